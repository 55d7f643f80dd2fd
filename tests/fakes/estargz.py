"""Makes eStargz blobs as stargz-snapshotter does (docs/estargz.md), the tables they have, and reads files by a table.

estargz([Member(b"bin/", type=DIRECTORY), Member(b"bin/sh", b"content", xattrs={"user.a": b"1"})], min_chunk=50_000)
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeAlias

from fsmount.archive.inflate import check_span, inflate_span
from fsmount.archive.span import Table
from tests.fakes import tar

#: A table of contents, or an entry of one: whatever a test wants to have there.
Json: TypeAlias = dict[str, Any]

TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
_TYPES = {
    tar.FILE: "reg",
    tar.DIRECTORY: "dir",
    tar.SYMLINK: "symlink",
    tar.HARDLINK: "hardlink",
    tar.CHAR: "char",
    tar.BLOCK_DEVICE: "block",
    tar.FIFO: "fifo",
}


@dataclass(frozen=True)
class Member(tar.Member):
    """A member of a tar, with the extended attributes that a PAX header before it has."""

    xattrs: Mapping[str, bytes] = field(default_factory=dict)

    def __bytes__(self) -> bytes:
        return self.headers() + tar.padded(self.data)

    def headers(self) -> bytes:
        """All that is before the data."""
        records = {"SCHILY.xattr." + name: value for name, value in self.xattrs.items()}
        return (bytes(tar.pax(records)) if records else b"") + self.header()


PREFETCH = Member(b".prefetch.landmark", b"\xf1")
NO_PREFETCH = Member(b".no.prefetch.landmark", b"\xf1")


@dataclass(frozen=True)
class Blob:
    """A layer: its bytes, its annotations, and its table of contents as it stands in them."""

    data: bytes
    annotations: Mapping[str, str]
    toc: bytes
    #: Where the table begins, compressed; and where it ends.
    toc_offset: int
    toc_stop: int


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def table(entries: Iterable[Json]) -> Json:
    return {"version": 1, "entries": list(entries)}


def encoded(toc: Json) -> bytes:
    """The JSON of a table. Names that are no UTF-8 stand there as they are."""
    return json.dumps(toc, ensure_ascii=False).encode("utf-8", "surrogateescape")


def described(member: Member) -> Json:
    """What a table says of a member but for its contents. Go leaves out what is 0 or empty."""
    assert isinstance(member.mtime, int)
    fields: Json = {
        "mode": member.mode,
        "uid": member.uid,
        "gid": member.gid,
        "linkName": text(member.link),
        "devMajor": member.major,
        "devMinor": member.minor,
        "xattrs": {name: base64.b64encode(value).decode() for name, value in member.xattrs.items()},
    }
    if member.mtime:
        fields["modtime"] = datetime.fromtimestamp(member.mtime, UTC).isoformat().replace("+00:00", "Z")
    kept = {key: value for key, value in fields.items() if value}
    return {"name": text(member.name), "type": _TYPES[member.type], **kept}


def text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


class Layout:
    """Tar bytes that are compressed member by member; a member is a gzip member or a zstd frame."""

    def __init__(self, compress: Callable[[bytes], bytes]) -> None:
        self.blob = b""
        self._compress = compress
        self._open = bytearray()

    def write(self, data: bytes) -> None:
        self._open += data

    def cut(self) -> int:
        """Ends the open member; the offset of the next."""
        if self._open:
            self.blob += self._compress(bytes(self._open))
            self._open.clear()
        return len(self.blob)

    def place(self, min_chunk: int) -> Json:
        """Where what is written next will be: in a member of its own if the open one has `min_chunk` bytes."""
        if len(self._open) >= min_chunk:
            return {"offset": self.cut()}
        return {"offset": len(self.blob), "innerOffset": len(self._open)}


def lay_out(
    layout: Layout, members: Iterable[Member], *, chunk_size: int = 4 << 20, min_chunk: int = 0
) -> Iterator[Json]:
    """Writes the members, in the order and with the cuts of stargz-snapshotter's Writer; their entries."""
    for member in members:
        layout.write(member.headers())
        if member.type != tar.FILE:
            yield described(member)
            continue
        fields = described(member) | {"digest": digest(member.data)}
        if member.data:
            fields["size"] = len(member.data)
        else:
            yield fields
        for at in range(0, len(member.data), chunk_size):
            chunk = member.data[at : at + chunk_size]
            # The snapshotter prefetches up to a landmark: so it begins a member.
            place = layout.place(0 if member in (PREFETCH, NO_PREFETCH) else min_chunk)
            layout.write(chunk)
            more = {"chunkSize": chunk_size if len(chunk) == chunk_size else 0, "chunkOffset": at}
            entry = fields if not at else {"name": text(member.name), "type": "chunk"}
            filled = {key: value for key, value in (place | more).items() if value}
            yield entry | filled | {"chunkDigest": digest(chunk)}
        layout.write(bytes(-len(member.data) % tar.BLOCK))


def estargz(
    members: Iterable[Member],
    *,
    chunk_size: int = 4 << 20,
    min_chunk: int = 0,
    footer: Callable[[int], bytes] | None = None,
    change: Callable[[Json], None] | None = None,
) -> Blob:
    """A blob. `min_chunk`: so many inflated bytes a gzip member has, before another begins; `change`: of its table."""
    layout = Layout(lambda data: gzip.compress(data, mtime=0))
    toc = table(lay_out(layout, members, chunk_size=chunk_size, min_chunk=min_chunk))
    if change is not None:
        change(toc)
    return with_table(layout, encoded(toc), footer=footer)


def with_table(layout: Layout, toc: bytes, *, footer: Callable[[int], bytes] | None = None) -> Blob:
    """What has been laid out, and a table of any contents behind it."""
    offset = layout.cut()
    layout.write(tar.archive(Member(b"stargz.index.json", toc)))
    stop = layout.cut()
    data = layout.blob + (footer or footer_51)(offset)
    return Blob(data, {TOC_DIGEST: digest(toc)}, toc, offset, stop)


# Footers: empty gzip members, whose header has an extra field.


def footer_51(offset: int) -> bytes:
    return _empty(b"SG" + (22).to_bytes(2, "little") + b"%016xSTARGZ" % offset)


def footer_47(offset: int) -> bytes:
    """That of stargz, before it had an e."""
    return _empty(b"%016xSTARGZ" % offset)


def footer_46(offset: int) -> bytes:
    """That of a layer whose table is in another image."""
    return _empty(b"SG" + (17).to_bytes(2, "little") + b"STARGZEXTERNALTOC")


def _empty(extra: bytes) -> bytes:
    header = bytes.fromhex("1f8b0804 00000000 00ff") + len(extra).to_bytes(2, "little") + extra
    return header + bytes.fromhex("01 0000 ffff") + bytes(8)


# Reading


def contents(table: Table, blob: bytes) -> list[tuple[bytes, bytes]]:
    """Every member's path and content, by its extents and the spans; each span is compared with its digest."""
    pieces = []
    for span in table.spans:
        data = blob[span.offset : span.offset + span.length]
        pieces.append(inflate_span(table.codec, span, data))
        check_span(span, data, pieces[-1])
    joined = b"".join(pieces)
    found = []
    for entry in table.entries:
        content = bytearray(entry.size)
        for at, offset, size in entry.extents:
            content[at : at + size] = joined[offset : offset + size]
        assert len(content) == entry.size
        found.append((entry.path, bytes(content)))
    return found
