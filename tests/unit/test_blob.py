"""Parts of a blob are asked for once, and a server without ranges for nothing more meanwhile."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import trio

from fsmount import blob as module
from fsmount.blob import Blob
from fsmount.cache.chunks import open_chunk_store
from fsmount.errors import Corrupt, NoSpace, Unreachable
from fsmount.oci.reference import Reference
from fsmount.registry.open import Sources
from fsmount.registry.retry import Retry
from tests.fakes.registry import FakeRegistry, Network, Reply, cut, descriptor_of

PIECE = 4096
DATA = Random(1).randbytes(40 * PIECE + 100)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_SIZE", PIECE)


@pytest.fixture
def fake() -> FakeRegistry:
    fake = FakeRegistry()
    fake.put_blob(DATA)
    return fake


@asynccontextmanager
async def opened(fake: FakeRegistry, folder: Path) -> AsyncIterator[Blob]:
    network = Network({fake.host: fake})
    with open_chunk_store(folder, size=10**9) as chunks:
        async with (
            Sources(transport=network.transport, retry=Retry(tries=1)) as sources,
            trio.open_nursery() as nursery,
        ):
            source = sources.open(Reference(fake.host, "team/web"))
            yield Blob(descriptor_of(DATA), source, chunks, nursery)
            nursery.cancel_scope.cancel()
    assert network.open_bodies == 0


def without_ranges(fake: FakeRegistry) -> None:
    fake.then("GET", "/blobs/", Reply(200, {}, DATA))


async def read_all(blob: Blob, readers: int = 1000) -> None:
    """Many readers at once, all over the blob, each of whom gets the right bytes."""
    random = Random(2)

    async def read(offset: int, size: int) -> None:
        assert await blob.read_at(offset, size) == DATA[offset : offset + size]

    async with trio.open_nursery() as nursery:
        for _ in range(readers):
            nursery.start_soon(read, random.randrange(len(DATA)), random.randrange(2 * PIECE))


async def test_a_thousand_readers_make_no_more_requests_than_there_are_pieces(
    fake: FakeRegistry, tmp_path: Path
) -> None:
    async with opened(fake, tmp_path) as blob:
        await read_all(blob)
    ranges = [request.headers["range"] for request in fake.seen("GET", "/blobs/")]
    assert len(ranges) == len(set(ranges)) <= 41


async def test_a_server_that_ignores_ranges_is_asked_once_for_all_readers(
    fake: FakeRegistry, tmp_path: Path
) -> None:
    for _ in range(100):
        without_ranges(fake)
    async with opened(fake, tmp_path) as blob:
        # One that has begun; whoever comes while it comes asks for nothing.
        assert await blob.read_at(5 * PIECE, 10) == DATA[5 * PIECE : 5 * PIECE + 10]
        await read_all(blob)
    assert len(fake.seen("GET", "/blobs/")) == 1


async def test_the_whole_blob_is_taken_to_its_end_although_its_readers_have_left(
    fake: FakeRegistry, tmp_path: Path
) -> None:
    without_ranges(fake)
    async with opened(fake, tmp_path) as blob:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(blob.read_at, 39 * PIECE, 1)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert await blob.read_at(39 * PIECE, 1) == DATA[39 * PIECE : 39 * PIECE + 1]
    assert len(fake.seen("GET", "/blobs/")) == 1


async def test_parts_end_where_the_blob_ends(fake: FakeRegistry, tmp_path: Path) -> None:
    async with opened(fake, tmp_path) as blob:
        assert await blob.read_at(len(DATA) - 5, 100) == DATA[-5:]
        assert await blob.read_at(len(DATA), 100) == b""
        assert await blob.read_at(PIECE - 3, 6) == DATA[PIECE - 3 : PIECE + 3]


async def test_a_whole_blob_with_another_digest_reaches_every_waiter_and_nothing_of_it_stays(
    fake: FakeRegistry, tmp_path: Path
) -> None:
    wrong = bytes([DATA[0] ^ 1]) + DATA[1:]
    fake.then("GET", "/blobs/", Reply(200, {}, wrong))
    async with opened(fake, tmp_path) as blob:
        with pytest.raises(Corrupt):
            # Served from what had come, or refused; but in the end refused.
            for _ in range(100):
                await blob.read_at(40 * PIECE, 100)
                await blob.read_at(0, 10)
        assert await blob.read_at(0, 10) == DATA[:10]


async def test_what_breaks_off_is_told_and_asked_for_again(fake: FakeRegistry, tmp_path: Path) -> None:
    fake.then("GET", "/blobs/", cut(100))
    async with opened(fake, tmp_path) as blob:
        with pytest.raises(Unreachable):
            await blob.read_at(0, PIECE)
        assert await blob.read_at(0, PIECE) == DATA[:PIECE]


async def test_a_full_disk_takes_nothing_from_readers(
    fake: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(*arguments: object, **options: object) -> None:
        raise NoSpace("full")

    async with opened(fake, tmp_path) as blob:
        monkeypatch.setattr(blob._chunks, "put", put)
        await read_all(blob, 50)


async def test_a_descriptor_of_another_size_is_corrupt(fake: FakeRegistry, tmp_path: Path) -> None:
    async with opened(fake, tmp_path) as blob:
        wrong = Blob(
            replace(descriptor_of(DATA), size=len(DATA) + 1), blob._source, blob._chunks, blob._nursery
        )
        with pytest.raises(Corrupt):
            await wrong.read_at(0, 10)
