"""What a tar archive says, and which archives say nothing that can be believed."""

import os
import subprocess
from pathlib import Path

import pytest

from fsmount.archive.entry import Entry, EntryType, Extent
from fsmount.archive.header import is_header
from fsmount.archive.scan import MAX_EXTENSION, TarScanner
from fsmount.errors import Invalid
from tests.fakes import tar
from tests.fakes.tar import Member, archive, base256, long_link, long_name, pax, record, sparse

X = b"12345678"  # content


def scan(data: bytes) -> list[Entry]:
    scanner = TarScanner()
    entries = scanner.feed(data)
    scanner.finish()
    return entries


def only(*parts: Member | bytes) -> Entry:
    """The one entry of an archive of `parts`."""
    (entry,) = scan(archive(*parts))
    return entry


def refusal(data: bytes) -> str:
    with pytest.raises(Invalid) as caught:
        scan(data)
    return caught.value.message


def content(data: bytes, entry: Entry) -> bytes:
    """What a reader of the entry sees: zeros where no extent is."""
    result = bytearray(entry.size)
    for extent in entry.extents:
        stored = data[extent.offset : extent.offset + extent.size]
        result[extent.file_offset : extent.file_offset + extent.size] = stored
    assert len(result) == entry.size
    return bytes(result)


# What a header says


def test_a_header_and_its_data_are_one_entry() -> None:
    member = Member(b"bin/sh", X, mode=0o104755, uid=10, gid=20, mtime=30)
    assert only(member) == Entry(
        b"bin/sh", EntryType.FILE, 0o4755, 10, 20, 8, 30 * 10**9, extents=(Extent(0, 512, 8),)
    )


def test_a_header_written_out_by_hand_is_read() -> None:
    text = b"hello.txt".ljust(100, b"\0") + b"0000644\0" + b"0001750\0" + b"0001751\0" + b"00000000005\0"
    text += b"14500000000\0" + b"006432\0 " + b"0"
    (entry,) = scan(text.ljust(512, b"\0") + b"hello".ljust(512, b"\0") + bytes(1024))
    assert (entry.path, entry.uid, entry.gid, entry.size) == (b"hello.txt", 0o1750, 0o1751, 5)
    assert entry.mtime_ns == 0o14500000000 * 10**9


def test_members_come_in_archive_order_each_with_the_place_of_its_data() -> None:
    data = archive(Member(b"a", X), Member(b"empty"), Member(b"b", 600 * b"b"), Member(b"c", X))
    entries = scan(data)
    assert [(entry.path, content(data, entry)) for entry in entries] == [
        (b"a", X),
        (b"empty", b""),
        (b"b", 600 * b"b"),
        (b"c", X),
    ]


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        (b"0", EntryType.FILE),
        (b"\0", EntryType.FILE),
        (b"7", EntryType.FILE),
        (b"1", EntryType.HARDLINK),
        (b"2", EntryType.SYMLINK),
        (b"3", EntryType.CHAR),
        (b"4", EntryType.BLOCK),
        (b"5", EntryType.DIRECTORY),
        (b"6", EntryType.FIFO),
    ],
)
def test_the_type_is_that_of_the_header(type_: bytes, expected: EntryType) -> None:
    assert only(Member(b"a", type=type_, link=b"b")).type is expected


@pytest.mark.parametrize("type_", [b"D", b"M", b"V", b"X", b"8", b"z", b"\xff"])
def test_a_type_that_is_none_of_posix_or_gnu_is_refused(type_: bytes) -> None:
    assert "expected a member type" in refusal(archive(Member(b"a", type=type_)))


def test_a_name_with_a_slash_at_its_end_is_a_directory_only_where_the_type_is_nul() -> None:
    assert only(Member(b"a/", type=b"\0")).type is EntryType.DIRECTORY
    assert only(Member(b"a/", type=b"0")).type is EntryType.FILE
    assert only(pax({"path": "a/"}), Member(b"a", type=b"\0", size=8)).type is EntryType.DIRECTORY


