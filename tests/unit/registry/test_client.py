"""What a repository asks of a registry, and what it makes of the answers."""

import json
from dataclasses import replace

import httpx
import pytest
import trio
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
    UsageError,
)
from fsmount.oci.digest import Digest
from fsmount.oci.reference import Reference
from fsmount.registry.hosts import Hosts
from fsmount.registry.open import Sources
from fsmount.registry.source import Source
from tests.fakes.registry import (
    OCI_MANIFEST,
    FakeRegistry,
    Handler,
    Network,
    Reply,
    cut,
    descriptor_of,
    error,
    stall,
)

HOST = "registry.example"


def source(sources: Sources, name: str = f"{HOST}/team/web") -> Source:
    return sources.open(Reference.parse(name))


def alone(fake: Handler, **others: Handler) -> Network:
    return Network({HOST: fake} | {host.replace("_", "."): handler for host, handler in others.items()})


@pytest.fixture
def fake() -> FakeRegistry:
    return FakeRegistry(host=HOST)


# -------------------- tags


async def test_tags_are_sorted_and_each_is_there_once(fake: FakeRegistry) -> None:
    fake.then("GET", "tags/list", Reply(body=b'{"tags": ["v2", "v1", "v2"]}'))
    async with Sources(transport=alone(fake).transport) as sources:
        assert await source(sources).tags() == ["v1", "v2"]


@pytest.mark.parametrize("body", [b'{"tags": null}', b'{"tags": []}', b'{"name": "team/web"}'])
async def test_a_repository_may_have_no_tags(fake: FakeRegistry, body: bytes) -> None:
    fake.then("GET", "tags/list", Reply(body=body))
    async with Sources(transport=alone(fake).transport) as sources:
        assert await source(sources).tags() == []


@pytest.mark.parametrize(
    "url", ["/v2/team/web/tags/list?last=a", "?last=a", f"https://{HOST}/v2/more?last=a"]
)
async def test_further_pages_are_followed_relative_or_not(fake: FakeRegistry, url: str) -> None:
    fake.then("GET", "", Reply(headers={"Link": f'<{url}>; rel="next"'}, body=b'{"tags": ["a"]}'))
    fake.then("GET", "", Reply(body=b'{"tags": ["b"]}'))
    async with Sources(transport=alone(fake).transport) as sources:
        assert await source(sources).tags() == ["a", "b"]
    assert fake.requests[1].query["last"] == ["a"]


async def test_pages_that_lead_in_a_circle_end(fake: FakeRegistry) -> None:
    page = Reply(headers={"Link": "</v2/team/web/tags/list>; rel=next"}, body=b'{"tags": ["a"]}')
    fake.then("GET", "tags/list", *[page] * 50)
    async with Sources(transport=alone(fake).transport) as sources:
        assert await source(sources).tags() == ["a"]
    assert len(fake.requests) == 2


async def test_a_page_on_another_server_is_refused_and_sees_no_credentials(fake: FakeRegistry) -> None:
    fake.then("GET", "tags/list", Reply(headers={"Link": '<https://evil.example/>; rel="next"'}, body=b"{}"))
    fake.then(
        "GET",
        "tags/list",
        Reply(headers={"Link": '<https://evil.example/>; rel="next"'}, body=b'{"tags":["a"]}'),
    )
    evil = FakeRegistry()
    async with Sources(transport=alone(fake, evil_example=evil).transport) as sources:
        assert await source(sources).tags() == []
        with pytest.raises(Refused, match=r"evil\.example"):
            await source(sources).tags()
    assert evil.requests == []


async def test_a_full_page_without_link_is_continued_after_its_last_tag(fake: FakeRegistry) -> None:
    names = [f"t{number:04}" for number in range(1001)]
    fake.then("GET", "tags/list", Reply(body=json.dumps({"tags": names[:1000]}).encode()))
    fake.then("GET", "tags/list", Reply(body=json.dumps({"tags": names[1000:]}).encode()))
    async with Sources(transport=alone(fake).transport) as sources:
        assert await source(sources).tags() == names
    assert fake.requests[1].query["last"] == ["t0999"]


