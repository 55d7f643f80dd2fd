"""Hosts: which servers are asked for a repository, from the files that containerd, podman and docker use."""

import logging
import os
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

import httpx

from fsmount.errors import Invalid, UsageError
from fsmount.oci.shape import Shape
from fsmount.registry import certificates, containerd, containers, dockerd
from fsmount.registry.endpoint import Endpoint, Tls
from fsmount.registry.urls import is_loopback

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_LARGEST_FILE = 1024 * 1024
_HUB = "docker.io"
_HUB_SERVER = "registry-1.docker.io"
_HUB_NAMES = frozenset({_HUB, "index.docker.io", _HUB_SERVER})


class Hosts:
    """Which servers to ask for a repository, in order; the last resort, the origin, is always among them
    unless an administrator left it out.

    One source decides: containerd's hosts.toml for the registry, else a rule of registries.conf that
    matches, else docker's daemon.json, else the registry's name. Files are read again when they change.
    What lies in a folder that is closed to us was not made for us, and is passed over, which is logged.
    Threads may use it at once.
    """

    def __init__(
        self,
        *,
        plain_http: frozenset[str] = frozenset(),
        root: Path = Path("/"),
        environ: Mapping[str, str] = os.environ,
        home: Path | None = None,
    ) -> None:
        """plain_http: the servers (`host[:port]`) that are spoken to without TLS, whatever a file says.

        root stands before /etc. home is the user's folder, by default as the environment has it.
        """
        self._plain_http = plain_http
        self._root = root
        self._environ = environ
        self._home = home or Path(environ.get("HOME") or os.path.expanduser("~"))
        self._passed_over: set[Path] = set()
        self._hosts_files = _Files(
            lambda data, path: containerd.parse(_toml(data, path), path),
            self._pass_over,
            remedy="See docs/hosts.md of containerd.",
        )
        self._registries = _Files(
            lambda data, path: containers.parse(_toml(data, path), path),
            self._pass_over,
            remedy="See containers-registries.conf(5), version 2.",
        )
        self._daemon = _Files(
            lambda data, path: dockerd.parse(Shape.parse(data, str(path))),
            self._pass_over,
            remedy="See docker's documentation of daemon.json.",
        )

    def endpoints(self, domain: str, repository: str) -> tuple[Endpoint, ...]:
        """Whom to ask for a repository, in order. Blocks on the disk, briefly.

        Raises: UsageError, naming the file that is malformed or cannot be read; AccessDenied, naming the
            file that blocks the repository.
        """
        found = (
            self._from_containerd(domain, repository)
            or self._from_containers(domain, repository)
            or self._from_docker(domain, repository)
        )
        return tuple(map(self._over_plain_http, found))

    def _from_containerd(self, domain: str, repository: str) -> list[Endpoint]:
        folders = containerd.folders(self._root, domain)
        path = next(filter(self._is_folder, folders), folders[-1]) / "hosts.toml"
        file = self._hosts_files.load(path)
        if file is None:
            return []
        return [
            self._as_written(host, domain, repository, path, is_origin=host is file.server)
            for host in (*file.mirrors, file.server)
        ]

    def _as_written(
        self, host: containerd.Host, domain: str, repository: str, path: Path, *, is_origin: bool
    ) -> Endpoint:
        address = host.address
        name = address.host if address else domain
        return Endpoint(
            bases=(f"{address.scheme}://{_server(name)}{address.path}",)
            if address
            else default_bases(domain),
            repository=repository,
            domain=_known_as(name),
            capabilities=host.capabilities,
            is_origin=is_origin,
            # As containerd has it: the name in the reference, to every server that does not have it.
            namespace=None if _known_as(name.lower()) == _known_as(domain.lower()) else domain,
            tls=host.tls,
            headers=host.headers,
            connect_seconds=host.connect_seconds,
            written_in=path,
        )

    def _from_containers(self, domain: str, repository: str) -> list[Endpoint]:
        rules: dict[str, containers.Rule] = {}
        for path in containers.files(self._root, self._home, self._environ):
            rules.update(self._registries.load(path) or {})
        return [self._endpoint(place) for place in containers.places(rules, domain, repository)]

    def _from_docker(self, domain: str, repository: str) -> list[Endpoint]:
        path = self._root / "etc/docker/daemon.json"
        daemon = self._daemon.load(path) or dockerd.DaemonFile()
        mirrors = [
            Endpoint(
                bases=(f"{mirror.scheme}://{_server(mirror.host)}/v2/",),
                repository=repository,
                domain=_known_as(mirror.host),
                capabilities=containers.MIRROR,
                tls=self._tls(mirror.host, insecure=daemon.is_insecure(mirror.host)),
                written_in=path,
            )
            for mirror in (daemon.mirrors if domain == _HUB else ())
        ]
        insecure = daemon.is_insecure(domain)
        origin = containers.Place(domain, repository, insecure, written_in=path if insecure else None)
        return [*mirrors, self._endpoint(origin)]

    def _endpoint(self, place: containers.Place) -> Endpoint:
        return Endpoint(
            bases=default_bases(place.host, insecure=place.insecure),
            repository=place.repository,
            domain=_known_as(place.host),
            capabilities=place.capabilities,
            is_origin=place.is_origin,
            tls=self._tls(place.host, insecure=place.insecure),
            written_in=place.written_in,
        )

    def _tls(self, host: str, *, insecure: bool) -> Tls:
        """Whom to trust as a server, from the first folder of certificates for it, and who we are to it."""
        *own, default = containerd.folders(self._root, host)
        of_others = certificates.folders(self._root, self._home, host)
        for folder in (*own, *of_others, default):
            # A folder with a hosts.toml holds what that names, and nothing else of it counts.
            if self._is_folder(folder) and not _is_filled(folder / "hosts.toml"):
                tls = certificates.parse(folder, self._files_in(folder), joined=folder not in of_others)
                return replace(tls, verify=not insecure)
        return Tls(verify=not insecure)

    def _files_in(self, folder: Path) -> tuple[str, ...]:
        try:
            with os.scandir(folder) as entries:
                return tuple(sorted(entry.name for entry in entries if entry.is_file()))
        except OSError as error:
            self._pass_over(folder, error)
            return ()

    def _is_folder(self, path: Path) -> bool:
        try:
            return stat.S_ISDIR(os.stat(path).st_mode)
        except PermissionError as error:
            self._pass_over(path.parent, error)
        except OSError:
            pass
        return False

    def _pass_over(self, path: Path, error: OSError) -> None:
        if path not in self._passed_over:
            self._passed_over.add(path)
            _log.warning("%s is passed over: %s", path, error.strerror)

    def _over_plain_http(self, endpoint: Endpoint) -> Endpoint:
        if endpoint.domain not in self._plain_http:
            return endpoint
        return replace(endpoint, bases=(f"http://{endpoint.bases[0].partition('://')[2]}",))


