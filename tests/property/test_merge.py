"""The merged tree of any layers is what a naive unpacking of them would leave, and any read is a slice."""

import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from fsmount.archive.entry import EntryType
from fsmount.configfile import load_config
from fsmount.engine import open_engine
from fsmount.errors import Invalid
from fsmount.tree import StoredTree, directory_key
from tests import peers

_NAMES = st.sampled_from(["a", "b", "c", "d"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map("/".join)


@dataclass(frozen=True)
class Member:
    kind: str
    path: str
    content: bytes = b""
    target: str = ""


_MEMBERS = st.one_of(
    st.builds(Member, st.just("file"), _PATHS, st.binary(max_size=40)),
    st.builds(Member, st.just("dir"), _PATHS),
    st.builds(Member, st.just("symlink"), _PATHS, st.just(b""), _PATHS),
    st.builds(Member, st.just("link"), _PATHS, st.just(b""), _PATHS),
    st.builds(Member, st.just("whiteout"), _PATHS),
    st.builds(Member, st.just("opaque"), _PATHS),
)
_LAYERS = st.lists(st.lists(_MEMBERS, max_size=8), min_size=1, max_size=3)

#: A naive tree: a folder is a dict, anything else (kind, content or target).
Tree = dict[str, object]


_NOWHERE = "a hardlink to nothing"


class Broken(Exception):
    """The layers say something that no unpacking could do."""


def _unpack(layers: list[list[Member]]) -> Tree:
    """The image specification's words, taken one by one; implied parents replace what is no folder."""
    tree: Tree = {}
    for layer in layers:
        for member in layer:
            *folders, name = member.path.split("/")
            if member.kind == "whiteout":
                parent = _get(tree, folders)
                if isinstance(parent, dict):
                    parent.pop(name, None)
            elif member.kind == "opaque":
                target = _get(tree, [*folders, name])
                if isinstance(target, dict):
                    target.clear()
        own: Tree = {}
        for member in layer:
            if member.kind in ("whiteout", "opaque"):
                continue
            *folders, name = member.path.split("/")
            if member.kind == "link":
                if member.target == member.path:
                    raise Broken
                wanted = member.target.split("/")
                found = _get(own, wanted)
                if isinstance(found, dict):
                    raise Broken
                if found is None:
                    found = ("lower", member.target)
                _make(own, folders)[name] = found
            elif member.kind == "dir":
                _make(own, [*folders, name])
            else:
                value = member.content if member.kind == "file" else member.target
                _make(own, folders)[name] = (member.kind, value)
        lower = _copy(tree)
        _overlay(tree, own)
        _resolve(tree, own, lower)
    if _NOWHERE in dict(_flat(tree)).values():
        raise Broken
    return tree


def _get(tree: object, names: list[str]) -> object:
    for name in names:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(name)
    return tree


def _make(tree: Tree, names: list[str]) -> Tree:
    for name in names:
        below = tree.get(name)
        if not isinstance(below, dict):
            below = tree[name] = {}
        tree = below
    return tree


def _copy(tree: object) -> object:
    return {name: _copy(below) for name, below in tree.items()} if isinstance(tree, dict) else tree


def _overlay(tree: Tree, own: Tree) -> None:
    for name, below in own.items():
        if isinstance(below, dict):
            _overlay(_make(tree, [name]), below)
        else:
            tree[name] = below


def _resolve(tree: Tree, own: Tree, lower: object) -> None:
    for name, below in own.items():
        if isinstance(below, dict):
            inner = tree.get(name)
            assert isinstance(inner, dict)
            _resolve(inner, below, lower)
        elif isinstance(below, tuple) and below[0] == "lower":
            found = _get(lower, below[1].split("/"))
            # It only matters if nobody hides it.
            tree[name] = _NOWHERE if found is None or isinstance(found, dict) else found


def _tar(layer: list[Member]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member in layer:
            folder, _, name = member.path.rpartition("/")
            prefix = folder + "/" if folder else ""
            info = tarfile.TarInfo(member.path)
            if member.kind == "whiteout":
                info.name = f"{prefix}.wh.{name}"
            elif member.kind == "opaque":
                info.name = f"{member.path}/.wh..wh..opq"
            elif member.kind == "dir":
                info.type = tarfile.DIRTYPE
            elif member.kind == "symlink":
                info.type, info.linkname = tarfile.SYMTYPE, member.target
            elif member.kind == "link":
                info.type, info.linkname = tarfile.LNKTYPE, member.target
            info.size = len(member.content)
            archive.addfile(info, io.BytesIO(member.content))
    return data.getvalue()


def _flat(tree: Tree, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, below in tree.items():
        yield prefix + name, "dir" if isinstance(below, dict) else below
        if isinstance(below, dict):
            yield from _flat(below, f"{prefix}{name}/")


async def _merged(folder: Path, start: int, size: int) -> dict[str, object]:
    """The same of the program, through the look-ups of the overlay and the listing of the stored tree."""
    config = load_config(cache=folder / "cache", environ={})
    result: dict[str, object] = {}
    async with open_engine(config) as engine:
        app, version = engine.find(f"oci-layout:{folder / 'layout'}:v1")
        content = await engine.catalog.open(app, version)
        tree = content.tree
        for layer in tree.layers:
            await layer.wait_complete()
        looked = await tree.walk([b"a"])
        stored: StoredTree = await tree.stored()
        again = stored.lookup(content.root, b"a")
        assert (looked and looked.member) == (again and again.member)
        waiting = [("", content.root)]
        while waiting:
            prefix, key = waiting.pop()
            for child in stored.children(key):
                node, path = child.node, prefix + child.node.name.decode()
                assert stored.lookup(key, node.name) == node
                if node.is_directory:
                    result[path] = "dir"
                    waiting.append((path + "/", directory_key(node)))
                elif node.member.type is EntryType.SYMLINK:
                    result[path] = ("symlink", node.member.link.decode())
                else:
                    layer = tree.layers[node.layer]
                    whole = await layer.read(node.member.number, 0, 1000)
                    assert await layer.read(node.member.number, start, size) == whole[start : start + size]
                    result[path] = ("file", whole)
    return result


@settings(max_examples=100, deadline=None)
@given(layers=_LAYERS, start=st.integers(0, 50), size=st.integers(0, 50))
def test_a_merged_tree_is_what_a_naive_unpacking_leaves(
    layers: list[list[Member]], start: int, size: int
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        peers.tar_layer_image(folder / "layout", "v1", [peers.pack(_tar(layer), "tar") for layer in layers])
        try:
            expected: dict[str, object] | None = dict(_flat(_unpack(layers)))
        except Broken:
            expected = None
        try:
            merged: dict[str, object] | None = trio.run(_merged, folder, start, size)
        except Invalid:
            merged = None
        assert merged == expected
