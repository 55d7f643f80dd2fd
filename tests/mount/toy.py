"""A file system of nothing but cases, served by a process of its own that a test talks to, line by line.

`/same` reads at once; `/stuck-*` reads when released; to look up `/slow` never ends, `/late` ends when
released, and `/broken-*` raises what it names.

The process writes a line for each event: `ready`, `lookup NAME`, `stuck COUNT`, `given up`, `released`, `killed`, and
`ended` after the mount. It reads commands: `ping` is answered with `pong`; `release` lets the stuck and the late go;
`trap` starts a caller and kills it at the worst moment: trio has seen its request, and the loop is about to read
it. `--raw` serves with pyfuse3's own loop instead of fsmount's.
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
from fsmount.fuse.inodes import ROOT
from fsmount.fuse.protocol import Attributes, Refusal, absent, pack_statfs
from fsmount.fuse.requests import Answer

_SIZE = 1 << 20
#: trio's name of the task that reads the requests.
_LOOP = "fsmount.fuse.session.Session._answer"
_FAILURES: dict[bytes, Callable[[], Exception]] = {
    b"broken-bug": lambda: ValueError("broken on purpose"),
    b"broken-corrupt": lambda: errors.Corrupt("corrupt on purpose"),
}


def say(line: str) -> None:
    """Write one event."""
    os.write(1, f"{line}\n".encode())


class Toy:
    """Handlers for fsmount.fuse.session. Inodes are counted up."""

    def __init__(self) -> None:
        self.names: dict[bytes, int] = {}
        self.asked = trio.Event()
        self.released = trio.Event()
        self.stuck = 0

    def lookup(self, parent: int, name: bytes) -> Answer[Attributes]:
        say(f"lookup {name.decode()}")
        if name == b"slow":
            return self._slow()
        if name == b"late":
            return self._late()
        if name in _FAILURES:
            raise _FAILURES[name]()
        if name != b"same" and not name.startswith(b"stuck-"):
            return absent(0)
        return self.getattr(self.names.setdefault(name, len(self.names) + 2))

    async def _slow(self) -> Attributes:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            say("given up")
            raise
        raise AssertionError

    async def _late(self) -> Attributes:
        await self.released.wait()
        return self.getattr(self.names.setdefault(b"late", len(self.names) + 2))

    def getattr(self, inode: int) -> Attributes:
        is_root = inode == ROOT
        mode = stat.S_IFDIR | 0o755 if is_root else stat.S_IFREG | 0o444
        return Attributes(inode, mode, 1, 0, 0, 0, 0 if is_root else _SIZE, 0, 0, 0, 0)

    def readlink(self, inode: int) -> bytes:
        raise Refusal(errno.EINVAL)

    async def read(self, inode: int, offset: int, size: int) -> bytes:
        if inode != self.names.get(b"same"):
            self.stuck += 1
            self.asked.set()
            say(f"stuck {self.stuck}")
            await self.released.wait()
        return bytes(min(size, _SIZE - offset))

    def readdir(self, inode: int, after: int, size: int, *, plus: bool) -> bytes:
        return b""

    def statfs(self) -> bytes:
        return pack_statfs(block_size=4096, name_max=255)


class Raw(pyfuse3.Operations):
    """As much of the same as is needed to see how pyfuse3's own loop ends."""

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name in _FAILURES:
            raise _FAILURES[name]()
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = inode
        attributes.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755)
        return attributes

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        return pyfuse3.StatvfsData()


class _Trap(trio.abc.Instrument):
    """Kills a caller between the wake-up of the pyfuse3 task that would read its request, and that read."""

    def __init__(self) -> None:
        self.caller: subprocess.Popen[bytes] | None = None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.caller is not None and task.name.startswith(("pyfuse-", _LOOP)):
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


async def _serve_raw(mountpoint: Path) -> None:
    pyfuse3.init(Raw(), os.fspath(mountpoint), {*pyfuse3.default_options, "subtype=fsmount"})
    say("ready")
    await pyfuse3.main()
    pyfuse3.close()


async def _main(arguments: argparse.Namespace) -> None:
    toy, trap = Toy(), _Trap()
    trio.lowlevel.add_instrument(trap)
    mountpoint = arguments.mountpoint
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_obey, toy, trap, mountpoint)
        if arguments.raw:
            await _serve_raw(mountpoint)
        else:
            async with trio.open_nursery() as serving:
                await serving.start(partial(session.Session(mountpoint).serve, toy))
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
    parser.add_argument("mountpoint", type=Path)
    trio.run(_main, parser.parse_args())
