"""zstd:chunked: zstd layers that end in skippable frames, with a table of contents and a footer that says where it is.

Everything here is about what the caller has fetched: the layer's annotations, the end of the blob, then the table.
The format is described in containers/storage, docs/containers-storage-zstd-chunked.md; stargz-snapshotter writes a
flavour of it, with the ranges of eStargz.
"""

import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from fsmount.archive.codecs import Compression
from fsmount.archive.header import Malformed
from fsmount.archive.span import Codec
from fsmount.archive.toc import MAX_TOC, Toc, inflate_toc, parse_sha256, parse_toc
from fsmount.errors import Corrupt, Invalid, Unsupported

#: Of the annotations. The older one is what podman and buildah wrote until 2022, and stargz-snapshotter still does.
PREFIXES = ("io.github.containers.zstd-chunked.", "io.containers.zstd-chunked.")

#: How many bytes of the blob's end hold any footer.
TAIL_SIZE = 72

#: Magic and length of a skippable frame (RFC 8878 §3.1.2).
_FRAME = struct.Struct("<4sI")
_SKIPPABLE = b"\x50\x2a\x4d\x18"
_NUMBERS = struct.Struct("<4Q")
#: The lengths of a footer, and the magics that one of that length ends with. Of the short ones, podman's and
#: buildah's have the first magic, stargz-snapshotter's the second.
_FOOTERS = {64: (b"GNUlInUx",), 40: (b"GNUlInUx", b"GnUlInUx")}
_POSITION = re.compile(":".join(["([0-9]{1,19})"] * 4))

#: The only type of table there is.
_CRFS = 1


@dataclass(frozen=True, slots=True)
class Position:
    """Where the compressed table lies: `length` bytes of the blob from `offset`, which inflate to `size`."""

    offset: int
    length: int
    size: int

    @property
    def stop(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Mark:
    """What the annotations of a layer say: the sha256 of its table, compressed; and its place, if they name one."""

    checksum: bytes
    position: Position | None


def read_mark(annotations: Mapping[str, str], blob_size: int) -> Mark | None:
    """What a layer's annotations say; None if it is no zstd:chunked layer.

    Raises: Invalid; Unsupported (another type of table, or a larger one than is read).
    """
    for prefix in PREFIXES:
        checksum = annotations.get(prefix + "manifest-checksum")
        position = annotations.get(prefix + "manifest-position")
        if checksum is not None:
            break
    else:
        return None
    try:
        sha256 = parse_sha256(checksum)
    except Malformed as problem:
        raise Invalid(f"the layer's annotation {prefix}manifest-checksum: {problem}") from None
    if position is None:
        return Mark(sha256, None)
    match = _POSITION.fullmatch(position)
    if match is None:
        raise Invalid(
            f"the layer's annotation {prefix}manifest-position: expected four numbers, not {position[:80]!a}"
        )
    offset, length, size, type_ = map(int, match.groups())
    return Mark(sha256, _position(offset, length, size, type_, blob_size))


def find_position(tail: bytes, blob_size: int) -> Position:
    """Where the table is by the blob's footer, for layers whose annotations do not say: writers of 2023 broke it.

    tail: the last bytes of the blob: TAIL_SIZE or more of them, or all.
    Raises: Invalid (no footer, or one that points elsewhere); Unsupported (another type of table, or a larger one than
    is read).
    """
    for length, magics in _FOOTERS.items():
        frame = tail[-_FRAME.size - length :]
        if (
            len(frame) == _FRAME.size + length
            and frame.startswith(_FRAME.pack(_SKIPPABLE, length))
            and frame.endswith(magics)
        ):
            offset, compressed, size, type_ = _NUMBERS.unpack_from(frame, _FRAME.size)
            return _position(offset, compressed, size, type_, blob_size - len(frame))
    raise Invalid(f"the zstd:chunked layer ends with {tail[-TAIL_SIZE:]!r}: expected a footer")


def read_toc(data: bytes, position: Position, *, checksum: bytes, max_size: int) -> Toc:
    """The table that is compressed in `data`: the blob's bytes from `position.offset` to `position.stop`.

    checksum: that of `Mark`.
    max_size: how many bytes all files together may have.
    CPU: as parse_toc. Memory: the table inflated, and what is made of it.
    Raises: Corrupt (not what the checksum names); Invalid; Unsupported.
    """
    found = hashlib.sha256(data)
    if found.digest() != checksum:
        raise Corrupt(
            "the zstd:chunked layer's table of contents is not what its annotation names: "
            f"expected sha256 {checksum.hex()}, not {found.hexdigest()}"
        )
    text = inflate_toc(Compression.ZSTD, data, limit=position.size)
    if len(text) != position.size:
        raise Invalid(
            f"the zstd:chunked layer's table of contents: expected {position.size} bytes, not {len(text)}"
        )
    return parse_toc(text, Codec.ZSTD, limit=position.offset - _FRAME.size, max_size=max_size)


def _position(offset: int, length: int, size: int, type_: int, limit: int) -> Position:
    """limit: where the table must have ended. Before it is the header of its frame."""
    if type_ != _CRFS:
        raise Unsupported(f"the zstd:chunked layer has a table of contents of type {type_}: only 1 is read")
    if not (offset >= _FRAME.size and 0 < length <= limit - offset and size > 0):
        raise Invalid(
            "the zstd:chunked layer's table of contents: "
            f"expected it within the blob's first {limit} bytes, not {length} bytes at {offset} ({size} inflated)"
        )
    if max(length, size) > MAX_TOC:
        raise Unsupported(
            f"the zstd:chunked layer has a table of contents of {max(length, size)} bytes: at most {MAX_TOC} are read"
        )
    return Position(offset, length, size)
