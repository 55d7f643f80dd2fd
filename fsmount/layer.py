"""Layer: one layer of an image as its readers see it: its bytes are here, on their way, or still to be fetched."""

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import trio

from fsmount.archive.entry import Extent
from fsmount.archive.scan import TarScanner
from fsmount.cache.chunks import ChunkStore
from fsmount.cache.folder import CacheFolder, disk_errors, publish
from fsmount.cache.numbers import Numbers
from fsmount.errors import Corrupt, FsmountError, Invalid, NotFound
from fsmount.index import Chunk, IndexBuilder, LayerIndex
from fsmount.ingest import CHUNK_SIZE, Keep, OneFile
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor
from fsmount.passes import Pass, Passes
from fsmount.registry.source import Source

log = logging.getLogger(__name__)

#: Seconds during which a layer that was found corrupt is not downloaded again.
_CONDEMNED_SECONDS = 60


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What a manifest says about one layer.

    `title` is set when the layer is one plain file of that path, as `oras push` makes them; `diff_id` when
    the image's configuration names the digest of the inflated layer.
    """

    descriptor: Descriptor
    title: bytes | None = None
    diff_id: Digest | None = None

    @property
    def key(self) -> str:
        """Names the layer in the cache: the digest, and the title for a plain file."""
        digest = self.descriptor.digest
        key = f"{digest.algorithm}-{digest.hex}"
        return key if self.title is None else f"{key}-{Digest.of(self.title).hex[:16]}"


class Piece(NamedTuple):
    """`size` bytes of a file at `file_offset`, found at `offset` of a chunk."""

    file_offset: int
    chunk: int
    offset: int
    size: int


class Layer:
    """A layer behind its index; reading fetches what is missing, once for all readers.

    A layer without an index is streamed whole, one time: that pass makes the index, caches the chunks and
    verifies the layer's digest at its end. What has gone by can be read meanwhile. If the digest turns out
    wrong, everything of the pass is dropped and the layer gets a new number, so that neither the cache nor
    the kernel keeps a byte of it.
    """

    def __init__(self, spec: LayerSpec, source: Source, layers: "Layers") -> None:
        self.spec = spec
        self.key = spec.key
        self.source = source
        self.number = layers.numbers.layer(self.key)
        self._layers = layers
        self._pass: Pass | None = None
        self._index: LayerIndex | None = None
        self._looked = False
        self._condemned: tuple[float, Corrupt] | None = None
        #: What images say of the inflated layer; one that is right suffices.
        self._expected: set[str] = set()
        #: The sha256 of chunks that readers were shown by passes which broke off, and which nobody has certified.
        self._shown: dict[int, bytes] = {}

    def expect(self, diff_id: Digest | None) -> None:
        """Takes what an image's configuration says about the inflated layer; checked now, or at the pass's end.

        Raises: Corrupt.
        """
        if diff_id is not None and diff_id.algorithm == "sha256":
            self._expected.add(str(diff_id))
            self.check(diff_id)

    def check(self, diff_id: Digest | None) -> None:
        """Raises: Corrupt, if the layer is complete and inflates to something else than an image says."""
        if diff_id is not None and diff_id.algorithm == "sha256" and self.complete:
            assert self.index is not None
            self._compare(self.index.diff_id, str(diff_id))

    def _compare(self, found: str, expected: str) -> None:
        if found != expected:
            raise Corrupt(
                f"layer {self.spec.descriptor.digest}: inflated it is {found}, but the image's configuration"
                f" says {expected}",
                remedy="Whoever made the image broke it; build and push it again.",
            )

    @property
    def index(self) -> LayerIndex | None:
        """The index: complete, of what has streamed so far, or None before the first byte."""
        if self._index is None and not self._looked:
            self._looked = True
            self._index = self._layers.load_index(self.key)
        return self._index

    @property
    def received(self) -> int:
        """Compressed bytes that the pass under way, or the last one, has received."""
        return self._pass.received if self._pass is not None else 0

    @property
    def complete(self) -> bool:
        index = self.index
        return index is not None and index.complete

    def close_index(self) -> None:
        """Frees what a complete index holds open; it opens by itself when it is asked again."""
        if self._index is not None and self._index.complete:
            self._index.close()
            self._index = None
            self._looked = False

    @property
    def index_path(self) -> Path:
        """The file of the complete index."""
        return self._layers.index_path(self.key)

    def reopen_index(self) -> LayerIndex:
        """Another connection to the complete index, for another thread. Ownership: the caller closes it."""
        index = self._layers.load_index(self.key)
        if index is None:
            raise FsmountError(
                f"the index of layer {self.spec.descriptor.digest} has vanished from the cache"
            )
        return index

    async def wait_complete(self) -> LayerIndex:
        """The complete index, streaming the layer if need be. Raises: what the pass raised."""
        while (index := self.index) is None or not index.complete:
            try:
                await self._running().wait_done()
            except Corrupt:
                if self._condemned is not None:
                    raise
                # It was a mirror's doing: the next pass asks the others. Nobody here has read anything.
        return index

    async def wait_progress(self) -> None:
        """Returns when more of the layer is known than now. Raises: what the pass raised."""
        if not self.complete:
            await self._running().wait_step()

    def read_hot(self, member: int, offset: int, size: int) -> bytes | None:
        """As `read`, if that takes no waiting: the bytes lie in one recent chunk. Else None."""
        index = self.index
        content = index.content(member) if index is not None and index.complete else None
        if content is None:
            return None
        logical_size, extents = content
        size = min(size, logical_size - offset)
        if size <= 0:
            return b""
        if len(extents) > 1 or extents[0].size != logical_size:
            return None
        start = extents[0].offset + offset
        number, chunk_start, length = self._locate(start)
        if start + size > chunk_start + length:
            return None
        descriptor = self._layers.chunks.hot(self._chunk_key(number))
        if descriptor is None:
            return None
        data = os.pread(descriptor, size, start - chunk_start)
        return data if len(data) == size else None

    async def read(self, member: int, offset: int, size: int) -> bytes:
        """size bytes of a member's content from offset, fewer only at its end.

        Raises: NotFound (no such member), Corrupt, Unreachable and other kinds of FsmountError.
        Cancellation: safe; what is being fetched goes on for other readers.
        """
        while True:
            index = self.index
            content = index.content(member) if index is not None else None
            if content is not None:
                break
            if index is not None and index.complete:
                raise NotFound(f"layer {self.spec.descriptor.digest} has no member {member}")
            # Found in a pass that broke off: the next one shows it under the same number.
            await self.wait_progress()
        logical_size, extents = content
        stop = min(offset + size, logical_size)
        if stop <= offset:
            return b""
        if len(extents) == 1 and extents[0].size == logical_size:  # all but sparse files
            return await self.read_stream(extents[0].offset + offset, stop - offset)
        result = bytearray(stop - offset)
        for extent in extents:
            start = max(extent.file_offset, offset)
            end = min(extent.file_offset + extent.size, stop)
            if start < end:
                data = await self.read_stream(extent.offset + start - extent.file_offset, end - start)
                result[start - offset : end - offset] = data
        return bytes(result)

    async def read_stream(self, offset: int, size: int) -> bytes:
        """size bytes of the inflated layer from offset; all of them. As `read`."""
        pieces: list[bytes] = []
        while size > 0:
            number, start, length = self._locate(offset)
            take = min(size, start + length - offset)
            descriptor = self._layers.chunks.hot(self._chunk_key(number))
            if descriptor is None:
                descriptor = await self.open_chunk(number)
            if offset == start:
                self._read_ahead(number, descriptor)
            piece = os.pread(descriptor, take, offset - start)
            if len(piece) != take:
                # Cut short on disk since it was opened.
                await self._layers.chunks.drop([self._chunk_key(number)])
                continue
            pieces.append(piece)
            offset += take
            size -= take
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_ahead(self, number: int, descriptor: int) -> None:
        """Has the disk bring a chunk that is read from its beginning, and the next one if that is open."""
        following = self._layers.chunks.hot(self._chunk_key(number + 1))
        for opened in (descriptor, following):
            if opened is not None:
                os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_WILLNEED)

    def pieces(self, extents: Iterable[Extent]) -> Iterator[Piece]:
        """Where the bytes of a file lie in the chunks of the complete layer."""
        for extent in extents:
            file_offset, offset, left = extent
            while left > 0:
                number, start, length = self._locate(offset)
                size = min(left, start + length - offset)
                yield Piece(file_offset, number, offset - start, size)
                file_offset += size
                offset += size
                left -= size

    def _locate(self, offset: int) -> tuple[int, int, int]:
        index = self.index
        if index is not None and index.complete:
            number = index.chunk_at(offset)
            chunk = index.chunks[number]
            return number, chunk.start, chunk.size
        number = offset // CHUNK_SIZE
        return number, number * CHUNK_SIZE, CHUNK_SIZE

    def _chunk_key(self, number: int) -> str:
        return f"{self.key}/{number}"

    async def open_chunk(self, number: int) -> int:
        """A descriptor of the chunk, verified, fetched if need be. Ownership: the store's; use it before awaiting."""
        key = self._chunk_key(number)
        chunks = self._layers.chunks
        index = self.index
        if index is not None and index.complete:
            descriptor = await chunks.open(key, index.chunks[number].sha256)
            if descriptor is not None:
                return descriptor
        while True:
            running = self._running()
            running.wanted.add(number)
            await running.wait_kept(number)
            descriptor = chunks.hot(key)
            if descriptor is None:
                descriptor = await chunks.open(key, running.keep.chunks[number].sha256)
            if descriptor is not None:
                return descriptor
            # It went by before it was wanted, and the cache is too small to have kept it: next pass.
            await running.wait_done()

    def cached_chunks(self) -> int:
        """How many chunks are in the cache. Blocks on the disk, briefly."""
        index = self.index
        count = len(index.chunks) if index is not None else 0
        return self._layers.chunks.stored([self._chunk_key(number) for number in range(count)])

    def _running(self) -> Pass:
        """The pass under way, or a new one."""
        if self._condemned is not None:
            until, error = self._condemned
            if trio.current_time() < until:
                raise error.with_traceback(None)
        if self._pass is None or self._pass.done:
            self._pass = Pass(
                self._layers.passes,
                self.spec.descriptor,
                chunk_key=self._chunk_key,
                known=self.index if self.complete else None,
                is_file=self.spec.title is not None,
            )
            self._layers.nursery.start_soon(self._run, self._pass)
        return self._pass

    async def _run(self, running: Pass) -> None:
        """One pass; its outcome goes to whoever waits for it, and only Cancelled leaves here."""
        try:
            async with self._layers.passes.place(self.source):
                await (self._fetch_again(running) if running.known else self._make_index(running))
        except FsmountError as error:
            running.error = error
        except Exception as error:
            log.exception("streaming layer %s failed in a way nobody foresaw", self.spec.descriptor.digest)
            running.error = FsmountError(
                f"layer {self.spec.descriptor.digest} failed: {type(error).__name__}: {error}"
            )
        finally:
            running.done = True
            running.step()

    async def _fetch_again(self, running: Pass) -> None:
        """For chunks that were evicted: each is checked as it comes."""
        try:
            await running.stream(self.source, None)
        except Corrupt:
            self.source.distrust(self.spec.descriptor)
            raise

    async def _make_index(self, running: Pass) -> None:
        with disk_errors(self._layers.folder.layers):
            handle, name = tempfile.mkstemp(prefix=".partial-", dir=self._layers.folder.layers)
            os.close(handle)
        with disk_errors(self._layers.folder.layers):
            builder = IndexBuilder(Path(name))
        self._index = builder.index
        running.keep = Keep(None, builder)
        finished = None
        try:
            title = self.spec.title
            scanner = TarScanner() if title is None else OneFile(title)
            inflate = await running.stream(self.source, scanner)
            try:
                diff_id = running.keep.finish()
            except Invalid as error:
                digest = self.spec.descriptor.digest
                raise Invalid(f"layer {digest}: {error.message}", remedy=error.remedy) from error
            if self._expected and str(diff_id) not in self._expected:
                self._compare(str(diff_id), min(self._expected))
            facts: dict[str, object] = {
                "digest": str(self.spec.descriptor.digest),
                "diff_id": str(diff_id),
                "compression": str(inflate.compression),
                "blob_size": self.spec.descriptor.size,
            }
            finished = await self._layers.passes.in_thread(self._publish, builder, running.keep, facts)
            self._compare_with_shown(running.keep.chunks, is_certified=True)
        except Corrupt as error:
            self._condemn(error)
            raise
        except BaseException:
            self._compare_with_shown(running.keep.chunks, is_certified=False)
            raise
        finally:
            self._index = finished
            builder.close()
            if finished is None:
                Path(name).unlink(missing_ok=True)
                keys = [self._chunk_key(number) for number in range(running.kept + 1)]
                with trio.move_on_after(10, shield=True):
                    await self._layers.chunks.drop(keys)

    def _compare_with_shown(self, chunks: Sequence[Chunk], *, is_certified: bool) -> None:
        """Gives the layer a new number if an earlier pass, which broke off, showed other bytes than this one.

        The kernel keeps what it was shown, by that number.
        """
        found = {number: chunk.sha256 for number, chunk in enumerate(chunks)}
        if any(found.get(number, sha256) != sha256 for number, sha256 in self._shown.items()):
            error = Corrupt(
                f"layer {self.spec.descriptor.digest}: what was read of it before has changed since"
            )
            log.error("%s; it came from %s", error.message, self.source.name)
            self._layers.renumber(self, error)
            self._shown = {}
        self._shown = {} if is_certified else self._shown | found

    def _publish(self, builder: IndexBuilder, keep: Keep, facts: dict[str, object]) -> LayerIndex:
        path = self._layers.index_path(self.key)
        with disk_errors(path):
            builder.finish(keep.chunks, facts)
            publish(builder.path, path)
        index = LayerIndex.open(path)
        assert index is not None
        return index

    def _condemn(self, error: Corrupt) -> None:
        log.info("%s; it came from %s, and nothing of it is kept", error.message, self.source.name)
        # If a mirror sent it, the next reader finds out what the others have.
        others = self.source.distrust(self.spec.descriptor)
        self._condemned = None if others else (trio.current_time() + _CONDEMNED_SECONDS, error)
        self._layers.renumber(self, error)
        self._shown = {}


