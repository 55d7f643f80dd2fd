"""protocol: the messages of the kernel's FUSE protocol that a read-only file system needs, as bytes and as values.

Structures and numbers are those of the kernel's include/uapi/linux/fuse.h, in the machine's byte order. Nothing here
reads or writes a descriptor.
"""

import enum
import os
import struct
from functools import lru_cache
from typing import NamedTuple


class Opcode(enum.IntEnum):
    """The requests that are answered; every other is told once that it is not implemented."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    READ = 15
    STATFS = 17
    INIT = 26
    READDIR = 28
    INTERRUPT = 36
    BATCH_FORGET = 42
    READDIRPLUS = 44


class Refusal(Exception):
    """A handler's answer is an errno, and there is nothing to log about it."""

    def __init__(self, errno: int) -> None:
        super().__init__(os.strerror(errno))
        self.errno = errno


class Attributes(NamedTuple):
    """What `stat` shows of an inode, and for how many seconds the kernel may believe its name and the rest.

    An inode of 0 says that the name does not exist.
    """

    inode: int
    mode: int
    nlink: int
    uid: int
    gid: int
    device: int
    size: int
    mtime_ns: int
    ctime_ns: int
    name_seconds: float
    seconds: float


def absent(seconds: float) -> Attributes:
    """A name that does not exist, and for how long the kernel need not ask again."""
    return Attributes(0, 0, 0, 0, 0, 0, 0, 0, 0, seconds, 0)


class Request(NamedTuple):
    """struct fuse_in_header; what follows it in the buffer depends on the opcode."""

    length: int
    opcode: int
    unique: int
    inode: int
    uid: int
    gid: int
    pid: int
    extensions: int
    padding: int


_IN_HEADER = struct.Struct("=IIQQIIIHH")
_OUT_HEADER = struct.Struct("=IiQ")
_READ_IN = struct.Struct("=QQI")  # handle, offset, size; flags follow
_INTERRUPT_IN = struct.Struct("=Q")
_INVALIDATE_OUT = struct.Struct("=Qqq")  # inode, offset, length; a length of 0 is all that follows
_NOTIFY_INVALIDATE, _NOTIFY_RESEND = 2, 7
_STATFS_OUT = struct.Struct("=5Q4I24x")
_ATTR = "6Q10I"
_DIRENT_FORM = "QQII"
_ATTR_OUT = struct.Struct("=QII" + _ATTR)
_ENTRY_OUT = struct.Struct("=QQQQII" + _ATTR)
_DIRENT = struct.Struct("=" + _DIRENT_FORM)
_DIRENTPLUS = struct.Struct(_ENTRY_OUT.format + _DIRENT_FORM)
_INIT_IN = struct.Struct("=IIII")
_INIT_FLAGS = struct.Struct("=I")
_INIT_SIZES = struct.Struct("=HHIIH")  # max_background, congestion_threshold, max_write, time_gran, max_pages

HEADER_SIZE = _IN_HEADER.size
#: An answer to INIT with all that is amended; an error has a header alone.
SMALLEST_INIT = _OUT_HEADER.size + _INIT_IN.size + _INIT_SIZES.size
_LARGEST_WRITE = 1 << 20
_PAGE = 4096
#: The kernel refuses to write a request into a smaller buffer than the largest WRITE that was agreed on needs.
BUFFER_SIZE = _LARGEST_WRITE + (1 << 16)
#: Names are followed by zeros to a multiple of this.
_ALIGNMENT = 8
_PADDING = [bytes(length) for length in range(_ALIGNMENT)]
_U64 = (1 << 64) - 1
_BLOCK = 512

_PARALLEL_DIROPS = 1 << 18
_CACHE_SYMLINKS = 1 << 23


def parse_request(buffer: bytearray) -> Request:
    """The header of the request in the buffer."""
    return Request._make(_IN_HEADER.unpack_from(buffer))


def parse_name(buffer: bytearray, length: int) -> bytes:
    """The name that a LOOKUP asks for."""
    return bytes(buffer[HEADER_SIZE : length - 1])


def parse_read(buffer: bytearray) -> tuple[int, int]:
    """The offset and the size of a READ, READDIR or READDIRPLUS."""
    _, offset, size = _READ_IN.unpack_from(buffer, HEADER_SIZE)
    return offset, size


def parse_interrupt(buffer: bytearray) -> int:
    """The `unique` of the request whose caller no longer wants an answer."""
    (unique,) = _INTERRUPT_IN.unpack_from(buffer, HEADER_SIZE)
    return int(unique)


def reply(unique: int, size: int) -> bytes:
    """The header of an answer with `size` bytes after it."""
    return _OUT_HEADER.pack(_OUT_HEADER.size + size, 0, unique)


def error_reply(unique: int, errno: int) -> bytes:
    """The whole answer that is an errno."""
    return _OUT_HEADER.pack(_OUT_HEADER.size, -errno, unique)


