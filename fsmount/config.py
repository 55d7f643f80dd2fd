"""Config: what the administrator wrote in file, environment and options, checked before anything starts."""

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, NamedTuple, Self, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fsmount.errors import UsageError
from fsmount.oci.platform import Platform
from fsmount.oci.reference import LayoutReference, Reference, parse_source
from fsmount.policy import Complete, Indexes

#: Where the administrator of a server keeps the configuration.
SYSTEM_FILE = Path("/etc/fsmount/config.toml")

_SIZES = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}
_DURATIONS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
# Fifteen digits are exact in a float.
_QUANTITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) *([A-Za-z]*)", re.ASCII)
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[A-Fa-f0-9:]+\])(?::[0-9]{1,5})?")
_HELPER = re.compile("[A-Za-z0-9_.-]+")
_BARE_KEY = re.compile("[A-Za-z0-9_-]+")
_LONGEST_NAME = 255
_LARGEST_SIZE = 2**63 - 1


def _quantity(value: object, units: Mapping[str, float]) -> float | None:
    match = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    unit = units.get(match[2].lower()) if match else None
    return float(match[1]) * unit if match and unit else None


def _size(value: object) -> int:
    # bool is a subclass of int, and no size.
    size = value if type(value) is int else round(_quantity(value, _SIZES) or 0)
    if not 0 < size <= _LARGEST_SIZE:
        raise ValueError('must be a size above zero; write "20 GB", "512 MiB" or a number of bytes')
    return size


def parse_seconds(value: object) -> float:
    """A time like "60s" or "500ms". Raises: ValueError."""
    seconds = _quantity(value, _DURATIONS)
    if not seconds:
        raise ValueError('must be a time above zero; write "60s", "5m", "1h" or "500ms"')
    return seconds


def _count(value: object) -> int:
    if type(value) is not int or not 0 < value <= 10_000:
        raise ValueError("must be a number from 1 to 10000")
    return value


def _absolute_path(value: object) -> Path:
    if not isinstance(value, str | Path) or not os.path.isabs(value) or "\0" in str(value):
        raise ValueError("must be an absolute path; write it from the root, like /srv/artifacts")
    return Path("/" + os.fspath(value).lstrip("/"))


def _folder(value: object) -> str:
    """A folder of an image, as `/` and its components with single slashes."""
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value or ".." in value.split("/"):
        raise ValueError('must be a folder of the image; write it from the root, without "..", like "/dist"')
    return os.path.normpath("/" + value.lstrip("/"))


def _platform(value: object) -> Platform:
    if not isinstance(value, str):
        raise ValueError('must be a platform; write "linux/amd64"')
    try:
        return Platform.parse(value)
    except UsageError as error:
        raise _problem(error) from error


def _repository(value: object) -> Reference | LayoutReference:
    if isinstance(value, str):
        try:
            value = parse_source(value)
        except UsageError as error:
            raise _problem(error) from error
    if not isinstance(value, Reference | LayoutReference):
        raise ValueError(
            'must be a repository; write "registry.example.com/team/web" or "oci-layout:/builds"'
        )
    if value.version:
        raise ValueError(f"names the version {value.version}; leave it out, and choose with tags = [...]")
    if isinstance(value, LayoutReference) and not value.path.is_absolute():
        raise ValueError(f"the folder {str(value.path)!r} is relative; write it from the root")
    return value


def _patterns(value: object) -> tuple[str, ...]:
    patterns = tuple(value) if isinstance(value, list | tuple) else ()
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError('must be a list of patterns; write ["v*", "main"], or leave it out to show all tags')
    return patterns


def _app_name(name: str, info: ValidationInfo) -> str:
    """One or more file names joined by slashes. The context, if there is one, holds all names."""
    components = name.split("/")
    for component in components:
        if component in {"", ".", ".."} or "\0" in component or len(os.fsencode(component)) > _LONGEST_NAME:
            raise ValueError(
                f"{component[:80]!r} is no folder name; an app is named like web or team/web, "
                f"each part with up to {_LONGEST_NAME} bytes"
            )
    for stop in range(1, len(components)):
        outer = "/".join(components[:stop])
        if outer in (info.context or ()):
            raise ValueError(f"is inside the app {outer}, where its tags are; rename one of the two")
    return name


