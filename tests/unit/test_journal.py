"""Where the log goes: the journal's own protocol, as a socket receives it, or lines on stderr."""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from fsmount import journal
from fsmount.journal import JournalHandler, Repetition, configure_logging

MOUNTPOINT = Path("/srv/artifacts")


class Receiver:
    """The journal's end of its socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(5)

    def entry(self) -> Mapping[str, bytes]:
        """The fields of the next entry, read as the protocol has them."""
        data = self._socket.recv(1 << 20)
        fields: dict[str, bytes] = {}
        while data:
            line, _, rest = data.partition(b"\n")
            name, equals, value = line.partition(b"=")
            if not equals:
                size = int.from_bytes(rest[:8], "little")
                value, end, data = rest[8 : 8 + size], rest[8 + size : 9 + size], rest[9 + size :]
                assert end == b"\n" and len(value) == size
            else:
                data = rest
            assert name.decode() not in fields
            fields[name.decode()] = value
        return fields

    def drain(self) -> int:
        """How many entries there are, and takes them."""
        self._socket.setblocking(False)
        count = 0
        with suppress(BlockingIOError):
            while self._socket.recv(1 << 20):
                count += 1
        self._socket.settimeout(5)
        return count

    def close(self) -> None:
        self._socket.close()
        self.path.unlink()


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path / "journal.sock")
    yield receiver
    if receiver.path.exists():
        receiver.close()


@pytest.fixture
def log(receiver: Receiver) -> Iterator[logging.Logger]:
    """A logger that writes there."""
    handler = JournalHandler(MOUNTPOINT, path=receiver.path)
    logger = logging.getLogger("tests.journal")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield logger
    logger.removeHandler(handler)
    logger.propagate = True
    handler.close()


def test_a_record_is_an_entry_with_its_fields(receiver: Receiver, log: logging.Logger) -> None:
    log.warning("chunk %s is damaged", "c1", extra={"layer": "sha256:8a9f", "errno": 74})
    entry = dict(receiver.entry())
    assert int(entry.pop("CODE_LINE")) > 0
    assert entry == {
        "MESSAGE": b"chunk c1 is damaged",
        "PRIORITY": b"4",
        "SYSLOG_IDENTIFIER": b"fsmount",
        "FSMOUNT_MOUNTPOINT": b"/srv/artifacts",
        "FSMOUNT_LAYER": b"sha256:8a9f",
        "ERRNO": b"74",
        "LOGGER": b"tests.journal",
        "CODE_FILE": __file__.encode(),
        "CODE_FUNC": b"test_a_record_is_an_entry_with_its_fields",
    }


@pytest.mark.parametrize(
    "level, priority",
    [("debug", b"7"), ("info", b"6"), ("warning", b"4"), ("error", b"3"), ("critical", b"2")],
)
def test_levels_are_syslog_s_priorities(
    receiver: Receiver, log: logging.Logger, level: str, priority: bytes
) -> None:
    getattr(log, level)("x")
    assert receiver.entry()["PRIORITY"] == priority


@pytest.mark.parametrize("text", ["one\ntwo\n", "PRIORITY=0\nMESSAGE=forged", "=", ""])
def test_no_text_can_become_another_field(receiver: Receiver, log: logging.Logger, text: str) -> None:
    log.info("%s", text)
    entry = receiver.entry()
    assert entry["MESSAGE"] == text.encode()
    assert entry["PRIORITY"] == b"6"


def test_a_traceback_is_part_of_the_message(receiver: Receiver, log: logging.Logger) -> None:
    try:
        raise KeyError("unforeseen")
    except KeyError:
        log.exception("it failed")
    message = receiver.entry()["MESSAGE"].decode()
    assert message.startswith("it failed\nTraceback ") and message.endswith("KeyError: 'unforeseen'")


@pytest.mark.parametrize("text", ["x", "ü"])
def test_what_is_too_long_for_the_journal_is_cut(receiver: Receiver, log: logging.Logger, text: str) -> None:
    log.info(text * 1_000_000)
    message = receiver.entry()["MESSAGE"].decode()
    assert message.endswith("...") and message[:-3] == text * len(message[:-3])
    assert len(message) > 10_000


def test_names_that_are_not_utf_8_are_still_text(receiver: Receiver, log: logging.Logger) -> None:
    log.info("%s", os.fsdecode(b"a\xff") + "\ud800")
    assert receiver.entry()["MESSAGE"] == b"a\\udcff\\ud800"


def test_a_journal_that_is_full_holds_up_nobody_and_is_told_how_much_it_missed(
    receiver: Receiver, log: logging.Logger
) -> None:
    sent = 10_000  # more than any queue holds
    for number in range(sent):
        log.info("%d", number)
    taken = receiver.drain()
    assert 0 < taken < sent
    log.info("again")
    told = receiver.entry()
    assert told["MESSAGE"] == b"messages of the log were lost: %d" % (sent - taken)
    assert (told["PRIORITY"], told["FSMOUNT_MOUNTPOINT"]) == (b"4", b"/srv/artifacts")
    assert receiver.entry()["MESSAGE"] == b"again"


def test_a_journal_that_was_away_is_written_to_when_it_is_back(
    receiver: Receiver, log: logging.Logger
) -> None:
    receiver.close()
    log.info("lost")
    back = Receiver(receiver.path)
    log.info("heard")
    assert back.entry()["MESSAGE"] == b"messages of the log were lost: 1"
    assert back.entry()["MESSAGE"] == b"heard"
    back.close()


# -------------------- what is told of what repeats itself


class Clock:
    """The time, as the test has it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(journal, "time", self)

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What a log that is filtered so has let through, of the logger `tests.told`."""
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(self.format(record))

    handler = Handler()
    handler.addFilter(Repetition())
    logger = logging.getLogger("tests.told")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield told
    logger.removeHandler(handler)
    logger.propagate = True


def test_the_same_fault_is_told_once_in_a_minute(clock: Clock, told: list[str]) -> None:
    log = logging.getLogger("tests.told")
    for _ in range(60):
        log.warning("%s cannot be reached", "registry.example")
        clock.now += 1
    assert told == ["registry.example cannot be reached"]
    log.warning("%s cannot be reached", "registry.example")
    assert told == ["registry.example cannot be reached"] * 2


def test_a_fault_on_a_thousand_files_names_200_and_then_ten_a_minute_with_the_number_of_the_others(
    clock: Clock, told: list[str]
) -> None:
    log = logging.getLogger("tests.told")
    for minute in range(11):
        for number in range(1000):
            log.warning("file %d.%d cannot be read", minute, number)
        clock.now += 60
    assert len(told) == 300
    assert told[199] == "file 0.199 cannot be read"
    assert told[200] == "file 1.0 cannot be read (and 800 like it, which were not told)"
    assert told[201] == "file 1.1 cannot be read"
    assert told[210] == "file 2.0 cannot be read (and 990 like it, which were not told)"


def test_what_is_damaged_on_a_day_is_all_named(clock: Clock, told: list[str]) -> None:
    log = logging.getLogger("tests.told")
    for number in range(500):
        log.warning("image %d is damaged", number)
        clock.now += 10
    assert told == [f"image {number} is damaged" for number in range(500)]


def test_one_kind_of_fault_hides_no_other(clock: Clock, told: list[str]) -> None:
    log = logging.getLogger("tests.told")
    for number in range(1000):
        log.warning("read: %d", number, extra={"errno": 113})
    told.clear()
    log.warning("read: %d", 1001, extra={"errno": 74})
    log.warning("write: %d", 1002)
    log.error("it is over")
    assert told == ["read: 1001", "write: 1002", "it is over"]


def test_what_is_no_fault_is_always_told(clock: Clock, told: list[str]) -> None:
    for _ in range(100):
        logging.getLogger("tests.told").info("again")
    assert len(told) == 100


def test_what_was_told_long_ago_is_forgotten(clock: Clock) -> None:
    repetition = Repetition()
    for number in range(5000):
        clock.now += 60
        for msg in ("%d", f"%d {number}"):
            assert repetition.filter(logging.makeLogRecord({"levelno": 30, "msg": msg, "args": (number,)}))
    assert len(repetition._told) <= 3000
    assert len(repetition._kinds) <= 3000


# -------------------- where it goes


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, which has its handlers back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # Else they would be closed.
    root.handlers.clear()
    yield root
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def _stream_of(descriptor: int) -> str:
    status = os.fstat(descriptor)
    return f"{status.st_dev}:{status.st_ino}"


def test_where_stderr_is_the_journal_s_stream_records_go_to_its_socket(
    receiver: Receiver, root: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SOCKET", receiver.path)
    with socket.socket() as stream:
        for mountpoint in (None, MOUNTPOINT):
            environ = {"JOURNAL_STREAM": _stream_of(stream.fileno())}
            configure_logging(mountpoint, environ=environ, stderr=stream.fileno())
            logging.getLogger("tests.journal").info("once")
            entry = receiver.entry()
            assert entry["MESSAGE"] == b"once"
            assert entry.get("FSMOUNT_MOUNTPOINT") == (b"/srv/artifacts" if mountpoint else None)
        assert receiver.drain() == 0


@pytest.mark.parametrize("stream", [None, "", "1:1", "nonsense"])
def test_else_they_are_lines_on_stderr(
    root: logging.Logger, capsys: pytest.CaptureFixture[str], stream: str | None
) -> None:
    environ = {} if stream is None else {"JOURNAL_STREAM": stream}
    with socket.socket() as other:
        configure_logging(MOUNTPOINT, environ=environ, stderr=other.fileno())
    logging.getLogger("tests.journal").warning("a %s", "line")
    assert capsys.readouterr().err.endswith(" WARNING tests.journal: a line\n")


def test_a_process_without_stderr_has_no_journal_there(root: logging.Logger) -> None:
    with socket.socket() as closed:
        descriptor, stream = closed.fileno(), _stream_of(closed.fileno())
    configure_logging(None, environ={"JOURNAL_STREAM": stream}, stderr=descriptor)
    assert not any(isinstance(handler, JournalHandler) for handler in root.handlers)
