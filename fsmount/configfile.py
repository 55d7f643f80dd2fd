"""configfile: where the configuration comes from: file, environment and options; and all that is wrong with it."""

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from pydantic import BaseModel, ValidationError

from fsmount.config import App, Cache, Config, Deadlines, Defaults, Metrics, Network, Registry
from fsmount.errors import UsageError
from fsmount.oci.reference import LayoutReference, Reference, parse_source

#: Where the administrator of a server keeps the configuration.
SYSTEM_FILE = Path("/etc/fsmount/config.toml")

_BARE_KEY = re.compile("[A-Za-z0-9_-]+")


def load_config(
    path: Path | None = None,
    *,
    cache: Path | None = None,
    apps: Mapping[str, str] = MappingProxyType({}),
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """The configuration in force: options win over the environment, it over the file, that over the defaults.

    `apps` are repositories by name: each adds an app, or replaces the repository of one in the file.
    Relative paths in arguments and environment are the process's; in the file they are refused.

    Raises: UsageError, naming every problem as `file:line: key: what is wrong; remedy`.
    """
    file = find_config(path, environ)
    text = _read(file) if file else ""
    data = _parse(text, file)
    origins: dict[_Location, _Origin] = {}
    if cache is not None:
        _overlay(data, ("cache", "path"), cache.absolute(), origins, "--cache")
    elif environ.get("FSMOUNT_CACHE"):
        _overlay(data, ("cache", "path"), Path(environ["FSMOUNT_CACHE"]).absolute(), origins, "FSMOUNT_CACHE")
    elif "path" not in _table(data, "cache"):
        _overlay(data, ("cache", "path"), _default_cache(environ), origins, "the default cache")
    for name, repository in apps.items():
        where = ("apps", name, "repository")
        _overlay(data, where, _from_command_line(repository), origins, f"--app {name}")
    try:
        return Config.model_validate(data, context=frozenset(_table(data, "apps")))
    except ValidationError as error:
        lines = {location: _Origin(line, f"{file}:{line}") for location, line in _lines(text).items()}
        # A table that the file does not have is from where its key is from.
        tables = {where[:stop]: origin for where, origin in origins.items() for stop in range(1, len(where))}
        raise _report(error, tables | lines | origins) from error


def find_config(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The file that `load_config` reads: path, `FSMOUNT_CONFIG`, the user's (root has none), the system's."""
    if path is not None:
        return path
    if environ.get("FSMOUNT_CONFIG"):
        return Path(environ["FSMOUNT_CONFIG"])
    candidates = [SYSTEM_FILE]
    if os.geteuid() != 0:
        candidates.insert(0, _user_folder(environ, "XDG_CONFIG_HOME", ".config") / "config.toml")
    return next((candidate for candidate in candidates if candidate.exists()), None)


#: Keys from the root of the file down; a number is a place in a list.
_Location: TypeAlias = tuple[str | int, ...]


class _Origin(NamedTuple):
    """Where a value was written; line 0 is no file."""

    line: int
    label: str


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"{file}:{line}: byte {error.object[error.start]:#x} is not UTF-8") from error
    except OSError as error:
        raise UsageError(f"the configuration {file} cannot be read: {error.strerror}") from error


def _parse(text: str, file: Path | None) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        reason, _, place = str(error).rpartition(" (at ")
        number = re.match("line ([0-9]+)", place)
        line = int(number[1]) if number else text.count("\n") + 1
        raise UsageError(
            f"{file}:{line}: {reason}",
            remedy='In TOML, text is in quotes, and so are names with dots, slashes or colons: [apps."a/b"].',
        ) from error


def _table(data: Mapping[str, object], key: str) -> dict[str, object]:
    """A table of the file; an empty one if something else stands there, which validation reports."""
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _overlay(
    data: dict[str, object],
    where: tuple[str, ...],
    value: object,
    origins: dict[_Location, _Origin],
    label: str,
) -> None:
    """Puts a value that is not from the file into what the file said, and remembers where it is from."""
    for key in where[:-1]:
        table = data.setdefault(key, {})
        if not isinstance(table, dict):
            return  # validation reports it
        data = table
    data[where[-1]] = value
    origins[where] = _Origin(0, label)


def _from_command_line(repository: str) -> str | Reference | LayoutReference:
    try:
        reference = parse_source(repository)
    except UsageError:
        return repository  # validation reports it, with all the other problems
    if isinstance(reference, LayoutReference):
        return replace(reference, path=reference.path.absolute())
    return reference


def _default_cache(environ: Mapping[str, str]) -> Path:
    if os.geteuid() == 0:
        return Path("/var/cache/fsmount")
    return _user_folder(environ, "XDG_CACHE_HOME", ".cache")


def _user_folder(environ: Mapping[str, str], variable: str, fallback: str) -> Path:
    """Our folder by the XDG Base Directory Specification, which has relative paths ignored."""
    home = Path(environ.get(variable, ""))
    return (home if home.is_absolute() else Path(environ.get("HOME") or Path.home()) / fallback) / "fsmount"


def _lines(text: str) -> dict[_Location, int]:
    """The line of every table and key. The text must be valid TOML.

    A statement begins on a line of its own, and is whole as soon as it parses by itself; so tomllib does the
    reading, of quotes, dotted keys, lists over several lines and inline tables too.
    """
    lines: dict[_Location, int] = {}
    table: _Location = ()
    pending: list[str] = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        pending.append(line)
        try:
            statement = tomllib.loads("\n".join(pending))
        except tomllib.TOMLDecodeError:
            continue
        first = number - len(pending) + 1
        is_header = pending[0].lstrip().startswith("[")
        pending.clear()
        locations = list(_locations(statement, () if is_header else table))
        for location in locations:
            lines.setdefault(location, first)
        if is_header:
            table = locations[-1]
    return lines


def _locations(table: Mapping[str, object], prefix: _Location) -> Iterator[_Location]:
    for key, value in table.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from _locations(value, (*prefix, key))


def _report(error: ValidationError, origins: Mapping[_Location, _Origin]) -> UsageError:
    problems: list[tuple[_Origin, str]] = []
    for detail in error.errors(include_url=False):
        location = tuple(part for part in detail["loc"] if part != "[key]")
        known = (location[:stop] for stop in range(len(location), 0, -1) if location[:stop] in origins)
        origin = origins.get(next(known, ()), _Origin(0, "configuration"))
        if detail["type"] == "value_error":
            what = str(detail["ctx"]["error"])
        elif detail["type"] == "extra_forbidden":
            what = _unknown_key(location, detail["input"])
        else:
            what = _MEANINGS.get(detail["type"], detail["msg"])
        problems.append((origin, f"{origin.label}: {_spelled(location)}: {what}"))
    texts = [text for _, text in sorted(problems)]
    if len(texts) == 1:
        return UsageError(texts[0])
    return UsageError("\n".join([f"the configuration has {len(texts)} problems:", *texts]))


#: What pydantic's own checks mean here.
_MEANINGS = {
    "missing": 'is missing; add repository = "registry.example.com/team/web"',
    "bool_type": "must be true or false; write it without quotes",
    "model_type": "must be a table; write it as a header in brackets, and its keys below",
    "dict_type": "must hold tables; write each as a header in brackets, and its keys below",
}


def _unknown_key(location: _Location, value: object) -> str:
    match location:
        case ("apps", app, inner) if isinstance(value, dict):
            return f'unknown key; an app name with a slash goes in quotes: [apps."{app}/{inner}"]'
        case ("apps", _, _):
            model: type[BaseModel] = App
        case ("registries", _, _):
            model = Registry
        case ("cache", _):
            model = Cache
        case ("defaults", _):
            model = Defaults
        case ("network", _):
            model = Network
        case ("deadlines", _):
            model = Deadlines
        case ("metrics", _):
            model = Metrics
        case _:
            model = Config
    keys = [field.alias or name for name, field in model.model_fields.items()]
    near = get_close_matches(str(location[-1]), keys, 1)
    return f"unknown key; did you mean {near[0]}?" if near else f"unknown key; known here: {', '.join(keys)}"


def _spelled(location: _Location) -> str:
    """A location as TOML spells a dotted key."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if _BARE_KEY.fullmatch(part) else f'."{part}"'
    return text.removeprefix(".")
