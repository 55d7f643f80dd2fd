"""Blobs that a registry keeps elsewhere, under addresses that are secrets and expire."""

import base64
import json
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import trio
from trio.testing import MockClock

from fsmount.errors import AccessDenied, Corrupt, FsmountError, NotFound, Refused, Unreachable
from fsmount.oci.digest import Digest
from fsmount.oci.reference import Reference
from fsmount.registry import signed
from fsmount.registry.credentials import Credentials
from fsmount.registry.endpoint import Tls
from fsmount.registry.hosts import Hosts
from fsmount.registry.open import Sources
from fsmount.registry.signed import SignedUrls
from fsmount.registry.source import Source
from tests.fakes.registry import (
    FakeRegistry,
    Handler,
    Network,
    Reply,
    Request,
    Step,
    basic,
    cut,
    descriptor_of,
    endless,
    error,
    unchanged,
)

HOST, CDN = "registry.example", "cdn.example"
DATA = bytes(range(256)) * 20
PATH = "/v2/x/blobs"
#: Nothing of it may be decoded, sorted or left out.
QUERY = "sig=s3cret%2Bb%20c+d%2f&b=%E2%82%AC&a=1&empty=&flag&a=0"


class Store:
    """A registry that redirects to a store for its blobs, and what was asked of both."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.registry, self.cdn = FakeRegistry(host=HOST), FakeRegistry(host=CDN)
        self.digest = Digest.parse(self.registry.put_image("v1", DATA))
        self.cdn.blobs = self.registry.blobs
        self.location = f"https://{CDN}{PATH}/{{digest}}?{QUERY}"
        self.hosts: dict[str, Handler] = {HOST: self._redirecting, CDN: self.cdn}

    @asynccontextmanager
    async def source(self) -> AsyncIterator[Source]:
        async with self.sources() as sources:
            yield sources.open(Reference(HOST, "team/web"))

    @asynccontextmanager
    async def sources(self) -> AsyncIterator[Sources]:
        network = Network(self.hosts)
        async with Sources(
            hosts=Hosts(root=self.root, environ={}, home=self.root / "home"),
            credentials=Credentials(environ={"REGISTRY_AUTH_FILE": str(self.root / "auth.json")}),
            transport=network.transport,
        ) as sources:
            yield sources
        assert network.open_bodies == 0

    def known(self, *steps: Step) -> None:
        """What the store answers once its address is known."""
        self.cdn.then("GET", "blobs", unchanged, *steps)

    @property
    def asked(self) -> tuple[int, int]:
        """How often the registry was asked for blobs, and how often the store."""
        return len(self.registry.seen("GET", "/blobs/")), len(self.cdn.requests)

    def _redirecting(self, request: Request) -> Reply:
        reply = self.registry(request)
        if "/blobs/" not in request.path or reply.status not in (200, 206):
            return reply
        digest = request.path.rpartition("/")[2]
        return Reply(307, {"Location": self.location.format(digest=digest)}, b"moved")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def redirected(location: str) -> Reply:
    return Reply(302, {"Location": location})


async def read(source: Source, data: bytes = DATA, start: int = 0) -> bytes:
    async with source.blob(descriptor_of(data), start=start) as pieces:
        return b"".join([piece async for piece in pieces])


# -------------------- how long an address is good

NOW = datetime(2020, 3, 29, 0, 59, 30, tzinfo=UTC)


def ago(seconds: int) -> str:
    return (NOW - timedelta(seconds=seconds)).strftime("%Y%m%dT%H%M%SZ")


def at(seconds: int) -> datetime:
    return NOW + timedelta(seconds=seconds)


def iso(seconds: int, form: str = "%Y-%m-%dT%H:%M:%SZ") -> str:
    return at(seconds).strftime(form).replace("+", "%2B").replace(":", "%3A")


def epoch(seconds: int) -> int:
    return int(at(seconds).timestamp())


@pytest.mark.parametrize(
    ("query", "seconds"),
    [
        (f"X-Amz-Date={ago(0)}&X-Amz-Expires=1200&X-Amz-Signature=x", 1140),
        (f"X-Amz-Expires=1200&X-Amz-Date={ago(600)}", 540),
        (f"x-amz-date={ago(0)}&x-amz-expires=1200", 1140),
        (f"X-Goog-Date={ago(0)}&X-Goog-Expires=900", 840),
        (f"sv=2021&se={iso(900)}&sig=a%2Bb", 840),
        (f"se={iso(900, '%Y-%m-%dT%H:%M:%S+00:00')}", 840),
        (f"se={iso(900, '%Y-%m-%dT%H:%M:%S')}", 840),
        (f"se={iso(900 + 7200, '%Y-%m-%dT%H:%M:%S+02:00')}", 840),
        (f"Expires={epoch(600)}&Signature=x&Key-Pair-Id=y", 540),
        (f"Expires={epoch(36000)}", 3600),
        (f"X-Amz-Date={ago(0)}&X-Amz-Expires=604800", 3600),
        ("", 300),
        ("token=opaque", 300),
        ("X-Amz-Date=yesterday&X-Amz-Expires=1200", 300),
        (f"X-Amz-Date={ago(0)}", 300),
        (f"X-Amz-Date={ago(0)}&X-Amz-Expires=soon", 300),
        (f"X-Amz-Date={ago(0)}&X-Amz-Expires={'9' * 30}", 300),
        ("se=tomorrow", 300),
        ("Expires=never", 300),
        (f"X-Amz-Date={ago(1200)}&X-Amz-Expires=1200", -60),
        (f"se={iso(55)}", -5),
        (f"Expires={epoch(55)}", -5),
        (f"Expires={'9' * 30}", 300),
        (f"Expires=-{'9' * 12}", 300),
    ],
)
def test_an_address_is_good_for_as_long_as_its_query_says_but_a_minute(query: str, seconds: float) -> None:
    assert signed._life_seconds(httpx.URL(f"https://{CDN}/x?{query}"), NOW) == seconds


def test_an_address_is_known_until_its_time_has_passed() -> None:
    urls, url = SignedUrls(), httpx.URL(f"https://{CDN}/x")
    urls.keep("path", url, 1000.0)
    assert urls.find("other", 1000.0) is None
    assert urls.find("path", 1299.9) == url
    assert urls.find("path", 1300.0) is None
    assert urls.find("path", 1000.0) is None
    urls.keep("path", url, 2000.0)
    urls.drop("path")
    urls.drop("path")
    assert urls.find("path", 2000.0) is None


@pytest.mark.parametrize(
    "query", [f"X-Amz-Date={ago(0)}&X-Amz-Expires=50", f"se={iso(0)}", "Expires=0", f"Expires={epoch(0)}"]
)
def test_an_address_that_has_expired_is_not_kept(query: str) -> None:
    urls = SignedUrls()
    urls.keep("path", httpx.URL(f"https://{CDN}/x?{query}"), 1000.0)
    assert urls.find("path", 1000.0) is None


def test_the_oldest_address_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signed, "_MOST", 3)
    urls, url = SignedUrls(), httpx.URL(f"https://{CDN}/x")
    for path in ("a", "b", "c", "a", "d"):
        urls.keep(path, url, 0.0)
    assert [path for path in "abcd" if urls.find(path, 0.0)] == ["a", "c", "d"]


# -------------------- an address that is known


async def test_a_known_address_is_asked_directly_with_the_range(store: Store) -> None:
    async with store.source() as source:
        assert await read(source) == DATA
        assert await read(source, start=100) == DATA[100:]
        assert await read(source, start=200) == DATA[200:]
    assert store.asked == (1, 3)
    end = len(DATA) - 1
    ranges = [request.headers.get("range") for request in store.cdn.requests]
    assert ranges == [None, f"bytes=100-{end}", f"bytes=200-{end}"]


async def test_the_query_is_sent_byte_for_byte(store: Store) -> None:
    async with store.source() as source:
        await read(source)
        await read(source)
    assert [request.raw_query for request in store.cdn.requests] == [QUERY, QUERY]


async def test_the_store_sees_neither_credentials_nor_headers_that_are_for_the_registry(
    store: Store,
) -> None:
    store.registry.challenge = 'Basic realm="r"'
    store.registry.admit = lambda authorization: authorization == basic("me", "pa:ss")
    auth = base64.b64encode(b"me:pa:ss").decode()
    (store.root / "auth.json").write_text(json.dumps({"auths": {HOST: {"auth": auth}}}))
    folder = store.root / "etc/containerd/certs.d" / HOST
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(f'server = "https://{HOST}"\n[header]\nX-Corporation = "us"')
    async with store.source() as source:
        for start in (0, 1, 2):
            await read(source, start=start)
    assert store.registry.requests[-1].headers["authorization"] == basic("me", "pa:ss")
    assert store.registry.requests[-1].headers["x-corporation"] == "us"
    expected = {"host", "user-agent", "accept-encoding"}
    seen = [set(request.headers) for request in store.cdn.requests]
    assert seen == [expected, expected | {"range"}, expected | {"range"}]


async def test_the_store_is_trusted_as_the_registry_is_and_sees_no_certificate_of_ours(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.root / "etc/containerd/certs.d" / HOST
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(f'server = "https://{HOST}"\nca = "ca.pem"\nclient = "me.pem"')
    ways: list[tuple[str, Tls]] = []
    async with store.sources() as sources:
        find = sources._transports.find

        def note(url: httpx.URL, tls: Tls) -> httpx.AsyncBaseTransport:
            ways.append((url.host, tls))
            return find(url, tls)

        monkeypatch.setattr(sources._transports, "find", note)
        for _ in range(2):
            await read(sources.open(Reference(HOST, "team/web")))
    assert [host for host, _ in ways] == [HOST, CDN, CDN]
    assert {tls.authorities for _, tls in ways} == {(folder / "ca.pem",)}
    assert [tls.client is not None for _, tls in ways] == [True, False, False]


async def test_when_its_time_has_passed_the_registry_is_asked_again(
    store: Store, autojump_clock: MockClock
) -> None:
    async with store.source() as source:
        await read(source)
        await trio.sleep(299)
        await read(source)
        assert store.asked == (1, 2)
        await trio.sleep(2)
        await read(source)
        assert store.asked == (2, 3)


async def test_each_blob_has_an_address_of_its_own(store: Store) -> None:
    store.registry.put_blob(b"other")
    async with store.source() as source:
        for data in (DATA, b"other") * 2:
            assert await read(source, data) == data
    assert store.asked == (2, 4)


async def test_a_body_that_breaks_off_goes_on_at_the_known_address(
    store: Store, autojump_clock: MockClock
) -> None:
    store.cdn.then("GET", "", cut(1500))
    async with store.source() as source:
        assert await read(source) == DATA
    assert store.asked == (1, 2)
    assert store.cdn.requests[1].headers["range"] == f"bytes=1500-{len(DATA) - 1}"


async def test_of_several_redirects_the_last_address_is_kept(store: Store) -> None:
    far = store.hosts["far.example"] = FakeRegistry(host="far.example", blobs=store.registry.blobs)
    further = f"https://far.example{PATH}/{descriptor_of(DATA).digest}?{QUERY}"
    store.cdn.then("GET", "", Reply(302, {"Location": further}))
    async with store.source() as source:
        await read(source)
        await read(source)
    assert store.asked == (1, 1)
    assert [request.raw_query for request in far.requests] == [QUERY, QUERY]


async def test_a_redirect_within_the_registry_is_followed_anew_each_time(store: Store) -> None:
    store.registry.then("GET", "/team/web/blobs/", *[Reply(307, {"Location": "/v2/moved/blobs/x"})] * 2)
    store.registry.then("GET", "/moved/", *[Reply(200, {}, DATA)] * 2)
    redirecting = Network({HOST: store.registry})
    async with Sources(transport=redirecting.transport) as sources:
        for _ in range(2):
            assert await read(sources.open(Reference(HOST, "team/web"))) == DATA
    paths = [request.path.split("/")[2] for request in store.registry.requests]
    assert paths == ["team", "moved", "team", "moved"]


async def test_only_blobs_are_asked_for_at_a_known_address(store: Store) -> None:
    path = f"/v2/x/manifests/{store.digest}"
    store.cdn.manifests = store.registry.manifests
    store.registry.then("GET", "manifests", *[Reply(307, {"Location": f"https://{CDN}{path}"})] * 2)
    async with store.source() as source:
        for _ in range(2):
            await source.manifest(store.digest)
    assert len(store.registry.requests) == 2


async def test_an_address_is_for_reading_alone(store: Store) -> None:
    """Whether a blob is there the registry knows; what was signed for GET is refused for HEAD."""
    async with store.sources() as sources:
        reference = Reference(HOST, "team/web")
        await read(sources.open(reference))
        (remote,) = await sources.remotes(reference)
        answer = await remote.send("HEAD", f"blobs/{descriptor_of(DATA).digest}", "the blob", stay=True)
        await answer.aclose()
    assert store.asked == (1, 1)
    assert len(store.registry.seen("HEAD", "/blobs/")) == 1


# -------------------- an address that is refused


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
async def test_a_refused_address_is_replaced_once_by_asking_the_registry(store: Store, status: int) -> None:
    store.known(error(status, "EXPIRED"))
    async with store.source() as source:
        await read(source)
        assert await read(source, start=100) == DATA[100:]
        assert store.asked == (2, 3)
        assert store.registry.requests[-1].headers["range"] == store.cdn.requests[-1].headers["range"]
        await read(source)
        assert store.asked == (2, 4)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, Unreachable), (401, AccessDenied), (403, AccessDenied), (404, NotFound), (410, Unreachable)],
)
async def test_a_second_refusal_is_the_answer(store: Store, status: int, kind: type[FsmountError]) -> None:
    store.known(*[Reply(status, {}, b"<Error>s3cret</Error>")] * 2)
    async with store.source() as source:
        await read(source)
        with pytest.raises(kind):
            await read(source)
        assert store.asked == (2, 3)
        await read(source)
        assert store.asked == (3, 4)


async def test_what_a_store_refuses_at_once_is_not_asked_for_again(store: Store) -> None:
    store.cdn.then("GET", "", Reply(403))
    async with store.source() as source:
        with pytest.raises(AccessDenied):
            await read(source)
    assert store.asked == (1, 1)


@pytest.mark.parametrize("step", [redirected("/login"), redirected("https://new.example/"), Reply(307)])
async def test_an_address_that_leads_elsewhere_now_is_replaced(store: Store, step: Step) -> None:
    store.known(step)
    async with store.source() as source:
        await read(source)
        assert await read(source) == DATA
    assert store.asked == (2, 3)


async def test_an_address_whose_server_is_gone_is_replaced(store: Store, autojump_clock: MockClock) -> None:
    store.hosts["gone.example"] = FakeRegistry(blobs=store.registry.blobs)
    location, store.location = store.location, store.location.replace(CDN, "gone.example")
    async with store.source() as source:
        await read(source)
        store.location = location
        del store.hosts["gone.example"]
        assert await read(source) == DATA
    assert store.asked == (2, 1)


async def test_an_error_that_passes_is_waited_for_at_the_known_address(
    store: Store, autojump_clock: MockClock
) -> None:
    store.known(Reply(503))
    async with store.source() as source:
        await read(source)
        await read(source)
    assert store.asked[1] == 3


# -------------------- what nobody gets to see


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (Reply(403), AccessDenied),
        (Reply(404, {}, b"<Error>s3cret</Error>"), NotFound),
        (Reply(500), Unreachable),
        (cut(0), Unreachable),
        (endless, Corrupt),
        (lambda reply: reply.with_headers(Content_Encoding="gzip"), Corrupt),
        (redirected("http://cdn.example/?sig=s3cret"), Refused),
        (redirected("https://cdn.example:x/?sig=s3cret"), Unreachable),
        (redirected("https://nobody.example/?sig=s3cret"), Unreachable),
        (redirected("https://me:s3cret@cdn.example/"), Refused),
    ],
)
async def test_the_query_of_an_address_shows_in_no_message_traceback_or_log(
    store: Store,
    step: Step,
    kind: type[FsmountError],
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(0)
    store.known(*[step] * 9)
    async with store.source() as source:
        await read(source)
        with pytest.raises(kind) as caught:
            await read(source)
    shown = [str(caught.value), repr(caught.value), caplog.text]
    shown += traceback.format_exception(caught.value)
    assert "s3cret" not in "".join(shown)