@pytest.mark.parametrize("type_", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_types_1_to_6_carry_no_data_whatever_their_size(type_: bytes) -> None:
    entries = scan(
        archive(
            Member(b"a", type=type_, size=5000, link=b"b"), pax({"size": "700"}), Member(b"c", 700 * b"c")
        )
    )
    assert [(entry.path, entry.size, entry.extents) for entry in entries] == [
        (b"a", 0, ()),
        (b"c", 700, (Extent(0, 4 * 512, 700),)),
    ]
    assert only(pax({"size": "5000"}), Member(b"a", type=type_, link=b"b")).size == 0


def test_device_numbers_are_those_of_devices_only() -> None:
    assert only(Member(b"null", type=tar.CHAR, major=1, minor=3)).device == (1, 3)
    assert only(Member(b"sda", type=tar.BLOCK_DEVICE, major=8, minor=0)).device == (8, 0)
    assert only(Member(b"a", major=1, minor=3)).device == (0, 0)


# Paths


@pytest.mark.parametrize(
    ("stored", "path"),
    [
        (b"./a", b"a"),
        (b"/a", b"a"),
        (b"//a//b///", b"a/b"),
        (b"a/./b/.", b"a/b"),
        (b"./", b""),
        (b".", b""),
        (b"/", b""),
        (b"...", b"..."),
        (b"a/..b/c..", b"a/..b/c.."),
        (b"a\\..\\b", b"a\\..\\b"),
        (b"\xff\n\x1b", b"\xff\n\x1b"),
    ],
)
def test_a_path_is_cleaned(stored: bytes, path: bytes) -> None:
    assert only(Member(stored, type=tar.DIRECTORY)).path == path
    if path:
        assert only(Member(stored)).path == path


@pytest.mark.parametrize("path", [b"..", b"../a", b"a/../b", b"a/..", b"/..", b"a/../", b"./.././x"])
def test_a_path_with_a_dot_dot_component_is_refused(path: bytes) -> None:
    for type_ in (tar.FILE, tar.DIRECTORY):
        assert "without .. components" in refusal(archive(Member(path, type=type_)))
    assert "hardlink target" in refusal(archive(Member(b"a", type=tar.HARDLINK, link=path)))


@pytest.mark.parametrize("type_", [tar.FILE, tar.SYMLINK, tar.HARDLINK, tar.FIFO])
@pytest.mark.parametrize("path", [b"", b".", b"/", b"././"])
def test_only_a_directory_can_be_the_root(type_: bytes, path: bytes) -> None:
    assert "expected a directory" in refusal(archive(Member(path, type=type_, link=b"x")))


def test_a_name_fills_its_field_without_a_nul() -> None:
    assert only(Member(100 * b"n")).path == 100 * b"n"
    assert only(Member(b"l", type=tar.SYMLINK, link=100 * b"t")).link == 100 * b"t"


def test_what_follows_a_nul_in_a_field_is_no_part_of_the_name() -> None:
    assert only(Member(b"a\0b")).path == b"a"


@pytest.mark.parametrize("path", [256 * b"n", b"a/" + 256 * b"n", 256 * b"n" + b"/a", 2048 * b"a/"])
def test_a_path_that_linux_cannot_name_is_refused(path: bytes) -> None:
    assert "bytes" in refusal(archive(long_name(path), Member(b"short")))


def test_the_longest_path_that_linux_can_name_is_read() -> None:
    path = b"/".join([255 * b"d"] * 16)
    assert len(path) == 4095
    assert only(pax({"path": path}), Member(b"short")).path == path


def test_ustar_puts_its_prefix_before_the_name() -> None:
    assert only(Member(b"name", prefix=b"some/folder")).path == b"some/folder/name"
    assert only(Member(b"name", prefix=155 * b"p")).path == 155 * b"p" + b"/name"


def test_star_has_a_prefix_of_131_bytes_before_two_times() -> None:
    times = {476: b"00000000001\x0000000000002\0", 508: b"tar\0"}
    assert only(Member(b"name", prefix=131 * b"p", at=times)).path == 131 * b"p" + b"/name"


@pytest.mark.parametrize("magic", [tar.GNU, tar.V7])
def test_only_ustar_has_a_prefix(magic: bytes) -> None:
    assert only(Member(b"name", X, magic=magic, at={345: b"00000000001\0"})).path == b"name"


# Links


def test_a_symlink_keeps_its_target_verbatim() -> None:
    assert only(Member(b"a", type=tar.SYMLINK, link=b"../.././/b/")).link == b"../.././/b/"


def test_the_target_of_a_hardlink_is_cleaned_like_a_path() -> None:
    assert only(Member(b"a", type=tar.HARDLINK, link=b"/./b//c")).link == b"b/c"


@pytest.mark.parametrize("type_", [tar.SYMLINK, tar.HARDLINK])
def test_a_link_without_a_target_is_refused(type_: bytes) -> None:
    assert "link target of 1 to 4095" in refusal(archive(Member(b"a", type=type_)))


def test_only_links_have_a_target() -> None:
    assert only(Member(b"a", link=b"b")).link == b""


# Numbers


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000017\0", 15),
        (b"     17 ", 15),
        (b"17\0\0\0\0\0\0", 15),
        (b"17 \0\0\0\0\0", 15),
        (b"\0\x0017\0\0\0\0", 15),
        (b"00000017", 15),
        (b"\0\0\0\0\0\0\0\0", 0),
        (b"        ", 0),
        (base256(15, 8), 15),
        (base256(2**31, 8), 2**31),
        (base256(2**32 - 2, 8), 2**32 - 2),
    ],
)
def test_a_number_is_octal_amid_spaces_and_nuls_or_base_256(field: bytes, value: int) -> None:
    assert only(Member(b"a", uid=field)).uid == value


