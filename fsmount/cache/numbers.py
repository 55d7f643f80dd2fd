"""Numbers: the small numbers that layers, views and folders keep for ever, so that inode numbers survive restarts."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fsmount.cache.folder import from_sqlite_error
from fsmount.errors import FsmountError
from fsmount.oci.digest import Digest

_SCHEMA = """
CREATE TABLE IF NOT EXISTS layers (number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS views (number INTEGER PRIMARY KEY AUTOINCREMENT,
    app TEXT NOT NULL, name TEXT NOT NULL, origin TEXT NOT NULL, digest TEXT);
CREATE INDEX IF NOT EXISTS views_by_name ON views (app, name, origin);
CREATE TABLE IF NOT EXISTS folders (number INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT NOT NULL UNIQUE);
"""


@dataclass(frozen=True, slots=True)
class ViewRecord:
    """One name of one app and, once somebody looked inside, the manifest it shows for ever.

    `origin` says where the app came from (repository, platform, folder): with another origin the same name
    is another view.
    """

    number: int
    app: str
    name: str
    origin: str
    digest: Digest | None


class Numbers:
    """Hands out numbers, the same for the same name, in every process and after every restart.

    A number is never given twice: the kernel caches by it.
    """

    def __init__(self, path: Path) -> None:
        """Raises: FsmountError when the file is damaged or cannot be written, NoSpace. So do all methods."""
        self._path = path
        try:
            self._connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=10
            )
            self._connection.executescript(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; BEGIN IMMEDIATE;" + _SCHEMA + "COMMIT;"
            )
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def close(self) -> None:
        self._connection.close()

    def _execute(self, statement: str, values: tuple[object, ...]) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _failure(self, error: sqlite3.Error) -> FsmountError:
        remedy = "With every fsmount process of this cache stopped, remove that file; it is made anew."
        return from_sqlite_error(error, self._path, remedy=remedy)

    def layer(self, key: str) -> int:
        return self._number("layers", "key", (key,))

    def retire_layer(self, key: str) -> None:
        """The next `layer(key)` is a new number: no page the kernel cached under the old one is seen again."""
        self._execute("DELETE FROM layers WHERE key = ?", (key,))

    def layer_key(self, number: int) -> str | None:
        row = self._execute("SELECT key FROM layers WHERE number = ?", (number,)).fetchone()
        return None if row is None else str(row[0])

    def folder(self, path: str) -> int:
        return self._number("folders", "path", (path,))

    def folder_path(self, number: int) -> str | None:
        row = self._execute("SELECT path FROM folders WHERE number = ?", (number,)).fetchone()
        return None if row is None else str(row[0])

    def latest_view(self, app: str, name: str, origin: str) -> ViewRecord | None:
        """The view that was last given to this name."""
        query = f"SELECT {_VIEW} FROM views WHERE app = ? AND name = ? AND origin = ? ORDER BY number DESC LIMIT 1"
        return _view(self._execute(query, (app, name, origin)).fetchone())

    def new_view(self, app: str, name: str, origin: str, digest: Digest | None) -> ViewRecord:
        cursor = self._execute(
            "INSERT INTO views (app, name, origin, digest) VALUES (?, ?, ?, ?)",
            (app, name, origin, None if digest is None else str(digest)),
        )
        assert cursor.lastrowid is not None
        return ViewRecord(cursor.lastrowid, app, name, origin, digest)

    def name_view(self, app: str, name: str, origin: str, digest: Digest | None) -> ViewRecord:
        """What a name stands for now: its latest view, if that shows the digest or nothing yet; else a new one."""
        with self._transaction():
            latest = self.latest_view(app, name, origin)
            if latest is None or latest.digest not in (None, digest):
                return self.new_view(app, name, origin, digest)
            return latest if digest is None else self.bind_view(latest.number, digest)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """What no other process may see half of, or do meanwhile."""
        self._execute("BEGIN IMMEDIATE", ())
        try:
            yield
            self._execute("COMMIT", ())
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite itself may have undone it
                self._connection.execute("ROLLBACK")
            raise

    def bind_view(self, number: int, digest: Digest) -> ViewRecord:
        """Says what a view shows, if nobody has said it yet; returns what holds."""
        update = "UPDATE views SET digest = ? WHERE number = ? AND digest IS NULL"
        self._execute(update, (str(digest), number))
        record = self.view(number)
        assert record is not None
        return record

    def view(self, number: int) -> ViewRecord | None:
        return _view(self._execute(f"SELECT {_VIEW} FROM views WHERE number = ?", (number,)).fetchone())

    def _number(self, table: str, columns: str, values: tuple[object, ...]) -> int:
        condition = " AND ".join(f"{column} = ?" for column in columns.split(", "))
        select = f"SELECT number FROM {table} WHERE {condition}"
        row = self._execute(select, values).fetchone()
        if row is None:
            marks = ", ".join("?" for _ in values)
            self._execute(f"INSERT OR IGNORE INTO {table} ({columns}) VALUES ({marks})", values)
            row = self._execute(select, values).fetchone()
        return int(row[0])


_VIEW = "number, app, name, origin, digest"


def _view(row: tuple[int, str, str, str, str | None] | None) -> ViewRecord | None:
    if row is None:
        return None
    number, app, name, origin, digest = row
    return ViewRecord(number, app, name, origin, None if digest is None else Digest.parse(digest))
