"""eStargz: gzip layers whose last members are a table of contents and a footer that says where it is.

Everything here is about bytes that the caller has fetched: the end of the blob, then the table. The format is
described in stargz-snapshotter, docs/estargz.md; what is refused here is not read lazily, but may be a good layer.
"""

import hashlib
import re
from collections.abc import Mapping

from fsmount.archive.codecs import Compression
from fsmount.archive.entry import EntryType, Extent
from fsmount.archive.header import Malformed
from fsmount.archive.scan import TarScanner
from fsmount.archive.span import Codec
from fsmount.archive.toc import MAX_TOC, TOC_NAME, Toc, inflate_toc, parse_sha256, parse_toc
from fsmount.errors import Corrupt, Invalid, Unsupported

#: Annotation of a layer: the digest of its table of contents, as JSON. It is what makes the table trustworthy.
TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"

#: How many bytes of the blob's end hold any footer.
TAIL_SIZE = 51

# An empty gzip member: header, extra field, an empty stored block, checksum and size.
_HEADER = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff"
_EMPTY = b"\x01\0\0\xff\xff" + bytes(8)
_OFFSET = rb"([0-9a-f]{16})STARGZ"
_FOOTER = re.compile(re.escape(_HEADER + b"\x1a\0SG\x16\0") + _OFFSET + re.escape(_EMPTY))
#: That of stargz before it had an e.
_LEGACY = re.compile(re.escape(_HEADER + b"\x16\0") + _OFFSET + re.escape(_EMPTY))
_EXTERNAL = _HEADER + b"\x15\0SG\x11\0STARGZEXTERNALTOC" + _EMPTY

#: The table's tar has one header, maybe extensions, padding and an end besides it.
_TAR_SIZE = 1 << 20


def toc_digest(annotations: Mapping[str, str]) -> bytes | None:
    """The sha256 that a layer's annotations give of its table; None if it is no eStargz layer. Raises: Invalid."""
    text = annotations.get(TOC_DIGEST)
    if text is None:
        return None
    try:
        return parse_sha256(text)
    except Malformed as problem:
        raise Invalid(f"the layer's annotation {TOC_DIGEST}: {problem}") from None


def toc_range(tail: bytes, blob_size: int) -> tuple[int, int]:
    """Where the compressed table is in the blob: start and stop, inside it.

    tail: the last bytes of the blob: TAIL_SIZE or more of them, or all.
    Raises: Invalid (no footer, or one that points elsewhere); Unsupported (the table is not in the blob, or is larger
    than any that is read).
    """
    if tail.endswith(_EXTERNAL):
        raise Unsupported(
            "the eStargz layer has its table of contents in another image (external TOC), which is not read"
        )
    for form, length in ((_FOOTER, 51), (_LEGACY, 47)):
        match = form.fullmatch(tail[-length:])
        if match is not None:
            start, stop = int(match[1], 16), blob_size - length
            break
    else:
        raise Invalid(f"the eStargz layer ends with {tail[-TAIL_SIZE:]!r}: expected a footer")
    if not start < stop:
        raise Invalid(
            f"the eStargz layer's footer: expected a table of contents before {stop}, not at {start}"
        )
    if stop - start > MAX_TOC:
        raise Unsupported(
            f"the eStargz layer has a table of contents of {stop - start} bytes: at most {MAX_TOC} are read"
        )
    return start, stop


def read_toc(data: bytes, *, toc_offset: int, digest: bytes, max_size: int) -> Toc:
    """The table that is compressed in `data`: the blob's bytes of `toc_range`, which begins at `toc_offset`.

    digest: what `toc_digest` returned.
    max_size: how many bytes all files together may have.
    CPU: as parse_toc. Memory: the table inflated, and what is made of it.
    Raises: Corrupt (not what the digest names); Invalid; Unsupported.
    """
    text = _unpacked(inflate_toc(Compression.GZIP, data, limit=MAX_TOC + _TAR_SIZE))
    found = hashlib.sha256(text)
    if found.digest() != digest:
        raise Corrupt(
            "the eStargz layer's table of contents is not what its annotation names: "
            f"expected sha256 {digest.hex()}, not {found.hexdigest()}"
        )
    return parse_toc(text, Codec.GZIP, limit=toc_offset, max_size=max_size)


def _unpacked(tar: bytes) -> bytes:
    """The one file of the table's tar."""
    scanner = TarScanner()
    entries = scanner.feed(tar)
    scanner.finish()
    if len(entries) != 1 or (entries[0].path, entries[0].type) != (TOC_NAME, EntryType.FILE):
        raise Invalid(f"the eStargz layer's table of contents: expected a tar of {TOC_NAME.decode()} alone")
    (entry,) = entries
    at = entry.extents[0].offset if entry.extents else 0
    if entry.extents != (Extent(0, at, entry.size),) or entry.size > MAX_TOC:
        raise Invalid(f"the eStargz layer's table of contents: expected a file of 1 to {MAX_TOC} bytes")
    return tar[at : at + entry.size]
