"""report: the values that a mount says of itself, and their JSON form."""

import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Of the JSON form; it changes when a field gets another meaning, or goes.
VERSION = 1


class State(enum.StrEnum):
    """How a mount is, in a word; the worst that applies."""

    #: It does not answer yet.
    STARTING = "starting"
    #: It answers EIO: one process after the other has died.
    REFUSING = "refusing"
    #: It asks no source, because several processes have died; what is in the cache is served.
    CACHE_ONLY = "cache-only"
    #: The source of an app does not answer, or refuses, and what is in the cache is served; or nothing can be cached.
    DEGRADED = "degraded"
    SERVING = "serving"


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """The process that says so, and those before it: as in Process."""

    pid: int
    holder: int | None
    starts: int
    last_death: str | None


@dataclass(frozen=True, slots=True)
class OperationStatus:
    """What the kernel has asked of this process, of one kind.

    `classes` says how many took at most 1 ms, 10 ms, 100 ms, 1 s, 10 s, and longer, each without those before it;
    `seconds` what all took together; `errors` how many were answered with which errno. Of these, ENOSYS and ENOENT
    are no failures.
    """

    name: str
    count: int
    seconds: float
    classes: Sequence[int]
    errors: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class FailureStatus:
    """The last time in this process that the kernel was answered with an error that should not be."""

    at: str
    message: str


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """`stored` and `limit` are bytes of chunks.

    `hits` and `misses`: how many chunks were there, and were not, when this process wanted to read them; those that
    it has open are not looked for. `evictions`: how many it has removed to make room.
    """

    path: str
    limit: int
    stored: int
    hits: int
    misses: int
    evictions: int
    #: Why chunks cannot be stored now; None if they can.
    trouble: str | None


@dataclass(frozen=True, slots=True)
class TroubleStatus:
    """The last time that the source of an app could not be asked. `is_over`: it has answered since.

    `since`: when it began not to answer. `is_refusal`: it did, but will not have us.
    """

    at: str
    message: str
    is_over: bool
    since: str
    is_refusal: bool


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """A registry or mirror: the requests that it was sent in this process, and how many of them were a further try."""

    server: str
    requests: int
    retries: int


@dataclass(frozen=True, slots=True)
class AppStatus:
    """`failures`: how many questions its source has not answered, or refused, in this process."""

    name: str
    source: str
    failures: int
    trouble: TroubleStatus | None


@dataclass(frozen=True, slots=True)
class RateStatus:
    """What a server has said of the pulls that are left."""

    server: str
    limit: int | None
    remaining: int
    window_seconds: int | None
    source: str | None


@dataclass(frozen=True, slots=True)
class LayerStatus:
    """One layer of an image that was looked into. Sizes are bytes of its blob.

    What its index says (from `read_as` on) is None as long as it has none.
    """

    digest: str
    size: int
    #: What came from its source in this process.
    fetched: int
    #: Whether something is on its way.
    is_fetching: bool
    #: Why all of it was fetched in this process where a part should have done.
    whole_because: str | None
    ranges_ignored: bool
    read_as: str | None
    trust: str | None
    #: Why it was streamed when it was first asked for, in whichever process.
    reason: str | None
    #: What need not be here; None where no part can be had alone.
    spared: int | None
    chunks: int | None
    cached_chunks: int | None


@dataclass(frozen=True, slots=True)
class Status:
    """One mount, now. Times are in ISO 8601, in UTC."""

    version: int
    state: State
    #: The state in a sentence: since when, and why.
    summary: str
    pid: int
    fsmount: str
    mountpoint: str
    #: When this process began.
    started: str
    process: ProcessStatus
    #: None while it is refusing: then it is not opened.
    cache: CacheStatus | None
    apps: Sequence[AppStatus]
    servers: Sequence[ServerStatus]
    operations: Sequence[OperationStatus]
    last_error: FailureStatus | None
    rate_limits: Sequence[RateStatus]
    layers: Sequence[LayerStatus]


def as_json(status: Status) -> bytes:
    """One line of ASCII."""
    return json.dumps(status, default=_fields).encode("ascii") + b"\n"


def _fields(value: object) -> dict[str, object]:
    # Not asdict, which copies everything, and is ten times slower.
    assert dataclasses.is_dataclass(value)
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
