"""SOCI indexes: the bytes that Go writes, and what is believed of those that others wrote."""

import json
from typing import Any

import pytest

from fsmount.errors import Invalid, Unsupported
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Descriptor
from fsmount.oci.soci import (
    CONFIG,
    INDEX_V1,
    INDEX_V2,
    LAYER_DIGEST,
    MAX_ZTOC_SIZE,
    ZTOC,
    SociIndex,
    describe_ztoc,
    encode_index,
    parse_index,
)

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
IMAGE = Descriptor(OCI_MANIFEST, Digest("sha256", "1" * 64), 527, {})
LAYERS = [Descriptor(GZIP, Digest("sha256", number * 64), 20_000_000, {}) for number in "ab"]

Json = dict[str, Any]


def ztocs() -> list[Descriptor]:
    return [
        describe_ztoc(b"ztoc %d" % number, layer, span_size=1 << 22) for number, layer in enumerate(LAYERS)
    ]


def changed(**changes: object) -> bytes:
    """An index of version 1 with other members, or without those that are None."""
    index: Json = json.loads(encode_index(ztocs(), tool="t", subject=IMAGE)) | changes
    return json.dumps({key: value for key, value in index.items() if value is not None}).encode()


def with_ztoc(**changes: object) -> bytes:
    """An index whose first ztoc has other members."""
    layers = json.loads(changed())["layers"]
    return changed(layers=[layers[0] | changes, *layers[1:]])


def refusal(data: bytes) -> str:
    with pytest.raises(Invalid) as caught:
        parse_index(data, image=IMAGE.digest)
    return caught.value.message


# The bytes


def test_an_index_has_the_bytes_that_go_writes() -> None:
    ztoc = describe_ztoc(b"ztoc", LAYERS[0], span_size=4194304, disable_xattrs=True)
    assert encode_index([ztoc], tool="fsmount 1", subject=IMAGE) == (
        b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",'
        b'"config":{"mediaType":"application/vnd.amazon.soci.index.v1+json",'
        b'"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},'
        b'"layers":[{"mediaType":"application/octet-stream",'
        b'"digest":"' + str(Digest.of(b"ztoc")).encode() + b'","size":4,'
        b'"annotations":{"com.amazon.soci.disable-xattrs":"true",'
        b'"com.amazon.soci.image-layer-digest":"sha256:' + b"a" * 64 + b'",'
        b'"com.amazon.soci.image-layer-mediaType":"application/vnd.oci.image.layer.v1.tar+gzip",'
        b'"com.amazon.soci.span-size":"4194304"}}],'
        b'"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json",'
        b'"digest":"sha256:' + b"1" * 64 + b'","size":527},'
        b'"annotations":{"com.amazon.soci.build-tool-identifier":"fsmount 1"}}'
    )


def test_an_index_of_version_2_has_another_configuration_and_no_subject() -> None:
    one, two = encode_index(ztocs(), tool="t", subject=IMAGE), encode_index(ztocs(), tool="t")
    subject = one[one.index(b',"subject"') : one.index(b',"annotations":{"com.amazon.soci.build')]
    assert two == one.replace(subject, b"").replace(INDEX_V1.encode(), INDEX_V2.encode())
    assert b"artifactType" not in one + two


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("<a> & b", rb"\u003ca\u003e \u0026 b"),
        ("\u2028\u2029", rb"\u2028\u2029"),
        ("é\U0001f600\x7f", "é\U0001f600\x7f".encode()),
        ('"\\/', rb"\"\\/"),
        ("\n\r\t\b\f", rb"\n\r\t\b\f"),
        ("\0\x1b", rb"\u0000\u001b"),
        ("\\u003c", rb"\\u003c"),
    ],
)
def test_strings_are_escaped_as_go_escapes_them(text: str, written: bytes) -> None:
    data = encode_index([], tool=text)
    assert data.endswith(b'"com.amazon.soci.build-tool-identifier":"' + written + b'"}}')
    assert json.loads(data)["annotations"]["com.amazon.soci.build-tool-identifier"] == text


def test_annotations_are_sorted_as_go_sorts_them() -> None:
    names = ["b", "a", "B", "\U0001f600", "\uffff", "é", ""]
    ztoc = Descriptor(ZTOC, Digest.of(b"x"), 1, dict.fromkeys(names, ""))
    (layer,) = json.loads(encode_index([ztoc], tool="t"))["layers"]
    assert list(layer["annotations"]) == sorted(names, key=str.encode)


def test_of_the_subject_only_type_digest_and_size_are_named() -> None:
    subject = Descriptor(OCI_MANIFEST, IMAGE.digest, 527, {"a": "b"}, artifact_type="x")
    assert encode_index(ztocs(), tool="t", subject=subject) == encode_index(ztocs(), tool="t", subject=IMAGE)


