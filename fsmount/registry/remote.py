"""Remote: one repository at one server."""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

from fsmount.oci.manifest import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from fsmount.registry.auth import Access
from fsmount.registry.endpoint import Endpoint
from fsmount.registry.server import Server
from fsmount.registry.wire import Answer

# One header, and on HEAD too: docker-registry 2.8 says "not found" where a type is not accepted. Indexes must
# be, or a registry may answer with one image of an index, and a digest that is not the tag's.
ANY_MANIFEST = {"Accept": ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST))}


@dataclass(frozen=True, slots=True)
class Remote:
    """The repository at one server."""

    server: Server
    endpoint: Endpoint

    async def send(
        self,
        method: str,
        path: str,
        what: str,
        *,
        headers: Mapping[str, str] | None = None,
        limit: int | None = None,
        content: bytes | None = None,
        actions: str = "pull",
        signed: bool = False,
        stay: bool = False,
    ) -> Answer:
        """As Server.send, for a path below the repository, or the absolute URL of a further page.

        A mirror is asked once: what it does not give, the next server does.
        """
        if "://" not in path:
            path = f"{self.endpoint.repository}/{path}"
            if self.endpoint.namespace:
                path += f"{'&' if '?' in path else '?'}ns={quote(self.endpoint.namespace, safe='')}"
        access = Access(self.endpoint.repository, actions)
        return await self.server.send(
            method,
            path,
            access=access,
            what=what,
            headers=headers,
            limit=limit,
            content=content,
            signed=signed,
            stay=stay,
            again=self.endpoint.is_origin,
        )
