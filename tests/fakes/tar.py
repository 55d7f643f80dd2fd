"""Makes tar archives byte by byte: every form of header, extension and sparse map, and whatever is wrong in one.

archive(pax({"path": "é"}), Member(b"e", b"content"), Member(b"d/", type=DIRECTORY, mode=0o755))
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

BLOCK = 512
#: The two zero blocks.
END = bytes(2 * BLOCK)

USTAR, GNU, V7 = b"ustar\x0000", b"ustar  \0", bytes(8)
FILE, HARDLINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"

#: Where the stored regions of a sparse file belong, and what they hold.
Regions = Sequence[tuple[int, bytes]]
#: A number, written in octal, or in base 256 if it must be; or the field's bytes as they are to stand.
Number = int | bytes


@dataclass(frozen=True)
class Member:
    """A header with the data that follows it. `size` is that of the data unless it is given.

    `checksum` is the right one unless it is given. `at` overwrites bytes of the header at offsets, before it is summed.
    """

    name: bytes
    data: bytes = b""
    type: bytes = FILE
    mode: Number = 0o644
    uid: Number = 0
    gid: Number = 0
    size: Number | None = None
    mtime: Number = 0
    link: bytes = b""
    magic: bytes = USTAR
    major: Number = 0
    minor: Number = 0
    prefix: bytes = b""
    checksum: bytes | None = None
    at: Mapping[int, bytes] = field(default_factory=dict)

    def header(self) -> bytes:
        block = bytearray(BLOCK)
        fields = {
            0: _text(self.name, 100),
            100: _number(self.mode, 8),
            108: _number(self.uid, 8),
            116: _number(self.gid, 8),
            124: _number(len(self.data) if self.size is None else self.size, 12),
            136: _number(self.mtime, 12),
            156: self.type,
            157: _text(self.link, 100),
            257: _text(self.magic, 8),
            329: _number(self.major, 8),
            337: _number(self.minor, 8),
            345: _text(self.prefix, 155),
        }
        for offset, value in [*fields.items(), *self.at.items()]:
            block[offset : offset + len(value)] = value
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block) if self.checksum is None else self.checksum.ljust(8, b"\0")
        return bytes(block)

    def __bytes__(self) -> bytes:
        return self.header() + padded(self.data)


def archive(*parts: Member | bytes, end: bytes = END) -> bytes:
    """A whole archive; `end` is what stands after the last member."""
    return b"".join(map(bytes, parts)) + end


def padded(data: bytes) -> bytes:
    """`data` with NULs up to a whole block."""
    return data + bytes(-len(data) % BLOCK)


def base256(value: int, width: int) -> bytes:
    """A numeric field as GNU tar writes what octal digits cannot say."""
    field = bytearray(value.to_bytes(width, "big", signed=True))
    field[0] |= 0x80
    return bytes(field)


def _number(value: Number, width: int) -> bytes:
    if isinstance(value, bytes):
        return _text(value, width)
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return base256(value, width)


def _text(value: bytes, width: int) -> bytes:
    if len(value) > width:
        raise ValueError(f"{value!r} does not fit in {width} bytes")
    return value


# Extension headers: they apply to the member after them.


def record(key: str | bytes, value: str | bytes) -> bytes:
    """One PAX record, whose length counts its own digits."""
    rest = b" %s=%s\n" % (_encoded(key), _encoded(value))
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return b"%d%s" % (length, rest)


def pax(
    records: Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]], *, type: bytes = b"x"
) -> Member:
    """A PAX header; pairs instead of a mapping where a key repeats; type b"g" for a global one."""
    pairs = records.items() if isinstance(records, Mapping) else records
    payload = b"".join(record(key, value) for key, value in pairs)
    return Member(b"PaxHeaders/member", payload, type=type)


def long_name(name: bytes) -> Member:
    """GNU's header for a name of more than 100 bytes."""
    return Member(b"././@LongLink", name + b"\0", type=b"L", magic=GNU)


def long_link(target: bytes) -> Member:
    """The same for the target of a link."""
    return Member(b"././@LongLink", target + b"\0", type=b"K", magic=GNU)


def _encoded(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


# Sparse files of `size` bytes, in the four forms that GNU tar writes.


def sparse_old(name: bytes, size: int, regions: Regions) -> bytes:
    """Type S: four regions in the header, then 21 in each block before the data."""
    entries = [_number(offset, 12) + _number(len(data), 12) for offset, data in regions]
    first, rest = entries[:4], entries[4:]
    data = b"".join(data for _, data in regions)
    at = {386: b"".join(first), 482: bytes([bool(rest)]), 483: _number(size, 12)}
    head = Member(name, type=b"S", magic=GNU, size=len(data), at=at).header()
    blocks = []
    while rest:
        block, rest = rest[:21], rest[21:]
        blocks.append(b"".join(block).ljust(504, b"\0") + bytes([bool(rest)]) + bytes(7))
    return head + b"".join(blocks) + padded(data)


def sparse_pax(name: bytes, size: int, regions: Regions, *, version: str) -> bytes:
    """PAX "0.0" (a pair of records per region), "0.1" (one record) or "1.0" (the map begins the data)."""
    data = b"".join(data for _, data in regions)
    sizes = [(str(offset), str(len(data))) for offset, data in regions]
    records: list[tuple[str, str | bytes]]
    if version == "1.0":
        lines = [str(len(regions)), *(number for pair in sizes for number in pair)]
        data = padded("".join(line + "\n" for line in lines).encode()) + data
        records = [
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.name", name),
            ("GNU.sparse.realsize", str(size)),
        ]
    else:
        records = [("GNU.sparse.size", str(size)), ("GNU.sparse.numblocks", str(len(regions)))]
        if version == "0.1":
            records.append(("GNU.sparse.name", name))
            records.append(("GNU.sparse.map", ",".join(number for pair in sizes for number in pair)))
        else:
            for offset, length in sizes:
                records += [("GNU.sparse.offset", offset), ("GNU.sparse.numbytes", length)]
    stand_in = name if version == "0.0" else b"GNUSparseFile.0/" + name
    return bytes(pax(records)) + bytes(Member(stand_in[:100], data))


def sparse(form: str, name: bytes, size: int, regions: Regions) -> bytes:
    """A sparse file in `form`: one of SPARSE_FORMS."""
    return sparse_old(name, size, regions) if form == "old" else sparse_pax(name, size, regions, version=form)


SPARSE_FORMS = ("old", "0.0", "0.1", "1.0")


def with_signed_checksum(member: Member) -> Member:
    """`member` as old tars of Sun and GNU summed it."""
    block = bytearray(member.header())
    block[148:156] = b" " * 8
    total = sum(byte - 256 if byte > 127 else byte for byte in block)
    return replace(member, checksum=b"%06o\0 " % total)
