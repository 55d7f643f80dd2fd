"""References: how a user names an image in a registry or in a layout folder, parsed once at the edge."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fsmount.errors import UsageError
from fsmount.oci.digest import Digest

# distribution/reference's grammar, with ASCII classes written out: Python's \w is all of Unicode.
_LABEL = "(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?P<host>{_LABEL}(?:\.{_LABEL})*|\[(?P<ipv6>[a-fA-F0-9:]+)\])(?::(?P<port>[0-9]+))?")
_COMPONENT = "[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(f"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile("[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HEX_ID = re.compile("[a-f0-9]{64}")
_LONGEST_NAME = 255
# 255 for the name, 128 for a tag, 135 for a sha512 digest, and some air.
_LONGEST_TEXT = 600
_LAYOUT_PREFIXES = ("oci-layout:", "oci:")

_FORM = "Write registry/repository, registry/repository:tag or registry/repository@sha256:…"
_LAYOUT_FORM = "Write oci-layout:DIR, oci-layout:DIR:TAG or oci-layout:DIR@sha256:…"


@dataclass(frozen=True, slots=True)
class Reference:
    """A repository in a registry, and perhaps one version of it by tag or digest, fully spelled out."""

    #: Host and port as written; `docker.io` stands for Docker Hub, whose host is another.
    domain: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`[domain/]repository[:tag][@digest]`; without a domain it is Docker Hub's, as everywhere.

        Raises: UsageError.
        """
        if len(text) > _LONGEST_TEXT:
            raise _malformed(text, f"it is longer than {_LONGEST_TEXT} characters", _FORM)
        if "://" in text:
            raise _malformed(text, "it is a URL", "Leave out everything up to and including '://'.")
        name, at, digest = text.partition("@")
        tag: str | None = None
        colon = name.rfind(":")
        if colon > name.rfind("/"):
            name, tag = name[:colon], name[colon + 1 :]
        if tag is not None and not _TAG.fullmatch(tag):
            raise _malformed(text, f"{tag[:140]!r} is no tag", "A tag is up to 128 of A-Z a-z 0-9 _ . -")
        domain, repository = _split_domain(name)
        _check_domain(text, domain)
        _check_repository(text, domain, repository)
        return cls(domain, repository, tag, Digest.parse(digest) if at else None)

    @property
    def name(self) -> str:
        """`domain/repository`, without a version."""
        return f"{self.domain}/{self.repository}"

    @property
    def version(self) -> str | None:
        """What `Source.resolve` takes: the digest, else the tag, else None for the source's default."""
        return str(self.digest) if self.digest else self.tag

    def __str__(self) -> str:
        return _with_version(self.name, self.tag, self.digest)


@dataclass(frozen=True, slots=True)
class LayoutReference:
    """An OCI image layout folder, and perhaps one image in it by name or digest."""

    path: Path
    #: A tag, or the full name that some tools write (`registry.example/team/app:v1`).
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`DIR[:TAG][@sha256:…]`, what follows `oci-layout:`.

        As for skopeo, DIR ends at the first colon, so that TAG may be a full name with colons of its own; a
        folder whose path has a colon needs a symbolic link, or a relative path. An `@` belongs to DIR or
        TAG unless a digest follows it.

        Raises: UsageError.
        """
        named, at, digest = text.rpartition("@")
        if not at or not digest.startswith(("sha256:", "sha512:")):
            named, digest = text, ""
        folder, colon, tag = named.partition(":")
        if not folder or "\0" in folder:
            raise _malformed(text, "it names no folder", _LAYOUT_FORM)
        if colon and not _is_layout_name(tag):
            remedy = f"{_LAYOUT_FORM} DIR ends at the first colon: use a symbolic link without one."
            raise _malformed(text, f"{tag[:140]!r} is no tag", remedy)
        return cls(Path(folder), tag or None, Digest.parse(digest) if digest else None)

    @property
    def version(self) -> str | None:
        """What `Source.resolve` takes: the digest, else the tag, else None for the source's default."""
        return str(self.digest) if self.digest else self.tag

    def __str__(self) -> str:
        return _with_version(f"oci-layout:{self.path}", self.tag, self.digest)


def parse_source(text: str) -> Reference | LayoutReference:
    """What a user writes for an image: `oci-layout:DIR…`, `oci:DIR…` or a registry's reference.

    Raises: UsageError.
    """
    for prefix in _LAYOUT_PREFIXES:
        if text.startswith(prefix):
            return LayoutReference.parse(text.removeprefix(prefix))
    return Reference.parse(text)


def is_tag(text: str) -> bool:
    """Whether text has the form of a tag; such a text is also safe as a file name."""
    return _TAG.fullmatch(text) is not None


def _with_version(name: str, tag: str | None, digest: Digest | None) -> str:
    return name + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")


def _is_layout_name(text: str) -> bool:
    if _TAG.fullmatch(text):
        return True
    try:
        return Reference.parse(text).digest is None
    except UsageError:
        return False


def _split_domain(name: str) -> tuple[str, str]:
    """docker's splitDockerDomain: `team/web` is on Docker Hub, `localhost/web`, `a.example/web` are not."""
    first, slash, rest = name.partition("/")
    if not slash:
        return "docker.io", f"library/{name}"
    if first != "localhost" and first == first.lower() and not set(first) & {".", ":", "["}:
        return "docker.io", name
    domain = "docker.io" if first == "index.docker.io" else first
    return domain, f"library/{rest}" if domain == "docker.io" and "/" not in rest else rest


def _check_domain(text: str, domain: str) -> None:
    match = _DOMAIN.fullmatch(domain)
    if not match:
        raise _malformed(text, f"{domain[:140]!r} is no registry host", _FORM)
    if match["port"] and not 0 < int(match["port"][:9]) < 65536:
        raise _malformed(text, f"{match['port'][:9]} is no port", _FORM)
    if match["ipv6"]:
        try:
            ipaddress.IPv6Address(match["ipv6"])
        except ValueError:
            raise _malformed(text, f"{domain!r} is no IPv6 address", _FORM) from None


def _check_repository(text: str, domain: str, repository: str) -> None:
    bare = repository.removeprefix("library/")
    if domain == "docker.io" and _HEX_ID.fullmatch(bare):
        raise _malformed(text, "64 hexadecimal digits are an identifier and no name", _FORM)
    if not _REPOSITORY.fullmatch(repository):
        if repository != repository.lower():
            raise _malformed(text, "repository names are lower-case", f"Write {repository.lower()[:200]!r}.")
        raise _malformed(text, f"{bare[:140]!r} is no repository name", _FORM)
    if len(domain) + 1 + len(repository) > _LONGEST_NAME:
        raise _malformed(text, f"the name is longer than {_LONGEST_NAME} characters", _FORM)


def _malformed(text: str, reason: str, remedy: str) -> UsageError:
    return UsageError(f"{text[:300]!r} is no image reference: {reason}", remedy=remedy)
