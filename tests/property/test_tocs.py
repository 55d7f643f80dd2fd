"""Files read by a table of contents are those that the blob was made of; and no table leads a read astray."""

import copy
import gzip
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from fsmount.archive import estargz, zstdchunked
from fsmount.archive.entry import Entry, EntryType
from fsmount.archive.toc import MAX_CHUNK, MAX_SKIP, Toc
from fsmount.errors import Corrupt, Invalid, Unsupported
from tests.fakes import estargz as estargz_fake
from tests.fakes import tar
from tests.fakes import zstdchunked as zstd_fake
from tests.fakes.estargz import PREFETCH, Blob, Json, Layout, Member, contents, encoded

MAX_SIZE = 1 << 30
_TYPES = {
    tar.FILE: EntryType.FILE,
    tar.DIRECTORY: EntryType.DIRECTORY,
    tar.SYMLINK: EntryType.SYMLINK,
    tar.HARDLINK: EntryType.HARDLINK,
    tar.CHAR: EntryType.CHAR,
    tar.BLOCK_DEVICE: EntryType.BLOCK,
    tar.FIFO: EntryType.FIFO,
}

#: Of few names, so that they recur.
_NAMES = st.lists(
    st.sampled_from(
        [b"a", b"b", b" ", b"\xff\xfe", "ü".encode(), b"two\nlines", b'"', b"\\u0041", b"n" * 30]
    ),
    min_size=1,
    max_size=3,
).map(b"/".join)
_CONTENTS = st.lists(
    st.one_of(
        st.binary(max_size=300), st.integers(0, 400).map(bytes), st.integers(0, 300).map(lambda n: n * b"c")
    ),
    max_size=4,
).map(b"".join)


@st.composite
def _members(draw: st.DrawFn) -> Member:
    type_ = draw(st.sampled_from([tar.FILE, tar.FILE, tar.FILE, *_TYPES]))
    device = type_ in (tar.CHAR, tar.BLOCK_DEVICE)
    return Member(
        draw(_NAMES),
        draw(_CONTENTS) if type_ == tar.FILE else b"",
        type=type_,
        mode=draw(st.integers(0, 0o7777)),
        uid=draw(st.integers(0, 2**32 - 2)),
        gid=draw(st.integers(0, 2**32 - 2)),
        mtime=draw(st.integers(0, 2**33)),
        link=draw(_NAMES) if type_ in (tar.SYMLINK, tar.HARDLINK) else b"",
        major=draw(st.integers(0, 2**21 - 1)) if device else 0,
        minor=draw(st.integers(0, 2**21 - 1)) if device else 0,
        xattrs=draw(st.dictionaries(st.sampled_from(["user.a", "ü"]), st.binary(max_size=9), max_size=2)),
    )


#: Makes a blob of members, with a change of its table.
_Form = Callable[[Sequence[Member], Callable[[Json], None] | None], Blob]
_CHUNK_SIZES = st.sampled_from([1, 7, 100, 512, 1 << 20])
_MIN_CHUNKS = st.sampled_from([0, 1, 700, 5000])
_FORMS: st.SearchStrategy[_Form] = st.one_of(
    st.builds(
        lambda size, least, footer: (
            lambda members, change: estargz_fake.estargz(
                members, chunk_size=size, min_chunk=least, footer=footer, change=change
            )
        ),
        _CHUNK_SIZES,
        _MIN_CHUNKS,
        st.sampled_from([estargz_fake.footer_51, estargz_fake.footer_47]),
    ),
    st.builds(
        lambda size, prefix, footer: (
            lambda members, change: zstd_fake.zstd_chunked(
                members, chunk_size=size, prefix=prefix, footer=footer, change=change
            )
        ),
        _CHUNK_SIZES,
        st.sampled_from([zstd_fake.CURRENT, zstd_fake.LEGACY]),
        st.sampled_from([zstd_fake.footer_64, zstd_fake.footer_40]),
    ),
    st.builds(
        lambda size, least: (
            lambda members, change: zstd_fake.stargz_flavour(
                members, chunk_size=size, min_chunk=least, change=change
            )
        ),
        _CHUNK_SIZES,
        _MIN_CHUNKS,
    ),
)


