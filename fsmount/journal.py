"""journal: where log records go: as entries to systemd's journal, if stderr leads there, else as lines to stderr."""

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SOCKET = Path("/run/systemd/journal/socket")

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
#: How long a text is not told again.
_QUIET_SECONDS = 60.0
#: Of one kind: how many lines may be told at once, and how long it takes until one more may. All damaged files are of
#: one kind, and each is to be named.
_AT_ONCE = 200.0
_REFILL_SECONDS = 6.0
#: As many as ten kinds may have in a minute, and then some.
_MOST_TEXTS = 3000
#: Of a field, in bytes. A datagram holds 200 KiB; what is longer would have to be a file in memory.
_LARGEST = 48 * 1024
#: What a record may say beyond its message, as `extra`, and the fields of that (systemd.journal-fields(7) has ERRNO).
_EXTRAS = {
    "errno": "ERRNO",
    "operation": "FSMOUNT_OPERATION",
    "app": "FSMOUNT_APP",
    "layer": "FSMOUNT_LAYER",
    "digest": "FSMOUNT_DIGEST",
}


def configure_logging(
    mountpoint: Path | None, *, environ: Mapping[str, str] = os.environ, stderr: int = 2
) -> None:
    """Sends all log records of this process on their way; when called again, only on the new one.

    mountpoint: what the process serves, if that is known.
    """
    handler: logging.Handler
    if _leads_to_journal(stderr, environ):
        handler = JournalHandler(mountpoint)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(Repetition())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _leads_to_journal(descriptor: int, environ: Mapping[str, str]) -> bool:
    """As systemd.exec(5) has it: the variable is inherited, and means nothing where stderr was redirected since."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class Repetition(logging.Filter):
    """Lets a fault through once, and not as often as a thousand readers meet it, on a thousand files.

    The same text comes once in a minute. Of one kind of fault, a place in the code and its errno, there are
    200 lines, and then ten a minute; the next that is told says how many were not. What is no fault is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, object, object], _Kind] = {}
        self._told: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        with self._lock:
            return self._is_news(record, time.monotonic())

    def _is_news(self, record: logging.LogRecord, now: float) -> bool:
        place = (record.name, record.msg, getattr(record, "errno", None))
        if len(self._kinds) >= _MOST_TEXTS:
            self._kinds.clear()  # of somebody whose messages are all different by themselves
        kind = self._kinds.setdefault(place, _Kind(now, _AT_ONCE))
        text = record.getMessage()
        is_told = now < self._told.get(text, -math.inf) + _QUIET_SECONDS
        if is_told or not kind.take(now):
            kind.hidden += not is_told
            return False
        if len(self._told) >= _MOST_TEXTS:
            self._told = {text: at for text, at in self._told.items() if now < at + _QUIET_SECONDS}
        self._told[text] = now
        if kind.hidden:
            record.msg, record.args = f"{text} (and {kind.hidden} like it, which were not told)", ()
            kind.hidden = 0
        return True


@dataclass(slots=True)
class _Kind:
    """Of one kind of fault: how many lines it may have at `at`, and how many it should have had since the last."""

    at: float
    lines: float
    hidden: int = 0

    def take(self, now: float) -> bool:
        self.lines = min(_AT_ONCE, self.lines + (now - self.at) / _REFILL_SECONDS)
        self.at = now
        if self.lines < 1:
            return False
        self.lines -= 1
        return True


class JournalHandler(logging.Handler):
    """Writes records in the journal's own form: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/.

    It never waits: what a journal that is full or away does not take is lost, and told with the next that it does.
    """

    def __init__(self, mountpoint: Path | None, *, path: Path | None = None) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter())
        self._path = os.fspath(path or SOCKET)
        self._mountpoint = mountpoint
        self._lost = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self.format(record)
            if self._lost:
                self._send({"MESSAGE": f"messages of the log were lost: {self._lost}", "PRIORITY": "4"})
                self._lost = 0
            self._send({"MESSAGE": message, "PRIORITY": _priority(record.levelno), **_fields_of(record)})
        except OSError:
            self._lost += 1
        except (
            Exception
        ):  # as every handler of the standard library: a log that cannot be written ends nothing
            self.handleError(record)

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _send(self, fields: Mapping[str, str]) -> None:
        """Raises: OSError."""
        fields = {**fields, "SYSLOG_IDENTIFIER": "fsmount"}
        if self._mountpoint is not None:
            fields["FSMOUNT_MOUNTPOINT"] = os.fspath(self._mountpoint)
        self._socket.sendto(b"".join(_encoded(fields)), self._path)


def _fields_of(record: logging.LogRecord) -> dict[str, str]:
    fields = {
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "CODE_FUNC": record.funcName or "",
    }
    for name, field in _EXTRAS.items():
        if (value := getattr(record, name, None)) is not None:
            fields[field] = str(value)
    return fields


def _encoded(fields: Mapping[str, str]) -> Iterator[bytes]:
    for name, text in fields.items():
        value = text.encode(errors="backslashreplace")
        if len(value) > _LARGEST:
            value = value[:_LARGEST].decode(errors="ignore").encode() + b"..."
        if b"\n" in value:
            yield b"%s\n%s%s\n" % (name.encode(), len(value).to_bytes(8, "little"), value)
        else:
            yield b"%s=%s\n" % (name.encode(), value)


def _priority(level: int) -> str:
    """syslog(3)'s number for a level of logging."""
    for least, priority in (
        (logging.CRITICAL, "2"),
        (logging.ERROR, "3"),
        (logging.WARNING, "4"),
        (logging.INFO, "6"),
    ):
        if level >= least:
            return priority
    return "7"
