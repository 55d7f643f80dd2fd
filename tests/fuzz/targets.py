"""What holds for any bytes: each target gives a parser its input, and checks all that is promised of the result.

A target returns whether its input was accepted, and raises only for a defect. What is no input of the parser itself,
such as the size of a blob, is in the first bytes of its data, so that it is varied like the rest.
"""

import gzip as gzip_module
import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any
from unittest.mock import patch

from backports import zstd

from fsmount.archive import codecs, estargz, toc, zstdchunked
from fsmount.archive.codecs import Compression
from fsmount.archive.entry import Entry, EntryType
from fsmount.archive.header import BLOCK, MAX_INT64
from fsmount.archive.inflate import inflate_span
from fsmount.archive.paths import MAX_PATH
from fsmount.archive.restarts import RestartDecoder, chunk_spans
from fsmount.archive.scan import TarScanner
from fsmount.archive.span import WINDOW_SIZE, Codec, Restart, Span, Table
from fsmount.archive.toc import MAX_CHUNK, MAX_SKIP, Toc
from fsmount.archive.ztoc import CHECKPOINT, CHECKPOINTS, MAX_SPAN, read_ztoc
from fsmount.archive.ztoc_builder import ZtocBuilder
from fsmount.archive.ztoc_writer import tar_checkpoints, write_ztoc
from fsmount.errors import Corrupt, Invalid, Unsupported
from fsmount.tarwalk import walk_tar
from tests.fakes import estargz as estargz_fake
from tests.fakes import tar as tar_fake
from tests.fakes import zstdchunked as zstd_fake
from tests.fakes.estargz import PREFETCH, Blob, Layout, Member
from tests.fakes.gzips import HEADERS, Deflate, by_zlib
from tests.fakes.tar import SPARSE_FORMS, archive, base256, long_link, long_name, pax, sparse

MAX_SIZE = 1 << 30
#: What an input may inflate to before it is left: of that size there is nothing new.
_ENOUGH = 1 << 19

_MEMBERS = [
    Member(b"dir/", type=tar_fake.DIRECTORY, mtime=5),
    Member(b"dir/file", b"0123456789" * 30, xattrs={"user.a": b"value"}),
    PREFETCH,
    Member(b"holey", b"h" * 300 + bytes(700) + b"y" * 90),
    Member(b"link", type=tar_fake.SYMLINK, link=b"dir/file"),
    Member(b"hard", type=tar_fake.HARDLINK, link=b"dir/file"),
    Member(b"null", type=tar_fake.CHAR, major=1, minor=3),
    Member(b"last", b"last" * 99),
]
_LAYER = archive(*_MEMBERS)
#: Its blocks end every 300 bytes.
_GZIP = by_zlib(_LAYER, flushes=[zlib.Z_SYNC_FLUSH, zlib.Z_BLOCK, zlib.Z_PARTIAL_FLUSH], step=300)


# -------------------- tar


def tar(data: bytes) -> bool:
    """1 byte: in how large pieces it is fed. The rest: a tar."""
    step, archive = 13 * (1 + data[0] if data else 1), data[1:]
    entries = _scanned([archive])
    assert _scanned(archive[at : at + step] for at in range(0, len(archive), step)) == entries
    if _is_plain(archive):
        assert _walked(archive) == entries
    if entries is None:
        return False
    stop = 0
    for entry in entries:
        _check_entry(entry)
        for extent in entry.extents:
            assert stop <= extent.offset <= len(archive) - extent.size
            stop = extent.offset + extent.size
    return True


def _scanned(pieces: Iterable[bytes]) -> list[Entry] | None:
    scanner = TarScanner()
    entries: list[Entry] = []
    try:
        for piece in pieces:
            entries += scanner.feed(piece)
        scanner.finish()
    except Invalid:
        return None
    return entries


def _is_plain(archive: bytes) -> bool:
    """Whether it is no compressed layer by its first bytes, whatever a scanner would find in it."""
    try:
        return codecs.sniff(archive[:BLOCK]) is Compression.NONE
    except (Invalid, Unsupported):
        return False


