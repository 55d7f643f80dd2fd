"""places: where the sockets of a user's mounts lie, and which folders are to be trusted with them."""

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def runtime_folders(user: int, environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Where the sockets of a user's mounts may lie, the best place first.

    Not in the cache folder: who asks knows the mount point alone. The last one is for users without a session.
    """
    if user == 0:
        return [Path("/run/fsmount"), Path("/tmp/fsmount-0")]
    folders = [Path(f"/run/user/{user}/fsmount"), Path(f"/tmp/fsmount-{user}")]
    own = Path(environ.get("XDG_RUNTIME_DIR", ""))
    # The XDG Base Directory Specification has relative paths ignored. Root may ask for another user's mount.
    return [own / "fsmount", *folders] if own.is_absolute() and user == os.geteuid() else folders


#: What `socket_name` makes.
SOCKET_NAME = re.compile(r"[0-9a-f]{16}\.sock")


def socket_name(mountpoint: Path) -> str:
    """The file name of a mount point's socket."""
    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16] + ".sock"


def address(folder: int, name: str) -> str:
    """A socket's address by a descriptor of its folder: a path may be longer than the 107 bytes of sun_path."""
    return f"/proc/self/fd/{folder}/{name}"


@contextmanager
def opened(path: Path, owner: int) -> Iterator[int]:
    """A descriptor of a folder to which nobody but its owner writes. Raises: OSError."""
    folder = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(folder)
        if status.st_uid != owner or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            # In /tmp anybody may have made it, to read our questions or to answer those of others.
            raise PermissionError(f"{path} is not for user {owner} alone")
        yield folder
    finally:
        os.close(folder)
