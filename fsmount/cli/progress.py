"""progress: a bar on a terminal, and silence elsewhere."""

import sys
from collections.abc import Sequence

import trio

from fsmount.layer import Layer
from fsmount.snapshot import Progress

_SECONDS = 0.1


async def show_progress(layers: Sequence[Layer], progress: Progress) -> None:
    """Shows a snapshot's two stages on stderr, if that is a terminal, until it is cancelled."""
    if not sys.stderr.isatty():
        return
    # 0.1 s to import, which only a terminal needs.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    missing = [layer for layer in layers if not layer.complete]
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        total = sum(layer.spec.descriptor.size for layer in missing)
        fetching = bars.add_task("fetching", total=total) if missing else None
        writing = bars.add_task("writing", total=None)
        while True:
            if fetching is not None:
                bars.update(fetching, completed=sum(layer.received for layer in missing))
            bars.update(writing, completed=progress.bytes, total=progress.total_bytes or None)
            await trio.sleep(_SECONDS)
