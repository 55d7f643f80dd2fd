"""Sparse members: the four forms in which GNU tar writes which regions of a file are stored (its manual, "Sparse")."""

from dataclasses import dataclass, field

from fsmount.archive.entry import Extent
from fsmount.archive.header import BLOCK, GNU, Header, Malformed, number, size_number
from fsmount.archive.pax import decimal

#: What a map may make us hold: bytes of it in the archive, and regions. Go bounds its own at 1 MiB.
MAX_MAP = 4 << 20
MAX_REGIONS = 1_000_000

_PAX_VERSIONS = {(b"", b""): "0", (b"0", b"0"): "0", (b"0", b"1"): "0", (b"1", b"0"): "1.0"}


@dataclass(slots=True)
class SparseMap:
    """The regions of a file of `size` bytes, which are stored one after another in `stored` bytes.

    When not `complete`, the map goes on with the next block of the archive.
    """

    size: int
    stored: int
    complete: bool = True
    regions: list[tuple[int, int]] = field(default_factory=list)
    _blocks: int = 0

    def add_block(self, block: bytes) -> None:
        """Takes the next block of the map. Raises: Malformed."""
        self._blocks += 1
        if self._blocks > MAX_MAP // BLOCK:
            raise Malformed(f"expected a sparse map of at most {MAX_MAP} bytes")
        self._read(block)

    def _read(self, block: bytes) -> None:
        raise AssertionError("a complete map has no more blocks")

    def _add_numbers(self, numbers: list[bytes], count: int) -> None:
        """Adds `count` regions of a PAX map: offset, size, offset, size …"""
        if len(numbers) != 2 * count:
            raise Malformed(f"expected a sparse map of {count} regions, not {len(numbers)} numbers")
        values = [decimal("the sparse map", number) for number in numbers]
        self.regions.extend(zip(values[::2], values[1::2], strict=True))

    def extents(self, data: int) -> tuple[Extent, ...]:
        """Where the regions lie if the data begins at `data`; but for empty ones, with which GNU tar ends maps.

        Raises: Malformed if they overlap, leave the file, or are not what is stored.
        """
        extents = []
        stop = used = 0
        for offset, size in self.regions:
            if size < 0 or offset < stop or offset + size > self.size:
                raise Malformed(
                    f"expected sparse regions in order within {self.size} bytes, not {offset}+{size}"
                )
            if size:
                extents.append(Extent(offset, data + used, size))
            stop = offset + size
            used += size
        if used != self.stored:
            raise Malformed(f"expected {used} bytes of data for the sparse map, not {self.stored}")
        return tuple(extents)


@dataclass(slots=True)
class _OldMap(SparseMap):
    """Type S: begins in the header, goes on in blocks that stand before the data and are no part of its size."""

    def _read(self, block: bytes) -> None:
        self.add_fields(block[:504], more=block[504])

    def add_fields(self, fields: bytes, *, more: int) -> None:
        """12 bytes of offset, 12 of size; an empty offset ends the block. `more`: whether another one follows."""
        for start in range(0, len(fields), 24):
            if not fields[start]:
                break
            middle = start + 12
            self.regions.append((number(fields[start:middle]), number(fields[middle : middle + 12])))
        self.complete = not more


@dataclass(slots=True)
class _TextMap(SparseMap):
    """PAX 1.0: begins the stored data; lines of a count, then of offset, size …; NULs fill its last block."""

    _text: bytearray = field(default_factory=bytearray)
    _lines: int = 0
    _count: int | None = None

    def _read(self, block: bytes) -> None:
        self.stored -= BLOCK
        if self.stored < 0:
            raise Malformed("expected the sparse map to end inside the member's data")
        self._text += block
        self._lines += block.count(b"\n")
        if self._count is None:
            self._count = decimal("the sparse map's count", block.partition(b"\n")[0], MAX_REGIONS)
        lines = 1 + 2 * self._count
        if self._lines >= lines:
            self._add_numbers(bytes(self._text).split(b"\n", lines)[1:lines], self._count)
            self.complete = True


def sparse_map(header: Header, block: bytes, records: dict[bytes, bytes], stored: int) -> SparseMap | None:
    """What the header, its `block` and the PAX records say of the map; None for a member that is not sparse.

    Sparse records of another version, or without a map, are refused: Go reads such a member as if it were not
    sparse, which gives wrong bytes.
    Raises: Malformed.
    """
    in_records = bool(records) and any(key.startswith(b"GNU.sparse.") for key in records)
    if header.type == b"S":
        if in_records or header.magic != GNU:
            # star has a type S of another layout; and two maps are one too many.
            raise Malformed("expected one sparse map, and GNU magic on a member of type S")
        old = _OldMap(size_number(block[483:495]), stored)
        old.add_fields(block[386:482], more=block[482])
        return old
    return _pax_map(records, stored) if in_records else None


def _pax_map(records: dict[bytes, bytes], stored: int) -> SparseMap:
    version = records.get(b"GNU.sparse.major", b""), records.get(b"GNU.sparse.minor", b"")
    form = _PAX_VERSIONS.get(version)
    if form is None:
        raise Malformed(f"expected GNU sparse version 0.0, 0.1 or 1.0, not {b'.'.join(version)!r}")
    text = records.get(b"GNU.sparse.size") or records.get(b"GNU.sparse.realsize")
    size = decimal("the sparse member's size", text) if text else stored
    if form == "1.0":
        return _TextMap(size, stored, complete=False)
    count = decimal("GNU.sparse.numblocks", records.get(b"GNU.sparse.numblocks", b""), MAX_REGIONS)
    numbers = records.get(b"GNU.sparse.map")
    sparse = SparseMap(size, stored)
    sparse._add_numbers(numbers.split(b",") if numbers else [], count)
    return sparse
