"""The table of contents that eStargz and zstd:chunked share: JSON that lists a layer's members and their chunks.

eStargz calls it TOC (stargz-snapshotter, docs/estargz.md); zstd:chunked adds `endOffset` and `chunkType` to it
(containers/storage, docs/containers-storage-zstd-chunked.md). Whoever made the image wrote it: nothing in it is
believed that could lead a read out of the blob, or make one cost more than the chunk it is for.
"""

import base64
import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from fsmount.archive import codecs
from fsmount.archive.codecs import Compression
from fsmount.archive.entry import Entry, EntryType, Extent
from fsmount.archive.header import MAX_INT64, Malformed, nearest_nanoseconds, valid_id
from fsmount.archive.paths import MAX_PATH, clean_path
from fsmount.archive.pax import without_nul
from fsmount.archive.span import Codec, Span, Table
from fsmount.errors import Invalid, Unsupported

#: How long a table may be, compressed and not, as in containers/storage.
MAX_TOC = 150 << 20
#: How many entries are read, chunks included: each is held as 0.7 KB while the layer is indexed.
MAX_ENTRIES = 1_000_000
#: What a read may have to inflate of other files first, where several share a gzip member or a frame.
MAX_SKIP = 64 << 20
#: How large a chunk may be: it is fetched, inflated and checked as a whole, in memory.
MAX_CHUNK = 256 << 20

#: In the layer's root; they are about the format, and no files of the image (estargz.md, "Prioritized Files").
TOC_NAME = b"stargz.index.json"
PREFETCH_LANDMARK = b".prefetch.landmark"
NO_PREFETCH_LANDMARK = b".no.prefetch.landmark"
#: What is in the root of such a layer's tar, and of no image's tree.
HIDDEN = (TOC_NAME, PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK)

_TYPES = {
    "reg": EntryType.FILE,
    "dir": EntryType.DIRECTORY,
    "symlink": EntryType.SYMLINK,
    "hardlink": EntryType.HARDLINK,
    "char": EntryType.CHAR,
    "block": EntryType.BLOCK,
    "fifo": EntryType.FIFO,
}
_MAX_DEVICE = 2**31 - 1
_SHA256 = re.compile("sha256:([0-9a-f]{64})")
_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T([01]\d|2[0-3]):([0-5]\d):([0-5]\d)(?:\.(\d{1,9}))?"
    r"(?:Z|([+-])([01]\d|2[0-3]):([0-5]\d))",
    re.ASCII,
)
#: Go's zero time, which older writers of zstd:chunked write for "unknown".
_NO_TIME = "0001-01-01T00:00:00Z"

#: A member of the JSON's list `entries`: whatever there is.
_Fields: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Toc:
    """What a table of contents says of a layer.

    The extents of `table` refer to the chunks of all files joined in the table's order: no headers, no padding.
    """

    table: Table
    #: So many bytes of the blob, from its beginning, are worth fetching in one request before the first read: they
    #: hold what the image's maker saw being read at its start. 0: nothing is known. Up to the size of the blob.
    prefetch: int


def parse_toc(data: bytes, codec: Codec, *, limit: int, max_size: int) -> Toc:
    """The table in `data` (JSON) of a blob whose chunks lie in its first `limit` bytes, in `codec`.

    max_size: how many bytes all files together may have.
    CPU: 2 s for 100,000 files. Memory: the text of the table, and 0.7 KB an entry.
    Raises: Invalid; Unsupported (another version, more entries or larger chunks than are read).
    """
    if data.count(b"{") + data.count(b"[") > 4 * MAX_ENTRIES:
        raise _too_many()  # before all these are objects, in twenty times the memory
    reader = _Reader(codec, limit, max_size)
    try:
        for first, chunks in _files(_items(data)):
            reader.add(first, chunks)
        return reader.finish()
    except Malformed as problem:
        raise Invalid(f"the layer's table of contents, {reader.where}: {problem}") from None


def parse_sha256(text: str) -> bytes:
    """The 32 bytes of a digest in the form `sha256:<hex>`. Raises: Malformed."""
    match = _SHA256.fullmatch(text)
    if match is None:
        raise Malformed(f"expected sha256: and 64 lower-case hexadecimal digits, not {text[:80]!a}")
    return bytes.fromhex(match[1])


def inflate_toc(compression: Compression, data: bytes, *, limit: int) -> bytes:
    """What the compressed table inflates to. Raises: Invalid, also as soon as it is more than `limit` bytes."""
    inflated = bytearray()
    decoder = codecs.decoder(compression, max_output=MAX_INT64)
    for piece in decoder.feed(data):
        inflated += piece
        if len(inflated) > limit:
            raise Invalid(
                f"the layer's table of contents inflates to more than {limit} bytes: refused as a bomb"
            )
    decoder.finish()
    return bytes(inflated)


