"""Link: a TCP proxy that is like a line of so many bits a second and so long a round trip, and counts what passes.

`python -m scripts.bench.link HOST:PORT MEGABITS ROUND_TRIP_MS` prints the address that it listens on. Then it answers
every line on its standard input with the bytes that went down and up so far and the number of connections, and ends
with that input. It is a process of its own, so that nobody's threads slow it down.

All connections share one wire a direction, and take turns on it piece by piece, as with a fair queue. A new connection
costs a round trip before its first byte goes up, and every byte is half a round trip on its way. It is kinder than
a real line in one way: a connection has the full rate from its first byte on (there is no slow start), and headers of
packets weigh nothing: 100 Mbit/s are 12.5 MB/s of what programs see.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import trio

#: The line, unless it is said otherwise.
MEGABITS, ROUND_TRIP_MS = 100.0, 20.0

#: What a connection puts on the wire in one turn: 5.2 ms of 100 Mbit/s.
_PIECE = 64 * 1024
#: Pieces of one connection that may be under way: four times what fits on a line of 100 Mbit/s and 20 ms.
_WINDOW = 16
#: Timers ring late, and this process may have to wait for a core: the wire was not idle for that. It is less than a
#: round trip, so that who waits for an answer gains nothing.
_GAP_SECONDS = 0.015


@dataclass(frozen=True, slots=True)
class Carried:
    """Bytes that went to clients (`down`) and came from them (`up`), HTTP's headers included."""

    down: int
    up: int
    connections: int


@dataclass(frozen=True, slots=True)
class Link:
    """A running link: `host` leads to what is behind it."""

    host: str
    _process: subprocess.Popen[str]

    def carried(self) -> Carried:
        """All that has passed since it began."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Carried(*map(int, self._process.stdout.readline().split()))


@contextmanager
def linked(
    upstream: str, *, megabits: float = MEGABITS, round_trip_ms: float = ROUND_TRIP_MS
) -> Iterator[Link]:
    """Start a link to `upstream` ("127.0.0.1:PORT"); it ends with the block, or with this process."""
    command = [sys.executable, "-m", "scripts.bench.link", upstream, str(megabits), str(round_trip_ms)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            host = process.stdout.readline().strip()
            if not host:
                raise RuntimeError("the link did not start")
            yield Link(host, process)
        finally:
            process.stdin.close()


class _Wire:
    """One direction: what is on it at a time is one piece of one connection."""

    def __init__(self, rate: float) -> None:
        """rate: bytes a second."""
        self.carried = 0
        self._rate = rate
        self._free_at = 0.0
        self._turn = trio.Lock()  # first come, first served

    async def take(self, source: trio.SocketStream) -> bytes:
        """A piece of what source has to send, when its last bit has left; nothing at the end."""
        await trio.lowlevel.wait_readable(source.socket)
        async with self._turn:
            data = bytes(await source.receive_some(_PIECE))
            self.carried += len(data)
            now = trio.current_time()
            began = self._free_at if now < self._free_at + _GAP_SECONDS else now
            self._free_at = began + len(data) / self._rate
            await trio.sleep_until(self._free_at)
        return data


class _Proxy:
    def __init__(self, upstream: str, megabits: float, round_trip_seconds: float) -> None:
        self._address, _, port = upstream.partition(":")
        self._port = int(port)
        self._delay = round_trip_seconds / 2
        self._down, self._up = _Wire(megabits * 1e6 / 8), _Wire(megabits * 1e6 / 8)
        self._connections = 0

    @property
    def figures(self) -> str:
        return f"{self._down.carried} {self._up.carried} {self._connections}\n"

    async def handle(self, client: trio.SocketStream) -> None:
        """One connection, until both ends have ended it or one has broken it."""
        self._connections += 1
        accepted = trio.current_time()
        upstream = await trio.open_tcp_stream(self._address, self._port)
        async with client, upstream, trio.open_nursery() as nursery:
            shaken = accepted + 2 * self._delay
            both = nursery.cancel_scope
            nursery.start_soon(self._carry, client, upstream, self._up, shaken, both)
            nursery.start_soon(self._carry, upstream, client, self._down, shaken, both)

    async def _carry(
        self,
        source: trio.SocketStream,
        sink: trio.SocketStream,
        wire: _Wire,
        begin: float,
        both: trio.CancelScope,
    ) -> None:
        send, receive = trio.open_memory_channel[tuple[float, bytes]](_WINDOW)
        try:
            await trio.sleep_until(begin)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._deliver, receive, sink)
                async with send:
                    while True:
                        data = await wire.take(source)
                        await send.send((trio.current_time() + self._delay, data))
                        if not data:
                            return
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            both.cancel()

    async def _deliver(
        self, pieces: trio.MemoryReceiveChannel[tuple[float, bytes]], sink: trio.SocketStream
    ) -> None:
        async for due, data in pieces:
            await trio.sleep_until(due)
            if data:
                await sink.send_all(data)
            else:
                await sink.send_eof()


async def _serve(upstream: str, megabits: float, round_trip_seconds: float) -> None:
    proxy = _Proxy(upstream, megabits, round_trip_seconds)
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, proxy.handle, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        address, port = listener.socket.getsockname()
        print(f"{address}:{port}", flush=True)
        async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as asked:
            async for lines in asked:
                print(proxy.figures * bytes(lines).count(b"\n"), end="", flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_serve, sys.argv[1], float(sys.argv[2]), float(sys.argv[3]) / 1000)
