"""prefetch: which chunks some files of a tree lie in, and having those here that are not."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

import trio

from fsmount.archive.span import Trust
from fsmount.errors import Corrupt, FsmountError, NoSpace
from fsmount.fetch import RangesIgnored
from fsmount.layer import Layer
from fsmount.singleflight import single_error
from fsmount.streamed import Means
from fsmount.tree import Tree

log = logging.getLogger(__name__)


class Item(NamedTuple):
    """A file or a layer that is wanted here: its bytes, and the numbers of the chunks of its layer that it needs."""

    layer: Layer
    size: int
    chunks: Sequence[int]


async def file_items(tree: Tree, files: Iterable[tuple[int, int]]) -> list[Item]:
    """What files need, each given by the position of its layer and its member there; several names of one count once.

    Raises: Corrupt, Unreachable and other kinds of FsmountError: an index that is not here is made, or fetched.
    """
    members: dict[Layer, set[int]] = defaultdict(set)
    for position, member in files:
        members[tree.layers[position]].add(member)
    items: list[Item] = []
    for layer, numbers in members.items():
        await layer.wait_complete()
        items += await trio.to_thread.run_sync(_file_items, layer, sorted(numbers))
    return items


def _file_items(layer: Layer, members: Iterable[int]) -> list[Item]:
    items: list[Item] = []
    with closing(layer.reopen_index()) as index:
        for member in members:
            size, extents = index.content(member) or (0, ())
            chunks = {
                number
                for extent in extents
                if extent.size
                for number in range(
                    index.chunk_at(extent.offset), index.chunk_at(extent.offset + extent.size - 1) + 1
                )
            }
            items.append(Item(layer, size, sorted(chunks)))
    return items


async def layer_items(tree: Tree, means: Means) -> list[Item]:
    """What all layers need, each an item. Raises: NoSpace (they cannot be in the cache at once), as `file_items`."""
    layers = list(dict.fromkeys(tree.layers))
    # Hardly ever does a layer inflate to less; and for some of them only streaming would tell.
    _compare(sum(layer.spec.descriptor.size for layer in layers), means)
    with single_error(FsmountError):
        async with trio.open_nursery() as nursery:
            for layer in layers:
                nursery.start_soon(layer.wait_complete)
    items: list[Item] = []
    for layer in layers:
        index = await layer.wait_complete()
        items.append(Item(layer, index.inflated_size, range(len(index.chunks))))
    return items


async def find_missing(items: Iterable[Item], means: Means) -> dict[Layer, list[int]]:
    """The chunks of items that are not in the cache, ascending; no layer of which nothing is missing."""
    missing: dict[Layer, list[int]] = {}
    for layer, numbers in _by_layer(items).items():
        keys = [layer.chunk_key(number) for number in numbers]
        stored = await means.passes.in_thread(means.chunks.stored, keys)
        absent = [number for number, is_here in zip(numbers, stored, strict=True) if not is_here]
        if absent:
            missing[layer] = absent
    return missing


async def check_room(items: Iterable[Item], means: Means) -> None:
    """Raises: NoSpace, if the cache cannot hold at once what all items need."""
    size = 0
    for layer, numbers in _by_layer(items).items():
        chunks = (await layer.wait_complete()).chunks
        size += sum(chunks[number].size for number in numbers)
    _compare(size, means)


def _compare(size: int, means: Means) -> None:
    if size > means.chunks.size:
        raise NoSpace(
            f"it takes {size} bytes of the cache, which holds {means.chunks.size} at most",
            remedy="Make cache.size larger in the configuration, or fetch less at once.",
        )


async def bring(missing: Mapping[Layer, Sequence[int]], means: Means) -> None:
    """Fetches chunks, those of all layers side by side, for somebody who waits.

    Raises: NoSpace (they did not stay), Corrupt, Unreachable and other kinds of FsmountError.
    """
    with single_error(FsmountError):
        async with trio.open_nursery() as nursery:
            for layer, numbers in missing.items():
                nursery.start_soon(bring_layer, layer, numbers)
    brought = [Item(layer, 0, numbers) for layer, numbers in missing.items()]
    gone = await find_missing(brought, means)
    if gone:
        count = sum(map(len, missing.values()))
        raise NoSpace(
            f"the cache has not kept {sum(map(len, gone.values()))} of {count} chunks that were fetched",
            remedy="Its disk is full, or cache.size too small for all that uses it at once.",
        )


async def bring_layer(layer: Layer, numbers: Sequence[int]) -> None:
    """Fetches chunks of one complete layer, by parts or, where that cannot be, by a pass. Raises: as `bring`."""
    ends = layer.ends
    fetcher, index = layer.fetcher, layer.index
    if fetcher is not None and index is not None:
        try:
            await fetcher.bring_all(numbers)
            return
        except (RangesIgnored, Corrupt) as error:
            if index.trust is not Trust.HINT:
                raise
            log.warning("%s; all of it is fetched", error.message)
            await layer.wait_trusted()
    if layer.ends == ends:
        # Ascending, as they come by in a pass.
        for number in numbers:
            await layer.open_chunk(number)
    if layer.ends != ends:
        raise Corrupt(
            f"layer {layer.spec.descriptor.digest} is not what was known of it before",
            remedy="That is forgotten now: try again.",
        )


def _by_layer(items: Iterable[Item]) -> dict[Layer, list[int]]:
    chunks: dict[Layer, set[int]] = defaultdict(set)
    for layer, _, numbers in items:
        chunks[layer].update(numbers)
    return {layer: sorted(numbers) for layer, numbers in chunks.items()}
