"""progress: a bar on a terminal, and silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from fsmount.layer import Layer
from fsmount.snapshot import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

_SECONDS = 0.1


def _bars() -> Bars:
    # 0.1 s to import, which only a terminal needs.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Bars(*columns, console=Console(stderr=True), transient=True)


async def show_progress(layers: Sequence[Layer], progress: Progress) -> None:
    """Shows a snapshot's two stages on stderr, if that is a terminal, until it is cancelled."""
    if not sys.stderr.isatty():
        return
    missing = [layer for layer in layers if not layer.complete]
    with _bars() as bars:
        total = sum(layer.spec.descriptor.size for layer in missing)
        fetching = bars.add_task("fetching", total=total) if missing else None
        writing = bars.add_task("writing", total=None)
        while True:
            if fetching is not None:
                bars.update(fetching, completed=sum(layer.received for layer in missing))
            bars.update(writing, completed=progress.bytes, total=progress.total_bytes or None)
            await trio.sleep(_SECONDS)


class Fetching:
    """How much comes over the network for some layers, and how much is to come, once that is known."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = list(dict.fromkeys(layers))
        self.total: int | None = None

    @property
    def received(self) -> int:
        """Bytes so far."""
        return sum(layer.received for layer in self._layers)

    def expect(self, missing: Mapping[Layer, Sequence[int]]) -> None:
        """Takes note that these chunks are to come."""
        self.total = self.received
        for layer, numbers in missing.items():
            index = layer.index
            if layer.fetcher is None or index is None:
                self.total += layer.spec.descriptor.size
                continue
            chunks = (index.chunks[number] for number in numbers)
            self.total += sum(chunk.blob_stop - chunk.blob_start for chunk in chunks)


@asynccontextmanager
async def shown(fetching: Fetching) -> AsyncIterator[None]:
    """Shows it on stderr meanwhile, if that is a terminal."""
    async with _shown("fetching", lambda: (fetching.received, fetching.total)):
        yield


@asynccontextmanager
async def shown_bytes(what: str, done: Callable[[], int], total: int) -> AsyncIterator[None]:
    """Shows on stderr meanwhile, if that is a terminal, how many of so many bytes are done."""
    async with _shown(what, lambda: (done(), total)):
        yield


@asynccontextmanager
async def _shown(what: str, state: Callable[[], tuple[int, int | None]]) -> AsyncIterator[None]:
    """state: bytes that are done, and all of them, once that is known."""
    if not sys.stderr.isatty():
        yield
        return

    async def show() -> None:
        with _bars() as bars:
            task = bars.add_task(what, total=None)
            while True:
                completed, total = state()
                bars.update(task, completed=completed, total=total)
                await trio.sleep(_SECONDS)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(show)
        yield
        nursery.cancel_scope.cancel()
