"""The images that are measured: made of seeded pools, equal everywhere, pushed to a registry of our own."""

import hashlib
import json
import random
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Literal

from tests.peers import LayerBlob, digest_of, push, tar_layer_image

REPOSITORY = "team/app"
MTIME = 1_700_000_000
#: Changes with what is generated, so that a kept work folder of an older bench is not used.
VERSION = 7

Content = Literal["text", "binary"]


@dataclass(frozen=True, slots=True)
class File:
    """One member: its path, size and the kind of bytes in it."""

    path: str
    size: int
    content: Content = "text"


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer on disk: the compressed blob, what it inflates to, and members worth asking for."""

    blob: str
    digest: str
    diff_id: str
    size: int
    tar_size: int
    content_size: int
    files: int
    early: str
    late: str
    largest: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """The layers by name, and the tags made of them."""

    version: int
    layers: dict[str, Layer]
    tags: dict[str, list[str]]

    def blobs(self, tag: str) -> list[Layer]:
        return [self.layers[name] for name in self.tags[tag]]


TAGS = {"v1": ["A", "B"], "v2": ["A", "B2"], "many": ["many"], "huge": ["huge"]}


def make(folder: Path) -> Corpus:
    """Generate what `folder` does not hold yet; takes about a minute of two cores, once."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "corpus.json"
    if record.exists() and (old := json.loads(record.read_text()))["version"] == VERSION:
        return Corpus(VERSION, {name: Layer(**one) for name, one in old["layers"].items()}, old["tags"])
    plans = {
        "A": (1, list(_application())),
        "B": (2, list(_change())),
        "B2": (3, list(_change())),
        "many": (4, list(_small(50_000, 30, 500))),
        "huge": (5, list(_small(203_400, 60, 300))),
    }
    layers = {name: _write(folder / f"{name}.tar.gz", seed, files) for name, (seed, files) in plans.items()}
    corpus = Corpus(VERSION, layers, TAGS)
    record.write_text(json.dumps(asdict(corpus)))
    return corpus


def publish(corpus: Corpus, folder: Path, host: str) -> None:
    """Push every tag to the registry at `host`."""
    for tag, names in corpus.tags.items():
        layers = [corpus.layers[name] for name in names]
        blobs = [LayerBlob(Path(one.blob), diff_id=one.diff_id) for one in layers]
        tar_layer_image(folder / "layout", tag, blobs)
        push(folder / "layout", tag, host, REPOSITORY)


def _application() -> Iterator[File]:
    """25,000 files, 400 MB: packages of small sources, libraries, and one large executable in the middle.

    Eight files a folder, as in what `npm install react-scripts` makes: 37,500 files in 4,600 folders.
    """
    sizes = random.Random(10)
    for package in range(500):
        for number in range(50):
            suffix = ("js", "py", "json", "css", "so")[number % 5]
            folder = f"app/packages/p{package:03}/{('src', 'test', 'lib/a', 'lib/b')[number % 4]}"
            size = min(int(sizes.lognormvariate(8.6, 1.25)), 4_000_000)
            yield File(f"{folder}/file{number:02}.{suffix}", size, "binary" if suffix == "so" else "text")
        if package % 50 == 25:
            yield File(f"app/native/lib{package}.so", 4_500_000, "binary")
        if package == 250:
            yield File("app/bin/server", 64_000_000, "binary")


def _change() -> Iterator[File]:
    sizes = random.Random(11)
    for number in range(400):
        yield File(f"app/dist/assets/chunk{number:03}.js", min(int(sizes.lognormvariate(8.9, 1.0)), 300_000))


def _small(entries: int, in_folder: int, size: int) -> Iterator[File]:
    """Files and the folders that hold them, `entries` together."""
    folders = entries // (in_folder + 1)
    for folder in range(folders):
        for number in range(in_folder):
            path = f"app/site/{folder // 100:02}/{folder % 100:02}/page{number:02}.html"
            yield File(path, size // 2 + (folder * 7 + number * 13) % size)


def _write(blob: Path, seed: int, files: list[File]) -> Layer:
    """Write the tar through gzip -6, hashing it on the way."""
    rng = random.Random(seed)
    hashed, tar_size, parents = hashlib.sha256(), 0, set[str]()
    with blob.open("wb") as out, subprocess.Popen(["gzip", "-6n"], stdin=subprocess.PIPE, stdout=out) as gzip:
        assert gzip.stdin is not None
        for piece in _members(rng, files, parents):
            hashed.update(piece)
            tar_size += len(piece)
            gzip.stdin.write(piece)
    if gzip.returncode:
        raise RuntimeError(f"gzip ended with {gzip.returncode}")
    return Layer(
        blob=str(blob),
        digest=digest_of(blob),
        diff_id=f"sha256:{hashed.hexdigest()}",
        size=blob.stat().st_size,
        tar_size=tar_size,
        content_size=sum(file.size for file in files),
        files=len(files),
        early=files[20].path,
        late=files[-20].path,
        largest=max(files, key=lambda file: file.size).path,
    )


def _members(rng: random.Random, files: list[File], parents: set[str]) -> Iterator[bytes]:
    pools = {"text": text_pool(), "binary": binary_pool()}
    for file in files:
        for folder in reversed(list(Path(file.path).parents)[:-1]):
            if str(folder) not in parents:
                parents.add(str(folder))
                yield header(f"{folder}/", 0, 0o755, tarfile.DIRTYPE)
        yield header(file.path, file.size, 0o755 if "/bin/" in file.path else 0o644, tarfile.REGTYPE)
        yield from slices(rng, pools[file.content], file.size)
        yield bytes(-file.size % 512)
    yield bytes(10240)


def slices(rng: random.Random, pool: bytes, size: int) -> Iterator[bytes]:
    """Pieces of the pool in random order; gzip's window is too small to see that they come again."""
    while size > 0:
        at = rng.randrange(len(pool) - 1_000_000)
        piece = pool[at : at + min(size, rng.randrange(200_000, 1_000_000))]
        size -= len(piece)
        yield piece


def header(path: str, size: int, mode: int, kind: bytes) -> bytes:
    """That of a member in a tar."""
    info = tarfile.TarInfo(path)
    info.size, info.mode, info.mtime, info.type = size, mode, MTIME, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


@cache
def text_pool() -> bytes:
    """24 MB of words as rare as in prose, in lines: gzip makes about a third of it."""
    rng = random.Random(100)
    words = [
        "".join(rng.choices("etaoinshrdlucmfwypvbgkqjxz_.(", k=rng.randrange(3, 13))) for _ in range(2500)
    ]
    weights = list(accumulate(1 / (rank + 5) for rank in range(len(words))))
    picked = rng.choices(words, cum_weights=weights, k=3_000_000)
    picked[::11] = [word + "\n   " for word in picked[::11]]
    return " ".join(picked).encode()


@cache
def binary_pool() -> bytes:
    """24 MB like machine code: short sequences that come again, between bytes that do not."""
    rng = random.Random(101)
    known = [rng.randbytes(rng.randrange(6, 28)) for _ in range(900)]
    weights = list(accumulate(1 / (rank + 4) for rank in range(len(known))))
    parts = rng.choices(known, cum_weights=weights, k=1_350_000)
    noise = rng.randbytes(len(parts))
    parts[::3] = [part + noise[at : at + 3] for at, part in enumerate(parts[::3])]
    return b"".join(parts)
