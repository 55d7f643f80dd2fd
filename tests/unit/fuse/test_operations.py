"""What the kernel is told, and how long it may remember it, without a kernel."""

import errno
import inspect
import os
import sqlite3
import stat
import struct
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from fsmount.cache.chunks import open_chunk_store
from fsmount.cache.folder import CacheFolder
from fsmount.cache.numbers import Numbers
from fsmount.catalog import App, Catalog
from fsmount.errors import Corrupt, FsmountError
from fsmount.fuse import operations as module
from fsmount.fuse.inodes import Content, content_inode, directory_inode, folder_inode, parse_inode
from fsmount.fuse.operations import Operations
from fsmount.fuse.protocol import Attributes, Refusal
from fsmount.layer import Layer, Layers
from fsmount.oci.manifest import Descriptor
from fsmount.oci.platform import Platform
from fsmount.registry.layout import Layout
from fsmount.registry.source import Bytes
from tests import peers
from tests.fakes.tar import BLOCK_DEVICE, CHAR, DIRECTORY, HARDLINK, SYMLINK, Member, archive

_ROOT = 1
_DAY, _SECOND = 86400.0, 1.0
_MIB = 1 << 20
_CREATED = "2020-01-02T03:04:05Z"
_CREATED_NS = 1_577_934_245 * 10**9

_SMALL = archive(
    Member(b"./", type=DIRECTORY, mode=0o750, mtime=3),
    Member(b"file", b"content" * 100, mode=0o4755, uid=1, gid=2, mtime=1_000_000_000),
    Member(b"again", type=HARDLINK, link=b"file"),
    Member(b"link", type=SYMLINK, link=b"folder/0", mode=0o777),
    Member(b"null", type=CHAR, mode=0o666, major=1, minor=3),
    Member(b"disk", type=BLOCK_DEVICE, mode=0o660, gid=6, major=1, minor=0x12345),
    Member(b"folder/", type=DIRECTORY, mode=0o700, mtime=5),
    *(Member(b"folder/%d" % number) for number in range(9)),
)
#: Its first chunk, of 4 MiB, shows all but `late`.
_LARGE = archive(
    Member(b"early", b"early"),
    Member(b"folder/", type=DIRECTORY),
    Member(b"folder/filler", bytes(6 * _MIB)),
    Member(b"late"),
)


class _Held(Layout):
    """A layout of whose blobs no more than 5 MiB come before they are let go on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.held = trio.Event()
        self.go_on = trio.Event()

    @asynccontextmanager
    async def blob(
        self, descriptor: Descriptor, *, start: int = 0, stop: int | None = None
    ) -> AsyncIterator[Bytes]:
        # All of it, whatever is asked: so the layer is streamed.
        async with super().blob(descriptor) as pieces:
            yield _HeldPieces(self, pieces)


class _HeldPieces:
    def __init__(self, source: _Held, pieces: Bytes) -> None:
        self.offset, self.stop = pieces.offset, pieces.stop
        self._source = source
        self._pieces = pieces
        self._size = 0

    def __aiter__(self) -> "_HeldPieces":
        return self

    async def __anext__(self) -> bytes:
        piece = await anext(self._pieces)
        if self._size >= 5 * _MIB:
            self._source.held.set()
            await self._source.go_on.wait()
        self._size += len(piece)
        return piece


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder in memory if there is one: every cache syncs its files, and here are 70 of them."""
    with TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


@pytest.fixture
def layout(work: Path) -> Path:
    path = work / "layout"
    config: Mapping[str, peers.Json] = {"created": _CREATED}
    peers.tar_layer_image(path, "v1", [peers.pack(_SMALL)], config=config)
    peers.tar_layer_image(path, "large", [peers.pack(_LARGE, "tar")])
    return path


@asynccontextmanager
async def process(
    cache: Path, source: Layout, *apps: str, subtree: tuple[bytes, ...] = ()
) -> AsyncIterator[Operations]:
    """What a process answers that has apps of these names, all of one source."""
    folder = CacheFolder(cache)
    numbers = Numbers(folder.state)
    platform = Platform.parse("linux/amd64")
    shown = [App(name, source, subtree, platform, lambda tag: True, 60) for name in apps]
    try:
        with open_chunk_store(folder.chunks, size=10**9) as chunks:
            async with trio.open_nursery() as nursery:
                layers = Layers(folder, chunks, numbers, nursery)
                yield Operations(Catalog(shown, layers, nursery), layers, numbers)
                nursery.cancel_scope.cancel()
    finally:
        numbers.close()