def _load(blob: Blob, *, by_footer: bool = False) -> tuple[Toc, int]:
    """The table, by whichever annotations the blob has; and where its files end."""
    data = blob.data
    mark = zstdchunked.read_mark(blob.annotations, len(data))
    if mark is None:
        digest = estargz.toc_digest(blob.annotations)
        assert digest is not None
        start, stop = estargz.toc_range(data[-estargz.TAIL_SIZE :], len(data))
        toc = estargz.read_toc(data[start:stop], toc_offset=start, digest=digest, max_size=MAX_SIZE)
        return toc, start
    position = None if by_footer else mark.position
    if position is None:
        position = zstdchunked.find_position(data[-zstdchunked.TAIL_SIZE :], len(data))
    table = data[position.offset : position.stop]
    toc = zstdchunked.read_toc(table, position, checksum=mark.checksum, max_size=MAX_SIZE)
    return toc, position.offset - 8


def _expected(member: Member) -> Entry:
    assert isinstance(member.mode, int) and isinstance(member.uid, int) and isinstance(member.gid, int)
    assert isinstance(member.mtime, int) and isinstance(member.major, int) and isinstance(member.minor, int)
    return Entry(
        path=member.name,
        type=_TYPES[member.type],
        mode=member.mode,
        uid=member.uid,
        gid=member.gid,
        size=len(member.data),
        mtime_ns=member.mtime * 10**9,
        link=member.link,
        device=(member.major, member.minor),
        xattrs={name.encode(): value for name, value in member.xattrs.items()},
    )


def _check(toc: Toc, limit: int) -> None:
    """Whatever the table said: no read leaves the files' part of the blob, or costs more than its chunk."""
    joined = sum(span.size for span in toc.table.spans)
    for span in toc.table.spans:
        assert 0 <= span.offset < span.offset + span.length <= limit
        assert 0 < span.size <= MAX_CHUNK and 0 <= span.skip <= MAX_SKIP
        assert span.sha256 is not None and len(span.sha256) == 32
    whole = sorted((span.offset, span.skip, span.size) for span in toc.table.spans)
    for (offset, skip, size), (next_offset, next_skip, _) in pairwise(whole):
        assert offset < next_offset or skip + size <= next_skip
    for entry in toc.table.entries:
        assert b".." not in entry.path.split(b"/")
        at = 0
        for extent in entry.extents:
            assert at <= extent.file_offset and extent.size > 0
            assert 0 <= extent.offset <= joined - extent.size
            at = extent.file_offset + extent.size
        assert at <= entry.size
    assert sum(entry.size for entry in toc.table.entries) <= MAX_SIZE
    assert 0 <= toc.prefetch <= limit


def _try(blob: Blob, *, by_footer: bool = False) -> None:
    """Reads all there is to be read. No exception but those of bad input may come out."""
    try:
        toc, limit = _load(blob, by_footer=by_footer)
    except (Invalid, Corrupt, Unsupported):
        return
    _check(toc, limit)
    # Inflating is another module's; but digests must have stopped every lie about contents.
    if sum(span.size + span.skip for span in toc.table.spans) < 1 << 20:
        try:
            contents(replace(toc.table, entries=[]), blob.data)
        except Corrupt:
            return


@settings(max_examples=200, deadline=None)
@given(members=st.lists(_members(), max_size=7), form=_FORMS, by_footer=st.booleans())
def test_any_layer_has_the_members_it_was_made_of(
    members: list[Member], form: _Form, by_footer: bool
) -> None:
    blob = form([*members[:3], PREFETCH, *members[3:]], None)
    toc, limit = _load(blob, by_footer=by_footer)
    _check(toc, limit)
    assert [replace(entry, extents=()) for entry in toc.table.entries] == list(map(_expected, members))
    assert contents(toc.table, blob.data) == [(member.name, member.data) for member in members]


_MEMBERS = [
    Member(b"d/", type=tar.DIRECTORY),
    Member(b"d/small", b"small"),
    PREFETCH,
    Member(b"d/holey", b"h" * 300 + bytes(700) + b"y" * 90, mtime=5, xattrs={"user.a": b"1"}),
    Member(b"link", type=tar.HARDLINK, link=b"d/small"),
    Member(b"last", b"last" * 99),
]

