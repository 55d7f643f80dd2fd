"""What a layer that is read in parts promises its readers: what was asked for, little else, and no wrong byte."""

import gzip
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
import trio

from fsmount.archive.span import Kind, Trust
from fsmount.archive.ztoc_builder import ZtocBuilder
from fsmount.errors import Corrupt, Unreachable
from fsmount.layer import Layer, Layers
from fsmount.lazy import LayerSpec
from fsmount.oci import soci
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import OCI_MANIFEST, Descriptor
from fsmount.policy import Indexes
from tests.fakes.estargz import Blob, Member, estargz
from tests.fakes.source import CHUNK, Body, FakeSource, Gate, open_layers, small_chunks
from tests.fakes.tar import archive
from tests.fakes.zstdchunked import stargz_flavour, zstd_chunked

_TAR = "application/vnd.oci.image.layer.v1.tar"
_IMAGE = Digest.of(b"the image's manifest")


def _text(seed: int, size: int) -> bytes:
    """What can be compressed, but not to nothing: so that every kind has many spans."""
    words = [b"%x " % Random(seed + n).getrandbits(24) for n in range(200)]
    return b"".join(Random(seed).choices(words, k=size // 4))[:size]


#: Enough that no kind of index is larger than what it spares; the empty file and the small ones share members.
FILES = {
    b"large": _text(1, 40 * CHUNK + 17),
    b"empty": b"",
    **{b"small/%02d" % number: _text(100 + number, 100 + number) for number in range(40)},
    b"last": _text(2, 30 * CHUNK),
}
MEMBERS = [Member(name, data) for name, data in FILES.items()]
TAR = archive(*MEMBERS)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    monkeypatch.setattr("fsmount.lazy._WORTHWHILE", 1)
    monkeypatch.setattr("fsmount.lazy._RAW_SPAN", CHUNK)
    monkeypatch.setattr("fsmount.lazy._TAIL", 3 * CHUNK)
    monkeypatch.setattr("fsmount.oci.soci.MIN_LAYER_SIZE", 1)
    monkeypatch.setattr("fsmount.indexing._JOINED", CHUNK)
    monkeypatch.setattr("fsmount.tarwalk._LEAST", 512)
    monkeypatch.setattr("fsmount.fetch._GAP", 64)


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


# -------------------- one layer in every form


def ztoc_of(blob: bytes) -> bytes:
    builder = ZtocBuilder(span_size=CHUNK)
    for start in range(0, len(blob), 1000):
        for _ in builder.feed(blob[start : start + 1000]):
            pass
    return builder.finish(tool="tests")


def _put(source: FakeSource, blob: Blob, suffix: str) -> LayerSpec:
    descriptor = replace(source.put_blob(blob.data, _TAR + suffix), annotations=blob.annotations)
    return LayerSpec(descriptor, image=_IMAGE)


def put_soci(source: FakeSource, blob: Descriptor, ztoc: bytes, *, version: int) -> LayerSpec:
    source.put_blob(ztoc)
    described = soci.describe_ztoc(ztoc, blob, span_size=CHUNK)
    subject = Descriptor(OCI_MANIFEST, _IMAGE, 1, {}) if version == 1 else None
    index = soci.encode_index([described], tool="tests", subject=subject)
    source.put_referrer(_IMAGE if version == 1 else Digest.of(b"nobody"), index, soci.INDEX_V1)
    return LayerSpec(blob, image=_IMAGE, soci_index=Digest.of(index) if version == 2 else None)


def packed(tar: bytes = TAR) -> bytes:
    """In small blocks, between which inflating can begin: there is one about every 4 KiB."""
    packer = zlib.compressobj(6, wbits=31, memLevel=1)
    return packer.compress(tar) + packer.flush()


def put_gzip(source: FakeSource) -> Descriptor:
    return source.put_blob(packed(), _TAR + "+gzip")


def _soci(version: int) -> Callable[[FakeSource], LayerSpec]:
    def put(source: FakeSource) -> LayerSpec:
        blob = put_gzip(source)
        return put_soci(source, blob, ztoc_of(packed()), version=version)

    return put


@dataclass(frozen=True)
class Form:
    """How a layer is put into a source, and as what it is read from there."""

    put: Callable[[FakeSource], LayerSpec]
    kind: Kind
    trust: Trust


FORMS = {
    "ranged tar": Form(lambda s: LayerSpec(s.put_blob(TAR, _TAR)), Kind.RANGED_TAR, Trust.HINT),
    "SOCI v1": Form(_soci(1), Kind.SOCI_V1, Trust.HINT),
    "SOCI v2": Form(_soci(2), Kind.SOCI_V2, Trust.BOUND),
    "eStargz": Form(
        lambda s: _put(s, estargz(MEMBERS, chunk_size=CHUNK, min_chunk=1000), "+gzip"),
        Kind.ESTARGZ,
        Trust.BOUND,
    ),
    "zstd:chunked": Form(
        lambda s: _put(s, zstd_chunked(MEMBERS, chunk_size=CHUNK), "+zstd"), Kind.ZSTD_CHUNKED, Trust.BOUND
    ),
    "zstd:chunked of stargz": Form(
        lambda s: _put(s, stargz_flavour(MEMBERS, chunk_size=CHUNK), "+zstd"), Kind.ZSTD_CHUNKED, Trust.BOUND
    ),
}
HINTS = {name: form for name, form in FORMS.items() if form.trust is Trust.HINT}
BOUND = {name: form for name, form in FORMS.items() if form.trust is Trust.BOUND}


def each(forms: dict[str, Form]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("form", forms.values(), ids=forms)


async def find(layer: Layer, path: bytes) -> int:
    """The number of a member."""
    index = await layer.wait_complete()
    number = 0
    for name in path.split(b"/"):
        found = index.name(number, name)
        assert found is not None and found.member is not None
        number = found.member.number
    return number


async def content(layer: Layer, path: bytes) -> bytes:
    return await layer.read(await find(layer, path), 0, 10**9)


def asked(source: FakeSource) -> int:
    """How many bytes of blobs were asked for."""
    return sum(stop - start for start, stop in source.ranges)


def left(cache: Path, folder: str) -> list[str]:
    return sorted(path.name for path in (cache / folder).iterdir())


# -------------------- reading


@each(FORMS)
async def test_the_tree_is_there_without_the_layer_and_a_file_costs_its_own_bytes(
    tmp_path: Path, source: FakeSource, form: Form
) -> None:
    spec = form.put(source)
    size = spec.descriptor.size
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        index = await layer.wait_complete()
        assert (index.kind, index.trust) == (form.kind, form.trust)
        assert index.members == 1 + len(FILES) + 1  # the root, and the folder
        before = len(source.ranges)
        if (
            form.kind is not Kind.SOCI_V1 and form.kind is not Kind.SOCI_V2
        ):  # whose windows outweigh such a layer
            assert asked(source) < size / 2
        source.ranges.clear()
        assert await content(layer, b"small/07") == FILES[b"small/07"]
        assert len(source.ranges) == 1 and asked(source) < size / 4
        await content(layer, b"small/07")
        assert len(source.ranges) == 1, "it is in the cache"
        assert before
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        assert await content(layer, b"small/07") == FILES[b"small/07"]
        assert len(source.ranges) == 1, "so it is for the next process, with the index"


@each(FORMS)
async def test_every_read_is_a_slice_of_the_file(tmp_path: Path, source: FakeSource, form: Form) -> None:
    spec = form.put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        for path, data in FILES.items():
            member = await find(layer, path)
            for offset in {0, 1, len(data) // 2, Random(len(data)).randrange(len(data) + 1), len(data)}:
                for length in (1, 700, 3 * CHUNK, 10**9):
                    assert await layer.read(member, offset, length) == data[offset : offset + length]


@each(FORMS)
async def test_a_thousand_readers_make_no_more_requests_than_there_are_chunks(
    tmp_path: Path, source: FakeSource, form: Form
) -> None:
    spec = form.put(source)

    async def read(layer: Layer, seed: int) -> None:
        path = Random(seed).choice(sorted(FILES))
        data = FILES[path]
        offset = Random(seed).randrange(len(data) + 1)
        assert await layer.read(await find(layer, path), offset, 500) == data[offset : offset + 500]

    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        index = await layer.wait_complete()
        source.ranges.clear()
        async with trio.open_nursery() as nursery:
            for seed in range(1000):
                nursery.start_soon(read, layer, seed)
        assert len(source.ranges) <= len(index.chunks)
        assert asked(source) <= 1.5 * spec.descriptor.size


async def test_a_reader_that_goes_on_finds_more_and_more_fetched_ahead(
    tmp_path: Path, source: FakeSource
) -> None:
    spec = FORMS["ranged tar"].put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        member = await find(layer, b"large")
        source.ranges.clear()
        for offset in range(0, 20 * CHUNK, 512):
            await layer.read(member, offset, 512)
            while layer.busy:  # noqa: ASYNC110 -- what is on its way may be in a thread
                await trio.sleep(0.001)
        lengths = [(stop - start) // CHUNK for start, stop in source.ranges]
        assert lengths[0] == 1, "one chunk was read, and nothing more is known of the reader"
        assert max(lengths) >= 4 and sum(lengths) <= 42, "not beyond the file"
        assert len(lengths) < 14
        source.ranges.clear()
        await layer.read(await find(layer, b"last"), 0, 1)
        assert [stop - start for start, stop in source.ranges] == [CHUNK], "another place is another reader"


@each(FORMS)
async def test_when_more_than_half_was_asked_for_the_rest_comes_by_itself(
    tmp_path: Path, source: FakeSource, form: Form
) -> None:
    spec = form.put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        await layer.wait_complete()
        index = await layer.wait_complete()
        for chunk in index.chunks[: len(index.chunks) // 2 : 2]:
            await layer.read_stream(chunk.start, 1)
        with trio.move_on_after(0.1):
            await trio.sleep_forever()
        assert not all(layer.stored_chunks())
        for chunk in [*index.chunks[::2], index.chunks[1]]:
            await layer.read_stream(chunk.start, 1)
        with trio.fail_after(5):
            while not all(layer.stored_chunks()):  # noqa: ASYNC110 - the disk tells nobody
                await trio.sleep(0.01)


async def test_what_somebody_waits_for_goes_before_what_nobody_waits_for(
    tmp_path: Path, source: FakeSource
) -> None:
    spec = FORMS["ranged tar"].put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        member = await find(layer, b"last")
        source.ranges.clear()
        gate = Gate()
        source.then(spec.descriptor, Body(gate=gate))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(layer.read, member, 0, 1)
            await gate.held.wait()
            nursery.start_soon(layer.fill)
            with trio.move_on_after(0.2):
                await trio.sleep_forever()
            assert len(source.ranges) == 1
            gate.open()
        assert asked(source) >= spec.descriptor.size


# -------------------- after a stream


async def test_what_was_evicted_of_a_streamed_layer_comes_back_in_parts(
    tmp_path: Path, source: FakeSource
) -> None:
    for blob, spec in ((put_gzip(source), None), (source.put_blob(TAR, _TAR), Indexes.OFF)):
        async with open_layers(tmp_path) as layers:
            layer = layers.get(LayerSpec(blob, indexes=spec or Indexes.ANY), source)
            index = await layer.wait_complete()
            assert index.trust is Trust.CERTIFIED and len(index.chunks) > 10
            await layers.chunks.drop([layer.chunk_key(number) for number in range(len(index.chunks))])
            source.ranges.clear()
            assert await content(layer, b"small/07") == FILES[b"small/07"]
            assert asked(source) < blob.size / 4
            for path, data in FILES.items():
                assert await content(layer, path) == data
            assert (0, blob.size) not in source.ranges


# -------------------- servers without ranges


@each(BOUND)
async def test_a_server_that_forgets_about_ranges_is_read_to_its_end_once_for_all(
    tmp_path: Path, source: FakeSource, form: Form, caplog: pytest.LogCaptureFixture
) -> None:
    spec = form.put(source)

    async def read(layer: Layer, path: bytes) -> None:
        assert await content(layer, path) == FILES[path]

    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        await layer.wait_complete()
        source.knows_ranges = False
        source.ranges.clear()
        async with trio.open_nursery() as nursery:
            for path in FILES:
                nursery.start_soon(read, layer, path)
        fetched = layer.received
        assert all(layer.stored_chunks())
        assert fetched <= 2 * spec.descriptor.size
    assert "cannot be read lazily" in caplog.text


@each(FORMS)
async def test_a_server_without_ranges_has_its_layers_streamed_and_it_is_said(
    tmp_path: Path, source: FakeSource, form: Form, caplog: pytest.LogCaptureFixture
) -> None:
    source.knows_ranges = False
    spec = form.put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        index = await layer.wait_complete()
        # That of SOCI is no part of the blob.
        is_soci = form.kind in (Kind.SOCI_V1, Kind.SOCI_V2)
        assert (index.kind, index.trust) == (
            (form.kind, form.trust) if is_soci else (Kind.STREAMED, Trust.CERTIFIED)
        )
        for path, data in FILES.items():
            assert await content(layer, path) == data
        assert index.members == 2 + len(FILES), "no table of contents among the files"
    assert "cannot be read lazily" in caplog.text


# -------------------- what is trusted


@each(HINTS)
async def test_a_layer_that_was_read_on_a_hint_is_certified_when_all_of_it_has_gone_by(
    tmp_path: Path, source: FakeSource, form: Form
) -> None:
    spec = form.put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        number = layer.number
        member = await find(layer, b"large")
        assert await layer.read(member, 0, 10 * CHUNK) == FILES[b"large"][: 10 * CHUNK]
        source.ranges.clear()
        await layer.fill()
        index = layer.index
        assert index is not None and index.trust is Trust.CERTIFIED and index.kind is form.kind
        assert index.diff_id == str(Digest.of(TAR))
        assert layer.number == number and await find(layer, b"large") == member
        if form.kind is Kind.RANGED_TAR:
            assert asked(source) < spec.descriptor.size, "what was here was not fetched again"
        for path, data in FILES.items():
            assert await content(layer, path) == data
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        assert layer.index is not None and layer.index.trust is Trust.CERTIFIED


@each(HINTS)
@pytest.mark.parametrize("policy", [Indexes.BOUND, Indexes.OFF])
async def test_who_wants_no_hints_has_the_layer_streamed_or_certified_first(
    tmp_path: Path, source: FakeSource, form: Form, policy: Indexes
) -> None:
    spec = form.put(source)
    async with open_layers(tmp_path / "new") as layers:
        layer = layers.get(replace(spec, indexes=policy), source)
        assert (await layer.wait_complete()).trust is Trust.CERTIFIED
    async with open_layers(tmp_path / "hinted") as layers:
        layer = layers.get(spec, source)
        assert (await layer.wait_complete()).trust is Trust.HINT
        await layers.get(replace(spec, indexes=policy), source).demand_trust()
        assert layer.index is not None and layer.index.trust is Trust.CERTIFIED


@each(BOUND)
async def test_what_is_bound_to_the_manifest_is_read_where_no_hints_are_wanted_and_not_where_no_indexes_are(
    tmp_path: Path, source: FakeSource, form: Form
) -> None:
    spec = form.put(source)
    async with open_layers(tmp_path / "bound") as layers:
        index = await layers.get(replace(spec, indexes=Indexes.BOUND), source).wait_complete()
        assert index.kind is form.kind
    async with open_layers(tmp_path / "off") as layers:
        index = await layers.get(replace(spec, indexes=Indexes.OFF), source).wait_complete()
        assert index.kind is Kind.STREAMED


OTHER = {name: data[::-1] for name, data in FILES.items()}
OTHER_NAMES = {name.replace(b"small", b"smell"): data for name, data in FILES.items()}


def _lying_index(files: dict[bytes, bytes]) -> Callable[[FakeSource], LayerSpec]:
    """A SOCI index of the layer with the members, and offsets, of another one."""

    def put(source: FakeSource) -> LayerSpec:
        truth = ZtocBuilder(span_size=CHUNK)
        list(truth.feed(packed()))
        other = ZtocBuilder(span_size=CHUNK)
        list(other.feed(packed(archive(*(Member(n, d) for n, d in files.items())))))
        truth.entries[:] = other.entries
        return put_soci(source, put_gzip(source), truth.finish(tool="a liar"), version=1)

    return put


async def assert_void(layers: Layers, layer: Layer, number: int) -> None:
    """Whoever holds the old number hears it; everything is forgotten; and then the layer is read as it is."""
    with pytest.raises(Corrupt, match="not to be trusted"):
        layers.numbered(number)
    assert layer.number != number
    for path, data in FILES.items():
        assert await content(layer, path) == data
    assert layer.index is not None and layer.index.trust is Trust.CERTIFIED


async def test_an_index_that_tells_other_names_is_void_when_the_layer_has_gone_by(
    tmp_path: Path, source: FakeSource, caplog: pytest.LogCaptureFixture
) -> None:
    spec = _lying_index(OTHER_NAMES)(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        number = layer.number
        (tmp_path / "trees" / "made-with-it.sqlite").touch()
        assert await content(layer, b"smell/07") == FILES[b"small/07"], "nobody knows better yet"
        await layer.wait_trusted()
        assert left(tmp_path, "trees") == []
        await assert_void(layers, layer, number)
    assert f"it came from {source.name}" in caplog.text


@each(HINTS)
async def test_a_chunk_that_was_other_bytes_is_void_when_the_layer_has_gone_by(
    tmp_path: Path, source: FakeSource, form: Form
) -> None:
    if form.kind is Kind.SOCI_V1:
        pytest.skip("whose spans have digests")
    spec = form.put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        number = layer.number
        member = await find(layer, b"large")
        source.then(spec.descriptor, Body(data=bytes(spec.descriptor.size)))
        assert await layer.read(member, 0, 700) == bytes(700), "nobody knows better yet"
        with pytest.raises(Corrupt):
            await layer.fill()
        assert layer.number != number
        with pytest.raises(Corrupt):
            layers.numbered(number)
        assert left(tmp_path, "layers") == []


@each({"SOCI v1": FORMS["SOCI v1"]})
async def test_a_span_that_is_not_what_a_hint_says_has_the_layer_streamed(
    tmp_path: Path, source: FakeSource, form: Form, caplog: pytest.LogCaptureFixture
) -> None:
    spec = form.put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        await layer.wait_complete()
        source.then(spec.descriptor, Body(data=bytes(spec.descriptor.size)))
        for path, data in FILES.items():
            assert await content(layer, path) == data
        assert (await layer.wait_trusted()).trust is Trust.CERTIFIED
    assert "all of it is fetched" in caplog.text


@each(BOUND)
async def test_a_span_that_is_not_what_its_digest_names_is_corrupt_and_fetched_again_later(
    tmp_path: Path, source: FakeSource, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsmount.fetch._REFUSED_SECONDS", 0.05)
    spec = form.put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        member = await find(layer, b"last")
        source.then(spec.descriptor, Body(data=bytes(spec.descriptor.size)))
        for _ in range(2):
            with pytest.raises(Corrupt):
                await layer.read(member, 0, 100)
        await trio.sleep(0.1)
        assert await layer.read(member, 0, 100) == FILES[b"last"][:100]
        source.mirrors = 1
        source.then(spec.descriptor, Body(data=bytes(spec.descriptor.size)))
        assert await layer.read(await find(layer, b"large"), 0, 100) == FILES[b"large"][:100], "from a mirror"


# -------------------- when things go wrong


@each(FORMS)
async def test_what_breaks_off_is_told_and_asked_for_again(
    tmp_path: Path, source: FakeSource, form: Form
) -> None:
    spec = form.put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        member = await find(layer, b"last")
        source.then(spec.descriptor, Body(stop=0, error=Unreachable("the registry went away")))
        with pytest.raises(Unreachable):
            await layer.read(member, 0, 100)
        assert await layer.read(member, 0, 100) == FILES[b"last"][:100]


@each(FORMS)
async def test_a_reader_that_leaves_takes_nothing_from_the_others(
    tmp_path: Path, source: FakeSource, form: Form
) -> None:
    spec = form.put(source)

    async def read(layer: Layer, member: int) -> None:
        assert await layer.read(member, 0, 100) == FILES[b"last"][:100]

    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        member = await find(layer, b"last")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, layer, member)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as leaving:
                    leaving.start_soon(layer.read, member, 0, 100)
                    await trio.lowlevel.checkpoint()
                    scope.cancel()


@each(FORMS)
async def test_a_full_disk_takes_nothing_from_readers(
    tmp_path: Path, source: FakeSource, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsmount.cache.hot.HOT_CHUNKS", 2)
    monkeypatch.setattr("fsmount.cache.chunks.ChunkStore.put", lambda *args: False)
    spec = form.put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        for path, data in FILES.items():
            assert await content(layer, path) == data


BROKEN: dict[str, Callable[[FakeSource], LayerSpec]] = {
    "an eStargz annotation for another table": lambda s: _put(
        s, replace(estargz(MEMBERS), annotations=estargz(MEMBERS[:3]).annotations), "+gzip"
    ),
    "an eStargz layer without a footer": lambda s: _put(
        s, Blob(gzip.compress(TAR), estargz(MEMBERS).annotations, b"", 0, 0), "+gzip"
    ),
    "a zstd:chunked annotation for another table": lambda s: _put(
        s, replace(zstd_chunked(MEMBERS), annotations=zstd_chunked(MEMBERS[:3]).annotations), "+zstd"
    ),
    "a ztoc of another layer": lambda s: put_soci(
        s, put_gzip(s), ztoc_of(gzip.compress(archive(*MEMBERS[:3]))), version=1
    ),
    "a ztoc that is none": lambda s: put_soci(s, put_gzip(s), b"\xff" * 1000, version=2),
    "a SOCI index that is not there": lambda s: LayerSpec(
        put_gzip(s), image=_IMAGE, soci_index=Digest.of(b"nowhere")
    ),
}


@pytest.mark.parametrize("put", BROKEN.values(), ids=BROKEN)
async def test_an_index_that_is_no_good_is_told_and_the_layer_streamed(
    tmp_path: Path,
    source: FakeSource,
    put: Callable[[FakeSource], LayerSpec],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    spec = put(source)
    async with open_layers(tmp_path) as layers:
        layer = layers.get(spec, source)
        for path, data in FILES.items():
            assert await content(layer, path) == data
        assert layer.index is not None and layer.index.kind is Kind.STREAMED
    assert f"layer {spec.descriptor.digest} is not read as" in caplog.text


def test_the_forms_cover_every_kind() -> None:
    assert {form.kind for form in FORMS.values()} == set(Kind) - {Kind.STREAMED, Kind.RANGED_FILE}


async def test_one_file_is_read_in_parts_and_certified(tmp_path: Path, source: FakeSource) -> None:
    blob = source.put_blob(FILES[b"large"])
    async with open_layers(tmp_path) as layers:
        layer = layers.get(LayerSpec(blob, title=b"app.bin"), source)
        member = await find(layer, b"app.bin")
        assert await layer.read(member, 5 * CHUNK, 100) == FILES[b"large"][5 * CHUNK :][:100]
        assert asked(source) < 3 * CHUNK
        await layer.fill()
        assert layer.index is not None
        assert (layer.index.kind, layer.index.trust) == (Kind.RANGED_FILE, Trust.CERTIFIED)
        assert (await content(layer, b"app.bin")) == FILES[b"large"]


@pytest.fixture(autouse=True)
def _no_unforeseen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert "nobody foresaw" not in caplog.text
