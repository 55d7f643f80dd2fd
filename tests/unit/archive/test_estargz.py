"""Where an eStargz layer's table of contents is, and what is read from it."""

import gzip
import hashlib
import io
import random
import tarfile
from collections.abc import Callable, Sequence
from functools import partial

import pytest

from fsmount.archive import estargz as module
from fsmount.archive.entry import EntryType
from fsmount.archive.estargz import TAIL_SIZE, read_toc, toc_digest, toc_range
from fsmount.archive.toc import Toc
from fsmount.errors import Corrupt, FsmountError, Invalid, Unsupported
from tests.fakes import estargz as fake
from tests.fakes import tar
from tests.fakes.estargz import NO_PREFETCH, PREFETCH, Blob, Layout, Member, contents, estargz, with_table

MEMBERS = [
    Member(b"d/", type=tar.DIRECTORY, mode=0o755),
    Member(b"d/first", b"first" * 100, mtime=1_600_000_000, xattrs={"user.a": b"\0\xff"}),
    Member(b"d/large", random.Random(7).randbytes(5000), mode=0o4755, uid=10, gid=20),
    Member(b"d/empty"),
    Member(b"link", type=tar.SYMLINK, link=b"d/first"),
    Member(b"hard", type=tar.HARDLINK, link=b"d/first"),
    Member(b"null", type=tar.CHAR, major=1, minor=3),
    Member(b"last", b"last"),
]


def load(blob: Blob, max_size: int = 1 << 30) -> Toc:
    """The table, found by the blob's footer and annotations."""
    start, stop = toc_range(blob.data[-TAIL_SIZE:], len(blob.data))
    digest = toc_digest(blob.annotations)
    assert digest is not None
    return read_toc(blob.data[start:stop], toc_offset=start, digest=digest, max_size=max_size)


def refusal(call: Callable[[], object], kind: type[FsmountError] = Invalid) -> str:
    with pytest.raises(FsmountError) as caught:
        call()
    assert type(caught.value) is kind
    return caught.value.message


def files(members: Sequence[Member]) -> list[tuple[bytes, bytes]]:
    return [(member.name.rstrip(b"/"), member.data) for member in members]


# Reading


@pytest.mark.parametrize("chunk_size", [1000, 4 << 20])
@pytest.mark.parametrize("min_chunk", [0, 3000, 1 << 20])
@pytest.mark.parametrize("footer", [fake.footer_51, fake.footer_47])
def test_every_file_is_read_by_the_table(
    chunk_size: int, min_chunk: int, footer: Callable[[int], bytes]
) -> None:
    blob = estargz(MEMBERS, chunk_size=chunk_size, min_chunk=min_chunk, footer=footer)
    assert contents(load(blob).table, blob.data) == files(MEMBERS)


def test_the_attributes_are_those_of_the_tar() -> None:
    entries = {entry.path: entry for entry in load(estargz(MEMBERS)).table.entries}
    first, large = entries[b"d/first"], entries[b"d/large"]
    assert (first.mtime_ns, first.xattrs) == (1_600_000_000 * 10**9, {b"user.a": b"\0\xff"})
    assert (large.mode, large.uid, large.gid, large.size) == (0o4755, 10, 20, 5000)
    assert (entries[b"link"].type, entries[b"link"].link) == (EntryType.SYMLINK, b"d/first")
    assert (entries[b"hard"].type, entries[b"hard"].link) == (EntryType.HARDLINK, b"d/first")
    assert (entries[b"null"].type, entries[b"null"].device) == (EntryType.CHAR, (1, 3))


def test_the_fake_is_a_gzipped_tar_with_the_table_at_its_end() -> None:
    blob = estargz(MEMBERS, chunk_size=1000, min_chunk=3000)
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(blob.data))) as archive:
        names = [info.name for info in archive]
        assert names[-1] == "stargz.index.json"
        assert names[:-1] == [path.decode() for path, _ in files(MEMBERS)]
        large = archive.extractfile("d/large")
        assert large is not None and large.read() == MEMBERS[2].data


