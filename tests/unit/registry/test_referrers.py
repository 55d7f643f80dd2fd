"""What refers to a manifest, by the API or under a tag, and how that is pushed."""

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs

import pytest
import trio
from trio.testing import MockClock

from fsmount.errors import AccessDenied, Corrupt, FsmountError, Invalid, NotFound, Refused, Unreachable
from fsmount.oci.digest import Digest
from fsmount.oci.reference import Reference
from fsmount.registry.credentials import Credentials
from fsmount.registry.hosts import Hosts
from fsmount.registry.open import Sources
from fsmount.registry.referrers import Artifact, Referrers, fallback_tag
from fsmount.registry.wire import Limits
from tests.fakes.registry import (
    OCI_INDEX,
    OCI_MANIFEST,
    UPLOAD_QUERY,
    FakeRegistry,
    Handler,
    Network,
    Reply,
    Request,
    Step,
    TokenServer,
    cut,
    error,
    unchanged,
)

HOST = "registry.example"
SUBJECT = Digest.of(b"subject")
TAG = f"sha256-{SUBJECT.hex}"
INDEX_TYPE, SIGNATURE_TYPE = "application/vnd.example.index", "application/vnd.example.signature+json"
EMPTY = b"{}"


def artifact(
    payload: bytes = b"payload",
    artifact_type: str = INDEX_TYPE,
    annotations: Mapping[str, str] | None = None,
    subject: Digest = SUBJECT,
) -> Artifact:
    """One blob beside the empty configuration."""
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": artifact_type,
        "config": described(EMPTY, "application/vnd.oci.empty.v1+json"),
        "layers": [described(payload, artifact_type)],
        "subject": {"mediaType": OCI_MANIFEST, "digest": str(subject), "size": 7},
        "annotations": dict(annotations or {}),
    }
    data = json.dumps(manifest).encode()
    return Artifact(data, OCI_MANIFEST, artifact_type, annotations or {}, subject, [EMPTY, payload])


def described(data: bytes, media_type: str) -> dict[str, object]:
    return {"mediaType": media_type, "digest": str(Digest.of(data)), "size": len(data)}


def entry(one: Artifact) -> dict[str, object]:
    """What an index says of an artifact."""
    annotations = {"annotations": dict(one.annotations)} if one.annotations else {}
    return described(one.manifest, OCI_MANIFEST) | {"artifactType": one.artifact_type} | annotations


def index(*entries: object, **more: object) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries, **more}).encode()


class Client:
    """Sources over a fake registry, with a file of credentials that need not exist."""

    def __init__(self, fake: FakeRegistry, root: Path) -> None:
        self.fake = fake
        self.root = root
        self.hosts: dict[str, Handler] = {HOST: fake}
        self.limits = Limits()

    @asynccontextmanager
    async def sources(self) -> AsyncIterator[Sources]:
        network = Network(self.hosts)
        async with Sources(
            hosts=Hosts(root=self.root, environ={}, home=self.root / "home"),
            credentials=Credentials(environ={"REGISTRY_AUTH_FILE": str(self.root / "auth.json")}),
            limits=self.limits,
            transport=network.transport,
        ) as sources:
            yield sources
        assert network.open_bodies == 0

    async def listed(self, artifact_type: str | None = None) -> list[str]:
        """The digests of the referrers."""
        async with self.sources() as sources:
            found = await sources.open(Reference(HOST, "team/web")).referrers(SUBJECT, artifact_type)
        return [str(one.digest) for one in found]

    @asynccontextmanager
    async def referrers(self) -> AsyncIterator[Referrers]:
        async with self.sources() as sources:
            (remote,) = await sources.remotes(Reference(HOST, "team/web"))
            yield Referrers(remote, f"{HOST}/team/web")

    async def push(self, *artifacts: Artifact) -> None:
        async with self.referrers() as referrers:
            for one in artifacts:
                await referrers.push(one)

    @property
    def asked(self) -> list[str]:
        """Methods and what follows the repository's name, digests and numbers of uploads left out."""
        names = {str(Digest.of(EMPTY)): "empty", str(Digest.of(b"payload")): "payload", TAG: "tag"}
        names |= {str(artifact().digest): "artifact", str(SUBJECT): "subject"}
        asked = []
        for request in self.fake.requests:
            path = request.path.removeprefix("/v2/team/web/")
            for long, short in names.items():
                path = path.replace(long, short)
            asked.append(f"{request.method} {path}")
        return asked

    @property
    def tagged(self) -> list[dict[str, object]]:
        """The entries of the index under the tag."""
        media_type, data = self.fake.manifests[self.fake.tags[TAG]]
        assert media_type == OCI_INDEX
        return list(json.loads(data)["manifests"])