def _walked(archive: bytes) -> list[Entry] | None:
    """The entries by a walk that reads little at once, and never finds it too dear."""
    before = 0

    async def read(start: int, stop: int) -> bytes:
        nonlocal before
        assert before <= start < stop <= len(archive)
        before = stop
        return archive[start:stop]

    with patch.multiple("fsmount.tarwalk", _LEAST=BLOCK, _MOST=4 * BLOCK, _STAKE=MAX_INT64):
        try:
            entries = _run(walk_tar(read, len(archive)))
        except Invalid:
            return None
    assert entries is not None
    return entries


def _run(coroutine: Coroutine[Any, None, list[Entry] | None]) -> list[Entry] | None:
    """What a coroutine returns that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as returned:
        result: list[Entry] | None = returned.value
        return result
    raise AssertionError("expected it not to wait")


def _check_entry(entry: Entry) -> None:
    """What holds for an entry from anywhere."""
    parts = entry.path.split(b"/")
    assert entry.path or entry.type is EntryType.DIRECTORY
    assert not entry.path or not {b"", b".", b".."} & set(parts)
    assert b"\0" not in entry.path + entry.link + b"".join(entry.xattrs)
    assert len(entry.path) <= MAX_PATH and len(entry.link) <= MAX_PATH
    assert 0 <= entry.mode <= 0o7777
    assert 0 <= entry.uid < 2**32 - 1 and 0 <= entry.gid < 2**32 - 1
    assert abs(entry.mtime_ns) <= MAX_INT64 and 0 <= entry.size <= MAX_INT64
    assert bool(entry.link) == (entry.type in (EntryType.SYMLINK, EntryType.HARDLINK))
    assert all(0 <= number < 2**31 for number in entry.device)
    assert all(name and isinstance(value, bytes) for name, value in entry.xattrs.items())
    at = 0
    for extent in entry.extents:
        assert at <= extent.file_offset < extent.file_offset + extent.size <= entry.size
        at = extent.file_offset + extent.size


def _tar_seeds() -> Iterator[bytes]:
    regions = [(0, b"first"), (1000, b"x" * 600), (5000, b"last")]
    yield _LAYER
    yield archive(Member(b"large", bytes(5000)), Member(b"small", b"s"), Member(b"larger", bytes(9000)))
    yield archive(long_name(b"n" * 150), Member(b"n", b"1"), long_link(b"t" * 150), *_MEMBERS[4:6])
    yield archive(
        pax({"comment": "global"}, type=b"g"),
        pax({"path": "é", "mtime": "-1.5", "size": "3", "uid": "7", "SCHILY.xattr.user.a": b"\0\xff"}),
        Member(b"e", b"abc"),
        pax({"linkpath": "é" * 90, "LIBARCHIVE.xattr.user.b%20c": "YQ"}),
        Member(b"l", type=tar_fake.SYMLINK, link=b"x"),
    )
    yield archive(
        Member(
            b"numbers", b"a", uid=base256(2**31, 8), mtime=base256(-5, 12), magic=tar_fake.GNU, prefix=b"old"
        )
    )
    yield archive(Member(b"old", b"data", magic=tar_fake.V7, type=b"\0"), end=b"")
    yield archive(*(sparse(form, b"holes", 6000, regions) for form in SPARSE_FORMS))
    yield archive(sparse("old", b"many", 10_000, [(at * 100, b"y" * 10) for at in range(30)]))


# -------------------- tables of contents


def toc_json(data: bytes) -> bool:
    """1 byte: whether the codec is gzip; 3: where the chunks end. The rest: the JSON."""
    codec = Codec.GZIP if data[:1] == b"\1" else Codec.ZSTD
    limit = int.from_bytes(data[1:4], "little")
    try:
        table = toc.parse_toc(data[4:], codec, limit=limit, max_size=MAX_SIZE)
    except (Invalid, Unsupported):
        return False
    _check_toc(table, limit)
    return True


def estargz_layer(data: bytes) -> bool:
    """1 byte: of what the rest is the whole: 0 a blob, 1 the tar of its table, 2 the table's JSON."""
    kind, rest = data[:1], data[1:]
    if kind == b"\0":
        blob = rest
    else:
        packed = rest if kind == b"\1" else archive(Member(b"stargz.index.json", rest))
        blob = bytes(2000) + gzip_module.compress(packed, 1, mtime=0) + estargz_fake.footer_51(2000)
    try:
        start, stop = estargz.toc_range(blob[-estargz.TAIL_SIZE :], len(blob))
        assert 0 <= start < stop <= len(blob)

        def read(digest: bytes) -> Toc:
            return estargz.read_toc(blob[start:stop], toc_offset=start, digest=digest, max_size=MAX_SIZE)

        table = read(_named(read))
    except (Corrupt, Unsupported):
        return False
    _check_toc(table, start)
    return True


