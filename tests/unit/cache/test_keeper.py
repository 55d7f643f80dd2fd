"""What is done in the background: the bounds are kept, uses are written down, and what was left behind goes away."""

import hashlib
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import trio
import trio.testing

from fsmount.cache.chunks import ChunkStore, open_chunk_store
from fsmount.cache.folder import whole_file
from fsmount.cache.keeper import Keeper
from fsmount.cache.room import PARTIAL

CHUNK = os.urandom(16 * 1024)
SHA256 = hashlib.sha256(CHUNK).digest()
OLD = time.time() - 2 * 24 * 3600


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "chunks"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsmount.cache.keeper._PAUSE_SECONDS", 0.0)


class Rounds:
    """How often everything was done."""

    count = 0

    async def pass_by(self, number: int = 3) -> None:
        stop = self.count + number
        await until(lambda: self.count >= stop)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Rounds:
    """As if a minute had passed, again and again."""
    monkeypatch.setattr("fsmount.cache.keeper._ROUND_SECONDS", 0.0)
    monkeypatch.setattr("fsmount.cache.keeper._ORPHANS_SECONDS", 0.0)
    rounds, look = Rounds(), Keeper._look_for_leftovers

    async def count(keeper: Keeper) -> None:
        await look(keeper)
        rounds.count += 1

    monkeypatch.setattr(Keeper, "_look_for_leftovers", count)
    return rounds


def put(store: ChunkStore, *keys: object) -> None:
    for key in keys:
        assert store.put(str(key), CHUNK, SHA256)


def files(folder: Path) -> list[Path]:
    # Folders may go meanwhile, which rglob does not bear.
    return [Path(base, name) for base, _, names in os.walk(folder) for name in names if name.endswith(".val")]


@asynccontextmanager
async def kept(store: ChunkStore) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.keep_room)
        yield
        nursery.cancel_scope.cancel()


async def until(condition: object) -> None:
    """Returns when a condition holds."""
    assert callable(condition)
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - of files
            await trio.sleep(0.01)


