"""tally: what became of the kernel's requests: how many there were, how long they took, and what failed."""

import errno
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from time import perf_counter

from fsmount.fuse.protocol import Opcode

#: Seconds that bound the classes of latency; the last class has no bound.
BOUNDS = (0.001, 0.01, 0.1, 1.0, 10.0)

#: Requests with a higher opcode are counted as one kind, as are all that have no name here.
_OPCODES = 64
_OTHER = "other"


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of request: how many of them took at most each of BOUNDS, and longer, one class after the other.

    `seconds` is what all of them took together; `errors` how many were answered with which errno, by its name.
    """

    name: str
    classes: Sequence[int]
    seconds: float
    errors: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Failure:
    """The last time that a request could not be answered as it should."""

    at: datetime
    message: str


class Tally:
    """Counts requests, once each, when they are answered. From 0, as a process begins."""

    def __init__(self) -> None:
        self.failure: Failure | None = None
        self._classes = [[0] * (len(BOUNDS) + 1) for _ in range(_OPCODES)]
        self._seconds = [0.0] * _OPCODES
        self._errors: Counter[tuple[int, int]] = Counter()

    def note(self, opcode: int, began: float) -> None:
        """An answer was sent to a request that was taken at `began`, of perf_counter.

        Measured at 0.5 µs, with the reading of both clocks, while the quickest request takes 15.
        """
        seconds = perf_counter() - began
        if opcode >= _OPCODES:
            opcode = 0
        self._classes[opcode][bisect_left(BOUNDS, seconds)] += 1
        self._seconds[opcode] += seconds

    def note_error(self, opcode: int, began: float, code: int) -> None:
        """As `note`, of an answer that is an errno."""
        self.note(opcode, began)
        self._errors[opcode if opcode < _OPCODES else 0, code] += 1

    def note_failure(self, message: str) -> None:
        """Beside that: what was answered is not how it should be."""
        self.failure = Failure(datetime.now(UTC), message)

    def operations(self) -> Iterator[Operation]:
        """What there was, by kind."""
        known = {opcode.value for opcode in Opcode}
        for opcode in sorted(known):
            if any(self._classes[opcode]):
                yield self._operation(Opcode(opcode).name.lower(), [opcode])
        others = [opcode for opcode in range(_OPCODES) if opcode not in known and any(self._classes[opcode])]
        if others:
            yield self._operation(_OTHER, others)

    def _operation(self, name: str, opcodes: Sequence[int]) -> Operation:
        errors: Counter[str] = Counter()
        for (opcode, code), count in self._errors.items():
            if opcode in opcodes:
                errors[errno.errorcode.get(code, str(code))] += count
        classes = [sum(column) for column in zip(*(self._classes[one] for one in opcodes), strict=True)]
        return Operation(name, classes, sum(self._seconds[one] for one in opcodes), dict(errors))
