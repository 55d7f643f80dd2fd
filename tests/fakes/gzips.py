"""Gzip blobs of every shape: what each encoder at hand makes, and blocks and headers that none of them makes."""

import ctypes
import gzip
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from random import Random

import pytest
from isal import igzip_lib
from zlib_ng import zlib_ng

from fsmount.archive.span import Restart
from tests.peers import have

#: Ten bytes of header without any optional field.
HEADER = b"\x1f\x8b\x08" + bytes(6) + b"\xff"


def header(
    *, extra: bytes | None = None, name: bytes = b"", comment: bytes = b"", crc: bool = False
) -> bytes:
    """A member's header with optional fields (RFC 1952 §2.3)."""
    flags = 4 * (extra is not None) + 8 * bool(name) + 16 * bool(comment) + 2 * crc
    data = HEADER[:3] + bytes([flags]) + HEADER[4:]
    if extra is not None:
        data += struct.pack("<H", len(extra)) + extra
    data += b"".join(text + b"\0" for text in (name, comment) if text)
    return data + struct.pack("<H", zlib.crc32(data) & 0xFFFF) if crc else data


HEADERS = [
    HEADER,
    header(name=b"layer.tar"),
    header(extra=b"", comment=b"nothing"),
    header(extra=bytes(range(256)) * 20, name=b"name", comment=b"comment", crc=True),
]


class Deflate:
    """Deflate data that is put together block by block (RFC 1951)."""

    def __init__(self) -> None:
        self.plain = b""
        self._whole = bytearray()
        self._bits = self._width = 0

    def _put(self, value: int, width: int) -> None:
        self._bits |= value << self._width
        self._width += width
        size = self._width // 8
        self._whole += (self._bits & (1 << 8 * size) - 1).to_bytes(size, "little")
        self._bits >>= 8 * size
        self._width -= 8 * size

    def stored(self, data: bytes = b"") -> "Deflate":
        """A block of these bytes as they are, from the next whole byte on."""
        self._put(0b000, 3)
        self._put(0, -self._width % 8)
        self._whole += struct.pack("<HH", len(data), len(data) ^ 0xFFFF) + data
        self.plain += data
        return self

    def fixed(self, data: bytes = b"", *, last: bool = False) -> "Deflate":
        """A block of these bytes as literals of the fixed code."""
        self._put(0b010 | last, 3)
        for byte in data:
            code, width = (0x30 + byte, 8) if byte < 144 else (0x190 + byte - 144, 9)
            self._put(int(f"{code:0{width}b}"[::-1], 2), width)
        self._put(0, 7)
        self.plain += data
        return self

    def end(self) -> bytes:
        """All of it, with an empty last block."""
        self.fixed(last=True)
        self._put(0, -self._width % 8)
        return bytes(self._whole)

    def member(self, head: bytes = HEADER) -> bytes:
        return head + self.end() + struct.pack("<II", zlib.crc32(self.plain), len(self.plain))


def by_zlib(
    data: bytes,
    level: int = 6,
    strategy: int = zlib.Z_DEFAULT_STRATEGY,
    memory: int = 8,
    flushes: Sequence[int] = (zlib.Z_NO_FLUSH,),
    step: int = 10_000,
    head: bytes = HEADER,
) -> bytes:
    """One member, flushed after every `step` bytes as `flushes` say in turn."""
    encoder = zlib.compressobj(level, zlib.DEFLATED, -15, memory, strategy)
    parts = [head]
    for number, start in enumerate(range(0, len(data), step)):
        parts += [encoder.compress(data[start : start + step]), encoder.flush(flushes[number % len(flushes)])]
    parts += [encoder.flush(), struct.pack("<II", zlib.crc32(data), len(data) % 2**32)]
    return b"".join(parts)


def _by_program(*command: str) -> Callable[[bytes], bytes]:
    def encode(data: bytes) -> bytes:
        if why := have(command[0]):
            pytest.skip(why)
        return subprocess.run(command, input=data, capture_output=True, check=True).stdout

    return encode


def _by_members(data: bytes) -> bytes:
    """Members of all sizes, with zeros between some."""
    parts, start = [], 0
    for number, size in enumerate([0, 1, 50, 70_000, 200_000, 5, len(data)]):
        parts += [by_zlib(data[start : start + size], head=HEADERS[number % len(HEADERS)]), bytes(number % 3)]
        start += size
    return b"".join(parts)


