"""doctor: what is wrong, or will be, with a mount and all that it depends on, and what to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fsmount.cli.options import MOUNT_POINT, ConfigOptions, config_options
from fsmount.cli.output import printable

if TYPE_CHECKING:
    from fsmount.config import Config
    from fsmount.doctor import Finding

_COLORS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command()
@click.argument("mountpoint", type=MOUNT_POINT, required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    help="For people or programs.  [default: table]",
)
@click.option("--json", "as_json", is_flag=True, envvar="FSMOUNT_JSON", help="The same as --format json.")
@config_options
def doctor(options: ConfigOptions, mountpoint: Path | None, form: str | None, as_json: bool) -> None:
    """Look at the kernel, rights, disk, clock, configuration, registries and credentials, and at MOUNTPOINT.

    Run it as the user of the mount. The mount itself is not touched. The exit code is 1 if there is a problem;
    warnings are none.
    """
    import trio

    from fsmount.doctor import Verdict, examine
    from fsmount.errors import UsageError

    config: Config | UsageError
    try:
        config = options.load()
    except UsageError as error:
        config = error
    place = mountpoint.absolute() if mountpoint is not None else None
    found = trio.run(examine, config, place)
    click.echo(_as_json(found) if form == "json" or (form is None and as_json) else _table(found))
    if any(finding.verdict is Verdict.PROBLEM for finding in found):
        raise click.exceptions.Exit(1)


def _as_json(found: Sequence[Finding]) -> str:
    findings = [
        {
            "check": finding.check,
            "subject": finding.subject,
            "verdict": finding.verdict,
            "message": finding.message,
            "remedy": finding.remedy,
        }
        for finding in found
    ]
    return json.dumps({"version": 1, "findings": findings}, indent=2)


def _table(found: Sequence[Finding]) -> str:
    lines = []
    for finding in found:
        verdict = click.style(f"{finding.verdict:<8}", fg=_COLORS[finding.verdict])
        message = printable(finding.message).replace("\n", f"\n{'':24}")
        lines.append(f"{verdict}{finding.check:<14}  {message}")
        if finding.remedy:
            lines.append(f"{'':24}→ {printable(finding.remedy)}".replace("\n", f"\n{'':26}"))
    return "\n".join(lines)
