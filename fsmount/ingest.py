"""Ingest: one pass over a layer's blob, from compressed bytes to chunks and index; the CPU work, free of waiting."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from fsmount.archive.codecs import Compression, Decoder, bounded, decoder, sniff
from fsmount.archive.entry import Entry, EntryType, Extent
from fsmount.archive.restarts import RestartDecoder
from fsmount.archive.span import Restart
from fsmount.archive.zstream import library
from fsmount.errors import Corrupt, Invalid, Unsupported
from fsmount.index import Chunk, LayerIndex
from fsmount.indexing import IndexBuilder
from fsmount.oci.digest import Digest

#: Inflated bytes fetched, verified, cached and evicted at once: about so many, where the first pass cuts.
CHUNK_SIZE = 4 * 1024 * 1024


@dataclass(slots=True)
class Portion:
    """A chunk's bytes, and the members whose headers were found on the way to its end."""

    data: memoryview
    entries: list[Entry]


class Inflate:
    """The first stage: hashes the blob, inflates it, finds the members, and cuts chunks.

    A layer that is known is cut as its index says. Else a gzip layer is cut where inflating can begin anew, so
    that a chunk can be had again from its own part of the blob; and any other every 4 MiB.
    Each method runs in a worker thread, one at a time.
    """

    def __init__(
        self,
        digest: Digest,
        scanner: "Scanner | None",
        *,
        is_file: bool,
        max_output: int,
        known: LayerIndex | None = None,
    ) -> None:
        """scanner: None when the members are known. is_file: the blob is a file as it is, and no tar."""
        self._digest = digest
        self._hash = digest.hasher()
        self._size = 0
        self._scanner = scanner
        self._is_file = is_file
        self._max_output = max_output
        self._decoder: Decoder | None = None
        self._pieces: Iterator[bytes | memoryview] = iter(())
        self._rest = memoryview(b"")
        #: Where chunks end, if it is known; they go on after the last one.
        self._stops = [chunk.start + chunk.size for chunk in known.chunks] if known is not None else []
        longest = max((chunk.size for chunk in known.chunks), default=0) if known is not None else 0
        self._capacity = max(2 * CHUNK_SIZE, longest)
        self._cuts_itself = known is None
        self._buffer = bytearray(self._capacity)
        self._start = 0  # of the chunk being filled, in the inflated layer
        self._filled = 0
        self._spare: list[bytearray] = []
        self._entries: list[Entry] = []
        self._failure: Invalid | Unsupported | None = None
        self.compression = Compression.NONE
        #: Where in a gzip blob inflating can begin anew, found so far.
        self.restarts: list[Restart] = []

    def push(self, block: bytes) -> None:
        """Takes the next bytes of the blob; `next_portion` must have returned None before.

        The first block holds at least 512 bytes, or the whole blob.
        """
        self._hash.update(block)
        self._size += len(block)
        if self._failure is not None:
            return
        try:
            if self._decoder is None:
                self.compression = Compression.NONE if self._is_file else sniff(block)
                self._decoder = self._new_decoder()
            self._pieces = self._decoder.feed(block)
        except (Invalid, Unsupported) as error:
            self._failure = error

    def _new_decoder(self) -> Decoder:
        if self._cuts_itself and self.compression is Compression.GZIP and library() is not None:
            inner = RestartDecoder(spacing=CHUNK_SIZE)
            self.restarts = inner.restarts
            return bounded(inner, max_output=self._max_output)
        return decoder(self.compression, max_output=self._max_output)

    def next_portion(self) -> Portion | None:
        """The next full chunk, or None when more of the blob is needed.

        After bytes that cannot be decoded there are no more, and `finish` says why: only the whole blob tells
        whether it was altered on the way or made wrong.
        """
        try:
            while True:
                room = self._stop() - self._start - self._filled
                if not room:
                    return self._take()
                if not self._rest:
                    piece = next(self._pieces, None)
                    if piece is None:
                        return None
                    if self._scanner is not None:
                        self._entries += self._scanner.feed(piece)
                    self._rest = memoryview(piece)
                    continue  # the decoder may have found a place to cut
                taken = self._rest[:room]
                self._buffer[self._filled : self._filled + len(taken)] = taken
                self._filled += len(taken)
                self._rest = self._rest[room:]
        except Invalid as error:
            self._failure = error
            self._pieces = iter(())
            self._rest = memoryview(b"")
        return None

    def _stop(self) -> int:
        """Where the chunk being filled ends, as far as it is known by now."""
        number = bisect_right(self._stops, self._start)
        if number < len(self._stops):
            return self._stops[number]
        if not self.restarts:
            return self._start + CHUNK_SIZE
        following = bisect_right(self.restarts, self._start, key=lambda restart: restart.out)
        cut = self._start + self._capacity
        return min(cut, self.restarts[following].out) if following < len(self.restarts) else cut

    def _take(self) -> Portion:
        portion = Portion(memoryview(self._buffer)[: self._filled], self._entries)
        self._start += self._filled
        self._filled = 0
        self._buffer = self._spare.pop() if self._spare else bytearray(self._capacity)
        self._entries = []
        return portion

    def reuse(self, portion: Portion) -> None:
        """Takes back a portion's memory, which nobody looks at any more: fresh pages cost more than inflating."""
        buffer = portion.data.obj
        portion.data.release()
        if isinstance(buffer, bytearray):
            self._spare.append(buffer)

    def finish(self) -> Portion:
        """The last portion, maybe empty, after the whole blob.

        Raises: Corrupt (the blob is not what its digest names); Invalid, Unsupported (it is, and cannot be read).
        """
        if self._hash.hexdigest() != self._digest.hex:
            raise Corrupt(
                f"layer {self._digest}: the {self._size} bytes received have another digest",
                remedy="The registry, or something on the way, altered it; push the image again if it persists.",
            )
        if self._failure is None:
            try:
                assert self._decoder is not None
                self._decoder.finish()
                if self._scanner is not None:
                    self._scanner.finish()
                    self._entries += self._scanner.feed(b"")
            except Invalid as error:
                self._failure = error
        if self._failure is not None:
            failure = self._failure
            raise type(failure)(f"layer {self._digest}: {failure.message}", remedy=failure.remedy)
        return self._take()


