"""The grammar of references, and of layout folders."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsmount.errors import UsageError
from fsmount.oci.digest import Digest
from fsmount.oci.reference import LayoutReference, Reference, parse_source

SHA = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("registry.example.com/team/web", "registry.example.com/team/web"),
        ("registry.example.com/team/web:v1.2", "registry.example.com/team/web:v1.2"),
        (f"registry.example.com/web@{SHA}", f"registry.example.com/web@{SHA}"),
        (f"registry.example.com/web:v1@{SHA}", f"registry.example.com/web:v1@{SHA}"),
        ("localhost:5000/a", "localhost:5000/a"),
        ("localhost/a", "localhost/a"),
        ("[::1]:5000/a:b", "[::1]:5000/a:b"),
        ("UPPER/a", "UPPER/a"),
        ("a.b/c__d/e--f/g.h", "a.b/c__d/e--f/g.h"),
        ("registry.example/a:_v1", "registry.example/a:_v1"),
    ],
)
def test_a_full_reference_is_written_back_as_it_was_read(text: str, full: str) -> None:
    assert str(Reference.parse(text)) == full


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("web", "docker.io/library/web"),
        ("web:v1", "docker.io/library/web:v1"),
        ("team/web", "docker.io/team/web"),
        ("docker.io/web", "docker.io/library/web"),
        ("index.docker.io/team/web", "docker.io/team/web"),
        ("localhost:5000", "docker.io/library/localhost:5000"),
        ("localhost", "docker.io/library/localhost"),
    ],
)
def test_a_reference_without_a_domain_is_of_docker_hub(text: str, full: str) -> None:
    assert str(Reference.parse(text)) == full


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "@",
        "a:",
        "a@",
        "/a",
        "a//b",
        "a/",
        "registry.example/",
        "registry.example/a:b:c",
        "registry.example/a:.b",
        "registry.example/a:" + "b" * 129,
        "registry.example/a\n",
        "registry.example/a:b\n",
        "registry.example/a:é",
        "registry.example/é",
        "registry.example/a..b",
        "registry.example/a___b",
        "registry.example/../b",
        "registry.example/-a",
        "registry.example/Team/web",
        "-bad.example/a",
        "registry..example/a",
        "registry.example:0/a",
        "registry.example:65536/a",
        "registry.example:99999999999999/a",
        "[::1/a",
        "[1:2]/a",
        "https://registry.example/a",
        "docker://registry.example/a",
        "user@registry.example/a",
        "registry.example/a@sha256:abc",
        "registry.example/a@sha256:" + "A" * 64,
        "registry.example/a@md5:" + "a" * 32,
        "a" * 64,
        "registry.example/" + "a" * 250,
        "a" * 100_000,
    ],
)
def test_what_is_malformed_is_a_usage_error_with_a_remedy(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Reference.parse(text)
    assert caught.value.remedy
    assert len(str(caught.value)) < 1500


def test_upper_case_in_a_repository_is_explained() -> None:
    with pytest.raises(UsageError, match="lower-case"):
        Reference.parse("registry.example/Team/Web")


def test_a_digest_counts_more_than_a_tag() -> None:
    reference = Reference.parse(f"registry.example/a:v1@{SHA}")
    assert (reference.tag, reference.digest, reference.version) == ("v1", Digest.parse(SHA), SHA)


def test_without_tag_and_digest_there_is_no_version() -> None:
    assert Reference.parse("registry.example/a").version is None


@given(st.text(max_size=80))
def test_any_text_is_a_reference_or_a_usage_error(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except UsageError:
        return
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oci-layout:/srv/builds", LayoutReference(Path("/srv/builds"))),
        ("oci:builds:v1", LayoutReference(Path("builds"), "v1")),
        (f"oci-layout:b@{SHA}", LayoutReference(Path("b"), None, Digest.parse(SHA))),
        (f"oci-layout:b:v1@{SHA}", LayoutReference(Path("b"), "v1", Digest.parse(SHA))),
        ("oci:/a@b/c:v1", LayoutReference(Path("/a@b/c"), "v1")),
        ("oci:b:registry.example:5000/app:v1", LayoutReference(Path("b"), "registry.example:5000/app:v1")),
    ],
)
def test_a_layout_ends_at_the_first_colon_as_for_skopeo(text: str, expected: LayoutReference) -> None:
    assert parse_source(text) == expected
    assert parse_source(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["oci:", "oci::v1", "oci:a:", "oci:a:-b", "oci:a:b c", f"oci:@{SHA}", "oci:a@sha256:12", "oci:\0"]
)
def test_a_malformed_layout_is_a_usage_error_with_a_remedy(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_source(text)
    assert caught.value.remedy


def test_anything_else_is_a_registry_reference() -> None:
    assert parse_source("registry.example/a:v1") == Reference("registry.example", "a", "v1")
