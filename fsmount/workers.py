"""Workers: the extracting processes of one snapshot, and the batches on their way to them."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from fsmount import extract
from fsmount.extract import File, Part
from fsmount.singleflight import single_error

_COUNT = min(4, os.cpu_count() or 1)


class ChangedMeanwhile(OSError):
    """A chunk is no longer what it was when it was checked."""


@dataclass(slots=True)
class Batch:
    """What to write from one chunk. Ownership: `descriptor` is closed when the batch has been written.

    `checked`: size and time of change that the chunk's file had when it was checked.
    """

    descriptor: int
    files: list[File] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    checked: tuple[int, int] | None = None

    def check(self) -> None:
        """Raises: ChangedMeanwhile, if the file of the chunk has changed since it was checked."""
        status = os.fstat(self.descriptor)
        if self.checked not in (None, (status.st_size, status.st_mtime_ns)):
            name = self.files[0].name if self.files else self.parts[0].name
            raise ChangedMeanwhile(
                errno.EBADMSG, "a chunk of the cache was changed while it was copied", os.fsdecode(name)
            )


@dataclass(slots=True)
class Workers:
    """Where batches go; files of one batch are written in order, batches in any."""

    batches: trio.MemorySendChannel[Batch]
    lost_xattrs: int = 0


@asynccontextmanager
async def start_workers(root: int) -> AsyncIterator[Workers]:
    """Processes that write below the folder `root`; all batches are done at the end of the block.

    Raises: OSError, as a process met it, with the name of the file; ChangedMeanwhile.
    Cancellation: the processes end.
    """
    send, receive = trio.open_memory_channel[Batch](_COUNT)
    workers = Workers(send)
    with single_error(OSError):
        async with trio.open_nursery() as nursery:
            async with receive:
                for _ in range(_COUNT):
                    nursery.start_soon(_serve, receive.clone(), root, workers)
            async with send:
                yield workers


async def _serve(batches: trio.MemoryReceiveChannel[Batch], root: int, workers: Workers) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        # -P: no module is taken from the current folder, which may be anybody's.
        command = [sys.executable, "-P", "-m", "fsmount.extract", str(theirs.fileno())]
        # In a group of its own: Ctrl-C is for us, and their end before ours would look like a failure.
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, process_group=0
        )
    try:
        async with batches:
            with trio.socket.from_stdlib_socket(ours) as connection:
                await _send(connection, b"", root)
                async for batch in batches:
                    try:
                        await _send(connection, extract.encode(batch.files, batch.parts), batch.descriptor)
                        lost = await _reply(connection)  # not within the sum, which others change meanwhile
                        batch.check()
                    finally:
                        os.close(batch.descriptor)
                    workers.lost_xattrs += lost
    finally:
        # Its connection has ended, or it is no longer wanted: it has nothing to lose.
        process.kill()
        process.wait()


async def _send(connection: trio.socket.SocketType, data: bytes, descriptor: int) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor.to_bytes(4, sys.byteorder))]
    await connection.sendmsg([extract.LENGTH.pack(len(data))], rights)
    rest = memoryview(data)
    while rest:
        rest = rest[await connection.send(rest) :]


async def _reply(connection: trio.socket.SocketType) -> int:
    """How many attributes a batch lost. Raises: OSError."""
    reply = await _receive(connection, extract.REPLY.size)
    code, lost, length = extract.REPLY.unpack(reply)
    if code:
        name = await _receive(connection, length)
        raise OSError(code, os.strerror(code), os.fsdecode(name))
    return int(lost)


async def _receive(connection: trio.socket.SocketType, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await connection.recv(size - len(data))
        if not piece:
            raise OSError(errno.EIO, "an extracting process ended early")
        data += piece
    return data
