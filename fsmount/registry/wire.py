"""One HTTP request and its answer, once: no retries, no redirects, no authentication, but always a deadline."""

import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

import httpx
import trio

from fsmount import __version__
from fsmount.errors import Corrupt, FsmountError, Unreachable
from fsmount.registry import failures
from fsmount.registry.endpoint import Tls
from fsmount.registry.retry import Again
from fsmount.registry.transport import Timeouts, Transports
from fsmount.registry.urls import shown

#: A body slower than this is no body; it has `Timeouts.body_seconds` to begin with.
LEAST_BYTES_A_SECOND = 1024
_CLOSE_SECONDS = 5.0
# A body would be useless compressed: offsets and digests are of the content.
_SYSTEM = Tls()
_HEADERS = {"User-Agent": f"fsmount/{__version__}", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a server may make us hold, and how many requests it gets at once."""

    #: 4 MiB is what every registry must accept, and clients may refuse to exceed.
    manifest_bytes: int = 4 * 1024 * 1024
    token_bytes: int = 64 * 1024
    #: Of an error: what is longer has no more to say.
    error_bytes: int = 64 * 1024
    #: To one server, bodies that are still coming included.
    requests: int = 32


class Answer:
    """A status, headers, and a body that arrives as it is iterated over; each piece has a deadline.

    Ownership: whoever has it closes it. A body read to its end leaves the connection for the next request.
    """

    def __init__(self, response: httpx.Response, url: httpx.URL, timeouts: Timeouts, limits: Limits) -> None:
        self.url = url
        self.status = response.status_code
        self.headers = response.headers
        self._response = response
        self._pieces = response.aiter_raw()
        self._stall_seconds = timeouts.stall_seconds
        self._until = trio.current_time() + timeouts.body_seconds
        self._error_bytes = limits.error_bytes
        self._on_close: Callable[[], None] | None = None
        self._on_break: Callable[[], None] = lambda: None
        #: What `load` or `settle` took.
        self.body = b""

    @property
    def length(self) -> int | None:
        """The length of the body as announced; None if it was not."""
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None

    @property
    def next_page(self) -> str | None:
        """The URL of the next part of a list, perhaps relative (RFC 8288)."""
        return self._response.links.get("next", {}).get("url")

    @property
    def certificate_expires(self) -> datetime | None:
        """Until when the server's certificate is good; None without TLS, and of one that was not checked."""
        stream = self._response.extensions.get("network_stream")
        tls = stream.get_extra_info("ssl_object") if stream is not None else None
        ends = tls.getpeercert().get("notAfter") if tls is not None else None
        return None if ends is None else datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        deadline = min(trio.current_time() + self._stall_seconds, self._until)
        try:
            with failures.map_exceptions(self.url), trio.fail_at(deadline):
                piece = await anext(self._pieces)
        except Unreachable:
            self._on_break()
            raise
        self._until += len(piece) / LEAST_BYTES_A_SECOND
        return piece

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises: Corrupt if it is longer than limit."""
        body = bytearray()
        async for piece in self:
            body += piece
            if len(body) > limit:
                raise Corrupt(f"{shown(self.url)} answers with more than {limit} bytes")
        return bytes(body)

    async def load(self, limit: int) -> None:
        """Take the whole body as `body`, and close. Raises: Corrupt if it is longer than limit."""
        try:
            self.body = await self.read(limit)
        finally:
            await self.aclose()

    async def settle(self) -> None:
        """Take a short body if there is one, so that the connection can be kept, and close."""
        # docker-registry 2.8's 416 announces the blob's length for a body of 33 bytes.
        if self.status == 416 or self._response.is_closed:
            await self.aclose()
        else:
            with suppress(Unreachable, Corrupt):
                await self.load(self._error_bytes)

    async def error(self, what: str) -> FsmountError:
        """The error that this answer means where another status was hoped for; closes it."""
        await self.settle()
        host = self.url.netloc.decode("ascii")
        return failures.from_status(self.status, self.body, what=what, host=host)

    def when_closed(self, function: Callable[[], None]) -> None:
        """Calls function once, when the answer is closed."""
        self._on_close = function

    def when_broken(self, function: Callable[[], None]) -> None:
        """Calls function when the body breaks off, or falls silent."""
        self._on_break = function

    async def aclose(self) -> None:
        """Release the connection; it is kept if the body was read to its end."""
        function, self._on_close = self._on_close, None
        if function is not None:
            function()
        with trio.CancelScope(deadline=trio.current_time() + _CLOSE_SECONDS, shield=True):
            await self._response.aclose()
            # httpx and httpcore read through five nested generators. Reading on, from what is closed, ends
            # them from the inside; closing the outermost would leave four to the garbage collector.
            with trio.CancelScope() as scope, suppress(httpx.RequestError, httpx.StreamError):
                scope.cancel()
                async for _ in self._pieces:
                    pass


class Wire:
    """The one way out: what every request of this package passes through, whatever it is for."""

    def __init__(self, transports: Transports, timeouts: Timeouts, limits: Limits) -> None:
        # The bare transports and no httpx.AsyncClient: that would add headers and cookies, and log every URL
        # with its query, which in a signed URL is a secret.
        self._transports = transports
        self._timeouts = timeouts
        self.limits = limits

    async def send(
        self,
        method: str,
        url: httpx.URL,
        headers: Mapping[str, str],
        *,
        tls: Tls = _SYSTEM,
        connect_seconds: float | None = None,
        form: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> Answer:
        """Ask, and return when the answer's headers are there.

        Raises: Again, with Unreachable or its kinds, whose reason is among its `causes`; Unreachable itself
            if trying again is of no use; UsageError (a file of tls).
        """
        transport = await self._transports.find(url, tls)
        connect_seconds = connect_seconds or self._timeouts.connect_seconds
        timeout = {"connect": connect_seconds, "write": self._timeouts.stall_seconds}
        request = httpx.Request(
            method,
            url,
            headers={**_HEADERS, **headers},
            data=form,
            content=content,
            extensions={"timeout": timeout},
        )
        try:
            with (
                failures.map_exceptions(url),
                trio.fail_after(connect_seconds + self._timeouts.stall_seconds),
            ):
                response = await transport.handle_async_request(request)
        except Unreachable as error:
            if failures.is_untrusted(error):
                raise
            raise Again(error) from error
        return Answer(response, url, self._timeouts, self.limits)
