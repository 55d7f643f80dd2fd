"""A cache disk that is full, or fails, costs readers nothing but speed; the log says when it begins and ends."""

import errno
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from backports import zstd

from fsmount.cache.table import ChunkTable
from fsmount.layer import Layer, Layers
from fsmount.lazy import LayerSpec
from tests.fakes.source import FakeSource, open_layers
from tests.unit.test_lazy import (
    FILES,
    FORMS,
    TAR,
    _small,  # noqa: F401 - small layers, small chunks
    content,
    packed,
)

_TAR = "application/vnd.oci.image.layer.v1.tar"
#: Those that are streamed, too: gzip, which can be read in parts afterwards, and what never can.
STREAMED: dict[str, Callable[[FakeSource], LayerSpec]] = {
    "gzip": lambda source: LayerSpec(source.put_blob(packed(), _TAR + "+gzip")),
    "zstd": lambda source: LayerSpec(source.put_blob(zstd.compress(TAR), _TAR + "+zstd")),
}
LAYERS = {name: form.put for name, form in FORMS.items()} | STREAMED


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


# -------------------- what can go wrong

Fault = Callable[[pytest.MonkeyPatch, Path], object]


def _writing_fails(code: int) -> Fault:
    def begin(patch: pytest.MonkeyPatch, _: Path) -> None:
        def fail(path: Path, data: memoryview) -> None:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data[:1])
            raise OSError(code, os.strerror(code))

        patch.setattr("fsmount.cache.chunks.write_file", fail)

    return begin


def _reading_fails(patch: pytest.MonkeyPatch, _: Path) -> None:
    pread, fail = os.pread, OSError(errno.EIO, os.strerror(errno.EIO))

    def is_chunk(descriptor: int) -> bool:
        return ".val" in os.readlink(f"/proc/self/fd/{descriptor}")

    def broken(descriptor: int, size: int, offset: int) -> bytes:
        if is_chunk(descriptor):
            raise fail
        return pread(descriptor, size, offset)

    def digest(descriptor: int) -> str:
        raise fail

    patch.setattr(os, "pread", broken)
    patch.setattr("fsmount.cache.chunks.digest_of", digest)


def _says(kind: type[sqlite3.Error], text: str, code: int, name: str, *, to: str = "") -> Fault:
    """SQLite says that of every statement that begins so."""

    def begin(patch: pytest.MonkeyPatch, _: Path) -> None:
        execute = ChunkTable._execute.fget  # type: ignore[attr-defined]

        def broken(table: ChunkTable) -> Callable[..., object]:
            def run(statement: str, *values: object) -> object:
                if not statement.startswith(to):
                    return execute(table)(statement, *values)
                error = kind(text)
                error.sqlite_errorcode, error.sqlite_errorname = code, name
                raise error

            return run

        patch.setattr(ChunkTable, "_execute", property(broken))

    return begin


