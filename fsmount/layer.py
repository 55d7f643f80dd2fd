"""Layer: one layer of an image as its readers see it; and Layers, those of a process."""

import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import trio

from fsmount.archive.entry import Extent
from fsmount.archive.span import Trust
from fsmount.cache.chunks import ChunkStore
from fsmount.cache.folder import CacheFolder
from fsmount.cache.numbers import Numbers
from fsmount.errors import Corrupt, FsmountError, NotFound
from fsmount.index import LayerIndex
from fsmount.lazy import Finder, LayerSpec
from fsmount.passes import Passes
from fsmount.registry.source import Source
from fsmount.shown import Shown
from fsmount.streamed import Means
from fsmount.supply import Opened, Supply
from fsmount.traffic import Traffic

log = logging.getLogger(__name__)

#: Why a layer is streamed that an earlier process has begun to stream.
_BEGUN = "that had begun before a restart"
#: When another number is tried to be had again that could not be.
_RETRY_SECONDS = 1.0


class Piece(NamedTuple):
    """`size` bytes of a file at `file_offset`, found at `offset` of a chunk."""

    file_offset: int
    chunk: int
    offset: int
    size: int


class Layer(Supply):
    """A layer as its readers see it: members at offsets, over the chunks that its supply opens.

    When it turns out that what was shown of it must not be shown again, it gets a new number, so that the kernel
    keeps nothing of it either.
    """

    def __init__(self, spec: LayerSpec, source: Source, layers: "Layers") -> None:
        super().__init__(
            spec, source, layers.means, lambda error, shown: layers.renumber(self, error, shown=shown)
        )
        self._number: int | None = layers.numbers.layer(spec.key)
        #: Why it has none.
        self._numberless: FsmountError | None = None
        #: Why what was shown of it before became void, each time.
        self._ends: list[Corrupt] = []
        #: Told of every member that the mount is asked to read.
        self.on_read: list[Callable[[Layer, int], None]] = []
        self._layers = layers
        self._last = -1  # the chunk that was read last

    @property
    def number(self) -> int:
        """By which the kernel knows it. Raises: FsmountError, NoSpace (it is to have another, which cannot be kept)."""
        if self._number is None:
            assert self._numberless is not None
            raise self._numberless.with_traceback(None)
        return self._number

    @property
    def ends(self) -> int:
        """How often what was shown of it became void: what is known of its members holds until the next time."""
        return len(self._ends)

    def end_number(self, error: Corrupt) -> int | None:
        """It has none from now on; returns what it was."""
        number, self._number = self._number, None
        self._ends.append(error)
        return number

    def renew_number(self) -> None:
        """Gives it another number, if it has none. Raises: FsmountError, NoSpace (that cannot be kept)."""
        try:
            if self._number is None:
                self._number = self._layers.numbers.renew_layer(self.spec.key)
        except FsmountError as error:
            self._numberless = error
            raise

    def read_hot(self, member: int, offset: int, size: int) -> bytes | None:
        """As `read`, if that takes no waiting: the bytes lie in one recent chunk. Else None.

        The mount asks this first, whatever it reads: so here those who take note of that are told.
        """
        for told in self.on_read:
            told(self, member)
        index = self.index
        content = index.content(member) if index is not None and index.complete else None
        if content is None:
            return None
        logical_size, extents = content
        size = min(size, logical_size - offset)
        if size <= 0:
            return b""
        if len(extents) != 1 or extents[0].size != logical_size:
            return None
        start = extents[0].offset + offset
        opened = self.hot(start)
        if opened is None or start + size > opened.start + opened.size:
            return None
        if opened.number != self._last:
            self._come_to(opened, start, extents[0].offset + logical_size)
        data = self._layers.chunks.read(opened.descriptor, size, start - opened.start)
        return data if len(data) == size else None

    async def read(self, member: int, offset: int, size: int, *, number: int | None = None) -> bytes:
        """size bytes of a member's content from offset, fewer only at its end.

        number: the layer's, if what is meant is what had that.
        Raises: NotFound (no such member), Corrupt, Unreachable and other kinds of FsmountError.
        Cancellation: safe; what is being fetched goes on for other readers.
        """
        if number is not None and number != self._number:
            self._layers.numbered(number)
        ends = self.ends
        while True:
            index = self.index
            content = index.content(member) if index is not None else None
            if content is not None:
                break
            if index is not None and index.complete:
                raise NotFound(f"layer {self.spec.descriptor.digest} has no member {member}")
            # Found in a pass that broke off: the next one shows it under the same number.
            await self.wait_progress()
            self._check(ends)
        logical_size, extents = content
        stop = min(offset + size, logical_size)
        if stop <= offset:
            return b""
        if len(extents) == 1 and extents[0].size == logical_size:  # all but sparse files
            begin = extents[0].offset
            return await self.read_stream(begin + offset, stop - offset, stop=begin + logical_size)
        result = bytearray(stop - offset)
        for extent in extents:
            start = max(extent.file_offset, offset)
            end = min(extent.file_offset + extent.size, stop)
            if start < end:
                begin = extent.offset - extent.file_offset
                extent_stop = extent.offset + extent.size
                data = await self.read_stream(begin + start, end - start, stop=extent_stop)
                self._check(ends)
                result[start - offset : end - offset] = data
        return bytes(result)

    async def read_stream(self, offset: int, size: int, *, stop: int = 0) -> bytes:
        """size bytes of the inflated layer from offset; all of them. stop: where the file ends, if it is known.

        As `read`.
        """
        ends = self.ends
        pieces: list[bytes] = []
        while size > 0:
            opened = self.hot(offset)
            if opened is None:
                opened = await self.open(offset)
                self._check(ends)
            if opened.number != self._last:
                self._come_to(opened, offset, stop)
            if offset == opened.start:
                self._read_ahead(opened)
            take = min(size, opened.start + opened.size - offset)
            piece = self._layers.chunks.read(opened.descriptor, take, offset - opened.start)
            if len(piece) != take:
                # Changed on the disk since it was opened, or the disk fails.
                await self._layers.chunks.drop([self.chunk_key(opened.number)])
                self._check(ends)
                continue
            pieces.append(piece)
            offset += take
            size -= take
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    # What the kernel is told

    async def _find(self) -> bool:
        shown = self._layers.shown
        if (
            shown is not None
            and self._number is not None
            and shown.has_numbering(self._number, self.stream_numbering)
        ):
            # Members whose numbers the kernel has from a pass are found under these by a pass alone.
            self._reason = _BEGUN
            return False
        return await super()._find()

    def note_index(self, index: LayerIndex) -> None:
        shown = self._layers.shown
        if shown is None or self._number is None:
            return
        if shown.has_other_numbering(self._number, index.numbering):
            digest = self.spec.descriptor.digest
            error = Corrupt(f"layer {digest}: what told its members apart was lost, and is another now")
            log.warning("%s; what is open of it cannot be read on", error.message)
            self._layers.renumber(self, error, shown=True)
            if self._number is None:
                return
        shown.note_index(self._number, index)
        if index.trust is Trust.HINT:
            shown.note_unverified(self._number)
        else:
            shown.note_verified(self._number, index.members)
        if self._number in shown.unnoted:
            self._layers.catch_up_later(self)

    def note_stream(self, *, has_begun: bool) -> None:
        shown = self._layers.shown
        if shown is None or self._number is None:
            return
        if has_begun:
            shown.note_stream(self._number, self.stream_numbering)
        else:
            shown.note_nothing(self._number)
        if self._number in shown.unnoted:
            self._layers.catch_up_later(self)

    def note_all(self) -> None:
        """Notes what is shown of it, which could not be noted, or not by this number, when that began."""
        index = self.index
        if index is not None and index.complete:
            self.note_index(index)
        else:
            self.note_stream(has_begun=index is not None or bool(self._shown))

    def _check(self, ends: int) -> None:
        """Raises: Corrupt, if what the layer was when that had so often become void has become so too."""
        if self.ends != ends:
            raise self._ends[-1].with_traceback(None)

    def _come_to(self, opened: Opened, offset: int, stop: int) -> None:
        self._last = opened.number
        self.was_read = True
        fetcher = self.fetcher
        if fetcher is not None:
            fetcher.follow(opened.number, goes_on=offset == opened.start, stop=stop)

    def _read_ahead(self, opened: Opened) -> None:
        """Has the disk bring a chunk that is read from its beginning, and the next one if that is open."""
        following = self._layers.chunks.hot(self.chunk_key(opened.number + 1))
        for descriptor in (opened.descriptor, following):
            if descriptor is not None:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)

    def checked(self, descriptor: int) -> tuple[int, int]:
        """As ChunkStore.checked, of a chunk that `open_chunk` has just opened."""
        return self._layers.chunks.checked(descriptor)

    def pieces(self, extents: Iterable[Extent]) -> Iterator[Piece]:
        """Where the bytes of a file lie in the chunks of the complete layer."""
        index = self.index
        assert index is not None and index.complete
        for extent in extents:
            file_offset, offset, left = extent
            while left > 0:
                number = index.chunk_at(offset)
                chunk = index.chunks[number]
                size = min(left, chunk.start + chunk.size - offset)
                yield Piece(file_offset, number, offset - chunk.start, size)
                file_offset += size
                offset += size
                left -= size

    def stored_chunks(self, index: LayerIndex | None = None) -> list[bool]:
        """Which chunks are in the cache. Blocks on the disk, briefly.

        index: the complete one, if the caller has it; then this is for any thread.
        """
        index = index or self.index
        if index is None:
            return []
        keys = [f"{self.spec.key}{index.space}/{number}" for number in range(len(index.chunks))]
        return self._layers.chunks.stored(keys)


