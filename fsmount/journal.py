"""journal: where log records go: as entries to systemd's journal, if stderr leads there, else as lines to stderr."""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

SOCKET = Path("/run/systemd/journal/socket")

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
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
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _leads_to_journal(descriptor: int, environ: Mapping[str, str]) -> bool:
    """As systemd.exec(5) has it: the variable is inherited, and means nothing where stderr was redirected since."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


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
