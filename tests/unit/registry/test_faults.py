"""What can go wrong × what is asked for: the error, the number of requests, the time, and what stays behind."""

import gzip
import json
import math
import socket
import ssl
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio
import trustme
from trio.testing import MockClock

from fsmount.errors import (
    AccessDenied,
    Corrupt,
    DeadlineExpired,
    FsmountError,
    Invalid,
    NotFound,
    RateLimited,
    Refused,
    Unreachable,
)
from fsmount.oci.digest import Digest
from fsmount.oci.reference import Reference
from fsmount.registry.credential import Password
from fsmount.registry.credentials import Credentials
from fsmount.registry.hosts import Hosts
from fsmount.registry.open import Sources
from fsmount.registry.retry import Retry
from fsmount.registry.source import Source
from tests.fakes.registry import (
    FakeRegistry,
    Fixed,
    Handler,
    Network,
    Reply,
    Request,
    Step,
    TokenServer,
    basic,
    cut,
    descriptor_of,
    drip,
    endless,
    error,
    served,
    silent,
    stall,
)

HOST, AUTH = "registry.example", "auth.example"
BEARER = f'Bearer realm="https://{AUTH}/token",service="s"'
DATA = bytes(range(250)) * 8
START = 100
PASSWORD = "pa55word"
SECRETS = (PASSWORD, basic("me", PASSWORD).split()[1], "Bearer token-", "s3cret")

Operation = Callable[[Source, Digest], Awaitable[object]]


async def read(source: Source, start: int = 0) -> bytes:
    async with source.blob(descriptor_of(DATA), start=start) as pieces:
        return b"".join([piece async for piece in pieces])


#: What is asked for, and the path that it has below the repository.
OPERATIONS: dict[str, tuple[str, Operation]] = {
    "tags": ("/tags/", lambda source, digest: source.tags()),
    "resolve": ("/manifests/", lambda source, digest: source.resolve("v1")),
    "manifest": ("/manifests/", lambda source, digest: source.manifest(digest)),
    "blob": ("/blobs/", lambda source, digest: read(source)),
    "range": ("/blobs/", lambda source, digest: read(source, START)),
    #: Which whoever asks for something needs first.
    "token": ("", lambda source, digest: source.resolve("v1")),
}


class World:
    """A registry that wants a token, and the server that gives it to a user with a password."""

    def __init__(self) -> None:
        self.registry = FakeRegistry(host=HOST, challenge=BEARER)
        self.tokens = TokenServer(extra={"expires_in": 86400})
        self.registry.admit = lambda authorization: authorization in self.tokens.valid
        self.digest = Digest.parse(self.registry.put_image("v1", DATA))
        self.credentials: Credentials = Fixed(Password("me", PASSWORD))
        self.hosts: dict[str, Handler] = {HOST: self.registry, AUTH: self.tokens}
        #: How many requests met the fault.
        self.faulty = 0

    def spoil(self, operation: str, step: Step, times: float = math.inf) -> None:
        """The next requests of the operation get what step makes of their answers."""
        host = AUTH if operation == "token" else HOST
        path, handler = OPERATIONS[operation][0], self.hosts[host]

        def spoiled(request: Request) -> Reply:
            reply = handler(request)
            if path not in request.path or self.faulty >= times:
                return reply
            self.faulty += 1
            return step if isinstance(step, Reply) else step(reply)

        self.hosts[host] = spoiled

    @asynccontextmanager
    async def source(self) -> AsyncIterator[Source]:
        """When it is left, nothing is open and nobody works any more."""
        tasks = trio.lowlevel.current_statistics().tasks_living
        network = Network(self.hosts)
        async with Sources(transport=network.transport, credentials=self.credentials) as sources:
            yield sources.open(Reference(HOST, "team/web"))
            assert network.open_bodies == 0
            (server, *_) = sources._servers.values()
            assert server._places.borrowed_tokens == 0
        assert trio.lowlevel.current_statistics().tasks_living == tasks

    async def prime(self, source: Source, operation: str) -> None:
        """The token is there, so that only the operation itself is spoiled."""
        if operation != "token":
            with pytest.raises(NotFound):
                await source.resolve("primer")
            self.registry.requests.clear()


