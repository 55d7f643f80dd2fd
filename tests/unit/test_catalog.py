"""Apps, tags and views: asked once for many, known for ever, and looked after in the background."""

import os
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount.archive.span import Trust
from fsmount.cache.listings import Listings
from fsmount.cache.numbers import Numbers, ViewRecord
from fsmount.catalog import VIEW_ROOT, App, Catalog, Content, View
from fsmount.errors import (
    AccessDenied,
    Corrupt,
    DeadlineExpired,
    FsmountError,
    NoSpace,
    NotFound,
    Unreachable,
)
from fsmount.oci.digest import Digest
from fsmount.oci.platform import Platform
from fsmount.policy import Indexes
from tests.fakes.source import Body, FakeSource, Gate, open_layers
from tests.fakes.tar import DIRECTORY, Member, archive

AMD64 = Platform("linux", "amd64")
GONE = Unreachable("the registry went away")


@pytest.fixture
def source() -> FakeSource:
    """With one image of one file, as `v1`."""
    source = FakeSource()
    put(source, "v1", b"first")
    return source


def put(source: FakeSource, tag: str | None, name: bytes) -> Digest:
    """An image of a file of that name in `dist`."""
    layer = source.put_layer(archive(Member(b"dist/", type=DIRECTORY), Member(b"dist/" + name, name)))
    return source.put_image(tag, [layer])


def app(
    source: FakeSource, name: str = "web", *, path: bytes = b"", platform: Platform = AMD64, tags: str = "*"
) -> App:
    subtree = tuple(path.split(b"/")) if path else ()
    return App(name, source, subtree, platform, lambda tag: fnmatchcase(tag, tags), refresh_seconds=60)


@asynccontextmanager
async def open_catalog(cache: Path, *apps: App) -> AsyncIterator[Catalog]:
    """The catalog of one process, which looks after what it knows."""
    async with open_layers(cache) as layers:
        catalog = Catalog(apps, layers, layers.nursery)
        layers.nursery.start_soon(catalog.freshness.run)
        yield catalog


async def names(content: Content) -> list[bytes]:
    """What a view shows."""
    stored = await content.tree.stored()
    return [child.node.name for child in stored.children(content.directory(VIEW_ROOT))]


# -------------------- tags


async def test_tags_are_listed_once_for_all_who_ask_and_again_behind_the_scenes_when_they_are_old(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    source.silent = Gate()
    got: list[frozenset[str]] = []

    async def ask() -> None:
        got.append(await catalog.tags(web))

    web = app(source)
    async with open_catalog(tmp_path, web) as catalog:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask)
            await source.silent.held.wait()
            source.silent.open()
        assert got == [{"v1"}] * 10
        put(source, "v2", b"second")
        changed = catalog.changed_ns("web")
        # It takes up to a fifth longer: servers that started together drift apart.
        for seconds, expected in ((0, {"v1"}), (59, {"v1"}), (13, {"v1", "v2"}), (59, {"v1", "v2"})):
            mock_clock.jump(seconds)
            await wait_all_tasks_blocked()
            assert await catalog.tags(web) == expected
        assert source.asked["tags"] == 2
        later = catalog.changed_ns("web")
        assert changed is not None and later is not None and later > changed
        mock_clock.jump(13)
        await wait_all_tasks_blocked()
        assert source.asked["tags"] == 3
        assert catalog.changed_ns("web") == later, "nothing has changed"


async def test_housekeeping_and_what_no_pattern_matches_is_not_listed_but_opens_by_name(
    tmp_path: Path, source: FakeSource
) -> None:
    hidden = [f"sha256-{'a' * 64}{end}" for end in ("", ".sig", ".att", ".sbom")]
    for tag in ("v2", "latest", "no tag", *hidden):
        source.listed[tag] = source.listed["v1"]
    web = app(source, tags="v*")
    everything = app(source, "all")
    async with open_catalog(tmp_path, web, everything) as catalog:
        assert await catalog.tags(web) == {"v1", "v2"}
        assert await catalog.tags(everything) == {"latest", "v1", "v2"}
        for tag in ("latest", hidden[0]):
            content = await catalog.content(await catalog.view(web, tag))
            assert content.image.digest == source.listed["v1"]


# -------------------- views


