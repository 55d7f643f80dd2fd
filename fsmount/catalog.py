"""Catalog: which apps there are, and what each name in an app's folder shows, now and to who holds it."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import trio

from fsmount.app import App, parse_name
from fsmount.cache.listings import Listing
from fsmount.cache.numbers import Origin, Root
from fsmount.errors import Corrupt, FsmountError, NotFound, Unreachable
from fsmount.freshness import Freshness
from fsmount.layer import Layer, Layers
from fsmount.names import Names
from fsmount.oci.digest import Digest
from fsmount.singleflight import SingleFlight
from fsmount.taglists import TagLists
from fsmount.views import VIEW_ROOT, Content, Contents, View, answering

__all__ = ["VIEW_ROOT", "App", "Catalog", "Content", "View"]

log = logging.getLogger(__name__)

#: Tags that are looked after, of all that were ever looked up: those that were so last.
_MOST_WATCHED = 500


class Catalog:
    """The apps of one configuration. Everything that asks a registry is asked once, however many wait.

    What was known stays true when a registry is away: a known tag opens from what was kept, in this process or in one
    before, and is looked after behind the scenes by whoever runs `freshness`.
    """

    def __init__(
        self, apps: Sequence[App], layers: Layers, nursery: trio.Nursery, *, names_seconds: float = 10.0
    ) -> None:
        """names_seconds: what a source may take to answer about names."""
        self.names_seconds = names_seconds
        self.freshness = Freshness()
        self.apps: Mapping[str, App] = {}
        #: Every folder above an app, and the names in it.
        self.folders: Mapping[str, frozenset[str]] = {}
        self._folder_listings: dict[str, Listing] = {}
        self._layers = layers
        self._numbers = layers.numbers
        self._names = Names(layers.numbers)
        self._contents = Contents(layers, nursery)
        #: Told of what an app shows, before anybody has read of it: once for every view, and whenever it is opened.
        self.on_open: list[Callable[[App, Content], None]] = self._contents.on_open
        self._lists = TagLists(layers.numbers.listings, nursery, self._forget)
        #: When names were asked for last, in this process.
        self._asked_at: dict[tuple[str, str], float] = {}
        #: Those that are looked after, the most recent last.
        self._watched: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._resolving: SingleFlight[Digest] = SingleFlight(nursery)
        self._opening: SingleFlight[Content] = SingleFlight(nursery)
        self._finding: SingleFlight[None] = SingleFlight(nursery)
        layers.on_void.append(self._renew)
        self._take_apps(apps)

    def _take_apps(self, apps: Sequence[App]) -> None:
        self.apps = self._names.apps = self._lists.apps = {app.name: app for app in apps}
        folders: dict[str, set[str]] = {"": set()}
        for name in self.apps:
            while name:
                parent, _, base = name.rpartition("/")
                folders.setdefault(parent, set()).add(base)
                name = parent
        self.folders = {path: frozenset(names) for path, names in folders.items()}
        for path, names in self.folders.items():
            with _keeping_apps():
                self._note_folder(path, names)
        for app in apps:
            with _keeping_apps():
                origin = Origin(app.source.name, str(app.platform), app.subtree)
                self._numbers.keep_origin(app.origin, origin)

    def _note_folder(self, path: str, names: frozenset[str]) -> None:
        """Raises: FsmountError, NoSpace; what this process knows of the folder is right then, too."""
        known = self._folder_listings.get(path)
        if known is not None and known.names == names:
            return
        new = self._folder_listings[path] = Listing(names, names, time.time_ns())
        if known is None:
            known = self._numbers.listings.load(path)
        if known is not None and known.names == names:
            self._folder_listings[path] = known
        else:
            self._numbers.listings.save(path, new)

    # Tags

    async def tags(self, app: App) -> frozenset[str]:
        """The tags that are listed, without those of housekeeping: as they were when they were last looked after.

        Raises: Unreachable (and nothing is known), AccessDenied, NotFound (no such repository).
        """
        listing = self._lists.known(app)
        if listing is None:
            listing = await self.ask_tags(app)
        return listing.shown

    def known_tags(self, app: App) -> Listing | None:
        """What the source has listed last, in this process or in one before."""
        return self._lists.known(app)

    def changed_ns(self, path: str) -> int | None:
        """When the names in a folder above the tags were others last, in nanoseconds of the epoch; None: never seen."""
        app = self.apps.get(path)
        listing = self._folder_listings.get(path) if app is None else self._lists.known(app)
        return None if listing is None else listing.changed_ns

    async def ask_tags(self, app: App) -> Listing:
        """What the source lists now. Raises: as `tags`."""
        self._lists.seconds = self.names_seconds
        listing = await self._lists.ask(app)
        if self.freshness.is_watched(app.name):
            self.freshness.note_asked(app.name)
        else:
            self._watch_tags(app, asked_at=trio.current_time())
        return listing

    # Views

    async def view(self, app: App, name: str) -> View:
        """What a name in an app's folder stands for: a tag, a tag and a digest, or a digest.

        A name that is known, or listed, is answered at once; any other name is asked for. A tag of which it is known
        what it stands for is looked after from now on.

        Raises: NotFound, Unreachable, AccessDenied.
        """
        tag, digest = parse_name(name)
        view = self._names.known(app, name)
        if view is not None and view.record.digest is not None:
            if digest is None:
                self._watch(app, name)
            return view
        # Of a view that nobody has entered yet, the list alone says that it exists.
        listing = self._lists.known(app) if digest is None else None
        is_listed = listing is not None and tag in listing.names
        if view is not None and is_listed:
            return view
        if not is_listed:
            digest = await self._resolve(app, name, str(digest) if digest else tag)
        return await self._numbers.when_possible(partial(self._names.give, app, name, digest))

    async def views(self, app: App, names: Collection[str]) -> list[View]:
        """The views of tags that are listed, in their order, for who wants to know nothing else of them."""
        return await self._numbers.when_possible(partial(self._names.give_all, app, names))

    def view_numbered(self, number: int) -> View | None:
        """The view of that number, also one of an earlier process, and of an app that is gone or has changed.

        None: there never was one, or nobody has looked into it and its app is gone.
        """
        return self._names.numbered(number)

    async def content(self, view: View) -> Content:
        """What a view shows, finding out which manifest that is if nobody has yet.

        Raises: NotFound (the tag, the platform, or the folder that the app shows is not there), Unsupported,
        Invalid, Corrupt, Unreachable and its kinds, AccessDenied.
        """
        if view.void is not None:
            raise view.void.with_traceback(None)
        if view.content is None:
            view.content = await self._opening.run(view.number, lambda: self._bind(view))
        self._contents.use(view.content)
        return view.content

    def ready(self, view: View) -> Content | None:
        """What a view shows, if that is known."""
        if view.content is not None:
            self._contents.use(view.content)
        return view.content

    def attributes(self, view: View) -> Root | None:
        """Those of a view's folder, if they are known without waiting; then they do not change any more."""
        return self._names.attributes(view)

    async def layer(self, number: int) -> Layer | None:
        """The layer of that number, also if an earlier process has given it out; None if nobody knows it any more.

        Raises: Corrupt (what had that number was condemned), as `content`.
        """
        layer = self._layers.numbered(number)
        if layer is None:
            await self._finding.run(number, lambda: self._find_layer(number))
            layer = self._layers.numbered(number)
        return layer

    async def _find_layer(self, number: int) -> None:
        """Opens one of the views that show the layer."""
        failure: FsmountError | None = None
        for view in self._names.showing(number):
            try:
                await self.content(view)
            except FsmountError as error:
                failure = failure or error
            if self._layers.numbered(number) is not None:
                return
        if failure is not None:
            raise failure

    async def open(self, app: App, version: str | None) -> Content:
        """What a tag or a digest shows now, for those who keep no views; None is the source's default. As `content`."""
        return await self._open_version(app, version, await self._resolve(app, version or "", version))

    async def open_for_mounts(
        self, app: App, version: str | None, *, patience_seconds: float | None = None
    ) -> Content:
        """As `open`, and mounts will find it without the source; if that is away, what they would show then.

        patience_seconds: what the source may take to answer, if that is less than it may take anyway.
        """
        name, seconds = version or "", self.names_seconds
        if patience_seconds is not None:
            seconds = min(patience_seconds, seconds)
        try:
            with answering(app.source.name, seconds):
                digest = await self._resolve(app, name, version)
        except Unreachable as error:
            record = self._numbers.latest_view(app.name, name, app.origin)
            if record is None or record.digest is None:
                raise
            log.info("%s of %s is what it was last known to be: %s", name, app.name, error.message)
            digest = record.digest
        content = await self._open_version(app, version, digest)
        if name and app.name in self.apps:
            name_view = partial(self._numbers.name_view, app.name, name, app.origin, digest)
            await self._numbers.when_possible(name_view)
        return content

    async def _open_version(self, app: App, version: str | None, digest: Digest) -> Content:
        is_pinned = version is not None and ":" in version
        content = await self._contents.open(app, digest, is_pinned=is_pinned, seconds=self.names_seconds)
        self._contents.use(content)
        return content

    async def _resolve(self, app: App, name: str, version: str | None, known: Digest | None = None) -> Digest:
        async def resolve() -> Digest:
            with answering(app.source.name, self.names_seconds):
                return (await app.source.resolve(version, known=known)).digest

        digest = await self._resolving.run((app.name, app.origin, name), resolve)
        self._asked_at[app.name, name] = trio.current_time()
        self.freshness.note_asked((app.name, name))
        return digest

    async def _bind(self, view: View) -> Content:
        app, name = view.app, view.record.name
        tag, pinned = parse_name(name)
        # Another process may have bound it, and what it fetched is here, whether the registry is or not.
        digest = self._names.look_up(view)
        if digest is None:
            digest = await self._resolve(app, name, str(pinned) if pinned else tag)
            digest = await self._numbers.when_possible(partial(self._names.bind, view, digest))
        is_pinned = pinned is not None
        while True:
            content = await self._contents.open(app, digest, is_pinned=is_pinned, seconds=self.names_seconds)
            if view.app is app:
                break
            # Another app has taken its place, and what is opened is opened from there.
            self._contents.use(content)
            app = view.app
        self._names.note_shown(view, content)
        if not is_pinned and self._names.known(app, name) is view:
            self._watch(app, name)
        return content

    def _renew(self, layer: Layer, error: Corrupt) -> None:
        self._contents.forget(layer)
        self._names.renew(layer, error)

    # Looking after what is known

    async def look_again(self, app: App, name: str) -> tuple[Digest | None, Digest | None]:
        """Finds out what a tag stands for now; what it stood for, as far as that was known, and what it does.

        None: there is no such tag. Raises: Unreachable and its kinds, AccessDenied.
        """
        view = self._names.known(app, name)
        before = view.record.digest if view is not None else None
        try:
            digest = await self._resolve(app, name, name, before)
        except NotFound:
            if before is not None:
                await self._forget(app, frozenset([name]))
            return before, None
        view = self._names.known(app, name)
        if view is not None and view.record.digest not in (None, digest):
            log.info("the tag %s of %s has moved to %s", name, app.name, digest)
            await self._numbers.when_possible(partial(self._names.give, app, name, digest))
        return before, digest

    def bound_names(self, app: App) -> list[str]:
        """The tags of an app of which it is known what they stand for, in this process or in one before."""
        return [name for name in self._names.bound(app) if parse_name(name)[1] is None]

    async def _forget(self, app: App, tags: frozenset[str]) -> None:
        """They are gone."""
        for tag in tags:
            log.info("the tag %s of %s is gone", tag, app.name)
            self._unwatch((app.name, tag))
            await self._numbers.when_possible(partial(self._names.forget, app, tag))

    def watch_lists(self) -> None:
        """Has the lists of tags looked after that are known, also those that an earlier process has left."""
        for app in self.apps.values():
            try:
                is_known = self._lists.known(app) is not None
            except FsmountError as error:
                log.warning("the tags of %s are not looked after yet: %s", app.name, error.message)
                continue
            if is_known and not self.freshness.is_watched(app.name):
                self._watch_tags(app, asked_at=None)

    def _watch_tags(self, app: App, *, asked_at: float | None) -> None:
        app = self._names.app_now(app)
        if self.apps.get(app.name) is app:
            ask, source = partial(self.ask_tags, app), app.source.name
            self.freshness.watch(app.name, ask, source=source, seconds=app.refresh_seconds, asked_at=asked_at)

    def _watch(self, app: App, name: str) -> None:
        """Has a name looked after that somebody uses."""
        app, key = self._names.app_now(app), (app.name, name)
        if key in self._watched:
            self._watched.move_to_end(key)
        elif self.apps.get(app.name) is app:
            self._watched[key] = None
            ask, source, asked_at = (
                partial(self.look_again, app, name),
                app.source.name,
                self._asked_at.get(key),
            )
            self.freshness.watch(key, ask, source=source, seconds=app.refresh_seconds, asked_at=asked_at)
            if len(self._watched) > _MOST_WATCHED:
                self._unwatch(next(iter(self._watched)))

    def _unwatch(self, key: tuple[str, str]) -> None:
        self._watched.pop(key, None)
        self.freshness.forget(key)

    # Another configuration

    def replace_apps(self, apps: Sequence[App]) -> None:
        """Shows these apps from now on; who is below one that is gone, or comes from elsewhere, stays there.

        An app that is the same object is not touched.
        """
        old = self.apps
        self._take_apps(apps)
        for app in apps:
            if app is not old.get(app.name):
                self._lists.filter_again(app)
        for app in old.values():
            new = self.apps.get(app.name)
            if new is app:
                continue
            self.freshness.forget(app.name)
            used = [name for owner, name in self._watched if owner == app.name]
            for name in used:
                self._unwatch((app.name, name))
            if new is None or new.origin != app.origin:
                self._names.drop(app)
                self._asked_at = {key: at for key, at in self._asked_at.items() if key[0] != app.name}
            else:
                self._pass_on(app, new)
                for name in used:
                    self._watch(new, name)
        self.watch_lists()

    def _pass_on(self, old: App, new: App) -> None:
        """What one has shown so far, the other does from now on."""
        for content in self._names.pass_on(old, new):
            for layer in content.tree.layers:
                layer.source = new.source
            for told in self.on_open:
                told(new, content)


@contextmanager
def _keeping_apps() -> Iterator[None]:
    try:
        yield
    except FsmountError as error:
        log.warning("which apps there are is not kept for the next process: %s", error.message)
