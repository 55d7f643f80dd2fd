"""What files need of their layers is fetched: that and no more, whatever the server can do, or it is said why not."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import trio
import zstandard
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount.catalog import App, Catalog
from fsmount.errors import Corrupt, NoSpace, Unreachable
from fsmount.layer import Layers
from fsmount.lazy import LayerSpec
from fsmount.oci.digest import Digest
from fsmount.oci.platform import Platform
from fsmount.prefetch import Item, bring, check_room, file_items, find_missing, layer_items
from fsmount.tree import Tree
from tests.fakes.source import CHUNK, Body, FakeSource, Gate, open_layers, small_chunks
from tests.fakes.tar import HARDLINK, Member, archive, sparse

#: Less than half of the layer, and in two places that no one request brings.
_FILES = {b"first": 3, b"unread": 60, b"last": 4, b"rest": 20}


def _noise(name: bytes, chunks: int) -> bytes:
    return Random(name).randbytes(chunks * CHUNK)


_TAR = archive(
    *(Member(name, _noise(name, chunks)) for name, chunks in _FILES.items()),
    Member(b"again", type=HARDLINK, link=b"first"),
    Member(b"empty"),
    bytes(sparse("1.0", b"sparse", 10**6, [(500_000, b"island")])),
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are read in chunks of 4 KiB by their tar."""
    small_chunks(monkeypatch)
    monkeypatch.setattr("fsmount.lazy._WORTHWHILE", 1)
    monkeypatch.setattr("fsmount.lazy._RAW_SPAN", CHUNK)
    monkeypatch.setattr("fsmount.indexing._JOINED", CHUNK)
    monkeypatch.setattr("fsmount.tarwalk._LEAST", 512)
    monkeypatch.setattr("fsmount.fetch._GAP", 64)


@dataclass
class Image:
    """An image of one layer, in one process."""

    source: FakeSource
    layers: Layers
    tree: Tree

    async def items(self, *names: bytes) -> list[Item]:
        stored = await self.tree.stored()
        found = dict(stored.files(0, names))
        assert set(found) == set(names)
        return await file_items(self.tree, [(node.layer, node.member.number) for node in found.values()])

    async def fetch(self, items: list[Item]) -> None:
        await bring(await find_missing(items, self.layers.means), self.layers.means)

    async def is_here(self, *names: bytes) -> bool:
        return not await find_missing(await self.items(*names), self.layers.means)


@asynccontextmanager
async def opened(cache: Path, *, size: int = 10**9, is_packed: bool = False) -> AsyncIterator[Image]:
    """is_packed: so that no part of it can be had alone."""
    source = FakeSource()
    if is_packed:
        packed = zstandard.compress(_TAR)
        spec = LayerSpec(source.put_blob(packed, "application/vnd.oci.image.layer.v1.tar+zstd"))
    else:
        spec = LayerSpec(source.put_layer(_TAR))
    async with open_layers(cache, size=size) as layers:
        digest = spec.descriptor.digest
        yield Image(source, layers, Tree(digest, [layers.get(spec, source)], layers.folder, layers.nursery))


async def test_what_files_need_is_fetched_once_and_no_more_than_that(tmp_path: Path) -> None:
    async with opened(tmp_path) as image:
        items = await image.items(b"first", b"last")
        assert [item.size for item in items] == [3 * CHUNK, 4 * CHUNK]
        assert not await image.is_here(b"first") and not await image.is_here(b"last")
        image.source.ranges.clear()
        await image.fetch(items)
        assert await image.is_here(b"first", b"last")
        assert not await image.is_here(b"unread")
        assert len(image.source.ranges) == 2, "one for each place"
        assert sum(stop - start for start, stop in image.source.ranges) <= 9 * CHUNK
        await image.fetch(await image.items(b"first", b"last"))
        assert len(image.source.ranges) == 2, "they are here"
    async with opened(tmp_path) as image:
        assert await image.is_here(b"first", b"last"), "for any process of the cache"


async def test_names_of_one_file_count_once_and_holes_and_the_empty_need_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as image:
        assert len(await image.items(b"first", b"again")) == 1
        assert [list(item.chunks) for item in await image.items(b"empty")] == [[]]
        (item,) = await image.items(b"sparse")
        assert item.size == 10**6
        assert len(item.chunks) <= 2


async def test_what_is_on_its_way_already_is_waited_for(tmp_path: Path) -> None:
    async with opened(tmp_path) as image:
        items = await image.items(b"first")
        gate = Gate()
        image.source.then(image.tree.layers[0].spec.descriptor, Body(gate=gate))
        fetcher = image.tree.layers[0].fetcher
        assert fetcher is not None
        image.source.ranges.clear()
        fetcher.prefetch(items[0].chunks)
        done = trio.Event()

        async def fetch() -> None:
            await image.fetch(items)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch)
            await gate.held.wait()
            assert not done.is_set()
            gate.open()
        assert await image.is_here(b"first")
        assert len(image.source.ranges) == 1


