"""Catalog: which apps there are, which tags they have, and what each tag shows."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TypeAlias

import trio

from fsmount.cache.numbers import ViewRecord
from fsmount.errors import Corrupt, DeadlineExpired, FsmountError, NotFound, Unreachable
from fsmount.image import Image, open_image
from fsmount.layer import Layer, Layers
from fsmount.oci.digest import Digest
from fsmount.oci.platform import Platform
from fsmount.oci.reference import is_tag
from fsmount.overlay import Node
from fsmount.policy import Complete, Indexes
from fsmount.registry.source import Source, is_housekeeping
from fsmount.singleflight import SingleFlight, in_background
from fsmount.tree import Tree, directory_key

log = logging.getLogger(__name__)

#: What a registry may take to answer about names before the caller hears that it does not.
_NAMES_SECONDS = 10.0
#: Stands for the root of a view in place of a directory's number, before that is known: 41 bits, all set.
VIEW_ROOT = (1 << 41) - 1
#: Trees kept open; each costs a descriptor or two, and opening one again under a millisecond.
_OPEN_TREES = 100


@dataclass(frozen=True, slots=True)
class App:
    """One repository shown as one folder of tags. `subtree` is the path that each tag's tree starts from."""

    name: str
    source: Source
    subtree: tuple[bytes, ...]
    platform: Platform
    #: Whether a tag is listed; others still open by name.
    listed: Callable[[str], bool]
    refresh_seconds: float
    indexes: Indexes = Indexes.ANY
    complete: Complete = Complete.IDLE
    publish_indexes: bool = False

    @property
    def origin(self) -> str:
        """What, if changed, makes the same name another view."""
        subtree = b"/".join(self.subtree).decode("utf-8", "backslashreplace")
        return f"{self.source.name} {self.platform} /{subtree}"


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
    def root(self) -> Node | None:
        """The attributes of its folder, if they are known without waiting."""
        content = self.content
        if content is None or not content.tree.final:
            return None
        stored = content.tree.on_disk
        if stored is not None:
            return stored.node(content.root)
        return content.tree.root() if content.root == directory_key(content.tree.root()) else None

    @property
    def created(self) -> datetime | None:
        return self.content.image.created if self.content else None


@dataclass(slots=True)
class _Tags:
    """What was listed, when that was last looked after, and when it last changed, in nanoseconds of the epoch."""

    listed: frozenset[str]
    looked_at: float
    changed_ns: int


