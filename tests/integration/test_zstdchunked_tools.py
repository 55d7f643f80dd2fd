"""Layers that buildah compresses as zstd:chunked are read by their tables as tar reads them."""

import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard

from fsmount.archive.entry import Entry, EntryType
from fsmount.archive.scan import TarScanner
from fsmount.archive.toc import Toc
from fsmount.archive.zstdchunked import TAIL_SIZE, find_position, read_mark, read_toc
from tests import peers
from tests.fakes.estargz import contents

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(why := peers.have("buildah", "skopeo")), reason=why),
    pytest.mark.skipif(os.geteuid() != 0, reason="buildah mounts its containers as root"),
]

#: It writes the annotations as they were called until 2022, and a footer of 40 bytes.
LEGACY = "io.containers.zstd-chunked."


@dataclass(frozen=True)
class Layer:
    """A layer as a tool stored it, and its descriptor's annotations."""

    blob: bytes
    annotations: dict[str, str]

    def tar(self) -> bytes:
        """What it is for everybody who does not know of tables."""
        return zstandard.ZstdDecompressor().stream_reader(self.blob, read_across_frames=True).read()

    def toc(self) -> Toc:
        mark = read_mark(self.annotations, len(self.blob))
        assert mark is not None and mark.position is not None
        data = self.blob[mark.position.offset : mark.position.stop]
        return read_toc(data, mark.position, checksum=mark.checksum, max_size=1 << 30)


def _tree(root: Path) -> None:
    """Files of one chunk and of many, with holes and without; and one of everything else."""
    noise = random.Random(5)
    (root / "bin" / "deep").mkdir(parents=True)
    (root / "bin" / "tool").write_bytes(b"#!/bin/sh\necho tool\n")
    (root / "bin" / "tool").chmod(0o4755)
    os.link(root / "bin" / "tool", root / "bin" / "tool-again")
    (root / "bin" / "deep" / "data").write_bytes(noise.randbytes(700_000))
    (root / "holey").write_bytes(noise.randbytes(100_000) + bytes(400_000) + noise.randbytes(50_000))
    (root / "ends-in-zeros").write_bytes(noise.randbytes(3000) + bytes(300_000))
    (root / "begins-with-zeros").write_bytes(bytes(300_000) + noise.randbytes(3000))
    (root / "zeros").write_bytes(bytes(700_000))
    (root / "empty").touch()
    (root / "ümlaut").write_text("a name of two bytes a letter\n")
    (root / ("n" * 200)).write_text("a long name\n")
    (root / "link").symlink_to("/no/where")
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", 0o020666, os.makedev(1, 3))
    os.chown(root / "empty", 1234, 70_000)
    os.setxattr(root / "empty", "user.note", b"\0\xff=\n")
    for number in range(300):
        (root / "bin" / f"{number}").write_bytes(noise.randbytes(number))


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What buildah pushed: an image of one layer, in a folder of skopeo's form `dir`."""
    work = tmp_path_factory.mktemp("chunked")
    store = ("--storage-driver", "vfs", "--root", str(work / "root"), "--runroot", str(work / "run"))
    container = peers.run("buildah", *store, "from", "scratch").strip()
    _tree(Path(peers.run("buildah", *store, "mount", container).strip()))
    peers.run("buildah", *store, "commit", "--quiet", container, "localhost/made")
    chunked = ("--quiet", "--compression-format", "zstd:chunked")
    peers.run("buildah", *store, "push", *chunked, "localhost/made", f"dir:{work / 'pushed'}")
    peers.run("buildah", *store, "rm", container)
    yield work / "pushed"
    shutil.rmtree(work)


@pytest.fixture(scope="module")
def layer(pushed: Path) -> Layer:
    return _layer(json.loads((pushed / "manifest.json").read_text()), pushed)


def _layer(manifest: dict[str, Any], folder: Path) -> Layer:
    (descriptor,) = manifest["layers"]
    assert descriptor["mediaType"].endswith("tar+zstd")
    blob = (folder / descriptor["digest"].removeprefix("sha256:")).read_bytes()
    return Layer(blob, descriptor["annotations"])


def _without_extents(entry: Entry) -> Entry:
    fields = {name: getattr(entry, name) for name in Entry.__dataclass_fields__}
    return Entry(**fields | {"extents": ()})


def test_the_table_says_what_the_tar_does(layer: Layer) -> None:
    scanner = TarScanner()
    scanned = scanner.feed(layer.tar())
    scanner.finish()
    entries = layer.toc().table.entries
    assert list(map(_without_extents, entries)) == list(map(_without_extents, scanned))
    assert {entry.type for entry in entries} == set(EntryType) - {EntryType.BLOCK}


def test_every_file_read_by_the_table_is_as_tar_extracts_it(layer: Layer, tmp_path: Path) -> None:
    (tmp_path / "layer.tar").write_bytes(layer.tar())
    (tmp_path / "tree").mkdir()
    peers.run("tar", "-xf", tmp_path / "layer.tar", "-C", tmp_path / "tree")
    table = layer.toc().table
    for entry, (path, content) in zip(table.entries, contents(table, layer.blob), strict=True):
        if entry.type is EntryType.FILE:
            assert content == (tmp_path / "tree" / os.fsdecode(path)).read_bytes(), path


def test_files_are_of_many_chunks_and_holes_are_not_fetched(layer: Layer) -> None:
    table = layer.toc().table
    by_path = {entry.path: entry for entry in table.entries}
    sizes = [[extent.size for extent in by_path[name].extents] for name in (b"bin/deep/data", b"holey")]
    assert sizes == [[700_000], [100_000, 50_000]]
    assert len(table.spans) > len(table.entries)
    with tarfile.open(fileobj=io.BytesIO(layer.tar())) as archive:
        assert sum(span.size for span in table.spans) < sum(info.size for info in archive)


def test_debian_s_buildah_writes_the_old_names_and_the_short_footer(layer: Layer) -> None:
    assert set(layer.annotations) == {LEGACY + "manifest-checksum", LEGACY + "manifest-position"}
    mark = read_mark(layer.annotations, len(layer.blob))
    assert mark is not None
    assert find_position(layer.blob[-TAIL_SIZE:], len(layer.blob)) == mark.position
    assert layer.blob[-48:-40] == b"\x50\x2a\x4d\x18" + (40).to_bytes(4, "little")


def test_skopeo_copies_the_layer_as_it_is_with_its_annotations(
    pushed: Path, layer: Layer, tmp_path: Path
) -> None:
    layout = tmp_path / "layout"
    peers.skopeo_copy(f"dir:{pushed}", f"oci:{layout}:v1")
    (top,) = json.loads((layout / "index.json").read_text())["manifests"]
    blobs = layout / "blobs" / "sha256"
    manifest = json.loads((blobs / top["digest"].removeprefix("sha256:")).read_text())
    assert _layer(manifest, blobs) == layer
