"""greeting: the first steps to a server, one by one: its address, its front door, and whether it knows us."""

import ipaddress
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
import trio

from fsmount.errors import Unreachable
from fsmount.registry.auth import Access
from fsmount.registry.endpoint import Endpoint
from fsmount.registry.proxies import Proxies
from fsmount.registry.server import Server
from fsmount.registry.urls import host_of, shown

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Way:
    """Whose address is needed to reach a server: its own, or that of the proxy before it.

    `proxy` is its URL, without the password.
    """

    host: str
    port: int
    proxy: str | None

    @property
    def is_address(self) -> bool:
        """Whether there is no name to look up."""
        try:
            ipaddress.ip_address(self.host.strip("[]"))
        except ValueError:
            return False
        return True


def way_to(endpoint: Endpoint, environ: Mapping[str, str] = os.environ) -> Way:
    """Raises: UsageError (a proxy)."""
    url = httpx.URL(endpoint.bases[0])
    proxy = Proxies.from_environment(environ).proxy_for(url)
    first = url if proxy is None else proxy
    port = first.port or _PORTS[first.scheme]
    return Way(host_of(first), port, None if proxy is None else shown(proxy))


async def addresses(way: Way) -> list[str]:
    """What its name stands for. Raises: Unreachable."""
    try:
        found = await trio.socket.getaddrinfo(way.host.strip("[]"), way.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else error
        raise Unreachable(
            f"{way.host} has no address: {reason}",
            remedy="Check the name, and the DNS servers of this machine (/etc/resolv.conf).",
        ) from error
    return sorted({str(address[0]) for *_, address in found})


@dataclass(frozen=True, slots=True)
class Greeting:
    """How a server answered somebody whom it does not know."""

    url: str
    status: int
    #: How far its clock is ahead of ours; None if it did not say what time it is.
    ahead_seconds: float | None
    #: Until when its certificate is good; None without TLS, and of one that was not checked.
    certificate_expires: datetime | None


async def greet(server: Server) -> Greeting:
    """Raises: Unreachable and its kinds, UsageError (the file of a certificate)."""
    answer = await server.knock()
    now = datetime.now(UTC)
    expires = answer.certificate_expires
    await answer.settle()
    date = None
    with suppress(ValueError, TypeError):
        date = parsedate_to_datetime(answer.headers.get("Date"))
    return Greeting(
        shown(answer.url),
        answer.status,
        None if date is None or date.tzinfo is None else (date - now).total_seconds(),
        expires,
    )


async def introduce(server: Server) -> None:
    """Tells a server who we are, whatever it is to be asked for then.

    Raises: AccessDenied, if it does not take that; Unreachable and its kinds, UsageError.
    """
    answer = await server.send("GET", "", access=Access(""), what=server.domain, again=False)
    if answer.status != 200:
        raise await answer.error(server.domain)
    await answer.settle()
