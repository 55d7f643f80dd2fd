"""The scenarios of reading lazily: an app that starts through a slow line, inflating alone, and making an index."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fsmount.archive.span import Kind
from fsmount.index import ROOT, LayerIndex
from scripts.bench import appimage
from scripts.bench.appimage import AppImage, Touched
from scripts.bench.bench import Bench
from scripts.bench.link import MEGABITS, linked
from scripts.bench.machine import Failed, timed
from scripts.bench.report import OURS, Ask
from scripts.bench.rivals import FLOOR, fetch_and_unpack

MB = 1e6
CHUNKS = "touched chunks"
PIECES = "touched pieces of the format"
LINE = "the line: index, touched chunks"
ISAL = "isal, raw deflate as a stream"
STREAM = "plain stream"
#: What is read after the start.
READ_ALL = "find . -type f -print0 | xargs -0 -P2 -n256 cat >/dev/null"


@dataclass(frozen=True, slots=True)
class Way:
    """One encoding of the image: its tag, how its layer is to be read, and how tar unpacks it."""

    name: str
    tag: str
    kind: Kind
    tar: str
    #: How it may be read as well: its figures say what that costs.
    otherwise: Kind | None = None

    def measure(self, what: str) -> str:
        return f"app-start, {self.name}: {what}"


WAYS = (
    Way(STREAM, appimage.GZIP, Kind.STREAMED, "tar xz"),
    Way("SOCI v1", appimage.SOCI_V1, Kind.SOCI_V1, "tar xz"),
    Way("SOCI v2", appimage.SOCI_V2, Kind.SOCI_V2, "tar xz"),
    Way("eStargz", appimage.ESTARGZ, Kind.ESTARGZ, "tar xz"),
    Way("zstd:chunked", appimage.ZSTD, Kind.ZSTD_CHUNKED, "tar x --zstd"),
    Way("plain tar", appimage.TAR, Kind.RANGED_TAR, "tar x", otherwise=Kind.STREAMED),
)
READY, WIRE, ALL = "ready, s", "ready, MB on the wire", "all read, s"
SPANS = "inflating spans, CPU s/GB"
INDEX = "index --push, s per 900 MB"


def _asks() -> Iterator[Ask]:
    for way in WAYS:
        if way.kind is not Kind.STREAMED:
            yield Ask(way.measure(READY), FLOOR, 1 / 8)
            yield Ask(way.measure(WIRE), CHUNKS, 1.5)
            # A plain tar cannot be here before a gzip layer of a third of its size.
            yield Ask(way.measure(ALL), FLOOR if way.tag == appimage.TAR else STREAM, 1.15)
    yield Ask(SPANS, ISAL, 1 / 0.8)
    yield Ask(INDEX, None, 12)


ASKS = tuple(_asks())


def app_start(bench: Bench) -> None:
    """Through 100 Mbit/s and 20 ms, from nothing: mount and read what an app reads as it starts, 5 %; then the rest.

    Peers fetch all and unpack it, then read the same. `touched chunks` are those of fsmount's index in which there
    are bytes that the app reads; the pieces of the format are what its own index would let one fetch alone.
    """
    image = _image(bench)
    read: dict[str, float] = {}
    floors: dict[str, tuple[float, float]] = {}
    for way in WAYS:

        def ours(way: Way = way) -> None:
            if way.tag in image.missing:
                raise Failed(image.missing[way.tag])
            read[way.name] = _start(bench, image, way)
            bench.record(way.measure(ALL), OURS, read[way.name])
            if STREAM in read and way.name != STREAM:
                bench.record(way.measure(ALL), STREAM, read[STREAM])

        def unpacking(way: Way = way) -> None:
            # Encodings that differ little in size share a figure: that of the one that people have.
            base = way if way.tag == appimage.TAR else WAYS[0]
            if base.tag not in floors:
                floors[base.tag] = _unpack(bench, image, base)
            seconds, megabytes = floors[base.tag]
            bench.record(way.measure(READY), FLOOR, seconds)
            bench.record(way.measure(WIRE), FLOOR, megabytes)
            if way.tag == appimage.TAR:
                bench.record(way.measure(ALL), FLOOR, seconds)

        bench.attempt(f"{OURS}, {way.name}", ours)
        bench.attempt(FLOOR, unpacking)


def spans(bench: Bench) -> None:
    """A gzip layer inflated span by span, and by isal as a stream: see spans.py."""

    def both() -> None:
        lines = timed([sys.executable, "-m", "scripts.bench.spans", "1"]).output.splitlines()
        speeds = {line[:32].strip(): float(line[32:].split()[0]) for line in lines if " MB/s " in line}
        for contender, name in ((OURS, "inflate_span, spans of 4 MiB"), (ISAL, ISAL)):
            bench.record(SPANS, contender, 1000 / speeds[name])

    bench.attempt(OURS, both)


def index(bench: Bench) -> None:
    """Build, check and publish the SOCI index of the app's layer, straight from the registry and to it."""
    image = _image(bench)

    def ours() -> None:
        source = f"{bench.registry.host}/{image.repository}:{appimage.BARE}"
        with bench.folder() as cache:
            done = timed([*bench.ours(), "index", source, "--push", "--force", "--cache", cache])
        bench.record(INDEX, OURS, done.seconds * 900e6 / image.tar_size)

    bench.attempt(OURS, ours)


