"""OCI image layout folders, as different tools write them."""

import json
import os
from pathlib import Path

import pytest

from fsmount.errors import AccessDenied, Corrupt, FsmountError, Invalid, NotFound, UsageError
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import OCI_INDEX, OCI_MANIFEST
from fsmount.registry.layout import Layout
from fsmount.registry.source import is_housekeeping
from tests.fakes.registry import descriptor_of

NAME = "org.opencontainers.image.ref.name"
FULL_NAME = "io.containerd.image.name"


class Folder:
    """A layout written by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.list_images()

    def put(self, data: bytes) -> str:
        digest = Digest.of(data)
        self.blob_path(data).write_bytes(data)
        return str(digest)

    def blob_path(self, data: bytes) -> Path:
        return self.path / "blobs/sha256" / Digest.of(data).hex

    def list_images(self, *images: tuple[bytes, dict[str, str]], **more: object) -> None:
        entries = [
            {
                "mediaType": OCI_MANIFEST,
                "digest": self.put(data),
                "size": len(data),
                "annotations": annotations,
            }
            for data, annotations in images
        ]
        temporary = self.path / "index.new"
        temporary.write_text(json.dumps({"schemaVersion": 2, "manifests": entries, **more}))
        temporary.rename(self.path / "index.json")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "layout")


async def test_tags_are_the_names_in_either_form_sorted_and_once(folder: Folder) -> None:
    folder.list_images(
        (b"1", {NAME: "v2"}),
        (b"2", {NAME: "registry.example:5000/team/app:v1"}),
        (b"3", {NAME: "v3", FULL_NAME: "docker.io/library/app:v3"}),
        (b"4", {}),
        (b"5", {NAME: "no tag at all"}),
    )
    assert await Layout(folder.path).tags() == ["v1", "v2", "v3"]


async def test_an_image_is_found_by_tag_by_full_name_and_by_digest(folder: Folder) -> None:
    name = "registry.example/team/app:v1"
    folder.list_images((b"1", {NAME: name}), (b"2", {NAME: "v2"}))
    layout = Layout(folder.path)
    for version in ("v1", name, str(Digest.of(b"1"))):
        found = await layout.resolve(version)
        assert (found.digest, found.size, found.media_type) == (Digest.of(b"1"), 1, OCI_MANIFEST)


async def test_what_an_index_within_names_can_be_resolved_by_digest(folder: Folder) -> None:
    folder.put(b"inner")
    found = await Layout(folder.path).resolve(str(Digest.of(b"inner")))
    assert (found.digest, found.size) == (Digest.of(b"inner"), 5)


async def test_the_default_is_latest_or_else_the_only_image(folder: Folder) -> None:
    layout = Layout(folder.path)
    folder.list_images((b"1", {}))
    assert (await layout.resolve(None)).digest == Digest.of(b"1")
    folder.list_images((b"1", {NAME: "v1"}), (b"2", {NAME: "latest"}))
    assert (await layout.resolve(None)).digest == Digest.of(b"2")
    folder.list_images((b"1", {NAME: "v1"}), (b"2", {NAME: "v2"}))
    with pytest.raises(NotFound, match="2 images") as caught:
        await layout.resolve(None)
    assert "v1, v2" in str(caught.value)


async def test_a_name_of_two_images_is_an_error_and_of_one_image_twice_is_not(folder: Folder) -> None:
    layout = Layout(folder.path)
    folder.list_images((b"1", {NAME: "v1"}), (b"2", {NAME: "v1"}))
    with pytest.raises(Invalid, match="2 images named 'v1'"):
        await layout.resolve("v1")
    folder.list_images((b"1", {NAME: "v1"}), (b"1", {NAME: "v1"}))
    assert (await layout.resolve("v1")).digest == Digest.of(b"1")


async def test_two_images_of_one_tag_are_told_apart_by_their_full_names(folder: Folder) -> None:
    folder.list_images((b"1", {NAME: "a.example/app:v1"}), (b"2", {NAME: "b.example/app:v1"}))
    assert (await Layout(folder.path).resolve("b.example/app:v1")).digest == Digest.of(b"2")


async def test_a_name_that_is_not_there_is_not_found_and_the_others_are_named(folder: Folder) -> None:
    folder.list_images((b"1", {NAME: "v1"}))
    with pytest.raises(NotFound, match="gone") as caught:
        await Layout(folder.path).resolve("gone")
    assert "v1" in str(caught.value)


async def test_a_changed_list_of_images_is_read_again(folder: Folder) -> None:
    layout = Layout(folder.path)
    folder.list_images((b"1", {NAME: "v1"}))
    assert (await layout.resolve("v1")).digest == Digest.of(b"1")
    folder.list_images((b"2", {NAME: "v1"}))
    assert (await layout.resolve("v1")).digest == Digest.of(b"2")


@pytest.mark.parametrize("more", [{}, {"mediaType": OCI_INDEX}])
async def test_the_list_may_lack_its_type(folder: Folder, more: dict[str, str]) -> None:
    folder.list_images((b"1", {NAME: "v1"}), **more)
    assert await Layout(folder.path).tags() == ["v1"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schemaVersion": 2}', '{"schemaVersion": 2, "layers": []}']
)
async def test_a_broken_list_is_invalid(folder: Folder, text: str) -> None:
    (folder.path / "index.json").write_text(text)
    with pytest.raises(Invalid):
        await Layout(folder.path).tags()


async def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no folder"):
        await Layout(tmp_path / "gone").tags()


@pytest.mark.parametrize("missing", ["oci-layout", "index.json"])
async def test_a_folder_that_is_no_layout_is_a_usage_error_with_a_remedy(
    folder: Folder, missing: str
) -> None:
    (folder.path / missing).unlink()
    with pytest.raises(UsageError, match="no OCI image layout") as caught:
        await Layout(folder.path).tags()
    assert caught.value.remedy


async def test_a_manifest_comes_verified(folder: Folder) -> None:
    folder.list_images((b"{}", {NAME: "v1"}))
    layout = Layout(folder.path)
    assert await layout.manifest(Digest.of(b"{}")) == (b"{}", OCI_MANIFEST)
    folder.blob_path(b"{}").write_bytes(b"[]")
    with pytest.raises(Corrupt, match="digest"):
        await layout.manifest(Digest.of(b"{}"))


async def test_a_manifest_larger_than_any_is_not_read(folder: Folder) -> None:
    folder.put(b"x")
    os.truncate(folder.blob_path(b"x"), 2**40)
    with pytest.raises(Invalid, match="too large"):
        await Layout(folder.path).manifest(Digest.of(b"x"))


@pytest.mark.parametrize("start", [0, 1, 2**20, 2**20 + 5, 3 * 2**20])
async def test_a_blob_is_read_from_any_offset(folder: Folder, start: int) -> None:
    data = os.urandom(1024) * 1024 * 3
    folder.put(data)
    async with Layout(folder.path).blob(descriptor_of(data), start=start) as pieces:
        assert b"".join([piece async for piece in pieces]) == data[start:]


async def test_a_blob_of_another_length_than_described_is_corrupt(folder: Folder) -> None:
    folder.put(b"data")
    folder.blob_path(b"data").write_bytes(b"dat")
    with pytest.raises(Corrupt, match="3 bytes, not the 4"):
        async with Layout(folder.path).blob(descriptor_of(b"data")):
            raise AssertionError


async def test_a_blob_that_shrinks_while_it_is_read_is_corrupt(folder: Folder) -> None:
    data = bytes(3 * 2**20)
    folder.put(data)
    with pytest.raises(Corrupt, match="ends after"):
        async with Layout(folder.path).blob(descriptor_of(data)) as pieces:
            await anext(pieces)
            os.truncate(folder.blob_path(data), 2**20)
            async for _ in pieces:
                pass


async def test_a_missing_blob_is_not_found(folder: Folder) -> None:
    with pytest.raises(NotFound, match="not there"):
        await Layout(folder.path).small_blob(descriptor_of(b"gone"))


async def test_a_fifo_in_place_of_a_blob_does_not_hang(folder: Folder) -> None:
    os.mkfifo(folder.blob_path(b"x"))
    with pytest.raises(NotFound):
        await Layout(folder.path).small_blob(descriptor_of(b"x"))


async def test_what_the_system_says_is_told_in_our_words(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, flags: int) -> int:
        raise failure

    monkeypatch.setattr(os, "open", refuse)
    failure: OSError = PermissionError(13, "Permission denied")
    with pytest.raises(AccessDenied):
        await Layout(folder.path).tags()
    failure = OSError(5, "Input/output error")
    with pytest.raises(FsmountError, match="Input/output error"):
        await Layout(folder.path).tags()


@pytest.mark.parametrize(
    ("tag", "housekeeping"),
    [
        (f"sha256-{'a' * 64}", True),
        (f"sha256-{'a' * 64}.sig", True),
        (f"sha256-{'a' * 64}.att", True),
        (f"sha256-{'a' * 63}", False),
        (f"sha256-{'a' * 64}.v1", False),
        (f"sha256-{'a' * 64}\n", False),
        ("v1", False),
    ],
)
def test_housekeeping_tags_are_told_from_builds(tag: str, housekeeping: bool) -> None:
    assert is_housekeeping(tag) is housekeeping
