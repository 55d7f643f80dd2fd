"""actions: what a running mount does when it is told to: look for tags that moved, take over another configuration."""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict

import trio

from fsmount.change import ReloadReport
from fsmount.config import Config
from fsmount.engine import Engine, split_version
from fsmount.errors import UsageError
from fsmount.fuse.operations import SOON
from fsmount.upkeep import RefreshReport

log = logging.getLogger(__name__)

#: For so long the kernel may answer for a name by itself.
_KERNEL_SECONDS = SOON + 0.05


class Actions:
    """For the control socket: each takes JSON and returns JSON, when whoever looks by path sees what has changed."""

    def __init__(self, engine: Engine, load: Callable[[], Config]) -> None:
        """load: reads the configuration as it is now. Raises: UsageError with all that is wrong."""
        self._engine = engine
        self._load = load

    async def refresh(self, body: bytes) -> bytes:
        """Of `{"what": "APP[:TAG]"}`, or of everything if that is empty. Raises: NotFound, UsageError."""
        app, tag = None, None
        what = _field(body, "what")
        if what:
            app, tag = (what, None) if what in self._engine.catalog.apps else split_version(what)
        report = await self._engine.upkeep.refresh(app, tag)
        if report.is_change:
            await trio.sleep(_KERNEL_SECONDS)
        return _encode(_refreshed(report))

    async def reload(self, body: bytes = b"") -> bytes:
        """Takes the configuration over as it is now; what came of it is in the log, too.

        Raises: UsageError; then nothing has changed.
        """
        try:
            report = await self._engine.reload(self._load())
        except UsageError as error:
            log.error("the configuration is not good, and stays what it was: %s", error)
            raise
        log.info("the configuration is read again: %s", "; ".join(_parts(report)) or "nothing has changed")
        if report.added or report.removed or report.changed:
            await trio.sleep(_KERNEL_SECONDS)
        return _encode(asdict(report))


def _field(body: bytes, name: str) -> str:
    """A text of the body; empty if it is not there. Raises: UsageError."""
    try:
        value = json.loads(body or b"{}").get(name) or ""
    except (ValueError, AttributeError):
        value = None
    if not isinstance(value, str):
        raise UsageError(f'the body is no JSON object with a text for "{name}"')
    return value


def _encode(fields: object) -> bytes:
    return json.dumps(fields).encode("ascii") + b"\n"


def _refreshed(report: RefreshReport) -> dict[str, object]:
    def tags(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
        return [{"app": app, "tag": tag} for app, tag in pairs]

    return {
        "moved": [
            {"app": one.app, "tag": one.tag, "before": str(one.before), "digest": str(one.digest)}
            for one in report.moved
        ],
        "appeared": tags(report.appeared),
        "gone": tags(report.gone),
        "failures": [
            {
                "app": one.app,
                "tag": one.tag,
                "message": one.error.message,
                "exit_code": one.error.exit_code,
            }
            for one in report.failures
        ],
        "asked": report.asked,
    }


def _parts(report: ReloadReport) -> Iterable[str]:
    if report.added:
        yield f"added {', '.join(report.added)}"
    if report.removed:
        yield f"removed {', '.join(report.removed)}"
    if report.changed:
        yield f"changed {', '.join(report.changed)}"
    if report.settings:
        yield f"set {', '.join(report.settings)}"
    if report.needs_restart:
        yield f"needs a restart: {', '.join(report.needs_restart)}"