@pytest.fixture
def fake() -> FakeRegistry:
    return FakeRegistry(host=HOST)


@pytest.fixture
def client(fake: FakeRegistry, tmp_path: Path) -> Client:
    return Client(fake, tmp_path)


def keep(fake: FakeRegistry, *artifacts: Artifact) -> list[str]:
    return [fake.put_manifest(None, one.manifest) for one in artifacts]


THREE = [
    artifact(b"1"),
    artifact(b"2", SIGNATURE_TYPE),
    artifact(b"3", annotations={"org.example.level": "1"}),
]

# -------------------- listed by the API


async def test_referrers_come_from_the_api_with_what_it_says_of_them(
    client: Client, fake: FakeRegistry
) -> None:
    extra = described(b"x", OCI_MANIFEST) | {"artifactType": INDEX_TYPE, "annotations": {"a": "b"}}
    fake.then("GET", "referrers", Reply(200, {"Content-Type": f"{OCI_INDEX}; charset=utf-8"}, index(extra)))
    async with client.sources() as sources:
        (found,) = await sources.open(Reference(HOST, "team/web")).referrers(SUBJECT)
    assert (found.digest, found.size, found.media_type) == (Digest.of(b"x"), 1, OCI_MANIFEST)
    assert (found.artifact_type, found.annotations) == (INDEX_TYPE, {"a": "b"})
    (request,) = fake.requests
    assert (request.path, request.raw_query) == (f"/v2/team/web/referrers/{SUBJECT}", "")
    assert request.headers["accept"] == OCI_INDEX


async def test_no_referrers_are_no_error_and_the_tag_is_not_asked_then(
    client: Client, fake: FakeRegistry
) -> None:
    fake.keeps_referrers = True
    fake.put_manifest(TAG, index(entry(artifact())), OCI_INDEX)
    assert await client.listed() == []
    assert client.asked == ["GET referrers/subject"]


@pytest.mark.parametrize("filters", [True, False])
@pytest.mark.parametrize("page", [1, 2, 3])
async def test_further_pages_are_followed_and_types_are_chosen_here_where_the_registry_does_not(
    client: Client, fake: FakeRegistry, page: int, filters: bool
) -> None:
    fake.keeps_referrers, fake.referrers_page, fake.filters_referrers = True, page, filters
    first, second, third = keep(fake, *THREE)
    assert await client.listed() == [first, second, third]
    assert await client.listed(INDEX_TYPE) == [first, third]
    assert await client.listed(SIGNATURE_TYPE) == [second]
    assert await client.listed("application/vnd.other") == []
    assert {parse.get("artifactType", [""])[0] for parse in (r.query for r in fake.requests)} == {
        "",
        INDEX_TYPE,
        SIGNATURE_TYPE,
        "application/vnd.other",
    }


async def test_the_type_is_quoted(client: Client, fake: FakeRegistry) -> None:
    fake.keeps_referrers = True
    await client.listed("a/b+c&d=e")
    assert fake.requests[0].query == {"artifactType": ["a/b+c&d=e"]}


async def test_an_entry_on_two_pages_is_one(client: Client, fake: FakeRegistry) -> None:
    page = Reply(200, {"Content-Type": OCI_INDEX}, index(entry(THREE[0])))
    fake.then("GET", "referrers", page.with_headers(Link='<?more=1>; rel="next"'), page)
    assert await client.listed() == [str(THREE[0].digest)]


async def test_pages_without_end_are_not_followed_to_it(client: Client, fake: FakeRegistry) -> None:
    page = Reply(200, {"Content-Type": OCI_INDEX, "Link": '<?more=1>; rel="next"'}, index())
    fake.then("GET", "referrers", *[page] * 999)
    with pytest.raises(Invalid, match="pages"):
        await client.listed()
    assert len(fake.requests) <= 100


