"""config: tells whether a configuration is valid, and what it amounts to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fsmount.cli.options import ConfigOptions, config_options
from fsmount.cli.output import printable

if TYPE_CHECKING:
    from fsmount.config import Config


@click.group()
def config() -> None:
    """Look at the configuration."""


@config.command()
@config_options
def check(options: ConfigOptions) -> None:
    """Check the configuration, and show what is in force."""
    loaded = options.load()
    click.echo(printable(f"{options.found or 'no configuration file; the built-in defaults'}: ok"))
    for line in _summary(loaded):
        click.echo(printable(line))


def _summary(config: Config) -> list[str]:
    lines = [
        f"mountpoint  {config.mountpoint}",
        f"cache       {config.cache.path}, {_size(config.cache.size)}",
    ]
    if config.cache.max_layer_size:
        lines.append(f"            layers up to {_size(config.cache.max_layer_size)}")
    for name, app in sorted(config.apps.items()):
        lines.append(f"app         {name}: {app.repository}, folder {app.path}, {app.platform}")
        lines.append(f"            tags {' '.join(app.tags)}, looked for every {app.refresh_seconds:g} s")
    for host, registry in sorted(config.registries.items()):
        lines.append(f"registry    {host}: {'plain HTTP' if registry.plain_http else 'HTTPS'}")
    return (
        lines if config.apps else [*lines, 'no apps: add [apps.NAME] with repository = "...", or use --app']
    )


def _size(size: int) -> str:
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size} B"
