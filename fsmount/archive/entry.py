"""Entry: one member of a tar archive, free of the archive's own encoding."""

import enum
from dataclasses import dataclass, field
from typing import NamedTuple


class EntryType(enum.IntEnum):
    """What a member is. The values are stored in the layer indexes: never renumber."""

    FILE = 0
    DIRECTORY = 1
    SYMLINK = 2
    HARDLINK = 3
    CHAR = 4
    BLOCK = 5
    FIFO = 6


class Extent(NamedTuple):
    """`size` bytes of a file at `file_offset`, found at `offset` of the inflated archive."""

    file_offset: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One tar member, after its extension headers were applied.

    `path` is cleaned: no leading or trailing slash, no empty or `.` component; `b""` is the root.
    It never has a `..` component (the scanner refuses those).
    `link` is a symlink's target verbatim, or a hardlink's target cleaned like `path`.
    `mode` holds permission, setuid, setgid and sticky bits only (0o7777).
    `size` is the logical size; what no extent covers reads as zeros. Extents ascend and never overlap.
    """

    path: bytes
    type: EntryType
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    extents: tuple[Extent, ...] = ()
