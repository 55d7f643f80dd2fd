"""index: builds the SOCI index of an image, checks it, and publishes it beside the image or in a folder."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fsmount.cli.options import ConfigOptions, config_options
from fsmount.cli.output import printable

if TYPE_CHECKING:  # they take the tenths of a second that `index --help` should not
    from fsmount.indexer import Progress
    from fsmount.publish import LayerOutcome, Published

_SECONDS = 0.1


@click.command()
@click.argument("source")
@click.option("--platform", metavar="OS/ARCH", envvar="FSMOUNT_PLATFORM", help="Of a multi-platform image.")
@click.option(
    "--min-size",
    metavar="BYTES",
    envvar="FSMOUNT_MIN_SIZE",
    type=click.IntRange(min=0),
    help="Layers of fewer compressed bytes get no ztoc.  [default: 10485760]",
)
@click.option("--push", is_flag=True, envvar="FSMOUNT_PUSH", help="Publish it where the image is.")
@click.option(
    "--output",
    metavar="DIR",
    envvar="FSMOUNT_OUTPUT",
    type=click.Path(path_type=Path),
    help="Write it to an OCI image layout, a new one or one that is there.",
)
@click.option("--force", is_flag=True, envvar="FSMOUNT_FORCE", help="Build it even if it is there already.")
@click.option("--json", "as_json", is_flag=True, envvar="FSMOUNT_JSON", help="For programs.")
@config_options
def index(
    options: ConfigOptions,
    source: str,
    platform: str | None,
    min_size: int | None,
    push: bool,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build the SOCI index of SOURCE, by which mounts and snapshotters read its layers lazily.

    Every layer is fetched once, and all that was built is decoded again and compared before anything is published.
    Without --push and --output nothing is. The image itself stays as it is.
    """
    import trio

    from fsmount.cli import browse
    from fsmount.engine import open_engine
    from fsmount.errors import Unsupported
    from fsmount.image import open_image
    from fsmount.indexer import Progress
    from fsmount.oci.platform import Platform
    from fsmount.oci.soci import MIN_LAYER_SIZE
    from fsmount.publish import index_tag, publish_index
    from fsmount.registry.destination import LayoutDestination

    config = options.load()
    chosen = Platform.parse(platform) if platform else None
    folder = LayoutDestination(output, tag=index_tag) if output is not None else None
    if folder is not None:
        folder.check()

    async def main() -> Published:
        async with open_engine(config) as engine:
            app, version = engine.find(source, platform=chosen, path="/")
            with browse.explained(engine, app, source):
                digest = (await app.source.resolve(version)).digest
                image = await open_image(app.source, digest, app.platform, engine.layers.folder)
            destinations = [engine.destination(source)] if push else []
            progress = Progress()
            async with _shown(progress):
                return await publish_index(
                    app.source,
                    image,
                    folder=engine.layers.folder.path,
                    destinations=[*destinations, folder] if folder is not None else destinations,
                    min_size=MIN_LAYER_SIZE if min_size is None else min_size,
                    max_layer_size=config.cache.max_layer_size,
                    force=force,
                    progress=progress,
                )

    published = trio.run(main)
    for layer in published.layers:
        if layer.fate == "unsupported":
            click.echo(printable(f"fsmount: warning: no ztoc: {_named(layer)}"), err=True)
    click.echo(json.dumps(_facts(published), indent=2) if as_json else printable(_report(published)))
    if published.failed:
        raise Unsupported(
            f"none of the layers of {published.image} that need a ztoc can have one: there is nothing to publish",
            remedy="Build the image with gzip layers of one member, as docker and buildah make them by default;"
            " or, as zstd:chunked or eStargz, with tables of contents of its own.",
        )


def _named(layer: LayerOutcome) -> str:
    """The reason, and the layer unless it names that itself."""
    digest = str(layer.layer.digest)
    return layer.reason if digest in layer.reason else f"layer {digest}: {layer.reason}"


def _facts(published: Published) -> dict[str, object]:
    return {
        "version": 1,
        "image": str(published.image),
        "index": str(published.index) if published.index else None,
        "ztoc_size": published.ztoc_bytes,
        "existed": published.existed,
        "published_to": list(published.places),
        "layers": [
            {
                "digest": str(layer.layer.digest),
                "media_type": layer.layer.media_type,
                "size": layer.layer.size,
                "status": str(layer.fate),
                "reason": layer.reason or None,
                "ztoc": str(layer.ztoc.digest) if layer.ztoc else None,
                "ztoc_size": layer.ztoc.size if layer.ztoc else None,
                "spans": layer.spans,
                "inflated_size": layer.inflated_size,
            }
            for layer in published.layers
        ],
    }


def _report(published: Published) -> str:
    lines = [f"{'image':<11} {published.image}"]
    for layer in published.layers:
        lines.append(f"  {layer.layer.digest}  {layer.layer.size} bytes")
        if layer.ztoc is not None:
            text = f"ztoc of {layer.ztoc.size} bytes"
            if layer.spans is not None:
                text += f": {layer.spans} spans of {layer.inflated_size} bytes inflated, all checked"
        else:
            text = f"{layer.fate}: {layer.reason}"
        lines.append(f"    {text}")
    if published.index is None:
        lines.append("index       none: no layer needs one" if not published.failed else "index       none")
        return "\n".join(lines)
    lines.append(f"{'index':<11} {published.index}, {published.ztoc_bytes} bytes of ztocs")
    places = ", ".join(published.places)
    if published.existed:
        lines.append(f"{'published':<11} before, to {places}; nothing was fetched")
    elif places:
        lines.append(f"{'published':<11} to {places}")
    else:
        lines.append(f"{'published':<11} no: that takes --push, or --output DIR")
    return "\n".join(lines)


@asynccontextmanager
async def _shown(progress: Progress) -> AsyncIterator[None]:
    """Shows both stages on stderr meanwhile, if that is a terminal."""
    import sys

    import trio

    if not sys.stderr.isatty():
        yield
        return
    # 0.1 s to import, which only a terminal needs.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())

    async def show() -> None:
        with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
            fetching, checking = bars.add_task("fetching", total=None), bars.add_task("checking", total=None)
            while True:
                total = progress.total or None
                bars.update(fetching, completed=progress.received, total=total)
                bars.update(checking, completed=progress.checked, total=total)
                await trio.sleep(_SECONDS)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(show)
        yield
        nursery.cancel_scope.cancel()
