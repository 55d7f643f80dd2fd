"""Supply: where the bytes of one layer come from: the cache, parts of its blob, or one pass over all of it."""

import hashlib
import logging
from collections.abc import Callable
from typing import NamedTuple

from fsmount.archive.codecs import Compression
from fsmount.archive.span import Codec, Kind, Trust
from fsmount.errors import Corrupt, Invalid
from fsmount.fetch import FetchedBlob, Fetcher, RangesIgnored
from fsmount.index import VERSION, LayerIndex
from fsmount.indexing import write_index
from fsmount.lazy import NO_INDEX, OFF, SMALL, SMALL_MEMBERS, Found, LayerSpec
from fsmount.passes import BlobSource, Pass
from fsmount.policy import Indexes
from fsmount.registry.source import Source
from fsmount.streamed import Means, Streamed

log = logging.getLogger(__name__)

#: Bytes of a blob that are fetched because its maker says so.
_LARGEST_PREFETCH = 64 * 1024 * 1024
#: What an index that is written all at once may need of the disk, of nearly any layer.
_INDEX_ROOM = 32 * 1024 * 1024
#: Why Finder has a layer streamed that nobody expects to be read in parts.
_GOOD_REASONS = frozenset({SMALL, OFF, NO_INDEX, SMALL_MEMBERS})


class Opened(NamedTuple):
    """An open chunk, and where it lies in the inflated layer. The descriptor is the store's: use it before awaiting."""

    number: int
    start: int
    size: int
    descriptor: int


