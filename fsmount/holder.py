"""holder: what systemd does for a mount, where there is none: it keeps the device, and the process that serves it.

It speaks systemd's protocol with its worker (see `notify`), so that the worker need not know whose it is. It imports
little, does nothing else, and never touches the mount: nothing shall end it.
"""

import errno
import fcntl
import json
import logging
import os
import select
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from fsmount import notify
from fsmount.fuse import mounts, stored
from fsmount.fuse.protocol import (
    BUFFER_SIZE,
    Opcode,
    error_reply,
    pack_statfs,
    parse_request,
    reply,
    resend,
)
from fsmount.program import PROGRAM

log = logging.getLogger(__name__)


_WATCHDOG_SECONDS = 30.0
#: What a process that is told to end, or shows by a signal where it is stuck, may take until it is killed.
_GRACE_SECONDS = 20.0
#: What is heard in one go, and answered in one go while no process serves.
_MOST_AT_ONCE = 64
_ABORT_SECONDS = 3.0
#: What a process may take until it serves. Readers wait as long.
_START_SECONDS = 60.0
#: A worker that has lived so long did not die of how it began.
_SOUND_SECONDS = 10.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
#: So many that have not even begun to serve, one after the other, and readers are told so.
_MOST_FAILURES = 10
_REFUSING_SECONDS = 60.0
_TRIAL_SECONDS = 20.0
_MISHAP_SECONDS = 1.0

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


@dataclass(slots=True)
class _Worker:
    """The process that serves. Times are of time.monotonic."""

    pid: int
    pidfd: int
    began: float
    heard: float
    is_ready: bool = False
    #: When it is to be killed.
    ends: float | None = None


