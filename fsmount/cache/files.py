"""The file of a chunk: written in one go, told from another one, and hashed."""

import hashlib
import os
from pathlib import Path
from typing import TypeAlias

#: Tells a file from another one, and from the same one after a change: inode, size, and the times of both changes.
Stamp: TypeAlias = tuple[int, int, int, int]


def stamp_of(descriptor: int) -> Stamp:
    """That of an open file, now."""
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def write_file(path: Path, data: memoryview) -> Stamp:
    """Writes a new file. Raises: OSError, and then there may be half of it."""
    for left in range(10, -1, -1):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            break
        except FileNotFoundError:
            # An earlier version removes a folder that is empty, maybe just now.
            if not left:
                raise
            path.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        # In one go: diskcache wrote line by line, which takes 113 ms for 1 MiB of newlines.
        while data:
            data = data[os.write(descriptor, data) :]
        return stamp_of(descriptor)
    finally:
        os.close(descriptor)


def digest_of(descriptor: int) -> str:
    """The sha256 of an open file, in hexadecimal digits. Raises: OSError."""
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()
