"""extract: the process that writes a snapshot's files; it only knows descriptors, names and numbers.

Started as `python -P -m fsmount.extract FD`: FD is a stream socket, and the first descriptor it brings is the root
folder of the destination. Making files costs more CPU time than inflating them, so that a snapshot uses a process
per core. Only the standard library is imported: it starts in 30 ms.
"""

import contextlib
import errno
import marshal
import os
import socket
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

#: What precedes a batch: its length in bytes.
LENGTH = struct.Struct("<I")
#: The answer to a batch: an errno or 0; how many extended attributes were lost; the length of a file name.
REPLY = struct.Struct("<III")

CREATE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
REOPEN = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FOLDERS = 128


class File(NamedTuple):
    """A whole file whose bytes lie in one chunk; pieces are (offset in the file, offset in the chunk, size)."""

    folder: bytes
    name: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    pieces: tuple[tuple[int, int, int], ...]
    xattrs: tuple[tuple[bytes, bytes], ...]


class Part(NamedTuple):
    """Some pieces of a file that was made before, and whose attributes are set after its last part."""

    folder: bytes
    name: bytes
    pieces: tuple[tuple[int, int, int], ...]


def encode(files: list[File], parts: list[Part]) -> bytes:
    """A batch, to be sent after its LENGTH and with the descriptor of its chunk."""
    return marshal.dumps(([tuple(file) for file in files], [tuple(part) for part in parts]))


class Folders:
    """Descriptors of the folders below a root, opened name by name: no symlink is ever followed."""

    def __init__(self, root: int) -> None:
        """Ownership: root stays the caller's."""
        self._root = root
        self._open: OrderedDict[bytes, int] = OrderedDict()

    def descriptor(self, path: bytes) -> int:
        """The folder's descriptor, valid until the next call."""
        if not path:
            return self._root
        descriptor = self._open.get(path)
        if descriptor is not None:
            self._open.move_to_end(path)
            return descriptor
        parent, _, name = path.rpartition(b"/")
        near = self._open.get(parent) if parent else self._root
        descriptor = self._walk(path) if near is None else _open_folder(name, near)
        self._open[path] = descriptor
        while len(self._open) > _OPEN_FOLDERS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def _walk(self, path: bytes) -> int:
        descriptor = os.dup(self._root)
        for name in path.split(b"/"):
            try:
                below = _open_folder(name, descriptor)
            finally:
                os.close(descriptor)
            descriptor = below
        return descriptor

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def _open_folder(name: bytes, parent: int) -> int:
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def set_attributes(descriptor: int, file: File) -> int:
    """Owner, mode, extended attributes and time, in an order in which none undoes another.

    Returns how many extended attributes the file system does not take. The umask must be 0, and the file
    have been made with the permission bits of its mode.
    """
    owned = os.geteuid() == 0 and (file.uid or file.gid != os.getegid())
    if owned:
        os.fchown(descriptor, file.uid, file.gid)
    lost = set_xattrs(descriptor, file.xattrs)
    if owned or file.mode & 0o7000 or file.xattrs:
        os.fchmod(descriptor, file.mode)
    os.utime(descriptor, ns=(file.mtime_ns, file.mtime_ns))
    return lost


def set_xattrs(descriptor: int, xattrs: Iterable[tuple[bytes, bytes]]) -> int:
    """Returns how many the file system does not take."""
    lost = 0
    for name, value in xattrs:
        try:
            os.setxattr(descriptor, name, value)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.ENOSPC, errno.E2BIG, errno.ERANGE):
                raise
            lost += 1
    return lost


def _write_file(file: File, folders: Folders, chunk: int) -> int:
    # `user.` attributes need the write bit, whatever the descriptor permits.
    mode = file.mode & 0o777 | (0o200 if file.xattrs else 0)
    descriptor = os.open(file.name, CREATE, mode, dir_fd=folders.descriptor(file.folder))
    try:
        _write_pieces(descriptor, file.pieces, chunk)
        if sum(size for _, _, size in file.pieces) != file.size:
            os.ftruncate(descriptor, file.size)
        return set_attributes(descriptor, file)
    finally:
        os.close(descriptor)


def _write_part(part: Part, folders: Folders, chunk: int) -> None:
    descriptor = os.open(part.name, REOPEN, dir_fd=folders.descriptor(part.folder))
    try:
        _write_pieces(descriptor, part.pieces, chunk)
    finally:
        os.close(descriptor)


def _write_pieces(descriptor: int, pieces: tuple[tuple[int, int, int], ...], chunk: int) -> None:
    for file_offset, offset, size in pieces:
        data = os.pread(chunk, size, offset)
        if len(data) != size:
            raise OSError(errno.EIO, "a chunk is shorter than its index says")
        while data:
            written = os.pwrite(descriptor, data, file_offset)
            data = data[written:]
            file_offset += written


def _receive(connection: socket.socket) -> tuple[bytes, int] | None:
    head, descriptors, _, _ = socket.recv_fds(connection, LENGTH.size, 1, socket.MSG_WAITALL)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    data = connection.recv(length, socket.MSG_WAITALL) if length else b""
    return (data, descriptors[0]) if len(data) == length else None


def _work(connection: socket.socket) -> None:
    """Does batches until the connection ends; answers each, and stops after the first failure."""
    os.umask(0)
    first = _receive(connection)
    if first is None:
        return
    folders = Folders(first[1])
    while (batch := _receive(connection)) is not None:
        data, chunk = batch
        files, parts = marshal.loads(data)
        name, lost = b"", 0
        try:
            for values in files:
                file = File(*values)
                name = file.name
                lost += _write_file(file, folders, chunk)
            for values in parts:
                part = Part(*values)
                name = part.name
                _write_part(part, folders, chunk)
        except OSError as error:
            connection.sendall(REPLY.pack(error.errno or errno.EIO, lost, len(name)) + name)
            return
        finally:
            os.close(chunk)
        connection.sendall(REPLY.pack(0, lost, 0))


if __name__ == "__main__":
    # When the parent is gone there is nobody to tell, and nothing to finish.
    with (
        socket.socket(fileno=int(sys.argv[1])) as inherited,
        contextlib.suppress(ConnectionError, KeyboardInterrupt),
    ):
        _work(inherited)
