"""Lease: a number that a process holds for as long as it lives, and by which others see whether it does."""

import fcntl
import os
import secrets
import struct
from pathlib import Path

#: struct flock of fcntl(2), on 64 bits: type, whence, start, length, process.
_FLOCK = struct.Struct("hhqqi4x")


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
        kind, *_ = _FLOCK.unpack(fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, _lock(number)))
        return bool(kind != fcntl.F_UNLCK)

    def close(self) -> None:
        """Gives the number back."""
        os.close(self._file)


def _lock(number: int) -> bytes:
    return _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
