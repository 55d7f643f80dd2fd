"""mounting: what the kernel and the process of a mount say of it. The mount itself is never touched: it may hang."""

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import trio

from fsmount import __version__, control
from fsmount.doctor.finding import Finding
from fsmount.errors import FsmountError
from fsmount.fuse import mounts
from fsmount.status import State

_CHECK = "mount"
#: Less than the check may take as a whole.
_ANSWER_SECONDS = 4.0


async def check(mountpoint: Path) -> Sequence[Finding]:
    """What is mounted there, and how that is; or whether something can be."""
    mount = await trio.to_thread.run_sync(mounts.find, mountpoint, abandon_on_cancel=True)
    if mount is None:
        return [await trio.to_thread.run_sync(_free, mountpoint, abandon_on_cancel=True)]
    if not mounts.is_ours(mount):
        return [
            Finding.problem(
                _CHECK,
                f"{mountpoint} is the mount point of {mount.source}, of type {mount.fstype}",
                remedy="Mount fsmount at another directory, for instance at one inside it.",
            )
        ]
    owner = int(mount.option("user_id") or 0)
    try:
        with trio.fail_after(_ANSWER_SECONDS):
            said = await control.ask(mount, "/status")
    except trio.TooSlowError:
        return [
            Finding.problem(
                _CHECK,
                f"the process that serves {mountpoint} has not answered within {_ANSWER_SECONDS:g} s",
                remedy="One that hangs is replaced after 30 s. Else: fsmount unmount --lazy, and mount again.",
            )
        ]
    except FsmountError as error:
        return [Finding.problem(_CHECK, error.message, remedy=error.remedy)]
    try:
        status = json.loads(said)
        found = judge(mountpoint, status["state"], status["summary"], status["fsmount"])
    except (ValueError, LookupError, TypeError):
        return [Finding.problem(_CHECK, f"what answers for {mountpoint} is not fsmount")]
    return [found] if owner == os.geteuid() else [found, _of_another(mountpoint, owner)]


def judge(mountpoint: Path, state: str, summary: str, version: str) -> Finding:
    """What a mount says of itself, and by which version."""
    said = f"{mountpoint}: {summary}"
    if state == State.REFUSING:
        return Finding.problem(_CHECK, said, remedy="Its log says what ended its processes.")
    if state == State.CACHE_ONLY:
        return Finding.warning(_CHECK, said, remedy="Its log says what ended its processes.")
    if state == State.DEGRADED:
        return Finding.warning(_CHECK, said, remedy="What is found of the registries below says more.")
    if version != __version__:
        return Finding.warning(
            _CHECK, f"{said}; by fsmount {version}, while this is {__version__}", remedy="fsmount upgrade"
        )
    return Finding.ok(_CHECK, said)


def _free(mountpoint: Path) -> Finding:
    """Nothing is mounted there: may it be? Blocks on the disk."""
    try:
        status = os.stat(mountpoint)
    except OSError as error:
        return Finding.problem(
            _CHECK,
            f"{mountpoint} cannot be a mount point: {error.strerror}",
            remedy=f"Make it: mkdir -p {mountpoint}",
        )
    if not stat.S_ISDIR(status.st_mode):
        return Finding.problem(
            _CHECK, f"{mountpoint} is no directory", remedy="Name a directory to mount at."
        )
    if not os.access(mountpoint, os.W_OK) and os.geteuid() != 0:
        return Finding.problem(
            _CHECK,
            f"user {os.geteuid()} may not write to {mountpoint}, and cannot mount there",
            remedy="An ordinary user mounts at directories they own: chown it, or name another.",
        )
    return Finding.warning(
        _CHECK, f"nothing is mounted at {mountpoint}", remedy=f"fsmount mount {mountpoint}"
    )


def _of_another(mountpoint: Path, owner: int) -> Finding:
    return Finding.warning(
        _CHECK,
        f"{mountpoint} is user {owner}'s mount, and this is found out as user {os.geteuid()}, who may have other"
        " rights, credentials and files",
        remedy="Run fsmount doctor as the user of the mount.",
    )
