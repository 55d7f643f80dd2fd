"""The loop over a socket in place of /dev/fuse: every request is answered once, and how."""

import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount.errors import Corrupt, NotFound
from fsmount.fuse.protocol import BUFFER_SIZE, Attributes, Listing, Opcode, Refusal, absent, amended_init
from fsmount.fuse.requests import Deadlines, Journal, answer_requests
from fsmount.fuse.tally import Tally

_FILE = Attributes(7, stat.S_IFREG | 0o644, 1, 2, 3, 0, 1000, -1_500_000_000, 5, 1.5, 86400.0)
_OPEN, _RELEASE, _GETXATTR = 14, 18, 22


@dataclass
class Cases:
    """Handlers that do what the test says, at once or in a coroutine."""

    failure: BaseException | None = None
    answer: bytes = b"bytes"
    waits: bool = False
    cancelled: int = 0
    asked: list[tuple[object, ...]] = field(default_factory=list)

    def _do(self, *asked: object) -> bytes:
        self.asked.append(asked)
        if self.failure is not None:
            raise self.failure
        return self.answer

    def lookup(self, parent: int, name: bytes) -> Attributes:
        self._do("lookup", parent, name)
        return _FILE

    async def getattr(self, inode: int) -> Attributes:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        raise AssertionError

    def readlink(self, inode: int) -> bytes:
        return self._do("readlink", inode)

    async def read(self, inode: int, offset: int, size: int) -> bytes:
        if self.waits:
            await self.getattr(inode)
        return self._do("read", inode, offset, size)

    def readdir(self, inode: int, after: int, size: int, *, plus: bool) -> bytes:
        return self._do("readdir", inode, after, size, plus)

    def statfs(self) -> bytes:
        return self._do("statfs")


class Kernel:
    """The other end of the device."""

    def __init__(self, end: socket.socket) -> None:
        self._raw = end
        self._end = trio.socket.from_stdlib_socket(end)
        self._unique = 0

    def send(self, opcode: int, inode: int = 1, body: bytes = b"", *, pid: int = 0) -> int:
        """Several that are sent without a pause are all there when the loop looks."""
        self._unique += 2
        header = struct.pack("=IIQQIIIHH", 40 + len(body), opcode, self._unique, inode, 0, 0, pid, 0, 0)
        self._raw.send(header + body)
        return self._unique

    async def receive(self) -> tuple[int, int, bytes]:
        """(unique, errno, what follows) of the next answer."""
        data = await self._end.recv(1 << 21)
        length, code, unique = struct.unpack_from("=IiQ", data)
        assert length == len(data)
        return unique, -code, data[16:]

    async def ask(self, opcode: int, inode: int = 1, body: bytes = b"") -> tuple[int, bytes]:
        unique = self.send(opcode, inode, body)
        answered, code, data = await self.receive()
        assert answered == unique
        return code, data


@asynccontextmanager
async def serving(
    cases: Cases, deadlines: Deadlines | None = None, tally: Tally | None = None
) -> AsyncIterator[Kernel]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        os.set_blocking(theirs.fileno(), False)
        async with trio.open_nursery() as nursery:
            answer = partial(answer_requests, theirs.fileno(), cases, deadlines or Deadlines(), tally=tally)
            nursery.start_soon(answer)
            yield Kernel(ours)
            nursery.cancel_scope.cancel()


def _read_in(offset: int, size: int) -> bytes:
    return struct.pack("=QQIIQII", 0, offset, size, 0, 0, 0, 0)


# -------------------- what is asked, and what is answered


async def test_each_request_reaches_its_handler_with_its_arguments() -> None:
    cases = Cases()
    async with serving(cases) as kernel:
        await kernel.ask(Opcode.READ, 9, _read_in(4096, 512))
        await kernel.ask(Opcode.READDIR, 9, _read_in(3, 100))
        await kernel.ask(Opcode.READDIRPLUS, 9, _read_in(3, 100))
        await kernel.ask(Opcode.LOOKUP, 9, b"a name\0")
        await kernel.ask(Opcode.READLINK, 9)
        await kernel.ask(Opcode.STATFS, 1, b"")
    assert cases.asked == [
        ("read", 9, 4096, 512),
        ("readdir", 9, 3, 100, False),
        ("readdir", 9, 3, 100, True),
        ("lookup", 9, b"a name"),
        ("readlink", 9),
        ("statfs",),
    ]


async def test_a_shorter_name_is_not_followed_by_the_rest_of_a_longer_one() -> None:
    cases = Cases()
    async with serving(cases) as kernel:
        await kernel.ask(Opcode.LOOKUP, 1, b"a very long name\0")
        await kernel.ask(Opcode.LOOKUP, 1, b"short\0")
    assert [name for _, _, name in cases.asked] == [b"a very long name", b"short"]