@pytest.mark.parametrize("field", [b"8", b"-1", b"+1", b"0x1", b"1_0", b"1 1", b"1e1", b"\t1"])
def test_a_number_with_other_digits_is_refused(field: bytes) -> None:
    for member in (
        Member(b"a", uid=field.ljust(8, b"\0")),
        Member(b"a", size=field.ljust(12, b"\0")),
        Member(b"a", mtime=field.ljust(12, b"\0")),
        Member(b"a", mode=field.ljust(8, b"\0")),
    ):
        assert "octal number" in refusal(archive(member))


def test_a_size_beyond_octal_is_read_in_base_256() -> None:
    scanner = TarScanner()
    (entry,) = scanner.feed(Member(b"a", size=2**40).header())
    assert entry.extents == (Extent(0, 512, 2**40),)


@pytest.mark.parametrize("size", [-1, -512, 2**63, 2**63 - 1, 2**64, 2**90])
def test_a_size_that_is_negative_or_past_64_bits_is_refused(size: int) -> None:
    assert refusal(archive(Member(b"a", size=base256(size, 12))))
    assert refusal(archive(Member(b"a", type=b"7", size=base256(size, 12))))
    assert refusal(archive(pax({"size": str(size)}), Member(b"a")))


@pytest.mark.parametrize("value", [-1, 2**32 - 1, 2**32, 2**62 - 1])
def test_a_user_or_group_that_linux_does_not_have_is_refused(value: int) -> None:
    assert "user or group" in refusal(archive(Member(b"a", uid=base256(value, 8))))
    assert "user or group" in refusal(archive(Member(b"a", gid=base256(value, 8))))
    if value >= 0:
        assert "user or group" in refusal(archive(pax({"uid": str(value)}), Member(b"a")))
        assert "user or group" in refusal(archive(pax({"gid": str(value)}), Member(b"a")))


@pytest.mark.parametrize("value", [-1, 2**31, 2**32, 2**62 - 1])
def test_a_device_number_that_os_makedev_does_not_take_is_refused(value: int) -> None:
    for type_ in (tar.CHAR, tar.BLOCK_DEVICE):
        assert "device number" in refusal(archive(Member(b"a", type=type_, major=base256(value, 8))))
        assert "device number" in refusal(archive(Member(b"a", type=type_, minor=base256(value, 8))))


def test_every_accepted_device_number_is_one_for_os_makedev() -> None:
    device = only(Member(b"a", type=tar.CHAR, major=2**31 - 1, minor=2**31 - 1)).device
    assert os.makedev(*device) > 0


def test_a_time_before_1970_is_read() -> None:
    assert only(Member(b"a", mtime=-1)).mtime_ns == -(10**9)


@pytest.mark.parametrize("seconds", [2**63, -(2**63) - 1, 2**80])
def test_a_time_past_64_bits_of_seconds_is_refused(seconds: int) -> None:
    assert "64 bits" in refusal(archive(Member(b"a", mtime=base256(seconds, 12))))
    assert "64 bits" in refusal(archive(pax({"mtime": f"{abs(seconds) + 1}.5"}), Member(b"a")))