@pytest.fixture
def world() -> World:
    return World()


def secrets_in(error: BaseException, log: str) -> list[str]:
    """Those that somebody gets to see."""
    shown = "".join((str(error), repr(error), log, *traceback.format_exception(error)))
    return [secret for secret in SECRETS if secret in shown]


@dataclass(frozen=True, slots=True)
class Outcome:
    """An error of exactly that kind, or none; after so many requests, and in so many seconds at most."""

    kind: type[FsmountError] | None
    requests: int
    seconds: float = 0.0


#: Two pauses between three tries, with their jitter.
PAUSES = (0.5 + 1.0) * 1.25
#: What a server may take for an answer, for a piece of it, and for a body that is too slow.
ANSWER, PIECE, BODY = 40.0, 30.0, 60.0

NAMES = ("tags", "resolve", "manifest")
BLOBS = ("blob", "range")
DOCUMENTS = ("tags", "manifest", "token")
ALL = tuple(OPERATIONS)


def same(operations: tuple[str, ...], *outcome: type[FsmountError] | float | None) -> Mapping[str, Outcome]:
    return {operation: Outcome(*outcome) for operation in operations}  # type: ignore[arg-type]


def compressed(reply: Reply) -> Reply:
    return replace(reply, body=gzip.compress(reply.body)).with_headers(Content_Encoding="gzip")


def reversed_(reply: Reply) -> Reply:
    return replace(reply, body=reply.body[::-1])


def longer(reply: Reply) -> Reply:
    return replace(reply, body=reply.body + b" " * 17 * 1024 * 1024)


def too_short(reply: Reply) -> Reply:
    """A range may come in parts."""
    start, _, _ = reply.headers["Content-Range"].removeprefix("bytes ").partition("-")
    content_range = f"bytes {start}-{int(start) + len(reply.body[:200]) - 1}/{len(DATA)}"
    return replace(reply, headers={"Content-Range": content_range}, body=reply.body[:200])


def redirect(location: str) -> Reply:
    return Reply(307, {"Location": location}, b"moved")


def away(location: str) -> tuple[Step, Mapping[str, Outcome]]:
    """Where nobody may be sent. A token server may send nobody anywhere."""
    return redirect(location), same((*NAMES, *BLOBS), Refused, 1) | same(("token",), Unreachable, 1)


THRICE = same(ALL, Unreachable, 3, PAUSES)
LATE = same(ALL, RateLimited, 3, PAUSES)
DENIED = same(ALL, AccessDenied, 1) | same(("resolve",), AccessDenied, 2)
HTML = {"Content-Type": "text/html"}
AGAIN = 2000 // 50

