"""The scenario of a cache that is full: what readers notice of it that older chunks go while newer ones come.

`python -m scripts.bench.eviction FILE` reads a file again and again until its standard input ends, each time through
the mount and not from the kernel's memory; it prints how many bytes that were, in how many seconds, and the longest
time that one piece of 128 KiB took.
"""

import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.bench.bench import Bench
from scripts.bench.corpus import header, slices, text_pool
from scripts.bench.machine import DEADLINE_SECONDS, Failed, timed
from scripts.bench.report import OURS, Ask
from tests.peers import LayerBlob, digest_of, push, tar_layer_image

MB = 1e6
REPOSITORY = "team/large"
KEPT, PASSING = "kept", "passing"
#: The layer that is read all the time; those that pass by, and the size of each; and of a cache that holds a few.
_KEPT_SIZE, _PASSING, _SIZE = 64_000_000, 6, 200_000_000
_CACHE_SIZE = 400_000_000
_PIECE = 128 * 1024

WITHOUT = "without eviction"
READING = "eviction: a file read through the mount meanwhile, s/GB"
STORING = "eviction: 1.2 GB fetched and stored, s"
PAUSE = "eviction: longest time that 128 KiB took, ms"
ASKS = (Ask(READING, WITHOUT, 1 / 0.7), Ask(PAUSE, None, 50))


def eviction(bench: Bench) -> None:
    """Large files are fetched and stored while another is read all the time: where they fit, and at the cap."""
    _publish(bench)
    bench.attempt(OURS, lambda: _measure(bench, OURS, _CACHE_SIZE))
    bench.attempt(WITHOUT, lambda: _measure(bench, WITHOUT, 4_000_000_000))


def _measure(bench: Bench, contender: str, size: int) -> None:
    repository = f"{bench.registry.host}/{REPOSITORY}"
    with bench.folder(on_disk=True) as folder:
        config, cache = folder / "config.toml", folder / "cache"
        config.write_text(f'[cache]\nsize = {size}\nmin_free = 0\n[defaults]\ncomplete = "never"\n')
        with bench.mounted(cache, repository=repository, config=config) as (point, _):
            timed(["cat", point / "a" / KEPT / "file"])
            with _reader(point / "a" / KEPT / "file") as figures:
                stored = timed("cat file* >/dev/null", cwd=point / "a" / PASSING)
        taken = sum(path.stat().st_blocks * 512 for path in (cache / "chunks").rglob("*"))
    if (taken > size) or (taken > _CACHE_SIZE) is (contender == OURS):
        raise Failed(f"the cache took {taken / MB:.0f} MB")
    count, seconds, longest = figures
    bench.record(READING, contender, seconds / count * 1e9)
    bench.record(STORING, contender, stored.seconds)
    bench.record(PAUSE, contender, longest * 1000)


@contextmanager
def _reader(path: Path) -> Iterator[list[float]]:
    """Reads a file meanwhile; afterwards the list holds the bytes, the seconds, and the longest pause."""
    figures: list[float] = []
    command = [sys.executable, "-m", "scripts.bench.eviction", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield figures
            out, _ = process.communicate(timeout=DEADLINE_SECONDS)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise Failed(f"the reader ended with {process.returncode}")
    figures += map(float, out.split())


def read_on(path: Path) -> tuple[int, float, float]:
    """Reads until the standard input ends."""
    count, longest = 0, 0.0
    descriptor = os.open(path, os.O_RDONLY)
    began = time.perf_counter()
    while not select.select([sys.stdin], [], [], 0)[0]:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(descriptor, 0, os.SEEK_SET)
        before = time.perf_counter()
        while data := os.read(descriptor, _PIECE):
            now = time.perf_counter()
            longest, before = max(longest, now - before), now
            count += len(data)
    return count, time.perf_counter() - began, longest


def _publish(bench: Bench) -> None:
    """Pushes the images, once; plain tars, so that it is not inflating that takes the time."""
    layout = bench.work / "large"
    if layout.exists():
        return
    rng = random.Random(12)
    for tag, count, size in ((KEPT, 1, _KEPT_SIZE), (PASSING, _PASSING, _SIZE)):
        blobs: list[LayerBlob] = []
        for number in range(count):
            blob = bench.work / f"{tag}{number}.tar"
            with blob.open("wb") as file:
                file.write(header(f"file{number or ''}", size, 0o644, b"0"))
                for piece in slices(rng, text_pool(), size):
                    file.write(piece)
                file.write(bytes(-size % 512 + 10240))
            blobs.append(LayerBlob(blob, "application/vnd.oci.image.layer.v1.tar", digest_of(blob)))
        tar_layer_image(layout, tag, blobs)
        for blob in blobs:
            assert isinstance(blob.content, Path)
            blob.content.unlink()
        push(layout, tag, bench.registry.host, REPOSITORY)


if __name__ == "__main__":
    print(*read_on(Path(sys.argv[1])))
