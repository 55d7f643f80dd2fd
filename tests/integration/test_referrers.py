"""Artifacts pushed to real registries that know no API of referrers, and what other clients then find there."""

import json
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fsmount.errors import Invalid, Unreachable
from fsmount.oci.digest import Digest
from fsmount.oci.reference import Reference
from fsmount.registry.credentials import Credentials
from fsmount.registry.hosts import Hosts
from fsmount.registry.open import Sources
from fsmount.registry.referrers import Artifact, Referrers, fallback_tag
from fsmount.registry.source import is_housekeeping
from tests import peers

_WHY_NOT = peers.have("docker-registry", "skopeo")
pytestmark = [pytest.mark.integration, pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)]

REPOSITORY = "team/web"
USER, PASSWORD = "me", "pass:word"
TYPE = "application/vnd.example.index.v1"
EMPTY = b"{}"


def artifact(subject: Digest, number: int = 0) -> Artifact:
    """As image-spec has it for what is no image: the empty configuration, a type, a subject."""
    payload = b"payload %d\n" % number * 1000
    annotations = {"org.example.number": str(number), "org.example.text": "größer > kleiner"}
    manifest = {
        "schemaVersion": 2,
        "mediaType": peers.MANIFEST,
        "artifactType": TYPE,
        "config": _described("application/vnd.oci.empty.v1+json", EMPTY),
        "layers": [_described(TYPE, payload)],
        "subject": {"mediaType": peers.MANIFEST, "digest": str(subject), "size": 1234},
        "annotations": annotations,
    }
    data = json.dumps(manifest, indent=1, ensure_ascii=False).encode()
    return Artifact(data, peers.MANIFEST, TYPE, annotations, subject, [EMPTY, payload])


