"""Streamed: the index of one layer, made by a pass over all of its blob, and what that finds out about the layer."""

import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import trio

from fsmount.archive import estargz
from fsmount.archive.codecs import Compression
from fsmount.archive.restarts import chunk_spans
from fsmount.archive.scan import TarScanner
from fsmount.archive.span import Codec, Kind, Span, Trust
from fsmount.archive.toc import HIDDEN
from fsmount.cache import database
from fsmount.cache.chunks import ChunkStore
from fsmount.cache.folder import CacheFolder, disk_errors, new_file, publish
from fsmount.errors import Corrupt, FsmountError, Invalid, Unsupported
from fsmount.index import VERSION, Chunk, LayerIndex
from fsmount.indexing import IndexBuilder
from fsmount.ingest import Inflate, Keep, OneFile
from fsmount.lazy import Finder, LayerSpec
from fsmount.oci.digest import Digest
from fsmount.passes import BlobSource, Meter, Pass, Passes
from fsmount.registry.source import Source
from fsmount.traffic import Traffic

log = logging.getLogger(__name__)

#: Seconds during which a layer that was found corrupt is not downloaded again.
_CONDEMNED_SECONDS = 60
#: What the last rows of any index may need of the disk.
_LAST_ROOM = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Means:
    """What the layers of a process share. What is under way goes on in `nursery`."""

    folder: CacheFolder
    chunks: ChunkStore
    passes: Passes
    traffic: Traffic
    finder: Finder
    nursery: trio.Nursery


