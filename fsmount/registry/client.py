"""Repository: a Source that is one repository of a registry, spoken to by the distribution API."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from urllib.parse import quote

from fsmount.errors import Invalid, UsageError
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Descriptor, essence
from fsmount.oci.reference import Reference, is_tag
from fsmount.oci.shape import Shape
from fsmount.registry.body import Body
from fsmount.registry.registry import Registry
from fsmount.registry.source import LARGEST_MANIFEST, check, read_small
from fsmount.registry.urls import follow
from fsmount.registry.wire import Answer

_log = logging.getLogger(__name__)

# One header, and on HEAD too: docker-registry 2.8 says "not found" where a type is not accepted. Indexes must
# be, or a registry may answer with one image of an index, and a digest that is not the tag's.
_ACCEPT = {"Accept": ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST))}
_PAGE = 1000
# A registry without pages sends all tags at once: 16 MiB is 120,000 of the longest.
_LARGEST_PAGE = 16 * 1024 * 1024
_MOST_PAGES = 1000


class Repository:
    """One repository; see Source for what its methods promise."""

    def __init__(self, registry: Registry, reference: Reference) -> None:
        self.name = reference.name
        self._registry = registry
        self._repository = reference.repository

    async def tags(self) -> list[str]:
        first = f"{self._repository}/tags/list?n={_PAGE}"
        path: str | None = first
        found: set[str] = set()
        for _ in range(_MOST_PAGES):
            if path is None:
                break
            page, path = await self._page(path)
            if path is None and len(page) == _PAGE:
                # Old registries page without saying so.
                path = f"{first}&last={quote(page[-1], safe='')}"
            if found.issuperset(page):
                break  # nothing new: the end, or a loop
            found.update(page)
        else:
            raise Invalid(f"{self.name} lists its tags on more than {_MOST_PAGES} pages")
        odd = {tag for tag in found if not is_tag(tag)}
        if odd:
            _log.warning("%s lists %d tags that are none, like %.80a", self.name, len(odd), min(odd))
        return sorted(found - odd)

    async def resolve(self, version: str | None) -> Descriptor:
        version = version or "latest"
        asked = Digest.parse(version) if ":" in version else None
        if asked is None and not is_tag(version):
            raise UsageError(f"{version[:140]!r} is neither a tag nor a digest")
        what = f"{self.name}{'@' if asked else ':'}{version}"
        answer = await self._manifest("HEAD", version, what)
        if answer.status in (401, 404):
            raise await answer.error(what)
        digest = asked or _digest(answer)
        if answer.status == 200 and digest and answer.length:
            return _descriptor(answer, digest, answer.length)
        # The rest is for GET to tell: HEAD has no error body, may be refused (405, or 403 where a signed URL
        # is for GET only), and older registries leave out what we need.
        await answer.aclose()
        answer = await self._document(version, asked, what)
        return _descriptor(answer, asked or Digest.of(answer.body), len(answer.body))

    async def manifest(self, digest: Digest) -> tuple[bytes, str | None]:
        answer = await self._document(str(digest), digest, f"{self.name}@{digest}")
        return answer.body, answer.headers.get("Content-Type")

    @asynccontextmanager
    async def blob(self, descriptor: Descriptor, *, start: int = 0) -> AsyncIterator[AsyncIterator[bytes]]:
        path = f"{self._repository}/blobs/{descriptor.digest}"
        what = f"blob {descriptor.digest} of {self.name}"

        async def send(headers: Mapping[str, str]) -> Answer:
            return await self._send("GET", path, what, headers)

        async with aclosing(Body(send, descriptor, start, what, self._registry.retry)) as body:
            await body.open()
            yield body

    async def small_blob(self, descriptor: Descriptor) -> bytes:
        return await read_small(self, descriptor)

    async def _send(
        self, method: str, path: str, what: str, headers: Mapping[str, str], limit: int | None = None
    ) -> Answer:
        return await self._registry.send(
            method, path, repository=self._repository, what=what, headers=headers, limit=limit
        )

    async def _manifest(self, method: str, version: str, what: str) -> Answer:
        path = f"{self._repository}/manifests/{version}"
        return await self._send(method, path, what, _ACCEPT, LARGEST_MANIFEST)

    async def _document(self, version: str, digest: Digest | None, what: str) -> Answer:
        """A manifest as the body of its answer, checked against the digest if that is known."""
        answer = await self._manifest("GET", version, what)
        if answer.status != 200:
            raise await answer.error(what)
        if digest:
            check(answer.body, digest, what)
        return answer

    async def _page(self, path: str) -> tuple[list[str], str | None]:
        """One page of tags, and the URL of the next."""
        what = f"the list of tags of {self.name}"
        answer = await self._send("GET", path, what, {}, _LARGEST_PAGE)
        if answer.status != 200:
            raise await answer.error(what)
        # Some registries write null for an empty list.
        tags = Shape.parse(answer.body, what).get("tags")
        page = [tag.string() for tag in tags.strings()] if tags else []
        link = answer.next_page
        url = follow(answer.url, link, registry=answer.url, purpose="next page") if link else None
        return page, str(url) if url else None


def _digest(answer: Answer) -> Digest | None:
    """What the registry calls the manifest; registries older than the specification do not say."""
    try:
        return Digest.parse(answer.headers.get("Docker-Content-Digest", ""))
    except UsageError:
        return None


def _descriptor(answer: Answer, digest: Digest, size: int) -> Descriptor:
    media_type = essence(answer.headers.get("Content-Type")) or ""
    return Descriptor(media_type=media_type, digest=digest, size=size, annotations={})
