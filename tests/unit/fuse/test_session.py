"""What the guard lets through to pyfuse3, and what it logs."""

import errno
import logging
from collections.abc import Awaitable
from pathlib import Path

import pyfuse3
import pytest
import trio
from trio.testing import MockClock

from fsmount.errors import Corrupt, NotFound, Refused
from fsmount.fuse import session


class Cases:
    """A handler for each case; `read` and `forget` do what the test says."""

    def __init__(self, failure: BaseException | None = None, *, answer: bytes = b"") -> None:
        self.failure = failure
        self.answer = answer
        self.cancelled = False

    async def read(self, fh: int, off: int, size: int) -> bytes:
        if self.failure is not None:
            raise self.failure
        return self.answer

    def readlink(self, inode: int, ctx: None) -> bytes:
        if self.failure is not None:
            raise self.failure
        return self.answer

    def getxattr(self, inode: int, name: bytes, ctx: None) -> Awaitable[bytes]:
        return self.read(inode, 0, 0)

    async def forget(self, inodes: list[tuple[int, int]]) -> None:
        if self.failure is not None:
            raise self.failure

    async def lookup(self, parent: int, name: bytes, ctx: None) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled = True
            raise

    open = lookup


async def _errno_of(answer: Awaitable[object]) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await answer
    return caught.value.errno


@pytest.mark.parametrize(
    "call",
    [
        lambda guarded: guarded.read(1, 0, 9),
        lambda guarded: guarded.readlink(1, None),
        lambda guarded: guarded.getxattr(1, b"user.a", None),
    ],
    ids=["async", "at-once", "at-once-a-coroutine"],
)
@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (pyfuse3.FUSEError(errno.ENODATA), errno.ENODATA),
        (Corrupt("sha256:… is damaged"), errno.EBADMSG),
        (NotFound("no such tag"), errno.ENOENT),
        (KeyError("bug"), errno.EIO),
        (ExceptionGroup("of a nursery", [ValueError("bug")]), errno.EIO),
    ],
    ids=repr,
)
async def test_every_failure_leaves_as_a_fuse_error(call, failure: Exception, expected: int) -> None:  # type: ignore[no-untyped-def]
    assert await call(session.guarded(Cases(answer=b"bytes"))) == b"bytes"
    assert await _errno_of(call(session.guarded(Cases(failure)))) == expected


@pytest.mark.parametrize(
    "failure", [pyfuse3.FUSEError(errno.EIO), NotFound("gone"), ValueError("bug")], ids=repr
)
async def test_nothing_leaves_forget_since_pyfuse3_would_die_of_it(failure: Exception) -> None:
    await session.guarded(Cases(failure)).forget([(pyfuse3.InodeT(1), 1)])


async def test_a_handler_that_is_not_there_is_not_implemented() -> None:
    assert await _errno_of(session.guarded(Cases()).rmdir(1, b"name", None)) == errno.ENOSYS  # type: ignore[arg-type]


@pytest.mark.parametrize(("handler", "seconds"), [("lookup", 10.0), ("open", 60.0)])
async def test_an_answer_too_late_is_a_timeout(
    handler: str, seconds: float, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    cases = Cases()
    assert await _errno_of(getattr(session.guarded(cases), handler)(1, b"name", None)) == errno.ETIMEDOUT
    assert trio.current_time() == pytest.approx(seconds)
    assert cases.cancelled
    assert [record.getMessage() for record in caplog.records] == [
        f"{handler}: ETIMEDOUT: no answer within {seconds:g} s"
    ]


async def test_cancellation_from_outside_passes(autojump_clock: MockClock) -> None:
    cases = Cases()
    with trio.move_on_after(1) as scope:
        await session.guarded(cases).lookup(1, b"name", None)  # type: ignore[arg-type]
    assert scope.cancelled_caught
    assert cases.cancelled


async def test_a_named_failure_is_logged_once_a_minute_and_without_traceback(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    guarded = session.guarded(Cases(Corrupt("sha256:… is damaged", remedy="Not for the log.")))
    for _ in range(61):
        await _errno_of(guarded.read(pyfuse3.FileHandleT(1), 0, 9))
        await trio.sleep(1)
    assert [record.getMessage() for record in caplog.records] == ["read: EBADMSG: sha256:… is damaged"] * 2
    assert all(record.exc_info is None and record.levelno == logging.WARNING for record in caplog.records)


async def test_a_thousand_different_failures_a_minute_are_enough_for_the_log(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    cases = Cases()
    guarded = session.guarded(cases)
    for number in range(1100):
        cases.failure = NotFound(f"no tag {number}")
        await _errno_of(guarded.read(pyfuse3.FileHandleT(1), 0, 9))
    assert len(caplog.records) == 1000
    await trio.sleep(60)
    await _errno_of(guarded.read(pyfuse3.FileHandleT(1), 0, 9))
    assert len(caplog.records) == 1001


async def test_an_unexpected_exception_is_logged_once_a_site_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cases = Cases()
    guarded = session.guarded(cases)
    for bug in (KeyError("one"), KeyError("again"), IndexError("another")):
        cases.failure = bug
        await _errno_of(guarded.read(pyfuse3.FileHandleT(1), 0, 9))
    assert [record.exc_info and record.exc_info[1] for record in caplog.records] == [
        caplog.records[0].exc_info and caplog.records[0].exc_info[1],
        cases.failure,
    ]
    assert all(record.levelno == logging.ERROR for record in caplog.records)


@pytest.mark.parametrize(
    ("line", "permitted"),
    [
        ("user_allow_other", True),
        ("  user_allow_other", True),
        ("#user_allow_other", False),
        ("mount_max = 9", False),
    ],
)
def test_a_user_may_let_others_in_if_fuse_conf_says_so(
    line: str, permitted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "fuse.conf"
    conf.write_text(f"# comment\n{line}\n")
    monkeypatch.setattr(session, "_FUSE_CONF", conf)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert ("allow_other" in session._options(None)) is permitted
    assert "allow_other" not in session._options(False)
    if not permitted:
        with pytest.raises(Refused, match="only root"):
            session._options(True)
