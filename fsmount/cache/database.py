"""How fsmount writes and opens the SQLite files that are written once and then only read."""

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from fsmount.errors import FsmountError

#: Few sizes, so that the statements stay prepared.
_ROWS_AT_ONCE = (256, 16, 1)
_HEADER_SIZE = 100


def create(path: Path, *, schema: str, version: int) -> sqlite3.Connection:
    """An empty database being filled by this process alone, under a name nobody else knows.

    No journal and no syncing: a file that was not finished is thrown away whole. The connection may be
    used from several threads (SQLite serialises them).
    """
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.executescript(
        f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-16000;"
        f"PRAGMA user_version={version}; {schema} BEGIN;"
    )
    return connection


def insert(connection: sqlite3.Connection, table: str, rows: Sequence[Sequence[object]]) -> None:
    """Inserts rows, replacing those of the same key; in order.

    sqlite3 lets go of the GIL at every step, and gets it back late while other threads compute: 50,000 rows one by
    one took 1.9 s beside a hashing thread, 0.5 s alone. So a statement takes many rows.
    """
    start = 0
    for count in _ROWS_AT_ONCE:
        while len(rows) - start >= count:
            some = rows[start : start + count]
            row = f"({', '.join('?' * len(some[0]))})"
            statement = f"INSERT OR REPLACE INTO {table} VALUES {', '.join([row] * count)}"
            connection.execute(statement, [value for values in some for value in values])
            start += count


def open_finished(path: Path, *, version: int) -> sqlite3.Connection | None:
    """A finished database, read-only and without locks (it never changes); None if absent or of another version.

    Raises: FsmountError when the file is no database.
    """
    try:
        with path.open("rb") as file:
            header, size = file.read(_HEADER_SIZE), os.fstat(file.fileno()).st_size
            # Look-ups are all over it, and wait for the disk one page at a time.
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_WILLNEED)
    except FileNotFoundError:
        return None
    try:
        if size != _written_size(header):
            raise sqlite3.DatabaseError("it is cut short")
        connection = sqlite3.connect(uri(path), uri=True, isolation_level=None, check_same_thread=False)
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found != version:
            connection.close()
            return None
    except sqlite3.DatabaseError as error:
        raise FsmountError(
            f"{path} is damaged: {error}", remedy="Remove that file: it is made again from the source."
        ) from error
    return connection


def _written_size(header: bytes) -> int:
    """What a database's header says of the file (sqlite.org/fileformat2.html, section 1.3).

    SQLite itself would only notice when it looks for a page that is missing.
    """
    page_size = int.from_bytes(header[16:18], "big")
    return (65536 if page_size == 1 else page_size) * int.from_bytes(header[28:32], "big")


def uri(path: Path) -> str:
    """How SQLite is told to open a finished database."""
    return f"file:{quote(str(path))}?mode=ro&immutable=1"


def is_sound(path: Path) -> bool:
    """Whether every page of a finished database holds together. Reads all of it: for when something was wrong."""
    try:
        with closing(sqlite3.connect(uri(path), uri=True)) as connection:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError:
        return False
    return bool(verdict == "ok")
