"""HotChunks: the chunks that this process has open, so that reading one is a `pread`."""

import os
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from fsmount.cache.files import Stamp, digest_of

#: Descriptors of recently used chunks kept open; with chunks of 4 MiB they reach over 1 GiB.
HOT_CHUNKS = 256
#: Bytes of chunks that live in memory because they could not be stored: one for each of 32 readers.
HELD_BYTES = 128 * 1024 * 1024

#: A chunk is being read as long as it was last used no longer ago.
_IN_USE_SECONDS = 5.0


@dataclass(slots=True)
class _Open:
    key: str
    descriptor: int
    #: When it was found to have this digest.
    stamp: Stamp
    sha256: str
    #: Whether it lives in memory.
    is_held: bool
    used_at: float


class HotChunks:
    """Open chunks by key, the least recently used closed first. For the event loop's thread, but for `names`.

    What was used in the last seconds is not evicted by this process; so what is open on the disk is bounded.
    """

    def __init__(self, *, most_stored: int) -> None:
        """most_stored: bytes of chunks on the disk that are open at most; one may always be."""
        self._most = {False: most_stored, True: HELD_BYTES}
        self._sizes = {False: 0, True: 0}
        self._chunks: OrderedDict[str, _Open] = OrderedDict()
        self._by_descriptor: dict[int, _Open] = {}
        self._asked_at = 0.0

    def names(self) -> frozenset[str]:
        """The keys of those that are open. For any thread."""
        return frozenset(self._chunks)  # in one step, which no other thread can interrupt

    def held(self) -> list[tuple[str, int]]:
        """The keys and descriptors of those that live in memory, the least recently used first."""
        return [(chunk.key, chunk.descriptor) for chunk in self._chunks.values() if chunk.is_held]

    def close_idle(self, keys: Iterable[str]) -> list[str]:
        """Closes those of the chunks that nobody is reading; returns those that stay open."""
        before = time.monotonic() - _IN_USE_SECONDS
        busy: list[str] = []
        for key in keys:
            chunk = self._chunks.get(key)
            if chunk is not None and chunk.used_at > before:
                busy.append(key)
            else:
                self.discard(key)
        return busy

    def get(self, key: str) -> int | None:
        """The descriptor of an open chunk. Ownership: use it before the next await."""
        chunk = self._chunks.get(key)
        if chunk is None:
            return None
        chunk.used_at = time.monotonic()
        self._chunks.move_to_end(key)
        return chunk.descriptor

    def read(self, descriptor: int, size: int, offset: int) -> bytes:
        """Bytes of an open chunk; none if somebody has changed the file since it was checked. Raises: OSError."""
        data = os.pread(descriptor, size, offset)
        chunk, status = self._by_descriptor[descriptor], os.fstat(descriptor)
        inode, stamped_size, modified_ns, changed_ns = chunk.stamp
        if status.st_mtime_ns != modified_ns or status.st_size != stamped_size:
            return b""
        if status.st_ctime_ns != changed_ns:
            # Somebody has removed it, to make room; or because it is damaged.
            if status.st_nlink or digest_of(descriptor) != chunk.sha256:
                return b""
            chunk.stamp = inode, stamped_size, modified_ns, status.st_ctime_ns
        return data

    def checked(self, descriptor: int) -> tuple[int, int]:
        """Size and time of change, in ns, that an open chunk had when it was checked."""
        _, size, modified_ns, _ = self._by_descriptor[descriptor].stamp
        return size, modified_ns

    def add(
        self, key: str, descriptor: int, stamp: Stamp, sha256: str = "", *, is_held: bool = False
    ) -> list[str]:
        """Takes a descriptor over; in place of the one that the chunk has. Returns what was closed for that."""
        self.discard(key)
        self._chunks[key] = self._by_descriptor[descriptor] = _Open(
            key, descriptor, stamp, sha256, is_held, time.monotonic()
        )
        self._sizes[is_held] += stamp[1]
        closed: list[str] = []
        while len(self._chunks) > HOT_CHUNKS:
            closed.append(next(iter(self._chunks)))
            self.discard(closed[-1])
        while self._sizes[is_held] > self._most[is_held]:
            oldest = next(chunk.key for chunk in self._chunks.values() if chunk.is_held is is_held)
            if oldest == key:
                break
            closed.append(oldest)
            self.discard(oldest)
        return closed

    def discard(self, key: str) -> None:
        """Closes a chunk, if it is open."""
        chunk = self._chunks.pop(key, None)
        if chunk is not None:
            del self._by_descriptor[chunk.descriptor]
            self._sizes[chunk.is_held] -= chunk.stamp[1]
            os.close(chunk.descriptor)

    def resize(self, *, most_stored: int) -> None:
        """Another bound for chunks on the disk; what is over it is closed."""
        self._most[False] = most_stored
        for chunk in list(self._chunks.values()):
            if not chunk.is_held and self._sizes[False] > most_stored:
                self.discard(chunk.key)

    def take_used(self) -> list[str]:
        """What was used since the last call; of the rest, what others have removed is closed: it takes up the disk."""
        before, self._asked_at = self._asked_at, time.monotonic()
        used: list[str] = []
        for chunk in list(self._chunks.values()):
            if chunk.used_at >= before:
                used.append(chunk.key)
            elif not chunk.is_held and not os.fstat(chunk.descriptor).st_nlink:
                self.discard(chunk.key)
        return used

    def close(self) -> None:
        """Closes all of them."""
        for key in list(self._chunks):
            self.discard(key)