async def test_a_page_on_another_server_is_refused_and_not_asked_for(
    client: Client, fake: FakeRegistry
) -> None:
    evil = client.hosts["evil.example"] = FakeRegistry()
    page = Reply(200, {"Content-Type": OCI_INDEX, "Link": '<https://evil.example/>; rel="next"'}, index())
    fake.then("GET", "referrers", page)
    with pytest.raises(Refused, match=r"evil\.example"):
        await client.listed()
    assert evil.requests == []


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (error(403, "DENIED"), AccessDenied),
        (Reply(401), AccessDenied),
        (Reply(500), Unreachable),
        (Reply(503), Unreachable),
        (cut(3), Unreachable),
        (Reply(200, {"Content-Type": OCI_INDEX}, b"<html>"), Invalid),
        (
            Reply(200, {"Content-Type": OCI_INDEX}, b'{"schemaVersion": 2, "config": {}, "layers": []}'),
            Invalid,
        ),
        (
            Reply(200, {"Content-Type": OCI_INDEX}, index({"digest": "x", "size": 1, "mediaType": "x"})),
            Invalid,
        ),
        (Reply(200, {"Content-Type": OCI_INDEX}, b" " * 5_000_000), Corrupt),
    ],
)
async def test_an_error_of_the_api_is_one_and_does_not_mean_that_it_is_missing(
    client: Client, fake: FakeRegistry, step: Step, kind: type[FsmountError], autojump_clock: MockClock
) -> None:
    fake.keeps_referrers = True
    fake.put_manifest(TAG, index(entry(artifact())), OCI_INDEX)
    fake.then("GET", "referrers", *[step] * 3)
    with pytest.raises(kind) as caught:
        await client.listed()
    assert type(caught.value) is kind
    assert "GET manifests/tag" not in client.asked


# -------------------- listed by the tag

UNSUPPORTED: dict[str, Reply] = {
    "404 as JSON": error(404, "NOT_FOUND"),
    "404 as text": Reply(404, {"Content-Type": "text/plain"}, b"404 page not found\n"),
    "404 as HTML": Reply(404, {"Content-Type": "text/html"}, b"<html><body>Not Found</body></html>"),
    "400": error(400, "NAME_INVALID"),
    "405": error(405, "UNSUPPORTED"),
    "406": error(406, "UNSUPPORTED"),
    "501": Reply(501),
    "another type": Reply(200, {"Content-Type": "application/json"}, index()),
    "HTML": Reply(200, {"Content-Type": "text/html"}, b"<html>"),
    "no type": Reply(200, {}, index()),
    "a manifest": Reply(200, {"Content-Type": OCI_MANIFEST}, index()),
    **{
        f"{status}": Reply(status, {"Location": "https://elsewhere.example/cut-off"})
        for status in (301, 302, 303, 307, 308)
    },
    "303 within": Reply(303, {"Location": "/login"}),
}


@pytest.mark.parametrize("signal", UNSUPPORTED)
async def test_whatever_says_that_the_api_is_missing_leads_to_the_tag_and_then_to_none(
    client: Client, fake: FakeRegistry, signal: str
) -> None:
    elsewhere = client.hosts["elsewhere.example"] = FakeRegistry()
    fake.then("GET", "referrers", *[UNSUPPORTED[signal]] * 3)
    assert await client.listed() == []
    assert client.asked == ["GET referrers/subject", "GET manifests/tag"]
    fake.put_manifest(TAG, index(*map(entry, THREE)), OCI_INDEX)
    first, second, third = (str(one.digest) for one in THREE)
    assert await client.listed() == [first, second, third]
    assert await client.listed(SIGNATURE_TYPE) == [second]
    assert elsewhere.requests == []


@pytest.mark.parametrize(
    "tagged",
    [
        (OCI_MANIFEST, artifact().manifest),
        ("text/html", b"<html>"),
        ("application/json", index(entry(artifact()))),
    ],
)
async def test_what_is_no_index_under_the_tag_means_none(
    client: Client, fake: FakeRegistry, tagged: tuple[str, bytes]
) -> None:
    fake.put_manifest(TAG, tagged[1], tagged[0])
    assert await client.listed() == []


@pytest.mark.parametrize(("status", "kind"), [(403, AccessDenied), (503, Unreachable)])
async def test_a_tag_that_cannot_be_read_is_an_error(
    client: Client, fake: FakeRegistry, status: int, kind: type[FsmountError], autojump_clock: MockClock
) -> None:
    fake.then("GET", "manifests", *[Reply(status)] * 3)
    with pytest.raises(kind):
        await client.listed()


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_the_tag_is_the_digest_cut_to_what_a_tag_may_hold(algorithm: str) -> None:
    digest = Digest(algorithm, "0123456789abcdef" * (4 if algorithm == "sha256" else 8))
    assert fallback_tag(digest) == f"{algorithm}-{'0123456789abcdef' * 4}"


# -------------------- pushed