def test_a_time_past_64_bits_of_nanoseconds_is_shown_as_the_nearest_that_is_not() -> None:
    year_9999 = 253402300799
    assert only(Member(b"a", mtime=year_9999)).mtime_ns == 2**63 - 1
    assert only(pax({"mtime": f"-{year_9999}.25"}), Member(b"a")).mtime_ns == -(2**63) + 1


# Checksums


def test_a_header_with_a_wrong_checksum_is_refused() -> None:
    block = bytearray(archive(Member(b"a", X)))
    for offset in (0, 150, 156, 300, 511):
        block[offset] ^= 1
        assert "tar archive, offset 0: expected a header whose checksum is right" in refusal(bytes(block))
        block[offset] ^= 1


def test_a_checksum_of_signed_bytes_is_accepted() -> None:
    member = tar.with_signed_checksum(Member("naïveté".encode(), X))
    assert member.checksum != Member(member.name, X).header()[148:156]
    assert only(member).path == "naïveté".encode()


def test_a_checksum_may_be_written_with_any_octal_padding() -> None:
    total = int(Member(b"a").header()[148:154], 8)
    for checksum in (b"%o" % total, b"%6o " % total, b"%08o" % total, b"%7o\0" % total):
        assert only(Member(b"a", checksum=checksum)).path == b"a"


@pytest.mark.parametrize("block", [bytes(512), b"#!/bin/sh\n".ljust(512), 512 * b"\xff", 512 * b"0"])
def test_what_has_no_checksum_is_no_header(block: bytes) -> None:
    assert not is_header(block)


# PAX


def test_pax_records_apply_to_the_next_member_only() -> None:
    records = {"path": "é/long", "uid": "7", "gid": "8", "mtime": "9", "comment": "x", "uname": "me"}
    first, second = scan(archive(pax(records), Member(b"a", X), Member(b"b", uid=1)))
    assert first == Entry(
        "é/long".encode(), EntryType.FILE, 0o644, 7, 8, 8, 9 * 10**9, extents=(Extent(0, 3 * 512, 8),)
    )
    assert (second.path, second.uid, second.gid, second.mtime_ns) == (b"b", 1, 0, 0)


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("1700000000", 1_700_000_000_000_000_000),
        ("1700000000.", 1_700_000_000_000_000_000),
        ("1700000000.123456789", 1_700_000_000_123_456_789),
        ("1700000000.1234567899", 1_700_000_000_123_456_789),
        ("1700000000.5", 1_700_000_000_500_000_000),
        ("0.000000001", 1),
        ("-0.5", -500_000_000),
        ("-1.000000001", -1_000_000_001),
    ],
)
def test_a_pax_time_is_exact_to_the_nanosecond(text: str, nanoseconds: int) -> None:
    assert only(pax({"mtime": text}), Member(b"a", mtime=5)).mtime_ns == nanoseconds


@pytest.mark.parametrize(
    "text", ["x", "1e5", ".5", "1.x", "1.-5", "--1", "+1", " 1", "1 ", "1.5.5", "nan", "١"]
)
def test_a_pax_time_that_is_not_decimal_is_refused(text: str) -> None:
    assert "mtime" in refusal(archive(pax({"mtime": text}), Member(b"a")))


@pytest.mark.parametrize("key", ["size", "uid", "gid"])
@pytest.mark.parametrize("text", ["-1", "+1", " 1", "1 ", "1.0", "0x1", "1_0", "²", "9" * 5000])
def test_a_pax_number_that_is_not_digits_is_refused(key: str, text: str) -> None:
    assert f"expected {key}" in refusal(archive(pax({key: text}), Member(b"a")))


@pytest.mark.parametrize("key", ["path", "linkpath", "uid", "gid", "mtime", "size"])
def test_an_empty_pax_value_leaves_what_the_header_says(key: str) -> None:
    plain = only(Member(b"a", X, uid=1, gid=2, mtime=3))
    entry = only(pax({key: ""}), Member(b"a", X, uid=1, gid=2, mtime=3))
    assert (entry.path, entry.uid, entry.gid, entry.mtime_ns, entry.size) == (
        plain.path,
        plain.uid,
        plain.gid,
        plain.mtime_ns,
        plain.size,
    )


