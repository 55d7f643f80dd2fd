"""What all repositories on a server share: how many requests it gets at once, what it says of pulls left, limits."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount.errors import Corrupt, FsmountError, NotFound, RateLimited, Unreachable
from fsmount.oci.digest import Digest
from fsmount.oci.reference import Reference
from fsmount.registry.hosts import Hosts
from fsmount.registry.open import Sources
from fsmount.registry.server import Asked, RateLimit
from fsmount.registry.source import Source
from fsmount.registry.wire import Limits
from tests.fakes.registry import (
    OCI_INDEX,
    FakeRegistry,
    Fixed,
    Handler,
    Network,
    Reply,
    Step,
    TokenServer,
    cut,
    descriptor_of,
    error,
    silent,
    stall,
)

HOST, MIRROR, AUTH = "registry.example", "mirror.example", "auth.example"
DATA = bytes(range(256)) * 20
BLOB = descriptor_of(DATA)


class World:
    """A registry, and how its client is set up."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fake = FakeRegistry(host=HOST)
        self.digest = Digest.parse(self.fake.put_image("v1", DATA))
        self.hosts: dict[str, Handler] = {HOST: self.fake}
        self.limits = Limits()

    @asynccontextmanager
    async def sources(self) -> AsyncIterator[Sources]:
        network = Network(self.hosts)
        async with Sources(
            hosts=Hosts(root=self.root, environ={}, home=self.root / "home"),
            credentials=Fixed(),
            limits=self.limits,
            transport=network.transport,
        ) as sources:
            yield sources
        assert network.open_bodies == 0

    @asynccontextmanager
    async def source(self, name: str = f"{HOST}/team/web") -> AsyncIterator[Source]:
        async with self.sources() as sources:
            yield sources.open(Reference.parse(name))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class Holders:
    """Tasks that each hold a blob open until they are told to leave."""

    def __init__(self, source: Source, nursery: trio.Nursery) -> None:
        self._source = source
        self._nursery = nursery
        self.open: list[trio.CancelScope] = []

    async def start(self, count: int, *, read: bool = False) -> None:
        """Returns when nothing more happens."""
        for _ in range(count):
            self._nursery.start_soon(self._hold, read)
        await wait_all_tasks_blocked()

    async def leave(self) -> None:
        self.open.pop(0).cancel()
        await wait_all_tasks_blocked()

    async def _hold(self, read: bool) -> None:
        with trio.CancelScope() as scope:
            async with self._source.blob(BLOB) as pieces:
                if read:
                    async for _ in pieces:
                        pass
                self.open.append(scope)
                await trio.sleep_forever()


# -------------------- how many requests at once


@pytest.mark.parametrize("limit", [32, 1, 3])
async def test_a_server_gets_so_many_requests_at_once_bodies_that_are_still_coming_included(
    world: World, limit: int
) -> None:
    world.limits = Limits() if limit == 32 else Limits(requests=limit)
    async with world.source() as source, trio.open_nursery() as nursery:
        holders = Holders(source, nursery)
        await holders.start(limit + 2)
        assert len(world.fake.requests) == len(holders.open) == limit
        await holders.leave()
        assert len(world.fake.requests) == limit + 1
        assert len(holders.open) == limit
        nursery.start_soon(source.resolve, "v1")
        await wait_all_tasks_blocked()
        assert world.fake.seen("HEAD") == []
        await holders.leave()
        await holders.leave()
        assert len(world.fake.seen("HEAD")) == 1
        nursery.cancel_scope.cancel()


async def test_a_body_that_was_read_to_its_end_makes_room_though_it_is_held(world: World) -> None:
    world.limits = Limits(requests=1)
    async with world.source() as source, trio.open_nursery() as nursery:
        holders = Holders(source, nursery)
        await holders.start(3, read=True)
        assert len(holders.open) == 3
        nursery.cancel_scope.cancel()


async def test_repositories_on_one_server_share_its_places_and_servers_do_not(world: World) -> None:
    world.limits = Limits(requests=1)
    world.hosts["other.example"] = FakeRegistry(tags=world.fake.tags, manifests=world.fake.manifests)
    async with world.sources() as sources, trio.open_nursery() as nursery:
        holders = Holders(sources.open(Reference(HOST, "team/web")), nursery)
        await holders.start(1)
        nursery.start_soon(sources.open(Reference(HOST, "team/api")).resolve, "v1")
        await sources.open(Reference("other.example", "team/web")).resolve("v1")
        await wait_all_tasks_blocked()
        assert world.fake.seen("HEAD") == []
        nursery.cancel_scope.cancel()


