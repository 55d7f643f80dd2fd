"""mounts: what the kernel has mounted where, learned without touching what may be dead, and how to undo it.

A mount whose daemon has died answers ENOTCONN; one whose daemon is stuck answers nothing, and makes whoever
asks unkillable. The usual checks fail on both: of a dead mount `os.path.ismount` says False,
`os.makedirs(exist_ok=True)` raises FileExistsError, and mount(2) stacks a second one on it. So everything
here reads /proc; only `probe` speaks to a mount, through a child process that may be lost.
"""

import contextlib
import ctypes
import enum
import errno
import logging
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fsmount.errors import NotRunning, Refused, UsageError

log = logging.getLogger(__name__)

#: What mount(8) and df call our mounts; libfuse makes it of the option `subtype`.
FSTYPE = "fuse.fsmount"

_PROBE_SECONDS = 5.0
_FUSERMOUNT_SECONDS = 30.0
_MOST_LINKS = 40  # as many as the kernel follows (path_resolution(7))
_MOST_USERS = 10

# linux/fs.h
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo (proc_pid_mountinfo(5)).

    `options` are those of the mount and those of its file system. `device` is `major:minor`, and unique among
    the file systems that are alive, as `id` is among the mounts.
    """

    id: int
    parent: int
    device: str
    mountpoint: Path
    options: frozenset[str]
    fstype: str
    source: str

    def option(self, name: str) -> str | None:
        """The value of an option of the form name=value."""
        values = (option.partition("=")[2] for option in self.options if option.startswith(f"{name}="))
        return next(values, None)


class Health(enum.Enum):
    """What a mount answers."""

    LIVING = "living"
    DEAD = "dead"
    HUNG = "hung"


class User(NamedTuple):
    """A process that keeps a mount busy."""

    pid: int
    command: str


def parse(mountinfo: bytes) -> list[Mount]:
    """The mounts in a text of the form of /proc/self/mountinfo, in its order; what is no such line is left out."""
    mounts = []
    # Not splitlines: the names are of whoever may mount, and of what that splits at the kernel escapes only \n.
    for line in mountinfo.split(b"\n"):
        with contextlib.suppress(ValueError):
            mounts.append(_parse_line(line))
    return mounts


def _parse_line(line: bytes) -> Mount:
    """Raises: ValueError."""
    # Any number of optional fields stands before the lone hyphen.
    fields, _, file_system = line.partition(b" - ")
    number, parent, device, _root, mountpoint, mount_options = fields.split(b" ")[:6]
    fstype, source, super_options = file_system.split(b" ")[:3]
    options = mount_options.split(b",") + super_options.split(b",")
    return Mount(
        id=int(number),
        parent=int(parent),
        device=device.decode("ascii"),
        mountpoint=Path(_unescape(mountpoint)),
        options=frozenset(_unescape(option) for option in options),
        fstype=_unescape(fstype),
        source=_unescape(source),
    )


def mounted() -> list[Mount]:
    """Everything this process sees mounted."""
    return parse(Path("/proc/self/mountinfo").read_bytes())


def find(mountpoint: Path) -> Mount | None:
    """The mount at exactly this path; of several, the topmost, which hides the others."""
    path = resolve(mountpoint)
    here = [mount for mount in mounted() if mount.mountpoint == path]
    hidden = {mount.parent for mount in here}
    return next((mount for mount in here if mount.id not in hidden), None)


def is_ours(mount: Mount) -> bool:
    """Whether fsmount made it."""
    return mount.fstype == FSTYPE


def probe(mount: Mount, *, timeout_seconds: float = _PROBE_SECONDS) -> Health:
    """Ask whatever is topmost where mount is. Blocks until the answer, at most for timeout_seconds.

    The question is statfs, which the kernel never answers from a cache. A child process asks it, because a
    thread that waits for a stuck mount would keep this process from ever ending.
    """
    child = subprocess.Popen(
        ["stat", "-f", "--", mount.mountpoint],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
        # Without allow_other the kernel lets only the mounting user ask, and not root: so root asks as that user.
        user=_number(mount.option("user_id")),
        group=_number(mount.option("group_id")),
    )
    try:
        _, complaint = child.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        # Only a request that the daemon has not yet taken can be killed; else the child is left to its fate.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=0.1)
        return Health.HUNG
    return Health.DEAD if os.strerror(errno.ENOTCONN).encode() in complaint else Health.LIVING


def is_dead(mount: Mount) -> bool:
    """Whether its daemon is gone. A mount that does not answer in time is not dead. Blocks: see `probe`."""
    return probe(mount) is Health.DEAD


def prepare(mountpoint: Path) -> bool:
    """Make sure that fsmount can be mounted there; True if dead mounts had to be cleared for it.

    A directory that is not empty is accepted, as by mount(8). Blocks: see `probe`.

    Raises: UsageError if it is no directory; Refused if something is mounted there that is not dead and ours.
    """
    cleared = clear_stale(mountpoint)
    if mount := find(mountpoint):
        if is_ours(mount):
            raise Refused(
                f"fsmount is already mounted at {mountpoint}",
                remedy=f"Unmount it first: fsmount unmount {mountpoint}",
            )
        raise Refused(
            f"{mountpoint} is the mount point of {mount.source}, of type {mount.fstype}",
            remedy="Mount fsmount at another directory, for instance at one inside it.",
        )
    try:
        is_directory = stat.S_ISDIR(os.stat(mountpoint).st_mode)
    except FileNotFoundError:
        raise UsageError(f"{mountpoint} does not exist", remedy=f"Make it: mkdir -p {mountpoint}") from None
    except OSError as error:
        raise UsageError(f"{mountpoint} cannot be used as mount point: {error.strerror}") from error
    if not is_directory:
        raise UsageError(f"{mountpoint} is not a directory", remedy="Name a directory to mount at.")
    return cleared > 0


def clear_stale(mountpoint: Path) -> int:
    """Take away the dead fsmount mounts stacked there, from the top down; says how many. Blocks: see `probe`.

    Raises: Refused if that is not allowed.
    """
    cleared = 0
    while (mount := find(mountpoint)) and is_ours(mount) and is_dead(mount):
        _take_away(mount, lazy=True)
        cleared += 1
    return cleared


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Take away the topmost fsmount mount there, living or dead; when lazy, even one in use.

    Raises: NotRunning if nothing is mounted there; Refused if it is busy, not ours, or another user's.
    """
    mount = find(mountpoint)
    if mount is None:
        raise NotRunning(f"nothing is mounted at {mountpoint}")
    if not is_ours(mount):
        raise Refused(f"what is mounted at {mountpoint} is not fsmount's, but of type {mount.fstype}")
    _take_away(mount, lazy=lazy)


