"""What a table of contents says, and which tables say nothing that can be believed."""

import base64
import json
from typing import Any

import pytest

from fsmount.archive import toc as module
from fsmount.archive.entry import Entry, EntryType, Extent
from fsmount.archive.span import Codec, Span
from fsmount.archive.toc import Toc, parse_toc
from fsmount.errors import FsmountError, Invalid, Unsupported
from tests.fakes.estargz import Json, digest

LIMIT = 1000
SHA = {letter: bytes.fromhex(digest(letter.encode())[7:]) for letter in "abcdef"}
#: More inflated bytes than any chunk here needs compressed ones for.
LARGE = 1 << 20


def reg(name: str, size: int, offset: int, **more: Any) -> Json:
    """A file of one chunk, whose digest is that of its name."""
    return {
        "type": "reg",
        "name": name,
        "size": size,
        "offset": offset,
        "digest": digest(name.encode()),
    } | more


def first(name: str, size: int, offset: int, chunk_size: int, **more: Any) -> Json:
    """A file of several chunks."""
    return reg(name, size, offset, chunkSize=chunk_size, chunkDigest=digest(b"a")) | more


def chunk(at: int, size: int, offset: int, of: str = "b", **more: Any) -> Json:
    fields = {"chunkOffset": at, "chunkSize": size, "offset": offset, "chunkDigest": digest(of.encode())}
    return {"type": "chunk", "name": "ignored"} | fields | more


def read(*entries: Any, codec: Codec = Codec.GZIP, limit: int = LIMIT, max_size: int = 1 << 40) -> Toc:
    return read_text(json.dumps({"version": 1, "entries": entries}), codec, limit, max_size)


def read_text(
    text: str | bytes, codec: Codec = Codec.GZIP, limit: int = LIMIT, max_size: int = 1 << 40
) -> Toc:
    data = text.encode() if isinstance(text, str) else text
    return parse_toc(data, codec, limit=limit, max_size=max_size)


def only(**fields: Any) -> Entry:
    """The one entry of a table: an empty file called f, but for `fields`."""
    (entry,) = read({"type": "reg", "name": "f"} | fields).table.entries
    return entry


def spans(*entries: Json, codec: Codec = Codec.GZIP) -> list[Span]:
    return list(read(*entries, codec=codec).table.spans)


def refusal(*entries: Any, kind: type[FsmountError] = Invalid, **options: Any) -> str:
    with pytest.raises(FsmountError) as caught:
        read(*entries, **options)
    assert type(caught.value) is kind
    return caught.value.message


def ranges(*entries: Json, codec: Codec = Codec.GZIP) -> list[tuple[int, int]]:
    return [(span.offset, span.offset + span.length) for span in spans(*entries, codec=codec)]


# Attributes


def test_an_entry_has_the_attributes_of_its_member() -> None:
    fields = {
        "mode": 0o104755,
        "uid": 10,
        "gid": 20,
        "modtime": "2026-11-24T23:35:49Z",
        "xattrs": {"user.a": base64.b64encode(b"\0\xff").decode()},
        "userName": "me",
        "accesstime": "nobody reads it",
        "unknown": [{"to": ["us"]}],
    }
    table = read(reg("./bin//sh", 5, 100) | fields).table
    assert list(table.entries) == [
        Entry(
            b"bin/sh",
            EntryType.FILE,
            0o4755,
            10,
            20,
            5,
            1795563349 * 10**9,
            xattrs={b"user.a": b"\0\xff"},
            extents=(Extent(0, 0, 5),),
        )
    ]
    assert table.codec is Codec.GZIP


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("reg", EntryType.FILE),
        ("dir", EntryType.DIRECTORY),
        ("symlink", EntryType.SYMLINK),
        ("hardlink", EntryType.HARDLINK),
        ("char", EntryType.CHAR),
        ("block", EntryType.BLOCK),
        ("fifo", EntryType.FIFO),
    ],
)
def test_the_type_is_one_of_seven(type_: str, expected: EntryType) -> None:
    entry = only(type=type_, linkName="t")
    assert (entry.type, entry.size, entry.extents) == (expected, 0, ())


@pytest.mark.parametrize("type_", ["", None, "file", "REG", "socket", 1, ["reg"], {"reg": 1}])
def test_any_other_type_is_refused(type_: object) -> None:
    assert "expected" in refusal({"type": type_, "name": "f"})


def test_only_files_have_a_size() -> None:
    assert only(type="symlink", linkName="t", size=700).size == 0
    assert only(type="dir", size=-1).size == 0


