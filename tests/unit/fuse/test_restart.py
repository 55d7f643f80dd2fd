"""What the kernel holds of a mount means the same to the process that serves it next, which has opened nothing yet."""

import errno
import inspect
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount.catalog import App, Catalog
from fsmount.errors import FsmountError, Unreachable
from fsmount.fuse.inodes import Content, parse_inode
from fsmount.fuse.operations import Operations
from fsmount.fuse.protocol import Attributes, Refusal
from fsmount.oci.manifest import Descriptor
from fsmount.oci.platform import Platform
from tests.fakes.source import CHUNK, Body, FakeSource, Gate, open_layers, small_chunks
from tests.fakes.tar import DIRECTORY, HARDLINK, SYMLINK, Member, archive, sparse

GONE = Unreachable("the registry went away")
DATA = Random(1).randbytes(5 * CHUNK + 7)
REGIONS = [(100, DATA[:CHUNK]), (9 * CHUNK, b"end")]
HOLES = bytes(100) + DATA[:CHUNK] + bytes(8 * CHUNK - 100) + b"end"
TAR = archive(
    Member(b"dist/", type=DIRECTORY, mode=0o750, mtime=5),
    Member(b"dist/data", DATA, mode=0o4755, uid=1, gid=2, mtime=1_000_000_000),
    Member(b"dist/again", type=HARDLINK, link=b"dist/data"),
    Member(b"dist/link", type=SYMLINK, link=b"data", mode=0o777),
    sparse("old", b"dist/holes", len(HOLES), REGIONS),
    Member(b"dist/folder/", type=DIRECTORY, mode=0o700),
    *(Member(b"dist/folder/%d" % number, b"%d" % number) for number in range(20)),
)
UPPER = archive(Member(b"dist/folder/new", b"new"), Member(b"dist/folder/.wh.3"))
FILES = {
    "dist/data": DATA,
    "dist/again": DATA,
    "dist/holes": HOLES,
    "dist/folder/7": b"7",
    "dist/folder/new": b"new",
}
DIRECTORIES = ["", "dist", "dist/folder"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock) -> None:
    """Time stands still: nothing that is known becomes old."""
    small_chunks(monkeypatch)


@pytest.fixture
def source() -> FakeSource:
    source = FakeSource()
    source.put_image("v1", [source.put_layer(TAR, packed=True), source.put_layer(UPPER)])
    return source


@asynccontextmanager
async def process(
    cache: Path, source: FakeSource, *names: str, subtree: bytes = b""
) -> AsyncIterator[Operations]:
    """One process of a mount that has apps of these names, all of one source."""
    parts = tuple(subtree.split(b"/")) if subtree else ()
    platform = Platform("linux", "amd64")
    apps = [App(name, source, parts, platform, lambda tag: True, 60) for name in names or ("app",)]
    async with open_layers(cache, mount="/srv") as layers:
        catalog = Catalog(apps, layers, layers.nursery)
        catalog.watch_lists()
        layers.nursery.start_soon(catalog.freshness.run)
        yield Operations(catalog, layers, layers.numbers)


@asynccontextmanager
async def nobody_asked(source: FakeSource) -> AsyncIterator[None]:
    """Nothing is asked of the source in the block, and it would not answer."""
    before = source.asked.copy()
    source.away = GONE
    yield
    assert source.asked == before
    source.away = None


async def ask(answer: Any) -> Any:
    """An answer that was given at once, or had to be waited for."""
    return await answer if inspect.isawaitable(answer) else answer


async def look(operations: Operations, path: str) -> Attributes:
    """The last of a series of look-ups that begins at the root."""
    inode, attributes = 1, await ask(operations.getattr(1))
    for name in path.split("/") if path else ():
        attributes = await ask(operations.lookup(inode, os.fsencode(name)))
        assert attributes.inode, f"there is no {name} of {path}"
        inode = attributes.inode
    return attributes


