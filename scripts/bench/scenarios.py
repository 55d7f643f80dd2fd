"""The scenarios, each called once a run: every contender does the same, one after the other, in that run."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from scripts.bench import boot, eviction, start
from scripts.bench.bench import Bench
from scripts.bench.corpus import REPOSITORY
from scripts.bench.machine import Failed, drop_caches, probe, resident_megabytes, timed
from scripts.bench.report import OURS, Ask
from scripts.bench.rivals import (
    FLOOR,
    HTTPX,
    NATIVE,
    RATARMOUNT,
    SQUASHFUSE,
    UMOCI,
    floor,
    native,
    ratarmounted,
    skopeo_umoci,
    squashfused,
)

MB = MICRO = 1e6
READERS = {
    "2 readers": "find . -type f -print0 | xargs -0 -P2 -n256 cat >/dev/null",
    "1 reader": "tar cf - . | cat >/dev/null",
}
LISTERS = {"find": "find . >/dev/null", "ls -lR": "ls -lR . >/dev/null"}

#: Proposals where the specification names no figure: ratios to the peer; without one, plain figures.
ASKS = (
    Ask("everything, 2 readers, s", FLOOR, 1.0),
    Ask("everything, 2 readers, s", UMOCI, 0.5),
    Ask("everything, 1 reader, s", FLOOR, 1.0),
    Ask("everything, 1 reader, s", UMOCI, 0.5),
    Ask("snapshot, s", FLOOR, 0.9),
    Ask("snapshot, s", UMOCI, 0.25),
    Ask("second tag, MB on the wire", UMOCI, 1.05),
    Ask("second tag, first byte, s", "its first tag", 0.05),
    Ask("find, cold mount, s", RATARMOUNT, 0.5),
    Ask("ls -lR, cold mount, s", RATARMOUNT, 0.5),
    Ask("ls -lR, cold mount, s", SQUASHFUSE, 1.0),
    Ask("warm stat, µs", NATIVE, 2.0),
    Ask("warm read, s/GB", NATIVE, 1.11),
    Ask("cached file, page cache cold, s/GB", NATIVE, 2.0),
    Ask("diff -r of two tags, cold, s", NATIVE, 0.25),
    Ask("diff -r of two tags, warm, s", NATIVE, 0.25),
    Ask("one blob, s", HTTPX, 1.25),
    Ask("one blob: event loop blocked, ms", None, 20),
    Ask("200,000 files: memory, MB", None, 250),
    Ask("200,000 files: open an indexed tag, s", None, 0.3),
    *start.ASKS,
    *eviction.ASKS,
    *boot.ASKS,
)


def everything(bench: Bench) -> None:
    """From nothing, cold cache, to every byte of v1 read through the mount; peers only unpack, and read nothing."""
    content = sum(layer.content_size for layer in bench.corpus.blobs("v1"))

    def read_all(root: Path, command: str) -> float:
        done = timed(command, cwd=root)
        if done.read_bytes < content:
            raise Failed(f"only {done.read_bytes / MB:.0f} of {content / MB:.0f} MB were read")
        return done.seconds

    for name, command in READERS.items():
        measure = f"everything, {name}, s"

        def ours(command: str = command, measure: str = measure) -> None:
            before = bench.wire_bytes()
            with bench.folder() as cache, bench.mounted(cache) as (point, seconds):
                bench.record(measure, OURS, seconds + read_all(point / "a/v1", command))
            bench.record(measure.replace(", s", ", MB on the wire"), OURS, (bench.wire_bytes() - before) / MB)

        def unpacked(measure: str = measure) -> None:
            with bench.folder() as dest:
                bench.record(measure, FLOOR, floor(bench, "v1", dest))

        def by_umoci(measure: str = measure) -> None:
            with bench.folder() as work:
                bench.record(measure, UMOCI, sum(skopeo_umoci(bench, "v1", work / "layout", work / "bundle")))

        bench.attempt(OURS, ours)
        bench.attempt(FLOOR, unpacked)
        bench.attempt(UMOCI, by_umoci)


def first_byte(bench: Bench) -> None:
    """From nothing to one byte of a file at the front and at the end of a large layer, mounting included."""
    layer = bench.corpus.layers["A"]

    def ours() -> None:
        for name, path in (("an early", layer.early), ("a late", layer.late)):
            with bench.folder() as cache, bench.mounted(cache) as (point, seconds):
                bench.record(
                    f"first byte of {name} file, s", OURS, seconds + probe("first", point / "a/v1" / path)
                )

    def unpacked() -> None:
        with bench.folder() as dest:
            seconds = floor(bench, "v1", dest)
            for name in ("an early", "a late"):
                bench.record(f"first byte of {name} file, s", FLOOR, seconds)

    bench.attempt(OURS, ours)
    bench.attempt(FLOOR, unpacked)


def snapshot(bench: Bench) -> None:
    """From nothing to a plain folder with v1."""

    def ours() -> None:
        with bench.folder() as cache, bench.folder() as dest:
            source = f"{bench.registry.host}/{REPOSITORY}:v1"
            done = timed([*bench.ours(), "snapshot", source, dest / "tree", "--cache", cache])
            bench.record("snapshot, s", OURS, done.seconds)

    def unpacked() -> None:
        with bench.folder() as dest:
            bench.record("snapshot, s", FLOOR, floor(bench, "v1", dest))

    def by_umoci() -> None:
        with bench.folder() as work:
            copied, unpacked = skopeo_umoci(bench, "v1", work / "layout", work / "bundle")
            bench.record("snapshot, s", UMOCI, copied + unpacked)
            bench.record("snapshot: umoci's part, s", UMOCI, unpacked)

    bench.attempt(OURS, ours)
    bench.attempt(FLOOR, unpacked)
    bench.attempt(UMOCI, by_umoci)


def second_tag(bench: Bench) -> None:
    """v2, which shares its large layer with v1: after v1 was read, what v2 costs in time and on the wire."""
    changed = bench.corpus.layers["B2"].late
    first, wire = "second tag, first byte, s", "second tag, MB on the wire"

    def ours() -> None:
        with bench.folder() as cache:
            with bench.mounted(cache) as (point, _):
                # The first tag's: a late file of the large layer, the one that v2 need not fetch again.
                late = bench.corpus.layers["A"].late
                bench.record(first, "its first tag", probe("first", point / "a/v1" / late))
                timed(READERS["2 readers"], cwd=point / "a/v1")
                before = bench.wire_bytes()
                bench.record(first, OURS, probe("first", point / "a/v2" / changed))
                timed(READERS["2 readers"], cwd=point / "a/v2")
            bench.record(wire, OURS, (bench.wire_bytes() - before) / MB)

    def unpacked() -> None:
        before = bench.wire_bytes()
        with bench.folder() as dest:
            bench.record(first, FLOOR, floor(bench, "v2", dest))
        bench.record(wire, FLOOR, (bench.wire_bytes() - before) / MB)

    def by_umoci() -> None:
        with bench.folder() as work:
            skopeo_umoci(bench, "v1", work / "layout", work / "bundle")
            before = bench.wire_bytes()
            copied, unpacked = skopeo_umoci(bench, "v2", work / "layout", work / "bundle2")
            bench.record(first, UMOCI, copied + unpacked)
            bench.record(wire, UMOCI, (bench.wire_bytes() - before) / MB)

    bench.attempt(OURS, ours)
    bench.attempt(FLOOR, unpacked)
    bench.attempt(UMOCI, by_umoci)


def listing(bench: Bench) -> None:
    """find and ls -lR over 50,000 entries, each in a new mount over an older index; then again."""

    @contextmanager
    def ours() -> Iterator[Path]:
        with bench.mounted(_indexed(bench, "many")) as (point, _):
            yield point / "a/many"

    def lists(contender: str, mount: Callable[[], AbstractContextManager[Path]]) -> None:
        for name, command in LISTERS.items():
            with mount() as root:
                for state in ("cold", "warm"):
                    bench.record(f"{name}, {state} mount, s", contender, timed(command, cwd=root).seconds)

    bench.attempt(OURS, lambda: lists(OURS, ours))
    bench.attempt(NATIVE, lambda: lists(NATIVE, lambda: nullcontext(native(bench, "many"))))
    bench.attempt(RATARMOUNT, lambda: lists(RATARMOUNT, lambda: ratarmounted(bench, "many")))
    bench.attempt(SQUASHFUSE, lambda: lists(SQUASHFUSE, lambda: squashfused(bench, "many")))


def warm(bench: Bench) -> None:
    """Stat and sequential reads that the kernel can answer from its caches, against a folder on tmpfs."""
    folder, largest = native(bench, "v1"), bench.corpus.layers["A"].largest
    listed = timed("find . -type f | sort", cwd=folder).output.splitlines()[::3]
    gigabytes = (folder / largest).stat().st_size / 1e9

    def measure(contender: str, root: Path) -> None:
        seconds = probe("stat", root, "\n".join(listed))
        bench.record("warm stat, µs", contender, seconds / len(listed) * MICRO)
        probe("read", root / largest)
        bench.record("warm read, s/GB", contender, probe("read", root / largest) / gigabytes)

    def ours() -> None:
        with bench.mounted(_indexed(bench, "v1")) as (point, _):
            measure(OURS, point / "a/v1")

    bench.attempt(OURS, ours)
    bench.attempt(NATIVE, lambda: measure(NATIVE, folder))


def cold_pages(bench: Bench) -> None:
    """A large file that is cached on a real disk, with an empty page cache, against the file on that disk."""
    largest = bench.corpus.layers["A"].largest
    plain = native(bench, "v1") / largest
    gigabytes = plain.stat().st_size / 1e9

    def measure(contender: str, path: Path) -> None:
        probe("read", path)
        drop_caches()
        bench.record("cached file, page cache cold, s/GB", contender, probe("read", path) / gigabytes)

    def ours() -> None:
        with bench.folder(on_disk=True) as cache, bench.mounted(cache) as (point, _):
            measure(OURS, point / "a/v1" / largest)

    def on_disk() -> None:
        with bench.folder(on_disk=True) as folder:
            measure(NATIVE, Path(shutil.copy(plain, folder)))

    bench.attempt(OURS, ours)
    bench.attempt(NATIVE, on_disk)


def diff(bench: Bench) -> None:
    """diff -r of two tags that share a layer, against that of two folders on the disk; the bytes that diff read.

    Cold: nothing in the page cache, and a new mount; warm: the same again.
    """

    def measure(contender: str, left: Path, right: Path) -> None:
        for state in ("cold", "warm"):
            done = timed(["diff", "-r", left, right], ok=1)
            bench.record(f"diff -r of two tags, {state}, s", contender, done.seconds)
            bench.record(f"diff -r of two tags, {state}, MB read", contender, done.read_bytes / MB)

    def ours() -> None:
        cache = _indexed(bench, "v1", "v2", on_disk=True)
        drop_caches()
        with bench.mounted(cache) as (point, _):
            measure(OURS, point / "a/v1", point / "a/v2")

    def folders() -> None:
        left, right = native(bench, "v1", on_disk=True), native(bench, "v2", on_disk=True)
        drop_caches()
        measure(NATIVE, left, right)

    bench.attempt(OURS, ours)
    bench.attempt(NATIVE, folders)


def download(bench: Bench) -> None:
    """One large blob to nowhere, through fsmount's registry client and through plain httpx."""
    layer = bench.corpus.layers["A"]

    def measure(contender: str, way: str) -> None:
        command = [sys.executable, "-m", "scripts.bench.download", way, bench.registry.host]
        seconds, blocked = timed([*command, REPOSITORY, layer.digest, str(layer.size)]).output.split()
        bench.record("one blob, s", contender, float(seconds))
        bench.record("one blob: event loop blocked, ms", contender, float(blocked) * 1000)

    bench.attempt(OURS, lambda: measure(OURS, "fsmount"))
    bench.attempt(HTTPX, lambda: measure(HTTPX, "httpx"))


