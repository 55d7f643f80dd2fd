"""LayerIndex: what one layer holds by itself: names, members, where their bytes lie, and what it hides below."""

import json
import sqlite3
import struct
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

from fsmount.archive.entry import Entry, EntryType, Extent
from fsmount.cache import database
from fsmount.errors import FsmountError, Invalid

#: The number of the layer's root directory, in every index.
ROOT = 0

#: Members that may wait to be written, and for how long.
_PENDING = 1024
_PENDING_SECONDS = 0.1

_VERSION = 1
_SCHEMA = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE chunks (number INTEGER PRIMARY KEY, start INTEGER, size INTEGER, sha256 BLOB);
CREATE TABLE members (number INTEGER PRIMARY KEY, type INTEGER, mode INTEGER, uid INTEGER, gid INTEGER,
    size INTEGER, mtime_ns INTEGER, major INTEGER, minor INTEGER, nlink INTEGER, link BLOB,
    offset INTEGER, extents BLOB, xattrs TEXT);
CREATE TABLE directories (number INTEGER PRIMARY KEY, parent INTEGER, name BLOB, origin INTEGER, opaque INTEGER);
CREATE TABLE names (parent INTEGER, name BLOB, member INTEGER, link BLOB, PRIMARY KEY (parent, name)) WITHOUT ROWID;
CREATE TABLE whiteouts (parent INTEGER, name BLOB, PRIMARY KEY (parent, name)) WITHOUT ROWID;
"""
_MEMBER = "m.number, m.type, m.mode, m.uid, m.gid, m.size, m.mtime_ns, m.major, m.minor, m.nlink, m.link"
_NAMES = (
    f"SELECT n.name, n.link, d.origin, d.opaque, {_MEMBER} FROM names n"
    " LEFT JOIN members m ON m.number = n.member LEFT JOIN directories d ON d.number = n.member WHERE n.parent = ?"
)
_OFFSETS = struct.Struct("<qqq")

#: Where a directory of a layer comes from: a member of its own; only the path of another member, whose
#: parents are missing; or only a whiteout, so that it exists if a lower layer has it.
EXPLICIT, IMPLIED, GHOST = range(3)


class Member(NamedTuple):
    """The attributes of a file, symlink, device or directory: everything but its name and its bytes."""

    number: int
    type: EntryType
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    major: int
    minor: int
    nlink: int
    link: bytes


#: A directory that no member describes: 0755, root's, from the epoch.
IMPLIED_DIRECTORY = Member(0, EntryType.DIRECTORY, 0o755, 0, 0, 0, 0, 0, 0, 1, b"")


class Name(NamedTuple):
    """What a name in a directory of the layer stands for: a member, or a hardlink into the layers below.

    For a directory, `origin` says where it comes from, and `opaque` that it hides what lower layers have in it.
    """

    member: Member | None
    link: bytes | None
    origin: int | None = None
    opaque: bool = False


#: Where a member's bytes lie in the inflated layer, ascending; the gaps are zeros.
Content: TypeAlias = tuple[Extent, ...]


class Chunk(NamedTuple):
    """`size` bytes of the inflated layer from `start`, and their sha256."""

    start: int
    size: int
    sha256: bytes


class LayerIndex:
    """The queries; on a finished index, and on one that is being built (then `complete` is false).

    A lookup is one SQLite query of about 7 µs, little against a FUSE round trip of 50 to 90, and nothing
    per file is kept in memory.
    """

    def __init__(self, connection: sqlite3.Connection, *, complete: bool, file: Path | None = None) -> None:
        """file: where it lies, once it is complete."""
        self._connection = connection
        self.complete = complete
        self.file = file
        self.chunks: list[Chunk] = []
        self._starts: list[int] = []
        self.facts: dict[str, object] = {}
        self._removes = True
        if complete:
            self.facts = dict(connection.execute("SELECT key, value FROM facts"))
            rows = connection.execute("SELECT start, size, sha256 FROM chunks ORDER BY number")
            self.chunks = [Chunk(*row) for row in rows]
            self._starts = [chunk.start for chunk in self.chunks]
            query = "SELECT EXISTS (SELECT 1 FROM whiteouts)"
            (self._removes,) = connection.execute(query).fetchone()

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """The finished index at path, or None. Raises: FsmountError (damaged)."""
        connection = database.open_finished(path, version=_VERSION)
        try:
            return None if connection is None else cls(connection, complete=True, file=path)
        except sqlite3.DatabaseError as error:
            raise FsmountError(
                f"{path} is damaged: {error}", remedy="Remove that file: it is made again from the source."
            ) from error

    def close(self) -> None:
        self._connection.close()

    @property
    def diff_id(self) -> str:
        """The digest of the inflated layer."""
        return str(self.facts["diff_id"])

    @property
    def inflated_size(self) -> int:
        return self.chunks[-1].start + self.chunks[-1].size if self.chunks else 0

    @property
    def members(self) -> int:
        """How many members the layer has."""
        (count,) = self._connection.execute("SELECT count(*) FROM members").fetchone()
        return int(count)

    def stands_alone(self) -> bool:
        """Whether it removes nothing from the layers below, and has no hardlinks into them."""
        query = (
            "SELECT EXISTS (SELECT 1 FROM directories WHERE origin = ?) OR"
            " EXISTS (SELECT 1 FROM names WHERE member IS NULL)"
        )
        (leans,) = self._connection.execute(query, (GHOST,)).fetchone()
        return not (leans or self._removes)

    def chunk_at(self, offset: int) -> int:
        """The number of the chunk that holds the byte at offset of the inflated layer."""
        return bisect_right(self._starts, offset) - 1

    def root(self) -> Name:
        """The layer's own root directory."""
        origin, opaque = self._connection.execute(
            "SELECT origin, opaque FROM directories WHERE number = ?", (ROOT,)
        ).fetchone()
        return Name(self.member(ROOT), None, origin, bool(opaque))

    def origin(self, directory: int) -> int:
        """Where one of the layer's directories comes from."""
        query = "SELECT origin FROM directories WHERE number = ?"
        (origin,) = self._connection.execute(query, (directory,)).fetchone()
        return int(origin)

    def name(self, parent: int, name: bytes) -> Name | None:
        """What the layer itself has under that name, whiteouts aside."""
        row = self._connection.execute(f"{_NAMES} AND n.name = ?", (parent, name)).fetchone()
        return None if row is None else _name(row)

    def names(self, parent: int) -> Iterator[tuple[bytes, Name]]:
        """Every name in a directory of the layer, sorted."""
        return (
            (row[0], _name(row)) for row in self._connection.execute(f"{_NAMES} ORDER BY n.name", (parent,))
        )

    def whiteout(self, parent: int, name: bytes) -> bool:
        if self.complete and not self._removes:
            return False
        query = "SELECT 1 FROM whiteouts WHERE parent = ? AND name = ?"
        return self._connection.execute(query, (parent, name)).fetchone() is not None

    def whiteouts(self, parent: int) -> set[bytes]:
        """The names of that directory that the layer removes from the layers below."""
        if self.complete and not self._removes:
            return set()
        return {
            name
            for (name,) in self._connection.execute("SELECT name FROM whiteouts WHERE parent = ?", (parent,))
        }

    def path(self, number: int) -> list[bytes] | None:
        """The names from the layer's root to one of its directories; None if it has no such directory."""
        names: list[bytes] = []
        while number != ROOT:
            query = "SELECT parent, name FROM directories WHERE number = ?"
            row = self._connection.execute(query, (number,)).fetchone()
            if row is None:
                return None
            number = row[0]
            names.append(row[1])
        return names[::-1]

    def member(self, number: int) -> Member | None:
        query = f"SELECT {_MEMBER} FROM members m WHERE m.number = ?"
        row = self._connection.execute(query, (number,)).fetchone()
        return None if row is None else _member(row)

    def content(self, number: int) -> tuple[int, tuple[Extent, ...]] | None:
        """The logical size of a member and where its bytes lie in the inflated layer; the gaps are zeros."""
        query = "SELECT size, offset, extents FROM members WHERE number = ?"
        row = self._connection.execute(query, (number,)).fetchone()
        if row is None:
            return None
        return row[0], unpack_content(*row)

    def packed_xattrs(self, number: int) -> str | None:
        """A member's extended attributes, for `unpack_xattrs`."""
        row = self._connection.execute("SELECT xattrs FROM members WHERE number = ?", (number,)).fetchone()
        return None if row is None else row[0]