FAULTS: dict[str, tuple[Step, Mapping[str, Outcome]]] = {
    "500": (Reply(500), THRICE),
    "502 with HTML": (Reply(502, HTML, b"<html><h1>Bad Gateway</h1>s3cret</html>"), THRICE),
    "503": (Reply(503), THRICE),
    "429": (Reply(429), LATE),
    "429, soon": (Reply(429, {"Retry-After": "20"}), same(ALL, RateLimited, 3, 40 + PAUSES)),
    "429, in a long time": (Reply(429, {"Retry-After": "3600"}), same(ALL, RateLimited, 1)),
    "401 in a circle": (
        Reply(401, {"WWW-Authenticate": BEARER}),
        same(ALL, AccessDenied, 2) | same(("token",), AccessDenied, 1),
    ),
    "401 without a way in": (
        Reply(401),
        # The front door names one, and what it leads to is refused in turn.
        same(ALL, AccessDenied, 2) | same(("token",), AccessDenied, 1),
    ),
    "403": (error(403, "DENIED"), DENIED),
    "404": (
        error(404, "NAME_UNKNOWN"),
        same(ALL, NotFound, 1) | same(("tags",), NotFound, 2) | same(("token",), Unreachable, 1),
    ),
    "silence": (silent, same(ALL, DeadlineExpired, 3, 3 * ANSWER + PAUSES)),
    "a body that does not begin": (
        cut(0),
        same((*DOCUMENTS, *BLOBS), Unreachable, 3, PAUSES) | same(("resolve",), None, 1),
    ),
    "a body that breaks off": (
        cut(50),
        same(("manifest",), Unreachable, 3, PAUSES)
        | {"blob": Outcome(None, AGAIN, AGAIN), "range": Outcome(None, AGAIN - 2, AGAIN)},
    ),
    "a body that falls silent": (
        stall(10),
        same((*DOCUMENTS, *BLOBS), DeadlineExpired, 3, 3 * PIECE + PAUSES),
    ),
    "a body that drips": (drip(20), same((*DOCUMENTS, *BLOBS), DeadlineExpired, 3, 3 * BODY + PAUSES)),
    "compression": (
        compressed,
        same(("tags",), Invalid, 1)
        | same(("resolve",), None, 1)
        | same(("manifest", *BLOBS), Corrupt, 1)
        | same(("token",), Unreachable, 1),
    ),
    "another content": (
        reversed_,
        same(("tags",), Invalid, 1) | same(("manifest",), Corrupt, 1) | same(("token",), Unreachable, 1),
    ),
    "a body far too long": (longer, same((*DOCUMENTS, *BLOBS), Corrupt, 1)),
    "a body without end": (endless, same((*DOCUMENTS, *BLOBS), Corrupt, 1)),
    "a redirect in a circle": (
        redirect("?again"),
        same((*NAMES, *BLOBS), Unreachable, 6) | same(("token",), Unreachable, 1),
    ),
    "a redirect to nobody": (
        redirect("https://nobody.example/?sig=s3cret"),
        same((*NAMES, *BLOBS), Unreachable, 3, PAUSES) | same(("token",), Unreachable, 1),
    ),
    "a redirect to http": away("http://store.example/?sig=s3cret"),
    "a redirect to this machine": away("https://127.0.0.1/?sig=s3cret"),
    "a redirect to this machine by name": away("https://me.localhost./?sig=s3cret"),
    "a redirect to this machine, disguised": away("https://0x7f000001/?sig=s3cret"),
    "a redirect to this machine's link": away("https://169.254.169.254/?sig=s3cret"),
    "a redirect to this machine's link, IPv6": away("https://[fe80::1]/?sig=s3cret"),
    "a redirect with a login": away("https://me:s3cret@store.example/"),
    "a redirect to a file": away("file:///etc/passwd"),
    "the whole for a range": (Reply(200, {}, DATA), same(BLOBS, None, 1)),
    "a part for a range": (too_short, {"range": Outcome(None, math.ceil((len(DATA) - START) / 200))}),
    **{
        f"Content-Range: {text}": (
            Reply(206, {"Content-Range": text}, DATA[START:]),
            same(("range",), Corrupt, 1),
        )
        for text in (
            f"bytes 0-{len(DATA) - START - 1}/{len(DATA)}",
            f"bytes {START}-{len(DATA) - 1}/{len(DATA) + 1}",
            f"bytes {START}-{len(DATA) - 2}/{len(DATA)}",
            f"bytes {START}-{len(DATA)}/*",
            "",
        )
    },
}


