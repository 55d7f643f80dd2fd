"""status: how a running mount is: its process, cache, apps and layers, as it says itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fsmount.cli.asking import ask
from fsmount.cli.options import MOUNT_POINT, ConfigOptions, config_options
from fsmount.cli.output import printable


@click.command()
@click.argument("mountpoint", type=MOUNT_POINT, required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "metrics"]),
    help="For people, programs or Prometheus.  [default: table]",
)
@click.option("--json", "as_json", is_flag=True, envvar="FSMOUNT_JSON", help="The same as --format json.")
@config_options
def status(options: ConfigOptions, mountpoint: Path | None, form: str | None, as_json: bool) -> None:
    """Show how the mount at MOUNTPOINT is; without it, the one of the configuration."""
    form = form or ("json" if as_json else "table")
    mountpoint = (mountpoint or options.load().mountpoint).absolute()
    said = ask(mountpoint, "/metrics" if form == "metrics" else "/status").decode(errors="replace")
    if form == "metrics":
        click.echo(printable(said), nl=False)
    elif form == "json":
        # Read and written anew: whoever's mount it is, this is JSON, and steers no terminal.
        click.echo(json.dumps(json.loads(said), indent=2))
    else:
        click.echo(printable(_table(json.loads(said))))


def _table(status: dict[str, Any]) -> str:
    layers = status["layers"]
    lines = [f"{status['mountpoint']}: {status['summary']}", *_process(status)]
    if cache := status["cache"]:
        wanted = cache["hits"] + cache["misses"]
        lines.append(
            f"cache {cache['path']}: {_size(cache['stored'])} of {_size(cache['limit'])},"
            f" {cache['hits']} of {wanted} chunks found, {cache['evictions']} evicted"
        )
    if error := status["last_error"]:
        lines.append(f"last error, at {_time(error['at'])}: {error['message']}")
    lines += ["", f"{len(status['apps'])} apps:"]
    for app in status["apps"]:
        lines.append(f"  {app['name']}: {app['source']}")
        if trouble := app["trouble"]:
            when = "it has answered since" if trouble["is_over"] else f"since {_time(trouble['since'])}"
            lines.append(f"    at {_time(trouble['at'])}: {trouble['message']} ({when})")
    for rate in status["rate_limits"]:
        limit = f" of {rate['limit']}" if rate["limit"] is not None else ""
        lines.append(f"  {rate['server']} allows {rate['remaining']}{limit} more pulls")
    for server in status["servers"]:
        lines.append(
            f"  {server['server']}: {server['requests']} requests, {server['retries']} of them again"
        )
    if status["operations"]:
        lines += ["", "operations:", *map(_operation, status["operations"])]
    fetched = sum(layer["fetched"] for layer in layers)
    spared = sum(layer["spared"] or 0 for layer in layers)
    lines += ["", f"{len(layers)} layers: {_size(fetched)} fetched, {_size(spared)} need not be here"]
    for layer in layers:
        lines += _layer(layer)
    return "\n".join(lines)


def _process(status: dict[str, Any]) -> list[str]:
    process = status["process"]
    line = f"fsmount {status['fsmount']}, process {process['pid']} since {_time(status['started'])}"
    if process["holder"] is not None:
        line += f", held by {process['holder']}"
    if process["starts"] == 1:
        return [line]
    death = f"; {process['last_death']}" if process["last_death"] else ""
    return [line, f"it is the {_ordinal(process['starts'])} that serves this mount{death}"]


def _ordinal(number: int) -> str:
    tens, ones = divmod(number % 100, 10)
    return f"{number}{'th' if tens == 1 else {1: 'st', 2: 'nd', 3: 'rd'}.get(ones, 'th')}"


def _operation(operation: dict[str, Any]) -> str:
    count = operation["count"]
    mean = operation["seconds"] / count * 1000
    slow = sum(operation["classes"][3:])
    line = f"  {operation['name']:<12}{count:>10}, {mean:.2f} ms on average, {slow} over 100 ms"
    errors = ", ".join(f"{count} {name}" for name, count in sorted(operation["errors"].items()))
    return f"{line}; {errors}" if errors else line


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
