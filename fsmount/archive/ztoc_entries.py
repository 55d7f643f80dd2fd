"""TocScanner: finds in a tar what a ztoc says of its members, which is what Go's archive/tar says of them.

SOCI's reader parses the header of a file again before it first reads it, and fails if that is not what the ztoc said.
So this keeps what Entry has no place for: names as they are stored, all PAX records, the names of owners.
"""

from collections.abc import Iterable
from typing import NamedTuple

from fsmount.archive import pax
from fsmount.archive.entry import EntryType
from fsmount.archive.header import BLOCK, GNU, MAX_INT64, USTAR, Header, Malformed, number, size_number
from fsmount.archive.scan import TarScanner
from fsmount.errors import Unsupported

_SPARSE = b"GNU.sparse."
_XATTR = b"SCHILY.xattr."
_OPAQUE = b".wh..wh..opq"


class TocEntry(NamedTuple):
    """One member, in the terms of a ztoc. `offset` is that after all of its headers, whether or not it has data."""

    name: bytes
    type: EntryType
    offset: int
    size: int
    link: bytes
    mode: int
    uid: int
    gid: int
    uname: bytes
    gname: bytes
    mtime_ns: int
    device: tuple[int, int]
    records: dict[bytes, bytes]


def may_disable_xattrs(entries: Iterable[TocEntry]) -> bool:
    """Whether a snapshotter need not look for extended attributes in the layer: it has none, and no opaque marker."""
    return not any(
        entry.name.endswith(_OPAQUE) or any(key.startswith(_XATTR) for key in entry.records)
        for entry in entries
    )


class TocScanner(TarScanner):
    """A TarScanner that keeps `found`, what it reads of each member, and takes only what SOCI can carry.

    `feed` raises Unsupported too. It goes through the steps for plain files as well: 32,000 take 0.8 s, not 0.3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[TocEntry] = []

    @property
    def stop(self) -> int:
        """Where the archive ends: after the two zero blocks, or where there are no more bytes."""
        return self._at if self._ended else self._offset

    def _plain_files(self, data: bytes | memoryview, base: int) -> None:
        pass  # all go through `_member`

    def _begin_extension(self, header: Header) -> None:
        if header.type == b"g":
            raise _unsupported("a global PAX header", self._at)
        super()._begin_extension(header)

    def _member(self, header: Header, block: bytes) -> None:
        extensions, at = self._extensions, self._at
        records, long_link = (extensions.records, extensions.long_link) if extensions else ({}, b"")
        super()._member(header, block)
        if header.type == b"S" or any(key.startswith(_SPARSE) for key in records):
            raise _unsupported("a sparse file", at)
        if header.type == b"7":
            raise _unsupported("a file of type 7", at)
        entry, name = self._found[-1], self._path
        assert name is not None
        if entry.type is EntryType.HARDLINK and _size(header, records):
            # Its reader looks for the next header after so many bytes, and there are none.
            raise _unsupported("a hardlink that has a size", at)
        if abs(entry.mtime_ns) == MAX_INT64:
            raise _unsupported("a time that 64 bits of nanoseconds do not hold", at)
        try:
            uname, gname, device = _owners_and_device(header, block, records)
        except Malformed as problem:
            raise _unsupported(f"a header that Go does not read ({problem})", at) from None
        if entry.type in (EntryType.CHAR, EntryType.BLOCK) and device != entry.device:
            raise _unsupported("a device of which Go does not read the numbers", at)
        self.found.append(
            TocEntry(
                name=name,
                type=entry.type,
                offset=at + BLOCK,
                size=entry.size,
                link=long_link or records.get(b"linkpath") or header.link.partition(b"\0")[0],
                mode=number(header.mode),
                uid=entry.uid,
                gid=entry.gid,
                uname=uname,
                gname=gname,
                mtime_ns=entry.mtime_ns,
                device=device,
                records=records,
            )
        )


def _unsupported(what: str, at: int) -> Unsupported:
    return Unsupported(f"a layer with {what} cannot have a SOCI index: tar archive, offset {at}")


def _size(header: Header, records: dict[bytes, bytes]) -> int:
    """The size that stands there, whether or not so much data follows."""
    size = records.get(b"size")
    return pax.decimal("size", size) if size else size_number(header.size)


def _owners_and_device(
    header: Header, block: bytes, records: dict[bytes, bytes]
) -> tuple[bytes, bytes, tuple[int, int]]:
    """User's and group's name, and device numbers, which Go reads of members of any type.

    Raises: Malformed, for these and for what else only Go reads.
    """
    for key in (b"atime", b"ctime"):
        if time := records.get(key):
            pax.nanoseconds(time)
    uname, gname = records.get(b"uname", b""), records.get(b"gname", b"")
    for name in (uname, gname):
        pax.without_nul("the name of a user or group", name)
    if header.magic != GNU and not header.magic.startswith(USTAR):
        return uname, gname, (0, 0)  # v7 has no such fields
    if header.magic == GNU:
        # Go 1.7 wrote names into these fields; Go reads it so still, and nobody else.
        for field in (block[345:357], block[357:369]):
            if field[0]:
                number(field)
    return (
        uname or block[265:297].partition(b"\0")[0],
        gname or block[297:329].partition(b"\0")[0],
        (number(header.major), number(header.minor)),
    )
