"""ChunkStore: the evictable part of the cache: chunks of layers, each a file, checked when it is read back."""

import contextlib
import hashlib
import logging
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trio

from fsmount.cache.eviction import Eviction, TooLarge, is_no_space
from fsmount.cache.files import Stamp, digest_of, stamp_of, write_file
from fsmount.cache.folder import from_os_error, from_sqlite_error
from fsmount.cache.hot import HotChunks
from fsmount.cache.keeper import Keeper
from fsmount.cache.room import Room, Taken, blocks
from fsmount.cache.table import GROWTH_BYTES, PATIENCE_SECONDS
from fsmount.cache.trouble import Trouble
from fsmount.errors import FsmountError, NoSpace

log = logging.getLogger(__name__)

#: Threads that look for chunks at once; each one costs a connection, which is three descriptors.
STORE_THREADS = 4
#: How long a chunk waits for others to be stored, while storing is known to fail.
_TROUBLED_SECONDS = 0.05
#: How long nothing is stored after it has failed, and where what was stored cannot be read.
_PAUSE_SECONDS = 1.0
_UNREADABLE_SECONDS = 10.0
#: A key that no layer's chunk has.
_PROBE = "probe"
#: What opening the other files of a cache folder takes of a disk that is full.
_FIRST_ROOM = 128 * 1024