def test_what_is_absent_or_null_is_zero() -> None:
    keys = ["size", "mode", "uid", "gid", "modtime", "xattrs", "offset", "digest", "chunkSize", "linkName"]
    assert only(**dict.fromkeys(keys)) == only() == Entry(b"f", EntryType.FILE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:01Z", 10**9),
        ("1969-12-31T23:59:59Z", -(10**9)),
        ("1969-12-31T23:59:59.25Z", -750_000_000),
        ("2026-11-24T23:35:49.123456789Z", 1795563349_123456789),
        ("2026-11-24T23:35:49.1Z", 1795563349_100000000),
        ("2026-11-25T01:05:49+01:30", 1795563349 * 10**9),
        ("2026-11-24T15:35:49-08:00", 1795563349 * 10**9),
        ("2024-02-29T00:00:00Z", 1709164800 * 10**9),
        ("0001-01-01T00:00:00Z", 0),
        ("9999-12-31T23:59:59Z", 2**63 - 1),
        ("0001-01-02T00:00:00Z", -(2**63) + 1),
        ("", 0),
    ],
)
def test_a_time_is_in_the_form_of_rfc_3339(text: str, expected: int) -> None:
    assert only(modtime=text).mtime_ns == expected


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-24",
        "2026-11-24T23:35:49",
        "2026-11-24 23:35:49Z",
        "2026-13-24T23:35:49Z",
        "2026-02-29T00:00:00Z",
        "2026-11-24T24:00:00Z",
        "2026-11-24T23:60:49Z",
        "2026-11-24T23:35:60Z",
        "2026-11-24T23:35:49.Z",
        "2026-11-24T23:35:49.0123456789Z",
        "2026-11-24T23:35:49+0100",
        "0000-01-01T00:00:00Z",
        "٢٠٢٦-11-24T23:35:49Z",
        " 2026-11-24T23:35:49Z",
        7,
    ],
)
def test_any_other_time_is_refused(text: object) -> None:
    assert "modtime" in refusal({"type": "dir", "name": "d", "modtime": text})


@pytest.mark.parametrize("key", ["uid", "gid"])
def test_users_and_groups_are_those_that_linux_can_name(key: str) -> None:
    assert getattr(only(**{key: 2**32 - 2}), key) == 2**32 - 2
    for wrong in (2**32 - 1, -1, 2**64):
        assert refusal({"type": "dir", "name": "d", key: wrong})


@pytest.mark.parametrize("key", ["uid", "gid", "mode", "size", "offset"])
@pytest.mark.parametrize("wrong", [1.0, 1e300, "1", True, [1], {}, 2**63, -(2**63)])
def test_a_number_is_a_whole_one_of_64_bits(key: str, wrong: object) -> None:
    assert f"expected {key}" in refusal({"type": "reg", "name": "f", key: wrong})


def test_device_numbers_are_those_of_devices_only() -> None:
    assert only(type="char", devMajor=1, devMinor=3).device == (1, 3)
    assert only(type="block", devMajor=8).device == (8, 0)
    assert only(devMajor=1, devMinor=3).device == (0, 0)
    for wrong in (-1, 2**31):
        assert "devMinor" in refusal({"type": "char", "name": "f", "devMinor": wrong})


@pytest.mark.parametrize(
    "xattrs",
    [{"": ""}, {"a\0b": ""}, {"a": "?"}, {"a": "YQ"}, {"a": "ü"}, {"a": 1}, {"\ud800": ""}, [1], "a", 1],
)
def test_an_extended_attribute_has_a_name_and_a_value_in_base64(xattrs: object) -> None:
    assert refusal({"type": "dir", "name": "d", "xattrs": xattrs})


# Names


@pytest.mark.parametrize(
    ("stored", "path"),
    [
        ("./a", b"a"),
        ("/a", b"a"),
        ("//a//b///", b"a/b"),
        ("a/./b/.", b"a/b"),
        ("./", b""),
        ("", b""),
        ("...", b"..."),
    ],
)
def test_a_path_is_cleaned(stored: str, path: bytes) -> None:
    assert only(type="dir", name=stored).path == path


@pytest.mark.parametrize("path", ["..", "../a", "a/../b", "a/..", "/..", "a/../"])
def test_a_path_with_a_dot_dot_component_is_refused(path: str) -> None:
    assert "without .. components" in refusal({"type": "dir", "name": path})
    assert "without .. components" in refusal(reg(path, 5, 100))
    assert "hardlink target" in refusal({"type": "hardlink", "name": "h", "linkName": path})


