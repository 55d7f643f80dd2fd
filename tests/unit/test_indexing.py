"""The index that is written of a table: how spans are joined to chunks, and that all of it is read back."""

import hashlib
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsmount import indexing
from fsmount.archive.entry import Entry, EntryType, Extent
from fsmount.archive.span import WINDOW_SIZE, Codec, Kind, Span, Table, Trust
from fsmount.errors import Invalid
from fsmount.index import VERSION, Chunk, LayerIndex
from fsmount.indexing import write_index
from fsmount.layer import Layer
from fsmount.lazy import LayerSpec
from tests.fakes.source import FakeSource, open_layers
from tests.fakes.tar import Member, archive

FACTS = {"kind": str(Kind.ESTARGZ), "trust": str(Trust.BOUND), "space": "-a"}
#: What small spans are joined to here.
JOINED = 1000


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "_JOINED", JOINED)
    monkeypatch.setattr(indexing, "_LARGEST_SPAN", 5 * JOINED)


def sha256(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def in_a_row(*sizes: int, length: int | None = None) -> list[Span]:
    """Spans of these inflated sizes, each of `length` compressed bytes, or as many as inflated; one after the other."""
    spans: list[Span] = []
    offset = 100
    for number, size in enumerate(sizes):
        spans.append(Span(offset, length or size, size, sha256=sha256(number)))
        offset += length or size
    return spans


def index_of(
    folder: Path, spans: Iterable[Span], *, codec: Codec = Codec.GZIP, entries: Iterable[Entry] = ()
) -> LayerIndex:
    path = folder / "index.sqlite"
    path.unlink(missing_ok=True)
    write_index(path, Table(codec, list(entries), list(spans)), FACTS)
    index = LayerIndex.open(path)
    assert index is not None
    return index


# -------------------- chunks


def test_a_span_of_the_size_of_a_chunk_is_one_with_its_digest(tmp_path: Path) -> None:
    spans = in_a_row(JOINED, JOINED)
    with closing(index_of(tmp_path, spans)) as index:
        assert index.chunks == [
            Chunk(0, JOINED, sha256(0), 100, 100 + JOINED),
            Chunk(JOINED, JOINED, sha256(1), 100 + JOINED, 100 + 2 * JOINED),
        ]
        assert [index.spans(number) for number in range(2)] == [[spans[0]], [spans[1]]]


def test_small_spans_are_joined_to_chunks_whose_digest_nobody_knows(tmp_path: Path) -> None:
    spans = in_a_row(400, 500, 100, 1, 998)
    with closing(index_of(tmp_path, spans)) as index:
        assert index.chunks == [Chunk(0, 1000, None, 100, 1100), Chunk(1000, 999, None, 1100, 2099)]
        assert [index.spans(number) for number in range(2)] == [spans[:3], spans[3:]]
        assert [index.chunk_at(offset) for offset in (0, 999, 1000, 1998)] == [0, 0, 1, 1]
        assert index.inflated_size == 1999


def test_a_span_larger_than_a_chunk_should_be_is_one_and_nothing_is_joined_to_it(tmp_path: Path) -> None:
    spans = in_a_row(10, 5 * JOINED, 10)
    with closing(index_of(tmp_path, spans)) as index:
        assert [(chunk.size, chunk.sha256) for chunk in index.chunks] == [
            (10, sha256(0)),
            (5 * JOINED, sha256(1)),
            (10, sha256(2)),
        ]


def test_a_span_that_would_not_fit_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="5001 bytes: expected at most 5000"):
        index_of(tmp_path, in_a_row(5 * JOINED + 1))


def test_spans_that_are_far_apart_in_the_blob_are_not_joined(tmp_path: Path) -> None:
    near, far = Span(0, 10, 10), Span(2 * JOINED - 10, 10, 10)
    with closing(index_of(tmp_path, [near, far])) as index:
        assert [(chunk.blob_start, chunk.blob_stop) for chunk in index.chunks] == [(0, 2 * JOINED)]
    with closing(index_of(tmp_path, [near, replace(far, offset=far.offset + 1)])) as index:
        assert [chunk.size for chunk in index.chunks] == [10, 10]


def test_spans_that_are_not_in_the_order_of_the_blob_are_not_joined(tmp_path: Path) -> None:
    spans = in_a_row(10, 10, 10)[::-1]
    with closing(index_of(tmp_path, spans)) as index:
        assert [(chunk.start, chunk.blob_start) for chunk in index.chunks] == [(0, 120), (10, 110), (20, 100)]


def test_spans_of_one_member_of_the_blob_come_with_the_member_once(tmp_path: Path) -> None:
    spans = [Span(50, 300, 100, skip=skip) for skip in (0, 200, 512)]
    with closing(index_of(tmp_path, spans)) as index:
        assert index.chunks == [Chunk(0, 300, None, 50, 350)]
        assert index.spans(0) == spans


_SPANS = st.lists(
    st.builds(Span, st.integers(0, 5000), st.integers(1, 3000), st.integers(1, 2500), st.integers(0, 99)),
    max_size=20,
)