class Supply(Streamed):
    """A layer of which only what is asked for is fetched, if its index tells what inflates alone.

    Before a layer is streamed such an index is looked for; and the pass itself makes one where it can. Everything is
    fetched once for all who ask.
    """

    def __init__(
        self, spec: LayerSpec, source: Source, means: Means, on_void: Callable[[Corrupt, bool], None]
    ) -> None:
        super().__init__(spec, source, means, on_void)
        self._fetcher: Fetcher | None = None
        #: Whether somebody has read of the layer in this process.
        self.was_read = False

    # Chunks

    def hot(self, offset: int) -> Opened | None:
        """The chunk with that byte of the inflated layer, if it is open already and the layer complete."""
        index = self.index
        if index is None or not index.complete:
            return None
        number = index.chunk_at(offset)
        descriptor = self._means.chunks.hot(self.chunk_key(number))
        if descriptor is None:
            return None
        start, size, *_ = index.chunks[number]
        return Opened(number, start, size, descriptor)

    async def open(self, offset: int) -> Opened:
        """The chunk with that byte of the inflated layer, verified, fetched if need be."""
        while True:
            index = self.index
            if index is not None and index.complete:
                number = index.chunk_at(offset)
                start, size, *_ = index.chunks[number]
                return Opened(number, start, size, await self.open_chunk(number))
            running = self._running()
            found = await running.wait_kept(offset)
            if found is None:
                continue
            chunk = running.keep.chunks[found]
            descriptor = await self._open_kept(running, found)
            if descriptor is not None:
                return Opened(found, chunk.start, chunk.size, descriptor)
            # It went by before it was wanted, and the cache is too small to have kept it: next pass.
            await running.wait_done()

    async def open_chunk(self, number: int) -> int:
        """A descriptor of a chunk of the complete layer. Ownership: the store's; use it before awaiting."""
        voids = self._voids
        while True:
            index = self.index
            if self._voids != voids and self._void is not None:
                raise self._void.with_traceback(None)
            assert index is not None and index.complete
            key, chunk = self.chunk_key(number), index.chunks[number]
            chunks, fetcher = self._means.chunks, self.fetcher
            came = fetcher.came(number) if fetcher is not None else 0
            descriptor = chunks.hot(key)
            if descriptor is None and not self._in_doubt:
                descriptor = await self._open_stored(index, number)
            if descriptor is not None:
                return descriptor
            if index is not self._index:
                continue
            if fetcher is not None and fetcher.came(number) != came:
                continue  # while it was looked for
            if fetcher is None:
                running = self._running()
                if not self._in_doubt:
                    await running.wait_kept(chunk.start)
                    descriptor = await self._open_kept(running, number)
                    if descriptor is not None:
                        return descriptor
                await running.wait_done()
                continue
            try:
                await fetcher.bring(number)
            except (RangesIgnored, Corrupt) as error:
                if index.trust is not Trust.HINT:
                    raise
                log.warning("%s; all of it is fetched", error.message)
                self._must_stream = True
                self._in_doubt = isinstance(error, Corrupt)
            descriptor = chunks.hot(key)
            if descriptor is not None:
                return descriptor

    async def _open_stored(self, index: LayerIndex, number: int) -> int | None:
        key, sha256 = self.chunk_key(number), index.chunks[number].sha256
        chunks = self._means.chunks
        if sha256 is None and index.trust is Trust.HINT:
            sha256 = await self._means.passes.in_thread(chunks.recorded, key)
            if sha256 is None or self._hinted.setdefault(number, sha256) != sha256:
                return None
        return await chunks.open(key, sha256)

    async def _open_kept(self, running: Pass, number: int) -> int | None:
        key = running.chunk_key(number)
        descriptor = self._means.chunks.hot(key)
        if descriptor is None:
            descriptor = await self._means.chunks.open(key, running.keep.chunks[number].sha256)
        return descriptor

    # All of it

    @property
    def fetcher(self) -> Fetcher | None:
        """What fetches chunks alone; None where all of the layer has to be streamed."""
        index = self.index
        if index is None or not index.complete or not index.has_spans or self._must_stream:
            return None
        if self._fetcher is None:
            means = self._means
            prefix = f"{self.spec.key}{index.space}"
            self._fetcher = Fetcher(
                self.spec.descriptor,
                index,
                # Not chunk_key: what the fetcher still has on its way when the index changes is cut by this one.
                lambda number: f"{prefix}/{number}",
                lambda: self.source,
                means.passes,
                means.traffic,
                means.nursery,
                shown=self._hinted,
                meter=self.meter,
            )
        return self._fetcher

    @property
    def received(self) -> int:
        """Compressed bytes that came from its source in this process, by passes and by ranges."""
        return self.meter.received

    @property
    def busy(self) -> bool:
        """Whether anything of it is on its way."""
        streams = self._pass is not None and not self._pass.done
        return streams or (self._fetcher is not None and self._fetcher.busy)

    @property
    def open_index(self) -> LayerIndex | None:
        """As `index`, but one that lies on the disk is not opened for that."""
        return self._index

    async def has_room(self) -> bool:
        """Whether what is missing of the layer fits into the cache without evicting anything. Raises: as `fill`."""
        index = await self.wait_complete()
        stored = await self._stored(index)
        missing = sum(chunk.size for chunk, is_here in zip(index.chunks, stored, strict=True) if not is_here)
        return await self._means.passes.in_thread(lambda: missing <= self._means.chunks.room)

    async def fill(self, *, rate: float | None = None) -> bool:
        """Fetches what is not here yet, if the cache can hold it; a layer that was read on a hint is verified then.

        False if something is not here afterwards that could be fetched by itself: the cache does not take it now.
        rate: bytes a second, at most. Raises: Corrupt, Unreachable and other kinds of FsmountError.
        """
        index = await self.wait_complete()
        fetcher = self.fetcher
        if (
            fetcher is not None
            and fetcher.fits
            and (index.trust is not Trust.HINT or index.codec is Codec.RAW)
        ):
            await fetcher.complete(rate=rate)
        await self.wait_trusted()
        # Asked, not concluded: a chunk that the disk did not take was fetched all the same.
        return self.fetcher is None or all(await self._stored(await self.wait_complete()))

    async def _stored(self, index: LayerIndex) -> list[bool]:
        keys = [self.chunk_key(number) for number in range(len(index.chunks))]
        return await self._means.passes.in_thread(self._means.chunks.stored, keys)

    # What a layer that is streamed leaves open

    async def _find(self) -> bool:
        """Whether there is an index for the layer, which then is its own."""
        found = await self._means.finder.find(self.spec, self.source, refused=self._refused)
        if isinstance(found, str):
            self._reason = found
            if found not in _GOOD_REASONS:
                self.meter.note_whole(found)
            return False
        try:
            index = await self._means.passes.in_thread(self._write_found, found)
        except Invalid as error:
            log.warning("layer %s: its %s index: %s", self.spec.descriptor.digest, found.kind, error.message)
            self._refused.add(found.space)
            self._reason = f"its {found.kind} index is no good"
            self.meter.note_whole(self._reason)
            return False
        if index.trust is Trust.HINT and self.spec.indexes is not Indexes.ANY:
            # Somebody has asked for more than a hint meanwhile.
            index.close()
            self._remove_index()
            self._reason = OFF
            return False
        self._set_index(index)
        if found.prefetch and self.fetcher is not None and self.fetcher.fits:
            stop = min(found.prefetch, _LARGEST_PREFETCH)
            self.fetcher.prefetch([n for n, chunk in enumerate(index.chunks) if chunk.blob_stop <= stop])
        log.info("layer %s is read by its %s index", self.spec.descriptor.digest, found.kind)
        return True

    def _write_found(self, found: Found) -> LayerIndex:
        with self._new_file() as path:
            facts = self._facts(found.kind, found.trust, found.space)
            facts["compression"] = str(_COMPRESSIONS[found.table.codec])
            facts["numbering"] = _numbering(found)
            self._means.chunks.free(_INDEX_ROOM)
            write_index(path, found.table, facts)
            # Another process may have been quicker, and have more than a hint.
            known = self.load_index()
            if known is not None and known.trust is not Trust.HINT:
                return known
            return self._publish(path)

    def _set_index(self, index: LayerIndex | None) -> None:
        if self._fetcher is not None:
            self._fetcher.is_retired = True
            self._fetcher = None
        super()._set_index(index)

    def _blob(self, hint: LayerIndex) -> BlobSource:
        fetcher = self._fetcher
        # What is not compressed need not be fetched again where it is here.
        if hint.codec is Codec.RAW and fetcher is not None and not fetcher.ignored:
            return FetchedBlob(fetcher, self._means.passes)
        return self.source

    def close_index(self) -> None:
        """Frees what a complete index holds open, unless something is on its way; it opens by itself when asked."""
        if not self.busy:
            super().close_index()
            self._fetcher = None


def _numbering(found: Found) -> str:
    """LayerIndex.numbering: the same whenever the same table is found, by whichever process.

    One that has a name, or a digest, has that in its space. What was read out of the blob itself has none: a server
    may lie about it.
    """
    if found.kind not in (Kind.RANGED_FILE, Kind.RANGED_TAR):
        return f"{VERSION}{found.space}"
    members = hashlib.sha256(repr(found.table.entries).encode("utf-8", "surrogateescape"))
    return f"{VERSION}{found.space}-{members.hexdigest()[:32]}"


_COMPRESSIONS = {
    Codec.RAW: Compression.NONE,
    Codec.RESTART: Compression.GZIP,
    Codec.GZIP: Compression.GZIP,
    Codec.ZSTD: Compression.ZSTD,
}
