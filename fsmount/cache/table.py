"""ChunkTable: which chunk lies in which file, with what digest, and since when unused; the only home of diskcache.

The database, its connections and the sum of the sizes in it are diskcache's. Storing, finding and removing are not:
it would unpickle what a row says (CVE-2025-69872), take the write lock for every look-up, and store first and make room
afterwards.
"""

import logging
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import diskcache

log = logging.getLogger(__name__)

#: How long a transaction waits for others at most. They take a millisecond, unless a process was stopped in one.
PATIENCE_SECONDS = 2.0
_PAUSE_SECONDS = 0.001
#: What SQLite waits by itself: its pauses grow to 100 ms, ours do not.
_BUSY_MILLISECONDS = 2
#: Pages that one transaction of ours writes to the log at most, with up to BATCH rows removed or touched.
_TRANSACTION_PAGES = 96
#: What the database itself may grow by with a new row.
GROWTH_BYTES = 16 * 4096
#: Rows that are removed or touched at once: in 1 to 2 ms, during which nobody else can write.
BATCH = 16
#: Pages of the log at which whoever writes copies them into the database, if nobody has done it before.
_LOG_PAGES = 512
_FRAME_BYTES = 24 + 4096
_LOG_BYTES = (_LOG_PAGES + 2 * _TRANSACTION_PAGES) * _FRAME_BYTES
_SHARED_MEMORY_BYTES = 32 * 1024

_FILE = re.compile(r"[0-9a-f]{2}/(?:[0-9a-f]{2}/)?[0-9a-f]{1,64}\.val", re.ASCII)
_DAMAGES = frozenset((sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB))
_BUSY = frozenset((sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED))
_COLUMNS = "rowid, key, filename, size, tag, access_time"


class Row(NamedTuple):
    """A chunk's row. `filename` is relative to the folder; None in a row that is not one of ours."""

    number: int
    key: str
    filename: str | None
    #: What the file takes of the disk.
    size: int
    #: The sha256 it was stored with, in hexadecimal digits; None in a row that is not one of ours.
    sha256: str | None
    used_at: float

    @property
    def place(self) -> tuple[float, int]:
        """Where it is in the order of use."""
        return self.used_at, self.number

    @property
    def identity(self) -> tuple[int, str | None]:
        """What no other row has: not even a later one of the same chunk, or of the same number."""
        return self.number, self.filename


#: Before all others in the order of use.
START = (float("-inf"), 0)


class Reservation(NamedTuple):
    """A file that is being written, and the lease of the process that does so."""

    filename: str
    size: int
    lease: int