async def test_a_listed_tag_is_not_asked_for_until_somebody_looks_inside_and_then_once(
    tmp_path: Path, source: FakeSource
) -> None:
    web = app(source)
    async with open_catalog(tmp_path, web) as catalog:
        await catalog.tags(web)
        view = await catalog.view(web, "v1")
        assert view is await catalog.view(web, "v1") is catalog.view_numbered(view.number)
        assert (catalog.attributes(view), view.created, catalog.ready(view)) == (None, None, None)
        assert source.asked["v1"] == 0
        contents: list[Content] = []

        async def look() -> None:
            contents.append(await catalog.content(view))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(look)
        assert all(content is contents[0] is catalog.ready(view) for content in contents)
        assert view.record.digest == source.listed["v1"]
        assert source.asked["v1"] == source.asked[f"manifest {source.listed['v1']}"] == 1
        await contents[0].tree.stored()
        attributes = catalog.attributes(view)
        assert attributes is not None and attributes.mode == 0o755
        assert view.created is not None and view.created.year == 2024


async def test_a_tag_that_moved_is_a_new_view_and_who_is_inside_the_old_one_stays_there(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    web = app(source, path=b"dist")
    async with open_catalog(tmp_path, web) as catalog:
        old = await catalog.view(web, "v1")
        assert await names(await catalog.content(old)) == [b"first"]
        put(source, "v1", b"second")
        source.silent = Gate()
        mock_clock.jump(59)
        await wait_all_tasks_blocked()
        assert await catalog.view(web, "v1") is old
        assert source.asked["v1"] == 1
        mock_clock.jump(13)
        await source.silent.held.wait()
        for _ in range(3):
            assert await catalog.view(web, "v1") is old, "known: answered at once"
        source.silent.open()
        await wait_all_tasks_blocked()
        assert source.asked["v1"] == 2
        assert source.known == [None, old.record.digest], "the registry need not say it again"
        # Who looks next gets the new one, whenever that is.
        mock_clock.jump(5)
        new = await catalog.view(web, "v1")
        assert new.number != old.number
        assert await names(await catalog.content(new)) == [b"second"]
        assert await names(await catalog.content(old)) == [b"first"]
        assert catalog.view_numbered(old.number) is old
        # A tag that has not moved stays the view that it is.
        mock_clock.jump(67)
        await wait_all_tasks_blocked()
        assert await catalog.view(web, "v1") is new
        assert source.asked["v1"] == 3


async def test_a_tag_that_vanished_is_gone_also_for_the_next_process_and_its_view_stays(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    web = app(source, path=b"dist")
    async with open_catalog(tmp_path, web) as catalog:
        view = await catalog.view(web, "v1")
        await catalog.content(view)
        digest = source.listed.pop("v1")
        mock_clock.jump(72)
        await wait_all_tasks_blocked()
        with pytest.raises(NotFound):
            await catalog.view(web, "v1")
        assert await names(await catalog.content(view)) == [b"first"]
    async with open_catalog(tmp_path, web) as catalog:
        with pytest.raises(NotFound):
            await catalog.view(web, "v1")
        source.listed["v1"] = digest
        again = await catalog.view(web, "v1")
        assert again.number != view.number
        assert await names(await catalog.content(again)) == [b"first"]


@pytest.mark.parametrize("reason", ["away", "silent"])
async def test_when_the_registry_went_away_what_was_known_stays_and_new_names_are_unreachable(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource, reason: str
) -> None:
    gate = Gate()

    async def answer(ask: Callable[[], Awaitable[object]]) -> object:
        """What comes of it, after ten seconds if need be: a value or an error."""
        got: list[object] = []

        async def run() -> None:
            try:
                got.append(await ask())
            except FsmountError as error:
                got.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await wait_all_tasks_blocked()
            mock_clock.jump(10)
        return got[0]

    web, blog = app(source), app(source, "blog")
    async with open_catalog(tmp_path, web, blog) as catalog:
        await catalog.tags(web)
        view = await catalog.view(web, "v1")
        await names(await catalog.content(view))
        if reason == "away":
            source.away = GONE
        else:
            source.silent = gate
        mock_clock.jump(72)
        for _ in range(2):
            assert await answer(lambda: catalog.tags(web)) == {"v1"}
            assert await catalog.view(web, "v1") is view
            await wait_all_tasks_blocked()
        assert (source.asked["tags"], source.asked["v1"]) == (2, 2), "once a minute, also in vain"
        assert await names(await catalog.content(view)) == [b"dist"]
        for ask in (lambda: catalog.tags(blog), lambda: catalog.view(web, "v2")):
            assert isinstance(await answer(ask), Unreachable)
        # After some minutes the registry is asked again, and then also for the rest.
        source.away = None
        gate.open()
        put(source, "v2", b"second")
        for _ in range(2):
            mock_clock.jump(144)
            await wait_all_tasks_blocked()
        assert await catalog.tags(web) == {"v1", "v2"}
        assert (await catalog.view(web, "v2")).app is web


@pytest.mark.parametrize("error", [GONE, AccessDenied("no"), NotFound("no such repository")])
async def test_a_listing_of_which_nothing_is_known_tells_what_went_wrong_and_is_tried_again(
    tmp_path: Path, source: FakeSource, error: FsmountError
) -> None:
    web = app(source)
    async with open_catalog(tmp_path, web) as catalog:
        source.away = error
        for _ in range(2):
            assert catalog.changed_ns("web") is None
            with pytest.raises(type(error)):
                await catalog.tags(web)
        source.away = None
        assert await catalog.tags(web) == {"v1"}


# -------------------- restarts


async def test_views_and_numbers_are_the_same_after_a_restart_and_open_without_the_registry(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    web = app(source, path=b"dist")
    async with open_catalog(tmp_path, web) as catalog:
        await catalog.tags(web)
        view = await catalog.view(web, "v1")
        content = await catalog.content(view)
        assert await names(content) == [b"first"]
        layer = content.tree.layers[0].number
    source.away = GONE
    async with open_catalog(tmp_path, web) as catalog:
        before = source.asked.total()
        again = catalog.view_numbered(view.number)
        assert again is not None and again.record == view.record
        assert await catalog.view(web, "v1") is again
        content = await catalog.content(again)
        assert content.tree.layers[0].number == layer
        assert await names(content) == [b"first"]
        await wait_all_tasks_blocked()
        assert source.asked.total() == before
    source.away = None
    put(source, "v1", b"second")
    async with open_catalog(tmp_path, web) as catalog:
        assert (await catalog.view(web, "v1")).record == view.record
        mock_clock.jump(60)
        await wait_all_tasks_blocked()
        assert (await catalog.view(web, "v1")).number != view.number


async def test_a_view_that_another_process_has_bound_shows_what_that_says(
    tmp_path: Path, source: FakeSource
) -> None:
    other = put(source, None, b"other")
    web = app(source, path=b"dist")
    async with open_catalog(tmp_path, web) as catalog:
        await catalog.tags(web)
        view = await catalog.view(web, "v1")
        with closing(Numbers(tmp_path / "state.sqlite")) as numbers:
            numbers.bind_view(view.number, other)
        assert await names(await catalog.content(view)) == [b"other"]
        assert view.record.digest == other


async def test_what_nobody_has_looked_into_is_nothing_when_its_app_is_gone_or_comes_from_elsewhere(
    tmp_path: Path, source: FakeSource
) -> None:
    web = app(source)
    async with open_catalog(tmp_path, web) as catalog:
        await catalog.tags(web)
        number = (await catalog.view(web, "v1")).number
        assert catalog.view_numbered(number + 1) is None
    for apps in changed_apps(source):
        async with open_catalog(tmp_path, *apps) as catalog:
            assert catalog.view_numbered(number) is None
            if apps:
                assert (await catalog.view(apps[0], "v1")).number != number
    async with open_catalog(tmp_path, web) as catalog:
        assert (await catalog.view(web, "v1")).number == number


def changed_apps(source: FakeSource) -> list[list[App]]:
    """Configurations in which nothing is left of an app `web` that shows all of amd64."""
    elsewhere = FakeSource(name="registry.example/team/moved")
    elsewhere.listed, elsewhere._documents, elsewhere._blobs = source.listed, source._documents, source._blobs
    return [
        [],
        [app(source, "other")],
        [app(source, path=b"dist")],
        [app(source, platform=Platform("linux", "arm64"))],
        [app(elsewhere)],
    ]


async def test_who_is_below_an_app_that_is_gone_or_comes_from_elsewhere_stays_there_as_far_as_it_is_cached(
    tmp_path: Path, source: FakeSource
) -> None:
    web = app(source)
    other = put(source, "v2", b"second")
    async with open_catalog(tmp_path, web) as catalog:
        view = await catalog.view(web, "v1")
        assert await names(await catalog.content(view)) == [b"dist"]
        unread = await catalog.view(web, "v2")
        assert unread.record.digest == other
    for apps in changed_apps(source):
        before = source.asked.total()
        async with open_catalog(tmp_path, *apps) as catalog:
            opened: list[str] = []
            catalog.on_open.append(lambda app, content, opened=opened: opened.append(app.name))  # type: ignore[misc]
            again = catalog.view_numbered(view.number)
            assert again is not None and again.record == view.record
            content = await catalog.content(again)
            assert await names(content) == [b"dist"]
            layer = content.tree.layers[0]
            assert await layer.read_stream(0, 10) == b"dist/".ljust(10, b"\0")
            never = catalog.view_numbered(unread.number)
            assert never is not None
            with pytest.raises(Unreachable, match="no app of the configuration"):
                await catalog.content(never)
            assert opened == []
            for one in apps:
                assert await catalog.view(one, "v1") is not again
        assert source.asked.total() - before <= 1, "for the tag of the app that there is"


# -------------------- names


async def test_a_digest_names_what_it_names_for_ever_with_a_tag_before_it_or_not(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    digest = source.listed["v1"]
    web = app(source, path=b"dist")
    async with open_catalog(tmp_path, web) as catalog:
        for name in (str(digest), f"v1@{digest}", f"never-pushed@{digest}"):
            view = await catalog.view(web, name)
            put(source, "v1", b"second")
            mock_clock.jump(1000)
            assert await catalog.view(web, name) is view
            assert await names(await catalog.content(view)) == [b"first"]
        await wait_all_tasks_blocked()
        assert source.asked[str(digest)] == 3
        assert source.asked["v1"] == 0
        with pytest.raises(NotFound):
            await catalog.view(web, str(Digest.of(b"nothing")))


NO_NAMES = [
    "",
    ".",
    "..",
    ".hidden",
    "-x",
    "a b",
    "a/b",
    "é",
    "x" * 129,
    "v1\n",
    "a:b",
    "v1@",
    "@",
    "v1@v2",
    "sha256:",
]
NO_DIGESTS = ["sha256:" + "A" * 64, "v1@sha256:" + "a" * 63, "@sha256:" + "a" * 64, "a b@sha256:" + "a" * 64]


@pytest.mark.parametrize("name", NO_NAMES + NO_DIGESTS)
async def test_a_name_that_has_not_the_form_of_a_tag_does_not_exist_and_nobody_is_asked(
    tmp_path: Path, source: FakeSource, name: str
) -> None:
    web = app(source)
    async with open_catalog(tmp_path, web) as catalog:
        with pytest.raises(NotFound):
            await catalog.view(web, name)
    assert source.asked.total() == 0


@pytest.mark.parametrize("question", ["tags", "view", "resolving", "manifest", "open"])
async def test_a_registry_has_ten_seconds_to_answer_about_names(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource, question: str
) -> None:
    web = app(source)

    async def ask(view: View | None) -> None:
        with pytest.raises(DeadlineExpired, match="10 s"):
            if question == "tags":
                await catalog.tags(web)
            elif question == "open":
                await catalog.open(web, None)
            elif view is not None:
                await catalog.content(view)
            else:
                await catalog.view(web, "v1")

    async with open_catalog(tmp_path, web) as catalog:
        if question == "resolving":
            await catalog.tags(web)
        view = await catalog.view(web, "v1") if question in ("resolving", "manifest") else None
        source.silent = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, view)
            await source.silent.held.wait()
            mock_clock.jump(9.9)
            await wait_all_tasks_blocked()
            assert nursery.child_tasks
            mock_clock.jump(0.1)


# -------------------- content


async def test_of_an_index_each_app_shows_the_image_for_its_platform(
    tmp_path: Path, source: FakeSource
) -> None:
    images = {"linux/amd64": put(source, None, b"amd64"), "linux/arm64": put(source, None, b"arm64")}
    index = source.put_index("v1", images)
    async with open_catalog(tmp_path) as catalog:
        for platform, digest in images.items():
            web = app(source, path=b"dist", platform=Platform.parse(platform))
            content = await catalog.open(web, "v1")
            assert content.image.digest == content.tree.digest == digest
            assert content.key[0] == index
            assert await names(content) == [platform.removeprefix("linux/").encode()]
        with pytest.raises(NotFound, match="s390x"):
            await catalog.open(app(source, platform=Platform.parse("linux/s390x")), "v1")


async def test_a_folder_that_the_image_has_not_is_not_found_and_neither_is_one_that_is_a_file(
    tmp_path: Path, source: FakeSource
) -> None:
    async with open_catalog(tmp_path) as catalog:
        for path in (b"nothing", b"dist/first", b"dist/first/below"):
            with pytest.raises(NotFound, match="no folder"):
                await catalog.open(app(source, path=path), "v1")


async def test_an_error_of_opening_is_not_remembered(tmp_path: Path, source: FakeSource) -> None:
    web = app(source)
    async with open_catalog(tmp_path, web) as catalog:
        await catalog.tags(web)
        view = await catalog.view(web, "v1")
        errors: list[FsmountError] = [GONE, AccessDenied("no")]
        for error in errors:
            source.away = error
            with pytest.raises(type(error)):
                await catalog.content(view)
        source.away = None
        assert await names(await catalog.content(view)) == [b"dist"]


async def test_of_many_trees_the_least_recent_are_closed_and_open_again_when_asked(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsmount.views._OPEN_TREES", 2)
    tags = ["v1", "v2", "v3", "v4"]
    for tag in tags:
        put(source, tag, tag.encode())
    web = app(source, path=b"dist")

    def open_files() -> int:
        links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if entry.is_symlink()]
        kinds = tuple(str(tmp_path / kind) for kind in ("trees", "layers"))
        return sum(link.startswith(kinds) for link in links)

    async with open_catalog(tmp_path, web) as catalog:
        views = [await catalog.view(web, tag) for tag in tags]
        for _ in range(2):
            for view in views:
                assert await names(await catalog.content(view)) == [view.record.name.encode()]
                assert open_files() <= 4, "of each a tree and a layer"


# -------------------- trust


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are read in parts, however small they are."""
    monkeypatch.setattr("fsmount.lazy._WORTHWHILE", 1)


async def trust(content: Content) -> list[Trust]:
    """What each of its layers is believed on, once its tree is known."""
    await content.tree.stored()
    found = []
    for layer in content.tree.layers:
        assert layer.index is not None and layer.index.complete
        found.append(layer.index.trust)
    return found


@pytest.mark.usefixtures("lazy")
async def test_a_tag_is_read_by_hints_and_with_its_digest_by_nothing_that_nobody_vouches_for(
    tmp_path: Path, source: FakeSource
) -> None:
    digest = source.listed["v1"]
    web = app(source)
    async with open_catalog(tmp_path, web) as catalog:
        content = await catalog.content(await catalog.view(web, "v1"))
        assert await names(content) == [b"dist"]
        assert await trust(content) == [Trust.HINT]
        pinned = await catalog.content(await catalog.view(web, f"v1@{digest}"))
        assert await trust(pinned) == [Trust.CERTIFIED]
        assert await names(pinned) == [b"dist"]
        assert await trust(content) == [Trust.CERTIFIED], "they have the same layers"


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("by", ["view", "tag and digest", "open"])
async def test_with_a_digest_a_layer_that_is_new_is_streamed_and_verified(
    tmp_path: Path, source: FakeSource, by: str
) -> None:
    digest = source.listed["v1"]
    web = app(source)
    async with open_catalog(tmp_path, web) as catalog:
        if by == "open":
            content = await catalog.open(web, str(digest))
        else:
            name = str(digest) if by == "view" else f"v1@{digest}"
            content = await catalog.content(await catalog.view(web, name))
        assert await trust(content) == [Trust.CERTIFIED]


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("indexes", Indexes)
async def test_of_an_app_that_allows_no_hints_no_tag_is_read_by_one(
    tmp_path: Path, source: FakeSource, indexes: Indexes
) -> None:
    web = replace(app(source), indexes=indexes)
    async with open_catalog(tmp_path, web) as catalog:
        content = await catalog.open(web, "v1")
        assert await trust(content) == [Trust.HINT if indexes is Indexes.ANY else Trust.CERTIFIED]


@pytest.mark.usefixtures("lazy")
async def test_an_app_without_hints_does_not_take_what_another_app_reads_by_one(
    tmp_path: Path, source: FakeSource
) -> None:
    web, strict = app(source), replace(app(source, "strict"), indexes=Indexes.BOUND)
    async with open_catalog(tmp_path, web, strict) as catalog:
        assert await trust(await catalog.open(web, "v1")) == [Trust.HINT]
        assert await trust(await catalog.open(strict, "v1")) == [Trust.CERTIFIED]


@pytest.mark.usefixtures("lazy")
async def test_when_a_layer_cannot_be_verified_its_digest_does_not_open_and_its_tag_still_does(
    tmp_path: Path, mock_clock: MockClock, source: FakeSource
) -> None:
    digest = source.listed["v1"]
    web = app(source)
    async with open_catalog(tmp_path, web) as catalog:
        content = await catalog.open(web, "v1")
        assert await trust(content) == [Trust.HINT]
        source.then(content.tree.layers[0].spec.descriptor, Body(stop=0, error=GONE))
        with pytest.raises(Unreachable):
            await catalog.open(web, str(digest))
        assert await trust(await catalog.open(web, "v1")) == [Trust.HINT]
        assert await trust(await catalog.open(web, str(digest))) == [Trust.CERTIFIED], "the next one is lucky"


@pytest.mark.usefixtures("lazy")
async def test_a_digest_that_is_opened_while_a_hint_is_being_looked_up_is_not_read_by_it(
    tmp_path: Path, source: FakeSource
) -> None:
    digest = source.listed["v1"]
    web = app(source)
    gate = Gate()
    async with open_catalog(tmp_path, web) as catalog, trio.open_nursery() as nursery:
        content = await catalog.open(web, "v1")
        source.then(content.tree.layers[0].spec.descriptor, Body(gate=gate))
        nursery.start_soon(content.tree.stored)
        await gate.held.wait()
        pinned: list[Content] = []

        async def open_pinned() -> None:
            pinned.append(await catalog.open(web, str(digest)))

        async with trio.open_nursery() as opening:
            opening.start_soon(open_pinned)
            await wait_all_tasks_blocked()
            gate.open()
        assert await trust(pinned[0]) == [Trust.CERTIFIED]


# -------------------- folders


async def test_the_names_of_apps_make_the_folders_above_them(tmp_path: Path, source: FakeSource) -> None:
    apps = [app(source, name) for name in ("web", "team/a", "team/b", "team/deep/c")]
    async with open_catalog(tmp_path, *apps) as catalog:
        assert catalog.folders == {"": {"web", "team"}, "team": {"a", "b", "deep"}, "team/deep": {"c"}}
        assert list(catalog.apps.values()) == apps


async def test_a_name_whose_view_became_void_while_the_disk_was_full_opens_when_there_is_room_again(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> ViewRecord:
        raise NoSpace("no space left for state.sqlite")

    source.listed["v2"] = source.listed["v1"]
    async with open_layers(tmp_path) as layers:
        catalog = Catalog([web := app(source)], layers, layers.nursery)
        views = [await catalog.view(web, tag) for tag in ("v1", "v2")]
        (layer,) = (await catalog.content(views[0])).tree.layers
        await catalog.content(views[1])
        await layer.wait_complete()
        with monkeypatch.context() as full:
            full.setattr(Numbers, "new_view", fail)
            layers.renumber(layer, Corrupt("it was another one"), shown=True)
            for tag, view in zip(("v1", "v2"), views, strict=True):
                assert await catalog.view(web, tag) is view
                with pytest.raises(Corrupt):
                    await catalog.content(view)
        for tag, view in zip(("v1", "v2"), views, strict=True):
            again = await catalog.view(web, tag)
            assert again is not view, "the kernel keeps the names in the old one"
            assert await names(await catalog.content(again)) == [b"dist"]


async def test_a_tag_opens_as_soon_as_another_process_of_the_cache_has_written(
    tmp_path: Path, source: FakeSource
) -> None:
    async with open_layers(tmp_path) as layers:
        catalog = Catalog([web := app(source)], layers, layers.nursery)
        await catalog.tags(web)
        with closing(sqlite3.connect(tmp_path / "state.sqlite", isolation_level=None)) as other:
            found: list[list[bytes]] = []

            async def look() -> None:
                found.append(await names(await catalog.content(await catalog.view(web, "v1"))))

            async with trio.open_nursery() as nursery:
                other.execute("BEGIN IMMEDIATE")
                nursery.start_soon(look)
                await trio.sleep(0.2)
                assert found == []
                other.execute("COMMIT")
        assert found == [[b"dist"]]


@pytest.mark.parametrize("name", ["v1", "hidden"], ids=["listed", "asked for"])
async def test_a_name_that_is_looked_up_while_its_app_is_replaced_is_asked_of_the_new_one(
    tmp_path: Path, source: FakeSource, name: str
) -> None:
    source.listed["hidden"] = source.listed["v1"]
    new_source = FakeSource()
    put(new_source, "v1", b"first")
    old, new = app(source), app(new_source)
    async with open_catalog(tmp_path, old) as catalog:
        source.silent = Gate()
        found: list[View] = []

        async def look() -> None:
            found.append(await catalog.view(old, name))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await wait_all_tasks_blocked()
            catalog.replace_apps([new])
            source.silent.open()
        source.away = GONE
        (view,) = found
        assert view.app is new and await catalog.view(new, name) is view
        assert await names(await catalog.content(view)) == [b"dist"]
        # What is looked after is asked of the new one, too.
        assert new_source.asked[f"manifest {new_source.listed['v1']}"] == 1


async def test_a_view_that_is_opened_while_its_app_is_replaced_is_opened_from_the_new_one(
    tmp_path: Path, source: FakeSource
) -> None:
    new_source = FakeSource()
    put(new_source, "v1", b"first")
    old, new = app(source), app(new_source)
    async with open_catalog(tmp_path, old) as catalog:
        view = await catalog.view(old, "v1")
        source.silent = Gate()
        shown: list[Content] = []

        async def open_view() -> None:
            shown.append(await catalog.content(view))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_view)
            await wait_all_tasks_blocked()
            catalog.replace_apps([new])
            source.silent.open()
        assert [layer.source for layer in shown[0].tree.layers] == [new_source]


async def test_a_list_that_is_on_its_way_while_its_app_is_replaced_is_filtered_as_the_new_one_says(
    tmp_path: Path, source: FakeSource
) -> None:
    source.listed["main"] = source.listed["v1"]
    old, new = app(source), app(source, tags="v*")
    async with open_catalog(tmp_path, old) as catalog:
        await catalog.tags(old)
        source.silent = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(catalog.ask_tags, old)
            await wait_all_tasks_blocked()
            catalog.replace_apps([new])
            assert await catalog.tags(new) == {"v1"}
            source.silent.open()
        assert await catalog.tags(new) == {"v1"}


async def test_an_app_that_comes_back_lists_what_it_is_to_list_now(
    tmp_path: Path, source: FakeSource
) -> None:
    source.listed["main"] = source.listed["v1"]
    old, new = app(source), app(source, tags="v*")
    async with open_catalog(tmp_path, old) as catalog:
        await catalog.tags(old)
        catalog.replace_apps([])
        catalog.replace_apps([new])
        assert await catalog.tags(new) == {"v1"}


async def test_what_is_asked_for_while_its_app_is_replaced_is_looked_after_by_the_new_one(
    tmp_path: Path, source: FakeSource, mock_clock: MockClock
) -> None:
    new_source = FakeSource()
    put(new_source, "v1", b"first")
    old, new = app(source), app(new_source)
    async with open_catalog(tmp_path, old) as catalog:
        source.silent = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(catalog.tags, old)
            nursery.start_soon(catalog.view, old, "v1")
            await wait_all_tasks_blocked()
            catalog.replace_apps([new])
            source.silent.open()
        await catalog.content(await catalog.view(new, "v1"))
        mock_clock.jump(73)
        await wait_all_tasks_blocked()
        assert (new_source.asked["tags"], new_source.asked["v1"]) == (1, 1)


async def test_every_folder_whose_names_change_says_so_also_when_the_disk_is_full(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NoSpace("no space left for state.sqlite")

    apps = [app(source, "team/a"), app(source, "other/a")]
    async with open_catalog(tmp_path, *apps) as catalog:
        before = {path: catalog.changed_ns(path) for path in catalog.folders}
        monkeypatch.setattr(Listings, "save", fail)
        catalog.replace_apps([*apps, *(app(source, f"{path}/b") for path in ("team", "other", "new"))])
        changed = {path for path in catalog.folders if catalog.changed_ns(path) != before.get(path)}
        assert changed == {"", "team", "other", "new"}
