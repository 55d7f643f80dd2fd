"""A merged tree: answered from the layers while they stream, and from one file ever after."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fsmount import tree as tree_module
from fsmount.archive.entry import EntryType
from fsmount.errors import Corrupt, FsmountError, Invalid, NoSpace, NotFound, Unreachable
from fsmount.layer import Layers
from fsmount.lazy import LayerSpec
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor
from fsmount.overlay import Node, Overlay
from fsmount.tree import StoredTree, Tree, directory_key
from tests.fakes.source import CHUNK, Body, FakeSource, Gate, open_layers, small_chunks
from tests.fakes.tar import DIRECTORY, HARDLINK, SYMLINK, Member, archive

BULK = Random(1).randbytes(4 * CHUNK)
#: Where a layer may be held so that what is before its BULK has been seen, and nothing after it.
MIDDLE = 4 * CHUNK + 2048
LOWER = archive(
    Member(b"removed", b"x"),
    Member(b"shared/", type=DIRECTORY, mode=0o700),
    Member(b"shared/low", b"low"),
    Member(b"low", b"low"),
    Member(b"bulk-low", BULK),
    Member(b"late-low", b"x"),
)
UPPER = archive(
    Member(b"up", b"upper"),
    Member(b"own/", type=DIRECTORY, mode=0o750),
    Member(b"own/file", b"x"),
    Member(b"shared/up", b"x"),
    Member(b"bulk-up", BULK),
    Member(b"late-up", b"x"),
    Member(b".wh.removed"),
)
DIGEST = Digest.of(b"the manifest")
GONE = Unreachable("the registry went away")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
def blobs(source: FakeSource) -> list[Descriptor]:
    return [source.put_layer(LOWER), source.put_layer(UPPER)]


def tree_of(layers: Layers, source: FakeSource, blobs: list[Descriptor]) -> Tree:
    specs = [LayerSpec(blob) for blob in blobs]
    return Tree(DIGEST, [layers.get(spec, source) for spec in specs], layers.folder, layers.nursery)


def listing(stored: StoredTree, node: Node | None = None) -> list[bytes]:
    return [child.node.name for child in stored.children(directory_key(node or stored.root))]


# -------------------- while layers stream


class Lookups:
    """Look-ups under way in the root of a tree, and the answers so far."""

    def __init__(self, tree: Tree, nursery: trio.Nursery, *names: bytes) -> None:
        self.answers: dict[bytes, Node | None] = {}
        self._tree = tree
        for name in names:
            nursery.start_soon(self._look, name)

    async def _look(self, name: bytes) -> None:
        self.answers[name] = await self._tree.walk(name.split(b"/"))

    def found(self) -> dict[bytes, int | None]:
        """The layer that each name came from."""
        return {name: None if node is None else node.layer for name, node in self.answers.items()}


async def test_a_lookup_is_answered_as_soon_as_the_layers_have_decided_it(
    tmp_path: Path, source: FakeSource, blobs: list[Descriptor]
) -> None:
    gates = [Gate(), Gate()]
    for blob, gate in zip(blobs, gates, strict=True):
        gate.let(MIDDLE)
        source.then(blob, Body(gate=gate))
    async with open_layers(tmp_path) as layers, trio.open_nursery() as nursery:
        tree = tree_of(layers, source, blobs)
        lower, upper = tree.layers
        names = [b"up", b"own", b"own/file", b"own/missing", b"shared", b"shared/up", b"shared/low"]
        names += [b"low", b"removed", b"late-up", b"late-low", b"missing"]
        lookups = Lookups(tree, nursery, *names)

        # The upper layer may still hide whatever it has not shown, and describe the folder that it implies.
        await upper.read_stream(3 * CHUNK, 1)
        await wait_all_tasks_blocked()
        expected: dict[bytes, int | None] = {b"up": 1, b"own": 1, b"own/file": 1}
        assert lookups.found() == expected
        assert not tree.final
        assert source.fetched(blobs[0]) == 0, "nothing has been asked of the lower layer"

        gates[1].open()
        await upper.wait_complete()
        await lower.read_stream(3 * CHUNK, 1)
        await wait_all_tasks_blocked()
        expected |= {
            b"late-up": 1,
            b"removed": None,
            b"low": 0,
            b"shared": 1,
            b"shared/up": 1,
            b"shared/low": 0,
        }
        assert lookups.found() == expected
        shared = lookups.answers[b"shared"]
        assert shared is not None and shared.member.mode == 0o700, "as the topmost layer with a member says"

        gates[0].open()
        await lower.wait_complete()
        while len(lookups.answers) < len(names):
            await trio.lowlevel.checkpoint()
        expected |= {b"own/missing": None, b"late-low": 0, b"missing": None}
        assert lookups.found() == expected
        assert tree.final
    assert [source.fetched(blob) for blob in blobs] == [1, 1]


async def test_a_folder_that_the_upper_layer_describes_and_what_it_has_in_it_need_no_lower_layer(
    tmp_path: Path, source: FakeSource, blobs: list[Descriptor]
) -> None:
    source.then(blobs[0], Body(stop=0, error=GONE))
    async with open_layers(tmp_path) as layers:
        tree = tree_of(layers, source, blobs)
        await tree.layers[1].wait_complete()
        own = await tree.walk([b"own"])
        assert own is not None and own.member.mode == 0o750
        assert await tree.lookup(directory_key(own), b"file") is not None
        assert source.fetched(blobs[0]) == 0
        with pytest.raises(Unreachable):
            await tree.lookup(directory_key(own), b"missing")
        assert await tree.lookup(directory_key(own), b"missing") is None


async def test_what_was_found_while_layers_streamed_is_where_it_was_afterwards(
    tmp_path: Path, source: FakeSource, blobs: list[Descriptor]
) -> None:
    gate = Gate()
    gate.let(MIDDLE)
    source.then(blobs[1], Body(gate=gate))
    async with open_layers(tmp_path) as layers:
        tree = tree_of(layers, source, blobs)
        own = await tree.walk([b"own"])
        assert own is not None
        key = directory_key(own)
        file = await tree.lookup(key, b"file")
        assert await tree.node(key) == own
        gate.open()
        stored = await tree.stored()
        assert await tree.node(key) == stored.node(key) == stored.lookup(0 | 1 << 32, b"own") == own
        assert await tree.lookup(key, b"file") == file
        for number in (99, 1 << 32 | 99, 7 << 32):
            with pytest.raises(NotFound):
                await tree.node(number)


async def test_a_folder_of_which_only_the_number_is_known_is_waited_for(
    tmp_path: Path, source: FakeSource
) -> None:
    blob = source.put_layer(archive(Member(b"bulk", BULK), Member(b"late/", type=DIRECTORY, mode=0o711)))
    async with open_layers(tmp_path / "before") as layers:
        late = await tree_of(layers, source, [blob]).walk([b"late"])
        assert late is not None
    gate = Gate()
    gate.let(MIDDLE)
    source.then(blob, Body(gate=gate))
    got: list[Node] = []
    async with open_layers(tmp_path / "after") as layers, trio.open_nursery() as nursery:
        tree = tree_of(layers, source, [blob])

        async def ask() -> None:
            got.append(await tree.node(directory_key(late)))

        nursery.start_soon(ask)
        await tree.layers[0].read_stream(3 * CHUNK, 1)
        await wait_all_tasks_blocked()
        assert not got
        gate.open()
    assert got == [late]


async def test_a_listing_waits_for_every_layer_and_the_last_answers_all_who_wait(
    tmp_path: Path, source: FakeSource, blobs: list[Descriptor], monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: list[Path] = []
    write = tree_module.write_tree

    def counted(path: Path, overlay: Overlay) -> None:
        merged.append(path)
        write(path, overlay)

    monkeypatch.setattr(tree_module, "write_tree", counted)
    gate = Gate()
    gate.let(MIDDLE)
    source.then(blobs[0], Body(gate=gate))
    got: list[list[bytes]] = []
    async with open_layers(tmp_path) as layers:
        tree = tree_of(layers, source, blobs)

        async def list_root() -> None:
            got.append(listing(await tree.stored()))

        scope = trio.CancelScope()

        async def leave() -> None:
            with scope:
                await tree.stored()

        async with trio.open_nursery() as nursery:
            for task in (leave, *[list_root] * 5):
                nursery.start_soon(task)
            await tree.layers[1].wait_complete()
            await tree.layers[0].read_stream(3 * CHUNK, 1)
            await wait_all_tasks_blocked()
            scope.cancel()
            await wait_all_tasks_blocked()
            assert scope.cancelled_caught and not got
            gate.open()
    assert got == [[b"bulk-low", b"bulk-up", b"late-low", b"late-up", b"low", b"own", b"shared", b"up"]] * 5
    assert merged == [tmp_path / "trees" / f"sha256-{DIGEST.hex}.sqlite"]


@pytest.mark.parametrize(
    ("error", "kind"), [(GONE, Unreachable), (Corrupt("of another length"), Corrupt)], ids=["gone", "corrupt"]
)
async def test_what_a_layer_cannot_decide_is_its_error_and_the_rest_is_answered(
    tmp_path: Path, source: FakeSource, blobs: list[Descriptor], error: FsmountError, kind: type[FsmountError]
) -> None:
    source.then(blobs[0], *[Body(stop=MIDDLE, error=error)] * 2)
    async with open_layers(tmp_path) as layers:
        tree = tree_of(layers, source, blobs)
        with pytest.raises(kind):
            await tree.lookup(directory_key(tree.root()), b"missing")
        with pytest.raises(kind):
            await tree.stored()
        assert await tree.walk([b"up"]) is not None
        assert await tree.walk([b"removed"]) is None
        assert list((tmp_path / "trees").iterdir()) == []
        if kind is Unreachable:
            assert b"low" in listing(await tree.stored())


async def test_a_layer_that_is_not_what_one_image_says_of_it_is_an_error_of_that_image_alone(
    tmp_path: Path, source: FakeSource, blobs: list[Descriptor]
) -> None:
    right: list[Digest | None] = [Digest.of(LOWER), None]
    wrong: list[Digest | None] = [Digest.of(b"other"), None]
    gate = Gate()
    source.then(blobs[0], Body(gate=gate))

    async def fail(tree: Tree) -> None:
        with pytest.raises(Corrupt, match="configuration"):
            await tree.stored()

    async with open_layers(tmp_path) as layers, trio.open_nursery() as nursery:
        trees = [
            Tree(
                Digest.of(str(diff_ids).encode()),
                [
                    layers.get(LayerSpec(blob, diff_id=diff_id), source)
                    for blob, diff_id in zip(blobs, diff_ids, strict=True)
                ],
                layers.folder,
                layers.nursery,
                diff_ids=diff_ids,
            )
            for diff_ids in (right, wrong)
        ]
        nursery.start_soon(trees[0].stored)
        nursery.start_soon(fail, trees[1])
        await gate.held.wait()
        gate.open()
    assert len(list((tmp_path / "trees").iterdir())) == 1
    assert source.fetched(blobs[0]) == 1


async def test_a_hardlink_to_nothing_makes_the_image_invalid_with_its_name(
    tmp_path: Path, source: FakeSource
) -> None:
    blob = source.put_layer(archive(Member(b"a", type=HARDLINK, link=b"nowhere"), Member(b"b", b"x")))
    async with open_layers(tmp_path) as layers:
        tree = tree_of(layers, source, [blob])
        for _ in range(2):
            with pytest.raises(Invalid, match="nowhere"):
                await tree.stored()
        assert list((tmp_path / "trees").iterdir()) == []


async def test_when_every_layer_is_there_a_lookup_has_the_tree_merged_and_goes_on_without_it_if_need_be(
    tmp_path: Path,
    source: FakeSource,
    blobs: list[Descriptor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried: list[Path] = []

    def full(path: Path, overlay: Overlay) -> None:
        tried.append(path)
        raise NoSpace("no space left")

    monkeypatch.setattr(tree_module, "write_tree", full)
    async with open_layers(tmp_path) as layers:
        tree = tree_of(layers, source, blobs)
        for layer in tree.layers:
            await layer.wait_complete()
        root = directory_key(tree.root())
        for _ in range(3):
            node = await tree.lookup(root, b"low")
            assert node is not None and node.layer == 0
            assert await tree.lookup(root, b"removed") is None
        while not caplog.records:
            await trio.lowlevel.checkpoint()
        with pytest.raises(NoSpace):
            await tree.stored()
    assert len(tried) == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


# -------------------- on disk


async def stored_once(cache: Path, source: FakeSource, blobs: list[Descriptor]) -> Path:
    """The file of the tree, written by another process; the source is away since."""
    async with open_layers(cache) as layers:
        tree = tree_of(layers, source, blobs)
        await tree.stored()
        tree.close()
    source.away = GONE
    return cache / "trees" / f"sha256-{DIGEST.hex}.sqlite"


async def test_another_process_finds_the_tree_and_asks_nobody(
    tmp_path: Path, source: FakeSource, blobs: list[Descriptor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = await stored_once(tmp_path, source, blobs)
    before = path.stat().st_ino, source.asked.total()
    for index in (tmp_path / "layers").iterdir():
        index.unlink()  # not even the layers' indexes
    async with open_layers(tmp_path) as layers:
        tree = tree_of(layers, source, blobs)
        assert tree.final and tree.root().is_directory
        stored = await tree.stored()
        assert len(listing(stored)) == stored.counts()[0] - 3 == 8
        shared = await tree.walk([b"shared"])
        assert shared is not None and await tree.node(directory_key(shared)) == shared
        assert listing(stored, shared) == [b"low", b"up"]
        assert await tree.walk([b"removed"]) is None
        assert await tree.walk([b"low", b"below a file"]) is None
    assert (path.stat().st_ino, source.asked.total()) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"garbage" * 1000,
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:60] + b"\0\0\0\x01" + data[64:],
    ],
    ids=["no database", "emptied", "half of it", "of another version"],
)
async def test_a_damaged_tree_is_made_again_from_the_indexes(
    tmp_path: Path,
    source: FakeSource,
    blobs: list[Descriptor],
    damage: Callable[[bytes], bytes],
) -> None:
    path = await stored_once(tmp_path, source, blobs)
    data = path.read_bytes()
    path.write_bytes(damage(data))
    async with open_layers(tmp_path) as layers:
        tree = tree_of(layers, source, blobs)
        assert (await tree.walk([b"shared", b"low"])) is not None
        assert len(listing(await tree.stored())) == 8
    assert path.read_bytes() == data


async def test_an_index_that_the_disk_has_spoilt_fails_once_and_is_made_again(
    tmp_path: Path, source: FakeSource, blobs: list[Descriptor]
) -> None:
    tree_path = await stored_once(tmp_path, source, blobs)
    tree_path.unlink()
    index = tmp_path / "layers" / f"sha256-{blobs[0].digest.hex}.sqlite"
    data = index.read_bytes()
    # The pages of names; what opening reads is left.
    pages = [data[at : at + 4096] for at in range(0, len(data), 4096)]
    index.write_bytes(b"".join(b"\xff" * 4096 if b"removed" in page else page for page in pages))
    async with open_layers(tmp_path) as layers:
        tree = tree_of(layers, source, blobs)
        with pytest.raises(FsmountError):
            await tree.stored()
        source.away = None
        assert len(listing(await tree.stored())) == 8


async def test_a_closed_tree_opens_again_and_a_listing_goes_on_where_it_was(
    tmp_path: Path, source: FakeSource, blobs: list[Descriptor]
) -> None:
    path = await stored_once(tmp_path, source, blobs)
    written = path.stat().st_ino

    def open_files() -> int:
        names = (os.readlink(entry.path) for entry in os.scandir("/proc/self/fd"))
        return sum(name.startswith(str(tmp_path / "trees")) for name in names)

    async with open_layers(tmp_path) as layers:
        tree = tree_of(layers, source, blobs)
        names, offset = [], 0
        while True:
            children = list((await tree.stored()).children(directory_key(tree.root()), offset))
            if not children:
                break
            names.append(children[0].node.name)
            offset = children[0].offset
            assert open_files() == 1
            tree.close()
            assert open_files() == 0
            if len(names) == 4:  # another process goes on with it
                tree = tree_of(layers, source, blobs)
        assert names == listing(await tree.stored()) == sorted(names)
        assert await tree.walk([b"up"]) is not None
        again = tree.reopen()
        assert listing(again) == names
        again.close()
    assert path.stat().st_ino == written


async def test_an_image_without_layers_is_an_empty_folder(tmp_path: Path, source: FakeSource) -> None:
    async with open_layers(tmp_path) as layers:
        tree = tree_of(layers, source, [])
        assert await tree.lookup(directory_key(tree.root()), b"a") is None
        stored = await tree.stored()
        assert listing(stored) == []
        assert (stored.root.member.mode, stored.counts()) == (0o755, (0, 0))


async def test_the_stored_tree_lists_folders_parents_first_and_members_in_the_order_of_their_bytes(
    tmp_path: Path, source: FakeSource
) -> None:
    tar = archive(
        Member(b"z/y/second", b"22"),
        Member(b"a-link", type=SYMLINK, link=b"z"),
        Member(b"first-too", type=HARDLINK, link=b"z/y/second"),
        Member(b"b", b"333"),
    )
    async with open_layers(tmp_path) as layers:
        tree = tree_of(layers, source, [source.put_layer(tar)])
        stored = await tree.stored()
        folders = list(stored.folders())
        assert [node.name for _, node, _ in folders] == [b"", b"z", b"y"]
        assert [parent for parent, _, _ in folders[1:]] == [directory_key(node) for _, node, _ in folders[:2]]
        for _ in range(2):
            found = list(stored.members(0, tree.layers[0].index_path))
            names = [(node.name, node.member.type) for _, node, _, _ in found]
            assert names == [
                (b"a-link", EntryType.SYMLINK),
                (b"first-too", EntryType.FILE),
                (b"second", EntryType.FILE),
                (b"b", EntryType.FILE),
            ]
            assert [sum(extent.size for extent in content) for _, _, content, _ in found] == [0, 2, 2, 3]
        assert stored.counts() == (6, 5)