@contextmanager
def _somebody_writes(chunks: Path) -> Iterator[None]:
    with closing(sqlite3.connect(chunks / "cache.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


_FULL = sqlite3.OperationalError, "database or disk is full", sqlite3.SQLITE_FULL, "SQLITE_FULL"
_IO = sqlite3.OperationalError, "disk I/O error", sqlite3.SQLITE_IOERR, "SQLITE_IOERR_READ"
_READ_ONLY = (
    sqlite3.OperationalError,
    "attempt to write a readonly database",
    sqlite3.SQLITE_READONLY,
    "SQLITE_READONLY",
)
_SPOILT = (
    sqlite3.DatabaseError,
    "database disk image is malformed",
    sqlite3.SQLITE_CORRUPT,
    "SQLITE_CORRUPT",
)
FAULTS: dict[str, Fault] = {
    "full": _writing_fails(errno.ENOSPC),
    "over quota": _writing_fails(errno.EDQUOT),
    "writing fails": _writing_fails(errno.EIO),
    "reading fails": _reading_fails,
    "no space for the table": _says(*_FULL, to="BEGIN"),
    "the table cannot be read": _says(*_IO),
    "the table cannot be written": _says(*_IO, to="COMMIT"),
    "read-only": _says(*_READ_ONLY, to="BEGIN"),
    "spoilt": _says(*_SPOILT),
}


@contextmanager
def trouble(fault: str, chunks: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if fault == "locked":
            patch.setattr("fsmount.cache.chunks.PATIENCE_SECONDS", 0.01)
            patch.setattr("fsmount.cache.eviction.PATIENCE_SECONDS", 0.01)
            with _somebody_writes(chunks):
                yield
        else:
            FAULTS[fault](patch, chunks)
            yield


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsmount.cache.trouble._QUIET_SECONDS", 0.0)


def open_files() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            yield os.readlink(f"/proc/self/fd/{name}")


def time_passes(layers: Layers) -> None:
    """Until what has failed is tried again."""
    layers.chunks._paused_until = 0.0
    layers.chunks._eviction._begun_at = float("-inf")


def close_chunks(layers: Layers) -> None:
    """As after many others were read: none of them is open any more."""
    layers.chunks._hot.close()


async def check(layer: Layer) -> None:
    """Reads all of a layer; little where all of it has to be streamed for nearly every chunk that is not cached."""
    index = await layer.wait_complete()
    for path in FILES if index.has_spans else (b"small/07", b"empty", b"small/31"):
        assert await content(layer, path) == FILES[path]


@pytest.mark.parametrize("fault", [*FAULTS, "locked"])
@pytest.mark.parametrize("put", LAYERS.values(), ids=LAYERS)
async def test_a_layer_that_is_known_is_read_whatever_the_disk_does_and_cached_again_when_that_is_over(
    tmp_path: Path,
    source: FakeSource,
    put: Callable[[FakeSource], LayerSpec],
    fault: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        assert await content(layer, b"small/07") == FILES[b"small/07"]
        # What is read on a hint may not be believed any more; here it is.
        caplog.clear()
        with trouble(fault, tmp_path / "chunks"):
            await check(layer)
            close_chunks(layers)
            await check(layer)
        said = [one.message for one in caplog.records if "serving without caching" in one.message]
        # A layer of which all is here needs no caching.
        assert len(said) == 1 or (not said and put in STREAMED.values() and fault not in ("reading fails",))
        time_passes(layers)
        close_chunks(layers)
        await layers.chunks.drop([layer.chunk_key(number) for number in range(len(layer.stored_chunks()))])
        await check(layer)
        assert sum(layer.stored_chunks()) > 5
        assert layers.chunks.trouble is None
        ends = [one.message for one in caplog.records if "takes chunks again" in one.message]
        assert len(ends) == len(said)
    assert "nobody foresaw" not in caplog.text


@pytest.mark.parametrize("fault", [*FAULTS, "locked"])
@pytest.mark.parametrize("put", STREAMED.values(), ids=STREAMED)
async def test_a_layer_that_is_not_known_is_streamed_whatever_the_disk_does_with_its_chunks(
    tmp_path: Path, source: FakeSource, put: Callable[[FakeSource], LayerSpec], fault: str
) -> None:
    async with open_layers(tmp_path) as layers:
        with trouble(fault, tmp_path / "chunks"):
            layer = layers.get(put(source), source)
            await check(layer)
            assert layer.complete
    async with open_layers(tmp_path) as layers:
        await check(layers.get(put(source), source))


async def test_what_cannot_be_stored_is_not_fetched_ahead(tmp_path: Path, source: FakeSource) -> None:
    spec = FORMS["eStargz"].put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        with trouble("full", tmp_path / "chunks"):
            await content(layer, b"small/07")
            fetcher = layer.fetcher
            assert fetcher is not None and not fetcher.fits
            source.ranges.clear()
            await layer.fill()
            assert source.ranges == []
        time_passes(layers)
        await content(layer, b"last")
        assert fetcher.fits


async def test_no_more_lives_in_memory_than_is_said(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsmount.cache.hot.HELD_BYTES", 20_000)
    spec = FORMS["SOCI v2"].put(source)
    async with open_layers(tmp_path) as layers:
        with trouble("full", tmp_path / "chunks"):
            layer = layers.get(spec, source)
            await check(layer)
        assert 1 <= sum("fsmount-chunk" in name for name in open_files()) <= 20_000 // 4096


@pytest.fixture(autouse=True)
def _no_error_of_others(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
