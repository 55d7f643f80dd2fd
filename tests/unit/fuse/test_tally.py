"""What is counted of the kernel's requests."""

import errno
from collections.abc import Mapping
from datetime import UTC, datetime

import pytest

from fsmount.fuse import tally
from fsmount.fuse.protocol import Opcode
from fsmount.fuse.tally import BOUNDS, Operation, Tally

_OPEN, _GETXATTR, _FAR = 14, 22, 4096


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Tally:
    """A tally in which it is 1000 seconds past something."""
    monkeypatch.setattr(tally, "perf_counter", lambda: 1000.0)
    return Tally()


def by_name(noted: Tally) -> Mapping[str, Operation]:
    return {operation.name: operation for operation in noted.operations()}


def test_of_what_was_never_asked_there_is_nothing_to_tell(noted: Tally) -> None:
    assert list(noted.operations()) == []
    assert noted.failure is None


@pytest.mark.parametrize(
    "seconds, place",
    [(0.0, 0), (0.0009, 0), (0.0011, 1), (0.0101, 2), (0.1001, 3), (1.001, 4), (10.001, 5), (60.0, 5)],
)
def test_each_answer_counts_in_the_class_of_the_time_that_it_took(
    noted: Tally, seconds: float, place: int
) -> None:
    noted.note(Opcode.READ, 1000.0 - seconds)
    (operation,) = noted.operations()
    assert [count for count in operation.classes if count] == [operation.classes[place]] == [1]
    assert len(operation.classes) == len(BOUNDS) + 1
    assert operation.seconds == pytest.approx(seconds)


def test_kinds_are_counted_apart_and_those_without_a_name_together(noted: Tally) -> None:
    for opcode in (Opcode.READ, Opcode.READ, Opcode.LOOKUP, _OPEN, _GETXATTR, _FAR):
        noted.note(opcode, 999.5)
    found = by_name(noted)
    assert {name: sum(one.classes) for name, one in found.items()} == {"lookup": 1, "read": 2, "other": 3}
    assert found["other"].seconds == 1.5


def test_an_answer_that_is_an_errno_counts_as_an_answer_too(noted: Tally) -> None:
    noted.note(Opcode.READ, 1000.0)
    for code in (errno.EIO, errno.EIO, errno.ETIMEDOUT):
        noted.note_error(Opcode.READ, 1000.0, code)
    for opcode in (_OPEN, _GETXATTR, _FAR):
        noted.note_error(opcode, 1000.0, errno.ENOSYS)
    found = by_name(noted)
    assert (sum(found["read"].classes), found["read"].errors) == (4, {"EIO": 2, "ETIMEDOUT": 1})
    assert (sum(found["other"].classes), found["other"].errors) == (3, {"ENOSYS": 3})


def test_the_last_failure_is_kept_with_its_time(noted: Tally) -> None:
    noted.note_failure("one")
    noted.note_failure("another")
    assert noted.failure is not None and noted.failure.message == "another"
    assert abs((datetime.now(UTC) - noted.failure.at).total_seconds()) < 60
