"""The front before the registry: it asks for tokens, and makes answers late, slow, short, wrong, or none at all."""

import http.client
import json
import random
import secrets
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, Self, TypeAlias

_OWN = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "content-length",
    "server",
    "date",
    "www-authenticate",
}
_PIECE = 65536

#: late: an answer begins after `amount` seconds. slow: its body comes with `amount` bytes a second. stall: it never
#: begins. cut: its body ends after `amount` bytes, as if by a proxy that gave up. reset: the same, with an RST. flip:
#: one byte of a body that has a digest is another. status: it is that status, `amount`. deny: no token is given, and
#: none is good.
Kind: TypeAlias = Literal["late", "slow", "stall", "cut", "reset", "flip", "status", "deny"]


@dataclass(frozen=True, slots=True)
class Toxic:
    """What is wrong with a share of all answers."""

    kind: Kind
    amount: float = 0.0
    share: float = 1.0


class Front:
    """Forwards requests on a loopback port that it keeps to `upstream` ("127.0.0.1:PORT"), a thread each.

    Whoever asks needs a token, which anybody gets. Ownership: a context manager.
    """

    def __init__(self, upstream: str, seed: str, *, log: Path | None = None) -> None:
        """log: where a line is written for each request: when, for what, with which token, and what it met."""
        self.upstream = upstream
        #: Requests that have met a fault, by its kind.
        self.met: Counter[str] = Counter()
        self.served = 0
        self.toxic: Toxic | None = None
        self.lock = threading.Lock()
        self.clients: set[socket.socket] = set()
        self.tokens: set[str] = set()
        #: Set when what stalls shall go on.
        self.over = threading.Event()
        self._log = None if log is None else log.open("a", buffering=1)
        self._dice = random.Random(f"{seed}/front")
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None
        self._address = ("127.0.0.1", 0)

    @property
    def host(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.set(None)
        self.close()
        if self._log is not None:
            self._log.close()

    def open(self) -> None:
        """Listens, on the same port as before if there was one."""
        handler = type("Handler", (_Handler,), {"front": self})
        self._server = ThreadingHTTPServer(self._address, handler)
        self._server.daemon_threads = True
        self._address = ("127.0.0.1", self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listens no more, and breaks all connections: who comes now is refused."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server = self._thread = None
        self.break_connections()

    def set(self, toxic: Toxic | None) -> None:
        """Lets one fault take the place of another; what stalled breaks off."""
        with self.lock:
            self.toxic = toxic
            self.over.set()
            self.over = threading.Event()
            if toxic is not None and toxic.kind == "deny":
                self.tokens.clear()

    def expire(self) -> None:
        """No token that was given is good any more."""
        self.note("all tokens expire")
        with self.lock:
            self.met["expired"] += len(self.tokens)
            self.tokens.clear()

    def break_connections(self) -> None:
        with self.lock:
            for client in self.clients:
                with suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)

    def meets(self, method: str, path: str) -> Toxic | None:
        """What is wrong with the answer to this request."""
        with self.lock:
            toxic = self.toxic
            if toxic is None or self._dice.random() >= toxic.share:
                return None
            # Only what a digest names is noticed when it is wrong.
            if toxic.kind == "flip" and (
                method != "GET" or ("/blobs/" not in path and "/sha256:" not in path)
            ):
                return None
            self.met[toxic.kind if toxic.kind != "status" else f"{toxic.amount:.0f}"] += 1
            return toxic

    def note(self, *words: str | int | None) -> None:
        """One line of the log."""
        if self._log is not None and not self._log.closed:
            self._log.write(" ".join([f"{time.monotonic():.3f}", *map(str, words)]) + "\n")

    def pick(self, stop: int) -> int:
        """A random number below stop."""
        with self.lock:
            return self._dice.randrange(stop)


class _Handler(BaseHTTPRequestHandler):
    """One client connection; each of its requests has a connection of its own to the upstream."""

    front: Front
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with self.front.lock:
            self.front.clients.add(self.connection)
        try:
            with suppress(OSError, http.client.HTTPException):
                super().handle()
        finally:
            with self.front.lock:
                self.front.clients.discard(self.connection)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        over = self.front.over
        toxic = self.front.meets(self.command, path)
        kind = toxic.kind if toxic else None
        amount = toxic.amount if toxic else 0.0
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.front.note(self.command, path, self.headers.get("Range"), f"token={token[:6]}", f"met={kind}")
        if kind == "late":
            over.wait(amount)
        if kind == "stall":
            over.wait()
            raise ConnectionAbortedError
        if kind == "reset" and not amount:
            self._reset()
        if kind == "status":
            self._say(int(amount), b"{}")
        elif kind == "deny":
            self._refuse()
        elif path == "/token":
            token = secrets.token_hex(16)
            with self.front.lock:
                self.front.tokens.add(token)
            self.front.note("gave", token[:6])
            self._say(200, json.dumps({"token": token, "expires_in": 3600}).encode())
        elif token not in self.front.tokens:
            self.front.note("refused", token[:6])
            self._refuse()
        else:
            self._forward(toxic, over)

    do_HEAD = do_GET

    def _refuse(self) -> None:
        realm = f'Bearer realm="http://{self.front.host}/token",service="soak",scope="repository:team:pull"'
        self._say(401, b"{}", ("WWW-Authenticate", realm))

    def _say(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise ConnectionAbortedError

    def _forward(self, toxic: Toxic | None, over: threading.Event) -> None:
        upstream = http.client.HTTPConnection(self.front.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "authorization"):
                    upstream.putheader(name, value)
            upstream.endheaders()
            answer = upstream.getresponse()
            stated = answer.headers.get("Content-Length")
            whole = b"" if stated else answer.read()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in _OWN:
                    self.send_header(name, value)
            size = int(stated) if stated else len(whole)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.front.served += 1
            if self.command != "HEAD":
                pieces = iter(lambda: answer.read(_PIECE), b"") if stated else iter([whole])
                for piece in self._spoiled(pieces, size, toxic, over):
                    self.wfile.write(piece)
        finally:
            upstream.close()

    def _spoiled(
        self, pieces: Iterator[bytes], size: int, toxic: Toxic | None, over: threading.Event
    ) -> Iterator[bytes]:
        kind = toxic.kind if toxic else None
        amount = toxic.amount if toxic else 0.0
        wrong = self.front.pick(max(size, 1)) if kind == "flip" else -1
        sent, began = 0, time.monotonic()
        for piece in pieces:
            if kind in ("cut", "reset") and sent + len(piece) > amount:
                yield piece[: int(amount) - sent]
                if kind == "reset":
                    self._reset()
                raise ConnectionAbortedError
            if 0 <= wrong - sent < len(piece):
                at = wrong - sent
                piece = piece[:at] + bytes([piece[at] ^ 0x10]) + piece[at + 1 :]
            step = max(1, int(amount / 10)) if kind == "slow" else len(piece)
            for at in range(0, len(piece), step or 1):
                yield piece[at : at + step]
                sent += len(piece[at : at + step])
                if kind == "slow":
                    # To the end of the fault at that speed, then as fast as it goes.
                    over.wait(max(0.0, began + sent / amount - time.monotonic()))
