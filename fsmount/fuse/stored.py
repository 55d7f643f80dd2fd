"""stored: how the device of a mount is named where it is kept for the process that will serve it next."""

import select

from fsmount.fuse import mounts

_PREFIX = "mount-"
#: It changes with whatever a kernel has been told for the life of a mount: what is agreed on in INIT, and what an inode
#: number, or a place in a listing, means.
_AGREEMENT = 1


def name_of(mount: mounts.Mount, numbers: str) -> str:
    """The name by which this version keeps the device of a mount. numbers: says by which its inodes are named."""
    # systemd has the names of stored descriptors without colons.
    return f"{_PREFIX}{_AGREEMENT}.{numbers}-{mount.device.replace(':', '.')}"


def is_agreed(name: str, numbers: str | None) -> bool:
    """Whether what is kept by this name can be served by this version, with these numbers; None: it needs none."""
    prefix = f"{_PREFIX}{_AGREEMENT}."
    return name.startswith(prefix if numbers is None else f"{prefix}{numbers}-")


def is_device(name: str) -> bool:
    """Whether what is kept by this name is the device of a mount, of whatever version."""
    return name.startswith(_PREFIX)


def mount_of(name: str) -> mounts.Mount | None:
    """The mount whose device is kept by this name, if it is there."""
    device = name.rpartition("-")[2].replace(".", ":")
    return next(
        (mount for mount in mounts.mounted() if mount.device == device and mounts.is_ours(mount)), None
    )


def is_whole(descriptor: int) -> bool:
    """Whether a descriptor that is kept is good for something: that of a mount no longer is when the mount is gone."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return not any(events & (select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0))
