"""The mount that is tried: its configuration, its small disk, its processes, and its end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fsmount.fuse import mounts
from tests.peers import run

#: How soon a tag that has moved is noticed.
REFRESH_SECONDS = 5
NAMES_SECONDS, CONTENT_SECONDS = 10, 20
CACHE_BYTES = 64_000_000
_DISK_SIZE = "96m"


class Broken(Exception):
    """A command of the program did not do what it is for; the message says what it said."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process that serves the mount, or keeps those that do."""

    pid: int
    parent: int


@dataclass(slots=True)
class Subject:
    """The mount at `point`, with its cache on a tmpfs at `disk`. Ownership: `mounted` takes all of it away."""

    point: Path
    disk: Path
    config: Path
    log: Path

    @property
    def chunks(self) -> Path:
        """Where the content lies that may be dropped."""
        return self.disk / "cache/chunks"

    def chunk_bytes(self) -> int:
        """What the chunks take of the disk, with what is being written and their database."""
        total = 0
        for folder, _, names in os.walk(self.chunks):
            for name in names:
                with suppress(OSError):  # it was evicted meanwhile
                    total += os.stat(os.path.join(folder, name)).st_blocks * 512
        return total

    def processes(self) -> list[Process]:
        """All that serve the mount or keep it: those that were started with its mount point."""
        wanted = b"\0".join([b"", b"fsmount", b"mount", os.fsencode(self.point), b""])
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with suppress(OSError, IndexError):  # it has ended
                    if wanted in (folder / "cmdline").read_bytes():
                        fields = (folder / "stat").read_text().rpartition(")")[2].split()
                        if fields[0] != "Z":
                            found.append(Process(int(folder.name), int(fields[1])))
        return found

    def worker(self) -> int | None:
        """The process that answers, or is about to; None if there is none now."""
        processes = self.processes()
        keepers = {process.pid for process in processes}
        children = [process.pid for process in processes if process.parent in keepers]
        return children[-1] if children else None

    def kill_worker(self, number: signal.Signals = signal.SIGKILL) -> int | None:
        """Sends a signal to the worker, if there is one; returns whom it hit."""
        pid = self.worker()
        with suppress(ProcessLookupError):
            if pid is not None:
                os.kill(pid, number)
                return pid
        return None

    def say(self, *words: str | Path, seconds: float = 60) -> str:
        """What a command of the program prints. Raises: Broken."""
        command = [sys.executable, "-P", "-m", "fsmount", *map(str, words)]
        try:
            done = subprocess.run(
                command,
                env=environment(self.config.parent),
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Broken(f"fsmount {' '.join(map(str, words))} has not ended within {seconds:g} s") from None
        if done.returncode:
            said = done.stderr.strip()[-2000:]
            raise Broken(f"fsmount {' '.join(map(str, words))} ended with {done.returncode}: {said}")
        return done.stdout

    def start(self) -> None:
        """Raises: Broken."""
        self.say("mount", self.point, "--config", self.config, "--log-file", self.log)
        if self.worker() is None:
            raise Broken(f"no process was found that serves {self.point} for another one")

    def is_mounted(self) -> bool:
        return mounts.find(self.point) is not None

    def leftovers(self, seconds: float = 15) -> list[str]:
        """What is left of the mount so long after it was taken away."""
        deadline = time.monotonic() + seconds
        while True:
            left = [f"process {process.pid}" for process in self.processes()]
            left += [f"mount {self.point}"] if self.is_mounted() else []
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.1)

    def clean(self) -> None:
        """Takes away whatever is left, by force."""
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        while self.is_mounted():
            mounts.unmount(self.point, lazy=True)


@contextmanager
def prepared(work: Path, host: str, apps: Iterable[str]) -> Iterator[Subject]:
    """A subject that is not started yet, showing `apps` of the registry at `host`; nothing of it is left afterwards."""
    subject = Subject(work / "mnt", work / "disk", work / "config.toml", work / "mount.log")
    subject.point.mkdir()
    subject.disk.mkdir()
    subject.config.write_text(_configuration(subject, host, apps))
    run("mount", "-t", "tmpfs", "-o", f"size={_DISK_SIZE},mode=0700", "tmpfs", subject.disk)
    try:
        yield subject
    finally:
        subject.clean()
        # Lazily: what is killed may have a file open for another moment.
        run("umount", "-l", subject.disk)


def _configuration(subject: Subject, host: str, apps: Iterable[str]) -> str:
    tables = [f'[apps.{app}]\nrepository = "{host}/team/{app}"' for app in apps]
    return "\n".join(
        [
            f'[cache]\npath = "{subject.disk}/cache"\nsize = {CACHE_BYTES}\nmin_free = 0',
            f'[defaults]\nrefresh = "{REFRESH_SECONDS}s"',
            '[network]\nconnect_timeout = "3s"\nstall_timeout = "8s"',
            f'[deadlines]\nnames = "{NAMES_SECONDS}s"\ncontent = "{CONTENT_SECONDS}s"',
            f'[registries."{host}"]\nplain_http = true',
            *tables,
            "",
        ]
    )


def environment(home: Path) -> dict[str, str]:
    """No more than the program needs, and nothing of the user's who runs this."""
    return {
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
        "LC_ALL": "C.UTF-8",
        "HOME": str(home),
        "PYTHONPATH": os.getcwd(),
    }


def descriptors_and_memory(pids: Sequence[int]) -> list[str]:
    """What processes hold now, one line each."""
    lines = []
    for pid in pids:
        with suppress(OSError):
            count = len(os.listdir(f"/proc/{pid}/fd"))
            status = Path(f"/proc/{pid}/status").read_text()
            memory = next((line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")), "0")
            lines.append(f"process {pid}: {count} descriptors, {int(memory) // 1024} MB")
    return lines
