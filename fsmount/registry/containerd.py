"""hosts.toml: which servers containerd asks for a registry's images, and how (its docs/hosts.md)."""

import logging
import posixpath
import re
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from fsmount.errors import Invalid
from fsmount.oci.shape import Shape
from fsmount.registry.endpoint import Capability, ClientCertificate, Tls

_log = logging.getLogger(__name__)

_CAPABILITIES = {
    "pull": Capability.PULL,
    "resolve": Capability.RESOLVE,
    "push": Capability.PUSH,
    "referrers": Capability.REFERRERS,
}
_HOST_KEYS = frozenset(
    {"capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout"}
)
_ROOT_KEYS = _HOST_KEYS | {"server", "host"}

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*")
_DURATION_PART = re.compile("([0-9]+[.]?[0-9]*|[.][0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_DURATION = re.compile(f"[+]?(?:0|(?:{_DURATION_PART.pattern})+)")
_UNIT_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class Address:
    """A URL that somebody wrote for a server's API."""

    scheme: str
    #: `host[:port]`, in lower case.
    host: str
    #: With slashes at both ends.
    path: str


@dataclass(frozen=True, slots=True)
class Host:
    """How one server is spoken to."""

    #: None is the registry's own server, at the address that its name says.
    address: Address | None
    capabilities: Capability
    tls: Tls
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    connect_seconds: float | None


@dataclass(frozen=True, slots=True)
class HostsFile:
    """A hosts.toml: who is asked first, in order, and who at last."""

    mirrors: tuple[Host, ...]
    server: Host


def folders(root: Path, domain: str) -> tuple[Path, ...]:
    """Where containerd looks for what concerns a registry: the first that exists counts; `_default` is last."""
    certs = root / "etc/containerd/certs.d"
    host, colon, port = domain.rpartition(":")
    spelled = [f"{host}_{port}_"] if colon and port.isdecimal() else []
    return tuple(certs / name for name in (*spelled, domain, "_default"))


def parse(file: Shape, path: Path) -> HostsFile:
    """Keys that are not known are ignored, as containerd does, which is logged. Raises: Invalid."""
    ignored = _unknown(file, _ROOT_KEYS, "")
    mirrors = []
    tables = file.get("host")
    for number, text in enumerate(tables.object().value if tables else (), 1):
        # A URL with credentials shall not be repeated in a message.
        name = f"host {number}" if "@" in text or "?" in text else f"host {text!a}"
        table = Shape(tables.value[text] if tables else None, f"{file.where}: {name}").object()
        if "host" in table:
            raise Invalid(f"{table.where} holds a host of its own")
        ignored += _unknown(table, _HOST_KEYS, f"{name}: ") + _surplus(table, f"{name}: ")
        mirrors.append(_host(text, table, table.where, path.parent))
    ignored += _surplus(file, "")
    server = file["server"].string() if "server" in file else ""
    last = _host(server, file, f"{file.where}: server", path.parent)
    if ignored:
        _log.warning("%s has what is ignored: %s", path, "; ".join(ignored))
    return HostsFile(tuple(mirrors), last)


def _host(text: str, table: Shape, where: str, folder: Path) -> Host:
    override_path = "override_path" in table and table["override_path"].boolean()
    address = _address(text, where, override_path=override_path) if text else None
    ca, client = table.get("ca"), table.get("client")
    tls = Tls(
        authorities=tuple(folder / text for text in _texts(ca)) if ca else (),
        client=_clients(client, folder)[0] if client else None,
        verify=not ("skip_verify" in table and table["skip_verify"].boolean()),
    )
    capabilities = _capabilities(table)
    timeout = table.get("dial_timeout")
    return Host(
        address,
        # A server that is not named is asked for everything, whatever is written.
        capabilities if address else Capability.ALL,
        tls,
        _headers(table),
        _seconds(timeout) if timeout else None,
    )


def _address(text: str, where: str, *, override_path: bool) -> Address:
    full = text if "://" in text else f"https://{text}"
    try:
        url = httpx.URL(full)
        is_server = url.scheme in ("http", "https") and url.host
    except (httpx.InvalidURL, ValueError):  # the latter of a name in Punycode that is none
        raise Invalid(f"{where} is no URL") from None
    if not is_server:
        raise Invalid(f"{where} is no http or https URL")
    if url.userinfo or url.query or url.fragment:
        raise Invalid(f"{where} has more than a scheme, a host and a path")
    path = posixpath.normpath("/" + url.raw_path.decode("ascii").strip("/"))
    if not override_path and not path.endswith("/v2"):
        path = f"{path.rstrip('/')}/v2"
    host = full.partition("://")[2].partition("/")[0].lower()
    return Address(url.scheme, host, f"{path.rstrip('/')}/")


def _capabilities(table: Shape) -> Capability:
    names = list(table["capabilities"].strings()) if "capabilities" in table else []
    granted = Capability(0)
    for name in names:
        capability = _CAPABILITIES.get(name.value.lower())
        if capability is None:
            raise Invalid(f"{name.where} is none of {', '.join(_CAPABILITIES)}: {name.value[:80]!a}")
        granted |= capability
    return granted or Capability.ALL


def _texts(value: Shape) -> list[str]:
    """A string, or a list of them."""
    return [value.value] if isinstance(value.value, str) else [item.value for item in value.strings()]


def _clients(value: Shape, folder: Path) -> list[ClientCertificate]:
    items = value.value if isinstance(value.value, list) else [value.value]
    pairs = [(item, "") if isinstance(item, str) else item for item in items]
    for pair in pairs:
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise Invalid(
                f"{value.where} is no path of a certificate, and no list of paths or pairs of paths"
            )
    if not pairs:
        raise Invalid(f"{value.where} is empty")
    return [ClientCertificate(folder / cert, folder / key if key else None) for cert, key in pairs]


def _headers(table: Shape) -> tuple[tuple[str, str], ...]:
    """The messages quote no value: it may be a secret."""
    entries = table.value.get("header", {})
    if not isinstance(entries, dict):
        raise Invalid(f"{table.where}: header is no table")
    headers = []
    for name, value in entries.items():
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str) or not _HEADER_VALUE.fullmatch(text):
                raise Invalid(f"{table.where}: header {name[:80]!a} is no text that may be sent")
            headers.append((name, text))
        if not _HEADER_NAME.fullmatch(name):
            raise Invalid(f"{table.where}: {name[:80]!a} is no name of a header")
    return tuple(headers)


def _seconds(value: Shape) -> float | None:
    """Go's durations; zero is none, as for its net.Dialer."""
    text = value.string()
    if text and not _DURATION.fullmatch(text):
        raise Invalid(f'{value.where} is no duration like "200ms" or "1m30s": {text[:80]!a}')
    return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in _DURATION_PART.findall(text)) or None


def _unknown(table: Shape, known: frozenset[str], place: str) -> list[str]:
    return [f"{place}the unknown key {key[:80]!a}" for key in table.value if key not in known]


def _surplus(table: Shape, place: str) -> list[str]:
    """We show one certificate; containerd would let the server choose."""
    several = isinstance(table.value.get("client"), list) and len(table.value["client"]) > 1
    return [f"{place}every client but the first"] if several else []
