"""asking: how a command speaks to the process that serves a mount."""

from pathlib import Path


def ask(mountpoint: Path, path: str, body: bytes | None = None) -> bytes:
    """What the process answers; with a body, what it has done.

    Raises: NotRunning, Refused, and what `control.ask` raises.
    """
    import trio

    from fsmount import control
    from fsmount.errors import NotRunning
    from fsmount.fuse import mounts

    mount = mounts.find(mountpoint)
    if mount is None:
        raise NotRunning(f"nothing is mounted at {mountpoint}")
    if not mounts.is_ours(mount):
        raise NotRunning(f"what is mounted at {mountpoint} is not fsmount's, but of type {mount.fstype}")
    return trio.run(control.ask, mount, path, body)
