"""What production does with a mount: runs programs from it, and reads large, many and oddly named files."""

import ctypes
import errno
import hashlib
import mmap
import os
import random
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import AnyStr

import pytest
import zstandard

from tests import peers
from tests.fakes.tar import (
    CHAR,
    DIRECTORY,
    END,
    FIFO,
    SYMLINK,
    Member,
    archive,
    long_link,
    long_name,
    sparse,
)
from tests.integration.program import mounted

pytestmark = [
    pytest.mark.integration,
    pytest.mark.mount,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"
    ),
]


@contextmanager
def _shown(*layers: peers.LayerBlob, config: str = "") -> Iterator[Path]:
    """The root of an image of these layers, mounted; layout and cache vanish afterwards."""
    with TemporaryDirectory(prefix="running-") as folder:
        work = Path(folder)
        peers.tar_layer_image(work / "layout", "v1", layers)
        with mounted(work, f"app=oci-layout:{work / 'layout'}", config=config) as mountpoint:
            yield mountpoint / "app" / "v1"


def _said(*command: str | Path) -> str:
    """What a program prints; that it complains, or has a problem with the mount, is a failure."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# -------------------- programs

_TABLE = random.Random(1).randbytes(5_000_000)

_LIBRARY = """
#define _GNU_SOURCE
#include <dlfcn.h>
__asm__(".section .rodata\\n.global table\\ntable: .incbin \\"table\\"\\n.previous");
extern const unsigned char table[];
unsigned long sum(void) {
    unsigned long total = 0;
    for (long i = 0; i < 5000000; i++) total += table[i];
    return total;
}
const char *home(void) {
    Dl_info info;
    return dladdr((void *)sum, &info) ? info.dli_fname : "nowhere";
}
"""

_PROGRAM = """
#include <stdio.h>
unsigned long sum(void);
const char *home(void);
int main(void) { return printf("%lu %s\\n", sum(), home()) < 0; }
"""


def _compile(root: Path, work: Path) -> None:
    """bin/total, and the library lib/libtable.so that only its own rpath leads to."""
    (work / "table").write_bytes(_TABLE)
    (work / "table.c").write_text(_LIBRARY)
    (work / "total.c").write_text(_PROGRAM)
    library, program = root / "lib/libtable.so", root / "bin/total"
    peers.run("gcc", "-shared", "-fPIC", "-o", library, "table.c", "-ldl", cwd=work)
    rpath = "-Wl,-rpath,$ORIGIN/../lib"
    peers.run("gcc", "-o", program, "total.c", "-L", library.parent, "-ltable", rpath, cwd=work)
    (root / "bin/script").write_text('#!/bin/sh\nexec "${0%/*}/total"\n')
    (root / "bin/script").chmod(0o755)


def _write_python(root: Path) -> None:
    """A program of a package with a module, a subpackage and a data file."""
    (root / "greeting/words").mkdir(parents=True)
    (root / "__main__.py").write_text("from greeting import greet\n\nprint(greet())\n")
    (root / "greeting/__init__.py").write_text(
        "from importlib.resources import files\n\nfrom greeting.words import first\n\n\n"
        "def greet():\n    return first.HELLO + files('greeting').joinpath('name.txt').read_text()\n"
    )
    (root / "greeting/name.txt").write_text("wörld")
    (root / "greeting/words/__init__.py").touch()
    (root / "greeting/words/first.py").write_text("HELLO = 'hello '\n")


def _write_node(root: Path) -> None:
    """A program with a module of its own, and a dependency that its package.json describes."""
    package = root / "node_modules/greeting"
    (package / "lib").mkdir(parents=True)
    (root / "main.js").write_text("console.log(require('greeting') + require('./name').name)\n")
    (root / "name.js").write_text("exports.name = 'wörld'\n")
    (package / "package.json").write_text('{"name": "greeting", "main": "lib/greeting.js"}')
    (package / "lib/greeting.js").write_text("module.exports = 'hello '\n")


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    """An image of umoci's with three programs, mounted."""
    if why := peers.have("umoci", "gcc"):
        pytest.skip(why)
    with TemporaryDirectory(prefix="running-") as folder:
        work = Path(folder)
        tree = work / "tree"
        for name in ("bin", "lib", "python", "node"):
            (tree / name).mkdir(parents=True)
        _compile(tree, work)
        _write_python(tree / "python")
        _write_node(tree / "node")
        peers.umoci_layout(work / "layout", "v1", (tree, "/"))
        with mounted(work, f"app=oci-layout:{work / 'layout'}") as mountpoint:
            yield mountpoint / "app" / "v1"