def test_of_a_repeated_record_and_of_repeated_headers_the_last_counts() -> None:
    assert only(pax([("path", "a"), ("path", "b")]), Member(b"c")).path == b"b"
    assert only(pax({"path": "a", "uid": "5"}), pax({"path": "b"}), Member(b"c")).path == b"b"
    assert only(pax({"path": "a", "uid": "5"}), pax({"path": "b"}), Member(b"c")).uid == 0
    assert only(long_name(b"a"), long_name(b"b"), Member(b"c")).path == b"b"


@pytest.mark.parametrize(
    "payload",
    [
        b"x",
        b"0 a=b\n",
        b"5 a=b\n",
        b"7 a=b\n",
        b"6 a=b ",
        b"-6 a=b\n",
        b" 6 a=b\n",
        b"6  a=b\n",
        b"6a=b\n",
        b"5 ab\n",
        b"5 =b\n",
        b"7 a\0=b\n",
        b"99999999999999999999 a=b\n",
        b"6 a=b\n\0",
        b"6 a=b\n6 a=",
        b"6\ta=b\n",
    ],
)
def test_a_malformed_pax_record_is_refused(payload: bytes) -> None:
    for type_ in (b"x", b"g"):
        assert "expected a PAX record" in refusal(archive(Member(b"h", payload, type=type_), Member(b"a")))


@pytest.mark.parametrize("key", ["path", "linkpath", "GNU.sparse.name"])
def test_a_nul_in_a_pax_name_is_refused(key: str) -> None:
    message = refusal(archive(pax({key: "a\0b"}), Member(b"a", type=tar.SYMLINK, link=b"b")))
    assert "expected no NUL" in message


def test_global_records_are_not_merged() -> None:
    first, second = scan(archive(pax({"path": "g", "uid": "9"}, type=b"g"), Member(b"a"), Member(b"b")))
    assert (first.path, first.uid, second.path) == (b"a", 0, b"b")


def test_a_global_header_between_an_extension_and_its_member_is_refused() -> None:
    for extension in (pax({"path": "x"}), long_name(b"x"), long_link(b"x")):
        message = refusal(archive(extension, pax({"comment": "x"}, type=b"g"), Member(b"a")))
        assert "global header" in message


def test_xattrs_are_stars_raw_records() -> None:
    records = {
        "SCHILY.xattr.user.a": b"x=y\nz\0\xff",
        "SCHILY.xattr.user.empty": b"",
        "SCHILY.xattr.security.capability": b"\1\0\0\2",
        "SCHILY.acl.access": b"user::rw-",
    }
    assert only(pax(records), Member(b"a")).xattrs == {
        b"user.a": b"x=y\nz\0\xff",
        b"user.empty": b"",
        b"security.capability": b"\1\0\0\2",
    }


def test_libarchives_xattrs_are_decoded_and_give_way_to_stars() -> None:
    records = {
        "LIBARCHIVE.xattr.user.%3D%0A": "aGVsbG8",
        "LIBARCHIVE.xattr.user.b": "Ynll",
        "SCHILY.xattr.user.b": "star",
    }
    assert only(pax(records), Member(b"a")).xattrs == {b"user.=\n": b"hello", b"user.b": b"star"}


@pytest.mark.parametrize(
    "records",
    [
        {"SCHILY.xattr.": "x"},
        {"LIBARCHIVE.xattr.": "eA"},
        {"LIBARCHIVE.xattr.user.a": "e"},
        {"LIBARCHIVE.xattr.user.a": "e A="},
        {"LIBARCHIVE.xattr.user.a": "*"},
        {"LIBARCHIVE.xattr.user.%00": "eA"},
    ],
)
def test_a_malformed_xattr_is_refused(records: dict[str, str | bytes]) -> None:
    assert "extended attribute" in refusal(archive(pax(records), Member(b"a")))


def test_a_pax_size_is_that_of_the_member_not_of_headers_between() -> None:
    # CVE-2025-62518: a reader that gives the L header 1024 bytes takes `hidden` for its second block of data.
    data = archive(
        pax({"size": "1024"}), long_name(b"outer"), Member(b"short", bytes(Member(b"hidden", X)), size=0)
    )
    (entry,) = scan(data)
    assert (entry.path, entry.size, content(data, entry)) == (b"outer", 1024, bytes(Member(b"hidden", X)))


# GNU long names


def test_long_names_and_targets_are_read() -> None:
    name, target = b"d/" * 200 + b"name", b"t/" * 200 + b"target"
    parts = [long_link(target), long_name(name), Member(b"short", type=tar.SYMLINK, link=b"short")]
    for one in (parts, [parts[1], parts[0], parts[2]]):
        entry = only(*one)
        assert (entry.path, entry.link) == (name, target)