def plant(path: Path, *, at: float = OLD) -> Path:
    """A file that nobody knows, last written then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"left behind")
    os.utime(path, (at, at))
    return path


async def test_when_a_chunk_found_no_space_the_bounds_are_looked_after_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_chunk_store(folder, size=10**9) as store:
        put(store, *range(50))
        async with kept(store):
            await trio.testing.wait_all_tasks_blocked(0.1)
            monkeypatch.setattr(store._room, "size", store.volume - 20 * len(CHUNK))

            def full(*_: object) -> None:
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr("fsmount.cache.chunks.write_file", full)
                assert not store.put("no", CHUNK, SHA256)
            await until(lambda: store.volume <= store._room.size)
        assert 20 < len(files(folder)) <= 32


@pytest.mark.usefixtures("rounds")
async def test_what_is_read_and_read_is_not_the_first_to_go_for_another_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsmount.cache.eviction._NOTE_SECONDS", 1e9)
    with open_chunk_store(folder, size=10**9) as store:
        put(store, *range(50))
        await store.open("3", SHA256)
        put(store, *range(50, 60))
        table = store._eviction.table

        def latest() -> str:
            return max(table.following(0, 100), key=lambda row: row.used_at).key

        async with kept(store):
            await until(lambda: latest() == "3")
            put(store, "later")
            assert latest() == "later"
            assert store.hot("3") is not None
            await until(lambda: latest() == "3")


@pytest.mark.usefixtures("rounds")
async def test_what_is_open_and_evicted_by_others_is_closed_when_nobody_reads_it(folder: Path) -> None:
    with open_chunk_store(folder, size=10**9) as store:
        put(store, *"ab")
        for key in "ab":
            await store.open(key, SHA256)
        store.hold("c", CHUNK)
        with open_chunk_store(folder, size=10**9) as other:
            await other.drop(["a"])
        async with kept(store):
            await until(lambda: "a" not in store._hot.names())
        assert store._hot.names() == {"b", "c"}


@pytest.mark.usefixtures("rounds")
async def test_a_fault_that_is_over_is_told_to_be_over_although_nobody_stores_anything(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsmount.cache.trouble._QUIET_SECONDS", 0.0)
    monkeypatch.setattr("fsmount.cache.chunks._PAUSE_SECONDS", 0.0)
    with open_chunk_store(folder, size=10**9) as store:
        store._fail(OSError(5, "Input/output error"))
        assert store.trouble is not None
        async with kept(store):
            await until(lambda: store.trouble is None)


@pytest.mark.usefixtures("rounds")
async def test_what_was_used_in_the_future_counts_as_used_now(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_chunk_store(folder, size=10**9) as store:
        with monkeypatch.context() as patch:
            true = time.time
            patch.setattr(time, "time", lambda: true() + 365 * 24 * 3600)
            put(store, *range(50))
        put(store, "later")
        rows = store._eviction.table.following
        async with kept(store):
            await until(lambda: max(row.used_at for row in rows(0, 100)) < time.time() + 60)
        assert len(rows(0, 100)) == 51


# -------------------- what was left behind


async def test_old_files_of_chunks_that_no_row_names_are_removed_and_no_others(
    folder: Path, rounds: Rounds
) -> None:
    with open_chunk_store(folder, size=10**9) as store:
        put(store, *range(50))
        for path in files(folder):
            os.utime(path, (OLD, OLD))
        known = set(files(folder))
        orphans = [plant(folder / "00/abcd.val"), plant(folder / "7f/3c/abcd.val"), plant(folder / "ff/half")]
        young = plant(folder / "00/ef.val", at=time.time() - 60)
        name = store._eviction.reserve(1000)
        reserved = plant(folder / name)
        async with kept(store):
            await rounds.pass_by(256)
        assert not any(path.exists() for path in orphans)
        assert set(files(folder)) == known | {young, reserved}
        for number in range(50):
            assert await store.open(str(number), SHA256) is not None


async def test_one_folder_of_256_is_looked_at_in_a_minute(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsmount.cache.keeper._ORPHANS_SECONDS", 0.0)
    looked_at: list[str] = []
    monkeypatch.setattr("fsmount.cache.keeper.remove_orphans", lambda *args: looked_at.append(args[1]))
    with open_chunk_store(folder, size=10**9) as store:
        for _ in range(300):
            await store._keeper._look_for_leftovers()
    assert sorted(looked_at[:256]) == [f"{number:02x}" for number in range(256)]
    assert looked_at[256:] == looked_at[:44]


@pytest.mark.usefixtures("rounds")
async def test_what_others_were_making_beside_the_chunks_is_removed_after_a_day(
    folder: Path, tmp_path: Path
) -> None:
    beside = [tmp_path / name for name in ("layers", "trees", "manifests", "absent")]
    old = [plant(path / f"{PARTIAL}{path.name}") for path in beside[:3]]
    young = plant(tmp_path / f"layers/{PARTIAL}young", at=time.time() - 3600)
    whole = plant(tmp_path / "layers/sha256-1.sqlite")
    with open_chunk_store(folder, size=10**9, beside=beside) as store:
        async with kept(store):
            await until(lambda: not any(path.exists() for path in old))
    assert young.exists() and whole.exists()


@pytest.mark.usefixtures("rounds")
async def test_what_a_living_process_is_making_stays_also_if_the_clock_jumps_by_days(
    folder: Path, tmp_path: Path
) -> None:
    beside = tmp_path / "layers"
    dead = plant(beside / f"{PARTIAL}dead")
    with (
        open_chunk_store(folder, size=10**9, beside=[beside]) as store,
        whole_file(beside / "sha256-1.sqlite") as partial,
    ):
        with closing(sqlite3.connect(partial)) as connection:
            connection.execute("CREATE TABLE Entries (name)")
            connection.commit()
        # As if the clock had been two days behind when it was begun.
        os.utime(partial, (OLD, OLD))
        async with kept(store):
            await until(lambda: not dead.exists())
        assert partial.exists()
    assert os.listdir(beside) == ["sha256-1.sqlite"]


async def test_what_lay_under_a_lost_table_is_removed_in_the_background_and_takes_no_room_from_what_comes(
    folder: Path, tmp_path: Path
) -> None:
    with open_chunk_store(folder, size=10**9) as store:
        put(store, *range(50))
    (folder / "cache.db").unlink()
    with open_chunk_store(folder, size=10**9) as store:
        left = len(files(tmp_path))
        assert left == 50
        for number in range(20):
            put(store, number)
            # One goes for each that comes; or some of the old table.
            assert len(files(tmp_path)) <= left + 4
        async with kept(store):
            await until(lambda: os.listdir(tmp_path) == ["chunks"])
        assert len(files(tmp_path)) == 20


async def test_a_disk_that_fails_does_not_end_it(
    folder: Path, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_chunk_store(folder, size=10**9) as store:
        put(store, *range(20))
        async with kept(store):
            with monkeypatch.context() as patch:

                def fail(*_: object) -> None:
                    raise OSError(5, "Input/output error")

                patch.setattr("fsmount.cache.room.Room.free", fail)
                patch.setattr("fsmount.cache.eviction.Eviction.release_dead", fail)
                await rounds.pass_by()
            size = store.volume - 10 * len(CHUNK)
            monkeypatch.setattr(store._room, "size", size)
            await until(lambda: store.volume <= size)


@pytest.fixture(autouse=True)
def _no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert "nobody foresaw" not in caplog.text
