"""Restart points: RestartDecoder notes them while a gzip blob goes by, and chunk_spans cuts spans at them."""

import re
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from fsmount.archive import zstream
from fsmount.archive.codecs import PIECE_SIZE
from fsmount.archive.span import Restart, Span
from fsmount.errors import Invalid

#: Inflated bytes between two restart points. Each costs 32 KiB in the index, and at most a span's inflating at a read.
SPACING = 4 * 1024 * 1024

_MAGIC = b"\x1f\x8b"
_ZEROS = re.compile(rb"\0*")


class RestartDecoder:
    """A codecs.Decoder of gzip that keeps restart points in `restarts`, for a quarter to a third more CPU than isal's.

    They are those of SOCI's builder (ztoc/compression/gzip_zinfo.c of soci-snapshotter): the first byte after the
    first member's header, then the first block boundary that is more than `spacing` inflated bytes after the
    point before; the end of a member's last block is none, but the beginning of the next member is.

    After a member zeros are passed over, and anything but another member to the end of the blob, as everywhere.
    """

    @staticmethod
    def available() -> bool:
        """Whether there is a library here that can tell where a block ends."""
        return zstream.library() is not None

    def __init__(self, *, spacing: int = SPACING) -> None:
        """Raises: Unsupported (not available)."""
        self.restarts: list[Restart] = []
        self._spacing = spacing
        self._inflater = zstream.Inflater()
        self._read = 0  # bytes of the blob that have been fed
        self._out = 0
        #: A boundary is a point when more than this has been inflated.
        self._threshold = -1
        self._members = 0
        self._in_member = False
        self._held = b""  # the first byte of what may be a magic
        self._garbage = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """As codecs.Decoder.feed: pieces of 1 byte to 256 KiB, each inflated when it is asked for.

        Ownership: the iterator must be exhausted before the next call.
        Raises: Invalid, while iterating.
        """
        self._read += len(data)
        data = self._held + data
        self._held = b""
        self._inflater.give(data)
        while self._in_member or self._begin_member(data):
            try:
                piece, more = self._step()
            except zlib.error as error:
                raise Invalid(f"gzip stream, member {self._members}: {error}") from None
            if piece:
                yield piece
            if self._inflater.ended:
                self._in_member = False
            elif not more:
                return

    def finish(self) -> None:
        """Says that the blob has no more bytes. Raises: Invalid if it should have."""
        if self._in_member or self._held or not self._members:
            raise Invalid("the gzip stream is cut short: expected more bytes")

    def _begin_member(self, data: bytes) -> bool:
        """Whether a member begins in what is left of `data`, perhaps after zeros; if not, all of that is used up."""
        start = len(data) - self._inflater.left
        if self._garbage or start == len(data):
            return False
        if self._members and not data[start]:
            zeros = _ZEROS.match(data, start)
            assert zeros is not None
            start = zeros.end()
        magic = data[start : start + len(_MAGIC)]
        if magic == _MAGIC:
            self._inflater.give(data, start)
            self._inflater.reset()
            self._members += 1
            self._in_member = True
            return True
        if _MAGIC.startswith(magic):
            self._held = magic
        elif not self._members:
            raise Invalid(f"gzip stream: expected the magic 1f8b, not {magic.hex()}")
        else:
            self._garbage = True
        return False

    def _step(self) -> tuple[bytes, bool]:
        """The next piece, and whether the same data may give more."""
        inflater = self._inflater
        room = self._threshold - self._out
        if room > 0:
            # Up to where a point is due at the earliest: stopping at each block would double the time.
            piece = inflater.inflate(min(room, PIECE_SIZE))
            self._out += len(piece)
            return piece, bool(inflater.left) or len(piece) == min(room, PIECE_SIZE)
        if not room:
            # Boundaries at the threshold itself are no points. All that are here are passed at once: stopping at
            # each would cost a microsecond for every ten bits of a blob of empty blocks.
            inflater.inflate(0)
            if inflater.ended:
                return b"", True
        piece = inflater.inflate(PIECE_SIZE, stop_at_boundary=True)
        self._out += len(piece)
        bits = inflater.boundary
        if bits is not None and self._out > self._threshold:
            self.restarts.append(Restart(self._read - inflater.left, self._out, bits, inflater.window()))
            self._threshold = self._out + self._spacing
        return piece, bool(inflater.left) or len(piece) == PIECE_SIZE


def chunk_spans(
    restarts: Sequence[Restart], chunks: Iterable[tuple[int, int, bytes | None]], blob_size: int
) -> Iterator[Span]:
    """The span of each chunk of an inflated gzip layer, for Codec.RESTART.

    restarts: in order, the first at 0. chunks: start, size and sha256 of each, in bytes of the inflated layer.
    A span goes from the last restart point at or before its chunk's start to the first at or after its end, or to
    the blob's end.
    """
    outs = [restart.out for restart in restarts]
    for start, size, sha256 in chunks:
        restart = restarts[bisect_right(outs, start) - 1]
        next_ = bisect_left(outs, start + size)
        stop = restarts[next_].offset if next_ < len(restarts) else blob_size
        offset = restart.offset - (1 if restart.bits else 0)
        yield Span(
            offset,
            stop - offset,
            size,
            skip=start - restart.out,
            sha256=sha256,
            bits=restart.bits,
            window=restart.window,
        )
