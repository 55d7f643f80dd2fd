"""Basic, Bearer, tokens and what is never told to whom."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import trio
from trio.testing import MockClock

from fsmount.errors import AccessDenied, FsmountError, Refused, Unreachable
from fsmount.oci.digest import Digest
from fsmount.oci.reference import Reference
from fsmount.registry.credentials import Credentials
from fsmount.registry.open import Sources
from fsmount.registry.source import Source
from tests.fakes.registry import FakeRegistry, Handler, Network, Reply, Request, TokenServer, basic, error

HOST = "registry.example"
AUTH = "auth.example"
BEARER = f'Bearer realm="https://{AUTH}/token?tenant=1",service="registry service",scope="repository:team/web:pull"'
PASSWORD = {"auth": base64.b64encode(b"me:pa:ss").decode()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


@pytest.fixture
def fake() -> FakeRegistry:
    fake = FakeRegistry(host=HOST, challenge=BEARER)
    fake.put_image("v1")
    return fake


@pytest.fixture
def server(fake: FakeRegistry) -> TokenServer:
    server = TokenServer()
    fake.admit = lambda authorization: authorization in server.valid
    return server


def write(path: Path, entry: object, key: str = HOST) -> None:
    path.write_text(json.dumps({"auths": {key: entry}}))


class Client:
    """Sources over handlers by host, with a file of credentials."""

    def __init__(self, path: Path, **hosts: Handler) -> None:
        self.network = Network({host.replace("_", "."): handler for host, handler in hosts.items()})
        credentials = Credentials(environ={"REGISTRY_AUTH_FILE": str(path)})
        self.sources = Sources(transport=self.network.transport, credentials=credentials)

    def source(self, repository: str = "team/web") -> Source:
        return self.sources.open(Reference(HOST, repository))


def client(path: Path, fake: Handler, server: Handler) -> Client:
    return Client(path, registry_example=fake, auth_example=server)


def nobody(request: Request) -> Reply:
    raise AssertionError("no token server was to be asked")


# -------------------- Basic


async def test_basic_is_sent_once_asked_for_and_then_with_every_request(
    fake: FakeRegistry, path: Path
) -> None:
    fake.challenge, fake.admit = 'Basic realm="r"', lambda sent: sent == basic("me", "pa:ss")
    write(path, PASSWORD)
    source = client(path, fake, nobody).source()
    await source.resolve("v1")
    await source.resolve("v1")
    sent = [request.headers.get("authorization") for request in fake.requests]
    assert sent == [None, basic("me", "pa:ss"), basic("me", "pa:ss")]


async def test_a_refused_password_is_not_sent_again_for_a_while(
    fake: FakeRegistry, path: Path, autojump_clock: MockClock
) -> None:
    fake.challenge, fake.admit = 'Basic realm="r"', lambda sent: False
    write(path, PASSWORD)
    source = client(path, fake, nobody).source()
    for _ in range(3):
        with pytest.raises(AccessDenied) as caught:
            await source.resolve("v1")
        assert "pa:ss" not in str(caught.value)
    assert len([r for r in fake.requests if "authorization" in r.headers]) == 1
    await trio.sleep(31)
    with pytest.raises(AccessDenied):
        await source.resolve("v1")
    assert len([r for r in fake.requests if "authorization" in r.headers]) == 2


async def test_a_password_that_replaces_a_refused_one_is_used_within_seconds(
    fake: FakeRegistry, path: Path, autojump_clock: MockClock
) -> None:
    fake.challenge, fake.admit = 'Basic realm="r"', lambda sent: sent == basic("me", "new")
    write(path, PASSWORD)
    source = client(path, fake, nobody).source()
    with pytest.raises(AccessDenied):
        await source.resolve("v1")
    write(path, {"username": "me", "password": "new"})
    await trio.sleep(6)
    await source.resolve("v1")


@pytest.mark.parametrize("status", [401, 403])
async def test_a_password_that_expires_is_read_again(fake: FakeRegistry, path: Path, status: int) -> None:
    fake.challenge = 'Basic realm="r"'
    write(path, PASSWORD)
    source = client(path, fake, nobody).source()
    await source.resolve("v1")
    write(path, {"username": "me", "password": "new"})
    fake.then("HEAD", "", error(status, "DENIED", "authorization token has expired"))
    await source.resolve("v1")
    assert fake.requests[-1].headers["authorization"] == basic("me", "new")


async def test_without_credentials_basic_is_not_answered(fake: FakeRegistry, path: Path) -> None:
    fake.challenge = 'Basic realm="r"'
    with pytest.raises(AccessDenied, match="fsmount login") as caught:
        await client(path, fake, nobody).source().resolve("v1")
    assert caught.value.remedy


# -------------------- Bearer


async def test_an_anonymous_token_is_asked_for_with_service_and_scope(
    fake: FakeRegistry, server: TokenServer, path: Path
) -> None:
    await client(path, fake, server).source().resolve("v1")
    asked = server.requests[0]
    assert (asked.method, asked.path) == ("GET", "/token")
    assert asked.query == {
        "tenant": ["1"],
        "service": ["registry service"],
        "scope": ["repository:team/web:pull"],
    }
    assert "authorization" not in asked.headers


async def test_a_password_is_exchanged_by_basic_and_only_the_token_goes_to_the_registry(
    fake: FakeRegistry, server: TokenServer, path: Path
) -> None:
    write(path, PASSWORD)
    await client(path, fake, server).source().resolve("v1")
    assert server.requests[0].headers["authorization"] == basic("me", "pa:ss")
    assert server.requests[0].query["account"] == ["me"]
    assert [r.headers.get("authorization") for r in fake.requests] == [None, "Bearer token-1"]


async def test_a_password_that_the_token_server_refuses_is_looked_up_again_and_a_new_one_is_tried(
    fake: FakeRegistry, server: TokenServer, path: Path, mock_clock: MockClock
) -> None:
    write(path, PASSWORD)
    both = client(path, fake, server)
    await both.source("team/web").resolve("v1")
    server.admit = lambda request: request.headers["authorization"] == basic("me", "new")
    write(path, {"username": "me", "password": "new"})
    await both.source("team/api").resolve("v1")  # the first look-up is too recent to notice
    assert [request.headers["authorization"] for request in server.requests[1:]] == [
        basic("me", "pa:ss"),
        basic("me", "new"),
    ]


async def test_a_refused_password_that_is_still_the_same_is_sent_once(
    fake: FakeRegistry, server: TokenServer, path: Path, mock_clock: MockClock
) -> None:
    write(path, PASSWORD)
    both = client(path, fake, server)
    await both.source("team/web").resolve("v1")
    server.admit = lambda request: False
    for _ in range(2):
        with pytest.raises(AccessDenied):
            await both.source("team/api").resolve("v1")
    assert len(server.requests) == 2


async def test_an_identity_token_is_exchanged_by_post(
    fake: FakeRegistry, server: TokenServer, path: Path
) -> None:
    write(path, {"identitytoken": "refresh"})
    await client(path, fake, server).source().resolve("v1")
    asked = server.requests[0]
    assert (asked.method, asked.query) == ("POST", {"tenant": ["1"]})
    assert parse_qs(asked.body.decode()) == {
        "grant_type": ["refresh_token"],
        "client_id": ["fsmount"],
        "service": ["registry service"],
        "scope": ["repository:team/web:pull"],
        "refresh_token": ["refresh"],
    }


async def test_a_registry_token_is_used_as_it_is(fake: FakeRegistry, path: Path) -> None:
    write(path, {"registrytoken": "ready"})
    fake.admit = lambda sent: sent == "Bearer ready"
    await client(path, fake, nobody).source().resolve("v1")


async def test_a_token_is_used_until_shortly_before_it_expires(
    fake: FakeRegistry, server: TokenServer, path: Path, autojump_clock: MockClock
) -> None:
    server.extra = {"expires_in": 300}
    source = client(path, fake, server).source()
    await source.resolve("v1")
    await trio.sleep(280)
    await source.resolve("v1")
    assert len(server.requests) == 1
    await trio.sleep(15)
    await source.resolve("v1")
    assert len(server.requests) == 2
    assert len(fake.requests) == 4  # no second 401: the way to a token is known


@pytest.mark.parametrize("extra", [{}, {"expires_in": 1}, {"expires_in": "x"}, {"expires_in": -5}])
async def test_a_token_lives_for_at_least_a_minute(
    fake: FakeRegistry, server: TokenServer, path: Path, autojump_clock: MockClock, extra: Mapping[str, Any]
) -> None:
    server.extra = extra
    source = client(path, fake, server).source()
    await source.resolve("v1")
    await trio.sleep(45)
    await source.resolve("v1")
    assert len(server.requests) == 1


async def test_many_requests_at_once_share_one_token(
    fake: FakeRegistry, server: TokenServer, path: Path
) -> None:
    source = client(path, fake, server).source()
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(source.resolve, "v1")
    assert len(server.requests) == 1


async def test_when_the_one_who_fetches_a_token_is_cancelled_another_takes_over(
    fake: FakeRegistry, server: TokenServer, path: Path
) -> None:
    silent, asked = [Reply(body=b"{}", stall_after=0)], trio.Event()

    def token(request: Request) -> Reply:
        asked.set()
        return silent.pop() if silent else server(request)

    both = client(path, fake, token)
    first, waiter = trio.CancelScope(), trio.CancelScope()

    async def resolve(scope: trio.CancelScope) -> None:
        with scope:
            await both.source().resolve("v1")

    async def waiting(count: int) -> None:
        locks = next(iter(both.sources._servers.values()))._auth._locks
        while sum(lock.statistics().tasks_waiting for lock in locks.values()) != count:
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(resolve, first)
        await asked.wait()
        nursery.start_soon(resolve, waiter)
        nursery.start_soon(resolve, trio.CancelScope())
        await waiting(2)
        waiter.cancel()
        await waiting(1)
        first.cancel()
    assert first.cancelled_caught
    assert waiter.cancelled_caught
    assert fake.requests[-1].headers["authorization"] == "Bearer token-1"
    assert both.network.open_bodies == 0


async def test_a_token_that_breaks_off_or_stalls_is_asked_for_again(
    fake: FakeRegistry, server: TokenServer, path: Path, autojump_clock: MockClock
) -> None:
    broken = [Reply(body=b"{}", stall_after=0), Reply(body=b"{}", cut_after=1)]
    await client(path, fake, lambda r: broken.pop() if broken else server(r)).source().resolve("v1")


async def test_each_repository_has_a_token_of_its_own(
    fake: FakeRegistry, server: TokenServer, path: Path
) -> None:
    both = client(path, fake, server)
    await both.source("team/web").resolve("v1")
    await both.source("team/api").resolve("v1")
    assert [r.query["scope"] for r in server.requests] == [
        ["repository:team/web:pull"],
        ["repository:team/api:pull"],
    ]


@pytest.mark.parametrize(
    ("challenged", "asked"),
    [
        ("", ["repository:team/web:pull"]),
        ("read", ["repository:team/web:pull"]),
        ("repository:mapped/team/web:pull", ["repository:team/web:pull", "repository:mapped/team/web:pull"]),
        ("repository:team/web:pull registry:catalog:*", ["repository:team/web:pull", "registry:catalog:*"]),
    ],
)
async def test_our_own_scope_comes_first_and_the_challenged_one_is_added(
    fake: FakeRegistry, server: TokenServer, path: Path, challenged: str, asked: list[str]
) -> None:
    fake.challenge = BEARER.replace("repository:team/web:pull", challenged)
    await client(path, fake, server).source().resolve("v1")
    assert server.requests[0].query["scope"] == asked


async def test_a_token_that_the_registry_refuses_is_replaced_once(
    fake: FakeRegistry, server: TokenServer, path: Path
) -> None:
    source = client(path, fake, server).source()
    await source.resolve("v1")
    server.valid.clear()
    await source.resolve("v1")
    assert len(server.requests) == 2


async def test_a_token_that_expires_early_is_replaced_although_the_token_server_was_away_for_others(
    fake: FakeRegistry, server: TokenServer, path: Path, autojump_clock: MockClock
) -> None:
    def busy(request: Request) -> Reply:
        if request.query["scope"] == ["repository:team/api:pull"]:
            return error(503, "UNAVAILABLE")
        return server(request)

    both = client(path, fake, busy)
    web = both.source("team/web")
    await web.resolve("v1")
    with pytest.raises(Unreachable):
        await both.source("team/api").resolve("v1")
    # What it has is good until the registry says otherwise.
    await web.resolve("v1")
    assert len(server.requests) == 1
    server.valid.clear()
    await web.resolve("v1")
    assert len(server.requests) == 2


async def test_a_registry_is_asked_anew_for_its_token_server_when_that_was_away(
    fake: FakeRegistry, server: TokenServer, path: Path, autojump_clock: MockClock
) -> None:
    fake.challenge = BEARER.replace(AUTH, "gone.example")
    away = Client(
        path,
        registry_example=fake,
        auth_example=server,
        gone_example=lambda request: error(503, "UNAVAILABLE"),
    )
    with pytest.raises(Unreachable):
        await away.source().resolve("v1")
    fake.challenge = BEARER
    await away.source().resolve("v1")


async def test_a_second_refusal_is_final_for_a_while(
    fake: FakeRegistry, server: TokenServer, path: Path, autojump_clock: MockClock
) -> None:
    fake.admit = lambda sent: False
    source = client(path, fake, server).source()
    for _ in range(3):
        with pytest.raises(AccessDenied, match=r"registry\.example"):
            await source.resolve("v1")
    assert len(fake.requests) == 2
    await trio.sleep(31)
    with pytest.raises(AccessDenied):
        await source.resolve("v1")
    assert len(fake.requests) > 2


@pytest.mark.parametrize("status", [400, 401, 403])
async def test_a_refusal_by_the_token_server_is_no_access_and_quotes_nothing(
    fake: FakeRegistry, path: Path, status: int
) -> None:
    def echo(request: Request) -> Reply:
        return error(status, "DENIED", f"{request.headers} {request.body!r}")

    for entry in (PASSWORD, {"identitytoken": "refresh"}):
        write(path, entry)
        with pytest.raises(AccessDenied, match=r"https://auth\.example/token") as caught:
            await client(path, fake, echo).source().resolve("v1")
        assert not {PASSWORD["auth"], "pa:ss", "refresh", "tenant"} & set(str(caught.value).split())
        assert "refresh" not in str(caught.value)


async def test_a_busy_token_server_is_asked_again(
    fake: FakeRegistry, server: TokenServer, path: Path, autojump_clock: MockClock
) -> None:
    replies = [Reply(503), Reply(429, {"Retry-After": "5"})]
    await client(path, fake, lambda r: replies.pop(0) if replies else server(r)).source().resolve("v1")


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"token": 1}', b'{"token": ""}', b"[" * 60000])
async def test_an_answer_without_a_token_is_none(fake: FakeRegistry, path: Path, body: bytes) -> None:
    with pytest.raises(Unreachable, match="without a token"):
        await client(path, fake, lambda request: Reply(body=body)).source().resolve("v1")


async def test_a_token_that_would_break_a_header_is_refused_unseen(fake: FakeRegistry, path: Path) -> None:
    reply = Reply(body=json.dumps({"token": "secret\r\nX: y"}).encode())
    with pytest.raises(AccessDenied) as caught:
        await client(path, fake, lambda request: reply).source().resolve("v1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "realm",
    [
        "http://auth.example/token",
        "https://127.0.0.1/token",
        "https://169.254.169.254/token",
        "https://me:secret@auth.example/token",
        "ftp://auth.example/token",
    ],
)
async def test_a_realm_that_would_leak_credentials_is_refused(
    fake: FakeRegistry, server: TokenServer, path: Path, realm: str
) -> None:
    fake.challenge = f'Bearer realm="{realm}"'
    write(path, PASSWORD)
    with pytest.raises(Refused, match="token server"):
        await client(path, fake, server).source().resolve("v1")
    assert server.requests == []


async def test_a_realm_may_be_relative(fake: FakeRegistry, server: TokenServer, path: Path) -> None:
    fake.challenge = 'Bearer realm="/token"'

    def both(request: Request) -> Reply:
        return server(request) if request.path == "/token" else fake(request)

    await Client(path, registry_example=both).source().resolve("v1")


async def test_a_redirect_of_the_token_server_is_not_followed(fake: FakeRegistry, path: Path) -> None:
    write(path, PASSWORD)
    evil = FakeRegistry()
    away = Reply(307, {"Location": "https://evil.example/"})
    both = Client(path, registry_example=fake, auth_example=lambda request: away, evil_example=evil)
    with pytest.raises(FsmountError):
        await both.source().resolve("v1")
    assert evil.requests == []


async def test_a_401_without_a_challenge_is_explained_by_the_front_door(
    fake: FakeRegistry, server: TokenServer, path: Path
) -> None:
    fake.then("HEAD", "", error(401, "UNAUTHORIZED"))
    await client(path, fake, server).source().resolve("v1")
    assert fake.requests[1].path == "/v2/"


async def test_credentials_do_not_follow_a_redirect_not_even_back(
    fake: FakeRegistry, server: TokenServer, path: Path
) -> None:
    digest = fake.tags["v1"]
    source_path = f"/v2/team/web/manifests/{digest}"
    cdn = FakeRegistry()
    cdn.then("GET", "", Reply(302, {"Location": f"https://{HOST}{source_path}"}))
    both = Client(path, registry_example=fake, auth_example=server, cdn_example=cdn)
    await both.source().resolve("v1")
    fake.then("GET", "", Reply(302, {"Location": "https://cdn.example/x"}))
    with pytest.raises(AccessDenied):
        await both.source().manifest(Digest.parse(digest))
    assert [r.headers.get("authorization") for r in fake.requests[-2:]] == ["Bearer token-1", None]
    assert "authorization" not in cdn.requests[0].headers


async def test_credentials_follow_a_redirect_within_the_registry(
    fake: FakeRegistry, server: TokenServer, path: Path
) -> None:
    digest = fake.tags["v1"]
    source = client(path, fake, server).source()
    await source.resolve("v1")
    fake.then("GET", "", Reply(308, {"Location": f"/v2/team/web/manifests/{digest}"}))
    await source.manifest(Digest.parse(digest))
