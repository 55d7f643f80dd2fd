"""Destination: where artifacts are published that refer to an image: its own repository, or an OCI layout folder."""

import errno
import fcntl
import json
import os
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import trio

from fsmount.errors import AccessDenied, FsmountError, Invalid, NoSpace, Refused
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import OCI_INDEX
from fsmount.registry.layout import Layout
from fsmount.registry.referrers import Artifact, Referrers, described
from fsmount.registry.remote import Remote
from fsmount.registry.source import Source

_NAME = "org.opencontainers.image.ref.name"


class Destination(Protocol):
    """One place for artifacts."""

    #: For messages, as that of a Source.
    name: str

    def source(self) -> Source | None:
        """The same place for reading; None while there is nothing yet. May touch the disk."""
        ...

    async def publish(self, artifact: Artifact) -> None:
        """Makes artifact a referrer of its subject, and returns when others can find it. Again, it changes nothing.

        Raises: AccessDenied, Unreachable and its kinds, Corrupt, Invalid, NoSpace, Refused.
        Cancellation: what is there by then names nothing that is not; some blobs may be there in vain.
        """
        ...


class RepositoryDestination:
    """A repository at its origin: mirrors are for reading."""

    def __init__(self, source: Source, remotes: Callable[[], Awaitable[list[Remote]]]) -> None:
        self.name = source.name
        self._source = source
        self._remotes = remotes

    def source(self) -> Source:
        return self._source

    async def publish(self, artifact: Artifact) -> None:
        origin = next(remote for remote in await self._remotes() if remote.endpoint.is_origin)
        await Referrers(origin, self.name).push(artifact)


class LayoutDestination:
    """A layout folder, made if it is not there; what it lists already stays as it is.

    A layout knows no referrers: they are manifests that it lists, as ORAS keeps them, with or without a tag.
    """

    def __init__(self, path: Path, *, tag: Callable[[Artifact], str] | None = None) -> None:
        """tag: the name that an artifact gets, for tools that copy by names; what had it before is listed no more."""
        self.name = f"oci-layout:{path}"
        self._path = path
        self._tag = tag

    def check(self) -> None:
        """Raises: Refused, if the folder has something else in it than a layout."""
        with _disk(self._path):
            try:
                names = os.listdir(self._path)
            except FileNotFoundError:
                return
        # Only blobs: the first artifact did not come further.
        if "oci-layout" not in names and set(names) - {"blobs"}:
            raise Refused(
                f"{self._path} is no OCI image layout, and not empty",
                remedy="Choose a new folder, or a layout.",
            )

    def source(self) -> Source | None:
        return Layout(self._path) if (self._path / "index.json").exists() else None

    async def publish(self, artifact: Artifact) -> None:
        await trio.to_thread.run_sync(self._publish, artifact)

    def _publish(self, artifact: Artifact) -> None:
        with _disk(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
            with _locked(self._path):
                self.check()
                (self._path / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
                for blob in (*artifact.blobs, artifact.manifest):
                    self._put_blob(blob)
                if not (self._path / "oci-layout").exists():
                    _replace(self._path / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
                self._list(artifact)

    def _put_blob(self, data: bytes) -> None:
        path = self._path / "blobs" / "sha256" / Digest.of(data).hex
        try:
            if path.read_bytes() == data:
                return
        except FileNotFoundError:
            pass
        _replace(path, data)

    def _list(self, artifact: Artifact) -> None:
        """Adds the artifact to index.json, whose other entries may hold what we know nothing of."""
        path = self._path / "index.json"
        index = _load(path)
        entries = index["manifests"]
        assert isinstance(entries, list)
        digest, name = str(artifact.digest), self._tag(artifact) if self._tag is not None else None
        same = [entry for entry in entries if entry.get("digest") == digest]
        if any(name in (None, _name(entry)) for entry in same):
            return
        entry = described(artifact) | ({"annotations": {_NAME: name}} if name is not None else {})
        replaced = [old for old in entries if name is not None and _name(old) == name]
        replaced += [old for old in same if _name(old) is None]
        index["manifests"] = [*(old for old in entries if old not in replaced), entry]
        _replace(path, json.dumps(index, separators=(",", ":")).encode())


def _name(entry: dict[str, object]) -> object:
    annotations = entry.get("annotations")
    return annotations.get(_NAME) if isinstance(annotations, dict) else None


def _load(path: Path) -> dict[str, object]:
    """The list of a layout, as it is. Raises: Invalid."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
    try:
        index = json.loads(data)
    except ValueError as error:
        raise Invalid(f"{path} is no JSON: {error}") from None
    entries = index.get("manifests") if isinstance(index, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise Invalid(f"{path} is no list of manifests")
    loaded: dict[str, object] = index
    return loaded


def _replace(path: Path, data: bytes) -> None:
    """Writes a file whole; who may read it is for the umask to say, as layouts are there for others."""
    partial = path.with_name(f".partial-{secrets.token_hex(8)}")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two of us do not lose each other's entries; other tools lock nothing."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turns what the operating system says into our words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space left for {path}", remedy="Free some space there.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise AccessDenied(f"{path} may not be written") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise Refused(f"{path} is no folder, and it is left alone") from error
        raise FsmountError(f"{path} cannot be written: {error.strerror}") from error
