"""How bytes get to and from a server: TLS trust, connection reuse, deadlines and large reads."""

import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import httpcore
import httpx
import trio

from fsmount.errors import UsageError
from fsmount.registry.endpoint import Tls
from fsmount.registry.proxies import Proxies


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a server may stay silent, and how slow it may be, before it counts as gone."""

    connect_seconds: float = 10.0
    #: For the first byte of an answer, and for each further piece of it.
    stall_seconds: float = 30.0
    #: For a whole body: so long, and a second more for every KiB that comes. No download is too large,
    #: but a server that drips is dead.
    body_seconds: float = 60.0


class Transports:
    """A pool of connections for each way to reach servers: whom to trust, and through which proxy.

    HTTP/2 is left out on purpose: one loopback stream gave 79 MB/s against 236.
    httpx's own reading of the environment too: its NO_PROXY is not what users of Go programs expect.

    Ownership: `aclose` closes every connection.
    """

    def __init__(self, proxies: Proxies, *, network: httpx.AsyncBaseTransport | None = None) -> None:
        """network replaces all of them, for tests."""
        self._proxies = proxies
        self._network = network
        self._pools: dict[_Way, httpx.AsyncBaseTransport] = {}

    async def find(self, url: httpx.URL, tls: Tls) -> httpx.AsyncBaseTransport:
        """The pool for a URL. Raises: UsageError, naming a file of tls that cannot be used."""
        if self._network is not None:
            return self._network
        way = _Way(tls, _stamps(tls), self._proxies.proxy_for(url))
        if way not in self._pools:
            # In a thread: reading the system's store takes 25 ms.
            context = await trio.to_thread.run_sync(trusting, tls)
            if way not in self._pools:
                self._pools[way] = _Transport(context, way.proxy)
        return self._pools[way]

    async def aclose(self) -> None:
        pools = list(self._pools.values())
        self._pools.clear()
        for pool in [*pools, *([self._network] if self._network else [])]:
            await pool.aclose()


@dataclass(frozen=True, slots=True)
class _Way:
    tls: Tls
    #: Of the files: a renewed certificate is another way.
    stamps: tuple[tuple[int, int, int], ...]
    proxy: httpx.URL | None


def _stamps(tls: Tls) -> tuple[tuple[int, int, int], ...]:
    stamps = []
    for path in _files(tls):
        try:
            status = path.stat()
        except OSError:  # said when it is to be loaded
            stamps.append((0, 0, 0))
        else:
            stamps.append((status.st_mtime_ns, status.st_ino, status.st_size))
    return tuple(stamps)


def _files(tls: Tls) -> Iterator[Path]:
    yield from tls.authorities
    if tls.client is not None:
        yield tls.client.certificate
        if tls.client.key is not None:
            yield tls.client.key


def trusting(tls: Tls) -> ssl.SSLContext:
    """A context that trusts the system's store and what tls adds to it. Raises: UsageError, naming the file."""
    # httpx's default is certifi's list, which knows no company authority; SSL_CERT_FILE works with this one.
    context = ssl.create_default_context()
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    for path in tls.authorities:
        with _naming(path):
            context.load_verify_locations(cafile=path)
    if tls.client is not None:
        with _naming(tls.client.certificate):
            # A key with a passphrase would otherwise be asked for at the terminal.
            context.load_cert_chain(tls.client.certificate, tls.client.key, password=lambda: b"")
    return context


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or "it is no PEM file"
        raise UsageError(
            f"the certificate {path} cannot be used: {reason}",
            remedy="It must hold PEM, be readable, and belong to its key.",
        ) from None


class _Transport(httpx.AsyncHTTPTransport):
    """httpx's transport over a pool with our network backend, for which its constructor has no argument."""

    def __init__(self, context: ssl.SSLContext, proxy: httpx.URL | None) -> None:
        # No limit on connections: those who ask know how many they need, and waiting for a free
        # connection would look like a silent server.
        limits: _Limits = {
            "max_connections": None,
            "max_keepalive_connections": 16,
            "keepalive_expiry": 30.0,
            "http1": True,
            "http2": False,
            "network_backend": _LargeReads(),
        }
        if proxy is None:
            self._pool = httpcore.AsyncConnectionPool(ssl_context=context, **limits)
            return
        user = (proxy.username, proxy.password) if proxy.username or proxy.password else None
        self._pool = httpcore.AsyncHTTPProxy(
            proxy_url=httpcore.URL(
                scheme=proxy.raw_scheme, host=proxy.raw_host, port=proxy.port, target=b"/"
            ),
            proxy_auth=user,
            proxy_ssl_context=ssl.create_default_context() if proxy.scheme == "https" else None,
            ssl_context=context,
            **limits,
        )


class _Limits(TypedDict):
    max_connections: int | None
    max_keepalive_connections: int
    keepalive_expiry: float
    http1: bool
    http2: bool
    network_backend: httpcore.AsyncNetworkBackend


# httpcore asks for 64 KiB at a time, and TLS gives one record of 16 KiB; each piece costs a trip through h11
# and five generators. 400 MB from docker-registry 2.8 on loopback, two noisy cores, medians of five runs of
# two, MB/s (CPU s): 64 KiB 502-611 (0.55-0.73), 256 KiB 802-807 (0.37), 512 KiB 741-1009 (0.28-0.38),
# 1 MiB 823-879 (0.30). TLS: one record a piece 133-220 (1.9-2.1), all that has arrived 206-479 (0.9-1.35).
_READ_SIZE = 512 * 1024
_CLOSE_SECONDS = 5.0


class _LargeReads(httpcore.TrioBackend):
    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        stream = await super().connect_tcp(host, port, timeout, local_address, socket_options)
        return _LargeReadStream(stream)


class _LargeReadStream(httpcore.AsyncNetworkStream):
    """A stream whose every read may return more than was asked for, as httpcore's HTTP/1.1 allows."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._tls: ssl.SSLObject | None = stream.get_extra_info("ssl_object")

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = await self._stream.read(max(max_bytes, _READ_SIZE), timeout)
        return self._with_further_records(data) if data and self._tls else data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            return _LargeReadStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))
        except BaseException:
            # httpcore 1.0 closes it after an Exception, and forgets it when the handshake is cancelled.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_SECONDS):
                await self._stream.aclose()
            raise

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)

    def _with_further_records(self, data: bytes) -> bytes:
        """Appends the TLS records that have arrived whole; takes nothing from the network."""
        assert self._tls is not None
        parts, size = [data], len(data)
        while size < _READ_SIZE:
            try:
                part = self._tls.read(_READ_SIZE)
            except ssl.SSLError:  # nothing more has arrived; anything worse shows at the next read
                break
            if not part:
                break
            parts.append(part)
            size += len(part)
        return b"".join(parts)