class Holder:
    """Runs a command for as long as the mount is there that it makes; see `run`."""

    def __init__(self, command: Sequence[str], *, environ: MutableMapping[str, str] = os.environ) -> None:
        self._command = list(command)
        self._environ = environ
        self._stored: dict[str, int] = {}
        self._worker: _Worker | None = None
        self._was_ready = False
        self._is_stopping = False
        self._failures = 0
        #: When the next worker is to be started, if there is none.
        self._due: float | None = time.monotonic()
        self._is_refusing = False
        self._selector = selectors.DefaultSelector()
        handed = environ.pop(notify.HANDED, None)
        if handed is None:
            self._listener = notify.listen()
        else:
            self._listener = self._take_over(json.loads(handed))

    def run(self) -> int:
        """Starts the command, and again whenever it ends while its mount is there; returns when that is not.

        The exit code is the command's. SIGTERM and SIGINT unmount; SIGHUP is passed on; SIGUSR2 has the program as it
        is installed now take over, here and in the worker.
        """
        # Where it is ignored, which is inherited, nobody can wait for a child.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.register(self._listener, selectors.EVENT_READ, self._hear)
        with self._signals() as told:
            self._selector.register(told, selectors.EVENT_READ, lambda: self._obey(told))
            code: int | None = None
            while code is None:
                try:
                    code = self._turn()
                except Exception:
                    # Who keeps a mount for others must outlive its own mistakes, as init does.
                    log.exception("the holder failed in a way nobody foresaw, and goes on")
                    if self._worker is None and self._due is None and not self._is_stopping:
                        self._due = time.monotonic()
                    time.sleep(_MISHAP_SECONDS)
        self._selector.close()
        notify.remove(self._listener)
        return code

    def _turn(self) -> int | None:
        """One thing that happens; the exit code at the end."""
        if self._worker is None:
            if self._was_ready and self._device is None:
                return 0  # it was unmounted while nobody served it
            if self._due is not None and time.monotonic() >= self._due:
                self._start()
        for key, _ in self._selector.select(self._seconds_left()):
            if key.fileobj is not self._pidfd:
                key.data()
        # What it has said goes before its end.
        worker = self._worker
        if worker is not None and _is_over(worker.pidfd):
            self._hear()
            return self._bury(worker)
        self._watch()
        return 0 if self._is_stopping and self._worker is None else None

    @property
    def _pidfd(self) -> int | None:
        return None if self._worker is None else self._worker.pidfd

    @property
    def _device(self) -> int | None:
        """That of the mount, if it is there."""
        kept = (descriptor for name, descriptor in self._stored.items() if stored.is_device(name))
        return next(filter(stored.is_whole, kept), None)

    # The worker

    def _start(self) -> None:
        self._stop_refusing()
        names = [name for name, descriptor in self._stored.items() if stored.is_whole(descriptor)]
        for name in self._stored.keys() - set(names):
            os.close(self._stored.pop(name))
        announced = self._environ.get("FSMOUNT_READY_FD")
        pid = os.fork()
        if not pid:
            _execute(self._command, self._listener, self._stored, self._environ)
        if announced is not None and not self._was_ready:
            # The first worker says for itself that it is ready, or why it never will be.
            del self._environ["FSMOUNT_READY_FD"]
            os.close(int(announced))
        try:
            self._adopt(pid)
        except OSError:
            _signal(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self._due = None

    def _adopt(self, pid: int, *, is_ready: bool = False) -> None:
        now = time.monotonic()
        self._worker = _Worker(pid, os.pidfd_open(pid), began=now, heard=now, is_ready=is_ready)
        self._selector.register(self._worker.pidfd, selectors.EVENT_READ)

    def _hear(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            message = notify.receive(self._listener)
            if message is None:
                return
            worker = self._worker
            if worker is None or message.pid != worker.pid:
                for descriptor in message.descriptors:
                    os.close(descriptor)
                continue
            worker.heard = time.monotonic()
            name = message.fields.get("FDNAME", "")
            if "FDSTOREREMOVE" in message.fields and name in self._stored:
                os.close(self._stored.pop(name))
            for descriptor in message.descriptors:
                if name in self._stored:
                    os.close(self._stored.pop(name))
                self._stored[name] = descriptor
            if "READY" in message.fields:
                worker.is_ready = self._was_ready = True
                self._failures = 0

    def _bury(self, worker: _Worker) -> int | None:
        self._selector.unregister(worker.pidfd)
        os.close(worker.pidfd)
        self._worker = None
        code = _exit_code(worker.pid)
        device = self._device
        if device is None:
            return code
        if self._is_stopping:
            self._unmount()
            return code
        lived = time.monotonic() - worker.began
        if not worker.is_ready:
            self._failures += 1
        if code:
            log.error("the process %d that serves the mount has ended: %s", worker.pid, _manner(code))
            self._environ[notify.LAST_DEATH] = f"{_manner(code)}, at {time.strftime('%Y-%m-%d %H:%M:%S')}"
        pause = 0.0
        if code and lived < _SOUND_SECONDS:
            pause = min(_SHORTEST_PAUSE * 2 ** min(self._failures, 10), _LONGEST_PAUSE)
        if self._failures >= _MOST_FAILURES:
            pause = _REFUSING_SECONDS
            self._start_refusing(device)
        self._due = time.monotonic() + pause
        return None

    def _watch(self) -> None:
        """Ends a worker that is stuck."""
        worker, now = self._worker, time.monotonic()
        if worker is None:
            return
        if worker.ends is not None:
            if now >= worker.ends:
                worker.ends = now + _GRACE_SECONDS
                _signal(worker.pid, signal.SIGKILL)
            return
        silent = now - worker.heard
        if silent > (_WATCHDOG_SECONDS if worker.is_ready else _START_SECONDS):
            log.error("the process %d that serves the mount is stuck: silent for %.0f s", worker.pid, silent)
            # It writes where it was.
            _signal(worker.pid, signal.SIGABRT)
            worker.ends = now + _ABORT_SECONDS

    def _seconds_left(self) -> float | None:
        worker = self._worker
        if worker is None:
            when = self._due
        elif worker.ends is not None:
            when = worker.ends
        else:
            when = worker.heard + (_WATCHDOG_SECONDS if worker.is_ready else _START_SECONDS)
        return None if when is None else max(when - time.monotonic(), 0) + 0.001

    # Signals

    @contextmanager
    def _signals(self) -> Iterator[int]:
        """A descriptor that can be read when a signal has come: one byte, its number."""
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        known = {number: signal.signal(number, _take_note) for number in _SIGNALS}
        before = signal.set_wakeup_fd(writing)
        # Who has taken another's place has been handed those that came meanwhile.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        try:
            yield reading
        finally:
            signal.set_wakeup_fd(before)
            for number, handler in known.items():
                signal.signal(number, handler)
            os.close(reading)
            os.close(writing)

    def _obey(self, told: int) -> None:
        worker, numbers = self._worker, os.read(told, 4096)
        ending = next((n for n in numbers if n in (signal.SIGTERM, signal.SIGINT)), None)
        if ending is not None:
            self._stop(signal.Signals(ending))
            return
        if signal.SIGHUP in numbers and worker is not None:
            _signal(worker.pid, signal.SIGHUP)
        if signal.SIGUSR2 in numbers and not self._is_stopping:
            self._upgrade(told)

    def _stop(self, number: signal.Signals) -> None:
        worker = self._worker
        self._is_stopping = True
        self._due = None
        if worker is None:
            self._unmount()
        else:
            _signal(worker.pid, number)
            worker.ends = time.monotonic() + _GRACE_SECONDS

    def _unmount(self) -> None:
        """For when no worker does."""
        self._stop_refusing()
        for name, descriptor in self._stored.items():
            is_there = stored.is_device(name) and stored.is_whole(descriptor)
            mount = stored.mount_of(name) if is_there else None
            if mount is not None:
                mounts.detach(mount)

    # A newer program

    def _upgrade(self, told: int) -> None:
        """Has the program as it is installed now take this one's place, and then its worker the worker's."""
        try:
            done = subprocess.run(
                [*PROGRAM, "version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=_TRIAL_SECONDS
            )
            problem = done.stderr.decode(errors="replace").strip() if done.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        if problem:
            log.error("the program that is installed now does not run, and takes nothing over: %s", problem)
            return
        worker = self._worker
        handed = {
            "listener": self._listener.fileno(),
            "stored": self._stored,
            "worker": None if worker is None else worker.pid,
            "is_ready": worker is not None and worker.is_ready,
        }
        for descriptor in (self._listener.fileno(), *self._stored.values()):
            os.set_inheritable(descriptor, True)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        with suppress(BlockingIOError):
            # What came meanwhile is in a pipe that ends here.
            if {signal.SIGTERM, signal.SIGINT} & set(os.read(told, 4096)):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
                self._stop(signal.SIGTERM)
                return
        try:
            os.execve(
                PROGRAM[0],
                self._command,  # whose arguments need no configuration to be found
                {**self._environ, notify.HANDED: json.dumps(handed)},
            )
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            log.error("the program that is installed now cannot be run: %s", error.strerror)

    def _take_over(self, handed: Mapping[str, object]) -> socket.socket:
        stored, pid = handed["stored"], handed["worker"]
        assert isinstance(stored, dict)
        self._stored = {str(name): int(descriptor) for name, descriptor in stored.items()}
        listener = socket.socket(fileno=int(str(handed["listener"])))
        for descriptor in (listener.fileno(), *self._stored.values()):
            os.set_inheritable(descriptor, False)
        self._was_ready = True
        if isinstance(pid, int):
            self._adopt(pid, is_ready=bool(handed["is_ready"]))
            self._due = None
            # One that has not begun to serve has not begun to listen either.
            if self._worker is not None and self._worker.is_ready:
                _signal(pid, signal.SIGUSR2)
                self._worker.ends = time.monotonic() + _GRACE_SECONDS
        return listener

    # Nobody serves

    def _start_refusing(self, device: int) -> None:
        log.critical(
            "no process can be started that serves the mount: everything in it answers EIO; the next try is in"
            " %.0f s, or at once by `kill -USR2 %d`",
            _REFUSING_SECONDS,
            os.getpid(),
        )
        self._is_refusing = True
        with suppress(OSError):
            os.write(device, resend())
        self._selector.register(device, selectors.EVENT_READ, lambda: _refuse(device))

    def _stop_refusing(self) -> None:
        if self._is_refusing:
            self._is_refusing = False
            for name, descriptor in self._stored.items():
                if stored.is_device(name):
                    with suppress(KeyError):
                        self._selector.unregister(descriptor)


def _execute(
    command: Sequence[str],
    listener: socket.socket,
    stored: Mapping[str, int],
    environ: Mapping[str, str],
) -> None:
    """Becomes the command, with these descriptors from notify.FIRST_DESCRIPTOR on, in their order. Never returns."""
    try:
        given = dict(environ)
        wanted = list(stored.values())
        if "FSMOUNT_READY_FD" in given:
            wanted.append(int(given["FSMOUNT_READY_FD"]))
            given["FSMOUNT_READY_FD"] = str(notify.FIRST_DESCRIPTOR + len(stored))
        given |= notify.environment(listener, list(stored), watchdog_seconds=_WATCHDOG_SECONDS)
        given[notify.HOLDER] = str(os.getppid())
        # First out of the way of where they are to be.
        last = notify.FIRST_DESCRIPTOR + len(wanted)
        aside = [_duplicate_above(descriptor, last) for descriptor in wanted]
        for number, descriptor in enumerate(aside, notify.FIRST_DESCRIPTOR):
            os.dup2(descriptor, number, inheritable=True)
        # Until it listens, it is not to die of being told to read its configuration again.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.execve(command[0], list(command), given)
    except BaseException as error:
        os.write(2, f"fsmount: error: {command[0]} cannot be run: {error}\n".encode(errors="replace"))
    finally:
        os._exit(127)


def _duplicate_above(descriptor: int, last: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, last + 1)


def _take_note(number: int, frame: FrameType | None) -> None:
    """The number comes by the wake-up descriptor."""


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _is_over(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _exit_code(pid: int) -> int:
    """That of a child that has ended, as a shell gives it."""
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:  # somebody else was told
        return 1
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _manner(code: int) -> str:
    """How a process has ended, by its exit code as a shell has it."""
    if code > 128:
        with suppress(ValueError):
            return f"killed by {signal.Signals(code - 128).name}"
    return f"exit code {code}"


def _refuse(device: int) -> None:
    """Answers what has come from a mounted device: EIO."""
    buffer = bytearray(BUFFER_SIZE)
    for _ in range(_MOST_AT_ONCE):
        try:
            os.readv(device, [buffer])
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                continue
            return
        request = parse_request(buffer)
        if request.opcode in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT):
            continue
        with suppress(OSError):
            if request.opcode == Opcode.STATFS:
                data = pack_statfs(block_size=4096, name_max=255)
                os.writev(device, (reply(request.unique, len(data)), data))
            else:
                os.write(device, error_reply(request.unique, errno.EIO))
