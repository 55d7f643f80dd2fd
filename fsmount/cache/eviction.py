"""Eviction: room for a chunk before it is written: what may go, in which order, and what is reserved by whom."""

import contextlib
import errno
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fsmount.cache.leases import Lease
from fsmount.cache.leftovers import Aside
from fsmount.cache.opening import OPENING_ROOM, open_table
from fsmount.cache.room import Room, Taken
from fsmount.cache.table import BATCH, GROWTH_BYTES, PATIENCE_SECONDS, START, Row, code_of
from fsmount.errors import NoSpace

log = logging.getLogger(__name__)

#: How long what could not go is passed over: to look at thousands that are pinned takes milliseconds.
_PASSED_SECONDS = 5.0
#: Some file systems (Btrfs, XFS) show the space of a removed file only later; it is waited for so long.
_OWED_SECONDS = 30.0
#: A table is not begun anew more often.
_ANEW_SECONDS = 60.0
#: Between two times at which those who open chunks write down what was used.
_NOTE_SECONDS = 1.0
#: Whose last use is further ahead than this was used while the clock was wrong.
_AHEAD_SECONDS = 60.0


class TooLarge(NoSpace):
    """It would not fit if nothing else were there."""


#: What telling the table what is gone may take of the disk.
_SETTLING_BYTES = 512 * 1024