async def names(operations: Operations, inode: int) -> list[tuple[str, int]]:
    """(name, inode) of what a folder lists."""
    answer = await ask(operations.readdir(inode, 0, 1 << 20, plus=False))
    found, position = [], 0
    while position < len(answer):
        number, _, length, _ = struct.unpack_from("=QQII", answer, position)
        position += 24
        found.append((os.fsdecode(answer[position : position + length]), number))
        position += length + -length % 8
    return found


async def fails(code: int, ask: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises((Refusal, FsmountError)) as caught:
        await ask()
    assert isinstance(caught.value, Refusal | FsmountError)
    assert errno.errorcode[caught.value.errno] == errno.errorcode[code]


# -------------------- numbers


async def test_every_number_that_a_process_gave_out_means_the_same_to_the_next_one_without_the_registry(
    tmp_path: Path, source: FakeSource
) -> None:
    files = [*FILES, "dist/link"]
    async with process(tmp_path, source) as operations:
        app = await look(operations, "app")
        await names(operations, app.inode)
        listings = {}
        for path in DIRECTORIES:
            inode = (await look(operations, f"app/v1/{path}".rstrip("/"))).inode
            listings[inode] = await names(operations, inode)
        held = {path: await look(operations, f"app/v1/{path}".rstrip("/")) for path in [*DIRECTORIES, *files]}
        for path, data in FILES.items():
            assert await ask(operations.read(held[path].inode, 0, 1 << 20)) == data
    # Whichever is asked first opens the rest; so each is asked first once.
    for before in held.values():
        async with nobody_asked(source), process(tmp_path, source) as operations:
            assert await ask(operations.getattr(before.inode)) == before
    for path, data in FILES.items():
        async with nobody_asked(source), process(tmp_path, source) as operations:
            assert await ask(operations.read(held[path].inode, 3, 1 << 20)) == data[3:]
    async with nobody_asked(source), process(tmp_path, source) as operations:
        assert await ask(operations.readlink(held["dist/link"].inode)) == b"data"
    for inode, listing in listings.items():
        async with nobody_asked(source), process(tmp_path, source) as operations:
            assert await names(operations, inode) == listing
    async with nobody_asked(source), process(tmp_path, source) as operations:
        for name, inode in listings[held["dist"].inode]:
            assert (await ask(operations.lookup(held["dist"].inode, os.fsencode(name)))).inode == inode
        assert (await ask(operations.lookup(held["dist"].inode, b"nothing"))).inode == 0
    async with nobody_asked(source), process(tmp_path, source) as operations:
        assert await look(operations, "app/v1/dist/data") == held["dist/data"]
        assert await names(operations, app.inode) == [("v1", held[""].inode)]


async def test_two_hundred_who_ask_at_once_have_the_layer_opened_once(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with process(tmp_path, source) as operations:
        inode = (await look(operations, "app/v1/dist/data")).inode
        await ask(operations.read(inode, 0, 1 << 20))
        await names(operations, (await look(operations, "app/v1")).inode)
    opened: list[App] = []

    async def check(number: int) -> None:
        if number % 2:
            assert await ask(operations.read(inode, number, 100)) == DATA[number : number + 100]
        else:
            assert (await ask(operations.getattr(inode))).size == len(DATA)

    async with nobody_asked(source), process(tmp_path, source) as operations:
        operations._catalog.on_open.append(lambda app, content: opened.append(app))
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(check, number)
    assert len(opened) == 1


async def test_a_layer_that_was_half_streamed_is_waited_for_in_the_next_process(
    tmp_path: Path, source: FakeSource
) -> None:
    layer = packed_layer(source)
    gate = Gate()
    gate.let(layer.size * 2 // 3)
    source.then(layer, Body(gate=gate))
    async with process(tmp_path, source) as operations:
        early = await look(operations, "app/v1/dist/data")
        folder = await look(operations, "app/v1/dist")
        assert await ask(operations.read(early.inode, 0, 1000)) == DATA[:1000]
        assert early.seconds == 0
    gate = Gate()
    source.then(layer, Body(gate=gate))
    answers: list[object] = []

    async def wait(answer: Callable[[], Any]) -> None:
        answers.append(await ask(answer()))

    async with process(tmp_path, source) as operations:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, lambda: operations.read(early.inode, 0, 1 << 20))
            nursery.start_soon(wait, lambda: operations.getattr(early.inode))
            nursery.start_soon(wait, lambda: operations.getattr(folder.inode))
            nursery.start_soon(wait, lambda: operations.lookup(folder.inode, b"data"))
            await gate.held.wait()
            await wait_all_tasks_blocked()
            assert answers == []
            gate.open()
        await names(operations, folder.inode)
        assert DATA in answers
        inodes = sorted(one.inode for one in answers if isinstance(one, Attributes))
        assert inodes == sorted([early.inode, early.inode, folder.inode])
    assert source.fetched(layer) == 2


def packed_layer(source: FakeSource) -> Descriptor:
    """The lower one of the image, of which random data do not become smaller."""
    return source.put_layer(TAR, packed=True)


@pytest.mark.parametrize("what", ["getattr", "read", "readlink"])
async def test_a_layer_that_nobody_knows_any_more_is_stale(
    tmp_path: Path, source: FakeSource, what: str
) -> None:
    async with process(tmp_path, source) as operations:
        inode = (await look(operations, "app/v1/dist/data")).inode
        place = parse_inode(inode)
        assert isinstance(place, Content)
        numbers = operations._numbers
        key = numbers.layer_key(place.layer)
        assert key is not None
        numbers.renew_layer(key)
    answers = {
        "getattr": lambda: operations.getattr(inode),
        "read": lambda: operations.read(inode, 0, 1),
        "readlink": lambda: operations.readlink(inode),
    }
    async with nobody_asked(source), process(tmp_path, source) as operations:
        await fails(errno.ESTALE, lambda: ask(answers[what]()))


async def test_a_layer_of_several_tags_is_opened_by_one_that_can_be(
    tmp_path: Path, source: FakeSource
) -> None:
    shared = source.put_layer(TAR, packed=True)
    for tag in ("v1", "v2", "v3"):
        source.put_image(tag, [shared, source.put_layer(archive(Member(tag.encode())))])
    async with process(tmp_path, source, "gone", "app") as operations:
        for path in ("app/v1", "app/v2", "app/v3", "gone/v3"):
            inode = (await look(operations, f"{path}/dist/data")).inode
        await ask(operations.read(inode, 0, 1 << 20))
        await names(operations, (await look(operations, "app/v1")).inode)
        digests = {tag: source.listed[tag] for tag in ("v1", "v2", "v3")}
    for tag in ("v2", "v3"):
        (tmp_path / "manifests" / f"sha256-{digests[tag].hex}").unlink()
    source.away = GONE
    async with process(tmp_path, source) as operations:
        opened: list[str] = []
        operations._catalog.on_open.append(lambda app, content: opened.append(app.name))
        assert await ask(operations.read(inode, 0, 100)) == DATA[:100]
        assert opened == ["app"]
    # Of an app that there is not any more it is good enough.
    async with process(tmp_path, source, "other") as operations:
        assert await ask(operations.read(inode, 0, 100)) == DATA[:100]
    (tmp_path / "manifests" / f"sha256-{digests['v1'].hex}").unlink()
    async with process(tmp_path, source) as operations:
        await fails(errno.EHOSTUNREACH, lambda: ask(operations.read(inode, 0, 100)))


# -------------------- attributes


async def test_no_attribute_changes_at_a_restart(tmp_path: Path, source: FakeSource) -> None:
    paths = [
        "",
        "team",
        "team/app",
        "other",
        "team/app/v1",
        "team/app/v2",
        "other/v1",
        "team/app/v1/dist/folder",
    ]
    source.listed["v2"] = source.listed["v1"]

    async def every(operations: Operations) -> list[Attributes]:
        return [await look(operations, path) for path in paths]

    apps = ("team/app", "other")
    async with process(tmp_path, source, *apps) as operations:
        await names(operations, (await look(operations, "team/app")).inode)
        await names(operations, (await look(operations, "team/app/v1")).inode)
        await look(operations, "other/v1")
        before = await every(operations)
        assert before == await every(operations)
    for _ in range(2):
        async with process(tmp_path, source, *apps) as operations:
            # Before and after anything is opened.
            assert await every(operations) == before
            for one in before:
                assert await ask(operations.getattr(one.inode)) == one
            assert await every(operations) == before


async def test_a_folder_that_shows_other_apps_than_before_the_restart_has_changed(
    tmp_path: Path, source: FakeSource
) -> None:
    # By that the kernel knows that the listing which it keeps is old.
    times = []
    for apps in (("a/x", "b"), ("a/x", "b"), ("a/x", "a/y", "b"), ("a/x", "a/y"), ("a/x", "a/y")):
        async with process(tmp_path, source, *apps) as operations:
            times.append([(await look(operations, path)).mtime_ns for path in ("", "a")])
    root, inner = zip(*times, strict=True)
    assert root[0] == root[1] == root[2] < root[3] == root[4]
    assert inner[0] == inner[1] < inner[2] == inner[3] == inner[4]


# -------------------- without the registry


async def test_when_the_registry_is_down_at_the_start_tags_are_listed_as_last_known_and_known_ones_open(
    tmp_path: Path, source: FakeSource, mock_clock: MockClock
) -> None:
    source.listed["v2"] = source.put_image(None, [source.put_layer(archive(Member(b"two")))])
    source.listed["hidden"] = source.listed["v1"]
    async with process(tmp_path, source) as operations:
        for tag in ("v1", "hidden"):
            await names(operations, (await look(operations, f"app/{tag}")).inode)
        await ask(operations.read((await look(operations, "app/v1/dist/data")).inode, 0, 1 << 20))
        del source.listed["hidden"]
        listed = await names(operations, (await look(operations, "app")).inode)
        assert {name for name, _ in listed} == {"v1", "v2"}
    async with nobody_asked(source), process(tmp_path, source) as operations:
        app = await look(operations, "app")
        assert await names(operations, app.inode) == listed
        data = await look(operations, "app/v1/dist/data")
        assert await ask(operations.read(data.inode, 0, 1 << 20)) == DATA
        # What was opened once is known, listed or not.
        hidden = await look(operations, "app/hidden")
        assert ("dist", (await look(operations, "app/hidden/dist")).inode) in await names(
            operations, hidden.inode
        )
    source.away = GONE
    async with process(tmp_path, source) as operations:
        v2 = await look(operations, "app/v2")
        await fails(errno.EHOSTUNREACH, lambda: names(operations, v2.inode))
        await fails(errno.EHOSTUNREACH, lambda: ask(operations.lookup(v2.inode, b"two")))
        await fails(errno.EHOSTUNREACH, lambda: ask(operations.lookup(app.inode, b"never-heard-of")))
    source.away, source.silent = None, Gate()
    async with process(tmp_path, source) as operations, trio.open_nursery() as nursery:
        v2 = await look(operations, "app/v2")
        nursery.start_soon(fails, errno.ETIMEDOUT, lambda: names(operations, v2.inode))
        await source.silent.held.wait()
        mock_clock.jump(10)


async def test_a_tag_that_was_deleted_at_the_source_disappears_with_the_next_listing(
    tmp_path: Path, source: FakeSource
) -> None:
    source.listed["v2"] = source.listed["v1"]
    async with process(tmp_path, source) as operations:
        app = await look(operations, "app")
        await names(operations, app.inode)
        held = await look(operations, "app/v2/dist/data")
    del source.listed["v2"]
    async with process(tmp_path, source) as operations:
        assert {name for name, _ in await names(operations, app.inode)} == {"v1", "v2"}
        assert (await look(operations, "app/v2")).inode
        catalog = operations._catalog
        await catalog.ask_tags(catalog.apps["app"])
        assert {name for name, _ in await names(operations, app.inode)} == {"v1"}
        assert (await ask(operations.lookup(app.inode, b"v2"))).inode == 0
        assert (await ask(operations.getattr(held.inode))).inode == held.inode
    async with process(tmp_path, source) as operations:
        assert (await ask(operations.lookup(app.inode, b"v2"))).inode == 0
