"""Indexes that are built of real images, published in real registries and layouts, and read again by their users."""

import hashlib
import io
import json
import os
import random
import subprocess
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fsmount.archive.inflate import check_span, inflate_span
from fsmount.archive.ztoc import read_ztoc
from fsmount.registry.source import is_housekeeping
from tests import peers
from tests.fakes.front import CountingProxy, Fault
from tests.fakes.tar import Member, archive, pax
from tests.integration.program import fsmount

_WHY_NOT = peers.have("docker-registry", "skopeo", "umoci")
pytestmark = [pytest.mark.integration, pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)]

_MIB = 2**20
SOCI_V1 = "application/vnd.amazon.soci.index.v1+json"


def _noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def _digits(size: int) -> bytes:
    return b"".join(b"%d\n" % number for number in range(size // 6))[:size]


#: More than SOCI wants of a layer that gets a ztoc, in several spans.
FILES = {
    b"noise": _noise(1, 11 * _MIB),
    b"digits": _digits(5 * _MIB),
    b"empty": b"",
    **{b"small/%03d" % number: _noise(number, number) for number in range(200)},
}
TAR = archive(*(Member(name, data) for name, data in FILES.items()))
GLOBAL = archive(pax({"comment": "c"}, type=b"g"), Member(b"a", _noise(2, 11 * _MIB)))
SMALL = archive(Member(b"tiny", b"content\n"))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[peers.Registry]:
    with peers.docker_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of every kind of layer, which no test changes."""
    path = tmp_path_factory.mktemp("layout") / "layout"
    gzip, plain = peers.pack(TAR), peers.pack(TAR, "tar")
    peers.tar_layer_image(path, "v1", [gzip, peers.pack(SMALL)])
    peers.tar_layer_image(path, "docker", [peers.pack(TAR, "docker-gzip")], docker=True)
    peers.tar_layer_image(path, "tar", [plain])
    peers.tar_layer_image(path, "small", [peers.pack(SMALL)])
    odd = [peers.pack(TAR, "gzip-members", member_size=5 * _MIB), peers.pack(GLOBAL), peers.pack(TAR, "zstd")]
    peers.tar_layer_image(path, "odd", odd)
    peers.tar_layer_image(path, "mixed", [gzip, *odd])
    arm = peers.tar_layer_image(path, None, [plain], platform="linux/arm64")
    amd = peers.tar_layer_image(path, None, [gzip])
    peers.image_index(path, "both", [amd, arm])
    return path


def _raw(host: str, path: str, *, accept: str = f"{peers.MANIFEST}, {peers.INDEX}") -> bytes:
    """What another client gets of a repository."""
    request = urllib.request.Request(f"http://{host}/v2/{path}", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=20) as answer:
        data: bytes = answer.read()
    return data


def _fallback(host: str, repository: str, subject: str) -> list[dict[str, Any]]:
    """The referrers of an image, as a client without an API finds them."""
    try:
        data = _raw(host, f"{repository}/manifests/{subject.replace(':', '-')}")
    except urllib.error.HTTPError as error:
        assert error.code == 404
        return []
    found: list[dict[str, Any]] = json.loads(data)["manifests"]
    return found


def _json(*arguments: str | Path, cache: Path, code: int = 0) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(fsmount("index", *arguments, "--json", cache=cache, code=code).stdout)
    return facts


def _check(index: Mapping[str, Any], layers: Mapping[str, bytes], blobs: Mapping[str, bytes]) -> None:
    """Reads every file of the layers that an index is to have, span by span, and compares with what tar reads.

    layers: their blobs by digest; blobs: the ztocs by digest.
    """
    assert index["config"] == {
        "mediaType": SOCI_V1,
        "digest": peers.digest_of(b"{}"),
        "size": 2,
    }
    assert [ztoc["annotations"]["com.amazon.soci.image-layer-digest"] for ztoc in index["layers"]] == [
        *layers
    ]
    for ztoc, blob in zip(index["layers"], layers.values(), strict=True):
        data = blobs[ztoc["digest"]]
        assert (peers.digest_of(data), len(data)) == (ztoc["digest"], ztoc["size"])
        table = read_ztoc(data, blob_size=len(blob), max_size=2**30)
        inflated = b""
        for span in table.spans:
            piece = blob[span.offset : span.offset + span.length]
            part = inflate_span(table.codec, span, piece)
            check_span(span, piece, part)
            inflated += part
        assert len(table.spans) > 2
        with tarfile.open(fileobj=io.BytesIO(blob)) as archive:
            members = archive.getmembers()
            assert [entry.path.decode() for entry in table.entries] == [one.name for one in members]
            for entry, member in zip(table.entries, members, strict=True):
                assert (entry.size, entry.mode, entry.mtime_ns) == (
                    member.size,
                    member.mode,
                    member.mtime * 10**9,
                )
                file = archive.extractfile(member) if member.isreg() else None
                content = b"".join(inflated[one.offset : one.offset + one.size] for one in entry.extents)
                assert content == (file.read() if file is not None else b"")


def _blob(layout: Path, digest: str) -> bytes:
    return (layout / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes()


# -------------------- registries


@pytest.mark.parametrize("tag", ["v1", "docker", "tar"])
def test_an_index_that_is_pushed_is_found_by_others_and_gives_every_byte(
    registry: peers.Registry, layout: Path, tmp_path: Path, tag: str
) -> None:
    host, repository = registry.host, f"team/{tag}"
    subject = peers.push(layout, tag, host, repository)
    facts = _json(f"{host}/{repository}:{tag}", "--push", cache=tmp_path / "cache")
    (entry,) = _fallback(host, repository, subject)
    assert (entry["digest"], entry["artifactType"]) == (facts["index"], SOCI_V1)
    assert facts["published_to"] == [f"{host}/{repository}"]
    manifest = _raw(host, f"{repository}/manifests/{facts['index']}")
    assert peers.digest_of(manifest) == facts["index"]
    index = json.loads(manifest)
    assert list(index) == ["schemaVersion", "mediaType", "config", "layers", "subject", "annotations"]
    image = json.loads(_blob(layout, subject))
    assert index["subject"] == {
        "mediaType": image["mediaType"],
        "digest": subject,
        "size": len(_blob(layout, subject)),
    }
    layer = image["layers"][0]["digest"]
    ztocs = {one["digest"]: _raw(host, f"{repository}/blobs/{one['digest']}") for one in index["layers"]}
    _check(index, {layer: _blob(layout, layer)}, ztocs)
    assert _raw(host, f"{repository}/blobs/{peers.digest_of(b'{}')}") == b"{}"
    ours = facts["layers"][0]
    assert (ours["digest"], ours["status"], ours["ztoc"]) == (layer, "indexed", index["layers"][0]["digest"])
    if tag == "v1":
        assert (facts["layers"][1]["status"], facts["layers"][1]["ztoc"]) == ("too small", None)


def test_of_images_by_other_tools_too(registry: peers.Registry, tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    (folder / "deep").mkdir(parents=True)
    (folder / "noise").write_bytes(_noise(3, 12 * _MIB))
    (folder / "deep" / "digits").write_bytes(_digits(3 * _MIB))
    (folder / "deep" / ("n" * 200)).write_text("a long name\n")
    peers.umoci_layout(tmp_path / "layout", "v1", (folder, "/app"))
    peers.skopeo_copy(f"oci:{tmp_path / 'layout'}:v1", f"docker://{registry.host}/team/umoci:v1")
    facts = _json(f"{registry.host}/team/umoci:v1", "--push", cache=tmp_path / "cache")
    index = json.loads(_raw(registry.host, f"team/umoci/manifests/{facts['index']}"))
    layer = facts["layers"][0]["digest"]
    ztocs = {
        one["digest"]: _raw(registry.host, f"team/umoci/blobs/{one['digest']}") for one in index["layers"]
    }
    _check(index, {layer: _raw(registry.host, f"team/umoci/blobs/{layer}")}, ztocs)


def test_what_was_pushed_is_what_layers_are_read_by(
    registry: peers.Registry, layout: Path, tmp_path: Path
) -> None:
    peers.push(layout, "v1", registry.host, "team/read")
    source = f"{registry.host}/team/read:v1"
    fsmount("index", source, "--push", cache=tmp_path / "ours")
    cache = tmp_path / "theirs"
    fsmount("ls", source, cache=cache)
    facts = json.loads(fsmount("inspect", source, "--json", cache=cache).stdout)
    assert facts["layers"][0]["read_as"] == "SOCI v1"


def test_what_is_there_already_is_neither_fetched_nor_pushed_again(
    registry: peers.Registry, layout: Path, tmp_path: Path
) -> None:
    peers.push(layout, "mixed", registry.host, "team/again")
    source = f"{registry.host}/team/again:mixed"
    first = _json(source, "--push", cache=tmp_path / "cache")
    assert not first["existed"]
    before = len(registry.requests())
    said = fsmount("index", source, "--push", cache=tmp_path / "cache").stdout.decode()
    assert "before" in said and "nothing was fetched" in said and first["index"] in said
    again = _json(source, "--push", cache=tmp_path / "other")
    asked = registry.requests()[before:]
    assert {request.method for request in asked} <= {"GET", "HEAD"}
    blobs = {layer["digest"] for layer in first["layers"]}
    assert not [request.path for request in asked if request.path.rpartition("/")[2] in blobs]
    assert again["existed"]
    assert [layer["status"] for layer in again["layers"]] == [layer["status"] for layer in first["layers"]]

    forced = _json(source, "--push", "--force", cache=tmp_path / "cache")
    assert (forced["existed"], forced["index"]) == (False, first["index"])
    assert len(_fallback(registry.host, "team/again", first["image"])) == 1


def test_layers_that_soci_cannot_carry_are_left_out_with_the_reason(
    registry: peers.Registry, layout: Path, tmp_path: Path
) -> None:
    peers.push(layout, "mixed", registry.host, "team/mixed")
    done = fsmount("index", f"{registry.host}/team/mixed:mixed", "--push", "--json", cache=tmp_path / "cache")
    layers = json.loads(done.stdout)["layers"]
    assert [layer["status"] for layer in layers] == ["indexed", *["unsupported"] * 3]
    reasons = ["several members", "a global PAX header", "zstd"]
    warnings = done.stderr.decode().splitlines()
    for layer, reason, warning in zip(layers[1:], reasons, warnings, strict=True):
        assert reason in layer["reason"] and reason in warning
        assert warning.startswith("fsmount: warning: no ztoc: ") and layer["digest"] in warning


def test_when_no_layer_can_have_one_it_is_an_error_that_says_what_to_do(layout: Path, tmp_path: Path) -> None:
    source = f"oci-layout:{layout}:odd"
    done = fsmount("index", source, "--output", tmp_path / "out", cache=tmp_path / "cache", code=1)
    assert b"none of the layers" in done.stderr and b"gzip layers of one member" in done.stderr
    assert not (tmp_path / "out").exists()


def test_when_no_layer_needs_one_it_is_no_error(layout: Path, tmp_path: Path) -> None:
    source = f"oci-layout:{layout}:small"
    done = fsmount("index", source, "--output", tmp_path / "out", cache=tmp_path / "cache")
    assert b"no layer needs one" in done.stdout
    assert (done.stderr, (tmp_path / "out").exists()) == (b"", False)
    facts = _json(source, "--min-size", "1", cache=tmp_path / "cache")
    assert (facts["layers"][0]["status"], facts["published_to"]) == ("indexed", [])


def test_without_push_and_output_it_says_what_it_would_publish(layout: Path, tmp_path: Path) -> None:
    before = sorted(path for path in layout.rglob("*"))
    done = fsmount("index", f"oci-layout:{layout}:v1", cache=tmp_path / "cache")
    assert b"--push" in done.stdout and b"spans of" in done.stdout
    assert sorted(path for path in layout.rglob("*")) == before
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > _MIB]
    assert left == []


def test_the_platform_chooses_the_image(registry: peers.Registry, layout: Path, tmp_path: Path) -> None:
    peers.push(layout, "both", registry.host, "team/both")
    source = f"{registry.host}/team/both:both"
    found = [
        _json(source, "--push", "--platform", platform, cache=tmp_path / "cache")
        for platform in ("linux/arm64", "linux/amd64")
    ]
    types = [one["layers"][0]["media_type"].rpartition(".")[2] for one in found]
    assert types == ["tar", "tar+gzip"]
    for one in found:
        (entry,) = _fallback(registry.host, "team/both", one["image"])
        assert entry["digest"] == one["index"]


@pytest.mark.parametrize("at", [5000, 8 * _MIB])
def test_a_layer_that_was_altered_on_the_way_is_corrupt_and_nothing_is_published(
    registry: peers.Registry, layout: Path, tmp_path: Path, at: int
) -> None:
    subject = peers.push(layout, "v1", registry.host, "team/altered")
    layer = json.loads(_blob(layout, subject))["layers"][0]["digest"]
    with CountingProxy(registry.host, faults=[Fault("flip", at, f"/blobs/{layer}")]) as front:
        source = f"{front.host}/team/altered:v1"
        out = tmp_path / "out"
        done = fsmount("index", source, "--push", "--output", out, cache=tmp_path / "cache", code=7)
    assert layer.encode() in done.stderr
    assert not out.exists()
    assert {one.method for one in front.passed()} <= {"GET", "HEAD"}
    assert _fallback(registry.host, "team/altered", subject) == []


def test_a_registry_that_may_not_be_written_says_so(layout: Path, tmp_path: Path) -> None:
    root = tmp_path / "storage"
    with peers.docker_registry(root) as registry:
        peers.push(layout, "v1", registry.host, "team/web")
    with peers.docker_registry(root, read_only=True) as closed:
        done = fsmount("index", f"{closed.host}/team/web:v1", "--push", cache=tmp_path / "cache", code=6)
    assert b"405" in done.stderr


# -------------------- layouts


def _own(tmp_path: Path, *tags: str, images: Path) -> Path:
    """A layout of some of the images only, which the test may change."""
    path = tmp_path / "own"
    for tag in tags:
        peers.skopeo_copy(f"oci:{images}:{tag}", f"oci:{path}:{tag}")
    return path


def test_an_index_is_added_to_the_layout_of_its_image(layout: Path, tmp_path: Path) -> None:
    own = _own(tmp_path, "v1", images=layout)
    before = json.loads((own / "index.json").read_text())["manifests"]
    facts = _json(f"oci-layout:{own}:v1", "--push", cache=tmp_path / "cache")
    (*others, entry) = json.loads((own / "index.json").read_text())["manifests"]
    assert others == before, "what was there stays as it is"
    assert (entry["digest"], entry["artifactType"]) == (facts["index"], SOCI_V1)
    index = json.loads(_blob(own, facts["index"]))
    layer = facts["layers"][0]["digest"]
    _check(
        index,
        {layer: _blob(own, layer)},
        {one["digest"]: _blob(own, one["digest"]) for one in index["layers"]},
    )
    # The layout still has only one image; and it is read by the index.
    cache = tmp_path / "theirs"
    assert fsmount("ls", f"oci-layout:{own}", cache=cache).stdout.split() == [
        b"digits",
        b"empty",
        b"noise",
        b"small",
        b"tiny",
    ]
    shown = json.loads(fsmount("inspect", f"oci-layout:{own}", "--json", cache=cache).stdout)
    assert shown["layers"][0]["read_as"] == "SOCI v1"
    assert b'"schemaVersion"' in subprocess.check_output(["skopeo", "inspect", "--raw", f"oci:{own}:v1"])
    stamp = (own / "index.json").stat().st_mtime_ns
    assert _json(f"oci-layout:{own}:v1", "--push", cache=tmp_path / "cache")["existed"]
    _json(f"oci-layout:{own}:v1", "--push", "--force", cache=tmp_path / "cache")
    assert (own / "index.json").stat().st_mtime_ns == stamp


def test_a_folder_of_the_index_is_a_layout_that_other_tools_push(
    registry: peers.Registry, layout: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    old = os.umask(0o022)
    try:
        facts = _json(f"oci-layout:{layout}:v1", "--output", out, cache=tmp_path / "cache")
    finally:
        os.umask(old)
    assert facts["published_to"] == [f"oci-layout:{out}"]
    tag = f"sha256-{facts['image'].removeprefix('sha256:')}.soci"
    assert is_housekeeping(tag), "it is not listed as a tag of the app"
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o644}
    raw = subprocess.check_output(["skopeo", "inspect", "--raw", f"oci:{out}:{tag}"])
    assert peers.digest_of(raw) == facts["index"]
    peers.skopeo_copy(f"oci:{out}:{tag}", f"docker://{registry.host}/team/copied:{tag}", "--preserve-digests")
    index = json.loads(_raw(registry.host, f"team/copied/manifests/{facts['index']}"))
    ztocs = {
        one["digest"]: _raw(registry.host, f"team/copied/blobs/{one['digest']}") for one in index["layers"]
    }
    layer = facts["layers"][0]["digest"]
    _check(index, {layer: _blob(layout, layer)}, ztocs)
    # Of another image, beside it; and of the same again, once.
    other = _json(f"oci-layout:{layout}:tar", "--output", out, cache=tmp_path / "cache")
    assert _json(f"oci-layout:{layout}:v1", "--output", out, cache=tmp_path / "cache")["existed"]
    listed = json.loads((out / "index.json").read_text())["manifests"]
    assert [entry["digest"] for entry in listed] == [facts["index"], other["index"]]


def test_a_folder_with_something_else_in_it_is_left_alone(layout: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("precious\n")
    source = f"oci-layout:{layout}:v1"
    done = fsmount("index", source, "--output", tmp_path / "out", cache=tmp_path / "cache", code=9)
    assert b"not empty" in done.stderr
    assert os.listdir(tmp_path / "out") == ["precious"]
    (tmp_path / "file").write_text("no folder\n")
    fsmount("index", source, "--output", tmp_path / "file", cache=tmp_path / "cache", code=9)


def test_the_image_itself_stays_as_it_is(registry: peers.Registry, layout: Path, tmp_path: Path) -> None:
    subject = peers.push(layout, "v1", registry.host, "team/same")
    fsmount("index", f"{registry.host}/team/same:v1", "--push", cache=tmp_path / "cache")
    assert hashlib.sha256(_raw(registry.host, "team/same/manifests/v1")).hexdigest() == subject[7:]