class Eviction:
    """The files of chunks that are stored, and those that are about to be; for any thread, of any number of processes.

    A file goes before its row does, and comes after it was reserved: so what the table counts is never less than what
    is on the disk, at whatever moment a process is killed, and a full disk keeps nobody from evicting. A row whose
    file is gone is one of a chunk that is not stored.
    """

    def __init__(self, folder: Path, room: Room, let_go: Callable[[Sequence[str]], Collection[str]]) -> None:
        """let_go is given keys of chunks, and returns those that may not go. Raises: OSError, sqlite3.Error."""
        self._folder = folder
        self._room = room
        self._let_go = let_go
        self._aside = Aside(folder)
        #: And what was wrong with the one before, if it had to be begun anew.
        self.table, self.damage = open_table(folder, self._aside)
        self._lease = Lease(folder / "leases")
        self._begun_at = float("-inf")
        # One thread at a time makes room; what they write themselves, they write side by side.
        self._lock = threading.RLock()
        self._pins: frozenset[str] = frozenset()
        self._pin_lengths: Sequence[int] = ()
        #: Whatever comes before it in the order of use could not go when it was looked at; and when that is forgotten.
        self._place = START
        self._begins_at = 0.0
        #: Rows whose files are gone, and reservations that are no longer needed, as far as the table does not know it:
        #: on a full disk it may not be told for long.
        self._gone: dict[tuple[int, str | None], Row] = {}
        self._released: list[str] = []
        self._owed = 0
        self._owed_until = 0.0
        #: Whether nothing could go when something should have.
        self._is_helpless = False
        #: When chunks were used, as far as the table does not know it.
        self._used: dict[str, float] = {}
        self._noted_at = 0.0
        #: How many chunks had to go.
        self.evicted = 0

    def close(self) -> None:
        """Tells the table what is gone, if it can be told now: else whoever looks next finds no file."""
        with contextlib.suppress(sqlite3.Error):
            self._settle()
        self.table.close()
        self._lease.close()

    def pin(self, prefixes: frozenset[str]) -> None:
        """Chunks whose keys begin so may not go, from now on."""
        # Without the lock: whoever holds it may be waiting for the thread that pins.
        self._pin_lengths = sorted({len(prefix) for prefix in prefixes | self._pins})
        self._pins = prefixes
        self._place = START

    def taken(self) -> Taken:
        """What counts now. Raises: sqlite3.Error."""
        return Taken(*self.table.totals(), self.table.overhead())

    # Coming

    def reserve(self, size: int, *, patience_seconds: float = PATIENCE_SECONDS) -> str:
        """Makes room for a file of that size, and returns its name. It is the caller's to write, and to `release`.

        Raises: NoSpace (it would be too much even then), OSError, sqlite3.Error.
        """
        if not self._lock.acquire(timeout=patience_seconds):
            raise TimeoutError(errno.ETIMEDOUT, "too many chunks are being stored at once")
        try:
            if not self.table.is_there():
                self._begin_anew()
            self._aside.free(size)
            is_prepared = False
            while True:
                with self._writing(patience_seconds):
                    taken = self.taken()
                    short = self._short(size, taken)
                    if not short:
                        return self.table.reserve(size, self._lease.number)
                if not is_prepared:
                    is_prepared = True
                    self._check_fits(size, taken)
                    self.write_uses(patience_seconds)
                    self.set_right_some(patience_seconds)
                    # Until the table knows what is gone, it counts.
                    counts = bool(self._gone or self._released)
                    if (taken.reserved and self.release_dead()) or counts:
                        self._settle(patience_seconds)
                        continue
                self._evict(short)
        finally:
            self._lock.release()

    def _short(self, size: int, taken: Taken) -> int:
        """Bytes that have to go. Raises: NoSpace."""
        low, owed = self._room.low(size, taken), self._owed_now()
        if low and low <= owed:
            raise self._too_low()
        return max(self._room.over(size + GROWTH_BYTES, taken), low - owed, 0)

    def _check_fits(self, size: int, taken: Taken) -> None:
        if size + GROWTH_BYTES + taken.database > self._room.size:
            raise TooLarge(f"a chunk of {size} bytes is too large for cache.size, {self._room.size} bytes")

    def _too_low(self) -> NoSpace:
        if self._room.free() < OPENING_ROOM:
            return NoSpace(f"no space left for {self._folder}")
        return NoSpace(f"{self._folder} may not take what cache.min_free leaves to others")

    def release(self, filename: str) -> None:
        """The file of a reservation is gone again, or was never made."""
        self._released.append(filename)
        with contextlib.suppress(sqlite3.Error):  # then with the next transaction
            self._settle(0)

    # Going

    def _evict(self, short: int) -> int:
        """Removes files of so many bytes, or of BATCH rows; how many bytes they were, if others have removed some.

        Their rows follow with the next transaction. Raises: NoSpace (no more may go), OSError.
        """
        rows = self._pick(short)
        if not rows:
            if self._room.free() < OPENING_ROOM:
                raise NoSpace(f"no space left for {self._folder}")
            raise NoSpace(f"all that is stored in {self._folder} is in use or pinned")
        free = self._room.free()
        size = 0
        for row in rows:
            if self._unlink(row):
                self.evicted += 1
                size += row.size
        owed = size - (self._room.free() - free)
        if 2 * owed > size > 0:
            self._owed = self._owed_now() + owed
            self._owed_until = time.monotonic() + _OWED_SECONDS
        return size

    def _owed_now(self) -> int:
        return self._owed if time.monotonic() < self._owed_until else 0

    def _pick(self, short: int) -> list[Row]:
        """The rows that go first, as many as needed, or BATCH. Raises: sqlite3.Error."""
        picked: list[Row] = []
        now = time.monotonic()
        if now >= self._begins_at:
            self._place, self._begins_at = START, now + _PASSED_SECONDS
        begins_anew = self._place != START
        gone = frozenset(self._gone)
        while True:
            rows = self.table.least_used(self._place, BATCH)
            busy = self._let_go([row.key for row in rows])
            for row in rows:
                self._place = row.place
                if row.identity in gone or row.key in busy or self._is_pinned(row.key):
                    continue
                picked.append(row)
                short -= row.size
                if short <= 0 or len(picked) == BATCH:
                    return picked
            if len(rows) == BATCH:
                continue
            self._place = START
            if picked or not begins_anew:
                return picked
            begins_anew = False

    def _is_pinned(self, key: str) -> bool:
        # Pins may be thousands, but hardly of more than two lengths.
        return any(key[:length] in self._pins for length in self._pin_lengths)

    def _unlink(self, row: Row) -> bool:
        """Removes a row's file, and soon the row; whether there was a file. Raises: OSError."""
        is_there = False
        if row.filename is not None:
            path = self._folder / row.filename
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                is_there = True
            if row.filename.count("/") > 1:
                # An earlier version had a folder for nearly every chunk.
                with contextlib.suppress(OSError):
                    path.parent.rmdir()
        self._gone[row.identity] = row
        return is_there

    @contextmanager
    def _writing(self, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
        """A transaction that tells the table what is gone, up to BATCH of it."""
        gone, released = list(self._gone.values())[:BATCH], self._released[:BATCH]
        with self.table.writing(patience_seconds):
            self.table.remove(gone)
            self.table.release(released)
            yield
        for row in gone:
            self._gone.pop(row.identity, None)
        del self._released[: len(released)]

    def _settle(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        with self._lock:
            while self._gone or self._released:
                with self._writing(patience_seconds):
                    pass

    def remove(self, rows: Iterable[Row]) -> None:
        """Removes chunks that are no good, or no longer wanted. Raises: OSError, sqlite3.Error."""
        for row in rows:
            self._unlink(row)
        self._settle()

    def remove_soon(self, row: Row) -> None:
        """As `remove`, for one who waits for nobody: if others are writing, the row goes with their next transaction.

        Raises: OSError.
        """
        self._unlink(row)
        if self._lock.acquire(blocking=False):
            try:
                with contextlib.suppress(sqlite3.Error):
                    self._settle(0)
            finally:
                self._lock.release()

    def sacrifice(self, size: int) -> bool:
        """Frees so many bytes of the disk, also if the table cannot be written before; whether it freed any.

        Raises: OSError, sqlite3.Error (it cannot even be read).
        """
        freed = 0
        with self._lock, contextlib.suppress(NoSpace):
            if self._aside.free(size):
                return True
            while freed < size:
                freed += self._evict(size - freed)
                if self._room.free() < size + _SETTLING_BYTES:
                    continue  # the table's log would take what was freed; it can wait
                with contextlib.suppress(sqlite3.Error):
                    self._settle()
        return freed > 0

    def is_low(self) -> bool:
        """Whether others have taken of the disk what shall stay free, and something can go for it. Raises: OSError."""
        return not self._owed_now() and not self._is_helpless and self._room.is_low()

    def trim_some(self) -> bool:
        """Evicts some of what is over the bounds now; whether there may be more. Raises: OSError, sqlite3.Error."""
        with self._lock:
            if self._aside.free(BATCH * 4 * 1024 * 1024):
                return True
            self._settle()
            taken = self.taken()
            short = max(self._room.over(0, taken), self._room.low(0, taken) - self._owed_now())
            if short <= 0:
                return False
            self._is_helpless = False
            try:
                self._evict(short)
            except NoSpace:
                self._is_helpless = True
            self._settle()
        return not self._is_helpless

    def release_dead(self) -> bool:
        """Ends the reservations of processes that have ended, with their files; whether there were any.

        Raises: OSError, sqlite3.Error.
        """
        held: dict[int, bool] = {}
        for filename, _, lease in self.table.reservations():
            if lease not in held:
                held[lease] = self._lease.is_held(lease)
            if not held[lease]:
                (self._folder / filename).unlink(missing_ok=True)
                self._released.append(filename)
        self._settle()
        return not all(held.values())

    # The order

    def note_use(self, key: str) -> None:
        """A chunk was used just now. Written down now and then: others who share the cache evict by that, too."""
        self._used[key] = time.time()

    def write_uses_soon(self) -> None:
        """Writes down a few uses, if that is due, and nobody else is writing."""
        now = time.monotonic()
        if now >= self._noted_at + _NOTE_SECONDS:
            self._noted_at = now
            with contextlib.suppress(sqlite3.Error):
                self.write_uses(0, most=BATCH)

    def write_uses(self, patience_seconds: float = PATIENCE_SECONDS, *, most: int | None = None) -> None:
        """Writes down what was used. Raises: sqlite3.Error."""
        keys = list(self._used)[:most]
        for start in range(0, len(keys), BATCH):
            some = [(key, at) for key in keys[start : start + BATCH] if (at := self._used.get(key))]
            with self.table.writing(patience_seconds):
                self.table.touch(some)
            for key, _ in some:
                self._used.pop(key, None)

    def set_right_some(self, patience_seconds: float = PATIENCE_SECONDS) -> bool:
        """What was last used in the future counts as used now; up to BATCH of it: whether there may be more.

        A clock was ahead then. What has been used since would go first, for as long as it was ahead.
        Raises: sqlite3.Error.
        """
        rows = self.table.least_used((time.time() + _AHEAD_SECONDS, 0), BATCH)
        if rows:
            with self.table.writing(patience_seconds):
                self.table.set_right(rows)
        return len(rows) == BATCH

    # Beginning anew

    def mend(self, error: sqlite3.Error) -> None:
        """Begins an empty table if an error says that this one is damaged, or no longer there.

        Raises: OSError, sqlite3.Error.
        """
        if not self._lock.acquire(blocking=False):
            return  # whoever has it will see it, too
        try:
            if self.table.is_spoilt_by(error):
                self._begin_anew(str(error))
        finally:
            self._lock.release()

    def _begin_anew(self, damage: str = "") -> None:
        """damage: what is wrong with the table, if it is the one that lies there."""
        now = time.monotonic()
        if now < self._begun_at + _ANEW_SECONDS:
            raise FileNotFoundError(errno.ENOENT, "its table is gone, or damaged")
        self._begun_at = now
        if self.table.is_there():
            log.warning("the chunk store is damaged (%s): starting with an empty one", damage)
            self._aside.take(self._folder)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self.table, _ = open_table(self._folder, self._aside)
        before, self._lease = self._lease, Lease(self._folder / "leases")
        before.close()
        self._gone.clear()
        self._released.clear()
        self._place = START


def is_no_space(error: Exception) -> bool:
    """Whether the disk is full, in the words of the system or of SQLite."""
    if isinstance(error, sqlite3.Error):
        return (
            code_of(error) == sqlite3.SQLITE_FULL
            or getattr(error, "sqlite_errorname", "") == "SQLITE_IOERR_SHMSIZE"
        )
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