async def test_what_cannot_be_a_tag_is_left_out(fake: FakeRegistry) -> None:
    fake.then("GET", "tags/list", Reply(body=b'{"tags": ["../x", "ok", "", "a/b", "a\\u001b"]}'))
    async with Sources(transport=alone(fake).transport) as sources:
        assert await source(sources).tags() == ["ok"]


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"tags": "a"}', b'{"tags": [1]}'])
async def test_a_list_of_tags_that_is_none_is_invalid(fake: FakeRegistry, body: bytes) -> None:
    fake.then("GET", "tags/list", Reply(body=body))
    async with Sources(transport=alone(fake).transport) as sources:
        with pytest.raises(Invalid, match="the list of tags"):
            await source(sources).tags()


# -------------------- resolve and manifest


async def test_a_tag_is_resolved_by_head_alone(fake: FakeRegistry) -> None:
    digest = fake.put_image("v1")
    async with Sources(transport=alone(fake).transport) as sources:
        found = await source(sources).resolve("v1")
    assert (str(found.digest), found.media_type) == (digest, OCI_MANIFEST)
    assert found.size == len(fake.manifests[digest][1])
    assert [request.method for request in fake.requests] == ["HEAD"]
    assert "application/vnd.oci.image.index.v1+json" in fake.requests[0].headers["accept"]


async def test_the_default_is_latest(fake: FakeRegistry) -> None:
    digest = fake.put_image("latest")
    async with Sources(transport=alone(fake).transport) as sources:
        assert str((await source(sources).resolve(None)).digest) == digest


@pytest.mark.parametrize(
    "answer",
    [
        Reply(405),
        Reply(403),
        Reply(400),
        Reply(200, {"Docker-Content-Digest": "sha256:" + "0" * 64}, length=None),
        Reply(200, {"Docker-Content-Digest": "sha256:bad"}, b"x"),
        Reply(200, {}, b"x"),
    ],
)
async def test_where_head_does_not_tell_get_does(fake: FakeRegistry, answer: Reply) -> None:
    digest = fake.put_image("v1")
    fake.then("HEAD", "manifests", answer)
    async with Sources(transport=alone(fake).transport) as sources:
        found = await source(sources).resolve("v1")
    assert (str(found.digest), found.size) == (digest, len(fake.manifests[digest][1]))


async def test_a_digest_stands_for_itself(fake: FakeRegistry) -> None:
    digest = fake.put_image("v1")
    fake.then("HEAD", "manifests", Reply(200, {"Docker-Content-Digest": "sha256:" + "0" * 64}, b"x"))
    async with Sources(transport=alone(fake).transport) as sources:
        assert str((await source(sources).resolve(digest)).digest) == digest


async def test_what_does_not_exist_is_not_found_by_name(fake: FakeRegistry) -> None:
    async with Sources(transport=alone(fake).transport) as sources:
        with pytest.raises(NotFound, match=r"registry\.example/team/web:gone"):
            await source(sources).resolve("gone")
        with pytest.raises(NotFound, match="MANIFEST_UNKNOWN"):
            await source(sources).manifest(Digest.of(b"gone"))


@pytest.mark.parametrize("version", ["../x", "a/b", "", "x" * 200, "sha256:12", "a b"])
async def test_what_is_neither_tag_nor_digest_is_not_asked_for(fake: FakeRegistry, version: str) -> None:
    async with Sources(transport=alone(fake).transport) as sources:
        if version:
            with pytest.raises(UsageError):
                await source(sources).resolve(version)
    assert fake.requests == []


async def test_a_manifest_comes_verified_with_the_type_that_the_registry_says(fake: FakeRegistry) -> None:
    digest = fake.put_manifest(None, b"{}", "text/plain; charset=utf-8")
    async with Sources(transport=alone(fake).transport) as sources:
        assert await source(sources).manifest(Digest.parse(digest)) == (b"{}", "text/plain; charset=utf-8")


async def test_a_manifest_that_is_not_what_its_digest_names_is_corrupt(fake: FakeRegistry) -> None:
    fake.then("GET", "manifests", Reply(body=b"[]"))
    async with Sources(transport=alone(fake).transport) as sources:
        with pytest.raises(Corrupt, match="digest"):
            await source(sources).manifest(Digest.of(b"{}"))