def huge(bench: Bench) -> None:
    """A tag of 200,000 files: memory after find over it, and how soon a new daemon opens what is indexed."""

    def ours() -> None:
        with bench.folder() as cache:
            with bench.mounted(cache) as (point, _):
                indexed = timed(LISTERS["find"], cwd=point / "a/huge")
                now, most = resident_megabytes(point)
                bench.record("200,000 files: first find, index included, s", OURS, indexed.seconds)
                bench.record("200,000 files: memory, MB", OURS, now)
                bench.record("200,000 files: peak memory, MB", OURS, most)
            with bench.mounted(cache) as (point, seconds):
                opened = timed(["stat", point / "a/huge" / bench.corpus.layers["huge"].late])
                bench.record("200,000 files: mount, s", OURS, seconds)
                bench.record("200,000 files: open an indexed tag, s", OURS, opened.seconds)

    def by_ratarmount() -> None:
        with ratarmounted(bench, "huge") as point:
            timed(LISTERS["find"], cwd=point)
            now, most = resident_megabytes(point)
            bench.record("200,000 files: memory, MB", RATARMOUNT, now)
            bench.record("200,000 files: peak memory, MB", RATARMOUNT, most)

    bench.attempt(OURS, ours)
    bench.attempt(RATARMOUNT, by_ratarmount)


SCENARIOS: dict[str, Callable[[Bench], None]] = {
    "everything": everything,
    "first-byte": first_byte,
    "snapshot": snapshot,
    "second-tag": second_tag,
    "listing": listing,
    "warm": warm,
    "cold-pages": cold_pages,
    "diff": diff,
    "download": download,
    "huge": huge,
    "app-start": start.app_start,
    "spans": start.spans,
    "index": start.index,
    "eviction": eviction.eviction,
    "boot": boot.boot,
}


def _indexed(bench: Bench, *tags: str, on_disk: bool = False) -> Path:
    """A cache in which these tags have been listed to the end once. Raises: Failed."""
    cache = (bench.disk if on_disk else bench.work) / f"cache-{'-'.join(tags)}"
    if not cache.exists():
        try:
            with bench.mounted(cache) as (point, _):
                for tag in tags:
                    timed(LISTERS["find"], cwd=point / "a" / tag)
        except BaseException:
            shutil.rmtree(cache, ignore_errors=True)
            raise
    return cache
