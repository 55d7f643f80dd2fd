"""The bytes of one blob, however often the connection breaks."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import trio

from fsmount.errors import Corrupt, DeadlineExpired, FsmountError, Unreachable
from fsmount.oci.manifest import Descriptor
from fsmount.registry.retry import Retry
from fsmount.registry.wire import LEAST_BYTES_A_SECOND, Answer

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


class Body(AsyncIterator[bytes]):
    """Iterates over part of a blob, asking anew from the last good byte when a body breaks off.

    What a server sends for a range is believed only if it says that it is that range of a blob of that
    size. A server that ignores ranges sends the blob from its beginning. If all of the rest is wanted, or part
    of it is known already, what is not wanted is skipped; else it becomes the whole blob, from `offset` 0 to `stop`.

    Ownership: close it; at most one connection is in use.
    """

    def __init__(
        self,
        send: Callable[[Mapping[str, str]], Awaitable[Answer]],
        descriptor: Descriptor,
        start: int,
        stop: int | None,
        what: str,
        retry: Retry,
    ) -> None:
        """stop: None for all of the rest."""
        if not 0 <= start <= (descriptor.size if stop is None else stop) <= descriptor.size:
            raise ValueError(f"{start} to {stop} is no part of {descriptor.size} bytes")
        self._send = send
        self._what = what
        self._size = descriptor.size
        self._retry = retry
        self._answer: Answer | None = None
        #: Whether it may yet become the whole blob.
        self._is_part = stop is not None
        self.stop = descriptor.size if stop is None else stop
        #: Of the blob: what was handed out, where the answer now is, and where it will end.
        self.offset = start
        self._position = start
        self._until = start
        self._ranges = True
        #: Requests in a row that brought nothing, or no more than drops.
        self._failures = 0
        #: Of the present one: where it began, and how long its body was waited for.
        self._begun = start
        self._waited = 0.0

    async def open(self) -> None:
        """Ask for the blob. Nothing is asked for where there is nothing left to read."""
        if self.offset == self.stop:
            return
        ranged = self._ranges and (self.offset > 0 or self.stop < self._size)
        answer = await self._send({"Range": f"bytes={self.offset}-{self.stop - 1}"} if ranged else {})
        if answer.status == 400 and ranged:
            # Some registries refuse ranges outright.
            self._ranges = False
            await answer.settle()
            answer = await self._send({})
        try:
            self._position, self._until = self._extent(answer)
        except FsmountError:
            await answer.aclose()
            raise
        except _Unexpected:
            raise await answer.error(self._what) from None
        self._answer = answer
        if self._is_part and self._position == 0 and self._until == self._size:
            self.offset, self.stop = 0, self._size
        self._is_part = False
        self._begun, self._waited = self.offset, 0.0

    async def __anext__(self) -> bytes:
        while True:
            if self.offset == self.stop and (self._answer is None or self._until > self.stop):
                await self.aclose()
                raise StopAsyncIteration
            if self._answer is None:
                await self.open()
            assert self._answer is not None
            try:
                piece = self._take(await self._next(self._answer))
            except StopAsyncIteration:
                await self.aclose()
                if self._position < self._until:
                    await self._pause(Corrupt(f"{self._what} ends after {self.offset} of {self._size} bytes"))
            except Unreachable as error:
                await self.aclose()
                if self.offset < self.stop:
                    await self._pause(error)
            else:
                if piece:
                    return piece

    async def _next(self, answer: Answer) -> bytes:
        began = trio.current_time()
        try:
            return await anext(answer)
        finally:
            self._waited += trio.current_time() - began

    async def aclose(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            await answer.aclose()

    def _extent(self, answer: Answer) -> tuple[int, int]:
        """Where in the blob the answer's body starts and stops. Raises: Corrupt, _Unexpected."""
        if answer.status not in (200, 206, 416):
            raise _Unexpected
        if answer.status == 416:
            raise Corrupt(f"{self._what} is shorter than the {self._size} bytes that its descriptor promises")
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Corrupt(f"{self._what} comes compressed, though that was ruled out")
        if answer.status == 200:
            start, stop, total = 0, self._size, answer.length
        else:
            start, stop, total = self._ranged(answer)
            if answer.length is not None and answer.length != stop - start:
                raise Corrupt(f"{self._what} comes as a range of another length than it announces")
        if total is not None and total != self._size:
            raise Corrupt(
                f"{self._what} has {total} bytes, not the {self._size} that its descriptor promises"
            )
        return start, stop

    def _ranged(self, answer: Answer) -> tuple[int, int, int | None]:
        said = answer.headers.get_list("Content-Range")
        match = _CONTENT_RANGE.fullmatch(said[0]) if len(said) == 1 else None
        if match is None or int(match[1]) != self.offset or not int(match[1]) <= int(match[2]) < self.stop:
            raise Corrupt(f"{self._what} comes as another range than was asked for")
        return int(match[1]), int(match[2]) + 1, None if match[3] == "*" else int(match[3])

    def _take(self, piece: bytes) -> bytes:
        """What of a piece is new. Raises: Corrupt if there is more than there should be."""
        known = max(0, self.offset - self._position)
        self._position += len(piece)
        if self._position > self._until:
            raise Corrupt(f"{self._what} is longer than the {self._size} bytes that its descriptor promises")
        # What a server sends beyond what is wanted (of the whole blob, where a range broke off) is left out.
        piece = (
            piece[known : known + self.stop - self.offset] if known or self._position > self.stop else piece
        )
        self.offset += len(piece)
        return piece

    async def _pause(self, error: FsmountError) -> None:
        """Wait before asking again. Raises: error, if that was tried often enough without any progress.

        A server that drips makes none: it would go on for ever.
        """
        brought = self.offset - self._begun
        least = self._waited * LEAST_BYTES_A_SECOND if isinstance(error, DeadlineExpired) else 1
        self._failures = 1 if brought >= max(1, least) else self._failures + 1
        if self._failures >= self._retry.tries:
            raise error
        await trio.sleep(self._retry.pause_seconds(self._failures))


class _Unexpected(Exception):
    """A status that no blob comes with."""