async def test_a_manifest_without_end_is_not_read_to_it(fake: FakeRegistry) -> None:
    data = b" " * (4 * 1024 * 1024 + 1)
    digest = fake.put_manifest(None, data)
    network = alone(fake)
    async with Sources(transport=network.transport) as sources:
        with pytest.raises(Corrupt, match="more than"):
            await source(sources).manifest(Digest.parse(digest))
    assert network.open_bodies == 0


async def test_a_document_that_breaks_off_or_stalls_is_asked_for_again(
    fake: FakeRegistry, autojump_clock: MockClock
) -> None:
    digest = fake.put_image("v1")
    fake.then("GET", "manifests", cut(10), stall(10))
    network = alone(fake)
    async with Sources(transport=network.transport) as sources:
        await source(sources).manifest(Digest.parse(digest))
    assert network.open_bodies == 0


# -------------------- errors


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, "UNAUTHORIZED", AccessDenied),
        (403, "DENIED", AccessDenied),
        (404, "NAME_UNKNOWN", NotFound),
        (400, "MANIFEST_UNKNOWN", NotFound),
        (429, "TOOMANYREQUESTS", RateLimited),
        (500, "UNKNOWN", Unreachable),
        (503, "UNAVAILABLE", Unreachable),
        (418, "TEAPOT", Unreachable),
    ],
)
async def test_a_status_is_an_error_that_says_what_the_registry_said(
    fake: FakeRegistry, autojump_clock: MockClock, status: int, code: str, kind: type[FsmountError]
) -> None:
    fake.then("GET", "", *[error(status, code, "in \x1b[31mred")] * 3)
    async with Sources(transport=alone(fake).transport) as sources:
        with pytest.raises(kind) as caught:
            await source(sources).manifest(Digest.of(b"x"))
    assert type(caught.value) is kind
    assert code in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"{}", b'{"errors": 1}', b'{"errors": [1]}', b"\xff", b"x" * 99999]
)
async def test_an_error_needs_no_readable_body(fake: FakeRegistry, body: bytes) -> None:
    fake.then("GET", "", Reply(404, {}, body))
    network = alone(fake)
    async with Sources(transport=network.transport) as sources:
        with pytest.raises(NotFound):
            await source(sources).manifest(Digest.of(b"x"))
    assert network.open_bodies == 0


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_a_passing_failure_is_asked_again(
    fake: FakeRegistry, autojump_clock: MockClock, status: int
) -> None:
    fake.put_image("v1")
    fake.then("HEAD", "", Reply(status), Reply(status))
    network = alone(fake)
    async with Sources(transport=network.transport) as sources:
        await source(sources).resolve("v1")
    assert len(fake.requests) == 3
    assert network.open_bodies == 0


async def test_retry_after_is_honoured(fake: FakeRegistry, autojump_clock: MockClock) -> None:
    fake.put_image("v1")
    fake.then("HEAD", "", Reply(429, {"Retry-After": "37"}))
    async with Sources(transport=alone(fake).transport) as sources:
        before = trio.current_time()
        await source(sources).resolve("v1")
        assert trio.current_time() - before >= 37


async def test_a_server_that_cannot_be_reached_is_asked_three_times(autojump_clock: MockClock) -> None:
    async with Sources(transport=Network({}).transport) as sources:
        with pytest.raises(Unreachable, match=r"https://registry\.example/v2/team/web/manifests/v1"):
            await source(sources).resolve("v1")


async def test_a_silent_server_is_given_up_after_the_deadline(autojump_clock: MockClock) -> None:
    async def silent(request: httpx.Request) -> httpx.Response:
        await trio.sleep_forever()
        raise AssertionError

    async with Sources(transport=httpx.MockTransport(silent)) as sources:
        with pytest.raises(DeadlineExpired, match="silent"):
            await source(sources).resolve("v1")


async def test_a_registry_name_that_cannot_be_one_is_a_usage_error(fake: FakeRegistry) -> None:
    async with Sources(transport=alone(fake).transport) as sources:
        with pytest.raises(UsageError):
            source(sources, "999.1.1.1/a")


# -------------------- redirects


