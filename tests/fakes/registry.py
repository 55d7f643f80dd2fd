"""A registry in the process, whose every answer can be scripted; served by MockTransport or through a socket."""

import base64
import hashlib
import json
import math
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from urllib.parse import parse_qs, quote

import h11
import httpx
import trio

from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor
from fsmount.registry.credential import Credential
from fsmount.registry.credentials import Credentials

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
#: What an upload's address carries, to be given back with the digest behind it.
UPLOAD_QUERY = "_state=a%2Bb%2Fc%3D%3D&more=1"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked; headers by lower-case name, parameters of the query as lists."""

    method: str
    host: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes = b""
    #: The query byte for byte.
    raw_query: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """What is answered. The body is sent in pieces, breaks off after cut_after bytes, or falls silent.

    length is what Content-Length says, if that is not the truth; None leaves it out.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_after: int | None = None
    stall_after: int | None = None
    length: int | None = -1
    #: The size of the pieces, and how long each is waited for.
    piece: int = 1000
    pause_seconds: float = 0.0
    #: How long the answer itself is waited for.
    delay_seconds: float = 0.0
    #: Behind the body come spaces without end.
    endless: bool = False

    def with_headers(self, **headers: str) -> "Reply":
        return replace(self, headers={**self.headers, **{k.replace("_", "-"): v for k, v in headers.items()}})


Handler = Callable[[Request], Reply]
#: What a script may hold for one request: an answer, or a change of the usual one.
Step = Reply | Callable[[Reply], Reply]


def cut(after: int) -> Step:
    """The connection breaks after so many bytes of the body."""
    return lambda reply: replace(reply, cut_after=after)


def stall(after: int) -> Step:
    """Nothing more comes after so many bytes of the body."""
    return lambda reply: replace(reply, stall_after=after)


def drip(seconds: float) -> Step:
    """A byte comes every so many seconds."""
    return lambda reply: replace(reply, piece=1, pause_seconds=seconds)


def endless(reply: Reply) -> Reply:
    """The body begins as it should, and has no end and no announced length."""
    return replace(reply, endless=True, length=None)


def silent(reply: Reply) -> Reply:
    """No answer comes at all."""
    return replace(reply, delay_seconds=math.inf)


def unchanged(reply: Reply) -> Reply:
    """A step that only waits for its turn to pass."""
    return reply


