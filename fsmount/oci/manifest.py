"""Manifests, indexes and image configurations: the documents that say what an image consists of."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from fsmount.errors import Invalid, Unsupported
from fsmount.oci.digest import Digest
from fsmount.oci.platform import Platform
from fsmount.oci.shape import Shape

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"

INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_LIST})
MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
IMAGE_CONFIG_TYPES = frozenset(
    {"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"}
)
_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1"

#: Annotation of a layer that `oras push` made of one file: the file's name.
TITLE = "org.opencontainers.image.title"
#: Annotation of a layer that `oras push` made of a directory: "true", and the layer is a tar of it.
UNPACK = "io.deis.oras.content.unpack"
#: Annotation of an attestation that BuildKit keeps in the image's index.
REFERENCE_TYPE = "vnd.docker.reference.type"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Where content is and what it must be: its type, digest and size in bytes (image-spec descriptor.md)."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str]
    platform: Platform | None = None
    artifact_type: str | None = None
    #: The content itself, when the descriptor carries it; it was checked against digest and size.
    data: bytes | None = None

    @property
    def is_index(self) -> bool:
        return self.media_type in INDEX_TYPES

    @property
    def is_encrypted(self) -> bool:
        """Whether it is a layer of ocicrypt: its bytes are no tar without a key."""
        return "+encrypted" in self.media_type

    def refuse_encrypted(self) -> None:
        """Raises: Unsupported if this is an encrypted layer."""
        if self.is_encrypted:
            raise Unsupported(f"layer {self.digest} is encrypted ({self.media_type})")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image, or one artifact: a configuration and layers, lowest first."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]
    artifact_type: str | None = None
    subject: Descriptor | None = None

    @property
    def is_image(self) -> bool:
        """Whether the layers are file system changes; in an artifact they are whatever their types say."""
        return self.config.media_type in IMAGE_CONFIG_TYPES


@dataclass(frozen=True, slots=True)
class Index:
    """A list of manifests, one for each platform; also the form of a layout's list of images."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """How one layer, or one empty step, came to be."""

    created: datetime | None
    created_by: str
    empty_layer: bool


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What the configuration says about the layers; diff_ids are the digests of their inflated tars."""

    created: datetime | None
    platform: Platform | None
    diff_ids: tuple[Digest, ...]
    history: tuple[HistoryEntry, ...]


def parse_manifest(data: bytes, media_type: str | None) -> Manifest | Index:
    """A manifest or an index, whichever it is; media_type is what the source said, if it said anything.

    The type must not depend on whom one asks (CVE-2021-41190): the source, the document's own `mediaType`
    and its fields must agree. A source that only says text/plain or the like counts as silent.

    Raises: Invalid, Unsupported (schema 1, other document types).
    """
    root = Shape.parse(data, "the manifest")
    kind = _manifest_type(root, media_type)
    annotations = _annotations(root)
    if kind in INDEX_TYPES:
        manifests = tuple(_descriptor(item) for item in root["manifests"].items())
        return Index(media_type=kind, manifests=manifests, annotations=annotations)
    subject = root.get("subject")
    return Manifest(
        media_type=kind,
        config=_descriptor(root["config"]),
        layers=tuple(_descriptor(item) for item in root["layers"].items()),
        annotations=annotations,
        artifact_type=_optional_string(root, "artifactType"),
        subject=_descriptor(subject) if subject else None,
    )


def parse_config(data: bytes) -> ImageConfig:
    """The configuration of an image; only of a manifest that `is_image`. Raises: Invalid."""
    root = Shape.parse(data, "the image configuration")
    history = root.get("history")
    return ImageConfig(
        created=_optional_time(root, "created"),
        platform=_platform(root),
        diff_ids=tuple(item.digest() for item in root["rootfs"].object()["diff_ids"].strings()),
        history=tuple(_history_entry(item) for item in history.items()) if history else (),
    )


def essence(media_type: str | None) -> str | None:
    """A media type without parameters and in lower case; None if it says nothing usable."""
    text = (media_type or "").partition(";")[0].strip().lower()
    return text or None


def _manifest_type(root: Shape, said: str | None) -> str:
    """The one type that the source, the document and its fields agree on."""
    said, written = essence(said), _optional_string(root, "mediaType")
    for name in (said, written):
        if name and name.startswith(_SCHEMA_1):
            raise _schema_1()
    version = root["schemaVersion"].value
    if version == 1:
        raise _schema_1()
    if version != 2 or isinstance(version, bool):
        raise Invalid(f"the manifest's schemaVersion is not 2: {ascii(version)[:80]}")

    known = INDEX_TYPES | MANIFEST_TYPES
    if written and written not in known:
        raise Unsupported(f"manifests of type {written[:200]!r} are not read")
    if written and said in known and written != said:
        raise Invalid(f"the source calls the manifest {said}, the manifest itself {written}")
    kind = written or (said if said in known else None)
    if kind is None:
        kind = OCI_INDEX if "manifests" in root else OCI_MANIFEST
    foreign = ("config", "layers", "fsLayers") if kind in INDEX_TYPES else ("manifests", "fsLayers")
    for key in foreign:
        if key in root:
            raise Invalid(f"a manifest of type {kind} must not have {key!r} (CVE-2021-41190)")
    return kind


def _schema_1() -> Unsupported:
    return Unsupported(
        "the image is in Docker's old manifest format (schema 1), which names no layer sizes and is not read",
        remedy="Push it again with any client of this decade.",
    )


def _descriptor(shape: Shape) -> Descriptor:
    shape = shape.object()
    digest, size = shape["digest"].digest(), shape["size"].size()
    platform = shape.get("platform")
    return Descriptor(
        media_type=shape["mediaType"].string(),
        digest=digest,
        size=size,
        annotations=_annotations(shape),
        platform=_platform(platform.object()) if platform else None,
        artifact_type=_optional_string(shape, "artifactType"),
        data=_embedded(shape["data"], digest, size) if "data" in shape else None,
    )


def _embedded(shape: Shape, digest: Digest, size: int) -> bytes:
    try:
        data = base64.b64decode(shape.string(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Invalid(f"{shape.where} is not base64") from error
    if len(data) != size or not digest.matches(data):
        raise Invalid(f"{shape.where} is not the {size} bytes of {digest}")
    return data


def _platform(shape: Shape) -> Platform | None:
    os, architecture = _optional_string(shape, "os"), _optional_string(shape, "architecture")
    if not os or not architecture:
        return None
    return Platform.normal(os, architecture, _optional_string(shape, "variant"))


def _history_entry(shape: Shape) -> HistoryEntry:
    empty = shape.get("empty_layer")
    return HistoryEntry(
        created=_optional_time(shape, "created"),
        created_by=_optional_string(shape, "created_by") or "",
        empty_layer=empty.boolean() if empty else False,
    )


def _annotations(shape: Shape) -> dict[str, str]:
    annotations = shape.get("annotations")
    return annotations.string_map() if annotations else {}


def _optional_string(shape: Shape, key: str) -> str | None:
    """None also for the empty string, which Go writes for absence."""
    value = shape.get(key)
    return value.string() or None if value else None


def _optional_time(shape: Shape, key: str) -> datetime | None:
    value = shape.get(key)
    return value.time() if value else None