class Catalog:
    """The apps of one configuration. Everything that asks a registry is asked once, however many wait.

    What was known stays true when a registry is away: a known tag opens from what was kept, and is looked
    after again in the background.
    """

    def __init__(self, apps: Sequence[App], layers: Layers, nursery: trio.Nursery) -> None:
        self.apps: Mapping[str, App] = {app.name: app for app in apps}
        #: Every folder above an app, and the names in it.
        self.folders: dict[str, set[str]] = {"": set()}
        for name in self.apps:
            while name:
                parent, _, base = name.rpartition("/")
                self.folders.setdefault(parent, set()).add(base)
                name = parent
        #: Told of what an app shows, before anybody has read of it: once for every view, and whenever it is opened.
        self.on_open: list[Callable[[App, Content], None]] = []
        self._layers = layers
        layers.on_void.append(self._renew)
        self._nursery = nursery
        self._tags: dict[str, _Tags] = {}
        self._checked: dict[tuple[str, str], float] = {}
        self._views: dict[int, View] = {}
        self._latest: dict[tuple[str, str], View] = {}
        self._contents: OrderedDict[ContentKey, Content] = OrderedDict()
        self._listing: SingleFlight[None] = SingleFlight(nursery)
        self._resolving: SingleFlight[Digest] = SingleFlight(nursery)
        self._opening: SingleFlight[Content] = SingleFlight(nursery)

    async def tags(self, app: App) -> frozenset[str]:
        """The tags that are listed, without those of housekeeping: as they were when they were last looked after.

        Raises: Unreachable (and nothing is known), AccessDenied, NotFound (no such repository).
        """
        known = self._tags.get(app.name)
        if known is None:
            await self._listing.run(app.name, lambda: self._list(app))
            known = self._tags[app.name]
        else:
            self.look_after(app)
        return known.listed

    def look_after(self, app: App) -> int | None:
        """Renews the list of tags behind the scenes if it is older than `refresh_seconds`.

        Returns when it last changed, in nanoseconds of the epoch; None if it was never asked for.
        """
        known = self._tags.get(app.name)
        if known is None:
            return None
        now = trio.current_time()
        if now - known.looked_at >= app.refresh_seconds:
            known.looked_at = now
            what = f"the tags of {app.name} are those of before"
            self._nursery.start_soon(in_background, what, lambda: self._list_again(app))
        return known.changed_ns

    async def _list_again(self, app: App) -> None:
        await self._listing.run(app.name, lambda: self._list(app))

    async def _list(self, app: App) -> None:
        with _deadline(app):
            tags = await app.source.tags()
        listed = frozenset(
            tag for tag in tags if is_tag(tag) and not is_housekeeping(tag) and app.listed(tag)
        )
        known = self._tags.get(app.name)
        changed_ns = known.changed_ns if known is not None and known.listed == listed else time.time_ns()
        self._tags[app.name] = _Tags(listed, trio.current_time(), changed_ns)

    async def view(self, app: App, name: str) -> View:
        """What a name in an app's folder stands for: a tag, a tag and a digest, or a digest.

        A name that is known, or listed, is answered at once, and looked after in the background when it is
        older than `refresh_seconds`; any other name is asked for.

        Raises: NotFound, Unreachable, AccessDenied.
        """
        tag, digest = _parse(name)
        view = self._known(app, name)
        if view is not None and view.record.digest is not None:
            if digest is None:
                self._refresh_later(app, name)
            return view
        # Of a view that nobody has entered yet, the list alone says that it exists.
        listed = digest is None and self.look_after(app) is not None and tag in self._tags[app.name].listed
        if view is not None and listed:
            return view
        if not listed:
            digest = await self._resolve(app, name, str(digest) if digest else tag)
        return self._new_view(app, name, digest)

    def view_numbered(self, number: int) -> View | None:
        """The view of that number, also one of an earlier process; None if its app is gone or has changed."""
        view = self._views.get(number)
        if view is None:
            record = self._layers.numbers.view(number)
            app = self.apps.get(record.app) if record is not None else None
            if record is not None and app is not None and record.origin == app.origin:
                view = self._views[number] = View(app, record)
        return view

    async def content(self, view: View) -> Content:
        """What a view shows, finding out which manifest that is if nobody has yet.

        Raises: NotFound (the tag, the platform, or the folder that the app shows is not there), Unsupported,
        Invalid, Corrupt, Unreachable and its kinds, AccessDenied.
        """
        if view.void is not None:
            raise view.void.with_traceback(None)
        if view.content is None:
            view.content = await self._opening.run(view.number, lambda: self._bind(view))
        self._use(view.content)
        return view.content

    def ready(self, view: View) -> Content | None:
        """What a view shows, if that is known."""
        if view.content is not None:
            self._use(view.content)
        return view.content

    async def open(self, app: App, version: str | None) -> Content:
        """What a tag or a digest shows now, for those who keep no views; None is the source's default. As `content`."""
        return await self._open_version(app, version, await self._resolve(app, version or "", version))

    async def open_for_mounts(
        self, app: App, version: str | None, *, patience_seconds: float = _NAMES_SECONDS
    ) -> Content:
        """As `open`, and mounts will find it without the source; if that is away, what they would show then.

        patience_seconds: what the source may take to answer, at most.
        """
        numbers, name = self._layers.numbers, version or ""
        try:
            with _deadline(app, min(patience_seconds, _NAMES_SECONDS)):
                digest = await self._resolve(app, name, version)
        except Unreachable as error:
            record = numbers.latest_view(app.name, name, app.origin)
            if record is None or record.digest is None:
                raise
            log.info("%s of %s is what it was last known to be: %s", name, app.name, error.message)
            digest = record.digest
        content = await self._open_version(app, version, digest)
        if name and app.name in self.apps:
            numbers.name_view(app.name, name, app.origin, digest)
        return content

    async def _open_version(self, app: App, version: str | None, digest: Digest) -> Content:
        content = await self._open(app, digest, is_pinned=version is not None and ":" in version)
        self._use(content)
        return content

    def _known(self, app: App, name: str) -> View | None:
        view = self._latest.get((app.name, name))
        if view is None:
            record = self._layers.numbers.latest_view(app.name, name, app.origin)
            if record is not None and record.digest is not None:
                view = self._views.get(record.number) or View(app, record)
                self._views[record.number] = self._latest[app.name, name] = view
                # What an earlier process knew may be old.
                self._checked.setdefault((app.name, name), float("-inf"))
        return view

    def _new_view(self, app: App, name: str, digest: Digest | None) -> View:
        record = self._layers.numbers.name_view(app.name, name, app.origin, digest)
        view = self._views[record.number] = self._latest[app.name, name] = View(app, record)
        return view

    def _renew(self, layer: Layer, error: Corrupt) -> None:
        """Gives new views to what shows a layer that is not what it was: the kernel keeps the names in the old ones."""
        affected = [key for key, content in self._contents.items() if layer in content.tree.layers]
        for key in affected:
            del self._contents[key]
        for view in list(self._views.values()):
            if view.content is None or layer not in view.content.tree.layers:
                continue
            view.content, view.void = None, error
            record = view.record
            if self._latest.get((record.app, record.name)) is view:
                record = self._layers.numbers.new_view(record.app, record.name, record.origin, record.digest)
                self._views[record.number] = self._latest[record.app, record.name] = View(view.app, record)

    async def _resolve(self, app: App, name: str, version: str | None, known: Digest | None = None) -> Digest:
        async def resolve() -> Digest:
            with _deadline(app):
                return (await app.source.resolve(version, known=known)).digest

        digest = await self._resolving.run((app.name, name), resolve)
        self._checked[app.name, name] = trio.current_time()
        return digest

    def _refresh_later(self, app: App, name: str) -> None:
        """Looks whether a tag has moved, in the background, unless that was done lately."""
        now = trio.current_time()
        if now - self._checked.get((app.name, name), now) < app.refresh_seconds:
            self._checked.setdefault((app.name, name), now)
            return
        self._checked[app.name, name] = now
        what = f"{name} of {app.name} stays what it was"
        self._nursery.start_soon(in_background, what, lambda: self._refresh(app, name))

    async def _refresh(self, app: App, name: str) -> None:
        latest = self._latest.get((app.name, name))
        known = latest.record.digest if latest is not None else None
        try:
            digest = await self._resolve(app, name, name, known)
        except NotFound:
            log.info("the tag %s of %s is gone", name, app.name)
            self._latest.pop((app.name, name), None)
            # An unbound view as the latest of its name: the next process does not believe in the old one.
            self._layers.numbers.new_view(app.name, name, app.origin, None)
            return
        view = self._latest.get((app.name, name))
        if view is not None and view.record.digest not in (None, digest):
            log.info("the tag %s of %s has moved to %s", name, app.name, digest)
            self._new_view(app, name, digest)

    async def _bind(self, view: View) -> Content:
        app, record = view.app, view.record
        digest = record.digest
        if digest is None:
            # Another process may have bound it, and what it fetched is here, whether the registry is or not.
            view.record = record = self._layers.numbers.view(record.number) or record
            digest = record.digest
            if digest is not None:
                self._checked.setdefault((app.name, record.name), float("-inf"))
        if digest is None:
            tag, pinned = _parse(record.name)
            digest = await self._resolve(app, record.name, str(pinned) if pinned else tag)
            view.record = self._layers.numbers.bind_view(record.number, digest)
            assert view.record.digest is not None
            digest = view.record.digest
        return await self._open(app, digest, is_pinned=_parse(record.name)[1] is not None)

    async def _open(self, app: App, digest: Digest, *, is_pinned: bool) -> Content:
        """is_pinned: by whoever asks, with a digest; what nobody vouches for is not good enough for them."""
        indexes = app.indexes.strictest(Indexes.BOUND) if is_pinned else app.indexes
        content = self._contents.get((digest, app.platform, app.subtree))
        if content is not None:
            image = content.image
        else:
            with _deadline(app):
                image = await open_image(app.source, digest, app.platform, self._layers.folder)
        layers = [self._layers.get(replace(spec, indexes=indexes), app.source) for spec in image.layers]
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
        for told in self.on_open:
            told(app, content)
        return content

    def _use(self, content: Content) -> None:
        """Keeps the number of open trees in bounds; a closed one opens again when it is asked."""
        self._contents[content.key] = content
        self._contents.move_to_end(content.key)
        while len(self._contents) > _OPEN_TREES:
            _, oldest = self._contents.popitem(last=False)
            oldest.tree.close()


@contextmanager
def _deadline(app: App, seconds: float = _NAMES_SECONDS) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise DeadlineExpired(f"{app.source.name} has not answered within {seconds:g} s") from None


def _parse(name: str) -> tuple[str | None, Digest | None]:
    """`tag`, `tag@digest` or `digest`. Raises: NotFound: nothing of another form exists."""
    tag, at, digest = name.rpartition("@")
    try:
        if at or name.startswith(("sha256:", "sha512:")):
            if at and not is_tag(tag):
                raise NotFound(f"{name!r} is no tag")
            return tag or None, Digest.parse(digest if at else name)
    except FsmountError:
        raise NotFound(f"{name!r} is no tag and no digest") from None
    if not is_tag(name):
        raise NotFound(f"{name!r} is no tag")
    return name, None
