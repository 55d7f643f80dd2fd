"""What the cache may take, and what goes first: never above the size, never below the free space, nothing in use."""

import fcntl
import hashlib
import logging
import os
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trio

from fsmount.cache.chunks import ChunkStore, open_chunk_store
from fsmount.cache.room import PARTIAL
from fsmount.cache.table import ChunkTable

KB = 1024
CHUNK = os.urandom(16 * KB)
SHA256 = hashlib.sha256(CHUNK).digest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "chunks"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def room_for(folder: Path) -> Callable[[int], int]:
    """The size of a cache for so many chunks."""
    with open_chunk_store(folder, size=1) as store:
        empty = store.volume
    return lambda chunks: empty + chunks * len(CHUNK) + 64 * KB


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be stored is tried again at once."""
    monkeypatch.setattr("fsmount.cache.chunks._PAUSE_SECONDS", 0.0)


def put(store: ChunkStore, *keys: object) -> list[bool]:
    return [store.put(str(key), CHUNK, SHA256) for key in keys]


def stored(store: ChunkStore, *keys: object) -> str:
    """Those of the keys that are stored, one letter each."""
    names = [str(key) for key in keys]
    return "".join(key for key, is_here in zip(names, store.stored(names), strict=True) if is_here)


def taken(folder: Path) -> dict[tuple[str, int], int]:
    """What each file below a folder takes of the disk; another file of the same name is another one."""
    sizes: dict[tuple[str, int], int] = {}
    for base, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(base, name)
            try:
                status = os.stat(path)
            except FileNotFoundError:
                continue
            sizes[path, status.st_ino] = status.st_blocks * 512
    return sizes


class Watch:
    """The most that a folder was seen to take, at one instant.

    Looking takes time, in which files come and go. What was there before and after an instant, was there at it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: dict[tuple[str, int], int] = {}
        self.most = 0

    def look(self) -> None:
        now = taken(self._folder)
        both = sum(min(size, self._last[file]) for file, size in now.items() if file in self._last)
        self._last = now
        self.most = max(self.most, both)


# -------------------- the size


def test_the_store_never_takes_more_than_its_size_also_when_that_has_changed(
    folder: Path, room_for: Callable[[int], int]
) -> None:
    for chunks in (40, 20):
        size = room_for(chunks)
        with open_chunk_store(folder, size=size) as store:
            for number in range(60):
                put(store, number)
                assert sum(taken(folder).values()) <= size
                assert store.volume <= size
            kept = len(list(folder.rglob("*.val")))
            assert chunks - 5 <= kept <= chunks, "the rest is for the table, which grows"


async def test_a_store_that_is_to_be_smaller_than_it_was_is_trimmed(
    folder: Path, room_for: Callable[[int], int]
) -> None:
    with open_chunk_store(folder, size=10**9) as store:
        put(store, *range(100))
    size = room_for(20)
    with open_chunk_store(folder, size=size) as store:
        assert store.volume > size
        await store.trim()
        assert store.volume <= size
        assert 10 < len(list(folder.rglob("*.val"))) <= 24


def test_a_chunk_that_is_larger_than_the_cache_is_not_stored_and_costs_no_other(
    folder: Path, room_for: Callable[[int], int], caplog: pytest.LogCaptureFixture
) -> None:
    with open_chunk_store(folder, size=room_for(10)) as store:
        put(store, *"abc")
        assert not store.put("large", CHUNK * 11, SHA256)
        assert stored(store, *"abc") == "abc"
    assert "too large for cache.size" in caplog.text


def test_what_is_being_made_beside_the_chunks_counts(folder: Path, room_for: Callable[[int], int]) -> None:
    layers = folder.parent / "layers"
    layers.mkdir()
    size = room_for(10)
    with open_chunk_store(folder, size=size, beside=[layers]) as store:
        put(store, *"abcdefgh")
        partial = layers / f"{PARTIAL}xyz"
        partial.write_bytes(CHUNK * 4)
        put(store, "i")
        assert stored(store, *"abcdefghi") == "defghi"
        with partial.open("ab") as file:
            file.write(CHUNK * 3)
        put(store, "j")
        assert stored(store, *"abcdefghij") == "hij", "also what it has grown by"
        assert sum(taken(folder.parent).values()) <= size
        partial.rename(layers / "whole")
        put(store, *"klm")
        assert stored(store, *"hijklm") == "hijklm", "it is no longer for the cache to count"


