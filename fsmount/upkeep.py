"""Upkeep: what a mount does unasked, so that what it shows is right and new; and at once, when it is told to."""

import logging
from dataclasses import dataclass, field

import trio

from fsmount.app import App
from fsmount.catalog import Catalog
from fsmount.errors import FsmountError, NotFound
from fsmount.layer import Layers
from fsmount.oci.digest import Digest

log = logging.getLogger(__name__)

#: Questions at once, when somebody waits for the answers to all.
_AT_ONCE = 16
#: Until it is tried again to verify what an earlier process has shown.
_PAUSE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Move:
    """A tag that stands for something else now than before."""

    app: str
    tag: str
    before: Digest
    digest: Digest


@dataclass(frozen=True, slots=True)
class Failure:
    """What could not be found out, and why."""

    app: str
    tag: str | None
    error: FsmountError


@dataclass(slots=True)
class RefreshReport:
    """What has become of the tags since they were looked after last.

    `appeared` and `gone` are tags by the name of their app; `asked` is how many tags were looked after one by one.
    """

    moved: list[Move] = field(default_factory=list)
    appeared: list[tuple[str, str]] = field(default_factory=list)
    gone: list[tuple[str, str]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    asked: int = 0

    @property
    def is_change(self) -> bool:
        return bool(self.moved or self.appeared or self.gone)


class Upkeep:
    """Keeps a catalog fresh, and finishes what earlier processes of the mount have begun."""

    def __init__(self, catalog: Catalog, layers: Layers) -> None:
        self._catalog = catalog
        self._layers = layers

    async def run(self) -> None:
        """For ever."""
        self._catalog.watch_lists()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._catalog.freshness.run)
            for number in self._layers.shown.left_unverified if self._layers.shown is not None else ():
                nursery.start_soon(self._verify, number)

    async def _verify(self, number: int) -> None:
        """Streams on what an earlier process was streaming: its readers may have bytes that nobody has verified."""
        while True:
            try:
                layer = await self._catalog.layer(number)
                if layer is not None and not layer.complete:
                    await layer.wait_complete()
                return
            except FsmountError as error:
                if not error.transient:
                    log.warning(
                        "what was shown of layer number %d cannot be verified: %s", number, error.message
                    )
                    return
                log.info("what was shown of layer number %d is not verified yet: %s", number, error.message)
            except Exception:
                log.exception("verifying layer number %d failed in a way nobody foresaw", number)
                return
            await trio.sleep(_PAUSE_SECONDS)

    async def refresh(self, app: str | None = None, tag: str | None = None) -> RefreshReport:
        """Looks at once what the tags of all apps, of one, or one tag, stand for now.

        An app's list is asked for, and every tag that anybody has looked into.

        Raises: NotFound (there is no such app, or tag).
        """
        apps = list(self._catalog.apps.values())
        if app is not None:
            apps = [one for one in apps if one.name == app]
            if not apps:
                known = ", ".join(sorted(self._catalog.apps)) or "none"
                raise NotFound(f"there is no app {app!r}", remedy=f"The configured apps: {known}.")
        report = RefreshReport()
        limiter = trio.CapacityLimiter(_AT_ONCE)
        async with trio.open_nursery() as nursery:
            for one in apps:
                if tag is None:
                    nursery.start_soon(self._refresh_app, one, report, limiter)
                else:
                    nursery.start_soon(self._refresh_tag, one, tag, report, limiter)
        report.moved.sort(key=lambda move: (move.app, move.tag))
        report.appeared.sort()
        report.gone.sort()
        return report

    async def _refresh_app(self, app: App, report: RefreshReport, limiter: trio.CapacityLimiter) -> None:
        known = self._catalog.known_tags(app)
        bound = self._catalog.bound_names(app)
        try:
            async with limiter:
                listing = await self._catalog.ask_tags(app)
        except FsmountError as error:
            report.failures.append(Failure(app.name, None, error))
            if error.transient:
                return
        else:
            before = known.shown if known is not None else listing.shown
            report.appeared += [(app.name, tag) for tag in listing.shown - before]
            report.gone += [(app.name, tag) for tag in before - listing.shown]
            if known is not None:
                bound = [tag for tag in bound if tag not in known.names - listing.names]
        async with trio.open_nursery() as nursery:
            for tag in bound:
                nursery.start_soon(self._refresh_tag, app, tag, report, limiter)

    async def _refresh_tag(
        self, app: App, tag: str, report: RefreshReport, limiter: trio.CapacityLimiter
    ) -> None:
        try:
            async with limiter:
                before, digest = await self._catalog.look_again(app, tag)
        except FsmountError as error:
            report.failures.append(Failure(app.name, tag, error))
            return
        report.asked += 1
        if digest is None:
            report.gone.append((app.name, tag))
        elif before is not None and before != digest:
            report.moved.append(Move(app.name, tag, before, digest))
