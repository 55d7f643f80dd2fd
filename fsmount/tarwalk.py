"""tarwalk: the members of a plain tar layer, from its headers alone."""

from collections.abc import Awaitable, Callable

from fsmount.archive.codecs import Compression, sniff
from fsmount.archive.entry import Entry
from fsmount.archive.scan import TarScanner

#: Bytes of the first request after a gap, and of the largest: each that finds no gap is twice the one before.
_LEAST = 16 * 1024
_MOST = 4 * 1024 * 1024
#: Bytes that could come in the time that a request takes to be answered: 20 ms at 100 Mbit/s.
_REQUEST = 256 * 1024
#: So much may be lost before it is known whether walking pays, and by what factor it has to.
_STAKE = 8 * 1024 * 1024
_GAIN = 3


async def walk_tar(read: Callable[[int, int], Awaitable[bytes]], size: int) -> list[Entry] | None:
    """The entries of a tar of so many bytes, in order; read gives those from a start to a stop.

    None if it is compressed, or its members are so small that reading all of it costs less than walking.
    Raises: Invalid (no tar), and what read raises.
    """
    scanner = TarScanner()
    entries: list[Entry] = []
    offset = cost = 0
    block = _LEAST
    while offset < size and not scanner.ended:
        stop = min(offset + block, size)
        data = await read(offset, stop)
        if not offset and sniff(data) is not Compression.NONE:
            return None
        entries += scanner.feed(data)
        cost += _REQUEST + stop - offset
        offset = max(stop, scanner.wanted)
        scanner.skip(min(offset, size))
        block = _LEAST if offset > stop else min(2 * block, _MOST)
        if cost > _STAKE and _GAIN * cost > offset:
            return None
    scanner.finish()
    return entries
