"""Layout: a Source that is a folder in the form of an OCI image layout (image-spec image-layout.md)."""

import errno
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self, TypeVar, TypeVarTuple, Unpack

import trio

from fsmount.errors import AccessDenied, Corrupt, FsmountError, Invalid, NotFound, Unsupported, UsageError
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import OCI_INDEX, OCI_MANIFEST, Descriptor, Index, Manifest, parse_manifest
from fsmount.oci.reference import Reference, is_tag
from fsmount.oci.soci import is_soci_index
from fsmount.registry.source import LARGEST_MANIFEST, Bytes, check, read_small

#: Of index.json: the only name an image has. `docker save` writes full names, others a tag.
_NAME = "org.opencontainers.image.ref.name"
# `docker save` since 25 keeps the full name here, and only the tag under the name above.
_FULL_NAME = "io.containerd.image.name"
_DEFAULT = "latest"
_PIECE = 1024 * 1024
_LARGEST_INDEX = 16 * 1024 * 1024
#: A disk serves few readers well; the threads are trio's, and others need them too.
_READERS = 4
_MOST_SHOWN = 20

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")


class Layout:
    """One folder, which may be written to meanwhile; see Source for what its methods promise.

    An image's name may be a tag, or a full reference of which the tag then counts as well. The same name
    for two images is an error when it is asked for.
    """

    def __init__(self, path: Path) -> None:
        self.name = f"oci-layout:{path}"
        self._path = path
        self._limiter = trio.CapacityLimiter(_READERS)
        self._stamp: _Stamp | None = None
        self._index = Index("", (), {})

    async def tags(self) -> list[str]:
        index = await self._load_index()
        return sorted({name for entry in index.manifests for name in _names(entry) if is_tag(name)})

    async def resolve(self, version: str | None, *, known: Digest | None = None) -> Descriptor:
        index = await self._load_index()
        if version is not None and version.startswith(("sha256:", "sha512:")):
            return await self._by_digest(index, Digest.parse(version))
        name = version or _DEFAULT
        found = {entry.digest: entry for entry in index.manifests if name in _names(entry)}
        if not found and version is None:
            # The index that `fsmount index --push` adds to a layout's only image does not make it one of two.
            found = {entry.digest: entry for entry in index.manifests if not is_soci_index(entry)}
        if not found:
            raise NotFound(f"{self.name} has no image named {name[:300]!r}", remedy=_what_there_is(index))
        if len(found) > 1 and version is None:
            raise NotFound(f"{self.name} holds {len(found)} images", remedy=_what_there_is(index))
        if len(found) > 1:
            raise Invalid(
                f"{self.name} has {len(found)} images named {name!r}",
                remedy=f"Choose one by its digest: {', '.join(map(str, found))}.",
            )
        return next(iter(found.values()))

    async def manifest(self, digest: Digest) -> tuple[bytes, str | None]:
        index = await self._load_index()
        said = next((entry.media_type for entry in index.manifests if entry.digest == digest), None)
        what = f"manifest {digest} of {self.name}"
        async with self._open_blob(digest, what) as (fd, size):
            if size > LARGEST_MANIFEST:
                raise Invalid(f"{what} is too large: {size} bytes")
            data = b"".join([piece async for piece in self._pieces(fd, 0, size, what)])
        check(data, digest, what)
        return data, said

    @asynccontextmanager
    async def blob(
        self, descriptor: Descriptor, *, start: int = 0, stop: int | None = None
    ) -> AsyncIterator[Bytes]:
        what = f"blob {descriptor.digest} of {self.name}"
        async with self._open_blob(descriptor.digest, what) as (fd, size):
            if size != descriptor.size:
                raise Corrupt(f"{what} has {size} bytes, not the {descriptor.size} of its descriptor")
            stop = size if stop is None else stop
            async with aclosing(_Pieces(start, stop, self._pieces(fd, start, stop, what))) as pieces:
                yield pieces

    async def small_blob(self, descriptor: Descriptor) -> bytes:
        return await read_small(self, descriptor)

    def distrust(self, descriptor: Descriptor) -> bool:
        return False  # there is nowhere else to look

    async def referrers(self, digest: Digest, artifact_type: str | None = None) -> list[Descriptor]:
        found = {}
        for entry in (await self._load_index()).manifests:
            if entry.media_type != OCI_MANIFEST or entry.size > LARGEST_MANIFEST:
                continue
            manifest = parse_manifest(*await self.manifest(entry.digest))
            if isinstance(manifest, Manifest) and manifest.subject and manifest.subject.digest == digest:
                kind = manifest.artifact_type or manifest.config.media_type
                found[entry.digest] = replace(entry, artifact_type=kind, annotations=manifest.annotations)
        return [entry for entry in found.values() if artifact_type in (None, entry.artifact_type)]

    @asynccontextmanager
    async def _open_blob(self, digest: Digest, what: str) -> AsyncIterator[tuple[int, int]]:
        """An open descriptor of a blob, and its size."""
        path = self._path / "blobs" / digest.algorithm / digest.hex
        with _named(what):
            fd, size = await self._in_thread(_open, path)
        try:
            yield fd, size
        finally:
            os.close(fd)

    async def _pieces(self, fd: int, start: int, stop: int, what: str) -> AsyncGenerator[bytes, None]:
        offset = start
        while offset < stop:
            with _named(what):
                piece = await self._in_thread(os.pread, fd, min(_PIECE, stop - offset), offset)
            if not piece:
                raise Corrupt(f"{what} ends after {offset} of {stop} bytes")
            offset += len(piece)
            yield piece

    async def _load_index(self) -> Index:
        """The list of images, read again if it was replaced or changed."""
        with _named(f"the OCI layout {self._path}"):
            self._stamp, self._index = await self._in_thread(_load, self._path, self._stamp, self._index)
        return self._index

    async def _in_thread(
        self, function: Callable[[Unpack[_Arguments]], _Result], *args: *_Arguments
    ) -> _Result:
        return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)

    async def _by_digest(self, index: Index, digest: Digest) -> Descriptor:
        """Also what index.json does not list: the parts of a listed index."""
        for entry in index.manifests:
            if entry.digest == digest:
                return entry
        async with self._open_blob(digest, f"manifest {digest} of {self.name}") as (_, size):
            return Descriptor(media_type="", digest=digest, size=size, annotations={})


