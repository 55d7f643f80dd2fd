"""A layout folder takes artifacts whole, and keeps what others wrote into it."""

import errno
import json
import os
from pathlib import Path

import pytest
import trio

from fsmount.errors import AccessDenied, Invalid, NoSpace, NotFound, Refused
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import OCI_INDEX, OCI_MANIFEST
from fsmount.oci.soci import INDEX_V1
from fsmount.registry.destination import LayoutDestination
from fsmount.registry.layout import Layout
from fsmount.registry.referrers import Artifact

_SUBJECT = Digest.of(b"the image")
_NAME = "org.opencontainers.image.ref.name"


def _artifact(number: int = 0) -> Artifact:
    payload = b"payload %d" % number
    config = {"mediaType": INDEX_V1, "digest": str(Digest.of(b"{}")), "size": 2}
    subject = {"mediaType": OCI_MANIFEST, "digest": str(_SUBJECT), "size": 9}
    layer = {"mediaType": "application/x", "digest": str(Digest.of(payload)), "size": len(payload)}
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": config,
        "layers": [layer],
        "subject": subject,
    }
    data = json.dumps(manifest).encode()
    return Artifact(data, OCI_MANIFEST, INDEX_V1, {"by": "tests"}, _SUBJECT, [b"{}", payload])


def _listed(folder: Path) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = json.loads((folder / "index.json").read_text())["manifests"]
    return entries


async def test_a_new_folder_becomes_a_layout_with_the_artifact(tmp_path: Path) -> None:
    place = LayoutDestination(tmp_path / "new" / "layout")
    assert place.source() is None
    artifact = _artifact()
    await place.publish(artifact)
    source = place.source()
    assert source is not None
    (found,) = await source.referrers(_SUBJECT, INDEX_V1)
    assert found.digest == artifact.digest
    assert (await source.manifest(found.digest))[0] == artifact.manifest
    files = sorted(path.name for path in (tmp_path / "new" / "layout").rglob("*") if path.is_file())
    blobs = [Digest.of(blob).hex for blob in (*artifact.blobs, artifact.manifest)]
    assert files == sorted(["index.json", "oci-layout", *blobs])
    assert json.loads((tmp_path / "new" / "layout" / "oci-layout").read_text()) == {
        "imageLayoutVersion": "1.0.0"
    }


async def test_what_is_listed_already_stays_with_all_that_is_in_it(tmp_path: Path) -> None:
    await LayoutDestination(tmp_path).publish(_artifact(1))
    strange = {"mediaType": "application/x", "digest": str(_SUBJECT), "size": 1, "vendor": {"größer": [1]}}
    index = {"schemaVersion": 2, "manifests": [strange, *_listed(tmp_path)], "vendor": 1}
    (tmp_path / "index.json").write_text(json.dumps(index))
    await LayoutDestination(tmp_path).publish(_artifact(2))
    written = json.loads((tmp_path / "index.json").read_text())
    assert written["manifests"][:2] == index["manifests"]
    assert [entry["digest"] for entry in written["manifests"][2:]] == [str(_artifact(2).digest)]
    assert {key: value for key, value in written.items() if key != "manifests"} == {
        "schemaVersion": 2,
        "vendor": 1,
    }


async def test_the_same_artifact_again_changes_nothing(tmp_path: Path) -> None:
    for tag in (None, lambda artifact: "named"):
        place = LayoutDestination(tmp_path, tag=tag)
        await place.publish(_artifact())
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        await place.publish(_artifact())
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    # Named, it is still one; and it keeps its name.
    await LayoutDestination(tmp_path).publish(_artifact())
    (entry,) = _listed(tmp_path)
    assert entry["annotations"] == {_NAME: "named"}


async def test_a_name_is_that_of_the_last_one(tmp_path: Path) -> None:
    place = LayoutDestination(tmp_path, tag=lambda artifact: "named")
    for number in (1, 2):
        await place.publish(_artifact(number))
    assert [entry["digest"] for entry in _listed(tmp_path)] == [str(_artifact(2).digest)]


async def test_many_at_once_are_all_listed(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(LayoutDestination(tmp_path).publish, _artifact(number))
    found = await Layout(tmp_path).referrers(_SUBJECT)
    assert {one.digest for one in found} == {_artifact(number).digest for number in range(20)}


async def test_a_blob_that_is_damaged_is_written_again(tmp_path: Path) -> None:
    artifact = _artifact()
    await LayoutDestination(tmp_path).publish(artifact)
    path = tmp_path / "blobs" / "sha256" / artifact.digest.hex
    path.write_bytes(b"damaged")
    await LayoutDestination(tmp_path).publish(artifact)
    assert path.read_bytes() == artifact.manifest


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}", '{"manifests": [1]}'])
async def test_an_index_that_is_none_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "oci-layout").write_text("{}")
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(Invalid, match=r"index\.json"):
        await LayoutDestination(tmp_path).publish(_artifact())
    assert (tmp_path / "index.json").read_text() == text


async def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(Refused, match="not empty"):
        await LayoutDestination(tmp_path).publish(_artifact())
    with pytest.raises(Refused, match="no folder"):
        await LayoutDestination(tmp_path / "precious").publish(_artifact())
    assert os.listdir(tmp_path) == ["precious"]


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EROFS, AccessDenied)]
)
async def test_a_disk_that_takes_no_more_says_so_and_nothing_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    await LayoutDestination(tmp_path).publish(_artifact(1))
    before = sorted(tmp_path.rglob("*"))

    def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind):
        await LayoutDestination(tmp_path).publish(_artifact(2))
    assert sorted(tmp_path.rglob("*")) == before


async def test_the_index_of_a_layout_s_only_image_does_not_make_it_one_of_two(tmp_path: Path) -> None:
    await LayoutDestination(tmp_path).publish(_artifact())
    with pytest.raises(NotFound) as caught:
        await Layout(tmp_path).resolve(None)
    assert caught.value.remedy == "It holds no image."
    image = {"mediaType": OCI_INDEX, "digest": str(_SUBJECT), "size": 9}
    (tmp_path / "index.json").write_text(
        json.dumps({"schemaVersion": 2, "manifests": [*_listed(tmp_path), image]})
    )
    assert (await Layout(tmp_path).resolve(None)).digest == _SUBJECT