@pytest.mark.parametrize(
    ("fault", "operation"),
    [(fault, operation) for fault, (_, table) in FAULTS.items() for operation in table],
)
async def test_a_fault_that_stays_is_told_in_time(
    world: World, autojump_clock: MockClock, fault: str, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    step, table = FAULTS[fault]
    outcome = table[operation]
    result: object = None
    caught: FsmountError | None = None
    async with world.source() as source:
        await world.prime(source, operation)
        world.spoil(operation, step)
        before = trio.current_time()
        try:
            result = await OPERATIONS[operation][1](source, world.digest)
        except FsmountError as error:
            caught = error
        took = trio.current_time() - before
    assert type(caught) is (outcome.kind or type(None))
    assert world.faulty == outcome.requests
    assert took <= outcome.seconds
    if caught is not None:
        assert caught.errno == type(caught).errno
        assert any(host in str(caught) for host in (HOST, AUTH, "nobody.example"))
        assert "<" not in str(caught)
        assert secrets_in(caught, caplog.text) == []
    elif operation in BLOBS:
        assert result == DATA[START if operation == "range" else 0 :]


PASSING: dict[str, Step] = {
    **{str(status): Reply(status) for status in (408, 429, 499, 500, 502, 503, 504, 522)},
    "429, soon": Reply(429, {"Retry-After": "7"}),
    "silence": silent,
    "401": Reply(401, {"WWW-Authenticate": BEARER}),
    "a redirect to nobody": redirect("https://nobody.example/"),
}
#: Of bodies, which a HEAD has not.
PASSING_BODIES: dict[str, Step] = {
    "a body that does not begin": cut(0),
    "a body that breaks off": cut(9),
    "a body that falls silent": stall(9),
    "a body that drips": drip(20),
}


@pytest.mark.parametrize(
    ("fault", "operation"),
    [(fault, operation) for fault in PASSING for operation in ALL]
    + [(fault, operation) for fault in PASSING_BODIES for operation in (*DOCUMENTS, *BLOBS)],
)
async def test_a_fault_that_passes_is_not_noticed(
    world: World, autojump_clock: MockClock, fault: str, operation: str
) -> None:
    async with world.source() as source:
        await world.prime(source, operation)
        world.spoil(operation, (PASSING | PASSING_BODIES)[fault], times=1)
        before = trio.current_time()
        if operation == "token" and fault in ("401", "a redirect to nobody"):
            with pytest.raises((AccessDenied, Unreachable)):
                await source.resolve("v1")
            return
        await OPERATIONS[operation][1](source, world.digest)
        took = trio.current_time() - before
    assert world.faulty == 1
    assert took >= (7 if fault == "429, soon" else 0)
    assert took <= BODY + PAUSES


@pytest.mark.parametrize("code", [socket.EAI_NONAME, socket.EAI_AGAIN, socket.EAI_FAIL])
@pytest.mark.parametrize("operation", [*NAMES, *BLOBS])
async def test_a_name_that_is_not_known(
    operation: str, code: int, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    names = Names(code)
    trio.socket.set_custom_hostname_resolver(names)
    async with Sources(credentials=Fixed()) as sources:
        with pytest.raises(Unreachable, match="registry") as caught:
            await OPERATIONS[operation][1](sources.open(Reference(HOST, "team/web")), Digest.of(b""))
    assert names.asked == [HOST] * 3
    assert "DNS" in str(caught.value.remedy)
    assert trio.current_time() <= PAUSES


async def test_names_that_nobody_answers_for_are_given_up(autojump_clock: MockClock) -> None:
    names = Names(None)
    trio.socket.set_custom_hostname_resolver(names)
    async with Sources(credentials=Fixed()) as sources:
        with pytest.raises(DeadlineExpired):
            await sources.open(Reference(HOST, "team/web")).resolve("v1")
    assert len(names.asked) == 3
    assert trio.current_time() <= 3 * 10 + PAUSES


class Names(trio.abc.HostnameResolver):
    """Answers for names as if there were a network: with an error, or never."""

    def __init__(self, code: int | None) -> None:
        self._code = code
        self.asked: list[str] = []

    async def getaddrinfo(  # type: ignore[override]
        self, host: bytes | None, port: object, *rest: object, **more: object
    ) -> list[object]:
        await trio.lowlevel.checkpoint()
        self.asked.append((host or b"").decode())
        if self._code is None:
            await trio.sleep_forever()
        raise socket.gaierror(self._code, "as scripted")

    async def getnameinfo(self, sockaddr: object, flags: int) -> tuple[str, str]:
        raise NotImplementedError


# -------------------- through sockets: certificates and refusals

QUICKLY = Retry(first_pause_seconds=0.0)


@asynccontextmanager
async def connected(root: Path, credentials: Credentials | None = None) -> AsyncIterator[Sources]:
    """Over real sockets, without waiting between tries; root stands before /etc."""
    async with Sources(
        hosts=Hosts(root=root, environ={}, home=root / "home"),
        credentials=credentials or Fixed(Password("me", PASSWORD)),
        retry=QUICKLY,
    ) as sources:
        yield sources


def certified(authority: trustme.CA, name: str, not_after: datetime | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    before = datetime(2020, 1, 1, tzinfo=UTC) if not_after else None
    authority.issue_cert(name, not_before=before, not_after=not_after).configure_cert(context)
    return context


#: The name, the end and the authority of a certificate, and what is said of it.
CERTIFICATES: dict[str, tuple[str, datetime | None, bool, str]] = {
    "another host": ("other.example", None, True, "not valid for '127.0.0.1'"),
    "expired": ("127.0.0.1", datetime(2020, 2, 1, tzinfo=UTC), True, "expired"),
    "unknown authority": ("127.0.0.1", None, False, "issuer"),
}


@pytest.mark.parametrize("certificate", CERTIFICATES)
@pytest.mark.parametrize("operation", ALL)
async def test_a_certificate_that_is_not_to_be_trusted(
    tmp_path: Path, operation: str, certificate: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    name, not_after, known, said = CERTIFICATES[certificate]
    authority, context = trustme.CA(), None
    context = certified(authority, name, not_after)
    world = World()
    is_token = operation == "token"
    async with served(world.tokens if is_token else world.registry, tls=context) as host:
        world.registry.challenge = f'Bearer realm="https://{host}/token"'
        async with served(world.registry) as plain, connected(tmp_path) as sources:
            asked = plain if is_token else host
            folder = tmp_path / "etc/docker/certs.d" / asked
            folder.mkdir(parents=True)
            if known:
                authority.cert_pem.write_to_path(str(folder / "ca.crt"))
            with pytest.raises(Unreachable, match="certificate is not trusted") as caught:
                await OPERATIONS[operation][1](sources.open(Reference(asked, "team/web")), world.digest)
    assert type(caught.value) is Unreachable
    assert said in str(caught.value)
    assert caught.value.remedy
    assert len(world.registry.requests) == (1 if is_token else 0)
    assert world.tokens.requests == []
    assert secrets_in(caught.value, caplog.text) == []


@pytest.mark.parametrize("operation", ALL)
async def test_a_server_that_takes_no_connections(tmp_path: Path, operation: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
    world = World()
    world.registry.challenge = f'Bearer realm="http://{nobody}/token"'
    async with served(world.registry) as host, connected(tmp_path) as sources:
        asked = host if operation == "token" else nobody
        with pytest.raises(Unreachable, match=rf"(?i){nobody}.*refused") as caught:
            await OPERATIONS[operation][1](sources.open(Reference(asked, "team/web")), world.digest)
    assert type(caught.value) is Unreachable


@pytest.mark.parametrize("operation", [*DOCUMENTS, *BLOBS])
@pytest.mark.parametrize(("step", "works"), [(cut(0), False), (cut(15), True)])
async def test_a_connection_that_ends_in_a_body_is_closed_and_made_again(
    tmp_path: Path, operation: str, step: Step, works: bool
) -> None:
    world = World()
    world.registry.challenge = None
    async with trio.open_nursery() as nursery, served(world.tokens) as auth:
        if operation == "token":
            world.registry.challenge = f'Bearer realm="http://{auth}/token"'
        world.hosts = {HOST: world.registry, AUTH: world.tokens}
        world.spoil(operation, step, times=1 if works else math.inf)
        async with (
            served(lambda request: world.hosts[HOST](request)) as host,
            served(lambda request: world.hosts[AUTH](request)) as spoiled,
            connected(tmp_path) as sources,
        ):
            if operation == "token":
                world.registry.challenge = f'Bearer realm="http://{spoiled}/token"'
            source = sources.open(Reference(host, "team/web"))
            if works:
                await OPERATIONS[operation][1](source, world.digest)
                assert world.faulty == 1
            else:
                with pytest.raises(Unreachable):
                    await OPERATIONS[operation][1](source, world.digest)
                assert world.faulty == 3
            for pool in sources._transports._pools.values():
                assert isinstance(pool, httpx.AsyncHTTPTransport)
                assert all(connection.is_idle() for connection in pool._pool.connections)
        nursery.cancel_scope.cancel()


# -------------------- slow, but not too slow


@pytest.mark.parametrize(("pause_seconds", "kind"), [(0.9, None), (2.0, DeadlineExpired)])
async def test_a_body_may_take_its_time_if_it_is_not_slower_than_a_kib_a_second(
    world: World, autojump_clock: MockClock, pause_seconds: float, kind: type[FsmountError] | None
) -> None:
    data = b"x" * 200_000
    world.registry.put_blob(data)
    world.spoil("blob", lambda reply: replace(reply, pause_seconds=pause_seconds))
    async with world.source() as source:

        async def read() -> bytes:
            async with source.blob(descriptor_of(data)) as pieces:
                return b"".join([piece async for piece in pieces])

        if kind is None:
            assert await read() == data
            assert trio.current_time() > 2 * BODY
            assert len(world.registry.seen("GET", "/blobs/")) == 2  # one without a token
        else:
            with pytest.raises(kind):
                await read()
            # Three times as long as it takes to notice: 60 s, and one for each KiB.
            assert trio.current_time() <= 3 * 120 + PAUSES


async def test_a_body_that_stops_often_goes_on_if_much_comes_in_between(
    world: World, autojump_clock: MockClock
) -> None:
    data = b"x" * 500_000
    world.registry.put_blob(data)
    world.spoil("blob", stall(50_000))
    async with world.source() as source, source.blob(descriptor_of(data)) as pieces:
        assert b"".join([piece async for piece in pieces]) == data
    # The 401 of the beginning is one of them.
    assert world.faulty == 10 + 1


# -------------------- tokens and passwords


@pytest.mark.parametrize("operation", [*NAMES, *BLOBS])
@pytest.mark.parametrize("scheme", ["Basic", "Bearer"])
async def test_a_password_that_has_expired_is_read_again_from_its_file(
    tmp_path: Path, operation: str, scheme: str
) -> None:
    world, path = World(), tmp_path / "auth.json"
    world.credentials = Credentials(environ={"REGISTRY_AUTH_FILE": str(path)})

    def log_in(password: str) -> None:
        path.write_text(json.dumps({"auths": {HOST: {"username": "me", "password": password}}}))

    log_in("old")
    if scheme == "Basic":
        world.registry.challenge = 'Basic realm="r"'
        world.registry.admit = lambda authorization: authorization is not None
    async with world.source() as source:
        await world.prime(source, operation)
        log_in("new")
        told = error(403, "DENIED", "Your authorization token has expired. Reauthenticate and try again.")
        world.spoil(operation, told, times=1)
        await OPERATIONS[operation][1](source, world.digest)
    sent = world.registry.requests[-1].headers["authorization"]
    if scheme == "Basic":
        assert sent == basic("me", "new")
    else:
        assert world.tokens.requests[-1].headers["authorization"] == basic("me", "new")
    assert len(world.registry.requests) == 2


@pytest.mark.parametrize(
    "realm",
    [
        f"http://{AUTH}/token",
        "https://127.0.0.1/token",
        "https://localhost/token",
        "https://169.254.169.254/latest/token",
        "https://[::1]/token",
        f"https://me:s3cret@{AUTH}/token",
        f"ftp://{AUTH}/token",
    ],
)
@pytest.mark.parametrize("operation", [*NAMES, *BLOBS])
async def test_a_token_server_where_none_may_be(
    world: World, autojump_clock: MockClock, realm: str, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.registry.challenge = f'Bearer realm="{realm}"'
    async with world.source() as source:
        for _ in range(2):
            with pytest.raises(Refused, match="token server") as caught:
                await OPERATIONS[operation][1](source, world.digest)
    assert world.tokens.requests == []
    assert secrets_in(caught.value, caplog.text) == []
    assert trio.current_time() == 0


async def test_a_token_server_on_another_host_is_where_tokens_come_from(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.source() as source:
        await source.resolve("v1")
    assert [request.host for request in world.tokens.requests] == [AUTH]


@pytest.mark.parametrize("realm", ["https://old.example/token", "http://old.example/token"])
async def test_a_registry_that_has_got_another_token_server_is_asked_where_it_is(
    world: World, autojump_clock: MockClock, realm: str
) -> None:
    world.registry.challenge = f'Bearer realm="{realm}"'
    async with world.source() as source:
        for _ in range(2):
            with pytest.raises((Unreachable, Refused)):
                await source.resolve("v1")
        world.registry.challenge = BEARER
        await source.resolve("v1")


async def test_a_token_server_that_is_back_is_used(world: World, autojump_clock: MockClock) -> None:
    world.spoil("token", Reply(503), times=3)
    async with world.source() as source:
        with pytest.raises(Unreachable):
            await source.resolve("v1")
        await source.resolve("v1")
    assert len(world.tokens.requests) == 4


@pytest.mark.parametrize("extra", [{}, {"expires_in": None}, {"expires_in": 0}])
async def test_a_token_that_does_not_say_how_long_it_is_good_is_for_a_minute(
    world: World, autojump_clock: MockClock, extra: Mapping[str, object]
) -> None:
    world.tokens.extra = extra
    async with world.source() as source:
        for seconds, tokens in ((0, 1), (45, 1), (10, 2)):
            await trio.sleep(seconds)
            await source.resolve("v1")
            assert len(world.tokens.requests) == tokens


async def test_a_token_that_expires_while_a_body_comes_does_not_end_it(
    world: World, autojump_clock: MockClock
) -> None:
    world.tokens.extra = {"expires_in": 60}
    async with world.source() as source:
        await source.resolve("v1")
        world.spoil("blob", lambda reply: replace(reply, piece=500, pause_seconds=14), times=1)
        assert await read(source) == DATA
        assert 50 < trio.current_time() < 60
        assert len(world.tokens.requests) == 1
        await source.resolve("v1")
    assert len(world.tokens.requests) == 2
    assert world.registry.requests[-1].headers["authorization"] == "Bearer token-2"


async def test_a_body_that_breaks_off_when_its_token_has_expired_goes_on_with_a_new_one(
    world: World, autojump_clock: MockClock
) -> None:
    world.tokens.extra = {"expires_in": 60}
    async with world.source() as source:
        await source.resolve("v1")
        slowly = partial(replace, piece=500, pause_seconds=18, cut_after=1500)
        world.spoil("blob", lambda reply: slowly(reply), times=1)
        assert await read(source) == DATA
    sent = [request.headers.get("authorization") for request in world.registry.requests]
    assert sent == [None, "Bearer token-1", "Bearer token-1", "Bearer token-2"]


async def test_who_leaves_in_the_middle_of_anything_leaves_nothing(
    world: World, autojump_clock: MockClock
) -> None:
    """At every step on the way of each operation."""
    for operation in ALL:
        for checkpoints in range(1, 25, 2):
            async with world.source() as source, trio.open_nursery() as nursery:
                nursery.start_soon(OPERATIONS[operation][1], source, world.digest)
                for _ in range(checkpoints):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
