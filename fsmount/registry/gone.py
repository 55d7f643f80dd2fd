"""Gone: the source of what nobody is configured to ask any more, and of which the cache may have enough."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import NoReturn

from fsmount.errors import Unreachable
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor
from fsmount.registry.source import Bytes


class Gone:
    """A source that has no answer."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def tags(self) -> list[str]:
        self._fail()

    async def resolve(self, version: str | None, *, known: Digest | None = None) -> Descriptor:
        self._fail()

    async def manifest(self, digest: Digest) -> tuple[bytes, str | None]:
        self._fail()

    @asynccontextmanager
    async def blob(
        self, descriptor: Descriptor, *, start: int = 0, stop: int | None = None
    ) -> AsyncGenerator[Bytes, None]:
        self._fail()
        yield

    def distrust(self, descriptor: Descriptor) -> bool:
        return False

    async def referrers(self, digest: Digest, artifact_type: str | None = None) -> list[Descriptor]:
        self._fail()

    async def small_blob(self, descriptor: Descriptor) -> bytes:
        self._fail()

    def _fail(self) -> NoReturn:
        raise Unreachable(f"{self.name} is asked for nothing any more: no app of the configuration shows it")
