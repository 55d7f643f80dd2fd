"""session: the life of one FUSE mount, from mount(2) to its last answer, whatever handlers and callers do.

pyfuse3 has three ways to stop answering, which leave callers that nobody can kill, or a dead mount. An
exception other than FUSEError leaves a handler: `guarded` lets none through. All workers wait for slow
answers: there are enough of them. A request is withdrawn just before it is read: `_LowLevel` looks again.
"""

import errno
import functools
import inspect
import logging
import math
import os
import select
import shutil
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CoroutineType
from typing import Any

import pyfuse3
import trio

from fsmount.errors import DeadlineExpired, FsmountError, NotRunning, Refused
from fsmount.fuse import mounts

log = logging.getLogger(__name__)

#: Requests under way at once; the next waits for one to end. With pyfuse3's default of 99, a stat beside 110
#: slow readers took 3.17 s; with 2000, 0.00 s.
MAX_TASKS = 2000

_DEVICE = Path("/dev/fuse")
_FUSE_CONF = Path("/etc/fuse.conf")
_READY_SECONDS = 10.0
_QUIET_SECONDS = 60.0
#: Requests that may be read one after the other before everything else in the process has had its turn.
_IN_A_ROW = 16
_MOST_MESSAGES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long a handler may take before its caller gets ETIMEDOUT.

    The caller cannot leave earlier, even if killed: the kernel waits for the answer to every request taken,
    and pyfuse3 does not deliver INTERRUPT.
    """

    names_seconds: float = 10.0
    content_seconds: float = 60.0
    #: Names of the handlers that may wait for content; all others wait for names.
    content: frozenset[str] = frozenset({"open", "read"})

    def of(self, handler: str) -> float:
        """Seconds for the handler of this name."""
        return self.content_seconds if handler in self.content else self.names_seconds


async def serve(
    operations: object,
    mountpoint: Path,
    *,
    allow_other: bool | None = None,
    deadlines: Deadlines | None = None,
    max_tasks: int = MAX_TASKS,
    read_ahead_kib: int = 1024,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount operations (see `guarded`) at mountpoint, and answer until it is unmounted or this is cancelled.

    `await nursery.start(serve, ...)` returns when the mount answers. allow_other lets other users in; None:
    if it is permitted. pyfuse3 keeps its state in globals: one mount a process.

    Raises: UsageError or Refused if it cannot be mounted; DeadlineExpired if it does not answer; NotRunning
    if it was unmounted before it had answered.
    Cancellation: unmounts, lazily; requests that wait for an answer fail with ECONNABORTED.
    """
    options = _options(allow_other)
    mountpoint = mounts.resolve(mountpoint)
    # One a session: an abandoned thread that outlives trio never gives its token back.
    probes = trio.CapacityLimiter(1)
    if await trio.to_thread.run_sync(mounts.prepare, mountpoint, limiter=probes):
        log.warning("cleared the dead mount of an earlier run at %s", mountpoint)
    ready = False
    session = trio.CancelScope()  # cancelled when the mount is gone
    with (
        _single_failure(),
        _checked_reads(gone=session.cancel),
        _mounted(guarded(operations, deadlines), mountpoint, options) as mount,
        session,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_answer_requests, max_tasks, session)
            await _wait_until_answering(mount, probes)
            if not mounts.set_read_ahead(mountpoint, read_ahead_kib):
                log.info("the read-ahead of %s stays at the kernel's default", mountpoint)
            ready = True
            task_status.started()
    if not ready:
        raise NotRunning(f"{mountpoint} was unmounted before it had answered")


