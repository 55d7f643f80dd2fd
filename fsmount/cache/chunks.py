"""ChunkStore: the evictable part of the cache, and the only home of diskcache."""

import contextlib
import errno
import hashlib
import io
import logging
import os
import shutil
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import diskcache
import trio

from fsmount.cache.folder import from_os_error, from_sqlite_error

log = logging.getLogger(__name__)

#: Descriptors of recently used chunks kept open; with chunks of 4 MiB they reach over 1 GiB.
HOT_CHUNKS = 256
#: Threads that touch the store at once; each one costs diskcache two descriptors and a connection.
STORE_THREADS = 4


#: What SQLite says of the disk, or of others who use the database: the database itself is sound.
_TROUBLES = frozenset(
    (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
    )
)


class _RawDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no type hints
    """Keeps bytes under text keys, each value a file, and refuses everything else.

    diskcache unpickles whatever a row says (CVE-2025-69872): here no pickle is ever written or read. It also
    writes a value line by line, which takes 113 ms for 1 MiB of newlines; here it is one write.
    """

    def __init__(self, directory: str, **settings: Any) -> None:
        super().__init__(directory, **settings)
        #: What this thread has stored last.
        self.last = threading.local()

    def put(self, key: Any) -> tuple[Any, bool]:
        if type(key) is not str:
            raise TypeError("chunk keys are text")
        return key, True

    def get(self, key: Any, raw: Any) -> Any:
        if not raw:
            raise ValueError("a pickled key in the chunk store")
        return key

    def store(self, value: Any, read: bool, key: Any = diskcache.UNKNOWN) -> tuple[int, int, str, None]:
        rest = memoryview(value)
        filename, full_path = self.filename(key, value)
        for left in range(10, -1, -1):
            try:
                os.makedirs(os.path.dirname(full_path), exist_ok=True)
                descriptor = os.open(full_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
                break
            except FileNotFoundError:
                # Another thread or process has just removed the folder, because it was empty.
                if not left:
                    raise
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            self.last.path, self.last.stamp = full_path, _stamp(descriptor)
        except BaseException:
            os.unlink(full_path)
            raise
        finally:
            os.close(descriptor)
        return len(value), diskcache.core.MODE_BINARY, filename, None

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode != diskcache.core.MODE_BINARY or filename is None or not read:
            raise ValueError("a foreign row in the chunk store")
        return open(os.path.join(self._directory, filename), "rb", buffering=0)


class ChunkStore:
    """Chunks of layers on disk, at most about `size` bytes, the least recently used dropped first.

    A chunk is verified against its sha256 when this process first reads it back: the disk, or another
    process, may have changed it (after a power cut diskcache returned 1,381 wrong values of 25,163). Where no index
    knows that digest (of a span of a SOCI index only the compressed bytes have one), it is the one
    beside the chunk, in the store's database.
    Recent chunks stay open, and reading one is a plain `pread`; an evicted chunk that is open stays readable.
    """

    def __init__(self, folder: Path, *, size: int) -> None:
        """Opens at once, whatever is in there; a damaged database is moved aside. Blocks on the disk."""
        self._folder = folder
        self.size = size
        try:
            self._cache = self._connect()
        except (sqlite3.DatabaseError, ValueError) as error:
            if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _TROUBLES:
                raise from_sqlite_error(error, folder) from error
            aside = folder.with_name(f"{folder.name}.damaged")
            log.warning(
                "the chunk store is damaged (%s): moved to %s, starting with an empty one", error, aside
            )
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            folder.mkdir(mode=0o700)
            self._cache = self._connect()
        self._limiter = trio.CapacityLimiter(STORE_THREADS)
        self._hot: OrderedDict[str, int] = OrderedDict()
        #: Of each chunk, the file that was found to have a digest, as it was then.
        self._verified: dict[str, tuple[_Stamp, str]] = {}
        self._dropped: dict[str, int] = {}

    def _connect(self) -> Any:
        return diskcache.Cache(
            str(self._folder),
            disk=_RawDisk,
            size_limit=self.size,
            cull_limit=16,
            eviction_policy="least-recently-used",
            statistics=0,
            timeout=10,
        )

    def close(self) -> None:
        """Closes every descriptor. Nothing may be used afterwards."""
        for descriptor in self._hot.values():
            os.close(descriptor)
        self._hot.clear()
        self._cache.close()

    @property
    def volume(self) -> int:
        """Bytes in the store."""
        return int(self._cache.volume())

    def hot(self, key: str) -> int | None:
        """The open descriptor of a recent, verified chunk. Ownership: the store's; use it before the next await."""
        descriptor = self._hot.get(key)
        if descriptor is not None:
            self._hot.move_to_end(key)
        return descriptor

    async def open(self, key: str, sha256: bytes | None = None) -> int | None:
        """Makes a stored chunk hot; None if it is not stored, or no longer has that digest (then it is dropped).

        sha256: None for the one it was stored with. Ownership: as `hot`.
        """
        dropped = self._dropped.get(key)
        descriptor = await trio.to_thread.run_sync(self._load, key, sha256, limiter=self._limiter)
        if descriptor is not None and self._dropped.get(key) != dropped:
            os.close(descriptor)
            return None
        return None if descriptor is None else self._keep_open(key, descriptor)

    def _load(self, key: str, sha256: bytes | None) -> int | None:
        try:
            value, tag = self._cache.get(key, read=True, tag=True)
        except (OSError, ValueError, sqlite3.Error, diskcache.Timeout) as error:
            log.warning("chunk %s cannot be read back: %s", key, error)
            return None
        if value is None:
            return None
        with value:
            descriptor = os.dup(value.fileno())
        stamp = _stamp(descriptor)
        expected = tag if sha256 is None else sha256.hex()
        if self._verified.get(key) != (stamp, expected):
            if _digest(descriptor).hex() != expected:
                os.close(descriptor)
                log.warning("chunk %s is damaged on disk: dropped", key)
                self._delete_file(key, stamp)
                return None
            self._verified[key] = stamp, expected
        return descriptor

    def _keep_open(self, key: str, descriptor: int) -> int:
        present = self._hot.pop(key, None)
        if present is not None:
            os.close(present)
        self._hot[key] = descriptor
        while len(self._hot) > HOT_CHUNKS:
            os.close(self._hot.popitem(last=False)[1])
        return descriptor

    def _delete_file(self, key: str, stamp: "_Stamp") -> None:
        """Deletes a chunk unless another has been stored in its place."""
        try:
            with self._cache.transact():
                value = self._cache.get(key, read=True)
                if value is not None:
                    with value:
                        same = _stamp(value.fileno()) == stamp
                    if same:
                        self._cache.delete(key)
        except (OSError, ValueError, sqlite3.Error, diskcache.Timeout) as error:
            log.warning("chunk %s cannot be removed: %s", key, error)

    def put(self, key: str, data: bytes | memoryview, sha256: bytes) -> None:
        """Stores a chunk, and its digest beside it. For worker threads. Raises: NoSpace, FsmountError."""
        last = self._cache.disk.last
        last.path = None
        try:
            self._cache.set(key, data, tag=sha256.hex())
        except OSError as error:
            raise from_os_error(error, self._folder) from error
        except (sqlite3.Error, diskcache.Timeout) as error:
            if last.path is not None:
                with contextlib.suppress(OSError):
                    os.unlink(last.path)
            full = (
                OSError(errno.ENOSPC, str(error)) if "full" in str(error) else OSError(errno.EIO, str(error))
            )
            raise from_os_error(full, self._folder) from error
        self._verified[key] = last.stamp, sha256.hex()

    def hold(self, key: str, data: bytes | memoryview) -> None:
        """Makes a chunk hot that could not be stored: it lives in memory until it falls out of the recent ones."""
        descriptor = os.memfd_create("fsmount-chunk", os.MFD_CLOEXEC)
        os.write(descriptor, data)
        self._keep_open(key, descriptor)

    async def drop(self, keys: list[str]) -> None:
        """Forgets chunks, on disk and open ones. Cancellation: shielded by the caller where it matters."""
        for key in keys:
            descriptor = self._hot.pop(key, None)
            if descriptor is not None:
                os.close(descriptor)
            self._verified.pop(key, None)
        self._count_dropped(keys)
        await trio.to_thread.run_sync(self._delete, keys, limiter=self._limiter)
        self._count_dropped(keys)

    def _count_dropped(self, keys: list[str]) -> None:
        for key in keys:
            self._dropped[key] = self._dropped.get(key, 0) + 1

    def _delete(self, keys: list[str]) -> None:
        for key in keys:
            try:
                self._cache.delete(key)
            except (OSError, sqlite3.Error, diskcache.Timeout) as error:
                log.warning("chunk %s cannot be removed: %s", key, error)

    async def trim(self) -> None:
        """Removes what is over the size, which may be smaller than it was; storing a chunk does so by itself."""

        def cull() -> None:
            try:
                self._cache.cull(retry=True)
            except (OSError, sqlite3.Error) as error:
                log.warning("the chunk store cannot be trimmed: %s", error)

        await trio.to_thread.run_sync(cull, limiter=self._limiter)

    def recorded(self, key: str) -> bytes | None:
        """The digest that a chunk was stored with; None if it is not stored. Blocks on the disk, briefly."""
        try:
            value, tag = self._cache.get(key, read=True, tag=True)
        except (OSError, ValueError, sqlite3.Error, diskcache.Timeout):
            return None
        if value is not None:
            value.close()
        return bytes.fromhex(tag) if value is not None and isinstance(tag, str) else None

    def stored(self, keys: Sequence[str]) -> list[bool]:
        """Which of these chunks are on disk, as far as can be told. Blocks on the disk, briefly."""
        try:
            return [key in self._cache for key in keys]
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            log.warning("the chunk store cannot be asked what it has: %s", error)
            return [False] * len(keys)


_Stamp: TypeAlias = tuple[int, int, int, int]


def _stamp(descriptor: int) -> _Stamp:
    """Another value when another file, or the same one after a change, is open."""
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _digest(descriptor: int) -> bytes:
    with io.FileIO(descriptor, closefd=False) as file:
        return hashlib.sha256(file.readall()).digest()


@contextmanager
def open_chunk_store(folder: Path, *, size: int) -> Iterator[ChunkStore]:
    """A store that is closed at the end of the block."""
    store = ChunkStore(folder, size=size)
    try:
        yield store
    finally:
        store.close()