@dataclass(slots=True)
class FakeRegistry:
    """Blobs, manifests and tags of any repository; what a script says comes before what is there."""

    host: str = "registry.example"
    requests: list[Request] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    #: Everything but the token server asks for this: a value of WWW-Authenticate, and who may pass.
    challenge: str | None = None
    admit: Callable[[str | None], bool] = lambda authorization: authorization is not None
    #: Whether it knows the API of referrers, whether that filters by type, and how many a page has.
    keeps_referrers: bool = False
    filters_referrers: bool = True
    referrers_page: int = 1000
    #: Whether a manifest of a type that is not accepted is not found.
    is_strict: bool = False
    #: What stands before the path of an upload; a location may be relative or not, and is opaque.
    uploads: str = ""
    _script: list[tuple[str, re.Pattern[str], Step]] = field(default_factory=list)

    def then(self, method: str, path: str, *steps: Step) -> None:
        """The next requests of that method whose path matches somewhere get these answers, one each."""
        self._script.extend((method, re.compile(path), step) for step in steps)

    def put_blob(self, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return digest

    def put_manifest(self, tag: str | None, data: bytes, media_type: str = OCI_MANIFEST) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.manifests[digest] = (media_type, data)
        if tag is not None:
            self.tags[tag] = digest
        return digest

    def put_image(self, tag: str, *layers: bytes) -> str:
        """An image whose layers are any bytes; returns the manifest's digest."""
        gzip = "application/vnd.oci.image.layer.v1.tar+gzip"
        parts = [(gzip, layer) for layer in layers]
        config: dict[str, object] = {"os": "linux", "architecture": "amd64"}
        config["rootfs"] = {"type": "layers", "diff_ids": [self.put_blob(layer) for layer in layers]}
        config_type = "application/vnd.oci.image.config.v1+json"
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self._described(config_type, json.dumps(config).encode()),
            "layers": [self._described(*part) for part in parts],
        }
        return self.put_manifest(tag, json.dumps(manifest).encode())

    def seen(self, method: str, path: str = "") -> list[Request]:
        """The requests so far of that method whose path matches somewhere."""
        return [one for one in self.requests if one.method == method and re.search(path, one.path)]

    def __call__(self, request: Request) -> Reply:
        self.requests.append(request)
        for number, (method, path, step) in enumerate(self._script):
            if method == request.method and path.search(request.path):
                del self._script[number]
                return step if isinstance(step, Reply) else step(self._usual(request))
        return self._usual(request)

    def _described(self, media_type: str, data: bytes) -> dict[str, object]:
        return {"mediaType": media_type, "digest": self.put_blob(data), "size": len(data)}

    def _usual(self, request: Request) -> Reply:
        if self.challenge is not None and not self.admit(request.headers.get("authorization")):
            return error(401, "UNAUTHORIZED").with_headers(WWW_Authenticate=self.challenge)
        if request.path == "/v2/":
            return Reply()
        if reply := self._push(request) or self._referrers(request):
            return reply
        match = re.fullmatch(r"/v2/(.+)/(manifests|blobs|tags)/([^/]+)", request.path)
        if match is None:
            return Reply(404, {"Content-Type": "text/plain"}, b"404 page not found\n")
        kind, name = match[2], match[3]
        if kind == "tags":
            return Reply(body=json.dumps({"name": match[1], "tags": list(self.tags)}).encode())
        if kind == "blobs":
            return self._blob(name, request)
        reply = self._manifest(name)
        accepted = request.headers.get("accept", "")
        # As docker-registry 2.8 has it.
        refused = self.is_strict and reply.headers.get("Content-Type", "") not in accepted
        return error(404, "MANIFEST_UNKNOWN", "accept header does not support it") if refused else reply

    def _push(self, request: Request) -> Reply | None:
        """What is answered to POST and PUT."""
        if request.method == "POST" and re.fullmatch("/v2/(.+)/blobs/uploads/", request.path):
            return Reply(
                202, {"Location": f"{self.uploads}{request.path}{len(self.requests)}?{UPLOAD_QUERY}"}
            )
        if request.method != "PUT":
            return None
        digest = f"sha256:{hashlib.sha256(request.body).hexdigest()}"
        if re.fullmatch("/v2/(.+)/blobs/uploads/([0-9]+)", request.path):
            if request.query != parse_qs(f"{UPLOAD_QUERY}&digest={digest}"):
                return error(400, "BLOB_UPLOAD_INVALID")
            self.put_blob(request.body)
            return Reply(201)
        match = re.fullmatch("/v2/(.+)/manifests/([^/]+)", request.path)
        if match is None:
            return None
        if ":" in match[2] and match[2] != digest:
            return error(400, "DIGEST_INVALID")
        content = json.loads(request.body)
        named = [content["config"], *content["layers"]] if "config" in content else []
        if any(one["digest"] not in self.blobs for one in named):
            return error(400, "MANIFEST_BLOB_UNKNOWN")
        tag = None if ":" in match[2] else match[2]
        self.put_manifest(tag, request.body, request.headers["content-type"])
        subject = content.get("subject")
        told = self.keeps_referrers and subject
        return Reply(201, {"OCI-Subject": subject["digest"]} if told else {})

    def _referrers(self, request: Request) -> Reply | None:
        match = re.fullmatch("/v2/(.+)/referrers/([^/]+)", request.path)
        if match is None or not self.keeps_referrers:
            return None
        found: list[dict[str, object]] = []
        for digest, (media_type, data) in self.manifests.items():
            content = json.loads(data)
            if content.get("subject", {}).get("digest") == match[2]:
                entry = {"mediaType": media_type, "digest": digest, "size": len(data)}
                found.append(entry | {"artifactType": content["artifactType"]})
        wanted = request.query.get("artifactType")
        headers = {"Content-Type": OCI_INDEX}
        if wanted and self.filters_referrers:
            found = [entry for entry in found if entry["artifactType"] in wanted]
            headers["OCI-Filters-Applied"] = "artifactType"
        start = int(request.query.get("from", ["0"])[0])
        if len(found) > (stop := start + self.referrers_page):
            kept = f"artifactType={quote(wanted[0], safe='')}&" if wanted else ""
            headers["Link"] = f'<{request.path}?{kept}from={stop}>; rel="next"'
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found[start:stop]}
        return Reply(200, headers, json.dumps(index).encode())

    def _manifest(self, name: str) -> Reply:
        digest = self.tags.get(name, name)
        if digest not in self.manifests:
            return error(404, "MANIFEST_UNKNOWN")
        media_type, data = self.manifests[digest]
        return Reply(200, {"Content-Type": media_type, "Docker-Content-Digest": digest}, data)

    def _blob(self, digest: str, request: Request) -> Reply:
        data = self.blobs.get(digest)
        if data is None:
            return error(404, "BLOB_UNKNOWN")
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if match is None:
            return Reply(200, {}, data)
        start, last = int(match[1]), min(int(match[2]), len(data) - 1)
        if start > last:
            return Reply(416, {}, b"no such range\n")
        return Reply(206, {"Content-Range": f"bytes {start}-{last}/{len(data)}"}, data[start : last + 1])