async def test_a_redirect_to_another_host_takes_along_the_range_and_nothing_else(fake: FakeRegistry) -> None:
    digest = fake.put_blob(b"0123456789")
    cdn = FakeRegistry(host="cdn.example", blobs=fake.blobs)
    away = Reply(307, {"Location": f"https://cdn.example/v2/x/blobs/{digest}?sig=a%2Bb"}, b"moved")
    fake.then("GET", "blobs", away)
    async with Sources(transport=alone(fake, cdn_example=cdn).transport) as sources:
        descriptor = descriptor_of(b"0123456789")
        async with source(sources).blob(descriptor, start=4) as pieces:
            assert b"".join([piece async for piece in pieces]) == b"456789"
    assert cdn.requests[0].query == {"sig": ["a+b"]}
    assert set(cdn.requests[0].headers) == {"host", "user-agent", "accept-encoding", "range"}


@pytest.mark.parametrize(
    "location",
    ["http://cdn.example/x", "https://127.0.0.1/x", "https://169.254.169.254/", "ftp://cdn.example/"],
)
async def test_a_redirect_to_plain_http_or_into_this_machine_is_refused(
    fake: FakeRegistry, location: str
) -> None:
    fake.then("GET", "", Reply(302, {"Location": location}))
    network = alone(fake)
    async with Sources(transport=network.transport) as sources:
        with pytest.raises(Refused, match="redirect"):
            await source(sources).manifest(Digest.of(b"x"))
    assert network.open_bodies == 0


async def test_redirects_end_after_five(fake: FakeRegistry, autojump_clock: MockClock) -> None:
    fake.then("GET", "", *[Reply(307, {"Location": "/v2/again"})] * 50)
    network = alone(fake)
    async with Sources(transport=network.transport) as sources:
        with pytest.raises(Unreachable, match="more than 5"):
            await source(sources).manifest(Digest.of(b"x"))
    assert network.open_bodies == 0


# -------------------- small blobs, plain http


async def test_a_small_blob_comes_verified(fake: FakeRegistry) -> None:
    fake.put_blob(b"{}")
    async with Sources(transport=alone(fake).transport) as sources:
        assert await source(sources).small_blob(descriptor_of(b"{}")) == b"{}"
        fake.then("GET", "blobs", Reply(body=b"[]"))
        with pytest.raises(Corrupt):
            await source(sources).small_blob(descriptor_of(b"{}"))


async def test_a_small_blob_that_its_descriptor_carries_is_not_fetched(fake: FakeRegistry) -> None:
    async with Sources(transport=alone(fake).transport) as sources:
        assert await source(sources).small_blob(replace(descriptor_of(b"{}"), data=b"{}")) == b"{}"
    assert fake.requests == []


async def test_a_large_blob_is_no_small_one(fake: FakeRegistry) -> None:
    async with Sources(transport=alone(fake).transport) as sources:
        with pytest.raises(Invalid, match="too large"):
            await source(sources).small_blob(replace(descriptor_of(b""), size=2**30))


def schemes(seen: list[str]) -> httpx.MockTransport:
    """Every host; notes the URL up to its path, and answers 404."""

    async def answer(request: httpx.Request) -> httpx.Response:
        seen.append(f"{request.url.scheme}://{request.url.netloc.decode()}")
        await trio.lowlevel.checkpoint()
        return httpx.Response(404)

    return httpx.MockTransport(answer)


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("registry.example/a", "https://registry.example"),
        ("registry.example:80/a", "https://registry.example:80"),
        ("plain.example:5000/a", "http://plain.example:5000"),
        ("plain.example/a", "https://plain.example"),
        ("127.0.0.1:5000/a", "https://127.0.0.1:5000"),
        ("docker.io/library/web", "https://registry-1.docker.io"),
    ],
)
async def test_plain_http_is_only_for_registries_that_are_named_for_it(name: str, url: str) -> None:
    seen: list[str] = []
    async with Sources(
        transport=schemes(seen), hosts=Hosts(plain_http=frozenset({"plain.example:5000"}))
    ) as sources:
        with pytest.raises(NotFound):
            await source(sources, name).resolve("v1")
    assert seen == [url]


async def test_every_request_names_fsmount_and_wants_no_compression(fake: FakeRegistry) -> None:
    fake.put_image("v1")
    async with Sources(transport=alone(fake).transport) as sources:
        await source(sources).resolve("v1")
    headers = fake.requests[0].headers
    assert headers["accept-encoding"] == "identity"
    assert headers["user-agent"].startswith("fsmount/")
