"""Ztocs: their bytes, what is read from them, and what is believed of none."""

import gzip
import hashlib
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from functools import cache, partial

import flatbuffers
import pytest

from fsmount.archive.entry import Entry, EntryType, Extent
from fsmount.archive.inflate import inflate_span
from fsmount.archive.restarts import RestartDecoder
from fsmount.archive.scan import TarScanner
from fsmount.archive.span import WINDOW_SIZE, Codec, Restart, Span, Table
from fsmount.archive.ztoc import CHECKPOINT, MAX_SPAN, read_ztoc
from fsmount.archive.ztoc_builder import ZtocBuilder
from fsmount.archive.ztoc_entries import TocEntry, TocScanner, may_disable_xattrs
from fsmount.archive.ztoc_writer import gzip_checkpoints, tar_checkpoints, write_ztoc
from fsmount.errors import Invalid, Unsupported
from tests.fakes import tar
from tests.fakes.tar import Member, archive, base256, long_link, long_name, pax, sparse

MAX_SIZE = 1 << 40

HELLO = archive(Member(b"a", b"hello"))

#: The ztoc of HELLO, in the order of its bytes; a builder writes them from the last to the first.
HAND_WRITTEN = bytes.fromhex(
    # 0: where the root is, and 4 bytes so that numbers of 8 are aligned
    "18000000 00000000"
    # 8: vtable of Ztoc: 16 bytes, of a table of 40; the places of its fields
    "1000 2800 2400 2000 1000 0800 1c00 0400"
    # 24: Ztoc: its vtable is 16 before; compression_info is 48 after this reference; uncompressed and compressed size;
    # 4 bytes of nothing; toc, build_tool_identifier, version
    "10000000 30000000 0008000000000000 0008000000000000 00000000 b8000000 68010000 6c010000"
    # 64: vtable of CompressionInfo, without max_span_id, which is 0
    "0c00 1000 0700 0000 0c00 0800"
    # 76: CompressionInfo: 3 bytes of nothing, compression_algorithm, checkpoints, span_digests
    "0c000000 000000 02 5c000000 04000000"
    # 92: span_digests: one, 4 after its reference; 71 characters and a NUL
    "01000000 04000000 47000000" + b"sha256:".hex() + hashlib.sha256(HELLO).hexdigest().encode().hex() + "00"
    # 176: checkpoints: 48 bytes, and 2 of nothing. They are a buffer of their own, with a TarZinfo: size, span_size,
    # 4 bytes of nothing, version
    "30000000"
    "14000000 000000000000 0a00 1c00 1800 0c00 0400"
    "0a000000 0008000000000000 0000400000000000 00000000 02000000"
    "0000"
    # 230: vtable of TOC, TOC, and its metadata: one file, 36 after its reference
    "0600 0800 0400 06000000 04000000 01000000 24000000"
    # 252: vtable of FileMetadata, without uid, gid, devmajor and devminor, which are 0
    "2000 3c00 3800 3400 2c00 2400 2000 1400 0000 0000 1000 0c00 0800 0000 0000 0400"
    # 284: FileMetadata: xattrs, mod_time, gname, uname; mode; 4 bytes of nothing; linkname; size, offset; type, name
    "20000000 38000000 38000000 50000000 54000000 a401000000000000 00000000 4c000000"
    "0500000000000000 0002000000000000 40000000 44000000"
    # 344: no xattrs; mod_time, 20 characters, a NUL and 3 bytes of nothing
    "00000000 14000000" + b"1970-01-01T00:00:00Z".hex() + "00000000"
    # 376: gname, uname and linkname are empty; type, name, build_tool_identifier, version
    "00000000 00000000 00000000 00000000 00000000 00000000"
    "03000000 72656700 01000000 61000000 01000000 74000000 03000000 302e3900"
)


def toc_entry(name: bytes = b"a", **changes: object) -> TocEntry:
    """A file of 5 bytes at 512, unless changed."""
    plain = TocEntry(name, EntryType.FILE, 512, 5, b"", 0o644, 0, 0, b"", b"", 0, (0, 0), {})
    return plain._replace(**changes)