def test_gnu_long_names_win_over_pax() -> None:
    records = pax({"path": "pax", "linkpath": "pax-target"})
    names = (long_name(b"gnu"), long_link(b"gnu-target"))
    link = Member(b"a", type=tar.SYMLINK, link=b"b")
    for parts in ((records, *names, link), (*names, records, link)):
        entry = only(*parts)
        assert (entry.path, entry.link) == (b"gnu", b"gnu-target")


def test_a_long_name_may_have_no_nul_or_many_at_its_end_but_none_inside() -> None:
    assert only(Member(b"L", b"name", type=b"L"), Member(b"a")).path == b"name"
    assert only(Member(b"L", b"name\0\0\0", type=b"L"), Member(b"a")).path == b"name"
    assert only(Member(b"L", b"", type=b"L"), Member(b"a")).path == b"a"
    assert "NUL" in refusal(archive(Member(b"L", b"na\0me", type=b"L"), Member(b"a")))


# Bounds


@pytest.mark.parametrize("type_", [b"x", b"g", b"L", b"K"])
def test_an_extension_of_more_than_1_mib_is_refused_before_it_has_come(type_: bytes) -> None:
    scanner = TarScanner()
    with pytest.raises(Invalid, match="extension of at most 1048576 bytes"):
        scanner.feed(Member(b"h", type=type_, size=MAX_EXTENSION + 1).header())


def test_an_extension_of_1_mib_is_read() -> None:
    value = (MAX_EXTENSION - len(b"1048576 comment=\n")) * b"v"
    assert len(record("comment", value)) == MAX_EXTENSION
    assert only(pax({"comment": value}), Member(b"a")).path == b"a"


@pytest.mark.parametrize("type_", [b"x", b"g", b"L", b"K"])
@pytest.mark.parametrize("size", [-1, 2**63])
def test_an_extension_of_impossible_size_is_refused(type_: bytes, size: int) -> None:
    assert refusal(archive(Member(b"h", type=type_, size=base256(size, 12)), Member(b"a")))


# The end


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(1024) + b"anything"])
def test_an_archive_ends_with_two_zero_blocks_one_or_none_and_what_follows_is_ignored(end: bytes) -> None:
    assert len(scan(archive(Member(b"a", X), end=end))) == 1


@pytest.mark.parametrize("data", [b"", bytes(512), bytes(1024), bytes(10240)])
def test_an_archive_may_have_no_members(data: bytes) -> None:
    assert scan(data) == []


def test_a_zero_block_between_members_is_refused() -> None:
    assert "second zero block" in refusal(archive(Member(b"a"), bytes(512), Member(b"b")))
    assert "second zero block" in refusal(bytes(512) + bytes(Member(b"b")))


def test_the_padding_after_the_last_data_may_be_missing_but_no_byte_of_the_data() -> None:
    data = archive(Member(b"a", 600 * b"a"), end=b"")
    assert len(scan(data[: 512 + 600])) == 1
    assert refusal(data[: 512 + 599]) == (
        "tar archive, offset 1111, member 'a': expected 1 more bytes of the member's data, and the archive ends"
    )


NINE = [(i, b"x") for i in range(9)]


@pytest.mark.parametrize(
    ("words", "data", "offset"),
    [
        ("inside it", archive(Member(b"a", X), end=Member(b"b").header()[:511]), 1024),
        ("inside it", b"\0", 0),
        ("of an extension", bytes(pax({"path": "x"}))[:520], 512),
        ("of an extension", bytes(long_name(b"x"))[:512], 512),
        ("after its extension", bytes(pax({"path": "x"})), 1024),
        ("after its extension", bytes(pax({"path": "x"})) + bytes(1024), 1024),
        ("sparse map", sparse("old", b"a", 9, NINE)[:700], 512),
        ("sparse map", sparse("1.0", b"a", 9, NINE)[: 3 * 512], 3 * 512),
    ],
)
def test_an_archive_that_ends_too_early_is_refused_saying_where(words: str, data: bytes, offset: int) -> None:
    message = refusal(data)
    assert words in message
    assert f"offset {offset}" in message