@pytest.fixture
async def operations(work: Path, layout: Path) -> AsyncIterator[Operations]:
    async with process(work / "cache", Layout(layout), "app", "team/web") as operations:
        yield operations


async def ask(answer: Any) -> Any:
    """An answer that was given at once, or had to be waited for."""
    return await answer if inspect.isawaitable(answer) else answer


async def look(operations: Operations, path: str) -> Attributes:
    """The last of a series of look-ups that begins at the root."""
    inode, attributes = _ROOT, await ask(operations.getattr(_ROOT))
    for name in path.split("/") if path else ():
        attributes = await ask(operations.lookup(inode, os.fsencode(name)))
        inode = attributes.inode
    return attributes


async def finish(operations: Operations, tag: str) -> None:
    """Have the whole tree of a tag fetched."""
    await listed(operations, (await look(operations, tag)).inode)


_DIRENT = struct.Struct("=QQII")
#: What stands before each entry of READDIRPLUS: struct fuse_entry_out.
_ENTRY_SIZE = 128


async def listed(
    operations: Operations, inode: int, *, after: int = 0, size: int = 1 << 20, plus: bool = False
) -> list[tuple[str, int, int]]:
    """(name, inode, offset) of what is listed after an offset, in one answer of that size."""
    answer = await ask(operations.readdir(inode, after, size, plus=plus))
    assert len(answer) <= size
    entries = []
    position = 0
    while position < len(answer):
        position += _ENTRY_SIZE if plus else 0
        number, offset, length, _ = _DIRENT.unpack_from(answer, position)
        position += _DIRENT.size
        entries.append((os.fsdecode(answer[position : position + length]), number, offset))
        position += length + -length % 8
    return entries


@contextmanager
def refused(code: int) -> Iterator[None]:
    with pytest.raises(Refusal) as caught:
        yield
    assert errno.errorcode[caught.value.errno] == errno.errorcode[code]


# -------------------- for how long


@pytest.mark.parametrize(
    ("path", "entry_seconds", "attributes_seconds"),
    [
        ("", _SECOND, _SECOND),
        ("app", _SECOND, _SECOND),
        ("team/web", _SECOND, _SECOND),
        ("nothing", _SECOND, None),
        ("app/nothing", _SECOND, None),
        ("app/no tag", _SECOND, None),
        ("team/web/v1", _SECOND, 0),
        ("app/v1", _SECOND, _DAY),
        ("app/v1/file", _DAY, _DAY),
        ("app/v1/folder", _DAY, _DAY),
        ("app/v1/folder/0", _DAY, _DAY),
        ("app/v1/nothing", _DAY, None),
        ("app/v1/folder/nothing", _DAY, None),
    ],
)
async def test_names_and_attributes_are_remembered_as_long_as_they_cannot_change(
    operations: Operations, path: str, entry_seconds: float, attributes_seconds: float | None
) -> None:
    await finish(operations, "app/v1")
    found = await look(operations, path)
    assert found.name_seconds == entry_seconds
    assert (found.inode == 0) == (attributes_seconds is None)
    if attributes_seconds is not None:
        assert found.seconds == attributes_seconds
        # getattr alone decides about attributes that have been looked up before.
        again = await ask(operations.getattr(found.inode))
        assert (again.inode, again.seconds) == (found.inode, attributes_seconds)


async def test_nothing_of_a_tree_is_remembered_while_its_layers_stream(work: Path, layout: Path) -> None:
    paths = ["early", "folder", "folder/filler"]
    source = _Held(layout)
    async with process(work / "cache", source, "app") as operations:
        streaming = [await look(operations, f"app/large/{path}") for path in paths]
        assert [(one.name_seconds, one.seconds) for one in streaming] == [(0, 0)] * 3
        assert (await look(operations, "app/large")).seconds == 0
        source.go_on.set()
        await finish(operations, "app/large")
        finished = [await look(operations, f"app/large/{path}") for path in paths]
        assert [(one.name_seconds, one.seconds) for one in finished] == [(_DAY, _DAY)] * 3
        assert [one.inode for one in finished] == [one.inode for one in streaming]


