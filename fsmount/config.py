"""Config: what the administrator may say, and what each of it must be like."""

import os
import re
from collections.abc import Mapping
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Self, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fsmount.errors import UsageError
from fsmount.oci.platform import Platform
from fsmount.oci.reference import LayoutReference, Reference, parse_source
from fsmount.policy import Complete, Indexes

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


def _size_or_none(value: object) -> int:
    return 0 if type(value) is int and value == 0 else _size(value)


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
    #: Bytes that are left free on the disk of the cache, at least.
    min_free: Annotated[int, PlainValidator(_size_or_none)] = 2 * 10**9
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


class Deadlines(_Table):
    """`[deadlines]`: how long a process that asks for something below the mount point waits at most."""

    #: For a registry to say which tags there are, and what a tag is.
    names_seconds: _Seconds = Field(default=10.0, alias="names")
    #: For bytes, and for names that only the bytes of a layer tell.
    content_seconds: _Seconds = Field(default=60.0, alias="content")


class Metrics(_Table):
    """`[metrics]`: what Prometheus reads, beyond `fsmount status`."""

    #: A file for the textfile collector of node_exporter; its name ends in .prom.
    textfile: _AbsolutePath | None = None


class Config(_Table):
    """The whole configuration. It cannot change: a reload makes another."""

    mountpoint: _AbsolutePath = Path("/srv/artifacts")
    cache: Cache
    defaults: Defaults = Defaults()
    network: Network = Network()
    deadlines: Deadlines = Deadlines()
    metrics: Metrics = Metrics()
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