def error(status: int, code: str, message: str = "as scripted") -> Reply:
    """An error in the form of the distribution specification."""
    return Reply(status, {}, json.dumps({"errors": [{"code": code, "message": message}]}).encode())


def descriptor_of(data: bytes) -> Descriptor:
    """A true descriptor of data."""
    return Descriptor(media_type="application/x", digest=Digest.of(data), size=len(data), annotations={})


@dataclass(slots=True)
class TokenServer:
    """Gives out token-1, token-2, … to those who may have one."""

    admit: Callable[[Request], bool] = lambda request: True
    #: Put into every answer beside the token.
    extra: Mapping[str, object] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    valid: set[str] = field(default_factory=set)

    def __call__(self, request: Request) -> Reply:
        self.requests.append(request)
        if not self.admit(request):
            return error(401, "UNAUTHORIZED")
        token = f"token-{len(self.requests)}"
        self.valid.add(f"Bearer {token}")
        return Reply(body=json.dumps({"token": token, **self.extra}).encode())


class Fixed(Credentials):
    """Has one for everybody, or none, and looks for none: while a thread does, an autojump clock runs on."""

    def __init__(self, credential: Credential | None = None) -> None:
        self._credential = credential

    async def find(self, domain: str, repository: str, *, fresh: bool = False) -> Credential | None:
        await trio.lowlevel.checkpoint()
        return self._credential


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


# -------------------- through httpx.MockTransport