async def test_what_has_gone_by_is_read_while_the_rest_is_awaited(work: Path, layout: Path) -> None:
    source = _Held(layout)
    found: list[int] = []

    async def look_for(name: str) -> None:
        found.append((await look(operations, f"app/large/{name}")).inode)

    async with process(work / "cache", source, "app") as operations, trio.open_nursery() as nursery:
        nursery.start_soon(look_for, "late")
        nursery.start_soon(look_for, "nowhere")
        await source.held.wait()
        early = await look(operations, "app/large/early")
        assert await ask(operations.read(early.inode, 0, 100)) == b"early"
        await trio.testing.wait_all_tasks_blocked()
        assert found == []
        source.go_on.set()
    assert sorted(inode != 0 for inode in found) == [False, True]


async def test_statfs_is_answered_at_once_and_tells_no_sizes(operations: Operations) -> None:
    blocks, free, available, files, files_free, block_size, name_max, *_ = struct.unpack_from(
        "=5Q4I", operations.statfs()
    )
    assert (blocks, free, available, files, files_free) == (0, 0, 0, 0, 0)
    assert (block_size, name_max) == (4096, 255)


# -------------------- what


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("file", (stat.S_IFREG | 0o4755, 2, 1, 2, 0, 700, 1_000_000_000 * 10**9)),
        ("again", (stat.S_IFREG | 0o4755, 2, 1, 2, 0, 700, 1_000_000_000 * 10**9)),
        ("link", (stat.S_IFLNK | 0o777, 1, 0, 0, 0, len("folder/0"), 0)),
        ("null", (stat.S_IFCHR | 0o666, 1, 0, 0, os.makedev(1, 3), 0, 0)),
        ("disk", (stat.S_IFBLK | 0o660, 1, 0, 6, 0x12300145, 0, 0)),
        ("folder", (stat.S_IFDIR | 0o700, 1, 0, 0, 0, 0, 5 * 10**9)),
    ],
)
async def test_attributes_are_those_of_the_image(
    operations: Operations, name: str, expected: tuple[int, ...]
) -> None:
    await finish(operations, "app/v1")
    found = await look(operations, f"app/v1/{name}")
    for one in (found, await ask(operations.getattr(found.inode))):
        assert one[1:8] == expected
        assert one.ctime_ns == one.mtime_ns


async def test_a_tag_s_folder_shows_the_time_of_creation_once_somebody_has_looked_inside(
    operations: Operations,
) -> None:
    before = await look(operations, "app/v1")
    assert (before.mode, before.mtime_ns > _CREATED_NS) == (stat.S_IFDIR | 0o755, True)
    await finish(operations, "app/v1")
    after = await look(operations, "app/v1")
    assert (after.mode, after.mtime_ns) == (stat.S_IFDIR | 0o750, _CREATED_NS)
    assert after.inode == before.inode
    # tar(1) would call it changed while it was read.
    assert after.ctime_ns == before.ctime_ns


async def test_one_member_has_one_number_in_all_apps_and_directories_have_their_own(
    operations: Operations,
) -> None:
    tags = ["app/v1", "team/web/v1"]
    one, other = [(await look(operations, f"{tag}/file")).inode for tag in tags]
    assert one == other == (await look(operations, "app/v1/again")).inode
    for path in ("", "/folder"):
        one, other = [(await look(operations, f"{tag}{path}")).inode for tag in tags]
        assert one != other


async def test_a_folder_of_the_image_can_be_the_root(work: Path, layout: Path) -> None:
    async with process(work / "cache", Layout(layout), "app", subtree=(b"folder",)) as operations:
        await finish(operations, "app/v1")
        root = await look(operations, "app/v1")
        assert root.mode == stat.S_IFDIR | 0o700
        assert (await look(operations, "app/v1/0")).inode != 0
        assert (await look(operations, "app/v1/file")).inode == 0


async def test_the_target_of_a_symlink_is_the_image_s(operations: Operations) -> None:
    link = await look(operations, "app/v1/link")
    assert operations.readlink(link.inode) == b"folder/0"


# -------------------- what not