def _image(bench: Bench) -> AppImage:
    return appimage.make(bench.work / "app", bench.registry.root, bench.registry.host, small=bench.small)


def _start(bench: Bench, image: AppImage, way: Way) -> float:
    """Records one start, and returns the seconds after which all was read.

    Nothing is recorded before it is known what was read, and by what. Raises: Failed.
    """
    digest, _ = image.layers[way.tag]
    config = bench.work / "app-start.toml"
    config.write_text('[defaults]\nindexes = "any"\ncomplete = "never"\n')
    with linked(bench.registry.host) as link, bench.folder() as cache:
        with bench.mounted(cache, repository=f"{link.host}/{image.repository}", config=config) as (
            point,
            mount,
        ):
            root = point / "a" / way.tag
            seconds = mount + _read_touched(root, image)
            at_ready = link.carried().down
            rest = timed(READ_ALL, cwd=root)
            if rest.read_bytes < image.content_size:
                raise Failed(f"only {rest.read_bytes / MB:.0f} of {image.content_size / MB:.0f} MB were read")
            at_end = link.carried().down
        layer = LayerIndex.open(cache / f"layers/{digest.replace(':', '-')}.sqlite")
        if layer is None or layer.kind not in (way.kind, way.otherwise):
            raise Failed(f"it was read as {layer.kind if layer else 'nothing'}, not as {way.kind}")
        if layer.kind is not way.kind:
            bench.note(f"{way.name} was read as {layer.kind}")
        bench.record(way.measure(READY), OURS, seconds)
        bench.record(way.measure(WIRE), OURS, at_ready / MB)
        bench.record(way.measure("all read, MB on the wire"), OURS, at_end / MB)
        if way.kind is not Kind.STREAMED:
            chunks, pieces = touched_bytes(layer, image.touched)
            bench.record(way.measure(WIRE), CHUNKS, chunks / MB)
            if layer.kind is not Kind.STREAMED:
                bench.record(way.measure(WIRE), PIECES, pieces / MB)
            least = (image.indexes.get(way.tag, 0) + chunks) * 8 / (MEGABITS * 1e6)
            bench.record(way.measure(READY), LINE, least)
        layer.close()
    return seconds + rest.seconds


def _unpack(bench: Bench, image: AppImage, way: Way) -> tuple[float, float]:
    """Seconds until all was fetched and unpacked and the app had read what it reads, and MB on the wire."""
    digest, _ = image.layers[way.tag]
    with linked(bench.registry.host) as link, bench.folder() as dest:
        url = f"http://{link.host}/v2/{image.repository}/blobs/{digest}"
        seconds = fetch_and_unpack([url], dest, tar=way.tar) + _read_touched(dest, image)
        return seconds, link.carried().down / MB


def _read_touched(root: Path, image: AppImage) -> float:
    """Seconds in which a program reads what the app reads. Raises: Failed, also for another content."""
    wanted = "".join(f"{one.size} {one.path}\n" for one in image.touched)
    done = timed([sys.executable, "-m", "scripts.bench.probe", "start", root], stdin=wanted)
    seconds, sha256 = done.output.split()
    if sha256 != image.sha256:
        raise Failed("the files that the app reads have not the content that they should")
    return float(seconds)


def touched_bytes(layer: LayerIndex, touched: Sequence[Touched]) -> tuple[int, int]:
    """Compressed bytes of the chunks in which these are, and of the spans, which are the pieces of the format."""
    chunks: set[int] = set()
    pieces: set[tuple[int, int]] = set()
    for one in touched:
        for start, stop in _ranges(layer, one):
            for number in range(layer.chunk_at(start), layer.chunk_at(stop - 1) + 1):
                chunks.add(number)
                at = layer.chunks[number].start
                for span in layer.spans(number):
                    if at < stop and start < at + span.size:
                        pieces.add((span.offset, span.length))
                    at += span.size
    all_chunks = layer.chunks
    return (
        sum(all_chunks[number].blob_stop - all_chunks[number].blob_start for number in chunks),
        sum(length for _, length in pieces),
    )


def _ranges(layer: LayerIndex, one: Touched) -> Iterator[tuple[int, int]]:
    """Where the first bytes of a file lie in the inflated layer."""
    number = ROOT
    for name in one.path.encode().split(b"/"):
        found = layer.name(number, name)
        if found is None or found.member is None:
            raise Failed(f"there is no {one.path} in the index")
        number = found.member.number
    content = layer.content(number)
    assert content is not None
    for extent in content[1]:
        wanted = min(extent.size, one.size - extent.file_offset)
        if wanted > 0:
            yield extent.offset, extent.offset + wanted
