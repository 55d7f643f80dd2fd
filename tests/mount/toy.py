"""A file system of nothing but cases, served by a process of its own that a test talks to, line by line.

`/same` reads at once; `/stuck-*` reads when released; to look up `/broken-*` raises what it names.

The process writes a line for each event: `ready`, `lookup NAME`, `stuck COUNT`, `released`, `killed`, and
`ended` after the mount. It reads commands: `ping` is answered with `pong`; `release` lets the stuck readers go;
`trap` starts a caller and kills it at the worst moment: trio has seen its request, and pyfuse3 is about to read
it. `--raw` serves as pyfuse3 does by itself, without what fsmount.fuse.session adds.
"""

import argparse
import contextlib
import ctypes
import errno
import os
import queue
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyfuse3
import trio

from fsmount import errors
from fsmount.fuse import mounts, session

_SIZE = 1 << 20
_FAILURES: dict[bytes, Callable[[], Exception]] = {
    b"broken-bug": lambda: ValueError("broken on purpose"),
    b"broken-corrupt": lambda: errors.Corrupt("corrupt on purpose"),
}


def say(line: str) -> None:
    """Write one event."""
    os.write(1, f"{line}\n".encode())


class Toy(pyfuse3.Operations):
    """Inodes are counted up, and a file handle is its inode."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[bytes, pyfuse3.InodeT] = {}
        self.asked = trio.Event()
        self.released = trio.Event()
        self.stuck = 0

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        say(f"lookup {name.decode()}")
        if name in _FAILURES:
            raise _FAILURES[name]()
        if name != b"same" and not name.startswith(b"stuck-"):
            raise pyfuse3.FUSEError(errno.ENOENT)
        inode = self.names.setdefault(name, pyfuse3.InodeT(len(self.names) + 2))
        return await self.getattr(inode, ctx)

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = inode
        attributes.attr_timeout = attributes.entry_timeout = 0
        is_root = inode == pyfuse3.ROOT_INODE
        attributes.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755 if is_root else stat.S_IFREG | 0o444)
        attributes.st_size = 0 if is_root else _SIZE
        return attributes

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), direct_io=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        if fh != self.names.get(b"same"):
            self.stuck += 1
            self.asked.set()
            say(f"stuck {self.stuck}")
            await self.released.wait()
        return bytes(min(size, _SIZE - off))

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(inode)

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        return

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        return pyfuse3.StatvfsData()


class _Trap(trio.abc.Instrument):
    """Kills a caller between the wake-up of the pyfuse3 task that would read its request, and that read."""

    def __init__(self) -> None:
        self.caller: subprocess.Popen[bytes] | None = None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.caller is not None and task.name.startswith("pyfuse-"):
            self.caller.kill()
            self.caller.wait()
            self.caller = None
            say("killed")


def _caller(mountpoint: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["stat", mountpoint / "any"], stderr=subprocess.DEVNULL)


async def _obey(toy: Toy, trap: _Trap, mountpoint: Path) -> None:
    stdin = trio.lowlevel.FdStream(os.dup(0))
    async with stdin:
        async for commands in stdin:
            for command in commands.split():
                if command == b"ping":
                    say("pong")
                elif command == b"release":
                    say("released")
                    toy.released.set()
                elif command == b"trap":
                    trap.caller = _caller(mountpoint)


async def _serve_raw(toy: Toy, mountpoint: Path, max_tasks: int) -> None:
    pyfuse3.init(toy, os.fspath(mountpoint), {*pyfuse3.default_options, "subtype=fsmount"})
    say("ready")
    await pyfuse3.main(max_tasks=max_tasks)
    pyfuse3.close()


async def _main(arguments: argparse.Namespace) -> None:
    toy, trap = Toy(), _Trap()
    trio.lowlevel.add_instrument(trap)
    mountpoint = arguments.mountpoint
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_obey, toy, trap, mountpoint)
        if arguments.raw:
            await _serve_raw(toy, mountpoint, arguments.max_tasks)
        else:
            async with trio.open_nursery() as serving:
                await serving.start(partial(session.serve, toy, mountpoint, max_tasks=arguments.max_tasks))
                say("ready")
        say("ended")
        nursery.cancel_scope.cancel()


class Process:
    """The toy as a test sees it."""

    def __init__(self, mountpoint: Path, *arguments: str, via: tuple[str, ...] = ()) -> None:
        self.mountpoint = mountpoint
        self.popen = subprocess.Popen(
            [*via, sys.executable, "-m", "tests.mount.toy", *arguments, mountpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        self.log = ""
        self._events: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._readers = [threading.Thread(target=self._read_events), threading.Thread(target=self._read_log)]
        for reader in self._readers:
            reader.start()

    def tell(self, command: str) -> None:
        """Send a command."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{command}\n".encode())
        self.popen.stdin.flush()

    def wait_for(self, event: str, *, timeout_seconds: float = 20) -> list[str]:
        """The events up to and with this one. Raises: queue.Empty if it does not come in time."""
        events: list[str] = []
        while event not in events:
            line = self._events.get(timeout=timeout_seconds)
            assert line is not None, f"it ended before {event!r}, saying {self.log!r}"
            events.append(line)
        return events

    def finish(self) -> int:
        """Wait until it ends; its exit code. `log` is complete then."""
        code = self.popen.wait(20)
        for reader in self._readers:
            reader.join()
        return code

    def _read_events(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._events.put(line.decode().rstrip("\n"))
        self._readers[1].join()
        self._events.put(None)

    def _read_log(self) -> None:
        assert self.popen.stderr is not None
        self.log = self.popen.stderr.read().decode()


@contextlib.contextmanager
def process(mountpoint: Path, *arguments: str, via: tuple[str, ...] = ()) -> Iterator[Process]:
    """The toy, mounted and ready; killed at the end."""
    toy = Process(mountpoint, *arguments, via=via)
    try:
        toy.wait_for("ready")
        yield toy
    finally:
        toy.popen.kill()
        toy.finish()
        for pipe in (toy.popen.stdin, toy.popen.stdout, toy.popen.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def clean(mountpoint: Path) -> None:
    """Take away whatever is mounted there."""
    while mount := mounts.find(mountpoint):
        subprocess.run(["umount", "-l", mount.mountpoint], check=True)


@contextlib.contextmanager
def unserved(mountpoint: Path) -> Iterator[None]:
    """A mount whose daemon never answers, and is dead afterwards; stacked on whatever is there. Needs root."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if libc.mount(b"fsmount", os.fsencode(mountpoint), mounts.FSTYPE.encode(), 0, options) != 0:
            raise OSError(ctypes.get_errno(), "mount(2) failed")
        yield
    finally:
        os.close(device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--max-tasks", type=int, default=session.MAX_TASKS)
    parser.add_argument("mountpoint", type=Path)
    trio.run(_main, parser.parse_args())
