"""Indexer: makes the ztoc of one layer from one stream over its blob, and decodes every span again before it counts."""

import hashlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar, TypeVarTuple, Unpack

import trio

from fsmount.archive.codecs import Compression, sniff
from fsmount.archive.entry import Entry
from fsmount.archive.inflate import check_span, inflate_span
from fsmount.archive.scan import TarScanner
from fsmount.archive.span import Codec, Span, Table
from fsmount.archive.ztoc import read_ztoc
from fsmount.archive.ztoc_builder import TarZtocBuilder, ZtocBuilder
from fsmount.archive.ztoc_entries import TocEntry, may_disable_xattrs
from fsmount.cache.folder import disk_errors
from fsmount.errors import Corrupt, FsmountError, Invalid, NoSpace, Unsupported
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor
from fsmount.oci.soci import MAX_ZTOC_SIZE
from fsmount.registry.source import Source
from fsmount.singleflight import single_error

_Args = TypeVarTuple("_Args")
_Result = TypeVar("_Result")

#: Compressed bytes handed to a worker thread at once, as in passes.
_BLOCK_SIZE = 1024 * 1024
#: Inflated bytes handed on at once: a block may inflate to a thousand times its size.
_BATCH_SIZE = 4 * 1024 * 1024
#: Of one layer: three stages while it streams; then so many spans are decoded side by side.
_THREADS = 3
_CHECKERS = 2


@dataclass(frozen=True, slots=True)
class Ztoc:
    """A ztoc that has been checked, and what it says: how many spans and members, of how many bytes of tar."""

    data: bytes = field(repr=False)
    spans: int
    members: int
    inflated_size: int
    #: As soci.describe_ztoc wants to know it.
    disable_xattrs: bool


@dataclass(slots=True)
class Progress:
    """How far it is, in bytes of blobs: `received` of `total`, and `checked`, which are decoded again."""

    total: int = 0
    received: int = 0
    checked: int = 0


async def build_ztoc(
    source: Source,
    layer: Descriptor,
    *,
    diff_id: Digest | None,
    folder: Path,
    tool: str,
    max_layer_size: int | None = None,
    progress: Progress | None = None,
) -> Ztoc:
    """The ztoc of a layer, from one stream over its blob; a mirror that sends something else is left for the next.

    Meanwhile the blob is in a file without a name in `folder`, and each span is decoded from there, and compared with
    what went by, before this returns.

    diff_id: of the inflated layer, as the image has it; None if it does not say. max_layer_size: inflated, in bytes;
    None for 64 times the blob, and 1 GiB.
    Memory: about 30 MiB, and a few times the ztoc, which has 32 KiB for 4 MiB of the layer, and 200 bytes for a member.

    Raises: Unsupported (SOCI cannot carry the layer), Corrupt (it is not what its digest, or the diff ID, names),
        Invalid (it is, and is no valid layer), NoSpace, and what the source raises.
    """
    progress = progress or Progress()
    while True:
        received = progress.received
        async with _scratch(folder, layer) as file:
            indexer = _Indexer(source, layer, file, folder, max_layer_size, progress)
            try:
                ztoc = await indexer.stream(tool=tool)
            except Invalid:
                raise
            except Corrupt:
                if not source.distrust(layer):
                    raise
                progress.received = received
                continue
            indexer.compare_diff_id(diff_id)
            return await indexer.check(ztoc)


@asynccontextmanager
async def _scratch(folder: Path, layer: Descriptor) -> AsyncIterator[BinaryIO]:
    """A file without a name, for the blob. Raises: NoSpace."""

    def create() -> BinaryIO:
        with disk_errors(folder):
            free = shutil.disk_usage(folder).free
            if free < layer.size:
                raise NoSpace(
                    f"layer {layer.digest} has {layer.size} bytes, and {folder} has {free} left",
                    remedy="Free some space there. Choose another place with --cache.",
                )
            return tempfile.TemporaryFile(dir=folder, prefix=".partial-")

    file = await trio.to_thread.run_sync(create)
    try:
        yield file
    finally:
        # Giving a gigabyte back takes the disk a tenth of a second.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(file.close)