def _named(read: Callable[[bytes], object]) -> bytes:
    """The digest of the table, by which it is refused when another is asked for: who lies about it knows it."""
    try:
        read(bytes(32))
    except Corrupt as error:
        found = re.search("not ([0-9a-f]{64})$", error.message)
        if found is None:
            raise
        return bytes.fromhex(found[1])
    raise AssertionError("expected a table not to have the digest of zeros")


def zstd_chunked(data: bytes) -> bool:
    """1 byte: 0 if a blob is to come, 1 if the JSON of its table. Of a blob, 1 byte: so long is its position."""
    if data[:1] == b"\1":
        layout = Layout(zstd_fake.frame)
        layout.blob = bytes(10_000)  # no read_toc looks at the chunks
        made = zstd_fake.with_table(layout, data[1:])
        blob, annotations = made.data, dict(made.annotations)
    else:
        stop = 2 + (data[1] if len(data) > 1 else 0)
        blob, position_text = data[stop:], data[2:stop].decode("utf-8", "surrogateescape")
        annotations = {zstd_fake.CURRENT + "manifest-checksum": zstd_fake.digest(b"")}
        if position_text:
            annotations[zstd_fake.CURRENT + "manifest-position"] = position_text
    try:
        mark = zstdchunked.read_mark(annotations, len(blob))
        assert mark is not None
        position = mark.position or zstdchunked.find_position(blob[-zstdchunked.TAIL_SIZE :], len(blob))
        assert 8 <= position.offset < position.stop <= len(blob)
        part = blob[position.offset : position.stop]
        checksum = hashlib.sha256(part).digest()
        table = zstdchunked.read_toc(part, position, checksum=checksum, max_size=MAX_SIZE)
    except (Corrupt, Unsupported):
        return False
    _check_toc(table, position.offset - 8)
    return True


def _check_toc(found: Toc, limit: int) -> None:
    _check_spans(found.table, limit, MAX_CHUNK)
    for span in found.table.spans:
        assert span.skip <= MAX_SKIP and span.sha256 is not None and len(span.sha256) == 32
    places = sorted((span.offset, span.skip, span.size) for span in found.table.spans)
    for (offset, skip, size), (next_offset, next_skip, _) in pairwise(places):
        assert offset < next_offset or skip + size <= next_skip
    assert sum(entry.size for entry in found.table.entries) <= MAX_SIZE
    assert 0 <= found.prefetch <= limit


def _check_spans(table: Table, blob_size: int, largest: int) -> None:
    """No read leaves the blob, and no file the bytes that are read."""
    for span in table.spans:
        assert 0 <= span.offset < span.offset + span.length <= blob_size
        assert 0 < span.size <= largest and span.skip >= 0
    total = sum(span.size for span in table.spans)
    for entry in table.entries:
        _check_entry(entry)
        assert all(0 <= extent.offset <= total - extent.size for extent in entry.extents)


def _blobs() -> list[tuple[Codec, Blob]]:
    small = [
        estargz_fake.estargz(_MEMBERS, chunk_size=100, min_chunk=700),
        estargz_fake.estargz(_MEMBERS, footer=estargz_fake.footer_47),
    ]
    return [(Codec.GZIP, blob) for blob in small] + [
        (Codec.ZSTD, zstd_fake.zstd_chunked(_MEMBERS, chunk_size=100)),
        (Codec.ZSTD, zstd_fake.zstd_chunked(_MEMBERS, footer=zstd_fake.footer_40)),
        (Codec.ZSTD, zstd_fake.stargz_flavour(_MEMBERS, chunk_size=200)),
    ]