def of_tar(
    *entries: TocEntry,
    size: int = len(HELLO),
    tar_size: int | None = None,
    checkpoints: bytes | None = None,
    digests: Sequence[bytes] | None = None,
    span_size: int = 4 << 20,
    compressed: bool = False,
) -> bytes:
    """The ztoc of a layer that is not compressed."""
    return write_ztoc(
        entries,
        tool="t",
        blob_size=size,
        tar_size=size if tar_size is None else tar_size,
        compressed=compressed,
        checkpoints=tar_checkpoints(size, span_size) if checkpoints is None else checkpoints,
        digests=[bytes(32)] * -(-size // span_size) if digests is None else digests,
    )


def of_gzip(
    restarts: Sequence[Restart], *, blob_size: int, tar_size: int, entries: Sequence[TocEntry] = ()
) -> bytes:
    """The ztoc of a layer that is compressed, and inflates from these points."""
    return write_ztoc(
        entries,
        tool="t",
        blob_size=blob_size,
        tar_size=tar_size,
        compressed=True,
        checkpoints=gzip_checkpoints(restarts, 4 << 20),
        digests=[bytes([number]) * 32 for number in range(len(restarts))],
    )


def read(data: bytes, blob_size: int = len(HELLO)) -> Table:
    return read_ztoc(data, blob_size=blob_size, max_size=MAX_SIZE)


def only(**changes: object) -> Entry:
    """The entry of a ztoc with one that has these changes."""
    (entry,) = read(of_tar(toc_entry(**changes))).entries
    return entry


def refusal(data: bytes, blob_size: int = len(HELLO)) -> str:
    with pytest.raises(Invalid) as caught:
        read(data, blob_size)
    assert caught.value.message.startswith("ztoc: ")
    return caught.value.message


class Strange:
    """Makes ztocs that no builder makes: parts are shared, and texts are anything. Of blobs of 4 MiB."""

    def __init__(self, *, time: bytes = b"1970-01-01T00:00:00Z") -> None:
        self.builder = flatbuffers.Builder(1 << 20)
        texts = (b"0.9", b"dir", time)
        self.version, self.type, self.time = map(self.builder.CreateString, texts)

    def vector(self, offsets: Sequence[int]) -> int:
        self.builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self.builder.PrependUOffsetTRelative(offset)
        return int(self.builder.EndVector())

    def table(self, slots: int, references: dict[int, int], numbers: dict[int, int] | None = None) -> int:
        self.builder.StartObject(slots)
        for slot, offset in references.items():
            self.builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
        for slot, number in (numbers or {}).items():
            self.builder.PrependInt64Slot(slot, number, 0)
        return int(self.builder.EndObject())

    def file(self, number: int, name: int, xattrs: int) -> int:
        return self.table(14, {0: name, 1: self.type, 10: self.time, 13: xattrs}, {2: 512 + 512 * number})

    def data(self, files: Sequence[int]) -> bytes:
        toc = self.table(1, {0: self.vector(files)})
        checkpoints = self.builder.CreateByteVector(gzip_checkpoints([Restart(10, 0, 0, b"")], 1))
        digests = self.vector([self.builder.CreateString(b"sha256:" + b"0" * 64)])
        compression = self.table(4, {2: digests, 3: checkpoints})
        root = self.table(6, {0: self.version, 4: toc, 5: compression}, {2: 2**22, 3: 2**25})
        self.builder.Finish(root)
        return bytes(self.builder.Output())


def with_time(text: bytes) -> bytes:
    """A ztoc of one directory, which has this time."""
    strange = Strange(time=text)
    return strange.data([strange.file(0, strange.builder.CreateString(b"a"), 0)])


def build(blob: bytes, *, span_size: int = 4 << 20, block: int = 1 << 20) -> bytes:
    """The ztoc of a gzip blob that is fed in blocks."""
    builder = ZtocBuilder(span_size=span_size)
    for start in range(0, len(blob), block):
        for _ in builder.feed(blob[start : start + block]):
            pass
    return builder.finish(tool="t")


def inflated(table: Table, blob: bytes) -> bytes:
    """All that the spans inflate to, one by one."""
    return b"".join(
        inflate_span(table.codec, span, blob[span.offset : span.offset + span.length]) for span in table.spans
    )


def scan(data: bytes) -> list[Entry]:
    scanner = TarScanner()
    entries = scanner.feed(data)
    scanner.finish()
    return entries


def found(*parts: Member | bytes) -> list[TocEntry]:
    scanner = TocScanner()
    scanner.feed(archive(*parts))
    scanner.finish()
    return scanner.found


def check_bounds(table: Table, *, blob_size: int, ztoc_size: int) -> None:
    """Whatever a table says, these things may be relied upon."""
    for before, span in zip([None, *table.spans], table.spans, strict=False):
        assert 0 <= span.offset < span.offset + span.length <= blob_size
        assert 0 < span.size <= MAX_SPAN
        assert span.skip == 0
        assert 0 <= span.bits < 8
        assert len(span.window) <= WINDOW_SIZE
        assert before is None or before.offset + before.length == span.offset + bool(span.bits)
    total = sum(span.size for span in table.spans)
    stop = 0
    for entry in table.entries:
        assert b".." not in entry.path.split(b"/")
        assert len(entry.path) <= 4095
        assert entry.size == sum(extent.size for extent in entry.extents)
        for extent in entry.extents:
            assert stop <= extent.offset < extent.offset + extent.size <= total
            stop = extent.offset + extent.size
    texts = [text for entry in table.entries for text in (entry.path, entry.link, *entry.xattrs.values())]
    assert len(table.entries) + sum(map(len, texts)) <= 2 * ztoc_size


# The bytes


def test_a_ztoc_has_the_bytes_that_follow_from_the_rules_of_flatbuffers_and_the_order_of_writing() -> None:
    digest = hashlib.sha256(HELLO).digest()
    assert of_tar(*found(Member(b"a", b"hello")), digests=[digest]) == HAND_WRITTEN


def test_a_ztoc_written_by_hand_is_read() -> None:
    entry = Entry(b"a", EntryType.FILE, 0o644, size=5, extents=(Extent(0, 512, 5),))
    span = Span(0, 2048, 2048, blob_sha256=hashlib.sha256(HELLO).digest())
    assert read(HAND_WRITTEN) == Table(Codec.RAW, [entry], [span])


def test_every_field_is_read_back() -> None:
    members = [
        Member(b"./dir/", type=tar.DIRECTORY, mode=0o41755, uid=10, gid=20, mtime=30),
        pax(
            {
                "SCHILY.xattr.user.a": b"\xff\n=",
                "SCHILY.xattr.user.b": b"",
                "comment": "x",
                "mtime": "7.000000070",
            }
        ),
        Member(b"dir/file", b"f" * 700, mode=0o104755, uid=2**32 - 2, gid=2**31, mtime=5),
        Member(b"link", type=tar.SYMLINK, link=b"../x/", mtime=-1),
        Member(b"hard", type=tar.HARDLINK, link=b"./dir//file"),
        Member(b"null", type=tar.CHAR, major=1, minor=3),
        Member(b"sda", type=tar.BLOCK_DEVICE, major=8, minor=2**20),
        Member(b"fifo", type=tar.FIFO),
        long_name(b"n" * 200 + b"/" + b"\xfe" * 200),
        long_link(b"t" * 300),
        Member(b"short", type=tar.SYMLINK, link=b"short"),
    ]
    data = archive(*members)
    assert read(of_tar(*found(*members), size=len(data)), len(data)).entries == scan(data)


def test_of_the_fields_none_is_written_that_is_0_and_none_is_missed_when_it_is_read() -> None:
    empty = toc_entry(b"", type=EntryType.DIRECTORY, size=0, mode=0)
    full = toc_entry(
        uid=1, gid=2, device=(3, 4), uname=b"u", gname=b"g", link=b"l", records={b"comment": b"x"}
    )
    assert len(of_tar(full)) > len(of_tar(toc_entry())) > len(of_tar(empty))
    assert only(name=b"", type=EntryType.DIRECTORY, size=0, mode=0) == Entry(b"", EntryType.DIRECTORY)


def test_records_are_written_in_the_order_of_their_names() -> None:
    records = {b"b": b"1", b"\xff": b"2", b"a": b"3"}
    data = of_tar(toc_entry(records=records))
    assert data == of_tar(toc_entry(records=dict(sorted(records.items()))))
    # Written first, and so last in the file.
    assert data.index(b"\x01\0\0\0a\0") > data.index(b"\x01\0\0\0b\0") > data.index(b"\x01\0\0\0\xff\0")


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, b"1970-01-01T00:00:00Z"),
        (1_700_000_000_123_456_789, b"2023-11-14T22:13:20.123456789Z"),
        (1_500_000_000, b"1970-01-01T00:00:01.5Z"),
        (-1, b"1969-12-31T23:59:59.999999999Z"),
        (-1_000_000_000, b"1969-12-31T23:59:59Z"),
    ],
)
def test_a_time_is_written_as_go_writes_it(nanoseconds: int, text: bytes) -> None:
    data = of_tar(toc_entry(mtime_ns=nanoseconds))
    assert struct.pack("<I", len(text)) + text + b"\0" in data
    assert read(data).entries[0].mtime_ns == nanoseconds


