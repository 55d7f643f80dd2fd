"""The CPU work of a pass: any cutting of any blob gives the same chunks and members, and says what is wrong with it."""

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from backports import zstd

from fsmount.archive.codecs import Compression
from fsmount.archive.entry import Entry, EntryType, Extent
from fsmount.archive.scan import TarScanner
from fsmount.errors import Corrupt, FsmountError, Invalid, Unsupported
from fsmount.index import Chunk, LayerIndex
from fsmount.indexing import IndexBuilder
from fsmount.ingest import Inflate, Keep, OneFile, Portion
from fsmount.oci.digest import Digest
from tests.fakes.source import CHUNK, small_chunks
from tests.fakes.tar import HARDLINK, Member, archive

FIRST, SECOND = Random(1).randbytes(2 * CHUNK), Random(2).randbytes(100)
TAR = archive(Member(b"first", FIRST), Member(b"second", SECOND))
PATHS = [b"first", b"second"]
PACKINGS = {
    Compression.NONE: bytes,
    Compression.GZIP: lambda data: gzip.compress(data[:5000]) + gzip.compress(data[5000:]),
    Compression.ZSTD: zstd.compress,
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)


def inflate_of(blob: bytes, *, digest: Digest | None = None, limit: int = 10**9) -> Inflate:
    return Inflate(digest or Digest.of(blob), TarScanner(), is_file=False, max_output=limit)


def portions(inflate: Inflate, blob: bytes, step: int = 1024) -> Iterator[Portion]:
    """What a pass does, in one thread."""
    for start in range(0, len(blob) or 1, step):
        inflate.push(blob[start : start + step])
        while (portion := inflate.next_portion()) is not None:
            yield portion
    yield inflate.finish()


# -------------------- Inflate


@pytest.mark.parametrize("step", [512, 1024, 10**6])
@pytest.mark.parametrize("compression", PACKINGS)
def test_the_portions_are_full_chunks_and_a_rest_with_every_member(
    compression: Compression, step: int
) -> None:
    blob = PACKINGS[compression](TAR)
    inflate = inflate_of(blob)
    found = [
        (bytes(one.data), [entry.path for entry in one.entries]) for one in portions(inflate, blob, step)
    ]
    if compression is Compression.GZIP:  # cut where a block ends, or else at twice the size
        assert b"".join(data for data, _ in found) == TAR
        assert max(len(data) for data, _ in found) <= 2 * CHUNK
    else:
        assert [data for data, _ in found] == [TAR[at : at + CHUNK] for at in range(0, len(TAR), CHUNK)]
    assert [path for _, paths in found for path in paths] == PATHS
    assert found[0][1] == [b"first"], "a member is known as soon as its header has gone by"
    assert inflate.compression is compression


def test_a_layer_that_ends_with_a_chunk_ends_with_an_empty_portion() -> None:
    tar = archive(Member(b"a", bytes(CHUNK - 512 - 1024)))
    assert [len(one.data) for one in portions(inflate_of(tar), tar)] == [CHUNK, 0]


def test_memory_that_is_given_back_is_used_again() -> None:
    inflate = inflate_of(TAR)
    buffers = []
    for portion in portions(inflate, TAR):
        buffers.append(portion.data.obj)
        inflate.reuse(portion)
        with pytest.raises(ValueError, match="released"):
            bytes(portion.data)
    assert len(buffers) == 3
    assert buffers[2] is buffers[0]


