"""Files of credentials in the form that docker, podman and skopeo share: read, searched and written."""

import base64
import binascii
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fsmount.errors import FsmountError, UsageError
from fsmount.registry.credential import Credential, IdentityToken, RegistryToken, from_login

_HUB = "docker.io"
_HUB_NAMES = frozenset({_HUB, "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"})
#: How docker spells Docker Hub, and the only spelling that it finds.
_HUB_KEY = "https://index.docker.io/v1/"
_FIELDS = ("auth", "username", "password", "identitytoken", "registrytoken")

_Outcome = TypeVar("_Outcome")


@dataclass(frozen=True, slots=True)
class AuthFile:
    """The parsed content of one file (docker's config.json, containers-auth.json(5)), or of a text like it."""

    #: What it was parsed from, for messages.
    origin: str
    #: Credentials by normal key: a registry, or a part of one, `host[:port]/path`.
    auths: Mapping[str, Mapping[str, Any]] = field(repr=False)
    #: `credHelpers`, by registry. An empty one says: no helper for this registry, not even the store.
    helpers: Mapping[str, str]
    #: `credsStore`: the helper for all registries.
    store: str | None

    @classmethod
    def parse(cls, data: bytes, origin: str, *, flat: bool = False) -> "AuthFile":
        """flat: the file has nothing but credentials, as .dockercfg of docker before 1.7 had.

        Raises: UsageError, which names origin and quotes nothing.
        """
        content = _object(data, origin)
        if flat:
            content = {"auths": content}
        auths, helpers = content.get("auths") or {}, content.get("credHelpers") or {}
        store = content.get("credsStore") or None
        if not isinstance(auths, dict) or not isinstance(helpers, dict):
            raise _broken(origin, "auths and credHelpers must be objects")
        if not all(isinstance(name, str) for name in [*helpers.values(), store or ""]):
            raise _broken(origin, "credsStore and the members of credHelpers must be strings")
        normal: dict[str, Mapping[str, Any]] = {}
        # Keys without a scheme last: they are of today, and win over URLs that older tools left.
        for key in sorted(auths, key=lambda key: "://" not in key):
            if not isinstance(auths[key], dict):
                raise _broken(origin, "a member of auths is no object")
            normal[normal_key(key)] = auths[key]
        return cls(origin, normal, {normal_key(key): name for key, name in helpers.items()}, store)

    @property
    def has_secrets(self) -> bool:
        """Whether reading it is enough to be somebody else."""
        return any(entry.get(name) for entry in self.auths.values() for name in _FIELDS)

    def find(self, domain: str, repository: str) -> tuple[str, Credential] | None:
        """The longest key that leads to the repository, and the credential under it.

        Raises: UsageError, if the entry is broken.
        """
        for key in _keys(domain, repository):
            entry = self.auths.get(key)
            credential = _credential(entry, f"{self.origin}, entry {key}") if entry is not None else None
            if credential is not None:
                return key, credential
        return None

    def helper(self, domain: str) -> str | None:
        """The helper that is responsible for a registry, with or without the file: store or credHelpers."""
        return self.helpers.get(domain, self.store) or None


def normal_key(key: str) -> str:
    """Legacy keys are URLs, of which the host counts; others may name a part of a registry."""
    _, scheme, rest = key.rpartition("://")
    rest = rest.rstrip("/")
    host, _, path = rest.partition("/")
    if host in _HUB_NAMES:
        host = _HUB
    return host if scheme or path in ("", "v1", "v2") else f"{host}/{path}"


def helper_keys(domain: str) -> tuple[str, ...]:
    """What to ask a helper for: docker's key first; podman and skopeo use the host for Docker Hub too."""
    return (_HUB_KEY, _HUB) if domain == _HUB else (domain,)


def load(path: Path) -> AuthFile:
    """The file as it is now, an empty one if there is none. Raises: UsageError."""
    with _explained(path):
        return AuthFile.parse(_read(path), str(path))


def put(path: Path, domain: str, login: tuple[str, str] | None) -> None:
    """Write a user and password for a registry; None leaves an empty entry: a helper has it.

    Other spellings of the registry go; everything else stays, and in its order. The file is replaced as a whole,
    readable for its owner alone; of a symbolic link, the target.

    Raises: UsageError (what is there is broken), FsmountError.
    """
    entry = {"auth": base64.b64encode(":".join(login).encode()).decode("ascii")} if login else {}

    def change(auths: dict[str, Any]) -> None:
        key = helper_keys(domain)[0]
        for other in _spellings(auths, domain):
            if other != key:
                del auths[other]
        auths[key] = entry

    _edit(path, change)


def remove(path: Path, domain: str) -> list[str]:
    """Take a registry's entries out; returns their keys. Raises: as put."""

    def change(auths: dict[str, Any]) -> list[str]:
        keys = _spellings(auths, domain)
        for key in keys:
            del auths[key]
        return keys

    # Not to create or rewrite a file that has nothing of it.
    return _edit(path, change) if domain in load(path).auths else []


def _edit(path: Path, change: Callable[[dict[str, Any]], _Outcome]) -> _Outcome:
    target = Path(os.path.realpath(path))
    with _explained(path):
        data = _read(target)
        AuthFile.parse(data, str(path))  # what is broken is not written to
        content = _object(data, str(path))
        auths = content.get("auths") or {}
        outcome = change(auths)
        content["auths"] = auths
        _replace(target, json.dumps(content, indent="\t", ensure_ascii=False).encode())
    return outcome


def _replace(target: Path, data: bytes) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # mkstemp's mode is 0600.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(descriptor, "wb") as file:
            with suppress(FileNotFoundError):
                # root who edits a user's file leaves it the user's.
                owner = target.stat()
                if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(descriptor, owner.st_uid, owner.st_gid)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FsmountError(f"the credentials in {path} cannot be changed: {error.strerror}") from error


def _keys(domain: str, repository: str) -> list[str]:
    """containers-auth.json(5): h/a/b, h/a, h; the most specific key wins."""
    words = [domain, *repository.split("/")] if repository else [domain]
    return ["/".join(words[:count]) for count in range(len(words), 0, -1)]


def _spellings(auths: Mapping[str, Any], domain: str) -> list[str]:
    return [key for key in auths if normal_key(key) == domain]


def _object(data: bytes, origin: str) -> dict[str, Any]:
    # The file holds secrets: no message may quote it, and none of json's is chained.
    try:
        content = json.loads(data.decode("utf-8")) if data.strip() else {}
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise _broken(origin, "it is no JSON object")
    return content


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
        return from_login(*_decode(texts["auth"], where))
    if texts["username"]:
        return from_login(texts["username"], texts["password"])
    return None


def _decode(auth: str, where: str) -> tuple[str, str]:
    try:
        text = base64.b64decode("".join(auth.split()), validate=True).rstrip(b"\0").decode("utf-8")
    except (binascii.Error, ValueError):
        text = ""
    username, colon, password = text.partition(":")
    if not colon:
        raise _broken(where, "auth must be the base64 form of user:password")
    return username, password


def _broken(where: str, reason: str) -> UsageError:
    return UsageError(f"broken credentials in {where}: {reason}", remedy="fsmount login writes a good one.")
