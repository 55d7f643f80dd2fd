"""A mount over a real registry fetches what is touched, in every form of layer, and outlives what it has fetched."""

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from fsmount.archive.ztoc_builder import ZtocBuilder
from fsmount.oci import soci
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor
from tests import peers
from tests.fakes.estargz import Blob, Member, estargz
from tests.fakes.front import CountingProxy, Fault
from tests.fakes.tar import DIRECTORY, archive
from tests.fakes.zstdchunked import zstd_chunked
from tests.integration.program import fsmount, mounted, wait_until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.mount,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"
    ),
]

_MIB = 1 << 20


def _bytes(seed: int, size: int) -> bytes:
    """Half noise, half text, in turns of 64 KiB."""
    random = Random(seed)
    words = [b"%x " % random.getrandbits(28) for _ in range(1000)]
    turns = [
        random.randbytes(65536) if number % 2 else b"".join(random.choices(words, k=9000))[:65536]
        for number in range(size // 65536 + 1)
    ]
    return b"".join(turns)[:size]


#: 30 files of 1 MiB in 3 folders: large enough that the headers of a plain tar are worth looking for.
FILES = {f"app/p{n // 10}/f{n % 10}": _bytes(n, _MIB + 1000 * n) for n in range(30)}
MEMBERS = [
    *(Member(b"app/p%d/" % n, type=DIRECTORY, mode=0o755) for n in range(3)),
    *(Member(name.encode(), data, mtime=1_700_000_000) for name, data in FILES.items()),
]
TAR = archive(*MEMBERS)


def _layer(blob: Blob, kind: str) -> peers.LayerBlob:
    annotations = tuple(blob.annotations.items())
    return peers.LayerBlob(blob.data, f"{peers.OCI}layer.v1.tar+{kind}", None, annotations)


FORMS: dict[str, Callable[[], peers.LayerBlob]] = {
    "streamed": lambda: peers.pack(TAR),
    "SOCI v1": lambda: peers.pack(TAR),
    "ranged tar": lambda: peers.pack(TAR, "tar"),
    "eStargz": lambda: _layer(estargz(MEMBERS), "gzip"),
    "zstd:chunked": lambda: _layer(zstd_chunked(MEMBERS), "zstd"),
}


@pytest.fixture(scope="module")
def storage() -> Iterator[Path]:
    """The storage of a registry with an image of each form, under its name; to SOCI's an index was published."""
    if why := peers.have("docker-registry"):
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="storage-") as name:
        layout, root = Path(name, "layout"), Path(name, "root")
        with peers.docker_registry(root) as registry:
            for form, make in FORMS.items():
                # Another configuration is another image: what refers to one does not to the others.
                config: dict[str, peers.Json] = {"author": form}
                peers.tar_layer_image(layout, _tag(form), [make()], config=config)
                peers.push(layout, _tag(form), registry.host, "team/app")
            reference = f"{registry.host}/team/app:{_tag('SOCI v1')}"
            fsmount("index", reference, "--push", cache=Path(name, "cache"))
        yield root


def _tag(form: str) -> str:
    return form.replace(" ", "-").replace(":", "-").lower()


@dataclass(frozen=True)
class Front:
    """A registry behind a proxy that counts, and a mount's configuration for it."""

    registry: peers.Registry
    proxy: CountingProxy

    def config(self, **defaults: str) -> str:
        lines = [f'{key} = "{value}"' for key, value in ({"complete": "never"} | defaults).items()]
        registry = f'[registries."{self.proxy.host}"]\nplain_http = true\n'
        return "\n".join(["[defaults]", *lines, registry])

    @property
    def app(self) -> str:
        return f"app={self.proxy.host}/team/app"

    def source(self, form: str) -> str:
        return f"{self.proxy.host}/team/app:{_tag(form)}"

    def sent(self) -> int:
        return sum(one.sent for one in self.proxy.passed("/blobs/"))


@pytest.fixture
def front(storage: Path) -> Iterator[Front]:
    with peers.docker_registry(storage) as registry, CountingProxy(registry.host) as proxy:
        yield Front(registry, proxy)