# Entries


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        (b"1970-01-01T02:00:00+02:00", 0),
        (b"1969-12-31T18:30:00.25-05:30", 250_000_000),
        (b"1970-01-01T00:00:00.000000001Z", 1),
        (b"0001-01-01T00:00:00Z", -(2**63) + 1),
        (b"9999-12-31T23:59:59Z", 2**63 - 1),
    ],
)
def test_a_time_is_read_in_any_zone_and_year(text: bytes, nanoseconds: int) -> None:
    assert read(with_time(text), 2**22).entries[0].mtime_ns == nanoseconds


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"1970-01-01",
        b"1970-01-01T00:00:00",
        b"1970-01-01 00:00:00Z",
        b"1970-01-01T00:00:00.Z",
        b"1970-01-01T00:00:00.1234567890Z",
        b"1970-13-01T00:00:00Z",
        b"1970-02-30T00:00:00Z",
        b"1970-01-01T24:00:01Z",
        b"1970-01-01T00:00:61Z",
        b"0000-01-01T00:00:00Z",
        b"10000-01-01T00:00:00Z",
        b"-001-01-01T00:00:00Z",
        b"\xd9\xa1970-01-01T00:00:00Z",
    ],
)
def test_a_time_that_is_none_is_refused(text: bytes) -> None:
    assert "entry 0: expected a time" in refusal(with_time(text), 2**22)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": b"../a"}, "without .. components"),
        ({"name": b"a/.."}, "without .. components"),
        ({"name": b""}, "the path is the root"),
        ({"name": b"./"}, "the path is the root"),
        ({"name": b"n" * 256}, "at most"),
        ({"name": b"n/" * 2500}, "at most 4095"),
        ({"type": EntryType.SYMLINK}, "a link to have a target"),
        ({"type": EntryType.HARDLINK}, "a link to have a target"),
        ({"type": EntryType.HARDLINK, "link": b"/"}, "a link to have a target"),
        ({"type": EntryType.HARDLINK, "link": b"b/../c"}, "without .. components"),
        ({"type": EntryType.SYMLINK, "link": b"t" * 4096}, "at most 4095"),
        ({"uid": 2**32 - 1}, "user or group"),
        ({"gid": 2**32 - 1}, "user or group"),
        ({"type": EntryType.CHAR, "device": (-1, 0)}, "device numbers"),
        ({"type": EntryType.BLOCK, "device": (0, 2**31)}, "device numbers"),
        ({"records": {b"SCHILY.xattr.": b"x"}}, "attribute to have a name"),
        ({"records": {b"LIBARCHIVE.xattr.a": b"?"}}, "in base64"),
        ({"records": {b"GNU.sparse.major": b"1"}}, "no sparse file"),
        ({"offset": -512}, "an offset and a size"),
        ({"size": -1}, "an offset and a size"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    text = refusal(of_tar(toc_entry(**changes)))
    assert text.startswith("ztoc: entry 0: ")
    assert message in text


def test_a_type_that_is_none_of_soci_s_is_refused() -> None:
    assert "expected the type of a file, not b'rag'" in refusal(HAND_WRITTEN.replace(b"reg\0", b"rag\0"))


def test_the_device_of_a_file_and_the_link_of_a_directory_mean_nothing() -> None:
    entry = only(device=(-1, 2**40), link=b"../..")
    assert (entry.device, entry.link) == ((0, 0), b"")


def test_entries_come_in_the_order_of_the_archive() -> None:
    entries = [toc_entry(name, offset=offset) for name, offset in [(b"c", 2560), (b"a", 512), (b"b", 1536)]]
    table = read(of_tar(*entries, size=4096), 4096)
    assert [entry.path for entry in table.entries] == [b"a", b"b", b"c"]


@pytest.mark.parametrize(
    ("entries", "offset"),
    [
        ([(512, 600), (1024, 5)], 1024),  # in the data of the first
        ([(512, 600), (1536, 5)], 1536),  # no room for a header
        ([(512, 5), (512, 5)], 512),
        ([(512, 0), (512, 0)], 512),
        ([(0, 5)], 0),
        ([(1000, 5)], 1000),
        ([(512, 8000)], 512),
        ([(512, 2**63 - 1)], 512),
        ([(8192, 1)], 8192),
    ],
)
def test_an_entry_that_overlaps_another_s_header_or_leaves_the_archive_is_refused(
    entries: list[tuple[int, int]], offset: int
) -> None:
    members = [toc_entry(offset=at, size=size) for at, size in entries]
    assert f", not {offset}" in refusal(of_tar(*members, size=8192), 8192)


def test_an_entry_may_end_where_the_archive_ends_and_begin_right_after_a_header() -> None:
    members = [toc_entry(offset=512, size=512), toc_entry(b"b", offset=1536, size=2560)]
    assert len(read(of_tar(*members, size=4096), 4096).entries) == 2


def test_what_has_no_data_takes_the_size_that_is_written_before_the_next_header() -> None:
    members = [toc_entry(type=EntryType.DIRECTORY, size=600), toc_entry(b"b", offset=2048, size=1)]
    table = read(of_tar(*members, size=4096), 4096)
    assert (table.entries[0].size, table.entries[0].extents) == (0, ())
    members[1] = toc_entry(b"b", offset=1024, size=1)
    assert "not 1024" in refusal(of_tar(*members, size=4096), 4096)


# Spans


@cache
def layer() -> tuple[bytes, bytes]:
    """A tar of 600 KB that compresses well, and badly, and its blob of many deflate blocks."""
    noise = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(3000))
    members = [
        Member(b"text", b"".join(b"%d and " % (number * number) for number in range(9000))),
        Member(b"noise", noise),
        Member(b"digits", noise.hex().encode()),
        Member(b"zeros", bytes(200_000)),
        Member(b"last", b"the end"),
    ]
    data = archive(*members) + bytes(9000)
    return data, gzip.compress(data, mtime=0)


