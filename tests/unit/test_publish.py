"""An image's index: for which layers, when it is there already, and that nothing is published before all is checked."""

import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import pytest

from fsmount import publish
from fsmount.cache.folder import CacheFolder
from fsmount.errors import Corrupt, NotFound
from fsmount.image import Image, open_image
from fsmount.oci import soci
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import OCI_MANIFEST, Descriptor
from fsmount.oci.platform import Platform
from fsmount.publish import Fate, Published, publish_index
from fsmount.registry.referrers import Artifact
from fsmount.registry.source import Source
from tests.fakes.source import Body, FakeSource
from tests.fakes.tar import Member, archive, pax

_LEAST = 5000


def _tar(seed: int) -> bytes:
    return archive(Member(b"%d" % seed, Random(seed).randbytes(2 * _LEAST)))


SMALL = archive(Member(b"small", b"content"))
GLOBAL = archive(pax({"comment": "c"}, type=b"g"), Member(b"a", Random(9).randbytes(2 * _LEAST)))


@dataclass
class FakeDestination:
    """A place where artifacts are kept, and found again once `shown` is what they are listed by."""

    name: str = "the place"
    artifacts: list[Artifact] = field(default_factory=list)
    shown: FakeSource | None = None

    def source(self) -> Source | None:
        return self.shown

    async def publish(self, artifact: Artifact) -> None:
        self.artifacts.append(artifact)
        if self.shown is not None:
            self.shown.put_referrer(artifact.subject, artifact.manifest, artifact.artifact_type)


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
def place(source: FakeSource) -> FakeDestination:
    return FakeDestination(shown=source)


async def _image(source: FakeSource, folder: Path, layers: Sequence[Descriptor]) -> Image:
    digest = source.put_image("v1", layers)
    return await open_image(source, digest, Platform.parse("linux/amd64"), CacheFolder(folder / "cache"))


async def _publish(
    source: FakeSource, image: Image, folder: Path, *places: FakeDestination, **options: bool
) -> Published:
    (folder / "scratch").mkdir(exist_ok=True)
    try:
        return await publish_index(
            source, image, folder=folder / "scratch", destinations=places, min_size=_LEAST, **options
        )
    finally:
        assert os.listdir(folder / "scratch") == []


def _fates(published: Published) -> list[Fate]:
    return [layer.fate for layer in published.layers]


async def test_the_index_has_the_ztocs_of_all_large_layers_in_their_order(
    source: FakeSource, place: FakeDestination, tmp_path: Path
) -> None:
    layers = [
        source.put_layer(tar, packed=packed)
        for tar, packed in ((_tar(1), True), (SMALL, True), (_tar(2), False), (_tar(1), True))
    ]
    image = await _image(source, tmp_path, layers)
    found = await _publish(source, image, tmp_path, place)
    (artifact,) = place.artifacts
    assert (found.image, found.index, found.places) == (image.digest, artifact.digest, ("the place",))
    assert (found.existed, found.failed) == (False, False)
    assert _fates(found) == [Fate.INDEXED, Fate.SMALL, Fate.INDEXED]
    assert (artifact.subject, artifact.media_type) == (image.digest, OCI_MANIFEST)
    assert artifact.artifact_type == soci.INDEX_V1
    assert artifact.blobs[0] == b"{}"
    index = soci.parse_index(artifact.manifest, image=image.digest)
    assert index.artifact_type == soci.INDEX_V1
    assert index.annotations == artifact.annotations == {soci.BUILD_TOOL: publish.TOOL}
    assert list(index.ztocs) == [layers[0].digest, layers[2].digest]
    assert [Digest.of(blob) for blob in artifact.blobs[1:]] == [one.digest for one in index.ztocs.values()]
    assert found.ztoc_bytes == sum(map(len, artifact.blobs[1:]))
    assert [source.fetched(layer) for layer in layers] == [1, 0, 1, 1]


async def test_without_a_destination_it_is_built_and_no_more(source: FakeSource, tmp_path: Path) -> None:
    image = await _image(source, tmp_path, [source.put_layer(_tar(1), packed=True)])
    found = await _publish(source, image, tmp_path)
    assert found.index is not None
    assert (found.places, found.existed, found.layers[0].spans) == ((), False, 1)


async def test_what_is_there_already_is_not_built_again_unless_by_force(
    source: FakeSource, place: FakeDestination, tmp_path: Path
) -> None:
    layer, without = source.put_layer(_tar(1), packed=True), source.put_layer(GLOBAL)
    image = await _image(source, tmp_path, [layer, without])
    first = await _publish(source, image, tmp_path, place)
    assert _fates(first) == [Fate.INDEXED, Fate.UNSUPPORTED]
    again = await _publish(source, image, tmp_path, place)
    assert again.existed and again.index == first.index
    assert _fates(again) == _fates(first)
    assert [one.ztoc for one in again.layers] == [one.ztoc for one in first.layers]
    assert (source.fetched(layer), source.fetched(without), len(place.artifacts)) == (1, 1, 1)
    forced = await _publish(source, image, tmp_path, place, force=True)
    assert (forced.existed, forced.index) == (False, first.index)
    assert (source.fetched(layer), len(place.artifacts)) == (2, 2)
    # Another place has none.
    other = FakeDestination("elsewhere")
    both = await _publish(source, image, tmp_path, place, other)
    assert (both.existed, both.places) == (False, ("the place", "elsewhere"))
    assert [one.digest for one in other.artifacts] == [first.index]


