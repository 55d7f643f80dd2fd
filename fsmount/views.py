"""Views: what a name in an app's folder shows, for as long as somebody is there; and the trees that are open for it."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import TypeAlias

import trio

from fsmount.app import App
from fsmount.cache.numbers import Root, ViewRecord
from fsmount.errors import Corrupt, DeadlineExpired, NotFound
from fsmount.image import Image, open_image
from fsmount.layer import Layer, Layers
from fsmount.oci.digest import Digest
from fsmount.oci.platform import Platform
from fsmount.policy import Indexes
from fsmount.registry.gone import Gone
from fsmount.tree import Tree, directory_key

#: Stands for the root of a view in place of a directory's number, before that is known: 41 bits, all set.
VIEW_ROOT = (1 << 41) - 1
#: Trees kept open; each costs a descriptor or two, and opening one again under a millisecond.
_OPEN_TREES = 100

#: A digest, of a manifest or an index; the platform that chooses from the index; the folder that is shown.
ContentKey: TypeAlias = tuple[Digest, Platform, tuple[bytes, ...]]


@dataclass(frozen=True, slots=True)
class Content:
    """What a view shows: a folder of a merged tree. `root` is that folder's number."""

    key: ContentKey
    image: Image
    tree: Tree
    root: int

    def directory(self, number: int) -> int:
        """The tree's number of a directory of the view, in which the root may have a number that stands for it."""
        return self.root if number == VIEW_ROOT else number

    @property
    def attributes(self) -> Root | None:
        """Those of the folder, if they are known without waiting, and cannot change any more."""
        if not self.tree.final:
            return None
        stored = self.tree.on_disk
        if stored is not None:
            node = stored.node(self.root)
        else:
            top = self.tree.root()
            node = top if self.root == directory_key(top) else None
        if node is None:
            return None
        member, created = node.member, self.image.created
        mtime_ns = member.mtime_ns if created is None else to_ns(created)
        return Root(member.mode, member.uid, member.gid, mtime_ns)


class View:
    """One name of one app, for as long as it means the same: what the kernel holds when it holds a tag's folder.

    It exists before anyone knows which manifest the name stands for: listing a thousand tags asks the registry
    once. The first look inside binds it to a digest, for ever; when the tag moves, the name gets another view,
    and who is inside this one stays with what it shows.
    """

    def __init__(self, app: App, record: ViewRecord) -> None:
        self.app = app
        self.record = record
        self.content: Content | None = None
        #: Why nothing of it may be shown any more.
        self.void: Corrupt | None = None

    @property
    def number(self) -> int:
        return self.record.number

    @property
    def created(self) -> datetime | None:
        return self.content.image.created if self.content else None


class Contents:
    """Every folder of a tree that is shown by some view, opened once for all of them."""

    def __init__(self, layers: Layers, nursery: trio.Nursery) -> None:
        self.on_open: list[Callable[[App, Content], None]] = []
        self._layers = layers
        self._nursery = nursery
        self._contents: OrderedDict[ContentKey, Content] = OrderedDict()

    async def open(self, app: App, digest: Digest, *, is_pinned: bool, seconds: float) -> Content:
        """What an app shows of a manifest, or of an index.

        is_pinned: by whoever asks, with a digest; what nobody vouches for is not good enough for them. seconds: for
        the source to say what the manifest is, if that is not here.

        Raises: NotFound (no such platform or folder), Unsupported, Invalid, Corrupt, Unreachable, AccessDenied.
        """
        indexes = app.indexes.strictest(Indexes.BOUND) if is_pinned else app.indexes
        content = self._contents.get((digest, app.platform, app.subtree))
        if content is not None:
            image = content.image
        else:
            with answering(app.source.name, seconds):
                image = await open_image(app.source, digest, app.platform, self._layers.folder)
        layers = []
        for spec in image.layers:
            get = partial(self._layers.get, replace(spec, indexes=indexes), app.source)
            layers.append(await self._layers.numbers.when_possible(get))
        if indexes is not Indexes.ANY:
            for layer in layers:
                await layer.demand_trust()
        if content is None:
            diff_ids = [spec.diff_id for spec in image.layers]
            tree = Tree(image.digest, layers, self._layers.folder, self._nursery, diff_ids=diff_ids)
            root = await tree.walk(app.subtree)
            if root is None or not root.is_directory:
                shown = b"/".join(app.subtree).decode("utf-8", "backslashreplace")
                raise NotFound(f"the image {digest} of {app.source.name} has no folder /{shown}")
            content = Content((digest, app.platform, app.subtree), image, tree, directory_key(root))
        if not isinstance(app.source, Gone):
            for told in self.on_open:
                told(app, content)
        return content

    def use(self, content: Content) -> None:
        """Keeps the number of open trees in bounds; a closed one opens again when it is asked."""
        self._contents[content.key] = content
        self._contents.move_to_end(content.key)
        while len(self._contents) > _OPEN_TREES:
            _, oldest = self._contents.popitem(last=False)
            oldest.tree.close()

    def forget(self, layer: Layer) -> None:
        """Nobody gets any more what shows a layer that is not what it was."""
        for key in [key for key, content in self._contents.items() if layer in content.tree.layers]:
            del self._contents[key]


@contextmanager
def answering(source: str, seconds: float) -> Iterator[None]:
    """Bounds what a source takes to answer. Raises: DeadlineExpired."""
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise DeadlineExpired(f"{source} has not answered within {seconds:g} s") from None


def to_ns(time: datetime) -> int:
    """Nanoseconds of the epoch."""
    return int(time.timestamp() * 10**9)