def test_the_spans_of_a_gzip_blob_inflate_to_the_tar_and_to_nothing_more() -> None:
    data, blob = layer()
    table = read(build(blob, span_size=10_000), len(blob))
    assert table.codec is Codec.RESTART
    assert len(table.spans) > 10
    assert len({span.bits for span in table.spans}) > 3
    assert inflated(table, blob) == data[:-9000]
    assert table.entries == scan(data)


def test_spans_are_those_of_the_restart_points_and_share_the_byte_that_both_have_bits_of() -> None:
    windows = b"z" * 5000, b"w" * WINDOW_SIZE
    restarts = [
        Restart(20, 0, 0, b""),
        Restart(500, 5000, 3, windows[0]),
        Restart(900, 90_000, 0, windows[1]),
    ]
    table = read(of_gzip(restarts, blob_size=1000, tar_size=100_000), 1000)
    assert table.spans == [
        Span(20, 480, 5000, blob_sha256=bytes(32)),
        Span(499, 401, 85_000, blob_sha256=b"\1" * 32, bits=3, window=windows[0]),
        Span(900, 100, 10_000, blob_sha256=b"\2" * 32, window=windows[1]),
    ]


def test_a_ztoc_of_the_old_form_leaves_the_first_point_away() -> None:
    data, blob = layer()
    decoder = RestartDecoder(spacing=50_000)
    assert b"".join(decoder.feed(blob)) == data
    assert decoder.restarts[0] == Restart(10, 0, 0, b"")
    new = gzip_checkpoints(decoder.restarts, 50_000)
    old = new[:12] + new[12 + CHECKPOINT.size :]
    digests = [bytes(32)] * len(decoder.restarts)
    write = partial(
        write_ztoc, [], tool="t", blob_size=len(blob), tar_size=len(data), compressed=True, digests=digests
    )
    table = read(write(checkpoints=old), len(blob))
    assert table == read(write(checkpoints=new), len(blob))
    assert inflated(table, blob) == data


def test_nothing_is_read_after_the_end_of_the_archive() -> None:
    restarts = [
        Restart(10, 0, 0, b""),
        Restart(500, 9000, 0, b"w" * 9000),
        Restart(600, 20_000, 0, b"w" * 20_000),
    ]
    for tar_size, sizes in [
        (20_001, [9000, 11_000, 1]),
        (20_000, [9000, 11_000]),
        (9001, [9000, 1]),
        (512, [512]),
    ]:
        table = read(of_gzip(restarts, blob_size=1000, tar_size=tar_size), 1000)
        assert [span.size for span in table.spans] == sizes
    assert read(of_gzip(restarts, blob_size=1000, tar_size=0), 1000).spans == []


@pytest.mark.parametrize(
    "restarts",
    [
        [Restart(10, 1, 0, b"")],
        [Restart(9, 0, 0, b"")],
        [Restart(-1, 0, 0, b"")],
        [Restart(10, 0, 8, b"")],
        [Restart(1000, 0, 0, b"")],
        [Restart(10, 0, 0, b""), Restart(10, 500, 0, b"")],
        [Restart(10, 0, 0, b""), Restart(500, 500, 0, b""), Restart(400, 600, 0, b"")],
        [Restart(10, 0, 0, b""), Restart(500, 500, 0, b""), Restart(600, 500, 0, b"")],
        [Restart(10, 0, 0, b""), Restart(500, 500, 0, b""), Restart(600, 400, 0, b"")],
        [Restart(10, 0, 0, b""), Restart(500, -1, 0, b"")],
        [Restart(10, 0, 0, b""), Restart(500, 500, 255, b"")],
        [Restart(10, 0, 0, b""), Restart(1000, 500, 0, b"")],
        [Restart(10, 0, 0, b""), Restart(2**63 - 1, 500, 0, b"")],
    ],
)
def test_restart_points_out_of_order_or_outside_the_blob_are_refused(restarts: list[Restart]) -> None:
    message = refusal(of_gzip(restarts, blob_size=1000, tar_size=9000), 1000)
    assert "in order within 1000" in message or "first checkpoint at 0" in message


