"""The cache folder: what lies where in it, who may read it, and how a file in it comes to be whole or absent."""

import contextlib
import errno
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fsmount.cache.leases import claim
from fsmount.cache.room import PARTIAL
from fsmount.errors import FsmountError, NoSpace, Refused, UsageError
from fsmount.oci.digest import Digest

#: What names and folders take besides content, with some to spare.
_LITTLE = 128 * 1024


class CacheFolder:
    """One cache folder, shared by every fsmount process of its owner.

        chunks/     diskcache: inflated pieces of layers; evicted, least recently used first
        layers/     one SQLite index per layer, by digest; written once, kept
        trees/      one SQLite tree per manifest digest; written once, kept
        manifests/  manifests and image configurations, by digest; written once, kept
        state.sqlite  the numbers given to layers and views; what apps were seen to read

    The folder is 0700: what a private registry served stays with who fetched it, and no one
    else can plant a file that this process would trust.
    """

    def __init__(self, path: Path) -> None:
        """Creates what is missing. Raises: UsageError, Refused (someone else's folder), NoSpace."""
        self.path = path
        self.chunks = path / "chunks"
        self.layers = path / "layers"
        self.trees = path / "trees"
        self.manifests = path / "manifests"
        self.state = path / "state.sqlite"
        #: Frees so many bytes of the disk, as far as it can, for what is kept here for ever: the chunk store's to set.
        self.make_room: Callable[[int], None] = lambda size: None
        with disk_errors(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = path.stat()
            if status.st_uid != os.geteuid():
                raise Refused(
                    f"the cache folder {path} belongs to user {status.st_uid}, not to user {os.geteuid()}",
                    remedy="Give each user a cache of their own with --cache or FSMOUNT_CACHE.",
                )
            if status.st_mode & 0o077:
                path.chmod(0o700)
            for folder in (self.chunks, self.layers, self.trees, self.manifests):
                folder.mkdir(mode=0o700, exist_ok=True)

    def manifest_path(self, digest: Digest) -> Path:
        return self.manifests / f"{digest.algorithm}-{digest.hex}"

    def load_manifest(self, digest: Digest) -> bytes | None:
        """The document of that digest, checked against it; a damaged file is removed and counts as absent."""
        path = self.manifest_path(digest)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if digest.matches(data):
            return data
        path.unlink(missing_ok=True)
        return None

    def save_manifest(self, digest: Digest, data: bytes) -> None:
        """Keeps a verified document. For worker threads. Raises: NoSpace."""
        self.make_room(len(data) + _LITTLE)
        with disk_errors(self.manifests), whole_file(self.manifest_path(digest)) as partial:
            partial.write_bytes(data)


@contextmanager
def new_file(folder: Path) -> Iterator[Path]:
    """A file in the making; it is gone at the end of the block, unless it has got its name.

    Others see meanwhile that it is being made, and do not take it for one that was left behind.
    """
    handle, name = tempfile.mkstemp(prefix=PARTIAL, dir=folder)
    try:
        claim(handle)
        yield Path(name)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a fresh path beside `path` to write to; it becomes `path`, synced, when the block ends well.

    A power cut leaves the old file, the new one, or none: never half of one.
    """
    with new_file(path.parent) as partial:
        yield partial
        publish(partial, path)


def publish(partial: Path, path: Path) -> None:
    """Gives a finished file its name, after its content has reached the disk."""
    handle = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    partial.replace(path)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's complaint about `path` into ours."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error, path) from error
    except sqlite3.DatabaseError as error:
        raise from_sqlite_error(error, path) from error


#: SQLite's words for ENOSPC: of a file, and of the shared memory beside a database.
_FULL = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")


def from_sqlite_error(error: sqlite3.Error, path: Path, *, remedy: str | None = None) -> FsmountError:
    """The error of ours that says what SQLite said about path; remedy, for all but a full disk."""
    if getattr(error, "sqlite_errorname", None) in _FULL:
        return from_os_error(OSError(errno.ENOSPC, str(error)), path)
    return FsmountError(f"{path} cannot be used: {error}", remedy=remedy)


def from_os_error(
    error: OSError, path: Path, *, elsewhere: str = "Choose another place with --cache."
) -> FsmountError:
    """The error of ours that says what the operating system said about path."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"no space left for {path}", remedy=f"Free some space there. {elsewhere}")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(f"{path} cannot be written: {reason}", remedy=elsewhere)
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UsageError(
            f"{path} cannot be a cache folder: {reason}", remedy="Choose another place with --cache."
        )
    return FsmountError(f"the disk failed at {path}: {reason}")