@pytest.fixture
def work() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mount-") as name:
        yield Path(name)


def _inspected(front: Front, form: str, cache: Path) -> dict[str, object]:
    out = fsmount("inspect", "--json", front.source(form), cache=cache).stdout
    (layer,) = json.loads(out)["layers"]
    assert isinstance(layer, dict)
    return layer


@pytest.mark.parametrize("form", [form for form in FORMS if form != "streamed"])
def test_what_is_touched_is_fetched_and_little_else(front: Front, work: Path, form: str) -> None:
    with mounted(work, front.app, config=front.config()) as mountpoint:
        tree = mountpoint / "app" / _tag(form)
        assert sorted(os.listdir(tree / "app/p1")) == [f"f{n}" for n in range(10)]
        assert (tree / "app/p2/f9").stat().st_size == len(FILES["app/p2/f9"])
        size = len(FORMS[form]().read())
        listed = front.sent()
        assert listed < size / 8, "the tree is there without the layer"
        assert (tree / "app/p1/f5").read_bytes() == FILES["app/p1/f5"]
        # A file of 1 MiB lies in at most two spans of 4 MiB; what has been read in a row brings another.
        assert front.sent() - listed < size / 2
        facts = _inspected(front, form, work / "cache")
        assert facts["read_as"] == form
        assert isinstance(facts["cached_size"], int) and 0 < facts["cached_size"] < size / 2


@pytest.mark.parametrize("form", FORMS)
def test_reads_at_random_offsets_are_slices_of_what_was_packed(front: Front, work: Path, form: str) -> None:
    random = Random(form)
    with mounted(work, front.app, config=front.config()) as mountpoint, ExitStack() as stack:
        tree = mountpoint / "app" / _tag(form)
        files = {name: stack.enter_context((tree / name).open("rb", buffering=0)) for name in FILES}
        for _ in range(300):
            name = random.choice(list(FILES))
            offset, size = random.randrange(len(FILES[name])), random.randrange(1, 300_000)
            assert os.pread(files[name].fileno(), size, offset) == FILES[name][offset : offset + size]
        for name, data in FILES.items():
            assert (tree / name).read_bytes() == data


@pytest.mark.parametrize("form", FORMS)
def test_what_is_complete_outlives_its_registry(front: Front, work: Path, form: str) -> None:
    with mounted(work, front.app, config=front.config(complete="now")) as mountpoint:
        tree = mountpoint / "app" / _tag(form)
        assert (tree / "app/p0/f0").read_bytes() == FILES["app/p0/f0"]
        assert wait_until(lambda: _is_complete(front, form, work / "cache"), seconds=60)
        front.registry.stop()
        front.proxy.break_connections()
        for name, data in FILES.items():
            assert (tree / name).read_bytes() == data
    # And so it does in the next mount.
    with mounted(work, front.app, config=front.config()) as mountpoint:
        for name, data in FILES.items():
            assert (mountpoint / "app" / _tag(form) / name).read_bytes() == data


def _is_complete(front: Front, form: str, cache: Path) -> bool:
    facts = _inspected(front, form, cache)
    return facts.get("trust") in ("certified", "bound") and facts.get("cached_chunks") == facts["chunks"]


def test_a_streamed_layer_that_was_evicted_comes_back_in_parts(front: Front, work: Path) -> None:
    fsmount("prefetch", front.source("streamed"), "--all", cache=work / "cache")
    for path in (work / "cache" / "chunks").rglob("*.val"):
        path.unlink()
    front.proxy.forget()
    with mounted(work, front.app, config=front.config()) as mountpoint:
        tree = mountpoint / "app" / _tag("streamed")
        assert (tree / "app/p1/f5").read_bytes() == FILES["app/p1/f5"]
        assert front.sent() < len(FORMS["streamed"]().read()) / 3


