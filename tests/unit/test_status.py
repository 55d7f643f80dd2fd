"""What a mount says of itself: that it is true, and how it is written down."""

import errno
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from time import perf_counter

import pytest
import trio

from fsmount import metrics
from fsmount.archive.estargz import TOC_DIGEST
from fsmount.cache.chunks import open_chunk_store
from fsmount.configfile import load_config
from fsmount.engine import Engine, open_engine
from fsmount.errors import AccessDenied, FsmountError, NotFound, Unreachable
from fsmount.fetch import RANGES_IGNORED
from fsmount.fuse.protocol import Opcode
from fsmount.fuse.tally import Tally
from fsmount.layer import Layer
from fsmount.lazy import LayerSpec
from fsmount.policy import Indexes
from fsmount.status import Observer, Process, State, Status, as_json
from fsmount.status.report import AppStatus, LayerStatus, ProcessStatus
from tests.fakes.source import Body, FakeSource, Gate
from tests.unit.test_lazy import (
    FORMS,
    TAR,
    Form,
    _small,  # noqa: F401 - small layers, small chunks
    asked,
    content,
    each,
    packed,
    put_gzip,
)

_TAR_TYPE = "application/vnd.oci.image.layer.v1.tar"


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@asynccontextmanager
async def engine_of(work: Path, *apps: str, **other: str) -> AsyncIterator[Engine]:
    named = dict.fromkeys(apps, "oci-layout:/nowhere") | other
    config = load_config(Path("/dev/null"), cache=work / "cache", apps=named, environ={})
    async with open_engine(config) as engine:
        yield engine


async def look(engine: Engine) -> Status:
    return await Observer(engine, Path("/mnt")).look()


async def look_at(engine: Engine, layer: Layer) -> LayerStatus:
    """What is said of one layer."""
    digest = str(layer.spec.descriptor.digest)
    (found,) = [one for one in (await look(engine)).layers if one.digest == digest]
    return found


async def settled(engine: Engine, layer: Layer) -> LayerStatus:
    """As `look_at`, when what comes beside what was asked for has come."""
    with trio.fail_after(10):
        while (found := await look_at(engine, layer)).is_fetching:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.01)
    return found


# -------------------- layers


@each(FORMS)
async def test_of_a_layer_that_is_read_in_parts_it_is_told_what_came_and_what_was_spared(
    tmp_path: Path,
    source: FakeSource,
    form: Form,
) -> None:
    spec = form.put(source)
    size = spec.descriptor.size
    async with engine_of(tmp_path) as engine:
        layer = engine.layers.get(spec, source)
        before = await look_at(engine, layer)
        assert (before.size, before.fetched, before.is_fetching) == (size, 0, False)
        assert (before.read_as, before.trust, before.spared, before.chunks) == (None, None, None, None)
        index = await layer.wait_complete()
        source.ranges.clear()
        await content(layer, b"small/07")
        here = await settled(engine, layer)
        assert (here.read_as, here.trust) == (str(form.kind), str(form.trust))
        assert (here.reason, here.whole_because, here.ranges_ignored) == (None, None, False)
        assert here.fetched == asked(source)
        # What lies between two wanted places comes too, and is not kept.
        assert here.spared is not None and size - asked(source) <= here.spared < size
        assert here.chunks == len(index.chunks) > 10
        assert here.cached_chunks in (1, 2)


async def test_what_was_fetched_is_counted_once_and_never_forgotten(
    tmp_path: Path, source: FakeSource
) -> None:
    blob = put_gzip(source)
    raw = source.put_blob(TAR, _TAR_TYPE)
    async with engine_of(tmp_path) as engine:
        streamed, hinted = (engine.layers.get(LayerSpec(one), source) for one in (blob, raw))
        await streamed.wait_complete()
        assert streamed.received == blob.size
        await engine.layers.chunks.drop([streamed.chunk_key(0)])
        await streamed.read_stream(0, 1)
        assert streamed.received > blob.size
        streamed.close_index()
        assert streamed.received > blob.size, "nothing is forgotten with the index"
        await hinted.wait_complete()
        await hinted.read_stream(0, 1)
        # It is certified by what is here: that comes out of the cache, and costs nothing again.
        await hinted.fill()
        assert (await look_at(engine, hinted)).trust == "certified"
        assert hinted.received == raw.size


