"""Makes zstd:chunked blobs as containers/storage does, which buildah and podman use; and as stargz-snapshotter does.

zstd_chunked([Member(b"bin/sh", b"content")], chunk_size=4, prefix=LEGACY, footer=footer_40)
"""

import struct
from collections.abc import Callable, Iterable, Iterator

import zstandard

from tests.fakes import tar
from tests.fakes.estargz import (
    TOC_DIGEST,
    Blob,
    Json,
    Layout,
    Member,
    described,
    digest,
    encoded,
    lay_out,
    table,
    text,
)

CURRENT = "io.github.containers.zstd-chunked."
LEGACY = "io.containers.zstd-chunked."
#: What old writers write for "unknown".
NO_TIME = "0001-01-01T00:00:00Z"


def frame(data: bytes) -> bytes:
    """A zstd frame that does not say its size, as Go's streaming writers make them."""
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


def skippable(data: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


def footer_64(offset: int, length: int, size: int) -> bytes:
    """The table's place, then that of tar-split data, of which there is none."""
    return struct.pack("<7Q8s", offset, length, size, 1, 0, 0, 0, b"GNUlInUx")


def footer_40(offset: int, length: int, size: int) -> bytes:
    """What buildah wrote until 2023."""
    return struct.pack("<4Q8s", offset, length, size, 1, b"GNUlInUx")


def footer_stargz(offset: int, length: int, size: int) -> bytes:
    return struct.pack("<4Q8s", offset, length, size, 1, b"GnUlInUx")


def zstd_chunked(
    members: Iterable[Member],
    *,
    chunk_size: int = 64 << 10,
    prefix: str = CURRENT,
    footer: Callable[[int, int, int], bytes] = footer_64,
    change: Callable[[Json], None] | None = None,
) -> Blob:
    """A blob of containers/storage's form. Chunks of zeros are holes, in files of several. `change`: of its table."""
    layout = Layout(frame)
    toc = table(_lay_out(layout, members, chunk_size))
    return _with_table(layout, toc, change, prefix, footer)


def stargz_flavour(
    members: Iterable[Member],
    *,
    chunk_size: int = 4 << 20,
    min_chunk: int = 0,
    change: Callable[[Json], None] | None = None,
) -> Blob:
    """A blob of stargz-snapshotter's form: entries as in eStargz, without endOffset."""
    layout = Layout(frame)
    toc = table(lay_out(layout, members, chunk_size=chunk_size, min_chunk=min_chunk))
    blob = _with_table(layout, toc, change, LEGACY, footer_stargz)
    return Blob(
        blob.data,
        {**blob.annotations, TOC_DIGEST: digest(blob.toc)},
        blob.toc,
        blob.toc_offset,
        blob.toc_stop,
    )


def _lay_out(layout: Layout, members: Iterable[Member], chunk_size: int) -> Iterator[Json]:
    unknown: Json = {"accesstime": NO_TIME, "changetime": NO_TIME}
    for member in members:
        layout.write(member.headers())
        if member.type != tar.FILE or not member.data:
            yield described(member) | unknown
            continue
        size = len(member.data)
        entry: Json = described(member) | {"size": size, "digest": digest(member.data)} | unknown
        entries = []
        for at in range(0, size, chunk_size):
            chunk = member.data[at : at + chunk_size]
            entry["offset"] = layout.cut()
            layout.write(chunk)
            if size > chunk_size:
                more = {"chunkOffset": at, "chunkType": "" if chunk.strip(b"\0") else "zeros"}
                entry |= {"chunkSize": len(chunk), "chunkDigest": digest(chunk)}
                entry |= {key: value for key, value in more.items() if value}
            entries.append(entry)
            entry = {"name": text(member.name), "type": "chunk"}
        entries[0]["endOffset"] = layout.cut()
        yield from entries
        layout.write(bytes(-size % tar.BLOCK))


def _with_table(
    layout: Layout,
    toc: Json,
    change: Callable[[Json], None] | None,
    prefix: str,
    footer: Callable[[int, int, int], bytes],
) -> Blob:
    if change is not None:
        change(toc)
    return with_table(layout, encoded(toc), prefix=prefix, footer=footer)


def with_table(
    layout: Layout,
    toc: bytes,
    *,
    prefix: str = CURRENT,
    footer: Callable[[int, int, int], bytes] = footer_64,
    size: int | None = None,
    end: bytes = tar.END,
) -> Blob:
    """What has been laid out, and a table of any contents behind it; `size`: what is said of it, if not the truth."""
    layout.write(end)
    offset = layout.cut() + 8
    compressed = frame(toc)
    place = (offset, len(compressed), len(toc) if size is None else size)
    data = layout.blob + skippable(compressed) + skippable(footer(*place))
    annotations = {
        prefix + "manifest-checksum": digest(compressed),
        prefix + "manifest-position": ":".join(map(str, (*place, 1))),
    }
    return Blob(data, annotations, toc, offset, offset + len(compressed))
