"""disk: whether the cache folder can be what it is to be: large, private, local and lasting."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fsmount.config import Cache
from fsmount.doctor.finding import Finding, Said, Verdict, ask_child

#: As stat(1) calls them. SQLite's locks and atomic renames are no good there, or slow.
_OF_THE_NETWORK = frozenset(
    {
        *("9p", "afs", "ceph", "cifs", "gfs/gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfsd", "ocfs2"),
        *("panfs", "smb", "smb2", "v9fs", "vboxsf"),
    }
)
_IN_MEMORY = frozenset({"ramfs", "tmpfs"})
#: Files that a cache has at least: one for each 4 MiB, and what is known of images.
_FEWEST_FILES = 10_000

_ok = partial(Finding.ok, "cache")
_warning = partial(Finding.warning, "cache")
_problem = partial(Finding.problem, "cache")


class _Disk(NamedTuple):
    """A file system, in bytes and files; `files` is 0 where they are not counted."""

    kind: str
    size: int
    free: int
    files: int
    free_files: int


def check(cache: Cache) -> list[Finding]:
    """What is wrong with it, or that nothing is. Blocks, and asks by child processes: the disk may hang."""
    place = _nearest(cache.path)
    if place is None:
        return [
            _problem(
                f"the disk of {cache.path} does not answer",
                remedy="A network file system that is away? Choose another place with cache.path.",
            )
        ]
    found = list(_folder(cache.path, place))
    if all(finding.verdict is not Verdict.PROBLEM for finding in found):
        found += _disk(cache, place)
    return found or [_ok(f"{cache.path} is private, on a local disk with room")]


def _nearest(path: Path) -> Path | None:
    """The folder itself, or the one in which it would be made; None if that cannot be found out in time."""
    for place in (path, *path.parents):
        said = ask_child("stat", "-L", "--", os.fspath(place))
        if said is None:
            return None
        if said.code == 0 or "No such file" not in said.complaint:
            return place
    return None


def _folder(path: Path, place: Path) -> Iterator[Finding]:
    said = ask_child("stat", "-L", "-c", "%u %a %F", "--", os.fspath(place))
    if said is None or said.code != 0:
        yield _problem(f"{place} cannot be looked at: {_reason(said)}")
        return
    owner, mode, kind = said.output.split(maxsplit=2)
    if kind.strip() != "directory":
        yield _problem(f"{place} is no folder", remedy="Choose another place with cache.path.")
        return
    if place == path and int(owner) != os.geteuid():
        yield _problem(
            f"{path} belongs to user {owner}, not to user {os.geteuid()}",
            remedy="Run as that user; or give each user a cache of their own with cache.path.",
        )
        return
    if place == path and int(mode, 8) & 0o077:
        yield _warning(
            f"{path} is open to other users (mode {mode}) until the next mount closes it",
            remedy=f"chmod 0700 {path}",
        )
    writable = ask_child("test", "-w", os.fspath(place))
    if writable is None or writable.code != 0:
        yield _problem(
            f"user {os.geteuid()} cannot write to {place}",
            remedy="Choose another place with cache.path, or have the folder made for this user.",
        )


def _disk(cache: Cache, place: Path) -> Iterator[Finding]:
    said = ask_child("stat", "-f", "-c", "%S %b %a %c %d %T", "--", os.fspath(place))
    if said is None or said.code != 0:
        yield _problem(f"the disk of {place} cannot be looked at: {_reason(said)}")
        return
    block, blocks, available, files, free_files, kind = said.output.split(maxsplit=5)
    unit = int(block)
    disk = _Disk(kind.strip(), int(blocks) * unit, int(available) * unit, int(files), int(free_files))
    yield from judge(cache, disk)


def judge(cache: Cache, disk: _Disk) -> Iterator[Finding]:
    """What is wrong with a file system as the place of a cache."""
    path, remedy = cache.path, "Free some space there, or choose another place with cache.path."
    if disk.kind in _OF_THE_NETWORK:
        yield _warning(
            f"{path} is on a network file system ({disk.kind}): it is slow, and away when the network is",
            remedy="Choose a local disk with cache.path.",
        )
    if disk.kind in _IN_MEMORY:
        yield _warning(
            f"{path} is in memory ({disk.kind}): after a start of the machine nothing is cached",
            remedy="Choose a disk with cache.path.",
        )
    if disk.free <= cache.min_free:
        yield _problem(
            f"{path} has {_size(disk.free)} left, and cache.min_free keeps {_size(cache.min_free)} free:"
            " nothing more is cached",
            remedy=remedy,
        )
    elif disk.size - cache.min_free < cache.size:
        yield _warning(
            f"the disk of {path} has {_size(disk.size)}: the cache cannot become as large as cache.size,"
            f" {_size(cache.size)}",
            remedy="Lower cache.size, or choose a larger disk with cache.path.",
        )
    if disk.files and disk.free_files < min(_FEWEST_FILES, disk.files):
        yield _warning(f"the disk of {path} has room for only {disk.free_files} more files", remedy=remedy)


def _reason(said: Said | None) -> str:
    return "no answer" if said is None else said.complaint.rpartition(": ")[2]


def _size(size: int) -> str:
    return f"{size / 10**9:.1f} GB" if size >= 10**8 else f"{size / 10**6:.1f} MB"
