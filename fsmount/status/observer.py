"""observer: finds out how a mount is: from the engine, the tally of requests, and what is known of its processes."""

import dataclasses
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
from fsmount.fuse.tally import Operation, Tally
from fsmount.index import LayerIndex
from fsmount.layer import Layer
from fsmount.lazy import RANGES_IGNORED
from fsmount.registry.standing import Trouble
from fsmount.singleflight import SingleFlight
from fsmount.status.report import (
    VERSION,
    AppStatus,
    CacheStatus,
    FailureStatus,
    LayerStatus,
    OperationStatus,
    ProcessStatus,
    RateStatus,
    ServerStatus,
    State,
    Status,
    TroubleStatus,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What a process knows of its place among those that have served the mount, one after the other.

    `holder` is the process that starts the next one; None is nobody, or systemd. `starts` counts them, this one
    included. `last_death` says how the last one that was not told to end has ended.
    """

    holder: int | None = None
    starts: int = 1
    last_death: str | None = None
    #: What the deaths have made of this one; None: nothing.
    mode: State | None = None


class Observer:
    """Finds out how a mount is, once for all who ask at the same time."""

    def __init__(
        self,
        engine: Engine | None,
        mountpoint: Path,
        *,
        process: Process | None = None,
        tally: Tally | None = None,
    ) -> None:
        """engine: None of a process that has none, because it refuses everything."""
        #: For whoever serves the mount to say, if it can be asked before.
        self.is_ready = True
        self._engine = engine
        self._mountpoint = mountpoint
        self._process = process or Process()
        self._tally = tally or Tally()
        self._started = datetime.now(UTC)
        self._looking: SingleFlight[Status] | None = None
        if engine is not None:
            self._looking = SingleFlight(engine.layers.nursery)
        # One at a time, and anew for each layer: there may be thousands, and readers go first.
        self._thread = trio.CapacityLimiter(1)

    def state(self) -> tuple[State, str]:
        """How it is now, in a word and in a sentence. Does no I/O."""
        process = self._process
        death = f": {process.last_death}" if process.last_death else ""
        if not self.is_ready:
            return State.STARTING, "starting"
        if process.mode is State.REFUSING or self._engine is None:
            return (
                State.REFUSING,
                f"refusing everything, for its processes have died one after the other{death}",
            )
        if process.mode is State.CACHE_ONLY:
            return State.CACHE_ONLY, f"cache-only, for several of its processes have died{death}"
        apps = self._engine.catalog.apps.values()
        troubles = [trouble for app in apps if (trouble := self._trouble(app)) and not trouble.is_over]
        full = self._engine.layers.chunks.trouble
        if not troubles:
            if full is not None:
                return State.DEGRADED, f"degraded, serving without caching: {full}"
            return State.SERVING, f"serving {len(apps)} app{'s' * (len(apps) != 1)}"
        first = min(troubles, key=lambda trouble: trouble.since)
        what = "registry refuses access" if first.is_refusal else "registry unreachable"
        summary = f"degraded, {what} since {first.since:%Y-%m-%d %H:%M:%S} UTC: {first.message}"
        if len(apps) > 1:
            summary += f" ({len(troubles)} of {len(apps)} apps)"
        if full is not None:
            summary += f"; serving without caching: {full}"
        return State.DEGRADED, summary

    async def report(self, encode: Callable[[Status], bytes]) -> bytes:
        """How it is now, encoded in a thread."""
        return await trio.to_thread.run_sync(encode, await self.look(), limiter=self._thread)

    async def look(self) -> Status:
        """How it is now. Cancellation: safe; looking ends when nobody waits for it any more."""
        if self._looking is None:
            return self._without_engine()
        return await self._looking.run((), self._look)

    def _without_engine(self) -> Status:
        state, summary = self.state()
        process, failure = self._process, self._tally.failure
        return Status(
            version=VERSION,
            state=state,
            summary=summary,
            pid=os.getpid(),
            fsmount=__version__,
            mountpoint=os.fspath(mounts.resolve(self._mountpoint)),
            started=_written(self._started),
            process=ProcessStatus(os.getpid(), process.holder, process.starts, process.last_death),
            cache=None,
            apps=[],
            servers=[],
            operations=[_operation(one) for one in self._tally.operations()],
            last_error=FailureStatus(_written(failure.at), failure.message) if failure else None,
            rate_limits=[],
            layers=[],
        )

    async def _look(self) -> Status:
        engine = self._engine
        assert engine is not None
        cache, chunks = engine.config.cache, engine.layers.chunks
        stored = await trio.to_thread.run_sync(lambda: chunks.volume, limiter=self._thread)
        layers = [await self._layer(layer) for layer in engine.layers]
        return dataclasses.replace(
            self._without_engine(),
            cache=CacheStatus(
                os.fspath(cache.path),
                cache.size,
                stored,
                chunks.hits,
                chunks.misses,
                chunks.evicted,
                chunks.trouble,
            ),
            apps=[self._app(app) for app in engine.catalog.apps.values()],
            servers=[
                ServerStatus(server, asked.requests, asked.retries)
                for server, asked in sorted(engine.sources.asked().items())
            ],
            rate_limits=[
                RateStatus(server, rate.limit, rate.remaining, rate.window_seconds, rate.source)
                for server, rate in engine.sources.rate_limits().items()
            ],
            layers=layers,
        )

    def _trouble(self, app: App) -> Trouble | None:
        assert self._engine is not None
        standing = self._engine.sources.standing(app.source)
        return standing.trouble if standing is not None else None

    def _app(self, app: App) -> AppStatus:
        assert self._engine is not None
        standing = self._engine.sources.standing(app.source)
        trouble = self._trouble(app)
        return AppStatus(
            app.name,
            app.source.name,
            standing.failures if standing is not None else 0,
            _trouble_status(trouble) if trouble else None,
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


def _trouble_status(trouble: Trouble) -> TroubleStatus:
    return TroubleStatus(
        _written(trouble.at), trouble.message, trouble.is_over, _written(trouble.since), trouble.is_refusal
    )


def _operation(one: Operation) -> OperationStatus:
    return OperationStatus(one.name, sum(one.classes), round(one.seconds, 6), one.classes, one.errors)


def _written(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds")
