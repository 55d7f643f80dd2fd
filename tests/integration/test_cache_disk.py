"""The cache on a real disk: one that others fill, processes that are killed, and bytes that change where they lie."""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fsmount.cache.chunks import ChunkStore, open_chunk_store
from tests import peers
from tests.fakes.tar import Member, archive
from tests.integration.program import fsmount, mounted, wait_until

pytestmark = pytest.mark.integration

KB, MB = 1024, 1024 * 1024


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own at a folder."""
    if os.geteuid():
        pytest.skip("only root may mount a small disk")
    folder.mkdir(exist_ok=True)
    peers.run("mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", folder)
    try:
        yield folder
    finally:
        peers.run("umount", "--lazy", folder)


@contextmanager
def filled(disk: Path, *, left: int = 0) -> Iterator[None]:
    """Somebody else takes all that is free of a disk, but for so many bytes."""
    theirs = disk / "theirs"
    status = os.statvfs(disk)
    with theirs.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_bsize - left))
    try:
        yield
    finally:
        theirs.unlink()


def content(number: int) -> bytes:
    return random.Random(number).randbytes(20 * KB + number % 7 * 9 * KB)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def put(store: ChunkStore, number: int) -> bool:
    data = content(number)
    return store.put(str(number), data, sha256(data))


async def read(store: ChunkStore, number: int) -> bytes | None:
    descriptor = await store.open(str(number), sha256(content(number)))
    return None if descriptor is None else store.read(descriptor, 10**6, 0)


# -------------------- a disk that others fill


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsmount.cache.chunks._PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("fsmount.cache.trouble._QUIET_SECONDS", 0.0)


async def test_on_a_disk_that_is_smaller_than_the_cache_the_oldest_go_for_what_comes(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "16m") as disk, open_chunk_store(disk, size=10**9) as store:
        for number in range(1000):
            assert put(store, number)
        assert [await read(store, number) for number in range(990, 1000)] == [
            content(number) for number in range(990, 1000)
        ]
        assert await read(store, 0) is None
        assert 150 < len(list(disk.rglob("*.val"))) < 350


async def test_on_a_disk_that_others_have_filled_room_is_made_and_nothing_is_lost_but_the_oldest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", "16m") as disk, open_chunk_store(disk, size=10**9) as store:
        for number in range(100):
            assert put(store, number)
        for left in (100 * KB, 0):
            with filled(disk, left=left):
                assert put(store, 1000 + left)
                assert await read(store, 1000 + left) == content(1000 + left)
            assert await read(store, 99) == content(99)
        assert await read(store, 0) is None
    assert caplog.text == ""


async def test_a_full_disk_without_anything_to_evict_stores_nothing_and_takes_chunks_again_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    with small_disk(tmp_path / "disk", "16m") as disk, open_chunk_store(disk, size=10**9) as store:
        with filled(disk):
            assert [put(store, number) for number in range(20)] == [False] * 20
            store.hold("held", content(1))
            descriptor = store.hot("held")
            assert descriptor is not None and store.read(descriptor, 10**6, 0) == content(1)
        assert [put(store, number) for number in range(20)] == [True] * 20
    assert caplog.messages == [
        f"no space left for {disk}: serving without caching",
        f"{disk} takes chunks again",
    ]


async def test_a_disk_that_fills_up_at_any_byte_leaves_a_cache_that_is_sound(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        for seed in range(12):
            rng = random.Random(seed)
            with open_chunk_store(disk, size=10**9) as store, filled(disk, left=rng.randrange(300 * KB)):
                for _ in range(15):
                    put(store, rng.randrange(100))
                    found = await read(store, number := rng.randrange(100))
                    assert found in (None, content(number))
            with open_chunk_store(disk, size=10**9) as store:
                assert put(store, seed)
                await in_line(disk, store)


def test_a_cache_opens_on_a_disk_that_is_full_to_the_last_byte(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        with open_chunk_store(disk, size=10**9) as store:
            for number in range(100):
                put(store, number)
        with filled(disk), open_chunk_store(disk, size=10**9) as store:
            assert sum(store.stored([str(number) for number in range(100)])) > 60
            assert put(store, 100)


# -------------------- processes that are killed

_STORING = """
import hashlib, random, sys, threading
from pathlib import Path
from fsmount.cache.chunks import open_chunk_store
from tests.integration.test_cache_disk import content, put

