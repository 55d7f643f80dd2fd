"""Referrers: the manifests that have another as their subject, listed and pushed (distribution-spec, "Referrers").

A registry that does not know the API has them in an index under a tag that is made of the subject's digest, and
clients keep that index.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import trio

from fsmount.errors import Corrupt, Invalid, Unreachable
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import OCI_INDEX, Descriptor, Index, essence, parse_manifest
from fsmount.registry.remote import ANY_MANIFEST, Remote
from fsmount.registry.source import check
from fsmount.registry.urls import follow
from fsmount.registry.wire import Answer

_MOST_PAGES = 100
#: How often an index under a tag is written again when another writer was quicker.
_TRIES = 3
_PUSH = "pull,push"
_INDEX_HEADERS = {"Accept": OCI_INDEX}


@dataclass(frozen=True, slots=True)
class Artifact:
    """A small manifest with a subject, and the blobs that it names; all bytes are in memory."""

    #: The manifest, byte for byte, and what it says of itself.
    manifest: bytes
    media_type: str
    artifact_type: str
    annotations: Mapping[str, str]
    subject: Digest
    blobs: Sequence[bytes] = field(repr=False)

    @property
    def digest(self) -> Digest:
        return Digest.of(self.manifest)


async def list_referrers(
    remote: Remote, subject: Digest, artifact_type: str | None = None
) -> list[Descriptor]:
    """What refers to subject: by the API, or else what the tag has; anything that is no index means none.

    Raises: AccessDenied, Unreachable and its kinds, Invalid.
    """
    found = await _by_api(remote, subject, artifact_type)
    if found is None:
        found = await _by_tag(remote, subject)
    unique = {entry.digest: entry for entry in found}
    return [entry for entry in unique.values() if artifact_type in (None, entry.artifact_type)]


async def _by_api(remote: Remote, subject: Digest, artifact_type: str | None) -> list[Descriptor] | None:
    """None: this registry does not know the API."""
    what = f"the referrers of {subject}"
    query = f"?artifactType={quote(artifact_type, safe='')}" if artifact_type else ""
    path: str | None = f"referrers/{subject}{query}"
    found: list[Descriptor] = []
    for _ in range(_MOST_PAGES):
        if path is None:
            return found
        # GHCR sends us to its web pages.
        answer = await _get(remote, path, what, stay=True)
        if answer.status in (401, 403):
            raise await answer.error(what)
        if answer.status != 200 or essence(answer.headers.get("Content-Type")) != OCI_INDEX:
            await answer.settle()
            return None
        found += _entries(answer.body, what)
        link = answer.next_page
        path = str(follow(answer.url, link, registry=answer.url, purpose="next page")) if link else None
    raise Invalid(f"{what} are on more than {_MOST_PAGES} pages")


async def _by_tag(remote: Remote, subject: Digest) -> list[Descriptor]:
    what = f"the referrers of {subject}"
    answer = await _get(remote, f"manifests/{fallback_tag(subject)}", what)
    if answer.status in (401, 403):
        raise await answer.error(what)
    if answer.status != 200 or essence(answer.headers.get("Content-Type")) != OCI_INDEX:
        await answer.settle()
        return []
    return _entries(answer.body, what)


async def _get(remote: Remote, path: str, what: str, *, stay: bool = False) -> Answer:
    limit = remote.server.limits.manifest_bytes
    return await remote.send("GET", path, what, headers=_INDEX_HEADERS, limit=limit, stay=stay)


def _entries(body: bytes, what: str) -> list[Descriptor]:
    index = parse_manifest(body, OCI_INDEX)
    if not isinstance(index, Index):
        raise Invalid(f"{what} are no index")
    return list(index.manifests)


def fallback_tag(subject: Digest) -> str:
    """The tag that stands for the API: algorithm and digest, each cut to what a tag may hold."""
    return f"{subject.algorithm[:32]}-{subject.hex[:64]}"


class Referrers:
    """Pushes artifacts to one repository's origin; those of one subject one after the other."""

    def __init__(self, remote: Remote, name: str) -> None:
        self._remote = remote
        self._name = name
        self._locks: dict[Digest, trio.Lock] = {}

    async def push(self, artifact: Artifact) -> None:
        """Makes artifact a referrer of its subject: blobs first, the manifest by its digest, then the tag's index
        if the registry did not say that it keeps referrers itself.

        Raises: AccessDenied, Unreachable and its kinds, Corrupt (it keeps something else), Invalid (what is
            under the tag is no index: it is left alone).
        """
        for blob in artifact.blobs:
            await self._push_blob(blob)
        what = f"manifest {artifact.digest} of {self._name}"
        answer = await self._put(str(artifact.digest), artifact.manifest, artifact.media_type, what)
        keeps_referrers = answer.headers.get("OCI-Subject", "").strip() == str(artifact.subject)
        await answer.settle()
        if not keeps_referrers:
            async with self._locks.setdefault(artifact.subject, trio.Lock()):
                await self._list_under_tag(artifact)
        await self._check(artifact)

    async def _push_blob(self, data: bytes) -> None:
        digest = Digest.of(data)
        what = f"blob {digest} of {self._name}"
        answer = await self._send("HEAD", f"blobs/{digest}", what)
        await answer.settle()
        if answer.status == 200:
            return
        answer = await self._send("POST", "blobs/uploads/", what, content=b"")
        location = answer.headers.get("Location")
        if answer.status != 202 or not location:
            raise await answer.error(what)
        await answer.settle()
        # Opaque, and perhaps with a query of its own.
        upload = follow(answer.url, location, registry=answer.url, purpose="upload address")
        upload = upload.copy_merge_params({"digest": str(digest)})
        headers = {"Content-Type": "application/octet-stream"}
        answer = await self._send("PUT", str(upload), what, headers=headers, content=data)
        if answer.status != 201:
            raise await answer.error(what)
        await answer.settle()

    async def _list_under_tag(self, artifact: Artifact) -> None:
        tag = fallback_tag(artifact.subject)
        what = f"the index of referrers {self._name}:{tag}"
        for _ in range(_TRIES):
            entries = await self._tagged(tag, what)
            if any(entry.get("digest") == str(artifact.digest) for entry in entries):
                return
            index = {
                "schemaVersion": 2,
                "mediaType": OCI_INDEX,
                "manifests": [*entries, described(artifact)],
            }
            data = json.dumps(index, separators=(",", ":")).encode()
            answer = await self._put(tag, data, OCI_INDEX, what)
            await answer.settle()
        entries = await self._tagged(tag, what)
        if all(entry.get("digest") != str(artifact.digest) for entry in entries):
            raise Unreachable(f"{what} is being changed by others all the time", remedy="Try again later.")

    async def _tagged(self, tag: str, what: str) -> list[dict[str, object]]:
        """The entries as they are, with whatever others wrote into them. Raises: Invalid (it is no index)."""
        answer = await self._send(
            "GET",
            f"manifests/{tag}",
            what,
            # An image under the tag would be "not found" if it were not accepted, and be overwritten.
            headers=ANY_MANIFEST,
            limit=self._remote.server.limits.manifest_bytes,
        )
        if answer.status == 404:
            await answer.settle()
            return []
        if answer.status != 200:
            raise await answer.error(what)
        if essence(answer.headers.get("Content-Type")) != OCI_INDEX:
            raise Invalid(f"{what} is something else; it is left alone")
        _entries(answer.body, what)  # raises unless it has the form of an index
        manifests = json.loads(answer.body).get("manifests") or []
        return [entry for entry in manifests if isinstance(entry, dict)]

    async def _put(self, reference: str, data: bytes, media_type: str, what: str) -> Answer:
        headers = {"Content-Type": media_type}
        answer = await self._send("PUT", f"manifests/{reference}", what, headers=headers, content=data)
        if answer.status != 201:
            raise await answer.error(what)
        return answer

    async def _check(self, artifact: Artifact) -> None:
        what = f"manifest {artifact.digest} of {self._name}"
        answer = await self._send(
            "GET",
            f"manifests/{artifact.digest}",
            what,
            headers={"Accept": artifact.media_type},
            limit=self._remote.server.limits.manifest_bytes,
        )
        if answer.status != 200:
            raise await answer.error(what)
        check(answer.body, artifact.digest, what)
        listed = await list_referrers(self._remote, artifact.subject)
        if all(entry.digest != artifact.digest for entry in listed):
            raise Corrupt(f"{self._name} took {what}, but does not list it as a referrer")

    async def _send(
        self,
        method: str,
        path: str,
        what: str,
        *,
        headers: Mapping[str, str] | None = None,
        limit: int | None = None,
        content: bytes | None = None,
    ) -> Answer:
        return await self._remote.send(
            method, path, what, headers=headers, limit=limit, content=content, actions=_PUSH
        )


def described(artifact: Artifact) -> dict[str, object]:
    """The descriptor of an artifact, as lists of referrers have it."""
    descriptor: dict[str, object] = {
        "mediaType": artifact.media_type,
        "digest": str(artifact.digest),
        "size": len(artifact.manifest),
        "artifactType": artifact.artifact_type,
    }
    return descriptor | ({"annotations": dict(artifact.annotations)} if artifact.annotations else {})
