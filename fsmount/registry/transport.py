"""How bytes get to and from a server: TLS trust, connection reuse, deadlines and large reads."""

import ssl
from collections.abc import Iterable
from dataclasses import dataclass

import httpcore
import httpx
import trio


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a server may stay silent before it counts as gone. There is no limit on a whole download."""

    connect_seconds: float = 10.0
    #: For the first byte of an answer, and for each further piece of it.
    stall_seconds: float = 30.0


def new_transport() -> httpx.AsyncBaseTransport:
    """A pool of HTTP/1.1 connections that trusts what the system trusts.

    HTTP/2 is left out on purpose: one loopback stream gave 79 MB/s against 236 (codecs-and-cache.md).
    Environment proxies too: httpx's reading of NO_PROXY is not what users of Go programs expect.
    """
    # httpx's default is certifi's list, which knows no company authority; SSL_CERT_FILE works with this one.
    return _Transport(ssl.create_default_context())


class _Transport(httpx.AsyncHTTPTransport):
    """httpx's transport over a pool with our network backend, for which its constructor has no argument."""

    def __init__(self, context: ssl.SSLContext) -> None:
        # No limit on connections: those who ask know how many they need, and waiting for a free
        # connection would look like a silent server.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=None,
            max_keepalive_connections=16,
            keepalive_expiry=30.0,
            http1=True,
            http2=False,
            network_backend=_LargeReads(),
        )


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
