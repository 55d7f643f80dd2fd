"""Platforms, and which manifest of an index suits one."""

import pytest

from fsmount.errors import NotFound, UsageError
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import OCI_INDEX, OCI_MANIFEST, REFERENCE_TYPE, Descriptor, Index
from fsmount.oci.platform import Platform
from fsmount.oci.selection import candidates, select


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("linux/amd64", "linux/amd64"),
        ("Linux/x86_64", "linux/amd64"),
        ("linux/amd64/v1", "linux/amd64"),
        ("linux/amd64/v3", "linux/amd64/v3"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm64/8", "linux/arm64"),
        ("linux/armhf", "linux/arm"),
        ("linux/arm", "linux/arm"),
        ("linux/arm/7", "linux/arm"),
        ("linux/armel", "linux/arm/v6"),
        ("linux/i686", "linux/386"),
        ("macos/arm64", "darwin/arm64"),
        ("linux/s390x", "linux/s390x"),
    ],
)
def test_aliases_are_one_platform(text: str, normal: str) -> None:
    assert str(Platform.parse(text)) == normal


@pytest.mark.parametrize(
    "text", ["", "linux", "linux/", "/amd64", "linux/amd64/v1/x", "linux/amd64\n", "a b/c"]
)
def test_what_is_no_platform_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="no platform"):
        Platform.parse(text)


def test_the_current_platform_is_normal() -> None:
    current = Platform.current()
    assert Platform.parse(str(current)) == current


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("linux/amd64", ["linux/amd64"]),
        ("linux/amd64/v3", ["linux/amd64/v3", "linux/amd64/v2", "linux/amd64"]),
        ("linux/arm", ["linux/arm", "linux/arm/v6", "linux/arm/v5"]),
        ("linux/arm/v6", ["linux/arm/v6", "linux/arm/v5"]),
        ("linux/arm/v8", ["linux/arm/v8", "linux/arm", "linux/arm/v6", "linux/arm/v5"]),
        ("linux/arm64", ["linux/arm64"]),
        ("linux/arm64/v9", ["linux/arm64/v9", "linux/arm64"]),
        ("linux/riscv64", ["linux/riscv64"]),
        ("linux/amd64/odd", ["linux/amd64/odd"]),
    ],
)
def test_a_platform_runs_its_own_images_first_and_then_those_of_lower_variants(
    text: str, runs: list[str]
) -> None:
    assert [str(platform) for platform in Platform.parse(text).runs()] == runs


def entry(
    name: str,
    platform: str | None,
    *,
    artifact_type: str | None = None,
    annotations: dict[str, str] | None = None,
    media_type: str = OCI_MANIFEST,
) -> Descriptor:
    return Descriptor(
        media_type=media_type,
        digest=Digest.of(name.encode()),
        size=len(name),
        annotations=annotations or {},
        platform=Platform.parse(platform) if platform else None,
        artifact_type=artifact_type,
    )


def index(*entries: Descriptor) -> Index:
    return Index(OCI_INDEX, entries, {})


AMD = Platform("linux", "amd64")


def test_the_first_of_equal_entries_is_selected() -> None:
    first, second = entry("1", "linux/amd64"), entry("2", "linux/amd64")
    assert select(index(entry("0", "linux/arm64"), first, second), AMD) == first


def test_a_higher_variant_is_preferred_wherever_it_stands() -> None:
    low, high, higher = (entry(v, f"linux/amd64/{v}") for v in ("v1", "v2", "v3"))
    assert select(index(low, high, higher), Platform("linux", "amd64", "v2")) == high
    assert select(index(higher, high, low), AMD) == low


def test_artifacts_attestations_and_unknown_platforms_are_passed_over() -> None:
    image = entry("image", "linux/amd64")
    others = (
        entry("artifact", "linux/amd64", artifact_type="application/spdx+json"),
        entry("attestation", "linux/amd64", annotations={REFERENCE_TYPE: "attestation-manifest"}),
        entry("unknown", "unknown/unknown"),
    )
    assert candidates(index(*others, image), AMD) == [image]
    with pytest.raises(NotFound, match="no images"):
        select(index(*others), AMD)


def test_entries_without_a_platform_are_the_last_resort() -> None:
    bare, image = entry("bare", None), entry("image", "linux/amd64")
    assert candidates(index(bare, image), AMD) == [image, bare]
    assert select(index(bare), AMD) == bare


def test_a_nested_index_may_be_selected() -> None:
    nested = entry("nested", None, media_type=OCI_INDEX)
    assert select(index(nested, entry("arm", "linux/arm64")), AMD).is_index


def test_where_nothing_suits_the_message_names_what_there_is() -> None:
    there = index(entry("1", "linux/arm64"), entry("2", "windows/amd64"), entry("3", "linux/arm64"))
    with pytest.raises(NotFound, match="linux/amd64") as caught:
        select(there, AMD)
    assert "linux/arm64, windows/amd64" in str(caught.value)
