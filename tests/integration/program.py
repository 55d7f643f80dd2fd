"""The program as its users run it: commands, and a mount that is always taken down."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsmount.fuse import mounts

_SECONDS = 100


def fsmount(
    *arguments: str | Path, cache: Path, code: int = 0, stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs a command, and fails with what it said if its exit code is not `code`."""
    done = run(*arguments, cache=cache)
    assert done.returncode == code, done.stderr.decode(errors="replace")
    return done


def run(*arguments: str | Path, cache: Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "fsmount", *map(str, arguments)]
    environment = {
        "FSMOUNT_CACHE": str(cache),
        "FSMOUNT_CONFIG": "/dev/null",
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
    }
    environment["HOME"] = str(cache.parent)
    return subprocess.run(
        command, env=environment, capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS, check=False
    )


@contextmanager
def mounted(work: Path, *apps: str, cache: Path | None = None) -> Iterator[Path]:
    """A mount of apps (NAME=REPOSITORY) in a folder of work."""
    mountpoint = work / "mnt"
    mountpoint.mkdir(exist_ok=True)
    flags = [word for app in apps for word in ("--app", app)]
    fsmount("mount", mountpoint, *flags, cache=cache or work / "cache")
    try:
        yield mountpoint
    finally:
        if mounts.find(mountpoint) is not None:
            mounts.unmount(mountpoint, lazy=True)