@pytest.mark.parametrize("form", ["SOCI v1", "eStargz", "zstd:chunked"])
def test_a_flipped_bit_is_never_shown(front: Front, work: Path, form: str) -> None:
    blob = FORMS[form]().read()
    front.proxy.faults.append(Fault("flip", len(blob) // 2, f"/blobs/{peers.digest_of(blob)}"))
    refused = 0
    with mounted(work, front.app, config=front.config()) as mountpoint:
        for name, data in FILES.items():
            try:
                assert (mountpoint / "app" / _tag(form) / name).read_bytes() == data
            except OSError as error:
                assert error.errno == errno.EBADMSG
                refused += 1
    # Of SOCI's index nobody can tell whether it or the blob is wrong, so the layer is condemned.
    assert refused > 10 if form == "SOCI v1" else 1 <= refused <= 2


def _lying_ztoc() -> bytes:
    """Of the layer's blob, with every member under another name."""
    blob = FORMS["SOCI v1"]().read()
    builder = ZtocBuilder()
    for _ in builder.feed(blob):
        pass
    builder.entries[:] = [
        entry._replace(name=entry.name.replace(b"app/", b"lie/")) for entry in builder.entries
    ]
    return builder.finish(tool="a liar")


def test_what_a_lying_index_showed_is_void_when_the_layer_has_gone_by(front: Front, work: Path) -> None:
    layout = work / "layout"
    image = peers.tar_layer_image(layout, "v1", [FORMS["SOCI v1"]()], config={"author": "victim"})
    peers.push(layout, "v1", front.registry.host, "team/lied")
    manifest = Descriptor(
        str(image["mediaType"]), Digest.parse(str(image["digest"])), int(str(image["size"])), {}
    )
    layer = Descriptor("", Digest.of(FORMS["SOCI v1"]().read()), 1, {})
    ztoc = _lying_ztoc()
    index = soci.encode_index(
        [soci.describe_ztoc(ztoc, layer, span_size=4 * _MIB)], tool="a liar", subject=manifest
    )
    lies = work / "lies"
    peers.put_blob(lies, ztoc, soci.ZTOC)
    peers.put_blob(lies, soci.CONFIG, soci.INDEX_V1)
    described = peers.put_blob(lies, index, peers.MANIFEST) | {"artifactType": soci.INDEX_V1}
    # The registry has no API for referrers: so they are in an index under a tag.
    peers.put_manifest(lies, None, json.loads(index))
    fallback = {"schemaVersion": 2, "mediaType": peers.INDEX, "manifests": [described]}
    peers.put_manifest(lies, f"sha256-{manifest.digest.hex}", fallback)
    peers.push(lies, f"sha256-{manifest.digest.hex}", front.registry.host, "team/lied")

    app = f"app={front.proxy.host}/team/lied"
    with mounted(work, app, config=front.config()) as mountpoint:
        tree = mountpoint / "app" / "v1"
        assert os.listdir(tree) == ["lie"], "nobody knows better yet"
        inside = os.open(tree / "lie" / "p1", os.O_RDONLY)
        try:
            file = os.open("f5", os.O_RDONLY, dir_fd=inside)
            assert os.pread(file, 100, 0) == FILES["app/p1/f5"][:100]
            fsmount("snapshot", f"{front.proxy.host}/team/lied:v1", work / "dest", cache=work / "other")
            assert os.listdir(work / "dest") == ["app"], "a snapshot asks no one who may lie"
            (work / "config.toml").write_text(front.config(complete="now"))
            _pinned(mountpoint, manifest.digest)
            with pytest.raises(OSError) as caught:
                os.pread(file, 100, 900_000)
            assert caught.value.errno == errno.EBADMSG
            os.close(file)
            assert wait_until(lambda: os.listdir(tree) == ["app"])
            for name, data in FILES.items():
                assert (tree / name).read_bytes() == data
            with pytest.raises(OSError):
                os.stat("f6", dir_fd=inside)
        finally:
            os.close(inside)


def _pinned(mountpoint: Path, digest: Digest) -> None:
    """Looks into an image by its digest, which no hint is good enough for: so the layer goes by."""
    assert wait_until(lambda: os.listdir(mountpoint / "app" / str(digest)) == ["app"], seconds=60)