def test_a_span_that_inflates_to_more_than_deflate_can_make_is_refused() -> None:
    def sizes(tar_size: int) -> bytes:
        return of_gzip([Restart(10, 0, 0, b"")], blob_size=30, tar_size=tar_size)

    assert read(sizes(20 * 1032), 30).spans[0].size == 20 * 1032
    assert "expected 20 bytes at 10 not to inflate to 20641" in refusal(sizes(20 * 1032 + 1), 30)


def test_a_span_that_one_reader_cannot_hold_is_refused() -> None:
    restarts = [Restart(10, 0, 0, b"")]
    assert read(of_gzip(restarts, blob_size=2**20, tar_size=MAX_SPAN), 2**20).spans[0].size == MAX_SPAN
    assert "not to inflate to" in refusal(of_gzip(restarts, blob_size=2**20, tar_size=MAX_SPAN + 1), 2**20)
    restarts.append(Restart(2**19, MAX_SPAN + 1, 0, b"w" * WINDOW_SIZE))
    assert "not to inflate to" in refusal(of_gzip(restarts, blob_size=2**20, tar_size=MAX_SPAN + 2), 2**20)
    assert "spans of" in refusal(of_tar(size=2**27, span_size=MAX_SPAN + 1), 2**27)


def test_the_spans_of_a_blob_that_is_a_tar_are_of_one_size_up_to_its_very_end() -> None:
    data = archive(Member(b"a", b"x" * 3000)) + bytes(700)
    digests = [bytes([number]) * 32 for number in range(3)]
    table = read(of_tar(size=len(data), tar_size=len(data) - 700, span_size=2048, digests=digests), len(data))
    assert table.spans == [
        Span(0, 2048, 2048, blob_sha256=digests[0]),
        Span(2048, 2048, 2048, blob_sha256=digests[1]),
        Span(4096, 1212, 1212, blob_sha256=digests[2]),
    ]
    assert inflated(table, data) == data


@pytest.mark.parametrize("size", [2047, 2049, 0, -1, 2**63 - 1])
def test_the_ztoc_of_a_blob_of_another_size_is_refused(size: int) -> None:
    assert "blob of 2048 bytes" in refusal(of_tar(size=size, checkpoints=b"", digests=[bytes(32)]))
    assert "spans of 2048 bytes" in refusal(of_tar(checkpoints=tar_checkpoints(size, 4 << 20)))


def test_a_tar_that_is_larger_than_what_may_be_kept_or_than_its_blob_is_refused() -> None:
    data = of_gzip([Restart(10, 0, 0, b"")], blob_size=1000, tar_size=5000)
    assert read_ztoc(data, blob_size=1000, max_size=5000).spans
    with pytest.raises(Invalid, match="a tar of at most 4999 bytes, not of 5000"):
        read_ztoc(data, blob_size=1000, max_size=4999)
    assert "a tar of at most" in refusal(of_tar(tar_size=-1))
    assert "expected a tar of 2049 bytes in 1 spans" in refusal(of_tar(tar_size=2049))


@pytest.mark.parametrize("digests", [0, 2, 3])
def test_other_than_one_digest_for_each_span_is_refused(digests: int) -> None:
    assert f"in {digests} spans, not 1" in refusal(of_tar(digests=[bytes(32)] * digests))
    restart = gzip_checkpoints([Restart(10, 0, 0, b"")], 4 << 20)
    message = refusal(of_tar(digests=[bytes(32)] * digests, checkpoints=restart, compressed=True))
    assert f"expected {digests} checkpoints" in message


def test_the_number_of_the_last_span_must_be_that_of_the_digests() -> None:
    data = of_tar(size=4096, span_size=1024)
    # The only field of 4 bytes that is 3 and follows the reference to span_digests.
    assert data.count(b"\3\0\0\0\0\0\0\0") == 0
    at = [at for at in range(0, 120) if data[at : at + 4] == b"\3\0\0\0"]
    assert len(at) == 1
    assert read(data, 4096).spans
    for number in (0, 2, 4, -1, 2**31 - 1, -(2**31)):
        changed = data[: at[0]] + struct.pack("<i", number) + data[at[0] + 4 :]
        assert "the digests of" in refusal(changed, 4096)


@pytest.mark.parametrize(
    "digest",
    [b"sha256:" + b"0" * 63 + b"g", b"sha256:" + b"A" * 64, b"sha512:" + b"0" * 64, b"0" * 71, b"x" * 71],
)
def test_a_digest_of_another_form_is_refused(digest: bytes) -> None:
    data = of_tar(toc_entry(), digests=[bytes(32)])
    assert "a digest of sha256" in refusal(data.replace(b"sha256:" + b"0" * 64, digest))


@pytest.mark.parametrize("have", [0, 2, -1, 2**31 - 1])
def test_a_count_of_checkpoints_other_than_those_that_are_there_is_refused(have: int) -> None:
    checkpoints = gzip_checkpoints([Restart(10, 0, 0, b"")], 4 << 20)
    lie = struct.pack("<i", have) + checkpoints[4:]
    assert "1 checkpoints" in refusal(of_tar(digests=[bytes(32)], checkpoints=lie, compressed=True))


