"""LayerIndex: what one layer holds by itself: names, members, where their bytes lie, and what it hides below."""

import json
import sqlite3
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

from fsmount.archive.entry import EntryType, Extent
from fsmount.archive.span import Codec, Kind, Span, Trust
from fsmount.cache import database
from fsmount.errors import FsmountError

#: The number of the layer's root directory, in every index.
ROOT = 0

VERSION = 2
SCHEMA = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE chunks (number INTEGER PRIMARY KEY, start INTEGER, size INTEGER, sha256 BLOB,
    blob_start INTEGER, blob_stop INTEGER);
CREATE TABLE spans (number INTEGER PRIMARY KEY, chunk INTEGER, offset INTEGER, length INTEGER, size INTEGER,
    skip INTEGER, sha256 BLOB, blob_sha256 BLOB, bits INTEGER, window BLOB);
CREATE INDEX spans_of_chunk ON spans (chunk);
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
OFFSETS = struct.Struct("<qqq")

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
    """`size` bytes of the inflated layer from `start`, and their sha256, if the index knows it.

    They can be had from the bytes of the blob from `blob_start` to `blob_stop`, if the index has spans.
    """

    start: int
    size: int
    sha256: bytes | None
    blob_start: int = 0
    blob_stop: int = 0


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
        #: Names the cuts of the layer into chunks: another index, which cuts it otherwise, has another name for them.
        self.space = ""
        self._removes = True
        if complete:
            self.facts = dict(connection.execute("SELECT key, value FROM facts"))
            self.space = str(self.facts["space"])
            rows = connection.execute(
                "SELECT start, size, sha256, blob_start, blob_stop FROM chunks ORDER BY number"
            )
            self.chunks = [Chunk(*row) for row in rows]
            self._starts = [chunk.start for chunk in self.chunks]
            query = "SELECT EXISTS (SELECT 1 FROM whiteouts)"
            (self._removes,) = connection.execute(query).fetchone()

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """The finished index at path, or None. Raises: FsmountError (damaged)."""
        connection = database.open_finished(path, version=VERSION)
        try:
            return None if connection is None else cls(connection, complete=True, file=path)
        except sqlite3.DatabaseError as error:
            raise FsmountError(
                f"{path} is damaged: {error}", remedy="Remove that file: it is made again from the source."
            ) from error

    def close(self) -> None:
        self._connection.close()

    @property
    def diff_id(self) -> str | None:
        """The digest of the inflated layer, if all of it has been seen."""
        found = self.facts.get("diff_id")
        return None if found is None else str(found)

    @property
    def kind(self) -> Kind:
        """How the layer is read."""
        return Kind(str(self.facts["kind"]))

    @property
    def numbering(self) -> str:
        """The same for two indexes of the layer only if every member has the same number in both."""
        return str(self.facts.get("numbering") or "")

    @property
    def reason(self) -> str:
        """Why the layer was streamed when it was first asked for; empty if it was not."""
        return str(self.facts.get("reason") or "")

    @property
    def trust(self) -> Trust:
        """What the index, and chunks that it brings, may be believed on."""
        return Trust(str(self.facts["trust"]))

    @property
    def has_spans(self) -> bool:
        """Whether chunks can be fetched alone."""
        return "codec" in self.facts

    @property
    def codec(self) -> Codec:
        """How the spans are inflated, if there are any."""
        return Codec(int(str(self.facts["codec"])))

    def spans(self, chunk: int) -> list[Span]:
        """What the bytes of a chunk are inflated from, in order."""
        query = (
            "SELECT offset, length, size, skip, sha256, blob_sha256, bits, window FROM spans"
            " WHERE chunk = ? ORDER BY number"
        )
        return [
            Span(
                offset,
                length,
                size,
                skip,
                sha256,
                blob_sha256,
                bits,
                zlib.decompress(window) if window else b"",
            )
            for offset, length, size, skip, sha256, blob_sha256, bits, window in self._connection.execute(
                query, (chunk,)
            )
        ]

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

    def rows(self, table: str, order: str) -> Iterator[tuple[Any, ...]]:
        """All of one of its tables, for comparing."""
        return self._connection.execute(f"SELECT * FROM {table} ORDER BY {order}")

    def packed_xattrs(self, number: int) -> str | None:
        """A member's extended attributes, for `unpack_xattrs`."""
        row = self._connection.execute("SELECT xattrs FROM members WHERE number = ?", (number,)).fetchone()
        return None if row is None else row[0]


def unpack_content(size: int, offset: int | None, packed: bytes | None) -> Content:
    """Where a member's bytes lie, from the columns of its row."""
    if packed is not None:
        return tuple(Extent(*values) for values in OFFSETS.iter_unpack(packed))
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
