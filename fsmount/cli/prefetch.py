"""prefetch: has files of an image here before they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fsmount.cli.options import ConfigOptions, config_options
from fsmount.cli.output import printable

if TYPE_CHECKING:
    from fsmount.catalog import Content
    from fsmount.prefetch import Item


@click.command()
@click.argument("source")
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.option("--recorded", is_flag=True, envvar="FSMOUNT_RECORDED", help="What the app was seen to read.")
@click.option("--all", "everything", is_flag=True, envvar="FSMOUNT_ALL", help="All layers, whole.")
@click.option("--platform", metavar="OS/ARCH", envvar="FSMOUNT_PLATFORM", help="Of a multi-platform image.")
@config_options
def prefetch(
    options: ConfigOptions,
    source: str,
    paths: tuple[str, ...],
    recorded: bool,
    everything: bool,
    platform: str | None,
) -> None:
    """Fetch files of SOURCE into the cache, where mounts find them: PATHs, with all that is in folders.

    SOURCE is APP:TAG of the configuration, registry/repository:tag, or oci-layout:DIR:TAG. No mount is needed.
    """
    import trio

    from fsmount.cli import browse
    from fsmount.cli.progress import Fetching, shown
    from fsmount.cli.signals import run_until_told
    from fsmount.engine import open_engine
    from fsmount.errors import UsageError
    from fsmount.oci.platform import Platform
    from fsmount.prefetch import bring, check_room, find_missing, layer_items
    from fsmount.warm import recorded_items

    if [bool(paths), recorded, everything].count(True) != 1:
        raise UsageError(
            "it is not said what to fetch"
            if not (paths or recorded or everything)
            else "PATHs, --recorded and --all exclude each other",
            remedy=f"Write the files or folders, like `fsmount prefetch {source} bin etc/app.conf`; or --recorded"
            " for what the app was seen to read, or --all.",
        )
    config = options.load()
    chosen = Platform.parse(platform) if platform else None

    async def command() -> str:
        async with open_engine(config) as engine:
            app, version = engine.find(source, platform=chosen)
            if recorded:
                browse.check_is_app(engine, app, source)
            with browse.explained(engine, app, source):
                content = await engine.catalog.open_for_mounts(app, version)
            means, layers = engine.layers.means, dict.fromkeys(content.tree.layers)
            complete = {layer for layer in layers if layer.complete}
            fetching = Fetching(content.tree.layers)
            async with shown(fetching):
                if everything:
                    items = await layer_items(content.tree, means)
                elif recorded:
                    items = await recorded_items(engine.warm_sets, app, content)
                else:
                    items = await _path_items(content, paths)
                await check_room(items, means)
                missing = await find_missing(items, means)
                fetching.expect(missing)
                if everything:
                    # What is read on nobody's word is verified, now that all of it is wanted.
                    async with trio.open_nursery() as nursery:
                        for layer in layers:
                            nursery.start_soon(layer.fill)
                    # Of some layers that fetches all; and one may have got another index meanwhile.
                    rest = await find_missing(await layer_items(content.tree, means), means)
                    await bring(rest, means)
                else:
                    await bring(missing, means)
        if not items and recorded:
            return f"{source}: nothing was recorded for {app.name} that is in it"
        absent = {layer: set(numbers) for layer, numbers in missing.items()}
        here = sum(
            one.layer in complete and absent.get(one.layer, set()).isdisjoint(one.chunks) for one in items
        )
        size = sum(one.size for one in items)
        return f"{source}: {len(items)} {'layers' if everything else 'files'}, {size} bytes; {here} were here already"

    click.echo(printable(run_until_told(command)))


async def _path_items(content: Content, paths: tuple[str, ...]) -> list[Item]:
    """Raises: NotFound, before anything is fetched that only serves other paths."""
    from fsmount.archive.entry import EntryType
    from fsmount.cli import browse
    from fsmount.prefetch import file_items
    from fsmount.tree import directory_key

    files: list[tuple[int, int]] = []
    folders: list[int] = []
    for path in paths:
        # A slash at the end follows a symlink that is the path's last name.
        node, names = await browse.walk(content, path + "/")
        if node.is_directory:
            folders.append(directory_key(node) if names else content.root)
        elif node.member.type is EntryType.FILE:
            files.append((node.layer, node.member.number))
    if folders:
        stored = await content.tree.stored()
        files += [(node.layer, node.member.number) for key in folders for node in stored.below(key)]
    return await file_items(content.tree, files)