async def test_a_server_that_is_mirror_and_origin_is_one(world: World) -> None:
    world.limits = Limits(requests=1)
    folder = world.root / "etc/containerd/certs.d/mirrored.example"
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(f'[host."https://{HOST}"]\ncapabilities = ["pull", "resolve"]')
    async with world.sources() as sources, trio.open_nursery() as nursery:
        holders = Holders(sources.open(Reference(HOST, "team/web")), nursery)
        await holders.start(1)
        nursery.start_soon(sources.open(Reference("mirrored.example", "team/web")).resolve, "v1")
        await wait_all_tasks_blocked()
        assert world.fake.seen("HEAD") == []
        await holders.leave()
        assert len(world.fake.seen("HEAD")) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("where", ["waiting", "asked"])
async def test_who_is_cancelled_keeps_no_place(world: World, where: str) -> None:
    world.limits = Limits(requests=1)
    async with world.source() as source, trio.open_nursery() as nursery:
        holders = Holders(source, nursery)
        if where == "waiting":
            await holders.start(1)
        else:
            world.fake.then("GET", "blobs", silent)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(Holders(source, inner).start, 1)
                await wait_all_tasks_blocked(0.01)
                scope.cancel()
        if where == "waiting":
            await holders.leave()
        await source.resolve("v1")


async def _blob(source: Source) -> None:
    async with source.blob(BLOB, start=5) as pieces:
        async for _ in pieces:
            pass


async def _resolve(source: Source) -> None:
    await source.resolve("v1", known=Digest.of(b"known"))


async def _manifest(source: Source) -> None:
    await source.manifest(Digest.of(b"x"))


async def _tags(source: Source) -> None:
    await source.tags()


async def _referrers(source: Source) -> None:
    await source.referrers(Digest.of(b"x"))


STEPS: dict[str, Step] = {
    **{str(status): Reply(status, {}, b"x") for status in (200, 204, 304, 400, 401, 403, 404, 416, 429, 500)},
    "redirect": Reply(307, {"Location": f"https://{HOST}/v2/x"}, b"moved"),
    "redirect elsewhere": Reply(307, {"Location": "https://nobody.example/"}),
    "redirect to http": Reply(307, {"Location": "http://nobody.example/"}),
    "redirect to nowhere": Reply(307, {}, b"moved"),
    "challenge": Reply(401, {"WWW-Authenticate": 'Bearer realm="https://nobody.example/"'}),
    "compressed": lambda reply: reply.with_headers(Content_Encoding="gzip"),
    "wrong range": Reply(206, {"Content-Range": "bytes 1-2/3"}, b"12"),
    "cut": cut(1),
    "stall": stall(1),
    "silence": silent,
    "long": Reply(200, {}, b"x" * 5_000_000),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("operation", [_blob, _resolve, _manifest, _tags, _referrers])
async def test_whatever_comes_of_a_request_its_place_is_free_afterwards(
    world: World, operation: Callable[[Source], Awaitable[None]], step: str, autojump_clock: MockClock
) -> None:
    world.limits = Limits(requests=1)
    for method in ("GET", "HEAD"):
        world.fake.then(method, "", *[STEPS[step]] * 9)
    async with world.source() as source:
        with trio.fail_after(1000):
            with suppress(FsmountError):
                await operation(source)
            world.fake._script.clear()
            await source.resolve("v1")


async def test_tokens_need_no_place(world: World) -> None:
    world.limits = Limits(requests=1)
    server = TokenServer()
    world.hosts[AUTH] = server
    world.fake.challenge = f'Bearer realm="https://{AUTH}/token"'
    world.fake.admit = lambda authorization: authorization in server.valid
    async with world.source() as source:
        await source.resolve("v1")
        await source.tags()


# -------------------- the pulls that are left


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (
            {
                "ratelimit-limit": "200;w=21600",
                "ratelimit-remaining": "193;w=21600",
                "docker-ratelimit-source": "203.0.113.7",
            },
            RateLimit(limit=200, remaining=193, window_seconds=21600, source="203.0.113.7"),
        ),
        ({"RateLimit-Remaining": "0;w=60"}, RateLimit(None, 0, 60, None)),
        ({"RateLimit-Remaining": "17"}, RateLimit(None, 17, None, None)),
        ({"RateLimit-Remaining": "17", "RateLimit-Limit": "100;w=3600"}, RateLimit(100, 17, 3600, None)),
        ({"RateLimit-Remaining": " 17 ; w=60", "RateLimit-Limit": "many"}, RateLimit(None, 17, 60, None)),
        ({"RateLimit-Remaining": "many"}, None),
        ({"RateLimit-Remaining": "-1"}, None),
        ({"RateLimit-Remaining": ""}, None),
        ({"RateLimit-Limit": "200;w=21600"}, None),
        ({}, None),
    ],
)
async def test_what_a_server_says_of_the_pulls_that_are_left_is_kept_by_its_name(
    world: World, headers: dict[str, str], expected: RateLimit | None
) -> None:
    world.fake.then("HEAD", "manifests", lambda reply: Reply(200, {**reply.headers, **headers}, reply.body))
    async with world.sources() as sources:
        assert sources.rate_limits() == {}
        await sources.open(Reference(HOST, "team/web")).resolve("v1")
        assert sources.rate_limits() == ({HOST: expected} if expected else {})


