"""WarmSets: the paths that each app reads when it starts, and how long ago each of them was last seen read."""

import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from fsmount.cache import state
from fsmount.errors import Busy
from fsmount.oci.digest import Digest

#: Paths of one app, at most; of more, those go first that were missed most often, then those read longest ago.
MOST_PATHS = 20_000
#: A path that so many recordings in a row have missed is forgotten.
_FORGOTTEN_AFTER = 3
#: How long saving waits for another process, and how often it looks; nobody else waits meanwhile.
_BUSY_SECONDS = 3.0
_LOOK_SECONDS = 0.05

#: What a path showed when it was last read: the number of a layer, and a member of it.
Shown: TypeAlias = tuple[int, int]


class WarmSets:
    """The warm set of each app, on disk, shared by all processes of a cache folder.

    An app is its name and its origin, as views have them (`ViewRecord`); paths are relative to the folder that it
    shows, without a slash at either end.
    """

    def __init__(self, path: Path) -> None:
        """Raises: FsmountError when the file cannot be used, NoSpace. So do all methods."""
        self._path = path
        # Several threads use the connection, and closing it under one of them ends the whole process.
        self._lock = threading.RLock()
        self._connection = state.connect(path)

    def close(self) -> None:
        with self._using():
            self._connection.close()

    def paths(self, app: str, origin: str) -> dict[bytes, Shown]:
        """The warm set of an app; empty if nothing was ever recorded."""
        query = "SELECT path, layer, member FROM warm_paths WHERE app = ?"
        with self._using():
            rows = self._connection.execute(query, (self._number(app, origin),))
            return {path: (layer, member) for path, layer, member in rows}

    def is_recorded(self, app: str, origin: str, digest: Digest) -> bool:
        """Whether a whole recording was made of what an app showed by that digest."""
        query = "SELECT 1 FROM warm_tags WHERE app = ? AND digest = ?"
        values = self._number(app, origin), str(digest)
        with self._using():
            return self._connection.execute(query, values).fetchone() is not None

    def save(
        self,
        app: str,
        origin: str,
        read: Mapping[bytes, Shown],
        *,
        missed: Collection[bytes] = (),
        digest: Digest | None = None,
    ) -> None:
        """Adds what a recording saw read, and counts what it missed.

        digest: of what was recorded, if that was the whole of a recording. Takes up to 50 ms, in which others wait.
        For worker threads. Raises: Busy.
        """
        until = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._save(app, origin, read, missed, digest)
                return
            except Busy:
                if time.monotonic() >= until:
                    raise
            time.sleep(_LOOK_SECONDS)

    def _save(
        self,
        app: str,
        origin: str,
        read: Mapping[bytes, Shown],
        missed: Collection[bytes],
        digest: Digest | None,
    ) -> None:
        with self._transaction() as connection:
            execute, execute_many = connection.execute, connection.executemany
            execute("INSERT OR IGNORE INTO warm_apps (app, origin) VALUES (?, ?)", (app, origin))
            number = self._number(app, origin)
            query = "SELECT ifnull(max(recording), 0) + 1 FROM warm_paths WHERE app = ?"
            (recording,) = execute(query, (number,)).fetchone()
            execute_many(
                "UPDATE warm_paths SET missed = missed + 1 WHERE app = ? AND path = ?",
                ((number, path) for path in missed),
            )
            execute_many(
                "INSERT OR REPLACE INTO warm_paths VALUES (?, ?, ?, ?, ?, 0)",
                ((number, path, *shown, recording) for path, shown in islice(read.items(), MOST_PATHS)),
            )
            execute("DELETE FROM warm_paths WHERE app = ? AND missed >= ?", (number, _FORGOTTEN_AFTER))
            (count,) = execute("SELECT count(*) FROM warm_paths WHERE app = ?", (number,)).fetchone()
            execute(
                "DELETE FROM warm_paths WHERE app = ? AND path IN (SELECT path FROM warm_paths WHERE app = ?"
                " ORDER BY missed DESC, recording LIMIT ?)",
                (number, number, max(0, count - MOST_PATHS)),
            )
            if digest is not None:
                execute("INSERT OR IGNORE INTO warm_tags VALUES (?, ?)", (number, str(digest)))

    def _number(self, app: str, origin: str) -> int:
        """Of an app that has a warm set; of others 0, which is no app's."""
        query = "SELECT number FROM warm_apps WHERE app = ? AND origin = ?"
        with self._using():
            row = self._connection.execute(query, (app, origin)).fetchone()
        return 0 if row is None else int(row[0])

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """What no other process may see half of, or do meanwhile."""
        with self._using(), state.transaction(self._connection):
            yield self._connection

    @contextmanager
    def _using(self) -> Iterator[None]:
        """For what uses the connection. Raises: FsmountError, NoSpace."""
        try:
            with self._lock:
                yield
        except sqlite3.Error as error:
            raise state.failure(error, self._path) from error
