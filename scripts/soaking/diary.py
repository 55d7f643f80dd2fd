"""What a reader writes down: what it does now, what failed or took long, what was wrong, and how much was right."""

import errno
import json
import mmap
import os
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

_Result = TypeVar("_Result")

#: An operation that took less is only counted.
WORTH_NOTING_SECONDS = 0.05
_SLOT_SIZE = 4096
_COUNTING_SECONDS = 1.0
_EVIDENCE_BYTES = 16
#: Of one reader, files of wrong bytes that are kept.
_MOST_EVIDENCE = 10


@dataclass(frozen=True, slots=True)
class Event:
    """One operation that failed or took long, or what was found wrong. Times are of CLOCK_MONOTONIC.

    `error` is the name of an errno or of a signal; "WRONG" for wrong bytes, names or sizes, "UNVERIFIED" where a
    layer may be wrong because it streams for the first time; None if only the time is worth noting.
    """

    reader: str
    kind: str
    what: str
    begin: float
    end: float
    error: str | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Now:
    """What a reader is at: since when, and what."""

    begin: float
    text: str


class Stop(Exception):
    """This reader was told to end."""


class Diary:
    """The diary of one reader, in files of a folder, which outlive it however it ends."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        #: Bytes that were compared and right.
        self.verified = 0
        self.is_stopping = False
        self._folder = folder
        self._events = (folder / f"{name}.events").open("a", buffering=1)
        with (folder / f"{name}.now").open("w+b") as slot:
            slot.truncate(_SLOT_SIZE)
            self._slot = mmap.mmap(slot.fileno(), _SLOT_SIZE)
        self._counted = 0.0
        self._is_calling = False

    def attempt(
        self, kind: str, what: str, call: Callable[[], _Result], *, count: bool = True
    ) -> _Result | None:
        """What call returns; None if it failed, which is noted. call returns something else than None.

        Raises: Stop, when this reader was told to end.
        """
        self._check()
        begin = time.monotonic()
        text = f"{kind} {what}".encode(errors="backslashreplace")[: _SLOT_SIZE - 16]
        self._slot[8 : 8 + len(text) + 1] = text + b"\0"
        self._slot[:8] = struct.pack("d", begin)
        failure, result = None, None
        self._is_calling = True
        try:
            result = call()
        except OSError as error:
            failure = errno.errorcode.get(error.errno or 0, repr(error))
        finally:
            self._is_calling = False
            self._slot[:8] = bytes(8)
        end = time.monotonic()
        self.counts[kind] += count
        if failure is not None or end - begin >= WORTH_NOTING_SECONDS:
            self.note(Event(self.name, kind, what, begin, end, failure))
        return result

    def note(self, event: Event) -> None:
        self._events.write(json.dumps(asdict(event)) + "\n")

    def wrong(self, kind: str, what: str, begin: float, text: str, *, error: str = "WRONG") -> None:
        """Notes something that, unless it has another name, no fault excuses."""
        self.note(Event(self.name, kind, what, begin, time.monotonic(), error, text))

    def compare(
        self,
        kind: str,
        what: str,
        begin: float,
        got: bytes,
        expected: bytes,
        *,
        offset: int = 0,
        error: str = "WRONG",
    ) -> bool:
        """Whether bytes that were read at an offset are right; if not, they are kept beside the diary."""
        if got == expected:
            self.verified += len(got)
            return True
        at = next(
            (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b),
            min(len(got), len(expected)),
        )
        evidence = self._folder / f"wrong-{self.name}-{self.counts['wrong']}"
        if self.counts["wrong"] < _MOST_EVIDENCE:
            evidence.write_bytes(got)
            evidence.with_suffix(".expected").write_bytes(expected)
        self.counts["wrong"] += 1
        self.wrong(
            kind,
            what,
            begin,
            f"{len(got)} bytes at {offset} differ from byte {offset + at} on: "
            f"expected {expected[at : at + _EVIDENCE_BYTES].hex()}, got {got[at : at + _EVIDENCE_BYTES].hex()}; "
            f"all of it is in {evidence}",
            error=error,
        )
        return False

    def pause(self, seconds: float) -> None:
        """Waits, or ends. Raises: Stop."""
        self._check()
        time.sleep(seconds)
        self._check()

    def close(self) -> None:
        self._count()
        self._events.close()
        self._slot.close()

    def _check(self) -> None:
        if time.monotonic() - self._counted > _COUNTING_SECONDS:
            self._count()
        if self.is_stopping:
            raise Stop

    def _count(self) -> None:
        self._counted = time.monotonic()
        path = self._folder / f"{self.name}.counts"
        path.with_suffix(".new").write_text(json.dumps({"counts": self.counts, "verified": self.verified}))
        path.with_suffix(".new").rename(path)

    def stop(self, *_: object) -> None:
        """Has the reader end: at once, if it waits for a call. For a signal handler."""
        self.is_stopping = True
        if self._is_calling:
            raise Stop  # or the interpreter would begin the call anew


def events(folder: Path) -> list[Event]:
    """All that readers have noted so far."""
    found = []
    for path in sorted(folder.glob("*.events")):
        for line in path.read_text().splitlines():
            with suppress(ValueError):  # the last line of one that was killed may be cut
                found.append(Event(**json.loads(line)))
    return found


def counts(folder: Path) -> tuple[Counter[str], int]:
    """Operations of all readers by kind, and bytes that were right."""
    total: Counter[str] = Counter()
    verified = 0
    for path in folder.glob("*.counts"):
        said = json.loads(path.read_text())
        total.update(said["counts"])
        verified += said["verified"]
    return total, verified


def now(folder: Path, name: str) -> Now | None:
    """What a reader is at; None between two operations."""
    with suppress(OSError, struct.error):  # it has not begun yet
        data = (folder / f"{name}.now").read_bytes()
        (begin,) = struct.unpack_from("d", data)
        if begin:
            return Now(begin, os.fsdecode(data[8:].partition(b"\0")[0]))
    return None
