"""The program as its users run it: commands, and a mount that is always taken down."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fsmount.fuse import mounts

_SECONDS = 100
_DAEMON_SECONDS = 20


def fsmount(
    *arguments: str | Path, cache: Path, code: int = 0, stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs a command, and fails with what it said if its exit code is not `code`."""
    done = run(*arguments, cache=cache)
    assert done.returncode == code, done.stderr.decode(errors="replace")
    return done


def run(*arguments: str | Path, cache: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(*arguments),
        env=environment(cache),
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=_SECONDS,
        check=False,
    )


def command(*arguments: str | Path) -> list[str]:
    """The words of a command line, for those who start it themselves; `environment` goes with it."""
    return [sys.executable, "-m", "fsmount", *map(str, arguments)]


def environment(cache: Path) -> Mapping[str, str]:
    """No more than the program needs, and nothing of the user's who runs the tests."""
    return {
        "FSMOUNT_CACHE": str(cache),
        "FSMOUNT_CONFIG": "/dev/null",
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": str(cache.parent),
    }


@contextmanager
def mounted(
    work: Path,
    *apps: str,
    cache: Path | None = None,
    config: str = "",
    flags: Sequence[str | Path] = (),
) -> Iterator[Path]:
    """A mount of apps (NAME=REPOSITORY) and of those in a configuration, in a folder of work.

    Afterwards nothing is mounted there, and it is a failure if its process does not end by itself.
    """
    mountpoint = work / "mnt"
    mountpoint.mkdir(exist_ok=True)
    (work / "config.toml").write_text(config)
    options = ["--config", work / "config.toml", *(word for app in apps for word in ("--app", app)), *flags]
    try:
        fsmount("mount", mountpoint, *options, cache=cache or work / "cache")
        yield mountpoint
    finally:
        take_down(mountpoint)


def take_down(mountpoint: Path) -> None:
    """Unmounts whatever is there, and fails if a process that served it has to be killed."""
    while mounts.find(mountpoint) is not None:
        mounts.unmount(mountpoint, lazy=True)
    if not wait_until(lambda: not daemons(mountpoint)):
        left = daemons(mountpoint)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise AssertionError(f"{left} went on without the mount {mountpoint}")


def daemons(mountpoint: Path) -> list[int]:
    """The processes that serve a mount there, or are about to, and those that hold it."""
    words = [b"-m", b"fsmount", b"mount", os.fsencode(mounts.resolve(mountpoint))]
    return [pid for pid, line in _processes() if [word for word in line if word != b"-P"][1:5] == words]


def daemon(mountpoint: Path) -> int:
    """The one process that serves a mount there."""
    pids = daemons(mountpoint)
    (pid,) = (pid for pid in pids if _parent(pid) in pids)
    return pid


def holder(mountpoint: Path) -> int:
    """The one process that holds a mount there, and starts another when the one that serves it ends."""
    return _parent(daemon(mountpoint))


def kill(mountpoint: Path) -> None:
    """Leaves nobody who serves a mount there, or would start somebody who does: it is dead afterwards."""
    mount = mounts.find(mountpoint)
    assert mount is not None
    for pid in (holder(mountpoint), *daemons(mountpoint)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: mounts.is_dead(mount))


def _parent(pid: int) -> int:
    """0 of a process that has just ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def wait_until(condition: Callable[[], object], *, seconds: float = _DAEMON_SECONDS) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _processes() -> Iterator[tuple[int, list[bytes]]]:
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):  # it has ended
                yield int(process.name), (process / "cmdline").read_bytes().split(b"\0")
