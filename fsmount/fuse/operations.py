"""Operations: the answers to the kernel, each a pure function of the inode numbers it asks about."""

import errno
import hashlib
import os
import stat
import time
from collections.abc import Coroutine, Sequence
from typing import TypeAlias

import pyfuse3

from fsmount.archive.entry import EntryType
from fsmount.archive.paths import MAX_NAME
from fsmount.cache.numbers import Numbers
from fsmount.catalog import VIEW_ROOT, App, Catalog, View
from fsmount.errors import NotFound
from fsmount.fuse.inodes import (
    Content,
    Directory,
    Folder,
    content_inode,
    directory_inode,
    folder_inode,
    parse_inode,
)
from fsmount.index import Member
from fsmount.layer import Layer, Layers
from fsmount.overlay import Node
from fsmount.tree import Tree, directory_key

#: What is below a digest never changes: the kernel may keep it as long as it likes.
_FOR_EVER = 86400.0
#: A tag may move, and an app gain tags: the kernel asks again after a second, and is answered from memory.
_SOON = 1.0

_KINDS = {
    EntryType.FILE: stat.S_IFREG,
    EntryType.DIRECTORY: stat.S_IFDIR,
    EntryType.SYMLINK: stat.S_IFLNK,
    EntryType.CHAR: stat.S_IFCHR,
    EntryType.BLOCK: stat.S_IFBLK,
    EntryType.FIFO: stat.S_IFIFO,
}


Attributes: TypeAlias = pyfuse3.EntryAttributes