def test_a_snapshotter_looks_for_attributes_unless_it_is_told_not_to() -> None:
    assert "com.amazon.soci.disable-xattrs" not in ztocs()[0].annotations


def test_the_configuration_is_the_empty_object() -> None:
    config = json.loads(changed())["config"]
    assert (config["digest"], config["size"]) == (str(Digest.of(CONFIG)), len(CONFIG))


# What is read


@pytest.mark.parametrize("subject", [IMAGE, None])
def test_an_index_says_which_ztoc_is_which_layer_s(subject: Descriptor | None) -> None:
    index = parse_index(encode_index(ztocs(), tool="t", subject=subject), image=IMAGE.digest)
    assert index == SociIndex(
        artifact_type=INDEX_V1 if subject else INDEX_V2,
        ztocs=dict(zip([layer.digest for layer in LAYERS], ztocs(), strict=True)),
        annotations={"com.amazon.soci.build-tool-identifier": "t"},
    )


def test_an_index_of_another_image_is_refused() -> None:
    other = Descriptor(OCI_MANIFEST, Digest("sha256", "2" * 64), 527, {})
    assert "has the subject sha256:222" in refusal(encode_index(ztocs(), tool="t", subject=other))


def test_version_1_has_a_subject_and_version_2_has_none() -> None:
    assert "has the subject None" in refusal(changed(subject=None))
    config = json.loads(changed())["config"] | {"mediaType": INDEX_V2}
    assert "expected None" in refusal(changed(config=config))


@pytest.mark.parametrize(
    "media_type", ["application/vnd.oci.image.config.v1+json", "", INDEX_V1.replace("1", "3")]
)
def test_a_manifest_that_is_no_index_is_refused(media_type: str) -> None:
    config = json.loads(changed())["config"] | {"mediaType": media_type}
    assert "is none" in refusal(changed(config=config))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", changed(mediaType=DOCKER_MANIFEST), changed(layers={}), changed(config=None)]
)
def test_what_is_no_manifest_of_oci_is_refused(data: bytes) -> None:
    with pytest.raises((Invalid, Unsupported)):
        parse_index(data, image=IMAGE.digest)


def test_an_image_index_is_no_soci_index() -> None:
    data = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode()
    assert refusal(data)


@pytest.mark.parametrize(
    ("annotations", "reason"),
    [
        (None, "has no 'com.amazon.soci.image-layer-digest'"),
        ({}, "has no 'com.amazon.soci.image-layer-digest'"),
        ({LAYER_DIGEST: "sha256:abc"}, "is no digest"),
        ({LAYER_DIGEST: "../../x"}, "is no digest"),
    ],
)
def test_a_ztoc_of_no_layer_is_refused(annotations: Json | None, reason: str) -> None:
    message = refusal(with_ztoc(annotations=annotations))
    assert "layers[0].annotations" in message
    assert reason in message


def test_a_ztoc_belongs_to_the_layer_that_its_annotation_names_and_to_no_other() -> None:
    other = Digest("sha256", "c" * 64)
    index = parse_index(with_ztoc(annotations={LAYER_DIGEST: str(other)}), image=IMAGE.digest)
    assert set(index.ztocs) == {other, LAYERS[1].digest}


def test_two_ztocs_of_one_layer_are_refused_unless_they_are_the_same() -> None:
    layers = json.loads(changed())["layers"]
    twice = changed(layers=[*layers, layers[0]])
    assert parse_index(twice, image=IMAGE.digest) == parse_index(changed(), image=IMAGE.digest)
    other = layers[0] | {"digest": str(Digest.of(b"other"))}
    assert "two ztocs of layer sha256:aaa" in refusal(changed(layers=[*layers, other]))


def test_what_is_no_ztoc_is_passed_over() -> None:
    prefetch = {"mediaType": "application/vnd.amazon.soci.prefetch.v1+json", "annotations": {}}
    index = parse_index(with_ztoc(**prefetch), image=IMAGE.digest)
    assert set(index.ztocs) == {LAYERS[1].digest}


def test_a_ztoc_that_is_too_large_is_as_if_it_were_not_there() -> None:
    assert len(parse_index(with_ztoc(size=MAX_ZTOC_SIZE), image=IMAGE.digest).ztocs) == 2
    assert set(parse_index(with_ztoc(size=MAX_ZTOC_SIZE + 1), image=IMAGE.digest).ztocs) == {LAYERS[1].digest}


@pytest.mark.parametrize("size", [-1, 1.5, "1", None, 2**63])
def test_a_size_that_is_none_is_refused(size: object) -> None:
    assert refusal(with_ztoc(size=size))
