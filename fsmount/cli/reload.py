"""reload: has a running mount take over the configuration as it is now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from fsmount.cli.asking import ask
from fsmount.cli.options import MOUNT_POINT, ConfigOptions, config_options
from fsmount.cli.output import printable


@click.command()
@click.argument("mountpoint", type=MOUNT_POINT, required=False)
@config_options
def reload(options: ConfigOptions, mountpoint: Path | None) -> None:
    """Have the mount at MOUNTPOINT read its configuration again: the file that it was started with.

    Apps that have not changed go on untouched; who is below one that is gone stays there. If anything is wrong with the
    file, nothing changes.
    """
    mountpoint = (mountpoint or options.load().mountpoint).absolute()
    for line in _lines(json.loads(ask(mountpoint, "/reload", b"{}"))):
        click.echo(printable(line))


def _lines(report: dict[str, Any]) -> Iterator[str]:
    words = {
        "added": "added:",
        "removed": "removed:",
        "changed": "changed:",
        "settings": "in force:",
        "needs_restart": "only after a restart:",
    }
    said = [f"{words[key]} {', '.join(report[key])}" for key in words if report[key]]
    yield from said or ["nothing has changed"]