def _toc_seeds() -> Iterator[bytes]:
    for codec, blob in _blobs():
        yield bytes([codec is Codec.GZIP]) + blob.toc_offset.to_bytes(3, "little") + blob.toc
    yield b"\1" + bytes(3) + b'{"version": 1, "entries": null, "more": [{}, 1.5, true]}'


def _estargz_seeds() -> Iterator[bytes]:
    for codec, blob in _blobs():
        if codec is Codec.GZIP:
            yield b"\0" + blob.data
            yield b"\1" + archive(Member(b"stargz.index.json", blob.toc))
            yield b"\2" + blob.toc


def _zstd_seeds() -> Iterator[bytes]:
    for codec, blob in _blobs():
        if codec is Codec.ZSTD:
            position = next(
                text for name, text in blob.annotations.items() if name.endswith("position")
            ).encode()
            yield b"\0\0" + blob.data
            yield b"\0" + bytes([len(position)]) + position + blob.data
            yield b"\1" + blob.toc


# -------------------- ztocs


def ztoc(data: bytes) -> bool:
    """4 bytes: the blob's size. The rest: a ztoc."""
    blob_size = int.from_bytes(data[:4], "little")
    table = _read_ztoc(data[4:], blob_size)
    if table is None:
        return False
    held = sum(
        len(entry.path) + len(entry.link) + sum(map(len, entry.xattrs.values())) for entry in table.entries
    )
    assert held <= 2 * len(data)
    return True


def zinfo(data: bytes) -> bool:
    """1 byte: of how many spans, and whether of a tar. The rest: checkpoints, but for the windows, which are true."""
    count, rest = data[0] & 0x7F if data else 0, data[1:]
    is_tar = bool(data and data[0] & 0x80)
    blob = _LAYER if is_tar else _GZIP
    table = _read_ztoc(
        write_ztoc(
            [],
            tool="t",
            blob_size=len(blob),
            tar_size=len(_LAYER),
            compressed=not is_tar,
            checkpoints=rest if is_tar else _with_windows(rest),
            digests=[bytes(32)] * count,
        ),
        len(blob),
    )
    if table is None:
        return False
    at = 0
    for span in table.spans:
        try:
            inflated = inflate_span(table.codec, span, blob[span.offset : span.offset + span.length])
        except Corrupt:
            pass
        else:
            assert len(inflated) == span.size
            begins = span.offset + bool(span.bits), at, span.bits
            assert begins not in _true_points() or inflated == _LAYER[at : at + span.size]
        at += span.size
    return True


def _read_ztoc(data: bytes, blob_size: int) -> Table | None:
    try:
        table = read_ztoc(data, blob_size=blob_size, max_size=MAX_SIZE)
    except Invalid:
        return None
    _check_spans(table, blob_size, MAX_SPAN)
    stop = 0
    for span in table.spans:
        assert stop <= span.offset + bool(span.bits) and 0 <= span.bits < 8
        assert len(span.window) <= WINDOW_SIZE
        stop = span.offset + span.length
    stop = 0
    for entry in table.entries:
        for extent in entry.extents:
            assert stop <= extent.offset
            stop = extent.offset + extent.size
    return table


_POINT = struct.Struct("<qqB")


def _with_windows(points: bytes) -> bytes:
    """Checkpoints as they stand in a ztoc; what is no whole point stays at the end."""
    parts = [points[: CHECKPOINTS.size]]
    for at in range(CHECKPOINTS.size, len(points), _POINT.size):
        point = points[at : at + _POINT.size]
        if len(point) == _POINT.size:
            offset, out, bits = _POINT.unpack(point)
            window = _LAYER[max(0, out - WINDOW_SIZE) : out] if 0 <= out <= len(_LAYER) else b""
            point = CHECKPOINT.pack(offset, out, bits, window.rjust(WINDOW_SIZE, b"\0"))
        parts.append(point)
    return b"".join(parts)


@cache
def _points(spacing: int) -> list[Restart]:
    decoder = RestartDecoder(spacing=spacing)
    for _ in decoder.feed(_GZIP):
        pass
    return decoder.restarts