@pytest.mark.parametrize("path", [256 * "n", 256 * "n" + "/a", 2048 * "a/", 128 * "ü"])
def test_a_path_that_linux_cannot_name_is_refused(path: str) -> None:
    assert "bytes" in refusal({"type": "reg", "name": path})


@pytest.mark.parametrize("type_", ["reg", "symlink", "hardlink", "fifo"])
def test_only_a_directory_can_be_the_root(type_: str) -> None:
    assert "expected a directory" in refusal({"type": type_, "name": "./", "linkName": "x"})


def test_a_name_that_is_no_utf_8_comes_as_it_is() -> None:
    table = read_text(
        b'{"version":1,"entries":[{"type":"dir","name":"\xff\xc3\xbc\\u00fc\xf0\x9f\x98\x80\\ud83d\\ude00"}]}'
    ).table
    assert table.entries[0].path == b"\xff" + "üü😀😀".encode()


@pytest.mark.parametrize("name", ["a\0b", "\ud800", 7, ["a"]])
def test_a_name_is_text_without_nul(name: object) -> None:
    assert refusal({"type": "dir", "name": name})
    assert refusal({"type": "symlink", "name": "l", "linkName": name})


def test_a_symlink_has_its_target_as_it_stands_and_a_hardlink_a_clean_one() -> None:
    assert only(type="symlink", linkName="..//./x/").link == b"..//./x/"
    assert only(type="hardlink", linkName="./x//y/").link == b"x/y"
    assert only(linkName="x").link == b""
    for type_ in ("symlink", "hardlink"):
        assert "link target" in refusal({"type": type_, "name": "l"})
    assert "link target" in refusal({"type": "symlink", "name": "l", "linkName": 4096 * "x"})


def test_members_of_one_name_stay_and_in_order() -> None:
    table = read(reg("a", 5, 100), {"type": "dir", "name": "a/"}, reg("./a", 7, 200)).table
    assert [(entry.path, entry.size) for entry in table.entries] == [(b"a", 5), (b"a", 0), (b"a", 7)]


# Landmarks


@pytest.mark.parametrize("name", [".prefetch.landmark", ".no.prefetch.landmark", "stargz.index.json"])
def test_what_the_format_adds_is_hidden_in_the_root_and_nowhere_else(name: str) -> None:
    table = read(
        reg("a", 5, 100), reg(name, 1, 200), reg(f"./{name}", 1, 300), reg(f"d/{name}", 7, 400)
    ).table
    assert [entry.path for entry in table.entries] == [b"a", b"d/" + name.encode()]
    assert [(span.offset, span.length) for span in table.spans] == [(100, 100), (400, 600)]
    assert table.entries[1].extents == (Extent(0, 5, 7),)


def test_the_prefetch_landmark_says_how_much_to_fetch_first() -> None:
    assert read(reg("a", 5, 100), reg(".prefetch.landmark", 1, 700)).prefetch == 700
    assert read(reg("a", 5, 100), reg(".no.prefetch.landmark", 1, 700)).prefetch == 0
    assert read(reg("a", 5, 100), reg("d/.prefetch.landmark", 1, 700)).prefetch == 0
    assert "offset" in refusal(reg(".prefetch.landmark", 1, LIMIT))
    assert "offset" in refusal({"type": "dir", "name": ".prefetch.landmark", "offset": LIMIT + 1})


# Chunks


def test_a_file_has_one_extent_over_the_chunks_of_all_files_joined() -> None:
    table = read(
        reg("c", 5, 100),
        {"type": "dir", "name": "d"},
        first("f", 10, 200, 6),
        chunk(6, 4, 300),
        reg("e", 3, 400),
    ).table
    assert [entry.extents for entry in table.entries] == [
        (Extent(0, 0, 5),),
        (),
        (Extent(0, 5, 10),),
        (Extent(0, 15, 3),),
    ]
    assert [(span.size, span.sha256) for span in table.spans] == [
        (5, SHA["c"]),
        (6, SHA["a"]),
        (4, SHA["b"]),
        (3, SHA["e"]),
    ]


def test_the_digest_of_a_chunk_stands_before_that_of_its_file() -> None:
    (span,) = spans(reg("c", 5, 100, chunkDigest=digest(b"d")))
    assert span.sha256 == SHA["d"]