def test_a_refusal_names_the_member_and_the_offset() -> None:
    data = archive(Member(b"ok", X), Member("d/é".encode(), type=tar.SYMLINK))
    assert refusal(data) == (
        "tar archive, offset 1024, member 'd/é': expected a link target of 1 to 4095 bytes, not 0"
    )


# Sparse files

REGIONS = [(0, b"head"), (1000, b"x" * 600), (5000, b"tail")]


def spread(size: int, regions: tar.Regions) -> bytes:
    result = bytearray(size)
    for offset, data in regions:
        result[offset : offset + len(data)] = data
    return bytes(result)


@pytest.mark.parametrize("form", tar.SPARSE_FORMS)
@pytest.mark.parametrize(
    ("size", "regions"),
    [
        (5004, REGIONS),
        (9000, [*REGIONS, (9000, b"")]),
        (9000, [(9000, b"")]),
        (10, [(3, b"mid")]),
        (400, [(2 * i, b"%d" % (i % 10)) for i in range(200)]),
        (8, [(0, b"1234"), (4, b"5678")]),
        (0, [(0, b"")]),
        (9 * 2**33, [(2**33, b"far"), (8 * 2**33, b"farther")]),
    ],
    ids=["data at the end", "hole at the end", "all hole", "one", "many", "adjacent", "empty", "past 8 GiB"],
)
def test_a_sparse_file_has_its_logical_size_and_its_data_where_it_belongs(
    form: str, size: int, regions: tar.Regions
) -> None:
    data = archive(sparse(form, b"d/file", size, regions), Member(b"next", X))
    entry, following = scan(data)
    assert (entry.path, entry.type, entry.size) == (b"d/file", EntryType.FILE, size)
    if size < 2**20:
        assert content(data, entry) == spread(size, regions)
    assert [
        (extent.file_offset, data[extent.offset : extent.offset + extent.size]) for extent in entry.extents
    ] == [region for region in regions if region[1]]
    assert content(data, following) == X


@pytest.mark.parametrize("form", tar.SPARSE_FORMS)
@pytest.mark.parametrize(
    ("size", "regions"),
    [
        (100, [(10, b"1234"), (13, b"5678")]),
        (100, [(10, b"1234"), (0, b"5678")]),
        (100, [(98, b"1234")]),
        (100, [(101, b"")]),
        (0, [(0, b"1")]),
    ],
    ids=["overlap", "disorder", "past the end", "begins past the end", "in an empty file"],
)
def test_sparse_regions_that_overlap_or_leave_the_file_are_refused(
    form: str, size: int, regions: tar.Regions
) -> None:
    message = refusal(archive(sparse(form, b"file", size, regions)))
    assert "member 'file'" in message
    assert "sparse regions in order" in message


@pytest.mark.parametrize("form", tar.SPARSE_FORMS)
def test_the_data_of_a_sparse_file_must_be_what_its_map_says(form: str) -> None:
    data = bytearray(archive(sparse(form, b"file", 5004, REGIONS)))
    start = 0 if form == "old" else 1024
    size = int(data[start + 124 : start + 135], 8)
    for wrong in (size - 1, size + 1):
        data[start + 124 : start + 135] = b"%011o" % wrong
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        assert "of data for the sparse map" in refusal(bytes(data))


@pytest.mark.parametrize(
    "records",
    [
        {"GNU.sparse.major": "2", "GNU.sparse.minor": "0"},
        {"GNU.sparse.major": "1"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "1"},
        {"GNU.sparse.name": "x"},
        {"GNU.sparse.size": "100"},
        {"GNU.sparse.map": "0,8"},
        {"GNU.sparse.numblocks": "2", "GNU.sparse.map": "0,8"},
        {"GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,8,9"},
        {"GNU.sparse.numblocks": "1", "GNU.sparse.map": "0;8"},
        {"GNU.sparse.numblocks": "1", "GNU.sparse.map": "-1,8"},
        {"GNU.sparse.numblocks": "1", "GNU.sparse.map": f"{2**63},8"},
        {"GNU.sparse.numblocks": "1000001", "GNU.sparse.map": "0,8"},
        {"GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,8", "GNU.sparse.size": "-8"},
    ],
)
def test_sparse_records_of_another_version_or_without_a_map_are_refused(
    records: dict[str, str | bytes],
) -> None:
    assert "sparse" in refusal(archive(pax(records), Member(b"a", X)))


