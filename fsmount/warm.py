"""warm: what an app reads when it starts: learned from one tag, and fetched ahead for the next."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial

import trio

from fsmount.cache.warmsets import MOST_PATHS, Shown, WarmSets
from fsmount.catalog import App, Content
from fsmount.errors import FsmountError
from fsmount.layer import Layer, Layers
from fsmount.oci.digest import Digest
from fsmount.prefetch import Item, bring_layer, file_items, find_missing
from fsmount.singleflight import in_background
from fsmount.tree import StoredTree, Tree

log = logging.getLogger(__name__)

#: How long it is noted what is read of a tag, from the first read on.
RECORD_SECONDS = 300.0
_LOOK_SECONDS = 5.0
#: A read of a layer costs 0.15 µs for each of its recordings; whoever looks into a thousand tags is no app that starts.
_MOST_RECORDINGS = 16
#: One who read less than this part of what an app reads, was somebody who looked around.
_VISITOR = 0.1
#: Where older content has to go for a warm set, it waits for so long whether a further tag of the app is opened.
_SETTLING_SECONDS = 2.0
#: For saving when the mount ends.
_LAST_SECONDS = 10.0


class _Recording:
    """What is read of the layers that an app shows, from the first read on."""

    def __init__(self, app: App, content: Content) -> None:
        self.app = app
        self.content = content
        #: What was read: at most so much as is kept, what is read first.
        self.noted: set[Shown] = set()
        self.began: float | None = None
        self._layers = list(dict.fromkeys(content.tree.layers))
        for layer in self._layers:
            layer.on_read.append(self._note)

    @property
    def digest(self) -> Digest:
        return self.content.image.digest

    def _note(self, layer: Layer, member: int) -> None:
        if self.began is None:
            self.began = trio.current_time()
        if len(self.noted) < MOST_PATHS:
            self.noted.add((layer.number, member))

    @property
    def is_over(self) -> bool:
        """Also the tree has to be known, or members would have no paths; while layers stream, all goes slower."""
        tree, began = self.content.tree, self.began
        return began is not None and trio.current_time() >= began + RECORD_SECONDS and tree.final

    def stop(self) -> None:
        """Takes note of nothing more. May be called again."""
        for layer in self._layers:
            layer.on_read.remove(self._note)
        self._layers = []


class Warmer:
    """Records what is read of each tag that is opened for the first time, and fetches for others what was recorded."""

    def __init__(self, sets: WarmSets, layers: Layers) -> None:
        self._sets = sets
        self._means = layers.means
        self._recordings: list[_Recording] = []
        #: What was opened in this process: name and origin of an app, and a digest.
        self._opened: set[tuple[str, str, Digest]] = set()
        #: What was opened last, by name and origin of the app.
        self._latest: dict[tuple[str, str], Content] = {}

    def open(self, app: App, content: Content) -> None:
        """Takes note that an app shows something; for `Catalog.on_open`."""
        key = app.name, app.origin, content.image.digest
        if key in self._opened:
            return
        self._opened.add(key)
        self._latest[app.name, app.origin] = content
        what = f"the warm set of {app.name} is not fetched for image {content.image.digest}"
        self._means.nursery.start_soon(in_background, what, partial(self._apply, app, content))
        try:
            if not self._sets.is_recorded(*key):
                self._begin(app, content)
        except FsmountError as error:
            extra = {"app": app.name}
            log.warning("what is read of %s is not recorded: %s", app.name, error.message, extra=extra)

    # Recording

    def _begin(self, app: App, content: Content) -> None:
        if len(self._recordings) >= _MOST_RECORDINGS:
            idle = next((one for one in self._recordings if one.began is None), None)
            if idle is None:
                return
            idle.stop()
            self._recordings.remove(idle)
        self._recordings.append(_Recording(app, content))

    async def run(self) -> None:
        """Saves recordings that are over, for ever. Cancellation: saves what those under way have seen."""
        try:
            while True:
                for recording in [one for one in self._recordings if one.is_over]:
                    await self._end(recording, whole=True)
                await trio.sleep(_LOOK_SECONDS)
        finally:
            with trio.move_on_after(_LAST_SECONDS, shield=True):
                for recording in list(self._recordings):
                    await self._end(recording, whole=False)

    async def _end(self, recording: _Recording, *, whole: bool) -> None:
        """whole: False if it was cut short; what it has not seen might have come yet."""
        recording.stop()
        tree = recording.content.tree
        if recording.noted and tree.final:
            try:
                await tree.stored()
                await trio.to_thread.run_sync(self._save, recording, whole)
            except FsmountError as error:
                log.warning("what is read of %s is not recorded: %s", recording.app.name, error.message)
            except Exception:
                log.exception("recording what is read of %s failed", recording.app.name)
        # Not before: if this is cancelled, what it has seen is saved after all.
        self._recordings.remove(recording)

    def _save(self, recording: _Recording, whole: bool) -> None:
        app, tree, root = recording.app, recording.content.tree, recording.content.root
        known = self._sets.paths(app.name, app.origin)
        with closing(tree.reopen()) as stored:
            read = dict(_paths(stored, tree, root, recording.noted))
            if not read:
                return
            unread = {path: shown for path, shown in known.items() if path not in read}
            here = {path: shown for path, shown, _ in _files(stored, tree, root, unread)}
        # What is the same as before may be in the kernel's page cache, and is then read unseen.
        missed = {path for path, shown in unread.items() if here.get(path) != shown}
        found_again = len(known) - len(unread)
        if found_again < _VISITOR * (found_again + len(missed & here.keys())):
            whole = False
        digest = recording.digest if whole else None
        self._sets.save(app.name, app.origin, read, missed=missed if whole else (), digest=digest)
        extra = {"app": app.name, "digest": recording.digest}
        log.info(
            "the warm set of %s: %d files were read of image %s",
            app.name,
            len(read),
            recording.digest,
            extra=extra,
        )

    # Applying

    async def _apply(self, app: App, content: Content) -> None:
        items = await recorded_items(self._sets, app, content)
        missing = await find_missing(items, self._means)
        if not missing:
            return
        chunks = self._means.chunks
        size = sum([await _size_to_fetch(layer, numbers) for layer, numbers in missing.items()])
        if 2 * size > chunks.size:
            log.info("the warm set of %s is not fetched: %d bytes are too many for the cache", app.name, size)
            return
        if size > await self._means.passes.in_thread(lambda: chunks.room):
            # One who looks into one old tag after the other shall not cost the app that runs what it has.
            await trio.sleep(_SETTLING_SECONDS)
            if self._latest[app.name, app.origin] is not content:
                return
        count = sum(map(len, missing.values()))
        extra = {"app": app.name}
        log.info(
            "the warm set of %s: %d files, %d chunks to be fetched", app.name, len(items), count, extra=extra
        )
        for layer, numbers in missing.items():
            fetcher = layer.fetcher
            if fetcher is not None:
                fetcher.prefetch(numbers)
            else:
                what = f"the warm set of {app.name} is not whole"
                self._means.nursery.start_soon(in_background, what, partial(bring_layer, layer, numbers))


async def _size_to_fetch(layer: Layer, numbers: Sequence[int]) -> int:
    """Bytes that some chunks take in the cache; where they come by a pass, that brings all of the layer."""
    index = await layer.wait_complete()
    if layer.fetcher is None:
        return index.inflated_size
    return sum(index.chunks[number].size for number in numbers)


async def recorded_items(sets: WarmSets, app: App, content: Content) -> list[Item]:
    """What an app was recorded to read, as far as it is in what it shows now; empty if nothing was recorded.

    Raises: as Tree.stored, and WarmSets.
    """
    tree = content.tree
    paths = await trio.to_thread.run_sync(sets.paths, app.name, app.origin)
    if not paths:
        return []
    await tree.stored()

    def find() -> list[tuple[int, int]]:
        with closing(tree.reopen()) as stored:
            return [place for _, _, place in _files(stored, tree, content.root, paths)]

    return await file_items(tree, await trio.to_thread.run_sync(find))


def _paths(
    stored: StoredTree, tree: Tree, root: int, noted: Iterable[Shown]
) -> Iterator[tuple[bytes, Shown]]:
    """The paths by which one gets at what was noted, and what they show; what is void by now has none."""
    members: dict[int, list[int]] = defaultdict(list)
    for number, member in noted:
        members[number].append(member)
    for position, layer in enumerate(tree.layers):
        for path, member in stored.paths(root, position, members[layer.number]):
            yield path, (layer.number, member)


def _files(
    stored: StoredTree, tree: Tree, root: int, paths: Iterable[bytes]
) -> Iterator[tuple[bytes, Shown, tuple[int, int]]]:
    """The files at those of the paths that there are: path, what it shows, and its layer's position with its member."""
    for path, node in stored.files(root, paths):
        yield path, (tree.layers[node.layer].number, node.member.number), (node.layer, node.member.number)
