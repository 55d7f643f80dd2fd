"""status: what a running mount says of itself: its cache, apps and layers, as JSON."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import trio

from fsmount import __version__
from fsmount.catalog import App
from fsmount.engine import Engine
from fsmount.fuse import mounts
from fsmount.index import LayerIndex
from fsmount.layer import Layer
from fsmount.lazy import RANGES_IGNORED
from fsmount.singleflight import SingleFlight

#: Of the JSON form; it changes when a field gets another meaning, or goes.
VERSION = 1


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """`stored` and `limit` are bytes of chunks."""

    path: str
    limit: int
    stored: int


@dataclass(frozen=True, slots=True)
class TroubleStatus:
    """The last time that the source of an app could not be asked. `is_over`: it has answered since."""

    at: str
    message: str
    is_over: bool


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
    pid: int
    fsmount: str
    mountpoint: str
    started: str
    cache: CacheStatus
    apps: Sequence[AppStatus]
    rate_limits: Sequence[RateStatus]
    layers: Sequence[LayerStatus]


def as_json(status: Status) -> bytes:
    """One line of ASCII."""
    return json.dumps(status, default=_fields).encode("ascii") + b"\n"


def _fields(value: object) -> dict[str, object]:
    # Not asdict, which copies everything, and is ten times slower.
    assert dataclasses.is_dataclass(value)
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


class Observer:
    """Finds out how a mount is, once for all who ask at the same time."""

    def __init__(self, engine: Engine, mountpoint: Path) -> None:
        self._engine = engine
        self._mountpoint = mountpoint
        self._started = datetime.now(UTC)
        self._looking: SingleFlight[Status] = SingleFlight(engine.layers.nursery)
        # One at a time, and anew for each layer: there may be thousands, and readers go first.
        self._thread = trio.CapacityLimiter(1)

    async def report(self, encode: Callable[[Status], bytes]) -> bytes:
        """How it is now, encoded in a thread."""
        return await trio.to_thread.run_sync(encode, await self.look(), limiter=self._thread)

    async def look(self) -> Status:
        """How it is now. Cancellation: safe; looking ends when nobody waits for it any more."""
        return await self._looking.run((), self._look)

    async def _look(self) -> Status:
        engine = self._engine
        stored = await trio.to_thread.run_sync(lambda: engine.layers.chunks.volume, limiter=self._thread)
        return Status(
            version=VERSION,
            pid=os.getpid(),
            fsmount=__version__,
            mountpoint=os.fspath(mounts.resolve(self._mountpoint)),
            started=_written(self._started),
            cache=CacheStatus(os.fspath(engine.config.cache.path), engine.config.cache.size, stored),
            apps=[self._app(app) for app in engine.catalog.apps.values()],
            rate_limits=[
                RateStatus(server, rate.limit, rate.remaining, rate.window_seconds, rate.source)
                for server, rate in engine.sources.rate_limits().items()
            ],
            layers=[await self._layer(layer) for layer in engine.layers],
        )

    def _app(self, app: App) -> AppStatus:
        standing = self._engine.sources.standing(app.source)
        trouble = standing.trouble if standing is not None else None
        return AppStatus(
            app.name,
            app.source.name,
            standing.failures if standing is not None else 0,
            TroubleStatus(_written(trouble.at), trouble.message, trouble.is_over) if trouble else None,
        )

    async def _layer(self, layer: Layer) -> LayerStatus:
        known = await trio.to_thread.run_sync(_look_up, layer, layer.open_index, limiter=self._thread)
        meter, descriptor = layer.meter, layer.spec.descriptor
        return LayerStatus(
            str(descriptor.digest),
            descriptor.size,
            meter.received,
            layer.busy,
            meter.whole_because,
            meter.whole_because == RANGES_IGNORED,
            *known,
        )


class _Known(NamedTuple):
    """The fields of LayerStatus that the index and the chunk store know, in their order."""

    read_as: str | None = None
    trust: str | None = None
    reason: str | None = None
    spared: int | None = None
    chunks: int | None = None
    cached_chunks: int | None = None


def _look_up(layer: Layer, opened: LayerIndex | None) -> _Known:
    """Blocks on the disk; for any thread. opened: the layer's index, if it is open."""
    index = opened or layer.load_index()
    if index is None or not index.complete:
        return _Known()
    if opened is None:
        # All that is asked below was loaded when it was opened.
        index.close()
    stored = layer.stored_chunks(index)
    here = cached_size(index, stored)
    size = layer.spec.descriptor.size
    return _Known(
        str(index.kind),
        str(index.trust),
        index.reason or None,
        None if here is None else size - min(here, size),
        len(stored),
        sum(stored),
    )


def cached_size(index: LayerIndex, stored: Sequence[bool]) -> int | None:
    """Bytes of the blob that the stored ones of its chunks stand for; None where no part can be had alone."""
    if not index.has_spans:
        return None
    pairs = zip(index.chunks, stored, strict=True)
    return sum(chunk.blob_stop - chunk.blob_start for chunk, is_here in pairs if is_here)


def _written(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds")
