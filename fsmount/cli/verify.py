"""verify: reads everything in the cache again, and drops what is not what it was."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from fsmount.cli.options import ConfigOptions, config_options
from fsmount.cli.output import printable

if TYPE_CHECKING:
    from fsmount.cache.verify import Verification

#: Of the JSON form; it changes when a field gets another meaning, or goes.
_VERSION = 1
#: Problems that are listed one by one.
_LISTED = 20


@click.command()
@click.option("--json", "as_json", is_flag=True, envvar="FSMOUNT_JSON", help="For programs.")
@config_options
def verify(options: ConfigOptions, as_json: bool) -> None:
    """Read all that is cached, and drop what the disk has spoilt: it is fetched again when it is asked for.

    Mounts may go on using the cache meanwhile. The exit code is 7 if something was not what it should be.
    """
    import trio

    from fsmount.cache.folder import CacheFolder
    from fsmount.cache.verify import verifying
    from fsmount.cli.progress import shown_bytes
    from fsmount.cli.signals import run_until_told
    from fsmount.errors import Corrupt

    config = options.load()

    async def command() -> Verification:
        with verifying(CacheFolder(config.cache.path)) as verification:
            async with shown_bytes("reading", lambda: verification.bytes, verification.expected):
                await trio.to_thread.run_sync(verification.run, trio.from_thread.check_cancelled)
            return verification

    found = run_until_told(command)
    click.echo(_as_json(found) if as_json else printable(_as_text(found)))
    bad = len(found.problems)
    if bad:
        kept = sum(not problem.is_dropped for problem in found.problems)
        dropped = "What was dropped is fetched or made again when it is asked for."
        raise Corrupt(
            f"{bad} of {sum(count.checked for count in found.counts.values())} parts of the cache were damaged",
            remedy=f"{dropped} The rest: stop every fsmount process of this cache, and remove it."
            if kept
            else dropped,
        )


def _as_json(found: Verification) -> str:
    counts = {
        kind: {"checked": count.checked, "bytes": count.bytes, "bad": count.bad, "dropped": count.dropped}
        for kind, count in found.counts.items()
    }
    problems = [
        {"kind": kind, "name": name, "problem": what, "dropped": is_dropped}
        for kind, name, what, is_dropped in found.problems
    ]
    return json.dumps({"version": _VERSION, "checked": counts, "problems": problems}, indent=2)


def _as_text(found: Verification) -> str:
    lines = [f"cache {found.folder.path}: {found.bytes} bytes read"]
    for kind, count in found.counts.items():
        bad = f", {count.bad} bad, {count.dropped} dropped" if count.bad else ", all sound"
        lines.append(f"  {kind}: {count.checked} looked at{bad if count.checked else ''}")
    for kind, name, what, _ in found.problems[:_LISTED]:
        lines.append(f"  {kind}: {name}: {what}")
    if len(found.problems) > _LISTED:
        lines.append(f"  and {len(found.problems) - _LISTED} more, which --json lists")
    return "\n".join(lines)