@pytest.mark.parametrize(
    ("blob", "kind", "message"),
    [
        (archive(Member(b"a", FIRST), end=b"no header" * 100), Invalid, "layer sha256:.*offset 8704"),
        (TAR[:-1500], Invalid, "layer sha256:"),
        (gzip.compress(TAR)[:-20], Invalid, "cut short"),
        (gzip.compress(TAR)[:3000] + bytes(3000), Invalid, "gzip"),
        (zstd.compress(TAR) + b"trailing", Invalid, "zstd"),
        (b"no layer" * 100, Invalid, "expected a tar"),
        (b"\xfd7zXZ\0" + bytes(1000), Unsupported, "xz"),
    ],
)
def test_a_blob_that_is_what_its_digest_names_and_cannot_be_read_is_invalid_or_unsupported(
    blob: bytes, kind: type[FsmountError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        list(portions(inflate_of(blob), blob))
    assert type(caught.value) is kind
    # Altered on the way, it is nobody's fault but the way's, whatever it looks like.
    with pytest.raises(Corrupt, match=f"the {len(blob)} bytes received") as caught:
        list(portions(inflate_of(blob, digest=Digest.of(TAR + b"?")), blob))
    assert type(caught.value) is Corrupt


def test_another_digest_algorithm_is_checked_by_its_own_hash() -> None:
    digest = Digest("sha512", hashlib.sha512(TAR).hexdigest())
    assert len(list(portions(inflate_of(TAR, digest=digest), TAR))) == 3
    with pytest.raises(Corrupt):
        list(portions(inflate_of(TAR, digest=digest), TAR + bytes(512)))


def test_a_bomb_ends_at_the_limit() -> None:
    bomb = gzip.compress(archive(Member(b"bomb", bytes(100 * CHUNK))))
    inflate = inflate_of(bomb, limit=10 * CHUNK)
    seen = 0
    with pytest.raises(Invalid, match="bomb"):
        for portion in portions(inflate, bomb):
            seen += len(portion.data)
    assert seen <= 10 * CHUNK


# -------------------- Keep


@pytest.fixture
def builder(tmp_path: Path) -> Iterator[IndexBuilder]:
    builder = IndexBuilder(tmp_path / "index")
    yield builder
    builder.close()


def known_of(tar: bytes, path: Path) -> LayerIndex:
    """The finished index of a layer."""
    builder = IndexBuilder(path)
    keep = Keep(None, builder)
    for portion in portions(inflate_of(tar), tar):
        keep.add(portion)
    builder.finish(keep.chunks, {"space": ""})
    builder.close()
    index = LayerIndex.open(path)
    assert index is not None
    return index


def test_the_first_pass_makes_the_chunks_the_members_and_the_diff_id(builder: IndexBuilder) -> None:
    keep = Keep(None, builder)
    for number, portion in enumerate(portions(inflate_of(TAR), TAR)):
        keep.add(portion)
        assert (builder.index.name(0, b"second") is not None) == (number == 2)
    assert keep.finish() == Digest.of(TAR)
    expected = [TAR[at : at + CHUNK] for at in range(0, len(TAR), CHUNK)]
    assert keep.chunks == [
        Chunk(number * CHUNK, len(data), hashlib.sha256(data).digest())
        for number, data in enumerate(expected)
    ]


def test_members_that_make_no_tree_are_told_at_the_end_when_the_digest_is_known(
    builder: IndexBuilder,
) -> None:
    tar = archive(Member(b"a", type=HARDLINK, link=b"a"), Member(b"b", FIRST))
    keep = Keep(None, builder)
    for portion in portions(inflate_of(tar), tar):
        keep.add(portion)
    with pytest.raises(Invalid, match="itself"):
        keep.finish()


def test_a_later_pass_takes_the_chunks_that_the_index_knows_and_no_others(tmp_path: Path) -> None:
    known = known_of(TAR, tmp_path / "index")
    for tar, fits in [
        (TAR, [True, True, True]),
        (TAR[:5000] + b"?" + TAR[5001:], [True, False]),
        (TAR + bytes(2 * CHUNK), [True, True, False]),
        (TAR[:-512], [True, True, False]),
    ]:
        keep = Keep(known, None)
        for number, expected in enumerate(fits):
            chunk = memoryview(tar[number * CHUNK : (number + 1) * CHUNK])
            if expected:
                keep.add(Portion(chunk, []))
            else:
                with pytest.raises(Corrupt):
                    keep.add(Portion(chunk, []))
        assert keep.chunks == known.chunks[: sum(fits)]
        if all(fits):
            with pytest.raises(Corrupt):
                keep.add(Portion(memoryview(b"more"), []))
    known.close()


@pytest.mark.parametrize("compression", PACKINGS)
def test_a_layer_that_is_streamed_again_by_its_index_goes_by_to_its_end(
    tmp_path: Path, compression: Compression
) -> None:
    known = known_of(TAR, tmp_path / "index")
    blob = PACKINGS[compression](TAR)
    inflate = Inflate(Digest.of(blob), None, is_file=False, max_output=10**9, known=known)
    keep = Keep(known, None)
    for portion in portions(inflate, blob):
        keep.add(portion)
    assert keep.chunks == known.chunks
    known.close()


# -------------------- OneFile


@pytest.mark.parametrize("data", [b"", b"short", FIRST])
def test_a_blob_that_is_one_file_is_that_file_whatever_it_looks_like(data: bytes) -> None:
    for blob in (data, gzip.compress(data)):
        inflate = Inflate(Digest.of(blob), OneFile(b"dir/file"), is_file=True, max_output=10**9)
        found = list(portions(inflate, blob))
        assert b"".join(bytes(one.data) for one in found) == blob
        extents = (Extent(0, 0, len(blob)),) if blob else ()
        entry = Entry(b"dir/file", EntryType.FILE, mode=0o644, size=len(blob), extents=extents)
        assert [entry for one in found for entry in one.entries] == [entry]
