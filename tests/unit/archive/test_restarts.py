"""RestartDecoder inflates what the other gzip decoder does, and keeps the points that SOCI's builder would keep."""

import gc
import gzip
import struct
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from random import Random

import pytest

from fsmount.archive import zstream
from fsmount.archive.codecs import PIECE_SIZE, Compression, decoder
from fsmount.archive.restarts import RestartDecoder, chunk_spans
from fsmount.archive.span import Restart, Span
from fsmount.archive.zstream import Inflater
from fsmount.errors import Invalid, Unsupported
from tests.fakes.gzips import (
    ENCODERS,
    HEADER,
    HEADERS,
    SINGLE,
    Deflate,
    by_zlib,
    encoded,
    fed,
    plain,
    soci_points,
)

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


def plain_of(blob: bytes, *, step: int = 65_536) -> bytes:
    return decoded(blob, step=step)[0]


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


@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_any_encoder_made_is_inflated_whatever_pieces_it_comes_in(encoder: str, library: str) -> None:
    blob = encoded(encoder)
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
def test_what_follows_a_member_is_taken_or_refused_as_the_other_decoder_does(
    tail: bytes, library: str
) -> None:
    blob = gzip.compress(b"first") + tail
    expected = outcome(by_codecs, blob)
    for step in (1, len(blob)):
        assert outcome(partial(plain_of, step=step), blob) == expected


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
        assert outcome(plain_of, blob[:stop]) is None
    for at in range(len(HEADERS[1]), len(blob)):
        changed = bytearray(blob)
        changed[at] ^= 1 << at % 8
        assert outcome(plain_of, bytes(changed)) in (None, plain()[:3000])


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
    assert next(RestartDecoder().feed(bomb[:-1] + b"?")), "the error at its end is not reached"


@pytest.mark.parametrize("spacing", [0, 10**9])
def test_all_that_the_data_so_far_inflates_to_comes_before_more_is_asked_for(
    spacing: int, library: str
) -> None:
    blob = gzip.compress(bytes(1_500_000))
    for stop in range(100, len(blob), 3):
        pieces = RestartDecoder(spacing=spacing).feed(blob[:stop])
        assert sum(map(len, pieces)) == len(zlib.decompressobj(31).decompress(blob[:stop]))


# -------------------- The points


@pytest.mark.parametrize("encoder", SINGLE)
def test_the_points_are_those_of_soci_s_builder(encoder: str, library: str) -> None:
    blob = encoded(encoder)
    for spacing in (0, SPACING, 10**9):
        assert decoded(blob, spacing=spacing)[1] == soci_points(blob, spacing)


@pytest.mark.parametrize(
    ("size", "second"), [(SPACING - 1, 2 * SPACING), (SPACING, SPACING + 1), (SPACING + 1, SPACING + 1)]
)
@pytest.mark.parametrize("empty", [Deflate.stored, Deflate.fixed])
def test_many_empty_blocks_at_one_place_make_no_more_than_one_point(
    empty: Callable[[Deflate], Deflate], size: int, second: int, library: str
) -> None:
    deflate = Deflate()
    for data in (b"", NOISE[: size - 10], b"0123456789", b"x", NOISE[: 2 * SPACING - size - 1], b"end"):
        deflate.stored(data)
        for _ in range(1000):
            empty(deflate)
    blob = deflate.member()
    data, restarts = decoded(blob)
    assert data == deflate.plain
    assert [one.out for one in restarts][:2] == [0, second]
    assert restarts == soci_points(blob, SPACING)
    assert decoded(blob, step=1)[1] == restarts