def run(store, seed):
    rng = random.Random(seed)
    while True:
        number = rng.randrange(300)
        put(store, number)
        loaded = store._load(str(rng.randrange(300)), None)

with open_chunk_store(Path(sys.argv[1]), size=int(sys.argv[2])) as store:
    threads = [threading.Thread(target=run, args=(store, f"{sys.argv[3]} {n}")) for n in range(3)]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    for thread in threads:
        thread.join()
"""


async def in_line(folder: Path, store: ChunkStore) -> None:
    """Every file has a row, every chunk that has a row can be read, and what is counted is what is there."""
    eviction = store._eviction
    eviction.release_dead()
    for row in eviction.table.following(0, 10_000):
        found = await read(store, int(row.key))
        assert found in (None, content(int(row.key)))
        assert found is not None or store.stored([row.key]) == [False]
    rows = {row.filename: row.size for row in eviction.table.following(0, 10_000)}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.val")} == rows.keys()
    assert eviction.table.totals() == (sum(rows.values()), 0)
    assert eviction.table.problems() == []


@pytest.mark.slow
async def test_after_kills_at_any_instant_the_cache_opens_at_once_and_is_as_it_says(tmp_path: Path) -> None:
    folder = tmp_path / "chunks"
    folder.mkdir()
    size = 12 * MB
    rng = random.Random(5)
    for seed in range(20):
        child = subprocess.Popen(
            [sys.executable, "-c", _STORING, folder, str(size), str(seed)], stdout=subprocess.PIPE
        )
        with child:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            time.sleep(rng.random() * 0.3)  # noqa: ASYNC251 - nobody else is there
            child.kill()
        assert child.returncode == -signal.SIGKILL
        # Others go on beside what it was about to do.
        with open_chunk_store(folder, size=size) as store:
            assert put(store, rng.randrange(300))
            taken = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
            assert taken <= size
            await in_line(folder, store)
            assert len(store._eviction.table.following(0, 1000)) > 30
    assert not folder.with_name("chunks.damaged").exists()


# -------------------- a mount

_FILES = {b"large": random.Random(1).randbytes(9_000_000), b"small": b"small\n" * 100}
_OTHERS = {b"large": random.Random(2).randbytes(9_000_000), b"small": b"other\n" * 100}
_ANY_DISK = "[cache]\nmin_free = 0\n"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tags of a layer each: gzip, zstd, and another one in gzip."""
    layout = tmp_path_factory.mktemp("image") / "layout"
    tar = archive(*(Member(name, data) for name, data in _FILES.items()))
    other = archive(*(Member(name, data) for name, data in _OTHERS.items()))
    peers.tar_layer_image(layout, "gzip", [peers.pack(tar, level=1)])
    peers.tar_layer_image(layout, "zstd", [peers.pack(tar, "zstd")])
    peers.tar_layer_image(layout, "other", [peers.pack(other, level=1)])
    return layout


def check(folder: Path, files: dict[bytes, bytes] = _FILES) -> None:
    for name, data in files.items():
        assert (folder / os.fsdecode(name)).read_bytes() == data


