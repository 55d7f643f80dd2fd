"""The builds that are read: made from a seed, one app for each kind of layer, and known to the last byte."""

import base64
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from tests.fakes.estargz import Member, estargz
from tests.fakes.tar import DIRECTORY, SYMLINK, archive
from tests.fakes.zstdchunked import zstd_chunked
from tests.peers import LayerBlob, Packing, pack, push, run, tar_layer_image

#: What is read while the worker is killed: it fits into the cache, and is in it by then.
CACHED = (("web", "v1"), ("web", "v2"), ("star", "v1"), ("chunked", "v1"))
#: The app whose tag moves, that tag, and the file that says what it shows.
MOVING, LIVE, REVISION = "moving", "live", "REVISION"
#: The app whose tags nobody reads before something is wrong: each is streamed for the first time under faults.
FRESH = "fresh"
_FRESH_TAGS = 12
#: Files of a revision beside that one.
REVISION_FILES = 24
PROGRAM, LIBRARY = "bin/total", "lib/libtable.so"
_TABLE_SIZE = 3_000_000
_MTIME = 1_700_000_000


@dataclass(frozen=True, slots=True)
class File:
    """One file: `seed` is what `content` makes its bytes of; empty for programs, whose bytes are not made so."""

    size: int
    sha256: str
    seed: str


@dataclass(frozen=True, slots=True)
class Tree:
    """What one tag shows, by path from its root."""

    files: Mapping[str, File]
    folders: Sequence[str]
    links: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Builds:
    """All that is known of the apps: by app and tag; and what the program prints that they hold."""

    trees: Mapping[str, Mapping[str, Tree]]
    total: int

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Builds":
        kept = json.loads(path.read_text())
        trees = {
            app: {
                tag: Tree(
                    {name: File(**file) for name, file in tree["files"].items()},
                    tree["folders"],
                    tree["links"],
                )
                for tag, tree in tags.items()
            }
            for app, tags in kept["trees"].items()
        }
        return cls(trees, kept["total"])


