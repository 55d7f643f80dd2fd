"""requests: the loop that takes the kernel's requests and answers each exactly once, whatever handlers and callers do.

It reads /dev/fuse itself, without blocking. pyfuse3's own loop does more work for each request (three times the CPU
time over a tree of small files: docs/decisions.md), cannot be told that a caller has given up, stops the whole
process when a caller is killed just before its request is read, and ends when a handler fails in a way of its own.
"""

import errno
import logging
import math
import os
import re
import signal
import traceback
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import trio

from fsmount.errors import FsmountError
from fsmount.fuse.protocol import (
    BUFFER_SIZE,
    Attributes,
    Opcode,
    Refusal,
    Request,
    error_reply,
    pack_attributes,
    pack_entry,
    parse_interrupt,
    parse_name,
    parse_read,
    parse_request,
    reply,
)
from fsmount.fuse.tally import Tally

log = logging.getLogger(__name__)

_QUIET_SECONDS = 60.0
#: What requests that are under way may take when the mount is left to another process, which else takes them over.
_LEAVING_SECONDS = 3.0
#: Requests that may be read one after the other before everything else in the process has had its turn.
_IN_A_ROW = 32
_MOST_MESSAGES = 1000
#: How soon the kernel asks once more for what it was answered ETIMEDOUT, and how long that may take.
_ONCE_MORE_SECONDS = 1.0
_LAST_SECONDS = 0.1
#: How soon the kernel shall say again that a caller was interrupted by a signal that does not end its wait.
_AGAIN_SECONDS = 0.1
_ENDING = sum(
    1 << number - 1
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL, signal.SIGTERM)
)

_Result = TypeVar("_Result")
#: What a handler returns: its answer, or the coroutine that will get it, if it has to wait.
Answer: TypeAlias = _Result | Coroutine[None, None, _Result]


class Handlers(Protocol):
    """The file system. An FsmountError becomes its errno, and is logged; a Refusal its errno, in silence."""

    def lookup(self, parent: int, name: bytes) -> Answer[Attributes]: ...
    def getattr(self, inode: int) -> Answer[Attributes]: ...
    def readlink(self, inode: int) -> Answer[bytes]: ...
    def read(self, inode: int, offset: int, size: int) -> Answer[bytes]: ...
    def readdir(self, inode: int, after: int, size: int, *, plus: bool) -> Answer[bytes]: ...
    def statfs(self) -> bytes: ...


@dataclass(slots=True, kw_only=True)
class Deadlines:
    """How long a handler may take before its caller gets ETIMEDOUT; a caller that is killed leaves at once.

    A change holds for the requests that follow.
    """

    #: What asks no more than names of a registry, and what needs content.
    names_seconds: float = 10.0
    content_seconds: float = 60.0
    content: frozenset[Opcode] = frozenset({Opcode.READ})

    def of(self, opcode: int) -> float:
        """Seconds for requests of this kind."""
        return self.content_seconds if opcode in self.content else self.names_seconds


async def answer_requests(
    device: int,
    handlers: Handlers,
    deadlines: Deadlines,
    *,
    leave: trio.Event | None = None,
    tally: Tally | None = None,
) -> bool:
    """Answers what comes from device, a mounted /dev/fuse that does not block, until it is unmounted.

    A handler that has its answer is answered for at once. One that must wait does so in a task of its own, which
    ends at its deadline, or when the kernel says that the caller was interrupted, and a signal is pending that asks
    it to end: SIGKILL, SIGTERM, SIGINT, SIGQUIT or SIGHUP.

    leave: once that is set no more are taken, and this returns when those that were have been answered, or a few
    seconds later. Says whether all have been. tally: where they are counted.

    Cancellation: requests that are under way stay unanswered; closing the last descriptor fails them.
    """
    leave = trio.Event() if leave is None else leave
    async with trio.open_nursery() as nursery:
        loop = _Loop(device, handlers, deadlines, tally or Tally(), nursery)
        async with trio.open_nursery() as reading:

            async def stop_reading() -> None:
                await leave.wait()
                reading.cancel_scope.cancel()

            reading.start_soon(stop_reading)
            await loop.run()
            reading.cancel_scope.cancel()
        if leave.is_set():
            with trio.move_on_after(_LEAVING_SECONDS):
                await loop.wait_idle()
        is_idle = not loop.is_busy
        nursery.cancel_scope.cancel()
    return is_idle


class _Waiting(NamedTuple):
    """A request that has not been answered yet, and the thread that waits for it."""

    scope: trio.CancelScope
    pid: int