def test_files_share_members_where_they_are_small() -> None:
    spans = load(estargz(MEMBERS, min_chunk=1 << 20)).table.spans
    assert len({(span.offset, span.length) for span in spans}) == 1
    assert len({span.skip for span in spans}) == 3
    spans = load(estargz(MEMBERS)).table.spans
    assert len({span.offset for span in spans}) == 3 and not any(span.skip for span in spans)


def test_landmarks_are_hidden_and_say_what_to_prefetch() -> None:
    blob = estargz([MEMBERS[1], PREFETCH, MEMBERS[7]], min_chunk=1 << 20)
    toc = load(blob)
    assert contents(toc.table, blob.data) == files([MEMBERS[1], MEMBERS[7]])
    head = gzip.decompress(blob.data[: toc.prefetch])
    assert MEMBERS[1].data in head and MEMBERS[7].data not in head
    assert load(estargz([NO_PREFETCH, MEMBERS[1]])).prefetch == 0


def test_a_layer_may_be_empty() -> None:
    assert load(estargz([])).table.entries == []


def test_a_table_of_several_gzip_members_is_read() -> None:
    blob = estargz(MEMBERS)
    tar_ = gzip.decompress(blob.data[blob.toc_offset : blob.toc_stop])
    data = gzip.compress(tar_[:700]) + gzip.compress(tar_[700:])
    digest = hashlib.sha256(blob.toc).digest()
    toc = read_toc(data, toc_offset=blob.toc_offset, digest=digest, max_size=1 << 30)
    assert toc == load(blob)


# Footers


def test_a_footer_written_out_by_hand_is_read() -> None:
    head = "1f8b0804 00000000 00ff"
    empty = "010000ffff 0000000000000000"
    tail = bytes.fromhex(head + "1a00 5347 1600") + b"00000000000003e8STARGZ" + bytes.fromhex(empty)
    assert len(tail) == 51
    assert toc_range(tail, 5000) == (1000, 4949)
    tail = bytes.fromhex(head + "1600") + b"00000000000003e8STARGZ" + bytes.fromhex(empty)
    assert len(tail) == 47
    assert toc_range(b"what is before it" + tail, 5000) == (1000, 4953)


def test_a_table_in_another_image_is_unsupported() -> None:
    tail = fake.footer_46(0)
    assert len(tail) == 46
    assert "external TOC" in refusal(lambda: toc_range(tail, 5000), Unsupported)


@pytest.mark.parametrize("footer", [fake.footer_51, fake.footer_47, fake.footer_46])
def test_a_footer_with_any_other_byte_is_refused(footer: Callable[[int], bytes]) -> None:
    good = footer(1000)
    for at in range(len(good)):
        if good[at : at + 1].isdigit() or good[at : at + 1] in b"abcdef":
            continue  # a digit of the offset may become another
        for flip in (0x01, 0x20, 0x80):
            bad = good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :]
            assert "expected a footer" in refusal(partial(toc_range, bad, 5000))


@pytest.mark.parametrize(
    "tail", [b"", b"STARGZ", bytes(51), fake.footer_51(1000)[1:], fake.footer_51(1000) + b"\0"]
)
def test_what_does_not_end_in_a_footer_is_refused(tail: bytes) -> None:
    assert "expected a footer" in refusal(lambda: toc_range(tail, 5000))


@pytest.mark.parametrize(
    "digits", [b"+0000000000003e8", b"00000000000003E8", b"0x000000000003e8", b" 000000000003e8 "]
)
def test_an_offset_is_sixteen_lower_case_digits(digits: bytes) -> None:
    tail = fake.footer_51(0).replace(16 * b"0", digits)
    assert "expected a footer" in refusal(lambda: toc_range(tail, 5000))


@pytest.mark.parametrize("offset", [4949, 4950, 5000, 2**63, 2**64 - 1])
def test_a_table_lies_between_the_files_and_the_footer(offset: int) -> None:
    assert "expected a table of contents before" in refusal(lambda: toc_range(fake.footer_51(offset), 5000))


def test_a_table_of_more_than_150_mib_is_unsupported() -> None:
    size = 1000 + (150 << 20) + 51
    assert toc_range(fake.footer_51(1000), size) == (1000, size - 51)
    assert "at most" in refusal(lambda: toc_range(fake.footer_51(1000), size + 1), Unsupported)


