"""session: the life of one FUSE mount in this process, from mount(2), or an inherited descriptor, to its last answer.

pyfuse3, that is libfuse, mounts and agrees with the kernel on what both can do (INIT), also for ordinary users through
fusermount3. The requests that follow are answered in `requests`: by this process, and then by the next one that
is handed the descriptor, for the kernel keeps a mount as long as some process has its device open.
"""

import enum
import errno
import functools
import logging
import os
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import pyfuse3
import trio

from fsmount.errors import DeadlineExpired, FsmountError, NotRunning, Refused
from fsmount.fuse import mounts, stored
from fsmount.fuse.protocol import BUFFER_SIZE, SMALLEST_INIT, amended_init, invalidate, resend
from fsmount.fuse.requests import Deadlines, Handlers, answer_requests
from fsmount.fuse.tally import Tally

log = logging.getLogger(__name__)

#: Reads that the kernel may send at once beyond those that it waits for: a slow layer holds up nobody else.
BACKGROUND = 2000

_DEVICE = Path("/dev/fuse")
_DEVICE_NUMBER = os.makedev(10, 229)
_FUSE_CONF = Path("/etc/fuse.conf")
_READY_SECONDS = 10.0


class Keeper(Protocol):
    """Who keeps the device of a mount when this process ends: systemd, or a holder."""

    #: What an earlier process has left there, by name. Ownership: the session's.
    inherited: dict[str, int]

    def store(self, name: str, descriptor: int) -> None: ...
    def remove(self, name: str) -> None: ...


class Ending(enum.Enum):
    """What becomes of the mount at the end of a session."""

    UNMOUNT = enum.auto()
    #: It is left to the next process that is handed the device.
    LEAVE = enum.auto()


