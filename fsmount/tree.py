"""Tree: the merged tree of an image, answered from the layers at first and from one file ever after."""

import logging
import sqlite3
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import trio

from fsmount.archive.entry import EntryType
from fsmount.cache import database
from fsmount.cache.folder import CacheFolder, disk_errors, whole_file
from fsmount.errors import Corrupt, FsmountError, Invalid, NotFound
from fsmount.index import Content, LayerIndex, Member, unpack_content
from fsmount.layer import Layer
from fsmount.oci.digest import Digest
from fsmount.overlay import Node, Overlay, Stack, Undecided
from fsmount.singleflight import in_background, single_error

log = logging.getLogger(__name__)

_VERSION = 4
_SCHEMA = """
CREATE TABLE nodes (id INTEGER PRIMARY KEY, parent INTEGER, name BLOB, layer INTEGER, member INTEGER, type INTEGER,
    mode INTEGER, uid INTEGER, gid INTEGER, size INTEGER, mtime_ns INTEGER, major INTEGER, minor INTEGER,
    nlink INTEGER, link BLOB, xattrs TEXT);
CREATE TABLE directories (key INTEGER PRIMARY KEY, node INTEGER, first INTEGER, stop INTEGER);
CREATE TABLE layers (position INTEGER PRIMARY KEY, numbering TEXT);
"""
_COLUMNS = "name, layer, member, type, mode, uid, gid, size, mtime_ns, major, minor, nlink, link"
_TYPES = tuple(EntryType)

#: Rows that are written at once.
_ROWS = 4096
#: What any tree takes.
_LITTLE = 256 * 1024
#: Merged directories whose place in the layers is remembered while the tree is not on disk.
_STACKS = 4096


def directory_key(node: Node) -> int:
    """The number of a directory within its tree: its topmost layer and its number there, in 9 and 32 bits."""
    return node.layer << 32 | node.member.number


class Child(NamedTuple):
    """A node in a listing; `offset` is where a listing goes on after it, the same in every process."""

    node: Node
    offset: int


