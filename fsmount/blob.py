"""Blob: a blob of a source read at any offset, each piece of it fetched once however many want it."""

import os
from contextlib import AsyncExitStack

import trio

from fsmount.cache.chunks import ChunkStore
from fsmount.errors import Corrupt, FsmountError, NoSpace
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor
from fsmount.registry.source import Bytes, Source
from fsmount.singleflight import SingleFlight

#: What is asked for with one range, and kept as one chunk.
PIECE_SIZE = 1024 * 1024


class Blob:
    """The bytes of a blob as its source has them: ranges of it, as they are asked for, kept in the chunk store.

    They are not verified, and what this process has fetched is what it believes: a piece's sha256 is that of its
    first fetch. A server that answers a range with the whole blob is read to its end once, for all who
    wait, and nothing else is asked of it meanwhile (a mirror may be filling its own cache from that very answer);
    only then the blob's digest is known, and if it is wrong nothing of it stays.
    """

    def __init__(
        self, descriptor: Descriptor, source: Source, chunks: ChunkStore, nursery: trio.Nursery
    ) -> None:
        """nursery: where what is under way goes on when those who wanted it have left."""
        self.size = descriptor.size
        self._descriptor = descriptor
        self._source = source
        self._chunks = chunks
        self._nursery = nursery
        self._flights: SingleFlight[None] = SingleFlight(nursery)
        self._sha256: dict[int, bytes] = {}
        self._whole: _Whole | None = None

    async def read_at(self, offset: int, size: int) -> bytes:
        """size bytes from offset, fewer only at the blob's end.

        Raises: Corrupt, Unreachable and other kinds of FsmountError.
        Cancellation: safe; a fetch that nobody else waits for ends.
        """
        stop = min(offset + size, self.size)
        parts = []
        while offset < stop:
            number, start = divmod(offset, PIECE_SIZE)
            part = await self._read(number, start, min(stop - offset, PIECE_SIZE - start))
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read(self, number: int, start: int, size: int) -> bytes:
        key = self._key(number)
        descriptor = self._chunks.hot(key)
        if descriptor is None:
            descriptor = await self._open(number)
        data = os.pread(descriptor, size, start)
        if len(data) != size:
            await self._chunks.drop([key])
            raise Corrupt(f"part {number} of blob {self._descriptor.digest} is cut short in the cache")
        return data

    async def _open(self, number: int) -> int:
        """A descriptor of the piece, fetched if need be. Ownership: the store's; use it before awaiting."""
        key = self._key(number)
        while True:
            sha256 = self._sha256.get(number)
            descriptor = await self._chunks.open(key, sha256) if sha256 is not None else None
            if descriptor is not None:
                return descriptor
            if self._whole is not None:
                await self._whole.wait(number)
            else:
                await self._flights.run(number, lambda: self._fetch(number))
            descriptor = self._chunks.hot(key)
            if descriptor is not None:
                return descriptor

    async def _fetch(self, number: int) -> None:
        start = number * PIECE_SIZE
        stop = min(start + PIECE_SIZE, self.size)
        async with AsyncExitStack() as stack:
            pieces = await stack.enter_async_context(
                self._source.blob(self._descriptor, start=start, stop=stop)
            )
            if (pieces.offset, pieces.stop) == (start, stop):
                await self._keep(number, b"".join([piece async for piece in pieces]), wanted=True)
                return
            if self._whole is None:
                self._whole = _Whole()
                self._nursery.start_soon(self._ingest, pieces, stack.pop_all(), self._whole)
        await self._whole.wait(number)

    async def _ingest(self, pieces: Bytes, stack: AsyncExitStack, whole: "_Whole") -> None:
        """Takes the whole blob; its outcome goes to whoever waits, and only Cancelled leaves here."""
        hasher = self._descriptor.digest.hasher()
        number = 0
        try:
            async with stack:
                buffer = bytearray()
                async for piece in pieces:
                    hasher.update(piece)
                    buffer += piece
                    while len(buffer) >= PIECE_SIZE:
                        await self._keep(number, bytes(buffer[:PIECE_SIZE]), wanted=number in whole.wanted)
                        del buffer[:PIECE_SIZE]
                        number += 1
                        whole.step(number)
                if buffer:
                    await self._keep(number, bytes(buffer), wanted=number in whole.wanted)
                    number += 1
            if hasher.hexdigest() != self._descriptor.digest.hex:
                raise Corrupt(f"blob {self._descriptor.digest}: what came has another digest")
        except FsmountError as error:
            whole.error = error
            if isinstance(error, Corrupt):
                self._source.distrust(self._descriptor)
                self._sha256.clear()
                with trio.move_on_after(10, shield=True):
                    await self._chunks.drop([self._key(kept) for kept in range(number)])
        finally:
            self._whole = None
            whole.step(number, done=True)

    async def _keep(self, number: int, data: bytes, *, wanted: bool) -> None:
        key = self._key(number)
        digest = Digest.of(data)
        self._sha256[number] = bytes.fromhex(digest.hex)
        try:
            await trio.to_thread.run_sync(self._chunks.put, key, data)
        except NoSpace:
            pass
        else:
            if not wanted or await self._chunks.open(key, self._sha256[number]) is not None:
                return
        self._chunks.hold(key, data)

    def _key(self, number: int) -> str:
        digest = self._descriptor.digest
        return f"blob-{digest.algorithm}-{digest.hex}/{number}"


class _Whole:
    """The state of one download of a whole blob, for those who wait for parts of it."""

    def __init__(self) -> None:
        self.error: FsmountError | None = None
        #: Pieces somebody waits for, which must be readable even if they cannot be stored.
        self.wanted: set[int] = set()
        self._kept = 0
        self._done = False
        self._lot = trio.lowlevel.ParkingLot()

    def step(self, kept: int, *, done: bool = False) -> None:
        """Wakes everyone who waits: so many pieces are there."""
        self._kept = kept
        self._done = done
        self._lot.unpark_all()

    async def wait(self, number: int) -> None:
        """Returns when the piece is there, or was. Raises: what ended the download."""
        self.wanted.add(number)
        while self._kept <= number and not self._done:
            await self._lot.park()
        if self.error is not None:
            raise self.error