class Network:
    """Hosts, each with a handler, behind one MockTransport; `open_bodies` counts the streams not closed yet."""

    def __init__(self, hosts: Mapping[str, Handler]) -> None:
        self._hosts = hosts
        self.open_bodies = 0
        self.transport = httpx.MockTransport(self._answer)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        host = request.url.netloc.decode()
        if host not in self._hosts:
            raise httpx.ConnectError("", request=request)
        reply = self._hosts[host](
            Request(
                method=request.method,
                host=host,
                path=request.url.path,
                query=parse_qs(request.url.query.decode()),
                headers=dict(request.headers),
                body=request.content,
                raw_query=request.url.query.decode(),
            )
        )
        if reply.delay_seconds:
            await trio.sleep(reply.delay_seconds)
        headers = [*reply.headers.items(), *_length_header(reply)]
        self.open_bodies += 1
        empty = request.method == "HEAD"
        return httpx.Response(reply.status, headers=headers, stream=_Stream(self, reply, empty))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, network: Network, reply: Reply, empty: bool) -> None:
        self._network = network
        self._reply = reply
        self._empty = empty
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._empty:
            return
        for piece in _pieces(self._reply):
            await trio.sleep(self._reply.pause_seconds)
            if self._closed:
                raise httpx.ReadError("closed")
            yield piece
        if _stalls(self._reply):
            await trio.sleep_forever()
        if _breaks(self._reply):
            raise httpx.RemoteProtocolError("peer closed connection without sending complete message body")

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):  # as httpcore does
            await trio.lowlevel.checkpoint()
        self._network.open_bodies -= not self._closed
        self._closed = True


_SPACES = b" " * 65536


def _pieces(reply: Reply) -> Iterator[bytes]:
    ends = [end for end in (reply.cut_after, reply.stall_after, len(reply.body)) if end is not None]
    body = reply.body[: min(ends)]
    for at in range(0, len(body), reply.piece):
        yield body[at : at + reply.piece]
    while reply.endless:
        yield _SPACES


def _stalls(reply: Reply) -> bool:
    return reply.stall_after is not None and reply.stall_after < len(reply.body)


def _breaks(reply: Reply) -> bool:
    return reply.cut_after is not None and reply.cut_after < len(reply.body)


def _length_header(reply: Reply) -> list[tuple[str, str]]:
    length = len(reply.body) if reply.length == -1 else reply.length
    return [] if length is None else [("Content-Length", str(length))]


# -------------------- through a socket


@asynccontextmanager
async def served(handler: Handler, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Serve HTTP/1.1 on a free loopback port, as long as the block lasts; yields `127.0.0.1:PORT`."""

    async def serve_connection(stream: trio.SocketStream) -> None:
        wrapped = trio.SSLStream(stream, tls, server_side=True, https_compatible=True) if tls else stream
        await _serve_connection(handler, wrapped)

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, serve_connection, 0, host="127.0.0.1")
        listeners = await nursery.start(serve)
        port = listeners[0].socket.getsockname()[1]
        yield f"127.0.0.1:{port}"
        nursery.cancel_scope.cancel()


async def _serve_connection(handler: Handler, stream: trio.abc.Stream) -> None:
    connection = h11.Connection(h11.SERVER)
    try:
        while request := await _receive(connection, stream):
            reply = handler(request)
            await trio.sleep(reply.delay_seconds)
            headers = [*reply.headers.items(), *_length_header(reply)]
            await stream.send_all(connection.send(h11.Response(status_code=reply.status, headers=headers)))
            if request.method != "HEAD":
                for piece in _pieces(reply):
                    await trio.sleep(reply.pause_seconds)
                    await stream.send_all(connection.send(h11.Data(data=piece)))
                if _stalls(reply):
                    await trio.sleep_forever()
                if _breaks(reply):
                    return
            await stream.send_all(connection.send(h11.EndOfMessage()))
            connection.start_next_cycle()
    except h11.RemoteProtocolError:
        # A TLS greeting among them: what every server says to it, and how clients notice.
        with suppress(trio.BrokenResourceError):
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    except trio.BrokenResourceError:
        return
    finally:
        await trio.aclose_forcefully(stream)


async def _receive(connection: h11.Connection, stream: trio.abc.Stream) -> Request | None:
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(65536)))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            path, _, query = head.target.decode().partition("?")
            headers = {name.decode(): value.decode() for name, value in head.headers}
            host = headers.get("host", "")
            return Request(head.method.decode(), host, path, parse_qs(query), headers, bytes(body), query)
        else:
            return None
