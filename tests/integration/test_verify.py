"""`fsmount verify` over a real cache: what is sound is left alone, what is not is dropped, told, and fetched again."""

import json
import os
import pty
import random
import re
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests import peers
from tests.fakes.tar import Member, archive
from tests.integration.program import command, environment, fsmount, mounted, run

pytestmark = pytest.mark.integration

_FILES = {b"large": random.Random(1).randbytes(30_000_000), b"small": b"small\n" * 100}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = tmp_path_factory.mktemp("image") / "layout"
    tar = archive(*(Member(name, data) for name, data in _FILES.items()))
    peers.tar_layer_image(layout, "v1", [peers.pack(tar, level=1)])
    return layout


@pytest.fixture
def cache(tmp_path: Path, layout: Path) -> Path:
    """One in which all of the image is."""
    fsmount("prefetch", f"oci-layout:{layout}:v1", "--all", cache=tmp_path / "cache")
    fsmount("ls", f"oci-layout:{layout}:v1", cache=tmp_path / "cache")
    return tmp_path / "cache"


def verify(cache: Path, *, code: int = 0) -> dict[str, Any]:
    said = fsmount("verify", "--json", cache=cache, code=code)
    found = json.loads(said.stdout)
    assert found["version"] == 1
    assert (b"were damaged" in said.stderr) == (code == 7)
    checked = found["checked"]
    assert list(checked) == ["tables", "chunks", "manifests", "indexes", "trees"]
    assert sum(one["bad"] for one in checked.values()) == len(found["problems"])
    return found  # type: ignore[no-any-return]


def chunks(cache: Path) -> list[Path]:
    return sorted((cache / "chunks").rglob("*.val"))


def flip(path: Path) -> None:
    """One bit, and nobody sees by its times that it was changed."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_sound_cache_is_told_to_be_sound_and_stays_as_it_is(cache: Path) -> None:
    files = [path for path in cache.rglob("*") if path.is_file() and "cache.db" not in path.name]
    before = {path: path.read_bytes() for path in files}
    checked = verify(cache)["checked"]
    assert {kind: one["checked"] for kind, one in checked.items()} == {
        "tables": 2,
        "chunks": len(chunks(cache)),
        "manifests": 2,
        "indexes": 1,
        "trees": 1,
    }
    assert checked["chunks"]["bytes"] >= 30_000_000
    said = fsmount("verify", cache=cache)
    assert said.stderr == b""
    lines = said.stdout.decode().splitlines()
    assert re.fullmatch(rf"cache {cache}: \d+ bytes read", lines[0])
    assert lines[1:] == [
        "  tables: 2 looked at, all sound",
        f"  chunks: {len(chunks(cache))} looked at, all sound",
        "  manifests: 2 looked at, all sound",
        "  indexes: 1 looked at, all sound",
        "  trees: 1 looked at, all sound",
    ]
    assert {path: path.read_bytes() for path in files} == before


def test_an_empty_cache_is_sound(tmp_path: Path) -> None:
    checked = verify(tmp_path / "cache")["checked"]
    assert sum(one["checked"] for one in checked.values()) == 2


def test_chunks_that_are_not_what_was_stored_are_dropped_and_fetched_again(cache: Path, layout: Path) -> None:
    some = chunks(cache)
    flip(some[0])
    some[1].write_bytes(b"")
    some[2].unlink()  # counts as evicted
    found = verify(cache, code=7)
    assert found["checked"]["chunks"] == {
        "checked": len(some) - 1,
        "bytes": found["checked"]["chunks"]["bytes"],
        "bad": 2,
        "dropped": 2,
    }
    for problem in found["problems"]:
        assert problem["kind"] == "chunks" and problem["dropped"]
        assert problem["problem"] == "its bytes are not those that were stored"
        assert re.fullmatch(r"sha256-[0-9a-f]{64}/\d+", problem["name"])
    assert len(chunks(cache)) == len(some) - 3
    verify(cache)
    assert fsmount("cat", f"oci-layout:{layout}:v1", "large", cache=cache).stdout == _FILES[b"large"]


@pytest.mark.parametrize(
    ("folder", "kind"), [("manifests", "manifests"), ("layers", "indexes"), ("trees", "trees")]
)
def test_other_files_that_are_damaged_are_dropped_and_made_again(
    cache: Path, layout: Path, folder: str, kind: str
) -> None:
    (path, *_) = sorted((cache / folder).iterdir())
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 3)
        file.write(b"\xff" * (size // 3))
    (problem,) = verify(cache, code=7)["problems"]
    assert (problem["kind"], problem["name"], problem["dropped"]) == (kind, f"{folder}/{path.name}", True)
    assert not path.exists()
    fsmount("snapshot", f"oci-layout:{layout}:v1", cache.parent / "DEST", cache=cache)
    assert (cache.parent / "DEST/large").read_bytes() == _FILES[b"large"]
    assert path.exists()
    verify(cache)


def _spoil(path: Path) -> None:
    """So that it still opens: a page in the middle of it is of another kind."""
    with path.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(b"\x0d\xff" * 2048)


def test_a_damaged_table_of_chunks_is_begun_anew(cache: Path, layout: Path) -> None:
    with closing(sqlite3.connect(cache / "chunks/cache.db")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    _spoil(cache / "chunks/cache.db")
    problems = verify(cache, code=7)["problems"]
    assert {problem["kind"] for problem in problems} == {"tables"}
    verify(cache)
    assert fsmount("cat", f"oci-layout:{layout}:v1", "large", cache=cache).stdout == _FILES[b"large"]


def test_what_is_being_made_is_not_looked_at(cache: Path) -> None:
    partial = cache / "layers/.partial-xyz"
    partial.write_bytes(b"half of it")
    verify(cache)
    assert partial.read_bytes() == b"half of it"


def test_a_mount_goes_on_while_its_cache_is_verified_and_reads_what_was_dropped_anew(
    cache: Path, layout: Path
) -> None:
    with mounted(cache.parent, f"web=oci-layout:{layout}") as path:
        assert (path / "web/v1/large").read_bytes() == _FILES[b"large"]
        verify(cache)
        for chunk in chunks(cache)[::2]:
            flip(chunk)
        verify(cache, code=7)
        descriptor = os.open(path / "web/v1/large", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        assert (path / "web/v1/large").read_bytes() == _FILES[b"large"]
        verify(cache)


def test_no_more_than_twenty_are_listed_for_people(cache: Path) -> None:
    for number in range(25):
        (cache / f"manifests/sha256-{number:064x}").write_bytes(b"no")
    said = run("verify", cache=cache)
    assert said.returncode == 7
    lines = said.stdout.decode().splitlines()
    assert "  manifests: 27 looked at, 25 bad, 25 dropped" in lines
    assert len([line for line in lines if line.startswith("  manifests: manifests/sha256-")]) == 20
    assert lines[-1] == "  and 5 more, which --json lists"
    assert b"25 of " in said.stderr and b"fetched or made again" in said.stderr


def test_on_a_terminal_it_shows_how_far_it_is(cache: Path) -> None:
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        command("verify"), env=environment(cache), stdout=subprocess.PIPE, stderr=follower, text=True
    )
    os.close(follower)
    with child:
        said = _read_all(lambda: os.read(leader, 10_000))
    os.close(leader)
    assert child.returncode == 0
    assert b"reading" in said


def _read_all(read: Callable[[], bytes]) -> bytes:
    said = b""
    try:
        while piece := read():
            said += piece
    except OSError:  # the other end is closed
        pass
    return said
