"""Passes: a layer's blob streamed once from its source to chunks and members, while its readers wait and follow."""

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, TypeVarTuple, Unpack

import trio

from fsmount.archive.scan import TarScanner
from fsmount.cache.chunks import ChunkStore
from fsmount.cache.folder import disk_errors
from fsmount.errors import Corrupt, FsmountError
from fsmount.index import LayerIndex
from fsmount.ingest import Inflate, Keep, OneFile, Portion
from fsmount.oci.manifest import Descriptor
from fsmount.registry.source import Source
from fsmount.singleflight import single_error

_Args = TypeVarTuple("_Args")
_Result = TypeVar("_Result")

#: Compressed bytes handed to a worker thread at once: enough that the 0.15 ms of a thread call do not count.
_BLOCK_SIZE = 1024 * 1024
#: Passes at once over blobs of one source, and of all: each holds up to about 16 MiB, while the network stalls less.
_OF_ONE_SOURCE = 4
_OF_ALL_SOURCES = 32
#: What the index in the making may need of the disk for the members of one portion, and some.
_INDEX_ROOM = 8 * 1024 * 1024


class Passes:
    """What all passes of a process share: where chunks go, the threads, and how many there may be."""

    def __init__(self, chunks: ChunkStore, folder: Path, *, max_layer_size: int | None = None) -> None:
        """folder: where the indexes of layers are being written. max_layer_size: inflated, in bytes."""
        self.chunks = chunks
        self.folder = folder
        self.max_layer_size = max_layer_size
        # Two stages per pass; more threads than cores only so that none waits for a slow disk.
        self._threads = trio.CapacityLimiter(4)
        self._all = trio.CapacityLimiter(_OF_ALL_SOURCES)
        self._by_source: dict[str, trio.CapacityLimiter] = {}

    @asynccontextmanager
    async def place(self, source: Source) -> AsyncIterator[None]:
        """Waits until there may be one more pass over a source's blobs: a slow registry holds up no other."""
        limiter = self._by_source.setdefault(source.name, trio.CapacityLimiter(_OF_ONE_SOURCE))
        async with limiter, self._all:
            yield

    async def in_thread(self, function: Callable[[Unpack[_Args]], _Result], *args: *_Args) -> _Result:
        """What function returns, from one of the few threads that passes have."""
        return await trio.to_thread.run_sync(function, *args, limiter=self._threads)

    def store(self, keep: Keep, key: str, portion: Portion) -> bool:
        """Takes a portion in; whether its chunk could be stored. For worker threads.

        Raises: Corrupt, NoSpace (for what the index needs).
        """
        self.chunks.free(_INDEX_ROOM)
        with disk_errors(self.folder):
            sha256 = keep.add(portion)
        if not portion.data or (keep.is_second_look and self.chunks.recorded(key) == sha256):
            return True
        return self.chunks.put(key, portion.data, sha256)


@dataclass(slots=True)
class Meter:
    """What one layer has cost in this process."""

    #: Compressed bytes that came from its source.
    received: int = 0
    #: Why all of it was fetched where a part should have done, as a clause; None if that has not happened.
    whole_because: str | None = None

    def note_whole(self, reason: str) -> None:
        """Takes note that all of it is fetched; the first reason stays."""
        if self.whole_because is None:
            self.whole_because = reason


class BlobSource(Protocol):
    """What a pass asks of a source."""

    def blob(self, descriptor: Descriptor) -> AbstractAsyncContextManager[AsyncIterator[bytes]]: ...


