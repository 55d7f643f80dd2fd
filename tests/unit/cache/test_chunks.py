"""The store of chunks: what is read back is what was stored, or nothing; and nothing foreign is ever believed."""

import hashlib
import os
import pickle
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from fsmount.cache.chunks import ChunkStore, open_chunk_store

GOOD, BAD = b"good" * 2500, b"evil" * 2500
SHA256 = hashlib.sha256(GOOD).digest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "chunks"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def store(folder: Path) -> Iterator[ChunkStore]:
    with open_chunk_store(folder, size=10**9) as store:
        yield store


def put(store: ChunkStore, key: str, data: bytes | memoryview) -> None:
    assert store.put(key, data, hashlib.sha256(data).digest())


def files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.val"))


def open_chunks() -> int:
    """How many descriptors of chunks this process has."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the listing's own
        count += ".val" in target or "fsmount-chunk" in target
    return count


def content(descriptor: int | None) -> bytes | None:
    return None if descriptor is None else os.pread(descriptor, 10**6, 0)


async def test_a_chunk_is_read_back_by_this_process_and_by_others(folder: Path, store: ChunkStore) -> None:
    put(store, "a", memoryview(GOOD))
    assert store.hot("a") is None
    assert content(await store.open("a", SHA256)) == content(store.hot("a")) == GOOD
    assert await store.open("b", SHA256) is None
    assert sum(store.stored(["a", "b"])) == 1
    with open_chunk_store(folder, size=10**9) as other:
        assert content(await other.open("a", SHA256)) == GOOD


def test_the_digest_that_a_chunk_was_stored_with_is_known_to_all_processes_until_it_is_gone(
    folder: Path, store: ChunkStore
) -> None:
    assert store.recorded("a") is None
    put(store, "a", BAD)
    put(store, "a", GOOD)
    put(store, "b", BAD)
    with open_chunk_store(folder, size=10**9) as other:
        assert [one.recorded("a") for one in (store, other)] == [SHA256, SHA256]
        assert other.recorded("b") == hashlib.sha256(BAD).digest()
    for path in files(folder):
        path.unlink()
    assert store.recorded("a") is None


async def test_the_digest_of_a_chunk_is_not_that_of_what_the_disk_made_of_it(
    folder: Path, store: ChunkStore
) -> None:
    put(store, "a", GOOD)
    files(folder)[0].write_bytes(BAD)
    with open_chunk_store(folder, size=10**9) as other:
        assert other.recorded("a") == SHA256
        assert await other.open("a") is None
        assert other.recorded("a") is None, "it was dropped"
    put(store, "a", GOOD)
    await store.drop(["a"])
    assert store.recorded("a") is None


@pytest.mark.parametrize("data", [BAD, GOOD[:-1], b""])
async def test_a_chunk_of_another_digest_counts_as_absent_and_is_dropped(
    folder: Path, store: ChunkStore, data: bytes
) -> None:
    put(store, "a", GOOD)
    files(folder)[0].write_bytes(data)
    with open_chunk_store(folder, size=10**9) as other:
        assert await other.open("a", SHA256) is None
        assert other.hot("a") is None
    assert files(folder) == []
    put(store, "a", GOOD)
    assert content(await store.open("a", SHA256)) == GOOD


async def test_what_another_process_has_stored_over_a_chunk_is_checked_too(
    folder: Path, store: ChunkStore
) -> None:
    put(store, "a", GOOD)
    with open_chunk_store(folder, size=10**9) as other:
        put(other, "a", BAD)
    assert await store.open("a", SHA256) is None


async def test_where_nobody_else_knows_a_digest_the_one_beside_the_chunk_tells_damage(
    folder: Path, store: ChunkStore
) -> None:
    put(store, "a", GOOD)
    with open_chunk_store(folder, size=10**9) as other:
        assert content(await other.open("a")) == GOOD
    (path,) = files(folder)
    path.write_bytes(BAD)
    with open_chunk_store(folder, size=10**9) as other:
        assert await other.open("a") is None
        assert other.stored(["a"]) == [False]


async def test_dropping_forgets_the_file_and_the_descriptor(folder: Path, store: ChunkStore) -> None:
    for key in "ab":
        put(store, key, GOOD)
        await store.open(key, SHA256)
    store.hold("c", GOOD)
    await store.drop(["a", "c", "never stored"])
    assert [store.hot(key) is None for key in "abc"] == [True, False, True]
    assert sum(store.stored(["a", "b", "c"])) == len(files(folder)) == open_chunks() == 1


async def test_a_chunk_that_is_held_lives_in_memory(folder: Path, store: ChunkStore) -> None:
    store.hold("a", memoryview(GOOD))
    assert content(store.hot("a")) == GOOD
    assert files(folder) == []


async def test_the_least_recent_descriptors_are_closed_and_closing_closes_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsmount.cache.hot.HOT_CHUNKS", 2)
    with open_chunk_store(folder, size=10**9) as store:
        for key in "abc":
            put(store, key, GOOD)
        for key in "abac":
            await store.open(key, SHA256)
        assert [store.hot(key) is None for key in "abc"] == [False, True, False]
        assert store.hot("a") is not None
        await store.open("b", SHA256)
        assert [store.hot(key) is None for key in "abc"] == [False, False, True]
        assert open_chunks() == 2
    assert open_chunks() == 0


# -------------------- two at once


class Held:
    """A function that a worker thread is in the middle of, until it may go on."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function
        self.entered = trio.Event()
        self.proceed = threading.Event()

    def __call__(self, *args: object, **options: object) -> object:
        result = self._function(*args, **options)
        trio.from_thread.run_sync(self.entered.set)
        self.proceed.wait(60)
        return result


