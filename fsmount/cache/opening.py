"""opening: the table of a folder of chunks is opened whatever lies there: damage, files without it, a full disk."""

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from fsmount.cache.leftovers import Aside, files_below
from fsmount.cache.table import ChunkTable, code_of

log = logging.getLogger(__name__)

#: Bytes of the disk that the table's files need when it is full, to be opened at all.
OPENING_ROOM = 1024 * 1024

#: What SQLite says of the disk, or of others who use the database: the database itself is sound.
_TROUBLES = frozenset(
    (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
    )
)


def open_table(folder: Path, aside: Aside) -> tuple[ChunkTable, str | None]:
    """The table of a folder; one that is damaged, or lost, is moved aside with all files, and it is said why.

    Raises: OSError, sqlite3.Error.
    """
    try:
        table = ChunkTable(folder)
        if not _is_lost(table, folder):
            return table, None
        table.close()
        reason = "its table is gone"
    except (sqlite3.DatabaseError, ValueError) as error:
        if isinstance(error, sqlite3.Error) and code_of(error) in _TROUBLES:
            # On a full disk it cannot be opened, let alone asked what has not been used for longest.
            status = os.statvfs(folder)
            if status.f_bavail * status.f_frsize >= OPENING_ROOM or not _unlink_some(folder):
                raise
            return ChunkTable(folder), None
        reason = str(error)
    log.warning("the chunk store is damaged (%s): starting with an empty one", reason)
    aside.take(folder)
    folder.mkdir(mode=0o700)
    return ChunkTable(folder), reason


def _is_lost(table: ChunkTable, folder: Path) -> bool:
    """Whether there are files of chunks, and a table that knows of none at all."""
    if table.following(0, 1):
        return False
    first = next(_chunk_files(folder), None)
    # Asked in this order: whoever makes a file has reserved it before.
    return first is not None and not (table.reservations() or table.following(0, 1)) and first.exists()


def _chunk_files(folder: Path) -> Iterator[Path]:
    """The files of chunks, in any order."""
    return (
        Path(file.path) for subfolder in folder.glob("[0-9a-f][0-9a-f]") for file in files_below(subfolder)
    )


def _unlink_some(folder: Path) -> bool:
    """Removes chunks of a mebibyte, whichever; whether there were any."""
    freed = 0
    for path in _chunk_files(folder):
        if freed >= OPENING_ROOM:
            break
        with contextlib.suppress(FileNotFoundError):
            freed += path.stat().st_size
            path.unlink()
    return freed > 0
