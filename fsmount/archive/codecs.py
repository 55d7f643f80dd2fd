"""The compressions of layers: told apart by their first bytes, and inflated in bounded pieces.

Both decoders find the seams of the format themselves (gzip headers, zstd blocks) and leave the rest to C libraries,
which release the GIL: isal, in half of zlib's time, else zlib; and zstandard. Nothing is inflated before it is asked
for, so a bomb costs neither memory nor, past `max_output`, time.
"""

import enum
import zlib
from collections.abc import Iterator
from typing import Protocol

from backports import zstd

from fsmount.archive.header import BLOCK, is_header
from fsmount.errors import Invalid, Unsupported

#: No decoder yields more at once.
PIECE_SIZE = 256 * 1024


class Compression(enum.StrEnum):
    """How the tar of a layer is compressed. The values are stored in the layer indexes."""

    NONE = "tar"
    GZIP = "gzip"
    ZSTD = "zstd"


class Decoder(Protocol):
    """Inflates one blob, given in pieces of any size."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What `data` inflates to, in pieces of 1 byte to 256 KiB, each inflated when it is asked for.

        Ownership: the iterator must be exhausted before the next call; after an exception the decoder is of no
        more use.
        Raises: Invalid, while iterating.
        """
        ...

    def finish(self) -> None:
        """Says that the blob has no more bytes. Raises: Invalid if it should have."""
        ...


def sniff(head: bytes) -> Compression:
    """The compression of a blob that begins with `head`: its first 512 bytes, or more, or all of a shorter one.

    Raises: Unsupported for xz and bzip2, Invalid for what is no layer at all.
    """
    if head.startswith(_GZIP_MAGIC + b"\x08"):
        return Compression.GZIP
    if head.startswith(_ZSTD_MAGIC) or _is_skippable(head):
        return Compression.ZSTD
    if head.startswith(b"\xfd7zXZ\0"):
        raise _unsupported("xz")
    # A tar may begin with the name of a file, "BZh" for example: so bzip2 comes last.
    if head[257:262] == b"ustar" or not head[:BLOCK].strip(b"\0") or is_header(head[:BLOCK]):
        return Compression.NONE
    if head.startswith(b"BZh"):
        raise _unsupported("bzip2")
    raise Invalid(
        f"the layer begins with {head[:16]!r}: expected a tar, plain or compressed with gzip or zstd"
    )


def _unsupported(name: str) -> Unsupported:
    return Unsupported(
        f"the layer is compressed with {name}, which image layers cannot be",
        remedy="Push the image again with its layers compressed with zstd or gzip.",
    )


def decoder(compression: Compression, *, max_output: int) -> Decoder:
    """A decoder that refuses, with Invalid, to yield more than `max_output` bytes."""
    kinds: dict[Compression, type[Decoder]] = {
        Compression.NONE: _PlainDecoder,
        Compression.GZIP: _GzipDecoder,
        Compression.ZSTD: _ZstdDecoder,
    }
    return bounded(kinds[compression](), max_output=max_output)


def bounded(inner: Decoder, *, max_output: int) -> Decoder:
    """The same decoder, but it refuses, with Invalid, to yield more than `max_output` bytes."""
    return _Bounded(inner, max_output)


class _Bounded:
    """A decoder that counts what another yields."""

    def __init__(self, inner: Decoder, max_output: int) -> None:
        self._inner = inner
        self._max_output = max_output
        self._room = max_output

    def feed(self, data: bytes) -> Iterator[bytes]:
        for piece in self._inner.feed(data):
            self._room -= len(piece)
            if self._room < 0:
                raise Invalid(
                    f"the layer inflates to more than {self._max_output} bytes: refused as a bomb",
                    remedy="If it is none, raise cache.max_layer_size in the configuration.",
                )
            yield piece

    def finish(self) -> None:
        self._inner.finish()


class _PlainDecoder:
    """A tar that is not compressed."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), PIECE_SIZE):
            yield data[start : start + PIECE_SIZE]

    def finish(self) -> None:
        pass


# gzip (RFC 1952)

_GZIP_MAGIC = b"\x1f\x8b"
_EXTRA, _NAME, _COMMENT, _HEADER_CRC, _RESERVED = 4, 8, 16, 2, 0xE0
_MAX_GZIP_HEADER = 1 << 20

#: How much an inflater is given at once. At the end of a member it returns a copy of what it did not use: with larger
#: strides a blob of tiny members (20 bytes is the least) would mostly be copied.
_STRIDE = 64 * 1024


class _Inflater(Protocol):
    """One gzip member, from its magic to the end of its trailer; what isal calls IgzipDecompressor."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /, max_length: int) -> bytes: ...


