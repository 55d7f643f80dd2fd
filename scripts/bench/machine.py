"""Runs other people's programs under a clock and a deadline, and looks at what the kernel counted."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEADLINE_SECONDS = 600.0


class Failed(Exception):
    """A program ended with an error or not at all; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Done:
    """A program that ended well: how long it took, what it printed, and the bytes it read by read(2)."""

    seconds: float
    output: str
    read_bytes: int


def timed(
    command: Sequence[str | Path] | str, *, cwd: Path | None = None, stdin: str = "", ok: int = 0
) -> Done:
    """Run a program, or a line of bash with pipefail, in a process group of its own.

    `ok` is the highest exit status that is no failure. Raises: Failed.
    """
    shell = isinstance(command, str)
    argv = ["bash", "-c", f"set -o pipefail; {command}"] if shell else [str(word) for word in command]
    began = time.perf_counter()
    with (
        os.fdopen(os.memfd_create("stdin"), "w+") as feed,
        os.fdopen(os.memfd_create("stdout"), "w+", errors="replace") as out,
        os.fdopen(os.memfd_create("stderr"), "w+", errors="replace") as said,
    ):
        if stdin:
            feed.write(stdin)
            feed.seek(0)
        process = subprocess.Popen(argv, cwd=cwd, stdin=feed, stdout=out, stderr=said, start_new_session=True)
        try:
            _wait_unreaped(process.pid, began + DEADLINE_SECONDS)
            seconds, read_bytes = time.perf_counter() - began, _read_bytes(process.pid)
            status = process.wait()
        except BaseException:
            _end(process)
            raise
        out.seek(0)
        said.seek(0)
        if not 0 <= status <= ok:
            what = command[:120] if isinstance(command, str) else " ".join(argv[:2])
            raise Failed(f"{what} … ended with {status}: {' '.join(said.read()[-400:].split())}")
        return Done(seconds, out.read(), read_bytes)


def probe(kind: str, path: Path, stdin: str = "") -> float:
    """Seconds of one access, see probe.py."""
    return float(timed([sys.executable, "-m", "scripts.bench.probe", kind, path], stdin=stdin).output)


def drop_caches() -> None:
    """As root: forget every clean page, name and inode of disks and mounts; tmpfs keeps its own."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def resident_megabytes(mountpoint: Path) -> tuple[float, float]:
    """Memory now and at most of the processes that name a mount point in their arguments, all together.

    Now is the proportional set size: what forked processes share is counted once. Raises: Failed: none does.
    """
    now = most = 0.0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if os.fsencode(mountpoint) in (folder / "cmdline").read_bytes().split(b"\0"):
                    now += _kilobytes(folder / "smaps_rollup", "Pss:") / 1024
                    most += _kilobytes(folder / "status", "VmHWM:") / 1024
            except OSError:
                continue
    if not now:
        raise Failed(f"no process names {mountpoint} in its arguments")
    return now, most


def mounts_below(folder: Path) -> list[Path]:
    """Mount points inside a folder, the innermost first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [Path(line.split(" ")[4].replace("\\040", " ")) for line in lines]
    return sorted((one for one in points if folder in one.parents), key=lambda one: -len(one.parts))


def _wait_unreaped(pid: int, deadline: float) -> None:
    """Wait for the end of a child and leave it a zombie, whose counters can still be read."""
    fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.perf_counter()) * 1000):
            raise Failed(f"no end after {DEADLINE_SECONDS:.0f} s")
    finally:
        os.close(fd)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to end, so that a program that mounts can undo it; then make it."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read_bytes(pid: int) -> int:
    counters = Path(f"/proc/{pid}/io").read_text().split()
    return int(counters[counters.index("rchar:") + 1])


def _kilobytes(path: Path, name: str) -> float:
    words = path.read_text().split()
    return float(words[words.index(name) + 1])
