"""Reads ztocs: the tables of contents that SOCI keeps of layers whose bytes it leaves as they are.

The format has no specification but its code: soci-snapshotter 0.15, folder `ztoc`. A ztoc lists the members of the
layer's tar, and where its blob can be inflated from: every few megabytes, a restart point with its window. What is
in it was not checked by anybody, so it is read as if the worst had written it.
"""

import re
import struct
from datetime import datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

from fsmount.archive import pax
from fsmount.archive.entry import Entry, EntryType, Extent
from fsmount.archive.flatbuffer import Flatbuffer, Form
from fsmount.archive.header import BLOCK, Malformed, nearest_nanoseconds, padded, valid_id
from fsmount.archive.paths import MAX_PATH, clean_path
from fsmount.archive.span import WINDOW_SIZE, Codec, Restart, Span, Table
from fsmount.errors import Invalid

VERSION = b"0.9"
#: SOCI's number of a compression; absent it is gzip.
GZIP, UNCOMPRESSED = 1, 2
TAR_ZINFO_VERSION = 2

TYPES = {
    b"reg": EntryType.FILE,
    b"dir": EntryType.DIRECTORY,
    b"symlink": EntryType.SYMLINK,
    b"hardlink": EntryType.HARDLINK,
    b"char": EntryType.CHAR,
    b"block": EntryType.BLOCK,
    b"fifo": EntryType.FIFO,
}

#: `i32 have, i64 span_size` and then the checkpoints: `i64 in, i64 out, u8 bits` and a window.
CHECKPOINTS = struct.Struct("<iq")
CHECKPOINT = struct.Struct(f"<qqB{WINDOW_SIZE}s")

#: What one span may inflate to. Builders aim at 4 MiB; a reader has to hold all of it.
MAX_SPAN = 64 << 20
#: Of one byte deflate makes no more: 258 bytes cost two bits at least (RFC 1951 §3.2.5).
_MAX_RATIO = 1032
#: No gzip header is shorter, and those are so long that name no file: old ztocs know no others.
_SHORT_HEADER = 10

_ZTOC = Form("RRqqRR")
_TOC = Form("R")
_FILE = Form("RRqqRqIIRRRqqR")
_RECORD = Form("RR")
_COMPRESSION = Form("biRR", byte=GZIP)
_TAR_ZINFO = Form("iqq")

_MAX_TEXT = 1 << 20  # of a PAX record: what an extension header may hold
_MAX_DEVICE = 2**31 - 1
_DIGEST = re.compile(rb"sha256:([0-9a-f]{64})")
_TIME = re.compile(
    rb"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})"
    rb"(?:\.([0-9]{1,9}))?(?:Z|([+-][0-9]{2}):([0-9]{2}))"
)
_EPOCH = datetime(1970, 1, 1)
_SECOND = timedelta(seconds=1)


def read_ztoc(data: bytes, *, blob_size: int, max_size: int) -> Table:
    """The table of a layer whose blob has blob_size bytes, and may inflate to max_size.

    The entries are those of the layer's tar, their extents in its bytes; spans have the sha256 of their
    compressed bytes. Takes no more memory than a small multiple of data.

    Raises: Invalid, for anything else than a ztoc that can be of such a layer.
    """
    try:
        return _read(Flatbuffer(data), blob_size, max_size)
    except Malformed as problem:
        raise Invalid(f"ztoc: {problem}") from None


def _read(ztoc: Flatbuffer, blob_size: int, max_size: int) -> Table:
    version, _, compressed, tar_size, toc, compression = ztoc.table(ztoc.root(), _ZTOC)
    text = ztoc.text(version, 64)
    if text != VERSION:
        raise Malformed(f"expected version {VERSION.decode()}, not {text!r}")
    if compressed != blob_size:
        raise Malformed(f"expected one of a blob of {blob_size} bytes, not of {compressed}")
    if not 0 <= tar_size <= max_size:
        raise Malformed(f"expected a tar of at most {max_size} bytes, not of {tar_size}")
    codec, spans = _spans(ztoc, compression, blob_size, tar_size)
    return Table(codec, _entries(ztoc, toc, tar_size), spans)


# Members


class _Member(NamedTuple):
    """An entry, and its place in the tar: `size` is what follows its header, padding excepted."""

    offset: int
    size: int
    entry: Entry