def unpack_content(size: int, offset: int | None, packed: bytes | None) -> Content:
    """Where a member's bytes lie, from the columns of its row."""
    if packed is not None:
        return tuple(Extent(*values) for values in _OFFSETS.iter_unpack(packed))
    return (Extent(0, offset, size),) if offset is not None and size else ()


def unpack_xattrs(text: str | None) -> dict[bytes, bytes]:
    """Extended attributes, from the column of a row."""
    if text is None:
        return {}
    return {key.encode("latin-1"): value.encode("latin-1") for key, value in json.loads(text).items()}


def _name(row: tuple[Any, ...]) -> Name:
    return Name(None if row[4] is None else _member(row[4:]), row[1], row[2], bool(row[3]))


def _member(row: tuple[Any, ...]) -> Member:
    return Member(row[0], _TYPES[row[1]], *row[2:])


_TYPES = tuple(EntryType)


class IndexBuilder:
    """Takes a layer's entries in archive order and makes its index; `index` answers for what came so far.

    Within the layer a later entry replaces an earlier one of the same name, a hardlink shares its target's
    member, missing parents are made, and whiteouts are kept apart: they speak of the layers below only
    (image-spec layer.md, "Whiteouts"). Directories keep the number of their first mention, so that what was
    answered while the layer streamed stays true.

    For one thread at a time; `index` may be queried from others meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection = database.create(path, schema=_SCHEMA, version=_VERSION)
        self.index = LayerIndex(self._connection, complete=False)
        self._next = 1
        self._flushed_at = 0.0
        self._directories: dict[bytes, int] = {b"": ROOT}
        self._ghosts: set[int] = set()
        self._members: list[tuple[object, ...]] = []
        self._names: list[tuple[int, bytes, int | None, bytes | None]] = []
        self._connection.execute("INSERT INTO directories VALUES (0, 0, x'', ?, 0)", (IMPLIED,))
        self._members.append(_implied(ROOT))
        self._flush()

    def add(self, entries: Iterable[Entry]) -> None:
        """Raises: Invalid, naming the entry."""
        for entry in entries:
            if b".wh." in entry.path and self._whiteout(entry):
                continue
            if entry.type is EntryType.DIRECTORY:
                self._add_directory(entry)
            elif entry.type is EntryType.HARDLINK:
                self._add_hardlink(entry)
            else:
                parent, name = self._place(entry.path)
                self._members.append(_row(self._next, entry))
                self._names.append((parent, name, self._next, None))
                self._next += 1
        # Statements of many rows are cheaper, but a slow stream's members must not wait to be seen.
        now = time.monotonic()
        if len(self._names) < _PENDING and now - self._flushed_at < _PENDING_SECONDS:
            return
        self._flushed_at = now
        self._flush()

    def _place(self, path: bytes) -> tuple[int, bytes]:
        """The parent's number and the name, with everything that path replaces gone."""
        folder, _, name = path.rpartition(b"/")
        parent = self._directories.get(folder)
        if parent is None or parent in self._ghosts:
            parent = self._make_directory(folder, IMPLIED)
        if path in self._directories:
            self._remove_directory(path)
        return parent, name

    def _make_directory(self, path: bytes, origin: int) -> int:
        """The number of a directory that exists at least as `origin` says, made with its parents if missing."""
        missing: list[bytes] = []
        while True:
            number = self._directories.get(path)
            if number is not None and (origin == GHOST or number not in self._ghosts):
                break
            missing.append(path)
            path = path.rpartition(b"/")[0]
        for path in reversed(missing):
            number = self._new_directory(number, path, origin)
        return number

    def _new_directory(self, parent: int, path: bytes, origin: int) -> int:
        name = path.rpartition(b"/")[2]
        number = self._directories.get(path)
        if number is None:
            number = self._directories[path] = self._next
            self._next += 1
            self._members.append(_implied(number))
            row = (number, parent, name, origin)
            self._connection.execute("INSERT INTO directories VALUES (?, ?, ?, ?, 0)", row)
        else:
            self._connection.execute("UPDATE directories SET origin = ? WHERE number = ?", (origin, number))
        if origin == GHOST:
            self._ghosts.add(number)
            # A file of this name stays: it hides what the whiteout would remove.
            self._flush()
            self._connection.execute(
                "INSERT OR IGNORE INTO names VALUES (?, ?, ?, NULL)", (parent, name, number)
            )
        else:
            self._ghosts.discard(number)
            self._names.append((parent, name, number, None))
        return number

    def _add_directory(self, entry: Entry) -> None:
        number = self._make_directory(entry.path, IMPLIED)
        self._members.append(_row(number, entry))
        self._connection.execute("UPDATE directories SET origin = ? WHERE number = ?", (EXPLICIT, number))

    def _add_hardlink(self, entry: Entry) -> None:
        if entry.link == entry.path:
            raise Invalid(f"the entry {_shown(entry.path)} is a hardlink to itself")
        if entry.link in self._directories and self._directories[entry.link] not in self._ghosts:
            raise Invalid(
                f"the entry {_shown(entry.path)} is a hardlink to the directory {_shown(entry.link)}"
            )
        self._flush()
        folder, _, base = entry.link.rpartition(b"/")
        target = self._connection.execute(
            "SELECT member, link FROM names WHERE parent = ? AND name = ?",
            (self._directories.get(folder, -1), base),
        ).fetchone()
        if target is None or target[0] in self._ghosts:
            # The layer does not have it itself; it is looked for below, when layers are merged.
            target = (None, entry.link)
        parent, name = self._place(entry.path)
        self._names.append((parent, name, *target))

    def _whiteout(self, entry: Entry) -> bool:
        """Whether the entry is a whiteout, or lies in one, and so is no content."""
        folders, _, name = entry.path.rpartition(b"/")
        if any(part.startswith(b".wh.") for part in folders.split(b"/")):
            return True
        if not name.startswith(b".wh."):
            return False
        if name == b".wh..wh..opq":
            parent = self._make_directory(folders, GHOST)
            self._connection.execute("UPDATE directories SET opaque = 1 WHERE number = ?", (parent,))
        elif not name.startswith(b".wh..wh."):  # the others are leftovers of AUFS, without meaning
            hidden = name[len(b".wh.") :]
            if hidden in (b"", b".", b".."):
                raise Invalid(f"the whiteout {_shown(entry.path)} names nothing that could be removed")
            parent = self._make_directory(folders, GHOST)
            self._connection.execute("INSERT OR IGNORE INTO whiteouts VALUES (?, ?)", (parent, hidden))
        return True

    def _remove_directory(self, path: bytes) -> None:
        """Takes a directory of this layer away again, because a later entry is no directory.

        Whiteouts in it are kept by what replaces it: a file hides all below its path anyway.
        """
        self._flush()
        for folder in [f for f in self._directories if f == path or f.startswith(path + b"/")]:
            number = self._directories.pop(folder)
            self._ghosts.discard(number)
            self._connection.execute("DELETE FROM names WHERE parent = ? OR member = ?", (number, number))
            self._connection.execute("DELETE FROM whiteouts WHERE parent = ?", (number,))

    def _flush(self) -> None:
        try:
            database.insert(self._connection, "members", self._members)
        except OverflowError:
            raise Invalid("an entry of the layer has a number of more than 64 bits") from None
        self._members.clear()
        database.insert(self._connection, "names", self._names)
        self._names.clear()

    def finish(self, chunks: list[Chunk], facts: dict[str, object]) -> None:
        """Completes the file. The caller gives it its name; `index` goes on answering from it until `close`."""
        self._flush()
        execute = self._connection.execute
        execute(
            "UPDATE members SET nlink = counted.links FROM (SELECT member, count(*) AS links FROM names"
            " WHERE member IS NOT NULL GROUP BY member HAVING links > 1) AS counted WHERE number = counted.member"
        )
        self._connection.executemany(
            "INSERT INTO chunks VALUES (?, ?, ?, ?)",
            ((number, *chunk) for number, chunk in enumerate(chunks)),
        )
        self._connection.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
        execute("COMMIT")

    def close(self) -> None:
        self._connection.close()


def _implied(number: int) -> tuple[object, ...]:
    return (*IMPLIED_DIRECTORY._replace(number=number), None, None, None)


def _row(number: int, entry: Entry) -> tuple[object, ...]:
    offset, extents = None, None
    if entry.size:
        if len(entry.extents) == 1 and entry.extents[0].size == entry.size:
            offset = entry.extents[0].offset
        else:
            extents = b"".join(_OFFSETS.pack(*extent) for extent in entry.extents)
    xattrs = None
    if entry.xattrs:
        xattrs = json.dumps({k.decode("latin-1"): v.decode("latin-1") for k, v in entry.xattrs.items()})
    return (
        number,
        int(entry.type),
        entry.mode,
        entry.uid,
        entry.gid,
        entry.size,
        entry.mtime_ns,
        *entry.device,
        1,
        entry.link,
        offset,
        extents,
        xattrs,
    )


def _shown(path: bytes) -> str:
    return repr(path.decode("utf-8", "backslashreplace"))