@pytest.mark.parametrize(
    "keys", [("numbytes",), ("offset", "offset"), ("offset", "numbytes", "numbytes"), ("offset",)]
)
def test_the_records_of_sparse_0_0_come_in_pairs(keys: tuple[str, ...]) -> None:
    records = [("GNU.sparse.numblocks", "1"), *((f"GNU.sparse.{key}", "0") for key in keys)]
    assert "sparse" in refusal(archive(pax(records), Member(b"a", X)))


@pytest.mark.parametrize(
    "text", ["", "x\n", "1000001\n", "-1\n", "1\n0\n", "1\n0\n9x\n", "2\n0\n8\n", "1\n\n8\n"]
)
def test_a_malformed_map_of_sparse_1_0_is_refused(text: str) -> None:
    records = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "8"}
    message = refusal(archive(pax(records), Member(b"a", tar.padded(text.encode()) + X)))
    assert "sparse map" in message


def test_only_a_file_can_be_sparse() -> None:
    records = pax({"GNU.sparse.numblocks": "0", "GNU.sparse.size": "0"})
    message = refusal(archive(records, Member(b"a", type=tar.DIRECTORY)))
    assert "only files" in message


def test_type_s_of_another_tar_and_a_second_map_are_refused() -> None:
    assert "GNU magic" in refusal(archive(Member(b"a", type=b"S", magic=tar.USTAR)))
    records = pax({"GNU.sparse.numblocks": "0", "GNU.sparse.size": "0"})
    assert "one sparse map" in refusal(archive(records, sparse("old", b"a", 0, [])))


def test_an_endless_map_of_old_gnu_is_refused() -> None:
    scanner = TarScanner()
    scanner.feed(Member(b"a", type=b"S", magic=tar.GNU, at={482: b"\1", 483: b"00000000000\0"}).header())
    with pytest.raises(Invalid, match="sparse map of at most"):
        for _ in range(100):
            scanner.feed(128 * (bytes(504) + b"\1" + bytes(7)))


def test_an_endless_map_of_sparse_1_0_is_refused() -> None:
    records = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "8"}
    scanner = TarScanner()
    scanner.feed(bytes(pax(records)) + Member(b"a", size=2**30).header() + tar.padded(b"1\n"))
    with pytest.raises(Invalid, match="sparse map of at most"):
        for _ in range(100):
            scanner.feed(128 * 512 * b"0")


# GNU tar itself

GNU_TAR_FORMS = [
    ["--format=gnu"],
    ["--format=oldgnu"],
    ["--format=posix", "--sparse-version=0.0"],
    ["--format=posix", "--sparse-version=0.1"],
    ["--format=posix", "--sparse-version=1.0"],
]


@pytest.mark.parametrize("options", GNU_TAR_FORMS, ids=" ".join)
def test_what_gnu_tar_stores_as_sparse_is_read_back(tmp_path: Path, options: list[str]) -> None:
    few = {0: b"head" * 1024, 2**20: b"body" * 1024, 3 * 2**20 - 4: b"tail"}
    many = {i * 65536: b"%04d" % i * 1024 for i in range(1, 40)}
    files = {"few": (3 * 2**20, few), "many": (40 * 65536, many), "hole": (2**20, {}), "far": (2**34, {})}
    for name, (size, regions) in files.items():
        with open(tmp_path / name, "wb") as file:
            for offset, data in regions.items():
                file.seek(offset)
                file.write(data)
            file.truncate(size)
    (tmp_path / ("n" * 120)).write_bytes(X)
    os.link(tmp_path / "few", tmp_path / "few-again")
    names = ["few", "many", "hole", "far", "few-again", "n" * 120]
    data = subprocess.run(
        ["tar", "-C", tmp_path, "--sparse", "--hole-detection=raw", *options, "-cf", "-", *names],
        check=True,
        capture_output=True,
    ).stdout
    entries = {entry.path.decode(): entry for entry in scan(data)}
    assert list(entries) == names
    for name, (size, regions) in files.items():
        assert entries[name].size == size
        if name != "far":
            assert content(data, entries[name]) == (tmp_path / name).read_bytes()
            assert len(entries[name].extents) >= len(regions)
    assert entries["far"].extents == ()
    assert (entries["few-again"].type, entries["few-again"].link) == (EntryType.HARDLINK, b"few")
    assert content(data, entries["n" * 120]) == X
