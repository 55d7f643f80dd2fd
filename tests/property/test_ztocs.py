"""A ztoc of any gzip layer leads to the same members and bytes as the layer; a broken one to nothing outside of it."""

import zlib
from itertools import cycle

from hypothesis import given, settings
from hypothesis import strategies as st

from fsmount.archive.entry import Entry
from fsmount.archive.inflate import check_span, inflate_span
from fsmount.archive.scan import TarScanner
from fsmount.archive.span import WINDOW_SIZE, Table
from fsmount.archive.ztoc import MAX_SPAN, read_ztoc
from fsmount.archive.ztoc_builder import ZtocBuilder
from fsmount.errors import Invalid
from tests.fakes import tar
from tests.fakes.tar import Member, archive, long_link, long_name, pax

MAX_SIZE = 1 << 30

_NAMES = st.one_of(
    st.sampled_from([b"a", b"./a/b", b"/c//d/", b"\xff\xfe", "ü".encode(), b"two\nlines", b"n" * 99]),
    st.binary(min_size=1, max_size=90)
    .map(lambda name: name.translate(None, b"\0"))
    .filter(lambda name: name and b".." not in name.split(b"/")),
).map(lambda name: b"x" + name)
_TIMES = st.one_of(st.integers(0, 2**33 - 1), st.integers(-(2**33), 2**33))
_MEMBERS = st.builds(
    Member,
    name=_NAMES,
    type=st.sampled_from([b"0", b"\0", tar.SYMLINK, tar.CHAR, tar.BLOCK_DEVICE, tar.DIRECTORY, tar.FIFO]),
    mode=st.integers(0, 0o177777),
    uid=st.integers(0, 2**32 - 2),
    gid=st.integers(0, 2**32 - 2),
    mtime=_TIMES,
    link=_NAMES,
    magic=st.sampled_from([tar.USTAR, tar.GNU, tar.V7]),
    major=st.integers(0, 2**21 - 1),
    minor=st.integers(0, 2**21 - 1),
).filter(lambda member: member.magic != tar.V7 or member.type not in (tar.CHAR, tar.BLOCK_DEVICE))
_FILES = st.builds(
    Member,
    name=_NAMES,
    data=st.one_of(
        st.binary(max_size=1500),
        st.tuples(st.binary(min_size=1, max_size=50), st.integers(0, 400)).map(
            lambda pair: pair[0] * pair[1]
        ),
    ),
    mtime=_TIMES,
)
_EXTENSIONS = st.one_of(
    st.just(b""),
    st.builds(long_name, _NAMES.map(lambda name: b"/".join([name] * 3))),
    st.builds(long_link, _NAMES.map(lambda name: b"/".join([name] * 3))),
    st.builds(
        lambda records: pax(records),
        st.fixed_dictionaries(
            {},
            optional={
                "path": _NAMES,
                "linkpath": _NAMES,
                "uname": st.just("root"),
                "mtime": st.integers(-(10**18), 10**18).map(lambda ns: f"{ns // 10**9}.{ns % 10**9:09}"),
                "SCHILY.xattr.user.a": st.binary(max_size=30),
                "LIBARCHIVE.xattr.user.b%20c": st.just("YQ"),
                "comment": st.just(""),
            },
        ),
    ),
)
_TARS = st.builds(
    lambda members, end: archive(*(bytes(part) for pair in members for part in pair), end=end),
    st.lists(st.tuples(_EXTENSIONS, st.one_of(_MEMBERS, _FILES)), min_size=1, max_size=8),
    st.sampled_from([b"", bytes(512), bytes(1024), bytes(9000)]),
)

#: Each ends a block in its own way: Z_PARTIAL_FLUSH, Z_SYNC_FLUSH, Z_FULL_FLUSH and Z_BLOCK.
_FLUSHES = st.sampled_from([zlib.Z_NO_FLUSH, 1, 2, 3, 5])


