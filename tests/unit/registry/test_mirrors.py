"""A registry behind its mirrors: who is asked for what, who is believed, who is left alone."""

import base64
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount.errors import AccessDenied, FsmountError, NotFound, RateLimited, Unreachable
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor
from fsmount.oci.reference import Reference
from fsmount.registry.credentials import Credentials
from fsmount.registry.hosts import Hosts
from fsmount.registry.open import Sources
from fsmount.registry.referrers import Artifact, Referrers
from fsmount.registry.source import Source
from tests.fakes.registry import (
    FakeRegistry,
    Fixed,
    Handler,
    Network,
    Reply,
    Request,
    Step,
    TokenServer,
    basic,
    cut,
    descriptor_of,
    endless,
    error,
    silent,
    stall,
)

HOST, ONE, TWO = "registry.example", "one.example", "two.example"
DATA = bytes(range(256)) * 20
#: All that a mount's caller waits for, when it asks about names.
NAMES_SECONDS = 10
HOSTS = f'[host."https://{ONE}"]\n[host."https://{TWO}"]\n'
CONF = f"""
[[registry]]
location = "{HOST}"
[[registry.mirror]]
location = "{ONE}"
[[registry.mirror]]
location = "{TWO}"
"""


class Mirrored:
    """A registry and two mirrors that have the same, a folder for /etc, and what was asked of whom."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.origin, self.one, self.two = (FakeRegistry(host=host) for host in (HOST, ONE, TWO))
        self.all = (self.one, self.two, self.origin)
        self.requests: list[Request] = []
        self.credentials: Credentials = Fixed()
        #: Other hosts, and those that stand in for one of the three.
        self.others: dict[str, Handler] = {}
        for fake in self.all:
            fake.put_blob(DATA)
            self.digest = Digest.parse(fake.put_image("v1", b"layer"))
            self.config = descriptor_of(next(blob for blob in fake.blobs.values() if blob[:1] == b"{"))

    def write(self, text: str, path: str = f"etc/containerd/certs.d/{HOST}/hosts.toml") -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def log_in(self, users: Mapping[str, str]) -> None:
        """Keeps `user:password` by host."""
        auths = {host: {"auth": base64.b64encode(login.encode()).decode()} for host, login in users.items()}
        self.write(json.dumps({"auths": auths}), "auth.json")
        self.credentials = Credentials(environ={"REGISTRY_AUTH_FILE": str(self.root / "auth.json")})

    def everywhere(self, method: str, path: str, *steps: Step) -> None:
        for fake in self.all:
            fake.then(method, path, *steps)

    @asynccontextmanager
    async def sources(self) -> AsyncIterator[Sources]:
        hosts = {fake.host: self._noted(fake) for fake in self.all}
        network = Network(hosts | {host: self._noted(other) for host, other in self.others.items()})
        async with Sources(
            hosts=Hosts(root=self.root, environ={}, home=self.root / "home"),
            credentials=self.credentials,
            transport=network.transport,
        ) as sources:
            yield sources
        assert network.open_bodies == 0

    @asynccontextmanager
    async def source(self, name: str = f"{HOST}/team/web") -> AsyncIterator[Source]:
        async with self.sources() as sources:
            yield sources.open(Reference.parse(name))

    @property
    def order(self) -> list[str]:
        """The hosts that were asked, one after the other."""
        return [request.host for request in self.requests]

    @property
    def wanted(self) -> list[str]:
        """The same, without those whose front door was tried."""
        return [request.host for request in self.requests if request.path != "/v2/"]

    def _noted(self, handler: Handler) -> Handler:
        def note(request: Request) -> Reply:
            self.requests.append(request)
            return handler(request)

        return note


@pytest.fixture
def world(tmp_path: Path) -> Mirrored:
    """With two mirrors that may be asked for everything."""
    world = Mirrored(tmp_path)
    world.write(HOSTS)
    return world


async def read(source: Source, descriptor: Descriptor | None = None, start: int = 0) -> bytes:
    async with source.blob(descriptor or descriptor_of(DATA), start=start) as pieces:
        return b"".join([piece async for piece in pieces])


# -------------------- order


@pytest.mark.parametrize(
    ("path", "text", "name", "order"),
    [
        (f"etc/containerd/certs.d/{HOST}/hosts.toml", HOSTS, HOST, [ONE, TWO, HOST]),
        ("etc/containerd/certs.d/_default/hosts.toml", HOSTS, HOST, [ONE, TWO, HOST]),
        ("etc/containers/registries.conf", CONF, HOST, [ONE, TWO, HOST]),
        (
            "etc/docker/daemon.json",
            f'{{"registry-mirrors": ["https://{TWO}", "https://{ONE}"]}}',
            "docker.io",
            [TWO, ONE, "registry-1.docker.io"],
        ),
        ("etc/docker/daemon.json", "{}", HOST, [HOST]),
    ],
)
async def test_servers_are_asked_in_the_order_of_the_file_and_the_origin_at_last(
    tmp_path: Path, path: str, text: str, name: str, order: list[str]
) -> None:
    world = Mirrored(tmp_path)
    world.others["registry-1.docker.io"] = FakeRegistry()
    world.write(text, path)
    async with world.source(f"{name}/team/web") as source:
        for ask in (source.resolve("gone"), source.manifest(Digest.of(b"gone"))):
            world.requests.clear()
            with pytest.raises(NotFound):
                await ask
            assert world.order == order


async def test_the_first_that_has_it_is_the_last_to_be_asked(world: Mirrored) -> None:
    world.one.tags.clear()
    async with world.source() as source:
        assert (await source.resolve("v1")).digest == world.digest
        assert world.order == [ONE, TWO]
        await source.manifest(world.digest)
        assert await source.small_blob(world.config)
        assert await read(source, start=17) == DATA[17:]
        assert world.order[2:] == [ONE] * 3


async def test_a_mirror_that_is_added_while_the_program_runs_is_asked(tmp_path: Path) -> None:
    world = Mirrored(tmp_path)
    async with world.source() as source:
        await source.resolve("v1")
        world.write(HOSTS)
        await source.resolve("v1")
    assert world.order == [HOST, ONE]


async def test_the_server_that_an_administrator_puts_in_the_origins_place_is_the_origin(
    world: Mirrored,
) -> None:
    world.write(f'server = "https://{ONE}"\n[host."https://{TWO}"]')
    world.one.tags = {"v2": str(world.digest)}
    async with world.source() as source:
        assert await source.tags() == ["v2"]
        with pytest.raises(NotFound, match=ONE):
            await source.resolve("gone")
    assert world.order == [ONE, TWO, ONE]
    assert world.requests[0].query["ns"] == [HOST]


# -------------------- what a mirror does not give, the next one does

OPERATIONS: dict[str, tuple[str, Callable[[Source, Mirrored], Awaitable[object]]]] = {
    "resolve": ("manifests", lambda source, world: source.resolve("v1")),
    "manifest": ("manifests", lambda source, world: source.manifest(world.digest)),
    "blob": ("blobs", lambda source, world: read(source)),
    "range": ("blobs", lambda source, world: read(source, start=100)),
    "small blob": ("blobs", lambda source, world: source.small_blob(world.config)),
}
FAULTS: dict[str, Step] = {
    **{str(status): Reply(status) for status in (400, 401, 403, 404, 410, 416, 418, 429, 500, 502, 503, 504)},
    "404 of a blob": error(404, "BLOB_UNKNOWN"),
    "no content": Reply(204),
    "a redirect to http": Reply(307, {"Location": "http://elsewhere.example/"}),
    "a redirect to nobody": Reply(307, {"Location": "https://nobody.example/"}),
    "a redirect to nowhere": Reply(307),
    "a redirect in a circle": Reply(307, {"Location": "/v2/team/web/blobs/manifests/again"}),
    "a login that we cannot do": Reply(401, {"WWW-Authenticate": 'Basic realm="r"'}),
    "a token server that is not there": Reply(
        401, {"WWW-Authenticate": 'Bearer realm="https://nobody.example"'}
    ),
    "a long pause": Reply(429, {"Retry-After": "59"}),
    "silence": silent,
}
UNEXPLAINED = {"400", "403", "410", "416", "418", "no content", "a redirect to nowhere"}
#: Of the body, which an answer to HEAD has not.
BODY_FAULTS: dict[str, Step] = {
    "a body that breaks off": cut(0),
    "a body that breaks off later": cut(3),
    "a body that falls silent": stall(0),
    "compression": lambda reply: Reply(200, {"Content-Encoding": "gzip"}, gzip.compress(reply.body)),
    "another thing": lambda reply: replace(reply, body=reply.body[::-1]),
    "another length": lambda reply: replace(reply, body=reply.body[:-1]),
    "something longer": lambda reply: replace(reply, body=reply.body + b"\n"),
    "something endless": endless,
}
#: Of a layer only its end tells, and the caller knows: see `distrust`.
TOLD_AT_THE_END = {"another thing", "something endless"}


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        *[(operation, fault) for operation in OPERATIONS for fault in FAULTS],
        *[(operation, fault) for operation in ("manifest", "small blob") for fault in BODY_FAULTS],
        *[
            (name, fault)
            for name in ("blob", "range")
            for fault in BODY_FAULTS
            if fault not in TOLD_AT_THE_END
        ],
    ],
)
async def test_what_goes_wrong_at_a_mirror_goes_well_at_the_next(
    world: Mirrored, operation: str, fault: str, autojump_clock: MockClock
) -> None:
    path, ask = OPERATIONS[operation]
    step = (FAULTS | BODY_FAULTS)[fault]
    for mirror in (world.one, world.two):
        mirror.then("GET", path, *[step] * 9)
        mirror.then("HEAD", path, *[step] * 9)
    async with world.source() as source:
        result = await ask(source, world)
    if path == "blobs" and operation != "small blob":
        assert result == (DATA[100:] if operation == "range" else DATA)
    # Where HEAD does not tell, GET is asked; where a range is refused, the whole.
    order = world.wanted
    if operation == "resolve" and fault in UNEXPLAINED:
        assert order == [ONE, ONE, TWO, TWO, HOST]
    elif operation == "range" and fault == "400":
        assert order == [ONE, ONE, TWO, HOST]
    elif fault == "a redirect in a circle":
        assert order == [ONE] * 6 + [TWO] * 6 + [HOST]
    else:
        assert order == [ONE, TWO, HOST]


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_mirrors_that_are_not_there_are_passed_over(
    world: Mirrored, operation: str, autojump_clock: MockClock
) -> None:
    world.write(HOSTS.replace(ONE, "nobody.example").replace(TWO, "neither.example"))
    async with world.source() as source:
        await OPERATIONS[operation][1](source, world)
    assert world.order == [HOST]


@pytest.mark.parametrize("operation", ["resolve", "manifest"])
async def test_silent_mirrors_leave_the_origin_time_to_answer_within_what_a_mount_allows_for_names(
    world: Mirrored, operation: str, autojump_clock: MockClock
) -> None:
    for mirror in (world.one, world.two):
        mirror.then("HEAD", "", silent)
        mirror.then("GET", "", silent)
    async with world.source() as source:
        with trio.fail_after(NAMES_SECONDS):
            await OPERATIONS[operation][1](source, world)
        before = trio.current_time()
        await OPERATIONS[operation][1](source, world)
        assert trio.current_time() == before
    assert world.order == [ONE, TWO, HOST, HOST]


async def test_a_mirror_that_fails_is_not_waited_for(world: Mirrored, autojump_clock: MockClock) -> None:
    world.one.then("HEAD", "", *[Reply(429, {"Retry-After": "30"})] * 3)
    async with world.source() as source:
        before = trio.current_time()
        await source.resolve("v1")
        assert trio.current_time() == before
    assert world.order == [ONE, TWO]


async def test_the_origin_is_asked_again_where_a_mirror_is_not(
    world: Mirrored, autojump_clock: MockClock
) -> None:
    world.everywhere("HEAD", "", Reply(503))
    async with world.source() as source:
        await source.resolve("v1")
    assert world.order == [ONE, TWO, HOST, HOST]


# -------------------- only the origin is believed


@pytest.mark.parametrize(
    ("at_mirrors", "at_origin", "kind"),
    [
        (404, 404, NotFound),
        (404, 403, AccessDenied),
        (403, 404, NotFound),
        (404, 503, Unreachable),
        (403, 503, Unreachable),
        (401, 503, Unreachable),
        (404, 429, RateLimited),
        (503, 404, NotFound),
        (503, 429, RateLimited),
    ],
)
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_what_a_mirror_says_of_existence_and_access_is_not_what_the_caller_hears(
    world: Mirrored,
    operation: str,
    at_mirrors: int,
    at_origin: int,
    kind: type[FsmountError],
    autojump_clock: MockClock,
) -> None:
    for fake in world.all:
        status = at_origin if fake is world.origin else at_mirrors
        fake.then("GET", "", *[error(status, "SAID")] * 9)
        fake.then("HEAD", "", *[Reply(status)] * 9)
    async with world.source() as source:
        with pytest.raises(kind, match=HOST) as caught:
            await OPERATIONS[operation][1](source, world)
    assert type(caught.value) is kind
    assert ONE not in str(caught.value)


async def test_what_the_origin_does_not_have_is_not_asked_of_a_mirror_that_rests(
    world: Mirrored, autojump_clock: MockClock
) -> None:
    world.one.then("HEAD", "", Reply(503))
    world.two.tags.clear()
    world.origin.tags.clear()
    async with world.source() as source:
        for _ in range(2):
            with pytest.raises(NotFound):
                await source.resolve("v1")
    assert world.order == [ONE, TWO, HOST, TWO, HOST]


async def test_what_a_mirror_that_rests_does_not_have_is_as_unknown_as_if_it_had_not_been_asked(
    world: Mirrored, autojump_clock: MockClock
) -> None:
    world.write(f'[host."https://{ONE}"]')
    async with world.source() as source:
        await fail_once(world, source)
        world.one.tags.clear()
        world.origin.then("HEAD", "", *[Reply(503)] * 3)
        with pytest.raises(Unreachable, match=HOST):
            await source.resolve("v1")
    assert world.order == [HOST, HOST, HOST, ONE]


async def test_tags_and_referrers_are_asked_of_the_origin_alone(world: Mirrored) -> None:
    for mirror in (world.one, world.two):
        mirror.tags["stale"] = str(world.digest)
    world.origin.keeps_referrers = True
    async with world.source() as source:
        assert await source.tags() == ["v1"]
        assert await source.referrers(world.digest) == []
    assert world.order == [HOST, HOST]
    assert [request.query.get("ns") for request in world.requests] == [None, None]


async def test_mirrors_do_not_stand_in_for_the_origins_tags(
    world: Mirrored, autojump_clock: MockClock
) -> None:
    world.origin.then("GET", "tags", *[Reply(503)] * 9)
    async with world.source() as source:
        with pytest.raises(Unreachable):
            await source.tags()
    assert set(world.order) == {HOST}


# -------------------- capabilities


@pytest.mark.parametrize(
    ("capabilities", "for_tag", "for_digest", "for_blob"),
    [
        ('["resolve"]', ONE, TWO, TWO),
        ('["pull"]', TWO, ONE, ONE),
        ('["pull", "resolve"]', ONE, ONE, ONE),
        ('["push"]', TWO, TWO, TWO),
        ('["referrers"]', TWO, TWO, TWO),
    ],
)
async def test_a_mirror_is_asked_only_for_what_it_may_be_asked_for(
    world: Mirrored, capabilities: str, for_tag: str, for_digest: str, for_blob: str
) -> None:
    world.write(f'[host."https://{ONE}"]\ncapabilities = {capabilities}\n[host."https://{TWO}"]')
    async with world.source() as source:
        await source.resolve("v1")
        await source.resolve(str(world.digest))
        await source.manifest(world.digest)
        await read(source)
    assert world.order == [for_tag, for_digest, for_digest, for_blob]


@pytest.mark.parametrize(
    ("use", "for_tag", "for_digest"), [("digest-only", HOST, ONE), ("all", ONE, ONE), ("tag-only", ONE, ONE)]
)
async def test_so_is_one_of_registries_conf(tmp_path: Path, use: str, for_tag: str, for_digest: str) -> None:
    world = Mirrored(tmp_path)
    text = f'[[registry]]\nlocation="{HOST}"\n[[registry.mirror]]\nlocation="{ONE}"\npull-from-mirror="{use}"'
    world.write(text, "etc/containers/registries.conf")
    async with world.source() as source:
        await source.resolve("v1")
        await source.manifest(world.digest)
    assert world.order == [for_tag, for_digest]


async def test_where_no_server_may_be_asked_that_is_said(world: Mirrored) -> None:
    world.write(
        f'server = "https://{HOST}"\ncapabilities = ["pull"]\n[host."https://{ONE}"]\ncapabilities = ["push"]'
    )
    async with world.source() as source:
        with pytest.raises(Unreachable, match="no server may be asked") as caught:
            await source.resolve("v1")
        assert "hosts.toml" in str(caught.value.remedy)
        assert world.requests == []
        await source.manifest(world.digest)
    assert world.order == [HOST]


async def test_what_is_pushed_goes_to_the_origin_alone(world: Mirrored) -> None:
    manifest = {"schemaVersion": 2, "config": {"digest": str(Digest.of(b"{}"))}, "layers": []}
    data = json.dumps(manifest).encode()
    artifact = Artifact(data, "application/vnd.oci.image.manifest.v1+json", "a/b", {}, world.digest, [b"{}"])
    async with world.sources() as sources:
        remotes = await sources.remotes(Reference(HOST, "team/web"))
        (origin,) = (remote for remote in remotes if remote.endpoint.is_origin)
        await Referrers(origin, f"{HOST}/team/web").push(artifact)
    assert set(world.order) == {HOST}
    assert str(Digest.of(data)) in world.origin.manifests


# -------------------- ?ns=, headers and credentials


@pytest.mark.parametrize(
    ("domain", "origin", "sent"),
    [
        (HOST, HOST, f"ns={HOST}"),
        (f"{HOST}:5000", f"{HOST}:5000", f"ns={HOST}%3A5000"),
        ("docker.io", "registry-1.docker.io", "ns=docker.io"),
    ],
)
async def test_a_mirror_is_told_whose_repository_is_meant_and_the_origin_is_not(
    world: Mirrored, domain: str, origin: str, sent: str
) -> None:
    world.write(f'[host."https://{ONE}"]', f"etc/containerd/certs.d/{domain}/hosts.toml")
    world.others[origin] = world.origin
    async with world.source(f"{domain}/team/web") as source:
        world.one.then("HEAD", "manifests", Reply(404))
        world.one.then("GET", "manifests", Reply(404))
        world.one.then("GET", "blobs", Reply(404), Reply(404))
        await source.resolve("v1")
        await source.manifest(world.digest)
        await read(source)
        await read(source, start=1)
        await source.tags()
    assert world.order == [ONE, origin] * 4 + [origin]
    assert [request.raw_query for request in world.requests if request.host == ONE] == [sent] * 4
    assert {request.raw_query for request in world.requests if request.host == origin} == {"", "n=1000"}


async def test_a_mirror_of_registries_conf_has_the_repository_under_its_own_name(tmp_path: Path) -> None:
    world = Mirrored(tmp_path)
    world.write(CONF.replace(f'"{ONE}"', f'"{ONE}/cache/a"'), "etc/containers/registries.conf")
    async with world.source() as source:
        await source.resolve("v1")
    (request,) = world.requests
    assert (request.path, request.raw_query) == ("/v2/cache/a/team/web/manifests/v1", "")


async def test_the_headers_of_a_server_are_sent_to_it_and_to_nobody_else(
    world: Mirrored, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    world.write(
        f'[host."https://{ONE}"]\n[host."https://{ONE}".header]\nX-Token = "s3cret"\nX-List = ["a", "b"]'
    )
    cdn = world.others["cdn.example"] = FakeRegistry()
    cdn.put_blob(DATA)
    path = f"/v2/x/blobs/{descriptor_of(DATA).digest}"
    world.one.then("GET", "blobs", Reply(307, {"Location": f"https://cdn.example{path}"}))
    world.one.then("GET", "manifests", Reply(503))
    async with world.source() as source:
        await source.resolve("v1")
        await read(source)
        await source.manifest(world.digest)
        await source.tags()
    headers = {
        (request.host, request.headers.get("x-token"), request.headers.get("x-list"))
        for request in world.requests
    }
    assert headers == {(ONE, "s3cret", "a, b"), ("cdn.example", None, None), (HOST, None, None)}
    assert "s3cret" not in caplog.text


async def test_each_server_gets_the_credentials_that_are_kept_for_it(world: Mirrored) -> None:
    world.log_in({HOST: "me:origins", ONE: "me:ones"})
    for fake in world.all:
        fake.challenge = 'Basic realm="r"'
        fake.admit = lambda authorization: False
    world.origin.admit = lambda authorization: authorization == basic("me", "origins")
    async with world.source() as source:
        await source.resolve("v1")
    sent = [(request.host, request.headers.get("authorization")) for request in world.requests]
    assert sent == [
        (ONE, None),
        (ONE, basic("me", "ones")),
        (TWO, None),
        (HOST, None),
        (HOST, basic("me", "origins")),
    ]


async def test_a_mirror_without_credentials_of_its_own_gets_an_anonymous_token(world: Mirrored) -> None:
    world.log_in({HOST: "me:origins"})
    server = world.others["auth.example"] = TokenServer()
    world.one.challenge = 'Bearer realm="https://auth.example/token",service="s"'
    world.one.admit = lambda authorization: authorization in server.valid
    async with world.source() as source:
        await source.resolve("v1")
    assert world.order == [ONE, "auth.example", ONE]
    assert "authorization" not in server.requests[0].headers
    assert "account" not in server.requests[0].query


# -------------------- a mirror that failed rests


async def fail_once(world: Mirrored, source: Source) -> None:
    """After it, the first mirror rests."""
    world.one.then("HEAD", "manifests", Reply(503))
    await source.resolve("v1")
    world.requests.clear()


async def test_a_mirror_that_failed_is_asked_after_those_that_work(
    world: Mirrored, autojump_clock: MockClock
) -> None:
    async with world.source() as source:
        await fail_once(world, source)
        await source.resolve("v1")
        await trio.sleep(14)
        await source.resolve("v1")
        assert world.order == [TWO, TWO]
        for fake in (world.two, world.origin):
            fake.then("HEAD", "", *[Reply(503)] * 3)
        await source.resolve("v1")
        assert world.order[2:] == [TWO, HOST, HOST, HOST, ONE]


async def test_a_mirror_that_has_rested_is_asked_at_its_front_door_and_then_first_again(
    world: Mirrored, autojump_clock: MockClock
) -> None:
    async with world.source() as source:
        await fail_once(world, source)
        await trio.sleep(16)
        assert world.requests == []  # nobody asks where nothing is wanted
        await source.resolve("v1")
        await wait_all_tasks_blocked()
        asked = sorted((request.host, request.method, request.path) for request in world.requests)
        assert asked == [(ONE, "GET", "/v2/"), (TWO, "HEAD", "/v2/team/web/manifests/v1")]
        await source.resolve("v1")
        assert world.order[2:] == [ONE]


async def test_nobody_waits_for_the_probe_and_there_is_one_at_a_time(
    world: Mirrored, autojump_clock: MockClock
) -> None:
    world.one.then("GET", "/v2/$", *[silent] * 9)
    async with world.source() as source:
        await fail_once(world, source)
        await trio.sleep(16)
        before = trio.current_time()
        for _ in range(5):
            await source.resolve("v1")
        assert trio.current_time() == before
        assert world.order.count(ONE) == 1


async def test_whoever_leaves_does_not_wait_for_a_probe(world: Mirrored, autojump_clock: MockClock) -> None:
    world.one.then("GET", "/v2/$", silent)
    async with world.source() as source:
        await fail_once(world, source)
        await trio.sleep(16)
        before = trio.current_time()
        await source.resolve("v1")
        await wait_all_tasks_blocked()
    assert ONE in world.order
    assert trio.current_time() == before


@pytest.mark.parametrize("answer", [Reply(401), Reply(404), Reply(200, {}, b"{}"), Reply(301)])
async def test_a_probe_may_be_answered_with_anything(
    world: Mirrored, autojump_clock: MockClock, answer: Reply
) -> None:
    world.one.then("GET", "/v2/$", answer)
    async with world.source() as source:
        await fail_once(world, source)
        await trio.sleep(16)
        await source.resolve("v1")
        await wait_all_tasks_blocked()
        await source.resolve("v1")
        assert world.order[-1] == ONE


@pytest.mark.parametrize("answer", [Reply(500), Reply(502), Reply(503), Reply(429)])
async def test_but_not_with_what_counts_as_a_failure_elsewhere(
    world: Mirrored, autojump_clock: MockClock, answer: Reply
) -> None:
    world.one.then("GET", "/v2/$", answer)
    async with world.source() as source:
        await fail_once(world, source)
        await trio.sleep(16)
        await source.resolve("v1")
        await wait_all_tasks_blocked()
        await source.resolve("v1")
        assert world.order[-1] == TWO


async def test_each_probe_that_fails_doubles_the_rest_up_to_five_minutes(
    world: Mirrored, autojump_clock: MockClock
) -> None:
    world.one.then("GET", "/v2/$", *[Reply(503)] * 99)
    async with world.source() as source:
        await fail_once(world, source)
        probed = []
        began = trio.current_time()
        while len(probed) < 7:
            await trio.sleep(1)
            count = world.order.count(ONE)
            await source.resolve("v1")
            await wait_all_tasks_blocked()
            if world.order.count(ONE) > count:
                probed.append(trio.current_time())
    rests = [after - before for before, after in zip([began, *probed], probed, strict=False)]
    assert rests == [15, 30, 60, 120, 240, 300, 300]


async def test_requests_that_fail_together_are_one_failure(
    world: Mirrored, autojump_clock: MockClock
) -> None:
    world.one.then("HEAD", "manifests", *[Reply(503, delay_seconds=1)] * 10)
    async with world.source() as source:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(source.resolve, "v1")
        world.requests.clear()
        await trio.sleep(16)
        await source.resolve("v1")
        await wait_all_tasks_blocked()
        assert sorted(world.order) == [ONE, TWO]


async def test_what_rests_for_one_repository_rests_for_all(
    world: Mirrored, autojump_clock: MockClock
) -> None:
    async with world.sources() as sources:
        web, api = (sources.open(Reference(HOST, name)) for name in ("team/web", "team/api"))
        await fail_once(world, web)
        await api.resolve("v1")
    assert world.order == [TWO]


async def test_a_registry_without_mirrors_is_not_probed(tmp_path: Path, autojump_clock: MockClock) -> None:
    world = Mirrored(tmp_path)
    world.origin.then("HEAD", "", *[Reply(503)] * 3)
    async with world.source() as source:
        with pytest.raises(Unreachable):
            await source.resolve("v1")
        await trio.sleep(16)
        await source.resolve("v1")
        await wait_all_tasks_blocked()
    assert world.order == [HOST] * 4


# -------------------- bodies that break off, and mirrors that send something else


@pytest.mark.parametrize("step", [cut(1500), stall(1500)])
@pytest.mark.parametrize("start", [0, 100])
async def test_a_body_that_breaks_off_goes_on_at_the_next_server_from_the_last_good_byte(
    world: Mirrored, autojump_clock: MockClock, step: Step, start: int
) -> None:
    world.one.then("GET", "blobs", step)
    async with world.source() as source:
        assert await read(source, start=start) == DATA[start:]
        await read(source)
    assert world.order == [ONE, TWO, TWO]
    assert world.requests[1].headers["range"] == f"bytes={start + 1500}-{len(DATA) - 1}"


async def test_a_body_that_breaks_off_everywhere_goes_around(
    world: Mirrored, autojump_clock: MockClock
) -> None:
    world.everywhere("GET", "blobs", *[cut(1000)] * 9)
    async with world.source() as source:
        assert await read(source) == DATA
    assert world.order[:3] == [ONE, TWO, HOST]
    assert len(world.order) == 6


async def test_bodies_that_bring_nothing_anywhere_come_to_an_end(
    world: Mirrored, autojump_clock: MockClock
) -> None:
    world.everywhere("GET", "blobs", *[cut(0)] * 9)
    async with world.source() as source:
        with pytest.raises(Unreachable):
            await read(source)
    assert world.order == [ONE, TWO, HOST]


async def test_a_body_whose_reader_leaves_says_nothing_about_the_mirror(world: Mirrored) -> None:
    async with world.source() as source:
        async with source.blob(descriptor_of(DATA)) as pieces:
            await anext(pieces)
        with trio.CancelScope() as scope:
            async with source.blob(descriptor_of(DATA)) as pieces:
                await anext(pieces)
                scope.cancel()
                await anext(pieces)
        await read(source)
    assert world.order == [ONE] * 3


async def test_who_sent_something_else_is_not_asked_for_it_again_but_for_other_blobs(
    world: Mirrored, caplog: pytest.LogCaptureFixture
) -> None:
    blob, other = descriptor_of(DATA), world.config
    async with world.source() as source:
        assert not source.distrust(blob)  # nobody has sent it yet
        for sender, others in ((ONE, True), (TWO, True), (HOST, False), (HOST, False)):
            world.requests.clear()
            await read(source, blob)
            assert world.order == [sender]
            assert source.distrust(blob) is others
        await read(source, other)
        assert world.order[-1] == ONE
    assert caplog.text.count("was something else") == 2


async def test_a_file_that_is_touched_ends_no_distrust(world: Mirrored) -> None:
    async with world.source() as source:
        await read(source)
        source.distrust(descriptor_of(DATA))
        world.write(f"{HOSTS}# touched")
        await read(source)
    assert world.order == [ONE, TWO]