class Streamed:
    """A layer that is streamed whole, one time, when something of it is first asked for.

    That pass makes the index, caches the chunks and verifies the layer's digest at its end; what has gone by can be
    read meanwhile. If the digest turns out wrong, nothing stays of the layer. A layer that has been read by a hint
    is streamed, too, before more of it is believed: then the pass compares.
    """

    def __init__(
        self, spec: LayerSpec, source: Source, means: Means, on_void: Callable[[Corrupt, bool], None]
    ) -> None:
        """on_void is told when all that was shown of the layer so far must not be shown again.

        And whether the layer was complete then, so that all of it may have been shown.
        """
        self.spec = spec
        self.source = source
        self.meter = Meter()
        self._means = means
        self._pass: Pass | None = None
        self._index: LayerIndex | None = None
        self._looked = False
        #: Whether the whole layer has to go by before more of it is believed, or because no part can be had alone.
        self._must_stream = False
        #: Whether a part was not what a hint says: until all has gone by nobody knows which of the two is wrong.
        self._in_doubt = False
        #: Indexes that said something else than the layer.
        self._refused: set[str] = set()
        self._condemned: tuple[float, Corrupt] | None = None
        #: What images say of the inflated layer; one that is right suffices.
        self._expected: set[str] = set()
        #: The sha256 of chunks that readers were shown by passes which broke off, and which nobody has certified.
        self._shown: dict[int, bytes] = {}
        #: The sha256 of chunks that readers were shown by a hint.
        self._hinted: dict[int, bytes] = {}
        #: Why it could not be read in parts when it was first asked for.
        self._reason = ""
        self._on_void = on_void
        self._is_void = False  # since the present pass began
        #: How often what was shown of the layer turned out void, and why it did last.
        self._voids = 0
        self._void: Corrupt | None = None

    # The index

    @property
    def index(self) -> LayerIndex | None:
        """The index: complete, of what has streamed so far, or None before the first byte."""
        if self._index is None and not self._looked:
            self._looked = True
            self._index = self.load_index()
        return self._index

    @property
    def complete(self) -> bool:
        index = self.index
        return index is not None and index.complete

    @property
    def index_path(self) -> Path:
        """The file of the complete index."""
        return self._means.folder.layers / f"{self.spec.key}.sqlite"

    def load_index(self) -> LayerIndex | None:
        """The index on disk; a damaged one is removed and counts as absent."""
        try:
            return LayerIndex.open(self.index_path)
        except FsmountError as error:
            log.warning("%s; it is made again", error.message)
            self.index_path.unlink(missing_ok=True)
            return None

    def reopen_index(self) -> LayerIndex:
        """Another connection to the complete index, for another thread. Ownership: the caller closes it."""
        index = self.load_index()
        if index is None:
            raise FsmountError(
                f"the index of layer {self.spec.descriptor.digest} has vanished from the cache"
            )
        return index

    def close_index(self) -> None:
        """Frees what a complete index holds open; it opens by itself when it is asked again."""
        if self._index is not None and self._index.complete:
            self._index.close()
            self._index = None
            self._looked = False

    def take(self, spec: LayerSpec, source: Source) -> None:
        """Takes what one more image says of the layer, and where to fetch it from now.

        Raises: Corrupt (the layer is known to inflate to something else).
        """
        # What must not be read by an index for one image, is from now on not read by a new one for any.
        self.spec = replace(spec, indexes=spec.indexes.strictest(self.spec.indexes))
        self.source = source
        if spec.diff_id is not None and spec.diff_id.algorithm == "sha256":
            self._expected.add(str(spec.diff_id))
            self.check(spec.diff_id)

    def check(self, diff_id: Digest | None) -> None:
        """Raises: Corrupt, if the layer is known to inflate to something else than an image says."""
        index = self.index
        if index is None or not index.complete or index.diff_id is None:
            return
        if diff_id is not None and diff_id.algorithm == "sha256":
            self._compare(index.diff_id, str(diff_id))

    def _compare(self, found: str, expected: str) -> None:
        if found != expected:
            raise Corrupt(
                f"layer {self.spec.descriptor.digest}: inflated it is {found}, but the image's configuration"
                f" says {expected}",
                remedy="Whoever made the image broke it; build and push it again.",
            )

    async def wait_complete(self) -> LayerIndex:
        """The complete index, streaming the layer if need be. Raises: what the pass raised."""
        while (index := self.index) is None or not index.complete:
            try:
                await self._running().wait_done()
            except Corrupt:
                if self._condemned is not None:
                    raise
                # It was a mirror's doing: the next pass asks the others. Nobody here has read anything.
        return index

    async def wait_trusted(self) -> LayerIndex:
        """The complete index, when it is more than a hint. Raises: what the pass raised."""
        while (index := await self.wait_complete()).trust is Trust.HINT:
            self._must_stream = True
            await self._running().wait_done()
        return index

    async def demand_trust(self) -> None:
        """Returns when an index that is a hint, if there is one, is that no more. Raises: what the pass raised."""
        index = self.index
        if index is not None and index.complete and index.trust is Trust.HINT:
            await self.wait_trusted()

    async def wait_progress(self) -> None:
        """Returns when more of the layer is known than now. Raises: what the pass raised."""
        if not self.complete:
            await self._running().wait_step()

    # Chunks

    def chunk_key(self, number: int) -> str:
        """Names a chunk in the store."""
        index = self.index
        space = index.space if index is not None and index.complete else ""
        return f"{self.spec.key}{space}/{number}"

    # Passes

    def _running(self) -> Pass:
        """The pass under way, or a new one."""
        if self._condemned is not None:
            until, error = self._condemned
            if trio.current_time() < until:
                raise error.with_traceback(None)
        if self._pass is None or self._pass.done:
            index = self.index if self.complete else None
            space = index.space if index is not None else ""
            self._pass = Pass(
                self._means.passes,
                self.spec.descriptor,
                chunk_key=lambda number: f"{self.spec.key}{space}/{number}",
                known=index,
                is_file=self.spec.title is not None,
            )
            self._means.nursery.start_soon(self._run, self._pass)
        return self._pass

    async def _run(self, running: Pass) -> None:
        """One pass; its outcome goes to whoever waits for it, and only Cancelled leaves here."""
        try:
            # What a pass that broke off has shown is compared with the next one: that must cut alike.
            if running.known is None and not self._shown and await self._find():
                running.skipped = True
                return
            async with self._means.passes.place(self.source):
                if running.known is not None and running.known.trust is not Trust.HINT:
                    await self._fetch_again(running)
                else:
                    await self._make_index(running)
        except FsmountError as error:
            running.error = error
        except Exception as error:
            log.exception("streaming layer %s failed in a way nobody foresaw", self.spec.descriptor.digest)
            running.error = FsmountError(
                f"layer {self.spec.descriptor.digest} failed: {type(error).__name__}: {error}"
            )
        finally:
            running.done = True
            running.step()

    async def _find(self) -> bool:
        """Whether the layer need not be streamed, because it has an index by now."""
        return False

    def _set_index(self, index: LayerIndex | None) -> None:
        self._index = index
        if index is not None:
            self.note_index(index)

    # What those learn who keep in mind what readers were shown

    def note_index(self, index: LayerIndex) -> None:
        """There is a complete index from now on."""

    def note_stream(self, *, has_begun: bool) -> None:
        """A pass without an index begins to show what nobody has verified; or it broke off, and had shown nothing."""

    def _blob(self, hint: LayerIndex) -> BlobSource:
        """Where the bytes come from of a layer that has been read by a hint."""
        return self.source

    def _facts(self, kind: Kind, trust: Trust, space: str) -> dict[str, object]:
        descriptor = self.spec.descriptor
        return {
            "digest": str(descriptor.digest),
            "blob_size": descriptor.size,
            "kind": str(kind),
            "trust": str(trust),
            "space": space,
        }

    @property
    def _has_toc(self) -> bool:
        """Whether the blob is a tar that has a table of its own contents in it."""
        return estargz.TOC_DIGEST in self.spec.descriptor.annotations

    @property
    def stream_numbering(self) -> str:
        """LayerIndex.numbering of what a pass finds: it depends on nothing but the layer."""
        return f"{VERSION}-streamed{'-hidden' if self._has_toc else ''}"

    def _publish(self, path: Path) -> LayerIndex:
        publish(path, self.index_path)
        index = LayerIndex.open(self.index_path)
        assert index is not None
        return index

    @contextmanager
    def _new_file(self) -> Iterator[Path]:
        """A file for an index in the making; it is gone at the end of the block, unless it has got its name."""
        layers = self._means.folder.layers
        with disk_errors(layers), new_file(layers) as path:
            yield path

    async def _fetch_again(self, running: Pass) -> None:
        """For chunks that were evicted: each is checked as it comes."""
        try:
            await running.stream(self.source, None, self.meter)
        except Corrupt:
            self.source.distrust(self.spec.descriptor)
            raise

    async def _make_index(self, running: Pass) -> None:
        """Streams the layer, whose index is not known, or only a hint."""
        hint = running.known
        self._is_void = False
        with self._new_file() as path:
            if hint is None:
                self.note_stream(has_begun=True)
            # As its own table of contents would have it.
            builder = IndexBuilder(path, hidden=HIDDEN if self._has_toc else ())
            if hint is None:
                self._index = builder.index
            running.keep = Keep(hint, builder, self._hinted if hint is not None else None)
            finished = None
            try:
                finished = await self._stream(running, builder)
                self._compare_with_shown(running.keep.chunks, is_certified=True)
                self._must_stream = self._in_doubt = False
            except Corrupt as error:
                self._condemn(error)
                raise
            except Unsupported as error:
                if hint is not None:
                    self._refuse(hint, error.message)
                raise
            except BaseException:
                if hint is None:
                    self._compare_with_shown(running.keep.chunks, is_certified=False)
                    if not self._shown:
                        self.note_stream(has_begun=False)
                elif running.keep.differs:
                    self._refuse(hint, "what was read by it before has changed since")
                raise
            finally:
                if hint is None or finished is not None or self._is_void:
                    self._set_index(finished)
                builder.close()
                if finished is None and (hint is None or self._is_void):
                    last = max(running.kept + 1, len(hint.chunks) if hint is not None else 0)
                    with trio.move_on_after(10, shield=True):
                        await self._means.chunks.drop([running.chunk_key(number) for number in range(last)])

    async def _stream(self, running: Pass, builder: IndexBuilder) -> LayerIndex | None:
        """The certified index, or None if a hint was wrong."""
        title = self.spec.title
        scanner = TarScanner() if title is None else OneFile(title)
        hint = running.known
        blob = self.source if hint is None else self._blob(hint)
        # What comes out of the cache was counted when it was fetched.
        meter = self.meter if blob is self.source else Meter()
        inflate = await running.stream(blob, scanner, meter)
        try:
            diff_id = running.keep.finish()
        except Invalid as error:
            digest = self.spec.descriptor.digest
            raise Invalid(f"layer {digest}: {error.message}", remedy=error.remedy) from error
        if self._expected and str(diff_id) not in self._expected:
            self._compare(str(diff_id), min(self._expected))
        facts = self._facts(Kind.STREAMED, Trust.CERTIFIED, hint.space if hint is not None else "")
        facts |= {"diff_id": str(diff_id), "compression": str(inflate.compression)}
        if hint is not None:
            facts |= {"kind": str(hint.kind), "numbering": hint.numbering}
        else:
            facts |= {"reason": self._reason, "numbering": self.stream_numbering}
        chunks, codec, spans = _spans(running, inflate, self.spec.descriptor.size)
        if codec is not None:
            facts["codec"] = int(codec)

        def finish() -> LayerIndex | None:
            with disk_errors(builder.path):
                # What is still to be written is less than what has been.
                self._means.chunks.free(_LAST_ROOM + builder.path.stat().st_size)
                builder.finish(chunks, facts, spans)
                if hint is not None and (running.keep.differs or not _same_members(builder.path, hint)):
                    return None
                return self._publish(builder.path)

        index = await self._means.passes.in_thread(finish)
        if index is None:
            assert hint is not None
            self._refuse(hint, "it says something else than the layer")
        return index

    def _compare_with_shown(self, chunks: Sequence[Chunk], *, is_certified: bool) -> None:
        """Makes void what an earlier pass, which broke off, has shown, if this one shows other bytes.

        The kernel keeps what it was shown, by the layer's number.
        """
        found = {number: chunk.sha256 for number, chunk in enumerate(chunks) if chunk.sha256}
        if any(found.get(number, sha256) != sha256 for number, sha256 in self._shown.items()):
            self._make_void(self._alarm("what was read of it before has changed since"))
            self._shown = {}
        self._shown = {} if is_certified else self._shown | found

    def _refuse(self, hint: LayerIndex, reason: str) -> None:
        """Makes void what an index said that nobody vouched for; the layer itself may be sound."""
        self._refused.add(hint.space)
        self._must_stream = self._in_doubt = False
        self._remove_index()
        self._make_void(self._alarm(f"its {hint.kind} index was not to be trusted: {reason}"))

    def _alarm(self, what: str) -> Corrupt:
        error = Corrupt(f"layer {self.spec.descriptor.digest}: {what}")
        log.error("%s; it came from %s", error.message, self.source.name)
        return error

    def _condemn(self, error: Corrupt) -> None:
        # Whoever was shown some of it on a hint does not hear the error itself.
        level = logging.ERROR if self._hinted else logging.INFO
        log.log(level, "%s; it came from %s, and nothing of it is kept", error.message, self.source.name)
        # If a mirror sent it, the next reader finds out what the others have.
        others = self.source.distrust(self.spec.descriptor)
        self._condemned = None if others else (trio.current_time() + _CONDEMNED_SECONDS, error)
        self._must_stream = self._in_doubt = False
        self._remove_index()
        self._shown = {}
        self._make_void(error)

    def _remove_index(self) -> None:
        """Removes an index that is no more than a hint, and the trees that may have been made with it."""
        if self.index_path.exists():
            self.index_path.unlink()
            for tree in self._means.folder.trees.iterdir():
                tree.unlink(missing_ok=True)

    def _make_void(self, error: Corrupt) -> None:
        self._is_void = True
        self._hinted.clear()  # what is on its way still fills this one
        self._void = error
        self._voids += 1
        self._on_void(error, self.complete)


