"""Layers that are read in parts while their index changes, mirrors lie, or other processes are quicker."""

from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fsmount.archive.span import Trust
from fsmount.archive.ztoc_builder import ZtocBuilder
from fsmount.errors import Corrupt
from fsmount.layer import Layer
from fsmount.lazy import LayerSpec
from tests.fakes.source import CHUNK, Body, FakeSource, Gate, open_layers
from tests.fakes.tar import Member, archive
from tests.unit.test_lazy import (  # noqa: F401 - fixtures
    FILES,
    FORMS,
    OTHER_NAMES,
    _small,
    content,
    find,
    packed,
    put_gzip,
    put_soci,
    source,
)

_WRONG = b"\xff" * 10**6


def lying(source: FakeSource, *, span_size: int = CHUNK) -> LayerSpec:  # noqa: F811
    """A layer with a SOCI index that gives its members other names."""
    truth, other = ZtocBuilder(span_size=span_size), ZtocBuilder(span_size=CHUNK)
    list(truth.feed(packed()))
    list(other.feed(packed(archive(*(Member(name, data) for name, data in OTHER_NAMES.items())))))
    truth.entries[:] = other.entries
    return put_soci(source, put_gzip(source), truth.finish(tool="a liar"), version=1)


async def read(layer: Layer, member: int, outcomes: list[str]) -> None:
    try:
        await layer.read(member, 0, 100)
        outcomes.append("read")
    except Corrupt:
        outcomes.append("corrupt")


async def test_what_a_void_index_has_on_its_way_is_stored_under_no_key_of_the_next(
    tmp_path: Path,
    source: FakeSource,  # noqa: F811
) -> None:
    spec = lying(source, span_size=3 * CHUNK)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        index = await layer.wait_complete()
        gate = Gate()
        source.then(spec.descriptor, Body(gate=gate))
        assert layer.fetcher is not None
        layer.fetcher.prefetch([len(index.chunks) // 2])
        await gate.held.wait()
        assert (await layer.wait_trusted()).trust is Trust.CERTIFIED
        gate.open()
        with trio.move_on_after(0.2):
            await trio.sleep_forever()
        for path, data in FILES.items():
            assert await content(layer, path) == data


async def test_each_process_finds_out_by_itself_that_an_index_lied(
    tmp_path: Path,
    source: FakeSource,  # noqa: F811
) -> None:
    spec = lying(source)
    async with open_layers(tmp_path) as ours, open_layers(tmp_path) as theirs:
        layers = [process.get(spec, source) for process in (ours, theirs)]
        numbers = [layer.number for layer in layers]
        for layer in layers:
            await find(layer, b"smell/07")
        for layer in reversed(layers):
            await layer.wait_trusted()
        assert all(layer.number != number for layer, number in zip(layers, numbers, strict=True))


async def test_who_waits_when_an_index_turns_out_to_lie_hears_it(
    tmp_path: Path,
    source: FakeSource,  # noqa: F811
) -> None:
    spec = lying(source)
    outcomes: list[str] = []
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        member = await find(layer, b"large")
        gate = Gate()
        source.then(spec.descriptor, Body(data=_WRONG[: spec.descriptor.size]), Body(gate=gate))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, layer, member, outcomes)
            await gate.held.wait()
            gate.open()
    assert outcomes == ["corrupt"]


async def test_an_index_is_not_closed_while_a_pass_compares_with_it(
    tmp_path: Path,
    source: FakeSource,  # noqa: F811
) -> None:
    spec = FORMS["SOCI v1"].put(source)
    async with open_layers(tmp_path) as layers, trio.open_nursery() as nursery:
        layer = layers.get(spec, source)
        await layer.wait_complete()
        gate = Gate()
        source.then(spec.descriptor, Body(gate=gate))
        nursery.start_soon(layer.wait_trusted)
        await gate.held.wait()
        layer.close_index()
        gate.open()


@pytest.mark.parametrize("form", ["eStargz", "SOCI v1"])
async def test_while_a_mirror_is_asked_again_for_a_chunk_others_wait_for_it_too(
    tmp_path: Path,
    source: FakeSource,  # noqa: F811
    form: str,
) -> None:
    spec = FORMS[form].put(source)
    outcomes: list[str] = []
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        member = await find(layer, b"last")
        source.ranges.clear()
        source.mirrors = 1
        gate = Gate()
        source.then(spec.descriptor, Body(data=_WRONG[: spec.descriptor.size]), Body(gate=gate))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, layer, member, outcomes)
            await gate.held.wait()
            nursery.start_soon(read, layer, member, outcomes)
            await wait_all_tasks_blocked()
            gate.open()
        assert outcomes == ["read", "read"]
        assert (0, spec.descriptor.size) not in source.ranges


async def test_where_a_mirror_sends_all_of_it_wrong_the_next_one_is_asked(
    tmp_path: Path,
    source: FakeSource,  # noqa: F811
) -> None:
    spec = FORMS["eStargz"].put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        member = await find(layer, b"last")
        source.knows_ranges = False
        source.mirrors = 1
        source.then(spec.descriptor, Body(data=_WRONG[: spec.descriptor.size]))
        with trio.fail_after(10):
            assert await layer.read(member, 0, 100) == FILES[b"last"][:100]
            for path, data in FILES.items():
                assert await content(layer, path) == data