@pytest.mark.parametrize("other", ["tool", "layers", "nonsense", "missing"])
async def test_an_index_that_is_another_does_not_count(
    source: FakeSource,
    place: FakeDestination,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: str,
) -> None:
    layers = [source.put_layer(_tar(seed), packed=True) for seed in (1, 2)]
    image = await _image(source, tmp_path, layers)
    if other == "tool":
        with monkeypatch.context() as patch:
            patch.setattr(publish, "TOOL", "fsmount 0.0.1")
            await _publish(source, image, tmp_path, place)
    elif other == "layers":
        fewer = replace(image, layers=image.layers[:1])
        await _publish(source, fewer, tmp_path, place)
    elif other == "nonsense":
        source.put_referrer(image.digest, b'{"schemaVersion": 2}', soci.INDEX_V1)
    else:
        source._referrers[image.digest] = [
            Descriptor(OCI_MANIFEST, Digest.of(b"gone"), 4, {}, artifact_type=soci.INDEX_V1)
        ]
    found = await _publish(source, image, tmp_path, place)
    assert not found.existed
    assert _fates(found) == [Fate.INDEXED] * 2
    assert (await _publish(source, image, tmp_path, place)).existed


async def test_layers_that_need_none_or_cannot_have_one_are_not_fetched_if_that_is_known(
    source: FakeSource, place: FakeDestination, tmp_path: Path
) -> None:
    plain = source.put_layer(_tar(1), packed=True)
    image = await _image(source, tmp_path, [plain])
    spec = image.layers[0]
    notes = {
        "estargz": {"containerd.io/snapshot/stargz/toc.digest": str(plain.digest)},
        "chunked": {"io.containers.zstd-chunked.manifest-checksum": str(plain.digest)},
    }
    described = [
        replace(source.put_blob(_tar(5)), annotations=notes["estargz"]),
        replace(source.put_blob(_tar(6)), annotations=notes["chunked"]),
        replace(source.put_blob(_tar(7)), media_type="application/vnd.oci.image.layer.v1.tar+zstd"),
        replace(source.put_blob(_tar(8)), media_type="application/x"),
    ]
    specs = [replace(spec, descriptor=one) for one in described]
    specs[3] = replace(specs[3], title=b"file")
    image = replace(image, layers=tuple(specs))
    found = await _publish(source, image, tmp_path, place)
    assert _fates(found) == [Fate.LAZY_ALREADY, Fate.LAZY_ALREADY, Fate.UNSUPPORTED, Fate.LAZY_ALREADY]
    assert all(one.reason for one in found.layers)
    assert (found.index, found.places, place.artifacts) == (None, (), [])
    assert found.failed
    assert sum(source.fetched(one) for one in described) == 0
    assert not (await _publish(source, replace(image, layers=image.layers[:2]), tmp_path, place)).failed


async def test_what_cannot_have_a_ztoc_is_named_with_the_reason(
    source: FakeSource, place: FakeDestination, tmp_path: Path
) -> None:
    members = gzip.compress(_tar(1)) + gzip.compress(_tar(2))
    image = await _image(source, tmp_path, [source.put_layer(GLOBAL), source.put_layer(_tar(3))])
    several = replace(image.layers[0], descriptor=source.put_blob(members), diff_id=None)
    image = replace(image, layers=(*image.layers, several))
    found = await _publish(source, image, tmp_path, place)
    assert _fates(found) == [Fate.UNSUPPORTED, Fate.INDEXED, Fate.UNSUPPORTED]
    assert "global PAX header" in found.layers[0].reason
    assert "several members" in found.layers[2].reason
    assert not found.failed


async def test_nothing_is_published_if_one_layer_is_not_what_it_should_be(
    source: FakeSource, place: FakeDestination, tmp_path: Path
) -> None:
    layers = [source.put_layer(_tar(seed), packed=True) for seed in (1, 2)]
    image = await _image(source, tmp_path, layers)
    source.then(layers[1], Body(gzip.compress(_tar(3))))
    with pytest.raises(Corrupt):
        await _publish(source, image, tmp_path, place)
    assert place.artifacts == []


async def test_an_image_without_large_layers_needs_no_index(
    source: FakeSource, place: FakeDestination, tmp_path: Path
) -> None:
    image = await _image(source, tmp_path, [source.put_layer(SMALL, packed=True)])
    source.away = NotFound("nobody is asked")
    found = await _publish(source, image, tmp_path, place)
    assert (found.index, found.failed, _fates(found)) == (None, False, [Fate.SMALL])