class ChunkTable:
    """The rows of a folder of chunks. For any thread; each one costs a connection, which is three descriptors.

    All methods raise sqlite3.Error.
    """

    def __init__(self, folder: Path) -> None:
        """Raises: sqlite3.Error, ValueError."""
        self._folder = folder
        self._cache = diskcache.Cache(
            str(folder),
            timeout=_BUSY_MILLISECONDS / 1000,
            cull_limit=0,
            eviction_policy="least-recently-used",  # makes the index of the order
            statistics=0,
            sqlite_busy_timeout=_BUSY_MILLISECONDS,
            sqlite_wal_autocheckpoint=_LOG_PAGES,
            # Else the log keeps the length that it once had, although little of it is in use. What it keeps is for a
            # transaction on a full disk.
            sqlite_journal_size_limit=_TRANSACTION_PAGES * _FRAME_BYTES,
            # A failing disk, or a file cut short, would end the process by SIGBUS.
            sqlite_mmap_size=0,
            sqlite_auto_vacuum=0,
        )
        self._read(
            "CREATE TABLE IF NOT EXISTS Reservations (filename TEXT PRIMARY KEY, size INTEGER, lease INTEGER)"
            " WITHOUT ROWID",
            (),
        )
        self._identity = self._identify()
        # Threads of one process take turns here: SQLite would let each sleep until it finds the lock free.
        self._turn = threading.Lock()

    def close(self) -> None:
        """Closes this thread's connection; those of others end with their threads."""
        self._cache.close()

    # Reading: nobody is waited for

    def find(self, key: str) -> Row | None:
        """The row of a chunk."""
        rows = self._read(f"SELECT {_COLUMNS} FROM Cache WHERE key = ? AND raw = 1", (key,))
        return _row(rows[0]) if rows else None

    def has(self, keys: Sequence[str]) -> list[bool]:
        """Which of these chunks have a row."""
        query = "SELECT 1 FROM Cache WHERE key = ? AND raw = 1"
        return [bool(self._read(query, (key,))) for key in keys]

    def least_used(self, after: tuple[float, int], count: int) -> list[Row]:
        """The rows that follow a place in the order of use, those unused for longest first."""
        query = (
            f"SELECT {_COLUMNS} FROM Cache WHERE (access_time, rowid) > (?, ?)"
            " ORDER BY access_time, rowid LIMIT ?"
        )
        return [_row(row) for row in self._read(query, (*after, count))]

    def following(self, number: int, count: int) -> list[Row]:
        """The rows after a number, in the order of numbers."""
        query = f"SELECT {_COLUMNS} FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT ?"
        return [_row(row) for row in self._read(query, (number, count))]

    def files_in(self, subfolder: str) -> set[str]:
        """Every file in a subfolder that has a row or a reservation. Reads all rows: 10 ms for 25,000."""
        pattern = f"{subfolder}/*"
        rows = self._read(
            "SELECT filename FROM Cache WHERE filename GLOB ?1"
            " UNION ALL SELECT filename FROM Reservations WHERE filename GLOB ?1",
            (pattern,),
        )
        return {filename for (filename,) in rows}

    def reservations(self) -> list[Reservation]:
        """All of them, of every process."""
        rows = self._read("SELECT filename, size, lease FROM Reservations", ())
        return [Reservation(*row) for row in rows if _FILE.fullmatch(str(row[0]))]

    def totals(self) -> tuple[int, int]:
        """Bytes that files with a row take, and bytes that are reserved."""
        query = (
            "SELECT (SELECT value FROM Settings WHERE key = 'size'),"
            " (SELECT ifnull(sum(size), 0) FROM Reservations)"
        )
        ((stored, reserved),) = self._read(query, ())
        return int(stored), int(reserved)

    def overhead(self) -> int:
        """Bytes that the database takes at most by the end of the next transaction, its log included."""
        ((pages,),) = self._read("PRAGMA page_count", ())
        log_bytes = max(_LOG_BYTES, self._log_size() + _TRANSACTION_PAGES * _FRAME_BYTES)
        return int(pages) * 4096 + log_bytes + _SHARED_MEMORY_BYTES

    def problems(self) -> list[str]:
        """What is wrong with the database itself. Reads all of it."""
        return [text for (text,) in self._read("PRAGMA quick_check(10)", ()) if text != "ok"]

    def _read(self, query: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                rows: list[tuple[Any, ...]] = self._execute(query, values).fetchall()
            except sqlite3.OperationalError as error:
                # One who reads is held up only while the database is opened first, or closed last.
                if not is_busy(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE_SECONDS)
            else:
                return rows

    # Writing

    @contextmanager
    def writing(self, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
        """One transaction of this thread: it is done whole or not at all, and nobody else writes meanwhile."""
        execute = self._execute
        deadline = time.monotonic() + patience_seconds
        if not self._turn.acquire(timeout=patience_seconds):
            raise _busy()
        try:
            while True:
                try:
                    execute("BEGIN IMMEDIATE")
                    break
                except sqlite3.OperationalError as error:
                    if not is_busy(error) or time.monotonic() >= deadline:
                        raise
                    time.sleep(_PAUSE_SECONDS)
            try:
                yield
                execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite itself may have undone it
                    execute("ROLLBACK")
                raise
        finally:
            self._turn.release()

    def reserve(self, size: int, lease: int) -> str:
        """Within `writing`: notes that a file of that size is about to be written, and returns its name."""
        # One level of folders: with two, nearly every chunk would have a folder of its own.
        filename = f"{secrets.token_hex(1)}/{secrets.token_hex(15)}.val"
        self._execute("INSERT INTO Reservations VALUES (?, ?, ?)", (filename, size, lease))
        return filename

    def insert(self, key: str, filename: str, sha256: str) -> str | None:
        """Within `writing`: a chunk lies in a file that was reserved for it. Returns the file in which it lay before.

        Raises: FileNotFoundError (the reservation is gone, and the file with it).
        """
        execute = self._execute
        reserved = execute("SELECT size FROM Reservations WHERE filename = ?", (filename,)).fetchone()
        if reserved is None:
            raise FileNotFoundError(filename)
        execute("DELETE FROM Reservations WHERE filename = ?", (filename,))
        now = time.time()
        values = now, now, sha256, *reserved, filename
        before = execute("SELECT rowid, filename FROM Cache WHERE key = ? AND raw = 1", (key,)).fetchone()
        if before is None:
            execute(
                "INSERT INTO Cache (key, raw, store_time, access_time, access_count, tag, size, mode, filename)"
                f" VALUES (?, 1, ?, ?, 0, ?, ?, {diskcache.core.MODE_BINARY}, ?)",
                (key, *values),
            )
            return None
        execute(
            "UPDATE Cache SET store_time = ?, access_time = ?, tag = ?, size = ?, filename = ?, value = NULL,"
            f" mode = {diskcache.core.MODE_BINARY}, expire_time = NULL WHERE rowid = ?",
            (*values, before[0]),
        )
        return _filename(before[1])

    def remove(self, rows: Iterable[Row]) -> None:
        """Within `writing`: rows are gone, where they are still as they were found. BATCH at once, at most."""
        self._cache._con.executemany(
            "DELETE FROM Cache WHERE rowid = ? AND (filename IS ? OR ? IS NULL)",
            [(row.number, row.filename, row.filename) for row in rows],
        )

    def release(self, filenames: Iterable[str]) -> None:
        """Within `writing`: reservations are gone."""
        self._cache._con.executemany(
            "DELETE FROM Reservations WHERE filename = ?", [(filename,) for filename in filenames]
        )

    def touch(self, used: Iterable[tuple[str, float]]) -> None:
        """Within `writing`: chunks were used, each at a time. BATCH at once, at most."""
        now = time.time()
        self._cache._con.executemany(
            "UPDATE Cache SET access_time = ?1 WHERE key = ?2 AND raw = 1 AND access_time < ?1",
            [(min(at, now), key) for key, at in used],
        )

    def set_right(self, rows: Iterable[Row]) -> None:
        """Within `writing`: chunks were used now, and not when their rows say. BATCH at once, at most."""
        now = time.time()
        self._cache._con.executemany(
            "UPDATE Cache SET access_time = ? WHERE rowid = ? AND access_time = ?",
            [(now, row.number, row.used_at) for row in rows],
        )

    def checkpoint(self) -> None:
        """Copies the log into the database if it is worth it: it syncs, which those who store shall not wait for."""
        if self.log_overflows:
            self._cut_log()
        elif self.log_is_long:
            self._read("PRAGMA wal_checkpoint(PASSIVE)", ())

    def _cut_log(self) -> None:
        """Where many write all the time, the log never comes to an end unless they are held up for a moment."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        if not self._turn.acquire(timeout=PATIENCE_SECONDS):
            return
        try:
            # Others may have done it meanwhile.
            while self.log_overflows and time.monotonic() < deadline:
                ((is_busy, pages, copied),) = self._read("PRAGMA wal_checkpoint(TRUNCATE)", ())
                if not is_busy or pages != copied:
                    return  # somebody reads what the log was a while ago: that may last
                # Others are copying it, which SQLite does not wait for, or writing.
                time.sleep(_PAUSE_SECONDS)
        finally:
            self._turn.release()

    @property
    def log_is_long(self) -> bool:
        """Whether `checkpoint` would do something."""
        return self._log_size() >= _LOG_PAGES // 2 * _FRAME_BYTES

    @property
    def log_overflows(self) -> bool:
        """Whether the log is longer than is expected of it."""
        return self._log_size() + _TRANSACTION_PAGES * _FRAME_BYTES > _LOG_BYTES

    def _log_size(self) -> int:
        try:
            return os.stat(self._folder / f"{diskcache.core.DBNAME}-wal").st_size
        except FileNotFoundError:
            return 0

    def is_spoilt_by(self, error: sqlite3.Error) -> bool:
        """Whether an error means that the database is damaged, or that another one lies there now."""
        return code_of(error) in _DAMAGES or self._identify() != self._identity

    def is_there(self) -> bool:
        """Whether the database that lies in the folder is this one."""
        return self._identify() == self._identity

    def _identify(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self._folder / diskcache.core.DBNAME)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    @property
    def _execute(self) -> Any:
        return self._cache._sql


def is_busy(error: sqlite3.Error) -> bool:
    """Whether somebody else was in the way for too long."""
    return code_of(error) in _BUSY


def code_of(error: sqlite3.Error) -> int:
    """SQLite's primary code; 0 if it has none."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _busy() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    error.sqlite_errorname = "SQLITE_BUSY"
    return error


def _row(values: tuple[Any, ...]) -> Row:
    number, key, filename, size, tag, used_at = values
    return Row(number, str(key), _filename(filename), size, tag if isinstance(tag, str) else None, used_at)


def _filename(value: object) -> str | None:
    """A file's name that a row says, if it is one of ours and leads nowhere else."""
    return value if isinstance(value, str) and _FILE.fullmatch(value) else None