async def test_a_chunk_that_is_dropped_while_it_is_opened_is_not_open_afterwards(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "a", BAD)
    held = Held(store._load)
    monkeypatch.setattr(store, "_load", held)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.open, "a", hashlib.sha256(BAD).digest())
        await held.entered.wait()
        await store.drop(["a"])
        held.proceed.set()
    assert store.hot("a") is None


async def test_a_chunk_that_is_stored_while_a_damaged_one_is_checked_stays(
    folder: Path, store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "a", BAD)
    held = Held(lambda descriptor: "another")
    monkeypatch.setattr("fsmount.cache.chunks.digest_of", held)
    with open_chunk_store(folder, size=10**9) as other:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.open, "a", SHA256)
            await held.entered.wait()
            put(store, "a", GOOD)
            held.proceed.set()
    assert sum(store.stored(["a"])) == 1


def test_a_folder_that_another_process_removes_as_empty_is_made_again(
    folder: Path, store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir
    removed: list[Path] = []

    def make_and_lose(path: Path, *args: object, **options: object) -> None:
        mkdir(path, *args, **options)  # type: ignore[arg-type]
        if not removed:
            removed.append(path)
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", make_and_lose)
    put(store, "a", GOOD)
    assert removed and sum(store.stored(["a"])) == 1


async def test_an_evicted_chunk_that_is_open_stays_readable(folder: Path, store: ChunkStore) -> None:
    put(store, "a", GOOD)
    await store.open("a", SHA256)
    with open_chunk_store(folder, size=1) as other:
        await other.trim()
    assert files(folder) == []
    descriptor = store.hot("a")
    assert descriptor is not None and store.read(descriptor, 10**6, 0) == GOOD


@pytest.mark.parametrize("change", ["flipped", "in secret", "in secret and removed", "cut short", "longer"])
async def test_of_an_open_chunk_that_somebody_changes_on_the_disk_no_byte_is_read(
    folder: Path, store: ChunkStore, change: str
) -> None:
    put(store, "a", GOOD)
    descriptor = await store.open("a", SHA256)
    assert descriptor is not None and store.read(descriptor, 4, 4) == GOOD[4:8]
    (path,) = files(folder)
    match change:
        case "flipped":
            with path.open("r+b") as file:
                file.write(BAD[:1])
        case "in secret" | "in secret and removed":
            status = path.stat()
            path.write_bytes(BAD)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            if change == "in secret and removed":
                path.unlink()
        case "cut short":
            os.truncate(path, len(GOOD) - 1)
        case "longer":
            os.truncate(path, len(GOOD) + 1)
    assert store.read(descriptor, 4, 4) == b""
    await store.drop(["a"])
    put(store, "a", GOOD)
    descriptor = await store.open("a", SHA256)
    assert descriptor is not None and store.read(descriptor, 4, 4) == GOOD[4:8]


async def test_a_chunk_whose_file_is_gone_counts_as_absent_and_its_row_is_removed_when_it_is_met(
    folder: Path, store: ChunkStore
) -> None:
    put(store, "a", GOOD)
    volume = store.volume
    files(folder)[0].unlink()
    assert await store.open("a", SHA256) is None
    assert store.stored(["a"]) == [False]
    assert store.volume < volume


# -------------------- foreign and damaged


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("column", ["value", "filename", "key", "outside"])
async def test_a_pickle_or_a_file_elsewhere_that_somebody_planted_is_never_read(
    folder: Path, store: ChunkStore, tmp_path: Path, column: str
) -> None:
    ran = tmp_path / "ran"
    payload = pickle.dumps(Payload(ran))
    put(store, "a", GOOD)
    with sqlite3.connect(folder / "cache.db") as database:
        if column == "outside":
            database.execute("UPDATE Cache SET filename = '../payload.val'")
            (folder.parent / "payload.val").write_bytes(GOOD)
        elif column == "value":
            database.execute("UPDATE Cache SET mode = 4, filename = NULL, value = ?", (payload,))
        elif column == "filename":
            files(folder)[0].write_bytes(payload)
            database.execute("UPDATE Cache SET mode = 4")
        else:
            database.execute("UPDATE Cache SET key = ?, raw = 0", (payload,))
    database.close()
    with open_chunk_store(folder, size=10**9) as other:
        assert await other.open("a", SHA256) is None
        put(other, "a", GOOD)
        assert content(await other.open("a", SHA256)) == GOOD
        await other.drop(["a"])
    assert not ran.exists()
    pickle.loads(payload)
    assert ran.exists(), "the payload would have shown it"


@pytest.mark.parametrize("value", [1, None, "text", [GOOD]])
def test_nothing_but_bytes_is_stored(folder: Path, store: ChunkStore, value: object) -> None:
    with pytest.raises(TypeError):
        store.put("a", value, SHA256)  # type: ignore[arg-type]
    assert files(folder) == []


@pytest.mark.parametrize("key", [1, b"a", ("a",), None])
def test_keys_are_text(store: ChunkStore, key: object) -> None:
    with pytest.raises(TypeError):
        put(store, key, GOOD)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"garbage!" * 100,
        lambda data: b"garbage!" * 2 + data[16:],
        lambda data: data[: len(data) // 2],
        lambda data: data[:4096] + b"\xff" * (len(data) - 4096),
        lambda data: b"",
    ],
    ids=["no database", "no header", "half of it", "only its first page", "nothing of it"],
)
async def test_a_damaged_table_is_begun_anew_and_what_lay_there_makes_room_for_what_comes(
    folder: Path, damage: Callable[[bytes], bytes]
) -> None:
    with open_chunk_store(folder, size=10**9) as store:
        for number in range(100):
            put(store, str(number), GOOD)
    database = folder / "cache.db"
    for path in folder.glob("cache.db-*"):
        path.unlink()
    database.write_bytes(damage(database.read_bytes()))
    for _ in range(2):
        with open_chunk_store(folder, size=10**9) as store:
            put(store, "a", GOOD)
            assert content(await store.open("a", SHA256)) == GOOD
            assert sum(store.stored([str(number) for number in range(100)])) == 0
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # Each chunk that comes takes the place of an old one.
    assert len(list(folder.parent.rglob("*.val"))) <= 100
    with open_chunk_store(folder, size=10**9) as store:
        await store.trim()
    assert [path.name for path in folder.parent.iterdir()] == ["chunks"]


