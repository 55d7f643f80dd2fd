"""metrics: a mount's status in the text format of Prometheus, version 0.0.4, and as a file for node_exporter."""

import logging
import os
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import trio

from fsmount.errors import FsmountError
from fsmount.fuse.tally import BOUNDS
from fsmount.singleflight import in_background
from fsmount.status.report import OperationStatus, State, Status

log = logging.getLogger(__name__)

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_UNKNOWN = "unknown"
#: As often as Prometheus asks by default.
_EVERY_SECONDS = 15.0


class _Sample(NamedTuple):
    value: float
    labels: Mapping[str, str] = {}
    #: Of the name, as the parts of a histogram have it.
    suffix: str = ""


class _Family(NamedTuple):
    """One metric: https://prometheus.io/docs/instrumenting/exposition_formats/."""

    name: str
    kind: str
    meaning: str
    samples: Iterable[_Sample]


def as_text(status: Status) -> bytes:
    """All metrics. prometheus-client would keep counters of its own; these are kept where they are counted.

    Each has the mount point as a label: the files of several mounts are read as one by node_exporter.
    """
    lines: list[str] = []
    for name, kind, meaning, samples in _families(status):
        lines += [f"# HELP fsmount_{name} {meaning}", f"# TYPE fsmount_{name} {kind}"]
        for value, labels, suffix in samples:
            named = {"mountpoint": status.mountpoint, **labels}
            shown = ",".join(f'{label}="{_escape(text)}"' for label, text in named.items())
            lines.append(f"fsmount_{name}{suffix}{{{shown}}} {_number(value)}")
    return "".join(line + "\n" for line in lines).encode(errors="replace")


def _families(status: Status) -> Iterator[_Family]:
    yield from _of_the_process(status)
    yield from _of_operations(status.operations)
    yield from _of_content(status)
    yield from _of_sources(status)


def _of_the_process(status: Status) -> Iterator[_Family]:
    yield _Family("build_info", "gauge", "Always 1.", [_Sample(1, {"version": status.fsmount})])
    yield _Family(
        "start_time_seconds", "gauge", "When the process began.", [_Sample(_seconds(status.started))]
    )
    yield _Family(
        "worker_restarts_total",
        "counter",
        "Processes that have served the mount before this one, without its being unmounted.",
        [_Sample(status.process.starts - 1)],
    )
    yield _Family(
        "state",
        "gauge",
        "How the mount is: 1 for the one state that applies.",
        [_Sample(status.state is state, {"state": state}) for state in State],
    )
    error = status.last_error
    yield _Family(
        "last_error_timestamp_seconds",
        "gauge",
        "When a request was last answered with an error that should not be.",
        [_Sample(_seconds(error.at))] if error else [],
    )


def _of_operations(operations: Iterable[OperationStatus]) -> Iterator[_Family]:
    yield _Family(
        "operation_duration_seconds",
        "histogram",
        "How long requests of the kernel took, from when they were taken until they were answered.",
        [sample for operation in operations for sample in _histogram(operation)],
    )
    yield _Family(
        "operation_errors_total",
        "counter",
        "Requests of the kernel that were answered with an errno; a name that does not exist is none.",
        [
            _Sample(count, {"operation": operation.name, "errno": code})
            for operation in operations
            for code, count in sorted(operation.errors.items())
        ],
    )


def _histogram(operation: OperationStatus) -> Iterator[_Sample]:
    labels = {"operation": operation.name}
    bounds = [f"{bound:g}" for bound in BOUNDS] + ["+Inf"]
    for bound, count in zip(bounds, accumulate(operation.classes), strict=True):
        yield _Sample(count, {**labels, "le": bound}, "_bucket")
    yield _Sample(operation.seconds, labels, "_sum")
    yield _Sample(operation.count, labels, "_count")


