"""Which proxy a URL goes through: what HTTPS_PROXY, HTTP_PROXY and NO_PROXY mean to the users of Go programs."""

import ipaddress
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import httpx

from fsmount.errors import UsageError
from fsmount.registry.urls import is_loopback

_PORTS = {"http": 80, "https": 443}
_PORT = re.compile(r"[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class _Networks:
    """Addresses in an entry of NO_PROXY; a port of None is every port."""

    network: ipaddress.IPv4Network | ipaddress.IPv6Network
    port: int | None

    def holds(self, host: str, port: int) -> bool:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address) in self.network and self.port in (None, port)


@dataclass(frozen=True, slots=True)
class _Names:
    """Names in an entry of NO_PROXY: those that end in suffix, which begins with a dot, and perhaps its own."""

    suffix: str
    itself: bool
    port: int | None

    def holds(self, host: str, port: int) -> bool:
        # What follows the % of an IPv6 address is no domain (CVE-2025-22870).
        name = host.partition("%")[0]
        found = name.endswith(self.suffix) or (self.itself and name == self.suffix[1:])
        return found and self.port in (None, port)


@dataclass(frozen=True, slots=True)
class Proxies:
    """The proxies for http and https, and what is reached without; a pure value.

    As in Go's httpproxy, except that a proxy that cannot be used is an error instead of none, and that
    REQUEST_METHOD means nothing: fsmount is no CGI program.
    """

    http: httpx.URL | None = None
    https: httpx.URL | None = None
    without: tuple[_Networks | _Names, ...] = ()

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """What the variables say; in upper case first, and one that is empty counts as not set.

        Raises: UsageError, that names the variable.
        """
        _, text = _variable(environ, "NO_PROXY")
        entries = (_parse_entry(entry.strip()) for entry in text.split(","))
        return cls(
            http=_parse_proxy(*_variable(environ, "HTTP_PROXY")),
            https=_parse_proxy(*_variable(environ, "HTTPS_PROXY")),
            without=tuple(entry for entry in entries if entry),
        )

    def proxy_for(self, url: httpx.URL) -> httpx.URL | None:
        """The proxy to reach url through, with what it wants to see as userinfo; None: directly."""
        if url.scheme not in _PORTS:
            return None
        proxy = self.http if url.scheme == "http" else self.https
        host, port = _host(url), url.port or _PORTS[url.scheme]
        # This machine in all its spellings, also where Go knows only some: plain http is permitted there.
        if proxy is None or is_loopback(host):
            return None
        return None if any(entry.holds(host, port) for entry in self.without) else proxy


def _variable(environ: Mapping[str, str], name: str) -> tuple[str, str]:
    """The name that is set, and its value."""
    names = (name, name.lower())
    return next(((name, environ[name]) for name in names if environ.get(name)), (name, ""))


def _parse_proxy(variable: str, text: str) -> httpx.URL | None:
    if not text:
        return None
    try:
        url = httpx.URL(text if "://" in text else f"http://{text}")
        host = _host(url)
    except (httpx.InvalidURL, UnicodeError):
        url, host = httpx.URL(), ""  # and not the exception: it quotes what may be a password
    # A password with a slash in it ends the host early, and would be taken for a path.
    is_cut = "@" in text and not url.userinfo
    if url.scheme not in _PORTS or not host or "%" in host or (url.port or 0) > 65535 or is_cut:
        raise UsageError(
            f"{variable} is not the URL of a proxy that fsmount could use",
            remedy="It reads http://[USER:PASSWORD@]HOST[:PORT], or https://…; "
            "what is no letter or digit in a password is written as %2F is for a slash.",
        )
    return url


def _parse_entry(text: str) -> _Networks | _Names | None:
    """One entry of NO_PROXY; one that means nothing is passed over."""
    if text == "*":
        return _Names(suffix="", itself=False, port=None)
    host, colon, digits = text.rpartition(":")
    # The colons of an IPv6 address belong to it, unless it stands in brackets.
    if colon and _PORT.fullmatch(digits) and (":" not in host or host.endswith("]")):
        port = int(digits)
    else:
        host, port = text, None
    with suppress(ValueError):
        return _Networks(ipaddress.ip_network(host.strip("[]"), strict=False), port)
    name = _ascii(host.removeprefix("*.").removeprefix("."))
    return _Names(f".{name}", itself=not host.startswith((".", "*.")), port=port) if name else None


def _ascii(name: str) -> str:
    """A name as it stands in a request, in lower case."""
    try:
        return _host(httpx.URL(scheme="http", host=name))
    except (httpx.InvalidURL, UnicodeError):
        return name


def _host(url: httpx.URL) -> str:
    # httpx.URL.host would decode xn-- names, and raise what idna raises for some.
    return url.raw_host.decode("ascii")