async def test_an_entry_is_a_name_s_inode_times_and_attributes() -> None:
    async with serving(Cases()) as kernel:
        code, data = await kernel.ask(Opcode.LOOKUP, 1, b"a\0")
    assert code == 0
    values = struct.unpack("=QQQQII6Q10I", data)
    assert values[:6] == (7, 0, 1, 86400, 500_000_000, 0)
    assert values[6:9] == (7, 1000, 2)
    assert values[9:12] == (2**64 - 2, 2**64 - 2, 0)  # before the epoch, and what remains is positive
    assert values[12:15] == (500_000_000, 500_000_000, 5)
    assert values[15:] == (stat.S_IFREG | 0o644, 1, 2, 3, 0, 4096, 0)


def test_a_listing_holds_as_many_entries_as_fit_and_none_after_one_that_does_not() -> None:
    listing = Listing(2 * (128 + 24 + 8) + 16, plus=True)
    assert listing.add(b"eight888", _FILE, 11)
    assert listing.add(b"x", _FILE, 12)
    assert not listing.add(b"nine99999", _FILE, 13)
    assert not listing.add(b"", _FILE, 14)
    data = listing.finish()
    assert len(data) == 320
    inode, offset, length, kind = struct.unpack_from("=QQII", data, 128)
    assert (inode, offset, length, kind) == (7, 11, 8, stat.S_IFREG >> 12)
    assert data[152:160] == b"eight888"
    assert data[160 + 152 :] == b"x" + bytes(7)


def test_a_listing_without_attributes_has_names_only() -> None:
    listing = Listing(64, plus=False)
    assert listing.add(b"name", _FILE, 5) and listing.add(b"other", _FILE, 6)
    assert not listing.add(b"third", _FILE, 7)
    assert struct.unpack_from("=QQII", listing.finish(), 32) == (7, 6, 5, stat.S_IFREG >> 12)


async def test_what_forgets_has_no_answer_and_others_go_on() -> None:
    async with serving(Cases()) as kernel:
        kernel.send(Opcode.FORGET, 7, struct.pack("=Q", 1))
        kernel.send(Opcode.BATCH_FORGET, 0, struct.pack("=IIQQ", 1, 0, 7, 1))
        assert await kernel.ask(Opcode.READLINK, 7) == (0, b"bytes")


@pytest.mark.parametrize("opcode", [_OPEN, _RELEASE, _GETXATTR, 4000])
async def test_every_other_request_is_not_implemented_which_the_kernel_remembers(opcode: int) -> None:
    async with serving(Cases()) as kernel:
        assert await kernel.ask(opcode) == (errno.ENOSYS, b"")


@pytest.mark.parametrize("bit", [1 << 18, 1 << 23], ids=["side-by-side look-ups", "kept symlinks"])
def test_the_answer_to_init_takes_what_the_kernel_offers_beyond_libfuse_s(bit: int) -> None:
    answer = _init_answer(flags=0b1010, max_write=1 << 20, max_pages=256)
    for offered, expected in ((0b1111, 0b1010), (bit | 0b1111, bit | 0b1010)):
        init = bytes(40) + struct.pack("=IIII", 7, 41, 131072, offered)
        changed = amended_init(init, answer, background=2000)
        assert struct.unpack_from("=IIIIHHIIHH", changed, 16) == (
            *(7, 31, 131072, expected, 2000, 1500, 1 << 20, 1, 256, 0),
        )
        assert changed[:28] == answer[:28] and changed[46:] == answer[46:]


def test_no_request_may_be_larger_than_the_buffer_for_it() -> None:
    answer = _init_answer(flags=0, max_write=1 << 24, max_pages=4096)
    changed = amended_init(bytes(40) + struct.pack("=IIII", 7, 41, 131072, 0), answer, background=9)
    assert struct.unpack_from("=II", changed, 36) == (1 << 20, 1)
    assert struct.unpack_from("=H", changed, 44) == (256,)
    assert BUFFER_SIZE > (1 << 20) + 4096


def _init_answer(*, flags: int, max_write: int, max_pages: int) -> bytes:
    head = struct.pack("=IiQ", 80, 0, 2)
    head += struct.pack("=IIIIHHIIHH", 7, 31, 131072, flags, 12, 9, max_write, 1, max_pages, 0)
    return head + bytes(80 - len(head))


# -------------------- failures


