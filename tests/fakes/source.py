"""A source in the process whose every answer can be scripted, and the read path over it without sockets or mounts."""

import gzip
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from fsmount.archive import codecs
from fsmount.cache.chunks import open_chunk_store
from fsmount.cache.folder import CacheFolder
from fsmount.cache.numbers import Numbers
from fsmount.errors import FsmountError, NotFound
from fsmount.layer import Layers
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import OCI_INDEX, OCI_MANIFEST, Descriptor
from fsmount.registry.source import Bytes, read_small

#: What a chunk holds after `small_chunks`.
CHUNK = 4096
#: The source gives so many bytes at once; no divisor of anything.
_PIECE = 700
_CONFIG = "application/vnd.oci.image.config.v1+json"
_TAR = "application/vnd.oci.image.layer.v1.tar"


class Gate:
    """Holds a blob back: its bytes pass as far as the test has let them."""

    def __init__(self) -> None:
        self.stop = 0
        self._lot = trio.lowlevel.ParkingLot()
        #: Set when somebody waits for the next byte.
        self.held = trio.Event()

    def let(self, stop: int) -> None:
        """The bytes before stop may pass."""
        self.stop = stop
        self.held = trio.Event()
        self._lot.unpark_all()

    def open(self) -> None:
        self.let(2**62)

    async def wait(self, offset: int) -> None:
        while offset >= self.stop:
            self.held.set()
            await self._lot.park()


@dataclass(frozen=True)
class Body:
    """What one request for a blob gets: `data`, if not the truth, through `gate`; `error`, if any, comes at `stop`."""

    data: bytes | None = None
    stop: int = 2**62
    error: Exception | None = None
    gate: Gate | None = None


