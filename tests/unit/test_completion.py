"""What is fetched when nobody asks for it: when it is due, when it is left alone, and that it disturbs nobody."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount.archive.span import Trust
from fsmount.cache.chunks import open_chunk_store
from fsmount.completion import Completer
from fsmount.errors import Unreachable
from fsmount.layer import Layer, Layers
from fsmount.lazy import LayerSpec
from fsmount.policy import Complete
from tests.fakes.estargz import Member, estargz
from tests.fakes.source import CHUNK, Body, FakeSource, open_layers, small_chunks
from tests.fakes.tar import archive

GONE = Unreachable("the registry went away")
_TAR = "application/vnd.oci.image.layer.v1.tar"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    small_chunks(monkeypatch)
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("fsmount.lazy._WORTHWHILE", 1)
    monkeypatch.setattr("fsmount.lazy._RAW_SPAN", CHUNK)
    monkeypatch.setattr("fsmount.indexing._JOINED", CHUNK)
    monkeypatch.setattr("fsmount.tarwalk._LEAST", 512)


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


def noise(seed: int, size: int = 20 * CHUNK) -> bytes:
    return Random(seed).randbytes(size)


def hinted(source: FakeSource, seed: int = 1) -> LayerSpec:
    """A layer that is read by its tar's headers, which nobody vouches for."""
    return LayerSpec(source.put_blob(archive(Member(b"file", noise(seed))), _TAR))


def bound(source: FakeSource, seed: int = 1) -> LayerSpec:
    """A layer that is read by a table whose digest the manifest names."""
    blob = estargz([Member(b"file", noise(seed))], chunk_size=CHUNK)
    return LayerSpec(replace(source.put_blob(blob.data, _TAR + "+gzip"), annotations=blob.annotations))


FORMS = {"hinted": hinted, "bound": bound}