@pytest.mark.parametrize("uploads", ["", f"https://{HOST}"], ids=["relative", "absolute"])
async def test_blobs_go_first_then_the_manifest_then_the_index_and_then_all_is_looked_at(
    client: Client, fake: FakeRegistry, uploads: str
) -> None:
    fake.uploads = uploads
    await client.push(artifact())
    assert client.asked == [
        "HEAD blobs/empty",
        "POST blobs/uploads/",
        "PUT blobs/uploads/2",
        "HEAD blobs/payload",
        "POST blobs/uploads/",
        "PUT blobs/uploads/5",
        "PUT manifests/artifact",
        "GET manifests/tag",
        "PUT manifests/tag",
        "GET manifests/tag",
        "GET manifests/artifact",
        "GET referrers/subject",
        "GET manifests/tag",
    ]
    assert {EMPTY, b"payload"} <= set(fake.blobs.values())


async def test_the_manifest_is_pushed_byte_for_byte_and_the_index_says_what_it_says_of_itself(
    client: Client, fake: FakeRegistry
) -> None:
    one = artifact(annotations={"b": "2", "a": "ü"})
    await client.push(one)
    assert fake.manifests[str(one.digest)] == (OCI_MANIFEST, one.manifest)
    assert json.loads(fake.manifests[fake.tags[TAG]][1]) == json.loads(index(entry(one)))
    assert client.tagged == [entry(one)]


async def test_an_upload_is_finished_at_the_address_given_whose_query_is_kept(
    client: Client, fake: FakeRegistry
) -> None:
    await client.push(artifact())
    put = fake.seen("PUT", "uploads")[1]
    assert put.query == parse_qs(f"{UPLOAD_QUERY}&digest={Digest.of(b'payload')}")
    assert (put.headers["content-type"], put.headers["content-length"]) == ("application/octet-stream", "7")
    assert put.body == b"payload"
    assert fake.seen("POST")[0].headers["content-length"] == "0"


async def test_a_blob_that_is_there_is_not_sent(client: Client, fake: FakeRegistry) -> None:
    fake.put_blob(EMPTY)
    fake.put_blob(b"payload")
    await client.push(artifact())
    assert client.asked[:3] == ["HEAD blobs/empty", "HEAD blobs/payload", "PUT manifests/artifact"]


@pytest.mark.parametrize(
    "location", ["https://evil.example/upload", "http://registry.example/upload", "https://127.0.0.1/upload"]
)
async def test_a_blob_is_sent_to_no_other_server(client: Client, fake: FakeRegistry, location: str) -> None:
    evil = client.hosts["evil.example"] = FakeRegistry()
    fake.then("POST", "uploads", Reply(202, {"Location": location}))
    with pytest.raises(Refused):
        await client.push(artifact())
    assert evil.requests == []
    assert fake.seen("PUT") == []


async def test_a_registry_that_keeps_referrers_gets_no_index(client: Client, fake: FakeRegistry) -> None:
    fake.keeps_referrers = True
    await client.push(artifact())
    assert client.asked[-3:] == ["PUT manifests/artifact", "GET manifests/artifact", "GET referrers/subject"]
    assert fake.tags == {}


@pytest.mark.parametrize("said", [str(Digest.of(b"another")), "", "true"])
async def test_only_the_subjects_own_digest_says_that_it_is_kept(
    client: Client, fake: FakeRegistry, said: str
) -> None:
    fake.then("PUT", "manifests/sha256:", lambda reply: reply.with_headers(OCI_Subject=said))
    await client.push(artifact())
    assert client.tagged == [entry(artifact())]


async def test_an_index_grows_and_lists_nothing_twice(client: Client, fake: FakeRegistry) -> None:
    await client.push(*THREE, THREE[1])
    assert client.tagged == [entry(one) for one in THREE]
    await client.push(THREE[0])
    assert client.tagged == [entry(one) for one in THREE]
    assert len(fake.seen("PUT", TAG)) == 3


async def test_an_artifact_that_the_index_knows_is_not_written_into_it_again(
    client: Client, fake: FakeRegistry
) -> None:
    fake.put_manifest(TAG, index(described(artifact().manifest, OCI_MANIFEST)), OCI_INDEX)
    await client.push(artifact())
    assert fake.seen("PUT", TAG) == []


