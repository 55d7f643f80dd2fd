"""cat: writes a file of an image to standard output, fetching its layer as far as needed."""

import sys

import click

from fsmount.archive.entry import EntryType
from fsmount.cli.options import ConfigOptions, config_options
from fsmount.errors import UsageError

_BLOCK = 1024 * 1024


@click.command()
@click.argument("source")
@click.argument("path")
@click.option("--platform", metavar="OS/ARCH", envvar="FSMOUNT_PLATFORM", help="Of a multi-platform image.")
@config_options
def cat(options: ConfigOptions, source: str, path: str, platform: str | None) -> None:
    """Print the file PATH of SOURCE."""
    import trio

    from fsmount.catalog import Content
    from fsmount.cli import browse
    from fsmount.engine import Engine
    from fsmount.policy import Indexes

    async def command(engine: Engine, content: Content) -> None:
        # A slash at the end follows a symlink that is the path's last name.
        node, _ = await browse.walk(content, path + "/")
        if node.member.type is not EntryType.FILE:
            raise UsageError(
                f"{path!r} is no regular file", remedy="See what it is: fsmount ls -l SOURCE PATH"
            )
        layer = content.tree.layers[node.layer]
        offset = 0
        while data := await layer.read(node.member.number, offset, _BLOCK):
            offset += len(data)
            await trio.to_thread.run_sync(sys.stdout.buffer.write, data)
        # What was printed came from bytes that only the end of a pass certifies.
        await layer.wait_complete()
        sys.stdout.buffer.flush()

    # What is printed cannot be taken back: by what nobody vouches for nothing is read.
    browse.run(options, source, command, platform=platform, indexes=Indexes.BOUND)