class _Files(Generic[_T]):
    """What the files of one format say; a file is parsed again when it has changed."""

    def __init__(
        self, parse: Callable[[bytes, Path], _T], pass_over: Callable[[Path, OSError], None], *, remedy: str
    ) -> None:
        self._parse = parse
        self._pass_over = pass_over
        self._remedy = remedy
        self._known: dict[Path, tuple[tuple[int, int, int], _T]] = {}

    def load(self, path: Path) -> _T | None:
        """None: there is no such file, or it is empty. Raises: UsageError."""
        try:
            known = self._known.get(path)
            if known is not None and known[0] == _stamp(os.stat(path)):
                return known[1]
            # Whatever stands there, opening it does not block.
            with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
                stamp = _stamp(os.fstat(file.fileno()))
                data = file.read(_LARGEST_FILE + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if _is_out_of_reach(path):
                self._pass_over(path, error)
                return None
            raise UsageError(
                f"{path} cannot be read: {error.strerror}",
                remedy="Make it readable: it decides which servers may be asked.",
            ) from error
        if len(data) > _LARGEST_FILE:
            raise UsageError(f"{path} has more than {_LARGEST_FILE} bytes", remedy=self._remedy)
        if not data:
            return None
        try:
            value = self._parse(data, path)
        except Invalid as error:
            raise UsageError(error.message, remedy=self._remedy) from error
        self._known[path] = stamp, value
        return value


def _toml(data: bytes, path: Path) -> Shape:
    try:
        return Shape(tomllib.loads(data.decode("utf-8")), str(path))
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{path} is no TOML: {error}") from error


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mtime_ns, status.st_ino, status.st_size


def _is_out_of_reach(path: Path) -> bool:
    """Whether a folder on the way is closed to us, which is another thing than a file that is."""
    try:
        os.stat(path)
    except OSError:
        return True
    return False


def _is_filled(path: Path) -> bool:
    try:
        return os.stat(path).st_size > 0
    except OSError:
        return False


def _server(host: str) -> str:
    """Who answers to a name: Docker Hub's is that of no server."""
    return _HUB_SERVER if host in _HUB_NAMES else host


def _known_as(host: str) -> str:
    """What credentials are kept under."""
    return _HUB if host in _HUB_NAMES else host


def default_bases(domain: str, *, insecure: bool = False) -> tuple[str, ...]:
    """Where a registry is that nobody wrote a URL for: only where TLS may be left out does http follow."""
    https = f"https://{_server(domain)}/v2/"
    try:
        host = httpx.URL(https).host
    except (httpx.InvalidURL, ValueError) as error:  # the latter of a name in Punycode that is none
        raise UsageError(f"{domain[:300]!r} is no registry host: {error}") from None
    return (https, f"http{https[5:]}") if insecure or is_loopback(host) else (https,)
