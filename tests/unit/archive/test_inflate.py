"""inflate_span gives the bytes that a span claims, or says that the data does not hold them."""

import gzip
import hashlib
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
import zstandard
from backports import zstd

from fsmount.archive import inflate
from fsmount.archive.inflate import check_span, inflate_span
from fsmount.archive.restarts import RestartDecoder, chunk_spans
from fsmount.archive.span import Codec, Span
from fsmount.errors import Corrupt
from tests.fakes.gzips import ENCODERS, HEADERS, Deflate, by_zlib, encoded, header, plain

SPACING = 20_000
NOISE = Random(4).randbytes(300_000)
DATA = plain()[:300_000]


@pytest.fixture(autouse=True, params=["isal", "zlib"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each library in turn."""
    if request.param == "zlib":
        monkeypatch.setattr(inflate, "_raw_inflate", lambda window: zlib.decompressobj(-15, zdict=window))
    name: str = request.param
    return name


def spans_of(blob: bytes, size: int, *, spacing: int = SPACING, cut: int = 7001) -> list[Span]:
    """The spans of a gzip blob's chunks of `cut` bytes."""
    decoder = RestartDecoder(spacing=spacing)
    for _ in decoder.feed(blob):
        pass
    decoder.finish()
    chunks = [(start, min(cut, size - start), None) for start in range(0, size, cut)]
    return list(chunk_spans(decoder.restarts, chunks, len(blob)))


def inflated(codec: Codec, span: Span, blob: bytes) -> bytes:
    """What the span gives, from nothing but its own bytes."""
    return inflate_span(codec, span, blob[span.offset : span.offset + span.length])


def whole(data: bytes, size: int, *, skip: int = 0) -> Span:
    return Span(0, len(data), size, skip=skip)


# -------------------- Restart points


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(("spacing", "cut"), [(SPACING, 7001), (1000, 50_000), (10**9, 300_000)])
def test_the_spans_of_what_any_encoder_made_join_to_its_data(encoder: str, spacing: int, cut: int) -> None:
    blob = encoded(encoder)
    spans = spans_of(blob, len(plain()), spacing=spacing, cut=cut)
    assert b"".join(inflated(Codec.RESTART, span, blob) for span in spans) == plain()


def test_a_span_may_begin_at_any_bit_of_its_first_byte() -> None:
    blob = encoded("zlib, flushed")
    spans = spans_of(blob, len(plain()), spacing=0, cut=3000)
    assert {span.bits for span in spans} == set(range(8))
    for one, next_ in pairwise(spans):
        assert one.offset + one.length >= next_.offset + bool(next_.bits), "the shared byte is in both"


@pytest.mark.parametrize("bits", range(8))
@pytest.mark.parametrize("kind", [Deflate.stored, Deflate.fixed])
def test_stored_blocks_after_a_shared_byte_stay_aligned(
    bits: int, kind: Callable[[Deflate, bytes], Deflate]
) -> None:
    count = next(n for n in range(1, 9) if (19 * n + bits) % 8 == 0)
    deflate = Deflate()
    for _ in range(count):
        deflate.fixed(b"\xff")  # 3 bits, 9 and 7
    blob = kind(deflate, NOISE[:100]).member()
    decoder = RestartDecoder(spacing=0)
    assert b"".join(decoder.feed(blob)) == b"\xff" * count + NOISE[:100]
    (point,) = [one for one in decoder.restarts if one.out == count]
    assert point.bits == bits
    (span,) = chunk_spans([point], [(count, 100, None)], len(blob))
    assert inflated(Codec.RESTART, span, blob) == NOISE[:100]


def test_the_filler_before_a_shared_byte_inflates_to_nothing() -> None:
    for bits in range(1, 8):
        filler, width = inflate._FILLERS[bits]
        assert (width + bits) % 8 == 0
        # The shared byte's high bits begin an empty last block.
        last = Deflate().end()
        data = (filler | int.from_bytes(last, "little") << width).to_bytes((width + 23) // 8, "little")
        decoder = inflate._raw_inflate(b"")
        assert decoder.decompress(data, 100) == b""
        assert decoder.eof


@pytest.mark.parametrize("head", [*HEADERS, header(extra=bytes(65_535), name=b"n" * 70_000, crc=True)])
@pytest.mark.parametrize("zeros", [0, 1, 100_000])
def test_a_span_goes_on_over_the_seams_of_members(head: bytes, zeros: int) -> None:
    parts = [DATA[:1000], b"", DATA[1000:1001], DATA[1001:]]
    blob = bytes(zeros).join(by_zlib(part, head=head) for part in parts)
    for skip, size in [(0, len(DATA)), (999, 3), (1000, 1), (1001, 10)]:
        at_start = Span(len(head), len(blob) - len(head), size, skip=skip)
        assert inflated(Codec.RESTART, at_start, blob) == DATA[skip : skip + size]
        assert inflated(Codec.GZIP, whole(blob, size, skip=skip), blob) == DATA[skip : skip + size]


def test_a_member_s_trailer_is_eight_bytes_whatever_they_are() -> None:
    for trailer in (bytes(8), b"\xff" * 8, HEADERS[0][:8]):
        blob = by_zlib(DATA[:9])[:-8] + trailer + by_zlib(DATA[9:])
        assert inflated(Codec.GZIP, whole(blob, len(DATA)), blob) == DATA


def test_all_that_the_data_inflates_to_can_be_had() -> None:
    blob = by_zlib(bytes(1_500_000))[10:]
    for stop in range(100, len(blob), 3):
        data = blob[:stop]
        size = len(zlib.decompressobj(-15).decompress(data))
        assert inflate_span(Codec.RESTART, whole(data, size), data) == bytes(size)
        with pytest.raises(Corrupt):
            inflate_span(Codec.RESTART, whole(data, size + 1000), data)


def test_what_comes_after_the_wanted_bytes_does_not_matter() -> None:
    blob = by_zlib(DATA)
    for tail in (b"", b"garbage", bytes(9), b"\x1f\x8b\x08", HEADERS[-1][:-1]):
        assert inflated(Codec.GZIP, whole(blob + tail, len(DATA)), blob + tail) == DATA
    half = by_zlib(DATA)[: len(blob) // 2]
    assert inflated(Codec.GZIP, whole(half, 50_000, skip=10), half) == DATA[10:50_010]


# -------------------- The other codecs


def test_raw_bytes_are_the_slice() -> None:
    assert inflated(Codec.RAW, Span(5, 20, 7, skip=3), DATA) == DATA[8:15]
    assert inflated(Codec.RAW, Span(5, 20, 20), DATA) == DATA[5:25]


SKIPPABLE = b"\x5a\x2a\x4d\x18\x03\0\0\0abc"


@pytest.mark.parametrize(
    "blob",
    [
        zstd.compress(DATA),
        zstandard.ZstdCompressor(level=19, write_checksum=True, write_content_size=False).compress(DATA),
        SKIPPABLE + zstd.compress(DATA[:7]) + SKIPPABLE * 2 + zstd.compress(b"") + zstd.compress(DATA[7:]),
        b"".join(zstd.compress(DATA[at : at + 100]) for at in range(0, len(DATA), 100)) + b"garbage",
    ],
)
def test_zstd_frames_are_joined_and_skippable_ones_are_nothing(blob: bytes) -> None:
    for skip, size in [(0, len(DATA)), (3, 10), (len(DATA) - 1, 1), (150_000, 1000)]:
        assert inflated(Codec.ZSTD, whole(blob, size, skip=skip), blob) == DATA[skip : skip + size]


def test_a_zstd_window_of_more_than_128_mib_is_refused() -> None:
    def frame(window_log: int) -> bytes:
        # A frame header without content size, then one raw block, the last (RFC 8878 §3.1.1).
        return b"\x28\xb5\x2f\xfd\0" + bytes([(window_log - 10) << 3]) + b"\x21\0\0data"

    assert inflated(Codec.ZSTD, whole(frame(27), 4), frame(27)) == b"data"
    with pytest.raises(Corrupt, match="memory"):
        inflated(Codec.ZSTD, whole(frame(28), 4), frame(28))


@pytest.mark.parametrize("codec", Codec)
def test_a_memoryview_will_do_and_nothing_is_read_for_no_bytes(codec: Codec) -> None:
    encoders: dict[Codec, Callable[[bytes], bytes]] = {
        Codec.RAW: bytes,
        Codec.RESTART: lambda data: by_zlib(data)[10:],
        Codec.GZIP: by_zlib,
        Codec.ZSTD: zstd.compress,
    }
    blob = encoders[codec](DATA)
    assert inflate_span(codec, whole(blob, 9, skip=1), memoryview(bytearray(blob))) == DATA[1:10]
    assert inflate_span(codec, whole(b"broken", 0, skip=5), b"broken") == b""


# -------------------- What is not right

BLOBS = [
    (Codec.RAW, 0, DATA[:5000]),
    (Codec.RESTART, 10, by_zlib(DATA[:5000])),
    (Codec.GZIP, 0, by_zlib(DATA[:2000]) + by_zlib(DATA[2000:5000])),
    (Codec.ZSTD, 0, zstd.compress(DATA[:2000]) + zstd.compress(DATA[2000:5000])),
]


@pytest.mark.parametrize(("codec", "offset", "blob"), BLOBS)
def test_fewer_bytes_than_claimed_are_corrupt(codec: Codec, offset: int, blob: bytes) -> None:
    span = Span(offset, len(blob) - offset, 5000)
    assert inflated(codec, span, blob) == DATA[:5000]
    for wrong in (replace(span, size=5001), replace(span, skip=1), replace(span, skip=10**12)):
        with pytest.raises(
            Corrupt, match=rf"offset {offset} .*expected {wrong.size} bytes after {wrong.skip}"
        ):
            inflated(codec, wrong, blob)
    with pytest.raises(Corrupt, match=f"expected {span.length} compressed bytes, not {span.length - 1}"):
        inflated(codec, span, blob[:-1])


@pytest.mark.parametrize(("codec", "offset", "blob"), BLOBS)
def test_data_that_is_cut_or_changed_is_corrupt_or_gives_so_many_bytes(
    codec: Codec, offset: int, blob: bytes
) -> None:
    refused = 0
    for stop in range(offset, len(blob), 7):
        changed = bytearray(blob)
        changed[stop] ^= 0xFF
        for data in (blob[offset:stop], bytes(changed[offset:])):
            try:
                found = inflate_span(codec, whole(data, 5000), data)
            except Corrupt:
                refused += 1
            else:
                assert len(found) == 5000
    assert refused > len(blob) // 7 // 2


@pytest.mark.parametrize(
    ("codec", "data"),
    [
        (Codec.RESTART, b"\x07" + bytes(100)),
        (Codec.GZIP, by_zlib(DATA)[:10] + b"\x07" + bytes(100)),
        (Codec.GZIP, b"PK" + bytes(100)),
        (Codec.GZIP, b""),
        (Codec.GZIP, HEADERS[-1][:500]),
        (Codec.GZIP, by_zlib(b"")[:-9]),
        (Codec.ZSTD, b"\x28\xb5\x2f\xfd" + bytes(100)),
        (Codec.ZSTD, SKIPPABLE),
        (Codec.ZSTD, b"PK" + bytes(100)),
        (Codec.ZSTD, b""),
        (Codec.RAW, b""),
    ],
)
def test_what_is_no_data_of_its_codec_is_corrupt(codec: Codec, data: bytes) -> None:
    with pytest.raises(Corrupt, match=f"the span of {len(data)} bytes at offset 0"):
        inflate_span(codec, whole(data, 1), data)


@pytest.mark.parametrize("bits", [-1, 1, 8, 200])
def test_a_shared_byte_that_there_cannot_be_is_corrupt(bits: int) -> None:
    data = b"" if bits == 1 else by_zlib(DATA)[10:]
    with pytest.raises(Corrupt):
        inflate_span(Codec.RESTART, replace(whole(data, 1), bits=bits), data)


def test_a_reference_to_before_the_window_is_corrupt() -> None:
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=NOISE[:32_000])
    data = encoder.compress(NOISE[:32_000]) + encoder.flush()
    span = replace(whole(data, 32_000), window=NOISE[:32_000])
    assert inflate_span(Codec.RESTART, span, data) == NOISE[:32_000]
    with pytest.raises(Corrupt):
        inflate_span(Codec.RESTART, replace(span, window=b""), data)


# -------------------- Bounds

SIZE = 4_000_000
ZEROS = bytes(100_000_000)
BOMBS = {
    Codec.RESTART: by_zlib(ZEROS)[10:],
    Codec.GZIP: gzip.compress(ZEROS),
    Codec.ZSTD: zstd.compress(ZEROS),
    Codec.RAW: ZEROS,
}


@pytest.mark.parametrize("codec", BOMBS)
@pytest.mark.parametrize("skip", [0, 8_000_000])
def test_memory_is_bounded_by_what_is_wanted_and_what_is_skipped_is_not_kept(codec: Codec, skip: int) -> None:
    bomb = BOMBS[codec]
    tracemalloc.start()
    found = inflate_span(codec, whole(bomb, SIZE, skip=skip), bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == bytes(SIZE)
    assert peak < 1.15 * SIZE + 1_000_000
    tracemalloc.start()
    with pytest.raises(Corrupt):
        inflate_span(codec, whole(bomb, 10**12, skip=99_999_999), bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000, "a claim costs nothing before there is data for it"


def test_blocks_and_members_that_hold_nothing_are_passed_however_many() -> None:
    blob = by_zlib(b"") * 20_000 + Deflate().fixed(b"x").member()
    assert inflated(Codec.GZIP, whole(blob, 1), blob) == b"x"
    data = b"\0\0\0\xff\xff" * 200_000 + Deflate().fixed(b"x").end()
    assert inflate_span(Codec.RESTART, whole(data, 1), data) == b"x"


# -------------------- check_span


def test_digests_are_compared_when_the_span_has_them() -> None:
    blob, data = by_zlib(DATA), DATA
    right, wrong = hashlib.sha256(data).digest(), hashlib.sha256(b"").digest()
    span = Span(7, len(blob), len(data))
    check_span(span, blob, data)
    check_span(replace(span, sha256=right, blob_sha256=hashlib.sha256(blob).digest()), blob, memoryview(data))
    with pytest.raises(Corrupt, match=f"offset 7 .*inflated bytes have not the sha256 {wrong.hex()}"):
        check_span(replace(span, sha256=wrong), blob, data)
    with pytest.raises(Corrupt, match=f"compressed bytes have not the sha256 {right.hex()}"):
        check_span(replace(span, blob_sha256=right, sha256=right), blob, data)
