"""wait: returns when what an app needs is here, for those who start it only then."""

import click

from fsmount.cli.options import ConfigOptions, config_options
from fsmount.cli.output import printable

#: Between two tries, while the registry does not answer.
_PAUSE_SECONDS = 1.0


@click.command()
@click.argument("source")
@click.option(
    "--recorded", is_flag=True, envvar="FSMOUNT_RECORDED", help="What the app was seen to read; the default."
)
@click.option("--all", "everything", is_flag=True, envvar="FSMOUNT_ALL", help="All layers, whole.")
@click.option(
    "--timeout",
    metavar="TIME",
    default="60s",
    show_default=True,
    envvar="FSMOUNT_TIMEOUT",
    help="How long, at most; then the exit code is 6.",
)
@config_options
def wait(options: ConfigOptions, source: str, recorded: bool, everything: bool, timeout: str) -> None:
    """Return when the files of SOURCE are here that its app reads when it starts, fetching those that are not.

    For ExecStartPre= of the app's systemd unit. It needs no mount, and no registry if all is here.
    """
    import trio

    from fsmount.cli import browse
    from fsmount.cli.signals import run_until_told
    from fsmount.config import parse_seconds
    from fsmount.engine import open_engine
    from fsmount.errors import DeadlineExpired, FsmountError, UsageError
    from fsmount.prefetch import bring, check_room, find_missing, layer_items
    from fsmount.warm import recorded_items

    if recorded and everything:
        raise UsageError("--recorded and --all exclude each other", remedy="Keep one of them.")
    try:
        seconds = parse_seconds(timeout)
    except ValueError as error:
        raise UsageError(f"--timeout {timeout}: {error}") from error
    config = options.load()

    async def attempt() -> None:
        """Raises: FsmountError of every kind."""
        async with open_engine(config) as engine:
            app, version = engine.find(source)
            if not everything:
                browse.check_is_app(engine, app, source)
                if not engine.warm_sets.paths(app.name, app.origin):
                    note = f"fsmount: note: nothing was recorded for {app.name} yet: there is nothing to wait for"
                    click.echo(printable(note), err=True)
                    return
            means = engine.layers.means
            with browse.explained(engine, app, source):
                # Without the registry there must be time left for what is here.
                content = await engine.catalog.open_for_mounts(app, version, patience_seconds=seconds / 2)
            if everything:
                items = await layer_items(content.tree, means)
            else:
                items = await recorded_items(engine.warm_sets, app, content)
            await check_room(items, means)
            await bring(await find_missing(items, means), means)

    async def command() -> None:
        reason = ""
        with trio.move_on_after(seconds):
            while True:
                try:
                    return await attempt()
                except FsmountError as error:
                    if not error.transient:
                        raise
                    reason = f": {error.message}"
                await trio.sleep(_PAUSE_SECONDS)
        raise DeadlineExpired(f"{source} is not here after {seconds:g} s{reason}")

    run_until_told(command)
