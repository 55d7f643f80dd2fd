"""status: how a running mount is: its cache, apps and layers, as it says itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fsmount.cli.options import ConfigOptions, config_options
from fsmount.cli.output import printable


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, envvar="FSMOUNT_JSON", help="For programs.")
@click.option("--metrics", is_flag=True, help="For Prometheus: its text format.")
@config_options
def status(options: ConfigOptions, mountpoint: Path | None, as_json: bool, metrics: bool) -> None:
    """Show how the mount at MOUNTPOINT is; without it, the one of the configuration."""
    if as_json and metrics:
        raise click.UsageError("--json and --metrics are two forms of the same; choose one")
    mountpoint = (mountpoint or options.load().mountpoint).absolute()
    said = _ask(mountpoint, "/metrics" if metrics else "/status").decode(errors="replace")
    if metrics:
        click.echo(printable(said), nl=False)
    elif as_json:
        # Read and written anew: whoever's mount it is, this is JSON, and steers no terminal.
        click.echo(json.dumps(json.loads(said), indent=2))
    else:
        click.echo(printable(_table(json.loads(said))))


def _ask(mountpoint: Path, path: str) -> bytes:
    import trio

    from fsmount import control
    from fsmount.errors import NotRunning
    from fsmount.fuse import mounts

    mount = mounts.find(mountpoint)
    if mount is None:
        raise NotRunning(f"nothing is mounted at {mountpoint}")
    if not mounts.is_ours(mount):
        raise NotRunning(f"what is mounted at {mountpoint} is not fsmount's, but of type {mount.fstype}")
    return trio.run(control.ask, mount, path)


def _table(status: dict[str, Any]) -> str:
    cache, layers = status["cache"], status["layers"]
    lines = [
        f"{status['mountpoint']}: fsmount {status['fsmount']}, process {status['pid']},"
        f" since {_time(status['started'])}",
        f"cache {cache['path']}: {_size(cache['stored'])} of {_size(cache['limit'])}",
        "",
        f"{len(status['apps'])} apps:",
    ]
    for app in status["apps"]:
        lines.append(f"  {app['name']}: {app['source']}")
        if trouble := app["trouble"]:
            when = "it has answered since" if trouble["is_over"] else "it has not answered since"
            lines.append(f"    at {_time(trouble['at'])}: {trouble['message']} ({when})")
    for rate in status["rate_limits"]:
        limit = f" of {rate['limit']}" if rate["limit"] is not None else ""
        lines.append(f"  {rate['server']} allows {rate['remaining']}{limit} more pulls")
    fetched = sum(layer["fetched"] for layer in layers)
    spared = sum(layer["spared"] or 0 for layer in layers)
    lines += ["", f"{len(layers)} layers: {_size(fetched)} fetched, {_size(spared)} need not be here"]
    for layer in layers:
        lines += _layer(layer)
    return "\n".join(lines)


def _layer(layer: dict[str, Any]) -> list[str]:
    fetching = ", fetching" if layer["is_fetching"] else ""
    lines = [
        f"  {layer['digest'][:19]}  {_size(layer['size']):>9}, {_size(layer['fetched'])} fetched{fetching}"
    ]
    if layer["read_as"] is None:
        lines.append("    not known by an index yet")
    else:
        text = f"    {layer['trust']}, read as {layer['read_as']}"
        if layer["reason"]:
            text += f" because {layer['reason']}"
        text += f"; {layer['cached_chunks']} of {layer['chunks']} chunks cached"
        if layer["spared"] is not None:
            text += f", {_size(layer['spared'])} need not be here"
        lines.append(text)
    if layer["whole_because"]:
        lines.append(f"    fetched whole, though a part should have done: {layer['whole_because']}")
    return lines


def _time(text: str) -> str:
    """ISO 8601, in UTC, as people write it."""
    return f"{text[:10]} {text[11:19]} UTC"


def _size(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