def test_a_member_ends_where_the_next_begins_the_last_at_the_table() -> None:
    entries = [
        reg("a", LARGE, 100),
        reg("b", LARGE, 250),
        first("f", 2 * LARGE, 300, LARGE),
        chunk(LARGE, LARGE, 600),
    ]
    assert ranges(*entries) == [(100, 250), (250, 300), (300, 600), (600, LIMIT)]
    assert ranges(*entries, codec=Codec.ZSTD) == [(100, 250), (250, 300), (300, 600), (600, LIMIT)]


def test_an_empty_file_may_begin_a_member() -> None:
    assert ranges(reg("a", LARGE, 100), reg("e", 0, 200)) == [(100, 200)]


def test_files_that_share_a_member_share_its_end() -> None:
    entries = [reg("a", 50, 100), reg("b", 60, 100, innerOffset=1024), reg("c", 7, 300, innerOffset=0)]
    assert [(s.offset, s.length, s.skip, s.size) for s in spans(*entries)] == [
        (100, 200, 0, 50),
        (100, 200, 1024, 60),
        (300, 700, 0, 7),
    ]


def test_a_first_member_without_a_file_of_its_own_begins_at_0() -> None:
    assert ranges(reg("a", 50, 0, innerOffset=512), reg("b", 60, 100)) == [(0, 100), (100, LIMIT)]


def test_the_last_chunk_has_what_is_left_of_the_file() -> None:
    assert [span.size for span in spans(first("f", 10, 200, 6), chunk(6, 0, 300))] == [6, 4]


def test_entries_need_not_be_in_the_order_of_the_blob() -> None:
    assert ranges(reg("b", LARGE, 250), reg("a", LARGE, 100)) == [(250, LIMIT), (100, 250)]


def test_no_more_is_fetched_of_a_member_than_its_file_can_need() -> None:
    (span,) = read(reg("a", 8, 100, innerOffset=8000), limit=10**12).table.spans
    assert span.length == 8008 + 1001 + 65536
    (span,) = read(reg("a", 8, 100, endOffset=10**12), codec=Codec.ZSTD, limit=10**12).table.spans
    assert span.length == 8 + 1 + 65536


def test_zstd_chunked_says_where_the_last_chunk_ends() -> None:
    entries = [
        reg("a", LARGE, 100, endOffset=200),
        first("f", 2 * LARGE, 300, LARGE, endOffset=700),
        chunk(LARGE, LARGE, 600),
        reg("b", LARGE, 800),
    ]
    assert ranges(*entries, codec=Codec.ZSTD) == [(100, 200), (300, 600), (600, 700), (800, LIMIT)]


def test_a_chunk_of_zeros_is_a_hole_and_needs_no_digest() -> None:
    table = read(
        first("f", 100, 200, 10, endOffset=700),
        chunk(10, 70, 300, chunkType="zeros", chunkDigest=""),
        chunk(80, 15, 400),
        chunk(95, 5, 500, of="c"),
        reg("b", 5, 800, endOffset=900),
        codec=Codec.ZSTD,
    ).table
    assert table.entries[0].extents == (Extent(0, 0, 10), Extent(80, 10, 20))
    assert table.entries[1].extents == (Extent(0, 30, 5),)
    assert [(span.offset, span.length) for span in table.spans] == [
        (200, 100),
        (400, 100),
        (500, 200),
        (800, 100),
    ]


def test_a_file_may_be_all_zeros() -> None:
    table = read(first("f", 2**40, 200, 2**40, chunkType="zeros"), codec=Codec.ZSTD).table
    assert (table.entries[0].size, table.entries[0].extents, list(table.spans)) == (2**40, (), [])


# Lies


@pytest.mark.parametrize(
    "entries",
    [
        [first("f", 10, 100, 6)],
        [first("f", 10, 100, 6), chunk(6, 3, 200)],
        [first("f", 10, 100, 6), chunk(6, 5, 200)],
        [first("f", 10, 100, 6), chunk(7, 3, 200)],
        [first("f", 10, 100, 6), chunk(5, 5, 200)],
        [first("f", 10, 100, 6), chunk(0, 10, 200)],
        [first("f", 10, 100, 6), chunk(6, 4, 200), chunk(6, 4, 300)],
        [first("f", 10, 100, 10), chunk(10, 0, 200)],
        [first("f", 10, 100, 2), chunk(6, 4, 200), chunk(2, 4, 300)],
        [reg("f", 10, 100, chunkSize=11)],
        [reg("f", 10, 100, chunkOffset=1)],
        [reg("f", 10, 100), chunk(0, 10, 200)],
        [reg("f", 0, 100), chunk(0, 10, 200)],
    ],
    ids=range(13),
)
def test_chunks_that_do_not_fill_their_file_in_order_are_refused(entries: list[Json]) -> None:
    assert "expected" in refusal(*entries)
    assert "expected" in refusal(*entries, codec=Codec.ZSTD)


