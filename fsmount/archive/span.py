"""Span: a range of a layer's blob that can be inflated alone; and Table, what every kind of index is read into."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fsmount.archive.entry import Entry

#: Bytes before a restart point that what comes after it may repeat (RFC 1951 §2).
WINDOW_SIZE = 32 * 1024


class Codec(enum.IntEnum):
    """How the bytes of a span are inflated. The values are stored in the layer indexes: never renumber."""

    #: They are the bytes themselves.
    RAW = 0
    #: Deflate data from a restart point on, over the seams of gzip members if need be.
    RESTART = 1
    #: One or more gzip members; of the last there may be no more than what is wanted of it.
    GZIP = 2
    #: One or more zstd frames; the last as with gzip members.
    ZSTD = 3


class Kind(enum.StrEnum):
    """How a layer is read. The values are stored in the layer indexes, and shown to users."""

    STREAMED = "streamed"
    RANGED_TAR = "ranged tar"
    RANGED_FILE = "ranged file"
    SOCI_V1 = "SOCI v1"
    SOCI_V2 = "SOCI v2"
    ESTARGZ = "eStargz"
    ZSTD_CHUNKED = "zstd:chunked"


class Trust(enum.StrEnum):
    """What an index is believed on. The values are stored in the layer indexes."""

    #: The whole layer has gone by, and had the digest that its manifest names.
    CERTIFIED = "certified"
    #: Digests lead from the manifest to the index, and from it to every chunk.
    BOUND = "bound"
    #: Nobody vouches for it until the layer is certified.
    HINT = "hint"


class Restart(NamedTuple):
    """A place in a gzip blob where inflating can begin: a boundary of deflate blocks, or of members.

    `offset` is that of the first whole byte, in the blob; so many (0 to 7) high bits of the byte before it
    belong to what follows as well. `out` bytes have been inflated by then, and `window` is the last 32 KiB of
    those of the same gzip member, or all of them if they are fewer.
    """

    offset: int
    out: int
    bits: int
    window: bytes


@dataclass(frozen=True, slots=True)
class Span:
    """`length` bytes of the blob from `offset` inflate, after `skip` bytes that are dropped, to `size` wanted ones.

    `sha256` is that of the wanted bytes, `blob_sha256` of the compressed ones; None where the index does not
    say. `bits` and `window` are those of the restart point, for Codec.RESTART: when bits is not 0, the span's first
    byte is the one of which only the high bits belong to it.
    """

    offset: int
    length: int
    size: int
    skip: int = 0
    sha256: bytes | None = None
    blob_sha256: bytes | None = None
    bits: int = 0
    window: bytes = b""


@dataclass(frozen=True, slots=True)
class Table:
    """What an index of any kind says of a layer: its members in order, and where their bytes are.

    The extents of the entries refer to the bytes of all spans joined in order. That is the layer's tar for some
    kinds, and only the contents of its files for others.
    """

    codec: Codec
    entries: Sequence[Entry]
    spans: Sequence[Span]