@pytest.mark.parametrize("opcode", [Opcode.READLINK, Opcode.READ], ids=["at-once", "in-a-coroutine"])
@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (Refusal(errno.ENODATA), errno.ENODATA),
        (Corrupt("sha256:… is damaged"), errno.EBADMSG),
        (NotFound("no such tag"), errno.ENOENT),
        (KeyError("bug"), errno.EIO),
        (OSError(errno.ENOSPC, "of a bug"), errno.EIO),
        (ExceptionGroup("of a nursery", [ValueError("bug")]), errno.EIO),
    ],
    ids=repr,
)
async def test_every_failure_is_an_errno_and_the_loop_goes_on(
    opcode: int, failure: Exception, expected: int
) -> None:
    cases = Cases(failure)
    async with serving(cases) as kernel:
        assert await kernel.ask(opcode, 1, _read_in(0, 9)) == (expected, b"")
        cases.failure = None
        assert await kernel.ask(opcode, 1, _read_in(0, 9)) == (0, b"bytes")


@pytest.mark.parametrize(("opcode", "seconds"), [(Opcode.GETATTR, 10.0), (Opcode.READ, 60.0)])
async def test_an_answer_too_late_is_a_timeout(
    opcode: int, seconds: float, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    cases = Cases(waits=True)
    async with serving(cases) as kernel:
        assert await kernel.ask(opcode, 1, _read_in(0, 9)) == (errno.ETIMEDOUT, b"")
    assert trio.current_time() == pytest.approx(seconds)
    assert cases.cancelled == 1
    name = Opcode(opcode).name.lower()
    assert [record.getMessage() for record in caplog.records] == [
        f"{name}: ETIMEDOUT: no answer within {seconds:g} s"
    ]


async def test_who_waited_in_vain_for_a_read_does_not_wait_as_long_when_the_kernel_asks_once_more(
    autojump_clock: MockClock,
) -> None:
    async with serving(Cases(waits=True), Deadlines(content_seconds=60)) as kernel:
        for pid, seconds in ((7, 60), (7, 60.1), (7, 120.1), (8, 180.1)):
            kernel.send(Opcode.READ, 9, _read_in(0, 512), pid=pid)
            assert (await kernel.receive())[1] == errno.ETIMEDOUT
            assert trio.current_time() == pytest.approx(seconds)


async def test_a_caller_that_gives_up_is_let_go_and_others_wait_on() -> None:
    cases = Cases(waits=True)
    async with serving(cases) as kernel:
        first = kernel.send(Opcode.GETATTR)
        kernel.send(Opcode.GETATTR)
        await wait_all_tasks_blocked()
        kernel.send(Opcode.INTERRUPT, 0, struct.pack("=Q", first))
        assert await kernel.receive() == (first, errno.EINTR, b"")
        assert cases.cancelled == 1
        assert await kernel.ask(Opcode.READLINK) == (0, b"bytes")


async def test_a_caller_may_give_up_in_the_moment_after_it_has_asked() -> None:
    cases = Cases(waits=True)
    async with serving(cases) as kernel:
        kernel.send(Opcode.READLINK)
        first = kernel.send(Opcode.GETATTR)
        kernel.send(Opcode.INTERRUPT, 0, struct.pack("=Q", first))
        assert (await kernel.receive())[1:] == (0, b"bytes")
        assert await kernel.receive() == (first, errno.EINTR, b"")
    assert cases.cancelled == 1


async def test_a_signal_that_does_not_end_the_wait_is_to_be_told_again(autojump_clock: MockClock) -> None:
    cases = Cases(waits=True)
    async with serving(cases) as kernel:
        first = kernel.send(Opcode.GETATTR, pid=os.getpid())
        for _ in range(3):
            again = kernel.send(Opcode.INTERRUPT, 0, struct.pack("=Q", first))
            assert await kernel.receive() == (again, errno.EAGAIN, b"")
        assert cases.cancelled == 0


async def test_a_failure_that_meets_a_cancellation_is_an_answer_and_the_loop_goes_on() -> None:
    class Grouped(Cases):
        async def read(self, inode: int, offset: int, size: int) -> bytes:
            async def fail() -> None:
                with trio.CancelScope(shield=True):
                    await self.failing.wait()
                raise Corrupt("while its caller leaves")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                nursery.start_soon(trio.sleep_forever)
            raise AssertionError

    cases = Grouped()
    cases.failing = trio.Event()  # type: ignore[attr-defined]
    async with serving(cases) as kernel:
        first = kernel.send(Opcode.READ, 1, _read_in(0, 9))
        await wait_all_tasks_blocked()
        kernel.send(Opcode.INTERRUPT, 0, struct.pack("=Q", first))
        await wait_all_tasks_blocked()
        cases.failing.set()  # type: ignore[attr-defined]
        assert (await kernel.receive())[:2] in {(first, errno.EBADMSG), (first, errno.EINTR)}
        assert await kernel.ask(Opcode.READLINK) == (0, b"bytes")


async def test_giving_up_what_was_answered_already_means_nothing() -> None:
    async with serving(Cases()) as kernel:
        unique = kernel.send(Opcode.READLINK)
        assert await kernel.receive() == (unique, 0, b"bytes")
        kernel.send(Opcode.INTERRUPT, 0, struct.pack("=Q", unique))
        assert await kernel.ask(Opcode.READLINK) == (0, b"bytes")


async def test_cancelling_the_loop_cancels_what_waits() -> None:
    cases = Cases()
    async with serving(cases) as kernel:
        kernel.send(Opcode.GETATTR)
        await wait_all_tasks_blocked()
    assert cases.cancelled == 1


# -------------------- what is counted


async def test_each_request_is_counted_once_when_it_is_answered(autojump_clock: MockClock) -> None:
    tally, cases = Tally(), Cases()
    async with serving(cases, Deadlines(names_seconds=2), tally) as kernel:
        await kernel.ask(Opcode.READ, 9, _read_in(0, 512))
        await kernel.ask(Opcode.LOOKUP, 9, b"name\0")
        kernel.send(Opcode.FORGET, 9, bytes(8))
        await kernel.ask(_OPEN, 9)
        assert tally.failure is None
        kernel.send(Opcode.GETATTR)
        await wait_all_tasks_blocked()
        assert "getattr" not in {one.name for one in tally.operations()}, "it waits yet"
        await kernel.receive()
        assert tally.failure.message == "getattr: ETIMEDOUT: no answer within 2 s"
        for failure in (Corrupt("damaged"), Refusal(errno.ESTALE), KeyError("unforeseen")):
            cases.failure = failure
            await kernel.ask(Opcode.READ, 9, _read_in(0, 512))
            await kernel.ask(Opcode.READLINK, 9)
    found = {one.name: (sum(one.classes), one.errors) for one in tally.operations()}
    assert found == {
        "lookup": (1, {}),
        "getattr": (1, {"ETIMEDOUT": 1}),
        "read": (4, {"EBADMSG": 1, "ESTALE": 1, "EIO": 1}),
        "readlink": (3, {"EBADMSG": 1, "ESTALE": 1, "EIO": 1}),
        "other": (1, {"ENOSYS": 1}),
    }
    assert tally.failure.message == "readlink failed unexpectedly: KeyError"


async def test_what_takes_long_is_counted_from_when_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("fsmount.fuse.requests.perf_counter", lambda: now)
    monkeypatch.setattr("fsmount.fuse.tally.perf_counter", lambda: now)
    tally = Tally()
    async with serving(Cases(waits=True), tally=tally) as kernel:
        read = kernel.send(Opcode.READ, 9, _read_in(0, 512))
        await wait_all_tasks_blocked()
        now = 5.0
        kernel.send(Opcode.INTERRUPT, body=struct.pack("=Q", read))
        assert (await kernel.receive())[:2] == (read, errno.EINTR)
    (operation,) = tally.operations()
    assert (operation.name, operation.seconds, operation.errors) == ("read", 5.0, {"EINTR": 1})


# -------------------- the log


@pytest.fixture
def journal() -> Journal:
    return Journal()


async def test_a_named_failure_is_logged_once_a_minute_and_without_traceback(
    journal: Journal, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(61):
        journal.note_failure("read", errno.EBADMSG, "sha256:… is damaged")
        await trio.sleep(1)
    assert [record.getMessage() for record in caplog.records] == ["read: EBADMSG: sha256:… is damaged"] * 2
    assert all(record.exc_info is None and record.levelno == logging.WARNING for record in caplog.records)


async def test_a_thousand_different_failures_a_minute_are_enough_for_the_log(
    journal: Journal, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(1100):
        journal.note_failure("read", errno.ENOENT, f"no tag {number}")
    assert len(caplog.records) == 1000
    await trio.sleep(60)
    journal.note_failure("read", errno.ENOENT, "no tag 1099")
    assert len(caplog.records) == 1001


def test_an_unexpected_exception_is_logged_once_a_site_with_its_traceback(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(error: Exception) -> Callable[[], None]:
        def raising() -> None:
            raise error

        return raising

    def note(error: Exception) -> None:
        try:
            fail(error)()
        except Exception as caught:
            journal.note_bug("read", caught)

    for bug in (KeyError("one"), KeyError("again"), IndexError("another")):
        note(bug)
    logged = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [repr(error) for error in logged] == ["KeyError('one')", "IndexError('another')"]
    assert all(record.levelno == logging.ERROR for record in caplog.records)


def test_a_name_that_does_not_exist_is_the_inode_0() -> None:
    assert absent(3.0).inode == 0 and absent(3.0).name_seconds == 3.0