def guarded(operations: object, deadlines: Deadlines | None = None) -> pyfuse3.Operations:
    """Handlers for pyfuse3 that raise nothing but FUSEError, and take no longer than their deadlines.

    operations has methods of the names of pyfuse3.Operations; of one it lacks, the kernel is told once (ENOSYS).
    A method is async, or it returns either its result or, if it has to wait, the coroutine that will.

    An FsmountError becomes its errno, and is logged once a minute. Any other exception becomes EIO, and is
    logged with its traceback once for each place that raises it. Cancellation passes.
    """
    deadlines = deadlines or Deadlines()
    journal = _Journal()
    result = pyfuse3.Operations()
    for name, default in inspect.getmembers(result):
        if not name.startswith("_"):
            given = getattr(operations, name, default)
            is_handler = inspect.iscoroutinefunction(default)
            setattr(result, name, _guard(name, given, deadlines.of(name), journal) if is_handler else given)
    return result


def _guard(
    name: str, handler: Callable[..., Any], seconds: float, journal: "_Journal"
) -> Callable[..., Awaitable[Any]]:
    # What need not wait should not pay for a deadline. A stat takes 25 µs through pyfuse3 alone and through
    # this function, and 42 µs with a cancel scope around the handler. Starting every coroutine, and opening the
    # scope once it blocks, would spare its author the choice, but corrupt trio's stack of scopes if the
    # handler has opened one by then.
    async def answer(*args: Any) -> Any:
        try:
            result = handler(*args)
            if not isinstance(result, CoroutineType):
                return result
            with trio.move_on_after(seconds):
                return await result
            code = errno.ETIMEDOUT
            journal.note_failure(name, code, f"no answer within {seconds:g} s")
        except pyfuse3.FUSEError as error:
            code = error.errno
        except FsmountError as error:
            code = error.errno
            journal.note_failure(name, code, error.message)
        except Exception as error:
            code = errno.EIO
            journal.note_bug(name, error)
        if name == "forget":
            return None  # it has no answer, and pyfuse3 catches nothing from it
        raise pyfuse3.FUSEError(code)

    return answer


@dataclass(slots=True)
class _Journal:
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
            log.warning("%s: %s: %s", handler, errno.errorcode.get(code, code), message)

    def note_bug(self, handler: str, error: Exception) -> None:
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        site = (type(error).__qualname__, frame.f_code.co_filename, line)
        if site not in self._bugs:
            self._bugs.add(site)
            log.error(
                "%s failed unexpectedly, and will do so in silence from now on", handler, exc_info=error
            )


async def _answer_requests(max_tasks: int, session: trio.CancelScope) -> None:
    await pyfuse3.main(max_tasks=max_tasks)
    session.cancel()


async def _wait_until_answering(mount: mounts.Mount, probes: trio.CapacityLimiter) -> None:
    """Raises: DeadlineExpired."""
    probe = functools.partial(mounts.probe, mount, timeout_seconds=_READY_SECONDS)
    # Abandoned, it ends by itself: unmounting answers the child that it waits for.
    health = await trio.to_thread.run_sync(probe, abandon_on_cancel=True, limiter=probes)
    if health is not mounts.Health.LIVING:
        raise DeadlineExpired(f"{mount.mountpoint} is mounted, but has not answered in {_READY_SECONDS:g} s")


@contextmanager
def _mounted(operations: pyfuse3.Operations, mountpoint: Path, options: set[str]) -> Iterator[mounts.Mount]:
    try:
        pyfuse3.init(operations, os.fspath(mountpoint), options)
    except RuntimeError as error:
        raise _why_not(mountpoint) from error
    mount = mounts.find(mountpoint)
    try:
        if mount is None:
            raise NotRunning(f"{mountpoint} was unmounted at once")
        yield mount
    finally:
        # After a lazy unmount from outside another session may be mounted at this path: that one must stay.
        top = mounts.find(mountpoint)
        still_there = mount is not None and top is not None and top.device == mount.device
        pyfuse3.close(unmount=still_there)
        if still_there:
            # libfuse leaves it there, dead, if its connection was aborted through /sys/fs/fuse/connections.
            mounts.clear_stale(mountpoint)


