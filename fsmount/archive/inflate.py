"""inflate_span: the wanted bytes of a span, from its compressed bytes and nothing else; and check_span.

Deflate data is inflated without its gzip wrapping, by isal, else by zlib; see `_restart` for how it begins in the
middle of a byte. Memory is bounded by what the span claims, whatever the data would inflate to: about an eighth more
than `size` at most, and 1 MiB.
"""

import hashlib
import io
import re
import zlib
from collections.abc import Iterator
from typing import Protocol

from backports import zstd

from fsmount.archive.codecs import PIECE_SIZE
from fsmount.archive.span import Codec, Span
from fsmount.errors import Corrupt

#: How much an inflater is given at once: it returns a copy of what it did not use.
_STRIDE = 64 * 1024


def inflate_span(codec: Codec, span: Span, data: bytes | memoryview) -> bytes:
    """Exactly `span.size` bytes, those after the first `span.skip` that data inflates to; the rest is not inflated.

    data: the `span.length` bytes of the blob from `span.offset`.
    CPU: 0.9 of isal's speed. Releases the GIL for most of it. Digests are not looked at: see check_span.
    Raises: Corrupt (broken, or fewer bytes than the span claims).
    """
    if len(data) != span.length:
        raise _corrupt(span, f"expected {span.length} compressed bytes, not {len(data)}")
    view = memoryview(data)
    if codec is Codec.RAW:
        pieces: Iterator[bytes | memoryview] = iter((view,))
    elif codec is Codec.ZSTD:
        pieces = _zstd_frames(view, span.skip + span.size)
    elif codec is Codec.GZIP:
        pieces = _gzip_members(view, span.skip + span.size)
    else:
        pieces = _restart(view, span)
    try:
        return _cut(pieces, span)
    except _ERRORS as error:
        raise _corrupt(span, str(error)) from None


def check_span(span: Span, data: bytes | memoryview, inflated: bytes | memoryview) -> None:
    """Compares what digests the span has with its compressed and its inflated bytes. Raises: Corrupt, naming them."""
    if span.blob_sha256 is not None and hashlib.sha256(data).digest() != span.blob_sha256:
        raise _corrupt(span, f"its compressed bytes have not the sha256 {span.blob_sha256.hex()}")
    if span.sha256 is not None and hashlib.sha256(inflated).digest() != span.sha256:
        raise _corrupt(span, f"its inflated bytes have not the sha256 {span.sha256.hex()}")


def _corrupt(span: Span, reason: str) -> Corrupt:
    return Corrupt(f"the span of {span.length} bytes at offset {span.offset} of the blob: {reason}")


def _cut(pieces: Iterator[bytes | memoryview], span: Span) -> bytes:
    # A BytesIO grows in place and gives its memory away; joining pieces would need it twice.
    wanted = io.BytesIO()
    skip, left = span.skip, span.size
    while left:
        piece = next(pieces, None)
        if piece is None:
            found = span.size - left
            raise _corrupt(span, f"expected {span.size} bytes after {span.skip}, found {found}")
        taken = piece[skip : skip + left]
        skip = max(0, skip - len(piece))
        left -= wanted.write(taken)
    return wanted.getvalue()


# Deflate (RFC 1951), in gzip members (RFC 1952)


class _Inflate(Protocol):
    """zlib's decompression object, and isal's."""

    @property
    def eof(self) -> bool: ...
    @property
    def unconsumed_tail(self) -> bytes: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes | memoryview, max_length: int, /) -> bytes: ...


_ERRORS: tuple[type[Exception], ...] = (zlib.error, zstd.ZstdError)
try:
    from isal import isal_zlib
except ImportError:

    def _raw_inflate(window: bytes) -> _Inflate:
        return zlib.decompressobj(-15, zdict=window)
else:
    _ERRORS = (*_ERRORS, isal_zlib.error)  # type: ignore[arg-type]  # its stubs say Exception

    def _raw_inflate(window: bytes) -> _Inflate:
        return isal_zlib.decompressobj(-15, zdict=window)


_MAGIC = b"\x1f\x8b\x08"
_HEADER_CRC, _EXTRA, _NAME, _COMMENT = 2, 4, 8, 16
_ZEROS = re.compile(rb"\0*")
_TEXT = re.compile(rb"[^\0]*\0")
_TRAILER_SIZE = 8


def _gzip_members(data: memoryview, limit: int) -> Iterator[bytes]:
    yield from _inflated(data, _header_stop(data, 0), limit)


