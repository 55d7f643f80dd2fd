"""Where a zstd:chunked layer's table of contents is, and what is read from it."""

import hashlib
import io
import random
import struct
import tarfile
from collections.abc import Callable, Sequence

import pytest
import zstandard

from fsmount.archive.entry import Extent
from fsmount.archive.toc import Toc
from fsmount.archive.zstdchunked import TAIL_SIZE, Mark, Position, find_position, read_mark, read_toc
from fsmount.errors import Corrupt, FsmountError, Invalid, Unsupported
from tests.fakes import tar
from tests.fakes import zstdchunked as fake
from tests.fakes.estargz import PREFETCH, Blob, Json, Layout, Member, contents
from tests.fakes.zstdchunked import (
    CURRENT,
    LEGACY,
    frame,
    skippable,
    stargz_flavour,
    with_table,
    zstd_chunked,
)

HOLEY = random.Random(1).randbytes(1500) + bytes(5000) + random.Random(2).randbytes(700)
MEMBERS = [
    Member(b"d/", type=tar.DIRECTORY, mode=0o755),
    Member(b"d/small", b"small", mtime=1_600_000_000, xattrs={"user.a": b"\0\xff"}),
    Member(b"d/holey", HOLEY, mode=0o4755, uid=10, gid=20),
    Member(b"d/zeros", bytes(900)),
    Member(b"d/empty"),
    Member(b"link", type=tar.SYMLINK, link=b"d/small"),
    Member(b"last", b"last" * 500),
]
EMPTY = b'{"version":1,"entries":[]}'


def load(blob: Blob, max_size: int = 1 << 30, *, by_footer: bool = False) -> Toc:
    mark = read_mark(blob.annotations, len(blob.data))
    assert mark is not None
    position = None if by_footer else mark.position
    if position is None:
        position = find_position(blob.data[-TAIL_SIZE:], len(blob.data))
    data = blob.data[position.offset : position.stop]
    return read_toc(data, position, checksum=mark.checksum, max_size=max_size)


def refusal(call: Callable[[], object], kind: type[FsmountError] = Invalid) -> str:
    with pytest.raises(FsmountError) as caught:
        call()
    assert type(caught.value) is kind
    return caught.value.message


def files(members: Sequence[Member]) -> list[tuple[bytes, bytes]]:
    return [(member.name.rstrip(b"/"), member.data) for member in members]


def inflated(data: bytes) -> bytes:
    """All frames of data, by another library than ours."""
    return zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()


# Reading


@pytest.mark.parametrize("chunk_size", [700, 1 << 20])
@pytest.mark.parametrize("prefix", [CURRENT, LEGACY])
@pytest.mark.parametrize("footer", [fake.footer_64, fake.footer_40])
@pytest.mark.parametrize("by_footer", [False, True])
def test_every_file_is_read_by_the_table(
    chunk_size: int, prefix: str, footer: Callable[[int, int, int], bytes], by_footer: bool
) -> None:
    blob = zstd_chunked(MEMBERS, chunk_size=chunk_size, prefix=prefix, footer=footer)
    assert contents(load(blob, by_footer=by_footer).table, blob.data) == files(MEMBERS)


@pytest.mark.parametrize("chunk_size", [700, 4 << 20])
@pytest.mark.parametrize("min_chunk", [0, 2000, 1 << 20])
@pytest.mark.parametrize("by_footer", [False, True])
def test_the_flavour_of_stargz_has_the_ranges_of_estargz(
    chunk_size: int, min_chunk: int, by_footer: bool
) -> None:
    members = [MEMBERS[1], PREFETCH, *MEMBERS[2:]]
    blob = stargz_flavour(members, chunk_size=chunk_size, min_chunk=min_chunk)
    toc = load(blob, by_footer=by_footer)
    assert contents(toc.table, blob.data) == files([MEMBERS[1], *MEMBERS[2:]])
    head = inflated(blob.data[: toc.prefetch])
    assert MEMBERS[1].data in head and MEMBERS[2].data not in head


def test_holes_are_not_fetched() -> None:
    table = load(zstd_chunked(MEMBERS, chunk_size=500)).table
    holey = table.entries[2]
    assert holey.extents == (Extent(0, 5, 1500), Extent(6500, 1505, 700))
    assert (holey.size, holey.mode, holey.uid, holey.gid) == (7200, 0o4755, 10, 20)
    assert table.entries[1].xattrs == {b"user.a": b"\0\xff"}


def test_a_span_is_the_frame_of_its_chunk() -> None:
    blob = zstd_chunked(MEMBERS)
    for span in load(blob).table.spans:
        data = blob.data[span.offset : span.offset + span.length]
        assert data == frame(inflated(data))


