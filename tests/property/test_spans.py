"""Any gzip blob is, span by span, what it is as a whole; and no bytes at all make inflate_span do more than refuse."""

import zlib
from itertools import accumulate, pairwise
from random import Random

from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from fsmount.archive.inflate import inflate_span
from fsmount.archive.restarts import RestartDecoder, chunk_spans
from fsmount.archive.span import WINDOW_SIZE, Codec, Restart, Span
from fsmount.errors import Corrupt
from tests.fakes.gzips import HEADERS, Deflate, by_zlib, soci_points

_NOISE = Random(6).randbytes(4000)
#: Short, as so many blocks and members are wanted; some of it repeats.
_DATA = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda at, size: _NOISE[at : at + size], st.integers(0, 3000), st.integers(0, 1000)),
    st.builds(lambda byte, size: byte * size, st.sampled_from([b"a", b"\0"]), st.integers(0, 3000)),
)


def _by_blocks(blocks: list[tuple[bool, bytes]], head: bytes) -> tuple[bytes, bytes]:
    deflate = Deflate()
    for stored, data in blocks:
        if stored:
            deflate.stored(data)
        else:
            deflate.fixed(data)
    return deflate.plain, deflate.member(head)


def _by_encoder(
    parts: list[bytes], level: int, strategy: int, flushes: list[int], step: int, head: bytes
) -> tuple[bytes, bytes]:
    data = b"".join(parts)
    return data, by_zlib(data, level, strategy, 1, flushes, step, head)


#: What a member inflates to, and the member.
_MEMBERS = st.one_of(
    st.builds(_by_blocks, st.lists(st.tuples(st.booleans(), _DATA), max_size=12), st.sampled_from(HEADERS)),
    st.builds(
        _by_encoder,
        st.lists(_DATA, max_size=12),
        st.integers(0, 9),
        st.sampled_from([zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE]),
        st.lists(
            st.sampled_from(
                [zlib.Z_NO_FLUSH, zlib.Z_BLOCK, zlib.Z_PARTIAL_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH]
            ),
            min_size=1,
            max_size=3,
        ),
        st.integers(50, 5000),
        st.sampled_from(HEADERS),
    ),
)
_SPACINGS = st.one_of(st.integers(0, 50), st.integers(0, 5000))


def _decoded(blob: bytes, spacing: int, cuts: list[int]) -> tuple[bytes, list[Restart]]:
    decoder = RestartDecoder(spacing=spacing)
    edges = [0, *sorted(cut % (len(blob) + 1) for cut in cuts), len(blob)]
    data = b"".join(piece for start, stop in pairwise(edges) for piece in decoder.feed(blob[start:stop]))
    decoder.finish()
    return data, decoder.restarts


@settings(max_examples=200, deadline=None)
@given(
    members=st.lists(st.tuples(_MEMBERS, st.integers(0, 3)), min_size=1, max_size=5),
    spacing=_SPACINGS,
    cuts=st.lists(st.integers(0, 2**20), max_size=5),
    sizes=st.lists(st.integers(1, 3000), min_size=1),
)
def test_any_members_are_span_by_span_what_they_are_as_a_whole(
    members: list[tuple[tuple[bytes, bytes], int]], spacing: int, cuts: list[int], sizes: list[int]
) -> None:
    plain = b"".join(data for (data, _), _ in members)
    blob = b"".join(member + bytes(zeros) for (_, member), zeros in members)
    data, restarts = _decoded(blob, spacing, cuts)
    assert data == plain
    assert restarts[0][1:] == (0, 0, b"")
    assert all(after.out - before.out > spacing for before, after in pairwise(restarts))

    starts = [start for start in accumulate(sizes, initial=0) if start < len(plain)]
    chunks = [(start, stop - start, None) for start, stop in pairwise([*starts, len(plain)])]
    found = [
        inflate_span(Codec.RESTART, span, blob[span.offset : span.offset + span.length])
        for span in chunk_spans(restarts, chunks, len(blob))
    ]
    assert found == [plain[start : start + size] for start, size, _ in chunks]
    # The same bytes, from whole members.
    for start, size, _ in chunks[:3]:
        assert (
            inflate_span(Codec.GZIP, Span(0, len(blob), size, skip=start), blob)
            == plain[start : start + size]
        )


@settings(max_examples=200, deadline=None)
@given(member=_MEMBERS, spacing=_SPACINGS, cuts=st.lists(st.integers(0, 2**20), max_size=5))
def test_the_points_of_any_member_are_those_of_soci_s_builder(
    member: tuple[bytes, bytes], spacing: int, cuts: list[int]
) -> None:
    assert _decoded(member[1], spacing, cuts)[1] == soci_points(member[1], spacing)


_GZIP_START, _ZSTD_START = HEADERS[0], b"\x28\xb5\x2f\xfd"
_RANDOM = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda start, rest: start + rest, st.sampled_from([_GZIP_START, _ZSTD_START]), st.binary(max_size=300)
    ),
)
_FULL = b"".join(_NOISE[at : at + 70] + bytes(50) for at in range(0, 2000, 70))
_GOOD = [by_zlib(_FULL), by_zlib(_FULL)[10:], by_zlib(_FULL, level=0), zstd.compress(_FULL)]


def _changed(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    result = bytearray(data)
    for at, value in changes:
        result[at % len(result)] ^= value
    return bytes(result)


_BROKEN = st.builds(
    _changed,
    st.sampled_from(_GOOD),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=3),
)


@settings(max_examples=1000, deadline=None)
@given(
    codec=st.sampled_from(Codec),
    data=st.one_of(_RANDOM, _BROKEN),
    skip=st.integers(0, 400),
    size=st.integers(0, 400),
    bits=st.integers(0, 7),
    window=st.one_of(st.just(b""), st.binary(max_size=100), st.just((_NOISE * 9)[:WINDOW_SIZE])),
)
def test_of_any_bytes_a_span_is_of_its_size_or_corrupt(
    codec: Codec, data: bytes, skip: int, size: int, bits: int, window: bytes
) -> None:
    span = Span(0, len(data), size, skip=skip, bits=bits, window=window)
    try:
        found = inflate_span(codec, span, data)
    except Corrupt:
        return
    assert len(found) == size
    if codec is Codec.RAW:
        assert found == data[skip : skip + size]


@settings(max_examples=500, deadline=None)
@given(data=st.one_of(_RANDOM, _BROKEN, _BROKEN.map(lambda data: by_zlib(b"first") + data)))
def test_of_any_bytes_a_decoder_makes_a_layer_or_finds_them_invalid(data: bytes) -> None:
    try:
        plain, restarts = _decoded(data, 100, [])
    except Corrupt:
        return
    assert restarts[0].out == 0
    assert plain.startswith(zlib.decompressobj(31).decompress(data))