@dataclass
class FakeSource:
    """A `Source` of what was put into it."""

    name: str = "registry.example/team/web"
    #: What each tag stands for.
    listed: dict[str, Digest] = field(default_factory=dict)
    #: How often each question was asked: `tags`, `v1`, `manifest sha256:…`, `blob sha256:…`.
    asked: Counter[str] = field(default_factory=Counter)
    #: What those who asked for a version had found before.
    known: list[Digest | None] = field(default_factory=list)
    #: From where to where blobs were asked for, and whether they are sent like that.
    ranges: list[tuple[int, int]] = field(default_factory=list)
    knows_ranges: bool = True
    #: Raised by every question while it is set.
    away: FsmountError | None = None
    #: Every question waits for it while it is set and not open.
    silent: Gate | None = None
    #: How many places are left to ask for a blob that came wrong.
    mirrors: int = 0
    _documents: dict[Digest, tuple[str, bytes]] = field(default_factory=dict)
    _blobs: dict[Digest, bytes] = field(default_factory=dict)
    _referrers: dict[Digest, list[Descriptor]] = field(default_factory=dict)
    _diff_ids: dict[Digest, Digest] = field(default_factory=dict)
    _script: dict[Digest, list[Body]] = field(default_factory=dict)

    def put_blob(self, data: bytes, media_type: str = "application/x") -> Descriptor:
        digest = Digest.of(data)
        self._blobs[digest] = data
        return Descriptor(media_type, digest, len(data), annotations={})

    def put_layer(self, tar: bytes, *, packed: bool = False) -> Descriptor:
        blob = gzip.compress(tar, mtime=0) if packed else tar
        layer = self.put_blob(blob, _TAR + "+gzip" if packed else _TAR)
        self._diff_ids[layer.digest] = Digest.of(tar)
        return layer

    def put_image(
        self, tag: str | None, layers: Sequence[Descriptor], *, diff_ids: Sequence[Digest] | None = None
    ) -> Digest:
        """An image whose configuration says the truth about its layers, or else diff_ids."""
        if diff_ids is None:
            diff_ids = [self._diff_ids[layer.digest] for layer in layers]
        config = {"created": "2024-01-01T00:00:00Z", "rootfs": {"diff_ids": [str(one) for one in diff_ids]}}
        manifest = {
            "config": _described(self.put_blob(json.dumps(config).encode(), _CONFIG)),
            "layers": [_described(layer) for layer in layers],
        }
        return self._put_document(tag, OCI_MANIFEST, manifest)

    def put_index(self, tag: str | None, images: Mapping[str, Digest]) -> Digest:
        """An index of images by `os/architecture`."""
        entries = []
        for platform, digest in images.items():
            os, architecture = platform.split("/")
            media_type, data = self._documents[digest]
            entry = _described(Descriptor(media_type, digest, len(data), annotations={}))
            entries.append({**entry, "platform": {"os": os, "architecture": architecture}})
        return self._put_document(tag, OCI_INDEX, {"manifests": entries})

    def _put_document(self, tag: str | None, media_type: str, fields: Mapping[str, object]) -> Digest:
        data = json.dumps({"schemaVersion": 2, "mediaType": media_type, **fields}).encode()
        digest = Digest.of(data)
        self._documents[digest] = media_type, data
        if tag is not None:
            self.listed[tag] = digest
        return digest

    def then(self, blob: Descriptor, *bodies: Body) -> None:
        """The next requests for a blob get these, one each; those after them the truth."""
        self._script.setdefault(blob.digest, []).extend(bodies)

    def put_referrer(self, subject: Digest, manifest: bytes, artifact_type: str) -> None:
        """A manifest that has another as its subject."""
        digest = Digest.of(manifest)
        self._documents[digest] = OCI_MANIFEST, manifest
        referrer = Descriptor(OCI_MANIFEST, digest, len(manifest), {}, artifact_type=artifact_type)
        self._referrers.setdefault(subject, []).append(referrer)

    def fetched(self, blob: Descriptor) -> int:
        """How often a blob was asked for."""
        return self.asked[f"blob {blob.digest}"]

    # What a Source is

    async def tags(self) -> list[str]:
        await self._ask("tags")
        return sorted(self.listed)

    async def resolve(self, version: str | None, *, known: Digest | None = None) -> Descriptor:
        version = version or "latest"
        self.known.append(known)
        await self._ask(version)
        digest = self.listed.get(version)
        if digest is None and version.startswith("sha256:"):
            digest = Digest.parse(version)
        if digest not in self._documents:
            raise NotFound(f"{self.name} has no {version}")
        media_type, data = self._documents[digest]
        return Descriptor(media_type, digest, len(data), annotations={})

    async def manifest(self, digest: Digest) -> tuple[bytes, str | None]:
        await self._ask(f"manifest {digest}")
        if digest not in self._documents:
            raise NotFound(f"{self.name} has no {digest}")
        media_type, data = self._documents[digest]
        return data, media_type

    @asynccontextmanager
    async def blob(
        self, descriptor: Descriptor, *, start: int = 0, stop: int | None = None
    ) -> AsyncIterator[Bytes]:
        await self._ask(f"blob {descriptor.digest}")
        self.ranges.append((start, descriptor.size if stop is None else stop))
        script = self._script.get(descriptor.digest)
        body = script.pop(0) if script else Body()
        data = self._blobs[descriptor.digest] if body.data is None else body.data
        if not self.knows_ranges and stop is not None:
            start, stop = 0, None
        pieces = _Pieces(
            start, descriptor.size if stop is None else stop, self._pieces(data[:stop], body, start)
        )
        async with aclosing(pieces):
            yield pieces

    def distrust(self, descriptor: Descriptor) -> bool:
        others = self.mirrors > 0
        self.mirrors -= others
        return others

    async def referrers(self, digest: Digest, artifact_type: str | None = None) -> list[Descriptor]:
        await self._ask(f"referrers {digest}")
        found = self._referrers.get(digest, [])
        return [one for one in found if artifact_type in (None, one.artifact_type)]

    async def small_blob(self, descriptor: Descriptor) -> bytes:
        return await read_small(self, descriptor)

    async def _ask(self, question: str) -> None:
        self.asked[question] += 1
        await trio.lowlevel.checkpoint()
        if self.silent is not None:
            await self.silent.wait(0)
        if self.away is not None:
            raise self.away

    async def _pieces(self, data: bytes, body: Body, offset: int) -> AsyncGenerator[bytes, None]:
        stop = min(body.stop, len(data))
        while offset < stop:
            limit = stop
            if body.gate is not None:
                await body.gate.wait(offset)
                limit = min(stop, body.gate.stop)
            await trio.lowlevel.checkpoint()
            piece = data[offset : min(offset + _PIECE, limit)]
            offset += len(piece)
            yield piece
        if body.gate is not None:
            await body.gate.wait(offset)
        if body.error is not None:
            raise body.error


class _Pieces:
    """The pieces of a blob, which say where in it they begin and stop."""

    def __init__(self, offset: int, stop: int, pieces: AsyncGenerator[bytes, None]) -> None:
        self.offset = offset
        self.stop = stop
        self._pieces = pieces

    def __aiter__(self) -> "_Pieces":
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        await self._pieces.aclose()


def _described(blob: Descriptor) -> dict[str, object]:
    return {"mediaType": blob.media_type, "digest": str(blob.digest), "size": blob.size}


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 KiB, so that small layers have many; and what a layer shows is seen at once."""
    monkeypatch.setattr("fsmount.ingest.CHUNK_SIZE", CHUNK)
    monkeypatch.setattr("fsmount.passes._BLOCK_SIZE", 1024)
    monkeypatch.setattr(codecs, "PIECE_SIZE", 1024)
    monkeypatch.setattr("fsmount.indexing._PENDING_SECONDS", 0)


@asynccontextmanager
async def open_layers(
    path: Path, *, size: int = 10**9, max_layer_size: int | None = None, mount: str | None = None
) -> AsyncIterator[Layers]:
    """What one process has over a cache folder; at the end of the block its passes are cancelled, and all is closed."""
    folder = CacheFolder(path)
    with closing(Numbers(folder.state)) as numbers, open_chunk_store(folder.chunks, size=size) as chunks:
        async with trio.open_nursery() as nursery:
            try:
                yield Layers(folder, chunks, numbers, nursery, mount=mount, max_layer_size=max_layer_size)
            finally:
                nursery.cancel_scope.cancel()