def forget_pages(folder: Path) -> None:
    """What is read next is read through the mount."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@pytest.mark.slow
def test_readers_of_a_mount_whose_cache_disk_is_full_get_every_byte_and_the_log_has_a_line_for_it(
    layout: Path, tmp_path: Path
) -> None:
    log, web = tmp_path / "mount.log", f"web=oci-layout:{layout}"
    with small_disk(tmp_path / "cache", "32m") as disk:
        with mounted(tmp_path, web, config=_ANY_DISK) as path:
            for tag in ("gzip", "zstd"):
                assert sorted(os.listdir(path / "web" / tag)) == ["large", "small"]
                check(path / "web" / tag)
        for chunk in disk.rglob("*.val"):
            chunk.unlink()  # as if they had been evicted, so that nothing can go
        free = filled(disk, left=300 * KB)
        with contextlib.ExitStack() as theirs:
            theirs.enter_context(free)
            with mounted(tmp_path, web, config=_ANY_DISK, flags=("--log-file", log)) as path:
                for _ in range(2):
                    for tag in ("gzip", "zstd"):
                        check(path / "web" / tag)
                        forget_pages(path / "web" / tag)
                said = log.read_text()
                assert said.count("serving without caching") == 1 and "Traceback" not in said
                assert list(disk.rglob("*.val")) == []
                theirs.close()
                # By itself, without anybody reading.
                assert wait_until(lambda: "takes chunks again" in log.read_text(), seconds=60)
                assert log.read_text().count("takes chunks again") == 1
                assert wait_until(lambda: len(list(disk.rglob("*.val"))) > 4)


@pytest.mark.slow
def test_a_tag_that_nobody_knows_yet_is_shown_from_a_full_disk_if_something_can_go_for_it(
    layout: Path, tmp_path: Path
) -> None:
    with (
        small_disk(tmp_path / "cache", "32m") as disk,
        mounted(
            tmp_path,
            f"web=oci-layout:{layout}",
            config=_ANY_DISK,
            flags=("--log-file", tmp_path / "mount.log"),
        ) as path,
    ):
        check(path / "web/gzip")
        time.sleep(6)  # until none of it is being read
        with filled(disk):
            assert wait_until(lambda: os.statvfs(disk).f_bavail)
            assert sorted(os.listdir(path / "web/other")) == ["large", "small"]
            check(path / "web/other", _OTHERS)


def test_chunks_that_are_flipped_cut_or_deleted_under_a_mount_cost_no_reader_a_wrong_byte(
    layout: Path, tmp_path: Path
) -> None:
    rng = random.Random(3)
    with mounted(tmp_path, f"web=oci-layout:{layout}") as path:
        for tag in ("gzip", "zstd"):
            check(path / "web" / tag)
        for _ in range(10):
            for chunk in (tmp_path / "cache/chunks").rglob("*.val"):
                with suppress(FileNotFoundError):
                    damage(chunk, rng)
            for tag in ("gzip", "zstd"):
                forget_pages(path / "web" / tag)
                check(path / "web" / tag)


def damage(path: Path, rng: random.Random) -> None:
    """Does to a file what a disk, or a careless person, may do."""
    match rng.randrange(4):
        case 0:
            path.unlink()
        case 1:
            os.truncate(path, rng.randrange(path.stat().st_size))
        case 2:
            with path.open("r+b") as file:
                file.seek(rng.randrange(path.stat().st_size))
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))


def test_a_mount_and_commands_share_a_cache_that_is_too_small_for_all_of_them(
    layout: Path, tmp_path: Path
) -> None:
    config = '[cache]\nsize = "16 MB"\n'
    with mounted(tmp_path, f"web=oci-layout:{layout}", config=config) as path:
        options = "--config", tmp_path / "config.toml"
        for number in range(3):
            for tag, files in (("gzip", _FILES), ("other", _OTHERS)):
                fsmount(
                    "snapshot",
                    f"oci-layout:{layout}:{tag}",
                    tmp_path / f"{tag}{number}",
                    *options,
                    cache=tmp_path / "cache",
                )
                check(tmp_path / f"{tag}{number}", files)
                forget_pages(path / "web" / tag)
                check(path / "web" / tag, files)
        chunks = (tmp_path / "cache/chunks").rglob("*")
        assert wait_until(lambda: sum(one.stat().st_size for one in chunks if one.is_file()) <= 16_000_000)
