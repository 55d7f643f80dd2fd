"""What killed processes and power cuts have left in a cache folder, which nothing names and nobody will ask for."""

import contextlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fsmount.cache.leases import is_claimed
from fsmount.cache.room import PARTIAL
from fsmount.cache.table import ChunkTable

log = logging.getLogger(__name__)

#: A file of a chunk that no row names has been given up by then: storing it takes seconds.
_ORPHAN_SECONDS = 3600.0
#: Nothing that is being made beside the chunks stays without a write for so long; by a clock that does not jump.
_PARTIAL_SECONDS = 24 * 3600.0

_SUBFOLDERS = 256


def subfolders() -> Iterator[str]:
    """The names of the folders in which chunks lie, for ever; each process begins elsewhere."""
    number = int.from_bytes(os.urandom(1))
    while True:
        yield f"{number:02x}"
        number = (number + 1) % _SUBFOLDERS


def remove_orphans(folder: Path, subfolder: str, table: ChunkTable) -> int:
    """Removes old files of one subfolder that the table does not know; how many. Raises: OSError, sqlite3.Error.

    They are there after a power cut, which takes the last rows with it, or if the table was lost.
    """
    before = time.time() - _ORPHAN_SECONDS
    # Also those one folder further down, where an earlier version has put them.
    old = [Path(entry.path) for entry in files_below(folder / subfolder) if _is_older(entry, before)]
    if not old:
        return 0
    # Asked afterwards: a file gets its row after it was written, and keeps its name for ever.
    known = table.files_in(subfolder)
    orphans = [path for path in old if str(path.relative_to(folder)) not in known]
    for path in orphans:
        path.unlink(missing_ok=True)
    if orphans:
        log.info("%s: %d files that belong to no chunk are removed", folder / subfolder, len(orphans))
    return len(orphans)


def _is_older(entry: os.DirEntry[str], than: float) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return entry.stat(follow_symlinks=False).st_mtime < than
    return False


def remove_partials(folders: Sequence[Path]) -> int:
    """Removes what processes that have ended were making; how many files. Raises: OSError."""
    before = time.time() - _PARTIAL_SECONDS
    count = 0
    for folder in folders:
        for entry in _entries(folder):
            path = Path(entry.path)
            if entry.name.startswith(PARTIAL) and _is_older(entry, before) and not is_claimed(path):
                path.unlink(missing_ok=True)
                count += 1
    if count:
        log.info("%d half-made files are removed", count)
    return count


class Aside:
    """A folder of chunks whose table was lost, moved aside: as good as free space, which is used up before any other.

    To remove it at once would take seconds, and to leave it would take the disk twice.
    """

    def __init__(self, folder: Path) -> None:
        """folder: of the chunks that are in use."""
        self.path = folder.with_name(f"{folder.name}.damaged")
        self._files: Iterator[os.DirEntry[str]] | None = None

    def take(self, folder: Path) -> None:
        """Moves the folder of chunks, which then is no longer there. Raises: OSError."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        folder.rename(self.path / secrets.token_hex(8))
        self._files = None

    def free(self, size: int) -> bool:
        """Removes files of so many bytes, if there are so many; whether there may be more. Raises: OSError."""
        if not self.path.exists():
            return False
        if self._files is None:
            self._files = files_below(self.path)
        while size > 0:
            entry = next(self._files, None)
            if entry is None:
                self._files = None
                shutil.rmtree(self.path, ignore_errors=True)
                return False
            with contextlib.suppress(FileNotFoundError):
                size -= entry.stat(follow_symlinks=False).st_size
                os.unlink(entry.path)
        return True


def files_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Every file below a folder, in any order. Some of them may be gone by the time they are looked at."""
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(Path(entry.path))
        else:
            yield entry


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    # Not one by one: the folder would stay open in a generator that nobody goes on with.
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return list(entries)
    return []
