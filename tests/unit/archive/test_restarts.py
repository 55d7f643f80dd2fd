"""RestartDecoder inflates what the other gzip decoder does, and keeps the points that SOCI's builder would keep."""

import gc
import gzip
import struct
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

import pytest

from fsmount.archive import zstream
from fsmount.archive.codecs import PIECE_SIZE, Compression, decoder
from fsmount.archive.restarts import RestartDecoder, chunk_spans
from fsmount.archive.span import Restart, Span
from fsmount.archive.zstream import Inflater
from fsmount.errors import Invalid, Unsupported
from tests.fakes.gzips import ENCODERS, HEADER, HEADERS, SINGLE, Deflate, by_zlib, fed, plain, soci_points

SPACING = 20_000
NOISE = Random(3).randbytes(SPACING)


def _absent() -> zstream.Library:
    raise ImportError


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes the named loaders of zstream the only ones that find a library."""

    def use_only(*names: str) -> None:
        for name in ("load_zlib_ng", "load_libz"):
            if name not in names:
                monkeypatch.setattr(zstream, name, _absent)
        zstream.library.cache_clear()

    yield use_only
    monkeypatch.undo()
    zstream.library.cache_clear()


@pytest.fixture(params=["load_zlib_ng", "load_libz"])
def library(request: pytest.FixtureRequest, use: Callable[..., None]) -> str:
    """Each library in turn, as if there were no other."""
    use(request.param)
    if not RestartDecoder.available():
        pytest.skip(f"{request.param} finds nothing")
    found = zstream.library()
    assert found is not None
    return found.name


def decoded(blob: bytes, *, spacing: int = SPACING, step: int = 65_536) -> tuple[bytes, list[Restart]]:
    decoder = RestartDecoder(spacing=spacing)
    data = b"".join(piece for block in fed(blob, step) for piece in decoder.feed(block))
    decoder.finish()
    return data, decoder.restarts


def outcome(decode: Callable[[bytes], bytes], blob: bytes) -> bytes | None:
    """What a blob inflates to, None if it is refused."""
    try:
        return decode(blob)
    except Invalid:
        return None


def by_codecs(blob: bytes) -> bytes:
    other = decoder(Compression.GZIP, max_output=10**9)
    data = b"".join(other.feed(blob))
    other.finish()
    return data


# -------------------- What it inflates to


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_what_any_encoder_made_is_inflated_whatever_pieces_it_comes_in(
    encode: Callable[[bytes], bytes], library: str
) -> None:
    blob = encode(plain())
    whole = decoded(blob)
    assert whole[0] == plain()
    for step in (len(blob), 997):
        assert decoded(blob, step=step) == whole


def test_a_blob_may_come_byte_by_byte(library: str) -> None:
    blob = b"".join(by_zlib(b"x" * 300, head=head) + bytes(2) for head in HEADERS) + b"\x1f?"
    assert decoded(blob, spacing=100, step=1) == decoded(blob, spacing=100)
    assert decoded(blob)[0] == b"x" * 300 * len(HEADERS)


@pytest.mark.parametrize(
    "tail",
    [
        b"\0",
        bytes(100_000),
        b"garbage",
        b"\x1e\x8b",
        b"\x1f",
        b"\x1f?",
        bytes(5) + b"\x1f\x8b",
        bytes(5) + b"garbage" + gzip.compress(b"after garbage"),
        bytes(5) + gzip.compress(b"after zeros"),
        gzip.compress(b"x")[:-1],
        HEADER[:9],
        HEADERS[-1][:-1],
        b"\x1f\x8b\x09" + bytes(30),
        b"\x1f\x8b\x08\xe0" + bytes(30),
    ],
    ids=lambda tail: repr(tail[:12]),
)
def test_what_follows_a_member_is_taken_or_refused_as_the_other_decoder_does(tail: bytes, library: str) -> None:
    blob = gzip.compress(b"first") + tail
    for step in (1, len(blob)):
        assert outcome(lambda blob, step=step: decoded(blob, step=step)[0], blob) == outcome(by_codecs, blob)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "cut short"),
        (b"\x1f", "cut short"),
        (b"\x1fx", "expected the magic 1f8b, not 1f78"),
        (bytes(20), "expected the magic 1f8b, not 0000"),
        (by_zlib(b"data")[:-1], "cut short"),
        (HEADER, "cut short"),
        (b"\x1f\x8b\x09" + bytes(30), "member 1: .*method"),
        (b"\x1f\x8b\x08\xe0" + bytes(30), "member 1: .*flags"),
        (HEADERS[-1][:-1] + b"?" + by_zlib(b"data")[10:], "member 1: .*header crc"),
        (HEADER + b"\x07" + bytes(30), "member 1: .*block type"),
        (by_zlib(b"data")[:-8] + struct.pack("<II", zlib.crc32(b"date"), 4), "member 1: .*data check"),
        (by_zlib(b"fine") + by_zlib(b"data")[:-1] + b"?", "member 2: .*length check"),
    ],
)
def test_a_broken_blob_is_invalid_and_the_message_says_where(blob: bytes, message: str, library: str) -> None:
    with pytest.raises(Invalid, match=f"gzip stream.*{message}"):
        decoded(blob)


def test_any_cut_is_told_and_no_byte_can_change_unseen(library: str) -> None:
    blob = by_zlib(plain()[:3000], head=HEADERS[1], flushes=[zlib.Z_SYNC_FLUSH], step=1000)
    for stop in range(len(blob)):
        assert outcome(lambda blob: decoded(blob)[0], blob[:stop]) is None
    for at in range(len(HEADERS[1]), len(blob)):
        changed = bytearray(blob)
        changed[at] ^= 1 << at % 8
        assert outcome(lambda blob: decoded(blob)[0], bytes(changed)) in (None, plain()[:3000])


def test_a_bomb_is_inflated_piece_by_piece_as_it_is_asked_for(library: str) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    tracemalloc.start()
    decoder = RestartDecoder()
    sizes = [len(piece) for piece in decoder.feed(bomb)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(sizes) == 50_000_000
    assert max(sizes) <= PIECE_SIZE
    assert len(decoder.restarts) <= 12
    assert peak < 2_000_000
    pieces = RestartDecoder().feed(bomb[:-1] + b"?")
    assert next(pieces)
    pieces.close()  # the error at its end is not reached


# -------------------- The points


@pytest.mark.parametrize("encode", SINGLE.values(), ids=SINGLE)
def test_the_points_are_those_of_soci_s_builder(encode: Callable[[bytes], bytes], library: str) -> None:
    blob = encode(plain())
    for spacing in (0, 1, SPACING, 10**9):
        if spacing > 1 and "blocks" not in encode.__name__ if hasattr(encode, "__name__") else spacing > 1:
            assert decoded(blob, spacing=spacing)[1] == soci_points(blob, spacing)


@pytest.mark.parametrize("size", [SPACING - 1, SPACING, SPACING + 1])
@pytest.mark.parametrize("empty", [Deflate.stored, Deflate.fixed])
def test_empty_blocks_are_passed_and_none_but_the_first_that_is_due_is_a_point(
    empty: Callable[[Deflate], Deflate], size: int, library: str
) -> None:
    deflate = Deflate()
    for data in (b"", NOISE[: size - 10], b"0123456789", b"x", NOISE, b"end"):
        deflate.stored(data)
        for _ in range(1000):
            empty(deflate)
    blob = deflate.member()
    data, restarts = decoded(blob)
    assert data == deflate.plain
    assert restarts == soci_points(blob, SPACING)
    second = size if size > SPACING else size + 1 if size == SPACING else SPACING
    assert [one.out for one in restarts][:2] == [0, max(second, SPACING + 1) if size != SPACING - 1 else size + 1 + SPACING]