@contextmanager
def _single_failure() -> Iterator[None]:
    """Let a failure out as itself, and not in the groups of the nurseries that it came through."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None


class _LowLevel:
    """trio.lowlevel for pyfuse3, with a `wait_readable` after which the read of /dev/fuse does not block.

    pyfuse3 waits for readability, lets trio run whatever else is ready, and then reads, blocking, with the
    GIL held. If meanwhile the only waiting caller is killed, the kernel withdraws its request, and the read
    stops every task and thread until somebody sends another. O_NONBLOCK is no cure: EAGAIN ends pyfuse3.
    Polling once more, in the very step that reads, leaves a window of microseconds, which only a heartbeat
    from outside can notice. It costs 1 to 3 µs a request.
    """

    def __init__(self, gone: Callable[[], None]) -> None:
        self._gone = gone
        self._poller = select.poll()
        self._in_a_row = 0

    async def wait_readable(self, fd: int) -> None:
        self._poller.register(fd, select.POLLIN)
        # While requests keep coming the next is often there already, and a trip through epoll not needed.
        events = self._poller.poll(0) if self._in_a_row < _IN_A_ROW else []
        self._in_a_row = self._in_a_row + 1 if events else 0
        while not events:
            await trio.lowlevel.wait_readable(fd)
            events = self._poller.poll(0)
        if events[0][1] & select.POLLERR:
            # The connection has ended for good. pyfuse3 itself would still wait for the handlers in progress.
            self._gone()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)


class _Trio:
    """trio for pyfuse3."""

    def __init__(self, lowlevel: _LowLevel) -> None:
        self.lowlevel = lowlevel

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


@contextmanager
def _checked_reads(*, gone: Callable[[], None]) -> Iterator[None]:
    """Replace trio in pyfuse3, and only there, the way its own `pyfuse3.asyncio.enable` does."""
    if isinstance(pyfuse3.trio, _Trio):  # type: ignore[attr-defined]  # not in its stubs
        raise RuntimeError("pyfuse3 serves one mount a process")
    pyfuse3.trio = _Trio(_LowLevel(gone))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        pyfuse3.trio = trio  # type: ignore[attr-defined]


def _options(allow_other: bool | None) -> set[str]:
    """Raises: Refused if other users are to be let in and cannot."""
    permitted = os.geteuid() == 0 or _users_may_allow_other()
    if allow_other and not permitted:
        raise Refused(
            "only root may let other users into a mount here",
            remedy=f"Have the line user_allow_other written into {_FUSE_CONF}, or mount without allow_other.",
        )
    options = {*pyfuse3.default_options, "default_permissions", "ro", "nosuid", "nodev"}
    options |= {"fsname=fsmount", "subtype=fsmount"}  # the source and the type (mounts.FSTYPE) in mountinfo
    if permitted and allow_other is not False:
        options.add("allow_other")
    return options


def _users_may_allow_other() -> bool:
    # The form that fusermount3 accepts: alone on its line.
    try:
        return "user_allow_other" in map(str.strip, _FUSE_CONF.read_text(errors="replace").splitlines())
    except OSError:
        return False


def _why_not(mountpoint: Path) -> FsmountError:
    """Why libfuse, which says no more than that to us, could not mount. Its own words are on stderr."""
    if not _DEVICE.exists():
        return Refused(
            f"this machine has no {_DEVICE}",
            remedy="Load the kernel module (modprobe fuse); give a container the device (--device).",
        )
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        return Refused(
            f"{_DEVICE} may not be opened by user {os.geteuid()}",
            remedy="Its mode is usually 0666; some systems have a group fuse to be a member of.",
        )
    if os.geteuid() == 0:
        return Refused(
            f"the kernel refuses to mount at {mountpoint}",
            remedy="In a container, mounting needs CAP_SYS_ADMIN and an AppArmor profile that allows it.",
        )
    if shutil.which("fusermount3") is None:
        return Refused("an ordinary user mounts with fusermount3", remedy="Install the package fuse3.")
    if not os.access(mountpoint, os.W_OK):
        return Refused(
            f"user {os.geteuid()} may not write to {mountpoint}",
            remedy="An ordinary user mounts at directories they own: chown it, or name another.",
        )
    return Refused(f"fusermount3 refuses to mount at {mountpoint}")