def test_a_chunk_follows_a_file() -> None:
    assert "expected a file before" in refusal(chunk(0, 5, 100))
    assert "expected only files" in refusal({"type": "dir", "name": "d"}, chunk(0, 5, 100))


@pytest.mark.parametrize("key", ["size", "offset", "innerOffset", "chunkSize", "chunkOffset"])
def test_a_place_is_never_negative(key: str) -> None:
    assert key in refusal(reg("f", 10, 100) | {key: -1})


@pytest.mark.parametrize("offset", [LIMIT, LIMIT + 1, 2**63 - 1, 2**63, 2**80])
def test_an_offset_past_the_files_is_refused(offset: int) -> None:
    assert "offset" in refusal(reg("f", 10, offset))
    assert "offset" in refusal(first("f", 10, 100, 6), chunk(6, 4, offset))


@pytest.mark.parametrize("end", [LIMIT + 1, 100, 99, 1, -1, 2**63])
def test_an_end_is_behind_its_beginning_and_before_the_table(end: int) -> None:
    assert refusal(reg("f", 10, 100, endOffset=end), codec=Codec.ZSTD)


def test_descending_chunks_of_zstd_chunked_are_refused() -> None:
    entries = first("f", 10, 200, 6, endOffset=400), chunk(6, 4, 100)
    assert "end after that" in refusal(*entries, codec=Codec.ZSTD)


@pytest.mark.parametrize(
    "entries",
    [
        [reg("a", 10, 100, endOffset=300), reg("b", 10, 200, endOffset=400)],
        [reg("a", 10, 100, endOffset=300), reg("b", 10, 200)],
        [reg("b", 10, 200, endOffset=400), reg("a", 10, 100, endOffset=300)],
        [reg("a", 10, 100, endOffset=300), reg("b", 10, 100, endOffset=300)],
        [reg("a", 10, 100, endOffset=200), reg("b", 10, 100, endOffset=300)],
        [reg("a", 10, 100, endOffset=900), reg("b", 10, 200, endOffset=210), reg("c", 1, 300, endOffset=310)],
        [reg("a", 10, 100), reg("b", 10, 100)],
        [reg("a", 10, 100), reg("b", 10, 100, innerOffset=9)],
        [reg("a", 10, 100, innerOffset=5), reg("b", 10, 100, innerOffset=14)],
    ],
    ids=range(9),
)
def test_chunks_that_overlap_are_refused(entries: list[Json]) -> None:
    assert "overlap" in refusal(*entries, codec=Codec.ZSTD)


def test_chunks_may_touch() -> None:
    assert (
        len(spans(reg("a", 10, 100, endOffset=200), reg("b", 10, 200, endOffset=300), codec=Codec.ZSTD)) == 2
    )
    assert len(spans(reg("a", 10, 100), reg("b", 10, 100, innerOffset=10))) == 2


def test_a_chunk_has_an_offset() -> None:
    assert "expected the offset" in refusal(reg("f", 10, 0))
    assert "expected the offset" in refusal({"type": "reg", "name": "f", "size": 5, "digest": digest(b"")})


def test_what_must_be_inflated_before_a_chunk_is_bounded() -> None:
    assert spans(reg("f", 10, 100, innerOffset=64 << 20))
    assert "innerOffset" in refusal(reg("f", 10, 100, innerOffset=(64 << 20) + 1))


def test_what_is_inflated_as_one_is_bounded() -> None:
    assert spans(reg("f", 256 << 20, 100))
    assert "not read as one" in refusal(reg("f", (256 << 20) + 1, 100), kind=Unsupported)
    assert len(spans(first("f", 512 << 20, 100, 256 << 20), chunk(256 << 20, 0, 200))) == 2


def test_all_files_together_are_bounded() -> None:
    entries = [reg("a", 60, 100), first("z", 40, 200, 40, chunkType="zeros")]
    assert read(*entries, max_size=100)
    assert "bomb" in refusal(*entries, max_size=99)
    huge = [first("z", 2**63 - 1, 200, 2**63 - 1, chunkType="zeros")] * 3
    assert "bomb" in refusal(*huge, max_size=2**63 - 1)


