"""From a parsed reference to its Source."""

import os
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Self

import httpx
import trio

from fsmount.errors import Unreachable
from fsmount.oci.reference import LayoutReference, Reference
from fsmount.registry.client import Repository
from fsmount.registry.credentials import Credentials
from fsmount.registry.destination import Destination, LayoutDestination, RepositoryDestination
from fsmount.registry.endpoint import Capability, Endpoint
from fsmount.registry.hosts import Hosts, default_bases
from fsmount.registry.layout import Layout
from fsmount.registry.proxies import Proxies
from fsmount.registry.remote import Remote
from fsmount.registry.retry import Retry
from fsmount.registry.server import Asked, RateLimit, Server
from fsmount.registry.source import Source
from fsmount.registry.standing import Standing
from fsmount.registry.transport import Timeouts, Transports
from fsmount.registry.wire import Limits, Wire

_CLOSE_SECONDS = 5.0


class Sources:
    """All sources of a process, and the connections and tokens that they share.

    Ownership: an async context manager; leaving it closes all connections. The sources die with it.
    """

    def __init__(
        self,
        *,
        hosts: Hosts | None = None,
        timeouts: Timeouts | None = None,
        limits: Limits | None = None,
        retry: Retry | None = None,
        credentials: Credentials | None = None,
        proxies: Proxies | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        is_offline: bool = False,
    ) -> None:
        """What is not given is as this user and this machine have it. transport replaces the network, for tests.

        is_offline: every registry counts as unreachable, and none is asked.

        Raises: UsageError (a proxy).
        """
        self._hosts = hosts or Hosts()
        self._retry = retry or Retry()
        self._credentials = credentials or Credentials()
        self._transports = Transports(proxies or Proxies.from_environment(os.environ), network=transport)
        self._wire = Wire(self._transports, timeouts or Timeouts(), limits or Limits())
        self._servers: dict[Endpoint, Server] = {}
        self._standings: dict[str, Standing] = {}
        self._is_offline = is_offline
        self._nursery_manager = trio.open_nursery()
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Self:
        self._nursery = await self._nursery_manager.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        await self._nursery_manager.__aexit__(None, None, None)
        with trio.CancelScope(deadline=trio.current_time() + _CLOSE_SECONDS, shield=True):
            await self._transports.aclose()

    def open(self, reference: Reference | LayoutReference) -> Source:
        """The source of a reference, whose version does not matter. Touches neither network nor disk.

        Raises: UsageError, if the registry's name cannot be one.
        """
        if isinstance(reference, LayoutReference):
            return Layout(reference.path)
        default_bases(reference.domain)

        async def remotes() -> list[Remote]:
            return await self.remotes(reference)

        standing = self._standings.setdefault(reference.name, Standing(reference.name))
        return Repository(reference, remotes, standing)

    def destination(self, reference: Reference | LayoutReference) -> Destination:
        """Where what refers to the images of a reference is published: beside them. As `open`."""
        if isinstance(reference, LayoutReference):
            return LayoutDestination(reference.path)

        async def remotes() -> list[Remote]:
            return await self.remotes(reference)

        return RepositoryDestination(self.open(reference), remotes)

    async def remotes(self, reference: Reference) -> list[Remote]:
        """The servers of a repository, in the order of asking.

        A mirror that has failed, and rested, is asked in the background whether it is back.

        Raises: UsageError (a malformed file), AccessDenied (the repository is blocked), Unreachable (see `is_offline`).
        """
        if self._is_offline:
            raise Unreachable(f"{reference.name} is not asked: this process serves what is in the cache")
        endpoints = self._hosts.endpoints(reference.domain, reference.repository)
        remotes = [Remote(self._server(endpoint), endpoint) for endpoint in endpoints]
        for remote in remotes:
            if len(remotes) > 1 and self._nursery is not None and remote.server.health.take_probe():
                self._nursery.start_soon(remote.server.probe)
        return remotes

    def rate_limits(self) -> Mapping[str, RateLimit]:
        """What servers have said of the pulls that are left, by their names."""
        servers = self._servers.values()
        return {server.domain: server.rate_limit for server in servers if server.rate_limit}

    def asked(self) -> Mapping[str, Asked]:
        """How many requests servers were sent, by their names."""
        found: dict[str, Asked] = {}
        for server in self._servers.values():
            before = found.get(server.domain, Asked(0, 0))
            found[server.domain] = Asked(
                before.requests + server.asked.requests, before.retries + server.asked.retries
            )
        return found

    def standing(self, source: Source) -> Standing | None:
        """What became of asking a repository; None of a layout, which asks nobody."""
        return self._standings.get(source.name)

    def _server(self, endpoint: Endpoint) -> Server:
        """One for all repositories on it."""
        key = replace(endpoint, repository="", namespace=None, capabilities=Capability.ALL, is_origin=False)
        server = self._servers.get(key)
        if server is None:
            server = self._servers[key] = Server(key, self._wire, self._credentials, retry=self._retry)
        return server
