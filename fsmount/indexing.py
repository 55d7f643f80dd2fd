"""IndexBuilder: from a layer's entries, in archive order, to its index."""

import json
import time
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from fsmount.archive.entry import Entry, EntryType
from fsmount.archive.span import Span, Table
from fsmount.cache import database
from fsmount.errors import Invalid
from fsmount.index import (
    EXPLICIT,
    GHOST,
    IMPLIED,
    IMPLIED_DIRECTORY,
    OFFSETS,
    ROOT,
    SCHEMA,
    VERSION,
    Chunk,
    LayerIndex,
)

#: Members that may wait to be written, and for how long.
_PENDING = 1024
_PENDING_SECONDS = 0.1


#: Small spans are joined to chunks of about this size: a file each in the chunk store would cost more than it saves.
_JOINED = 1024 * 1024
#: No span may inflate to more: it is in memory as a whole, and everything of it is fetched for one byte.
_LARGEST_SPAN = 64 * 1024 * 1024


def write_index(path: Path, table: Table, facts: Mapping[str, object]) -> None:
    """The index of a layer of which a table is known, at path. Blocks on the disk. Raises: Invalid."""
    builder = IndexBuilder(path)
    try:
        builder.add(table.entries)
        chunks, spans = _chunks(table.spans)
        builder.finish(chunks, {**facts, "codec": int(table.codec)}, spans)
    finally:
        builder.close()


def _chunks(spans: Iterable[Span]) -> tuple[list[Chunk], list[tuple[int, Span]]]:
    """Chunks of one or more neighbouring spans, and the spans with the number of their chunk."""
    chunks: list[Chunk] = []
    numbered: list[tuple[int, Span]] = []
    for span in spans:
        if span.size > _LARGEST_SPAN:
            raise Invalid(f"a span inflates to {span.size} bytes: expected at most {_LARGEST_SPAN}")
        last = chunks[-1] if chunks else Chunk(0, 0, None)
        if last.size + span.size <= _JOINED and last.blob_stop and span.offset >= last.blob_start:
            stop = max(last.blob_stop, span.offset + span.length)
            if stop - last.blob_start <= 2 * _JOINED:
                chunks[-1] = Chunk(last.start, last.size + span.size, None, last.blob_start, stop)
                numbered.append((len(chunks) - 1, span))
                continue
        numbered.append((len(chunks), span))
        start = last.start + last.size
        chunks.append(Chunk(start, span.size, span.sha256, span.offset, span.offset + span.length))
    return chunks, numbered


class IndexBuilder:
    """Takes a layer's entries in archive order and makes its index; `index` answers for what came so far.

    Within the layer a later entry replaces an earlier one of the same name, a hardlink shares its target's
    member, missing parents are made, and whiteouts are kept apart: they speak of the layers below only
    (image-spec layer.md, "Whiteouts"). Directories keep the number of their first mention, so that what was
    answered while the layer streamed stays true.

    For one thread at a time; `index` may be queried from others meanwhile.
    """

    def __init__(self, path: Path, *, hidden: Collection[bytes] = ()) -> None:
        """hidden: paths of entries that are left out."""
        self.path = path
        self._hidden = hidden
        self._connection = database.create(path, schema=SCHEMA, version=VERSION)
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
            if entry.path in self._hidden:
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

    def finish(
        self, chunks: Sequence[Chunk], facts: Mapping[str, object], spans: Iterable[tuple[int, Span]] = ()
    ) -> None:
        """Completes the file. The caller gives it its name; `index` goes on answering from it until `close`.

        spans: each with the number of its chunk, in order.
        """
        self._flush()
        execute = self._connection.execute
        execute(
            "UPDATE members SET nlink = counted.links FROM (SELECT member, count(*) AS links FROM names"
            " WHERE member IS NOT NULL GROUP BY member HAVING links > 1) AS counted WHERE number = counted.member"
        )
        self._connection.executemany(
            "INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?)",
            ((number, *chunk) for number, chunk in enumerate(chunks)),
        )
        rows = ((number, chunk, *_span_row(span)) for number, (chunk, span) in enumerate(spans))
        while some := list(islice(rows, _PENDING)):
            database.insert(self._connection, "spans", some)
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
            extents = b"".join(OFFSETS.pack(*extent) for extent in entry.extents)
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


def _span_row(span: Span) -> tuple[object, ...]:
    # At 32 KiB for every 4 MiB the windows would be most of an index.
    window = zlib.compress(span.window, 1) if span.window else None
    return (
        span.offset,
        span.length,
        span.size,
        span.skip,
        span.sha256,
        span.blob_sha256,
        span.bits,
        window,
    )


def _shown(path: bytes) -> str:
    return repr(path.decode("utf-8", "backslashreplace"))