class StoredTree:
    """The merged tree as one read-only SQLite file.

    The children of a directory are neighbours, sorted by name, and a listing goes on from a row number:
    nothing is kept between two calls.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    def open(cls, path: Path) -> "StoredTree | None":
        """Raises: FsmountError (damaged)."""
        connection = database.open_finished(path, version=_VERSION)
        return None if connection is None else cls(connection)

    def close(self) -> None:
        self._connection.close()

    def numberings(self) -> list[str]:
        """Of the indexes that it was merged from: LayerIndex.numbering."""
        return [row[0] for row in self._connection.execute("SELECT numbering FROM layers ORDER BY position")]

    def lookup(self, directory: int, name: bytes) -> Node | None:
        query = f"SELECT {_COLUMNS} FROM nodes WHERE parent = ? AND name = ?"
        row = self._connection.execute(query, (directory, name)).fetchone()
        return None if row is None else _node(row)

    def node(self, directory: int) -> Node | None:
        query = f"SELECT {_COLUMNS} FROM nodes WHERE id = (SELECT node FROM directories WHERE key = ?)"
        row = self._connection.execute(query, (directory,)).fetchone()
        return None if row is None else _node(row)

    def children(self, directory: int, after: int = 0) -> Iterator[Child]:
        """The children that follow the one whose offset was `after`; of an unknown directory, none."""
        query = "SELECT first, stop FROM directories WHERE key = ?"
        first, stop = self._connection.execute(query, (directory,)).fetchone() or (0, 0)
        rows = self._connection.execute(
            f"SELECT id, {_COLUMNS} FROM nodes WHERE id >= ? AND id < ? ORDER BY id",
            (max(first, after + 1), stop),
        )
        return (Child(_node(row), number) for number, *row in rows)

    def folders(self) -> Iterator[tuple[int, Node, str | None]]:
        """Every directory, with its parent's number, and its attributes as an index keeps them; parents come first."""
        rows = self._connection.execute(
            f"SELECT parent, xattrs, {_COLUMNS} FROM nodes WHERE type = ? ORDER BY id",
            (int(EntryType.DIRECTORY),),
        )
        return ((parent, _node(row), xattrs) for parent, xattrs, *row in rows)

    def members(
        self, layer: int, index: Path
    ) -> Generator[tuple[int, Node, Content, str | None], None, None]:
        """Everything but directories that comes from one layer, in the order of its bytes in that layer.

        With its parent's number, its content, and its attributes as the index keeps them; index is the layer's.
        """
        self._connection.execute("ATTACH DATABASE ? AS layer", (database.uri(index),))
        rows = self._connection.cursor()
        try:
            rows.execute(
                f"SELECT parent, {', '.join('n.' + name for name in _COLUMNS.split(', '))}, m.offset, m.extents,"
                " m.xattrs FROM main.nodes n JOIN layer.members m ON m.number = n.member"
                " WHERE n.layer = ? AND n.type != ? ORDER BY m.offset, n.member, n.id",
                (layer, int(EntryType.DIRECTORY)),
            )
            for row in rows:
                node = _node(row[1:14])
                yield row[0], node, unpack_content(node.member.size, row[14], row[15]), row[16]
        finally:
            rows.close()  # or the index would be in use, if the caller has had enough
            self._connection.execute("DETACH DATABASE layer")

    def files(self, directory: int, paths: Iterable[bytes]) -> Iterator[tuple[bytes, Node]]:
        """Those of the paths from a directory that lead to regular files, without a symlink on the way."""
        known: dict[bytes, int | None] = {}
        for path in paths:
            *folders, name = path.split(b"/")
            key: int | None = directory
            above = b""
            for folder in folders:
                if key is None:
                    break
                above += folder + b"/"
                if above not in known:
                    node = self.lookup(key, folder)
                    known[above] = directory_key(node) if node is not None and node.is_directory else None
                key = known[above]
            node = None if key is None else self.lookup(key, name)
            if node is not None and node.member.type is EntryType.FILE:
                yield path, node

    def below(self, directory: int) -> Iterator[Node]:
        """Every regular file below a directory."""
        waiting = [directory]
        while waiting:
            for child in self.children(waiting.pop()):
                if child.node.is_directory:
                    waiting.append(directory_key(child.node))
                elif child.node.member.type is EntryType.FILE:
                    yield child.node

    def paths(self, directory: int, layer: int, members: Iterable[int]) -> Iterator[tuple[bytes, int]]:
        """By which paths from a directory one gets at members of a layer, at its position; of one elsewhere, none."""
        known: dict[int, bytes | None] = {directory: b""}
        for member in members:
            query = "SELECT parent, name FROM nodes WHERE layer = ? AND member = ? AND type != ?"
            rows = self._connection.execute(query, (layer, member, int(EntryType.DIRECTORY)))
            for parent, name in rows.fetchall():
                above = self._above(parent, known)
                if above is not None:
                    yield above + name, member

    def _above(self, key: int, known: dict[int, bytes | None]) -> bytes | None:
        """The path of a directory, with a slash behind it, from one that is known; None if it is below none."""
        trail: list[tuple[int, bytes]] = []
        query = "SELECT id, parent, name FROM nodes WHERE id = (SELECT node FROM directories WHERE key = ?)"
        while key not in known:
            number, parent, name = self._connection.execute(query, (key,)).fetchone()
            if number == 1:
                known[key] = None
                break
            trail.append((key, name))
            key = parent
        path = known[key]
        for key, name in reversed(trail):
            path = known[key] = None if path is None else path + name + b"/"
        return path

    @property
    def root(self) -> Node:
        row = self._connection.execute(f"SELECT {_COLUMNS} FROM nodes WHERE id = 1").fetchone()
        return _node(row)

    def counts(self) -> tuple[int, int]:
        """(nodes without the root, bytes of all files, hardlinks counted once)."""
        row = self._connection.execute(
            "SELECT (SELECT count(*) - 1 FROM nodes), coalesce(sum(size), 0) FROM"
            " (SELECT DISTINCT layer, member, size FROM nodes WHERE type = ?)",
            (int(EntryType.FILE),),
        ).fetchone()
        return int(row[0]), int(row[1])


def _node(row: Sequence[Any]) -> Node:
    name, layer, number, kind, *rest = row
    return Node(name, layer, Member(number, _TYPES[kind], *rest))


def write_tree(path: Path, indexes: Sequence[LayerIndex]) -> None:
    """Merges complete layers, and writes the tree down, whole or not at all. For a worker thread.

    Raises: Invalid, NoSpace.
    """
    with disk_errors(path), whole_file(path) as partial:
        connection = database.create(partial, schema=_SCHEMA, version=_VERSION)
        try:
            _Writer(connection, indexes).write()
        finally:
            connection.close()


class _Whole(NamedTuple):
    """A directory that one layer alone has, with all that is in it: its key, and where it is in that layer."""

    key: int
    own_id: int
    layer: int
    number: int


