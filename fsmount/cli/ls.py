"""ls: lists a folder of an image without mounting it."""

import datetime
import stat

import click

from fsmount.archive.entry import EntryType
from fsmount.cli.options import ConfigOptions, config_options
from fsmount.cli.output import escape

_KINDS = {
    EntryType.FILE: stat.S_IFREG,
    EntryType.DIRECTORY: stat.S_IFDIR,
    EntryType.SYMLINK: stat.S_IFLNK,
    EntryType.CHAR: stat.S_IFCHR,
    EntryType.BLOCK: stat.S_IFBLK,
    EntryType.FIFO: stat.S_IFIFO,
}


@click.command()
@click.argument("source")
@click.argument("path", default="")
@click.option("--long", "-l", is_flag=True, help="Mode, owner, size and time too.")
@click.option("--recursive", "-R", is_flag=True, help="Everything below, with its path.")
@click.option("--platform", metavar="OS/ARCH", envvar="FSMOUNT_PLATFORM", help="Of a multi-platform image.")
@config_options
def ls(
    options: ConfigOptions, source: str, path: str, long: bool, recursive: bool, platform: str | None
) -> None:
    """List PATH in SOURCE: APP:TAG, registry/repository:tag, or oci-layout:DIR:TAG."""
    from fsmount.catalog import Content
    from fsmount.cli import browse
    from fsmount.engine import Engine
    from fsmount.overlay import Node
    from fsmount.tree import directory_key

    def show(node: Node, name: bytes) -> None:
        link = f" -> {escape(node.member.link)}" if long and node.member.type is EntryType.SYMLINK else ""
        click.echo((_details(node) if long else "") + escape(name) + link)

    async def command(engine: Engine, content: Content) -> None:
        node, names = await browse.walk(content, path)
        if not node.is_directory:
            show(node, b"/".join(names))
            return
        stored = await content.tree.stored()
        waiting = [(b"", directory_key(node) if names else content.root)]
        while waiting:
            prefix, key = waiting.pop()
            below = []
            for child in stored.children(key):
                name = prefix + child.node.name
                show(child.node, name)
                if recursive and child.node.is_directory:
                    below.append((name + b"/", directory_key(child.node)))
            waiting.extend(reversed(below))

    browse.run(options, source, command, platform=platform)


def _details(node: "Node") -> str:  # type: ignore[name-defined]  # noqa: F821
    member = node.member
    mode = stat.filemode(_KINDS[member.type] | member.mode)
    size = (
        f"{member.major}, {member.minor}" if member.type in (EntryType.CHAR, EntryType.BLOCK) else member.size
    )
    time = datetime.datetime.fromtimestamp(member.mtime_ns // 10**9, datetime.UTC).strftime(
        "%Y-%m-%d %H:%M:%S"
    )
    return f"{mode} {member.uid:>5} {member.gid:>5} {size:>12} {time} "