def _of_content(status: Status) -> Iterator[_Family]:
    layers, cache = status.layers, status.cache
    read = Counter((layer.read_as or _UNKNOWN, layer.trust or _UNKNOWN) for layer in layers)
    whole = Counter(layer.whole_because for layer in layers if layer.whole_because)

    yield _Family(
        "cache_bytes", "gauge", "Bytes of chunks in the cache.", [_Sample(cache.stored)] if cache else []
    )
    yield _Family(
        "cache_limit_bytes", "gauge", "What they may be at most.", [_Sample(cache.limit)] if cache else []
    )
    yield _Family(
        "cache_up",
        "gauge",
        "Whether chunks can be stored; if not, what is read is fetched each time.",
        [_Sample(cache.trouble is None)] if cache else [],
    )
    yield _Family(
        "cache_hits_total",
        "counter",
        "Chunks that were in the cache when they were to be read; those that are open are not looked for.",
        [_Sample(cache.hits)] if cache else [],
    )
    yield _Family(
        "cache_misses_total", "counter", "Chunks that were not.", [_Sample(cache.misses)] if cache else []
    )
    yield _Family(
        "cache_evictions_total",
        "counter",
        "Chunks that were removed to make room for others.",
        [_Sample(cache.evictions)] if cache else [],
    )
    yield _Family(
        "layers",
        "gauge",
        "Layers of the images that were looked into, by how they are read and on what trust.",
        [_Sample(count, {"read_as": kind, "trust": trust}) for (kind, trust), count in sorted(read.items())],
    )
    yield _Family(
        "layers_fetching",
        "gauge",
        "Layers of which something is on its way.",
        [_Sample(sum(layer.is_fetching for layer in layers))],
    )
    yield _Family(
        "layer_fetched_bytes_total",
        "counter",
        "Compressed bytes of layers that came from their sources.",
        [_Sample(sum(layer.fetched for layer in layers))],
    )
    yield _Family(
        "layer_spared_bytes",
        "gauge",
        "Compressed bytes of the layers that are read in parts which need not be in the cache.",
        [_Sample(sum(layer.spared or 0 for layer in layers))],
    )
    yield _Family(
        "layers_not_lazy_total",
        "counter",
        "Layers of 1 MiB or more that were fetched whole although a part should have done.",
        [_Sample(count, {"reason": reason}) for reason, count in sorted(whole.items())],
    )


def _of_sources(status: Status) -> Iterator[_Family]:
    yield _Family(
        "fetches_total",
        "counter",
        "Requests that a server was sent, further tries included, and tokens and redirects not.",
        [_Sample(server.requests, {"server": server.server}) for server in status.servers],
    )
    yield _Family(
        "fetch_retries_total",
        "counter",
        "Those that were a further try.",
        [_Sample(server.retries, {"server": server.server}) for server in status.servers],
    )
    yield _Family(
        "source_failures_total",
        "counter",
        "Questions that the source of an app has not answered, or refused.",
        [_Sample(app.failures, {"app": app.name}) for app in status.apps],
    )
    yield _Family(
        "source_up",
        "gauge",
        "Whether the source of an app answered when it was last asked.",
        [_Sample(app.trouble is None or app.trouble.is_over, {"app": app.name}) for app in status.apps],
    )
    yield _Family(
        "pulls_remaining",
        "gauge",
        "Pulls that a server has left us.",
        [_Sample(rate.remaining, {"server": rate.server}) for rate in status.rate_limits],
    )


def _seconds(written: str) -> float:
    return datetime.fromisoformat(written).timestamp()


def _number(value: float) -> str:
    return repr(value) if isinstance(value, float) else str(int(value))


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


# -------------------- as a file


async def write_textfile(path: Path, make: Callable[[], Awaitable[bytes]]) -> None:
    """Writes what make says to path, for ever, as the textfile collector of node_exporter wants it: whole or not.

    While it cannot be written, the log says so once. Cancellation: the file goes, if it is still the one from here.
    """
    await in_background(f"writing the metrics to {path}", partial(_write_for_ever, path, make))


async def _write_for_ever(path: Path, make: Callable[[], Awaitable[bytes]]) -> None:
    thread = trio.CapacityLimiter(1)
    written: os.stat_result | None = None
    is_failing = False
    try:
        while True:
            try:
                content = await make()
                written = await trio.to_thread.run_sync(_replace, path, content, limiter=thread)
                is_failing = False
            except (OSError, FsmountError) as error:
                if not is_failing:
                    reason = error.strerror if isinstance(error, OSError) else error.message
                    log.warning("the metrics cannot be written to %s: %s", path, reason)
                is_failing = True
            await trio.sleep(_EVERY_SECONDS)
    finally:
        # What is said of a mount that is gone would be believed for ever.
        if written is not None:
            _remove(path, written)


def _replace(path: Path, content: bytes) -> os.stat_result:
    """Of the file that is there then. Blocks on the disk. Raises: OSError.

    The folder may be another user's, and this root: no link in it is followed, and no name in it can be foreseen.
    """
    # node_exporter looks at names that end in .prom.
    partial = f".{path.name}.{secrets.token_hex(8)}"
    with _opened(path.parent) as folder:
        descriptor = os.open(
            partial, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=folder
        )
        try:
            with open(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o644)  # its reader is another user
                file.write(content)
                status = os.fstat(descriptor)
            os.rename(partial, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            with suppress(FileNotFoundError):
                os.unlink(partial, dir_fd=folder)
            raise
    return status


def _remove(path: Path, written: os.stat_result) -> None:
    with suppress(OSError), _opened(path.parent) as folder:
        if os.path.samestat(written, os.stat(path.name, dir_fd=folder, follow_symlinks=False)):
            os.unlink(path.name, dir_fd=folder)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """Raises: OSError."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