def _entries(ztoc: Flatbuffer, toc: int, tar_size: int) -> list[Entry]:
    (metadata,) = ztoc.table(toc, _TOC)
    members = []
    for number, at in enumerate(ztoc.references(metadata)):
        try:
            members.append(_member(ztoc, at))
        except Malformed as problem:
            raise Malformed(f"entry {number}: {problem}") from None
    members.sort(key=lambda member: member.offset)
    stop = 0
    for offset, size, entry in members:
        # Where a header begins is not written, but computed as here. A header needs a block at least.
        if offset < stop + BLOCK or offset % BLOCK or offset + size > tar_size:
            raise Malformed(
                f"entry {entry.path[:200]!r}: expected its {size} bytes from {stop + BLOCK} to {tar_size}, not {offset}"
            )
        stop = padded(offset + size)
    return [member.entry for member in members]


def _member(ztoc: Flatbuffer, at: int) -> _Member:
    # User and group names, 8 and 9, are of no use here.
    name, kind, offset, size, link, mode, uid, gid, _, _, mtime, major, minor, xattrs = ztoc.table(at, _FILE)
    if offset < 0 or size < 0:
        raise Malformed(f"expected an offset and a size, not {offset} and {size}")
    text = ztoc.text(kind, 16)
    type_ = TYPES.get(text)
    if type_ is None:
        raise Malformed(f"expected the type of a file, not {text!r}")
    path = clean_path(_name(ztoc, name))
    if not path and type_ is not EntryType.DIRECTORY:
        raise Malformed("expected a directory where the path is the root")
    stored = size if type_ is EntryType.FILE else 0
    entry = Entry(
        path=path,
        type=type_,
        mode=mode & 0o7777,
        uid=valid_id(uid),
        gid=valid_id(gid),
        size=stored,
        mtime_ns=_nanoseconds(ztoc.text(mtime, 64)),
        link=_link(ztoc, link, type_),
        device=_device(major, minor) if type_ in (EntryType.CHAR, EntryType.BLOCK) else (0, 0),
        xattrs=_xattrs(ztoc, xattrs),
        extents=(Extent(0, offset, stored),) if stored else (),
    )
    return _Member(offset, size, entry)


def _link(ztoc: Flatbuffer, at: int, type_: EntryType) -> bytes:
    if type_ is EntryType.SYMLINK:
        target = _name(ztoc, at)
    elif type_ is EntryType.HARDLINK:
        target = clean_path(_name(ztoc, at))
    else:
        return b""
    if not target:
        raise Malformed("expected a link to have a target")
    return target


def _device(major: int, minor: int) -> tuple[int, int]:
    if not (0 <= major <= _MAX_DEVICE and 0 <= minor <= _MAX_DEVICE):
        raise Malformed(f"expected device numbers from 0 to {_MAX_DEVICE}, not {major} and {minor}")
    return major, minor


def _xattrs(ztoc: Flatbuffer, at: int) -> dict[bytes, bytes]:
    """Extended attributes: among the PAX records, all of which are under this name."""
    records = {}
    for record in ztoc.references(at):
        key, value = ztoc.table(record, _RECORD)
        records[pax.without_nul("the key of a PAX record", ztoc.text(key, _MAX_TEXT))] = ztoc.text(
            value, _MAX_TEXT
        )
    if not records:
        return {}
    # SOCI's builder takes sparse files of PAX for whole ones, and its reader returns something else than they hold.
    if sparse := [key for key in records if key.startswith(b"GNU.sparse.")]:
        raise Malformed(f"expected no sparse file, and there is {sparse[0][:40]!r}")
    return pax.xattrs(records)


def _name(ztoc: Flatbuffer, at: int) -> bytes:
    return pax.without_nul("a name", ztoc.text(at, MAX_PATH))


