"""A front before a real registry that counts what passes, and can slow, stall, cut, change or refuse it."""

import http.client
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, Self

_OWN = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


@dataclass(slots=True)
class Passed:
    """One answered request: `range_` is its Range header, `sent` the body bytes given so far."""

    method: str
    path: str
    range_: str
    status: int
    sent: int


@dataclass(slots=True)
class Fault:
    """What goes wrong with answers to GET whose path contains `path`, at most `times` times.

    `at` is a position in the whole blob, whichever range asks for it: only answers that hold it are met.
    "stall" waits there for `CountingProxy.release`; "cut" ends the connection before it; "flip" changes a bit
    of that byte; "refuse" answers `at` as a status, without a body.
    """

    kind: Literal["stall", "cut", "flip", "refuse"]
    at: int
    path: str = ""
    times: int = 1 << 30


@dataclass(slots=True)
class CountingProxy:
    """Forwards requests on a free loopback port to `upstream` ("127.0.0.1:PORT", plain http), a thread each.

    `throttle` bounds the body of each answer, in bytes a second. Ownership: a context manager; leaving it
    releases what is stalled and breaks all connections.
    """

    upstream: str
    throttle: float | None = None
    faults: list[Fault] = field(default_factory=list)
    _passed: list[Passed] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _go: threading.Event = field(default_factory=threading.Event)
    _stalled: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _clients: set[socket.socket] = field(default_factory=set)
    _server: ThreadingHTTPServer = field(init=False)
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"front": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.release()
        self.break_connections()

    def break_connections(self) -> None:
        """End every connection that is open now; new ones are accepted."""
        with self._lock:
            for client in self._clients:
                with suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Let every stalled answer go on, and none stall again."""
        self._go.set()

    def wait_stalled(self, timeout_seconds: float = 10) -> bool:
        """Wait until one more answer has stalled; False if none did in time."""
        return self._stalled.acquire(timeout=timeout_seconds)

    def passed(self, path: str = "") -> list[Passed]:
        """The requests answered so far whose path contains `path`, in the order of their answers."""
        with self._lock:
            return [one for one in self._passed if path in one.path]

    def body_bytes(self) -> Counter[str]:
        """Body bytes sent by path, queries left out."""
        count: Counter[str] = Counter()
        for one in self.passed():
            count[one.path] += one.sent
        return count

    def forget(self) -> None:
        """Begin counting anew."""
        with self._lock:
            self._passed.clear()


class _Handler(BaseHTTPRequestHandler):
    """One client connection; each of its requests has a connection of its own to the upstream."""

    front: CountingProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with self.front._lock:
            self.front._clients.add(self.connection)
        try:
            with suppress(OSError, http.client.HTTPException):
                super().handle()
        finally:
            with self.front._lock:
                self.front._clients.discard(self.connection)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        upstream = http.client.HTTPConnection(self.front.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "connection":
                    upstream.putheader(name, value)
            upstream.endheaders(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            answer = upstream.getresponse()
            stated = answer.headers.get("Content-Length")
            body = b"" if stated else answer.read()
            size = int(stated) if stated else len(body)
            ranged = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
            start = int(ranged[1]) if ranged else 0
            faults = self._faults(path, start, start + size) if self.command == "GET" else []
            status = next((fault.at for fault in faults if fault.kind == "refuse"), answer.status)
            refused = status != answer.status
            one = Passed(self.command, path, self.headers.get("Range", ""), status, 0)
            with self.front._lock:
                self.front._passed.append(one)
            self.send_response(status)
            for name, value in answer.headers.items():
                if name.lower() not in _OWN and not refused:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(0 if refused else size))
            self.end_headers()
            if self.command != "HEAD" and not refused:
                began = time.monotonic()
                pieces = iter(lambda: answer.read(65536), b"") if stated else iter([body])
                for piece in _spoiled(self.front, pieces, start, faults):
                    one.sent += len(piece)
                    self.wfile.write(piece)
                    due = began + one.sent / (self.front.throttle or float("inf"))
                    time.sleep(max(0.0, due - time.monotonic()))
        finally:
            upstream.close()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _faults(self, path: str, start: int, stop: int) -> list[Fault]:
        with self.front._lock:
            here = [one for one in self.front.faults if one.times > 0 and one.path in path]
            met = [one for one in here if one.kind == "refuse" or start <= one.at < stop]
            for fault in met:
                fault.times -= 1
        return met


def _spoiled(
    front: CountingProxy, pieces: Iterator[bytes], offset: int, faults: list[Fault]
) -> Iterator[bytes]:
    for piece in pieces:
        for fault in (f for f in faults if f.kind != "refuse" and 0 <= f.at - offset < len(piece)):
            at = fault.at - offset
            if fault.kind == "flip":
                piece = piece[:at] + bytes([piece[at] ^ 0x40]) + piece[at + 1 :]
                continue
            yield piece[:at]
            if fault.kind == "cut":
                raise ConnectionAbortedError
            front._stalled.release()
            front._go.wait()
            piece, offset = piece[at:], fault.at
        yield piece
        offset += len(piece)
