"""What a mount's kernel was shown by one process holds in the next one, or is taken back from the kernel."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from random import Random

import pytest
import trio

from fsmount.archive.span import Trust
from fsmount.cache.numbers import Numbers
from fsmount.errors import Busy, Corrupt, FsmountError, NoSpace, Unreachable
from fsmount.layer import Layer, Layers
from fsmount.lazy import LayerSpec
from fsmount.oci.manifest import Descriptor
from tests.fakes.source import CHUNK, Body, FakeSource, Gate, open_layers, small_chunks
from tests.fakes.tar import Member, archive

HEAD, TAIL = Random(1).randbytes(9 * CHUNK), Random(2).randbytes(9 * CHUNK + 100)
TAR = archive(Member(b"head", HEAD), Member(b"tail", TAIL))
#: The root is one of them.
MEMBERS = 3
#: Where the source may be held so that HEAD has gone by and TAIL has not.
MIDDLE = 10 * CHUNK + 2048
GONE = Unreachable("the registry went away")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    monkeypatch.setattr("fsmount.lazy._WORTHWHILE", 1)
    monkeypatch.setattr("fsmount.lazy._RAW_SPAN", CHUNK)
    monkeypatch.setattr("fsmount.tarwalk._LEAST", 512)


@pytest.fixture
def source() -> FakeSource:
    """By default it has no ranges, so that layers are streamed."""
    return FakeSource(knows_ranges=False)


@pytest.fixture
def blob(source: FakeSource) -> Descriptor:
    return source.put_layer(TAR)


@asynccontextmanager
async def process(
    cache: Path, told: list[tuple[int, int]] | None = None, *, mount: str | None = "/srv"
) -> AsyncIterator[Layers]:
    """One process of a mount; told: what it says of stale content."""
    async with open_layers(cache, mount=mount) as layers:
        if layers.shown is not None and told is not None:
            layers.shown.on_stale.append(lambda *what: told.append(what))
        yield layers


async def show_half(layers: Layers, source: FakeSource, blob: Descriptor, *, is_begun: bool = False) -> Layer:
    """What a process shows that ends in the middle of a layer."""
    gate = Gate()
    gate.let(MIDDLE)
    if not is_begun:
        source.then(blob, Body())  # it looks whether there are ranges
    source.then(blob, Body(gate=gate))
    layer = layers.get(LayerSpec(blob), source)
    assert await layer.read_stream(512, 100) == HEAD[:100]
    return layer


def left(layers: Layers) -> frozenset[int]:
    assert layers.shown is not None
    return layers.shown.left_unverified


# -------------------- what nobody had verified


async def test_content_that_a_process_showed_and_did_not_verify_is_taken_back_when_the_next_one_has_verified_it(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    told: list[tuple[int, int]] = []
    async with process(tmp_path, told) as layers:
        number = (await show_half(layers, source, blob)).number
        assert left(layers) == frozenset()
    async with process(tmp_path, told) as layers:
        assert left(layers) == {number}
        layer = await show_half(layers, source, blob, is_begun=True)
        assert (layer.number, told) == (number, [])
    async with process(tmp_path, told) as layers:
        layer = layers.get(LayerSpec(blob), source)
        await layer.wait_complete()
        assert told == [(number, MEMBERS)]
        assert left(layers) == frozenset()
    async with process(tmp_path, told) as layers:
        assert left(layers) == frozenset()
        layers.get(LayerSpec(blob), source)
    assert told == [(number, MEMBERS)]


async def test_a_process_that_verifies_what_it_has_shown_itself_takes_nothing_back(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    told: list[tuple[int, int]] = []
    async with process(tmp_path, told) as layers:
        source.then(blob, Body(), Body(stop=MIDDLE, error=GONE))
        layer = layers.get(LayerSpec(blob), source)
        assert await layer.read_stream(512, 100) == HEAD[:100]
        with pytest.raises(Unreachable):
            await layer.wait_complete()
        await layer.wait_complete()
    async with process(tmp_path, told) as layers:
        assert left(layers) == frozenset()
    assert told == []


async def test_when_another_process_of_the_cache_has_verified_it_it_is_taken_back_as_soon_as_it_is_opened(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    told: list[tuple[int, int]] = []
    async with process(tmp_path) as layers:
        number = (await show_half(layers, source, blob)).number
    for other in (None, "/mnt"):
        async with process(tmp_path, told, mount=other) as layers:
            await layers.get(LayerSpec(blob), source).wait_complete()
    assert told == []
    async with process(tmp_path, told) as layers:
        assert left(layers) == {number}
        layers.get(LayerSpec(blob), source)
        assert told == [(number, MEMBERS)]
        assert left(layers) == frozenset()


async def test_what_a_hint_has_shown_is_taken_back_when_a_later_process_verifies_the_layer(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    told: list[tuple[int, int]] = []
    source.knows_ranges = True
    for _ in range(2):
        async with process(tmp_path, told) as layers:
            layer = layers.get(LayerSpec(blob), source)
            assert await layer.read_stream(512, 100) == HEAD[:100]
            index = await layer.wait_complete()
            assert index.trust is Trust.HINT
    assert told == []
    async with process(tmp_path, told) as layers:
        assert left(layers) == {layer.number}
        again = layers.get(LayerSpec(blob), source)
        assert (await again.wait_trusted()).trust is Trust.CERTIFIED
        assert again.number == layer.number
        assert told == [(layer.number, MEMBERS)]
    async with process(tmp_path, told) as layers:
        assert left(layers) == frozenset()


async def test_what_turns_out_wrong_is_taken_back_and_its_number_is_not_used_again(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    told: list[tuple[int, int]] = []
    async with process(tmp_path) as layers:
        number = (await show_half(layers, source, blob)).number
    async with process(tmp_path, told) as layers:
        source.then(blob, Body(data=TAR[:-2000] + b"!" + TAR[-1999:]))
        layer = layers.get(LayerSpec(blob), source)
        assert layer.number == number
        with pytest.raises(Corrupt):
            await layer.wait_complete()
        assert layer.number != number
        assert told == [(number, MEMBERS)]
        assert left(layers) == frozenset()


@pytest.mark.parametrize("has_room_again", [False, True])
async def test_what_turns_out_wrong_is_taken_back_whether_a_new_number_can_be_kept_or_not(
    tmp_path: Path,
    source: FakeSource,
    blob: Descriptor,
    monkeypatch: pytest.MonkeyPatch,
    has_room_again: bool,
) -> None:
    def fail(*_: object) -> int:
        raise NoSpace("no space left for state.sqlite")

    monkeypatch.setattr("fsmount.layer._RETRY_SECONDS", 0.01)
    monkeypatch.setattr("fsmount.streamed._CONDEMNED_SECONDS", 0)
    told: list[tuple[int, int]] = []
    async with process(tmp_path) as layers:
        number = (await show_half(layers, source, blob)).number
    async with process(tmp_path, told) as layers:
        source.then(blob, Body(data=TAR[:-2000] + b"!" + TAR[-1999:]))
        layer = layers.get(LayerSpec(blob), source)
        with monkeypatch.context() as full:
            full.setattr(Numbers, "renew_layer", fail)
            with pytest.raises(Corrupt):
                await layer.wait_complete()
            assert told == [(number, MEMBERS)]
            with pytest.raises(Corrupt):
                layers.numbered(number)
            with pytest.raises(NoSpace):
                _ = layer.number
            # Who does not come from the kernel needs no number.
            assert await layer.read_stream(512, 100) == HEAD[:100]
            if not has_room_again:
                return
        with trio.fail_after(10):
            while layers.numbers.layer(layer.spec.key) == number:  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.01)
        assert layers.numbered(layer.number) is layer
        await layer.wait_complete()
        assert layers.numbers.numbering(layer.number) == layer.stream_numbering
        assert len(told) == 1


async def test_a_mount_that_has_just_begun_has_nothing_to_take_back(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    told: list[tuple[int, int]] = []
    async with process(tmp_path) as layers:
        await show_half(layers, source, blob)
    for _ in range(2):
        async with process(tmp_path, told) as layers:
            assert layers.shown is not None
            layers.shown.forget()
            assert left(layers) == frozenset()
            await layers.get(LayerSpec(blob), source).wait_complete()
    assert told == []


async def test_a_pass_that_broke_off_before_it_showed_anything_leaves_nothing_behind(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    async with process(tmp_path) as layers:
        source.then(blob, Body(), Body(stop=0, error=GONE))
        layer = layers.get(LayerSpec(blob), source)
        with pytest.raises(Unreachable):
            await layer.wait_complete()
    source.knows_ranges = True
    async with process(tmp_path) as layers:
        assert left(layers) == frozenset()
        index = await layers.get(LayerSpec(blob), source).wait_complete()
        assert index.trust is Trust.HINT, "nothing says that it has to be streamed"


async def test_a_command_that_shows_nothing_to_a_kernel_leaves_nothing_behind(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    async with process(tmp_path, mount=None) as layers:
        await show_half(layers, source, blob)
    async with process(tmp_path) as layers:
        assert left(layers) == frozenset()


async def test_a_full_disk_keeps_nobody_from_reading(
    tmp_path: Path, source: FakeSource, blob: Descriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise FsmountError("no space")

    async with process(tmp_path) as layers:
        for name in ("note_unverified", "forget_unverified", "keep_numbering"):
            monkeypatch.setattr(Numbers, name, fail)
        layer = layers.get(LayerSpec(blob), source)
        assert await layer.read_stream(512, 100) == HEAD[:100]
        await layer.wait_complete()


@pytest.mark.parametrize("missing", ["note_unverified", "keep_numbering"])
async def test_what_could_not_be_noted_for_the_next_process_is_noted_later(
    tmp_path: Path, source: FakeSource, blob: Descriptor, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def fail(*_: object) -> None:
        raise Busy("another process has locked state.sqlite")

    monkeypatch.setattr("fsmount.layer._RETRY_SECONDS", 0.01)
    async with process(tmp_path) as layers:
        numbers = layers.numbers
        with monkeypatch.context() as busy:
            busy.setattr(Numbers, missing, fail)
            number = (await show_half(layers, source, blob)).number
        with trio.fail_after(10):
            while not (numbers.unverified("/srv") and numbers.numbering(number)):  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.01)
    async with process(tmp_path) as layers:
        assert left(layers) == {number}


# -------------------- by which numbers


async def test_a_layer_that_a_process_has_begun_to_stream_is_streamed_by_the_next_one_too(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    async with process(tmp_path) as layers:
        await show_half(layers, source, blob)
    source.knows_ranges = True
    async with process(tmp_path) as layers:
        index = await layers.get(LayerSpec(blob), source).wait_complete()
        assert (index.trust, index.reason) == (Trust.CERTIFIED, "that had begun before a restart")


async def test_an_index_that_is_lost_and_made_again_alike_keeps_the_layer_s_number(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    numbers = []
    for _ in range(2):
        async with process(tmp_path) as layers:
            layer = layers.get(LayerSpec(blob), source)
            await layer.wait_complete()
            numbers.append(layer.number)
            layer.index_path.unlink()
    assert numbers[0] == numbers[1]


async def test_members_that_are_numbered_by_something_else_have_another_layer_number(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    told: list[tuple[int, int]] = []
    async with process(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob), source)
        await layer.wait_complete()
        number = layer.number
        layer.index_path.unlink()
    # A command that shows nothing to a kernel makes another index of it.
    source.knows_ranges = True
    async with process(tmp_path, mount=None) as layers:
        await layers.get(LayerSpec(blob), source).wait_complete()
    async with process(tmp_path, told) as layers:
        voids: list[Layer] = []
        layers.on_void.append(lambda layer, error: voids.append(layer))
        again = layers.get(LayerSpec(blob), source)
        assert again.number != number
        assert (told, voids) == ([(number, MEMBERS)], [again])
        with pytest.raises(Corrupt, match="told its members apart"):
            layers.numbered(number)
        assert await again.read_stream(512, 100) == HEAD[:100]
    with closing(Numbers(tmp_path / "state.sqlite")) as known:
        assert known.layer_key(number) is None


async def test_a_reader_who_waits_in_the_next_process_gets_what_the_layer_holds(
    tmp_path: Path, source: FakeSource, blob: Descriptor
) -> None:
    async with process(tmp_path) as layers:
        layer = await show_half(layers, source, blob)
        index = layer.index
        assert index is not None
        name = index.name(0, b"head")
        assert name is not None and name.member is not None
        head = name.member.number
    async with process(tmp_path) as layers, trio.open_nursery() as nursery:
        again = layers.get(LayerSpec(blob), source)

        async def read(offset: int) -> None:
            assert await again.read(head, offset, 5000) == HEAD[offset : offset + 5000]

        for offset in range(0, len(HEAD), 5000):
            nursery.start_soon(read, offset)