@pytest.mark.parametrize("size", [0, 4, 11, 13, 12 + 32784, 12 + 32786, 12 + 2 * 32785])
def test_checkpoints_of_other_lengths_are_refused(size: int) -> None:
    checkpoints = struct.pack("<iq", 1, 4 << 20).ljust(size, b"\0")[:size]
    message = refusal(of_tar(digests=[bytes(32)], checkpoints=checkpoints, compressed=True))
    assert "expected 1 checkpoints, or one less" in message


@pytest.mark.parametrize("span_size", [0, -1, -(2**63), 2**63 - 1])
def test_spans_of_no_size_are_refused(span_size: int) -> None:
    checkpoints = tar_checkpoints(len(HELLO), span_size)
    assert "spans of 2048 bytes" in refusal(of_tar(checkpoints=checkpoints))


def test_spans_of_one_byte_are_refused_before_there_are_any() -> None:
    assert "in 1 spans" in refusal(
        of_tar(size=2**40, checkpoints=tar_checkpoints(2**40, 1), digests=[bytes(32)]), 2**40
    )


@pytest.mark.parametrize("version", [b"0.8", b"1.0", b"0,9", b"\0\0\0"])
def test_another_version_is_refused(version: bytes) -> None:
    assert "expected version 0.9" in refusal(HAND_WRITTEN.replace(b"0.9\0", version + b"\0"))


@pytest.mark.parametrize("algorithm", [0, 1, 3, 255])
def test_another_compression_is_refused(algorithm: int) -> None:
    data = bytearray(HAND_WRITTEN)
    assert data[83] == 2
    data[83] = algorithm
    assert ("checkpoints" if algorithm == 1 else "no compression") in refusal(bytes(data))


# What strangers write


@pytest.mark.parametrize("stop", range(len(HAND_WRITTEN)))
def test_a_ztoc_that_is_cut_is_refused(stop: int) -> None:
    # The last bytes are the NUL of the version, and not looked at.
    if stop < len(HAND_WRITTEN) - 1:
        refusal(HAND_WRITTEN[:stop])


def test_a_byte_that_is_changed_makes_it_invalid_or_another_table_within_bounds() -> None:
    restarts = [Restart(10, 0, 0, b""), Restart(500, 1500, 3, b"w" * 1500)]
    compressed = of_gzip(
        restarts, blob_size=1000, tar_size=2048, entries=found(pax({"a": "b"}), Member(b"a", b"x"))
    )
    refused = 0
    for data, blob_size in [(HAND_WRITTEN, len(HELLO)), (compressed, 1000)]:
        windows = {at for at in range(len(data)) if data[at - 16 : at + 16] in (b"w" * 32, bytes(32))}
        for at in set(range(len(data))) - windows:
            for change in (1, 2, 0x40, 0x80, 0xFF):
                changed = bytearray(data)
                changed[at] ^= change
                try:
                    table = read(bytes(changed), blob_size)
                except Invalid:
                    refused += 1
                else:
                    check_bounds(table, blob_size=blob_size, ztoc_size=len(data))
    assert refused > 1000


#: Where in HAND_WRITTEN the references are, and the ways back to vtables; but for those that nobody follows.
REFERENCES = [0, 24, 28, 52, 60, 76, 84, 88, 96, 180, 200, 236, 240, 248, 284, 288, 292, 336, 340]


@pytest.mark.parametrize("at", REFERENCES)
@pytest.mark.parametrize("number", [2**32 - 1, 2**31, 2**31 - 1, 432, 431, 429])
def test_a_reference_that_leads_outside_is_refused(at: int, number: int) -> None:
    refusal(HAND_WRITTEN[:at] + struct.pack("<I", number) + HAND_WRITTEN[at + 4 :])


@pytest.mark.parametrize("at", [8, 64, 230, 252])
@pytest.mark.parametrize("size", [0, 2, 426, 65535])
def test_a_vtable_that_is_too_short_or_leaves_the_data_is_refused(at: int, size: int) -> None:
    refusal(HAND_WRITTEN[:at] + struct.pack("<H", size) + HAND_WRITTEN[at + 2 :])


@pytest.mark.parametrize("place", [1, 3, 5, 37, 65535])
def test_a_field_outside_its_table_or_over_another_is_refused(place: int) -> None:
    for at in (12, 14, 16, 18, 20, 22):
        refusal(HAND_WRITTEN[:at] + struct.pack("<H", place) + HAND_WRITTEN[at + 2 :])


@pytest.mark.parametrize(("at", "size"), [(8, 40), (64, 16), (230, 8), (252, 60)])
def test_fields_that_leave_the_table_are_refused(at: int, size: int) -> None:
    def with_size(number: int) -> bytes:
        return HAND_WRITTEN[: at + 2] + struct.pack("<H", number) + HAND_WRITTEN[at + 4 :]

    assert with_size(size) == HAND_WRITTEN
    for smaller in (size - 1, 4, 0):
        assert f"in the table's {smaller} bytes" in refusal(with_size(smaller))


@pytest.mark.parametrize("at", [92, 100, 176, 244, 400, 408, 424])
@pytest.mark.parametrize("count", [2**32 - 1, 2**31, 2**30, 500])
def test_a_vector_or_string_that_is_longer_than_the_data_is_refused(at: int, count: int) -> None:
    refusal(HAND_WRITTEN[:at] + struct.pack("<I", count) + HAND_WRITTEN[at + 4 :])


@pytest.mark.parametrize("data", [b"", b"\0", bytes(4), bytes(1000), b"\xff" * 1000, b"\4\0\0\0" * 200])
def test_bytes_that_are_no_ztoc_are_refused(data: bytes) -> None:
    refusal(data)


def one_table_many_times(strange: Strange) -> list[int]:
    return [strange.file(0, strange.builder.CreateString(b"a"), 0)] * 250_000


