"""The image of an app that starts through a slow line: one layer of 1 GB, encoded in every way that is measured."""

import hashlib
import json
import random
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fsmount.archive.ztoc_builder import SPAN_SIZE, ZtocBuilder
from fsmount.oci import soci
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor
from scripts.bench.corpus import File, binary_pool, header, slices, text_pool
from scripts.bench.machine import timed
from scripts.bench.stargz import write_estargz
from tests.peers import (
    MANIFEST,
    OCI,
    Json,
    LayerBlob,
    digest_of,
    have,
    push,
    put_blob,
    put_manifest,
    tar_layer_image,
)

#: Changes with what is generated, as that of corpus.py.
_VERSION = 3
_TOOL = "fsmount bench"
_BLOCK = 1 << 20

# The tags. Those of the first line have the same layer; of these, nobody but the scenario "index" adds to BARE.
GZIP, BARE, SOCI_V1, SOCI_V2 = "gzip", "bare", "soci1", "soci2"
ESTARGZ, ZSTD, TAR = "estargz", "zstd", "tar"


@dataclass(frozen=True, slots=True)
class Touched:
    """A file that the app reads as it starts: so many bytes from its beginning."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class AppImage:
    """What was pushed: the digest and size of the layer of each tag; what starting the app reads, and its sha256.

    `sha256` is that of the sha256 of what is read of each file, in order.
    """

    version: int
    repository: str
    files: int
    content_size: int
    tar_size: int
    touched: list[Touched]
    sha256: str
    layers: dict[str, tuple[str, int]]
    #: Bytes of the index of each tag that has one, as they come over the wire.
    indexes: dict[str, int]
    #: Tags that could not be made here, and why.
    missing: dict[str, str]


def make(folder: Path, registry: Path, host: str, *, small: bool) -> AppImage:
    """Generate and push what the registry with the storage `registry` does not have yet: some three minutes, once.

    small: a tenth of everything. `folder` is needed meanwhile, and removed.
    """
    repository = "team/start-small" if small else "team/start"
    record = registry / f"{repository.replace('/', '-')}.json"
    if record.exists() and (old := json.loads(record.read_text()))["version"] == _VERSION:
        return AppImage(**old | {"touched": [Touched(**one) for one in old["touched"]]})
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        image = _Maker(folder, host, repository).make(small)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record.write_text(json.dumps(asdict(image)))
    return image


# What is in it


def plan(small: bool) -> tuple[list[File], list[Touched]]:
    """25,000 files in the order of a walk, and what of them is read at the start: 5 % of their bytes.

    A program of 90 MB with libraries and data beside it, and 440 packages of small sources in scopes of 16, as in
    node_modules; the app reads the beginning of its program, a few libraries, the packages of two scopes, some
    packages elsewhere, and single files.
    """
    part = 10 if small else 1
    scopes, sizes = (27 if not small else 3), random.Random(20)
    files = [File("app/bin/server", 90_000_000 // part, "binary")]
    files += [File(f"app/data/part{n}.bin", 20_000_000 // part, "binary") for n in range(8)]
    packages = [
        _package(f"@scope{scope:02}/p{one:02}", sizes) for scope in range(scopes) for one in range(16)
    ]
    files += [file for members in packages for file in members]
    files.append(File("etc/ssl/certs/ca-certificates.crt", 200_000))
    files += [File(f"usr/lib/lib{n:03}.so", 5_000_000 // part, "binary") for n in range(40)]
    files += [File(f"usr/lib/python3/native{n}.so", 50_000_000 // part, "binary") for n in range(4)]
    files += [File(f"usr/share/locale/l{n:03}/app.mo", 30_000) for n in range(760 // part)]

    by_path = {file.path: file.size for file in files}
    near, far = (0, 1) if small else (3, scopes - 8)
    chosen = [near * 16 + one for one in range(12)] + [far * 16 + one for one in range(8)]
    chosen += [scope * 16 + scope % 16 for scope in range(6, scopes, 6)]
    singles = ["etc/ssl/certs/ca-certificates.crt", f"usr/share/locale/l{300 // part:03}/app.mo"]
    singles += [packages[at % len(packages)][30].path for at in (20, 150, 300, 400)]
    touched = [Touched("app/bin/server", 20_000_000 // part)]
    touched += [Touched(f"usr/lib/lib{n:03}.so", by_path[f"usr/lib/lib{n:03}.so"]) for n in (4, 5, 19)]
    touched += [
        Touched(file.path, file.size) for one in chosen[:: 3 if small else 1] for file in packages[one]
    ]
    touched += [Touched(path, by_path[path]) for path in singles]
    touched.append(Touched("usr/lib/python3/native2.so", 2_000_000 // part))
    return files, list(dict.fromkeys(touched))


def _package(name: str, sizes: random.Random) -> list[File]:
    files = []
    for number in range(56):
        suffix = ("css", "d.ts", "js", "json", "so")[number // 12]
        inner = ("lib", "src/core", "src", "test")[number // 14]
        size = min(int(sizes.lognormvariate(8.6, 1.25)), 2_000_000)
        path = f"app/node_modules/{name}/{inner}/file{number:02}.{suffix}"
        files.append(File(path, size, "binary" if suffix == "so" else "text"))
    return files


class _Tar:
    """Writes the members to a tar; knows what starting the app must read of them."""

    def __init__(self, path: Path, files: Sequence[File], touched: Sequence[Touched]) -> None:
        self._hashes = {one.path: hashlib.sha256() for one in touched}
        self._left = {one.path: one.size for one in touched}
        whole = hashlib.sha256()
        with path.open("wb") as out:
            for piece in self._members(files):
                whole.update(piece)
                out.write(piece)
        self.path, self.size, self.diff_id = path, path.stat().st_size, f"sha256:{whole.hexdigest()}"
        self.sha256 = hashlib.sha256(b"".join(self._hashes[one.path].digest() for one in touched)).hexdigest()

    def _members(self, files: Sequence[File]) -> Iterator[bytes]:
        rng, parents = random.Random(21), set[Path]()
        pools = {"text": text_pool(), "binary": binary_pool()}
        for file in files:
            for folder in reversed(list(Path(file.path).parents)[:-1]):
                if folder not in parents:
                    parents.add(folder)
                    yield header(f"{folder}/", 0, 0o755, tarfile.DIRTYPE)
            mode = 0o755 if "/bin/" in file.path else 0o644
            yield header(file.path, file.size, mode, tarfile.REGTYPE)
            for piece in slices(rng, pools[file.content], file.size):
                self._note(file.path, piece)
                yield piece
            yield bytes(-file.size % 512)
        yield bytes(10240)

    def _note(self, path: str, piece: bytes) -> None:
        left = self._left.get(path, 0)
        if left:
            self._hashes[path].update(piece[:left])
            self._left[path] = max(0, left - len(piece))


# How it is encoded, and pushed


class _Maker:
    def __init__(self, folder: Path, host: str, repository: str) -> None:
        self._folder = folder
        self._host = host
        self._repository = repository
        self._layout = folder / "layout"
        self._layers: dict[str, tuple[str, int]] = {}
        self._indexes: dict[str, int] = {}
        self._missing: dict[str, str] = {}

    def make(self, small: bool) -> AppImage:
        files, touched = plan(small)
        tar = _Tar(self._folder / "layer.tar", files, touched)
        gzipped = self._folder / "layer.tar.gz"
        with gzipped.open("wb") as out, subprocess.Popen(["gzip", "-6nc", tar.path], stdout=out) as gzip:
            # On the other core.
            made = write_estargz(tar.path, estargz := self._folder / "layer.esgz")
        if gzip.returncode:
            raise RuntimeError(f"gzip ended with {gzip.returncode}")
        self._push(TAR, LayerBlob(tar.path, OCI + "layer.v1.tar", tar.diff_id))
        self._indexes[ESTARGZ] = made.toc_size
        self._push(ESTARGZ, LayerBlob(estargz, diff_id=made.diff_id, annotations=made.annotations))
        self._push(GZIP, layer := LayerBlob(gzipped, diff_id=tar.diff_id))
        self._push(BARE, layer, {"note": "to be indexed"})
        self._push_soci(layer)
        self._push_zstd(tar.path)
        return AppImage(
            version=_VERSION,
            repository=self._repository,
            files=len(files),
            content_size=sum(file.size for file in files),
            tar_size=tar.size,
            touched=touched,
            sha256=tar.sha256,
            layers=self._layers,
            indexes=self._indexes,
            missing=self._missing,
        )

    def _push(self, tag: str, layer: LayerBlob, annotations: Mapping[str, str] | None = None) -> Digest:
        """An image of one layer; returns the digest of its manifest, which annotations make another one."""
        described = tar_layer_image(self._layout, tag, [layer], annotations=annotations)
        push(self._layout, tag, self._host, self._repository)
        assert isinstance(layer.content, Path)
        self._layers[tag] = digest_of(layer.content), layer.content.stat().st_size
        return Digest.parse(str(described["digest"]))

    def _push_soci(self, layer: LayerBlob) -> None:
        """Two more images of the gzip layer: one has an index among its referrers, the other names one."""
        assert isinstance(layer.content, Path)
        builder = ZtocBuilder(span_size=SPAN_SIZE)
        with layer.content.open("rb") as blob:
            while data := blob.read(_BLOCK):
                for _ in builder.feed(data):
                    pass
        ztoc = builder.finish(tool=_TOOL)
        self._indexes[SOCI_V1] = self._indexes[SOCI_V2] = len(ztoc)
        digest, size = self._layers[GZIP]
        descriptor = Descriptor(layer.media_type, Digest.parse(digest), size, {})
        ztocs = [soci.describe_ztoc(ztoc, descriptor, span_size=SPAN_SIZE)]
        put_blob(self._layout, ztoc, soci.ZTOC)
        put_blob(self._layout, soci.CONFIG, soci.INDEX_V1)

        named = self._put_index("soci2-index", soci.encode_index(ztocs, tool=_TOOL), soci.INDEX_V2)
        self._push(SOCI_V2, layer, {soci.INDEX_DIGEST: str(named)})

        image = self._push(SOCI_V1, layer, {"note": "it has a SOCI index among its referrers"})
        manifest = (self._layout / "blobs/sha256" / image.hex).stat().st_size
        subject = Descriptor(MANIFEST, image, manifest, {})
        # The registry has no API for referrers: they are in an index under this tag.
        tag = f"sha256-{image.hex}"
        self._put_index(tag, soci.encode_index(ztocs, tool=_TOOL, subject=subject), soci.INDEX_V1)

    def _put_index(self, tag: str, index: bytes, artifact_type: str) -> Digest:
        entry: Json = put_blob(self._layout, index, MANIFEST) | {"artifactType": artifact_type}
        top: dict[str, Json] = {"schemaVersion": 2, "mediaType": OCI + "index.v1+json", "manifests": [entry]}
        put_manifest(self._layout, tag, top)
        push(self._layout, tag, self._host, self._repository)
        return Digest.of(index)

    def _push_zstd(self, tar: Path) -> None:
        """What buildah makes of the same files."""
        if reason := have("buildah"):
            self._missing[ZSTD] = reason
            return
        folder, layout = self._folder / "buildah", self._folder / "zstd-layout"
        store = f"--storage-driver vfs --root {folder}/root --runroot {folder}/run"
        timed(
            f"container=$(buildah {store} from scratch)"
            f" && tar xf {shlex.quote(str(tar))} -C $(buildah {store} mount $container)"
            f" && buildah {store} commit --quiet --rm $container localhost/app"
            f" && buildah {store} push --quiet --compression-format zstd:chunked localhost/app oci:{layout}:{ZSTD}"
        )
        shutil.rmtree(folder, ignore_errors=True)
        push(layout, ZSTD, self._host, self._repository)
        blobs = layout / "blobs/sha256"
        top = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
        (layer,) = json.loads((blobs / top.removeprefix("sha256:")).read_text())["layers"]
        self._layers[ZSTD] = layer["digest"], layer["size"]
        positions = [text for key, text in layer["annotations"].items() if key.endswith("manifest-position")]
        self._indexes[ZSTD] = int(positions[0].split(":")[1])