async def test_a_closed_index_is_looked_into_and_stays_closed(tmp_path: Path, source: FakeSource) -> None:
    async with engine_of(tmp_path) as engine:
        layer = engine.layers.get(LayerSpec(put_gzip(source)), source)
        await layer.wait_complete()
        layer.close_index()
        found = await look_at(engine, layer)
        assert (found.read_as, found.trust, found.reason) == ("streamed", "certified", "it has no index")
        assert found.chunks == found.cached_chunks and found.chunks
        assert layer.open_index is None
    async with engine_of(tmp_path) as engine:
        layer = engine.layers.get(LayerSpec(put_gzip(source)), source)
        assert (await look_at(engine, layer)) == replace(found, fetched=0), "and so in the next process"


async def test_while_something_comes_it_is_told(tmp_path: Path, source: FakeSource) -> None:
    blob = put_gzip(source)
    gate = Gate()
    source.then(blob, Body(gate=gate))
    gate.let(1000)
    async with engine_of(tmp_path) as engine, trio.open_nursery() as nursery:
        layer = engine.layers.get(LayerSpec(blob), source)
        nursery.start_soon(layer.wait_complete)
        await gate.held.wait()
        found = await look_at(engine, layer)
        assert (found.is_fetching, found.read_as) == (True, None)
        assert 0 < found.fetched <= 1000
        gate.open()
        await layer.wait_complete()
        assert not (await look_at(engine, layer)).is_fetching