class Pass:
    """One stream over a blob, and its state for those who wait for it."""

    def __init__(
        self,
        passes: Passes,
        descriptor: Descriptor,
        *,
        chunk_key: Callable[[int], str],
        known: LayerIndex | None,
        is_file: bool,
    ) -> None:
        """chunk_key names a chunk in the store. known: the complete index, if there is one. is_file: it is no tar."""
        self.known = known
        #: Whether it found out that no pass is needed.
        self.skipped = False
        self.keep = Keep(known, None)
        #: Chunks that can be read by now; the pass goes through them in order.
        self.kept = 0
        self._stop = 0  # of them, in the inflated layer
        self.done = False
        self.error: FsmountError | None = None
        #: Where somebody waits for the inflated layer; those chunks must be readable even if the disk is full.
        self._wanted: Counter[int] = Counter()
        self._passes = passes
        self._descriptor = descriptor
        self.chunk_key = chunk_key
        self._is_file = is_file
        self._lot = trio.lowlevel.ParkingLot()

    # Waiting

    def step(self) -> None:
        """Wakes everyone who waits: something more is known."""
        self._lot.unpark_all()

    async def wait_step(self) -> None:
        """Returns when more is known, or the pass is done. Raises: the error of the pass."""
        if not self.done:
            await self._lot.park()
        self._raise()

    async def wait_kept(self, offset: int) -> int | None:
        """The number of the chunk with that byte of the inflated layer, as soon as it can be read.

        None if no pass was needed. Raises: the error of the pass.
        """
        self._wanted[offset] += 1
        try:
            while self._stop <= offset and not self.done:
                await self._lot.park()
        finally:
            self._wanted[offset] -= 1
            if not self._wanted[offset]:
                del self._wanted[offset]
        if self._stop <= offset:
            self._raise()
            if self.skipped:
                return None
            raise Corrupt(f"the layer ends before its byte {offset}")
        return self.keep.at(offset)

    async def wait_done(self) -> None:
        """Returns at the end of the pass. Raises: the error of the pass."""
        while not self.done:
            await self._lot.park()
        self._raise()

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)  # or every reader would make it longer

    # Streaming

    async def stream(
        self, source: "BlobSource", scanner: TarScanner | OneFile | None, meter: Meter
    ) -> Inflate:
        """Network, inflating and storing side by side, each stage one block or chunk ahead of the next.

        scanner: None when the index is known. meter: counts what comes.

        Raises: Corrupt, Invalid, Unsupported, NoSpace, and what source raises.
        """
        limit = self._passes.max_layer_size or 64 * self._descriptor.size + 2**30
        inflate = Inflate(
            self._descriptor.digest, scanner, is_file=self._is_file, max_output=limit, known=self.known
        )
        send_blocks, blocks = trio.open_memory_channel[bytes](1)
        send_portions, portions = trio.open_memory_channel[Portion](1)
        with single_error(FsmountError):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._collect, source, send_blocks, meter)
                nursery.start_soon(self._inflate, inflate, blocks, send_portions)
                async with portions:
                    async for portion in portions:
                        await self._keep(portion)
                        inflate.reuse(portion)
        await self._keep(await self._passes.in_thread(inflate.finish))
        return inflate

    async def _collect(
        self, source: "BlobSource", blocks: trio.MemorySendChannel[bytes], meter: Meter
    ) -> None:
        """Joins the network's pieces to blocks; sends at least one, maybe empty."""
        async with blocks, source.blob(self._descriptor) as pieces:
            block = bytearray()
            async for piece in pieces:
                block += piece
                meter.received += len(piece)
                if len(block) >= _BLOCK_SIZE:
                    await blocks.send(bytes(block))
                    block.clear()
            await blocks.send(bytes(block))

    async def _inflate(
        self,
        inflate: Inflate,
        blocks: trio.MemoryReceiveChannel[bytes],
        portions: trio.MemorySendChannel[Portion],
    ) -> None:
        async with blocks, portions:
            async for block in blocks:
                await self._passes.in_thread(inflate.push, block)
                while (portion := await self._passes.in_thread(inflate.next_portion)) is not None:
                    await portions.send(portion)

    async def _keep(self, portion: Portion) -> None:
        number = self.kept
        key = self.chunk_key(number)
        stored = await self._passes.in_thread(self._passes.store, self.keep, key, portion)
        if portion.data:
            # A cache of less than a few chunks may have evicted it as soon as it was stored.
            stop = self._stop + len(portion.data)
            wanted = any(self._stop <= offset < stop for offset in self._wanted)
            if wanted and not (stored and await self._open_stored(number)):
                self._passes.chunks.hold(key, portion.data)
            self.kept += 1
            self._stop = stop
        self.step()

    async def _open_stored(self, number: int) -> bool:
        """Makes a chunk hot that was stored; False if it is no longer there."""
        sha256 = self.keep.chunks[number].sha256
        return await self._passes.chunks.open(self.chunk_key(number), sha256) is not None