def _too_many() -> Unsupported:
    return Unsupported(f"the layer's table of contents has more than {MAX_ENTRIES} entries, and is not read")


# The JSON. Entries are parsed one by one, so that never all of them are there as Python's dictionaries.


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


_SPACE = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder(parse_constant=_no_constant).raw_decode


class _Cursor:
    """A place in a JSON text. Every method moves past what it names, or raises: Malformed."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def take(self, mark: str) -> bool:
        """Whether `mark` comes next, after white space."""
        match = _SPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        if not self._text.startswith(mark, self._at):
            return False
        self._at += len(mark)
        return True

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            raise Malformed(f"expected JSON with {mark!r} at character {self._at}")

    def value(self) -> object:
        self.take("")
        try:
            value, self._at = _decode(self._text, self._at)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"expected JSON: {error}") from None
        result: object = value
        return result

    def end(self) -> None:
        self.take("")
        if self._at < len(self._text):
            raise Malformed(f"expected the end of the JSON at character {self._at}")


def _items(data: bytes) -> Iterator[_Fields]:
    """The objects in `entries`, each when it is asked for. Raises: Malformed, Unsupported, while iterating.

    Names need not be UTF-8: what is not comes through as lone surrogates, and is made bytes again by `_name`.
    """
    cursor = _Cursor(data.decode("utf-8", "surrogateescape"))
    seen: dict[str, object] = {}
    cursor.expect("{")
    more = not cursor.take("}")
    while more:
        key = cursor.value()
        if not isinstance(key, str):
            raise Malformed("expected the keys of a JSON object to be strings")
        cursor.expect(":")
        if key == "entries":
            if key in seen:
                raise Malformed("expected one list of entries, not two")
            seen[key] = None
            yield from _list(cursor)
        else:
            value = cursor.value()
            if key == "version":
                seen[key] = value
        more = cursor.take(",")
        if not more:
            cursor.expect("}")
    cursor.end()
    if seen.get("version", 1) != 1:
        raise Unsupported(
            f"the layer's table of contents has version {seen['version']!a:.40}: only 1 is read"
        )
    if "entries" not in seen or "version" not in seen:
        raise Malformed("expected a version and entries")


def _list(cursor: _Cursor) -> Iterator[_Fields]:
    if not cursor.take("["):
        if cursor.value() is not None:  # which is how Go writes an empty list
            raise Malformed("expected entries to be a list")
        return
    more = not cursor.take("]")
    while more:
        item = cursor.value()
        if not isinstance(item, dict):
            raise Malformed("expected entries to be a list of objects")
        yield item
        more = cursor.take(",")
        if not more:
            cursor.expect("]")


def _files(items: Iterator[_Fields]) -> Iterator[tuple[_Fields, list[_Fields]]]:
    """Every member with the chunks that follow it. Raises: Malformed, Unsupported, while iterating."""
    first: _Fields | None = None
    chunks: list[_Fields] = []
    for number, item in enumerate(items):
        if number == MAX_ENTRIES:
            raise _too_many()
        if item.get("type") == "chunk":
            if first is None:
                raise Malformed("expected a file before its chunks")
            chunks.append(item)
            continue
        if first is not None:
            yield first, chunks
        first, chunks = item, []
    if first is not None:
        yield first, chunks


# Its fields


def _integer(fields: _Fields, key: str, largest: int = MAX_INT64, smallest: int = 0) -> int:
    """A number; 0 if it is absent or null."""
    value = fields.get(key)
    if value is None:
        return 0
    if type(value) is not int or not smallest <= value <= largest:
        raise Malformed(
            f"expected {key} to be a whole number from {smallest} to {largest}, not {value!a:.80}"
        )
    return value


def _string(fields: _Fields, key: str) -> str:
    """A string; "" if it is absent or null."""
    value = fields.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"expected {key} to be a string, not {value!a:.80}")
    return value


def _name(what: str, text: str) -> bytes:
    try:
        return without_nul(what, text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        raise Malformed(f"expected {what} to be text, not {text[:80]!a}") from None


def _xattrs(fields: _Fields) -> dict[bytes, bytes]:
    value = fields.get("xattrs")
    if not value and (value is None or isinstance(value, dict)):
        return {}
    if not isinstance(value, dict):
        raise Malformed(f"expected xattrs to be an object, not {value!a:.80}")
    xattrs = {}
    for name, encoded in value.items():
        if not name:
            raise Malformed("expected an extended attribute to have a name")
        try:
            decoded = base64.b64decode(_string(value, name), validate=True)
        except ValueError:  # binascii.Error is one; so is that of characters that are not ASCII
            raise Malformed(f"expected an extended attribute in base64, not {encoded!a:.80}") from None
        xattrs[_name("an extended attribute's name", name)] = decoded
    return xattrs


@lru_cache(maxsize=16384)
def _nanoseconds(text: str) -> int:
    """A time in the form of RFC 3339, with up to nine decimals; 0 if it is unknown. They recur, hence the cache."""
    if not text or text == _NO_TIME:
        return 0
    match = _TIME.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        year, month, day, hour, minute, second = map(int, match.groups()[:6])
        days = date(year, month, day).toordinal() - date(1970, 1, 1).toordinal()
    except ValueError:
        raise Malformed(f"expected modtime to be a time as in RFC 3339, not {text[:80]!a}") from None
    fraction, sign, hours, minutes = match.groups()[6:]
    seconds = (days * 24 + hour) * 3600 + minute * 60 + second
    if sign is not None:
        east = int(hours) * 3600 + int(minutes) * 60
        seconds += east if sign == "-" else -east
    return nearest_nanoseconds(seconds * 1_000_000_000 + int((fraction or "").ljust(9, "0")))


# Its meaning


class _Chunk(NamedTuple):
    """`size` bytes that follow `skip` others of what the blob inflates to from `offset`.

    `stop` is where the last byte needed for that may be; 0 where that is the beginning of the next chunk.
    """

    offset: int
    stop: int
    skip: int
    size: int
    sha256: bytes


class _Reader:
    """Collects entries and chunks, and decides when all are known where the chunks end."""

    def __init__(self, codec: Codec, limit: int, max_size: int) -> None:
        self._codec = codec
        self._limit = limit
        self._max_size = max_size
        self._entries: list[Entry] = []
        self._chunks: list[_Chunk] = []
        self._starts = {limit}  # where members and frames begin; and where the last ends
        self._total = 0  # of the sizes of all files
        self._joined = 0  # of the sizes of all chunks that have bytes
        self._prefetch = 0
        self._name = ""
        self._number = 0

    @property
    def where(self) -> str:
        """The member read last, for messages."""
        return f"member {self._number}, {self._name[:200]!a}" if self._number else "at its beginning"

    def add(self, first: _Fields, chunks: list[_Fields]) -> None:
        """A member and its chunks. Raises: Malformed, Invalid, Unsupported."""
        self._number += 1
        self._name = name = _string(first, "name")
        type_ = _TYPES.get(_string(first, "type"))
        if type_ is None:
            raise Malformed(f"expected a type of member that is known, not {first.get('type')!a:.80}")
        path = clean_path(_name("the name", name))
        if not path and type_ is not EntryType.DIRECTORY:
            raise Malformed("expected a directory where the path is the root")
        if chunks and type_ is not EntryType.FILE:
            raise Malformed("expected only files to have chunks")
        size = _integer(first, "size") if type_ is EntryType.FILE else 0
        extents, found = self._contents(first, chunks, size)
        if path in HIDDEN:
            if path == PREFETCH_LANDMARK:
                self._prefetch = _integer(first, "offset", self._limit)
            return
        self._chunks += found
        self._joined += sum(chunk.size for chunk in found)
        entry = Entry(
            path=path,
            type=type_,
            mode=_integer(first, "mode", smallest=-MAX_INT64) & 0o7777,
            uid=valid_id(_integer(first, "uid", smallest=-MAX_INT64)),
            gid=valid_id(_integer(first, "gid", smallest=-MAX_INT64)),
            size=size,
            mtime_ns=_nanoseconds(_string(first, "modtime")),
            link=_link(first, type_),
            device=_device(first) if type_ in (EntryType.CHAR, EntryType.BLOCK) else (0, 0),
            xattrs=_xattrs(first),
            extents=extents,
        )
        self._entries.append(entry)

    def _contents(
        self, first: _Fields, more: list[_Fields], size: int
    ) -> tuple[tuple[Extent, ...], list[_Chunk]]:
        """Where the bytes of a file are. Its chunks must follow each other in it without gap, and fill it."""
        self._total += size
        if self._total > self._max_size:
            raise Invalid(
                f"the layer's table of contents has files of more than {self._max_size} bytes: refused as a bomb",
                remedy="If it is none, raise cache.max_layer_size in the configuration.",
            )
        if not size:
            if more:
                raise Malformed("expected no chunks of an empty file")
            self._starts.add(_integer(first, "offset", self._limit))
            return (), []
        end = _integer(first, "endOffset", self._limit) if self._codec is Codec.ZSTD else 0
        parts = [first, *more]
        offsets = [_integer(part, "offset", self._limit - 1) for part in parts]
        stops = [*offsets[1:], end] if end else [0] * len(parts)
        self._starts.update(offsets)
        found = []
        extents: list[Extent] = []
        at, joined = 0, self._joined
        for part, offset, stop in zip(parts, offsets, stops, strict=True):
            part_size = _integer(part, "chunkSize") or size - at
            if _integer(part, "chunkOffset") != at or not 0 < part_size <= size - at:
                raise Malformed(f"expected chunks that fill the file's {size} bytes, and one of them at {at}")
            if end and stop <= offset:
                raise Malformed(f"expected a chunk that begins at {offset} to end after that, not at {stop}")
            if not _is_zeros(part):
                found.append(_chunk(part, offset, stop, part_size, alone=not more))
                _append(extents, Extent(at, joined, part_size))
                joined += part_size
            at += part_size
        if at != size:
            raise Malformed(f"expected chunks that fill the file's {size} bytes, not {at} of them")
        return tuple(extents), found

    def finish(self) -> Toc:
        """The whole table. Raises: Malformed."""
        starts = sorted(self._starts)
        # A member or a frame ends where the next begins: also one that begins with a file that is hidden.
        chunks = [
            chunk if chunk.stop else chunk._replace(stop=starts[bisect_right(starts, chunk.offset)])
            for chunk in self._chunks
        ]
        _refuse_overlaps(chunks)
        spans = [
            Span(
                offset=chunk.offset,
                length=min(chunk.stop - chunk.offset, _needed(chunk.skip + chunk.size)),
                size=chunk.size,
                skip=chunk.skip,
                sha256=chunk.sha256,
            )
            for chunk in chunks
        ]
        return Toc(Table(self._codec, self._entries, spans), self._prefetch)


def _link(fields: _Fields, type_: EntryType) -> bytes:
    if type_ is not EntryType.SYMLINK and type_ is not EntryType.HARDLINK:
        return b""
    target = _name("the target of a link", _string(fields, "linkName"))
    if type_ is EntryType.HARDLINK:
        try:
            target = clean_path(target)
        except Malformed as problem:
            raise Malformed(f"hardlink target: {problem}") from None
    if not 0 < len(target) <= MAX_PATH:
        raise Malformed(f"expected a link target of 1 to {MAX_PATH} bytes, not {len(target)}")
    return target


def _device(fields: _Fields) -> tuple[int, int]:
    return _integer(fields, "devMajor", _MAX_DEVICE), _integer(fields, "devMinor", _MAX_DEVICE)


def _is_zeros(fields: _Fields) -> bool:
    """Whether the chunk is all zeros. They are in the blob too, but nobody needs to fetch them."""
    kind = _string(fields, "chunkType")
    if kind not in ("", "zeros"):
        raise Malformed(f"expected a type of chunk that is known, not {kind[:80]!a}")
    return kind == "zeros"


def _chunk(fields: _Fields, offset: int, stop: int, size: int, *, alone: bool) -> _Chunk:
    """alone: the file has no other chunk, so its digest is that of the file."""
    if size > MAX_CHUNK:
        raise Unsupported(f"the layer has a chunk of {size} bytes: more than {MAX_CHUNK} are not read as one")
    skip = _integer(fields, "innerOffset", MAX_SKIP)
    if not offset and not skip:
        # The first bytes of a blob are a header of tar: 0 stands for a field that was left out.
        raise Malformed("expected the offset of a chunk")
    digest = _string(fields, "chunkDigest") or (_string(fields, "digest") if alone else "")
    if not digest:
        raise Malformed("expected the digest of a chunk")
    return _Chunk(offset, stop, skip, size, parse_sha256(digest))


def _append(extents: list[Extent], extent: Extent) -> None:
    """Adds `extent`, to the last one if nothing is between them."""
    if extents:
        last = extents[-1]
        if last.file_offset + last.size == extent.file_offset and last.offset + last.size == extent.offset:
            extents[-1] = last._replace(size=last.size + extent.size)
            return
    extents.append(extent)


def _needed(size: int) -> int:
    """How many compressed bytes are enough for `size` inflated ones, of any compressor: most make fewer of them.

    A chunk's member goes on behind it: with headers, with other files. They are not fetched for it, so that reading a
    small file costs little also where a lie makes its member end far away.
    """
    return size + size // 8 + 64 * 1024


def _refuse_overlaps(chunks: list[_Chunk]) -> None:
    """Raises: Malformed if two chunks share bytes of the blob, other than different ones of the same member.

    Chunks may lie in any order: containers/storage says not to rely on one. No writer lets files share a chunk.
    """
    previous = _Chunk(0, 0, 0, 0, b"")
    for chunk in sorted(chunks):
        if chunk.offset == previous.offset and chunk.stop == previous.stop:
            wrong = chunk.skip < previous.skip + previous.size
        else:
            wrong = chunk.offset < previous.stop
        if wrong:
            raise Malformed(f"expected chunks that do not overlap, and two do at {chunk.offset}")
        previous = chunk
