"""options: the options that many commands share, and what they amount to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

import click

if (
    TYPE_CHECKING
):  # pydantic takes 100 ms to import, which no command should wait for that needs no configuration
    from fsmount.config import Config


class MountPoint(click.ParamType[Path]):
    """A path that is not looked at: click.Path would, and a mount that nobody serves yet answers nobody."""

    name = "path"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return Path(value)


#: The type of every argument that names a mount.
MOUNT_POINT = MountPoint()


@dataclass(frozen=True, slots=True)
class ConfigOptions:
    """Where the configuration of this command comes from; `load` may be called again, to see changes."""

    path: Path | None
    cache: Path | None
    apps: Mapping[str, str]

    @property
    def found(self) -> Path | None:
        """The file that `load` reads, or None if it uses the built-in defaults."""
        from fsmount.configfile import find_config

        return find_config(self.path)

    def arguments(self) -> list[str]:
        """The same options for another process of the same command, in whichever folder it is."""
        words: list[str] = []
        if self.path is not None:
            words += ["--config", str(self.path.absolute())]
        if self.cache is not None:
            words += ["--cache", str(self.cache.absolute())]
        for name, repository in self.apps.items():
            words += ["--app", f"{name}={_absolute(repository)}"]
        return words

    def load(self) -> Config:
        """Raises: UsageError with all problems."""
        from fsmount.configfile import load_config

        return load_config(self.path, cache=self.cache, apps=self.apps)


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command --config, --cache and --app; its function receives them first, as ConfigOptions."""

    @click.option(
        "--config",
        "config_path",
        metavar="FILE",
        envvar="FSMOUNT_CONFIG",
        show_envvar=True,
        type=click.Path(path_type=Path),
        help="The configuration.  [default: /etc/fsmount/config.toml, if it exists]",
    )
    @click.option(
        "--cache",
        metavar="DIR",
        envvar="FSMOUNT_CACHE",
        show_envvar=True,
        type=click.Path(path_type=Path),
        help="Where fetched bytes are kept, instead of cache.path of the configuration.",
    )
    @click.option(
        "--app",
        "apps",
        metavar="NAME=REPOSITORY",
        multiple=True,
        callback=_apps,
        help="One more app, or another repository for one of the configuration. Repeatable.",
    )
    @wraps(command)
    def with_options(
        config_path: Path | None, cache: Path | None, apps: Mapping[str, str], **others: object
    ) -> None:
        command(ConfigOptions(config_path, cache, apps), **others)

    return with_options


def _absolute(repository: str) -> str:
    scheme, _, folder = repository.partition("oci-layout:")
    return repository if scheme or not folder else f"oci-layout:{Path(folder).absolute()}"


def _apps(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    apps: dict[str, str] = {}
    for value in values:
        name, equals, repository = value.partition("=")
        if not equals:
            raise click.BadParameter(
                f"{value!r} has no '='; write NAME=REPOSITORY, like web=registry.example.com/web"
            )
        if name in apps:
            raise click.BadParameter(f"{name!r} is given twice; an app is one repository")
        apps[name] = repository
    return apps