def test_empty_blocks_are_not_stopped_at_one_by_one(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    found = zstream.library()
    assert found is not None
    calls = 0

    def counted(*arguments: object) -> int:
        nonlocal calls
        calls += 1
        return found.inflate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(zstream, "library", lambda: replace(found, inflate=counted))
    deflate = Deflate()
    for data in (b"", NOISE, b"x"):  # no point is due, one is nearly, one was just taken
        deflate.stored(data)
        for _ in range(10_000):
            deflate.fixed()
    blob = deflate.member()
    assert decoded(blob)[0] == NOISE + b"x"
    assert calls < 30
    decoder = RestartDecoder(spacing=SPACING)
    threshold = blob.index(NOISE) + SPACING
    for block in (blob[:threshold], blob[threshold:]):
        assert len(list(decoder.feed(block))) <= 2
    assert calls < 60


def test_the_beginning_of_a_later_member_is_a_point_when_one_is_due(library: str) -> None:
    first, second, third = NOISE + b"x", NOISE[:100], NOISE[::-1] * 2
    blobs = [
        by_zlib(data, memory=1, head=head)
        for data, head in zip((first, second, third), HEADERS, strict=False)
    ]
    blob = blobs[0] + bytes(7) + blobs[1] + blobs[2]
    data, restarts = decoded(blob)
    assert data == first + second + third
    starts = [len(HEADERS[0]), len(blobs[0]) + 7 + len(HEADERS[1])]
    assert restarts[:2] == [Restart(starts[0], 0, 0, b""), Restart(starts[1], len(first), 0, b"")]
    assert len(restarts) == 3, "the second member is too small for the third to begin with one"
    inside = len(first) + len(second)
    assert restarts[2].window == data[inside : restarts[2].out], "no byte of another member"


def test_tiny_members_make_points_by_the_spacing_only(library: str) -> None:
    blob = gzip.compress(b"tiny", mtime=0) * 10_000 + gzip.compress(b"", mtime=0) * 1000
    data, restarts = decoded(blob, spacing=3999)
    assert data == b"tiny" * 10_000
    assert [one.out for one in restarts] == list(range(0, 40_001, 4000))
    assert all(one.window == b"" and one.bits == 0 for one in restarts)


def test_both_libraries_and_the_other_decoder_agree(use: Callable[..., None]) -> None:
    results, encoders = [], ("zlib -6", "members")
    for name in ("load_zlib_ng", "load_libz"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zstream, "library", lambda name=name: getattr(zstream, name)())
            results.append([decoded(encoded(encoder)) for encoder in encoders])
    assert results[0] == results[1]
    assert [data for data, _ in results[0]] == [by_codecs(encoded(encoder)) for encoder in encoders]


def test_without_any_library_there_are_no_points_and_that_is_said(use: Callable[..., None]) -> None:
    use()
    assert not RestartDecoder.available()
    with pytest.raises(Unsupported, match="neither zlib-ng nor libz"):
        RestartDecoder()


# -------------------- chunk_spans

POINTS = [Restart(10, 0, 0, b""), Restart(50, 100, 3, b"w1"), Restart(90, 250, 0, b"w2")]


def test_a_chunk_s_span_goes_from_the_point_before_it_to_the_point_after_it() -> None:
    chunks = [(0, 100, b"a"), (100, 20, None), (120, 130, b"c"), (250, 40, b"d"), (290, 0, None)]
    assert list(chunk_spans(POINTS, chunks, 120)) == [
        Span(10, 40, 100, skip=0, sha256=b"a"),
        Span(49, 41, 20, skip=0, bits=3, window=b"w1"),
        Span(49, 41, 130, skip=20, sha256=b"c", bits=3, window=b"w1"),
        Span(90, 30, 40, skip=0, sha256=b"d", window=b"w2"),
        Span(90, 30, 0, skip=40, window=b"w2"),
    ]


def test_a_chunk_over_several_points_takes_all_that_lies_between() -> None:
    chunks = [(99, 2, None), (101, 150, None)]
    assert list(chunk_spans(POINTS, chunks, 120)) == [
        Span(10, 80, 2, skip=99),
        Span(49, 71, 150, skip=1, bits=3, window=b"w1"),
    ]


def test_no_chunks_need_no_points() -> None:
    assert list(chunk_spans([], [], 120)) == []


# -------------------- Inflater: the native memory


def test_native_memory_is_freed_once_whatever_happens(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    found = zstream.library()
    assert found is not None
    ended: list[object] = []

    def end(stream: object) -> int:
        ended.append(stream)
        return found.end(stream)

    counting = replace(found, end=end)
    monkeypatch.setattr(zstream, "library", lambda: counting)
    closed = Inflater()
    closed.close()
    closed.close()
    assert len(ended) == 1
    for use_it in (closed.reset, closed.window, lambda: closed.inflate(1)):
        with pytest.raises(RuntimeError, match="closed"):
            use_it()
    for blob in (gzip.compress(plain()), HEADER + b"\x07"):
        decoder = RestartDecoder()
        with suppress(Invalid):
            list(decoder.feed(blob))
        ended.clear()
        del decoder
        gc.collect()
        assert len(ended) == 1
    refusing = replace(counting, init=lambda stream, wbits: -4)
    monkeypatch.setattr(zstream, "library", lambda: refusing)
    ended.clear()
    with pytest.raises(MemoryError):
        Inflater()
    gc.collect()
    assert ended == [], "what was never begun is not ended"


def test_an_inflater_keeps_the_data_it_reads(library: str) -> None:
    inflater = Inflater()
    data = gzip.compress(NOISE)
    references = sys.getrefcount(data)
    inflater.give(data)
    assert sys.getrefcount(data) == references + 1
    assert inflater.inflate(10**9) == NOISE
    assert inflater.ended
    assert inflater.left == 0
    inflater.close()
    assert sys.getrefcount(data) == references


def test_an_inflater_takes_nothing_that_could_move_and_no_place_outside(library: str) -> None:
    inflater = Inflater()
    data = gzip.compress(NOISE)
    for other in (bytearray(data), memoryview(data)):
        with pytest.raises(TypeError):
            inflater.give(other)  # type: ignore[arg-type]
    for start in (-1, len(data) + 1):
        with pytest.raises(ValueError, match="start"):
            inflater.give(data, start)
    inflater.give(data, len(data))
    assert inflater.inflate(10) == b""


def test_an_inflater_yields_never_more_than_its_memory_holds(library: str) -> None:
    inflater = Inflater()
    inflater.give(gzip.compress(bytes(2 * zstream.MAX_OUTPUT + 1)))
    sizes = [len(inflater.inflate(most)) for most in (-1, -(10**12), 0, 10**12, 2**32, 2**32 - 1)]
    assert sizes == [0, 0, 0, zstream.MAX_OUTPUT, zstream.MAX_OUTPUT, 1]


def test_threads_that_share_an_inflater_take_turns(library: str) -> None:
    inflater = Inflater()
    inflater.give(gzip.compress(plain()))
    pieces: list[bytes] = []

    def work() -> None:
        pieces.extend(inflater.inflate(5000) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(map(len, pieces)) == 80 * 5000
    assert sorted(pieces) == sorted(plain()[at : at + 5000] for at in range(0, 80 * 5000, 5000))