class Layers:
    """The layers in use, each once, and what they share. One per process; passes run in `nursery`."""

    def __init__(
        self,
        folder: CacheFolder,
        chunks: ChunkStore,
        numbers: Numbers,
        nursery: trio.Nursery,
        *,
        mount: str | None = None,
        max_layer_size: int | None = None,
    ) -> None:
        """mount: names the one whose kernel remembers what layers show, in this process and those before; if any."""
        self.folder = folder
        self.chunks = chunks
        self.numbers = numbers
        self.nursery = nursery
        passes = Passes(chunks, folder.layers, max_layer_size=max_layer_size)
        self.means = Means(folder, chunks, passes, Traffic(), Finder(max_layer_size), nursery)
        #: Told of every layer that turned out to be other than the kernel has been told for good.
        self.on_void: list[Callable[[Layer, Corrupt], None]] = []
        self.shown = None if mount is None else Shown(numbers, mount)
        self._layers: dict[str, Layer] = {}
        self._by_number: dict[int, Layer] = {}
        self._retired: dict[int, Corrupt] = {}
        #: Those that are to catch up with what could not be written when it was due.
        self._behind: set[Layer] = set()

    def __iter__(self) -> Iterator[Layer]:
        """Those in use: of every image that was looked into."""
        return iter(list(self._layers.values()))

    def get(self, spec: LayerSpec, source: Source) -> Layer:
        """The layer, with source as the place to fetch it from. Raises: Corrupt (it is known to break its diff ID)."""
        layer = self._layers.get(spec.key)
        if layer is None:
            layer = self._layers[spec.key] = Layer(spec, source, self)
            self._by_number[layer.number] = layer
            index = layer.index if self.shown is not None else None
            if index is not None:
                layer.note_index(index)
        layer.take(spec, source)
        return layer

    def numbered(self, number: int) -> Layer | None:
        """The layer in use that has this number. Raises: Corrupt if what had it was condemned."""
        if number in self._retired:
            raise self._retired[number].with_traceback(None)
        return self._by_number.get(number)

    def renumber(self, layer: Layer, error: Corrupt, *, shown: bool) -> None:
        """Gives a condemned layer a new number. shown: it was complete, so the kernel was told to keep what it is.

        The kernel has to forget the old one, whatever becomes of the new one: if the disk has no room for that,
        the layer has none until there is.
        """
        number, members = layer.end_number(error), _members(layer)
        if number is not None:
            self._by_number.pop(number, None)
            self._retired[number] = error
            if self.shown is not None:
                self.shown.note_void(number, members)
        try:
            layer.renew_number()
        except FsmountError as failure:
            digest = layer.spec.descriptor.digest
            log.warning("layer %s has no number until one can be kept: %s", digest, failure.message)
            self.catch_up_later(layer)
        else:
            self._by_number[layer.number] = layer
        if shown:
            for told in self.on_void:
                told(layer, error)

    def catch_up_later(self, layer: Layer) -> None:
        """Has it get the number that it has not got, and has noted what could not be noted of it."""
        if layer not in self._behind:
            self._behind.add(layer)
            self.nursery.start_soon(self._catch_up, layer)

    async def _catch_up(self, layer: Layer) -> None:
        is_behind = True
        while is_behind:
            await trio.sleep(_RETRY_SECONDS)
            with suppress(FsmountError):
                await self.numbers.when_possible(layer.renew_number)
                self._by_number[layer.number] = layer
                layer.note_all()
                is_behind = self.shown is not None and layer.number in self.shown.unnoted
        self._behind.discard(layer)


def _members(layer: Layer) -> int:
    """How many are known."""
    try:
        return layer.index.members if layer.index is not None else 0
    except sqlite3.DatabaseError:  # of a pass for which the disk was too full
        return 0