async def test_the_latest_word_on_pulls_counts_and_silence_is_none(world: World) -> None:
    for remaining in ("9;w=60", "8;w=60"):
        world.fake.then(
            "GET", "manifests", lambda reply, r=remaining: reply.with_headers(RateLimit_Remaining=r)
        )
    async with world.sources() as sources:
        source = sources.open(Reference(HOST, "team/web"))
        for remaining in (9, 8, 8):
            await source.manifest(world.digest)
            assert sources.rate_limits()[HOST].remaining == remaining


async def test_a_429_says_it_too_and_docker_hub_goes_by_its_name(
    world: World, autojump_clock: MockClock
) -> None:
    world.hosts["registry-1.docker.io"] = world.fake
    world.fake.then("HEAD", "", *[Reply(429, {"RateLimit-Remaining": "0;w=21600"})] * 3)
    async with world.sources() as sources:
        with pytest.raises(RateLimited):
            await sources.open(Reference("docker.io", "library/web")).resolve("v1")
        assert sources.rate_limits() == {"docker.io": RateLimit(None, 0, 21600, None)}


# -------------------- what has not changed


async def test_a_tag_that_has_not_moved_is_told_by_304_without_a_body(world: World) -> None:
    world.fake.then("HEAD", "manifests/v1", Reply(304))
    async with world.source() as source:
        found = await source.resolve("v1", known=world.digest)
    assert (found.digest, found.size, found.media_type) == (world.digest, 0, "")
    (request,) = world.fake.requests
    assert request.headers["if-none-match"] == f'"{world.digest}"'


async def test_a_tag_that_has_moved_is_told_as_ever(world: World) -> None:
    known = Digest.of(b"before")
    async with world.source() as source:
        found = await source.resolve("v1", known=known)
        assert found.digest == world.digest
        assert found.size == len(world.fake.manifests[str(world.digest)][1])
        # Where GET has to tell, all of it is wanted.
        world.fake.then("HEAD", "", Reply(405))
        assert (await source.resolve("v1", known=known)).digest == world.digest
    assert [("if-none-match" in request.headers) for request in world.fake.requests] == [True, True, False]


async def test_a_304_that_was_not_asked_for_tells_nothing(world: World) -> None:
    world.fake.then("HEAD", "", Reply(304))
    async with world.source() as source:
        assert (await source.resolve("v1")).digest == world.digest
    assert ["if-none-match" in request.headers for request in world.fake.requests] == [False, False]


async def test_a_mirror_may_say_that_nothing_has_changed(world: World) -> None:
    folder = world.root / "etc/containerd/certs.d" / HOST
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(f'[host."https://{MIRROR}"]')
    mirror = world.hosts[MIRROR] = FakeRegistry()
    mirror.then("HEAD", "", Reply(304))
    async with world.source() as source:
        assert (await source.resolve("v1", known=world.digest)).digest == world.digest
    assert world.fake.requests == []


