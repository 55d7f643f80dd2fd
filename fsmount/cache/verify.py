"""verify: everything in a cache folder is read again, and what is not what it was when it was kept is dropped."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fsmount.cache import database
from fsmount.cache.eviction import Eviction
from fsmount.cache.files import digest_of
from fsmount.cache.folder import CacheFolder, disk_errors
from fsmount.cache.room import PARTIAL, Room
from fsmount.cache.table import Row
from fsmount.errors import UsageError
from fsmount.oci.digest import Digest

#: What is looked at, in this order, by the names that reports have for it.
KINDS = ("tables", "chunks", "manifests", "indexes", "trees")


@dataclass(slots=True)
class Count:
    """How many of one kind were looked at, and what became of them."""

    checked: int = 0
    bytes: int = 0
    bad: int = 0
    dropped: int = 0


class Problem(NamedTuple):
    """Something that is not what it should be. `name`: a chunk's key, or a file within the folder."""

    kind: str
    name: str
    what: str
    is_dropped: bool


@dataclass(slots=True)
class Verification:
    """One look at all of a cache, as far as it has come. Mounts and commands may go on using it meanwhile."""

    folder: CacheFolder
    _eviction: Eviction
    counts: dict[str, Count] = field(default_factory=lambda: {kind: Count() for kind in KINDS})
    problems: list[Problem] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """What has been read by now."""
        return sum(count.bytes for count in self.counts.values())

    @property
    def expected(self) -> int:
        """About how many bytes that will be."""
        with disk_errors(self.folder.chunks):
            return self._eviction.table.totals()[0]

    def run(self, checkpoint: Callable[[], None] = lambda: None) -> None:
        """Looks at everything. For a worker thread; checkpoint is called again and again, and may raise.

        Raises: FsmountError: the disk fails.
        """
        with disk_errors(self.folder.path):
            for kind, size, problem in self._look():
                count = self.counts[kind]
                count.checked += 1
                count.bytes += size
                if problem is not None:
                    self.problems.append(problem)
                    count.bad += 1
                    count.dropped += problem.is_dropped
                checkpoint()

    def _look(self) -> Iterator[tuple[str, int, Problem | None]]:
        yield self._table()
        yield self._state()
        yield from self._chunks()
        yield from self._files(self.folder.manifests, "manifests", _manifest_problem)
        yield from self._files(self.folder.layers, "indexes", _database_problem)
        yield from self._files(self.folder.trees, "trees", _database_problem)

    def _table(self) -> tuple[str, int, Problem | None]:
        """The table itself; if it is damaged, an empty one is begun."""
        what = self._eviction.damage
        if what is None and (problems := self._eviction.table.problems()):
            what = problems[0]
            damage = sqlite3.DatabaseError(what)
            damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            self._eviction.mend(damage)
        name = self.folder.chunks.name
        return "tables", 0, Problem("tables", name, what, True) if what is not None else None

    def _state(self) -> tuple[str, int, Problem | None]:
        # Not dropped: the numbers in it are those that the kernel has.
        path = self.folder.state
        if not path.exists():
            return "tables", 0, None
        try:
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as connection:
                (what,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            what = str(error)
        problem = None if what == "ok" else Problem("tables", path.name, what, False)
        return "tables", path.stat().st_size, problem

    def _chunks(self) -> Iterator[tuple[str, int, Problem | None]]:
        number = 0
        while rows := self._eviction.table.following(number, 1):
            (row,) = rows
            number = row.number
            try:
                what = self._chunk_problem(row)
            except FileNotFoundError:
                # Evicted just now; or it counts as that.
                self._eviction.remove([row])
                continue
            if what is not None:
                self._eviction.remove([row])
            yield "chunks", row.size, Problem("chunks", row.key, what, True) if what is not None else None

    def _chunk_problem(self, row: Row) -> str | None:
        """Raises: FileNotFoundError."""
        if row.filename is None or row.sha256 is None:
            return "it was not stored by fsmount"
        descriptor = os.open(self.folder.chunks / row.filename, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # From the disk, not from memory, as far as the kernel lets that be.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            found = digest_of(descriptor)
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        finally:
            os.close(descriptor)
        return None if found == row.sha256 else "its bytes are not those that were stored"

    def _files(
        self, folder: Path, kind: str, problem_of: Callable[[Path], str | None]
    ) -> Iterator[tuple[str, int, Problem | None]]:
        for name in sorted(os.listdir(folder)):
            path = folder / name
            try:
                size = path.stat().st_size
                what = None if name.startswith(PARTIAL) else problem_of(path)
            except FileNotFoundError:
                continue  # it has been replaced, or was being made
            if what is not None:
                path.unlink(missing_ok=True)
            known = str(path.relative_to(self.folder.path))
            if not name.startswith(PARTIAL):
                yield kind, size, Problem(kind, known, what, True) if what is not None else None


def _manifest_problem(path: Path) -> str | None:
    try:
        digest = Digest.parse(path.name.replace("-", ":", 1))
    except UsageError:
        return "its name is no digest"
    return None if digest.matches(path.read_bytes()) else "it is not what its name says"


def _database_problem(path: Path) -> str | None:
    return None if database.is_sound(path) else "it is damaged"


@contextmanager
def verifying(folder: CacheFolder) -> Iterator[Verification]:
    """A look at a cache, which has not begun. Raises: NoSpace, FsmountError."""
    with disk_errors(folder.chunks):
        # It stores nothing, and so has no bounds.
        room = Room(folder.chunks, size=2**62, min_free=0, beside=())
        eviction = Eviction(folder.chunks, room, let_go=lambda keys: keys)
    try:
        yield Verification(folder, eviction)
    finally:
        eviction.close()
