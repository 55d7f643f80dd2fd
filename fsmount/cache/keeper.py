"""Keeper: what is done for a store in the background, so that nobody who reads or stores has to wait for it."""

import contextlib
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import trio

from fsmount.cache.eviction import Eviction
from fsmount.cache.hot import HotChunks
from fsmount.cache.leftovers import remove_orphans, remove_partials, subfolders

log = logging.getLogger(__name__)


#: Between two rounds, if nothing calls for one; and between any two.
_ROUND_SECONDS = 30.0
_PAUSE_SECONDS = 0.2
#: Between two looks at what the disk has left, which take microseconds: others may fill it within seconds.
_GLANCE_SECONDS = 1.0
#: Between two looks at one of the 256 folders of chunks for files that belong to none.
_ORPHANS_SECONDS = 60.0


class Keeper:
    """Keeps a store within its bounds, writes down what was used, and removes what was left behind."""

    def __init__(
        self,
        folder: Path,
        eviction: Eviction,
        hot: HotChunks,
        beside: Sequence[Path],
        limiter: trio.CapacityLimiter,
        try_again: Callable[[], Awaitable[None]],
    ) -> None:
        """beside: folders in which the other files of the cache are made. try_again is part of every round."""
        self._folder = folder
        self._try_again = try_again
        self._eviction = eviction
        self._hot = hot
        self._beside = beside
        self._limiter = limiter
        self._subfolders = subfolders()
        self._wake: Callable[[], None] | None = None

    def wake(self) -> None:
        """Has the next round begin at once. For any thread; without `run` nothing happens."""
        wake = self._wake
        if wake is not None:
            with contextlib.suppress(trio.RunFinishedError):
                wake()

    async def run(self) -> None:
        """Round after round, for ever. Cancellation: safe; what a thread has begun is finished."""
        token = trio.lowlevel.current_trio_token()
        looked_at = trio.current_time()
        while True:
            woken = trio.Event()
            self._wake = partial(token.run_sync_soon, woken.set)
            await self._round()
            if trio.current_time() >= looked_at + _ORPHANS_SECONDS:
                looked_at = trio.current_time()
                await self._look_for_leftovers()
            await trio.sleep(_PAUSE_SECONDS)
            with trio.move_on_after(_ROUND_SECONDS):
                await self._wait_until_needed(woken)

    async def _wait_until_needed(self, woken: trio.Event) -> None:
        while not woken.is_set():
            with contextlib.suppress(OSError):
                if self._eviction.is_low():
                    return
            with trio.move_on_after(_GLANCE_SECONDS):
                await woken.wait()

    async def _round(self) -> None:
        for key in self._hot.take_used():
            self._eviction.note_use(key)
        await self._try(self._eviction.write_uses)
        while await self._try(self._eviction.set_right_some):
            pass
        await self._try(self._eviction.release_dead)
        await self.trim()
        await self._try(self._eviction.table.checkpoint)
        await self._try_again()

    async def trim(self) -> None:
        """Evicts what is over the bounds, in small pieces, between which others come in."""
        while await self._try(self._eviction.trim_some):
            pass

    async def _look_for_leftovers(self) -> None:
        subfolder = next(self._subfolders)
        await self._try(lambda: remove_orphans(self._folder, subfolder, self._eviction.table))
        await self._try(lambda: remove_partials(self._beside))

    async def _try(self, work: Callable[[], object]) -> bool:
        """Whether work found something to do. If the disk fails, those who store notice, and say so."""
        try:
            return bool(await trio.to_thread.run_sync(work, limiter=self._limiter))
        except (OSError, sqlite3.Error) as error:
            log.debug("keeping the chunk store in bounds: %s", error)
            return False
