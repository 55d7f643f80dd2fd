"""examination: all checks side by side, each with a deadline, so that it ends soon, whatever hangs."""

from collections.abc import Sequence
from pathlib import Path

import trio

from fsmount.config import Config
from fsmount.doctor import disk, machine, mounting, sources
from fsmount.doctor.finding import Check, Finding, in_thread
from fsmount.engine import sources_of
from fsmount.errors import FsmountError, UsageError

_SECONDS = 5.0
_SILENT = (
    "What it asks is silent: is a server, a disk or a name server away, or does a firewall drop what is sent?"
)


async def examine(config: Config | UsageError, mountpoint: Path | None) -> list[Finding]:
    """Everything that a mount by this configuration depends on, in a fixed order.

    config: or what is wrong with it; then the rest is looked at as far as it goes. mountpoint: None for that of
    the configuration. It is over within about ten seconds.
    """
    checks = machine.checks()
    if mountpoint is None and isinstance(config, Config):
        mountpoint = config.mountpoint
    if mountpoint is not None:
        place = mountpoint
        checks.append(Check("mount", None, lambda: mounting.check(place)))
    if isinstance(config, UsageError):
        remedy = config.remedy or "Mend it; `fsmount config check` says whether it is good."
        wrong = Finding.problem("configuration", config.message, remedy=remedy)
        return [wrong, *await _run(checks)]
    cache = config.cache
    checks.append(in_thread("cache", lambda: disk.check(cache)))
    found = [_configured(config)]
    try:
        async with sources_of(config) as opened:
            return [*found, *await _run([*checks, *await sources.checks(config, opened)])]
    except UsageError as error:
        # A proxy that is none: nothing can be asked.
        return [*found, Finding.problem("proxy", error.message, remedy=error.remedy), *await _run(checks)]


def _configured(config: Config) -> Finding:
    if not config.apps:
        return Finding.warning(
            "configuration",
            "it has no apps: the mount is empty",
            remedy="Add [apps.NAME] with its repository.",
        )
    return Finding.ok("configuration", f"it is good, and has {len(config.apps)} apps")


async def _run(checks: Sequence[Check]) -> list[Finding]:
    found: list[Sequence[Finding]] = [[] for _ in checks]

    async def run(place: int, check: Check) -> None:
        found[place] = await _find(check)

    async with trio.open_nursery() as nursery:
        for place, check in enumerate(checks):
            nursery.start_soon(run, place, check)
    return [finding for findings in found for finding in findings]


async def _find(check: Check) -> Sequence[Finding]:
    try:
        with trio.fail_after(_SECONDS):
            return await check.run()
    except trio.TooSlowError:
        which = f" of {check.subject}" if check.subject else ""
        message = f"the check{which} did not end within {_SECONDS:g} s"
        return [Finding.problem(check.name, message, remedy=_SILENT, subject=check.subject)]
    except FsmountError as error:
        return [Finding.problem(check.name, error.message, remedy=error.remedy, subject=check.subject)]
    except OSError as error:
        return [Finding.problem(check.name, f"it cannot be found out: {error}", subject=check.subject)]