class Operations:
    """The mount: `/`, apps, tags, trees. Its methods are handlers for the session's guard.

    Nothing is kept per lookup, open file or listing: handles are inode numbers, and a listing goes on from a
    number that names the entry. Errors leave as FsmountError; the guard turns them into errnos. A handler that
    has what it needs returns its answer, and else the coroutine that gets it: see session.guarded.
    """

    def __init__(self, catalog: Catalog, layers: Layers, numbers: Numbers) -> None:
        self._catalog = catalog
        self._layers = layers
        self._numbers = numbers
        self._started_ns = time.time_ns()

    # Names

    def lookup(
        self, parent_inode: int, name: bytes, ctx: object = None
    ) -> Attributes | Coroutine[None, None, Attributes]:
        if len(name) > MAX_NAME:
            raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
        place = parse_inode(parent_inode)
        if isinstance(place, Directory):
            view = self._view(place.view)
            content = self._catalog.ready(view)
            stored = content.tree.on_disk if content is not None else None
            if content is None or stored is None:
                return self._lookup_in_tree(view, place, name)
            node = stored.lookup(content.directory(place.directory), name)
            return _absent(_FOR_EVER) if node is None else self._node_attributes(view, content.tree, node)
        if not isinstance(place, Folder):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        path, text = self._path(place), os.fsdecode(name)
        if path in self._catalog.apps:
            return self._lookup_tag(self._catalog.apps[path], text)
        if text not in self._catalog.folders[path]:
            return _absent(_SOON)
        return self._folder_attributes(f"{path}/{text}" if path else text)

    async def _lookup_tag(self, app: App, name: str) -> Attributes:
        try:
            return self._view_attributes(await self._catalog.view(app, name))
        except NotFound:
            return _absent(_SOON)

    async def _lookup_in_tree(self, view: View, place: Directory, name: bytes) -> Attributes:
        content = await self._catalog.content(view)
        tree = content.tree
        node = await tree.lookup(content.directory(place.directory), name)
        if node is None:
            return _absent(_FOR_EVER if tree.final else 0)
        return self._node_attributes(view, tree, node)

    def getattr(self, inode: int, ctx: object = None) -> Attributes | Coroutine[None, None, Attributes]:
        place = parse_inode(inode)
        if isinstance(place, Folder):
            return self._folder_attributes(self._path(place))
        if isinstance(place, Content):
            return _attributes(inode, self._member(place), _FOR_EVER)
        view = self._view(place.view)
        if place.directory == VIEW_ROOT:
            return self._view_attributes(view)
        return self._directory_attributes(view, place)

    async def _directory_attributes(self, view: View, place: Directory) -> Attributes:
        tree = (await self._catalog.content(view)).tree
        return self._node_attributes(view, tree, await tree.node(place.directory))

    def readlink(self, inode: int, ctx: object) -> bytes:
        place = parse_inode(inode)
        if not isinstance(place, Content):
            raise pyfuse3.FUSEError(errno.EINVAL)
        return self._member(place).link

    # Listings

    def opendir(self, inode: int, ctx: object) -> int | Coroutine[None, None, int]:
        place = parse_inode(inode)
        if isinstance(place, Directory) and place.directory == VIEW_ROOT:
            return self._open_root(inode, place)
        return inode

    async def _open_root(self, inode: int, place: Directory) -> int:
        # What follows is a listing, which waits for the tree anyway; tar compares the attributes that it
        # sees from here on, and calls the folder changed if they come to be known in between.
        content = await self._catalog.content(self._view(place.view))
        await content.tree.stored()
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        place = parse_inode(fh)
        if isinstance(place, Directory):
            view = self._view(place.view)
            content = await self._catalog.content(view)
            stored = await content.tree.stored()
            for child in stored.children(content.directory(place.directory), start_id):
                attributes = self._node_attributes(view, content.tree, child.node)
                if not pyfuse3.readdir_reply(token, child.node.name, attributes, child.offset):
                    return
        elif isinstance(place, Folder):
            for offset, name, attributes in await self._folder_entries(self._path(place)):
                if offset > start_id and not pyfuse3.readdir_reply(token, name, attributes, offset):
                    return

    async def _folder_entries(self, path: str) -> list[tuple[int, bytes, Attributes]]:
        """The entries of a folder that may change; the place of each does not depend on the others."""
        app = self._catalog.apps.get(path)
        if app is not None:
            tags = await self._catalog.tags(app)
            entries = [(tag, self._view_attributes(await self._catalog.view(app, tag))) for tag in tags]
        else:
            names = self._catalog.folders[path]
            entries = [(name, self._folder_attributes(f"{path}/{name}" if path else name)) for name in names]
        placed = [(_offset(name), os.fsencode(name), attributes) for name, attributes in entries]
        return sorted(placed, key=lambda entry: entry[0])

    def releasedir(self, fh: int) -> None:
        pass

    # Content

    def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC):
            raise pyfuse3.FUSEError(errno.EROFS)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    def read(self, fh: int, off: int, size: int) -> bytes | Coroutine[None, None, bytes]:
        place = parse_inode(fh)
        if not isinstance(place, Content):
            raise pyfuse3.FUSEError(errno.EISDIR)
        layer = self._layer(place)
        data = layer.read_hot(place.member, off, size)
        return layer.read(place.member, off, size) if data is None else data

    def release(self, fh: int) -> None:
        pass

    def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        pass

    # The whole

    def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        """Never waits for anything: a watchdog asks this. A read-only tree has no free space to report."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = MAX_NAME
        return data

    def _path(self, folder: Folder) -> str:
        """The path of a folder above the tags. Raises: ESTALE when the configuration no longer has it."""
        path = self._numbers.folder_path(folder.number) if folder.number else ""
        if path is None or not (path in self._catalog.folders or path in self._catalog.apps):
            raise pyfuse3.FUSEError(errno.ESTALE)
        return path

    def _view(self, number: int) -> View:
        view = self._catalog.view_numbered(number)
        if view is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return view

    def _layer(self, place: Content) -> Layer:
        layer = self._layers.numbered(place.layer)
        if layer is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return layer

    def _member(self, place: Content) -> Member:
        index = self._layer(place).index
        member = index.member(place.member) if index is not None else None
        if member is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return member

    def _folder_attributes(self, path: str) -> Attributes:
        inode = folder_inode(self._numbers.folder(path)) if path else pyfuse3.ROOT_INODE
        folder = Member(0, EntryType.DIRECTORY, 0o755, 0, 0, 0, self._started_ns, 0, 0, 1, b"")
        return _attributes(inode, folder, _SOON)

    def _view_attributes(self, view: View) -> Attributes:
        """Of a tag's folder; until somebody has looked inside, nobody asks the registry what it is."""
        root = view.root
        inode = directory_inode(view.number)
        if root is not None:
            attributes = _attributes(inode, root.member, _FOR_EVER)
        else:
            unknown = Member(0, EntryType.DIRECTORY, 0o755, 0, 0, 0, self._started_ns, 0, 0, 1, b"")
            attributes = _attributes(inode, unknown, 0)
        if view.created is not None:
            attributes.st_mtime_ns = attributes.st_ctime_ns = int(view.created.timestamp() * 10**9)
        attributes.entry_timeout = _SOON
        return attributes

    def _node_attributes(self, view: View, tree: Tree, node: Node) -> Attributes:
        if node.is_directory:
            inode = directory_inode(view.number, directory_key(node))
        else:
            inode = content_inode(tree.layers[node.layer].number, node.member.number)
        # While layers stream, a later member of the same layer may replace this one.
        return _attributes(inode, node.member, _FOR_EVER if tree.final else 0)


def _attributes(inode: int, member: Member, timeout: float) -> Attributes:
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = inode
    attributes.st_mode = _KINDS[member.type] | member.mode
    attributes.st_nlink = member.nlink
    attributes.st_uid = member.uid
    attributes.st_gid = member.gid
    attributes.st_rdev = os.makedev(member.major, member.minor)
    attributes.st_size = member.size if member.type is not EntryType.SYMLINK else len(member.link)
    attributes.st_blocks = (member.size + 511) // 512
    attributes.st_blksize = 4096
    attributes.st_atime_ns = attributes.st_mtime_ns = attributes.st_ctime_ns = member.mtime_ns
    attributes.entry_timeout = timeout
    attributes.attr_timeout = timeout
    return attributes


def _absent(seconds: float) -> Attributes:
    """Tells the kernel that a name does not exist, and for how long it need not ask again."""
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = 0
    attributes.entry_timeout = seconds
    return attributes


def _offset(name: str) -> int:
    """The place of a name in a listing whose other names may come and go: 62 bits of its hash, and never 0."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big") >> 2 | 1