class _Pieces:
    """An iterator of pieces that tells where they lie."""

    def __init__(self, offset: int, stop: int, pieces: AsyncGenerator[bytes, None]) -> None:
        self.offset = offset
        self.stop = stop
        self._pieces = pieces

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        piece = await anext(self._pieces)
        self.offset += len(piece)
        return piece

    async def aclose(self) -> None:
        await self._pieces.aclose()


_Stamp = tuple[int, int, int]


def _load(path: Path, stamp: _Stamp | None, index: Index) -> tuple[_Stamp, Index]:
    """Runs in a thread: the index and its stamp, which are those given if nothing has changed."""
    try:
        fd, size = _open(path / "index.json")
    except (FileNotFoundError, NotADirectoryError):
        raise _no_layout(path) from None
    try:
        status = os.fstat(fd)
        now = (status.st_mtime_ns, status.st_ino, status.st_size)
        if now == stamp:
            return now, index
        if not (path / "oci-layout").is_file():
            raise _no_layout(path)
        if size > _LARGEST_INDEX:
            raise Invalid(f"{path / 'index.json'} is too large: {size} bytes")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(_LARGEST_INDEX)
    finally:
        os.close(fd)
    # It may lack its type (umoci); then its fields say what it is.
    try:
        parsed = parse_manifest(data, OCI_INDEX)
    except (Invalid, Unsupported) as error:
        raise type(error)(f"{path / 'index.json'}: {error.message}", remedy=error.remedy) from error
    assert isinstance(parsed, Index)
    return now, parsed


def _open(path: Path) -> tuple[int, int]:
    """Runs in a thread: a descriptor of a regular file, and its size. A fifo does not block it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "not a regular file", str(path))
    return fd, status.st_size


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn what the operating system says into our words."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{what} is not there") from error
    except PermissionError as error:
        raise AccessDenied(f"{what} may not be read") from error
    except OSError as error:
        raise FsmountError(f"{what} cannot be read: {error.strerror}") from error


def _names(entry: Descriptor) -> set[str]:
    """All names by which an image can be asked for: those written, and the tags of full ones."""
    names = {entry.annotations[key] for key in (_NAME, _FULL_NAME) if key in entry.annotations}
    for name in list(names):
        if not is_tag(name):
            try:
                tag = Reference.parse(name).tag
            except UsageError:
                continue
            if tag:
                names.add(tag)
    return names


def _what_there_is(index: Index) -> str:
    listed = [entry for entry in index.manifests if not is_soci_index(entry)]
    images = [min(_names(entry), default=str(entry.digest)) for entry in listed]
    more = f" and {len(images) - _MOST_SHOWN} more" if len(images) > _MOST_SHOWN else ""
    return f"There are: {', '.join(images[:_MOST_SHOWN])}{more}." if images else "It holds no image."


def _no_layout(path: Path) -> FsmountError:
    if not path.exists():
        return NotFound(f"there is no folder {path}")
    return UsageError(
        f"{path} is no OCI image layout: it has no oci-layout and index.json",
        remedy="skopeo copy docker://… oci:DIR:TAG makes one.",
    )
