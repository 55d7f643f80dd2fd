"""Fetcher: the chunks of a layer that can be had alone, each fetched once however many want it, neighbours together."""

import hashlib
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from itertools import groupby
from typing import NamedTuple

import trio

from fsmount.archive.inflate import check_span, inflate_span
from fsmount.archive.span import Codec, Span, Trust
from fsmount.errors import Corrupt, FsmountError
from fsmount.index import Chunk, LayerIndex
from fsmount.lazy import RANGES_IGNORED
from fsmount.oci.manifest import Descriptor
from fsmount.passes import Meter, Passes
from fsmount.registry.source import Bytes, Source
from fsmount.singleflight import in_background, single_error
from fsmount.traffic import PARALLEL, Run, Traffic

log = logging.getLogger(__name__)

#: Inflated bytes that are fetched ahead of a sequential reader, at most.
_AHEAD = 16 * 1024 * 1024
#: Compressed bytes that completing a layer asks for at once.
_STRIDE = 16 * 1024 * 1024
#: Such requests side by side for one who waits for many chunks of a layer.
_PARALLEL_WAITED_FOR = 8
#: Compressed bytes between two wanted chunks that are fetched, and dropped, rather than asked around.
_GAP = 64 * 1024
#: Sequential readers of one layer that are followed.
_READERS = 16
#: Seconds during which a chunk that was not what it should be is not fetched again.
_REFUSED_SECONDS = 10


class RangesIgnored(FsmountError):
    """The server sends the whole blob for any part of it, and nothing vouches for the parts."""


class _Reader(NamedTuple):
    """One that is expected at a chunk: the bytes of chunks it has come to by going on, and where its file ends."""

    read: int
    stop: int


