"""Operations: the answers to the kernel, each a pure function of the inode numbers it asks about."""

import errno
import functools
import hashlib
import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TypeVar

from fsmount.archive.entry import EntryType
from fsmount.archive.paths import MAX_NAME
from fsmount.cache.numbers import Numbers
from fsmount.catalog import VIEW_ROOT, App, Catalog, View
from fsmount.catalog import Content as Shown
from fsmount.errors import Busy, NoSpace, NotFound
from fsmount.fuse.inodes import (
    ROOT,
    Content,
    Directory,
    Folder,
    content_inode,
    directory_inode,
    folder_inode,
    parse_inode,
)
from fsmount.fuse.protocol import Attributes, Listing, Refusal, absent, pack_statfs
from fsmount.fuse.requests import Answer
from fsmount.index import Member
from fsmount.layer import Layer, Layers
from fsmount.overlay import Node
from fsmount.tree import StoredTree, Tree, directory_key
from fsmount.views import to_ns

#: What is below a digest never changes: the kernel may keep it as long as it likes.
_FOR_EVER = 86400.0
#: A tag may move, and an app gain tags: the kernel asks again after a second, and is answered from memory.
SOON = 1.0
#: Folders above the trees whose names are kept in order, for who lists them page by page.
_LISTINGS = 16

_Result = TypeVar("_Result")

_KINDS = {
    EntryType.FILE: stat.S_IFREG,
    EntryType.DIRECTORY: stat.S_IFDIR,
    EntryType.SYMLINK: stat.S_IFLNK,
    EntryType.CHAR: stat.S_IFCHR,
    EntryType.BLOCK: stat.S_IFBLK,
    EntryType.FIFO: stat.S_IFIFO,
}


