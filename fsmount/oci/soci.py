"""SOCI indexes: the artifacts that say which ztoc belongs to which layer of an image (soci-snapshotter 0.15).

There are two versions, and they have the same form: an image manifest, its configuration `{}`, its layers the ztocs.
Version 1 has the image as its subject, and so is found among the image's referrers; version 2 is named by an
annotation of the image's manifest.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fsmount.errors import Invalid
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import OCI_MANIFEST, Descriptor, Manifest, parse_manifest
from fsmount.oci.shape import Shape

#: The artifact types of indexes; media types of their configurations, too.
INDEX_V1 = "application/vnd.amazon.soci.index.v1+json"
INDEX_V2 = "application/vnd.amazon.soci.index.v2+json"
ZTOC = "application/octet-stream"

#: The content of every index's configuration.
CONFIG = b"{}"

#: Annotations of a ztoc in an index.
LAYER_DIGEST = "com.amazon.soci.image-layer-digest"
LAYER_TYPE = "com.amazon.soci.image-layer-mediaType"
LAYER_SPAN_SIZE = "com.amazon.soci.span-size"
LAYER_DISABLE_XATTRS = "com.amazon.soci.disable-xattrs"
#: Annotation of an index: who made it.
BUILD_TOOL = "com.amazon.soci.build-tool-identifier"
#: Annotation of an image's manifest: the digest of its index of version 2.
INDEX_DIGEST = "com.amazon.soci.index-digest"
#: Annotation of the descriptor of an index of version 2, beside the image's in an image index: the image's digest.
MANIFEST_DIGEST = "com.amazon.soci.image-manifest-digest"

#: Layers of fewer bytes have no ztocs: fetching the whole is as quick.
MIN_LAYER_SIZE = 10 << 20
#: What a ztoc may have us hold: 32 KiB for 4 MiB of layer, and 200 bytes for a file.
MAX_ZTOC_SIZE = 256 << 20


@dataclass(frozen=True, slots=True)
class SociIndex:
    """What an index says: the ztoc of each layer that has one, by the layer's digest."""

    artifact_type: str
    ztocs: Mapping[Digest, Descriptor]
    annotations: Mapping[str, str]


def is_soci_index(entry: Descriptor) -> bool:
    """Whether what a list has here is said to be an index, and so no image."""
    return entry.artifact_type in (INDEX_V1, INDEX_V2)


def parse_index(data: bytes, *, image: Digest) -> SociIndex:
    """The index in `data` (a manifest), which is to be that of the image whose manifest is `image`.

    Of ztocs that are larger than MAX_ZTOC_SIZE nothing is said: their layers are read as if they had none.

    Raises: Invalid, also if it is that of another image; an index of version 2 does not say of which it is.
    """
    manifest = parse_manifest(data, OCI_MANIFEST)
    if not isinstance(manifest, Manifest) or manifest.config.media_type not in (INDEX_V1, INDEX_V2):
        raise Invalid(f"the SOCI index of {image} is none")
    subject = manifest.subject.digest if manifest.subject else None
    expected = image if manifest.config.media_type == INDEX_V1 else None
    if subject != expected:
        raise Invalid(f"the SOCI index of {image} has the subject {subject}: expected {expected}")
    ztocs: dict[Digest, Descriptor] = {}
    for number, ztoc in enumerate(manifest.layers):
        # There may be other things about a layer as well, such as what to fetch first.
        if ztoc.media_type != ZTOC:
            continue
        place = f"the SOCI index of {image}: layers[{number}].annotations"
        layer = Shape(ztoc.annotations, place)[LAYER_DIGEST].digest()
        if ztocs.setdefault(layer, ztoc).digest != ztoc.digest:
            raise Invalid(f"{place}: there are two ztocs of layer {layer}")
    small = {layer: ztoc for layer, ztoc in ztocs.items() if ztoc.size <= MAX_ZTOC_SIZE}
    return SociIndex(manifest.config.media_type, small, manifest.annotations)


def describe_ztoc(
    ztoc: bytes, layer: Descriptor, *, span_size: int, disable_xattrs: bool = False
) -> Descriptor:
    """The descriptor of a layer's ztoc, as an index has it.

    disable_xattrs: no member has extended attributes or is an opaque marker, and snapshotters need not look for any.
    """
    annotations = {
        LAYER_DIGEST: str(layer.digest),
        LAYER_TYPE: layer.media_type,
        LAYER_SPAN_SIZE: str(span_size),
    }
    if disable_xattrs:
        annotations[LAYER_DISABLE_XATTRS] = "true"
    return Descriptor(ZTOC, Digest.of(ztoc), len(ztoc), annotations)


def encode_index(
    ztocs: Sequence[Descriptor],
    *,
    tool: str,
    subject: Descriptor | None = None,
    annotations: Mapping[str, str] | None = None,
) -> bytes:
    """An index: of version 1 if there is a subject, the manifest of one platform's image; else of version 2.

    ztocs: from describe_ztoc, in the order of the layers; of several artifacts only the bytes of one make it work:
    the snapshotter decodes the index, encodes it again with Go's JSON, and keeps that under the first one's digest.
    annotations: of the index, beside the one that names the tool.
    """
    config = Descriptor(INDEX_V1 if subject else INDEX_V2, Digest.of(CONFIG), len(CONFIG), {})
    manifest: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": _described(config),
        "layers": [_described(ztoc) for ztoc in ztocs],
    }
    if subject:
        manifest["subject"] = _described(Descriptor(subject.media_type, subject.digest, subject.size, {}))
    manifest["annotations"] = dict(sorted({BUILD_TOOL: tool, **(annotations or {})}.items()))
    return _go_json(manifest)


def _described(descriptor: Descriptor) -> dict[str, object]:
    described: dict[str, object] = {
        "mediaType": descriptor.media_type,
        "digest": str(descriptor.digest),
        "size": descriptor.size,
    }
    if descriptor.annotations:
        described["annotations"] = dict(sorted(descriptor.annotations.items()))
    return described


def _go_json(value: object) -> bytes:
    """JSON as Go's encoding/json writes it, since 1.22: safe to stand in HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # they stand in strings only
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace")
