"""snapshot: makes a plain folder of an image."""

import os
from pathlib import Path

import click

from fsmount.cli.options import ConfigOptions, config_options
from fsmount.cli.output import escape, printable


@click.command()
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--path", metavar="SUBDIR", envvar="FSMOUNT_PATH", help="Only this folder of the image.")
@click.option("--platform", metavar="OS/ARCH", envvar="FSMOUNT_PLATFORM", help="Of a multi-platform image.")
@click.option(
    "--keep-privileges",
    is_flag=True,
    envvar="FSMOUNT_KEEP_PRIVILEGES",
    help="Keep setuid and setgid bits, file capabilities and device nodes.",
)
@config_options
def snapshot(
    options: ConfigOptions,
    source: str,
    destination: Path,
    path: str | None,
    platform: str | None,
    keep_privileges: bool,
) -> None:
    """Write what SOURCE shows to a new folder DESTINATION. It is there whole, or not at all.

    SOURCE is APP:TAG of the configuration, registry/repository:tag, or oci-layout:DIR:TAG.
    """
    import signal
    import time

    import trio

    from fsmount.cli import browse
    from fsmount.cli.progress import show_progress
    from fsmount.errors import FsmountError
    from fsmount.policy import Indexes
    from fsmount.singleflight import single_error
    from fsmount.snapshot import Progress, check_destination
    from fsmount.snapshot import snapshot as write

    check_destination(destination)
    progress = Progress()
    started = time.monotonic()

    async def main() -> bool:
        async with trio.open_nursery() as outer:
            outer.start_soon(stop, outer.cancel_scope)
            # All of it is wanted: streaming that is quickest, and verifies it.
            opened = browse.open_content(options, source, platform=platform, path=path, indexes=Indexes.OFF)
            async with opened as (_, content), trio.open_nursery() as nursery:
                nursery.start_soon(show_progress, content.tree.layers, progress)
                await write(content, destination, keep_privileges=keep_privileges, progress=progress)
                nursery.cancel_scope.cancel()
            outer.cancel_scope.cancel()
            return True
        return False

    async def stop(scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                scope.cancel()

    with single_error(FsmountError):
        done = trio.run(main)
    if not done:
        raise click.exceptions.Exit(128 + signal.SIGTERM)
    seconds = time.monotonic() - started
    made = f"{progress.files} files, {progress.bytes} bytes from {source} in {seconds:.1f} s"
    click.echo(f"{escape(os.fsencode(destination))}: {printable(made)}")
    if progress.lost_xattrs:
        click.echo(
            f"fsmount: warning: {progress.lost_xattrs} extended attributes are missing:"
            f" the file system of {destination} does not take them",
            err=True,
        )
