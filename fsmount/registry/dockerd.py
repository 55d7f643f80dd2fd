"""daemon.json: docker's mirrors of Docker Hub, and which registries it does not expect TLS of."""

import ipaddress
from dataclasses import dataclass

import httpx

from fsmount.errors import Invalid
from fsmount.oci.shape import Shape

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Mirror:
    """A server that is asked for what Docker Hub has."""

    scheme: str
    #: `host[:port]`, in lower case.
    host: str


@dataclass(frozen=True, slots=True)
class DaemonFile:
    """A daemon.json, as far as it concerns us."""

    mirrors: tuple[Mirror, ...] = ()
    insecure_hosts: frozenset[str] = frozenset()
    insecure_networks: tuple[_Network, ...] = ()

    def is_insecure(self, domain: str) -> bool:
        """Whether domain (`host[:port]`) is listed, or is an address in a network that is.

        Docker also asks the DNS whether a name leads to such a network; we do not.
        """
        if domain.lower() in self.insecure_hosts:
            return True
        try:
            address = ipaddress.ip_address(httpx.URL(f"https://{domain}").host)
        except (httpx.InvalidURL, ValueError):
            return False
        return any(address in network for network in self.insecure_networks)


def parse(file: Shape) -> DaemonFile:
    """Raises: Invalid."""
    mirrors = [_mirror(item) for item in _strings(file, "registry-mirrors")]
    hosts: set[str] = set()
    networks: list[_Network] = []
    for item in _strings(file, "insecure-registries"):
        text = item.string().lower().removeprefix("http://").removeprefix("https://")
        if "/" not in text:
            hosts.add(text)
            continue
        try:
            networks.append(ipaddress.ip_network(text, strict=False))
        except ValueError:
            raise Invalid(f"{item.where} is neither host[:port] nor a network like 10.0.0.0/8") from None
    return DaemonFile(tuple(mirrors), frozenset(hosts), tuple(networks))


def _strings(file: Shape, key: str) -> list[Shape]:
    return list(file[key].strings()) if key in file else []


def _mirror(item: Shape) -> Mirror:
    text = item.string()
    try:
        url = httpx.URL(text)
        is_server = url.scheme in ("http", "https") and url.host
    except (httpx.InvalidURL, ValueError):  # the latter of a name in Punycode that is none
        raise Invalid(f"{item.where} is no URL") from None
    if not is_server or url.userinfo or url.query or url.fragment or url.path != "/":
        raise Invalid(f"{item.where} is not of the form https://host[:port]")
    return Mirror(url.scheme, text.partition("://")[2].rstrip("/").lower())
