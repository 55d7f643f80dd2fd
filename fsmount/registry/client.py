"""Repository: a Source that is one repository, at the server that is its origin and at those that mirror it."""

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import NamedTuple, TypeVar
from urllib.parse import quote

from fsmount.errors import Corrupt, FsmountError, Invalid, NotFound, Unreachable, UsageError
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor, essence
from fsmount.oci.reference import Reference, is_tag
from fsmount.oci.shape import Shape
from fsmount.registry.body import Body
from fsmount.registry.endpoint import Capability, Endpoint
from fsmount.registry.referrers import list_referrers
from fsmount.registry.remote import ANY_MANIFEST, Remote
from fsmount.registry.source import Bytes, check, read_small
from fsmount.registry.standing import Standing
from fsmount.registry.urls import follow
from fsmount.registry.wire import Answer

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_PAGE = 1000
# A registry without pages sends all tags at once: 16 MiB is 120,000 of the longest.
_LARGEST_PAGE = 16 * 1024 * 1024
_MOST_PAGES = 1000
#: For a mirror to answer about a manifest: of the ten that a mount allows for names, the origin needs some too.
_MIRROR_SECONDS = 4.0


class _Distrusted(NamedTuple):
    digest: Digest
    endpoint: Endpoint


class Repository:
    """One repository; see Source for what its methods promise.

    Its servers are asked in their order, a mirror that failed lately after all others, until one has what is
    wanted. A mirror is a hint: that something does not exist, or may not be read, is believed of the origin alone,
    and so is the list of tags.
    """

    def __init__(
        self, reference: Reference, remotes: Callable[[], Awaitable[list[Remote]]], standing: Standing
    ) -> None:
        """remotes: the servers as the administrator's files have them now. standing: told of what they answer."""
        self.name = reference.name
        self._standing = standing
        self._remotes = remotes
        self._distrusted: set[_Distrusted] = set()
        self._served: dict[Digest, Remote] = {}

    async def tags(self) -> list[str]:
        return await self._origin(self._tags)

    async def resolve(self, version: str | None, *, known: Digest | None = None) -> Descriptor:
        version = version or "latest"
        asked = Digest.parse(version) if ":" in version else None
        if asked is None and not is_tag(version):
            raise UsageError(f"{version[:140]!r} is neither a tag nor a digest")
        capability = Capability.PULL if asked else Capability.RESOLVE
        return await self._first(capability, lambda remote: self._resolve(remote, version, asked, known))

    async def manifest(self, digest: Digest) -> tuple[bytes, str | None]:
        async def ask(remote: Remote) -> Answer:
            return await self._document(remote, str(digest), digest, f"{self.name}@{digest}")

        answer = await self._first(Capability.PULL, ask)
        return answer.body, answer.headers.get("Content-Type")

    @asynccontextmanager
    async def blob(
        self, descriptor: Descriptor, *, start: int = 0, stop: int | None = None
    ) -> AsyncIterator[Bytes]:
        digest = descriptor.digest
        what = f"blob {digest} of {self.name}"

        async def ask(remote: Remote, headers: Mapping[str, str]) -> Answer:
            answer = await remote.send("GET", f"blobs/{digest}", what, headers=headers, signed=True)
            # What a refused range means is for Body to tell.
            if answer.status not in ((200, 206, 400, 416) if "Range" in headers else (200, 206)):
                raise await answer.error(what)
            self._served[digest] = remote
            return answer

        async def send(headers: Mapping[str, str]) -> Answer:
            return await self._first(Capability.PULL, lambda remote: ask(remote, headers), digest=digest)

        retry = (await self._remotes())[0].server.retry
        async with aclosing(Body(send, descriptor, start, stop, what, retry)) as body:
            while True:
                try:
                    await body.open()
                    break
                except Corrupt:
                    if not self.distrust(descriptor):
                        raise
            try:
                yield body
            except Unreachable as error:
                self._standing.note_broken(error)
                raise

    async def small_blob(self, descriptor: Descriptor) -> bytes:
        while True:
            try:
                return await read_small(self, descriptor)
            except Invalid:
                raise
            except Corrupt:
                if not self.distrust(descriptor):
                    raise

    def distrust(self, descriptor: Descriptor) -> bool:
        remote = self._served.pop(descriptor.digest, None)
        if remote is None or remote.endpoint.is_origin:
            return False
        extra = {"digest": descriptor.digest}
        _log.error(
            "what %s sent of %s was something else", remote.server.domain, descriptor.digest, extra=extra
        )
        self._distrusted.add(_Distrusted(descriptor.digest, remote.endpoint))
        return True

    async def referrers(self, digest: Digest, artifact_type: str | None = None) -> list[Descriptor]:
        return await self._origin(lambda remote: list_referrers(remote, digest, artifact_type))

    async def _origin(self, ask: Callable[[Remote], Awaitable[_Result]]) -> _Result:
        with self._standing.asking():
            remotes = await self._remotes()
            return await ask(next(remote for remote in remotes if remote.endpoint.is_origin))

    async def _first(
        self,
        capability: Capability,
        ask: Callable[[Remote], Awaitable[_Result]],
        *,
        digest: Digest | None = None,
    ) -> _Result:
        """The answer of the first server that has one; digest is that of a blob.

        Raises: what the origin, else the last, raised.
        """
        with self._standing.asking():
            return await self._first_of_all(capability, ask, digest)

    async def _first_of_all(
        self, capability: Capability, ask: Callable[[Remote], Awaitable[_Result]], digest: Digest | None
    ) -> _Result:
        remotes = [
            remote
            for remote in await self._remotes()
            if capability in remote.endpoint.capabilities
            and (digest is None or _Distrusted(digest, remote.endpoint) not in self._distrusted)
        ]
        remotes.sort(key=lambda remote: not remote.server.health.is_good)  # in order otherwise
        failure: FsmountError | None = None
        origins_failure: FsmountError | None = None
        for remote in remotes:
            is_patient = digest is not None or remote.endpoint.is_origin
            try:
                with remote.server.deadline(math.inf if is_patient else _MIRROR_SECONDS):
                    return await ask(remote)
            except FsmountError as error:
                if remote.endpoint.is_origin:
                    if not error.transient:
                        raise
                    origins_failure = error
                else:
                    _log.info("mirror %s: %s", remote.server.domain, error.message)
                failure = error
        failure = origins_failure or failure
        raise failure or Unreachable(
            f"no server may be asked for this of {self.name}",
            remedy="See the capabilities of its hosts.toml.",
        )

    async def _resolve(
        self, remote: Remote, version: str, asked: Digest | None, known: Digest | None
    ) -> Descriptor:
        what = f"{self.name}{'@' if asked else ':'}{version}"
        headers = {"If-None-Match": f'"{known}"'} if known else {}
        answer = await self._manifest(remote, "HEAD", version, what, headers)
        if answer.status == 304 and known:
            await answer.aclose()
            return Descriptor(media_type="", digest=known, size=0, annotations={})
        if answer.status in (401, 404):
            raise await answer.error(what)
        digest = asked or _digest(answer)
        if answer.status == 200 and digest and answer.length:
            return _descriptor(answer, digest, answer.length)
        # The rest is for GET to tell: HEAD has no error body, may be refused (405, or 403 where a signed URL
        # is for GET only), and older registries leave out what we need.
        await answer.aclose()
        answer = await self._document(remote, version, asked, what)
        return _descriptor(answer, asked or Digest.of(answer.body), len(answer.body))

    async def _manifest(
        self, remote: Remote, method: str, version: str, what: str, headers: Mapping[str, str]
    ) -> Answer:
        limit = remote.server.limits.manifest_bytes
        return await remote.send(
            method, f"manifests/{version}", what, headers={**ANY_MANIFEST, **headers}, limit=limit
        )

    async def _document(self, remote: Remote, version: str, digest: Digest | None, what: str) -> Answer:
        """A manifest as the body of its answer, checked against the digest if that is known."""
        answer = await self._manifest(remote, "GET", version, what, {})
        if answer.status != 200:
            raise await answer.error(what)
        if digest:
            check(answer.body, digest, what)
        return answer

    async def _tags(self, remote: Remote) -> list[str]:
        first = f"tags/list?n={_PAGE}"
        try:
            page, path = await self._page(remote, first)
        except NotFound:
            # zuul-registry has no such page if it is asked with a query.
            page, path = await self._page(remote, "tags/list")
        found: set[str] = set()
        for _ in range(_MOST_PAGES):
            if found.issuperset(page):
                break  # nothing new: the end, or a loop
            found.update(page)
            if path is None and len(page) == _PAGE:
                # Old registries page without saying so.
                path = f"{first}&last={quote(page[-1], safe='')}"
            if path is None:
                break
            page, path = await self._page(remote, path)
        else:
            raise Invalid(f"{self.name} lists its tags on more than {_MOST_PAGES} pages")
        odd = {tag for tag in found if not is_tag(tag)}
        if odd:
            _log.warning("%s lists %d tags that are none, like %.80a", self.name, len(odd), min(odd))
        return sorted(found - odd)

    async def _page(self, remote: Remote, path: str) -> tuple[list[str], str | None]:
        """One page of tags, and the URL of the next."""
        what = f"the list of tags of {self.name}"
        answer = await remote.send("GET", path, what, limit=_LARGEST_PAGE)
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