class Session:
    """One mount, as long as this process serves it.

    With a keeper, the mount outlives a process that ends without having been told to unmount: the next one
    inherits the device and goes on. Without one, the mount ends with the session.
    """

    def __init__(self, mountpoint: Path, *, keeper: Keeper | None = None, is_follower: bool = False) -> None:
        """is_follower: the mount that was inherited is what there is to serve; another is not made in its place when
        somebody has unmounted it.
        """
        self.mountpoint = mounts.resolve(mountpoint)
        #: Whether all requests that were taken have been answered when the mount was left.
        self.is_drained = False
        #: Whether an earlier process has served the mount.
        self.is_inherited = False
        #: Says which inode numbers the handlers know; a mount whose kernel has others is not gone on with. None: all.
        self.numbers: str | None = None
        #: What becomes of the mount when `serve` is cancelled or fails.
        self.ending = Ending.UNMOUNT if keeper is None else Ending.LEAVE
        self._keeper = keeper
        self._is_follower = is_follower
        #: The name by which it keeps the device.
        self._stored = ""
        self._leave = trio.Event()
        self._device: int | None = None

    @property
    def may_inherit(self) -> bool:
        """Whether there may be a mount to go on with, whose kernel remembers; asked before `serve`."""
        return self._keeper is not None and any(map(stored.is_device, self._keeper.inherited))

    def leave(self) -> None:
        """Has `serve` take no more requests, answer those that were, and leave the mount to the next process."""
        self.ending = Ending.LEAVE
        self._leave.set()

    async def serve(
        self,
        handlers: Handlers,
        *,
        allow_other: bool | None = None,
        deadlines: Deadlines | None = None,
        read_ahead_kib: int = 1024,
        is_drained: bool = False,
        tally: Tally | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Mounts, or goes on with what was inherited, and answers with handlers until that ends.

        `await nursery.start(session.serve, ...)` returns when the mount answers. allow_other lets other users in;
        None: if it is permitted. is_drained: the process before left nothing unanswered. tally: where requests are
        counted.

        Raises: UsageError or Refused if it cannot be mounted; DeadlineExpired if it does not answer; NotRunning
        if it was unmounted before it had answered.
        Cancellation: unmounts, lazily, or leaves the mount, as `ending` says. Requests that wait for an answer fail
        with ECONNABORTED, or get theirs from the next process.
        """
        options = _options(allow_other)
        # One a session: an abandoned thread that outlives trio never gives its token back.
        probes = trio.CapacityLimiter(1)
        ready = False
        with _single_failure():
            connection = self._inherit(is_drained=is_drained)
            if connection is None:
                if await trio.to_thread.run_sync(mounts.prepare, self.mountpoint, limiter=probes):
                    log.warning("cleared the dead mount of an earlier run at %s", self.mountpoint)
                mount, device = await _mount(self.mountpoint, options)
                connection = _Connection(mount, device)
            with self._connected(connection):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._answer, connection.device, handlers, deadlines, tally, nursery)
                    if not self.is_inherited:
                        await _wait_until_answering(mount, probes)
                        if not mounts.set_read_ahead(self.mountpoint, read_ahead_kib):
                            log.info("the read-ahead of %s stays at the kernel's default", self.mountpoint)
                        if self._keeper is not None:
                            self._stored = stored.name_of(mount, self.numbers or "")
                            self._keeper.store(self._stored, device)
                    ready = True
                    task_status.started()
        if not ready:
            raise NotRunning(f"{self.mountpoint} was unmounted before it had answered")

    async def forget(self, inodes: Iterable[int]) -> None:
        """Has the kernel forget the pages of inodes.

        Cancellation: what is under way goes on in its thread; the kernel has that wait for readers of a page.
        """
        if self._device is not None:
            # Its own: by the end of the session the number of the other may be another file's.
            device = os.dup(self._device)
            await trio.to_thread.run_sync(_forget, device, inodes, abandon_on_cancel=True)

    async def _answer(
        self,
        device: int,
        handlers: Handlers,
        deadlines: Deadlines | None,
        tally: Tally | None,
        nursery: trio.Nursery,
    ) -> None:
        self.is_drained = await answer_requests(
            device, handlers, deadlines or Deadlines(), leave=self._leave, tally=tally
        )
        if not self._leave.is_set():
            self.ending = Ending.UNMOUNT  # it is gone already, or dead for good
        nursery.cancel_scope.cancel()

    def _inherit(self, *, is_drained: bool) -> "_Connection | None":
        """The mount of an earlier process, if it is there and can be gone on with.

        Raises: NotRunning (see is_follower).
        """
        keeper = self._keeper
        names = [name for name in keeper.inherited if stored.is_device(name)] if keeper is not None else []
        found: _Connection | None = None
        for name in names:
            assert keeper is not None
            device = keeper.inherited.pop(name)
            # The number of a mount that is gone may be another's by now.
            is_whole = stored.is_whole(device)
            mount = stored.mount_of(name) if is_whole else None
            # What was unmounted lazily is still asked by those who have something of it open.
            is_orphan = is_whole and mount is None and self._is_follower
            is_wanted = is_orphan or (mount is not None and mount.mountpoint == self.mountpoint)
            if is_wanted and stored.is_agreed(name, self.numbers):
                os.set_blocking(device, False)
                if is_drained or _resend(device):
                    found, self._stored = _Connection(mount, device), name
                    continue
                log.warning(
                    "%s is mounted anew: this kernel (before 6.9) cannot send again what the process that ended"
                    " has not answered; who has a file open there must open it again",
                    self.mountpoint,
                )
            elif mount is not None:
                log.warning(
                    "%s is unmounted: %s",
                    mount.mountpoint,
                    "its kernel knows it by other numbers than this cache, or this version"
                    if is_wanted
                    else "it is not what is to be served now",
                )
            keeper.remove(name)
            if mount is not None:
                mounts.detach(mount)
            os.close(device)
            if mount is None and self._is_follower:
                raise NotRunning(f"{self.mountpoint} was unmounted while nobody served it")
        self.is_inherited = found is not None
        return found

    @contextmanager
    def _connected(self, connection: "_Connection") -> Iterator[None]:
        mount = connection.mount
        self._device = connection.device
        try:
            yield
        finally:
            self._device = None
            os.close(connection.device)
            # After a lazy unmount from outside another session may be mounted at this path: that one must stay.
            top = mounts.find(self.mountpoint)
            is_there = mount is not None and top is not None and top.device == mount.device
            if top is not None and is_there and self.ending is Ending.UNMOUNT:
                if self._keeper is not None:
                    self._keeper.remove(self._stored)
                mounts.detach(top)


def _forget(device: int, inodes: Iterable[int]) -> None:
    """Closes device."""
    try:
        for inode in inodes:
            with suppress(FileNotFoundError):  # the kernel does not have it
                os.write(device, invalidate(inode))
    except OSError as error:
        log.warning("the kernel does not forget what was not certified: %s", error.strerror)
    finally:
        os.close(device)


class _Connection(NamedTuple):
    """A mount, None if it has no place any more, and a descriptor of its device that does not block."""

    mount: mounts.Mount | None
    device: int


def _resend(device: int) -> bool:
    try:
        os.write(device, resend())
    except OSError:
        return False
    return True


async def _mount(mountpoint: Path, options: set[str]) -> tuple[mounts.Mount, int]:
    """Has libfuse mount, and agree with the kernel on what both can do; what follows is not for libfuse.

    The mount, and a descriptor of its device that does not block.

    Raises: Refused, NotRunning (it was unmounted at once).
    """
    before = set(_devices())
    try:
        pyfuse3.init(pyfuse3.Operations(), os.fspath(mountpoint), options)
    except RuntimeError as error:
        raise _why_not(mountpoint) from error
    (libfuse_s,) = set(_devices()) - before
    device = os.dup(libfuse_s)
    os.set_blocking(device, False)
    mount = mounts.find(mountpoint)
    is_agreed = False
    try:
        is_agreed = mount is not None and await _negotiate(device, libfuse_s)
        if mount is None or not is_agreed:
            raise NotRunning(f"{mountpoint} was unmounted at once")
        return mount, device
    finally:
        pyfuse3.close(unmount=False)
        if not is_agreed:
            os.close(device)
            top = mounts.find(mountpoint)
            if mount is not None and top is not None and top.device == mount.device:
                mounts.detach(top)


async def _negotiate(device: int, libfuse_s: int) -> bool:
    """Lets libfuse answer INIT, the kernel's first request, over a socket.

    libfuse_s is its own descriptor of the device. False: it was unmounted before.

    Raises: Refused (libfuse and the kernel do not agree).
    Cancellation: nothing is negotiated.
    """
    await trio.lowlevel.wait_readable(device)
    try:
        init = os.read(device, BUFFER_SIZE)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return False
        raise
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        os.dup2(theirs.fileno(), libfuse_s, inheritable=False)
        theirs.close()
        try:
            ours.send(init)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pyfuse3.main)
                await trio.lowlevel.wait_readable(ours)
                answer = ours.recv(BUFFER_SIZE)
                nursery.cancel_scope.cancel()
        finally:
            # What it closes shall be the device again.
            os.dup2(device, libfuse_s, inheritable=False)
    if len(answer) < SMALLEST_INIT:
        raise Refused("libfuse does not agree with this kernel on the FUSE protocol", remedy="Upgrade fuse3.")
    os.write(device, amended_init(init, answer, background=BACKGROUND))
    return True


async def _wait_until_answering(mount: mounts.Mount, probes: trio.CapacityLimiter) -> None:
    """Raises: DeadlineExpired."""
    probe = functools.partial(mounts.probe, mount, timeout_seconds=_READY_SECONDS)
    # Abandoned, it ends by itself: unmounting answers the child that it waits for.
    health = await trio.to_thread.run_sync(probe, abandon_on_cancel=True, limiter=probes)
    if health is not mounts.Health.LIVING:
        raise DeadlineExpired(f"{mount.mountpoint} is mounted, but has not answered in {_READY_SECONDS:g} s")


def _devices() -> Iterator[int]:
    """The descriptors of /dev/fuse that this process has open: libfuse does not tell which one is its."""
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:  # that of the listing itself
            continue
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == _DEVICE_NUMBER:
            yield int(name)


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