class Keep:
    """The second stage: hashes chunks and indexes members; checks the chunks if the index is certified already."""

    def __init__(
        self,
        known: LayerIndex | None,
        builder: IndexBuilder | None,
        shown: dict[int, bytes] | None = None,
    ) -> None:
        """At least one of the first two is given.

        shown: the sha256 of chunks that were shown on a hint; it takes those that go by now.
        """
        self._certified = known if builder is None else None
        self._builder = builder
        self._shown = shown
        self._hash = hashlib.sha256()
        self._failure: Invalid | None = None
        self.chunks: list[Chunk] = []
        #: Whether some of the chunks may be in the cache already.
        self.is_second_look = shown is not None
        #: Whether chunks that were shown turned out to be others.
        self.differs = False

    @property
    def stop(self) -> int:
        """How much of the inflated layer there is by now."""
        return self.chunks[-1].start + self.chunks[-1].size if self.chunks else 0

    def at(self, offset: int) -> int:
        """The number of the chunk that holds the byte at offset, which is before `stop`."""
        return bisect_right(self.chunks, offset, key=lambda chunk: chunk.start) - 1

    def add(self, portion: Portion) -> bytes:
        """The sha256 of the portion's chunk. Raises: Corrupt (not the chunk that the index knows)."""
        data = portion.data
        number = len(self.chunks)
        sha256 = hashlib.sha256(data).digest()
        chunk = Chunk(self.stop, len(data), sha256)
        # What comes after the last chunk that the index knows is empty.
        if (
            self._certified is not None
            and data
            and (number >= len(self._certified.chunks) or self._certified.chunks[number][:3] != chunk[:3])
        ):
            raise Corrupt(f"chunk {number} of a layer is not the one that was verified before")
        if self._shown is not None and self._shown.setdefault(number, sha256) != sha256:
            self.differs = True
        if data:
            self.chunks.append(chunk)
        if self._builder is not None:
            self._hash.update(data)
            try:
                if self._failure is None:
                    self._builder.add(portion.entries)
            except Invalid as error:
                self._failure = error
        return sha256

    def finish(self) -> Digest:
        """The diff ID: the digest of all that was added. Raises: Invalid (the members make no tree)."""
        if self._failure is not None:
            raise self._failure
        return Digest("sha256", self._hash.hexdigest())


class Scanner(Protocol):
    """Finds members in the inflated layer."""

    def feed(self, data: bytes | memoryview) -> list[Entry]: ...
    def finish(self) -> None: ...


class OneFile:
    """The scanner where the whole blob is one file."""

    def __init__(self, path: bytes) -> None:
        self._path = path
        self._size = 0
        self._finished = False

    def feed(self, data: bytes | memoryview) -> list[Entry]:
        self._size += len(data)
        if not self._finished:
            return []
        extents = (Extent(0, 0, self._size),) if self._size else ()
        return [Entry(self._path, EntryType.FILE, mode=0o644, size=self._size, extents=extents)]

    def finish(self) -> None:
        self._finished = True