def content(seed: str, size: int) -> bytes:
    """Bytes that compress to half, always the same for a seed."""
    return base64.b16encode(random.Random(seed).randbytes(size // 2 + 1))[:size]


def make(layout: Path, work: Path, seed: str) -> Builds:
    """Writes every tag but the moving one into an OCI layout, as APP-TAG. `work` gets what is compiled."""
    maker = _Maker(layout, seed)
    program, library, total = _compile(work, seed)
    programs = {PROGRAM: program, LIBRARY: library}
    base = maker.files("web/base", 240, 20_000) | maker.files("web/large", 3, 3_000_000)
    for tag in ("v1", "v2"):
        # The same paths in both tags: half of the changed ones hide files of the base.
        own = {path: f"{at}-{tag}" for path, (at, _) in list(base.items())[:30]}
        change = {path: (own_seed, base[path][1]) for path, own_seed in own.items()}
        change |= maker.files(f"web/{tag}", 60, 20_000)
        maker.image("web", tag, [("gzip", base, programs), ("gzip", change, {})])
    maker.image("zst", "v1", [("zstd", maker.files("zst", 150, 20_000, 2, 4_000_000), {})])
    maker.image("bulk", "v1", [("tar", maker.files("bulk", 20, 50_000, 8, 5_000_000), {})])
    maker.image("soci", "v1", [("gzip", maker.files("soci", 150, 30_000, 3, 4_000_000), {})])
    for tag in ("v1", "v2"):
        maker.image("star", tag, [("estargz", maker.files(f"star/{tag}", 150, 20_000, 3, 2_000_000), {})])
        chunked = maker.files(f"chunked/{tag}", 150, 20_000, 3, 2_000_000)
        maker.image("chunked", tag, [("chunked", chunked, {})])
    for number in range(_FRESH_TAGS):
        kind = ("gzip", "tar", "zstd")[number % 3]
        maker.image(
            FRESH, f"f{number:02}", [(kind, maker.files(f"fresh/f{number:02}", 40, 20_000, 1, 2_000_000), {})]
        )
    return Builds(maker.trees, total)


def publish(builds: Builds, layout: Path, host: str, config: Path) -> None:
    """Pushes all of `make`, and a SOCI index for the app that is named after it."""
    for app, tags in builds.trees.items():
        for tag in tags:
            push(layout, f"{app}-{tag}", host, f"team/{app}", as_tag=tag)
    words = ("index", f"{host}/team/soci:v1", "--push", "--min-size", "100000", "--config", config)
    command = [sys.executable, "-P", "-m", "fsmount", *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def push_revision(number: int, layout: Path, host: str, seed: str) -> None:
    """Moves the moving tag to another revision."""
    files = revision(number, seed)
    members = [Member(path.encode(), data, mtime=_MTIME + number) for path, data in files.items()]
    tar_layer_image(layout, f"{MOVING}-{number}", [pack(archive(*members))])
    push(layout, f"{MOVING}-{number}", host, f"team/{MOVING}", as_tag=LIVE)


def revision(number: int, seed: str) -> dict[str, bytes]:
    """Every file of a revision."""
    files = {f"f{at:02}": content(f"{seed}/{number}/{at}", 6_000) for at in range(REVISION_FILES)}
    return {REVISION: b"%d\n" % number, **files}


class _Maker:
    """Makes images of planned files, and keeps what they must show."""

    def __init__(self, layout: Path, seed: str) -> None:
        self.trees: dict[str, dict[str, Tree]] = {}
        self._layout = layout
        self._seed = seed

    def files(
        self, name: str, count: int, size: int, large: int = 0, large_size: int = 0
    ) -> dict[str, tuple[str, int]]:
        """Paths with a seed and a size: many of about `size`, ten to a folder, and a few large ones."""
        sizes = random.Random(f"{self._seed}/{name}")
        top = name.partition("/")[2] or "files"
        plan = {}
        for at in range(count):
            plan[f"{top}/d{at // 10:02}/f{at % 10}"] = min(int(sizes.expovariate(2 / size)), 2 * size)
        for at in range(large):
            plan[f"{top}/large{at}"] = int(large_size * sizes.uniform(0.8, 1.2))
        return {path: (f"{self._seed}/{name}/{path}", length) for path, length in plan.items()}

    def image(
        self,
        app: str,
        tag: str,
        layers: Sequence[tuple[str, Mapping[str, tuple[str, int]], Mapping[str, bytes]]],
    ) -> None:
        """One tag of layers, each of a kind, with planned files and ready ones; upper ones hide lower ones."""
        shown: dict[str, File] = {}
        links: dict[str, str] = {}
        blobs = []
        for number, (kind, planned, ready) in enumerate(layers):
            datas = {path: content(seed, size) for path, (seed, size) in planned.items()}
            for path, data in (datas | dict(ready)).items():
                seed = planned[path][0] if path in planned else ""
                shown[path] = File(len(data), sha256(data).hexdigest(), seed)
            layer_links = {f"link{number}": next(iter(datas))}
            links |= layer_links
            blobs.append(_blob(kind, list(_members(datas | dict(ready), layer_links))))
        tar_layer_image(self._layout, f"{app}-{tag}", blobs)
        folders = sorted({folder for path in shown for folder in _above(path)})
        self.trees.setdefault(app, {})[tag] = Tree(shown, folders, links)


def _members(files: Mapping[str, bytes], links: Mapping[str, str]) -> Iterator[Member]:
    for folder in sorted({folder for path in files for folder in _above(path)}):
        yield Member(folder.encode() + b"/", type=DIRECTORY, mode=0o755, mtime=_MTIME)
    for path, data in files.items():
        mode = 0o755 if path == PROGRAM else 0o644
        yield Member(path.encode(), data, mode=mode, mtime=_MTIME)
    for path, target in links.items():
        yield Member(path.encode(), type=SYMLINK, link=target.encode(), mode=0o777, mtime=_MTIME)


def _above(path: str) -> Iterable[str]:
    parts = path.split("/")[:-1]
    return ("/".join(parts[: stop + 1]) for stop in range(len(parts)))


def _blob(kind: str, members: Sequence[Member]) -> LayerBlob:
    if kind in ("estargz", "chunked"):
        make_blob = partial(estargz, chunk_size=1 << 20) if kind == "estargz" else zstd_chunked
        made = make_blob(members)
        media_type = "application/vnd.oci.image.layer.v1.tar+" + ("gzip" if kind == "estargz" else "zstd")
        return LayerBlob(made.data, media_type, annotations=tuple(made.annotations.items()))
    packings: dict[str, Packing] = {"gzip": "gzip", "zstd": "zstd", "tar": "tar"}
    return pack(archive(*members), packings[kind], level=1)


# The program: it adds up a table that lies in its library; with an argument again and again, after the kernel was
# told to forget the pages of it, each time with when that began and ended.

_LIBRARY = f"""
#define _GNU_SOURCE
#include <dlfcn.h>
__asm__(".section .rodata\\n.balign 4096\\n.global table\\ntable: .incbin \\"table\\"\\n.balign 4096\\n.previous");
extern const unsigned char table[];
unsigned long sum(void) {{
    unsigned long total = 0;
    for (long i = 0; i < {_TABLE_SIZE}; i++) total += table[i];
    return total;
}}
const unsigned char *start(void) {{ return table; }}
const char *home(void) {{
    Dl_info info;
    return dladdr((void *)sum, &info) ? info.dli_fname : "nowhere";
}}
"""

_PROGRAM = f"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
unsigned long sum(void);
const unsigned char *start(void);
const char *home(void);
static sigjmp_buf back;
static void on_bus_error(int number) {{ siglongjmp(back, number); }}
static double now(void) {{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}}
int main(int count, char **words) {{
    if (count == 1) return printf("%lu\\n", sum()) < 0;
    int library = open(home(), O_RDONLY);
    signal(SIGBUS, on_bus_error);
    for (;;) {{
        madvise((void *)start(), {_TABLE_SIZE}, MADV_DONTNEED);
        posix_fadvise(library, 0, 0, POSIX_FADV_DONTNEED);
        volatile double began = now();
        if (sigsetjmp(back, 1)) printf("%f %f SIGBUS\\n", began, now());
        else {{
            unsigned long total = sum();
            printf("%f %f %lu\\n", began, now(), total);
        }}
        if (fflush(stdout)) return 1;
        usleep(500000);
    }}
}}
"""


def _compile(work: Path, seed: str) -> tuple[bytes, bytes, int]:
    """The program, its library, and what it prints."""
    table = random.Random(f"{seed}/table").randbytes(_TABLE_SIZE)
    for folder in ("bin", "lib"):
        (work / folder).mkdir(parents=True)
    (work / "table").write_bytes(table)
    (work / "table.c").write_text(_LIBRARY)
    (work / "total.c").write_text(_PROGRAM)
    run("gcc", "-O1", "-shared", "-fPIC", "-o", LIBRARY, "table.c", "-ldl", cwd=work)
    run("gcc", "-O1", "-o", PROGRAM, "total.c", "-Llib", "-ltable", "-Wl,-rpath,$ORIGIN/../lib", cwd=work)
    return (work / PROGRAM).read_bytes(), (work / LIBRARY).read_bytes(), sum(table)