def test_the_fake_is_a_tar_for_those_who_do_not_know_the_format() -> None:
    for blob in (zstd_chunked(MEMBERS, chunk_size=700), stargz_flavour(MEMBERS, min_chunk=2000)):
        with tarfile.open(fileobj=io.BytesIO(inflated(blob.data))) as archive:
            assert archive.getnames() == [path.decode() for path, _ in files(MEMBERS)]
            holey = archive.extractfile("d/holey")
            assert holey is not None and holey.read() == HOLEY


# Annotations


CHECKSUM = "sha256:" + 64 * "a"


def mark(position: str, size: int = 5000, **more: str) -> Mark | None:
    notes = {CURRENT + "manifest-checksum": CHECKSUM, CURRENT + "manifest-position": position}
    return read_mark(notes | more, size)


def test_the_annotations_say_where_the_table_is_and_what_it_is() -> None:
    assert mark("1000:200:300:1") == Mark(bytes.fromhex(64 * "a"), Position(1000, 200, 300))
    assert Position(1000, 200, 300).stop == 1200


def test_a_layer_without_a_checksum_is_no_zstd_chunked() -> None:
    assert read_mark({}, 5000) is None
    assert read_mark({CURRENT + "manifest-position": "1000:200:300:1"}, 5000) is None


def test_the_newer_annotations_count_where_there_are_both() -> None:
    new = {CURRENT + "manifest-checksum": CHECKSUM, CURRENT + "manifest-position": "1000:200:300:1"}
    old = {LEGACY + "manifest-checksum": "sha256:" + 64 * "b", LEGACY + "manifest-position": "9:9:9:1"}
    assert read_mark(old | new, 5000) == mark("1000:200:300:1")
    assert read_mark(old, 5000) == Mark(bytes.fromhex(64 * "b"), Position(9, 9, 9))


def test_a_position_of_the_other_prefix_is_not_mixed_in() -> None:
    notes = {CURRENT + "manifest-checksum": CHECKSUM, LEGACY + "manifest-position": "9:9:9:1"}
    assert read_mark(notes, 5000) == Mark(bytes.fromhex(64 * "a"), None)


@pytest.mark.parametrize("text", ["", "sha256:0", "sha512:" + 128 * "0", "sha256:" + 64 * "A"])
def test_the_checksum_is_a_sha256(text: str) -> None:
    assert "manifest-checksum" in refusal(lambda: read_mark({CURRENT + "manifest-checksum": text}, 5000))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1000",
        "1000:200:300",
        "1000:200:300:1:1",
        "1000:200:300:1 ",
        "-1:200:300:1",
        "0x9:2:3:1",
        "1:2:3:",
        "٩:9:9:1",
        30 * "9" + ":200:300:1",
    ],
)
def test_a_position_is_four_numbers(text: str) -> None:
    assert "manifest-position" in refusal(lambda: mark(text))


@pytest.mark.parametrize(
    "text",
    [
        "0:200:300:1",
        "7:200:300:1",
        "4801:200:300:1",
        "5000:1:300:1",
        "1000:0:300:1",
        "1000:200:0:1",
        "9999999999999999999:200:300:1",
        "1000:9999999999999999999:300:1",
    ],
)
def test_a_table_lies_inside_the_blob(text: str) -> None:
    assert "expected it within" in refusal(lambda: mark(text))


def test_the_table_may_be_all_there_is() -> None:
    assert mark("4800:200:300:1")
    assert mark("8:4992:300:1")
    blob = with_table(Layout(frame), EMPTY, end=b"")
    assert load(blob).table.entries == []


@pytest.mark.parametrize("type_", [0, 2, 17])
def test_another_type_of_table_is_unsupported(type_: int) -> None:
    assert "type" in refusal(lambda: mark(f"1000:200:300:{type_}"), Unsupported)


def test_a_table_of_more_than_150_mib_is_unsupported() -> None:
    most = 150 << 20
    assert mark(f"1000:{most}:{most}:1", 1 << 40)
    assert "at most" in refusal(lambda: mark(f"1000:{most + 1}:{most}:1", 1 << 40), Unsupported)
    assert "at most" in refusal(lambda: mark(f"1000:{most}:{most + 1}:1", 1 << 40), Unsupported)


# Footers


@pytest.mark.parametrize(
    ("footer", "length"), [(fake.footer_64, 72), (fake.footer_40, 48), (fake.footer_stargz, 48)]
)
def test_a_footer_says_where_the_table_is(footer: Callable[[int, int, int], bytes], length: int) -> None:
    tail = skippable(footer(1000, 200, 300))
    assert len(tail) == length
    assert find_position(tail, 5000) == Position(1000, 200, 300)
    assert find_position(bytes(100) + tail, 5000) == Position(1000, 200, 300)
    assert find_position(skippable(footer(1000, 4000 - length, 300)), 5000)
    assert "within" in refusal(lambda: find_position(skippable(footer(1000, 4001 - length, 300)), 5000))


