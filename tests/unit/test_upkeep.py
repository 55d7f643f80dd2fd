"""What a mount does unasked: it verifies what an earlier process has shown; and at once when it is told to."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount.catalog import App, Catalog
from fsmount.errors import AccessDenied, NotFound, Unreachable
from fsmount.layer import Layers
from fsmount.oci.digest import Digest
from fsmount.oci.platform import Platform
from fsmount.upkeep import Move, RefreshReport, Upkeep
from tests.fakes.source import CHUNK, Body, FakeSource, Gate, open_layers, small_chunks
from tests.fakes.tar import Member, archive

GONE = Unreachable("the registry went away")
DATA = bytes(range(256)) * 16 * 8


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock) -> None:
    """Time stands still: nothing that is known becomes old."""
    small_chunks(monkeypatch)


def put(source: FakeSource, tag: str | None, name: bytes) -> Digest:
    """An image of a file of that name."""
    return source.put_image(tag, [source.put_layer(archive(Member(name, DATA)))])


@pytest.fixture
def source() -> FakeSource:
    source = FakeSource()
    for tag in ("v1", "v2", "v3"):
        put(source, tag, tag.encode())
    return source


@asynccontextmanager
async def process(
    cache: Path, *sources: FakeSource, runs: bool = False
) -> AsyncIterator[tuple[Upkeep, Catalog, Layers]]:
    """One process of a mount with an app for each source, called like it."""
    apps = [
        App(source.name, source, (), Platform("linux", "amd64"), lambda tag: tag != "hidden", 60)
        for source in sources
    ]
    async with open_layers(cache, mount="/srv") as layers:
        catalog = Catalog(apps, layers, layers.nursery)
        upkeep = Upkeep(catalog, layers)
        if runs:
            layers.nursery.start_soon(upkeep.run)
        yield upkeep, catalog, layers


async def open_tag(catalog: Catalog, source: FakeSource, tag: str) -> int:
    """Looks into a tag, as somebody does who finds it by its path; returns its view's number."""
    view = await catalog.view(catalog.apps[source.name], tag)
    await (await catalog.content(view)).tree.stored()
    return view.number


# -------------------- told to look again


async def test_a_refresh_says_what_has_moved_come_and_gone_and_the_next_look_finds_that(
    tmp_path: Path, source: FakeSource
) -> None:
    name = source.name
    async with process(tmp_path, source) as (upkeep, catalog, _):
        await catalog.tags(catalog.apps[name])
        numbers = {tag: await open_tag(catalog, source, tag) for tag in ("v1", "v2", "v3")}
        before = source.listed["v1"]
        report = await upkeep.refresh()
        assert (report.is_change, report.asked, report.failures) == (False, 3, [])
        after = put(source, "v1", b"moved")
        put(source, "v4", b"new")
        put(source, "hidden", b"not listed")
        del source.listed["v3"]
        source.asked.clear()
        report = await upkeep.refresh(name)
        assert report == RefreshReport(
            moved=[Move(name, "v1", before, after)], appeared=[(name, "v4")], gone=[(name, "v3")], asked=2
        )
        assert report.is_change
        assert source.asked == {"tags": 1, "v1": 1, "v2": 1}
        assert await catalog.tags(catalog.apps[name]) == {"v1", "v2", "v4"}
        moved = await catalog.view(catalog.apps[name], "v1")
        assert moved.number != numbers["v1"] and moved.record.digest == after
        assert await open_tag(catalog, source, "v2") == numbers["v2"]
        with pytest.raises(NotFound):
            await catalog.view(catalog.apps[name], "v3")
        assert not (await upkeep.refresh()).is_change


async def test_a_refresh_asks_also_for_what_only_an_earlier_process_has_looked_into(
    tmp_path: Path, source: FakeSource
) -> None:
    async with process(tmp_path, source) as (_, catalog, _):
        old = await open_tag(catalog, source, "v1")
        before = source.listed["v1"]
        pinned = await catalog.view(catalog.apps[source.name], f"v1@{before}")
    after = put(source, "v1", b"moved")
    async with process(tmp_path, source) as (upkeep, catalog, _):
        source.asked.clear()
        report = await upkeep.refresh()
        assert report.moved == [Move(source.name, "v1", before, after)]
        assert source.asked == {"tags": 1, "v1": 1}, "what is named by a digest does not move"
        assert await open_tag(catalog, source, "v1") != old
        assert (await catalog.view(catalog.apps[source.name], f"v1@{before}")).number == pinned.number


