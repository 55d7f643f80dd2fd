"""Room: what the cache may take of the disk, and how much of that is left: `cache.size` and `cache.min_free`."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: What file systems give out at once.
_BLOCK = 4096
#: A folder that changed so short a time before it was listed may have changed again since, with the same time.
_GRAIN_SECONDS = 0.05
#: Bytes that stay free beyond what the administrator says: transactions and folders take some, too.
_SLACK = 512 * 1024

PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True)
class Taken:
    """What counts: files of chunks that are stored, those that are being written, and the database beside them."""

    stored: int
    reserved: int
    database: int


class Room:
    """The two bounds, and what is left up to them. For any thread.

    Against the size count: chunks, as blocks of 4 KiB; those being written, whole from the start; the database with
    its log, as large as it may be after the next transaction; and what is being made beside the chunks, as it is now.
    """

    def __init__(self, folder: Path, *, size: int, min_free: int, beside: Sequence[Path]) -> None:
        """beside: folders in which files are being made whose names begin with `PARTIAL`."""
        self.size = size
        self.min_free = min_free
        self._folder = folder
        self._partials = [_Partials(path) for path in beside]

    def over(self, need: int, taken: Taken) -> int:
        """How many bytes of the cache have to go before so many more may come, for the sake of the size."""
        return max(0, self.counted(taken) + need - self.size)

    def low(self, need: int, taken: Taken) -> int:
        """As `over`, for the sake of the disk's free space. What is being written counts as if nothing of it were."""
        return max(0, self.min_free + taken.reserved + need + _SLACK - self.free())

    def is_low(self) -> bool:
        """Whether the disk has less left than it shall have. Raises: OSError."""
        return self.free() < self.min_free + _SLACK

    def left(self, taken: Taken) -> int:
        """How many bytes may come before something has to go."""
        below_free = self.free() - self.min_free - taken.reserved - _SLACK
        return max(0, min(self.size - self.counted(taken), below_free))

    def counted(self, taken: Taken) -> int:
        """Everything that counts against the size."""
        return taken.stored + taken.reserved + taken.database + sum(one.size() for one in self._partials)

    def free(self) -> int:
        """What the disk has left. Raises: OSError."""
        status = os.statvfs(self._folder)
        return status.f_bavail * status.f_frsize


def blocks(size: int) -> int:
    """What a file of that size takes."""
    return -(-size // _BLOCK) * _BLOCK


class _Partials:
    """The files that are being made in a folder. It is listed anew only when a name has come or gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._changed_ns: int | None = None
        self._names: list[str] = []

    def size(self) -> int:
        """Bytes that they take now."""
        try:
            changed_ns = self._folder.stat().st_mtime_ns
            if changed_ns != self._changed_ns:
                self._names = [name for name in os.listdir(self._folder) if name.startswith(PARTIAL)]
                old_enough = changed_ns / 1e9 < time.time() - _GRAIN_SECONDS
                self._changed_ns = changed_ns if old_enough else None
        except OSError:
            return 0
        return sum(self._taken(name) for name in self._names)

    def _taken(self, name: str) -> int:
        try:
            return (self._folder / name).stat().st_blocks * 512
        except OSError:
            return 0  # it has got its name, or is gone