def test_a_log_that_somebody_who_reads_has_let_grow_is_short_again_when_that_is_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, checkpoints = folder / "cache.db-wal", 0
    checkpoint = ChunkTable.checkpoint

    def count(table: ChunkTable) -> None:
        nonlocal checkpoints
        checkpoints += 1
        checkpoint(table)

    monkeypatch.setattr(ChunkTable, "checkpoint", count)
    with open_chunk_store(folder, size=10**9) as store:
        volume = store.volume
        with closing(sqlite3.connect(folder / "cache.db", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM Cache").fetchone()
            put(store, *range(200))
        longest = log.stat().st_size
        assert longest > 2**22
        checkpoints = 0
        put(store, *range(200))
        assert checkpoints == 1, "whoever stores waits for it once"
        assert log.stat().st_size < longest / 2
        assert store.volume - volume < 200 * len(CHUNK) + 2**20, "nor does it count for ever"


def test_a_log_that_has_grown_is_cut_as_soon_as_others_are_through_with_copying_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_chunk_store(folder, size=10**9) as store:
        table = store._eviction.table
        with closing(sqlite3.connect(folder / "cache.db", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM Cache").fetchone()
            put(store, *range(100))
        assert table.log_overflows
        with (folder / "cache.db-shm").open("rb+", buffering=0) as shared:
            # As another process does while it copies: WAL_CKPT_LOCK, see sqlite.org/walformat.html.
            lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 121, 1, 0)
            fcntl.fcntl(shared, fcntl.F_OFD_SETLK, lock)
            waited: list[float] = []

            def release(seconds: float) -> None:
                waited.append(seconds)
                if len(waited) == 3:
                    shared.close()

            monkeypatch.setattr(time, "sleep", release)
            table.checkpoint()
        assert len(waited) == 3 and not table.log_overflows


@pytest.mark.parametrize("checkpoint", ["PASSIVE", "RESTART"])
def test_a_log_that_was_copied_calls_for_nobody_to_do_so(folder: Path, checkpoint: str) -> None:
    with open_chunk_store(folder, size=10**9) as store:
        table = store._eviction.table
        number = 0
        while not table.log_is_long:
            put(store, number)
            number += 1
        with closing(sqlite3.connect(folder / "cache.db", isolation_level=None)) as other:
            other.execute(f"PRAGMA wal_checkpoint({checkpoint})")
        put(store, "next")
        assert not table.log_is_long


def test_a_chunk_that_replaces_another_one_is_never_there_beside_it(
    folder: Path, room_for: Callable[[int], int]
) -> None:
    with open_chunk_store(folder, size=room_for(10)) as store:
        put(store, *"aabaa")
        assert len(list(folder.rglob("*.val"))) == 2
        volume = store.volume
        put(store, *"ab" * 10)
        assert store.volume == volume


_STORING = """
import hashlib, random, sys
from pathlib import Path
from threading import Thread
import trio
from fsmount.cache.chunks import open_chunk_store

folder, size, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def content(number):
    return random.Random(number).randbytes(1000 + number * 400)

def store_some(store, numbers):
    for number in numbers:
        data = content(number)
        assert store.put(str(number), data, hashlib.sha256(data).digest())

async def read_some(store, rng):
    hits = 0
    for _ in range(600):
        number = rng.randrange(200)
        data = content(number)
        descriptor = await store.open(str(number), hashlib.sha256(data).digest())
        if descriptor is not None:
            found = store.read(descriptor, 10**6, 0)
            assert found == data, "a wrong byte"
            hits += 1
        await trio.lowlevel.checkpoint()
    return hits

async def main():
    rng = random.Random(seed)
    with open_chunk_store(folder, size=size) as store:
        threads = [Thread(target=store_some, args=(store, rng.choices(range(200), k=250))) for _ in range(3)]
        for thread in threads:
            thread.start()
        hits = await read_some(store, rng)
        for thread in threads:
            await trio.to_thread.run_sync(thread.join)
        assert store.trouble is None, store.trouble
    print("hits", hits)

trio.run(main)
"""


def storing(folder: Path, size: int, seed: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _STORING, folder, str(size), str(seed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_that_store_read_and_evict_at_once_read_no_wrong_byte_and_stay_within_the_size(
    folder: Path, room_for: Callable[[int], int]
) -> None:
    size = room_for(400)  # 6.5 MB, of 200 chunks of 40 KB on average
    watch = Watch(folder)
    processes = [storing(folder, size, seed) for seed in range(3)]
    while any(process.poll() is None for process in processes):
        watch.look()
    said = [(process.communicate(), process.returncode) for process in processes]
    for (out, err), code in said:
        assert (code, err) == (0, "")
        assert out.startswith("hits ") and out != "hits 0\n"
    assert size // 2 < watch.most <= size
    with open_chunk_store(folder, size=size) as store:
        table = store._eviction.table
        assert table.reservations() == []
        sizes = {row.filename: row.size for row in table.following(0, 1000)}
        assert {str(path.relative_to(folder)) for path in folder.rglob("*.val")} == sizes.keys()
        assert table.totals() == (sum(sizes.values()), 0)


# -------------------- the free space of the disk


class Disk:
    """A disk of which so much is free, but for the chunks that come and go from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._folder = folder
        self._used = self._now()
        self._free = 10**9
        #: Whether what is removed is free only later.
        self.lags = False
        monkeypatch.setattr("fsmount.cache.room.Room.free", lambda room: self.free)

    def _now(self) -> int:
        # Not what the table takes: it grows by a few blocks whenever something goes, and these chunks are small.
        return sum(size for (path, _), size in taken(self._folder).items() if path.endswith(".val"))

    @property
    def free(self) -> int:
        used = self._now()
        return self._free - max(0, used - self._used) if self.lags else self._free + self._used - used

    @free.setter
    def free(self, value: int) -> None:
        self._free, self._used = value, self._now()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Disk:
    return Disk(monkeypatch, folder)


def test_as_much_of_the_disk_stays_free_as_is_asked_for(folder: Path, disk: Disk) -> None:
    with open_chunk_store(folder, size=10**9, min_free=10**6) as store:
        put(store, *"abcdefgh")
        disk.free = 2 * 10**6
        while stored(store, *"abcdefgh") == "abcdefgh":
            put(store, f"more {disk.free}")
            assert disk.free >= 10**6
        assert disk.free < 2 * 10**6 - 10 * len(CHUNK)
        assert stored(store, *"abcdefgh") == "bcdefgh"


async def test_a_disk_that_others_fill_gets_its_free_space_back_while_there_is_something_to_evict(
    folder: Path, disk: Disk
) -> None:
    with open_chunk_store(folder, size=10**9, min_free=10**6) as store:
        put(store, *range(100))
        disk.free = 10**6 - 100 * KB
        await store.trim()
        assert 10**6 <= disk.free < 10**6 + 600 * KB
        assert 40 < len(list(folder.rglob("*.val"))) < 70
        disk.free = 0
        await store.trim()
        assert list(folder.rglob("*.val")) == []


async def test_of_a_disk_that_shows_free_space_late_no_more_is_evicted_than_is_missing(
    folder: Path, disk: Disk
) -> None:
    with open_chunk_store(folder, size=10**9, min_free=10**6) as store:
        put(store, *range(100))
        disk.lags = True
        disk.free = 10**6 + 512 * KB - 100 * KB
        for _ in range(3):
            await store.trim()
            assert put(store, "more") == [False], "it would be less than is asked for, as far as can be seen"
        assert len(list(folder.rglob("*.val"))) == 92, "6.25 chunks, and one"
        disk.free = 10**9
        assert put(store, "more") == [True]


def test_while_the_table_cannot_be_told_other_files_go_each_time_and_none_counts_twice(
    folder: Path, room_for: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def full(*_: object) -> Iterator[None]:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_FULL, "SQLITE_FULL"
        raise error
        yield

    def left() -> int:
        return len(list(folder.rglob("*.val")))

    with open_chunk_store(folder, size=room_for(44)) as store:
        assert all(put(store, *range(40)))
        eviction = store._eviction
        with monkeypatch.context() as patch:
            patch.setattr(eviction.table, "writing", full)
            for chunks in (22, 4):
                assert eviction.sacrifice(18 * len(CHUNK))
                assert (left(), store.evicted) == (chunks, 40 - chunks)
        large = CHUNK * 30
        assert store.put("large", large, hashlib.sha256(large).digest())
        assert left() == 4 + 1, "what is gone makes room, once it can be said"
        assert store.evicted == 36
        with monkeypatch.context() as patch:
            patch.setattr(eviction.table, "writing", full)
            assert eviction.sacrifice(10**9)
            assert not eviction.sacrifice(10**9), "there is nothing left"
        assert store.evicted == 36 + 5


def test_room_that_the_cache_needs_besides_chunks_is_made_whatever_shall_stay_free(
    folder: Path, disk: Disk
) -> None:
    with open_chunk_store(folder, size=10**9) as store:
        put(store, *range(100))
        disk.free = 50 * KB
        store.free(200 * KB)
        assert disk.free >= 200 * KB
        assert 80 < len(list(folder.rglob("*.val"))) < 95
        store.free(200 * KB)
        assert disk.free < 220 * KB, "it was free already"
        store.free(10**9)
        assert list(folder.rglob("*.val")) == []


# -------------------- the order


async def test_the_least_recently_read_goes_first_in_whichever_process_that_was(
    folder: Path, room_for: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsmount.cache.eviction._NOTE_SECONDS", 0.0)
    size = room_for(14)
    with open_chunk_store(folder, size=size) as store, open_chunk_store(folder, size=size) as other:
        put(store, *"abcdefgh")
        await other.open("a", SHA256)
        await other.open("d", SHA256)
        other._hot.close()
        put(store, *"ijklmnop")
        assert stored(store, *"abcdefgh").startswith("ad")
        assert stored(store, *"bc") == ""


class Clock:
    """The time of day, as somebody sets it."""

    def __init__(self) -> None:
        self.ahead_seconds = 0.0
        self._true = time.time

    def __call__(self) -> float:
        return self._true() + self.ahead_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


def test_what_was_stored_while_the_clock_was_ahead_does_not_outlive_what_is_stored_later(
    folder: Path, room_for: Callable[[int], int], clock: Clock
) -> None:
    with open_chunk_store(folder, size=room_for(40)) as store:
        clock.ahead_seconds = 365 * 24 * 3600.0
        assert all(put(store, *(f"old/{number}" for number in range(30))))
        clock.ahead_seconds = 0.0
        new = [f"new/{number}" for number in range(60)]
        for key in new:
            assert put(store, key) == [True]
            assert store.stored([key]) == [True]
        assert not any(store.stored([f"old/{number}" for number in range(30)]))
        assert store.stored(new[-30:]) == [True] * 30


async def test_what_was_used_while_the_clock_was_ahead_goes_before_what_is_used_later(
    folder: Path, room_for: Callable[[int], int], clock: Clock
) -> None:
    with open_chunk_store(folder, size=room_for(40)) as store:
        put(store, *range(30))
        clock.ahead_seconds = 3600.0
        for number in range(30):
            await store.open(str(number), SHA256)
        clock.ahead_seconds = 0.0
        store._hot.close()
        for number in range(30, 70):
            assert put(store, number) == [True]
        assert store.stored([str(number) for number in range(40, 70)]) == [True] * 30


async def test_what_is_open_in_this_process_is_not_evicted_and_all_that_is_open_is_no_more_than_half(
    folder: Path, room_for: Callable[[int], int]
) -> None:
    size = room_for(250)
    keys = [str(number) for number in range(240)]
    with open_chunk_store(folder, size=size) as store:
        put(store, *keys)
        for key in keys:
            await store.open(key, SHA256)
        opened = [key for key in keys if store.hot(key) is not None]
        assert len(opened) == size // 2 // len(CHUNK) < 220
        assert opened == keys[-len(opened) :]
        put(store, *range(1000, 1200))
        assert all(store.stored(opened))
        assert sum(store.stored(keys)) < 220


async def test_what_is_open_and_has_not_been_read_for_seconds_is_closed_and_evicted(
    folder: Path, room_for: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_chunk_store(folder, size=room_for(20)) as store:
        put(store, *"abcdef")
        for key in "abcdef":
            await store.open(key, SHA256)
        await trio.to_thread.run_sync(lambda: put(store, *range(40)))
        assert stored(store, *"abcdef") == "abcdef", "all of them may be in the middle of being read"
        monkeypatch.setattr("fsmount.cache.hot._IN_USE_SECONDS", 0.0)
        monkeypatch.setattr("fsmount.cache.eviction._PASSED_SECONDS", 0.0)
        store._eviction._begins_at = 0.0
        await trio.to_thread.run_sync(lambda: put(store, *range(40)))
        assert stored(store, *"abcdef") == ""
        assert store._hot.names() == frozenset()


async def test_what_is_pinned_is_not_evicted_until_it_no_longer_is(
    folder: Path, room_for: Callable[[int], int], caplog: pytest.LogCaptureFixture
) -> None:
    with open_chunk_store(folder, size=room_for(8)) as store:
        keys = [f"sha256-{layer}/{number}" for layer in "ab" for number in range(3)]
        put(store, *keys)
        store.pin(frozenset(["sha256-a", "sha256-b-other"]))
        put(store, *range(40))
        assert store.stored(keys) == [True] * 3 + [False] * 3
        store.pin(frozenset())
        put(store, *range(40))
        assert store.stored(keys) == [False] * 6
    assert caplog.text == ""


async def test_if_all_is_pinned_or_in_use_nothing_is_stored_and_the_log_says_so_once(
    folder: Path,
    room_for: Callable[[int], int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fsmount.cache.trouble._QUIET_SECONDS", 0.0)
    with open_chunk_store(folder, size=room_for(8)) as store:
        store.pin(frozenset("abcdefghij"))
        kept = put(store, *"abcdefghij")
        assert kept == sorted(kept, reverse=True) and 5 <= sum(kept) <= 8
        assert put(store, *range(20)) == [False] * 20
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        assert "in use or pinned" in caplog.text and caplog.text.count("serving without caching") == 1
        assert store.trouble is not None
        store.pin(frozenset())
        assert put(store, *"xyz") == [True] * 3
        assert store.trouble is None
        assert caplog.messages[1:] == [f"{folder} takes chunks again"]


def test_while_some_may_not_be_evicted_not_all_of_them_are_looked_at_for_every_chunk(
    folder: Path, room_for: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = 0
    with open_chunk_store(folder, size=room_for(400)) as store:
        store.pin(frozenset(["pinned/"]))
        put(store, *(f"pinned/{number}" for number in range(300)), *range(90))
        least_used = store._eviction.table.least_used

        def count(*arguments: object) -> object:
            nonlocal looked_at
            rows = least_used(*arguments)  # type: ignore[arg-type]
            looked_at += len(rows)
            return rows

        monkeypatch.setattr(store._eviction.table, "least_used", count)
        put(store, *(f"more/{number}" for number in range(60)))
        assert looked_at < 60 * 16 + 2 * 300


# -------------------- reservations


def test_what_is_being_written_counts_and_ends_with_the_process_that_does_so(
    folder: Path, room_for: Callable[[int], int], tmp_path: Path
) -> None:
    size = room_for(10)
    program = """
import os, sys
from pathlib import Path
from fsmount.cache.chunks import open_chunk_store
with open_chunk_store(Path(sys.argv[1]), size=int(sys.argv[2])) as store:
    name = store._eviction.reserve(4 * 16384)
    path = Path(sys.argv[1]) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half")
    print(name, flush=True)
    sys.stdin.read()
    os._exit(9)
"""
    with open_chunk_store(folder, size=size) as store:
        child = subprocess.Popen(
            [sys.executable, "-c", program, folder, str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None and child.stdin is not None
        name = child.stdout.readline().strip()
        put(store, *range(20))
        assert len(list(folder.rglob("*.val"))) <= 7
        assert (folder / name).exists()
        child.stdin.close()
        child.wait()
        child.stdout.close()
        put(store, *range(20, 40))
        assert not (folder / name).exists()
        assert len(list(folder.rglob("*.val"))) > 7
        assert store._eviction.table.reservations() == []


def test_what_could_not_be_written_is_reserved_no_longer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_chunk_store(folder, size=10**9) as store:

        def fail(*_: object) -> None:
            raise OSError(5, "Input/output error")

        volume = store.volume
        with monkeypatch.context() as patch:
            patch.setattr("fsmount.cache.chunks.write_file", fail)
            assert put(store, "a") == [False]
        assert store.volume == volume
        assert store._eviction.table.reservations() == []


def test_threads_that_store_at_once_stay_within_the_size(
    folder: Path, room_for: Callable[[int], int]
) -> None:
    size = room_for(200)
    watch = Watch(folder)
    with open_chunk_store(folder, size=size) as store:
        threads = [
            threading.Thread(target=put, args=(store, *(f"{one}/{number}" for number in range(100))))
            for one in range(6)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            watch.look()
        assert store.trouble is None
    assert size // 2 < watch.most <= size


@pytest.fixture(autouse=True)
def _nothing_left(folder: Path) -> Iterator[None]:
    yield
    assert not folder.with_name("chunks.damaged").exists()