async def test_what_others_wrote_into_the_index_stays(client: Client, fake: FakeRegistry) -> None:
    foreign = [
        described(b"x", "application/vnd.docker.distribution.manifest.v2+json"),
        described(b"y", OCI_MANIFEST)
        | {
            "artifactType": SIGNATURE_TYPE,
            "annotations": {"ключ": "значение"},
            "platform": {"os": "linux", "architecture": "arm64", "os.features": ["x"]},
            "urls": ["https://a.example"],
            "vendor": {"deep": [1, 2.5, None, True]},
        },
        described(b"z", OCI_INDEX) | {"annotations": {"lone": "\ud800", "\u2028": "\x00"}},
    ]
    fake.put_manifest(TAG, index(*foreign), OCI_INDEX)
    await client.push(artifact())
    assert client.tagged == [*foreign, entry(artifact())]


async def test_a_manifest_that_refers_to_nothing_known_yet_may_be_pushed_for_any_subject(
    client: Client, fake: FakeRegistry
) -> None:
    other = Digest.of(b"other")
    await client.push(artifact(), artifact(subject=other))
    assert set(fake.tags) == {TAG, fallback_tag(other)}


@pytest.mark.parametrize(
    ("media_type", "data"),
    [
        (OCI_MANIFEST, artifact(b"x").manifest),
        ("application/vnd.docker.distribution.manifest.list.v2+json", index()),
        (OCI_INDEX, b"<html>"),
        (OCI_INDEX, b'{"schemaVersion": 2, "manifests": [1]}'),
        (OCI_INDEX, index(config={})),
    ],
)
async def test_what_is_no_index_under_the_tag_is_left_alone(
    client: Client, fake: FakeRegistry, media_type: str, data: bytes
) -> None:
    fake.is_strict = True
    digest = fake.put_manifest(TAG, data, media_type)
    with pytest.raises(Invalid):
        await client.push(artifact())
    assert fake.tags == {TAG: digest}
    assert fake.seen("PUT", TAG) == []


def overwrite(fake: FakeRegistry, *entries: object) -> Callable[[Reply], Reply]:
    """A step: right after us another writer has written what it made of the index as it was before."""

    def step(reply: Reply) -> Reply:
        fake.put_manifest(TAG, index(*entries), OCI_INDEX)
        return reply

    return step


@pytest.mark.parametrize("times", [1, 2])
async def test_an_index_that_another_writer_replaced_is_written_again(
    client: Client, fake: FakeRegistry, times: int
) -> None:
    foreign = described(b"foreign", OCI_MANIFEST)
    fake.then("PUT", TAG, *[overwrite(fake, foreign)] * times)
    await client.push(artifact())
    assert client.tagged == [foreign, entry(artifact())]
    assert len(fake.seen("PUT", TAG)) == times + 1


async def test_but_not_for_ever(client: Client, fake: FakeRegistry) -> None:
    fake.then("PUT", TAG, *[overwrite(fake)] * 9)
    with pytest.raises(Unreachable, match="changed by others") as caught:
        await client.push(artifact())
    assert caught.value.remedy
    assert len(fake.seen("PUT", TAG)) == 3
    assert client.tagged == []


async def test_pushes_for_one_subject_are_one_after_the_other_and_for_others_at_once(
    client: Client, fake: FakeRegistry, autojump_clock: MockClock
) -> None:
    other = Digest.of(b"other")
    tags = (TAG, fallback_tag(other))

    def slow(request: Request) -> Reply:
        return replace(fake(request), delay_seconds=1 if request.path.endswith(tags) else 0)

    client.hosts[HOST] = slow
    async with client.referrers() as referrers, trio.open_nursery() as nursery:
        for one in (THREE[0], THREE[1], artifact(subject=other)):
            nursery.start_soon(referrers.push, one)
    assert {str(one["digest"]) for one in client.tagged} == {str(one.digest) for one in THREE[:2]}
    methods = [request.method for request in fake.requests if request.path.endswith(TAG)]
    first, second = (at for at, method in enumerate(methods) if method == "PUT")
    # The first looks at what it wrote, and only then the second reads.
    assert methods[:first] == ["GET"]
    assert second - first > 2
    writes = [request.path for request in fake.seen("PUT", "manifests/sha256-")]
    assert writes.index(f"/v2/team/web/manifests/{tags[1]}") < 2


async def test_a_push_that_is_cancelled_lets_the_next_one_go_on(client: Client, fake: FakeRegistry) -> None:
    fake.then("GET", TAG, lambda reply: replace(reply, delay_seconds=float("inf")))
    async with client.referrers() as referrers:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(referrers.push, artifact())
                while not fake.seen("GET", TAG):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        await referrers.push(artifact())
    assert client.tagged == [entry(artifact())]


