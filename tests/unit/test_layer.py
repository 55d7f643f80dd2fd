"""What a layer promises its readers: one stream for all, never a wrong byte, nothing left of what went wrong."""

import errno
import hashlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount.cache import database
from fsmount.cache.chunks import ChunkStore, open_chunk_store
from fsmount.errors import Corrupt, FsmountError, Invalid, NoSpace, NotFound, Unreachable
from fsmount.ingest import Keep, Portion
from fsmount.layer import Layer
from fsmount.lazy import LayerSpec
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor
from tests.fakes.source import CHUNK, Body, FakeSource, Gate, open_layers, small_chunks
from tests.fakes.tar import Member, archive, sparse

HEAD, TAIL = Random(1).randbytes(3 * CHUNK), Random(2).randbytes(3 * CHUNK + 100)
TAR = archive(Member(b"head", HEAD), Member(b"tail", TAIL))
#: Where the source may be held so that HEAD has gone by and TAIL has not.
MIDDLE = 4 * CHUNK + 2048
GONE = Unreachable("the registry went away")


@pytest.fixture(autouse=True)
def _small_and_tidy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    small_chunks(monkeypatch)
    yield
    left = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
    assert not [path for path in left if ".val" in path or "fsmount-chunk" in path]


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
def blob(source: FakeSource) -> Descriptor:
    return source.put_layer(TAR)


async def find(layer: Layer, name: bytes) -> int:
    """The number of a member, as soon as the layer has shown it."""
    while True:
        index = layer.index
        found = index.name(0, name) if index is not None else None
        if found is not None and found.member is not None:
            return found.member.number
        await layer.wait_progress()


