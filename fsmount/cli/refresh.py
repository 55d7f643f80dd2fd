"""refresh: has a running mount look at once which tags there are, and what they stand for."""

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
@click.argument("what", metavar="[APP[:TAG]]", default="")
@click.option("--mountpoint", type=MOUNT_POINT, help="The mount.  [default: mountpoint of the configuration]")
@config_options
def refresh(options: ConfigOptions, what: str, mountpoint: Path | None) -> None:
    """Have the mount look at once whether tags have come, gone or moved: those of all apps, of APP, or one TAG.

    When this returns, who looks by path sees what is new. Who is in a tag that moved stays where they are.
    """
    mountpoint = (mountpoint or options.load().mountpoint).absolute()
    report = json.loads(ask(mountpoint, "/refresh", json.dumps({"what": what}).encode()))
    for line in _changes(report):
        click.echo(printable(line))
    for failure in report["failures"]:
        of = failure["app"] if failure["tag"] is None else f"{failure['app']}:{failure['tag']}"
        click.echo(printable(f"{of} is as it was: {failure['message']}"), err=True)
    if report["failures"]:
        raise click.exceptions.Exit(report["failures"][0]["exit_code"])


def _changes(report: dict[str, Any]) -> Iterator[str]:
    for one in report["moved"]:
        yield f"{one['app']}:{one['tag']} has moved from {_short(one['before'])} to {_short(one['digest'])}"
    for one in report["appeared"]:
        yield f"{one['app']}:{one['tag']} is new"
    for one in report["gone"]:
        yield f"{one['app']}:{one['tag']} is gone"
    if not (report["moved"] or report["appeared"] or report["gone"]):
        yield f"nothing has changed; {report['asked']} tags were looked after one by one"


def _short(digest: str) -> str:
    return digest[:19]