_PLACES = pytest.mark.parametrize("place", ["", "app", "team", "app/v1", "app/v1/folder"])


@_PLACES
async def test_a_name_of_more_than_255_bytes_is_too_long(operations: Operations, place: str) -> None:
    parent = (await look(operations, place)).inode
    assert (await ask(operations.lookup(parent, b"n" * 255))).inode == 0
    with refused(errno.ENAMETOOLONG):
        await ask(operations.lookup(parent, b"n" * 256))


@pytest.mark.parametrize("name", ["file", "link", "null"])
async def test_what_is_no_directory_has_no_names(operations: Operations, name: str) -> None:
    parent = (await look(operations, f"app/v1/{name}")).inode
    with refused(errno.ENOTDIR):
        await ask(operations.lookup(parent, b"name"))


@_PLACES
async def test_a_directory_is_neither_read_nor_followed(operations: Operations, place: str) -> None:
    inode = (await look(operations, place)).inode
    with refused(errno.EISDIR):
        await ask(operations.read(inode, 0, 1))
    with refused(errno.EINVAL):
        operations.readlink(inode)


_GONE = 99_999
_UNKNOWN = {
    "a folder": folder_inode(_GONE),
    "a member of an unknown layer": content_inode(_GONE, 1),
    "an unknown tag": directory_inode(_GONE),
    "a directory of an unknown tag": directory_inode(_GONE, 1),
}


@pytest.mark.parametrize("inode", _UNKNOWN.values(), ids=_UNKNOWN)
async def test_what_nobody_has_given_out_is_stale(operations: Operations, inode: int) -> None:
    is_content = isinstance(parse_inode(inode), Content)
    with refused(errno.ESTALE):
        await ask(operations.getattr(inode))
    with refused(errno.ENOTDIR if is_content else errno.ESTALE):
        await ask(operations.lookup(inode, b"name"))
    with refused(errno.ESTALE):
        await (ask(operations.read(inode, 0, 1)) if is_content else listed(operations, inode))


async def test_a_member_that_its_layer_does_not_have_is_stale(operations: Operations) -> None:
    file = (await look(operations, "app/v1/file")).inode
    with refused(errno.ESTALE):
        await ask(operations.getattr(file + 500))


async def test_the_folders_of_what_the_configuration_no_longer_has_are_stale_and_what_is_below_a_tag_is_not(
    work: Path, layout: Path
) -> None:
    cache, source = work / "cache", Layout(layout)
    async with process(cache, source, "team/web", "app") as operations:
        await finish(operations, "app/v1")
        stale = [(await look(operations, path)).inode for path in ("team", "team/web")]
        below = [await look(operations, path) for path in ("app/v1", "app/v1/folder", "app/v1/file")]
    async with process(cache, source, "app", subtree=(b"folder",)) as operations:
        for inode in stale:
            with refused(errno.ESTALE):
                await ask(operations.getattr(inode))
        for one in below:
            assert (await ask(operations.getattr(one.inode)))[:8] == one[:8]
        assert {name for name, _, _ in await listed(operations, below[1].inode)} == set("012345678")
        assert (await look(operations, "app/v1")).inode != below[0].inode


async def test_the_numbers_of_directories_mean_the_same_to_the_next_process(work: Path, layout: Path) -> None:
    cache = work / "cache"
    paths = ["app", "team/web", "app/v1", "app/v1/folder"]
    async with process(cache, Layout(layout), "app", "team/web") as operations:
        await finish(operations, "app/v1")
        before = [await look(operations, path) for path in paths]
    async with process(cache, Layout(layout), "new", "team/web", "app") as operations:
        for one in reversed(before):
            assert (await ask(operations.getattr(one.inode))).inode == one.inode
        assert (await ask(operations.lookup(before[3].inode, b"0"))).inode != 0
        after = [await look(operations, path) for path in paths]
        assert [one.inode for one in after] == [one.inode for one in before]