@settings(max_examples=100, deadline=None)
@given(spans=_SPANS)
def test_however_spans_lie_their_chunks_have_all_their_bytes_in_order(
    tmp_path_factory: pytest.TempPathFactory, spans: list[Span]
) -> None:
    with closing(index_of(tmp_path_factory.getbasetemp(), spans)) as index:
        numbers = range(len(index.chunks))
        assert [span for number in numbers for span in index.spans(number)] == spans
        for chunk, following in pairwise(index.chunks):
            assert chunk.start + chunk.size == following.start
        for number, chunk in enumerate(index.chunks):
            inside = index.spans(number)
            assert chunk.size == sum(span.size for span in inside)
            assert chunk.blob_start == min(span.offset for span in inside)
            assert chunk.blob_stop == max(span.offset + span.length for span in inside)
            assert len(inside) == 1 or chunk.size <= JOINED
            assert len(inside) == 1 or chunk.blob_stop - chunk.blob_start <= 2 * JOINED


# -------------------- what is read back


@pytest.mark.parametrize("codec", Codec)
def test_spans_are_read_back_with_all_that_is_known_of_them(tmp_path: Path, codec: Codec) -> None:
    windows = [b"", b"w", bytes(WINDOW_SIZE), Random(1).randbytes(WINDOW_SIZE)]
    spans = [
        Span(
            1000 * number,
            1000,
            2000,
            skip=number,
            sha256=sha256(number) if number % 2 else None,
            blob_sha256=None if number % 2 else sha256(-number),
            bits=number % 8,
            window=window,
        )
        for number, window in enumerate(windows)
    ]
    with closing(index_of(tmp_path, spans, codec=codec)) as index:
        assert [index.spans(number) for number in range(len(spans))] == [[span] for span in spans]
        assert (index.has_spans, index.codec) == (True, codec)
        assert (index.kind, index.trust, index.space) == (Kind.ESTARGZ, Trust.BOUND, "-a")
        assert index.spans(len(spans)) == []


def test_windows_of_what_repeats_take_little_room(tmp_path: Path) -> None:
    text = b"the same again and again, " * 2000
    spans = [Span(n * 10, 10, 1500, window=text[-WINDOW_SIZE:]) for n in range(100)]
    with closing(index_of(tmp_path, spans)) as index:
        assert index.spans(99) == [spans[99]]
    assert (tmp_path / "index.sqlite").stat().st_size < 100 * WINDOW_SIZE / 10


def test_entries_are_found_with_the_places_of_their_bytes(tmp_path: Path) -> None:
    holes = (Extent(0, 10, 5), Extent(90, 15, 10))
    entries = [
        Entry(b"file", EntryType.FILE, size=10, extents=(Extent(0, 0, 10),)),
        Entry(b"holes", EntryType.FILE, size=200, extents=holes),
        Entry(b"empty", EntryType.FILE),
    ]
    with closing(index_of(tmp_path, in_a_row(25), entries=entries)) as index:
        found = {}
        for name in (b"file", b"holes", b"empty"):
            child = index.name(0, name)
            assert child is not None and child.member is not None
            found[name] = index.content(child.member.number)
        assert found == {b"file": (10, (Extent(0, 0, 10),)), b"holes": (200, holes), b"empty": (0, ())}


def test_a_layer_without_contents_has_no_chunks(tmp_path: Path) -> None:
    with closing(index_of(tmp_path, [], entries=[Entry(b"d", EntryType.DIRECTORY)])) as index:
        assert (index.chunks, index.inflated_size, index.has_spans) == ([], 0, True)


# -------------------- versions


def set_version(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version={version}")


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1, 0])
def test_an_index_of_another_version_counts_as_absent(tmp_path: Path, version: int) -> None:
    index_of(tmp_path, in_a_row(10)).close()
    path = tmp_path / "index.sqlite"
    set_version(path, version)
    assert LayerIndex.open(path) is None
    set_version(path, VERSION)
    again = LayerIndex.open(path)
    assert again is not None
    again.close()


async def content(layer: Layer) -> bytes:
    index = await layer.wait_complete()
    found = index.name(0, b"file")
    assert found is not None and found.member is not None
    return await layer.read(found.member.number, 0, 100)


async def test_an_index_of_an_older_version_is_made_again(tmp_path: Path) -> None:
    source = FakeSource()
    blob = source.put_layer(archive(Member(b"file", b"content")))
    path = tmp_path / "layers" / f"sha256-{blob.digest.hex}.sqlite"
    async with open_layers(tmp_path) as layers:
        assert await content(layers.get(LayerSpec(blob), source)) == b"content"
    set_version(path, VERSION - 1)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        assert layer.index is None
        assert await content(layer) == b"content"
    assert source.fetched(blob) == 2
    async with open_layers(tmp_path) as layers:
        assert layers.get(LayerSpec(blob), source).complete
    assert source.fetched(blob) == 2
