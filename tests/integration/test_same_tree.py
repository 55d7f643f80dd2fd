"""The mount, the snapshot and umoci's unpack of one image are the same tree."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import peers
from tests.integration.program import fsmount, mounted

pytestmark = [
    pytest.mark.integration,
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="owners, devices and umoci need root"),
]

#: umoci sets the times of folders that no layer describes to now; we say the epoch.
_BY_UMOCI = ("links", "xattrs")


def _first(root: Path) -> None:
    """A tree with one of everything."""
    (root / "bin").mkdir()
    (root / "bin" / "tool").write_bytes(b"#!/bin/sh\necho tool\n")
    (root / "bin" / "tool").chmod(0o755)
    os.link(root / "bin" / "tool", root / "bin" / "tool-again")
    (root / "lib" / "deep" / "deeper").mkdir(parents=True)
    (root / "lib" / "deep" / "deeper" / "data").write_bytes(os.urandom(300_000))
    (root / "lib" / "gone").write_text("an upper layer removes this\n")
    (root / "lib" / "gone-folder").mkdir()
    (root / "lib" / "gone-folder" / "inside").write_text("and this\n")
    (root / "swap").write_text("a file, later a folder\n")
    (root / "paws").mkdir()
    (root / "paws" / "inside").write_text("a folder, later a file\n")
    (root / "turn").symlink_to("bin/tool")
    (root / "dangling").symlink_to("/no/where")
    (root / "empty").touch()
    (root / "opaque").mkdir()
    (root / "opaque" / "old").write_text("hidden by an opaque folder\n")
    (root / os.fsdecode(b"not-utf8-\xff\xfe")).write_text("bytes\n")
    (root / ("n" * 255)).write_text("a long name\n")
    with (root / "sparse").open("wb") as file:
        file.truncate(3_000_000)
        file.seek(1_500_000)
        file.write(b"island")
    os.mkfifo(root / "fifo")
    (root / "setuid").write_text("x")
    (root / "setuid").chmod(0o4755)
    os.chown(root / "empty", 1234, 4321)
    _age(root)


def _second(root: Path) -> None:
    """What a later build changes."""
    (root / "lib" / "gone").unlink()
    shutil.rmtree(root / "lib" / "gone-folder")
    (root / "swap").unlink()
    (root / "swap").mkdir()
    (root / "swap" / "now").write_text("a folder\n")
    shutil.rmtree(root / "paws")
    (root / "paws").write_text("a file\n")
    (root / "turn").unlink()
    (root / "turn").write_text("no link any more\n")
    shutil.rmtree(root / "opaque")
    (root / "opaque").mkdir()
    (root / "opaque" / "new").write_text("all there is\n")
    (root / "bin" / "tool").unlink()  # its other name keeps the content
    _age(root, 86_400)


def _third(root: Path) -> None:
    (root / "lib" / "gone").write_text("back again\n")
    (root / "bin" / "tool").write_text("another tool\n")
    _age(root, 172_800)


def _age(root: Path, plus: int = 0) -> None:
    for folder, folders, files in os.walk(os.fsencode(root), topdown=False):
        for number, name in enumerate(sorted(folders + files)):
            path = folder + b"/" + name
            if os.lstat(path).st_mtime > 1_600_100_000 + plus:
                os.utime(path, (1_600_000_000, 1_600_000_000 + plus + number), follow_symlinks=False)
    os.utime(root, (1_600_000_000, 1_600_000_000 + plus))


def _umoci(layout: Path, work: Path) -> None:
    tree = work / "tree"
    tree.mkdir()
    _first(tree)
    new = work / "new"
    new.mkdir()
    (new / "file").write_text("inserted\n")
    _age(new)
    peers.umoci_layout(
        layout,
        "v1",
        (tree, "/"),
        (new, "/lib/added"),
        (None, "/lib/gone"),
        (None, "/lib/gone-folder"),
        (None, "/swap"),
    )


def _buildah(layout: Path, work: Path) -> None:
    peers.buildah_image(layout, "v1", [_first, _second, _third], work=work / "store")


def _skopeo(layout: Path, work: Path) -> None:
    _umoci(work / "original", work)
    peers.skopeo_copy(f"oci:{work / 'original'}:v1", f"oci:{layout}:v1", "--dest-compress-format", "zstd")


@pytest.fixture(scope="module", params=[_umoci, _buildah, _skopeo], ids=["umoci", "buildah", "skopeo-zstd"])
def layout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    maker: Callable[[Path, Path], None] = request.param
    missing = peers.have("umoci", "skopeo", "buildah", "docker-registry")
    if missing:
        pytest.skip(missing)
    work = tmp_path_factory.mktemp("image")
    maker(work / "layout", work)
    return work / "layout"


@contextmanager
def _unpacked(layout: Path, work: Path) -> Iterator[dict[bytes, peers.Node]]:
    """What umoci makes of the image; umoci 0.4 reads no zstd, so that skopeo inflates it first."""
    readable = work / "readable"
    peers.skopeo_copy(
        f"oci:{layout}:v1", f"oci:{readable}:v1", "--dest-compress-format", "gzip", "--dest-compress"
    )
    yield peers.tree_listing(peers.umoci_unpack(readable, "v1", work / "unpacked"), leave_out=_BY_UMOCI)


def _without_times(tree: dict[bytes, peers.Node], folders: set[bytes]) -> dict[bytes, peers.Node]:
    from dataclasses import replace

    return {path: replace(node, mtime_ns=0) if path in folders else node for path, node in tree.items()}


def test_the_mount_the_snapshot_and_umoci_agree_on_every_file(layout: Path, tmp_path: Path) -> None:
    source = f"oci-layout:{layout}"
    fsmount("snapshot", f"{source}:v1", tmp_path / "snapshot", "--keep-privileges", cache=tmp_path / "cache")
    snapshot = peers.tree_listing(tmp_path / "snapshot", leave_out=_BY_UMOCI)
    with mounted(tmp_path, f"app={source}") as mountpoint:
        mount = peers.tree_listing(mountpoint / "app" / "v1", leave_out=_BY_UMOCI)
    with _unpacked(layout, tmp_path) as unpacked:
        # The root of a view shows the time of creation; umoci's root, and folders it had to make, the time of now.
        now = {
            path
            for path, node in unpacked.items()
            if node.kind == "folder" and node.mtime_ns > 1_700_000_000e9
        }
        loose = now | {b"."}
        assert peers.differences(_without_times(mount, loose), _without_times(snapshot, loose)) == []
        assert peers.differences(_without_times(snapshot, loose), _without_times(unpacked, loose)) == []


def test_hardlinks_are_hardlinks_in_mount_and_snapshot(layout: Path, tmp_path: Path) -> None:
    source = f"oci-layout:{layout}"
    fsmount("snapshot", f"{source}:v1", tmp_path / "snapshot", cache=tmp_path / "cache")
    snapshot = peers.tree_listing(tmp_path / "snapshot", leave_out=("xattrs", "mode", "mtime_ns"))
    with mounted(tmp_path, f"app={source}") as mountpoint:
        mount = peers.tree_listing(mountpoint / "app" / "v1", leave_out=("xattrs", "mode", "mtime_ns"))
    assert peers.differences(mount, snapshot) == []


def test_a_registry_shows_the_same_tree_as_the_layout(layout: Path, tmp_path: Path) -> None:
    with peers.docker_registry(tmp_path / "registry") as registry:
        peers.push(layout, "v1", registry.host, "team/app")
        apps = (f"here=oci-layout:{layout}", f"there={registry.host}/team/app")
        with mounted(tmp_path, *apps) as mountpoint:
            here = peers.tree_listing(mountpoint / "here" / "v1", leave_out=("links",))
            there = peers.tree_listing(mountpoint / "there" / "v1", leave_out=("links",))
        assert peers.differences(here, there) == []


def test_a_snapshot_grants_no_more_than_the_mount(layout: Path, tmp_path: Path) -> None:
    fsmount("snapshot", f"oci-layout:{layout}:v1", tmp_path / "snapshot", cache=tmp_path / "cache")
    tree = peers.tree_listing(tmp_path / "snapshot", leave_out=("sha256",))
    assert b"setuid" in tree
    assert not [path for path, node in tree.items() if node.mode & 0o6000 or node.kind in ("char", "block")]


@pytest.mark.parametrize("packing", ["gzip", "gzip-members", "tar", "zstd", "docker-gzip", "docker-tar"])
def test_every_packing_of_a_layer_gives_the_same_bytes(packing: peers.Packing, tmp_path: Path) -> None:
    import io
    import tarfile

    content = os.urandom(3_000_000) + b"words " * 1_000_000
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        member = tarfile.TarInfo("folder/file")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    layer = peers.pack(tar.getvalue(), packing)
    peers.tar_layer_image(tmp_path / "layout", "v1", [layer], docker=packing.startswith("docker"))
    fsmount("snapshot", f"oci-layout:{tmp_path / 'layout'}:v1", tmp_path / "out", cache=tmp_path / "cache")
    assert (tmp_path / "out" / "folder" / "file").read_bytes() == content


def test_artifacts_of_oras_are_trees_too(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    (folder / "css").mkdir(parents=True)
    (folder / "css" / "main.css").write_text("body {}\n")
    peers.oras_artifact(tmp_path / "layout", "v1", {"readme.txt": b"hello\n", "empty": b"", "site": folder})
    with mounted(tmp_path, f"app=oci-layout:{tmp_path / 'layout'}") as mountpoint:
        root = mountpoint / "app" / "v1"
        assert (root / "readme.txt").read_bytes() == b"hello\n"
        assert (root / "empty").read_bytes() == b""
        assert (root / "site" / "css" / "main.css").read_text() == "body {}\n"
        assert sorted(os.listdir(root)) == ["empty", "readme.txt", "site"]


def test_an_unreachable_registry_takes_nothing_from_other_apps(tmp_path: Path) -> None:
    peers.oras_artifact(tmp_path / "layout", "v1", {"readme.txt": b"hello\n"})
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        apps = (
            f"dead=127.0.0.1:{unused.getsockname()[1]}/team/app",
            f"alive=oci-layout:{tmp_path / 'layout'}",
        )
        with mounted(tmp_path, *apps) as mountpoint:
            with pytest.raises(OSError) as caught:
                os.listdir(mountpoint / "dead")
            assert os.strerror(caught.value.errno or 0) == "No route to host"
            assert os.listdir(mountpoint / "alive") == ["v1"]