async def test_all_who_ask_at_once_share_one_look(
    tmp_path: Path,
    source: FakeSource,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[Layer] = []
    stored_chunks = Layer.stored_chunks

    def counted(self: Layer, *arguments: object) -> list[bool]:
        looked.append(self)
        return stored_chunks(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Layer, "stored_chunks", counted)
    async with engine_of(tmp_path) as engine:
        await engine.layers.get(LayerSpec(put_gzip(source)), source).wait_complete()
        observer = Observer(engine, Path("/mnt"))
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(observer.report, as_json)
        assert len(looked) == 1


# -------------------- layers that should be lazy and are not


@each({name: form for name, form in FORMS.items() if not name.startswith("SOCI")})
async def test_a_server_without_ranges_is_a_reason(tmp_path: Path, source: FakeSource, form: Form) -> None:
    source.knows_ranges = False
    await _is_fetched_whole(tmp_path, source, form.put(source), RANGES_IGNORED)


@each({name: form for name, form in FORMS.items() if name.startswith("SOCI")})
async def test_so_it_is_when_that_is_noticed_only_while_reading(
    tmp_path: Path,
    source: FakeSource,
    form: Form,
) -> None:
    spec = form.put(source)
    source.knows_ranges = False
    found = await _is_fetched_whole(tmp_path, source, spec, RANGES_IGNORED)
    assert found.ranges_ignored


async def test_an_index_that_is_no_good_is_a_reason(tmp_path: Path, source: FakeSource) -> None:
    spec = FORMS["eStargz"].put(source)
    annotations = {**spec.descriptor.annotations, TOC_DIGEST: f"sha256:{'0' * 64}"}
    spec = replace(spec, descriptor=replace(spec.descriptor, annotations=annotations))
    found = await _is_fetched_whole(tmp_path, source, spec, "its eStargz index is no good")
    assert found.reason == found.whole_because


async def test_a_part_that_a_hint_tells_wrong_is_a_reason(tmp_path: Path, source: FakeSource) -> None:
    spec = FORMS["SOCI v1"].put(source)
    source.then(spec.descriptor, Body(data=bytes(len(packed()))))
    await _is_fetched_whole(tmp_path, source, spec, "a part of it was not what its index says")


@pytest.mark.parametrize(
    "put",
    [
        lambda source: LayerSpec(put_gzip(source)),
        lambda source: LayerSpec(source.put_blob(TAR, _TAR_TYPE), indexes=Indexes.OFF),
        lambda source: LayerSpec(source.put_blob(TAR, _TAR_TYPE)),
    ],
    ids=["no index", "indexes off", "small"],
)
async def test_what_nobody_expects_to_be_lazy_is_no_alarm(
    tmp_path: Path,
    source: FakeSource,
    put: Callable[[FakeSource], LayerSpec],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "small" in request.node.name:
        monkeypatch.setattr("fsmount.lazy._WORTHWHILE", 10**9)
    async with engine_of(tmp_path) as engine:
        layer = engine.layers.get(put(source), source)
        await layer.wait_complete()
        found = await look_at(engine, layer)
        assert layer.received == found.size
        assert found.whole_because is None
        text = metrics.as_text(await look(engine)).decode()
        assert "not_lazy_total{" not in text


async def _is_fetched_whole(
    work: Path,
    source: FakeSource,
    spec: LayerSpec,
    reason: str,
) -> LayerStatus:
    async with engine_of(work) as engine:
        layer = engine.layers.get(spec, source)
        await content(layer, b"small/07")
        found = await settled(engine, layer)
        assert found.whole_because == reason
        assert found.fetched >= spec.descriptor.size
        # As a counter, it stays.
        layer.close_index()
        text = metrics.as_text(await look(engine)).decode()
        assert re.search(rf'^fsmount_layers_not_lazy_total{{.*reason="{reason}"}} 1$', text, re.MULTILINE)
    return found


# -------------------- apps


async def test_apps_are_told_with_their_sources_and_what_was_wrong(tmp_path: Path) -> None:
    async with engine_of(tmp_path, "plain", **{"team/web": "127.0.0.1:1/team/web"}) as engine:
        web = engine.catalog.apps["team/web"]
        plain, asked_for = (await look(engine)).apps
        assert plain == AppStatus("plain", "oci-layout:/nowhere", 0, None)
        assert asked_for == AppStatus("team/web", "127.0.0.1:1/team/web", 0, None)
        with pytest.raises(Exception, match="cannot be reached"):
            await engine.catalog.tags(web)
        _, asked_for = (await look(engine)).apps
        trouble = asked_for.trouble
        assert trouble is not None and not trouble.is_over
        assert "127.0.0.1:1" in trouble.message
        assert abs((datetime.now(UTC) - datetime.fromisoformat(trouble.at)).total_seconds()) < 60
        assert (trouble.since, trouble.is_refusal) == (trouble.at, False)


async def test_servers_are_told_with_what_they_were_asked(tmp_path: Path) -> None:
    async with engine_of(tmp_path, web="127.0.0.1:1/team/web") as engine:
        assert (await look(engine)).servers == []
        with pytest.raises(FsmountError):
            await engine.catalog.tags(engine.catalog.apps["web"])
        (server,) = (await look(engine)).servers
        assert server.server == "127.0.0.1:1"
        assert server.requests == server.retries + 1 > 1


# -------------------- how it is


async def test_a_mount_is_starting_until_it_is_ready_and_then_serving(tmp_path: Path) -> None:
    async with engine_of(tmp_path, "web") as engine:
        observer = Observer(engine, Path("/mnt"))
        observer.is_ready = False
        assert observer.state() == (State.STARTING, "starting")
        observer.is_ready = True
        assert observer.state() == (State.SERVING, "serving 1 app")
        found = await observer.look()
        assert (found.state, found.summary) == observer.state()


async def test_while_the_source_of_an_app_is_away_the_mount_is_degraded_since_that_began(
    tmp_path: Path,
) -> None:
    async with engine_of(tmp_path, "plain", web="127.0.0.1:1/team/web") as engine:
        observer = Observer(engine, Path("/mnt"))
        assert observer.state()[0] is State.SERVING
        web = engine.catalog.apps["web"]
        standing = engine.sources.standing(web.source)
        assert standing is not None
        for message in ("nobody answers", "still nobody answers"):
            with pytest.raises(Unreachable), standing.asking():
                raise Unreachable(message)
        assert standing.trouble is not None
        state, summary = observer.state()
        assert state is State.DEGRADED
        since = f"{standing.trouble.since:%Y-%m-%d %H:%M:%S} UTC"
        assert summary == f"degraded, registry unreachable since {since}: still nobody answers (1 of 2 apps)"
        with pytest.raises(NotFound), standing.asking():
            raise NotFound("that is an answer")
        assert observer.state() == (State.SERVING, "serving 2 apps")
        with pytest.raises(AccessDenied), standing.asking():
            raise AccessDenied("who are you?")
        assert "registry refuses access since" in observer.state()[1]


async def test_a_cache_that_takes_nothing_is_told_beside_what_else_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine_of(tmp_path, web="127.0.0.1:1/team/web") as engine:
        observer = Observer(engine, Path("/mnt"))
        monkeypatch.setattr(type(engine.layers.chunks), "trouble", "no space left")
        assert observer.state() == (State.DEGRADED, "degraded, serving without caching: no space left")
        with pytest.raises(FsmountError):
            await engine.catalog.tags(engine.catalog.apps["web"])
        state, summary = observer.state()
        assert state is State.DEGRADED
        assert "registry unreachable since" in summary
        assert summary.endswith("; serving without caching: no space left")
        found = await observer.look()
        assert found.cache is not None and found.cache.trouble == "no space left"
        assert b"\nfsmount_cache_up{" in metrics.as_text(found)


async def test_chunks_are_counted_that_were_there_were_not_and_had_to_go(
    tmp_path: Path, source: FakeSource
) -> None:
    async with engine_of(tmp_path) as engine:
        layer = engine.layers.get(FORMS["eStargz"].put(source), source)
        await content(layer, b"small/07")
        cache = (await look(engine)).cache
        assert cache is not None and cache.misses > 0
    async with engine_of(tmp_path) as engine:
        layer = engine.layers.get(FORMS["eStargz"].put(source), source)
        await content(layer, b"small/07")
        cache = (await look(engine)).cache
        assert cache is not None and (cache.misses, cache.evictions) == (0, 0) and cache.hits > 0


def test_a_chunk_that_had_to_go_is_counted(tmp_path: Path) -> None:
    with open_chunk_store(tmp_path / "chunks", size=4 * 1024 * 1024) as store:
        keys = [f"layer:{number}" for number in range(8)]
        for key in keys:
            data = key.encode().ljust(1024 * 1024)
            assert store.put(key, data, sha256(data).digest())
        gone = store.stored(keys).count(False)
        assert store.evicted == gone > 0


async def test_what_deaths_have_made_of_a_process_comes_before_its_sources(tmp_path: Path) -> None:
    process = Process(holder=7, starts=6, last_death="killed by SIGKILL", mode=State.CACHE_ONLY)
    async with engine_of(tmp_path, "web") as engine:
        observer = Observer(engine, Path("/mnt"), process=process)
        state, summary = observer.state()
        assert state is State.CACHE_ONLY
        assert summary == "cache-only, for several of its processes have died: killed by SIGKILL"
        found = (await observer.look()).process
        assert found == ProcessStatus(os.getpid(), 7, 6, "killed by SIGKILL")


async def test_a_process_that_refuses_everything_can_still_be_asked(tmp_path: Path) -> None:
    tally = Tally()
    tally.note_error(Opcode.READ, perf_counter(), errno.EIO)
    tally.note_failure("read: EIO: nothing is served")
    observer = Observer(None, tmp_path, process=Process(mode=State.REFUSING), tally=tally)
    found = await observer.look()
    assert (found.state, found.cache, found.apps, found.layers) == (State.REFUSING, None, [], [])
    assert found.last_error is not None and found.last_error.message == "read: EIO: nothing is served"
    assert json.loads(as_json(found))["operations"][0]["errors"] == {"EIO": 1}
    assert b"fsmount_cache" in metrics.as_text(found)


async def test_what_the_kernel_has_asked_is_told_by_kind(tmp_path: Path) -> None:
    tally = Tally()
    now = perf_counter()
    for began in (now, now - 0.5, now - 0.6):
        tally.note(Opcode.READ, began)
    async with engine_of(tmp_path) as engine:
        observer = Observer(engine, Path("/mnt"), tally=tally)
        (found,) = (await observer.look()).operations
        assert (found.name, found.count, found.classes) == ("read", 3, [1, 0, 0, 2, 0, 0])
        assert found.seconds == pytest.approx(1.1, abs=0.1)
        assert (await observer.look()).last_error is None


# -------------------- JSON


async def test_the_json_form_has_these_fields(tmp_path: Path, source: FakeSource) -> None:
    async with engine_of(tmp_path, "web") as engine:
        await engine.layers.get(LayerSpec(put_gzip(source)), source).wait_complete()
        said = json.loads(as_json(await look(engine)))
    assert said["version"] == 1
    assert list(said) == [
        *("version", "state", "summary", "pid", "fsmount", "mountpoint", "started", "process", "cache"),
        *("apps", "servers", "operations", "last_error", "rate_limits", "layers"),
    ]
    assert (said["state"], said["summary"]) == ("serving", "serving 1 app")
    assert said["process"] == {"pid": said["pid"], "holder": None, "starts": 1, "last_death": None}
    assert said["cache"] == {
        "path": str(tmp_path / "cache"),
        "limit": 20 * 10**9,
        "stored": said["cache"]["stored"],
        "hits": 0,
        "misses": said["cache"]["misses"],
        "evictions": 0,
        "trouble": None,
    }
    assert said["cache"]["stored"] > len(TAR)
    assert list(said["layers"][0]) == [field.name for field in fields(LayerStatus)]
    assert datetime.fromisoformat(said["started"]).tzinfo is not None