def _compressed(data: bytes, level: int, strategy: int, flushes: list[int]) -> bytes:
    """`data` in one gzip member, of many blocks."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, 31, strategy=strategy)
    pieces = []
    for start, flush in zip(range(0, len(data), 700), cycle(flushes)):
        pieces.append(compressor.compress(data[start : start + 700]))
        pieces.append(compressor.flush(flush) if flush else b"")
    return b"".join([*pieces, compressor.flush()])


def _built(blob: bytes, span_size: int, blocks: list[int]) -> bytes:
    """The ztoc of a blob that is fed in blocks of these sizes, again and again."""
    builder = ZtocBuilder(span_size=span_size)
    start = 0
    for size in cycle(blocks):
        if start >= len(blob):
            break
        for _ in builder.feed(blob[start : start + size]):
            pass
        start += size
    return builder.finish(tool="t")


def _scanned(data: bytes) -> list[Entry]:
    scanner = TarScanner()
    entries = scanner.feed(data)
    scanner.finish()
    return entries


_BLOBS = st.builds(
    lambda data, level, strategy, flushes: (data, _compressed(data, level, strategy, flushes)),
    _TARS,
    st.integers(0, 9),
    st.sampled_from([zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE]),
    st.lists(_FLUSHES, min_size=1, max_size=4),
)


@settings(max_examples=200, deadline=None)
@given(
    layer=_BLOBS,
    span_size=st.one_of(st.integers(1, 3000), st.just(4 << 20)),
    blocks=st.lists(st.one_of(st.integers(1, 300), st.just(1 << 20)), min_size=1, max_size=4),
)
def test_the_ztoc_of_a_layer_has_its_members_and_spans_that_inflate_to_its_bytes(
    layer: tuple[bytes, bytes], span_size: int, blocks: list[int]
) -> None:
    data, blob = layer
    ztoc = _built(blob, span_size, blocks)
    table = read_ztoc(ztoc, blob_size=len(blob), max_size=MAX_SIZE)
    assert list(table.entries) == _scanned(data)
    tar_bytes = b""
    for span in table.spans:
        compressed = blob[span.offset : span.offset + span.length]
        piece = inflate_span(table.codec, span, compressed)
        check_span(span, compressed, piece)
        tar_bytes += piece
    # What follows the two zero blocks is no part of the archive.
    assert data.startswith(tar_bytes)
    assert not data[len(tar_bytes) :].strip(b"\0")
    assert ztoc == _built(blob, span_size, [1 << 20])


def _check_bounds(table: Table, blob_size: int, ztoc_size: int) -> None:
    stop = 0
    for span in table.spans:
        assert stop <= span.offset + bool(span.bits)
        assert 0 <= span.offset < span.offset + span.length <= blob_size
        assert 0 < span.size <= MAX_SPAN
        assert 0 <= span.bits < 8
        assert len(span.window) <= WINDOW_SIZE
        stop = span.offset + span.length
    total, stop, held = sum(span.size for span in table.spans), 0, 0
    for entry in table.entries:
        assert b".." not in entry.path.split(b"/")
        for extent in entry.extents:
            assert stop <= extent.offset < extent.offset + extent.size <= total
            stop = extent.offset + extent.size
        held += len(entry.path) + len(entry.link) + sum(map(len, entry.xattrs.values()))
    assert held <= 2 * ztoc_size


#: Made once: what is to be broken is the same in all examples.
_LAYER = archive(
    pax({"SCHILY.xattr.user.a": b"value", "mtime": "1.5"}),
    Member(b"dir/", type=tar.DIRECTORY),
    Member(b"dir/file", b"0123456789" * 300),
    Member(b"link", type=tar.SYMLINK, link=b"dir/file"),
    Member(b"hard", type=tar.HARDLINK, link=b"dir/file"),
    Member(b"null", type=tar.CHAR, major=1, minor=3),
)
_BLOB = _compressed(_LAYER, 6, zlib.Z_DEFAULT_STRATEGY, [1, 5])
_ZTOC = _built(_BLOB, 1000, [1 << 20])
#: Where it is more than windows.
_WHERE = [at for at in range(len(_ZTOC)) if at % 1024 == 0 or _ZTOC[max(0, at - 32) : at + 32] != bytes(64)]


@settings(max_examples=1000, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.sampled_from(_WHERE), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4
    )
)
def test_a_ztoc_that_was_changed_is_refused_or_leads_nowhere_outside_the_blob(
    changes: list[tuple[int, bytes]],
) -> None:
    data = bytearray(_ZTOC)
    for at, change in changes:
        data[at : at + len(change)] = change
    try:
        table = read_ztoc(bytes(data), blob_size=len(_BLOB), max_size=MAX_SIZE)
    except Invalid:
        return
    _check_bounds(table, len(_BLOB), len(data))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(_ZTOC) - 2))
def test_a_ztoc_that_was_cut_is_refused(stop: int) -> None:
    try:
        read_ztoc(_ZTOC[:stop], blob_size=len(_BLOB), max_size=MAX_SIZE)
    except Invalid:
        return
    raise AssertionError("expected it to be refused")


@given(st.binary(max_size=300))
def test_bytes_that_are_no_ztoc_are_refused(data: bytes) -> None:
    try:
        table = read_ztoc(data, blob_size=1000, max_size=MAX_SIZE)
    except Invalid:
        return
    _check_bounds(table, 1000, len(data))
