"""Lease: a number that a process holds for as long as it lives, and by which others see whether it does.

So do files that are being made: age tells nothing of them where a clock may jump.
"""

import contextlib
import fcntl
import os
import secrets
import struct
from pathlib import Path

#: struct flock of fcntl(2), on 64 bits: type, whence, start, length, process.
_FLOCK = struct.Struct("hhqqi4x")
#: What is locked of a file in the making: far beyond the bytes that SQLite locks (from 1 GiB on, 512).
_CLAIM = 2**62


class Lease:
    """One byte of a shared file, locked: the kernel unlocks it when the process ends, however that comes.

    Process ids would not do: they are given again, and mean something else in another container.
    """

    def __init__(self, path: Path) -> None:
        """Raises: OSError."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.number = 0
        while not self.number:
            number = 1 + secrets.randbelow(2**62)
            try:
                fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _lock(number))
            except BlockingIOError:
                continue  # somebody has it
            except OSError:
                os.close(self._file)
                raise
            self.number = number

    def is_held(self, number: int) -> bool:
        """Whether the process that was given that number lives. Raises: OSError."""
        if number == self.number:
            return True
        return _is_locked(self._file, _lock(number))

    def close(self) -> None:
        """Gives the number back."""
        os.close(self._file)


def claim(descriptor: int) -> None:
    """Has others see that a file is being made, until this descriptor is closed, however that comes."""
    with contextlib.suppress(OSError):  # there are file systems without locks
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _lock(_CLAIM))


def is_claimed(path: Path) -> bool:
    """Whether a file is being made by a process that lives. Raises: OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return _is_locked(descriptor, _lock(_CLAIM, kind=fcntl.F_RDLCK))
    finally:
        os.close(descriptor)


def _lock(number: int, *, kind: int = fcntl.F_WRLCK) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, number, 1, 0)


def _is_locked(descriptor: int, lock: bytes) -> bool:
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, lock))
    return bool(kind != fcntl.F_UNLCK)