def resend() -> bytes:
    """Has the kernel (6.9 and later) send again what it has sent to a process that ended without answering."""
    return _OUT_HEADER.pack(_OUT_HEADER.size, _NOTIFY_RESEND, 0)


def invalidate(inode: int) -> bytes:
    """Has the kernel forget the pages and attributes of an inode."""
    return _OUT_HEADER.pack(
        _OUT_HEADER.size + _INVALIDATE_OUT.size, _NOTIFY_INVALIDATE, 0
    ) + _INVALIDATE_OUT.pack(inode, 0, 0)


def pack_attributes(attributes: Attributes) -> bytes:
    """The answer to GETATTR."""
    return _ATTR_OUT.pack(*_duration(attributes.seconds), 0, *_attr(attributes))


def pack_entry(attributes: Attributes) -> bytes:
    """The answer to LOOKUP."""
    return _ENTRY_OUT.pack(*_entry(attributes))


def pack_statfs(*, block_size: int, name_max: int) -> bytes:
    """The answer to STATFS of a file system that has no sizes to tell."""
    return _STATFS_OUT.pack(0, 0, 0, 0, 0, block_size, name_max, block_size, 0)


class Listing:
    """The answer to READDIR or READDIRPLUS: as many entries as fit."""

    def __init__(self, size: int, *, plus: bool) -> None:
        self._left = size
        self._plus = plus
        self._header = _DIRENTPLUS.size if plus else _DIRENT.size
        self._parts: list[bytes] = []

    @property
    def most(self) -> int:
        """How many entries may fit yet."""
        return self._left // self._header

    def add(self, name: bytes, attributes: Attributes, offset: int) -> bool:
        """Whether it fitted; offset is where a listing goes on after this entry."""
        length = len(name)
        padding = -length % _ALIGNMENT
        self._left -= self._header + length + padding
        if self._left < 0:
            self._left = 0  # entries follow each other: a shorter one does not fit any more either
            return False
        kind = attributes.mode >> 12  # S_IFMT, as dirent.d_type has it
        if self._plus:
            header = _DIRENTPLUS.pack(*_entry(attributes), attributes.inode, offset, length, kind)
        else:
            header = _DIRENT.pack(attributes.inode, offset, length, kind)
        self._parts += (header, name, _PADDING[padding])
        return True

    def finish(self) -> bytes:
        """All that was added."""
        return b"".join(self._parts)


def amended_init(init: bytes, answer: bytes, *, background: int) -> bytes:
    """libfuse's answer to the kernel's INIT, with what libfuse has no option for.

    The kernel keeps symlink targets, which never change here. It looks up names of one directory side by side: by
    default one that waits holds up the others. It sends `background` reads at once: by default 12, of all files
    together, so that a dozen readers of a slow layer would hold up everyone. And no request may be larger than
    our buffer, whatever a newer libfuse would take.
    """
    _, _, _, offered = _INIT_IN.unpack_from(init, HEADER_SIZE)
    changed = bytearray(answer)
    flags_at = _OUT_HEADER.size + 12  # major, minor and max_readahead come first
    (flags,) = _INIT_FLAGS.unpack_from(changed, flags_at)
    _INIT_FLAGS.pack_into(changed, flags_at, flags | offered & (_PARALLEL_DIROPS | _CACHE_SYMLINKS))
    sizes_at = flags_at + 4
    _, _, max_write, time_gran, max_pages = _INIT_SIZES.unpack_from(changed, sizes_at)
    max_write, max_pages = min(max_write, _LARGEST_WRITE), min(max_pages, _LARGEST_WRITE // _PAGE)
    _INIT_SIZES.pack_into(changed, sizes_at, background, background * 3 // 4, max_write, time_gran, max_pages)
    return bytes(changed)


def _entry(a: Attributes) -> tuple[int, ...]:
    """struct fuse_entry_out."""
    name_seconds, name_nanoseconds = _duration(a.name_seconds)
    seconds, nanoseconds = _duration(a.seconds)
    return (a.inode, 0, name_seconds, seconds, name_nanoseconds, nanoseconds, *_attr(a))


def _attr(a: Attributes) -> tuple[int, ...]:
    """struct fuse_attr."""
    inode, mode, nlink, uid, gid, device, size, mtime_ns, ctime_ns, _, _ = a
    mtime, mtime_ns = divmod(mtime_ns, 1_000_000_000)
    ctime, ctime_ns = divmod(ctime_ns, 1_000_000_000)
    mtime &= _U64
    blocks = (size + _BLOCK - 1) // _BLOCK
    times = (mtime, mtime, ctime & _U64, mtime_ns, mtime_ns, ctime_ns)
    return (inode, size, blocks, *times, mode, nlink, uid, gid, device, 4096, 0)


@lru_cache(maxsize=16)
def _duration(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return whole, int((seconds - whole) * 1e9)
