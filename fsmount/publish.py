"""Publish: from an image to its SOCI index: which layers get a ztoc, whether there is one already, where it goes."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsmount import __version__
from fsmount.archive import estargz, zstdchunked
from fsmount.archive.ztoc_builder import SPAN_SIZE
from fsmount.errors import Corrupt, NotFound, Unsupported, UsageError
from fsmount.image import Image
from fsmount.indexer import Progress, build_ztoc
from fsmount.lazy import LayerSpec
from fsmount.oci import soci
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import OCI_MANIFEST, Descriptor
from fsmount.registry.destination import Destination
from fsmount.registry.referrers import Artifact, fallback_tag
from fsmount.registry.source import Source

#: Who makes indexes. With another version they may be others, so images get another one.
TOOL = f"fsmount {__version__}"
#: Annotation of an index: the layers that cannot have a ztoc, so that nobody downloads them again to find that out.
_WITHOUT = "fsmount.layers-without-ztoc"


class Fate(enum.StrEnum):
    """What becomes of a layer. The values are shown to users."""

    INDEXED = "indexed"
    #: To fetch it whole is as quick.
    SMALL = "too small"
    #: It is read by parts without a ztoc: by a table of contents of its own, or as the single file that it is.
    LAZY_ALREADY = "lazy already"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class LayerOutcome:
    """A layer, and its ztoc or the reason why it has none. spans: None where another run has built the ztoc."""

    layer: Descriptor
    fate: Fate
    reason: str = ""
    ztoc: Descriptor | None = None
    spans: int | None = None
    inflated_size: int | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """An image's index, and where it is; both may be none.

    `existed` says that it was at all those places before, and nothing was fetched.
    """

    image: Digest
    index: Digest | None
    layers: tuple[LayerOutcome, ...]
    places: tuple[str, ...]
    existed: bool = False

    @property
    def ztoc_bytes(self) -> int:
        return sum(layer.ztoc.size for layer in self.layers if layer.ztoc is not None)

    @property
    def failed(self) -> bool:
        """Whether there were layers that need a ztoc, and none of them can have one."""
        return self.index is None and any(layer.fate is Fate.UNSUPPORTED for layer in self.layers)


async def publish_index(
    source: Source,
    image: Image,
    *,
    folder: Path,
    destinations: Sequence[Destination] = (),
    min_size: int = soci.MIN_LAYER_SIZE,
    max_layer_size: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Published:
    """Builds the SOCI index, version 1, of an image, and publishes it at all destinations; at none, it is built only.

    If all of them have one by this version of fsmount, for all these layers, nothing is fetched, unless by force.
    Each layer is streamed once, one after the other. Nothing is published before all are built and checked.

    folder: on the disk, for one layer's blob at a time; it is gone afterwards whatever happens.
    min_size: layers of fewer compressed bytes get no ztoc. max_layer_size: inflated, as build_ztoc has it.
    Memory: the ztocs, about a hundredth of the inflated layers.

    Raises: Corrupt (a layer is not what its digest or diff ID names), Invalid, NoSpace, AccessDenied,
        Unreachable and its kinds. Layers that SOCI cannot carry are no error: see Published.failed.
    """
    outcomes = {spec.descriptor.digest: _without_looking(spec, min_size) for spec in image.layers}
    todo = [spec for spec in _unique(image.layers) if outcomes[spec.descriptor.digest] is None]
    places = tuple(destination.name for destination in destinations)
    if todo and destinations and not force:
        known = [await _find(destination, image, todo) for destination in destinations]
        first = known[0]
        if first is not None and all(known):
            digest, index = first
            for spec in todo:
                outcomes[spec.descriptor.digest] = _of_known(spec.descriptor, index)
            return Published(image.digest, digest, _in_order(image, outcomes), places, existed=True)

    blobs: list[bytes] = []
    if progress is not None:
        progress.total = sum(spec.descriptor.size for spec in todo)
    subject = await _subject(source, image) if todo else None
    for spec in todo:
        outcome, data = await _build(source, spec, folder, max_layer_size, progress)
        outcomes[spec.descriptor.digest] = outcome
        blobs += [data] if data is not None else []
    layers = _in_order(image, outcomes)
    if subject is None or not blobs:
        return Published(image.digest, None, layers, ())
    artifact = _artifact(subject, layers, blobs)
    for destination in destinations:
        await destination.publish(artifact)
    return Published(image.digest, artifact.digest, layers, places)


def index_tag(artifact: Artifact) -> str:
    """A tag for an image's index, of the form that listings leave out, as they do cosign's `.sig`."""
    return f"{fallback_tag(artifact.subject)}.soci"


def _unique(specs: Sequence[LayerSpec]) -> list[LayerSpec]:
    return list({spec.descriptor.digest: spec for spec in specs}.values())


def _in_order(image: Image, outcomes: dict[Digest, LayerOutcome | None]) -> tuple[LayerOutcome, ...]:
    found = [outcomes[spec.descriptor.digest] for spec in _unique(image.layers)]
    return tuple(outcome for outcome in found if outcome is not None)


def _without_looking(spec: LayerSpec, min_size: int) -> LayerOutcome | None:
    """What becomes of a layer, if its descriptor says enough about that."""
    layer = spec.descriptor
    if layer.size < min_size:
        return LayerOutcome(layer, Fate.SMALL, f"it has fewer than {min_size} bytes")
    if spec.title is not None:
        return LayerOutcome(layer, Fate.LAZY_ALREADY, "it is a single file, which is read by ranges as it is")
    if any(f"{prefix}manifest-checksum" in layer.annotations for prefix in zstdchunked.PREFIXES):
        return LayerOutcome(layer, Fate.LAZY_ALREADY, "it has a table of contents of its own (zstd:chunked)")
    if estargz.TOC_DIGEST in layer.annotations:
        return LayerOutcome(layer, Fate.LAZY_ALREADY, "it has a table of contents of its own (eStargz)")
    if layer.media_type.endswith(("+zstd", ".zstd")):
        return LayerOutcome(layer, Fate.UNSUPPORTED, "it is compressed with zstd, which SOCI cannot carry")
    return None


async def _find(
    destination: Destination, image: Image, todo: Sequence[LayerSpec]
) -> tuple[Digest, soci.SociIndex] | None:
    """The index of the image there that makes another one needless."""
    source = destination.source()
    if source is None:
        return None
    wanted = {str(spec.descriptor.digest) for spec in todo}
    for referrer in await source.referrers(image.digest, soci.INDEX_V1):
        try:
            data, _ = await source.manifest(referrer.digest)
            index = soci.parse_index(data, image=image.digest)
        except (NotFound, Corrupt, Unsupported, UsageError):
            continue  # what others left there is no reason to fail
        covered = {*map(str, index.ztocs), *index.annotations.get(_WITHOUT, "").split()}
        if index.ztocs and index.annotations.get(soci.BUILD_TOOL) == TOOL and wanted <= covered:
            return referrer.digest, index
    return None


def _of_known(layer: Descriptor, index: soci.SociIndex) -> LayerOutcome:
    ztoc = index.ztocs.get(layer.digest)
    if ztoc is None:
        return LayerOutcome(layer, Fate.UNSUPPORTED, "it could have none when the index was made")
    return LayerOutcome(layer, Fate.INDEXED, ztoc=ztoc)


async def _build(
    source: Source, spec: LayerSpec, folder: Path, max_layer_size: int | None, progress: Progress | None
) -> tuple[LayerOutcome, bytes | None]:
    layer = spec.descriptor
    try:
        ztoc = await build_ztoc(
            source,
            layer,
            diff_id=spec.diff_id,
            folder=folder,
            tool=TOOL,
            max_layer_size=max_layer_size,
            progress=progress,
        )
    except Unsupported as error:
        return LayerOutcome(layer, Fate.UNSUPPORTED, error.message), None
    described = soci.describe_ztoc(ztoc.data, layer, span_size=SPAN_SIZE, disable_xattrs=ztoc.disable_xattrs)
    outcome = LayerOutcome(
        layer, Fate.INDEXED, ztoc=described, spans=ztoc.spans, inflated_size=ztoc.inflated_size
    )
    return outcome, ztoc.data


async def _subject(source: Source, image: Image) -> Descriptor:
    data, _ = await source.manifest(image.digest)
    return Descriptor(image.manifest.media_type, image.digest, len(data), {})


def _artifact(subject: Descriptor, layers: Sequence[LayerOutcome], blobs: Sequence[bytes]) -> Artifact:
    ztocs = [layer.ztoc for layer in layers if layer.ztoc is not None]
    without = " ".join(str(layer.layer.digest) for layer in layers if layer.fate is Fate.UNSUPPORTED)
    more = {_WITHOUT: without} if without else {}
    manifest = soci.encode_index(ztocs, tool=TOOL, subject=subject, annotations=more)
    return Artifact(
        manifest,
        OCI_MANIFEST,
        soci.INDEX_V1,
        {soci.BUILD_TOOL: TOOL, **more},
        subject.digest,
        [soci.CONFIG, *blobs],
    )