async def raises(kind: type[FsmountError], read: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(kind):
        await read()


async def follow(layer: Layer) -> None:
    """Waits for all that the layer has to show, as look-ups do."""
    while not layer.complete:
        await layer.wait_progress()


def chunk_files(cache: Path) -> list[Path]:
    return sorted((cache / "chunks").rglob("*.val"))


def chunk_file(cache: Path, data: bytes) -> Path:
    (path,) = (path for path in chunk_files(cache) if path.read_bytes() == data[:CHUNK])
    return path


def assert_nothing_is_kept(cache: Path, layer: Layer) -> None:
    assert chunk_files(cache) == []
    assert list((cache / "layers").iterdir()) == []
    assert layer.index is None


# -------------------- the stream


@pytest.mark.parametrize("packed", [False, True])
async def test_a_layer_is_streamed_once_for_any_number_of_readers_and_its_index_is_kept(
    tmp_path: Path, source: FakeSource, packed: bool
) -> None:
    blob = source.put_layer(TAR, packed=packed)

    async def check(layer: Layer, offset: int, size: int) -> None:
        assert await layer.read_stream(offset, size) == TAR[offset : offset + size]

    async with open_layers(tmp_path) as layers, trio.open_nursery() as nursery:
        layer = layers.get(LayerSpec(blob), source)
        for offset in range(0, len(TAR) - 1500, 700):
            nursery.start_soon(check, layer, offset, 1500)
        nursery.start_soon(layer.wait_complete)
    assert (tmp_path / "layers" / f"sha256-{blob.digest.hex}.sqlite").exists()
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        assert await layer.read(await find(layer, b"tail"), 0, len(TAIL)) == TAIL
    assert source.fetched(blob) == 1


async def test_files_that_have_gone_by_are_served_while_the_rest_streams(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    gate = Gate()
    gate.let(MIDDLE)
    source.then(blob, Body(gate=gate))
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        assert await layer.read(await find(layer, b"head"), 0, len(HEAD)) == HEAD
        assert not layer.complete
        gate.open()
        assert await layer.read(await find(layer, b"tail"), 0, len(TAIL)) == TAIL
        assert (await layer.wait_complete()).diff_id == str(Digest.of(TAR))


async def test_several_layers_stream_side_by_side(tmp_path: Path, source: FakeSource) -> None:
    blobs = [source.put_layer(archive(Member(b"%d" % n, HEAD))) for n in range(3)]
    gates = [Gate() for _ in blobs]
    async with open_layers(tmp_path) as layers:
        for blob, gate in zip(blobs, gates, strict=True):
            gate.let(CHUNK + 2048)
            source.then(blob, Body(gate=gate))
        for blob in blobs:
            assert await layers.get(LayerSpec(blob), source).read_stream(512, 9) == HEAD[:9]


async def test_a_read_is_a_slice_of_the_file(tmp_path: Path, source: FakeSource) -> None:
    regions = [(100, HEAD[:CHUNK]), (3 * CHUNK, b"end")]
    holes = bytearray(4 * CHUNK)
    for offset, data in regions:
        holes[offset : offset + len(data)] = data
    tar = archive(Member(b"plain", TAIL), Member(b"empty"), sparse("old", b"holes", len(holes), regions))
    files = {b"plain": TAIL, b"empty": b"", b"holes": bytes(holes)}
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(source.put_layer(tar)), source)
        for name, content in files.items():
            member = await find(layer, name)
            for offset in (0, 1, 99, CHUNK - 513, 3 * CHUNK - 1, 3 * CHUNK + 99, 10**9):
                for size in (0, 1, 200, CHUNK, 10**9):
                    expected = content[offset : offset + size]
                    assert await layer.read(member, offset, size) == expected
                    assert layer.read_hot(member, offset, size) in (None, expected)
        await layer.wait_complete()
        assert layer.read_hot(await find(layer, b"plain"), 10, 20) == TAIL[10:30]
        with pytest.raises(NotFound):
            await layer.read(99, 0, 1)


async def test_a_titled_layer_is_one_file_and_the_same_bytes_under_another_title_another_layer(
    tmp_path: Path, source: FakeSource
) -> None:
    blob = source.put_blob(TAIL)
    async with open_layers(tmp_path) as layers:
        for title in (b"app.bin", b"other"):
            layer = layers.get(LayerSpec(blob, title=title), source)
            assert await layer.read(await find(layer, title), 0, 10**6) == TAIL


# -------------------- condemned


OTHER_BYTE = TAR[:-2000] + bytes([TAR[-2000] ^ 1]) + TAR[-1999:]
NO_TAR = TAR[: 5 * CHUNK] + b"\xff" * 5 * CHUNK


@pytest.mark.parametrize(
    ("tar", "body", "diff_id", "heals"),
    [
        pytest.param(TAR, Body(data=OTHER_BYTE), None, True, id="another byte"),
        pytest.param(TAR, Body(stop=6 * CHUNK), None, True, id="cut short"),
        pytest.param(TAR, Body(stop=6 * CHUNK, error=Corrupt("too short")), None, True, id="source says so"),
        pytest.param(NO_TAR, Body(), None, False, id="no tar"),
        pytest.param(TAR, Body(), Digest.of(b"other"), False, id="another diff ID"),
    ],
)
async def test_nothing_of_a_condemned_layer_stays_and_it_is_not_fetched_again_for_a_minute(
    tmp_path: Path,
    mock_clock: MockClock,
    source: FakeSource,
    tar: bytes,
    body: Body,
    diff_id: Digest | None,
    heals: bool,
) -> None:
    blob = source.put_layer(tar)
    gate = Gate()
    gate.let(MIDDLE)
    source.then(blob, replace(body, gate=gate))
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob, diff_id=diff_id), source)
        number = layer.number
        assert await layer.read_stream(0, CHUNK) == tar[:CHUNK]
        async with trio.open_nursery() as nursery:
            readers: list[Callable[[], Awaitable[object]]] = [layer.wait_complete, partial(follow, layer)]
            if diff_id is None:  # which is compared when all bytes have gone by
                readers += [partial(layer.read_stream, 6 * CHUNK, 1)] * 2
            for read in readers:
                nursery.start_soon(raises, Corrupt, read)
            await wait_all_tasks_blocked()
            gate.open()
        assert_nothing_is_kept(tmp_path, layer)
        assert layers.chunks.hot(layer.chunk_key(0)) is None
        with pytest.raises(Corrupt):
            layers.numbered(number)
        assert layer.number != number and layers.numbered(layer.number) is layer
        assert layers.numbers.layer_key(number) is None

        mock_clock.jump(59)
        for read in (partial(layer.read_stream, 0, 1), layer.wait_complete):
            await raises(Corrupt, read)
        assert source.fetched(blob) == 1
        mock_clock.jump(1)
        if heals:
            assert await layer.read_stream(0, len(tar)) == tar
            assert (await layer.wait_complete()).complete
        else:
            await raises(Corrupt, layer.wait_complete)
            assert_nothing_is_kept(tmp_path, layer)
        assert source.fetched(blob) == 2