def _spans(
    running: Pass, inflate: Inflate, blob_size: int
) -> tuple[list[Chunk], Codec | None, list[tuple[int, Span]]]:
    """The chunks of a pass with how each can be had again alone, if it can."""
    hint, chunks = running.known, running.keep.chunks
    if hint is not None:
        # What follows the end of the archive is in no span, and in no file.
        found = zip(chunks, hint.chunks, strict=False)
        joined = [known._replace(sha256=chunk.sha256) for chunk, known in found]
        numbered = [(number, span) for number in range(len(joined)) for span in hint.spans(number)]
        return joined, hint.codec, numbered
    if inflate.compression is Compression.NONE:
        spans = [Span(chunk.start, chunk.size, chunk.size, sha256=chunk.sha256) for chunk in chunks]
        codec = Codec.RAW
    elif inflate.restarts:
        cuts = [(chunk.start, chunk.size, chunk.sha256) for chunk in chunks]
        spans = list(chunk_spans(inflate.restarts, cuts, blob_size))
        codec = Codec.RESTART
    else:
        return chunks, None, []
    ranged = [
        chunk._replace(blob_start=span.offset, blob_stop=span.offset + span.length)
        for chunk, span in zip(chunks, spans, strict=True)
    ]
    return ranged, codec, list(enumerate(spans))


def _same_members(path: Path, hint: LayerIndex) -> bool:
    """Whether a finished index has the members, names and whiteouts of the hint that was read."""
    orders = {
        "members": "number",
        "directories": "number",
        "names": "parent, name",
        "whiteouts": "parent, name",
    }
    with closing(sqlite3.connect(database.uri(path), uri=True)) as connection:
        return all(
            row == other
            for table, order in orders.items()
            for row, other in zip_longest(
                connection.execute(f"SELECT * FROM {table} ORDER BY {order}"), hint.rows(table, order)
            )
        )