class Fetcher:
    """Fetches chunks by the spans that an index gives, and keeps them in the chunk store.

    A server that answers a range with the whole blob is read to its end once, for all who wait, if each
    chunk can be told right from wrong by itself. What has begun goes on when those who wanted it have left.
    """

    def __init__(
        self,
        descriptor: Descriptor,
        index: LayerIndex,
        chunk_key: Callable[[int], str],
        source: Callable[[], Source],
        passes: Passes,
        traffic: Traffic,
        nursery: trio.Nursery,
        *,
        shown: dict[int, bytes],
        meter: Meter,
    ) -> None:
        """chunk_key names a chunk in the store. source: the place to fetch from now.

        shown: takes the sha256 of chunks that are shown although nobody vouches for them. meter: counts what comes.
        """
        self.index = index
        #: Whether the server was seen to send more than the range that it was asked for.
        self.ignored = False
        self._shown = shown
        self._meter = meter
        self._descriptor = descriptor
        self.chunk_key = chunk_key
        self._source = source
        self._passes = passes
        self._traffic = traffic
        self._nursery = nursery
        #: Whether the layer has another index by now: then nothing is stored any more.
        self.is_retired = False
        self._coming: dict[int, Run] = {}
        self._bringing = 0
        self._whole: Run | None = None
        self._refused: dict[int, tuple[float, Corrupt]] = {}
        self._completing = False
        #: Chunks that readers have come to, and their compressed bytes.
        self._touched: set[int] = set()
        self._touched_size = 0
        #: How often chunks have come, or were found to be here.
        self._came: Counter[int] = Counter()
        #: Those who go on reading, by the chunk at which they are expected next.
        self._readers: OrderedDict[int, _Reader] = OrderedDict()

    @property
    def busy(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._coming) or self._completing or self._bringing > 0

    # What readers ask for

    async def bring(self, number: int) -> None:
        """Returns when the chunk can be opened: it is hot, unless the disk was full or it went by before.

        Raises: Corrupt, RangesIgnored, and what the source raises.
        """
        run = self._coming.get(number)
        if run is None:
            until, error = self._refused.get(number, (0.0, None))
            if error is not None and trio.current_time() < until:
                raise error.with_traceback(None)
            window = self._window(number, self._readers.get(number))
            run = self._start([number, *self._neighbours(number, window)], urgent=True)
        else:
            self._traffic.promote(run)
        await run.wait(number)

    def follow(self, number: int, *, goes_on: bool, stop: int) -> None:
        """Takes note that a reader has come to a chunk; one that reads on and on finds what comes next already here.

        goes_on: it came to its beginning, as one does that has read the chunk before; who reads the same file does so
        anyway. stop: where that file ends. When readers have come to more than half of the layer, the rest follows.
        """
        chunk = self.index.chunks[number]
        if number not in self._touched:
            self._touched.add(number)
            self._touched_size += chunk.blob_stop - chunk.blob_start
            if 2 * self._touched_size > self._descriptor.size and not self._completing and self.fits:
                self._completing = True
                # Nobody waits for the rest.
                what = f"layer {self._descriptor.digest} is not completed"
                self._nursery.start_soon(in_background, what, self.complete)
        elif number + 1 in self._readers:
            return  # the kernel asks for several parts of a file at once, in any order
        before = self._readers.pop(number, None)
        goes_on = before is not None and (goes_on or before.stop == stop)
        reader = _Reader(before.read + chunk.size if before is not None and goes_on else 0, stop)
        self._readers[number + 1] = reader
        if len(self._readers) > _READERS:
            self._readers.popitem(last=False)
        window = self._window(number, reader)
        if window:
            end = self.index.chunk_at(chunk.start + chunk.size + window)
            ahead = range(number + 1, end)
            missing = [one for one in ahead if one not in self._coming and one not in self._came]
            # A request for every single chunk would wait for every single answer.
            if len(missing) * 2 > len(ahead):
                self._start(missing, urgent=False)

    def _window(self, number: int, reader: _Reader | None) -> int:
        """How many inflated bytes are worth fetching beyond a chunk that a reader has come to, or is about to.

        As many as it has read in a row, as far as its file goes; beyond that, a third of them.
        """
        if reader is None:
            return 0
        chunk = self.index.chunks[number]
        in_file = min(reader.read, reader.stop - chunk.start - chunk.size)
        if 0 < in_file < reader.read:
            # Up to the end of the chunk in which the file ends.
            last = self.index.chunks[self.index.chunk_at(reader.stop - 1)]
            in_file = last.start + last.size - chunk.start - chunk.size
        return min(max(in_file, reader.read // 3), _AHEAD)

    def _neighbours(self, number: int, size: int) -> list[int]:
        """The chunks after one that are not on their way, have so many inflated bytes, and can come with it."""
        chunks = self.index.chunks
        found: list[int] = []
        previous = chunks[number]
        for following in range(number + 1, len(chunks)):
            chunk = chunks[following]
            size -= chunk.size
            if size < 0 or following in self._coming or not _continues(previous, chunk):
                break
            found.append(following)
            previous = chunk
        return found

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Has chunks brought in the background that are expected to be read."""
        for stride in self._strides(number for number in numbers if number not in self._coming):
            self._start(stride, urgent=False)

    async def bring_all(self, numbers: Iterable[int]) -> None:
        """Returns when all these chunks, ascending, were fetched and stored, unless the disk was full.

        As many requests go side by side as pay.

        Raises: as `bring`. Cancellation: what has begun goes on.
        """
        strides = iter(self._strides(numbers))
        self._bringing += 1
        try:
            with single_error(FsmountError):
                async with trio.open_nursery() as nursery:
                    for _ in range(_PARALLEL_WAITED_FOR):
                        nursery.start_soon(self._bring_strides, strides)
        finally:
            self._bringing -= 1

    async def _bring_strides(self, strides: Iterable[list[int]]) -> None:
        for numbers in strides:
            runs = {self._coming[number] for number in numbers if number in self._coming}
            for run in runs:
                self._traffic.promote(run)
            missing = [number for number in numbers if number not in self._coming]
            if missing:
                runs.add(self._start(missing, urgent=True))
            for run in runs:
                await run.wait_done()

    def came(self, number: int) -> int:
        """How often a chunk has come; it may be gone again."""
        return self._came[number]

    # Completing

    @property
    def fits(self) -> bool:
        """Whether the cache can hold all of the layer, and its disk takes anything now."""
        chunks = self._passes.chunks
        return self.index.inflated_size <= chunks.size and chunks.trouble is None

    async def complete(self, *, rate: float | None = None) -> None:
        """Fetches all chunks that are not stored, in the background, at most so many bytes a second.

        Raises: as `bring`.
        """
        self._completing = True
        try:
            keys = [self.chunk_key(number) for number in range(len(self.index.chunks))]
            stored = await self._passes.in_thread(self._passes.chunks.stored, keys)
            runs = iter(self._strides([number for number, is_here in enumerate(stored) if not is_here]))
            with single_error(FsmountError):
                async with trio.open_nursery() as nursery:
                    for _ in range(PARALLEL if rate is None else 1):
                        nursery.start_soon(self._complete_strides, runs, rate)
        finally:
            self._completing = False

    async def _complete_strides(self, runs: Iterable[list[int]], rate: float | None) -> None:
        for numbers in runs:
            missing = [number for number in numbers if number not in self._coming]
            if missing and not self.is_retired:
                await self._start(missing, urgent=False, rate=rate).wait_done()

    def _strides(self, numbers: Iterable[int]) -> Iterable[list[int]]:
        """Chunks joined to what one request may bring."""
        chunks = self.index.chunks
        stride: list[int] = []
        for number in numbers:
            if stride and not (
                _continues(chunks[stride[-1]], chunks[number])
                and chunks[number].blob_stop - chunks[stride[0]].blob_start <= _STRIDE
            ):
                yield stride
                stride = []
            stride.append(number)
        if stride:
            yield stride

    # Fetching

    def _start(self, numbers: list[int], *, urgent: bool, rate: float | None = None) -> Run:
        run = Run(numbers, urgent=urgent, rate=rate)
        for number in numbers:
            self._coming[number] = run
        self._nursery.start_soon(self._fly, run)
        return run

    async def _fly(self, run: Run) -> None:
        """One run; its outcome goes to whoever waits for it, and only Cancelled leaves here."""
        source = self._source()
        try:
            async with self._traffic.turn(source.name, run):
                await self._drop_stored(run)
                while run.left:
                    try:
                        await self._fetch(run, source)
                    except Corrupt as error:
                        # If a mirror sent it, the next one may do better.
                        if not source.distrust(self._descriptor):
                            if run.failing is not None:
                                until = trio.current_time() + _REFUSED_SECONDS
                                self._refused[run.failing] = until, error
                            if self.index.trust is Trust.HINT:
                                self._meter.note_whole("a part of it was not what its index says")
                            raise
        except FsmountError as error:
            run.error = error
        except Exception as error:
            log.exception("fetching of layer %s failed in a way nobody foresaw", self._descriptor.digest)
            run.error = FsmountError(
                f"layer {self._descriptor.digest} failed: {type(error).__name__}: {error}"
            )
        finally:
            if self._whole is run:
                self._whole = None
            for number in run.left:
                self._forget(run, number)
            run.done = True
            run.step()

    def _forget(self, run: Run, number: int) -> None:
        if self._coming.get(number) is run:
            del self._coming[number]

    async def _drop_stored(self, run: Run) -> None:
        """Takes out of a run what is fetched ahead, and is here already."""
        ahead = [number for number in run.numbers if number not in run.wanted]
        if not ahead:
            return
        keys = [self.chunk_key(number) for number in ahead]
        stored = await self._passes.in_thread(self._passes.chunks.stored, keys)
        for number, is_here in zip(ahead, stored, strict=True):
            if is_here and number not in run.wanted:
                self._deliver(run, number)
        run.numbers = [number for number in run.numbers if number in run.left]

    async def _fetch(self, run: Run, source: Source) -> None:
        """What is left of a run up to the first gap, with one request."""
        chunks = self.index.chunks
        numbers = next(iter(self._strides(number for number in run.numbers if number in run.left)))
        start, stop = chunks[numbers[0]].blob_start, chunks[numbers[-1]].blob_stop
        async with source.blob(self._descriptor, start=start, stop=stop) as pieces:
            if (pieces.offset, pieces.stop) == (start, stop):
                await self._take(run, pieces, numbers)
                return
            self._warn_ignored(source)
            if self.index.trust is Trust.HINT:
                raise RangesIgnored(f"{source.name} sends whole blobs where parts are asked for")
            whole = self._whole
            if whole is None or whole is run:
                self._whole = run
                everything = sorted(range(len(chunks)), key=lambda number: chunks[number].blob_start)
                run.numbers = everything
                # Other runs find it out with their own answers, and then wait for this one.
                run.left = {number for number in everything if self._coming.setdefault(number, run) is run}
                await self._take(run, pieces, everything)
                return
        await whole.wait_done()

    def _warn_ignored(self, source: Source) -> None:
        if not self.ignored:
            self.ignored = True
            self._meter.note_whole(RANGES_IGNORED)
            log.warning(
                "%s sends all of layer %s where a part is asked for: it cannot be read lazily",
                source.name,
                self._descriptor.digest,
            )

    async def _take(self, run: Run, pieces: Bytes, numbers: Sequence[int]) -> None:
        """Cuts the chunks out of what comes, which is ascending."""
        buffer = bytearray()
        base = pieces.offset
        for number in numbers:
            chunk = self.index.chunks[number]
            while base + len(buffer) < chunk.blob_stop:
                piece = await anext(pieces, None)
                if piece is None:
                    raise Corrupt(f"layer {self._descriptor.digest} ends before byte {chunk.blob_stop}")
                self._meter.received += len(piece)
                buffer += piece
                if run.rate is not None and not run.urgent:
                    await trio.sleep(len(piece) / run.rate)
                unwanted = min(chunk.blob_start - base, len(buffer))
                if unwanted > 0:
                    del buffer[:unwanted]
                    base += unwanted
            data = bytes(memoryview(buffer)[chunk.blob_start - base : chunk.blob_stop - base])
            if number == numbers[-1] and chunk.blob_stop == pieces.stop:
                # Only a connection whose body was seen to end can be used again.
                await anext(pieces, None)
            await self._keep(run, number, data)

    async def _keep(self, run: Run, number: int, data: bytes) -> None:
        key = self.chunk_key(number)
        chunk = self.index.chunks[number]
        spans = self.index.spans(number)

        def decode_and_store() -> tuple[bytes, bytes, bool]:
            inflated = _decode(self.index.codec, spans, data, chunk.blob_start)
            sha256 = hashlib.sha256(inflated).digest()
            if len(inflated) != chunk.size or chunk.sha256 not in (None, sha256):
                raise Corrupt("it is not the chunk that was verified before")
            stored = not self.is_retired and self._passes.chunks.put(key, inflated, sha256)
            return inflated, sha256, stored

        try:
            inflated, sha256, stored = await self._passes.in_thread(decode_and_store)
        except Corrupt as error:
            run.failing = number
            raise Corrupt(f"layer {self._descriptor.digest}, chunk {number}: {error.message}") from None
        if self.index.trust is Trust.HINT and self._shown.setdefault(number, sha256) != sha256:
            raise Corrupt(f"layer {self._descriptor.digest}, chunk {number}: it was another one before")
        for one in {run, self._coming.get(number, run)}:
            wanted = number in one.wanted and not self.is_retired
            # A cache of less than a few chunks may have evicted it as soon as it was stored.
            if wanted and not (stored and await self._passes.chunks.open(key, sha256) is not None):
                self._passes.chunks.hold(key, inflated)
            self._deliver(one, number)

    def _deliver(self, run: Run, number: int) -> None:
        self._forget(run, number)
        self._refused.pop(number, None)
        self._came[number] += 1
        run.left.discard(number)
        run.step()


class FetchedBlob:
    """The blob of a layer that is not compressed: its chunks, fetched where they are not here."""

    def __init__(self, fetcher: Fetcher, passes: Passes) -> None:
        self._fetcher = fetcher
        self._passes = passes

    @asynccontextmanager
    async def blob(self, descriptor: Descriptor) -> AsyncIterator[AsyncIterator[bytes]]:
        """All of it, not verified. Raises: as Fetcher.bring."""
        async with aclosing(self._pieces()) as pieces:
            yield pieces

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        chunks = self._passes.chunks
        for number, chunk in enumerate(self._fetcher.index.chunks):
            key = self._fetcher.chunk_key(number)
            data = b""
            while len(data) != chunk.size:
                descriptor = chunks.hot(key)
                if descriptor is None:
                    descriptor = await chunks.open(key)
                while descriptor is None:
                    await self._fetcher.bring(number)
                    descriptor = chunks.hot(key)
                data = chunks.read(descriptor, chunk.size, 0)
                if len(data) != chunk.size:
                    await chunks.drop([key])
            yield data


def _continues(chunk: Chunk, following: Chunk) -> bool:
    """Whether one request may bring both: the second begins where the first ends, or nearly so."""
    return chunk.blob_start <= following.blob_start <= chunk.blob_stop + _GAP and (
        following.blob_stop >= chunk.blob_stop
    )


def _decode(codec: Codec, spans: Sequence[Span], data: bytes, base: int) -> bytes:
    """The bytes of a chunk, from the part of the blob that begins at base. Raises: Corrupt."""
    parts: list[bytes] = []
    for (offset, length), shared in groupby(spans, key=lambda span: (span.offset, span.length)):
        compressed = data[offset - base : offset - base + length]
        group = list(shared)
        if len(group) == 1:
            inflated = inflate_span(codec, group[0], compressed)
            check_span(group[0], compressed, inflated)
            parts.append(inflated)
            continue
        # Small files that share a gzip member: it is inflated once for all of them.
        stop = max(span.skip + span.size for span in group)
        whole = inflate_span(codec, Span(offset, length, stop), compressed)
        for span in group:
            inflated = whole[span.skip : span.skip + span.size]
            check_span(span, compressed, inflated)
            parts.append(inflated)
    return b"".join(parts)
