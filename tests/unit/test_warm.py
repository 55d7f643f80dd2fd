"""What an app reads when it starts is learned from one tag, and is there for the next one before it is asked for."""

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
import trio
from trio.testing import MockClock

from fsmount.cache.folder import CacheFolder
from fsmount.cache.warmsets import WarmSets
from fsmount.catalog import App, Catalog, Content
from fsmount.errors import FsmountError, Unreachable
from fsmount.layer import Layers
from fsmount.oci.manifest import Descriptor
from fsmount.oci.platform import Platform
from fsmount.policy import Indexes
from fsmount.prefetch import Item, file_items, find_missing
from fsmount.warm import RECORD_SECONDS, Warmer, recorded_items
from tests.fakes.source import CHUNK, Body, FakeSource, Gate, open_layers, small_chunks
from tests.fakes.tar import HARDLINK, SYMLINK, Member, archive

_NAMES = [b"bin/web", b"lib/one", b"lib/two", b"share/large", b"etc/conf"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are read in chunks of 4 KiB by their tar."""
    small_chunks(monkeypatch)
    monkeypatch.setattr("fsmount.lazy._WORTHWHILE", 1)
    monkeypatch.setattr("fsmount.lazy._RAW_SPAN", CHUNK)
    monkeypatch.setattr("fsmount.indexing._JOINED", CHUNK)
    monkeypatch.setattr("fsmount.tarwalk._LEAST", 512)
    monkeypatch.setattr("fsmount.fetch._GAP", 64)


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


def noise(seed: object, chunks: int = 3) -> bytes:
    return Random(repr(seed)).randbytes(chunks * CHUNK)


def put_layer(source: FakeSource, *names: bytes, build: object, packed: bool = False) -> Descriptor:
    """A layer with a file of that name each, whose content is another in every build.

    What nobody reads is most of it: or all of it would be fetched, since so much was read.
    """
    members = (Member(name, noise((name, build))) for name in names)
    return source.put_layer(archive(*members, Member(b"unread", noise(build, 80))), packed=packed)


def put(source: FakeSource, tag: str, *names: bytes) -> None:
    """A tag of a build of its own, which has all of these files."""
    source.put_image(tag, [put_layer(source, *(names or _NAMES), build=tag)])


def app(source: FakeSource, name: str = "web", *, path: bytes = b"") -> App:
    subtree = tuple(path.split(b"/")) if path else ()
    return App(name, source, subtree, Platform("linux", "amd64"), lambda tag: True, refresh_seconds=10**6)


@dataclass
class Mount:
    """What a mount does, but for the mounting."""

    layers: Layers
    catalog: Catalog
    warmer: Warmer
    sets: WarmSets

    async def open(self, app: App, tag: str) -> Content:
        """As somebody who looks into a tag's folder."""
        return await self.catalog.content(await self.catalog.view(app, tag))

    async def read(self, app: App, tag: str, *paths: bytes) -> None:
        content = await self.open(app, tag)
        for path in paths:
            node = await content.tree.walk([*app.subtree, *path.split(b"/")])
            assert node is not None
            layer, member = content.tree.layers[node.layer], node.member.number
            if layer.read_hot(member, 0, 100) is None:
                await layer.read(member, 0, 100)

    async def is_here(self, app: App, tag: str, *paths: bytes) -> bool:
        """Whether all bytes of files are in the cache."""
        content = await self.open(app, tag)
        return not await find_missing(await items_of(content, app, *paths), self.layers.means)

    @property
    def watched(self) -> int:
        """How many recordings are told of reads of a layer, at most."""
        return max((len(layer.on_read) for layer in self.layers._layers.values()), default=0)

    @property
    def recordings(self) -> int:
        """How many are under way, or being saved."""
        return len(self.warmer._recordings)

    def known(self, app: App) -> set[bytes]:
        return set(self.sets.paths(app.name, app.origin))


async def items_of(content: Content, app: App, *paths: bytes) -> list[Item]:
    nodes = [await content.tree.walk([*app.subtree, *path.split(b"/")]) for path in paths]
    return await file_items(content.tree, [(node.layer, node.member.number) for node in nodes if node])


@asynccontextmanager
async def mounted(cache: Path, *apps: App, size: int = 10**9) -> AsyncIterator[Mount]:
    """A process that mounts; at the end of the block SIGTERM comes."""
    with closing(WarmSets(CacheFolder(cache).state)) as sets:
        async with open_layers(cache, size=size) as layers, trio.open_nursery() as nursery:
            catalog, warmer = Catalog(apps, layers, layers.nursery), Warmer(sets, layers)
            catalog.on_open.append(warmer.open)
            nursery.start_soon(warmer.run)
            yield Mount(layers, catalog, warmer, sets)
            nursery.cancel_scope.cancel()


async def comes_true(condition: Callable[[], object]) -> bool:
    """Whether it does within 5 s of real time, in which no time of trio's passes."""
    deadline = time.monotonic() + 5
    while not condition():
        if time.monotonic() > deadline:
            return False
        await trio.to_thread.run_sync(time.sleep, 0.005)
    return True


async def settles(mount: Mount) -> None:
    """Returns when nothing has been asked of a source, and nothing stored, for a while."""
    state: object = None
    while state != (state := (mount.layers.chunks.volume, len(mount.layers.nursery.child_tasks))):
        await trio.to_thread.run_sync(time.sleep, 0.1)


async def whole_recording(mount: Mount, clock: MockClock) -> None:
    """Lets the time of what is recorded pass."""
    assert mount.watched
    await settles(mount)
    clock.jump(RECORD_SECONDS + 5)
    assert await comes_true(lambda: mount.recordings == 0)


# -------------------- learned and applied


async def test_what_is_read_of_one_tag_is_there_for_the_next_before_it_is_asked_for(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    web = app(source)
    put(source, "v1")
    put(source, "v2", *_NAMES[::-1], b"new")
    async with mounted(tmp_path, web) as mount:
        await mount.read(web, "v1", b"bin/web", b"lib/two", b"bin/web")
        assert not await mount.is_here(web, "v1", b"lib/two"), "its first bytes alone are"
        await whole_recording(mount, mock_clock)
        assert mount.known(web) == {b"bin/web", b"lib/two"}
        source.ranges.clear()
        await mount.open(web, "v2")
        await settles(mount)
        assert await mount.is_here(web, "v2", b"bin/web", b"lib/two")
        for name in (b"lib/one", b"share/large", b"etc/conf", b"new"):
            assert not await mount.is_here(web, "v2", name)
        await settles(mount)
        asked = len(source.ranges)
        await mount.read(web, "v2", b"bin/web", b"lib/two")
        assert len(source.ranges) == asked


async def test_the_next_process_knows_what_was_recorded_and_does_not_record_that_tag_again(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    web = app(source)
    put(source, "v1")
    async with mounted(tmp_path, web) as mount:
        await mount.read(web, "v1", b"bin/web")
        await whole_recording(mount, mock_clock)
    async with mounted(tmp_path, web) as mount:
        await mount.read(web, "v1", b"lib/one")
        assert mount.watched == 0
        await settles(mount)
        assert await mount.is_here(web, "v1", b"bin/web"), "of a tag that was there before, too"
    with closing(WarmSets(tmp_path / "state.sqlite")) as sets:
        assert set(sets.paths(web.name, web.origin)) == {b"bin/web"}


async def test_the_time_runs_from_the_first_read_on_and_what_comes_after_is_not_noted(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    web = app(source)
    put(source, "v1")
    async with mounted(tmp_path, web) as mount:
        await mount.open(web, "v1")
        mock_clock.jump(10 * RECORD_SECONDS)  # a deployer has looked at it, and the app starts much later
        await settles(mount)
        await mount.read(web, "v1", b"bin/web")
        mock_clock.jump(RECORD_SECONDS - 10)
        await mount.read(web, "v1", b"lib/one")
        mock_clock.jump(20)
        assert await comes_true(lambda: mount.recordings == 0)
        await mount.read(web, "v1", b"lib/two")
    with closing(WarmSets(tmp_path / "state.sqlite")) as sets:
        assert set(sets.paths(web.name, web.origin)) == {b"bin/web", b"lib/one"}


async def test_a_process_that_ends_early_saves_what_it_has_and_the_next_one_records_on(
    tmp_path: Path, source: FakeSource
) -> None:
    web = app(source)
    put(source, "v1")
    for name in _NAMES[:3]:
        async with mounted(tmp_path, web) as mount:
            await mount.read(web, "v1", name)
            assert mount.watched == 1
    async with mounted(tmp_path, web) as mount:
        assert mount.known(web) == set(_NAMES[:3]), "none of them counts as missed"


async def test_nothing_is_saved_of_who_has_read_nothing(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    web = app(source)
    put(source, "v1")
    async with mounted(tmp_path, web) as mount:
        await (await mount.open(web, "v1")).tree.stored()
        mock_clock.jump(RECORD_SECONDS * 2)
    async with mounted(tmp_path, web) as mount:
        await mount.open(web, "v1")
        assert mount.watched == 1
        assert mount.known(web) == set()


async def test_paths_begin_at_the_folder_that_the_app_shows_and_what_is_outside_has_none(
    tmp_path: Path, source: FakeSource
) -> None:
    whole, part = app(source, "whole"), app(source, "part", path=b"srv/app")
    source.put_image("v1", [put_layer(source, b"srv/app/bin/web", b"usr/lib/one", build=1)])
    async with mounted(tmp_path, whole, part) as mount:
        await mount.open(whole, "v1")
        await mount.open(part, "v1")
        await mount.read(whole, "v1", b"srv/app/bin/web", b"usr/lib/one")
    async with mounted(tmp_path, whole, part) as mount:
        assert mount.known(whole) == {b"srv/app/bin/web", b"usr/lib/one"}
        assert mount.known(part) == {b"bin/web"}, (
            "equal content is one inode: nobody knows for whom it was read"
        )


async def test_all_names_of_a_file_are_learned_and_what_a_symlink_leads_to(
    tmp_path: Path, source: FakeSource
) -> None:
    web = app(source)
    tar = archive(
        Member(b"bin/web", noise(1)),
        Member(b"bin/again", type=HARDLINK, link=b"bin/web"),
        Member(b"current", type=SYMLINK, link=b"bin"),
    )
    source.put_image("v1", [source.put_layer(tar)])
    async with mounted(tmp_path, web) as mount:
        await mount.read(web, "v1", b"bin/again")
    async with mounted(tmp_path, web) as mount:
        assert mount.known(web) == {b"bin/web", b"bin/again"}


async def test_a_path_that_the_next_tag_has_as_something_else_is_passed_over(
    tmp_path: Path, source: FakeSource
) -> None:
    web = app(source)
    put(source, "v1", b"a/file", b"b/file", b"c", b"gone", b"stays")
    members = (
        Member(b"a", b"now a file"),
        Member(b"b", type=SYMLINK, link=b"elsewhere"),
        Member(b"elsewhere/file", noise(1)),
        Member(b"c/file", noise(2)),
        Member(b"stays", noise(3)),
    )
    source.put_image("v2", [source.put_layer(archive(*members))])
    async with mounted(tmp_path, web) as mount:
        await mount.read(web, "v1", b"a/file", b"b/file", b"c", b"gone", b"stays")
    async with mounted(tmp_path, web) as mount:
        content = await mount.open(web, "v2")
        items = await recorded_items(mount.sets, web, content)
        assert [item.size for item in items] == [3 * CHUNK]
        await settles(mount)
        assert await mount.is_here(web, "v2", b"stays")
        assert not await mount.is_here(web, "v2", b"elsewhere/file")


# -------------------- forgotten


async def record(
    cache: Path, clock: MockClock, web: App, tag: str, *paths: bytes, expected: Mapping[bytes, bool]
) -> None:
    """One whole recording by a process of its own; afterwards the set has the expected paths, and not the others."""
    async with mounted(cache, web) as mount:
        await mount.read(web, tag, *paths)
        await whole_recording(mount, clock)
        known = mount.known(web)
        assert {path: path in known for path in expected} == expected


async def test_what_three_builds_in_a_row_did_not_read_is_forgotten(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    web = app(source)
    for tag in ("v1", "v2", "v3", "v4"):
        put(source, tag)
    start = [b"bin/web"]
    await record(tmp_path, mock_clock, web, "v1", *start, b"lib/one", expected={b"lib/one": True})
    for tag in ("v2", "v3"):
        await record(tmp_path, mock_clock, web, tag, *start, expected={b"lib/one": True})
    await record(tmp_path, mock_clock, web, "v4", *start, expected={b"lib/one": False, b"bin/web": True})


async def test_what_is_the_same_file_in_the_next_builds_is_not_missed_since_the_kernel_has_it(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    web = app(source)
    base = put_layer(source, b"lib/one", b"lib/two", build="base")
    for tag in ("v1", "v2", "v3", "v4", "v5"):
        source.put_image(tag, [base, put_layer(source, b"bin/web", build=tag)])
    everything = {b"bin/web": True, b"lib/one": True}
    await record(tmp_path, mock_clock, web, "v1", b"bin/web", b"lib/one", expected=everything)
    for tag in ("v2", "v3", "v4", "v5"):
        await record(tmp_path, mock_clock, web, tag, b"bin/web", expected=everything)


async def test_who_reads_next_to_nothing_of_what_the_app_reads_is_not_the_app(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    web = app(source)
    files = [b"lib/%02d" % number for number in range(30)]
    for tag in ("v1", "v2", "v3", "v4", "v5"):
        put(source, tag, b"VERSION", *files)
    everything = dict.fromkeys(files, True)
    await record(tmp_path, mock_clock, web, "v1", *files, expected=everything)
    for tag in ("v2", "v3", "v4", "v5"):
        await record(tmp_path, mock_clock, web, tag, b"VERSION", expected=everything | {b"VERSION": True})


# -------------------- bounds


async def test_one_who_looks_into_many_tags_is_not_recorded_everywhere_and_the_app_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: FakeSource
) -> None:
    monkeypatch.setattr("fsmount.warm._MOST_RECORDINGS", 3)
    web = app(source)
    base = put_layer(source, b"lib/one", build="base")
    for number in range(9):
        source.put_image(f"v{number}", [base, put_layer(source, b"bin/web", build=number)])
    async with mounted(tmp_path, web) as mount:
        for number in range(8):
            await mount.open(web, f"v{number}")
            assert mount.watched <= 3
        await mount.read(web, "v7", b"bin/web")
        await mount.open(web, "v8")
        await mount.read(web, "v8", b"lib/one")
    async with mounted(tmp_path, web) as mount:
        assert mount.known(web) == {b"bin/web", b"lib/one"}


async def test_no_more_is_noted_than_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: FakeSource
) -> None:
    monkeypatch.setattr("fsmount.warm.MOST_PATHS", 2)
    web = app(source)
    put(source, "v1")
    async with mounted(tmp_path, web) as mount:
        await mount.read(web, "v1", *_NAMES)
    async with mounted(tmp_path, web) as mount:
        assert mount.known(web) == set(_NAMES[:2])


async def learn(cache: Path, web: App, tag: str, *paths: bytes) -> None:
    async with mounted(cache, web) as mount:
        await mount.read(web, tag, *paths)


async def test_a_warm_set_that_would_fill_more_than_half_of_the_cache_is_not_fetched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: FakeSource
) -> None:
    caplog.set_level(logging.INFO, "fsmount.warm")
    web = app(source)
    put(source, "v1")
    put(source, "v2")
    await learn(tmp_path, web, "v1", *_NAMES)
    size = 2 * len(_NAMES) * 3 * CHUNK
    async with mounted(tmp_path, web, size=size - CHUNK) as mount:
        await mount.open(web, "v2")
        await settles(mount)
        assert not any([await mount.is_here(web, "v2", name) for name in _NAMES])
        assert "too many for the cache" in caplog.text
    async with mounted(tmp_path, web) as mount:
        await mount.open(web, "v2")
        await settles(mount)
        assert await mount.is_here(web, "v2", *_NAMES)


async def test_for_one_who_looks_into_one_tag_after_the_other_nothing_has_to_go(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    web, other = app(source), app(source, "other")
    tags = [f"v{number}" for number in range(5)]
    for tag in [*tags, "other"]:
        put(source, tag)
    blobs = [put_layer(source, *_NAMES, build=tag) for tag in tags]  # those of the tags
    await learn(tmp_path, web, "v0", b"bin/web", b"lib/one")
    async with mounted(tmp_path, web, other) as mount:
        await mount.read(other, "other", *_NAMES)
        await settles(mount)
        size = mount.layers.chunks.volume + 2 * CHUNK  # no room for the seven chunks of another tag
    async with mounted(tmp_path, web, size=size) as mount:
        for tag in tags[1:]:
            await mount.open(web, tag)
        await settles(mount)
        for tag in tags[1:]:
            assert not await mount.is_here(web, tag, b"bin/web")
        before = [source.fetched(blob) for blob in blobs]
        mock_clock.jump(2)
        await settles(mount)
        after = [source.fetched(blob) for blob in blobs]
        assert [new > old for new, old in zip(after, before, strict=True)] == [False] * 4 + [True]


async def test_a_layer_that_cannot_be_read_in_parts_is_streamed(tmp_path: Path, source: FakeSource) -> None:
    web = replace(app(source), indexes=Indexes.OFF)
    blobs = [put_layer(source, b"bin/web", b"lib/one", build=build, packed=True) for build in (1, 2)]
    for number, blob in enumerate(blobs, 1):
        source.put_image(f"v{number}", [blob])
    await learn(tmp_path, web, "v1", b"bin/web")
    async with mounted(tmp_path, web) as mount:
        await mount.open(web, "v2")
        await settles(mount)
        assert source.fetched(blobs[1]) == 1
        assert await mount.is_here(web, "v2", b"bin/web")
        assert source.fetched(blobs[1]) == 1


async def test_what_is_read_while_the_layer_streams_is_learned_when_its_tree_is_known(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    web = replace(app(source), indexes=Indexes.OFF)
    blob = put_layer(source, b"web", b"one", build=1)
    source.put_image("v1", [blob])
    gate = Gate()
    gate.let(40 * CHUNK)
    source.then(blob, Body(gate=gate))
    async with mounted(tmp_path, web) as mount:
        await mount.read(web, "v1", b"web")
        mock_clock.jump(RECORD_SECONDS + 5)
        await settles(mount)
        assert mount.watched == 1
        gate.open()
        await settles(mount)
        mock_clock.jump(5)
        assert await comes_true(lambda: mount.recordings == 0)
        assert mount.known(web) == {b"web"}


# -------------------- failures


async def test_what_cannot_be_fetched_ahead_costs_nobody_anything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: FakeSource
) -> None:
    web = app(source)
    put(source, "v1")
    put(source, "v2")
    await learn(tmp_path, web, "v1", b"bin/web")
    async with mounted(tmp_path, web) as mount:
        content = await mount.open(web, "v2")
        source.away = Unreachable("the registry went away")
        await settles(mount)
        source.away = None
        assert content is await mount.open(web, "v2")
        await mount.read(web, "v2", b"bin/web")


async def test_a_state_that_cannot_be_used_costs_the_recording_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise FsmountError("state.sqlite cannot be used")

    web = app(source)
    put(source, "v1")
    for method in ("is_recorded", "paths"):
        monkeypatch.setattr(WarmSets, method, fail)
    async with mounted(tmp_path, web) as mount:
        await mount.read(web, "v1", b"bin/web")
        assert mount.watched == 0
    assert caplog.text.count("state.sqlite cannot be used") == 2