class _Writer:
    """Merges name by name where several layers meet, and copies whole what only one of them has: most of a tree."""

    def __init__(self, connection: sqlite3.Connection, indexes: Sequence[LayerIndex]) -> None:
        self._connection = connection
        self._indexes = indexes
        self._stands_alone = [index.stands_alone() for index in indexes]

    def write(self) -> None:
        self._connection.executemany(
            "INSERT INTO layers VALUES (?, ?)", enumerate(index.numbering for index in self._indexes)
        )
        whole = self._merge()
        self._connection.execute("CREATE UNIQUE INDEX by_name ON nodes (parent, name)")
        self._connection.execute("COMMIT")
        for position, index in enumerate(self._indexes):
            directories = [one for one in whole if one.layer == position]
            if directories:
                self._copy(index, directories)
        self._connection.execute("CREATE INDEX by_content ON nodes (layer, member)")

    def _merge(self) -> list[_Whole]:
        """Writes what is decided name by name; returns what is left to be copied."""
        overlay = Overlay(lambda position: self._indexes[position], len(self._indexes))
        node, stack = overlay.root()
        waiting: deque[tuple[int, int, Stack]] = deque([(1, directory_key(node), stack)])
        nodes = [_row(1, 0, node, overlay.xattrs(stack))]
        directories: list[tuple[int, int, int, int]] = []
        whole: list[_Whole] = []
        next_id = 2
        while waiting:
            own_id, key, stack = waiting.popleft()
            if len(stack) == 1 and self._stands_alone[stack[0][0]]:
                whole.append(_Whole(key, own_id, *stack[0]))
                continue
            first = next_id
            for node, below in overlay.children(stack):
                xattrs = None
                if node.is_directory:
                    waiting.append((next_id, directory_key(node), below))
                    xattrs = overlay.xattrs(below)
                nodes.append(_row(next_id, key, node, xattrs))
                next_id += 1
            directories.append((key, own_id, first, next_id))
            if len(nodes) >= _ROWS:
                database.insert(self._connection, "nodes", nodes)
                nodes.clear()
        database.insert(self._connection, "nodes", nodes)
        database.insert(self._connection, "directories", directories)
        return whole

    def _copy(self, index: LayerIndex, directories: list[_Whole]) -> None:
        """Copies directories of one layer with all that is in them.

        A layer numbers a directory before what is in it, and so do the rows that are made in that order.
        """
        assert index.file is not None
        execute = self._connection.execute
        layer = directories[0].layer
        execute("ATTACH DATABASE ? AS layer", (database.uri(index.file),))
        try:
            execute("CREATE TEMP TABLE copied (number INTEGER PRIMARY KEY, node INTEGER)")
            self._connection.executemany(
                "INSERT INTO copied VALUES (?, ?)", [(one.number, one.own_id) for one in directories]
            )
            execute(
                "WITH RECURSIVE below (number) AS (SELECT number FROM copied UNION ALL"
                " SELECT n.member FROM below JOIN layer.names n ON n.parent = below.number"
                " JOIN layer.directories d ON d.number = n.member)"
                " INSERT OR IGNORE INTO copied SELECT number, NULL FROM below"
            )
            execute("BEGIN")
            (last,) = execute("SELECT max(id) FROM nodes").fetchone()
            execute(
                "INSERT INTO nodes SELECT NULL, ? << 32 | n.parent, n.name, ?, m.number, m.type, m.mode, m.uid,"
                " m.gid, m.size, m.mtime_ns, m.major, m.minor, m.nlink, m.link,"
                " CASE WHEN m.type = ? THEN m.xattrs END"
                " FROM temp.copied c JOIN layer.names n ON n.parent = c.number"
                " JOIN layer.members m ON m.number = n.member ORDER BY c.number, n.name",
                (layer, layer, int(EntryType.DIRECTORY)),
            )
            execute(
                "UPDATE temp.copied SET node = nodes.id FROM main.nodes WHERE nodes.id > ? AND nodes.type = ?"
                " AND nodes.member = copied.number",
                (last, int(EntryType.DIRECTORY)),
            )
            execute(
                "INSERT INTO directories SELECT ? << 32 | c.number, c.node, ifnull(r.first, 0), ifnull(r.stop, 0)"
                " FROM temp.copied c LEFT JOIN (SELECT parent, min(id) AS first, max(id) + 1 AS stop FROM nodes"
                " WHERE id > ? GROUP BY parent) r ON r.parent = ? << 32 | c.number",
                (layer, last, layer),
            )
            execute("COMMIT")
            execute("DROP TABLE temp.copied")
        finally:
            execute("DETACH DATABASE layer")


