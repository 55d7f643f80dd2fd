"""The real transport, on loopback sockets: reads, TLS, and connections that are kept or closed."""

import gc
import ssl
from collections.abc import Iterable
from pathlib import Path

import httpcore
import httpx
import pytest
import trio
import trustme

from fsmount.errors import DeadlineExpired, Unreachable
from fsmount.oci.reference import Reference
from fsmount.registry.endpoint import Tls
from fsmount.registry.open import Sources
from fsmount.registry.proxies import Proxies
from fsmount.registry.retry import Retry
from fsmount.registry.transport import Timeouts, Transports, _LargeReads, _LargeReadStream
from tests.fakes.registry import FakeRegistry, cut, descriptor_of, served

ONCE = Retry(tries=1)
DATA = bytes(range(256)) * 4096


class Trickle(httpcore.AsyncNetworkStream):
    """Gives what it was made of, one piece a read, and remembers how much it was asked for."""

    def __init__(self, pieces: Iterable[bytes], tls: object = None) -> None:
        self.pieces = list(pieces)
        self.asked: list[int] = []
        self._tls = tls

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        await trio.lowlevel.checkpoint()
        self.asked.append(max_bytes)
        return self.pieces.pop(0) if self.pieces else b""

    def get_extra_info(self, info: str) -> object:
        return self._tls if info == "ssl_object" else None


class Records:
    """An SSLObject that has decoded some records, and then wants more, or fails."""

    def __init__(self, *records: bytes | Exception) -> None:
        self._records = list(records)

    def read(self, size: int) -> bytes:
        record = self._records.pop(0) if self._records else ssl.SSLWantReadError()
        if isinstance(record, Exception):
            raise record
        return record


async def test_a_read_may_return_more_than_the_64_kib_that_httpcore_asks_for() -> None:
    inner = Trickle([b"x"])
    assert await _LargeReadStream(inner).read(65536) == b"x"
    assert inner.asked[0] > 65536


async def test_records_of_tls_that_have_arrived_are_read_together() -> None:
    stream = _LargeReadStream(Trickle([b"a", b"d"], Records(b"b", b"c")))
    assert [await stream.read(65536) for _ in range(3)] == [b"abc", b"d", b""]


@pytest.mark.parametrize(
    "end", [ssl.SSLZeroReturnError(), ssl.SSLEOFError(), ssl.SSLError("bad record"), b""]
)
async def test_what_arrived_before_the_end_of_tls_is_not_lost(end: bytes | Exception) -> None:
    assert await _LargeReadStream(Trickle([b"a"], Records(b"b", end))).read(65536) == b"ab"


async def test_new_connections_read_that_way() -> None:
    transports = Transports(Proxies(https=httpx.URL("http://proxy.example:3128")))
    for url in ("http://r.example/", "https://r.example/"):
        transport = await transports.find(httpx.URL(url), Tls())
        assert isinstance(transport, httpx.AsyncHTTPTransport)
        assert isinstance(transport._pool._network_backend, _LargeReads)
    await transports.aclose()


@pytest.fixture
def fake() -> FakeRegistry:
    fake = FakeRegistry()
    fake.put_image("v1")
    fake.put_blob(DATA)
    return fake


@pytest.fixture
def certified() -> tuple[trustme.CA, ssl.SSLContext]:
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return authority, context


async def read_twice(sources: Sources, fake: FakeRegistry, host: str) -> None:
    source = sources.open(Reference(host, "team/web"))
    fake.then("GET", "/blobs/", cut(300_000))
    for start in (0, 1000):
        async with source.blob(descriptor_of(DATA), start=start) as pieces:
            assert b"".join([piece async for piece in pieces]) == DATA[start:]


async def test_a_registry_on_this_machine_may_speak_tls(
    fake: FakeRegistry,
    certified: tuple[trustme.CA, ssl.SSLContext],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authority, context = certified
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    async with served(fake, tls=context) as host, Sources() as sources:
        await read_twice(sources, fake, host)


async def test_a_registry_on_this_machine_may_speak_plain_http(fake: FakeRegistry) -> None:
    async with served(fake) as host, Sources() as sources:
        await read_twice(sources, fake, host)


async def test_a_certificate_that_nobody_vouches_for_is_named_and_neither_retried_nor_evaded(
    fake: FakeRegistry, certified: tuple[trustme.CA, ssl.SSLContext]
) -> None:
    _, context = certified
    async with served(fake, tls=context) as host, Sources() as sources:
        with pytest.raises(Unreachable, match="certificate is not trusted") as caught:
            await sources.open(Reference(host, "team/web")).resolve("v1")
    assert caught.value.remedy
    assert fake.requests == []


async def test_a_refused_connection_says_so() -> None:
    async with Sources(retry=ONCE) as sources:
        with pytest.raises(Unreachable, match=r"(?i)refused"):
            await sources.open(Reference("127.0.0.1:1", "team/web")).resolve("v1")


async def test_a_connection_is_kept_when_all_was_read(fake: FakeRegistry) -> None:
    async with served(fake) as host, Sources() as sources:
        source = sources.open(Reference(host, "team/web"))
        for _ in range(3):
            found = await source.resolve("v1")
            await source.manifest(found.digest)
            async with source.blob(descriptor_of(DATA)) as pieces:
                async for _ in pieces:
                    pass
        transport = await sources._transports.find(httpx.URL(f"http://{host}/"), Tls())
        assert isinstance(transport, httpx.AsyncHTTPTransport)
        assert len(transport._pool.connections) == 1


async def test_who_is_cancelled_while_tls_is_agreed_on_leaves_no_socket_behind() -> None:
    async def mute(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, mute, 0)
        host = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        async with Sources(timeouts=Timeouts(connect_seconds=0.05), retry=ONCE) as sources:
            source = sources.open(Reference(host, "team/web"))
            with pytest.raises(DeadlineExpired):
                await source.resolve("v1")
            for checkpoints in range(1, 30):
                async with trio.open_nursery() as inner:
                    inner.start_soon(source.resolve, "v1")
                    for _ in range(checkpoints):
                        await trio.lowlevel.checkpoint()
                    inner.cancel_scope.cancel()
        nursery.cancel_scope.cancel()
    gc.collect()  # a socket left open would warn, and a warning fails the test