def _host(name: str) -> str:
    if not _HOST.fullmatch(name):
        raise ValueError('is no registry; write its host and port as in references, like "localhost:5000"')
    return name


def _username(value: object) -> str:
    if not isinstance(value, str) or not value or ":" in value or not value.isprintable():
        raise ValueError('must be a user name, without ":" and control characters; write "robot$ci"')
    return value


def _password_file(value: object) -> Path:
    if isinstance(value, str) and value not in {"", ".", ".."} and not set(value) & {"/", "\0"}:
        return Path(value)
    try:
        return _absolute_path(value)
    except ValueError:
        raise ValueError(
            "must be a file; write it from the root, like /etc/fsmount/password, "
            "or the name of a systemd credential (LoadCredential=)"
        ) from None


def _helper(value: object) -> str:
    if not isinstance(value, str) or not _HELPER.fullmatch(value):
        raise ValueError('must be what follows docker-credential- in a program\'s name; write "ecr-login"')
    return value


def _problem(error: UsageError) -> ValueError:
    remedy = error.remedy or ""
    return ValueError(f"{error.message}; {remedy[:1].lower()}{remedy[1:].rstrip('.')}")


def _indexes(value: object) -> Indexes:
    return _choice(Indexes, value)


def _complete(value: object) -> Complete:
    return _choice(Complete, value)


_Choice = TypeVar("_Choice", bound=StrEnum)


def _choice(choices: type[_Choice], value: object) -> _Choice:
    try:
        return choices(value if isinstance(value, str) else "")
    except ValueError:
        *others, last = (f'"{choice}"' for choice in choices)
        raise ValueError(f"must be {', '.join(others)} or {last}") from None