async def test_a_server_without_ranges_and_a_hint_that_is_not_to_be_trusted_cost_the_whole_layer(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as image:
        items = await image.items(b"first", b"last")
        image.source.knows_ranges = False
        await image.fetch(items)
        assert await image.is_here(b"first", b"last")


async def test_a_layer_that_is_only_streamed_is_whole_here_once_its_files_are_known(tmp_path: Path) -> None:
    async with opened(tmp_path, is_packed=True) as image:
        assert await image.is_here(*_FILES)
        # Some of it was evicted since.
        layer = image.tree.layers[0]
        await image.layers.chunks.drop([layer.chunk_key(number) for number in range(5)])
        assert not await image.is_here(b"first")
        await image.fetch(await image.items(b"first"))
        assert await image.is_here(b"first")
        assert image.source.ranges == [(0, layer.spec.descriptor.size)] * 2


async def test_all_layers_are_items_too(tmp_path: Path) -> None:
    async with opened(tmp_path) as image:
        (item,) = await layer_items(image.tree, image.layers.means)
        assert item.size == len(_TAR)
        await image.fetch([item])
        assert await image.is_here(*_FILES)


async def test_what_the_cache_cannot_hold_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    async with opened(tmp_path, size=50 * CHUNK) as image:
        await check_room(await image.items(b"first", b"last", b"rest"), image.layers.means)
        asked = len(image.source.ranges)
        for refused in (
            check_room(await image.items(b"unread"), image.layers.means),
            layer_items(image.tree, image.layers.means),
        ):
            with pytest.raises(NoSpace, match=f"holds {50 * CHUNK} at most"):
                await refused
        assert len(image.source.ranges) == asked


async def test_that_chunks_were_fetched_and_not_kept_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as image:
        items = await image.items(b"first")
        monkeypatch.setattr(type(image.layers.chunks), "put", lambda *_: False)
        with pytest.raises(NoSpace, match="has not kept 4 of 4"):
            await image.fetch(items)


async def test_a_source_that_is_away_is_one_error_and_not_a_group(tmp_path: Path) -> None:
    async with opened(tmp_path) as image:
        items = await image.items(b"first", b"last")
        image.source.away = Unreachable("the registry went away")
        with pytest.raises(Unreachable):
            await image.fetch(items)


async def test_what_has_changed_since_somebody_has_seen_it_is_an_error(tmp_path: Path) -> None:
    async with opened(tmp_path) as image:
        layer = image.tree.layers[0]
        items = await image.items(b"first")
        await image.fetch(items)
        await image.layers.chunks.drop([layer.chunk_key(number) for number in items[0].chunks])
        changed = bytearray(_TAR)
        changed[CHUNK] ^= 1
        image.source.then(layer.spec.descriptor, *[Body(data=bytes(changed))] * 2)
        with pytest.raises(Corrupt):
            await image.fetch(items)
        assert list((tmp_path / "chunks").rglob("*.val")) == []


# -------------------- what a tag is, for those who fetch for mounts


def _app(source: FakeSource) -> App:
    return App("web", source, (), Platform("linux", "amd64"), lambda tag: True, refresh_seconds=60)


async def test_what_was_fetched_for_mounts_they_find_without_the_registry(tmp_path: Path) -> None:
    source = FakeSource()
    digest = source.put_image("v1", [source.put_layer(_TAR)])
    web = _app(source)
    async with open_layers(tmp_path) as layers:
        content = await Catalog([web], layers, layers.nursery).open_for_mounts(web, "v1")
        await bring(
            await find_missing(await layer_items(content.tree, layers.means), layers.means), layers.means
        )
    source.away = Unreachable("the registry went away")
    async with open_layers(tmp_path) as layers:
        catalog = Catalog([web], layers, layers.nursery)
        content = await catalog.content(await catalog.view(web, "v1"))
        assert content.image.digest == digest
        node = await content.tree.walk([b"last"])
        assert node is not None
        data = await content.tree.layers[node.layer].read(node.member.number, 0, 10**9)
        assert data == _noise(b"last", _FILES[b"last"])


async def test_without_the_registry_a_tag_is_what_it_was_last_known_to_be(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    source = FakeSource()
    old = source.put_image("v1", [source.put_layer(_TAR)])
    web = _app(source)
    async with open_layers(tmp_path) as layers:
        catalog = Catalog([web], layers, layers.nursery)
        source.away = Unreachable("the registry went away")
        with pytest.raises(Unreachable):
            await catalog.open_for_mounts(web, "v1")
        source.away = None
        await catalog.content(await catalog.view(web, "v1"))
        new = source.put_image("v1", [source.put_layer(archive(Member(b"new", b"new")))])
        source.away = Unreachable("the registry went away")
        assert (await catalog.open_for_mounts(web, "v1")).image.digest == old
        with pytest.raises(Unreachable):
            await catalog.open_for_mounts(web, "v2")
        source.away = None
        assert (await catalog.open_for_mounts(web, "v1")).image.digest == new
        source.silent = Gate()
        opened: list[Digest] = []

        async def open_patiently() -> None:
            opened.append((await catalog.open_for_mounts(web, "v1", patience_seconds=3)).image.digest)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_patiently)
            await source.silent.held.wait()
            mock_clock.jump(2.9)
            await wait_all_tasks_blocked()
            assert opened == []
            mock_clock.jump(0.1)
        assert opened == [new]


async def test_what_is_no_app_leaves_nothing_for_mounts(tmp_path: Path) -> None:
    source = FakeSource()
    source.put_image("v1", [source.put_layer(_TAR)])
    web = _app(source)
    async with open_layers(tmp_path) as layers:
        await Catalog([], layers, layers.nursery).open_for_mounts(web, "v1")
        assert layers.numbers.latest_view(web.name, "v1", web.origin) is None
