"""state: the one file of a cache folder that changes in place: its tables, their version, and what comes of damage."""

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from fsmount.cache.folder import from_os_error, from_sqlite_error
from fsmount.errors import Busy, FsmountError

log = logging.getLogger(__name__)

#: How long a write waits for that of another process: nothing else goes on meanwhile in who has an event loop.
_PATIENCE_MILLISECONDS = 100
_BUSY_REMEDY = (
    "If an fsmount process of this cache was stopped in the middle of a write, let it go on (kill -CONT)."
)
_REMEDY = "With every fsmount process of this cache stopped, remove that file; it is made anew."
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_DAMAGES = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_FILES = ("", "-wal", "-shm")

#: Leads from the version that is its place to the next. Version 0 is an empty file, or one that was made before there
#: were versions.
_MIGRATIONS = (
    """
CREATE TABLE IF NOT EXISTS layers (number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS views (number INTEGER PRIMARY KEY AUTOINCREMENT,
    app TEXT NOT NULL, name TEXT NOT NULL, origin TEXT NOT NULL, digest TEXT);
CREATE INDEX IF NOT EXISTS views_by_name ON views (app, name, origin);
CREATE TABLE IF NOT EXISTS folders (number INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS warm_apps (number INTEGER PRIMARY KEY, app TEXT NOT NULL, origin TEXT NOT NULL,
    UNIQUE (app, origin));
CREATE TABLE IF NOT EXISTS warm_tags (app INTEGER, digest TEXT, PRIMARY KEY (app, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS warm_paths (app INTEGER, path BLOB, layer INTEGER, member INTEGER, recording INTEGER,
    missed INTEGER, PRIMARY KEY (app, path)) WITHOUT ROWID;
ALTER TABLE layers ADD COLUMN numbering TEXT;
CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT INTO facts VALUES ('identity', lower(hex(randomblob(16))));
INSERT INTO facts VALUES ('began_ns', CAST(strftime('%s', 'now') AS INTEGER) * 1000000000);
CREATE TABLE shown (layer INTEGER, view INTEGER, PRIMARY KEY (layer, view)) WITHOUT ROWID;
CREATE TABLE origins (origin TEXT PRIMARY KEY, source TEXT NOT NULL, platform TEXT NOT NULL, subtree BLOB NOT NULL)
    WITHOUT ROWID;
CREATE TABLE roots (view INTEGER PRIMARY KEY, mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL);
CREATE TABLE unverified (mount TEXT, layer INTEGER, PRIMARY KEY (mount, layer)) WITHOUT ROWID;
CREATE TABLE listings (app TEXT, origin TEXT, names TEXT NOT NULL, shown TEXT NOT NULL, changed_ns INTEGER NOT NULL,
    PRIMARY KEY (app, origin)) WITHOUT ROWID;
""",
)
VERSION = len(_MIGRATIONS)


def connect(path: Path) -> sqlite3.Connection:
    """The file as this version knows it: made, or brought up to it, if need be. Ownership: the caller closes it.

    A damaged file is moved aside, which is logged, and an empty one takes its place. To open it may take a while if
    another process does the same; a write waits for another as long as is said above.

    Raises: FsmountError (of a later version; it cannot be written), NoSpace.
    """
    try:
        if path.exists():
            try:
                connection = _open(path)
            except sqlite3.Error as error:
                if not _is_damage(error):
                    raise
            else:
                if connection is not None:
                    return connection
        with _alone(path):
            try:
                return _make(path)
            except sqlite3.Error as error:
                if not _is_damage(error):
                    raise
                _move_aside(path, error)
            return _make(path)
    except sqlite3.Error as error:
        raise failure(error, path) from error