class _Indexer:
    """One layer on its way from the source to a ztoc."""

    def __init__(
        self,
        source: Source,
        layer: Descriptor,
        file: BinaryIO,
        folder: Path,
        max_layer_size: int | None,
        progress: Progress,
    ) -> None:
        self._source = source
        self._layer = layer
        self._file = file
        self._most = max_layer_size or 64 * layer.size + 2**30
        self._blob = _Blob(layer, file, folder)
        self._inflate = _Inflate(self._most)
        self._watch = _Watch()
        self._progress = progress
        self._threads = trio.CapacityLimiter(_THREADS)

    async def _in_thread(self, function: Callable[[Unpack[_Args]], _Result], *args: *_Args) -> _Result:
        return await trio.to_thread.run_sync(function, *args, limiter=self._threads)

    # Streaming

    async def stream(self, *, tool: str) -> bytes:
        """Network and disk, inflating, and hashing side by side, each stage one block or batch ahead of the next.

        Raises: Corrupt, Invalid, Unsupported, NoSpace, and what the source raises.
        """
        send_blocks, blocks = trio.open_memory_channel[bytes](1)
        send_batches, batches = trio.open_memory_channel[_Batch](1)
        with single_error(FsmountError):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._collect, send_blocks)
                nursery.start_soon(self._inflate_blocks, blocks, send_batches)
                async with batches:
                    async for batch in batches:
                        await self._in_thread(self._watch.add, batch)
        await self._in_thread(self._blob.finish)
        try:
            return await self._in_thread(self._inflate.finish, tool)
        except (Invalid, Unsupported) as error:
            raise type(error)(f"layer {self._layer.digest}: {error.message}", remedy=error.remedy) from None

    async def _collect(self, blocks: trio.MemorySendChannel[bytes]) -> None:
        """Joins the network's pieces to blocks, and keeps them; sends at least one, maybe empty."""
        async with blocks, self._source.blob(self._layer) as pieces:
            buffer = bytearray()
            async for piece in pieces:
                buffer += piece
                self._progress.received += len(piece)
                if len(buffer) >= _BLOCK_SIZE:
                    block = bytes(buffer)
                    buffer.clear()
                    await self._in_thread(self._blob.add, block)
                    await blocks.send(block)
            block = bytes(buffer)
            await self._in_thread(self._blob.add, block)
            await blocks.send(block)

    async def _inflate_blocks(
        self, blocks: trio.MemoryReceiveChannel[bytes], batches: trio.MemorySendChannel["_Batch"]
    ) -> None:
        async with blocks, batches:
            async for block in blocks:
                await self._in_thread(self._inflate.push, block)
                while (batch := await self._in_thread(self._inflate.next_batch)) is not None:
                    await batches.send(batch)

    def compare_diff_id(self, expected: Digest | None) -> None:
        """Raises: Corrupt."""
        found = f"sha256:{self._watch.sha256}"
        # Of another algorithm nobody has made any.
        if expected is not None and expected.algorithm == "sha256" and found != str(expected):
            raise Corrupt(
                f"layer {self._layer.digest}: inflated it is {found}, but the image's configuration says {expected}",
                remedy="Whoever made the image broke it; build and push it again.",
            )

    # Checking

    async def check(self, data: bytes) -> Ztoc:
        """The ztoc that data is, as its readers will read it. Raises: Unsupported, Corrupt."""
        table, count = await self._in_thread(self._read, data)
        todo = zip(table.spans, self._watch.spans, strict=True)
        with single_error(FsmountError):
            async with trio.open_nursery() as nursery:
                for _ in range(_CHECKERS):
                    nursery.start_soon(self._check_spans, table.codec, todo)
        return Ztoc(
            data,
            len(table.spans),
            count,
            sum(span.size for span in table.spans),
            may_disable_xattrs(self._inflate.members),
        )

    def _read(self, data: bytes) -> tuple[Table, int]:
        what = f"layer {self._layer.digest} cannot have a SOCI index"
        if len(data) > MAX_ZTOC_SIZE:
            raise Unsupported(f"{what}: its ztoc would have {len(data)} bytes, more than {MAX_ZTOC_SIZE}")
        try:
            table = read_ztoc(data, blob_size=self._layer.size, max_size=self._most)
        except Invalid as error:
            # What is right in a tar and a deflate stream may still be more than readers of ztocs take.
            raise Unsupported(f"{what} that all can read: {error.message}") from None
        entries = self._watch.entries
        if list(table.entries) != entries:
            other = next((a for a, b in zip(entries, table.entries, strict=False) if a != b), None)
            name = f"{os.fsdecode(other.path)!r}" if other is not None else "the number of members"
            raise Unsupported(f"{what}: its ztoc would not say of {name} what its tar says")
        return table, len(entries)

    async def _check_spans(self, codec: Codec, todo: Iterator[tuple[Span, bytes]]) -> None:
        for span, sha256 in todo:
            await self._in_thread(self._check_span, codec, span, sha256)
            self._progress.checked += span.length

    def _check_span(self, codec: Codec, span: Span, sha256: bytes) -> None:
        data = os.pread(self._file.fileno(), span.length, span.offset)
        try:
            check_span(replace(span, sha256=sha256), data, inflate_span(codec, span, data))
        except Corrupt as error:
            raise Corrupt(f"layer {self._layer.digest}, read again: {error.message}") from None


@dataclass(slots=True)
class _Batch:
    """A part of the inflated layer, the spans that begin in it or soon after, and where the last one ends if known."""

    pieces: list[bytes]
    starts: Sequence[int]
    stop: int | None


class _Builder(Protocol):
    """ZtocBuilder, and TarZtocBuilder."""

    @property
    def entries(self) -> list[TocEntry]: ...
    @property
    def stop(self) -> int | None: ...
    def starts(self, first: int) -> Sequence[int]: ...
    def feed(self, data: bytes) -> Iterator[bytes]: ...
    def finish(self, *, tool: str) -> bytes: ...


