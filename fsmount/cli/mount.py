"""mount: serves the configured apps at a mount point, in the background unless told otherwise."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fsmount.cli.background import announce_ready, run_in_background
from fsmount.cli.options import MOUNT_POINT, ConfigOptions, config_options

if TYPE_CHECKING:  # what takes long to import waits until it is needed
    from fsmount.config import Config
    from fsmount.notify import Service


@click.command()
@click.argument("mountpoint", type=MOUNT_POINT, required=False)
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

    from fsmount.journal import configure_logging
    from fsmount.notify import Service

    configure_logging(mountpoint)
    service = Service.from_environment()
    if service.is_held:
        _serve(options, mountpoint, service)
        return

    from fsmount.fuse import mounts
    from fsmount.holder import Holder
    from fsmount.program import PROGRAM

    # Where a link on the way leads now: the mount stays where it is when that changes.
    mountpoint = mounts.resolve((mountpoint or options.load().mountpoint).absolute())
    command = [*PROGRAM, "mount", str(mountpoint), "--foreground", *options.arguments()]
    raise click.exceptions.Exit(Holder(command).run())


def _serve(options: ConfigOptions, mountpoint: Path | None, service: Service) -> None:
    import faulthandler
    import logging
    import signal

    import trio

    from fsmount.daemon import Daemon
    from fsmount.fuse.session import Session
    from fsmount.notify import HOLDER
    from fsmount.succession import Succession

    # Until it is listened to.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Whoever finds this process stuck ends it by SIGABRT: then the log says where it was.
    faulthandler.enable()
    succession = Succession(service)
    config, text = _load(options, succession.record.config)
    mountpoint = (mountpoint or config.mountpoint).absolute()
    if not config.apps:
        logging.warning("no apps are configured: the mount is empty; add [apps.NAME], or use --app")

    def ready() -> None:
        succession.serve_by(text)
        service.ready()
        announce_ready()

    session = Session(mountpoint, keeper=service, is_follower=HOLDER in os.environ)
    trio.run(Daemon(config, options.load, session, service, succession, ready).run)


def _load(options: ConfigOptions, last_good: str | None) -> tuple[Config, str]:
    """The configuration, and the text of its file.

    last_good: what the process before has served by. A mistake that was made since must not take the mount down.
    Raises: UsageError.
    """
    import logging

    from fsmount.errors import UsageError

    try:
        config, found = options.load(), options.found
        return config, "" if found is None else found.read_text()
    except (UsageError, OSError) as error:
        if last_good is None:
            raise
        logging.error("the configuration is the one of before, for the present one is not good: %s", error)
    descriptor = os.memfd_create("fsmount-config", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, last_good.encode())
        return replace(options, path=Path(f"/proc/self/fd/{descriptor}")).load(), last_good
    finally:
        os.close(descriptor)


def _in_background(options: ConfigOptions, mountpoint: Path | None, log_file: Path | None) -> int:
    from fsmount.fuse.mounts import resolve

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
        ["mount", str(resolve(mountpoint.absolute())), "--foreground", *options.arguments()], log_file
    )