@pytest.mark.parametrize("what", ["flipped", "deleted", "replaced", "the whole folder"])
async def test_a_table_that_is_damaged_or_lost_while_it_is_in_use_is_begun_anew(
    folder: Path,
    store: ChunkStore,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fsmount.cache.chunks._PAUSE_SECONDS", 0.0)
    for number in range(100):
        put(store, str(number), GOOD)
    await store.open("1", SHA256)
    database = folder / "cache.db"
    store._eviction.table._read("PRAGMA wal_checkpoint(TRUNCATE)", ())
    match what:
        case "flipped":
            with database.open("r+b") as file:
                file.seek(100)
                file.write(b"\xff" * (database.stat().st_size - 100))
        case "deleted":
            for path in folder.glob("cache.db*"):
                path.unlink()
        case "replaced":
            for path in folder.glob("cache.db*"):
                path.unlink()
            with open_chunk_store(folder, size=10**9):
                pass
        case _:
            shutil.rmtree(folder)
    kept = [store.put(f"new/{number}", GOOD, SHA256) for number in range(10)]
    assert kept[-1], "after a few that were not stored"
    assert content(await store.open("new/9", SHA256)) == GOOD
    assert store.hot("1") is not None
    with open_chunk_store(folder, size=10**9) as other:
        assert content(await other.open("new/9", SHA256)) == GOOD


def test_chunks_are_readable_by_their_owner_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        with open_chunk_store(folder, size=10**9) as store:
            put(store, "a", GOOD)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(files(folder)[0].stat().st_mode) == 0o600