async def test_two_processes_that_see_a_tag_move_give_it_the_same_number(work: Path, layout: Path) -> None:
    cache, source = work / "cache", Layout(layout)
    async with (
        process(cache, source, "app") as one,
        process(cache, source, "app") as other,
    ):
        both = (one, other)
        before = [(await look(operations, "app/v1/folder")).inode for operations in both]
        peers.tar_layer_image(layout, "v1", [peers.pack(_SMALL), peers.pack(archive(Member(b"new")))])
        after = []
        for operations in both:
            catalog = operations._catalog
            await catalog.look_again(catalog.apps["app"], "v1")
            after.append((await look(operations, "app/v1/folder")).inode)
    assert before[0] == before[1]
    assert after[0] == after[1] != before[0]


# -------------------- listings


@_PLACES
@pytest.mark.parametrize("size", [40, 200, 1000])
@pytest.mark.parametrize("plus", [False, True])
async def test_a_listing_goes_on_after_any_entry_in_any_process(
    work: Path, layout: Path, place: str, size: int, plus: bool
) -> None:
    cache, apps = work / "cache", ("app", "team/web", "team/api", "z")
    async with process(cache, Layout(layout), *apps) as operations:
        inode = (await look(operations, place)).inode
        whole = await listed(operations, inode)
        assert len(whole) >= 2
        assert [one for one, _, _ in whole] == list(dict.fromkeys(one for one, _, _ in whole))
    async with process(cache, Layout(layout), *apps) as operations:
        gathered: list[tuple[str, int, int]] = []
        while more := await listed(
            operations,
            inode,
            after=gathered[-1][2] if gathered else 0,
            size=size + plus * _ENTRY_SIZE,
            plus=plus,
        ):
            gathered += more
        assert gathered == whole


@_PLACES
async def test_a_listing_says_what_a_look_up_says(operations: Operations, place: str) -> None:
    inode = (await look(operations, place)).inode
    for name, number, _ in await listed(operations, inode):
        assert (await ask(operations.lookup(inode, os.fsencode(name)))).inode == number


class _Tagged(Layout):
    """A source whose tags are what the test says."""

    names: list[str]

    async def tags(self) -> list[str]:
        return self.names


async def look_after(operations: Operations) -> None:
    """Have the list of tags of the app renewed."""
    await operations._catalog.ask_tags(operations._catalog.apps["app"])


async def test_who_lists_while_tags_come_and_go_sees_every_tag_that_stays_once(
    work: Path, layout: Path
) -> None:
    source = _Tagged(layout)
    source.names = tags = [f"v{number}" for number in range(40)]
    async with process(work / "cache", source, "app") as operations:
        inode = (await look(operations, "app")).inode
        first = await listed(operations, inode, size=17 * 32)
        seen = [name for name, _, _ in first]
        source.names = [f"new{number}" for number in range(40)] + tags[::2]
        await look_after(operations)
        rest = [name for name, _, _ in await listed(operations, inode, after=first[-1][2])]
    stayed = set(tags[::2])
    assert len(seen) == 17
    assert sorted(name for name in seen + rest if name in stayed) == sorted(stayed)
    assert not set(rest) & set(tags[1::2])
    assert any(name.startswith("new") for name in rest)


async def test_an_app_s_folder_changes_when_its_tags_do(work: Path, layout: Path) -> None:
    # By that the kernel knows that the listing which it keeps is old.
    source = _Tagged(layout)
    source.names = ["v1"]
    async with process(work / "cache", source, "app") as operations:
        inode = (await look(operations, "app")).inode
        times = []
        for names in (["v1"], ["v1"], ["v1", "v2"], ["v1", "v2"], ["v2"]):
            source.names = names
            await listed(operations, inode)
            await look_after(operations)
            times.append((await ask(operations.getattr(inode))).mtime_ns)
    assert times[0] == times[1] < times[2] == times[3] < times[4]


@given(st.binary(min_size=1, max_size=255))
def test_the_place_of_a_tag_in_a_listing_is_never_the_beginning(name: bytes) -> None:
    # The kernel takes offsets for signed.
    assert 0 < module._offset(os.fsdecode(name)) < 2**63


def test_the_place_of_a_tag_in_a_listing_is_the_same_in_every_process() -> None:
    assert module._offset("v1") == 514116026288276215