def test_a_footer_written_out_by_hand_is_read() -> None:
    # By buildah 1.28.
    text = "502a4d1828000000 9fe1060000000000 7604000000000000 630f000000000000 0100000000000000 474e556c496e5578"
    assert find_position(bytes.fromhex(text), 452165) == Position(450975, 1142, 3939)


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        bytes(72),
        b"GNUlInUx",
        skippable(fake.footer_64(1000, 200, 300))[1:],
        skippable(fake.footer_64(1000, 200, 300)) + b"\0",
        skippable(struct.pack("<7Q8s", 1000, 200, 300, 1, 0, 0, 0, b"GnUlInUx")),
        skippable(struct.pack("<4Q8s", 1000, 200, 300, 1, b"GNUlInUX")),
        skippable(fake.footer_40(1000, 200, 300) + b"\0"),
        b"\x51" + skippable(fake.footer_40(1000, 200, 300))[1:],
        b"\x50\x2a\x4d\x18" + (41).to_bytes(4, "little") + fake.footer_40(1000, 200, 300),
        fake.footer_64(1000, 200, 300),
    ],
    ids=range(11),
)
def test_what_does_not_end_in_a_footer_is_refused(tail: bytes) -> None:
    assert "expected a footer" in refusal(lambda: find_position(tail, 5000))


@pytest.mark.parametrize(
    "place", [(0, 1, 1), (2**64 - 1, 1, 1), (1000, 2**64 - 1, 1), (1000, 0, 1), (1000, 1, 0)]
)
def test_a_footer_points_into_the_blob(place: tuple[int, int, int]) -> None:
    assert "within" in refusal(lambda: find_position(skippable(fake.footer_64(*place)), 5000))


def test_a_footer_of_another_type_of_table_is_unsupported() -> None:
    tail = skippable(struct.pack("<4Q8s", 1000, 200, 300, 2, b"GNUlInUx"))
    assert "type 2" in refusal(lambda: find_position(tail, 5000), Unsupported)


# The table


def made(toc: bytes, size: int | None = None) -> Blob:
    layout = Layout(frame)
    layout.write(b"anything")
    return with_table(layout, toc, size=size)


def test_a_table_that_the_annotation_does_not_name_is_corrupt_before_it_is_inflated() -> None:
    data = b"no zstd"
    message = refusal(lambda: read_toc(data, Position(1000, 7, 7), checksum=bytes(32), max_size=1), Corrupt)
    assert hashlib.sha256(data).hexdigest() in message


def test_a_table_has_the_size_that_was_said() -> None:
    assert load(made(EMPTY)).table.entries == []
    assert "bomb" in refusal(lambda: load(made(EMPTY, len(EMPTY) - 1)))
    assert "expected 27 bytes" in refusal(lambda: load(made(EMPTY, len(EMPTY) + 1)))


def checked(data: bytes, size: int = 1000) -> Toc:
    position = Position(1000, len(data), size)
    return read_toc(data, position, checksum=hashlib.sha256(data).digest(), max_size=1)


def test_a_table_that_is_no_zstd_is_refused() -> None:
    assert "zstd stream" in refusal(lambda: checked(b"no zstd, but long enough"))
    assert "cut short" in refusal(lambda: checked(frame(EMPTY)[:-1]))
    assert "zstd stream" in refusal(lambda: checked(frame(EMPTY) + b"garbage"))


def test_a_table_that_inflates_to_more_than_said_is_refused_before_it_has() -> None:
    # A frame of 300 MiB, in runs of 128 KiB of one byte.
    runs = (b"\x02\x00\x10" + b" ") * 2399 + b"\x03\x00\x10" + b" "
    bomb = b"\x28\xb5\x2f\xfd" + b"\x00\x50" + runs
    assert "bomb" in refusal(lambda: checked(bomb, 150 << 20))


def test_a_table_with_a_window_of_more_than_128_mib_is_refused() -> None:
    window = (28 - 10) << 3
    data = b"\x28\xb5\x2f\xfd" + bytes([0x00, window]) + b"\x01\x00\x00"
    assert "zstd stream" in refusal(lambda: checked(data))


def test_a_chunk_that_reaches_into_the_table_is_refused() -> None:
    def beyond(toc: Json) -> None:
        toc["entries"][-1]["endOffset"] += 10_000

    assert "endOffset" in refusal(lambda: load(zstd_chunked(MEMBERS, change=beyond)))


def test_trailing_data_after_the_json_is_refused() -> None:
    assert "end of the JSON" in refusal(lambda: load(made(EMPTY + EMPTY)))
