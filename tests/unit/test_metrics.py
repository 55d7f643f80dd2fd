"""What Prometheus reads of a mount: that it says what the status does, in the form that is prescribed."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount import metrics
from fsmount.lazy import LayerSpec
from fsmount.status.report import (
    AppStatus,
    FailureStatus,
    OperationStatus,
    ProcessStatus,
    RateStatus,
    ServerStatus,
    State,
    Status,
    TroubleStatus,
)
from tests.fakes.source import FakeSource
from tests.unit.test_lazy import (
    FORMS,
    _small,  # noqa: F401 - small layers, small chunks
    content,
    put_gzip,
)
from tests.unit.test_status import engine_of, look

_LABEL = r'[a-z_]+="(?:[^"\\\n]|\\[\\"n])*"'
_SAMPLE = re.compile(rf"([a-z_]+)\{{{_LABEL}(?:,{_LABEL})*\}} [0-9]+(?:\.[0-9]+)?(?:e-[0-9]+)?")
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}


def parse(text: str, mountpoint: str = "/mnt") -> Mapping[str, Mapping[str, float]]:
    """Metrics by name and labels; the mount point, which they all have, is not told.

    Prometheus's own library takes more than the format allows; here types come first, once, and none mix.
    """
    assert text.endswith("\n")
    kinds: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("# HELP "):
            continue
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds and name.startswith("fsmount_")
            assert (kind == "counter") == name.endswith("_total")
            kinds[name] = kind
            continue
        sample = _SAMPLE.fullmatch(line)
        assert sample is not None, line
        name, kind = list(kinds.items())[-1]
        assert sample[1] in {name + suffix for suffix in _SUFFIXES.get(kind, ("",))}
    return {name: {} for name in kinds} | dict(_read(text, mountpoint))


def _read(text: str, mountpoint: str) -> Iterator[tuple[str, Mapping[str, float]]]:
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert sample.labels.pop("mountpoint") == mountpoint
            labels = ",".join(f'{label}="{value}"' for label, value in sample.labels.items())
            samples = found.setdefault(sample.name, {})
            assert labels not in samples
            samples[labels] = sample.value
    yield from found.items()


async def test_the_metrics_say_what_the_status_does(tmp_path: Path) -> None:
    source = FakeSource()
    async with engine_of(tmp_path) as engine:
        lazy = engine.layers.get(FORMS["eStargz"].put(source), source)
        await content(lazy, b"small/07")
        await engine.layers.get(LayerSpec(put_gzip(source)), source).wait_complete()
        engine.layers.get(LayerSpec(source.put_blob(b"nobody has asked for this")), source)
        status = await look(engine)
    found = parse(metrics.as_text(status).decode())
    assert status.cache is not None
    assert found["fsmount_build_info"] == {f'version="{status.fsmount}"': 1}
    assert found["fsmount_cache_bytes"] == {"": status.cache.stored}
    assert found["fsmount_cache_limit_bytes"] == {"": 20 * 10**9}
    assert found["fsmount_layers"] == {
        'read_as="eStargz",trust="bound"': 1,
        'read_as="streamed",trust="certified"': 1,
        'read_as="unknown",trust="unknown"': 1,
    }
    assert found["fsmount_layer_fetched_bytes_total"] == {"": sum(one.fetched for one in status.layers)}
    assert found["fsmount_layer_spared_bytes"][""] > lazy.spec.descriptor.size / 2
    assert found["fsmount_layers_not_lazy_total"] == {}
    assert found["fsmount_last_error_timestamp_seconds"] == {}


@pytest.fixture
async def status(tmp_path: Path) -> Status:
    async with engine_of(tmp_path) as engine:
        return await look(engine)


async def test_requests_of_the_kernel_are_a_histogram_and_their_errors(status: Status) -> None:
    read = OperationStatus("read", 7, 12.25, [3, 0, 2, 0, 1, 1], {"EIO": 2, "ETIMEDOUT": 1})
    lookup = OperationStatus("lookup", 1, 0.000015, [1, 0, 0, 0, 0, 0], {})
    found = parse(metrics.as_text(replace(status, operations=[read, lookup])).decode())
    buckets = found["fsmount_operation_duration_seconds_bucket"]
    assert {labels: count for labels, count in buckets.items() if "read" in labels} == {
        'operation="read",le="0.001"': 3,
        'operation="read",le="0.01"': 3,
        'operation="read",le="0.1"': 5,
        'operation="read",le="1"': 5,
        'operation="read",le="10"': 6,
        'operation="read",le="+Inf"': 7,
    }
    assert found["fsmount_operation_duration_seconds_count"] == {
        'operation="read"': 7,
        'operation="lookup"': 1,
    }
    assert found["fsmount_operation_duration_seconds_sum"]['operation="lookup"'] == pytest.approx(0.000015)
    assert found["fsmount_operation_errors_total"] == {
        'operation="read",errno="EIO"': 2,
        'operation="read",errno="ETIMEDOUT"': 1,
    }


async def test_the_process_its_state_and_its_last_error_are_told(status: Status) -> None:
    status = replace(
        status,
        state=State.CACHE_ONLY,
        process=ProcessStatus(5, 4, 6, "killed"),
        last_error=FailureStatus("2024-01-01T00:00:00.500+00:00", "read: EIO: away"),
    )
    found = parse(metrics.as_text(status).decode())
    assert found["fsmount_worker_restarts_total"] == {"": 5}
    assert found["fsmount_state"] == {
        'state="starting"': 0,
        'state="refusing"': 0,
        'state="cache-only"': 1,
        'state="degraded"': 0,
        'state="serving"': 0,
    }
    assert found["fsmount_last_error_timestamp_seconds"] == {"": 1704067200.5}


async def test_sources_and_servers_are_told(status: Status) -> None:
    trouble = TroubleStatus("2024-01-01T00:00:00+00:00", "away", False, "2024-01-01T00:00:00+00:00", False)
    status = replace(
        status,
        apps=[AppStatus("web", "s", 3, trouble), AppStatus("plain", "t", 0, None)],
        rate_limits=[RateStatus("registry-1.docker.io", 100, 76, 21600, None)],
        servers=[ServerStatus("one.example", 12, 3), ServerStatus("two.example:5000", 1, 0)],
    )
    found = parse(metrics.as_text(status).decode())
    assert found["fsmount_source_up"] == {'app="web"': 0, 'app="plain"': 1}
    assert found["fsmount_source_failures_total"] == {'app="web"': 3, 'app="plain"': 0}
    assert found["fsmount_pulls_remaining"] == {'server="registry-1.docker.io"': 76}
    assert found["fsmount_fetches_total"] == {'server="one.example"': 12, 'server="two.example:5000"': 1}
    assert found["fsmount_fetch_retries_total"] == {'server="one.example"': 3, 'server="two.example:5000"': 0}


async def test_no_name_breaks_the_format(status: Status) -> None:
    name = 'a "b"\\c\nd\udcff'
    status = replace(status, apps=[AppStatus(name, "s", 3, None)], mountpoint=name)
    found = parse(metrics.as_text(status).decode(), mountpoint='a "b"\\c\nd?')
    assert found["fsmount_source_up"] == {'app="a "b"\\c\nd?"': 1}


# -------------------- as a file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "collected/fsmount.prom"


class _Texts:
    """Another text each time."""

    def __init__(self) -> None:
        self.made = 0

    async def __call__(self) -> bytes:
        self.made += 1
        return b"text %d\n" % self.made


async def _later(mock_clock: MockClock, path: Path, text: bytes) -> None:
    mock_clock.jump(15)
    await _until(path, text)


async def _until(path: Path, text: bytes) -> None:
    """The thread that writes is not seen by the clock."""
    while not path.exists() or path.read_bytes() != text:
        await wait_all_tasks_blocked(0.001)


async def test_the_file_is_written_at_once_and_again_and_its_reader_finds_it_whole(
    mock_clock: MockClock, path: Path
) -> None:
    path.parent.mkdir()
    old = os.umask(0o077)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(metrics.write_textfile, path, _Texts())
            await _until(path, b"text 1\n")
            assert path.stat().st_mode & 0o777 == 0o644
            # Whoever has opened it reads on what was there.
            with path.open("rb") as reader:
                await _later(mock_clock, path, b"text 2\n")
                assert reader.read() == b"text 1\n"
            assert os.listdir(path.parent) == [path.name]
            nursery.cancel_scope.cancel()
    finally:
        os.umask(old)
    assert os.listdir(path.parent) == []


async def test_a_file_that_cannot_be_written_is_told_once_and_tried_again(
    mock_clock: MockClock, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = _Texts()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(metrics.write_textfile, path, texts)
        for number in range(1, 4):
            while texts.made < number:
                await wait_all_tasks_blocked(0.001)
            await wait_all_tasks_blocked(0.01)
            mock_clock.jump(15)
        path.parent.mkdir()
        while not path.exists():
            mock_clock.jump(15)
            await wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
    (record,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert f"{path}: No such file or directory" in record.getMessage()


async def test_the_file_of_the_process_that_follows_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(metrics.write_textfile, path, _Texts())
        await _until(path, b"text 1\n")
        other = path.with_name("other")
        other.write_bytes(b"theirs")
        other.replace(path)
        nursery.cancel_scope.cancel()
    assert path.read_bytes() == b"theirs"


async def test_no_link_in_the_folder_is_followed_and_no_name_in_it_can_be_foreseen(
    mock_clock: MockClock, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    victim = path.parent.with_name("victim")
    victim.write_bytes(b"precious")
    victim.chmod(0o600)
    created: list[str] = []
    open_file = os.open

    def plant(name: str | os.PathLike[str], flags: int, *rest: Any, **more: Any) -> int:
        """The folder's owner has seen each name of before, and makes it a link."""
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            created.append(os.fspath(name))
        return open_file(name, flags, *rest, **more)

    monkeypatch.setattr(os, "open", plant)
    path.symlink_to(victim)
    # What it would be called by the process alone.
    path.with_name(f".{path.name}.{os.getpid()}").symlink_to(victim)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(metrics.write_textfile, path, _Texts())
        await _until(path, b"text 1\n")
        path.with_name(created[-1]).symlink_to(victim)
        await _later(mock_clock, path, b"text 2\n")
        assert not path.is_symlink()
        nursery.cancel_scope.cancel()
    assert len(set(created)) == 2
    assert victim.read_bytes() == b"precious" and victim.stat().st_mode & 0o777 == 0o600


async def test_a_link_in_place_of_the_file_is_not_taken_for_it_at_the_end(path: Path) -> None:
    path.parent.mkdir()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(metrics.write_textfile, path, _Texts())
        await _until(path, b"text 1\n")
        moved = path.with_name("moved")
        path.rename(moved)
        path.symlink_to(moved)
        nursery.cancel_scope.cancel()
    assert path.is_symlink() and moved.read_bytes() == b"text 1\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system")
async def test_a_full_disk_keeps_what_was_there_and_nothing_beside_it(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    await trio.run_process(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(path.parent)])
    try:
        path.write_bytes(b"old")

        async def make() -> bytes:
            return bytes(100_000)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(metrics.write_textfile, path, make)
            while not caplog.records:
                await wait_all_tasks_blocked(0.001)
            nursery.cancel_scope.cancel()
        assert "No space left on device" in caplog.text
        assert os.listdir(path.parent) == [path.name]
        assert path.read_bytes() == b"old"
    finally:
        await trio.run_process(["umount", str(path.parent)])
