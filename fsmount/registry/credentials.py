"""Who we are at which registry, as docker's config.json says."""

import base64
import binascii
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from fsmount.errors import UsageError

_log = logging.getLogger(__name__)

#: How old an answer may be that was given without looking at the file again.
_FRESH_SECONDS = 5.0
_LARGEST_FILE = 1024 * 1024
_HUB_NAMES = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"})


@dataclass(frozen=True, slots=True)
class Password:
    """A user and a password, for Basic, or to be exchanged for a token."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class IdentityToken:
    """A refresh token, to be exchanged for an access token by POST."""

    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class RegistryToken:
    """An access token, ready for use."""

    token: str = field(repr=False)


Credential = Password | IdentityToken | RegistryToken


class DockerConfig:
    """The file of `docker login`; read again when it was replaced or changed.

    Credential helpers are not asked: their registries are used anonymously, which is logged once each.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or _default_path()
        self._stamp: tuple[int, int, int] | None = None
        self._entries = _Entries({}, frozenset(), has_store=False)
        self._read_at = float("-inf")
        self._warned: set[str] = set()

    async def find(self, domain: str, repository: str, *, fresh: bool = False) -> Credential | None:
        """The credential for a repository, by the longest matching key; None is anonymous.

        fresh: look at the file even if it was looked at a moment ago; for use after a refusal.

        Raises: UsageError, naming the file, if it or the matching entry is broken.
        """
        now = trio.current_time()
        if fresh or now - self._read_at > _FRESH_SECONDS:
            await trio.to_thread.run_sync(self._refresh)
            self._read_at = now
        for key in _keys(domain, repository):
            entry = self._entries.auths.get(key)
            credential = _credential(entry, f"{self.path}, entry {key}") if entry is not None else None
            if credential is not None:
                return credential
        if self._entries.has_store or domain in self._entries.helped:
            self._warn_of_helper(domain)
        return None

    def _refresh(self) -> None:
        """Runs in a thread. A missing file is an empty one."""
        try:
            status = self.path.stat()
            stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
            if stamp != self._stamp:
                with self.path.open("rb") as file:
                    self._entries = _parse(file.read(_LARGEST_FILE + 1), self.path)
                self._stamp = stamp
        except (FileNotFoundError, NotADirectoryError):
            self._entries, self._stamp = _Entries({}, frozenset(), has_store=False), None
        except OSError as error:
            raise UsageError(
                f"the credentials in {self.path} cannot be read: {error.strerror}",
                remedy="Make the file readable, or let DOCKER_CONFIG name another folder.",
            ) from error

    def _warn_of_helper(self, domain: str) -> None:
        if domain not in self._warned:
            self._warned.add(domain)
            _log.warning(
                "%s leaves the credentials of %s to a helper program, which is not asked: going on without",
                self.path,
                domain,
            )


@dataclass(frozen=True, slots=True)
class _Entries:
    """The file as it matters: its `auths` by normal key, and which registries have helpers."""

    auths: Mapping[str, Mapping[str, Any]] = field(repr=False)
    helped: frozenset[str]
    has_store: bool


def _default_path() -> Path:
    folder = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    return Path(folder) / "config.json"


def _keys(domain: str, repository: str) -> list[str]:
    """containers-auth.json(5): h/a/b, h/a, h; the most specific key wins."""
    words = [domain, *repository.split("/")]
    return ["/".join(words[:count]) for count in range(len(words), 0, -1)]


def _parse(data: bytes, path: Path) -> _Entries:
    # The file holds secrets: no message may quote it, and none of json's is chained.
    try:
        content = json.loads(data.decode("utf-8")) if len(data) <= _LARGEST_FILE else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise _broken(str(path), "it is no JSON object")
    auths = content.get("auths") or {}
    helpers = content.get("credHelpers") or {}
    if not isinstance(auths, dict) or not isinstance(helpers, dict):
        raise _broken(str(path), "auths and credHelpers must be objects")
    normal: dict[str, Mapping[str, Any]] = {}
    # Keys without a scheme last: they are of today, and win over URLs that older tools left.
    for key in sorted(auths, key=lambda key: "://" not in key):
        if not isinstance(auths[key], dict):
            raise _broken(str(path), "a member of auths is no object")
        normal[_normal_key(key)] = auths[key]
    return _Entries(normal, frozenset(map(_normal_key, helpers)), has_store=bool(content.get("credsStore")))


def _normal_key(key: str) -> str:
    """Legacy keys are URLs, of which the host counts; others may name a part of a registry."""
    _, scheme, rest = key.rpartition("://")
    rest = rest.rstrip("/")
    host, _, path = rest.partition("/")
    if host in _HUB_NAMES:
        host = "docker.io"
    return host if scheme or path in ("", "v1", "v2") else f"{host}/{path}"


def _credential(entry: Mapping[str, Any], where: str) -> Credential | None:
    """None for an empty entry: a mark that a helper keeps this one."""
    texts = {key: entry.get(key) or "" for key in _FIELDS}
    if not all(isinstance(text, str) for text in texts.values()):
        raise _broken(where, "its fields must be strings")
    if texts["registrytoken"]:
        return RegistryToken(texts["registrytoken"])
    if texts["identitytoken"]:
        return IdentityToken(texts["identitytoken"])
    if texts["auth"]:
        return _decode(texts["auth"], where)
    if texts["username"]:
        return Password(texts["username"], texts["password"])
    return None


_FIELDS = ("auth", "username", "password", "identitytoken", "registrytoken")


def _decode(auth: str, where: str) -> Password:
    try:
        text = base64.b64decode(auth, validate=True).rstrip(b"\0").decode("utf-8")
    except (binascii.Error, ValueError):
        text = ""
    username, colon, password = text.partition(":")
    if not colon:
        raise _broken(where, "auth must be the base64 form of user:password")
    return Password(username, password)


def _broken(where: str, reason: str) -> UsageError:
    return UsageError(f"broken credentials in {where}: {reason}", remedy="docker login writes a good one.")
