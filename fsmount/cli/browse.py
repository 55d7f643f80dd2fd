"""browse: what the commands that look into an image without a mount have in common."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TypeVar

import trio

from fsmount.archive.entry import EntryType
from fsmount.catalog import App, Content
from fsmount.cli.options import ConfigOptions
from fsmount.engine import Engine, open_engine
from fsmount.errors import AccessDenied, NotFound, Unreachable, UsageError
from fsmount.oci.platform import Platform
from fsmount.overlay import Node
from fsmount.policy import Indexes
from fsmount.tree import directory_key

_Result = TypeVar("_Result")

#: The kernel's bound on symlinks in one path (path_resolution(7)).
_MOST_LINKS = 40


def run(
    options: ConfigOptions,
    source: str,
    command: Callable[[Engine, Content], Awaitable[_Result]],
    *,
    platform: str | None = None,
    path: str | None = None,
    indexes: Indexes = Indexes.ANY,
) -> _Result:
    """Runs a command on what SOURCE shows. Raises: FsmountError of every kind."""

    async def main() -> _Result:
        opened = open_content(options, source, platform=platform, path=path, indexes=indexes)
        async with opened as (engine, content):
            return await command(engine, content)

    return trio.run(main)


@asynccontextmanager
async def open_content(
    options: ConfigOptions,
    source: str,
    *,
    platform: str | None = None,
    path: str | None = None,
    indexes: Indexes = Indexes.ANY,
) -> AsyncIterator[tuple[Engine, Content]]:
    """The engine, and what SOURCE shows now; `path` chooses the folder that is shown.

    indexes: by which layers may be read, if the configuration is not stricter.
    """
    config = options.load()
    chosen = Platform.parse(platform) if platform else None
    async with open_engine(config) as engine:
        app, version = engine.find(source, platform=chosen, path=path)
        with explained(engine, app, source):
            app = replace(app, indexes=indexes.strictest(app.indexes))
            content = await engine.catalog.open(app, version)
        yield engine, content


@contextmanager
def explained(engine: Engine, app: App, source: str) -> Iterator[None]:
    """Says of an app that is not there which ones there are."""
    try:
        yield
    except (NotFound, AccessDenied, Unreachable) as error:
        name = app.name.removeprefix("docker.io/library/")
        if name != app.name and source.startswith(name):
            # Without a registry it is one of Docker Hub, which is what a mistyped app becomes, too.
            apps = ", ".join(sorted(engine.catalog.apps)) or "none"
            error.remedy = f"There is no app {name!r} in the configuration; there are: {apps}."
        raise


def check_is_app(engine: Engine, app: App, source: str) -> None:
    """Raises: UsageError, if SOURCE names no app of the configuration: only of those it is recorded what is read."""
    if app.name not in engine.catalog.apps:
        apps = ", ".join(sorted(engine.catalog.apps)) or "none"
        raise UsageError(
            f"{source} is no app of the configuration: what is read of it is not recorded",
            remedy=f"Name an app and a tag; there are: {apps}. Or fetch all of it, with --all.",
        )


async def walk(content: Content, path: str) -> tuple[Node, list[bytes]]:
    """The node at a path of what is shown, and its names; symlinks on the way are followed within it.

    Raises: NotFound.
    """
    waiting = [name for name in reversed(path.encode(errors="surrogateescape").split(b"/")) if name]
    tree = content.tree
    root = await tree.node(content.root)
    trail: list[Node] = [root]
    links = 0
    while waiting:
        name = waiting.pop()
        if not trail[-1].is_directory:
            raise _missing(path)
        if name == b".":
            continue
        if name == b"..":
            trail = trail[:-1] or [root]
            continue
        key = content.root if len(trail) == 1 else directory_key(trail[-1])
        node = await tree.lookup(key, name)
        if node is None:
            raise _missing(path)
        if node.member.type is EntryType.SYMLINK and (waiting or path.endswith("/")):
            links += 1
            if links > _MOST_LINKS:
                raise NotFound(f"{path!r} leads through more than {_MOST_LINKS} symbolic links")
            if node.member.link.startswith(b"/"):
                trail = [root]
            waiting.extend(part for part in reversed(node.member.link.split(b"/")) if part)
            continue
        trail.append(node)
    return trail[-1], [node.name for node in trail[1:]]


def _missing(path: str) -> NotFound:
    return NotFound(f"there is no {path!r} in it", remedy="See what there is: fsmount ls SOURCE")