async def test_a_refresh_of_one_tag_asks_for_that_alone(tmp_path: Path, source: FakeSource) -> None:
    name = source.name
    async with process(tmp_path, source) as (upkeep, catalog, _):
        for tag in ("v1", "v2"):
            await open_tag(catalog, source, tag)
        before, after = source.listed["v1"], put(source, "v1", b"moved")
        put(source, "v2", b"moved too")
        source.asked.clear()
        assert (await upkeep.refresh(name, "v1")).moved == [Move(name, "v1", before, after)]
        assert source.asked == {"v1": 1}
        del source.listed["v1"]
        assert (await upkeep.refresh(name, "v1")).gone == [(name, "v1")]
        assert (await upkeep.refresh(name, "v3")) == RefreshReport(asked=1), "nobody has looked into it"


async def test_what_a_refresh_cannot_find_out_is_told_and_keeps_it_from_nothing_else(
    tmp_path: Path, source: FakeSource
) -> None:
    gone = FakeSource(name="gone", listed=source.listed, _documents=source._documents, _blobs=source._blobs)
    refused = FakeSource(
        name="refused", listed=source.listed, _documents=source._documents, _blobs=source._blobs
    )
    sources = source, gone, refused
    async with process(tmp_path, *sources) as (upkeep, catalog, _):
        for one in sources:
            await open_tag(catalog, one, "v1")
        gone.away, refused.away = GONE, AccessDenied("no")
        before, after = source.listed["v1"], put(source, "v1", b"moved")
        report = await upkeep.refresh()
        assert report.moved == [Move(source.name, "v1", before, after)]
        failures = [(one.app, one.tag, one.error) for one in report.failures]
        # Who may not list the tags may yet ask for one of them.
        expected = [("gone", None, GONE), ("refused", None, refused.away), ("refused", "v1", refused.away)]
        assert sorted(failures, key=lambda one: (one[0], one[1] or "")) == expected


async def test_a_refresh_of_an_app_that_there_is_not_names_those_that_there_are(
    tmp_path: Path, source: FakeSource
) -> None:
    async with process(tmp_path, source) as (upkeep, _, _):
        with pytest.raises(NotFound, match="no app 'nothing'") as caught:
            await upkeep.refresh("nothing")
        assert source.name in str(caught.value)


# -------------------- unasked


async def test_what_a_process_left_unverified_is_verified_by_the_next_one_though_nobody_asks_for_it(
    tmp_path: Path, source: FakeSource, mock_clock: MockClock
) -> None:
    layer = source.put_layer(archive(Member(b"a", DATA), Member(b"b", DATA)))
    source.put_image("v1", [layer])
    first, second, third = Gate(), Gate(), Gate()
    first.let(5 * CHUNK)
    source.then(layer, Body(gate=first), Body(gate=second, stop=0, error=GONE), Body(gate=third))
    async with process(tmp_path, source) as (_, catalog, layers):
        view = await catalog.view(catalog.apps[source.name], "v1")
        content = await catalog.content(view)
        number = content.tree.layers[0].number
        await content.tree.layers[0].read_stream(0, 10)
    told: list[tuple[int, int]] = []
    async with process(tmp_path, source, runs=True) as (_, catalog, layers):
        assert layers.shown is not None
        layers.shown.on_stale.append(lambda *what: told.append(what))
        await second.held.wait()
        second.open()
        # It is tried again after a minute.
        while not third.held.is_set():
            await trio.to_thread.run_sync(time.sleep, 0.001)
            mock_clock.jump(60)
        assert (source.fetched(layer), told) == (3, [])
        third.open()
        found = layers.numbered(number)
        assert found is not None
        await found.wait_complete()
        assert told == [(number, 3)]


async def test_after_a_start_the_lists_that_are_known_are_asked_for_at_some_moment_and_others_are_not(
    tmp_path: Path, source: FakeSource, mock_clock: MockClock
) -> None:
    unknown = FakeSource(name="never-listed")
    async with process(tmp_path, source, unknown) as (_, catalog, _):
        await catalog.tags(catalog.apps[source.name])
    source.asked.clear()
    put(source, "v4", b"new")
    async with process(tmp_path, source, unknown, runs=True) as (_, catalog, _):
        await wait_all_tasks_blocked()
        assert source.asked.total() == 0
        mock_clock.jump(60)
        await wait_all_tasks_blocked()
        assert source.asked == {"tags": 1} and unknown.asked.total() == 0
        assert "v4" in await catalog.tags(catalog.apps[source.name])