@lru_cache(maxsize=4096)
def _nanoseconds(text: bytes) -> int:
    """A time of RFC 3339, as Go writes it; of a year past 9999 Go writes nothing."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise Malformed(f"expected a time of RFC 3339, not {text!r}")
    whole, fraction, hours, minutes = match.groups(default=b"")
    try:
        seconds = (datetime.fromisoformat(whole.decode()) - _EPOCH) // _SECOND
    except ValueError as error:
        raise Malformed(f"expected a time of RFC 3339, not {text!r}: {error}") from None
    if hours:
        seconds -= int(hours) * 3600 + int(hours[:1] + minutes) * 60
    return nearest_nanoseconds(seconds * 1_000_000_000 + int(fraction.ljust(9, b"0")))


# Spans


def _spans(ztoc: Flatbuffer, at: int, blob_size: int, tar_size: int) -> tuple[Codec, list[Span]]:
    algorithm, last, digests_at, checkpoints_at = ztoc.table(at, _COMPRESSION)
    digests = [_sha256(ztoc.text(text, 160)) for text in ztoc.references(digests_at)]
    if last != len(digests) - 1:
        raise Malformed(f"expected the digests of {last + 1} spans, not of {len(digests)}")
    checkpoints = ztoc.text(checkpoints_at)
    if algorithm == GZIP:
        return Codec.RESTART, _gzip_spans(_restarts(checkpoints, len(digests)), digests, blob_size, tar_size)
    if algorithm == UNCOMPRESSED:
        return Codec.RAW, _tar_spans(checkpoints, digests, blob_size, tar_size)
    raise Malformed(f"expected gzip or no compression, not algorithm {algorithm}")


def _sha256(text: bytes) -> bytes:
    match = _DIGEST.fullmatch(text)
    if match is None:
        raise Malformed(f"expected a digest of sha256, not {text!r}")
    return bytes.fromhex(match[1].decode())


def _restarts(checkpoints: bytes, count: int) -> list[Restart]:
    """The restart points of a gzip blob. Old ztocs leave the first away, which is after a header without a name."""
    points = len(checkpoints) - CHECKPOINTS.size
    if not count or points not in (CHECKPOINT.size * count, CHECKPOINT.size * (count - 1)):
        raise Malformed(f"expected {count} checkpoints, or one less, not {points} bytes of them")
    have, _ = CHECKPOINTS.unpack_from(checkpoints)
    if have != count:
        raise Malformed(f"expected {count} checkpoints, not {have}")
    restarts = [] if points == CHECKPOINT.size * count else [Restart(_SHORT_HEADER, 0, 0, b"")]
    for at in range(CHECKPOINTS.size, len(checkpoints), CHECKPOINT.size):
        offset, out, bits, window = CHECKPOINT.unpack_from(checkpoints, at)
        # Of what was not inflated by then there are zeros, in front.
        restarts.append(Restart(offset, out, bits, window[max(0, WINDOW_SIZE - out) :]))
    return restarts


def _gzip_spans(restarts: list[Restart], digests: list[bytes], blob_size: int, tar_size: int) -> list[Span]:
    """The spans of a gzip blob up to the end of the tar, which may have gigabytes of zeros after it."""
    if restarts[0].out:
        raise Malformed(f"expected the first checkpoint at 0, not at {restarts[0].out}")
    spans = []
    previous = _SHORT_HEADER - 1
    ends = [(restart.offset, restart.out) for restart in restarts[1:]]
    ends.append((blob_size, max(tar_size, restarts[-1].out + 1)))
    for restart, (stop, out_stop), digest in zip(restarts, ends, digests, strict=True):
        offset, out, bits, window = restart
        if not (previous < offset < stop and out < out_stop and bits < 8):
            raise Malformed(
                f"expected checkpoints in order within {blob_size} bytes, not {offset} for {out}, {bits}"
            )
        previous = offset
        start = offset - 1 if bits else offset
        size = min(out_stop, tar_size) - out
        if size > min(MAX_SPAN, _MAX_RATIO * (stop - start)):
            raise Malformed(f"expected {stop - start} bytes at {start} not to inflate to {size}")
        if size > 0:
            spans.append(Span(start, stop - start, size, blob_sha256=digest, bits=bits, window=window))
    return spans


def _tar_spans(checkpoints: bytes, digests: list[bytes], blob_size: int, tar_size: int) -> list[Span]:
    """The spans of a blob that is a tar, to its very end."""
    zinfo = Flatbuffer(checkpoints)
    version, span_size, size = zinfo.table(zinfo.root(), _TAR_ZINFO)
    if version != TAR_ZINFO_VERSION or size != blob_size or not 0 < span_size <= MAX_SPAN:
        raise Malformed(
            f"expected spans of {blob_size} bytes, version {TAR_ZINFO_VERSION}, not {span_size} of {size}, {version}"
        )
    starts = range(0, blob_size, span_size)
    if len(starts) != len(digests) or tar_size > blob_size:
        raise Malformed(
            f"expected a tar of {tar_size} bytes in {len(digests)} spans, not {len(starts)} of {blob_size}"
        )
    return [
        Span(start, min(span_size, blob_size - start), min(span_size, blob_size - start), blob_sha256=digest)
        for start, digest in zip(starts, digests, strict=True)
    ]
