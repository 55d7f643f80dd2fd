"""PAX extension headers: the form of their records, and the values that numbers, times and attributes have there."""

import base64
import binascii
import re
import urllib.parse

from fsmount.archive.header import MAX_INT64, Malformed, nearest_nanoseconds

_RECORD = re.compile(rb"([0-9]{1,8}) ([^=\0]+)=")
_TIME = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")
_NAMES = (b"path", b"linkpath", b"GNU.sparse.name")
_SPARSE_PAIR = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
_SCHILY_XATTR = b"SCHILY.xattr."
_LIBARCHIVE_XATTR = b"LIBARCHIVE.xattr."


def read_records(payload: bytes) -> dict[bytes, bytes]:
    """The records `<length> <key>=<value>\\n` of an `x` or `g` header; of a repeated key the last.

    Except the repeated pairs of sparse 0.0, which become the GNU.sparse.map of 0.1, as in Go.
    Raises: Malformed.
    """
    records: dict[bytes, bytes] = {}
    sparse: list[bytes] = []
    position = 0
    while position < len(payload):
        match = _RECORD.match(payload, position)
        stop = position + int(match[1]) if match else 0
        if match is None or not match.end() < stop <= len(payload) or payload[stop - 1] != 0x0A:
            raise Malformed(f"expected a PAX record, not {payload[position : position + 40]!r}")
        key, value = match[2], payload[match.end() : stop - 1]
        if key in _SPARSE_PAIR:
            if key != _SPARSE_PAIR[len(sparse) % 2] or b"," in value:
                raise Malformed("expected pairs of GNU.sparse.offset and GNU.sparse.numbytes")
            sparse.append(value)
        else:
            records[key] = without_nul(f"the PAX record {key!r}", value) if key in _NAMES else value
        position = stop
    if sparse:
        records[b"GNU.sparse.map"] = b",".join(sparse)
    return records


def without_nul(what: str, text: bytes) -> bytes:
    """`text`. Raises: Malformed if there is a NUL in it."""
    if b"\0" in text:
        raise Malformed(f"expected no NUL inside {what}")
    return text


def decimal(what: str, value: bytes, largest: int = MAX_INT64) -> int:
    """A number as PAX writes it: digits alone, no sign. Raises: Malformed."""
    if not value.isdigit() or len(value) > 20 or int(value) > largest:
        raise Malformed(f"expected {what} to be a number up to {largest}, not {value[:40]!r}")
    return int(value)


def nanoseconds(value: bytes) -> int:
    """Seconds with any number of decimals; digits past the ninth are cut off, as in Go. Raises: Malformed."""
    match = _TIME.fullmatch(value)
    if match is None or int(match[2]) > MAX_INT64:
        raise Malformed(f"expected mtime to be decimal seconds of 64 bits, not {value[:40]!r}")
    sign, seconds, fraction = match.groups(default=b"")
    total = int(seconds) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    return nearest_nanoseconds(-total if sign else total)


def xattrs(records: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Extended attributes: star's raw records, and libarchive's encoded ones where star's name no such.

    Raises: Malformed.
    """
    raw: dict[bytes, bytes] = {}
    encoded: dict[bytes, bytes] = {}
    for key, value in records.items():
        if key.startswith(_SCHILY_XATTR):
            raw[key[len(_SCHILY_XATTR) :]] = value
        elif key.startswith(_LIBARCHIVE_XATTR):
            name = urllib.parse.unquote_to_bytes(key[len(_LIBARCHIVE_XATTR) :])
            encoded[without_nul("an extended attribute's name", name)] = _base64(value)
    if encoded:
        raw = encoded | raw
    if b"" in raw:
        raise Malformed("expected an extended attribute to have a name")
    return raw


def _base64(value: bytes) -> bytes:
    value = value.rstrip(b"=")  # libarchive writes no padding
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error:
        raise Malformed(f"expected an extended attribute in base64, not {value[:40]!r}") from None