def _by_blocks(data: bytes) -> bytes:
    """One member that begins with empty blocks and goes on with stored, fixed and empty ones."""
    deflate = Deflate().fixed().stored().fixed().fixed()
    random, start = Random(5), 0
    while start < len(data):
        size = random.choice([1, 2, 3, 5000])
        if random.random() < 0.5:
            deflate.fixed(data[start : start + size])
        else:
            deflate.stored(data[start : start + size])
        start += size
        for _ in range(random.randrange(3)):
            deflate.fixed()
    return deflate.member()


SINGLE: dict[str, Callable[[bytes], bytes]] = {
    **{f"zlib -{level}": partial(by_zlib, level=level) for level in range(10)},
    "zlib, small blocks": partial(by_zlib, memory=1),
    "zlib, fixed codes": partial(by_zlib, strategy=zlib.Z_FIXED),
    "zlib, no matches": partial(by_zlib, strategy=zlib.Z_HUFFMAN_ONLY),
    "zlib, runs": partial(by_zlib, strategy=zlib.Z_RLE),
    "zlib, flushed": partial(
        by_zlib, flushes=[zlib.Z_SYNC_FLUSH, zlib.Z_BLOCK, zlib.Z_PARTIAL_FLUSH, zlib.Z_FULL_FLUSH]
    ),
    "zlib, every header": partial(by_zlib, head=HEADERS[-1]),
    **{f"zlib-ng -{level}": partial(zlib_ng.compress, level=level, wbits=31) for level in (1, 2, 6, 9)},
    **{
        f"isal -{level}": partial(igzip_lib.compress, level=level, flag=igzip_lib.COMP_GZIP)
        for level in range(4)
    },
    "gzip.compress": gzip.compress,
    "gzip -1": _by_program("gzip", "-1"),
    "gzip": _by_program("gzip"),
    "gzip --rsyncable": _by_program("gzip", "--rsyncable"),
    "pigz": _by_program("pigz", "-p2"),
    "pigz -i": _by_program("pigz", "-p2", "-i"),
    "igzip -0": _by_program("igzip", "-0"),
    "igzip -3": _by_program("igzip", "-3"),
    "blocks": _by_blocks,
}
ENCODERS = SINGLE | {"members": _by_members}


@cache
def plain() -> bytes:
    """440 KB: prose, what repeats from far, noise, and zeros."""
    random = Random(1)
    words = [random.randbytes(random.randrange(2, 9)).hex().encode() for _ in range(600)]
    prose = b" ".join(random.choices(words, k=12_000))
    noise = random.randbytes(100_000)
    return prose + noise[:70_000] + noise[:50_000] + bytes(80_000) + prose[:100_000]


@cache
def encoded(encoder: str) -> bytes:
    """What an encoder makes of `plain()`; skips the test if it is not there."""
    return ENCODERS[encoder](plain())


def fed(blob: bytes, step: int) -> Iterator[bytes]:
    """The blob in pieces."""
    for start in range(0, len(blob), step):
        yield blob[start : start + step]


class _Stream(ctypes.Structure):
    _fields_ = (
        *(("next_in", ctypes.c_char_p), ("avail_in", ctypes.c_uint), ("total_in", ctypes.c_ulong)),
        *(("next_out", ctypes.c_void_p), ("avail_out", ctypes.c_uint), ("total_out", ctypes.c_ulong)),
        *(("pointers", ctypes.c_void_p * 5), ("data_type", ctypes.c_int), ("numbers", ctypes.c_ulong * 2)),
    )


@cache
def soci_points(blob: bytes, spacing: int) -> list[Restart]:
    """What SOCI's builder records of a single-member blob: libz, stopped at every boundary, with one large output."""
    try:
        libz = ctypes.CDLL("libz.so.1")
    except OSError as error:
        pytest.skip(str(error))
    size = int.from_bytes(blob[-4:], "little") + 1
    output = ctypes.create_string_buffer(size)
    stream = _Stream(next_in=blob, avail_in=len(blob), next_out=ctypes.addressof(output), avail_out=size)
    libz.inflateInit2_(ctypes.byref(stream), 47, b"1", ctypes.sizeof(stream))
    points: list[Restart] = []
    while libz.inflate(ctypes.byref(stream), 5) == 0:
        out = stream.total_out
        if (
            stream.data_type & 128
            and not stream.data_type & 64
            and (not points or out - points[-1].out > spacing)
        ):
            window = output.raw[max(0, out - 32768) : out]
            points.append(Restart(stream.total_in, out, stream.data_type & 7, window))
    libz.inflateEnd(ctypes.byref(stream))
    return points
