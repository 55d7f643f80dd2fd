"""TagLists: which tags an app has, as its source has last said, in this process or in one before."""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping

import trio

from fsmount.app import App
from fsmount.cache.listings import Listing, Listings
from fsmount.errors import FsmountError
from fsmount.oci.reference import is_tag
from fsmount.registry.source import is_housekeeping
from fsmount.singleflight import SingleFlight
from fsmount.views import answering

log = logging.getLogger(__name__)


class TagLists:
    """The list of each app: asked for once for all who wait, and kept on disk.

    `names` of a listing are all tags but those of housekeeping; `shown` are those that the app lists.
    """

    def __init__(
        self,
        listings: Listings,
        nursery: trio.Nursery,
        on_gone: Callable[[App, frozenset[str]], Awaitable[None]],
    ) -> None:
        """on_gone: told of tags that were listed before, and are no more."""
        #: The apps that there are now.
        self.apps: Mapping[str, App] = {}
        #: For a source to answer.
        self.seconds = 10.0
        self._listings = listings
        self._on_gone = on_gone
        #: By name and origin of the app.
        self._known: dict[tuple[str, str], Listing] = {}
        self._asking: SingleFlight[Listing] = SingleFlight(nursery)

    def known(self, app: App) -> Listing | None:
        """What was last listed, as far as anybody knows here; None if nothing ever was."""
        key = app.name, app.origin
        listing = self._known.get(key)
        if listing is None:
            listing = self._listings.load(*key)
            if listing is not None:
                # The tags that are to be listed may be others by now.
                listing = self._keep(app, listing.names)
        return listing

    def filter_again(self, app: App) -> None:
        """Shows those of the known tags that the app lists from now on."""
        listing = self._known.get((app.name, app.origin))
        if listing is not None:
            self._keep(app, listing.names)

    async def ask(self, app: App) -> Listing:
        """What the source lists now. Raises: Unreachable and its kinds, AccessDenied, NotFound (no such repository)."""
        return await self._asking.run((app.name, app.origin), lambda: self._ask(app))

    async def _ask(self, app: App) -> Listing:
        with answering(app.source.name, self.seconds):
            tags = await app.source.tags()
        names = frozenset(tag for tag in tags if is_tag(tag) and not is_housekeeping(tag))
        known = self.known(app)
        if known is not None and known.names - names:
            await self._on_gone(app, known.names - names)
        return self._keep(app, names)

    def _keep(self, app: App, names: frozenset[str]) -> Listing:
        key = app.name, app.origin
        now = self.apps.get(app.name)
        # Another may have taken its place while the source was asked.
        listed = now.listed if now is not None and now.origin == app.origin else app.listed
        shown = frozenset(filter(listed, names))
        known = self._known.get(key) or self._listings.load(*key)
        changed_ns = known.changed_ns if known is not None and known.shown == shown else time.time_ns()
        listing = self._known[key] = Listing(names, shown, changed_ns)
        if listing != known:
            try:
                self._listings.save(app.name, listing, app.origin)
            except FsmountError as error:
                log.warning("the tags of %s are not kept for the next process: %s", app.name, error.message)
        return listing
