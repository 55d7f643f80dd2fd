"""unmount: takes a mount away, also one whose daemon is dead."""

from pathlib import Path

import click

from fsmount.cli.options import MOUNT_POINT
from fsmount.fuse import mounts


@click.command()
@click.argument("mountpoint", type=MOUNT_POINT)
@click.option(
    "--lazy", is_flag=True, help="Take it away even while it is in use; it ends with its last user."
)
def unmount(mountpoint: Path, lazy: bool) -> None:
    """Unmount what fsmount serves at MOUNTPOINT."""
    mounts.unmount(mountpoint, lazy=lazy)