class ChunkStore:
    """Chunks of layers on disk, never more than `size` bytes, and never so many that less than `min_free` is left.

    Room is made before a chunk is stored: those go that nobody has used for longest, never those that are being read
    in this process, or pinned. What cannot be stored is for the caller to `hold`.

    A chunk is verified against its sha256 when this process first reads it back: the disk, or another
    process, may have changed it (after a power cut diskcache returned 1,381 wrong values of 25,163). Where no index
    knows that digest (of a span of a SOCI index only the compressed bytes have one), it is the one
    beside the chunk, in the store's table.
    Recent chunks stay open, and reading one is a plain `pread`; an evicted chunk that is open stays readable.
    """

    def __init__(self, folder: Path, *, size: int, min_free: int = 0, beside: Sequence[Path] = ()) -> None:
        """Opens at once, whatever is in there; a damaged table is moved aside, with its files. Blocks on the disk.

        beside: folders in which the other files of the cache are made. Raises: NoSpace, FsmountError.
        """
        self.size = size
        self._folder = folder
        self._hot = HotChunks(most_stored=size // 2)
        #: Chunks that are being opened, and how often.
        self._opening: Counter[str] = Counter()
        self._room = Room(folder, size=size, min_free=min_free, beside=beside)
        try:
            self._eviction = Eviction(folder, self._room, self._let_go)
        except OSError as error:
            raise from_os_error(error, folder) from error
        except sqlite3.Error as error:
            raise from_sqlite_error(error, folder) from error
        self._trouble = Trouble(f"{folder} takes chunks again")
        self._limiter = trio.CapacityLimiter(STORE_THREADS)
        #: Of each chunk, the file that was found to have a digest, as it was then.
        self._verified: dict[str, tuple[Stamp, str]] = {}
        self._dropped: dict[str, int] = {}
        #: Nothing is stored before.
        self._paused_until = 0.0
        self._has_told_too_large = False
        #: How many chunks were found on the disk when somebody wanted to read them, and how many were not.
        self.hits = 0
        self.misses = 0
        self._keeper = Keeper(folder, self._eviction, self._hot, beside, self._limiter, self._try_again)
        self.free(_FIRST_ROOM)

    def resize(self, *, size: int, min_free: int) -> None:
        """Other bounds from now on; `trim` removes what is over them."""
        self.size = self._room.size = size
        self._room.min_free = min_free
        self._hot.resize(most_stored=size // 2)

    def close(self) -> None:
        """Closes every descriptor. Nothing may be used afterwards."""
        self._hot.close()
        self._eviction.close()

    def _let_go(self, keys: Sequence[str]) -> Collection[str]:
        """Closes chunks that are about to be evicted; returns those that are in use. For worker threads."""
        opening = frozenset(self._opening).intersection(keys)
        opened = self._hot.names().intersection(keys)
        if not opened:
            return opening
        try:
            return opening.union(trio.from_thread.run_sync(self._hot.close_idle, opened - opening))
        except RuntimeError:
            # This is no worker thread of a loop that still runs: nobody here can close them.
            return opening | opened

    # What is there

    @property
    def volume(self) -> int:
        """Bytes that count against the size, now; 0 if that cannot be told. As `room`: blocks on the disk, briefly."""
        return self._ask(self._room.counted)

    @property
    def room(self) -> int:
        """Bytes that can be stored before others have to go."""
        return max(0, self._ask(self._room.left) - GROWTH_BYTES)

    def _ask(self, question: Callable[[Taken], int]) -> int:
        try:
            return question(self._eviction.taken())
        except (OSError, sqlite3.Error) as error:
            self._fail(error)
            return 0

    @property
    def evicted(self) -> int:
        """How many chunks this process has removed to make room."""
        return self._eviction.evicted

    @property
    def trouble(self) -> str | None:
        """Why chunks cannot be stored now; None if they can."""
        return self._trouble.message

    def stored(self, keys: Sequence[str]) -> list[bool]:
        """Which of these chunks are on disk, as far as can be told. Blocks on the disk, briefly."""
        try:
            return self._eviction.table.has(keys)
        except sqlite3.Error as error:
            self._fail(error)
            return [False] * len(keys)

    def recorded(self, key: str) -> bytes | None:
        """The digest that a chunk was stored with; None if it is not stored. Blocks on the disk, briefly."""
        try:
            row = self._eviction.table.find(key)
            if row is None or row.filename is None or row.sha256 is None:
                return None
            return bytes.fromhex(row.sha256) if (self._folder / row.filename).exists() else None
        except (OSError, sqlite3.Error) as error:
            self._fail(error)
        except ValueError:
            log.warning("chunk %s was not stored by us", key)
        return None

    def pin(self, prefixes: frozenset[str]) -> None:
        """From now on, chunks whose keys begin so are not evicted, and no others are spared. For any thread."""
        self._eviction.pin(prefixes)

    # Reading

    def hot(self, key: str) -> int | None:
        """The open descriptor of a recent, verified chunk. Ownership: the store's; use it before the next await."""
        return self._hot.get(key)

    def checked(self, descriptor: int) -> tuple[int, int]:
        """Size and time of change, in ns, that an open chunk had when it was checked: for who copies it elsewhere."""
        return self._hot.checked(descriptor)

    def read(self, descriptor: int, size: int, offset: int) -> bytes:
        """Bytes of an open chunk, which end where the chunk does.

        None at all if the disk fails, or somebody has changed the file since it was verified: then `drop` the chunk.
        """
        try:
            return self._hot.read(descriptor, size, offset)
        except OSError as error:
            self._fail_to_read(error)
            return b""

    def _fail_to_read(self, error: OSError) -> None:
        """Takes note that what was stored cannot be read: if it were stored again, that would go on for ever."""
        self._pause(_UNREADABLE_SECONDS)
        self._fail(error)

    async def open(self, key: str, sha256: bytes | None = None) -> int | None:
        """Makes a stored chunk hot; None if it is not stored, or no longer has that digest (then it is dropped).

        sha256: None for the one it was stored with. Ownership: as `hot`.
        """
        dropped = self._dropped.get(key)
        self._opening[key] += 1
        try:
            loaded = await trio.to_thread.run_sync(self._load, key, sha256, limiter=self._limiter)
        finally:
            self._opening[key] -= 1
            if not self._opening[key]:
                del self._opening[key]
        if loaded is None:
            self.misses += 1
            return None
        self.hits += 1
        descriptor, stamp, found = loaded
        if self._dropped.get(key) != dropped:
            os.close(descriptor)
            return None
        self._note_closed(self._hot.add(key, descriptor, stamp, found))
        return descriptor

    def _load(self, key: str, sha256: bytes | None) -> tuple[int, Stamp, str] | None:
        table = self._eviction.table
        try:
            row = table.find(key)
            if row is None:
                return None
            if row.filename is None or row.sha256 is None:
                log.warning("chunk %s was not stored by us: dropped", key)
                self._eviction.remove_soon(row)
                return None
            try:
                descriptor = os.open(self._folder / row.filename, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self._eviction.remove_soon(row)
                return None
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, descriptor)
                stamp = stamp_of(descriptor)
                expected = row.sha256 if sha256 is None else sha256.hex()
                if self._verified.get(key) != (stamp, expected):
                    if not self._is(descriptor, expected):
                        log.warning("chunk %s is damaged on disk: dropped", key)
                        self._eviction.remove_soon(row)
                        return None
                    self._verified[key] = stamp, expected
                self._eviction.note_use(key)
                self._eviction.write_uses_soon()
                stack.pop_all()
                return descriptor, stamp, expected
        except (OSError, sqlite3.Error) as error:
            self._fail(error)
            return None

    def _is(self, descriptor: int, sha256: str) -> bool:
        try:
            return digest_of(descriptor) == sha256
        except OSError as error:
            self._fail_to_read(error)
            return False

    def _note_closed(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._eviction.note_use(key)

    def hold(self, key: str, data: bytes | memoryview) -> None:
        """Makes a chunk hot that could not be stored: it lives in memory until it falls out of the recent ones."""
        descriptor = os.memfd_create("fsmount-chunk", os.MFD_CLOEXEC)
        os.write(descriptor, data)
        self._note_closed(self._hot.add(key, descriptor, stamp_of(descriptor), is_held=True))

    # Storing

    def put(self, key: str, data: bytes | memoryview, sha256: bytes) -> bool:
        """Stores a chunk, and its digest beside it. For worker threads.

        False if it cannot be stored: the disk is full or fails, it is larger than the cache, or all that is stored is
        in use or pinned. The log says so when that begins, and when it is over.
        """
        if type(key) is not str:
            raise TypeError("chunk keys are text")
        view = memoryview(data)
        if time.monotonic() < self._paused_until:
            return False
        size = blocks(view.nbytes)
        try:
            if self._eviction.table.log_overflows:
                self._eviction.table.checkpoint()
            try:
                self._store(key, view, size, sha256)
            except (OSError, sqlite3.Error) as error:
                if not is_no_space(error) or not self._eviction.sacrifice(size):
                    raise
                # Others have filled the disk since room was made, or the table itself had none.
                self._store(key, view, size, sha256)
        except TooLarge as error:
            if not self._has_told_too_large:
                self._has_told_too_large = True
                log.error("%s: it is served without caching", error.message)
            return False
        except (OSError, sqlite3.Error, NoSpace) as error:
            self._fail(error)
            return False
        self._trouble.end()
        if self._eviction.table.log_is_long:
            self._keeper.wake()
        return True

    def _store(self, key: str, data: memoryview, size: int, sha256: bytes) -> None:
        # While it is known to fail nobody waits long for it to do so.
        patience = PATIENCE_SECONDS if self._trouble.message is None else _TROUBLED_SECONDS
        eviction = self._eviction
        filename = eviction.reserve(size, patience_seconds=patience)
        path = self._folder / filename
        try:
            stamp = write_file(path, data)
            with eviction.table.writing(patience):
                before = eviction.table.insert(key, filename, sha256.hex())
                if before is not None:
                    # Within, or for a moment there were both.
                    (self._folder / before).unlink(missing_ok=True)
        except BaseException:
            path.unlink(missing_ok=True)
            eviction.release(filename)
            raise
        self._verified[key] = stamp, sha256.hex()

    def _pause(self, seconds: float) -> None:
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def _fail(self, error: Exception) -> None:
        """Takes note that the disk or the table fails; a table that is damaged, or gone, is begun anew."""
        self._pause(_PAUSE_SECONDS)
        match error:
            case FsmountError():
                failure = error
            case sqlite3.Error():
                failure = from_sqlite_error(error, self._folder)
                with contextlib.suppress(OSError, sqlite3.Error):  # then it is tried again later
                    self._eviction.mend(error)
            case OSError():
                failure = from_os_error(error, self._folder)
            case _:
                raise error
        self._trouble.begin(failure.message)
        if isinstance(failure, NoSpace):
            self._keeper.wake()

    def free(self, size: int) -> None:
        """Has so many bytes free on the disk, by evicting, for what the cache needs besides chunks, or what there are.

        Without regard for `min_free`: that is for what can be fetched again. Takes microseconds if they are free.
        For worker threads.
        """
        try:
            missing = size - self._room.free()
            if missing > 0:
                self._eviction.sacrifice(missing)
        except (OSError, sqlite3.Error) as error:
            self._fail(error)

    # Dropping

    async def drop(self, keys: list[str]) -> None:
        """Forgets chunks, on disk and open ones. Cancellation: shielded by the caller where it matters."""
        for key in keys:
            self._hot.discard(key)
            self._verified.pop(key, None)
        self._count_dropped(keys)
        await trio.to_thread.run_sync(self._delete, keys, limiter=self._limiter)
        self._count_dropped(keys)

    def _count_dropped(self, keys: list[str]) -> None:
        for key in keys:
            self._dropped[key] = self._dropped.get(key, 0) + 1

    def _delete(self, keys: list[str]) -> None:
        try:
            rows = [row for row in map(self._eviction.table.find, keys) if row is not None]
            self._eviction.remove(rows)
        except (OSError, sqlite3.Error) as error:
            log.warning("chunks cannot be removed: %s", error)
            self._fail(error)

    # Keeping it so

    async def _try_again(self) -> None:
        """Looks whether what could not be stored can be now; what lives in memory for that reason then need not."""
        if self._trouble.message is None:
            return
        for key, descriptor in self._hot.held():
            dropped = self._dropped.get(key)
            copy = os.dup(descriptor)
            if not await trio.to_thread.run_sync(self._put_held, key, copy, limiter=self._limiter):
                return
            if self._dropped.get(key) == dropped:
                self._hot.discard(key)
            else:
                await trio.to_thread.run_sync(self._delete, [key], limiter=self._limiter)
        if self._trouble.message is not None:
            await trio.to_thread.run_sync(self._probe, limiter=self._limiter)

    def _put_held(self, key: str, descriptor: int) -> bool:
        with open(descriptor, "rb") as file:
            data = os.pread(descriptor, os.fstat(file.fileno()).st_size, 0)
        return self.put(key, data, hashlib.sha256(data).digest())

    def _probe(self) -> None:
        if self.put(_PROBE, b"probe", hashlib.sha256(b"probe").digest()):
            self._delete([_PROBE])

    async def trim(self) -> None:
        """Removes what is over the bounds now: they, or what others have on the disk, may not be what they were."""
        await self._keeper.trim()

    async def keep_room(self) -> None:
        """Keeps the store within its bounds, for ever, and removes what killed processes have left.

        Every 30 s, and at once when a chunk found no space. Once for each process, in the background.
        """
        await self._keeper.run()


@contextmanager
def open_chunk_store(
    folder: Path, *, size: int, min_free: int = 0, beside: Sequence[Path] = ()
) -> Iterator[ChunkStore]:
    """A store that is closed at the end of the block."""
    store = ChunkStore(folder, size=size, min_free=min_free, beside=beside)
    try:
        yield store
    finally:
        store.close()
