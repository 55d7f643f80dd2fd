"""Which addresses a registry may send us to: the rules for redirects, token servers and further pages."""

import ipaddress
import socket

import httpx

from fsmount.errors import Refused, Unreachable

_PORTS = {"http": 80, "https": 443}


def origin(url: httpx.URL) -> tuple[str, str, int | None]:
    """Scheme, host and port: what credentials are bound to."""
    return url.scheme, host_of(url), url.port or _PORTS.get(url.scheme)


def host_of(url: httpx.URL) -> str:
    """The host as it is sent: httpx's own decodes names in Punycode, and fails at some."""
    return url.raw_host.decode("ascii")


def is_loopback(host: str) -> bool:
    """Whether host is this machine, by its name or in any way of writing such an address."""
    address = _literal(host)
    return host.rstrip(".") == "localhost" if address is None else address.is_loopback


def shown(url: httpx.URL) -> str:
    """The URL as a message may show it: a signed URL's query is a secret."""
    return str(url.copy_with(query=None, fragment=None, userinfo=b""))


def follow(base: httpx.URL, location: str, *, registry: httpx.URL, purpose: str) -> httpx.URL:
    """Where location, relative to base, leads, if the registry may send us there.

    Never from https to http, and never from elsewhere to this machine or its link (CVE-2026-33540; the
    metadata service of clouds is link-local). Private addresses stay allowed: on-premises stores have
    them. A name that resolves to such an address is not noticed.

    Raises: Refused, Unreachable (no URL at all).
    """
    try:
        url = base.join(location)
        host_of(url)
    except (httpx.InvalidURL, ValueError) as error:  # UnicodeError among the latter
        raise Unreachable(f"{shown(base)} gives a {purpose} that is no URL") from error
    reason = _objection(base, url, registry)
    if reason:
        raise Refused(f"{shown(base)} gives a {purpose} that is refused, {shown(url)[:300]}: {reason}")
    return url


def _objection(base: httpx.URL, url: httpx.URL, registry: httpx.URL) -> str | None:
    if url.scheme not in _PORTS or not host_of(url):
        return "it is neither http nor https"
    if url.userinfo:
        return "it holds credentials"
    if url.scheme == "http" and (base.scheme == "https" or registry.scheme == "https"):
        return "it would leave https"
    if not is_loopback(host_of(registry)) and _is_inside(host_of(url)):
        return "it leads to this machine, or to its link"
    return None


def _is_inside(host: str) -> bool:
    address = _literal(host)
    if address is None:
        return f".{host.rstrip('.')}".endswith(".localhost")
    return address.is_loopback or address.is_link_local or address.is_unspecified


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that host spells, also as getaddrinfo reads 127.1, 0x7f000001 or 2130706433."""
    text = host.strip("[]").rstrip(".")
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(text))
        except (OSError, UnicodeError, ValueError):
            return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
