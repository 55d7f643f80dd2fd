"""session: the life of one FUSE mount, from mount(2) to its last answer.

pyfuse3, that is libfuse, mounts, agrees with the kernel on what both can do (INIT), and unmounts, also for ordinary
users through fusermount3. The requests in between are answered in `requests`.
"""

import errno
import functools
import logging
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
import trio

from fsmount.errors import DeadlineExpired, FsmountError, NotRunning, Refused
from fsmount.fuse import mounts
from fsmount.fuse.protocol import BUFFER_SIZE, SMALLEST_INIT, amended_init
from fsmount.fuse.requests import Deadlines, Handlers, answer_requests

log = logging.getLogger(__name__)

#: Reads that the kernel may send at once beyond those that it waits for: a slow layer holds up nobody else.
BACKGROUND = 2000

_DEVICE = Path("/dev/fuse")
_DEVICE_NUMBER = os.makedev(10, 229)
_FUSE_CONF = Path("/etc/fuse.conf")
_READY_SECONDS = 10.0

_is_serving = False


async def serve(
    handlers: Handlers,
    mountpoint: Path,
    *,
    allow_other: bool | None = None,
    deadlines: Deadlines | None = None,
    read_ahead_kib: int = 1024,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount at mountpoint, and answer with handlers until it is unmounted or this is cancelled.

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
    with _single_failure(), _mounted(mountpoint, options) as (mount, device, libfuse_s):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve_device, device, libfuse_s, handlers, deadlines or Deadlines(), nursery)
            await _wait_until_answering(mount, probes)
            if not mounts.set_read_ahead(mountpoint, read_ahead_kib):
                log.info("the read-ahead of %s stays at the kernel's default", mountpoint)
            ready = True
            task_status.started()
    if not ready:
        raise NotRunning(f"{mountpoint} was unmounted before it had answered")


async def _serve_device(
    device: int, libfuse_s: int, handlers: Handlers, deadlines: Deadlines, nursery: trio.Nursery
) -> None:
    if await _negotiate(device, libfuse_s):
        await answer_requests(device, handlers, deadlines)
    nursery.cancel_scope.cancel()  # the mount is gone


async def _negotiate(device: int, libfuse_s: int) -> bool:
    """Lets libfuse answer INIT, the kernel's first request: over a socket, for what follows is not for libfuse.

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
            # What it closes, and looks at before it unmounts, shall be the device again.
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


@contextmanager
def _mounted(mountpoint: Path, options: set[str]) -> Iterator[tuple[mounts.Mount, int, int]]:
    """The mount, a descriptor of its device that does not block, and libfuse's own of the same."""
    global _is_serving
    if _is_serving:
        raise RuntimeError("pyfuse3 serves one mount a process")
    before = set(_devices())
    try:
        pyfuse3.init(pyfuse3.Operations(), os.fspath(mountpoint), options)
    except RuntimeError as error:
        raise _why_not(mountpoint) from error
    _is_serving = True
    (libfuse_s,) = set(_devices()) - before
    device = os.dup(libfuse_s)
    os.set_blocking(device, False)
    mount = mounts.find(mountpoint)
    try:
        if mount is None:
            raise NotRunning(f"{mountpoint} was unmounted at once")
        yield mount, device, libfuse_s
    finally:
        os.close(device)
        # After a lazy unmount from outside another session may be mounted at this path: that one must stay.
        top = mounts.find(mountpoint)
        still_there = mount is not None and top is not None and top.device == mount.device
        pyfuse3.close(unmount=still_there)
        _is_serving = False
        if still_there:
            # libfuse leaves it there, dead, if its connection was aborted through /sys/fs/fuse/connections.
            mounts.clear_stale(mountpoint)


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
