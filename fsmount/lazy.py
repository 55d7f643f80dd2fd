"""lazy: whether a layer can be read by parts, and by what: its own table of contents, a SOCI index, or its tar."""

import logging
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import trio

from fsmount.archive import estargz, zstdchunked
from fsmount.archive.entry import Entry, EntryType, Extent
from fsmount.archive.span import Codec, Kind, Span, Table, Trust
from fsmount.archive.ztoc import read_ztoc
from fsmount.errors import Corrupt, FsmountError, Invalid
from fsmount.oci import soci
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor
from fsmount.policy import Indexes
from fsmount.registry.source import Source, check
from fsmount.tarwalk import walk_tar

log = logging.getLogger(__name__)

# Why a layer is streamed, as clauses for people.
SMALL = "it is small"
OFF = "indexes are off"
NO_INDEX = "it has no index"
SMALL_MEMBERS = "finding the headers of its small members costs more"
#: This one, and those of indexes that are no good, should not be.
RANGES_IGNORED = "the server sends all of it where a part is asked for"

#: Layers of fewer bytes are fetched whole: that is one request, and no more than an index of them would be.
_WORTHWHILE = 1024 * 1024
#: Ranges of what is not compressed.
_RAW_SPAN = 1024 * 1024
#: Bytes at the end of a blob among which its table of contents usually is.
_TAIL = 1024 * 1024
#: Seconds for which it is remembered what SOCI indexes there are for an image.
_REMEMBERED_SECONDS = 60


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What a manifest says about one layer.

    `title` is set when the layer is one plain file of that path, as `oras push` makes them; `diff_id` when
    the image's configuration names the digest of the inflated layer. `image` is the manifest, which may have
    referrers, and `soci_index` the SOCI index that it names; `indexes`, by which the layer may be read.
    """

    descriptor: Descriptor
    title: bytes | None = None
    diff_id: Digest | None = None
    image: Digest | None = None
    soci_index: Digest | None = None
    indexes: Indexes = Indexes.ANY

    @property
    def key(self) -> str:
        """Names the layer in the cache: the digest, and the title for a plain file."""
        digest = self.descriptor.digest
        key = f"{digest.algorithm}-{digest.hex}"
        return key if self.title is None else f"{key}-{Digest.of(self.title).hex[:16]}"


@dataclass(frozen=True, slots=True)
class Found:
    """By what a layer can be read. `space` tells the cuts of this table from those of any other of the layer.

    The first `prefetch` bytes of the blob are worth fetching before the first read.
    """

    table: Table
    kind: Kind
    trust: Trust
    space: str
    prefetch: int = 0


class _WholeBlob(FsmountError):
    """The server answers a range with all of the blob."""


class Finder:
    """Looks for the index of a layer, the best kind first; of one that is no good it says so, and tries the next."""

    def __init__(self, max_layer_size: int | None) -> None:
        """max_layer_size: inflated, in bytes; None for 64 times the compressed size, and 1 GiB."""
        self._max_layer_size = max_layer_size
        self._soci: dict[tuple[str, Digest], tuple[float, list[soci.SociIndex]]] = {}

    async def find(self, spec: LayerSpec, source: Source, *, refused: Collection[str]) -> Found | str:
        """What the layer can be read by, or why it has to be streamed. refused: spaces that turned out to lie.

        Raises: Unreachable and its kinds.
        """
        descriptor = spec.descriptor
        if descriptor.size < _WORTHWHILE:
            return SMALL
        if spec.indexes is Indexes.OFF:
            return OFF
        reason = NO_INDEX
        for kind, attempt in self._attempts(spec):
            try:
                found = await attempt(spec, source)
            except _WholeBlob as error:
                log.warning("%s: it cannot be read lazily", error.message)
                return RANGES_IGNORED
            except FsmountError as error:
                if error.transient:
                    raise
                extra = {"layer": descriptor.digest}
                log.warning(
                    "layer %s is not read as %s: %s", descriptor.digest, kind, error.message, extra=extra
                )
                reason = f"its {kind} index is no good"
                continue
            if isinstance(found, str):
                reason = found
            elif found is not None and found.space not in refused:
                return found
            elif found is not None:
                reason = f"its {kind} index was not to be trusted"
        return reason

    def _attempts(self, spec: LayerSpec) -> Iterator[tuple[Kind, "_Attempt"]]:
        """What might be, by what the manifest says."""
        descriptor = spec.descriptor
        hints = spec.indexes is Indexes.ANY
        size = descriptor.size
        if spec.title is not None:
            if hints and size <= self._most(descriptor):
                yield Kind.RANGED_FILE, self._ranged_file
            return
        if any(f"{prefix}manifest-checksum" in descriptor.annotations for prefix in zstdchunked.PREFIXES):
            yield Kind.ZSTD_CHUNKED, self._zstd_chunked
        if estargz.TOC_DIGEST in descriptor.annotations:
            yield Kind.ESTARGZ, self._estargz
        if size >= soci.MIN_LAYER_SIZE:
            if spec.soci_index is not None:
                yield Kind.SOCI_V2, self._soci_v2
            if hints and spec.image is not None:
                yield Kind.SOCI_V1, self._soci_v1
        if hints and descriptor.media_type.endswith((".tar", "+tar")) and size <= self._most(descriptor):
            yield Kind.RANGED_TAR, self._ranged_tar

    def _most(self, descriptor: Descriptor) -> int:
        return self._max_layer_size or 64 * descriptor.size + 2**30

    # What is not compressed

    async def _ranged_file(self, spec: LayerSpec, source: Source) -> Found:
        size = spec.descriptor.size
        assert spec.title is not None
        # The first byte shows whether the server has ranges at all.
        await _read(source, spec.descriptor, 0, 1)
        entry = Entry(spec.title, EntryType.FILE, mode=0o644, size=size, extents=(Extent(0, 0, size),))
        return Found(Table(Codec.RAW, [entry], _raw_spans(size)), Kind.RANGED_FILE, Trust.HINT, "-raw")

    async def _ranged_tar(self, spec: LayerSpec, source: Source) -> Found | str:
        size = spec.descriptor.size
        entries = await walk_tar(lambda start, stop: _read(source, spec.descriptor, start, stop), size)
        if entries is None:
            return SMALL_MEMBERS
        return Found(Table(Codec.RAW, entries, _raw_spans(size)), Kind.RANGED_TAR, Trust.HINT, "-raw")

    # SOCI

    async def _soci_v2(self, spec: LayerSpec, source: Source) -> Found | None:
        assert spec.soci_index is not None and spec.image is not None
        data, _ = await source.manifest(spec.soci_index)
        index = soci.parse_index(data, image=spec.image)
        return await self._soci_table(spec, source, [index], Kind.SOCI_V2, Trust.BOUND)

    async def _soci_v1(self, spec: LayerSpec, source: Source) -> Found | None:
        assert spec.image is not None
        indexes = await self._referring(spec.image, source)
        return await self._soci_table(spec, source, indexes, Kind.SOCI_V1, Trust.HINT)

    async def _referring(self, image: Digest, source: Source) -> list[soci.SociIndex]:
        """The SOCI indexes that refer to an image; remembered for its other layers."""
        key = source.name, image
        until, indexes = self._soci.get(key, (0.0, []))
        if trio.current_time() < until:
            return indexes
        indexes = []
        for descriptor in await self._referrers(image, source):
            try:
                data, _ = await source.manifest(descriptor.digest)
                indexes.append(soci.parse_index(data, image=image))
            except FsmountError as error:
                if error.transient:
                    raise
                log.warning(
                    "%s: SOCI index %s is not read: %s", source.name, descriptor.digest, error.message
                )
        self._soci = {key: kept for key, kept in self._soci.items() if trio.current_time() < kept[0]}
        self._soci[key] = trio.current_time() + _REMEMBERED_SECONDS, indexes
        return indexes

    async def _referrers(self, image: Digest, source: Source) -> list[Descriptor]:
        try:
            return await source.referrers(image, soci.INDEX_V1)
        except FsmountError as error:
            # A registry may not let everybody list them, or trip over the question; the image is there all the same.
            log.warning("%s: whether there is a SOCI index is not known: %s", source.name, error.message)
            return []

    async def _soci_table(
        self, spec: LayerSpec, source: Source, indexes: list[soci.SociIndex], kind: Kind, trust: Trust
    ) -> Found | None:
        descriptor = spec.descriptor
        for index in indexes:
            ztoc = index.ztocs.get(descriptor.digest)
            if ztoc is not None:
                data = await _verified(source, ztoc)
                read = partial(read_ztoc, data, blob_size=descriptor.size, max_size=self._most(descriptor))
                table = await trio.to_thread.run_sync(read)
                return Found(table, kind, trust, f"-soci-{ztoc.digest.hex[:16]}")
        return None

    # Tables of contents in the blob itself

    async def _estargz(self, spec: LayerSpec, source: Source) -> Found | None:
        descriptor = spec.descriptor
        digest = estargz.toc_digest(descriptor.annotations)
        if digest is None:
            return None
        tail = await _read_tail(source, descriptor)
        start, stop = estargz.toc_range(tail, descriptor.size)
        data = await _read_near(source, descriptor, start, stop, tail)
        read = partial(
            estargz.read_toc, data, toc_offset=start, digest=digest, max_size=self._most(descriptor)
        )
        toc = await trio.to_thread.run_sync(read)
        return Found(toc.table, Kind.ESTARGZ, Trust.BOUND, f"-estargz-{digest.hex()[:16]}", toc.prefetch)

    async def _zstd_chunked(self, spec: LayerSpec, source: Source) -> Found | None:
        descriptor = spec.descriptor
        mark = zstdchunked.read_mark(descriptor.annotations, descriptor.size)
        if mark is None:
            return None
        tail = b""
        position = mark.position
        if position is None:
            tail = await _read_tail(source, descriptor)
            position = zstdchunked.find_position(tail, descriptor.size)
        data = await _read_near(source, descriptor, position.offset, position.stop, tail)
        most = self._most(descriptor)
        read = partial(zstdchunked.read_toc, data, position, checksum=mark.checksum, max_size=most)
        toc = await trio.to_thread.run_sync(read)
        return Found(
            toc.table, Kind.ZSTD_CHUNKED, Trust.BOUND, f"-zstd-{mark.checksum.hex()[:16]}", toc.prefetch
        )


#: Finds the table, says why there is none, or finds nothing.
_Attempt: TypeAlias = Callable[[LayerSpec, Source], Awaitable[Found | str | None]]


def _raw_spans(size: int) -> list[Span]:
    return [
        Span(start, min(_RAW_SPAN, size - start), min(_RAW_SPAN, size - start))
        for start in range(0, size, _RAW_SPAN)
    ]


async def _read(source: Source, descriptor: Descriptor, start: int, stop: int) -> bytes:
    """A range of a blob, not verified. Raises: _WholeBlob, Corrupt, and what the source raises."""
    async with source.blob(descriptor, start=start, stop=stop) as pieces:
        if (pieces.offset, pieces.stop) != (start, stop):
            raise _WholeBlob(
                f"{source.name} sends all of layer {descriptor.digest} where a part is asked for"
            )
        data = b"".join([piece async for piece in pieces])
    if len(data) != stop - start:
        raise Corrupt(f"layer {descriptor.digest} ends before byte {stop}")
    return data


async def _read_tail(source: Source, descriptor: Descriptor) -> bytes:
    """The end of a blob. As `_read`."""
    return await _read(source, descriptor, max(0, descriptor.size - _TAIL), descriptor.size)


async def _read_near(source: Source, descriptor: Descriptor, start: int, stop: int, tail: bytes) -> bytes:
    """As `_read`, for what may be in the blob's end already, or partly so."""
    before = descriptor.size - len(tail)
    if stop <= before:
        return await _read(source, descriptor, start, stop)
    head = await _read(source, descriptor, start, before) if start < before else b""
    return head + tail[max(start - before, 0) : stop - before]


async def _verified(source: Source, descriptor: Descriptor) -> bytes:
    """A blob of tens of megabytes, checked. Raises: Invalid (too large), Corrupt, and what the source raises."""
    if descriptor.size > soci.MAX_ZTOC_SIZE:
        raise Invalid(
            f"blob {descriptor.digest} has {descriptor.size} bytes: expected at most {soci.MAX_ZTOC_SIZE}"
        )
    async with source.blob(descriptor) as pieces:
        data = b"".join([piece async for piece in pieces])
    check(data, descriptor.digest, f"blob {descriptor.digest} of {source.name}")
    return data