@pytest.mark.parametrize("name", ["total", "script"])
def test_an_executable_runs_with_the_shared_library_of_its_image(programs: Path, name: str) -> None:
    total, library = _said(programs / "bin" / name).split()
    assert int(total) == sum(_TABLE)
    assert os.path.normpath(library) == str(programs / "lib/libtable.so")


def test_an_executable_runs_in_many_processes_at_once(programs: Path) -> None:
    started = [subprocess.Popen([programs / "bin/total"], stdout=subprocess.PIPE) for _ in range(16)]
    said = {one.communicate(timeout=60)[0].split()[0] for one in started}
    assert said == {b"%d" % sum(_TABLE)}


def test_a_python_program_runs_with_its_packages_and_data(programs: Path) -> None:
    assert _said(sys.executable, "-X", "utf8", programs / "python") == "hello wörld\n"


def test_a_node_program_runs_with_its_dependencies(programs: Path) -> None:
    if why := peers.have("node"):
        pytest.skip(why)
    assert _said("node", programs / "node/main.js") == "hello wörld\n"


# -------------------- 2 GB in one file

_EDGE = 2**31 - 1
_BIG = 2**31 + 3_000_005
_BLOCK = 65536


def _expected(offset: int, size: int) -> bytes:
    """Part of the big file, in which every 16 bytes say in which block they are."""
    first = offset // _BLOCK
    blocks = range(first, (min(offset + size, _BIG) + _BLOCK - 1) // _BLOCK)
    text = b"".join(b"%015d\n" % number * (_BLOCK // 16) for number in blocks)
    return text[offset - first * _BLOCK : min(offset + size, _BIG) - first * _BLOCK]


def _write_big(blob: Path) -> peers.LayerBlob:
    """A layer with the big file between two small ones, written to `blob`: 2 MB for 2 GB."""
    step = 256 * _BLOCK
    diff_id = hashlib.sha256()

    def tar() -> Iterator[bytes]:
        yield bytes(Member(b"before", b"before\n"))
        yield Member(b"big", size=_BIG).header()
        for offset in range(0, _BIG, step):
            yield _expected(offset, step)
        yield bytes(-_BIG % 512) + archive(Member(b"after", b"after\n"))

    with blob.open("wb") as file, zstandard.ZstdCompressor(1).stream_writer(file) as packed:
        for piece in tar():
            diff_id.update(piece)
            packed.write(piece)
    return peers.LayerBlob(blob, f"{peers.OCI}layer.v1.tar+zstd", f"sha256:{diff_id.hexdigest()}")


@pytest.fixture(scope="module")
def big() -> Iterator[Path]:
    """A folder with `big`, whose bytes are all stored, and `sparse`, of the same size, mounted."""
    islands = [(0, b"start"), (_EDGE - 4, b"across the edge"), (_BIG - 3, b"end")]
    holes = peers.pack(archive(sparse("1.0", b"sparse", _BIG, islands)))
    with TemporaryDirectory(prefix="running-") as folder:
        layer = _write_big(Path(folder) / "blob")
        assert 64 * Path(folder, "blob").stat().st_size + 2**30 < _BIG  # else the bound need not be raised
        with _shown(layer, holes, config='[cache]\nmax_layer_size = "3 GiB"\n') as root:
            yield root


_PLACES = pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 100_000),
        (4 * 2**20 - 5, 10),
        (2**30 + 7, 3_000_000),
        (_EDGE - 1, 1),
        (_EDGE - 70_000, 140_000),
        (_EDGE, 2),
        (_EDGE + 1, 16),
        (_BIG - 1_000_000, 1_000_000),
        (_BIG - 1, 1),
    ],
)


@_PLACES
def test_a_file_of_2_gb_reads_right_at_any_offset(big: Path, offset: int, size: int) -> None:
    with (big / "big").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), size, offset) == _expected(offset, size)


