"""metrics: a mount's status in the text format of Prometheus, version 0.0.4."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import NamedTuple

from fsmount.status import Status

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_UNKNOWN = "unknown"


class _Sample(NamedTuple):
    value: int
    labels: Mapping[str, str] = {}


def as_text(status: Status) -> bytes:
    """All metrics. prometheus-client would keep counters of its own; these are kept where they are counted."""
    return "".join(line + "\n" for line in _lines(status)).encode(errors="replace")


def _lines(status: Status) -> Iterator[str]:
    layers, cache = status.layers, status.cache
    read = Counter((layer.read_as or _UNKNOWN, layer.trust or _UNKNOWN) for layer in layers)
    whole = Counter(layer.whole_because for layer in layers if layer.whole_because)
    started = int(datetime.fromisoformat(status.started).timestamp())

    yield from _family("build_info", "gauge", "Always 1.", [_Sample(1, {"version": status.fsmount})])
    yield from _family("start_time_seconds", "gauge", "When the mount began.", [_Sample(started)])
    yield from _family("cache_bytes", "gauge", "Bytes of chunks in the cache.", [_Sample(cache.stored)])
    yield from _family("cache_limit_bytes", "gauge", "What they may be at most.", [_Sample(cache.limit)])
    yield from _family(
        "layers",
        "gauge",
        "Layers of the images that were looked into, by how they are read and on what trust.",
        [_Sample(count, {"read_as": kind, "trust": trust}) for (kind, trust), count in sorted(read.items())],
    )
    yield from _family(
        "layers_fetching",
        "gauge",
        "Layers of which something is on its way.",
        [_Sample(sum(layer.is_fetching for layer in layers))],
    )
    yield from _family(
        "layer_fetched_bytes_total",
        "counter",
        "Compressed bytes of layers that came from their sources.",
        [_Sample(sum(layer.fetched for layer in layers))],
    )
    yield from _family(
        "layer_spared_bytes",
        "gauge",
        "Compressed bytes of the layers that are read in parts which need not be in the cache.",
        [_Sample(sum(layer.spared or 0 for layer in layers))],
    )
    yield from _family(
        "layers_not_lazy_total",
        "counter",
        "Layers of 1 MiB or more that were fetched whole although a part should have done.",
        [_Sample(count, {"reason": reason}) for reason, count in sorted(whole.items())],
    )
    yield from _family(
        "source_failures_total",
        "counter",
        "Questions that the source of an app has not answered, or refused.",
        [_Sample(app.failures, {"app": app.name}) for app in status.apps],
    )
    yield from _family(
        "source_up",
        "gauge",
        "Whether the source of an app answered when it was last asked.",
        [_Sample(app.trouble is None or app.trouble.is_over, {"app": app.name}) for app in status.apps],
    )
    yield from _family(
        "pulls_remaining",
        "gauge",
        "Pulls that a server has left us.",
        [_Sample(rate.remaining, {"server": rate.server}) for rate in status.rate_limits],
    )


def _family(name: str, kind: str, meaning: str, samples: Iterable[_Sample]) -> Iterator[str]:
    """The lines of one metric: https://prometheus.io/docs/instrumenting/exposition_formats/."""
    yield f"# HELP fsmount_{name} {meaning}"
    yield f"# TYPE fsmount_{name} {kind}"
    for value, labels in samples:
        shown = ",".join(f'{label}="{_escape(text)}"' for label, text in labels.items())
        yield f"fsmount_{name}{f'{{{shown}}}' if shown else ''} {int(value)}"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
