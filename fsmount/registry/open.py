"""From a parsed reference to its Source."""

from types import TracebackType
from typing import Self

import httpx
import trio

from fsmount.oci.reference import LayoutReference, Reference
from fsmount.registry.client import Repository
from fsmount.registry.credentials import DockerConfig
from fsmount.registry.layout import Layout
from fsmount.registry.registry import Registry
from fsmount.registry.retry import Retry
from fsmount.registry.source import Source
from fsmount.registry.transport import Timeouts, new_transport
from fsmount.registry.wire import Wire

_CLOSE_SECONDS = 5.0


class Sources:
    """All sources of a process, and the connections and tokens that they share.

    Ownership: an async context manager; leaving it closes all connections. The sources die with it.
    """

    def __init__(
        self,
        *,
        plain_http: frozenset[str] = frozenset(),
        timeouts: Timeouts | None = None,
        retry: Retry | None = None,
        credentials: DockerConfig | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """plain_http: the registries (`host[:port]`) that are spoken to without TLS.

        transport replaces the network, for tests.
        """
        self._plain_http = plain_http
        self._retry = retry or Retry()
        self._credentials = credentials or DockerConfig()
        self._transport = transport or new_transport()
        self._wire = Wire(self._transport, timeouts or Timeouts())
        self._registries: dict[str, Registry] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with trio.CancelScope(deadline=trio.current_time() + _CLOSE_SECONDS, shield=True):
            await self._transport.aclose()

    def open(self, reference: Reference | LayoutReference) -> Source:
        """The source of a reference, whose version does not matter. Touches neither network nor disk.

        Raises: UsageError, if the registry's name cannot be one.
        """
        if isinstance(reference, LayoutReference):
            return Layout(reference.path)
        return Repository(self._registry(reference.domain), reference)

    def _registry(self, domain: str) -> Registry:
        registry = self._registries.get(domain)
        if registry is None:
            plain_http = domain in self._plain_http
            registry = Registry(
                domain, self._wire, self._credentials, plain_http=plain_http, retry=self._retry
            )
            self._registries[domain] = registry
        return registry
