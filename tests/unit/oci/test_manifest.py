"""Manifests, indexes and configurations as strangers write them."""

import base64
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsmount.errors import FsmountError, Invalid, Unsupported
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Index,
    Manifest,
    parse_config,
    parse_manifest,
)
from fsmount.oci.platform import Platform

CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"

Json = dict[str, Any]


def descriptor(data: bytes = b"x", media_type: str = LAYER, **more: object) -> Json:
    return {"mediaType": media_type, "digest": str(Digest.of(data)), "size": len(data), **more}


def manifest(**more: object) -> Json:
    return {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(b"{}", CONFIG),
        "layers": [descriptor(b"one"), descriptor(b"two")],
        **more,
    }


def index(**more: object) -> Json:
    entry = descriptor(b"m", OCI_MANIFEST, platform={"os": "linux", "architecture": "amd64"})
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry], **more}


def without(value: Json, *keys: str) -> Json:
    return {key: value[key] for key in value if key not in keys}


def parsed(value: object, media_type: str | None = None) -> Manifest | Index:
    return parse_manifest(json.dumps(value).encode(), media_type)


def test_a_manifest_has_its_layers_in_order() -> None:
    result = parsed(manifest(annotations={"a": "b"}), OCI_MANIFEST)
    assert isinstance(result, Manifest)
    assert [layer.digest for layer in result.layers] == [Digest.of(b"one"), Digest.of(b"two")]
    assert (result.annotations, result.is_image) == ({"a": "b"}, True)


def test_an_index_has_the_platforms_of_its_entries() -> None:
    result = parsed(index())
    assert isinstance(result, Index)
    assert result.manifests[0].platform == Platform("linux", "amd64")


@pytest.mark.parametrize("said", [None, "text/plain", "application/json", "application/octet-stream", ""])
@pytest.mark.parametrize(("make", "kind"), [(manifest, Manifest), (index, Index)])
def test_a_source_without_a_usable_type_leaves_it_to_the_document(
    said: str | None, make: Callable[[], Json], kind: type
) -> None:
    assert isinstance(parsed(make(), said), kind)
    assert isinstance(parsed(without(make(), "mediaType"), said), kind)


def test_parameters_and_case_of_a_media_type_do_not_count() -> None:
    assert parsed(manifest(), "Application/vnd.oci.image.manifest.v1+JSON; charset=utf-8")


def test_a_document_without_type_is_what_the_source_says() -> None:
    result = parsed(without(manifest(), "mediaType"), DOCKER_MANIFEST)
    assert result.media_type == DOCKER_MANIFEST


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (manifest(), OCI_INDEX),
        (manifest(), DOCKER_MANIFEST),
        (index(), OCI_MANIFEST),
        (index(), DOCKER_LIST),
        (manifest(manifests=[]), OCI_MANIFEST),
        (without(manifest(manifests=[]), "mediaType"), None),
        (without(manifest(), "mediaType"), OCI_INDEX),
        (without(index(), "mediaType"), OCI_MANIFEST),
        (index(layers=[]), None),
        (index(config={}), None),
        (manifest(fsLayers=[]), None),
    ],
)
def test_a_document_that_could_be_two_things_is_invalid(value: Json, said: str | None) -> None:
    with pytest.raises(Invalid):
        parsed(value, said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"schemaVersion": 1, "fsLayers": []}, None),
        ({"schemaVersion": 1}, "application/vnd.docker.distribution.manifest.v1+prettyjws"),
        (manifest(), "application/vnd.docker.distribution.manifest.v1+json"),
    ],
)
def test_schema_1_is_refused_by_name(value: Json, said: str | None) -> None:
    with pytest.raises(Unsupported, match="schema 1"):
        parsed(value, said)


def test_another_type_of_document_is_unsupported() -> None:
    with pytest.raises(Unsupported, match=r"artifact\.manifest"):
        parsed(manifest(mediaType="application/vnd.oci.artifact.manifest.v1+json"))


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (manifest(layers={}), "layers"),
        (manifest(layers=[1]), r"layers\[0\]"),
        (manifest(layers=[descriptor(), descriptor() | {"size": -1}]), r"layers\[1\]\.size"),
        (manifest(layers=[descriptor() | {"size": True}]), r"layers\[0\]\.size"),
        (manifest(layers=[descriptor() | {"size": 1.0}]), "size"),
        (manifest(layers=[descriptor() | {"size": 2**63}]), "size"),
        (manifest(layers=[descriptor() | {"size": "1"}]), "size"),
        (manifest(layers=[without(descriptor(), "size")]), "size"),
        (manifest(layers=[descriptor() | {"digest": "sha256:../../etc/passwd"}]), "digest"),
        (manifest(layers=[descriptor() | {"digest": 1}]), "digest"),
        (manifest(layers=[without(descriptor(), "mediaType")]), "mediaType"),
        (manifest(annotations={"a": 1}), "annotations"),
        (manifest(annotations=[]), "annotations"),
        (without(manifest(), "config"), "config"),
        (without(manifest(), "layers"), "layers"),
        (without(manifest(), "schemaVersion"), "schemaVersion"),
        (manifest(schemaVersion=3), "schemaVersion"),
        (manifest(schemaVersion="2"), "schemaVersion"),
        (manifest(mediaType=1), "mediaType"),
        (manifest(subject=[]), "subject"),
        (index(manifests=None), "manifests"),
        ([], "object"),
    ],
)
def test_a_wrong_shape_is_invalid_and_names_the_place(value: object, where: str) -> None:
    with pytest.raises(Invalid, match=where):
        parsed(value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"\xef\xbb\xbf{}", b"1" * 10_000])
