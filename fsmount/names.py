"""Names: which view each name in an app's folder has, in this process and in those before; nobody is asked here."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from fsmount.app import App
from fsmount.cache.numbers import Numbers, Root, ViewRecord
from fsmount.errors import Corrupt, FsmountError
from fsmount.layer import Layer
from fsmount.oci.digest import Digest
from fsmount.oci.platform import Platform
from fsmount.registry.gone import Gone
from fsmount.views import Content, View

log = logging.getLogger(__name__)


class Names:
    """The views of a process, over what is kept of them on disk.

    What can only be of use to the next process is not worth an error to this one: it is logged that it is not kept.
    """

    def __init__(self, numbers: Numbers) -> None:
        #: The apps that there are now.
        self.apps: Mapping[str, App] = {}
        self._numbers = numbers
        self._views: dict[int, View] = {}
        self._latest: dict[tuple[str, str], View] = {}
        #: What is to have another view, which could not be kept.
        self._to_rename: dict[int, ViewRecord] = {}

    def known(self, app: App, name: str) -> View | None:
        """The view of a name, if it is known what the name stands for, or somebody has given it one here."""
        if self._to_rename:
            self._rename_all()
        view = self._latest.get((app.name, name))
        if view is not None and view.record.origin == app.origin:
            view.app = self.app_now(app)
            return view
        record = self._numbers.latest_view(app.name, name, app.origin)
        if record is None or record.digest is None:
            return None
        return self._name(app, record)

    def give(self, app: App, name: str, digest: Digest | None) -> View:
        """The view of a name that stands for something now; None: that is not known yet."""
        return self._name(app, self._numbers.name_view(app.name, name, app.origin, digest))

    def give_all(self, app: App, names: Collection[str]) -> list[View]:
        """The views of names that are there, whether it is known what they stand for or not; all in one go."""
        known = {name: self.known(app, name) for name in names}
        missing = [name for name, view in known.items() if view is None]
        if missing:
            for record in self._numbers.name_views(app.name, missing, app.origin):
                known[record.name] = self._name(app, record)
        return [view for view in known.values() if view is not None]

    def _name(self, app: App, record: ViewRecord) -> View:
        # Another app may have taken the place of that of whoever has waited for this.
        app = self.app_now(app)
        view = self._views.get(record.number) or View(app, record)
        view.app, view.record = app, record
        self._views[record.number] = self._latest[app.name, record.name] = view
        return view

    def app_now(self, app: App) -> App:
        """What the configuration has now of the app, if that comes from the same place."""
        now = self.apps.get(app.name)
        return now if now is not None and now.origin == app.origin else app

    def forget(self, app: App, name: str) -> None:
        """The name stands for nothing any more; the next process does not believe in its view either."""
        self._latest.pop((app.name, name), None)
        latest = self._numbers.latest_view(app.name, name, app.origin)
        if latest is not None and latest.digest is not None:
            self._numbers.new_view(app.name, name, app.origin, None)

    def bound(self, app: App) -> list[str]:
        """The names of an app of which it is known what they stand for."""
        return [record.name for record in self._numbers.bound_views(app.name, app.origin)]

    def bind(self, view: View, digest: Digest) -> Digest:
        """Says what a view shows; returns what it does: another process may have been quicker."""
        view.record = self._numbers.bind_view(view.number, digest)
        assert view.record.digest is not None
        return view.record.digest

    def look_up(self, view: View) -> Digest | None:
        """What a view shows, if anybody has said so."""
        if view.record.digest is None:
            view.record = self._numbers.view(view.number) or view.record
        return view.record.digest

    def note_shown(self, view: View, content: Content) -> None:
        """Takes note which layers a view shows, so that it is found by their numbers."""
        with _keeping(view.record):
            self._numbers.note_shown(view.number, [layer.number for layer in content.tree.layers])

    def attributes(self, view: View) -> Root | None:
        """Those of a view's folder, if they are known without waiting; then they do not change any more."""
        if view.record.root is None and view.content is not None:
            root = view.content.attributes
            if root is not None:
                view.record = replace(view.record, root=root)
                with _keeping(view.record):
                    self._numbers.keep_root(view.record, root)
        return view.record.root

    # What the kernel asks about

    def numbered(self, number: int) -> View | None:
        """The view of that number, also one of an earlier process, and of an app that is gone or has changed.

        None: there never was one, or nobody has looked into it and its app is gone.
        """
        view = self._views.get(number)
        if view is None:
            record = self._numbers.view(number)
            view = self._of(record) if record is not None else None
        return view

    def _of(self, record: ViewRecord) -> View | None:
        view = self._views.get(record.number)
        if view is None:
            app = self._app_of(record)
            if app is not None:
                view = self._views[record.number] = View(app, record)
        return view

    def _app_of(self, record: ViewRecord) -> App | None:
        app = self.apps.get(record.app)
        if app is not None and app.origin == record.origin:
            return app
        origin = self._numbers.origin(record.origin) if record.digest is not None else None
        if origin is None:
            return None
        platform = Platform.parse(origin.platform)
        return App(record.app, Gone(origin.source), origin.subtree, platform, lambda tag: True, 0.0)

    def showing(self, layer: int) -> list[View]:
        """The views that show the layer of that number: the latest first, and those last whose app is gone."""
        views = filter(None, map(self._of, self._numbers.views_of(layer)))
        return sorted(views, key=lambda view: isinstance(view.app.source, Gone))

    # Changes

    def renew(self, layer: Layer, error: Corrupt) -> None:
        """Gives new views to what shows a layer that is not what it was: the kernel keeps the names in the old ones."""
        for view in self._views.values():
            if view.content is not None and layer in view.content.tree.layers:
                view.content, view.void = None, error
                view.record = replace(view.record, root=None)
                self._to_rename[view.number] = view.record
        try:
            # Those of earlier processes too.
            for record in self._numbers.views_of(self._numbers.layer(layer.spec.key)):
                self._to_rename[record.number] = record
        except FsmountError as failure:
            log.warning("which names show a layer that is another now is not known: %s", failure.message)
        self._rename_all()

    def _rename_all(self) -> None:
        """The rest when somebody asks for a name the next time."""
        for record in list(self._to_rename.values()):
            try:
                self._rename(record)
            except FsmountError as failure:
                log.warning("%s of %s cannot be shown anew yet: %s", record.name, record.app, failure.message)
                return
            del self._to_rename[record.number]

    def _rename(self, record: ViewRecord) -> None:
        """Another view for a name, of the same content, if this is the latest that it has."""
        latest = self._numbers.latest_view(record.app, record.name, record.origin)
        if latest is None or latest.number != record.number:
            return
        new = self._numbers.new_view(record.app, record.name, record.origin, record.digest)
        old = self._latest.get((record.app, record.name))
        if old is not None and old.number == record.number:
            self._views[new.number] = self._latest[new.app, new.name] = View(old.app, new)

    def drop(self, app: App) -> None:
        """No name of the app is known any more; its views stay."""
        for key in [key for key in self._latest if key[0] == app.name]:
            del self._latest[key]

    def pass_on(self, old: App, new: App) -> list[Content]:
        """The views of one app are another's from now on, that comes from the same place; returns what they show."""
        shown: dict[int, Content] = {}
        for view in self._views.values():
            if view.app is old:
                view.app = new
                if view.content is not None:
                    shown[id(view.content)] = view.content
        return list(shown.values())


@contextmanager
def _keeping(record: ViewRecord) -> Iterator[None]:
    try:
        yield
    except FsmountError as error:
        log.warning(
            "what %s of %s is like is not kept for the next process: %s",
            record.name,
            record.app,
            error.message,
        )