class Operations:
    """The mount: `/`, apps, tags, trees: the handlers of requests.Handlers.

    Nothing is kept per lookup, open file or listing: what the kernel holds are inode numbers, and a listing goes on
    from a number that names the entry. A handler that has what it needs returns its answer, and else the
    coroutine that gets it.
    """

    def __init__(self, catalog: Catalog, layers: Layers, numbers: Numbers) -> None:
        self._catalog = catalog
        self._layers = layers
        self._numbers = numbers

    # Names

    def lookup(self, parent: int, name: bytes) -> Answer[Attributes]:
        if len(name) > MAX_NAME:
            raise Refusal(errno.ENAMETOOLONG)
        place = parse_inode(parent)
        if isinstance(place, Directory):
            view = self._view(place.view)
            content = self._catalog.ready(view)
            stored = content.tree.on_disk if content is not None else None
            if content is None or stored is None:
                return self._lookup_in_tree(view, place, name)
            node = stored.lookup(content.directory(place.directory), name)
            return absent(_FOR_EVER) if node is None else self._node_attributes(view, content.tree, node)
        if not isinstance(place, Folder):
            raise Refusal(errno.ENOTDIR)
        path, text = self._path(place), os.fsdecode(name)
        if path in self._catalog.apps:
            return self._lookup_tag(self._catalog.apps[path], text)
        if text not in self._catalog.folders[path]:
            return absent(SOON)
        known = partial(self._folder_attributes, f"{path}/{text}" if path else text)
        try:
            return known()
        except (Busy, NoSpace):  # it has no number yet
            return self._numbers.when_possible(known)

    async def _lookup_tag(self, app: App, name: str) -> Attributes:
        try:
            return self._view_attributes(await self._catalog.view(app, name))
        except NotFound:
            return absent(SOON)

    async def _lookup_in_tree(self, view: View, place: Directory, name: bytes) -> Attributes:
        content = await self._catalog.content(view)
        tree = content.tree
        node = await tree.lookup(content.directory(place.directory), name)
        _check(view)
        if node is None:
            return absent(_FOR_EVER if tree.final else 0)
        return self._node_attributes(view, tree, node)

    def getattr(self, inode: int) -> Answer[Attributes]:
        place = parse_inode(inode)
        if isinstance(place, Folder):
            return self._folder_attributes(self._path(place))
        if isinstance(place, Content):
            return self._with_member(place, lambda layer, member: _member_attributes(inode, layer, member))
        view = self._view(place.view)
        if place.directory == VIEW_ROOT:
            return self._view_attributes(view)
        return self._directory_attributes(view, place)

    async def _directory_attributes(self, view: View, place: Directory) -> Attributes:
        tree = (await self._catalog.content(view)).tree
        node = await tree.node(place.directory)
        _check(view)
        return self._node_attributes(view, tree, node)

    def readlink(self, inode: int) -> Answer[bytes]:
        place = parse_inode(inode)
        if not isinstance(place, Content):
            raise Refusal(errno.EINVAL)
        return self._with_member(place, lambda layer, member: member.link)

    # Listings

    def readdir(self, inode: int, after: int, size: int, *, plus: bool) -> Answer[bytes]:
        place = parse_inode(inode)
        listing = Listing(size, plus=plus)
        if isinstance(place, Directory):
            view = self._view(place.view)
            content = self._catalog.ready(view)
            stored = content.tree.on_disk if content is not None else None
            if content is None or stored is None:
                return self._list_when_known(view, place, after, listing)
            return self._list(view, content, stored, place, after, listing)
        if not isinstance(place, Folder):
            raise Refusal(errno.ENOTDIR)
        return self._list_folder(self._path(place), after, listing)

    async def _list_when_known(self, view: View, place: Directory, after: int, listing: Listing) -> bytes:
        content = await self._catalog.content(view)
        stored = await content.tree.stored()
        _check(view)
        return self._list(view, content, stored, place, after, listing)

    def _list(
        self, view: View, content: Shown, stored: StoredTree, place: Directory, after: int, listing: Listing
    ) -> bytes:
        for node, offset in stored.children(content.directory(place.directory), after):
            if not listing.add(node.name, self._node_attributes(view, content.tree, node), offset):
                break
        return listing.finish()

    async def _list_folder(self, path: str, after: int, listing: Listing) -> bytes:
        """The entries of a folder that may change; the place of each does not depend on the others."""
        app = self._catalog.apps.get(path)
        names = await self._catalog.tags(app) if app is not None else self._catalog.folders[path]
        offsets, ordered = _in_order(names)
        begin = bisect_right(offsets, after)
        stop = begin + listing.most
        page = ordered[begin:stop]
        if app is not None:
            attributes = [self._view_attributes(view) for view in await self._catalog.views(app, page)]
        else:
            paths = [f"{path}/{name}" if path else name for name in page]
            attributes = await self._numbers.when_possible(
                lambda: [self._folder_attributes(path) for path in paths]
            )
        for name, of_name, offset in zip(page, attributes, offsets[begin:stop], strict=True):
            if not listing.add(os.fsencode(name), of_name, offset):
                break
        return listing.finish()

    # Content

    def read(self, inode: int, offset: int, size: int) -> Answer[bytes]:
        place = parse_inode(inode)
        if not isinstance(place, Content):
            raise Refusal(errno.EISDIR)
        layer = self._layers.numbered(place.layer)
        if layer is None:
            return self._when_opened(place, lambda: self.read(inode, offset, size))
        data = layer.read_hot(place.member, offset, size)
        if data is not None:
            return data
        # Its task begins later: the layer may have become another by then.
        return layer.read(place.member, offset, size, number=place.layer)

    # The whole

    def statfs(self) -> bytes:
        """Never waits for anything: a watchdog asks this. A read-only tree has no free space to report."""
        return pack_statfs(block_size=4096, name_max=MAX_NAME)

    def _path(self, folder: Folder) -> str:
        """The path of a folder above the tags. Raises: ESTALE when the configuration no longer has it."""
        path = self._numbers.folder_path(folder.number) if folder.number else ""
        if path is None or not (path in self._catalog.folders or path in self._catalog.apps):
            raise Refusal(errno.ESTALE)
        return path

    def _view(self, number: int) -> View:
        view = self._catalog.view_numbered(number)
        if view is None:
            raise Refusal(errno.ESTALE)
        return view

    async def _when_opened(self, place: Content, answer: Callable[[], Answer[_Result]]) -> _Result:
        """answer about a layer whose number an earlier process has given out: this one has to open it first."""
        if await self._catalog.layer(place.layer) is None:
            raise Refusal(errno.ESTALE)
        found = answer()
        return await found if isinstance(found, Coroutine) else found

    def _with_member(self, place: Content, answer: Callable[[Layer, Member], _Result]) -> Answer[_Result]:
        """answer of a member, waiting for the next pass if the one that showed it broke off."""
        layer = self._layers.numbered(place.layer)
        if layer is None:
            return self._when_opened(place, lambda: self._with_member(place, answer))
        member = _find_member(layer, place.member)
        if member is not None:
            return answer(layer, member)

        async def wait() -> _Result:
            member = None
            while member is None:
                await layer.wait_progress()
                # Raises if the layer has become another meanwhile: what has that number now is another member.
                self._layers.numbered(place.layer)
                member = _find_member(layer, place.member)
            return answer(layer, member)

        return wait()

    def _folder_attributes(self, path: str) -> Attributes:
        inode = folder_inode(self._numbers.folder(path)) if path else ROOT
        # The kernel keeps a listing until its folder's mtime changes, and asks for that before each use.
        changed_ns = self._catalog.changed_ns(path) or self._numbers.began_ns
        return _attributes(inode, _UNKNOWN._replace(mtime_ns=changed_ns), SOON)

    def _view_attributes(self, view: View) -> Attributes:
        """Of a tag's folder; until somebody has looked inside, nobody asks the registry what it is.

        Its ctime stays as it is when the rest comes to be known: tar takes a change of that for one of the content.
        """
        root, created = self._catalog.attributes(view), view.created
        if root is not None:
            member = _UNKNOWN._replace(mode=root.mode, uid=root.uid, gid=root.gid, mtime_ns=root.mtime_ns)
        else:
            mtime_ns = self._numbers.began_ns if created is None else to_ns(created)
            member = _UNKNOWN._replace(mtime_ns=mtime_ns)
        attributes = _attributes(directory_inode(view.number), member, 0 if root is None else _FOR_EVER)
        return attributes._replace(ctime_ns=self._numbers.began_ns, name_seconds=SOON)

    def _node_attributes(self, view: View, tree: Tree, node: Node) -> Attributes:
        if node.is_directory:
            inode = directory_inode(view.number, directory_key(node))
        else:
            inode = content_inode(tree.layers[node.layer].number, node.member.number)
        # While layers stream, a later member of the same layer may replace this one.
        return _attributes(inode, node.member, _FOR_EVER if tree.final else 0)