def test_what_is_no_json_is_invalid(data: bytes) -> None:
    with pytest.raises(Invalid):
        parse_manifest(data, OCI_MANIFEST)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    ["schemaVersion", "mediaType", "config", "layers", "manifests", "digest", "size", "data"]
                ),
                x,
            )
        ),
    )
)
def test_any_json_is_a_manifest_or_one_of_our_errors(value: object) -> None:
    with suppress(FsmountError):
        parsed(value)


def test_embedded_data_is_taken_when_it_is_what_the_digest_names() -> None:
    config = descriptor(b"{}", CONFIG) | {"data": base64.b64encode(b"{}").decode()}
    result = parsed(manifest(config=config))
    assert isinstance(result, Manifest)
    assert result.config.data == b"{}"


@pytest.mark.parametrize("data", ["e30", "e30=\n", "eyB9", "", 1])
def test_embedded_data_that_is_anything_else_is_invalid(data: object) -> None:
    with pytest.raises(Invalid, match="data"):
        parsed(manifest(config=descriptor(b"{}", CONFIG) | {"data": data}))


def test_null_is_absence() -> None:
    result = parsed(manifest(annotations=None, subject=None, artifactType=None, layers=[]))
    assert isinstance(result, Manifest)
    assert (result.annotations, result.subject, result.artifact_type) == ({}, None, None)


def test_an_artifact_is_no_image() -> None:
    result = parsed(manifest(config=descriptor(b"{}", "application/vnd.oci.empty.v1+json")))
    assert isinstance(result, Manifest)
    assert not result.is_image


def test_an_encrypted_layer_is_refused_when_asked() -> None:
    result = parsed(manifest(layers=[descriptor(), descriptor(media_type=LAYER + "+encrypted")]))
    assert isinstance(result, Manifest)
    result.layers[0].refuse_encrypted()
    with pytest.raises(Unsupported, match="encrypted"):
        result.layers[1].refuse_encrypted()


def test_messages_hold_no_control_characters_of_the_document() -> None:
    with pytest.raises(Invalid) as caught:
        parsed(manifest(layers="\x1b[31m"))
    assert "\x1b" not in str(caught.value)


def config(**more: object) -> bytes:
    diff_ids = [str(Digest.of(b"tar"))]
    rootfs = {"type": "layers", "diff_ids": diff_ids}
    return json.dumps({"os": "linux", "architecture": "arm64", "rootfs": rootfs, **more}).encode()


def test_a_configuration_has_platform_and_diff_ids() -> None:
    result = parse_config(config(variant="v8"))
    assert result.platform == Platform("linux", "arm64")
    assert (result.diff_ids, result.created, result.history) == ((Digest.of(b"tar"),), None, ())


@pytest.mark.parametrize(
    ("text", "iso"),
    [
        ("2026-01-02T03:04:05.123456789Z", "2026-01-02T03:04:05.123456+00:00"),
        ("2026-01-02T03:04:05+02:00", "2026-01-02T03:04:05+02:00"),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00+00:00"),
    ],
)
def test_creation_times_have_their_offset(text: str, iso: str) -> None:
    created = parse_config(config(created=text)).created
    assert created is not None
    assert created.isoformat() == iso


def test_history_tells_layers_from_empty_steps() -> None:
    steps = [{"created_by": "COPY"}, {"created_by": "ENV", "empty_layer": True}]
    result = parse_config(config(history=steps))
    assert [(step.created_by, step.empty_layer) for step in result.history] == [
        ("COPY", False),
        ("ENV", True),
    ]


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"created": "yesterday"}, "created"),
        ({"created": "2026-01-02T03:04:05"}, "created"),
        ({"rootfs": None}, "rootfs"),
        ({"rootfs": {"diff_ids": ["sha256:1"]}}, r"rootfs\.diff_ids\[0\]"),
        ({"history": [{"empty_layer": "yes"}]}, r"history\[0\]\.empty_layer"),
    ],
)
def test_a_configuration_of_wrong_shape_is_invalid_and_names_the_place(more: Json, where: str) -> None:
    with pytest.raises(Invalid, match=where):
        parse_config(config(**more))