def _row(own_id: int, parent: int, node: Node, xattrs: str | None) -> tuple[object, ...]:
    number, kind, *rest = node.member
    return (own_id, parent, node.name, node.layer, number, int(kind), *rest, xattrs)


class Tree:
    """The merged tree of one manifest.

    Until it is on disk, lookups are answered by the overlay of what the layers have shown so far, and wait
    only for what those have not decided; a listing waits for the whole tree. The tree is merged once, in a
    thread, when the last layer is complete.
    """

    def __init__(
        self,
        digest: Digest,
        layers: Sequence[Layer],
        folder: CacheFolder,
        nursery: trio.Nursery,
        *,
        diff_ids: Sequence[Digest | None] = (),
    ) -> None:
        """nursery: where the merging runs that nobody waits for. diff_ids: of each layer, as the image has them."""
        self.digest = digest
        self._diff_ids = diff_ids
        self._nursery = nursery
        self.layers = layers
        self._folder = folder
        self._path = folder.trees / f"{digest.algorithm}-{digest.hex}.sqlite"
        self._ends = [layer.ends for layer in layers]
        self._stored: StoredTree | None = None
        self._looked = False
        self._overlay = Overlay(lambda position: layers[position].index, len(layers))
        self._stacks: OrderedDict[int, Stack] = OrderedDict()
        self._writing = trio.Lock()
        self._merging = False

    @property
    def on_disk(self) -> StoredTree | None:
        """The merged tree, if it has been written."""
        ends = [layer.ends for layer in self.layers]
        if ends != self._ends:
            # What a layer was when the tree was merged turned out to be wrong.
            self._ends = ends
            self._forget()
        if self._stored is None and not self._looked:
            self._looked = True
            self._stored = self._load()
        return self._stored

    def _load(self) -> StoredTree | None:
        """The tree on disk, if it was merged from the indexes that the layers have now."""
        stored = _load(self._path)
        if stored is None:
            return None
        indexes = [layer.index for layer in self.layers]
        for index, numbering in zip(indexes, stored.numberings(), strict=True):
            if index is not None and index.complete and index.numbering != numbering:
                stored.close()
                return None
        return stored

    def _forget(self) -> None:
        if self._stored is not None:
            self._stored.close()
        self._stored = None
        self._looked = False
        self._merging = False
        self._stacks.clear()

    @property
    def final(self) -> bool:
        """Whether every layer is complete, so that no answer can change any more."""
        return self.on_disk is not None or all(layer.complete for layer in self.layers)

    def close(self) -> None:
        """Frees what the tree holds open; it opens by itself when it is asked again."""
        self._forget()
        for layer in self.layers:
            layer.close_index()

    async def stored(self) -> StoredTree:
        """The tree on disk, fetching and merging what that takes.

        Raises: Corrupt, Invalid, Unreachable and other kinds of FsmountError.
        Cancellation: safe; the passes go on.
        """
        if self.on_disk is None:
            with single_error(FsmountError):
                async with trio.open_nursery() as nursery:
                    for layer in self.layers:
                        nursery.start_soon(layer.wait_complete)
            for layer, diff_id in zip(self.layers, self._diff_ids, strict=False):
                layer.check(diff_id)
            await self._writing.acquire()
            try:
                # A layer may have become another while it was waited for.
                if self.on_disk is None:
                    try:
                        self._stored = await self._merge_in_thread()
                    except FsmountError as error:
                        if isinstance(error.__cause__, sqlite3.DatabaseError):
                            await self._drop_damaged_indexes()
                        raise
                    self._stacks.clear()
            finally:
                self._writing.release()
        assert self._stored is not None
        return self._stored

    async def _drop_damaged_indexes(self) -> None:
        """What the disk has spoilt is made again when it is asked for next."""
        for layer in self.layers:
            if not await trio.to_thread.run_sync(database.is_sound, layer.index_path):
                log.error("%s is damaged; it is made again", layer.index_path)
                layer.close_index()
                layer.index_path.unlink(missing_ok=True)

    def reopen(self) -> StoredTree:
        """Another connection to the written tree, for another thread. Ownership: the caller closes it."""
        stored = StoredTree.open(self._path)
        if stored is None:
            raise FsmountError(f"the tree of {self.digest} has vanished from the cache")
        return stored

    async def _merge_in_thread(self) -> StoredTree:
        ends = [layer.ends for layer in self.layers]
        stored = await trio.to_thread.run_sync(self._merge)
        if ends != [layer.ends for layer in self.layers]:
            stored.close()
            self._path.unlink(missing_ok=True)
            raise Corrupt(f"image {self.digest}: one of its layers turned out to be wrong meanwhile")
        return stored

    def _merge(self) -> StoredTree:
        # Connections of its own: those of the layers belong to the event loop's thread.
        indexes = [layer.reopen_index() for layer in self.layers]
        try:
            with disk_errors(self._path):
                # About as large as they are.
                size = sum(layer.index_path.stat().st_size for layer in self.layers)
            self._folder.make_room(size + _LITTLE)
            write_tree(self._path, indexes)
        except Invalid as error:
            raise Invalid(f"image {self.digest}: {error.message}", remedy=error.remedy) from error
        finally:
            for index in indexes:
                index.close()
        return self.reopen()

    def root(self) -> Node:
        """The root; while layers stream, its attributes are those known so far."""
        stored = self.on_disk
        if stored is not None:
            return stored.root
        node, stack = self._overlay.root()
        self._remember(node, stack)
        return node

    async def lookup(self, directory: int, name: bytes) -> Node | None:
        """The node of a name in a directory, or None. Raises: NotFound (no such directory), as `stored`."""
        while True:
            stored = self.on_disk
            if stored is not None:
                return stored.lookup(directory, name)
            try:
                found = self._overlay.lookup(self._stack(directory), name)
            except Undecided as undecided:
                await self.layers[undecided.position].wait_progress()
                continue
            except sqlite3.DatabaseError as error:
                await self._fail(error)
                continue
            if self.final:
                self._merge_later()
            if found is None:
                return None
            self._remember(*found)
            return found[0]

    def _merge_later(self) -> None:
        if not self._merging:
            self._merging = True
            what = f"the tree of {self.digest} cannot be written"
            self._nursery.start_soon(in_background, what, self._merge_once)

    async def _merge_once(self) -> None:
        await self.stored()

    async def node(self, directory: int) -> Node:
        """A directory by its number. Raises: NotFound, as `stored`."""
        while True:
            stored = self.on_disk
            if stored is not None:
                node = stored.node(directory)
                if node is None:
                    raise _no_directory(directory)
                return node
            try:
                return self._find(directory)[0]
            except Undecided as undecided:
                await self.layers[undecided.position].wait_progress()
            except sqlite3.DatabaseError as error:
                await self._fail(error)

    async def _fail(self, error: sqlite3.DatabaseError) -> None:
        """What a layer streams into a full disk has no use any more, and its pass will soon say so."""
        if all(layer.complete for layer in self.layers):
            raise error
        for layer in self.layers:
            await layer.wait_complete()

    async def walk(self, path: Sequence[bytes]) -> Node | None:
        """The node at a path of names from the root, or None. As `lookup`."""
        node = self.root()
        for name in path:
            found = await self.lookup(directory_key(node), name) if node.is_directory else None
            if found is None:
                return None
            node = found
        return node

    def _stack(self, directory: int) -> Stack:
        stack = self._stacks.get(directory)
        if stack is None or (stack and stack[-1][1] < 0):
            # Unknown, or found when a layer had not shown all of it: look again.
            stack = self._find(directory)[1]
        return stack

    def _find(self, directory: int) -> tuple[Node, Stack]:
        """A directory by its number: its path in its topmost layer is its path in the tree."""
        position, number = directory >> 32, directory & 0xFFFFFFFF
        index: LayerIndex | None = None
        if position < len(self.layers):
            index = self.layers[position].index
            if index is None:
                raise Undecided(position)
        path = index.path(number) if index is not None else ([] if directory == 0 else None)
        found = self._overlay.walk(path) if path is not None else None
        if found is None or directory_key(found[0]) != directory:
            if index is not None and not index.complete:
                raise Undecided(position)
            raise _no_directory(directory)
        self._remember(*found)
        return found

    def _remember(self, node: Node, stack: Stack) -> None:
        if node.is_directory:
            self._stacks[directory_key(node)] = stack
            while len(self._stacks) > _STACKS:
                self._stacks.popitem(last=False)


def _no_directory(key: int) -> FsmountError:
    return NotFound(f"the tree has no directory {key >> 32}:{key & 0xFFFFFFFF}")


def _load(path: Path) -> StoredTree | None:
    try:
        return StoredTree.open(path)
    except FsmountError as error:
        log.warning("%s; it is made again", error.message)
        path.unlink(missing_ok=True)
        return None