_NUMBERS = st.one_of(
    st.integers(-2, 3000),
    st.sampled_from(
        [2**31, 2**32 - 1, MAX_SKIP, MAX_SKIP + 1, MAX_CHUNK + 1, 2**63 - 1, 2**63, 2**64, -(2**63)]
    ),
)
_VALUES = st.one_of(
    _NUMBERS,
    _NUMBERS,
    st.none(),
    st.booleans(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        ["..", "/", "a/../b", "reg", "chunk", "dir", "zeros", "sha256:" + 64 * "0", 5000 * "a/", "\ud800"]
    ),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.one_of(st.text(max_size=4), st.integers()), max_size=2),
)
_KEYS = st.sampled_from(
    [
        "name",
        "type",
        "size",
        "modtime",
        "linkName",
        "mode",
        "uid",
        "gid",
        "devMajor",
        "xattrs",
        "digest",
        "offset",
    ]
    + ["endOffset", "innerOffset", "chunkOffset", "chunkSize", "chunkDigest", "chunkType"] * 2
)
#: One entry's field gets a value; or an entry is repeated, dropped or moved.
_CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 30), _KEYS, _VALUES),
        st.tuples(
            st.sampled_from(["drop", "repeat", "move"]), st.integers(0, 30), st.integers(0, 30), st.none()
        ),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(changes=_CHANGES, form=_FORMS, by_footer=st.booleans())
def test_no_change_of_a_table_leads_out_of_the_blob(
    changes: list[tuple[str, int, str | int, object]], form: _Form, by_footer: bool
) -> None:
    def change(toc: Json) -> None:
        entries = toc["entries"] = copy.deepcopy(toc["entries"])
        for what, number, key, value in changes:
            if not entries:
                break
            number %= len(entries)
            if what == "set":
                entries[number][key] = value
            elif what == "drop":
                del entries[number]
            else:
                moved = copy.deepcopy(entries[number]) if what == "repeat" else entries.pop(number)
                entries.insert(int(key), moved)

    try:
        blob = form(_MEMBERS, change)
    except UnicodeEncodeError:
        return  # a lone surrogate cannot be written without an escape
    _try(blob, by_footer=by_footer)


#: Where, as a share of the whole; and by what a byte there is changed. 0: all from there on is cut off.
_FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3)


def _damaged(data: bytes, flips: list[tuple[float, int]]) -> bytes:
    damaged = bytearray(data)
    for share, mask in flips:
        at = int(share * len(damaged))
        if mask and damaged:
            damaged[at] ^= mask
        else:
            del damaged[at:]
    return bytes(damaged)


@settings(max_examples=300, deadline=None)
@given(flips=_FLIPS, form=_FORMS, at_the_end=st.booleans(), by_footer=st.booleans())
def test_no_damage_of_a_blob_gives_another_exception(
    flips: list[tuple[float, int]], form: _Form, at_the_end: bool, by_footer: bool
) -> None:
    blob = form(_MEMBERS, None)
    keep = len(blob.data) - 80 if at_the_end else 0
    _try(replace(blob, data=blob.data[:keep] + _damaged(blob.data[keep:], flips)), by_footer=by_footer)


@settings(max_examples=150, deadline=None)
@given(flips=_FLIPS, form=_FORMS)
def test_no_damage_of_the_json_gives_another_exception(flips: list[tuple[float, int]], form: _Form) -> None:
    text = _damaged(form(_MEMBERS, None).toc, flips)
    for blob in (
        estargz_fake.with_table(_filled(Layout(gzip.compress)), text),
        zstd_fake.with_table(_filled(Layout(zstd_fake.frame)), text),
    ):
        _try(blob)


def _filled(layout: Layout) -> Layout:
    for member in _MEMBERS:
        layout.write(bytes(member))
        layout.cut()
    return layout


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        _VALUES, lambda inner: st.dictionaries(_KEYS, inner, max_size=4) | st.lists(inner, max_size=3)
    )
)
def test_no_json_gives_another_exception(value: object) -> None:
    for toc in ({"version": 1, "entries": value}, {"version": 1, "entries": [value]}, {"version": value}):
        try:
            text = encoded(toc)
        except UnicodeEncodeError:
            continue
        _try(zstd_fake.with_table(_filled(Layout(zstd_fake.frame)), text))