async def test_while_there_are_mirrors_left_a_condemned_layer_is_fetched_again_at_once(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    source.mirrors = 1
    source.then(blob, *[Body(data=OTHER_BYTE)] * 2)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        numbers = [layer.number]
        for _ in range(3):
            # Of the last chunk nothing is known before the digest is.
            await raises(Corrupt, partial(layer.read_stream, len(TAR) - 1, 1))
            assert_nothing_is_kept(tmp_path, layer)
            numbers.append(layer.number)
        assert source.fetched(blob) == 2
        assert numbers == sorted(numbers) and len(set(numbers)) == 3


async def test_nothing_stays_of_a_chunk_that_is_being_stored_when_its_layer_is_condemned(
    tmp_path: Path, source: FakeSource, blob: Descriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    storing, proceed, put = trio.Event(), threading.Event(), ChunkStore.put

    def slow_put(*args: object) -> bool:
        trio.from_thread.run_sync(storing.set)
        proceed.wait(60)
        return put(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ChunkStore, "put", slow_put)
    gate = Gate()
    gate.let(CHUNK + 2048)
    source.then(blob, Body(gate=gate, stop=CHUNK + 2048, error=Corrupt("too short")))
    async with open_layers(tmp_path) as layers, trio.open_nursery() as nursery:
        layer = layers.get(LayerSpec(blob), source)
        nursery.start_soon(raises, Corrupt, partial(layer.read_stream, 0, CHUNK))
        await storing.wait()
        gate.open()
        await wait_all_tasks_blocked()
        proceed.set()
    assert_nothing_is_kept(tmp_path, layer)


async def test_an_image_with_a_wrong_diff_id_does_not_take_the_layer_from_other_images(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    right = LayerSpec(blob, diff_id=Digest.of(TAR))
    wrongs = [LayerSpec(blob, diff_id=Digest("sha256", digit * 64)) for digit in "0f"]
    gate = Gate()
    source.then(blob, Body(gate=gate))
    async with open_layers(tmp_path) as layers, trio.open_nursery() as nursery:
        layer = layers.get(right, source)
        nursery.start_soon(layer.wait_complete)
        await gate.held.wait()
        for wrong in wrongs:
            layers.get(wrong, source)
        gate.open()
    async with open_layers(tmp_path) as layers:
        assert layers.get(right, source).complete
        for wrong in wrongs:
            with pytest.raises(Corrupt):
                layers.get(wrong, source)


async def test_a_layer_that_inflates_to_more_than_the_limit_is_refused(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    async with open_layers(tmp_path, max_layer_size=len(TAR) - 1) as layers:
        layer = layers.get(LayerSpec(blob), source)
        await raises(Invalid, layer.wait_complete)
        assert_nothing_is_kept(tmp_path, layer)


# -------------------- broken off


@pytest.mark.parametrize("error", [GONE, ZeroDivisionError("a bug")])
async def test_what_breaks_a_stream_off_reaches_every_waiter_and_the_next_read_starts_again(
    tmp_path: Path, source: FakeSource, blob: Descriptor, error: Exception
) -> None:
    gate = Gate()
    gate.let(MIDDLE)
    source.then(blob, Body(gate=gate, stop=MIDDLE, error=error))
    kind = type(error) if isinstance(error, FsmountError) else FsmountError
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        number = layer.number
        assert await layer.read_stream(0, CHUNK) == TAR[:CHUNK]
        async with trio.open_nursery() as nursery:
            last = partial(layer.read_stream, len(TAR) - 1, 1)
            for read in (layer.wait_complete, partial(follow, layer), last, last):
                nursery.start_soon(raises, kind, read)
            await wait_all_tasks_blocked()
            gate.open()
        assert_nothing_is_kept(tmp_path, layer)
        assert layer.number == number
        assert await layer.read_stream(0, len(TAR)) == TAR
        assert source.fetched(blob) == 2


async def test_a_file_that_was_found_before_the_stream_broke_off_can_be_read_after_it(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    gate, got = Gate(), []
    source.then(blob, Body(stop=len(TAR) - 100, error=GONE), Body(gate=gate))
    async with open_layers(tmp_path) as layers, trio.open_nursery() as nursery:
        layer = layers.get(LayerSpec(blob), source)
        member = await find(layer, b"tail")
        await raises(Unreachable, layer.wait_complete)

        async def read() -> None:
            got.append(await layer.read(member, 0, len(TAIL)))

        nursery.start_soon(read)
        await gate.held.wait()
        nursery.start_soon(read)  # now that there is an index, without the member
        await wait_all_tasks_blocked()
        gate.open()
    assert got == [TAIL, TAIL]


# -------------------- chunks on disk


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped byte": _flip,
    "cut short": partial(os.truncate, length=100),
    "emptied": partial(os.truncate, length=0),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("running", [False, True], ids=["after a restart", "while running"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
async def test_a_damaged_chunk_is_noticed_and_fetched_again(
    tmp_path: Path, source: FakeSource, blob: Descriptor, damage: Callable[[Path], None], running: bool
) -> None:
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        await layer.wait_complete()
        if running:
            damage(chunk_file(tmp_path, TAR[2 * CHUNK :]))
            assert await layer.read_stream(0, len(TAR)) == TAR
    if not running:
        damage(chunk_file(tmp_path, TAR[2 * CHUNK :]))
    for _ in range(2):
        async with open_layers(tmp_path) as layers:
            layer = layers.get(LayerSpec(blob), source)
            assert layer.complete
            assert await layer.read_stream(0, len(TAR)) == TAR
        assert source.fetched(blob) == 2


@pytest.mark.parametrize("length", [0, 100])
async def test_a_chunk_cut_short_while_it_is_open_is_fetched_again(
    tmp_path: Path, source: FakeSource, blob: Descriptor, length: int
) -> None:
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        await layer.wait_complete()
        await layer.read_stream(0, len(TAR))
        head = await find(layer, b"head")
        assert layer.read_hot(head, 0, 1000) == HEAD[:1000]
        for path in chunk_files(tmp_path):
            os.truncate(path, length)
        assert layer.read_hot(head, 0, 1000) is None
        assert await layer.read(head, 0, len(HEAD)) == HEAD
        assert await layer.read_stream(0, len(TAR)) == TAR


@pytest.mark.parametrize("kept", [0, 1, 3, 5, 6, 7])
async def test_a_cache_too_small_for_a_layer_serves_every_byte_in_any_order_to_many_readers(
    tmp_path: Path, source: FakeSource, blob: Descriptor, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr("fsmount.cache.hot.HOT_CHUNKS", 2)
    source.then(blob, *[Body()] * 100, *[Body(stop=0, error=Unreachable("asked too often"))] * 20)
    chunks = list(range(0, len(TAR), CHUNK))

    async def read_all(layer: Layer, seed: int) -> None:
        for start in Random(seed).sample(chunks, len(chunks)):
            size = min(CHUNK, len(TAR) - start)
            assert await layer.read_stream(start, size) == TAR[start : start + size]

    with open_chunk_store(tmp_path / "empty", size=1) as store:
        size = store.volume + kept * CHUNK
    async with open_layers(tmp_path / "cache", size=size) as layers, trio.open_nursery() as nursery:
        for seed in range(5):
            nursery.start_soon(read_all, layers.get(LayerSpec(blob), source), seed)


async def test_with_a_full_disk_everything_is_served_without_caching_and_one_message_says_so(
    tmp_path: Path,
    source: FakeSource,
    blob: Descriptor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fsmount.cache.chunks.write_file", full)
    async with open_layers(tmp_path) as layers:
        for _ in range(2):
            layer = layers.get(LayerSpec(blob), source)
            assert await layer.read(await find(layer, b"tail"), 0, len(TAIL)) == TAIL
            assert await layer.read(await find(layer, b"head"), 0, len(HEAD)) == HEAD
    assert chunk_files(tmp_path) == []
    errors = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    assert errors == [f"no space left for {tmp_path}/chunks: serving without caching"]


async def test_an_index_that_finds_no_space_is_no_space(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = database.create

    def create_small(*args: object, **options: object) -> object:
        connection = create(*args, **options)  # type: ignore[arg-type]
        connection.execute("PRAGMA max_page_count=20")
        return connection

    monkeypatch.setattr(database, "create", create_small)
    blob = source.put_layer(archive(*(Member(b"%0100d" % n) for n in range(1000))))
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        await raises(NoSpace, layer.wait_complete)
        assert_nothing_is_kept(tmp_path, layer)


async def test_chunks_left_by_a_process_that_was_killed_are_not_believed(
    tmp_path: Path, source: FakeSource, blob: Descriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        for number in range(7):
            layers.chunks.put(layer.chunk_key(number), b"x" * CHUNK, hashlib.sha256(b"x" * CHUNK).digest())
    # Nor if they cannot be replaced.
    monkeypatch.setattr("fsmount.passes.Passes.store", _only_indexed)
    async with open_layers(tmp_path) as layers:
        assert await layers.get(LayerSpec(blob), source).read_stream(0, len(TAR)) == TAR


def _only_indexed(self: object, keep: Keep, key: str, portion: Portion) -> bool:
    keep.add(portion)
    return False


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"garbage" * 1000,
        lambda data: b"",
        lambda data: data[:5000],
        lambda data: data[:4096] + b"\xff" * (len(data) - 4096),
    ],
    ids=["no database", "emptied", "cut short", "only its first page"],
)
async def test_a_damaged_index_is_made_again(
    tmp_path: Path, source: FakeSource, blob: Descriptor, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "layers" / f"sha256-{blob.digest.hex}.sqlite"
    async with open_layers(tmp_path) as layers:
        await layers.get(LayerSpec(blob), source).wait_complete()
    path.write_bytes(damage(path.read_bytes()))
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        assert await layer.read(await find(layer, b"tail"), 0, len(TAIL)) == TAIL


async def test_an_index_opens_by_itself_and_nothing_is_fetched(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        await layer.wait_complete()
        layer.close_index()
        assert await layer.read_stream(0, len(TAR)) == TAR
    async with open_layers(tmp_path) as layers:
        assert await layers.get(LayerSpec(blob), source).read_stream(0, len(TAR)) == TAR
    assert source.fetched(blob) == 1


# -------------------- cancellation


@pytest.mark.parametrize("place", ["the source is silent", "it has not come", "it has gone by"])
async def test_a_reader_that_is_cancelled_leaves_at_once_and_the_others_get_their_bytes(
    tmp_path: Path, source: FakeSource, blob: Descriptor, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    gate = Gate()
    source.then(blob, Body(gate=gate))
    gate.let(MIDDLE)
    offset = 6 * CHUNK
    if place == "the source is silent":
        source.silent = Gate()
    if place == "it has gone by":
        # Not asked for when it came, and not stored.
        monkeypatch.setattr("fsmount.passes.Passes.store", _only_indexed)
        offset = 0
    scope, got = trio.CancelScope(), []

    async def leave() -> None:
        with scope:
            await layer.read_stream(offset, 100)

    async def stay() -> None:
        got.append(await layer.read_stream(offset, 100))

    async with open_layers(tmp_path) as layers, trio.open_nursery() as nursery:
        layer = layers.get(LayerSpec(blob), source)
        if place == "it has gone by":
            await layer.read_stream(3 * CHUNK, 1)
        async with trio.open_nursery() as leavers:
            leavers.start_soon(leave)
            nursery.start_soon(stay)
            await wait_all_tasks_blocked()
            scope.cancel()
        assert scope.cancelled_caught and not got
        if source.silent is not None:
            source.silent.open()
        gate.open()
    assert got == [TAR[offset : offset + 100]]


async def test_a_reader_that_is_cancelled_while_a_chunk_is_opened_leaves_nothing_open(
    tmp_path: Path, source: FakeSource, blob: Descriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, proceed, load = trio.Event(), threading.Event(), ChunkStore._load

    def slow_load(*args: object) -> object:
        trio.from_thread.run_sync(opening.set)
        proceed.wait(60)
        return load(*args)  # type: ignore[arg-type]

    scope, got = trio.CancelScope(), []

    async def leave() -> None:
        with scope:
            await layer.read_stream(0, 100)

    async def stay() -> None:
        got.append(await layer.read_stream(0, 100))

    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        await layer.wait_complete()
        monkeypatch.setattr(ChunkStore, "_load", slow_load)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave)
            nursery.start_soon(stay)
            await opening.wait()
            scope.cancel()
            proceed.set()
    assert got == [TAR[:100]]


async def test_a_pass_whose_process_ends_leaves_nothing(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    gate = Gate()
    gate.let(MIDDLE)
    source.then(blob, Body(gate=gate))
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        assert await layer.read_stream(0, CHUNK) == TAR[:CHUNK]
    assert_nothing_is_kept(tmp_path, layer)
    async with open_layers(tmp_path) as layers:
        assert await layers.get(LayerSpec(blob), source).read_stream(0, len(TAR)) == TAR


async def test_who_needs_a_whole_layer_gets_it_from_others_if_a_mirror_altered_it(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    source.mirrors = 1
    source.then(blob, Body(TAR[:MIDDLE] + bytes([TAR[MIDDLE] ^ 1]) + TAR[MIDDLE + 1 :]))
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        number = layer.number
        await layer.wait_complete()
        assert layer.number != number, "what the kernel may have cached of the altered one is not seen again"
    assert source.fetched(blob) == 2


@pytest.mark.parametrize("changed", [False, True], ids=["the same bytes", "other bytes"])
async def test_what_a_pass_showed_that_broke_off_keeps_its_number_only_if_the_next_one_shows_the_same(
    tmp_path: Path, source: FakeSource, blob: Descriptor, changed: bool
) -> None:
    # Past the headers, so that the first pass finds the same members.
    wrong = TAR[:600] + bytes([TAR[600] ^ 1]) + TAR[601:]
    source.then(blob, Body(wrong if changed else TAR, stop=MIDDLE, error=GONE))
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        number = layer.number
        await raises(Unreachable, partial(layer.read_stream, len(TAR) - 1, 1))
        assert layer.number == number, (
            "a connection that broke does not take files from those who have them open"
        )
        await layer.wait_complete()
        assert (layer.number != number) == changed
        if changed:
            with pytest.raises(Corrupt):
                layers.numbered(number)
            assert layers.numbered(layer.number) is layer