@pytest.mark.parametrize(
    ("method", "path", "step", "kind"),
    [
        ("POST", "uploads", error(405, "UNSUPPORTED"), Unreachable),
        ("POST", "uploads", Reply(202), Unreachable),
        ("POST", "uploads", error(403, "DENIED"), AccessDenied),
        ("POST", "uploads", error(404, "NAME_UNKNOWN"), NotFound),
        ("PUT", "uploads", error(400, "DIGEST_INVALID"), Unreachable),
        ("PUT", "manifests/sha256:", error(400, "MANIFEST_INVALID"), Unreachable),
        ("PUT", "manifests/sha256:", Reply(413), Unreachable),
        ("PUT", "manifests/sha256-", error(403, "DENIED"), AccessDenied),
        ("GET", "manifests/sha256-", error(403, "DENIED"), AccessDenied),
    ],
)
async def test_what_a_registry_refuses_on_the_way_ends_the_push(
    client: Client, fake: FakeRegistry, method: str, path: str, step: Step, kind: type[FsmountError]
) -> None:
    fake.then(method, path, step)
    with pytest.raises(kind) as caught:
        await client.push(artifact())
    assert type(caught.value) is kind
    assert client.asked[-1].startswith(method)


@pytest.mark.parametrize("path", ["uploads", "manifests/sha256:", "manifests/sha256-"])
async def test_an_error_that_passes_is_waited_for(
    client: Client, fake: FakeRegistry, path: str, autojump_clock: MockClock
) -> None:
    fake.then("PUT", path, Reply(503))
    await client.push(artifact())
    assert client.tagged == [entry(artifact())]


async def test_a_registry_that_keeps_other_bytes_is_found_out(client: Client, fake: FakeRegistry) -> None:
    fake.then("GET", "manifests/sha256:", lambda reply: replace(reply, body=reply.body + b" "))
    with pytest.raises(Corrupt, match=str(artifact().digest)):
        await client.push(artifact())


@pytest.mark.parametrize("keeps", [True, False])
async def test_a_registry_that_does_not_list_what_it_took_is_found_out(
    client: Client, fake: FakeRegistry, keeps: bool
) -> None:
    fake.keeps_referrers = keeps
    path = "referrers" if keeps else TAG
    waits = [] if keeps else [unchanged] * 2
    fake.then("GET", path, *waits, Reply(200, {"Content-Type": OCI_INDEX}, index()))
    with pytest.raises(Corrupt, match="does not list"):
        await client.push(artifact())


async def test_an_index_too_large_to_be_read_is_left_alone(client: Client, fake: FakeRegistry) -> None:
    client.limits = Limits(manifest_bytes=2000)
    fake.put_manifest(TAG, index(*[described(b"%d" % n, OCI_MANIFEST) for n in range(20)]), OCI_INDEX)
    with pytest.raises(Corrupt, match="more than 2000 bytes"):
        await client.push(artifact())
    assert fake.seen("PUT", TAG) == []


async def test_a_push_asks_for_a_token_that_allows_it_and_listing_for_one_that_does_not(
    client: Client, fake: FakeRegistry
) -> None:
    server = TokenServer()
    client.hosts["auth.example"] = server
    fake.challenge = 'Bearer realm="https://auth.example/token",service="s"'
    fake.admit = lambda authorization: authorization in server.valid
    await client.push(artifact())
    tokens = {
        f"Bearer token-{number}": request.query["scope"] for number, request in enumerate(server.requests, 1)
    }
    used = {
        (request.method, *tokens[sent])
        for request in fake.requests
        if (sent := request.headers.get("authorization"))
    }
    push, pull = "repository:team/web:pull,push", "repository:team/web:pull"
    assert {method: scope for method, scope in used if method != "GET"} == dict.fromkeys(
        ("HEAD", "POST", "PUT"), push
    )
    assert {scope for method, scope in used if method == "GET"} == {push, pull}
    assert len(server.requests) == 2
    server.requests.clear()
    await client.listed()
    assert [request.query["scope"] for request in server.requests] == [[pull]]


async def test_credentials_are_sent_with_every_step(client: Client, fake: FakeRegistry) -> None:
    (client.root / "auth.json").write_text(json.dumps({"auths": {HOST: {"username": "me", "password": "x"}}}))
    fake.challenge = 'Basic realm="r"'
    await client.push(artifact())
    assert [r.method for r in fake.requests if "authorization" not in r.headers] == ["HEAD"]