def _open(path: Path) -> sqlite3.Connection | None:
    """None: it is not of this version yet."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    try:
        connection.execute("PRAGMA synchronous=NORMAL")
        if _suspicion(path).exists():
            _check(connection)
            _suspicion(path).unlink(missing_ok=True)
        if _version(connection) == VERSION:
            _set_patience(connection, _PATIENCE_MILLISECONDS)
            return connection
    except BaseException:
        connection.close()
        raise
    connection.close()
    return None


def _make(path: Path) -> sqlite3.Connection:
    """As `_open`, for one process at a time.

    Of two that begin a file in WAL mode at the same time one gets SQLITE_BUSY, whatever its timeout.
    """
    connection = _open(path)
    if connection is None:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as changing:
            changing.execute("PRAGMA journal_mode=WAL")
            _migrate(changing, path)
        connection = _open(path)
        assert connection is not None
    return connection


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    with transaction(connection):
        version = _version(connection)
        if version > VERSION:
            raise FsmountError(
                f"{path} is of version {version}, and this fsmount knows versions up to {VERSION}",
                remedy="A later fsmount has used this cache folder: use that one, or another folder with --cache.",
            )
        for migration in _MIGRATIONS[version:]:
            for statement in migration.split(";"):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {VERSION}")


def _check(connection: sqlite3.Connection) -> None:
    """Reads all of the file. Raises: sqlite3.DatabaseError (damaged)."""
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        error = sqlite3.DatabaseError(verdict)
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error


def _set_patience(connection: sqlite3.Connection, milliseconds: int) -> None:
    connection.execute(f"PRAGMA busy_timeout = {milliseconds}")


def _code(error: sqlite3.Error) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _is_damage(error: sqlite3.Error) -> bool:
    return _code(error) in _DAMAGES


def _suspicion(path: Path) -> Path:
    return path.with_name(f"{path.name}.suspect")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process makes the file meanwhile, or moves it. Raises: FsmountError (there is no such folder)."""
    try:
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, path) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _move_aside(path: Path, error: sqlite3.Error) -> None:
    aside = path.with_name(f"{path.name}.damaged")
    log.error(
        "%s is damaged (%s): moved to %s, starting with an empty one; a mount that lives on gets new inode numbers",
        path,
        error,
        aside,
    )
    for suffix in _FILES:
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")
    _suspicion(path).unlink(missing_ok=True)


def failure(error: sqlite3.Error, path: Path) -> FsmountError:
    """The error of ours for what SQLite says of the file; damage is looked into when it is opened next."""
    if _code(error) in _BUSY:
        return Busy(f"another process has locked {path}", remedy=_BUSY_REMEDY)
    if _is_damage(error):
        with suppress(OSError):
            _suspicion(path).touch()
    return from_sqlite_error(error, path, remedy=_REMEDY)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """What no other process may see half of, or do meanwhile. Raises: sqlite3.Error."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # SQLite itself may have undone it
            connection.execute("ROLLBACK")
        raise


class State:
    """A connection to the file, for one thread at a time. All methods raise FsmountError, NoSpace, Busy.

    When a write has waited for another process in vain, those after it do not, until one succeeds: there may be
    hundreds in a row, and all of them on the event loop.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = connect(path)
        self._is_patient = True

    def close(self) -> None:
        self._connection.close()

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._errors():
            return self._connection.execute(query, values).fetchall()

    def row(self, query: str, *values: object) -> tuple[Any, ...] | None:
        rows = self.rows(query, *values)
        return rows[0] if rows else None

    def write(self, statement: str, *values: object) -> int:
        """Changes something; returns the number of the last row that was inserted."""
        with self._writing():
            return self._connection.execute(statement, values).lastrowid or 0

    def write_many(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        """The same for many rows, in one transaction."""
        with self.transaction():
            self._connection.executemany(statement, rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What no other process may see half of, or do meanwhile."""
        with self._writing(), transaction(self._connection):
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._errors():
                yield
        except Busy:
            self._be_patient(False)
            raise
        self._be_patient(True)

    def _be_patient(self, is_patient: bool) -> None:
        if is_patient != self._is_patient:
            self._is_patient = is_patient
            with self._errors():
                _set_patience(self._connection, _PATIENCE_MILLISECONDS if is_patient else 0)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise failure(error, self._path) from error
