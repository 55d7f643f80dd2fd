"""Numbers: the small numbers that layers, views and folders keep for ever, so that inode numbers survive restarts."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import trio

from fsmount.cache.listings import Listings
from fsmount.cache.state import State
from fsmount.errors import Busy, NoSpace
from fsmount.oci.digest import Digest

#: How long who can wait does so for another process, and how often it looks.
_BUSY_SECONDS = 8.0
_LOOK_SECONDS = 0.02
#: What any change may need of the disk, many times over.
_ROOM = 1024 * 1024

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Root:
    """The attributes of the folder that a view shows, once they cannot change any more."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an app came from: the name of its source, the platform, and the folder that is shown, name by name."""

    source: str
    platform: str
    subtree: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ViewRecord:
    """One name of one app and, once somebody looked inside, the manifest it shows for ever.

    `origin` stands for where the app came from (repository, platform, folder): with another origin the same name
    is another view.
    """

    number: int
    app: str
    name: str
    origin: str
    digest: Digest | None
    root: Root | None = None


class Numbers:
    """Hands out numbers, the same for the same name, in every process and after every restart.

    A number is never given twice: the kernel caches by it. And what a number stands for can be found by any process:
    the kernel may ask about one that this process has never given out.
    """

    def __init__(self, path: Path) -> None:
        """Raises: FsmountError when the file cannot be used, NoSpace, Busy. So do all methods."""
        self._state = State(path)
        facts = dict(self._state.rows("SELECT name, value FROM facts"))
        #: Of these numbers: with another identity they mean something else, and no kernel may mix the two.
        self.identity = str(facts["identity"])
        #: When they began, in nanoseconds of the epoch.
        self.began_ns = int(facts["began_ns"])
        #: What folders that may change have listed.
        self.listings = Listings(self._state)
        #: Frees so many bytes of the disk, as far as it can; for worker threads.
        self.make_room: Callable[[int], None] = lambda size: None

    def close(self) -> None:
        self._state.close()

    async def when_possible(self, change: Callable[[], _Result]) -> _Result:
        """What change returns, which writes here: as soon as no other process does, and with room made if need be.

        Raises: as change; Busy, if the other does not come to an end. Cancellation: safe; nothing has changed then.
        """
        until, is_roomy = trio.current_time() + _BUSY_SECONDS, False
        while True:
            try:
                return change()
            except Busy:
                if trio.current_time() >= until:
                    raise
            except NoSpace:
                if is_roomy:
                    raise
                is_roomy = True
                await trio.to_thread.run_sync(self.make_room, _ROOM)
            await trio.sleep(_LOOK_SECONDS)

    # Layers

    def layer(self, key: str) -> int:
        return self._number("layers", "key", key)

    def renew_layer(self, key: str) -> int:
        """Another number for a layer: no page the kernel cached under the old one is seen again."""
        with self._state.transaction():
            row = self._state.row("SELECT number FROM layers WHERE key = ?", key)
            self._state.write("DELETE FROM layers WHERE key = ?", key)
            number = self._state.write("INSERT INTO layers (key) VALUES (?)", key)
            if row is not None:
                self._state.write("UPDATE shown SET layer = ? WHERE layer = ?", number, row[0])
                self._state.write("DELETE FROM unverified WHERE layer = ?", row[0])
        return number

    def layer_key(self, number: int) -> str | None:
        return self._name("layers", "key", number)

    def numbering(self, number: int) -> str | None:
        """The numbering of members (LayerIndex.numbering) by which those of a layer were shown; None if none were."""
        return self._name("layers", "numbering", number)

    def keep_numbering(self, number: int, numbering: str | None) -> None:
        """Says by which numbering the members of a layer are shown; None, that none were."""
        self._state.write("UPDATE layers SET numbering = ? WHERE number = ?", numbering, number)

    def note_shown(self, view: int, layers: Collection[int]) -> None:
        """Takes note that a view shows some layers, so that these can be found by their numbers."""
        marks = ", ".join("?" for _ in layers)
        query = f"SELECT layer FROM shown WHERE layer IN ({marks}) AND view = ?"
        known = {row[0] for row in self._state.rows(query, *layers, view)}
        missing = [(number, view) for number in layers if number not in known]
        if missing:
            self._state.write_many("INSERT OR IGNORE INTO shown VALUES (?, ?)", missing)

    def views_of(self, layer: int) -> list[ViewRecord]:
        """The views that show a layer, the latest first."""
        where = "v.number IN (SELECT view FROM shown WHERE layer = ?) ORDER BY v.number DESC"
        return self._views(where, layer)

    # What a kernel was shown of a layer that nobody had verified

    def unverified(self, mount: str) -> set[int]:
        """The layers of which the kernel of a mount may hold bytes that nobody had verified."""
        return {row[0] for row in self._state.rows("SELECT layer FROM unverified WHERE mount = ?", mount)}

    def note_unverified(self, mount: str, layer: int) -> None:
        self._state.write("INSERT OR IGNORE INTO unverified VALUES (?, ?)", mount, layer)

    def forget_unverified(self, mount: str, layer: int | None = None) -> None:
        """Of one layer, or of all that the mount shows."""
        self._state.write("DELETE FROM unverified WHERE mount = ? AND layer = ifnull(?, layer)", mount, layer)

    # Folders

    def folder(self, path: str) -> int:
        return self._number("folders", "path", path)

    def folder_path(self, number: int) -> str | None:
        return self._name("folders", "path", number)

    # Views

    def view(self, number: int) -> ViewRecord | None:
        views = self._views("v.number = ?", number)
        return views[0] if views else None

    def latest_view(self, app: str, name: str, origin: str) -> ViewRecord | None:
        """The view that was last given to this name."""
        where = "app = ? AND name = ? AND origin = ? ORDER BY v.number DESC LIMIT 1"
        views = self._views(where, app, name, origin)
        return views[0] if views else None

    def bound_views(self, app: str, origin: str) -> list[ViewRecord]:
        """Of every name of an app its latest view, where that says what it shows."""
        where = (
            "v.number IN (SELECT max(number) FROM views WHERE app = ? AND origin = ? GROUP BY name)"
            " AND digest IS NOT NULL ORDER BY v.number"
        )
        return self._views(where, app, origin)

    def new_view(self, app: str, name: str, origin: str, digest: Digest | None) -> ViewRecord:
        values = app, name, origin, None if digest is None else str(digest)
        number = self._state.write(
            "INSERT INTO views (app, name, origin, digest) VALUES (?, ?, ?, ?)", *values
        )
        return ViewRecord(number, app, name, origin, digest)

    def name_view(self, app: str, name: str, origin: str, digest: Digest | None) -> ViewRecord:
        """What a name stands for now: its latest view, if that shows the digest or nothing yet; else a new one."""
        with self._state.transaction():
            return self._name_view(app, name, origin, digest)

    def name_views(self, app: str, names: Collection[str], origin: str) -> list[ViewRecord]:
        """The latest view of each name, a new one if it has none; of those that show something, a new one too."""
        with self._state.transaction():
            return [self._name_view(app, name, origin, None) for name in names]

    def _name_view(self, app: str, name: str, origin: str, digest: Digest | None) -> ViewRecord:
        latest = self.latest_view(app, name, origin)
        if latest is None or latest.digest not in (None, digest):
            return self.new_view(app, name, origin, digest)
        return latest if digest is None else self.bind_view(latest.number, digest)

    def bind_view(self, number: int, digest: Digest) -> ViewRecord:
        """Says what a view shows, if nobody has said it yet; returns what holds."""
        self._state.write(
            "UPDATE views SET digest = ? WHERE number = ? AND digest IS NULL", str(digest), number
        )
        record = self.view(number)
        assert record is not None
        return record

    def keep_root(self, record: ViewRecord, root: Root) -> ViewRecord:
        """Says what the folder of a view is like, for ever; returns the view with it."""
        insert = "INSERT OR REPLACE INTO roots VALUES (?, ?, ?, ?, ?)"
        self._state.write(insert, record.number, root.mode, root.uid, root.gid, root.mtime_ns)
        return replace(record, root=root)

    def _views(self, where: str, *values: object) -> list[ViewRecord]:
        query = (
            "SELECT v.number, app, name, origin, digest, mode, uid, gid, mtime_ns"
            f" FROM views v LEFT JOIN roots r ON r.view = v.number WHERE {where}"
        )
        return [_view(*row) for row in self._state.rows(query, *values)]

    # Origins

    def origin(self, name: str) -> Origin | None:
        """What an origin stands for, also one that the configuration no longer has."""
        row = self._state.row("SELECT source, platform, subtree FROM origins WHERE origin = ?", name)
        if row is None:
            return None
        source, platform, subtree = row
        # A name in a tree has no NUL.
        return Origin(source, platform, tuple(subtree.split(b"\0")) if subtree else ())

    def keep_origin(self, name: str, origin: Origin) -> None:
        if self.origin(name) is None:
            insert = "INSERT OR REPLACE INTO origins VALUES (?, ?, ?, ?)"
            self._state.write(insert, name, origin.source, origin.platform, b"\0".join(origin.subtree))

    # All of them

    def _number(self, table: str, column: str, value: str) -> int:
        select = f"SELECT number FROM {table} WHERE {column} = ?"
        row = self._state.row(select, value)
        if row is None:
            self._state.write(f"INSERT OR IGNORE INTO {table} ({column}) VALUES (?)", value)
            row = self._state.row(select, value)
            assert row is not None
        return int(row[0])

    def _name(self, table: str, column: str, number: int) -> str | None:
        row = self._state.row(f"SELECT {column} FROM {table} WHERE number = ?", number)
        return None if row is None or row[0] is None else str(row[0])


def _view(number: int, app: str, name: str, origin: str, digest: str | None, *root: Any) -> ViewRecord:
    shown = None if digest is None else Digest.parse(digest)
    return ViewRecord(number, app, name, origin, shown, None if root[0] is None else Root(*root))