def records_shared(strange: Strange) -> list[int]:
    text = strange.builder.CreateString(b"k")
    records = strange.vector([strange.table(2, {0: text, 1: text})] * 10_000)
    return [strange.file(number, text, records) for number in range(10_000)]


def one_long_name(strange: Strange) -> list[int]:
    name = strange.builder.CreateString(b"/".join([b"n" * 255] * 15))
    return [strange.file(number, name, 0) for number in range(10_000)]


def one_long_value(strange: Strange) -> list[int]:
    value = strange.builder.CreateString(bytes(1 << 20))
    records = []
    for number in range(10_000):
        key = strange.builder.CreateString(b"SCHILY.xattr.user.%d" % number)
        records.append(strange.table(2, {0: key, 1: value}))
    return [strange.file(0, strange.builder.CreateString(b"a"), strange.vector(records))]


@pytest.mark.parametrize("files", [one_table_many_times, records_shared, one_long_name, one_long_value])
def test_what_is_small_and_claims_to_be_large_is_refused_at_once(
    files: Callable[[Strange], list[int]],
) -> None:
    strange = Strange()
    data = strange.data(files(strange))
    assert len(data) < 2_500_000
    started = time.process_time()
    assert "again and again" in refusal(data, 2**22)
    assert time.process_time() - started < 2


def test_more_vtables_than_a_writer_makes_are_refused() -> None:
    strange = Strange()
    files = []
    for number in range(1100):
        strange.builder.vtables.clear()  # so that it finds none to share
        files.append(strange.file(number, strange.builder.CreateString(b"%d" % number), 0))
    assert "at most 1000 vtables" in refusal(strange.data(files), 2**22)


def test_strings_that_a_writer_shares_are_read() -> None:
    strange = Strange()
    data = strange.data(
        [strange.file(number, strange.builder.CreateString(b"%d" % number), 0) for number in range(1000)]
    )
    table = read(data, 2**22)
    assert [entry.path for entry in table.entries] == [b"%d" % number for number in range(1000)]


# What is found in a tar


def test_what_is_kept_of_a_member_is_what_go_reads_there() -> None:
    owner = {265: b"user", 297: b"group"}
    member = Member(b"./d//", type=tar.DIRECTORY, mode=0o40755, uid=1, gid=2, mtime=3, link=b"x", at=owner)
    assert found(member) == [
        TocEntry(
            name=b"./d//",
            type=EntryType.DIRECTORY,
            offset=512,
            size=0,
            link=b"x",
            mode=0o40755,
            uid=1,
            gid=2,
            uname=b"user",
            gname=b"group",
            mtime_ns=3 * 10**9,
            device=(0, 0),
            records={},
        )
    ]


def test_records_of_pax_override_the_header_and_are_all_kept() -> None:
    records = {
        "path": "p/",
        "linkpath": "l",
        "uname": "u",
        "gname": "g",
        "size": "3",
        "mtime": "1.5",
        "uid": "9",
        "x": "",
    }
    (entry,) = found(
        pax(records), Member(b"a", b"abc", size=5000, link=b"b", at={265: b"user", 297: b"group"})
    )
    assert (entry.name, entry.link, entry.uname, entry.gname) == (b"p/", b"l", b"u", b"g")
    assert (entry.offset, entry.size, entry.mtime_ns, entry.uid) == (1536, 3, 1_500_000_000, 9)
    assert entry.records == {key.encode(): value.encode() for key, value in records.items()}
    (entry,) = found(pax({"uname": "", "linkpath": ""}), Member(b"a", link=b"b", at={265: b"user"}))
    assert (entry.uname, entry.link) == (b"user", b"b")


def test_long_names_of_gnu_win_over_those_of_pax() -> None:
    (entry,) = found(pax({"path": "p", "linkpath": "q"}), long_name(b"n/"), long_link(b"l"), Member(b"a"))
    assert (entry.name, entry.link) == (b"n/", b"l")


def test_device_numbers_are_read_of_all_but_the_oldest_headers() -> None:
    assert [entry.device for entry in found(Member(b"a", major=1, minor=2))] == [(1, 2)]
    assert [entry.device for entry in found(Member(b"a", magic=tar.GNU, major=1, minor=2))] == [(1, 2)]
    v7 = Member(b"a", magic=tar.V7, major=1, minor=2, at={265: b"user"})
    assert [(entry.device, entry.uname) for entry in found(v7)] == [((0, 0), b"")]


def test_go_reads_the_times_of_gnu_only_where_there_are_some() -> None:
    fields = {345: b"\0junk", 357: b"\0junk"}
    assert [entry.name for entry in found(Member(b"a", magic=tar.GNU, at=fields))] == [b"a"]
    times = {345: b"00000000017\0", 357: base256(2**40, 12)}
    assert [entry.name for entry in found(Member(b"a", magic=tar.GNU, at=times))] == [b"a"]


def test_only_files_have_a_size() -> None:
    members = [Member(b"d", type=tar.DIRECTORY, size=600), Member(b"f", b"x" * 600), Member(b"e")]
    assert [(entry.offset, entry.size) for entry in found(*members)] == [(512, 0), (1024, 600), (2560, 0)]


@pytest.mark.parametrize("block", [1, 511, 512, 700, 100_000])
def test_entries_are_those_of_the_scanner_however_the_archive_is_cut(block: int) -> None:
    parts = [
        Member(b"a", b"x" * 700),
        pax({"path": "b"}),
        Member(b"c", b"y"),
        Member(b"d/", type=tar.DIRECTORY),
    ]
    data = archive(*parts) + bytes(3000)
    scanner = TocScanner()
    entries = [entry for at in range(0, len(data), block) for entry in scanner.feed(data[at : at + block])]
    scanner.finish()
    assert entries == scan(data)
    assert [entry.name for entry in scanner.found] == [b"a", b"b", b"d/"]
    assert scanner.stop == len(data) - 3000