@_PLACES
def test_a_file_of_2_gb_can_be_mapped_whole(big: Path, offset: int, size: int) -> None:
    with (
        (big / "big").open("rb") as file,
        mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as view,
    ):
        assert len(view) == _BIG
        assert view[offset : offset + size] == _expected(offset, size)


def test_a_file_of_2_gb_ends_where_it_ends(big: Path) -> None:
    assert (big / "big").stat().st_size == _BIG
    with (big / "big").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 1000, _BIG - 3) == _expected(_BIG - 3, 3)
        assert os.pread(file.fileno(), 1000, _BIG) == b""
        assert os.pread(file.fileno(), 1000, _BIG + 2**32) == b""
    assert (big / "before").read_bytes() + (big / "after").read_bytes() == b"before\nafter\n"


def test_a_sparse_file_of_2_gb_shows_its_holes_as_zeros(big: Path) -> None:
    assert (big / "sparse").stat().st_size == _BIG
    with (big / "sparse").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 9, 0) == b"start" + bytes(4)
        assert os.pread(file.fileno(), 19, _EDGE - 6) == bytes(2) + b"across the edge" + bytes(2)
        assert os.pread(file.fileno(), 100, _BIG - 5) == bytes(2) + b"end"
        assert os.pread(file.fileno(), 500_000, 2**30) == bytes(500_000)


def test_many_threads_read_all_over_a_large_file(big: Path) -> None:
    offsets = random.Random(2).sample(range(_BIG - 50_000), 200)
    with (big / "big").open("rb", buffering=0) as file, ThreadPoolExecutor(16) as pool:
        read = pool.map(lambda offset: os.pread(file.fileno(), 50_000, offset), offsets, timeout=60)
        assert [data == _expected(offset, 50_000) for offset, data in zip(offsets, read, strict=True)] == [
            True
        ] * 200


# -------------------- many files

_WIDE = 20_000
_FOLDERS = 80
_IN_EACH = 1_000


def _wide_names() -> list[bytes]:
    """Of all lengths, so that they fill the kernel's buffers in many ways."""
    return [b"%05d" % number + b"x" * (number * 7 % 90) for number in range(_WIDE)]


def _empty_files(names: Iterator[bytes]) -> bytes:
    """As Member would write them, forty times as fast."""
    blank = Member(b"").header()
    total = sum(blank[:148]) + 8 * ord(" ") + sum(blank[156:])
    headers = (
        name.ljust(100, b"\0") + blank[100:148] + b"%06o\0 " % (total + sum(name)) + blank[156:]
        for name in names
    )
    return b"".join(headers)


@pytest.fixture(scope="module")
def many() -> Iterator[Path]:
    """100,000 empty files, 20,000 of them in the folder `wide`, mounted."""
    narrow = (b"narrow/%02d/%03d" % (one, two) for one in range(_FOLDERS) for two in range(_IN_EACH))
    wide = (b"wide/" + name for name in _wide_names())
    with _shown(peers.pack(_empty_files(narrow) + _empty_files(wide) + END, level=1)) as root:
        yield root


def test_find_counts_100_000_files_in_one_tag(many: Path) -> None:
    assert len(_said("find", many, "-type", "f", "-empty", "-printf", "x")) == 100_000
    assert len(_said("find", many, "-type", "d", "-printf", "x")) == 3 + _FOLDERS


def test_the_last_of_100_000_files_is_a_look_up_away(many: Path) -> None:
    last = many / "wide" / os.fsdecode(_wide_names()[-1])
    assert stat.S_ISREG(last.stat().st_mode)
    assert last.read_bytes() == b""
    assert not last.with_name(f"{last.name}x").exists()


def test_all_100_000_files_have_inodes_of_their_own(many: Path) -> None:
    inodes = _said("find", many, "-printf", "%i\n").split()
    assert len(inodes) == len(set(inodes)) == 100_000 + 3 + _FOLDERS


def test_scandir_lists_20_000_entries_each_once(many: Path) -> None:
    with os.scandir(os.fsencode(many / "wide")) as entries:
        seen = [(entry.name, entry.inode(), entry.is_file()) for entry in islice(entries, 2 * _WIDE)]
    assert sorted(name for name, _, _ in seen) == sorted(_wide_names())
    assert all(is_file for _, _, is_file in seen)
    name, inode, _ = seen[12_345]
    assert os.stat(os.path.join(os.fsencode(many / "wide"), name)).st_ino == inode