@cache
def _true_points() -> set[tuple[int, int, int]]:
    return {(point.offset, point.out, point.bits) for point in _points(0)}


def _ztoc_seeds() -> Iterator[bytes]:
    named = archive(
        pax({"path": "long" * 40, "mtime": "1.5", "SCHILY.xattr.user.a": b"v"}),
        Member(b"x", b"12"),
        *_MEMBERS,
    )
    for layer in (_LAYER, named):
        blob = by_zlib(layer)
        builder = ZtocBuilder()
        for _ in builder.feed(blob):
            pass
        # With windows they would be large, and nearly all zeros: old ztocs leave the first one out.
        of_gzip = CHECKPOINTS.pack(1, 1 << 20)
        for size, points in ((len(blob), of_gzip), (len(layer), tar_checkpoints(len(layer), 1000))):
            is_gzip = points is of_gzip
            yield size.to_bytes(4, "little") + write_ztoc(
                builder.entries,
                tool="t",
                blob_size=size,
                tar_size=len(layer),
                compressed=is_gzip,
                checkpoints=points,
                digests=[bytes(32)] * (1 if is_gzip else -(-size // 1000)),
            )


def _zinfo_seeds() -> Iterator[bytes]:
    for spacing in (1000, 4000, 1 << 20):
        points = _points(spacing)
        packed = b"".join(_POINT.pack(point.offset, point.out, point.bits) for point in points)
        if len(points) < 128:
            yield bytes([len(points)]) + CHECKPOINTS.pack(len(points), spacing) + packed
            # As old ztocs have it: without the first.
            yield (bytes([len(points)]) + CHECKPOINTS.pack(len(points), spacing) + packed[_POINT.size :])
    for span_size in (1000, 1 << 20):
        count = -(-len(_LAYER) // span_size)
        yield bytes([0x80 | count]) + tar_checkpoints(len(_LAYER), span_size)


# -------------------- inflating


_SPAN = struct.Struct("<BBHHH")


def span(data: bytes) -> bool:
    """Codec, bits, skip, size, and the window's length; the window; the rest: compressed bytes."""
    if len(data) < _SPAN.size:
        return False
    kind, bits, skip, size, window_size = _SPAN.unpack_from(data)
    codec = Codec(kind % len(Codec))
    start = min(_SPAN.size + window_size, len(data)) if codec is Codec.RESTART else _SPAN.size
    window, compressed = data[_SPAN.size : start], data[start:]
    one = Span(0, len(compressed), size, skip=skip, bits=bits % 8, window=window)
    try:
        found: bytes | None = inflate_span(codec, one, compressed)
    except Corrupt:
        found = None
    assert found is None or len(found) == size
    if codec is Codec.RAW:
        assert found == (
            compressed[skip : skip + size] if skip + size <= len(compressed) or not size else None
        )
    elif codec is not Codec.RESTART:
        plain, is_whole = _decoded(
            codecs.decoder(Compression.GZIP if codec is Codec.GZIP else Compression.ZSTD, max_output=_ENOUGH),
            [compressed],
        )
        wanted = plain[skip : skip + size]
        # Checksums, and what follows the wanted bytes, are not looked at: so only what both find must agree.
        assert found is None or found.startswith(wanted)
        assert not is_whole or found == (wanted if len(wanted) == size else None)
    return found is not None


def gzip(data: bytes) -> bool:
    """1 byte: in how large pieces it is fed; 1: of the spacing. The rest: a blob.

    Judged by zlib: isal also takes members with sets of codes that zlib refuses.
    """
    step, spacing, blob = 1 + 7 * (data[0] if data else 0), 4 * (data[1] if len(data) > 1 else 0), data[2:]
    pieces = [blob[at : at + step] for at in range(0, len(blob), step)]
    with patch("fsmount.archive.codecs._inflater", codecs._ZlibInflater):
        plain, is_whole = _decoded(codecs.decoder(Compression.GZIP, max_output=_ENOUGH), [blob])
    if len(plain) >= _ENOUGH // 2:
        return False
    restarts: list[list[Restart]] = []
    for fed in ([blob], pieces):
        decoder = RestartDecoder(spacing=spacing)
        found = _decoded(codecs.bounded(decoder, max_output=_ENOUGH), fed)
        if not is_whole:
            assert not found[1]
            continue
        assert found == (plain, True)
        assert _decoded(codecs.decoder(Compression.GZIP, max_output=_ENOUGH), fed) == (plain, True)
        restarts.append(decoder.restarts)
    if not is_whole:
        return False
    assert restarts[0] == restarts[1]
    cuts = [(start, min(997, len(plain) - start), None) for start in range(0, len(plain), 997)]
    for one, (start, size, _) in zip(chunk_spans(restarts[0], cuts, len(blob)), cuts, strict=True):
        part = blob[one.offset : one.offset + one.length]
        assert inflate_span(Codec.RESTART, one, part) == plain[start : start + size]
    return True


def _decoded(decoder: codecs.Decoder, pieces: Sequence[bytes]) -> tuple[bytes, bool]:
    """What comes out before anything is found wrong; and whether nothing is."""
    plain = bytearray()
    try:
        for piece in pieces:
            for found in decoder.feed(piece):
                plain += found
        decoder.finish()
    except Invalid:
        return bytes(plain), False
    return bytes(plain), True


def _compressed() -> list[bytes]:
    text = b"".join(b"%d little lines, %d again\n" % (at, at * at) for at in range(40))
    deflate = Deflate().fixed(b"fixed").stored(b"stored" * 9).fixed().stored().fixed(text[:50])
    return [
        by_zlib(text),
        by_zlib(text, flushes=[zlib.Z_SYNC_FLUSH, zlib.Z_BLOCK, zlib.Z_PARTIAL_FLUSH], step=100),
        by_zlib(text, level=0),
        by_zlib(text[:100], strategy=zlib.Z_FIXED, head=HEADERS[1]),
        by_zlib(b"no text", head=HEADERS[2])
        + bytes(3)
        + by_zlib(text[:300], strategy=zlib.Z_HUFFMAN_ONLY)
        + b"garbage",
        deflate.member(),
        by_zlib(bytes(3000)),
    ]


def _span_seeds() -> Iterator[bytes]:
    for blob in _compressed():
        yield _SPAN.pack(Codec.GZIP, 0, 10, 40, 0) + blob
        if blob.startswith(HEADERS[0]):
            yield _SPAN.pack(Codec.RESTART, 0, 0, 40, 0) + blob[len(HEADERS[0]) :]
    for point in _points(500)[:4]:
        window = point.window
        rest = _GZIP[point.offset - bool(point.bits) : point.offset + 200]
        yield _SPAN.pack(Codec.RESTART, point.bits, 5, 100, len(window)) + window + rest
    text = b"".join(b"%d lines\n" % at for at in range(100))
    for frames in (
        zstd.compress(text),
        zstd_fake.frame(text) + zstd_fake.skippable(b"x") + zstd_fake.frame(text),
    ):
        yield _SPAN.pack(Codec.ZSTD, 0, 7, 200, 0) + frames
    yield _SPAN.pack(Codec.RAW, 0, 3, 5, 0) + b"raw bytes"


def _gzip_seeds() -> Iterator[bytes]:
    for number, blob in enumerate(_compressed()):
        yield bytes([number * 30, number * 9]) + blob


#: By the names that scripts/fuzz knows.
TARGETS: dict[str, Callable[[bytes], bool]] = {
    "ztoc": ztoc,
    "zinfo": zinfo,
    "toc": toc_json,
    "estargz": estargz_layer,
    "zstdchunked": zstd_chunked,
    "tar": tar,
    "span": span,
    "gzip": gzip,
}
_SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "ztoc": _ztoc_seeds,
    "zinfo": _zinfo_seeds,
    "toc": _toc_seeds,
    "estargz": _estargz_seeds,
    "zstdchunked": _zstd_seeds,
    "tar": lambda: (bytes([number * 31]) + made for number, made in enumerate(_tar_seeds())),
    "span": _span_seeds,
    "gzip": _gzip_seeds,
}


def seeds(target: str) -> list[bytes]:
    """Good inputs of a target, from which others are made."""
    return list(_SEEDS[target]())