def _described(media_type: str, data: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": str(Digest.of(data)), "size": len(data)}


def entry(one: Artifact) -> dict[str, object]:
    described = _described(peers.MANIFEST, one.manifest)
    return described | {"artifactType": TYPE, "annotations": dict(one.annotations)}


@asynccontextmanager
async def opened(root: Path, host: str) -> AsyncIterator[Sources]:
    """A client that knows nothing of this machine's files but what is below root."""
    async with Sources(
        hosts=Hosts(root=root, environ={}, home=root / "home"),
        credentials=Credentials(environ={"REGISTRY_AUTH_FILE": str(root / "auth.json")}),
    ) as sources:
        yield sources


async def referrers_of(sources: Sources, host: str) -> Referrers:
    (remote,) = await sources.remotes(Reference(host, REPOSITORY))
    return Referrers(remote, f"{host}/{REPOSITORY}")


async def listed(
    sources: Sources, host: str, subject: Digest, artifact_type: str | None = None
) -> list[Digest]:
    found = await sources.open(Reference(host, REPOSITORY)).referrers(subject, artifact_type)
    return [one.digest for one in found]


def raw(host: str, reference: object) -> tuple[str, bytes]:
    """The type and the bytes that another client gets."""
    accept = {"Accept": f"{peers.MANIFEST}, {peers.INDEX}"}
    request = urllib.request.Request(f"http://{host}/v2/{REPOSITORY}/manifests/{reference}", headers=accept)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.headers["Content-Type"], answer.read()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[peers.Registry]:
    with peers.docker_registry(tmp_path / "storage") as registry:
        yield registry


@pytest.fixture
def subject(tmp_path: Path, registry: peers.Registry) -> Digest:
    """An image in the registry."""
    layout = tmp_path / "layout"
    peers.tar_layer_image(layout, "v1", [peers.pack(b"\0" * 1024)])
    return Digest.parse(peers.push(layout, "v1", registry.host, REPOSITORY))


async def test_what_is_pushed_is_found_by_us_and_by_others_byte_for_byte(
    tmp_path: Path, registry: peers.Registry, subject: Digest
) -> None:
    host, one = registry.host, artifact(subject)
    async with opened(tmp_path, host) as sources:
        assert await listed(sources, host, subject) == []
        await (await referrers_of(sources, host)).push(one)
        assert await listed(sources, host, subject) == [one.digest]
        assert await listed(sources, host, subject, TYPE) == [one.digest]
        assert await listed(sources, host, subject, "application/vnd.other") == []
        source = sources.open(Reference(host, REPOSITORY))
        assert await source.manifest(one.digest) == (one.manifest, peers.MANIFEST)
        assert await source.tags() == sorted(["v1", fallback_tag(subject)])
    assert is_housekeeping(fallback_tag(subject))
    assert raw(host, one.digest) == (peers.MANIFEST, one.manifest)
    media_type, data = raw(host, fallback_tag(subject))
    assert media_type == peers.INDEX
    assert json.loads(data) == {"schemaVersion": 2, "mediaType": peers.INDEX, "manifests": [entry(one)]}
    seen = peers.run(
        "skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{host}/{REPOSITORY}@{one.digest}"
    )
    assert seen.encode() == one.manifest


async def test_the_order_on_the_wire(tmp_path: Path, registry: peers.Registry, subject: Digest) -> None:
    one = artifact(subject)
    before = len(registry.requests())
    async with opened(tmp_path, registry.host) as sources:
        referrers = await referrers_of(sources, registry.host)
        await referrers.push(one)
        await referrers.push(one)
    asked = [
        (r.method, r.path.rpartition("/")[2].partition("?")[0], r.status)
        for r in registry.requests()[before:]
    ]
    empty, payload = (str(Digest.of(blob)) for blob in one.blobs)
    digest, tag = str(one.digest), fallback_tag(subject)
    look = [("GET", digest, 200), ("GET", str(subject), 404), ("GET", tag, 200)]
    uploads = [name for method, name, _ in asked if method == "PUT"]
    assert asked == [
        ("HEAD", empty, 404),
        ("POST", "", 202),
        ("PUT", uploads[0], 201),
        ("HEAD", payload, 404),
        ("POST", "", 202),
        ("PUT", uploads[1], 201),
        ("PUT", digest, 201),
        ("GET", tag, 404),
        ("PUT", tag, 201),
        ("GET", tag, 200),
        *look,
        ("HEAD", empty, 200),
        ("HEAD", payload, 200),
        ("PUT", digest, 201),
        ("GET", tag, 200),
        *look,
    ]


async def test_many_pushed_at_once_are_all_found(
    tmp_path: Path, registry: peers.Registry, subject: Digest
) -> None:
    artifacts = [artifact(subject, number) for number in range(12)]
    async with opened(tmp_path, registry.host) as sources:
        referrers = await referrers_of(sources, registry.host)
        async with trio.open_nursery() as nursery:
            for one in artifacts:
                nursery.start_soon(referrers.push, one)
        found = await listed(sources, registry.host, subject)
    assert sorted(found) == sorted(one.digest for one in artifacts)
    entries = json.loads(raw(registry.host, fallback_tag(subject))[1])["manifests"]
    assert sorted(entries, key=str) == sorted(map(entry, artifacts), key=str)


async def test_what_another_client_has_listed_stays_as_it_is(
    tmp_path: Path, registry: peers.Registry, subject: Digest
) -> None:
    layout = tmp_path / "foreign"
    signature = peers.tar_layer_image(layout, None, [peers.pack(b"\0" * 2048)])
    foreign = signature | {"artifactType": "application/vnd.other", "annotations": {"vendor": "größer"}}
    peers.image_index(layout, "others", [foreign])
    peers.push(layout, "others", registry.host, REPOSITORY, as_tag=fallback_tag(subject))
    one = artifact(subject)
    async with opened(tmp_path, registry.host) as sources:
        await (await referrers_of(sources, registry.host)).push(one)
        found = await listed(sources, registry.host, subject)
    assert found == [Digest.parse(str(signature["digest"])), one.digest]
    assert json.loads(raw(registry.host, fallback_tag(subject))[1])["manifests"] == [foreign, entry(one)]


async def test_an_image_under_the_tag_is_left_alone(
    tmp_path: Path, registry: peers.Registry, subject: Digest
) -> None:
    layout = tmp_path / "foreign"
    peers.tar_layer_image(layout, "image", [peers.pack(b"\0" * 2048)])
    digest = peers.push(layout, "image", registry.host, REPOSITORY, as_tag=fallback_tag(subject))
    async with opened(tmp_path, registry.host) as sources:
        assert await listed(sources, registry.host, subject) == []
        with pytest.raises(Invalid, match="left alone"):
            await (await referrers_of(sources, registry.host)).push(artifact(subject))
    assert Digest.of(raw(registry.host, fallback_tag(subject))[1]) == Digest.parse(digest)


async def test_a_subject_that_is_not_there_yet_may_have_referrers(
    tmp_path: Path, registry: peers.Registry
) -> None:
    subject = Digest.of(b"to be pushed later")
    async with opened(tmp_path, registry.host) as sources:
        await (await referrers_of(sources, registry.host)).push(artifact(subject))
        assert await listed(sources, registry.host, subject) == [artifact(subject).digest]


async def test_over_tls_and_with_a_password(tmp_path: Path) -> None:
    tls = peers.loopback_tls(tmp_path / "tls")
    with peers.docker_registry(tmp_path / "storage", tls=tls, htpasswd={USER: PASSWORD}) as registry:
        login = {"auths": {registry.host: {"username": USER, "password": PASSWORD}}}
        (tmp_path / "auth.json").write_text(json.dumps(login))
        folder = tmp_path / "etc/docker/certs.d" / registry.host
        folder.mkdir(parents=True)
        (folder / "ca.crt").write_bytes(tls.authority.read_bytes())
        subject = Digest.of(b"subject")
        async with opened(tmp_path, registry.host) as sources:
            await (await referrers_of(sources, registry.host)).push(artifact(subject))
            assert await listed(sources, registry.host, subject) == [artifact(subject).digest]


async def test_a_registry_that_takes_nothing_says_so(
    tmp_path: Path, registry: peers.Registry, subject: Digest
) -> None:
    with peers.docker_registry(registry.root, read_only=True) as closed:
        async with opened(tmp_path, closed.host) as sources:
            with pytest.raises(Unreachable, match="405"):
                await (await referrers_of(sources, closed.host)).push(artifact(subject))
            assert await listed(sources, closed.host, subject) == []


@pytest.mark.skipif(bool(peers.have("zuul-registry")), reason=peers.have("zuul-registry"))
async def test_a_registry_that_explains_in_html_is_used_in_the_same_way(tmp_path: Path) -> None:
    with peers.zuul_registry(tmp_path / "zuul", {USER: PASSWORD}) as host:
        login = {"auths": {host: {"username": USER, "password": PASSWORD}}}
        (tmp_path / "auth.json").write_text(json.dumps(login))
        subject = Digest.of(b"subject")
        async with opened(tmp_path, host) as sources:
            assert await listed(sources, host, subject) == []
            await (await referrers_of(sources, host)).push(artifact(subject))
            assert await listed(sources, host, subject) == [artifact(subject).digest]