class _Blob:
    """The first stage: hashes the blob, and keeps it in the file. Each method runs in a thread, one at a time."""

    def __init__(self, layer: Descriptor, file: BinaryIO, folder: Path) -> None:
        self._layer = layer
        self._hash = layer.digest.hasher()
        self._size = 0
        self._file = file
        self._folder = folder

    def add(self, block: bytes) -> None:
        """Raises: NoSpace."""
        self._hash.update(block)
        self._size += len(block)
        with disk_errors(self._folder):
            self._file.write(block)

    def finish(self) -> None:
        """Raises: Corrupt, NoSpace."""
        if self._hash.hexdigest() != self._layer.digest.hex:
            raise Corrupt(
                f"layer {self._layer.digest}: the {self._size} bytes received have another digest",
                remedy="The registry, or something on the way, altered it; push the image again if it persists.",
            )
        with disk_errors(self._folder):
            self._file.flush()


class _Inflate:
    """The second stage: inflates the blob, and builds the ztoc. Each method runs in a thread, one at a time."""

    def __init__(self, max_output: int) -> None:
        self._max_output = max_output
        self._inflated = 0
        self._builder: _Builder | None = None
        self._pieces: Iterator[bytes] = iter(())
        self._starts = 0  # spans whose beginning was handed on
        self._failure: Invalid | Unsupported | None = None

    @property
    def members(self) -> list[TocEntry]:
        return self._builder.entries if self._builder is not None else []

    def push(self, block: bytes) -> None:
        """Takes the next bytes of the blob; `next_batch` must have returned None before.

        The first block holds at least 512 bytes, or the whole blob.
        """
        if self._failure is not None:
            return
        try:
            if self._builder is None:
                self._builder = _new_builder(sniff(block))
            self._pieces = self._builder.feed(block)
        except (Invalid, Unsupported) as error:
            self._failure = error

    def next_batch(self) -> _Batch | None:
        """The next batch, or None when more of the blob is needed.

        After bytes of which no ztoc can be made there are no more, and `finish` says why: only the whole blob tells
        whether it was altered on the way.
        """
        pieces: list[bytes] = []
        size = 0
        try:
            while size < _BATCH_SIZE and (piece := next(self._pieces, None)) is not None:
                pieces.append(piece)
                size += len(piece)
                if self._inflated + size > self._max_output:
                    raise Invalid(
                        f"it inflates to more than {self._max_output} bytes: refused as a bomb",
                        remedy="If it is none, raise cache.max_layer_size in the configuration.",
                    )
        except (Invalid, Unsupported) as error:
            self._failure = error
            self._pieces = iter(())
            return None
        if not pieces:
            return None
        assert self._builder is not None
        self._inflated += size
        starts = self._builder.starts(self._starts)
        self._starts += len(starts)
        return _Batch(pieces, starts, self._builder.stop)

    def finish(self, tool: str) -> bytes:
        """The ztoc, after the whole blob. Raises: Invalid, Unsupported."""
        if self._failure is not None:
            raise self._failure
        assert self._builder is not None
        return self._builder.finish(tool=tool)


def _new_builder(compression: Compression) -> _Builder:
    if compression is Compression.GZIP:
        return ZtocBuilder()
    if compression is Compression.NONE:
        return TarZtocBuilder()
    raise Unsupported(f"a layer that is compressed with {compression} cannot have a SOCI index")


class _Watch:
    """The third stage: what the inflated layer is, found out without the builder, to compare its ztoc with.

    Its method runs in a thread, one at a time.
    """

    def __init__(self) -> None:
        self._scanner = TarScanner()
        self._whole = hashlib.sha256()
        self._offset = 0
        self._starts: deque[int] = deque()  # of the spans to come
        self._span = hashlib.sha256()
        self._count = 0  # spans that have begun
        self._ended: list[bytes] = []
        #: The members, in archive order.
        self.entries: list[Entry] = []

    @property
    def sha256(self) -> str:
        """Of all of it, in hexadecimal."""
        return self._whole.hexdigest()

    @property
    def spans(self) -> list[bytes]:
        """The sha256 of each span's inflated bytes."""
        return [*self._ended, self._span.digest()] if self._count else []

    def add(self, batch: _Batch) -> None:
        self._starts.extend(batch.starts)
        for piece in batch.pieces:
            self._whole.update(piece)
            self.entries += self._scanner.feed(piece)
            self._divide(piece, batch.stop)
            self._offset += len(piece)

    def _divide(self, piece: bytes, stop: int | None) -> None:
        """Divides a piece among the digests of the spans; what is after their end is in none."""
        view = memoryview(piece)
        end = self._offset + len(piece) if stop is None else min(stop, self._offset + len(piece))
        at = self._offset
        while at < end:
            if self._starts and self._starts[0] == at:
                self._begin_span()
            upto = min(end, self._starts[0]) if self._starts else end
            self._span.update(view[at - self._offset : upto - self._offset])
            at = upto

    def _begin_span(self) -> None:
        self._starts.popleft()
        if self._count:
            self._ended.append(self._span.digest())
            self._span = hashlib.sha256()
        self._count += 1