async def test_what_a_listing_of_many_tags_takes_grows_no_faster_than_they_do(
    work: Path, layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _Tagged(layout)
    source.names = tags = [f"v{number}" for number in range(500)]
    placed: list[str] = []
    place = module._offset

    def offset(name: str) -> int:
        placed.append(name)
        return place(name)

    monkeypatch.setattr(module, "_offset", offset)
    async with process(work / "cache", source, "app") as operations:
        inode = (await look(operations, "app")).inode
        await look_after(operations)
        statements: list[str] = []
        operations._numbers._state._connection.set_trace_callback(statements.append)
        for _ in range(2):
            seen: list[str] = []
            pages, after = 0, 0
            while page := await listed(operations, inode, after=after, size=4096, plus=True):
                seen += [name for name, _, _ in page]
                pages, after = pages + 1, page[-1][2]
            assert sorted(seen) == sorted(tags)
        assert len(placed) == len(tags)
        assert 0 < statements.count("COMMIT") <= pages + 1
        assert len([one for one in statements if "INSERT" in one]) == len(tags)


# -------------------- while another process is in the middle of a write


async def test_folders_and_tags_that_have_no_number_yet_are_answered_when_the_other_has_written(
    work: Path, layout: Path
) -> None:
    found: list[int] = []
    async with process(work / "cache", Layout(layout), "app", "team/web") as operations:
        with closing(sqlite3.connect(work / "cache" / "state.sqlite", isolation_level=None)) as other:

            async def find(path: str) -> None:
                found.append((await look(operations, path)).inode)

            async with trio.open_nursery() as nursery:
                other.execute("BEGIN IMMEDIATE")
                for path in ("app", "team", "app/v1"):
                    nursery.start_soon(find, path)
                await trio.testing.wait_all_tasks_blocked()
                assert found == []
                assert await ask(operations.getattr(_ROOT))
                other.execute("COMMIT")
    assert len(set(found)) == 3 and all(found)


# -------------------- what a layer was


async def test_a_read_that_begins_when_its_layer_has_become_another_is_refused(
    operations: Operations,
) -> None:
    await finish(operations, "app/v1")
    file = await look(operations, "app/v1/file")
    layer = _layer_of(operations, file)
    operations._layers.chunks._hot.close()  # so that it has to wait
    answer = operations.read(file.inode, 0, 10)
    assert inspect.iscoroutine(answer)
    operations._layers.renumber(layer, Corrupt("it was another one"), shown=True)
    with pytest.raises(Corrupt, match="another one"):
        await answer


@pytest.mark.parametrize("question", ["getattr", "readlink", "lookup", "readdir"])
async def test_who_waits_for_a_layer_is_refused_if_it_becomes_another_meanwhile(
    work: Path, layout: Path, question: str
) -> None:
    source = _Held(layout)
    async with process(work / "cache", source, "app") as operations:
        root = (await look(operations, "app/large")).inode
        layer = _layer_of(operations, await look(operations, "app/large/early"))
        late = content_inode(layer.number, 4)
        answer: Any
        match question:
            case "getattr":
                answer = operations.getattr(late)
            case "readlink":
                answer = operations.readlink(late)
            case "lookup":
                answer = operations.lookup(root, b"late")
            case "readdir":
                answer = operations.readdir(root, 0, 4096, plus=True)
        assert inspect.iscoroutine(answer)
        caught: list[FsmountError] = []

        async def wait() -> None:
            try:
                await answer
            except FsmountError as error:
                caught.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            operations._layers.renumber(layer, Corrupt("it was another one"), shown=True)
            source.go_on.set()
        assert [error.message for error in caught] == ["it was another one"]


async def test_a_listing_that_waits_for_a_pass_lists_what_the_layer_turns_out_to_be(
    work: Path, layout: Path
) -> None:
    source = _Held(layout)
    found: list[str] = []
    async with process(work / "cache", source, "app") as operations:
        root = (await look(operations, "app/large")).inode
        layer = _layer_of(operations, await look(operations, "app/large/early"))

        async def wait() -> None:
            found.extend(name for name, *_ in await listed(operations, root))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            operations._layers.renumber(layer, Corrupt("it was another one"), shown=False)
            source.go_on.set()
    assert found == ["early", "folder", "late"]


def _layer_of(operations: Operations, member: Attributes) -> Layer:
    place = parse_inode(member.inode)
    assert isinstance(place, Content)
    layer = operations._layers.numbered(place.layer)
    assert layer is not None
    return layer
