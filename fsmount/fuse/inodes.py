"""Inode numbers: 63 bits that say what they name, so that no table is needed and a new process understands them."""

from typing import NamedTuple

from fsmount.catalog import VIEW_ROOT

#: The kernel's number for the root of a mount.
ROOT = 1

_FOLDER, _MEMBER, _DIRECTORY = 0, 1, 2
_KIND_SHIFT = 61
_MEMBER_BITS = 32
_DIRECTORY_BITS = 41  # a position in the image, 9 bits, and a number in that layer, 32
_VIEW_BITS = 20


class Folder(NamedTuple):
    """A folder above the tags: the root, an app, or what leads to an app. `number` is kept on disk."""

    number: int


class Content(NamedTuple):
    """A file, symlink or device: a member of a layer, the same in every tag that shares the layer.

    GNU diff takes two such names for equal without opening them, and the page cache holds them once.
    """

    layer: int
    member: int


class Directory(NamedTuple):
    """A directory of a tree in a view; the kernel allows a directory one name, so that it is one per view."""

    view: int
    directory: int


def folder_inode(number: int) -> int:
    """The inode of the folder of that number; numbers begin at 1, and so do not meet the root's."""
    return number + ROOT


def content_inode(layer: int, member: int) -> int:
    return _MEMBER << _KIND_SHIFT | layer << _MEMBER_BITS | member


def directory_inode(view: int, directory: int = VIEW_ROOT) -> int:
    """Raises: OverflowError after a million views in one cache."""
    if view >> _VIEW_BITS:
        raise OverflowError("the cache has given out all its numbers for tags; start with a new cache folder")
    return _DIRECTORY << _KIND_SHIFT | view << _DIRECTORY_BITS | directory


def parse_inode(inode: int) -> Folder | Content | Directory:
    """What an inode number names. Folder(0) is the root."""
    kind = inode >> _KIND_SHIFT
    rest = inode & ((1 << _KIND_SHIFT) - 1)
    if kind == _MEMBER:
        return Content(rest >> _MEMBER_BITS, rest & ((1 << _MEMBER_BITS) - 1))
    if kind == _DIRECTORY:
        return Directory(rest >> _DIRECTORY_BITS, rest & ((1 << _DIRECTORY_BITS) - 1))
    return Folder(rest - ROOT)