class Attempts:
    """The layers that the completer has set to, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[Layer] = []
        self._ended, self._waiting = trio.open_memory_channel[Layer](100)
        complete = Completer._complete

        async def noted(completer: Completer, layer: Layer) -> None:
            self.begun.append(layer)
            await complete(completer, layer)
            self._ended.send_nowait(layer)

        monkeypatch.setattr(Completer, "_complete", noted)

    async def ended(self) -> Layer:
        """Returns when one more is through."""
        return await self._waiting.receive()


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    return Attempts(monkeypatch)


@asynccontextmanager
async def completing(layers: Layers, *, rate: float | None = None) -> AsyncIterator[Completer]:
    """A completer that runs; it first looks when the block awaits."""
    completer = Completer(layers.means.traffic, rate=rate)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(completer.run)
        yield completer
        nursery.cancel_scope.cancel()


async def passes_by(clock: MockClock, seconds: int) -> None:
    """So much time, of which the completer sees every five seconds."""
    await wait_all_tasks_blocked()
    for _ in range(seconds // 5):
        clock.jump(5)
        await wait_all_tasks_blocked()


async def read(layer: Layer, offset: int = 0) -> bytes:
    index = await layer.wait_complete()
    found = index.name(0, b"file")
    assert found is not None and found.member is not None
    return await layer.read(found.member.number, offset, 100)


async def look_up(cache: Path, source: FakeSource, *specs: LayerSpec) -> None:
    """Makes the indexes of layers, in an earlier process that reads nothing of them."""
    async with open_layers(cache) as layers:
        for spec in specs:
            await layers.get(spec, source).wait_complete()


# -------------------- when


@pytest.mark.parametrize("put", FORMS.values(), ids=FORMS)
async def test_what_is_wanted_now_is_fetched_and_certified_although_nobody_reads_it(
    tmp_path: Path,
    mock_clock: MockClock,
    source: FakeSource,
    attempts: Attempts,
    put: Callable[[FakeSource], LayerSpec],
) -> None:
    async with open_layers(tmp_path) as layers, completing(layers) as completer:
        layer = layers.get(put(source), source)
        completer.use([layer], Complete.NOW)
        assert await attempts.ended() is layer
        assert layer.index is not None and layer.index.trust is not Trust.HINT
        assert all(layer.stored_chunks())
        source.away = GONE
        assert await read(layer) == noise(1)[:100], "it has outlived its registry"
        await passes_by(mock_clock, 3600)
        assert attempts.begun == [layer], "once is enough"


async def test_what_is_never_wanted_stays_what_was_asked_for(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource, attempts: Attempts
) -> None:
    async with open_layers(tmp_path) as layers, completing(layers) as completer:
        layer = layers.get(hinted(source), source)
        completer.use([layer], Complete.NEVER)
        await read(layer)
        await passes_by(mock_clock, 3600)
        assert attempts.begun == []
        assert not all(layer.stored_chunks())


async def test_an_idle_layer_is_completed_when_readers_have_wanted_nothing_for_half_a_minute(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource, attempts: Attempts
) -> None:
    spec = hinted(source)
    await look_up(tmp_path, source, spec)
    async with open_layers(tmp_path) as layers, completing(layers) as completer:
        layer = layers.get(spec, source)
        completer.use([layer], Complete.IDLE)
        await wait_all_tasks_blocked()  # it has looked, and found nothing to do
        await read(layer)
        await passes_by(mock_clock, 25)
        await read(layer, 5 * CHUNK)
        await passes_by(mock_clock, 25)
        assert attempts.begun == [], "the second reader was here 25 seconds ago"
        await passes_by(mock_clock, 5)
        assert await attempts.ended() is layer
        assert layer.index is not None and layer.index.trust is Trust.CERTIFIED
        assert all(layer.stored_chunks())


async def test_an_idle_layer_of_which_nothing_was_read_is_left_alone(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource, attempts: Attempts
) -> None:
    spec = bound(source)
    await look_up(tmp_path, source, spec)
    async with open_layers(tmp_path) as layers, completing(layers) as completer:
        layer = layers.get(spec, source)
        completer.use([layer], Complete.IDLE)
        await passes_by(mock_clock, 3600)
        assert attempts.begun == []
        await read(layer)
        await passes_by(mock_clock, 30)
        assert await attempts.ended() is layer


async def test_a_layer_that_was_only_looked_up_counts_as_not_read(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource, attempts: Attempts
) -> None:
    async with open_layers(tmp_path) as layers, completing(layers) as completer:
        layer = layers.get(hinted(source), source)
        completer.use([layer], Complete.IDLE)
        await layer.wait_complete()
        await passes_by(mock_clock, 60)
        assert attempts.begun == []


async def test_who_reads_another_layer_of_the_registry_disturbs_the_quiet_and_who_reads_elsewhere_does_not(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource, attempts: Attempts
) -> None:
    elsewhere = FakeSource(name="registry.example/team/other")
    specs, foreign = [hinted(source, 1), hinted(source, 2)], hinted(elsewhere, 3)
    await look_up(tmp_path, source, *specs)
    await look_up(tmp_path, elsewhere, foreign)
    async with open_layers(tmp_path) as layers, completing(layers) as completer:
        layer, neighbour = (layers.get(spec, source) for spec in specs)
        stranger = layers.get(foreign, elsewhere)
        completer.use([layer], Complete.IDLE)
        await wait_all_tasks_blocked()  # it has looked, and found nothing to do
        await read(layer)
        for number in range(3):
            await passes_by(mock_clock, 25)
            await read(neighbour, number * 6 * CHUNK)  # nothing is fetched ahead
        await passes_by(mock_clock, 25)
        assert attempts.begun == []
        await read(stranger)
        await passes_by(mock_clock, 5)
        assert await attempts.ended() is layer


async def test_layers_are_completed_one_after_the_other(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource, attempts: Attempts
) -> None:
    async with open_layers(tmp_path) as layers, completing(layers) as completer:
        wanted = [layers.get(bound(source, seed), source) for seed in range(3)]
        completer.use(wanted, Complete.NOW)
        for number, layer in enumerate(wanted, 1):
            assert await attempts.ended() is layer
            assert attempts.begun[:number] == wanted[:number] and all(layer.stored_chunks())


async def test_of_several_wishes_for_a_layer_the_last_counts(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource, attempts: Attempts
) -> None:
    async with open_layers(tmp_path) as layers, completing(layers) as completer:
        layer = layers.get(hinted(source), source)
        completer.use([layer], Complete.NOW)
        completer.use([layer], Complete.NEVER)
        await passes_by(mock_clock, 60)
        assert attempts.begun == []


# -------------------- what is left alone


async def test_a_layer_that_would_evict_others_is_left_alone_until_there_is_room(
    tmp_path: Path,
    mock_clock: MockClock,
    source: FakeSource,
    attempts: Attempts,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open_chunk_store(tmp_path / "empty", size=1) as store:
        size = store.volume + 66 * CHUNK
    async with open_layers(tmp_path / "cache", size=size) as layers, completing(layers) as completer:
        other = layers.get(LayerSpec(source.put_blob(noise(9, 40 * CHUNK)), title=b"file"), source)
        await other.fill()
        layer = layers.get(bound(source), source)
        await read(layer)
        source.ranges.clear()
        completer.use([layer], Complete.NOW)
        await passes_by(mock_clock, 5)
        assert await attempts.ended() is layer
        assert "the cache has no room for it" in caplog.text
        assert source.ranges == [] and all(other.stored_chunks())
        assert await read(layer) == noise(1)[:100], "what was read of it is here"
        await passes_by(mock_clock, 55)
        assert attempts.begun == [layer], "and not looked at again for a minute"
        await layers.chunks.drop([other.chunk_key(number) for number in range(len(other.stored_chunks()))])
        await passes_by(mock_clock, 5)
        assert await attempts.ended() is layer
        assert all(layer.stored_chunks())


async def test_a_layer_that_is_said_to_be_complete_is_complete(
    tmp_path: Path,
    mock_clock: MockClock,
    source: FakeSource,
    attempts: Attempts,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open_chunk_store(tmp_path / "empty", size=1) as store:
        size = store.volume + 46 * CHUNK
    async with open_layers(tmp_path / "cache", size=size) as layers, completing(layers) as completer:
        layer = layers.get(bound(source), source)
        completer.use([layer], Complete.NOW)
        assert await attempts.ended() is layer
        assert all(layer.stored_chunks()) or "is complete" not in caplog.text


# -------------------- when it fails


async def test_after_a_failure_there_is_a_pause_and_then_another_attempt(
    tmp_path: Path,
    mock_clock: MockClock,
    source: FakeSource,
    attempts: Attempts,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = bound(source)
    async with open_layers(tmp_path) as layers, completing(layers) as completer:
        layer = layers.get(spec, source)
        await read(layer)
        source.then(spec.descriptor, *[Body(stop=0, error=GONE)] * 10)
        completer.use([layer], Complete.NOW)
        await passes_by(mock_clock, 5)
        assert await attempts.ended() is layer
        assert "is not completed: the registry went away" in caplog.text
        assert not all(layer.stored_chunks())
        source._script.clear()
        await passes_by(mock_clock, 55)
        assert attempts.begun == [layer]
        await passes_by(mock_clock, 5)
        assert await attempts.ended() is layer
        assert all(layer.stored_chunks())


async def test_a_layer_that_the_disk_does_not_take_is_not_said_to_be_complete_and_completed_when_it_does(
    tmp_path: Path,
    mock_clock: MockClock,
    source: FakeSource,
    attempts: Attempts,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fsmount.cache.trouble._QUIET_SECONDS", 0.0)
    spec = bound(source)
    async with open_layers(tmp_path) as layers, completing(layers) as completer:
        layer = layers.get(spec, source)
        await layer.wait_complete()
        layers.chunks._fail(OSError(5, "Input/output error"))
        source.ranges.clear()
        completer.use([layer], Complete.NOW)
        await passes_by(mock_clock, 5)
        assert await attempts.ended() is layer
        assert "the cache does not take it now" in caplog.text and "is complete" not in caplog.text
        assert source.ranges == [] and not any(layer.stored_chunks())
        layers.chunks._paused_until = 0.0
        await layers.chunks._try_again()  # as the store's keeper does, although nothing else is stored
        await passes_by(mock_clock, 60)
        assert await attempts.ended() is layer
        assert all(layer.stored_chunks()) and "is complete" in caplog.text


async def test_a_layer_that_the_disk_begins_to_refuse_meanwhile_is_not_said_to_be_complete(
    tmp_path: Path,
    mock_clock: MockClock,
    source: FakeSource,
    attempts: Attempts,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    async with open_layers(tmp_path) as layers, completing(layers) as completer:
        layer = layers.get(bound(source), source)
        await layer.wait_complete()
        monkeypatch.setattr("fsmount.cache.chunks.write_file", fail)
        completer.use([layer], Complete.NOW)
        await passes_by(mock_clock, 5)
        assert await attempts.ended() is layer
        assert "the cache does not take it now" in caplog.text and "is complete" not in caplog.text


async def test_a_layer_that_fails_holds_up_no_other(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource, attempts: Attempts
) -> None:
    away = FakeSource(name="registry.example/team/other")
    async with open_layers(tmp_path) as layers, completing(layers) as completer:
        broken, layer = layers.get(hinted(away, 2), away), layers.get(hinted(source), source)
        away.away = GONE
        completer.use([broken, layer], Complete.NOW)
        assert [await attempts.ended(), await attempts.ended()] == [broken, layer]
        assert all(layer.stored_chunks()) and layer.complete and not broken.complete


# -------------------- how fast


async def test_no_more_bytes_a_second_are_fetched_than_the_rate_allows(
    tmp_path: Path, autojump_clock: MockClock, source: FakeSource, attempts: Attempts
) -> None:
    spec = bound(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        await layer.wait_complete()
        source.ranges.clear()
        async with completing(layers, rate=CHUNK / 10) as completer:
            completer.use([layer], Complete.NOW)
            before = trio.current_time()
            await attempts.ended()
            seconds = trio.current_time() - before
    asked = sum(stop - start for start, stop in source.ranges)
    assert asked >= 20 * CHUNK
    assert asked / (CHUNK / 10) <= seconds < 2 * asked / (CHUNK / 10)