def _check(view: View) -> None:
    """Raises: Corrupt, if what the view shows was condemned while somebody waited: its numbers mean others now."""
    if view.void is not None:
        raise view.void.with_traceback(None)


def _find_member(layer: Layer, number: int) -> Member | None:
    """None: a pass may yet show it. Raises: Refusal, if none will."""
    index = layer.index
    member = index.member(number) if index is not None else None
    if member is None and layer.complete:
        raise Refusal(errno.ESTALE)
    return member


def _member_attributes(inode: int, layer: Layer, member: Member) -> Attributes:
    return _attributes(inode, member, _FOR_EVER if layer.complete else 0)


#: A directory of which nothing is known but that it is one.
_UNKNOWN = Member(0, EntryType.DIRECTORY, 0o755, 0, 0, 0, 0, 0, 0, 1, b"")


def _attributes(inode: int, member: Member, seconds: float) -> Attributes:
    _, kind, mode, uid, gid, size, mtime_ns, major, minor, nlink, link = member
    device = _encode_device(major, minor) if major or minor else 0
    if link:
        size = len(link)
    return Attributes(
        inode, _KINDS[kind] | mode, nlink, uid, gid, device, size, mtime_ns, mtime_ns, seconds, seconds
    )


def _encode_device(major: int, minor: int) -> int:
    """The kernel's form of a device number in 32 bits (new_encode_dev in include/linux/kdev_t.h)."""
    return minor & 0xFF | (major & 0xFFF) << 8 | (minor & 0xFFF00) << 12


@functools.lru_cache(maxsize=_LISTINGS)
def _in_order(names: frozenset[str]) -> tuple[list[int], list[str]]:
    """The places of names in a listing, ascending, and the names. Of 10,000 in 20 ms, and one page has 23 of them."""
    ordered = sorted((_offset(name), name) for name in names)
    return [offset for offset, _ in ordered], [name for _, name in ordered]


def _offset(name: str) -> int:
    """The place of a name in a listing whose other names may come and go: 62 bits of its hash, and never 0."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big") >> 2 | 1
