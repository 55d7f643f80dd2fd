"""The reader: one process that does something with the mount, knows what is right, and writes down what is not."""

import errno
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.soaking.builds import Builds, File, Tree, content
from scripts.soaking.diary import Diary, Event
from scripts.soaking.subject import environment

#: What a program may take that does many calls, each of which may take its deadline, before it is told to end.
_PROGRAM_SECONDS = 40.0
#: What it may take to end then.
_ENDING_SECONDS = 5.0
#: What is asked for at once.
SIZES = (4096, 65536, 131072, 1 << 20)


@dataclass(frozen=True, slots=True)
class Task:
    """What one reader is to do. `scope`: the tags that it reads, as APP/TAG."""

    kind: str
    name: str
    point: str
    builds: str
    folder: str
    seed: str
    scope: tuple[str, ...]
    pause: float


def start(task: Task) -> subprocess.Popen[bytes]:
    """The process of a reader. Ownership: the caller ends it, with SIGTERM."""
    log = Path(task.folder) / f"{task.name}.log"
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "scripts.soaking.readers", json.dumps(asdict(task))],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


class Reader:
    """What all readers have: the mount, what is known of it, dice, and a diary."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.builds = Builds.load(Path(task.builds))
        self.diary = Diary(Path(task.folder), task.name)
        self.dice = random.Random(f"{task.seed}/{task.name}")
        #: What wrong bytes are: those of a layer that streams for the first time are not verified before its end.
        self.wrong = "UNVERIFIED" if task.kind == "fresh" else "WRONG"

    def choose(self) -> tuple[Path, Tree]:
        """One tag of the scope: its folder, and what it shows."""
        tag = self.dice.choice(self.task.scope)
        app, _, name = tag.partition("/")
        return Path(self.task.point, tag), self.builds.trees[app][name]

    def pause(self) -> None:
        self.diary.pause(self.task.pause * self.dice.uniform(0.5, 1.5))

    def open(self, path: Path | str, *, folder: int | None = None) -> int | None:
        return self.diary.attempt("open", str(path), lambda: os.open(path, os.O_RDONLY, dir_fd=folder))

    def read_whole(self, path: Path | str, file: File, *, folder: int | None = None) -> bool:
        """Reads a file from the mount, not from the kernel's pages, and compares. Whether all was right."""
        descriptor = self.open(path, folder=folder)
        if descriptor is None:
            return False
        try:
            forget_pages(descriptor)
            begin = time.monotonic()
            data = bytearray()
            size = self.dice.choice(SIZES)
            while True:
                piece = self.read(str(path), descriptor, size, len(data))
                if piece is None:
                    return False
                if not piece:
                    break
                data += piece
            self.diary.counts["file"] += 1
            if hashlib.sha256(data).hexdigest() == file.sha256:
                self.diary.verified += len(data)
                return True
            expected = content(file.seed, file.size) if file.seed else b""
            return self.diary.compare("read", str(path), begin, bytes(data), expected, error=self.wrong)
        finally:
            os.close(descriptor)

    def read(self, what: str, descriptor: int, size: int, offset: int) -> bytes | None:
        return self.diary.attempt(
            "read", f"{what} [{offset}:+{size}]", lambda: os.pread(descriptor, size, offset)
        )

    def run(
        self,
        kind: str,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        codes: Mapping[int, str] | None = None,
    ) -> tuple[str, int] | None:
        """What a program prints, and its exit status; None if it met an error, which is noted.

        One that takes too long is told to end, as a user would; it must do so at once. codes: which error an exit
        status stands for; without them each line of stderr is one.
        """
        what = " ".join(map(str, command))
        begin = time.monotonic()

        def program() -> tuple[str, str, int]:
            with subprocess.Popen(
                list(map(str, command)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="surrogateescape",
                cwd=cwd,
                env=environment(Path(self.task.folder)),
            ) as process:
                try:
                    out, err = process.communicate(timeout=_PROGRAM_SECONDS)
                    return out, err, process.returncode
                except subprocess.TimeoutExpired:
                    self.diary.counts[f"{kind} given up"] += 1
                    return self._end(kind, what, process)
                except BaseException:
                    process.terminate()
                    process.wait()
                    raise

        done = self.diary.attempt(kind, what, program)
        if done is None:
            return None
        out, err, status = done
        lines = [line for line in err.splitlines() if line.strip()]
        if codes is not None:
            lines = lines[-1:] if status else []
        failures = [(codes or {}).get(status) or _errno_of(line) for line in lines]
        if status < 0 and not failures:
            failures, lines = [f"signal {-status}"], [what]
        for failure, line in zip(failures, lines, strict=True):
            self.diary.note(Event(self.task.name, kind, what, begin, time.monotonic(), failure, line))
        return None if failures else (out, status)

    def _end(self, kind: str, what: str, process: subprocess.Popen[str]) -> tuple[str, str, int]:
        told = time.monotonic()
        process.terminate()
        try:
            process.communicate(timeout=_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self.diary.wrong(kind, what, told, f"told to end, it went on for more than {_ENDING_SECONDS:g} s")
            process.kill()
            process.communicate()
        # As if it had been interrupted at the call that it waited for.
        return "", os.strerror(errno.EINTR), 1

    def check_names(self, kind: str, what: str, begin: float, got: set[str], expected: set[str]) -> None:
        if got != expected:
            missing, more = sorted(expected - got)[:5], sorted(got - expected)[:5]
            self.diary.wrong(
                kind, what, begin, f"{len(got)} names for {len(expected)}: missing {missing}, too many {more}"
            )


def forget_pages(descriptor: int) -> None:
    """Has the kernel ask the mount again for what it has of a file."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


_ERRNOS = {os.strerror(number): name for number, name in errno.errorcode.items()}


def _errno_of(line: str) -> str:
    """The name of the errno that ends a message; the message, if none does."""
    known = next((name for text, name in _ERRNOS.items() if re.search(rf"\b{re.escape(text)}\b", line)), None)
    return known or f"message: {line}"