class _ZlibInflater:
    """zlib as an _Inflater."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data

    def decompress(self, data: bytes, /, max_length: int) -> bytes:
        tail = self._inflate.unconsumed_tail
        piece = self._inflate.decompress(tail + data if tail else data, max_length)
        # A full piece may leave more inside zlib, even when all input is consumed.
        self.needs_input = len(piece) < max_length and not self._inflate.unconsumed_tail
        return piece


_GZIP_ERRORS: tuple[type[Exception], ...]
try:
    from isal import igzip_lib
except ImportError:
    _GZIP_ERRORS = (zlib.error,)

    def _inflater() -> _Inflater:
        return _ZlibInflater()
else:
    _GZIP_ERRORS = (zlib.error, igzip_lib.IsalError)  # type: ignore[assignment]  # its stubs say Exception

    def _inflater() -> _Inflater:
        return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)


class _MemberDecoder:
    """Compressed members in a row: gzip members, zstd frames."""

    def __init__(self) -> None:
        self._member: _Inflater | None = None
        self._held = b""  # the beginning of a member's header
        self._members = 0

    #: For messages.
    form: str
    #: What the compression library raises.
    errors: tuple[type[Exception], ...]

    def new_member(self) -> _Inflater:
        raise NotImplementedError

    def find_member(self, data: bytes, *, first: bool) -> bytes | None:
        """data from the beginning of the next member; None if more is needed to tell, b"" if there is none."""
        raise NotImplementedError

    def feed(self, data: bytes) -> Iterator[bytes]:
        view = memoryview(data)
        for start in range(0, len(data), _STRIDE):
            rest = bytes(view[start : start + _STRIDE])
            while rest:
                if self._member is None:
                    rest = self._begin_member(rest)
                if self._member is not None:
                    yield from self._inflate(self._member, rest)
                    rest = self._end_member(self._member)

    def finish(self) -> None:
        if self._member is not None or self._held or not self._members:
            raise Invalid(f"the {self.form} stream is cut short: expected more bytes")

    def _begin_member(self, data: bytes) -> bytes:
        """Opens a member if `data` completes its header; what it is to be fed."""
        data = self._held + data
        found = self.find_member(data, first=not self._members)
        self._held = data if found is None else b""
        if not found:
            return b""
        self._member = self.new_member()
        self._members += 1
        return found

    def _inflate(self, member: _Inflater, data: bytes) -> Iterator[bytes]:
        while True:
            try:
                piece = member.decompress(data, PIECE_SIZE)
            except self.errors as error:
                raise Invalid(f"{self.form} stream, member {self._members}: {error}") from None
            if piece:
                yield piece
            if member.eof or member.needs_input:
                return
            data = b""

    def _end_member(self, member: _Inflater) -> bytes:
        """Closes the member if it is complete; what follows it in the data it was fed."""
        if not member.eof:
            return b""
        self._member = None
        return member.unused_data


class _GzipDecoder(_MemberDecoder):
    """After a member zeros are ignored, and so is all that does not begin with gzip's magic, to the end of the blob:
    GNU gzip does the same. What does begin with it must be a whole member.
    """

    form = "gzip"
    errors = _GZIP_ERRORS
    _garbage = False

    def new_member(self) -> _Inflater:
        return _inflater()

    def find_member(self, data: bytes, *, first: bool) -> bytes | None:
        if self._garbage:
            return b""
        if not first:
            data = data.lstrip(b"\0")
        if not data.startswith(_GZIP_MAGIC[: len(data)]):
            if first:
                raise Invalid(f"gzip stream: expected the magic 1f8b, not {data[:2].hex()}")
            self._garbage = True
            return b""
        # isal takes a header with optional fields for broken when it comes in several pieces.
        return data if not data or _is_whole_gzip_header(data) else None


def _is_whole_gzip_header(data: bytes) -> bool:
    """Whether a gzip header ends in `data`. Raises: Invalid for one that is too long or of an unknown kind."""
    if len(data) < 10:
        return False
    flags = data[3]
    if data[2] != 8 or flags & _RESERVED:
        raise Invalid(f"gzip stream: expected method 8 and no reserved flags, not {data[2]} and {flags:#04x}")
    stop = 10
    if flags & _EXTRA:
        stop += 2 + int.from_bytes(data[10:12], "little")
    for flag in (_NAME, _COMMENT):
        if flags & flag:
            stop = data.find(b"\0", stop) + 1 or len(data) + 1
    if flags & _HEADER_CRC:
        stop += 2
    if stop > len(data) > _MAX_GZIP_HEADER:
        raise Invalid(f"gzip stream: expected a header of at most {_MAX_GZIP_HEADER} bytes")
    return stop <= len(data)


# zstd (RFC 8878)

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
#: What `zstd -d` accepts too; it is allocated per frame.
_MAX_WINDOW_LOG = 27


def _is_skippable(head: bytes) -> bool:
    return len(head) >= 4 and head[0] & 0xF0 == 0x50 and head[1:4] == b"\x2a\x4d\x18"


class _ZstdDecoder(_MemberDecoder):
    """Frames and skippable frames; anything else after a frame is refused, as by `zstd -d`."""

    form = "zstd"
    errors = (zstd.ZstdError,)

    def new_member(self) -> _Inflater:
        options = {int(zstd.DecompressionParameter.window_log_max): _MAX_WINDOW_LOG}
        return zstd.ZstdDecompressor(options=options)

    def find_member(self, data: bytes, *, first: bool) -> bytes | None:
        return data