def _restart(data: memoryview, span: Span) -> Iterator[bytes]:
    """Inflates from a boundary of blocks that may lie within the first byte.

    No library of Python's can be told to begin at a bit. Shifting all bits would misplace stored blocks, which are
    aligned to bytes. So the first byte's other bits are replaced by empty blocks that end where it is entered.
    """
    if not span.bits:
        yield from _inflated(data, 0, span.skip + span.size, window=span.window)
    elif data and 0 < span.bits < 8:
        filler, width = _FILLERS[span.bits]
        filled = filler | data[0] >> (8 - span.bits) << width
        head = filled.to_bytes((width + span.bits) // 8, "little")
        yield from _inflated(data, 1, span.skip + span.size, window=span.window, head=head)


def _inflated(
    data: memoryview, start: int, limit: int, *, window: bytes = b"", head: bytes = b""
) -> Iterator[bytes]:
    """The first `limit` bytes of head and data from `start` on, over the seams of members; fewer if there are no more.

    The checksums of the members are not compared: most spans see a part of theirs only.
    """
    inflate = _raw_inflate(window)
    rest: bytes | memoryview = head
    while limit:  # to the inflaters 0 would mean: no limit
        piece = inflate.decompress(rest, min(PIECE_SIZE, limit))
        if piece:
            yield piece
            limit -= len(piece)
        if inflate.eof:
            start = _header_stop(data, start - len(inflate.unused_data) + _TRAILER_SIZE)
            inflate = _raw_inflate(b"")
        elif piece or inflate.unconsumed_tail:
            rest = inflate.unconsumed_tail  # empty, it may hold more output still
            continue
        elif start >= len(data):
            return
        rest = data[start : start + _STRIDE]
        start += len(rest)


def _header_stop(data: memoryview, start: int) -> int:
    """Where the header ends of the gzip member that begins at `start`, maybe after zeros; the end if there is none."""
    zeros = _ZEROS.match(data, start)
    start = zeros.end() if zeros is not None else len(data)
    header = data[start : start + 12]
    if len(header) < 10 or header[:3] != _MAGIC:
        return len(data)
    flags = header[3]
    stop = start + 10
    if flags & _EXTRA:
        stop += 2 + int.from_bytes(header[10:12], "little")
    for flag in (_NAME, _COMMENT):
        if flags & flag:
            text = _TEXT.match(data, stop)
            stop = text.end() if text is not None else len(data)
    return stop + 2 if flags & _HEADER_CRC else stop


def _packed(*fields: tuple[int, int]) -> tuple[int, int]:
    """Values, each of so many bits, the first in the lowest ones; and how many bits they are together."""
    packed = width = 0
    for value, bits in fields:
        packed |= value << width
        width += bits
    return packed, width


#: A block that is not the last, of the fixed codes, and with the end-of-block code only: 10 bits.
_EMPTY = _packed((0, 1), (0b01, 2), (0, 7))
#: The same with codes of its own, which makes it odd: 91 bits. The literals 0 and 256, the end of the block, get
#: codes of one bit, as does the one distance that there must be.
_EMPTY_ODD = _packed(
    *((0, 1), (0b10, 2), (0, 5), (0, 5), (18 - 4, 4)),  # 257 literals, 1 distance, 18 lengths of length codes
    *((0, 6), (1, 3), (0, 14 * 3), (1, 3)),  # of these, the third, 18, and the eighteenth, 1, are of one bit
    *((0, 1), (1, 1), (138 - 11, 7), (1, 1), (117 - 11, 7), (0, 1)),  # 1, 138 zeros, 117 zeros, 1
    *((0, 1), (1, 1)),  # the distance; then, after the codes, the end of the block
)


def _filler(bits: int) -> tuple[int, int]:
    """Empty blocks that end so many bits before the end of a byte."""
    blocks = [_EMPTY_ODD] if bits % 2 else []
    while (sum(width for _, width in blocks) + bits) % 8:
        blocks.append(_EMPTY)
    return _packed(*blocks)


_FILLERS = [_filler(bits) for bits in range(8)]


# zstd (RFC 8878)

#: As for whole layers; it is allocated per frame.
_WINDOW_LOG = {int(zstd.DecompressionParameter.window_log_max): 27}


def _zstd_frames(data: memoryview, limit: int) -> Iterator[bytes]:
    """The first `limit` bytes that frames in a row inflate to; fewer if there are no more."""
    start = 0
    frame = _new_frame()
    while limit:
        rest = data[start : start + _STRIDE] if frame.needs_input else b""
        if not rest and frame.needs_input:
            return
        start += len(rest)
        piece = frame.decompress(rest, min(PIECE_SIZE, limit))
        if piece:
            yield piece
            limit -= len(piece)
        if frame.eof:
            start -= len(frame.unused_data)
            frame = _new_frame()


def _new_frame() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options=_WINDOW_LOG)