# Digests


def test_a_layer_without_the_annotation_is_no_estargz() -> None:
    assert toc_digest({"org.opencontainers.image.title": "x"}) is None


@pytest.mark.parametrize("text", ["", "sha256:0", "sha512:" + 128 * "0", "sha256:" + 64 * "A"])
def test_the_annotation_is_a_sha256(text: str) -> None:
    assert "toc.digest" in refusal(lambda: toc_digest({module.TOC_DIGEST: text}))


def test_a_table_that_the_annotation_does_not_name_is_corrupt() -> None:
    blob = estargz(MEMBERS)
    start, stop = toc_range(blob.data[-51:], len(blob.data))
    message = refusal(
        lambda: read_toc(blob.data[start:stop], toc_offset=start, digest=bytes(32), max_size=1 << 30), Corrupt
    )
    assert hashlib.sha256(blob.toc).hexdigest() in message


def test_a_range_that_is_cut_short_is_refused() -> None:
    blob = estargz(MEMBERS)
    for stop in (blob.toc_offset, blob.toc_offset + 1, blob.toc_offset + 20, blob.toc_stop - 1):
        data = blob.data[blob.toc_offset : stop]
        refusal(partial(read_toc, data, toc_offset=blob.toc_offset, digest=bytes(32), max_size=1))


# The table's tar


def table_in(tar_: bytes, text: bytes = b"") -> Toc:
    digest = hashlib.sha256(text).digest()
    return read_toc(gzip.compress(tar_, 1), toc_offset=1000, digest=digest, max_size=1 << 30)


EMPTY = b'{"version":1,"entries":[]}'
INDEX = Member(b"stargz.index.json", EMPTY)


def test_the_table_is_alone_in_its_tar() -> None:
    assert table_in(tar.archive(INDEX), EMPTY).table.entries == []
    for parts in (
        [],
        [Member(b"index.json", EMPTY)],
        [Member(b"d/stargz.index.json", EMPTY)],
        [Member(b"stargz.index.json", type=tar.SYMLINK, link=b"x")],
        [Member(b"stargz.index.json", type=tar.DIRECTORY)],
        [INDEX, INDEX],
        [INDEX, Member(b"x")],
    ):
        assert "alone" in refusal(partial(table_in, tar.archive(*parts), EMPTY))


def test_a_table_without_bytes_or_with_holes_is_refused() -> None:
    assert "expected a file" in refusal(lambda: table_in(tar.archive(Member(b"stargz.index.json"))))
    holes = tar.sparse_old(b"stargz.index.json", 10**15, [(0, EMPTY)])
    assert "expected a file" in refusal(lambda: table_in(tar.archive(holes)))


def test_a_table_that_is_no_tar_is_refused() -> None:
    assert "tar archive" in refusal(lambda: table_in(EMPTY))
    assert "tar archive" in refusal(lambda: table_in(tar.archive(INDEX)[:520]))


def test_a_table_that_inflates_to_more_than_150_mib_is_refused_before_it_has() -> None:
    bomb = gzip.compress(bytes(300 << 20), 1)
    message = refusal(lambda: read_toc(bomb, toc_offset=1000, digest=bytes(32), max_size=1))
    assert "bomb" in message


def test_files_larger_than_allowed_are_refused() -> None:
    total = sum(len(member.data) for member in MEMBERS)
    assert load(estargz(MEMBERS), max_size=total)
    assert "bomb" in refusal(lambda: load(estargz(MEMBERS), max_size=total - 1))


def test_a_chunk_behind_the_table_is_refused() -> None:
    def beyond(toc: fake.Json) -> None:
        toc["entries"][1]["offset"] = 10**6

    assert "member 2, 'd/first'" in refusal(lambda: load(estargz(MEMBERS, change=beyond)))


def test_trailing_data_after_the_json_is_refused() -> None:
    layout = Layout(lambda data: gzip.compress(data))
    assert "end of the JSON" in refusal(lambda: load(with_table(_filled(layout), EMPTY + b"{}")))


def _filled(layout: Layout) -> Layout:
    layout.write(Member(b"a", b"content").headers())
    return layout