def test_the_archive_ends_after_two_zero_blocks_or_where_there_is_no_more() -> None:
    for end in (b"", bytes(512), bytes(1024)):
        scanner = TocScanner()
        data = archive(Member(b"a", b"x"), end=end)
        scanner.feed(data)
        scanner.finish()
        assert scanner.stop == len(data)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        *(([sparse(form, b"s", 8192, [(4096, b"x")])], "a sparse file") for form in tar.SPARSE_FORMS),
        ([pax({"comment": "x"}, type=b"g"), Member(b"a")], "a global PAX header"),
        ([Member(b"a", type=tar.HARDLINK, link=b"b", size=5)], "a hardlink that has a size"),
        ([pax({"size": "5"}), Member(b"a", type=tar.HARDLINK, link=b"b")], "a hardlink that has a size"),
        ([Member(b"a", type=b"7")], "a file of type 7"),
        ([Member(b"a", mtime=base256(2**40, 12))], "a time"),
        ([Member(b"a", major=b"x")], "Go does not read"),
        ([Member(b"a", magic=tar.V7, type=tar.CHAR, major=1, minor=3)], "a device of which Go"),
        ([pax({"atime": "x"}), Member(b"a")], "Go does not read"),
        ([pax({"uname": b"a\0b"}), Member(b"a")], "Go does not read"),
        ([Member(b"a", magic=tar.GNU, at={345: b"prefix"})], "Go does not read"),
    ],
)
def test_a_layer_that_soci_cannot_carry_is_refused(parts: list[Member | bytes], reason: str) -> None:
    with pytest.raises(Unsupported, match="cannot have a SOCI index: tar archive, offset") as caught:
        found(*parts)
    assert reason in caught.value.message


def test_a_member_that_is_wrong_for_everybody_is_invalid() -> None:
    with pytest.raises(Invalid, match=r"without \.\. components"):
        found(Member(b"../a"))


def test_snapshotters_look_for_attributes_if_there_are_any_or_an_opaque_marker() -> None:
    assert may_disable_xattrs(found(Member(b"a"), pax({"comment": "x"}), Member(b"b")))
    assert not may_disable_xattrs(found(Member(b"a"), pax({"SCHILY.xattr.user.a": ""}), Member(b"b")))
    assert not may_disable_xattrs(found(Member(b"d/.wh..wh..opq")))


# What is built while a blob goes by


@pytest.mark.parametrize("block", [100_000, 1000, 7, 1])
def test_a_ztoc_does_not_depend_on_how_the_blob_is_cut(block: int) -> None:
    blob = gzip.compress(
        archive(*(Member(b"%d" % n, hashlib.sha256(b"%d" % n).digest() * 20) for n in range(300)))
    )
    assert build(blob, span_size=9000, block=block) == build(blob, span_size=9000)


@pytest.mark.parametrize("span_size", [1, 5000, 100_000, 4 << 20])
def test_each_digest_is_that_of_the_span_s_compressed_bytes(span_size: int) -> None:
    _, blob = layer()
    table = read(build(blob, span_size=span_size, block=999), len(blob))
    digests = [hashlib.sha256(blob[span.offset : span.offset + span.length]).digest() for span in table.spans]
    assert [span.blob_sha256 for span in table.spans] == digests
    assert table.spans[-1].offset + table.spans[-1].length == len(blob)


def test_the_pieces_that_are_yielded_are_the_layer() -> None:
    data, blob = layer()
    builder = ZtocBuilder()
    assert b"".join(builder.feed(blob)) == data
    builder.finish(tool="t")
    assert [entry.name for entry in builder.entries] == [b"text", b"noise", b"digits", b"zeros", b"last"]


def test_no_more_of_the_blob_is_held_than_a_trailer() -> None:
    _, blob = layer()
    builder = ZtocBuilder(span_size=20_000)
    for at in range(0, len(blob), 5000):
        for _ in builder.feed(blob[at : at + 5000]):
            pass
        assert len(builder._held) <= 8


MEMBERS = gzip.compress(HELLO[:700]), gzip.compress(HELLO[700:])
EMPTY = gzip.compress(b"")


@pytest.mark.parametrize(
    "blob",
    [
        MEMBERS[0] + MEMBERS[1],
        EMPTY + gzip.compress(HELLO),
        gzip.compress(HELLO) + EMPTY,
        gzip.compress(HELLO) + b"\0",
        gzip.compress(HELLO) + b"garbage",
        gzip.compress(HELLO) + bytes(512),
    ],
    ids=["two members", "empty, full", "full, empty", "a zero", "garbage", "zeros"],
)
@pytest.mark.parametrize("block", [1, 1000])
def test_a_blob_of_several_members_or_with_more_after_them_is_refused(blob: bytes, block: int) -> None:
    with pytest.raises(Unsupported, match="several members"):
        build(blob, block=block)


def test_a_blob_of_one_member_whose_first_blocks_are_empty_is_not_refused() -> None:
    compressor = zlib.compressobj(wbits=31)
    blob = b"".join(compressor.flush(zlib.Z_FULL_FLUSH) for _ in range(5))
    blob += compressor.compress(HELLO) + compressor.flush()
    for block in (1, 1000):
        table = read(build(blob, block=block), len(blob))
        assert inflated(table, blob) == HELLO


def test_a_blob_that_is_cut_or_broken_is_invalid() -> None:
    blob = gzip.compress(HELLO)
    broken = blob[:-6] + bytes([blob[-6] ^ 1]) + blob[-5:]
    for bad in (blob[:-1], blob[:5], b"", broken, b"x" + blob):
        with pytest.raises(Invalid):
            build(bad)