# -------------------- limits


async def test_how_large_a_manifest_may_be_is_configurable(world: World) -> None:
    large = Digest.parse(world.fake.put_manifest("large", b" " * 5 * 1024 * 1024))
    async with world.source() as source:
        with pytest.raises(Corrupt, match="more than 4194304 bytes"):
            await source.manifest(large)
    world.limits = Limits(manifest_bytes=5 * 1024 * 1024)
    async with world.source() as source:
        assert len((await source.manifest(large))[0]) == 5 * 1024 * 1024
    world.limits = Limits(manifest_bytes=len(world.fake.manifests[str(world.digest)][1]))
    async with world.source() as source:
        await source.manifest(world.digest)
    world.limits = Limits(manifest_bytes=world.limits.manifest_bytes - 1)
    async with world.source() as source:
        with pytest.raises(Corrupt, match="more than"):
            await source.manifest(world.digest)
        world.fake.then("GET", "referrers", Reply(200, {"Content-Type": OCI_INDEX}, b" " * 9999))
        with pytest.raises(Corrupt, match="more than"):
            await source.referrers(world.digest)


@pytest.mark.parametrize("limit", [99, 101])
async def test_how_large_a_token_may_be_is_configurable(world: World, limit: int) -> None:
    world.limits = Limits(token_bytes=limit)
    body = json.dumps({"token": "t" * 87}).encode()
    assert len(body) == 100
    world.hosts[AUTH] = lambda request: Reply(body=body)
    world.fake.challenge = f'Bearer realm="https://{AUTH}/token"'
    async with world.source() as source:
        if limit > 100:
            await source.resolve("v1")
        else:
            with pytest.raises(Corrupt, match="more than 99 bytes"):
                await source.resolve("v1")


@pytest.mark.parametrize("limit", [100, 10])
async def test_of_a_longer_error_than_configured_only_the_status_is_told(world: World, limit: int) -> None:
    world.limits = Limits(error_bytes=limit)
    world.fake.then("GET", "", error(404, "MANIFEST_UNKNOWN", "gone"))
    async with world.source() as source:
        with pytest.raises(NotFound, match="404") as caught:
            await source.manifest(Digest.of(b"x"))
    assert ("gone" in str(caught.value)) == (limit == 100)


async def test_how_long_a_connection_may_take_is_the_hosts_or_ours(world: World) -> None:
    folder = world.root / "etc/containerd/certs.d" / HOST
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(f'[host."https://{MIRROR}"]\ndial_timeout = "200ms"')
    seen: dict[str, object] = {}

    async def note(request: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        seen[request.url.host] = request.extensions["timeout"]["connect"]
        return httpx.Response(404)

    async with Sources(
        transport=httpx.MockTransport(note), hosts=Hosts(root=world.root, environ={}, home=world.root)
    ) as sources:
        with pytest.raises(NotFound):
            await sources.open(Reference(HOST, "team/web")).resolve("v1")
    assert seen == {MIRROR: 0.2, HOST: 10.0}


async def test_a_server_that_never_answers_is_given_up_after_three_tries(
    world: World, autojump_clock: MockClock
) -> None:
    world.fake.then("HEAD", "", *[silent] * 9)
    async with world.source() as source:
        with pytest.raises(Unreachable):
            await source.resolve("v1")
    assert len(world.fake.requests) == 3
    assert 3 * 40 <= trio.current_time() <= 3 * 40 + 3


# -------------------- what it was asked


async def test_requests_are_counted_by_server_and_further_tries_apart(
    world: World, mock_clock: MockClock
) -> None:
    mock_clock.autojump_threshold = 0
    async with world.sources() as sources:
        one, other = (sources.open(Reference.parse(f"{HOST}/{name}")) for name in ("team/web", "team/more"))
        assert sources.asked() == {}
        await one.resolve("v1")
        assert sources.asked() == {HOST: Asked(requests=1, retries=0)}
        world.fake.then("GET", "manifests/", error(503, "UNAVAILABLE"), error(503, "UNAVAILABLE"))
        await other.manifest(world.digest)
        assert sources.asked() == {HOST: Asked(requests=4, retries=2)}
