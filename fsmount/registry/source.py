"""Source: the one interface to places that keep images, whatever they are."""

import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from fsmount.errors import Corrupt, Invalid
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor

#: What image-spec and distribution-spec let every client refuse to exceed.
LARGEST_MANIFEST = 4 * 1024 * 1024

# Signatures, attestations and referrers are kept under tags of this form.
_HOUSEKEEPING = re.compile(r"sha256-[0-9a-f]{64}(\.[a-z]+)?")


class Bytes(Protocol):
    """An iterator of pieces of a blob."""

    @property
    def offset(self) -> int:
        """Where in the blob the next piece begins."""
        ...

    @property
    def stop(self) -> int:
        """Where in the blob the last piece ends."""
        ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...
    async def __anext__(self) -> bytes: ...


class Source(Protocol):
    """One repository of a registry, or one layout folder.

    Every method but `tags` names content by digest or yields one, so what it returns never changes.
    All may raise NotFound, AccessDenied, Unreachable and its kinds, Corrupt and Invalid.

    Cancellation: safe everywhere; a connection in use is closed.
    """

    #: For messages: `registry.example.com/team/web`, `oci-layout:/srv/builds`.
    name: str

    async def tags(self) -> list[str]:
        """All tags, sorted, each once; also those of housekeeping."""
        ...

    async def resolve(self, version: str | None, *, known: Digest | None = None) -> Descriptor:
        """What a tag or a digest (`sha256:…`) stands for now; None is `latest`, or a layout's only image.

        Asked with HEAD where possible: a GET counts as a pull on Docker Hub. known is what it stood for when
        it was last asked. media_type and size are as the source said them (the type may be unusable, or
        empty, and the size 0, when it only said that nothing has changed); `manifest` verifies the bytes.
        """
        ...

    async def manifest(self, digest: Digest) -> tuple[bytes, str | None]:
        """The bytes of a manifest or index, verified, and the media type as the source said it."""
        ...

    def blob(
        self, descriptor: Descriptor, *, start: int = 0, stop: int | None = None
    ) -> AbstractAsyncContextManager[Bytes]:
        """The bytes of a blob from start to its end, in pieces as they come. Not verified: the caller hashes.

        With a stop, no more is wanted than what lies before it; but a server that knows no ranges sends the
        whole blob, and then the pieces are that, as their `offset` and `stop` tell.

        A body that breaks off is resumed at the last good byte. Leaving the context closes the connection.

        Raises: Corrupt, while iterating, if the blob's length is not descriptor.size.
        """
        ...

    def distrust(self, descriptor: Descriptor) -> bool:
        """Says that what came of this blob was not what its digest names.

        True if it came from a place that is not asked for it any more, and others remain to be asked.
        """
        ...

    async def referrers(self, digest: Digest, artifact_type: str | None = None) -> list[Descriptor]:
        """The manifests here that have this one as their subject, perhaps of one type only; none is no error."""
        ...

    async def small_blob(self, descriptor: Descriptor) -> bytes:
        """A blob of at most 4 MiB in one piece, verified; taken from the descriptor if that carries it."""
        ...


async def read_small(source: Source, descriptor: Descriptor) -> bytes:
    """What every `small_blob` does. Raises: Invalid (too large), Corrupt."""
    if descriptor.data is not None:
        return descriptor.data
    if descriptor.size > LARGEST_MANIFEST:
        raise Invalid(f"blob {descriptor.digest} of {source.name} is too large: {descriptor.size} bytes")
    async with source.blob(descriptor) as pieces:
        data = b"".join([piece async for piece in pieces])
    check(data, descriptor.digest, f"blob {descriptor.digest} of {source.name}")
    return data


def check(data: bytes, digest: Digest, what: str) -> None:
    """Raises: Corrupt unless data is what digest names."""
    if not digest.matches(data):
        raise Corrupt(f"{what} is not what its digest names: its {len(data)} bytes have another one")


def is_housekeeping(tag: str) -> bool:
    """Whether a tag holds signatures or referrers of another image, and is hidden from listings."""
    return _HOUSEKEEPING.fullmatch(tag) is not None
