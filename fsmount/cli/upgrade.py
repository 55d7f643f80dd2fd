"""upgrade: has the program as it is installed now take over a running mount, which goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from fsmount.cli.asking import ask
from fsmount.cli.options import MOUNT_POINT, ConfigOptions, config_options

_SECONDS = 60.0
_PAUSE_SECONDS = 0.05
#: For a process that has died to be followed by another.
_PATIENCE_SECONDS = 10.0


@click.command()
@click.argument("mountpoint", type=MOUNT_POINT, required=False)
@config_options
def upgrade(options: ConfigOptions, mountpoint: Path | None) -> None:
    """Have the program as it is installed now serve MOUNTPOINT, without unmounting.

    Open files, working directories and running programs stay valid; who reads meanwhile waits for a moment.
    """
    from fsmount.errors import DeadlineExpired, Refused
    from fsmount.fuse import mounts

    mountpoint = (mountpoint or options.load().mountpoint).absolute()
    before = _first_status(mountpoint)
    mount = mounts.find(mountpoint)
    if mount is None or int(mount.option("user_id") or 0) != os.geteuid():
        # Which process to signal is what the mount says.
        raise Refused(f"the mount at {mountpoint} is another user's", remedy="Run this as that user.")
    process = before["process"]
    _tell(mountpoint, process["pid"], process["holder"])
    deadline = time.monotonic() + _SECONDS
    while True:
        time.sleep(_PAUSE_SECONDS)
        after = _try_status(mountpoint)
        if after is not None and after["process"]["pid"] != process["pid"]:
            break
        if time.monotonic() > deadline:
            raise DeadlineExpired(
                f"process {process['pid']} has not been followed by another within {_SECONDS:.0f} s",
                remedy="The log of the mount says why.",
            )
    click.echo(
        f"{mountpoint}: served by fsmount {after['fsmount']}, process {after['process']['pid']};"
        f" before it was fsmount {before['fsmount']}, process {process['pid']}"
    )


def _tell(mountpoint: Path, worker: int, holder: int | None) -> None:
    """Signals whoever sees to it that another process follows the worker. Raises: Refused, NotRunning."""
    from fsmount.errors import NotRunning, Refused

    # The holder takes its newer self's place first. Without one, systemd starts the next process.
    if _signal(worker if holder is None else holder):
        return
    if holder is None:
        raise NotRunning(
            f"process {worker}, which served {mountpoint}, has just ended",
            remedy="Run this again when the next one serves it: fsmount status says so.",
        )
    raise Refused(
        f"process {holder}, which kept the mount at {mountpoint}, is gone: process {worker} serves it on, and nobody"
        " would follow it",
        remedy=f"Begin anew when it suits: fsmount unmount --lazy {mountpoint}, and fsmount mount {mountpoint}",
    )


def _signal(pid: int) -> bool:
    """False if there is no such process, or its number is by now another's, who would die of the signal."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # Looked at after it was opened, and signalled by that: a number is not used again between the two unnoticed.
        process = Path(f"/proc/{pid}")
        if process.stat().st_uid != os.geteuid() or not _mounts((process / "cmdline").read_bytes()):
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGUSR2)
    except (FileNotFoundError, ProcessLookupError):
        return False
    finally:
        os.close(descriptor)
    return True


def _mounts(cmdline: bytes) -> bool:
    """Whether it is a command line of `fsmount mount`, by name or as a module."""
    return any(
        os.path.basename(program) == b"fsmount" and command == b"mount"
        for program, command in pairwise(cmdline.split(b"\0"))
    )


def _first_status(mountpoint: Path) -> dict[str, Any]:
    """Raises: FsmountError."""
    from fsmount.errors import NotRunning
    from fsmount.fuse import mounts

    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return _status(mountpoint)
        except NotRunning:
            # One process may have just died, and the next one not begun to answer.
            if time.monotonic() > deadline or mounts.find(mountpoint) is None:
                raise
        time.sleep(_PAUSE_SECONDS)


def _status(mountpoint: Path) -> dict[str, Any]:
    """Raises: FsmountError."""
    said: dict[str, Any] = json.loads(ask(mountpoint, "/status"))
    return said


def _try_status(mountpoint: Path) -> dict[str, Any] | None:
    from fsmount.errors import FsmountError

    try:
        return _status(mountpoint)
    except FsmountError:
        return None  # nobody has begun to answer yet
