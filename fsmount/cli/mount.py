"""mount: serves the configured apps at a mount point, in the background unless told otherwise."""

from pathlib import Path

import click

from fsmount.cli.background import announce_ready, run_in_background
from fsmount.cli.options import ConfigOptions, config_options


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path), required=False)
@config_options
@click.option(
    "--foreground", "-f", is_flag=True, envvar="FSMOUNT_FOREGROUND", help="Stay, and log to stderr."
)
@click.option(
    "--log-file",
    type=click.Path(path_type=Path),
    envvar="FSMOUNT_LOG_FILE",
    help="Where the background process logs.  [default: log/mount.log in the cache folder]",
)
def mount(options: ConfigOptions, mountpoint: Path | None, foreground: bool, log_file: Path | None) -> None:
    """Mount the configured apps at MOUNTPOINT, as MOUNTPOINT/APP/TAG.

    It returns when the mount answers. SIGTERM, or `fsmount unmount MOUNTPOINT`, takes it down.
    """
    if not foreground:
        raise click.exceptions.Exit(_in_background(options, mountpoint, log_file))

    config = options.load()
    mountpoint = (mountpoint or config.mountpoint).absolute()
    import logging

    import trio

    from fsmount import daemon

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if not config.apps:
        logging.warning("no apps are configured: the mount is empty; add [apps.NAME], or use --app")
    trio.run(lambda: daemon.run(config, mountpoint, ready=announce_ready))


def _in_background(options: ConfigOptions, mountpoint: Path | None, log_file: Path | None) -> int:
    # The process in the background finds out about mistakes, and tells; here the configuration is read only for
    # what nobody said: that takes 0.2 s.
    if mountpoint is None or (log_file is None and options.cache is None):
        config = options.load()
        mountpoint = mountpoint or config.mountpoint
        log_file = log_file or config.cache.path / "log" / "mount.log"
    if log_file is None:
        assert options.cache is not None
        log_file = options.cache / "log" / "mount.log"
    return run_in_background(
        ["mount", str(mountpoint.absolute()), "--foreground", *options.arguments()], log_file
    )