def _without_dots(names: list[AnyStr]) -> list[AnyStr]:
    return sorted(name for name in names if name not in (".", "..", b".", b".."))


def test_ls_lists_20_000_entries_each_once(many: Path) -> None:
    listed = _said("ls", "-f", many / "wide").split()
    assert _without_dots(listed) == sorted(map(os.fsdecode, _wide_names()))


class _Listing:
    """readdir(3) and its relatives, of which Python shows only the first."""

    def __init__(self, path: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        for name in ("opendir", "readdir"):
            getattr(self._libc, name).restype = ctypes.c_void_p
        self._libc.telldir.restype = ctypes.c_long
        self._stream = ctypes.c_void_p(self._libc.opendir(os.fsencode(path)))
        assert self._stream.value

    def names(self, most: int) -> list[bytes]:
        names: list[bytes] = []
        while len(names) < most and (entry := self._libc.readdir(self._stream)):
            names.append(ctypes.string_at(entry + 19))  # d_name, after inode, offset, length and type
        return names

    def tell(self) -> int:
        return int(self._libc.telldir(self._stream))

    def seek(self, place: int) -> None:
        self._libc.seekdir(self._stream, ctypes.c_long(place))

    def rewind(self) -> None:
        self._libc.rewinddir(self._stream)

    def close(self) -> None:
        self._libc.closedir(self._stream)


@pytest.fixture
def listing(many: Path) -> Iterator[_Listing]:
    listing = _Listing(many / "wide")
    yield listing
    listing.close()


@pytest.mark.parametrize("read", [1, 2, 3, 777, 7_000, _WIDE - 1])
def test_a_listing_goes_on_from_wherever_it_is_set_back_to(listing: _Listing, read: int) -> None:
    before = listing.names(read)
    place = listing.tell()
    after = listing.names(2 * _WIDE)
    listing.seek(place)
    assert listing.names(2 * _WIDE) == after
    assert _without_dots(before + after) == sorted(_wide_names())


def test_a_listing_begins_again_when_it_is_rewound(listing: _Listing) -> None:
    first = listing.names(5_000)
    listing.rewind()
    assert listing.names(5_000) == first


# -------------------- odd names and kinds

_NAMES = {
    "not UTF-8": b"\xff\xfe\x80",
    "latin-1": "Grüße.txt".encode("latin-1"),
    "a newline": b"two\nlines",
    "blanks": b"  a b  ",
    "a backslash": b"back\\slash",
    "a control character": b"\x01\x1b[31m",
    "a hyphen first": b"-rf",
    "255 bytes": b"n" * 255,
    "255 bytes of UTF-8": "ä".encode() * 127 + b"n",
    "like a whiteout": b".whiteout",
    "the other case": b"BACK\\slash",
}
_NAME = pytest.mark.parametrize("name", list(_NAMES.values()), ids=list(_NAMES))
_LEVELS = 100
_TARGET = b"t" * 1000 + b"/" + b"u" * 3000


def _named(name: bytes, data: bytes = b"", type: bytes = b"0", link: bytes = b"") -> bytes:
    """A member whose name or target may be too long for its header."""
    head = bytes(long_name(name)) if len(name) > 100 else b""
    head += bytes(long_link(link)) if len(link) > 100 else b""
    return head + bytes(Member(name[:100], data, type=type, link=link[:100]))


def _deep(component: bytes) -> bytes:
    return b"/".join([component] * _LEVELS)


#: As long as a path may be: below a mount point it is too long to be opened in one step.
_DEEPEST = _deep(b"d" * 39) + b"/" + b"f" * 95


@pytest.fixture(scope="module")
def odd() -> Iterator[Path]:
    """Whatever a tree may hold beside usual names and files, mounted."""
    parts = [_named(b"names/" + name, name) for name in _NAMES.values()]
    parts += [_named(b"folders/" + name + b"/inside", name) for name in _NAMES.values()]
    parts += [
        _named(_deep(b"level") + b"/file", b"deep\n"),
        _named(_DEEPEST, b"deeper\n"),
    ]
    parts += [
        bytes(Member(b"empty", mtime=1_234_567_890)),
        bytes(Member(b"links/", type=DIRECTORY, mode=0o755)),
        bytes(Member(b"links/relative", type=SYMLINK, link=b"../names/-rf", mode=0o777)),
        bytes(Member(b"links/absolute", type=SYMLINK, link=b"/proc/self/comm")),
        bytes(Member(b"links/dangling", type=SYMLINK, link=b"no/\xff/where")),
        bytes(Member(b"links/loop", type=SYMLINK, link=b"loop")),
        _named(b"links/long", type=SYMLINK, link=_TARGET),
        bytes(Member(b"fifo", type=FIFO, mode=0o640, uid=12, gid=34, mtime=1_000_000_000)),
        bytes(Member(b"null", type=CHAR, mode=0o666, major=1, minor=3)),
    ]
    with _shown(peers.pack(b"".join(parts) + END)) as root:
        yield root


@_NAME
def test_a_file_of_any_name_opens_and_holds_its_own_bytes(odd: Path, name: bytes) -> None:
    with open(os.path.join(os.fsencode(odd), b"names", name), "rb") as file:
        assert file.read() == name


@_NAME
def test_a_folder_of_any_name_can_be_entered(odd: Path, name: bytes) -> None:
    folder = os.path.join(os.fsencode(odd), b"folders", name)
    assert os.listdir(folder) == [b"inside"]
    with open(os.path.join(folder, b"inside"), "rb") as file:
        assert file.read() == name


@pytest.mark.parametrize("folder", [b"names", b"folders"])
def test_all_names_are_listed_as_they_are(odd: Path, folder: bytes) -> None:
    assert sorted(os.listdir(os.path.join(os.fsencode(odd), folder))) == sorted(_NAMES.values())


def test_a_name_of_256_bytes_is_too_long(odd: Path) -> None:
    with pytest.raises(OSError) as caught:
        (odd / "names" / ("n" * 256)).stat()
    assert caught.value.errno == errno.ENAMETOOLONG


def test_an_empty_file_is_empty(odd: Path) -> None:
    assert (odd / "empty").read_bytes() == b""
    assert ((odd / "empty").stat().st_size, (odd / "empty").stat().st_mtime) == (0, 1_234_567_890)


def test_a_file_lies_100_folders_deep(odd: Path) -> None:
    assert (odd / os.fsdecode(_deep(b"level")) / "file").read_text() == "deep\n"


def test_a_file_lies_deeper_than_the_longest_path(odd: Path) -> None:
    assert len(os.fsencode(odd)) + len(_DEEPEST) > os.pathconf(odd, "PC_PATH_MAX")
    assert peers.tree_listing(odd)[_DEEPEST].sha256 == hashlib.sha256(b"deeper\n").hexdigest()


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("relative", b"../names/-rf"),
        ("absolute", b"/proc/self/comm"),
        ("dangling", b"no/\xff/where"),
        ("long", _TARGET),
    ],
)
def test_a_symlink_has_the_target_of_the_image(odd: Path, name: str, target: bytes) -> None:
    link = os.fsencode(odd / "links" / name)
    assert os.readlink(link) == target
    assert os.lstat(link).st_size == len(target)


def test_symlinks_lead_where_they_would_on_any_file_system(odd: Path) -> None:
    assert (odd / "links/relative").read_bytes() == b"-rf"
    assert (odd / "links/absolute").read_bytes() == Path("/proc/self/comm").read_bytes()
    for name, code in [("dangling", errno.ENOENT), ("loop", errno.ELOOP)]:
        with pytest.raises(OSError) as caught:
            (odd / "links" / name).read_bytes()
        assert caught.value.errno == code


def test_a_fifo_is_shown_as_in_the_image(odd: Path) -> None:
    status = (odd / "fifo").stat()
    assert (status.st_mode, status.st_uid, status.st_gid) == (stat.S_IFIFO | 0o640, 12, 34)
    assert status.st_mtime == 1_000_000_000


def test_a_device_is_shown_as_in_the_image_and_cannot_be_opened(odd: Path) -> None:
    status = (odd / "null").stat()
    assert (status.st_mode, status.st_rdev) == (stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with pytest.raises(PermissionError):
        (odd / "null").read_bytes()