class Layers:
    """The layers in use, each once, and what they share. One per process; passes run in `nursery`."""

    def __init__(
        self,
        folder: CacheFolder,
        chunks: ChunkStore,
        numbers: Numbers,
        nursery: trio.Nursery,
        *,
        max_layer_size: int | None = None,
    ) -> None:
        self.folder = folder
        self.chunks = chunks
        self.numbers = numbers
        self.nursery = nursery
        self.passes = Passes(chunks, folder.layers, max_layer_size=max_layer_size)
        self._layers: dict[str, Layer] = {}
        self._by_number: dict[int, Layer] = {}
        self._retired: dict[int, Corrupt] = {}

    def get(self, spec: LayerSpec, source: Source) -> Layer:
        """The layer, with source as the place to fetch it from. Raises: Corrupt (it is known to break its diff ID)."""
        layer = self._layers.get(spec.key)
        if layer is None:
            layer = self._layers[spec.key] = Layer(spec, source, self)
            self._by_number[layer.number] = layer
        layer.source = source
        layer.expect(spec.diff_id)
        return layer

    def numbered(self, number: int) -> Layer | None:
        """The layer in use that has this number. Raises: Corrupt if what had it was condemned."""
        if number in self._retired:
            raise self._retired[number].with_traceback(None)
        return self._by_number.get(number)

    def renumber(self, layer: Layer, error: Corrupt) -> None:
        """Gives a condemned layer a new number."""
        self._by_number.pop(layer.number, None)
        self._retired[layer.number] = error
        self.numbers.retire_layer(layer.key)
        layer.number = self.numbers.layer(layer.key)
        self._by_number[layer.number] = layer

    def index_path(self, key: str) -> Path:
        return self.folder.layers / f"{key}.sqlite"

    def load_index(self, key: str) -> LayerIndex | None:
        """The index on disk; a damaged one is removed and counts as absent."""
        path = self.index_path(key)
        try:
            return LayerIndex.open(path)
        except FsmountError as error:
            log.warning("%s; it is made again", error.message)
            path.unlink(missing_ok=True)
            return None
