"""ZtocBuilder and TarZtocBuilder: make the ztoc of a layer, gzip or plain tar, while the layer's blob goes by, once."""

import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice

from fsmount.archive.restarts import RestartDecoder
from fsmount.archive.ztoc_entries import TocEntry, TocScanner
from fsmount.archive.ztoc_writer import gzip_checkpoints, tar_checkpoints, write_ztoc
from fsmount.errors import Unsupported

#: SOCI's own, in inflated bytes.
SPAN_SIZE = 4 << 20

#: What ends a gzip member: CRC-32 of what it inflates to, and its size (RFC 1952 §2.3.1).
_TRAILER = struct.Struct("<II")


class ZtocBuilder:
    """Is fed a gzip blob and inflates it, as a Decoder does, and keeps what belongs in its ztoc.

    That is 32 KiB for each span, and the members; of the blob itself no more than a trailer.
    """

    def __init__(self, *, span_size: int = SPAN_SIZE) -> None:
        """Raises: Unsupported (nothing here can tell where a deflate block ends)."""
        self._span_size = span_size
        self._decoder = RestartDecoder(spacing=span_size)
        self._scanner = TocScanner()
        self._first = zlib.decompressobj(wbits=31)  # inflates the first member until its first byte is there
        self._first_seen = False
        self._crc = self._inflated = 0
        self._size = 0
        self._held = b""  # the end of the blob so far, in no digest yet
        self._spans = 0
        self._hash = hashlib.sha256()  # of the span that is going by; before the first of nothing
        self._digests: list[bytes] = []

    @property
    def entries(self) -> list[TocEntry]:
        """The members found so far."""
        return self._scanner.found

    def starts(self, first: int) -> Sequence[int]:
        """Where spans begin in what the blob inflates to: those known by now, from the `first`-th on.

        One is known before a byte of it is yielded.
        """
        return [restart.out for restart in islice(self._decoder.restarts, first, None)]

    @property
    def stop(self) -> int | None:
        """Where the last span ends in what the blob inflates to: with the tar, once that has ended."""
        return self._scanner.stop if self._scanner.ended else None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """As Decoder.feed: what `data` inflates to. Whoever wants a bound on that counts it.

        Ownership: the iterator must be exhausted before the next call; after an exception the builder is of no
        more use.
        Raises: Invalid, and Unsupported (SOCI cannot carry this layer), while iterating.
        """
        self._refuse_empty_member(data)
        for piece in self._decoder.feed(data):
            self._scanner.feed(piece)
            self._crc = zlib.crc32(piece, self._crc)
            self._inflated += len(piece)
            yield piece
        self._digest(data)

    def finish(self, *, tool: str) -> bytes:
        """The ztoc of the blob, which is complete. tool: who made it, for people to read.

        Raises: Invalid, Unsupported.
        """
        self._decoder.finish()
        self._scanner.finish()
        if self._held != _TRAILER.pack(self._crc, self._inflated & 0xFFFFFFFF):
            raise _several_members()
        self._hash.update(self._held)
        return write_ztoc(
            self.entries,
            tool=tool,
            blob_size=self._size,
            tar_size=self._scanner.stop,
            compressed=True,
            checkpoints=gzip_checkpoints(self._decoder.restarts, self._span_size),
            digests=[*self._digests, self._hash.digest()],
        )

    def _digest(self, data: bytes) -> None:
        """Divides what has come among the digests of the spans.

        A restart point becomes known only when the decoder has come so far. But it never lies before what the decoder
        had read by the call before, except for one byte that the point's bits are in: so what is held back of every
        call is enough.
        """
        base = self._size - len(self._held)
        self._size += len(data)
        blob = memoryview(self._held + data)
        start = 0
        for restart in islice(self._decoder.restarts, self._spans, None):
            if self._spans:
                self._hash.update(blob[start : restart.offset - base])
                self._digests.append(self._hash.digest())
            self._hash = hashlib.sha256()
            self._spans += 1
            # A byte of which both have bits is in the digests of both.
            start = restart.offset - base - bool(restart.bits)
            assert start >= 0
        stop = max(start, len(blob) - _TRAILER.size)
        if self._spans:
            self._hash.update(blob[start:stop])
        self._held = bytes(blob[stop:])

    def _refuse_empty_member(self, data: bytes) -> None:
        """Several members are known by the last trailer, which is not that of the whole: unless the others are empty.

        SOCI before 0.14 reads zeros after the first member, so such layers are not for publishing.
        Raises: Unsupported.
        """
        if self._first_seen:
            return
        try:
            self._first_seen = bool(self._first.decompress(self._first.unconsumed_tail + data, 1))
        except zlib.error:
            self._first_seen = True  # the decoder says the same, in more words
        if self._first.eof and not self._first_seen:
            raise _several_members()


class TarZtocBuilder:
    """The same for a blob that is a tar: spans are cut by their size alone, and what is fed is what is yielded."""

    def __init__(self, *, span_size: int = SPAN_SIZE) -> None:
        self._span_size = span_size
        self._scanner = TocScanner()
        self._size = 0
        self._hash = hashlib.sha256()  # of the span that is going by
        self._digests: list[bytes] = []

    @property
    def entries(self) -> list[TocEntry]:
        """The members found so far."""
        return self._scanner.found

    def starts(self, first: int) -> Sequence[int]:
        """Where spans begin: those known by now, from the `first`-th on."""
        return range(first * self._span_size, self._size, self._span_size)

    @property
    def stop(self) -> int | None:
        """None: the last span ends with the blob, whatever follows the tar."""
        return None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yields `data`. Raises: Invalid, and Unsupported (SOCI cannot carry this layer), while iterating."""
        self._scanner.feed(data)
        rest = memoryview(data)
        while rest:
            piece = rest[: self._span_size - self._size % self._span_size]
            self._hash.update(piece)
            self._size += len(piece)
            if not self._size % self._span_size:
                self._end_span()
            rest = rest[len(piece) :]
        yield data

    def finish(self, *, tool: str) -> bytes:
        """The ztoc of the blob, which is complete. tool: who made it, for people to read. Raises: Invalid."""
        self._scanner.finish()
        if self._size % self._span_size:
            self._end_span()
        return write_ztoc(
            self.entries,
            tool=tool,
            blob_size=self._size,
            tar_size=self._scanner.stop,
            compressed=False,
            checkpoints=tar_checkpoints(self._size, self._span_size),
            digests=self._digests,
        )

    def _end_span(self) -> None:
        self._digests.append(self._hash.digest())
        self._hash = hashlib.sha256()


def _several_members() -> Unsupported:
    return Unsupported(
        "a gzip layer of several members, or with something after them, cannot have a SOCI index that all can read"
    )
