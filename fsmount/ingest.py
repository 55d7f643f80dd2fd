"""Ingest: one pass over a layer's blob, from compressed bytes to chunks and index; the CPU work, free of waiting."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from fsmount.archive.codecs import Compression, Decoder, decoder, sniff
from fsmount.archive.entry import Entry, EntryType, Extent
from fsmount.errors import Corrupt, Invalid, Unsupported
from fsmount.index import Chunk, IndexBuilder, LayerIndex
from fsmount.oci.digest import Digest

#: Inflated bytes fetched, verified, cached and evicted at once.
CHUNK_SIZE = 4 * 1024 * 1024


@dataclass(slots=True)
class Portion:
    """A chunk's bytes, and the members whose headers were found on the way to its end."""

    data: memoryview
    entries: list[Entry]


class Inflate:
    """The first stage: hashes the blob, inflates it, finds the members, and cuts chunks.

    Each method runs in a worker thread, one at a time.
    """

    def __init__(self, digest: Digest, scanner: "Scanner | None", *, is_file: bool, max_output: int) -> None:
        """scanner: None when the index is already known. is_file: the blob is a file as it is, and no tar."""
        self._digest = digest
        self._hash = digest.hasher()
        self._size = 0
        self._scanner = scanner
        self._is_file = is_file
        self._max_output = max_output
        self._decoder: Decoder | None = None
        self._pieces: Iterator[bytes] = iter(())
        self._buffer = bytearray(CHUNK_SIZE)
        self._filled = 0
        self._spare: list[bytearray] = []
        self._entries: list[Entry] = []
        self._failure: Invalid | Unsupported | None = None
        self.compression = Compression.NONE

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
                self._decoder = decoder(self.compression, max_output=self._max_output)
            self._pieces = self._decoder.feed(block)
        except (Invalid, Unsupported) as error:
            self._failure = error

    def next_portion(self) -> Portion | None:
        """The next full chunk, or None when more of the blob is needed.

        After bytes that cannot be decoded there are no more, and `finish` says why: only the whole blob tells
        whether it was altered on the way or made wrong.
        """
        try:
            for piece in self._pieces:
                if self._scanner is not None:
                    self._entries += self._scanner.feed(piece)
                stop = self._filled + len(piece)
                if stop < CHUNK_SIZE:
                    self._buffer[self._filled : stop] = piece
                    self._filled = stop
                    continue
                rest = memoryview(piece)[CHUNK_SIZE - self._filled :]
                self._buffer[self._filled :] = memoryview(piece)[: len(piece) - len(rest)]
                portion = self._take(CHUNK_SIZE)
                self._buffer[: len(rest)] = rest
                self._filled = len(rest)
                return portion
        except Invalid as error:
            self._failure = error
            self._pieces = iter(())
        return None

    def _take(self, size: int) -> Portion:
        portion = Portion(memoryview(self._buffer)[:size], self._entries)
        self._buffer = self._spare.pop() if self._spare else bytearray(CHUNK_SIZE)
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
        return self._take(self._filled)


class Keep:
    """The second stage: hashes chunks and indexes members; checks the chunks if the index is known already."""

    def __init__(self, known: LayerIndex | None, builder: IndexBuilder | None) -> None:
        """One of the two is given."""
        self._known = known
        self._builder = builder
        self._hash = hashlib.sha256()
        self._start = 0
        self._failure: Invalid | None = None
        self.chunks: list[Chunk] = []

    def add(self, portion: Portion) -> None:
        """Raises: Corrupt (not the chunk that the index knows)."""
        data = portion.data
        chunk = Chunk(self._start, len(data), hashlib.sha256(data).digest())
        if self._known is not None and (
            len(self.chunks) >= len(self._known.chunks) or self._known.chunks[len(self.chunks)] != chunk
        ):
            raise Corrupt(f"chunk {len(self.chunks)} of a layer is not the one that was verified before")
        if data:
            self._start += len(data)
            self.chunks.append(chunk)
        if self._builder is not None:
            self._hash.update(data)
            try:
                if self._failure is None:
                    self._builder.add(portion.entries)
            except Invalid as error:
                self._failure = error

    def finish(self) -> Digest:
        """The diff ID: the digest of all that was added. Raises: Invalid (the members make no tree)."""
        if self._failure is not None:
            raise self._failure
        return Digest("sha256", self._hash.hexdigest())


class Scanner(Protocol):
    """Finds members in the inflated layer."""

    def feed(self, data: bytes) -> list[Entry]: ...
    def finish(self) -> None: ...


class OneFile:
    """The scanner where the whole blob is one file."""

    def __init__(self, path: bytes) -> None:
        self._path = path
        self._size = 0
        self._finished = False

    def feed(self, data: bytes) -> list[Entry]:
        self._size += len(data)
        if not self._finished:
            return []
        extents = (Extent(0, 0, self._size),) if self._size else ()
        return [Entry(self._path, EntryType.FILE, mode=0o644, size=self._size, extents=extents)]

    def finish(self) -> None:
        self._finished = True
