"""A ztoc is what a second look at the whole layer found it to be, or there is none, and a reason."""

import hashlib
import os
import shutil
import zlib
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest
import trio
from backports import zstd

from fsmount.archive import ztoc_builder
from fsmount.archive.inflate import check_span, inflate_span
from fsmount.archive.scan import TarScanner
from fsmount.archive.span import Codec
from fsmount.archive.ztoc import read_ztoc
from fsmount.archive.ztoc_builder import TarZtocBuilder, ZtocBuilder
from fsmount.errors import Corrupt, FsmountError, Invalid, NoSpace, Unreachable, Unsupported
from fsmount.indexer import Progress, Ztoc, build_ztoc
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor
from tests.fakes.source import Body, FakeSource, Gate
from tests.fakes.tar import DIRECTORY, END, HARDLINK, Member, archive, pax, sparse

#: A multiple of tar's blocks.
_SPAN = 20_480


def _text(seed: int, size: int) -> bytes:
    words = [b"%x " % Random(seed + n).getrandbits(24) for n in range(200)]
    return b"".join(Random(seed).choices(words, k=size // 4))[:size]


TAR = archive(
    Member(b"folder/", type=DIRECTORY, mode=0o755),
    pax({"SCHILY.xattr.user.note": b"\0\xff=\n"}),
    Member(b"folder/noted", b"content\n", mtime=1_600_000_000),
    Member(b"large", _text(1, 10 * _SPAN + 17)),
    Member(b"again", type=HARDLINK, link=b"large"),
    *(Member(b"small/%03d" % number, _text(number, 100 + number)) for number in range(150)),
    Member(b"noise", Random(2).randbytes(3 * _SPAN)),
)


def _packed(tar: bytes) -> bytes:
    """One gzip member of short blocks, between which there are many restart points."""
    encoder = zlib.compressobj(6, zlib.DEFLATED, 31, 1)
    return encoder.compress(tar) + encoder.flush()


def _put(source: FakeSource, tar: bytes, *, packed: bool = True) -> Descriptor:
    return source.put_blob(_packed(tar) if packed else tar)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of 20 kB, so that small layers have many, and blocks of which one holds no more than a part of a span."""
    monkeypatch.setattr("fsmount.indexer._BLOCK_SIZE", 3000)
    monkeypatch.setattr("fsmount.indexer._BATCH_SIZE", 7000)
    monkeypatch.setattr("fsmount.indexer.ZtocBuilder", partial(ZtocBuilder, span_size=_SPAN))
    monkeypatch.setattr("fsmount.indexer.TarZtocBuilder", partial(TarZtocBuilder, span_size=_SPAN))


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


async def _build(
    source: FakeSource,
    layer: Descriptor,
    folder: Path,
    *,
    diff_id: Digest | None = None,
    max_layer_size: int | None = None,
    progress: Progress | None = None,
) -> Ztoc:
    built = build_ztoc(
        source,
        layer,
        diff_id=diff_id,
        folder=folder,
        tool="tests",
        max_layer_size=max_layer_size,
        progress=progress,
    )
    try:
        return await built
    finally:
        assert os.listdir(folder) == [], "nothing is left on the disk"


def _check(ztoc: Ztoc, blob: bytes, tar: bytes) -> None:
    """Reads all of a layer by its ztoc and the blob alone."""
    table = read_ztoc(ztoc.data, blob_size=len(blob), max_size=2**30)
    scanner = TarScanner()
    assert list(table.entries) == scanner.feed(tar)
    inflated = b""
    for span in table.spans:
        data = blob[span.offset : span.offset + span.length]
        piece = inflate_span(table.codec, span, data)
        check_span(span, data, piece)
        inflated += piece
    assert inflated == tar[: len(inflated)]
    assert not tar[len(inflated) :].strip(b"\0")
    assert (ztoc.spans, ztoc.inflated_size) == (len(table.spans), len(inflated))
    assert ztoc.members == len(table.entries)


# -------------------- what is built


async def test_of_a_gzip_layer_it_is_what_the_builder_makes(source: FakeSource, tmp_path: Path) -> None:
    layer = _put(source, TAR)
    blob = _packed(TAR)
    progress = Progress()
    ztoc = await _build(source, layer, tmp_path, diff_id=Digest.of(TAR), progress=progress)
    builder = ZtocBuilder(span_size=_SPAN)
    assert b"".join(builder.feed(blob)) == TAR
    assert ztoc.data == builder.finish(tool="tests")
    assert ztoc.spans > 5
    _check(ztoc, blob, TAR)
    assert source.fetched(layer) == 1
    assert progress.received == len(blob)
    # A byte that two spans share is checked with both; before the first there is gzip's header.
    assert len(blob) - 10 <= progress.checked <= len(blob) - 10 + ztoc.spans


async def test_of_a_plain_tar_it_has_spans_of_one_size(source: FakeSource, tmp_path: Path) -> None:
    layer = _put(source, TAR, packed=False)
    ztoc = await _build(source, layer, tmp_path, diff_id=layer.digest)
    table = read_ztoc(ztoc.data, blob_size=len(TAR), max_size=2**30)
    assert table.codec is Codec.RAW
    assert [span.offset for span in table.spans] == list(range(0, len(TAR), _SPAN))
    assert [span.blob_sha256 for span in table.spans] == [
        hashlib.sha256(TAR[at : at + _SPAN]).digest() for at in range(0, len(TAR), _SPAN)
    ]
    _check(ztoc, TAR, TAR)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("size", [_SPAN, 3 * _SPAN])
async def test_a_tar_may_end_with_a_span(source: FakeSource, tmp_path: Path, packed: bool, size: int) -> None:
    tar = archive(Member(b"all", Random(3).randbytes(size - 512 - len(END))))
    assert len(tar) == size
    layer = _put(source, tar, packed=packed)
    ztoc = await _build(source, layer, tmp_path)
    _check(ztoc, _packed(tar) if packed else tar, tar)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("end", [b"", bytes(512), END + bytes(10 * _SPAN), END + Random(4).randbytes(_SPAN)])
async def test_whatever_stands_after_the_tar_is_in_the_diff_id_alone(
    source: FakeSource, tmp_path: Path, packed: bool, end: bytes
) -> None:
    tar = archive(Member(b"large", _text(1, 3 * _SPAN + 17)), end=end)
    layer = _put(source, tar, packed=packed)
    ztoc = await _build(source, layer, tmp_path, diff_id=Digest.of(tar))
    assert ztoc.members == 1
    with pytest.raises(Corrupt, match="configuration says"):
        await _build(source, layer, tmp_path, diff_id=Digest.of(tar + b"\0"))


async def test_attributes_and_opaque_markers_must_be_looked_for(source: FakeSource, tmp_path: Path) -> None:
    plain = archive(Member(b"file", b"content"))
    opaque = archive(Member(b"folder/.wh..wh..opq"))
    noted = archive(pax({"SCHILY.xattr.user.note": "note"}), Member(b"file", b"content"))
    found = [
        await _build(source, _put(source, tar, packed=False), tmp_path) for tar in (plain, opaque, noted)
    ]
    assert [ztoc.disable_xattrs for ztoc in found] == [True, False, False]


# -------------------- what is refused


UNSUPPORTED = {
    "several members": (_packed(TAR[:50_000]) + _packed(TAR[50_000:]), "several members"),
    "zstd": (zstd.compress(TAR), "zstd"),
    "a sparse file": (_packed(archive(sparse("1.0", b"s", 10**6, [(5000, b"x")]))), "a sparse file"),
    "a global header": (archive(pax({"comment": "c"}, type=b"g"), Member(b"a")), "a global PAX header"),
    "a hardlink with a size": (
        _packed(archive(Member(b"a"), Member(b"b", type=HARDLINK, link=b"a", size=700))),
        "a hardlink that has a size",
    ),
    "xz": (b"\xfd7zXZ\0" + bytes(3000), "xz"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
async def test_what_soci_cannot_carry_is_unsupported_once_it_is_known_to_be_that(
    source: FakeSource, tmp_path: Path, name: str
) -> None:
    blob, reason = UNSUPPORTED[name]
    layer = source.put_blob(blob)
    with pytest.raises(Unsupported, match=f"{layer.digest}.*{reason}"):
        await _build(source, layer, tmp_path)
    source.then(layer, Body(blob[:-1] + b"?"))
    with pytest.raises(Corrupt, match=f"the {len(blob)} bytes received have another digest"):
        await _build(source, layer, tmp_path)


@pytest.mark.parametrize(
    "blob",
    [
        b"no layer" * 100,
        _packed(TAR)[:-20],
        _packed(TAR)[:3000] + bytes(9000),
        archive(Member(b"a", TAR), end=b"no header" * 100),
        _packed(TAR[:-60_000]),
        TAR[:-60_000],
    ],
)
async def test_what_is_no_layer_is_invalid(source: FakeSource, tmp_path: Path, blob: bytes) -> None:
    layer = source.put_blob(blob)
    with pytest.raises(Invalid, match=f"layer {layer.digest}: "):
        await _build(source, layer, tmp_path)


async def test_a_bomb_is_refused(source: FakeSource, tmp_path: Path) -> None:
    layer = _put(source, TAR)
    assert (await _build(source, layer, tmp_path, max_layer_size=len(TAR))).spans > 5
    with pytest.raises(Invalid, match="bomb"):
        await _build(source, layer, tmp_path, max_layer_size=len(TAR) - 1)


async def test_a_blob_for_which_there_is_no_room_is_not_fetched(
    source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = _put(source, TAR)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, layer.size - 1))
    with pytest.raises(NoSpace, match=f"{layer.size} bytes.* {layer.size - 1} left"):
        await _build(source, layer, tmp_path)
    assert source.fetched(layer) == 0


# -------------------- sources that fail


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("at", [0, 1, 12_345, -9, -1])
async def test_an_altered_blob_is_corrupt_wherever_it_was_altered(
    source: FakeSource, tmp_path: Path, packed: bool, at: int
) -> None:
    layer = _put(source, TAR, packed=packed)
    blob = bytearray(_packed(TAR) if packed else TAR)
    blob[at] ^= 4
    source.then(layer, Body(bytes(blob)))
    with pytest.raises(Corrupt) as caught:
        await _build(source, layer, tmp_path)
    assert type(caught.value) is Corrupt
    assert caught.value.exit_code == 7


async def test_when_a_mirror_sent_something_else_the_next_one_is_asked(
    source: FakeSource, tmp_path: Path
) -> None:
    layer = _put(source, TAR)
    source.mirrors = 1
    source.then(layer, Body(_packed(TAR + TAR)), Body(_packed(TAR)))
    progress = Progress()
    _check(await _build(source, layer, tmp_path, progress=progress), _packed(TAR), TAR)
    assert (source.fetched(layer), progress.received) == (2, layer.size)


async def test_an_image_whose_diff_id_is_wrong_is_corrupt(source: FakeSource, tmp_path: Path) -> None:
    layer = _put(source, TAR)
    wrong = Digest.of(b"another")
    with pytest.raises(Corrupt, match=f"{layer.digest}: inflated it is {Digest.of(TAR)}, .* says {wrong}"):
        await _build(source, layer, tmp_path, diff_id=wrong)
    assert source.fetched(layer) == 1, "no mirror is to blame"


async def test_what_the_source_raises_arrives_as_it_is(source: FakeSource, tmp_path: Path) -> None:
    layer = _put(source, TAR)
    source.then(layer, Body(stop=10_000, error=Unreachable("gone")))
    with pytest.raises(Unreachable, match="gone"):
        await _build(source, layer, tmp_path)


async def test_it_can_be_cancelled_while_it_waits_for_the_network(
    source: FakeSource, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    layer = _put(source, TAR)
    gate = Gate()
    source.then(layer, Body(gate=gate))
    with trio.move_on_after(5) as scope:
        gate.let(10_000)
        await _build(source, layer, tmp_path)
    assert scope.cancelled_caught


# -------------------- the second look


async def _expect(
    source: FakeSource, folder: Path, kind: type[FsmountError], message: str, *, packed: bool = True
) -> None:
    layer = _put(source, TAR, packed=packed)
    with pytest.raises(kind, match=message) as caught:
        await _build(source, layer, folder, diff_id=Digest.of(TAR))
    assert type(caught.value) is kind


def _spoil(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[list], list]) -> None:
    """What the builder has written differs from what it found."""
    write = ztoc_builder.write_ztoc

    def written(entries, *, digests, **others):
        parts = {"entries": list(entries), "digests": list(digests)}
        parts[name] = change(parts[name])
        return write(parts["entries"], digests=parts["digests"], **others)

    monkeypatch.setattr(ztoc_builder, "write_ztoc", written)


@pytest.mark.parametrize("packed", [True, False])
async def test_a_digest_that_is_not_its_span_s_is_found(
    source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    _spoil(monkeypatch, "digests", lambda digests: [*digests[:3], bytes(32), *digests[4:]])
    await _expect(source, tmp_path, Corrupt, "compressed bytes have not the sha256 000000", packed=packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: [*found[:3], found[3]._replace(mode=0o600), *found[4:]], "of 'again' what"),
        (lambda found: found[:-1], "the number of members"),
        (
            lambda found: [*found[:1], found[1]._replace(offset=found[1].offset + 1), *found[2:]],
            "expected its",
        ),
    ],
)
async def test_a_ztoc_that_does_not_say_what_the_tar_says_is_found(
    source: FakeSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list], list],
    message: str,
) -> None:
    _spoil(monkeypatch, "entries", change)
    await _expect(source, tmp_path, Unsupported, message)


@pytest.mark.parametrize(
    "change",
    [
        lambda restart: restart._replace(window=bytes(len(restart.window))),
        lambda restart: restart._replace(bits=(restart.bits + 1) % 8),
    ],
)
async def test_a_restart_point_from_which_something_else_is_inflated_is_found(
    source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable
) -> None:
    make = ztoc_builder.gzip_checkpoints

    def checkpoints(restarts, span_size):
        return make([*restarts[:2], change(restarts[2]), *restarts[3:]], span_size)

    monkeypatch.setattr(ztoc_builder, "gzip_checkpoints", checkpoints)
    await _expect(source, tmp_path, Corrupt, "read again: the span")


async def test_a_disk_that_does_not_give_back_what_it_took_is_found(
    source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread = os.pread

    def damaged(fd: int, size: int, offset: int) -> bytes:
        data = pread(fd, size, offset)
        return data if offset < 50_000 else data[:-1] + bytes([data[-1] ^ 1])

    monkeypatch.setattr(os, "pread", damaged)
    await _expect(source, tmp_path, Corrupt, "read again: the span", packed=False)


async def test_a_ztoc_that_readers_would_refuse_is_none(
    source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsmount.archive.ztoc.MAX_SPAN", _SPAN)
    await _expect(source, tmp_path, Unsupported, "cannot have a SOCI index that all can read")
    monkeypatch.setattr("fsmount.indexer.MAX_ZTOC_SIZE", 1000)
    await _expect(source, tmp_path, Unsupported, "more than 1000")