def detach(mount: Mount) -> None:
    """Take away a mount of ours, lazily; a complaint is logged: for the end of whoever has served it."""
    try:
        _take_away(mount, lazy=True)
    except Refused as error:
        log.warning("%s", error.message)


def users_of(mountpoint: Path) -> list[User]:
    """Up to ten processes that have part of the mount open, mapped or as their directory, if we may see it.

    It compares the texts of links in /proc, so it never touches the mount.
    """
    users: list[User] = []
    path = os.fspath(resolve(mountpoint))
    for process in Path("/proc").iterdir():
        if len(users) == _MOST_USERS:
            break
        if process.name.isdigit() and any(f"{used}/".startswith(f"{path}/") for used in _used_by(process)):
            users.append(User(int(process.name), _command(process)))
    return users


def set_read_ahead(mountpoint: Path, kib: int = 1024) -> bool:
    """Let the kernel read ahead that far; False if this user may not.

    It must have answered before: INIT resets the value. Sequential reads: 360 MB/s with the kernel's 128 KiB,
    1.3 GB/s with 1 MiB, the largest request libfuse takes.
    """
    mount = find(mountpoint)
    if mount is None:
        return False
    try:
        Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").write_text(f"{kib}\n")
    except OSError:
        return False
    return True


def resolve(mountpoint: Path) -> Path:
    """The mount point as the kernel writes it: absolute, without links.

    `os.path.realpath` would lstat the mount itself; readlink of its root never reaches the daemon.
    """
    path = mountpoint
    for _ in range(_MOST_LINKS):
        if path.name == "..":
            return Path(os.path.realpath(path))
        path = Path(os.path.realpath(path.parent), path.name)
        try:
            target = os.readlink(path)
        except OSError:
            return path
        path = path.parent / target
    return path


def _unescape(field: bytes) -> str:
    """Space, tab, newline and backslash are written in octal (`mangle` in the kernel's fs/seq_file.c)."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), field))


def _number(user: str | None) -> int | None:
    """For subprocess: root becomes that user; everyone else stays who they are."""
    return int(user) if user is not None and os.geteuid() == 0 else None


def _take_away(mount: Mount, *, lazy: bool) -> None:
    """Raises: Refused."""
    reason = _umount2(mount, lazy=lazy) if os.geteuid() == 0 else _fusermount(mount, lazy=lazy)
    # The kernel's list decides: somebody may have been quicker, or a mount on a parent may hide this one.
    if all(other.id != mount.id for other in mounted()):
        return
    if os.strerror(errno.EBUSY) in reason and not lazy:
        users = ", ".join(f"{user.command} ({user.pid})" for user in users_of(mount.mountpoint))
        raise Refused(
            f"{mount.mountpoint} is in use" + (f" by {users}" if users else ""),
            remedy="Stop what uses it, or unmount it with --lazy: then it is gone once the last user is.",
        )
    raise Refused(f"{mount.mountpoint} could not be unmounted: {reason or 'another mount hides it'}")


def _umount2(mount: Mount, *, lazy: bool) -> str:
    # Not umount(8), which looks at the mount first and may hang.
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    failed = libc.umount2(os.fsencode(mount.mountpoint), flags) != 0
    return os.strerror(ctypes.get_errno()) if failed else ""


def _fusermount(mount: Mount, *, lazy: bool) -> str:
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", os.fspath(mount.mountpoint)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, "LC_ALL": "C"},
            timeout=_FUSERMOUNT_SECONDS,
        )
    except FileNotFoundError:
        return "fusermount3 is not installed (package fuse3)"
    except subprocess.TimeoutExpired:
        return "fusermount3 does not end"
    return os.fsdecode(done.stderr).strip()


def _used_by(process: Path) -> Iterator[str]:
    # Processes end while they are looked at, and those of other users cannot be.
    with contextlib.suppress(OSError):
        for name in ("cwd", "root"):
            yield os.readlink(process / name)
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield os.readlink(descriptor)
        for line in (process / "maps").read_bytes().split(b"\n"):
            # address perms offset dev inode path: the path is the rest of the line.
            yield from map(os.fsdecode, line.split(maxsplit=5)[5:])


def _command(process: Path) -> str:
    try:
        return (process / "comm").read_text(errors="replace").strip()
    except OSError:
        return "?"