class _Loop:
    def __init__(
        self, device: int, handlers: Handlers, deadlines: Deadlines, tally: Tally, nursery: trio.Nursery
    ) -> None:
        self._device = device
        self._handlers = handlers
        self._deadlines = deadlines
        self._tally = tally
        self._nursery = nursery
        self._buffer = bytearray(BUFFER_SIZE)
        self._journal = Journal()
        #: The requests that wait, by `unique`.
        self._waiting: dict[int, _Waiting] = {}
        self._answered = trio.lowlevel.ParkingLot()
        #: When which process has waited in vain for a file's content.
        self._in_vain: dict[tuple[int, int], float] = {}

    @property
    def is_busy(self) -> bool:
        """Whether requests have been taken and not answered."""
        return bool(self._waiting)

    async def wait_idle(self) -> None:
        """Returns when all that were taken have been answered."""
        while self._waiting:
            await self._answered.park()

    async def run(self) -> None:
        buffers = [self._buffer]
        in_a_row = 0
        while True:
            try:
                os.readv(self._device, buffers)
            except BlockingIOError:
                in_a_row = 0
                await trio.lowlevel.wait_readable(self._device)
                continue
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted, or its connection was aborted
                    return
                if error.errno in (errno.ENOENT, errno.EINTR):  # the request was withdrawn while it was read
                    continue
                raise
            self._handle()
            in_a_row += 1
            if in_a_row >= _IN_A_ROW:
                in_a_row = 0
                await trio.lowlevel.checkpoint()

    def _handle(self) -> None:
        """Answers the request in the buffer, or starts the task that will."""
        began = perf_counter()
        request = parse_request(self._buffer)
        opcode, unique = request.opcode, request.unique
        if opcode == Opcode.INTERRUPT:
            self._interrupt(unique, parse_interrupt(self._buffer))
            return
        try:
            answer = self._call(opcode, request.inode, request.length)
            if isinstance(answer, bytes | Attributes):
                self._reply(unique, _packed(opcode, answer))
                self._tally.note(opcode, began)
            elif answer is not None:
                # Here and not in the task: its caller may give up before it has begun.
                waiting = self._waiting[unique] = _Waiting(trio.CancelScope(), request.pid)
                self._nursery.start_soon(self._wait, request, began, answer, waiting.scope)
        except Exception as error:
            self._fail(opcode, unique, began, error)

    def _call(self, opcode: int, inode: int, length: int) -> Answer[Attributes] | Answer[bytes] | None:
        """What the handler says; None if there is nothing to be answered."""
        handlers, buffer = self._handlers, self._buffer
        match opcode:
            case Opcode.READ:
                return handlers.read(inode, *parse_read(buffer))
            case Opcode.READDIRPLUS | Opcode.READDIR:
                return handlers.readdir(inode, *parse_read(buffer), plus=opcode == Opcode.READDIRPLUS)
            case Opcode.LOOKUP:
                return handlers.lookup(inode, parse_name(buffer, length))
            case Opcode.GETATTR:
                return handlers.getattr(inode)
            case Opcode.READLINK:
                return handlers.readlink(inode)
            case Opcode.STATFS:
                return handlers.statfs()
            case Opcode.FORGET | Opcode.BATCH_FORGET:  # they have no answer
                return None
            case _:
                # The kernel remembers. Of OPEN and OPENDIR it then asks no more, nor of their ends, and keeps
                # pages and listings: a small file costs one request instead of three.
                raise Refusal(errno.ENOSYS)

    async def _wait(
        self,
        request: Request,
        began: float,
        answer: Coroutine[None, None, Attributes | bytes],
        scope: trio.CancelScope,
    ) -> None:
        opcode, unique = request.opcode, request.unique
        seconds = self._seconds(request)
        try:
            with scope, trio.move_on_after(seconds) as deadline:
                self._reply(unique, _packed(opcode, await answer))
                self._tally.note(opcode, began)
                return
        except Exception as error:
            # Out here: a nursery of the handler's may have joined its failure with our cancellation, and only the
            # end of the scopes takes that out of the group.
            self._fail(opcode, unique, began, _without_group(error))
            return
        finally:
            del self._waiting[unique]
            self._answered.unpark_all()
        code = errno.EINTR
        if deadline.cancelled_caught:
            code = errno.ETIMEDOUT
            if opcode == Opcode.READ and seconds > _LAST_SECONDS:
                self._note_in_vain(request)
            self._note_failure(opcode, code, f"no answer within {seconds:g} s")
        self._refuse(opcode, unique, began, code)

    def _seconds(self, request: Request) -> float:
        """How long its caller may have to wait.

        When its read-ahead gets an error, the kernel asks once more for the page that is needed: who has waited in vain
        for the one does not wait as long for the other.
        """
        since = self._in_vain.pop((request.inode, request.pid), -math.inf)
        if request.opcode == Opcode.READ and trio.current_time() - since < _ONCE_MORE_SECONDS:
            return _LAST_SECONDS
        return self._deadlines.of(request.opcode)

    def _note_in_vain(self, request: Request) -> None:
        now = trio.current_time()
        if len(self._in_vain) >= _MOST_MESSAGES:
            self._in_vain = {key: at for key, at in self._in_vain.items() if now - at < _ONCE_MORE_SECONDS}
        self._in_vain[request.inode, request.pid] = now

    def _interrupt(self, unique: int, interrupted: int) -> None:
        """The kernel says so, once, for every signal that the caller has a handler for; most do not end its wait.

        A shell that learns of a child's end must not be told that a file does not exist. EAGAIN has the kernel say
        it again, so that a signal that comes later is heard of too.
        """
        waiting = self._waiting.get(interrupted)
        if waiting is None:
            return
        if _wants_to_end(waiting.pid):
            waiting.scope.cancel()
        else:
            self._nursery.start_soon(self._ask_again, unique)

    async def _ask_again(self, unique: int) -> None:
        await trio.sleep(_AGAIN_SECONDS)
        self._write(error_reply(unique, errno.EAGAIN))

    def _fail(self, opcode: int, unique: int, began: float, error: Exception) -> None:
        match error:
            case Refusal(errno=code):
                pass
            case FsmountError(errno=code):
                if code == errno.ENOENT and opcode in (Opcode.READDIR, Opcode.READDIRPLUS):
                    # readdir(3) takes ENOENT for the end: the folder would look empty.
                    code = errno.ENODATA
                self._note_failure(opcode, code, error.message)
            case _:
                code = errno.EIO
                self._tally.note_failure(f"{_name(opcode)} failed unexpectedly: {type(error).__qualname__}")
                self._journal.note_bug(_name(opcode), error)
        self._refuse(opcode, unique, began, code)

    def _note_failure(self, opcode: int, code: int, message: str) -> None:
        self._tally.note_failure(f"{_name(opcode)}: {errno.errorcode.get(code, code)}: {message}")
        self._journal.note_failure(_name(opcode), code, message)

    def _refuse(self, opcode: int, unique: int, began: float, code: int) -> None:
        self._write(error_reply(unique, code))
        self._tally.note_error(opcode, began, code)

    def _reply(self, unique: int, data: bytes) -> None:
        self._write(reply(unique, len(data)), data)

    def _write(self, *parts: bytes) -> None:
        try:
            os.writev(self._device, parts)
        except OSError as error:
            # ENOENT: the caller is gone; ENODEV: the mount is.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise


def _wants_to_end(pid: int) -> bool:
    """Whether a signal is pending that asks a thread or its process to end; also if that cannot be found out."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:  # it has ended, or is of another namespace
        return True
    pending = re.findall(r"^(?:SigPnd|ShdPnd):\t([0-9a-f]+)$", status, re.MULTILINE)
    return any(int(mask, 16) & _ENDING for mask in pending)


def _without_group(error: Exception) -> Exception:
    """The first failure in a group of nurseries, one that has a name if there is one."""
    leaves = [error]
    while any(isinstance(leaf, ExceptionGroup) for leaf in leaves):
        leaves = [
            inner
            for leaf in leaves
            for inner in (leaf.exceptions if isinstance(leaf, ExceptionGroup) else [leaf])
        ]
    return next((leaf for leaf in leaves if isinstance(leaf, FsmountError)), leaves[0])


def _packed(opcode: int, answer: Attributes | bytes) -> bytes:
    if isinstance(answer, bytes):
        return answer
    return pack_entry(answer) if opcode == Opcode.LOOKUP else pack_attributes(answer)


def _name(opcode: int) -> str:
    try:
        return Opcode(opcode).name.lower()
    except ValueError:
        return f"request {opcode}"


@dataclass(slots=True)
class Journal:
    """Writes the failures of handlers into the log, but not as often as a thousand readers meet them."""

    _noted: dict[tuple[int, str], float] = field(default_factory=dict)
    _bugs: set[tuple[str, str, int]] = field(default_factory=set)

    def note_failure(self, handler: str, code: int, message: str) -> None:
        now = trio.current_time()
        if now - self._noted.get((code, message), -math.inf) < _QUIET_SECONDS:
            return
        if len(self._noted) >= _MOST_MESSAGES:
            self._noted = {key: time for key, time in self._noted.items() if now - time < _QUIET_SECONDS}
        if len(self._noted) < _MOST_MESSAGES:
            self._noted[code, message] = now
            extra = {"operation": handler, "errno": code}
            log.warning("%s: %s: %s", handler, errno.errorcode.get(code, code), message, extra=extra)

    def note_bug(self, handler: str, error: Exception) -> None:
        frames = list(traceback.walk_tb(error.__traceback__))
        place = [(frame.f_code.co_filename, line) for frame, line in frames[-1:]]
        site = (type(error).__qualname__, *(place[0] if place else ("", 0)))
        if site not in self._bugs:
            self._bugs.add(site)
            log.error(
                "%s failed unexpectedly, and will do so in silence from now on", handler, exc_info=error
            )