_Size: TypeAlias = Annotated[int, PlainValidator(_size)]
_Seconds: TypeAlias = Annotated[float, PlainValidator(parse_seconds)]
_AbsolutePath: TypeAlias = Annotated[Path, PlainValidator(_absolute_path)]
_OnePlatform: TypeAlias = Annotated[Platform, PlainValidator(_platform)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Cache(_Table):
    """`[cache]`: where fetched bytes stay, and how many."""

    path: _AbsolutePath
    #: Bytes of layer content on disk, at most.
    size: _Size = 20 * 10**9
    #: Bound on the inflated bytes of one layer; None is 64 times the compressed size and 1 GiB.
    max_layer_size: _Size | None = None


class Defaults(_Table):
    """`[defaults]`: what holds for every app that does not say otherwise."""

    refresh_seconds: _Seconds = Field(default=60.0, alias="refresh")
    platform: _OnePlatform = Field(default_factory=Platform.current)
    #: By which indexes layers may be read.
    indexes: Annotated[Indexes, PlainValidator(_indexes)] = Indexes.ANY
    #: When the rest of a layer is fetched that nobody has asked for.
    complete: Annotated[Complete, PlainValidator(_complete)] = Complete.IDLE
    #: Whether a mount makes the SOCI indexes of what it shows, and pushes them.
    publish_indexes: StrictBool = False


class App(_Table):
    """`[apps.NAME]`: one repository, shown as one folder of tags; the defaults are already applied."""

    repository: Annotated[Reference | LayoutReference, PlainValidator(_repository)]
    #: The folder of the image that is shown as the tree's root; it starts with a slash and ends without.
    path: Annotated[str, PlainValidator(_folder)] = "/"
    platform: _OnePlatform = Field(default_factory=Platform.current)
    #: Shell patterns; a tag is listed if one matches.
    tags: Annotated[tuple[str, ...], PlainValidator(_patterns)] = ("*",)
    refresh_seconds: _Seconds = Field(default=60.0, alias="refresh")
    indexes: Annotated[Indexes, PlainValidator(_indexes)] = Indexes.ANY
    complete: Annotated[Complete, PlainValidator(_complete)] = Complete.IDLE
    publish_indexes: StrictBool = False

    def shows(self, tag: str) -> bool:
        """Whether a tag is among those of this app."""
        return any(fnmatchcase(tag, pattern) for pattern in self.tags)


class Registry(_Table):
    """`[registries."host:port"]`: how a registry is reached, beyond what docker and podman are told."""

    #: HTTP without TLS.
    plain_http: StrictBool = False
    # Who we are there. At most one of three: a user with the password in a file, a helper, nobody. With none of
    # them it is as docker and podman are told.
    username: Annotated[str | None, PlainValidator(_username)] = None
    #: A bare name is that of a systemd credential: a file in `$CREDENTIALS_DIRECTORY`.
    password_file: Annotated[Path | None, PlainValidator(_password_file)] = None
    #: The program docker-credential-<helper>.
    helper: Annotated[str | None, PlainValidator(_helper)] = None
    #: No credentials, whatever others have.
    anonymous: StrictBool = False

    @model_validator(mode="after")
    def _one_identity(self) -> Self:
        if (self.username is None) != (self.password_file is None):
            given, missing = ("username", "password_file") if self.username else ("password_file", "username")
            raise ValueError(f"has {given} and no {missing}; write both, or neither")
        ways = {
            "username": self.username is not None,
            "helper": self.helper is not None,
            "anonymous": self.anonymous,
        }
        chosen = [name for name, is_chosen in ways.items() if is_chosen]
        if len(chosen) > 1:
            raise ValueError(f"has {' and '.join(chosen)}, which exclude each other; keep one")
        return self


class Network(_Table):
    """`[network]`: how long servers may take, and how much they may make us hold."""

    connect_seconds: _Seconds = Field(default=10.0, alias="connect_timeout")
    #: For the first byte of an answer, and for each further piece of it.
    stall_seconds: _Seconds = Field(default=30.0, alias="stall_timeout")
    #: Of a request, before it counts as failed.
    tries: Annotated[int, PlainValidator(_count)] = 3
    #: At once, to one server.
    requests_per_server: Annotated[int, PlainValidator(_count)] = 32
    manifest_size: _Size = 4 * 1024 * 1024
    token_size: _Size = 64 * 1024
    #: Of what a server says with an error.
    error_size: _Size = 64 * 1024
    #: Bytes a second that are fetched of a layer, at most, while nobody waits for them; None is no bound.
    background_rate: _Size | None = None


class Config(_Table):
    """The whole configuration. It cannot change: a reload makes another."""

    mountpoint: _AbsolutePath = Path("/srv/artifacts")
    cache: Cache
    defaults: Defaults = Defaults()
    network: Network = Network()
    #: By name; a name with slashes is a path of nested folders.
    apps: Mapping[Annotated[str, AfterValidator(_app_name)], App] = Field(default_factory=dict)
    #: By `host` or `host:port`, as references spell it.
    registries: Mapping[Annotated[str, AfterValidator(_host)], Registry] = Field(default_factory=dict)

    @field_validator("cache")
    @classmethod
    def _outside_the_mount(cls, cache: Cache, info: ValidationInfo) -> Cache:
        mountpoint = info.data.get("mountpoint")
        if mountpoint and cache.path.is_relative_to(mountpoint):
            raise ValueError(f"path {cache.path} is inside the mount point {mountpoint}; choose one outside")
        return cache

    @field_validator("apps")
    @classmethod
    def _apply_defaults(cls, apps: Mapping[str, App], info: ValidationInfo) -> Mapping[str, App]:
        defaults = info.data.get("defaults", Defaults())
        inherited = {key: getattr(defaults, key) for key in Defaults.model_fields}
        return MappingProxyType(
            {
                name: app.model_copy(
                    update={key: value for key, value in inherited.items() if key not in app.model_fields_set}
                )
                for name, app in apps.items()
            }
        )


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
            model: type[_Table] = App
        case ("registries", _, _):
            model = Registry
        case ("cache", _):
            model = Cache
        case ("defaults", _):
            model = Defaults
        case ("network", _):
            model = Network
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