@pytest.mark.parametrize(
    "wrong",
    [None, "", "sha256:", "sha256:" + 63 * "0", "sha256:" + 64 * "A", "sha512:" + 128 * "0", 64 * "0", 7],
)
def test_every_chunk_has_a_sha256(wrong: object) -> None:
    assert "expected" in refusal(reg("f", 10, 100, digest=wrong))
    assert "expected" in refusal(first("f", 10, 100, 6), chunk(6, 4, 200, chunkDigest=wrong))


def test_the_digest_of_a_file_is_none_of_its_chunks() -> None:
    assert "digest" in refusal(first("f", 10, 100, 6, chunkDigest=None), chunk(6, 4, 200))


@pytest.mark.parametrize("kind", ["holes", "ZEROS", 7])
def test_any_other_type_of_chunk_is_refused(kind: object) -> None:
    assert "expected" in refusal(reg("f", 10, 100, chunkType=kind), codec=Codec.ZSTD)


# The JSON


@pytest.mark.parametrize("entries", ["[]", "null", " [ ] "])
def test_a_layer_may_be_empty(entries: str) -> None:
    assert read_text(f' {{"a" : [[]], "entries":{entries} , "version":1, "z":{{}}}}\r\n').table.entries == []


def test_of_a_repeated_key_the_last_counts_as_in_go() -> None:
    text = '{"version":2,"version":1,"entries":[{"type":"reg","type":"dir","name":"a","name":"b"}]}'
    (entry,) = read_text(text).table.entries
    assert (entry.path, entry.type) == (b"b", EntryType.DIRECTORY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "{}",
        '{"version":1}',
        '{"entries":[]}',
        '{"version":1,"entries":[],}',
        '{"version":1,"entries":[{}',
        '{"version":1,"entries":[,]}',
        '{"version":1,"entries":[{"type":"dir","name":"d"},]}',
        '{"version":1,"entries":{}}',
        '{"version":1,"entries":7}',
        '{"version":1,"entries":[7]}',
        '{"version":1,"entries":[null]}',
        '{"version":1,"entries":[[]]}',
        '{"version":1,"entries":[],"entries":[]}',
        '{"version":1,"entries":[]}{}',
        '{"version":1,"entries":[]} x',
        '{"version":1,"entries":[]}\0',
        '{"version":1 "entries":[]}',
        '{"version" 1,"entries":[]}',
        '{version:1,"entries":[]}',
        '{7:1,"entries":[]}',
        '{"version":1,"entries":[],"x":NaN}',
        '{"version":1,"entries":[{"type":"dir","name":"d","x":Infinity}]}',
        '{"version":1,"entries":[{"type":"dir","name":"a\nb"}]}',
        '{"version":1,"entries":[{"type":"dir","name":"\\x"}]}',
        '\ufeff{"version":1,"entries":[]}',
        '{"version":1,"entries":[{"type":"reg","name":"f","size":' + 5000 * "9" + "}]}",
        '{"version":1,"entries":[],"x":' + 100_000 * "[",
        '{"version":1,"entries":[{"x":' + 100_000 * '{"x":',
    ],
)
def test_what_is_no_table_in_json_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="table of contents"):
        read_text(text)


@pytest.mark.parametrize("version", ["2", '"1"', "null", "0", "[]"])
def test_another_version_is_unsupported(version: str) -> None:
    with pytest.raises(Unsupported, match="version"):
        read_text(f'{{"entries":[],"version":{version}}}')


def test_a_message_names_the_member_and_no_more_of_it_than_fits() -> None:
    assert "member 2, 'a/..': expected" in refusal(
        {"type": "dir", "name": "a"}, {"type": "dir", "name": "a/.."}
    )
    assert len(refusal(reg(10_000 * "n", 10, 10**300))) < 1000
    assert len(refusal(reg("f", 10, 100, digest=10_000 * "n"))) < 1000


def test_the_number_of_entries_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENTRIES", 3)
    assert len(read(*3 * [{"type": "dir", "name": "d"}]).table.entries) == 3
    assert "entries" in refusal(*4 * [{"type": "dir", "name": "d"}], kind=Unsupported)
    assert "entries" in refusal(
        first("f", 4, 1, 1), *(chunk(n, 1, 1 + n) for n in (1, 2, 3)), kind=Unsupported
    )


def test_brackets_are_counted_before_they_become_objects() -> None:
    hollow = b"[" + b"[]," * (4 * module.MAX_ENTRIES) + b"[]]"
    with pytest.raises(Unsupported):
        read_text(b'{"version":1,"entries":[],"x":' + hollow + b"}")
