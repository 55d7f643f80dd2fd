"""Another configuration for a running process: what it names is shown, what it does not goes on for who is there."""

import errno
import inspect
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from fsmount.actions import Actions
from fsmount.change import ReloadReport
from fsmount.config import Config
from fsmount.configfile import load_config
from fsmount.engine import Engine, open_engine
from fsmount.errors import NotFound, UsageError
from fsmount.fuse.operations import Operations
from fsmount.fuse.protocol import Attributes, Refusal
from tests import peers
from tests.fakes.tar import DIRECTORY, Member, archive

TAR = archive(
    Member(b"dist/", type=DIRECTORY), Member(b"dist/file", b"content" * 1000), Member(b"other", b"other")
)


@pytest.fixture
def layouts(tmp_path: Path) -> Path:
    """Three repositories, each with two tags."""
    for name in ("one", "two", "three"):
        for tag in ("v1", "main"):
            config: Mapping[str, peers.Json] = {"created": f"2020-01-0{len(name)}T00:00:00Z"}
            peers.tar_layer_image(tmp_path / name, tag, [peers.pack(TAR)], config=config)
    return tmp_path


class File:
    """The configuration file of a process, and what is written into it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.path = work / "config.toml"

    def write(self, *apps: str, before: str = "", after: str = "") -> None:
        """apps: NAME, or NAME with further lines; each shows the layout of its last part."""
        text = f'{before}\n[cache]\npath = "{self.work}/cache"\n{after}\n'
        for app in apps:
            name, _, more = app.partition("\n")
            text += (
                f'[apps."{name}"]\nrepository = "oci-layout:{self.work}/{name.rpartition("/")[2]}"\n{more}\n'
            )
        self.path.write_text(text)

    def load(self) -> Config:
        return load_config(self.path, environ={})


@pytest.fixture
def file(layouts: Path) -> File:
    file = File(layouts)
    file.write("one", "team/two")
    return file


@asynccontextmanager
async def running(file: File) -> AsyncIterator[tuple[Engine, Operations]]:
    async with open_engine(file.load(), mount=Path("/srv")) as engine:
        yield engine, Operations(engine.catalog, engine.layers, engine.numbers)


async def ask(answer: Any) -> Any:
    """An answer that was given at once, or had to be waited for."""
    return await answer if inspect.isawaitable(answer) else answer


async def look(operations: Operations, path: str) -> Attributes:
    """The last of a series of look-ups that begins at the root; of what does not exist, inode 0."""
    inode, attributes = 1, await ask(operations.getattr(1))
    for name in path.split("/"):
        attributes = await ask(operations.lookup(inode, os.fsencode(name)))
        inode = attributes.inode
        if not inode:
            break
    return attributes


async def read(operations: Operations, inode: int) -> bytes:
    data = await ask(operations.read(inode, 0, 1 << 20))
    assert isinstance(data, bytes)
    return data


# -------------------- apps


async def test_apps_come_go_and_change_and_who_has_not_changed_is_not_touched(file: File) -> None:
    async with running(file) as (engine, operations):
        kept = engine.catalog.apps["one"]
        view = await engine.catalog.view(kept, "v1")
        content = await engine.catalog.content(view)
        held = await look(operations, "one/v1/dist/file")
        root = await ask(operations.getattr(1))
        file.write("one", "three")
        assert await engine.reload(file.load()) == ReloadReport(added=("three",), removed=("team/two",))
        assert engine.catalog.apps["one"] is kept
        assert await engine.catalog.view(kept, "v1") is view and view.content is content
        assert await look(operations, "one/v1/dist/file") == held
        assert (await look(operations, "three/v1/dist/file")).inode
        for gone in ("team", "team/two"):
            assert (await look(operations, gone)).inode == 0
        # By that the kernel knows that what it has listed is old.
        assert (await ask(operations.getattr(1))).mtime_ns > root.mtime_ns
        assert await engine.reload(file.load()) == ReloadReport()


async def test_who_is_below_an_app_that_is_gone_stays_there(file: File) -> None:
    async with running(file) as (engine, operations):
        opened = await look(operations, "team/two/v1/dist/file")
        folder = await look(operations, "team/two/v1/dist")
        never_read = await look(operations, "team/two/main")
        before = [await look(operations, path) for path in ("team", "team/two")]
        file.write("one")
        await engine.reload(file.load())
        assert await read(operations, opened.inode) == b"content" * 1000
        assert (await ask(operations.lookup(folder.inode, b"file"))).inode == opened.inode
        assert (await ask(operations.getattr(folder.inode))).inode == folder.inode
        assert (await ask(operations.lookup(never_read.inode, b"other"))).inode, (
            "its source is asked as before"
        )
        for one in before:
            with pytest.raises(Refusal) as caught:
                await ask(operations.getattr(one.inode))
            assert caught.value.errno == errno.ESTALE
        file.write("one", "team/two")
        await engine.reload(file.load())
        assert (await look(operations, "team/two/v1/dist/file")).inode == opened.inode
        assert [(await look(operations, path)).inode for path in ("team", "team/two")] == [
            one.inode for one in before
        ]


async def test_an_app_that_shows_another_folder_has_other_views_and_who_is_in_the_old_ones_stays(
    file: File,
) -> None:
    async with running(file) as (engine, operations):
        old = await look(operations, "one/v1")
        inner = await look(operations, "one/v1/dist")
        file.write('one\npath = "/dist"', "team/two")
        assert (await engine.reload(file.load())).changed == ("one",)
        new = await look(operations, "one/v1")
        assert new.inode != old.inode
        assert (await look(operations, "one/v1/file")).inode
        assert (await look(operations, "one/v1/dist")).inode == 0
        assert (await ask(operations.lookup(old.inode, b"dist"))).inode == inner.inode


async def test_an_app_of_which_only_the_rules_change_keeps_its_views_and_lists_by_the_new_rules_at_once(
    file: File,
) -> None:
    async with running(file) as (engine, _):
        app = engine.catalog.apps["one"]
        assert await engine.catalog.tags(app) == {"v1", "main"}
        view = await engine.catalog.view(app, "v1")
        content = await engine.catalog.content(view)
        opened: list[float] = []
        engine.catalog.on_open.append(lambda app, content: opened.append(app.refresh_seconds))
        changed = engine.catalog.changed_ns("one")
        file.write('one\ntags = ["v*"]\nrefresh = "5s"', "team/two")
        assert (await engine.reload(file.load())).changed == ("one",)
        new = engine.catalog.apps["one"]
        assert new is not app and new.refresh_seconds == 5
        assert await engine.catalog.view(new, "v1") is view
        assert view.app is new and view.content is content
        assert opened == [5], "who looks after what is open learns of it"
        assert await engine.catalog.tags(new) == {"v1"}
        after = engine.catalog.changed_ns("one")
        assert changed is not None and after is not None and after > changed


# -------------------- everything else


async def test_what_changes_of_registries_and_the_network_holds_for_the_next_question(file: File) -> None:
    remote = 'repository = "registry.example.com/web"'
    after = f"[apps.web]\n{remote}\n"
    file.write("one", after=after)
    async with running(file) as (engine, _):
        web, one, sources = engine.catalog.apps["web"], engine.catalog.apps["one"], engine.sources
        file.write("one", after=after + '[network]\nbackground_rate = "1 MB"')
        await engine.reload(file.load())
        assert engine.sources is sources, "that is nothing for those who ask"
        assert engine.config.network.background_rate == 1_000_000
        file.write("one", after=after + '[registries."registry.example.com"]\nplain_http = true')
        report = await engine.reload(file.load())
        assert report.changed == ()
        assert 'registries."registry.example.com"' in report.settings
        assert engine.sources is not sources
        new = engine.catalog.apps["web"]
        assert new.source is not web.source and new.origin == web.origin
        assert engine.catalog.apps["one"] is one, "of a folder nothing has changed"
        # What layers may still ask is open.
        assert sources._nursery is not None and not sources._nursery.cancel_scope.cancel_called


async def test_layers_that_are_open_are_fetched_from_where_their_app_has_them_now(file: File) -> None:
    async with running(file) as (engine, operations):
        await look(operations, "one/v1/dist/file")
        (layer,) = engine.layers
        before = layer.source
        file.write('one\nrefresh = "5s"', "team/two")
        await engine.reload(file.load())
        assert layer.source is engine.catalog.apps["one"].source is not before


async def test_bounds_are_in_force_at_once_and_what_needs_a_restart_is_named(file: File) -> None:
    async with running(file) as (engine, _):
        told: list[Config] = []
        engine.on_reload.append(told.append)
        file.write("one", "team/two", after='size = "1 GB"\nmin_free = "1 MB"\n[deadlines]\nnames = "3s"')
        report = await engine.reload(file.load())
        assert report.settings == ("cache.size", "cache.min_free", "deadlines.names")
        assert engine.catalog.names_seconds == 3
        assert engine.layers.chunks.size == 10**9
        assert told == [engine.config]
        file.work.joinpath("config.toml").write_text(
            file.path.read_text()
            .replace("/cache", "/elsewhere")
            .replace("[cache]", 'mountpoint = "/mnt"\n[cache]')
        )
        report = await engine.reload(file.load())
        assert report == ReloadReport(needs_restart=("mountpoint", "cache.path"))
        assert engine.config.cache.path == file.work / "cache"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("[apps.one]\nrepository = 5\nrefresh = 0\n[cache]\nsize = -1", ["repository", "refresh", "size"]),
        ("[apps.one\n", [":1:"]),
        ('[apps.one]\nrepository = "oci-layout:/x"\nrefesh = "1s"', ["did you mean refresh"]),
        (None, ["cannot be read"]),
    ],
)
async def test_a_bad_file_changes_nothing_and_all_that_is_wrong_is_said(
    file: File, text: str | None, problems: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async with running(file) as (engine, operations):
        held = await look(operations, "one/v1/dist/file")
        before = engine.config, dict(engine.catalog.apps), engine.sources
        if text is None:
            file.path.unlink()
        else:
            file.path.write_text(text)
        with pytest.raises(UsageError) as caught:
            await Actions(engine, file.load).reload()
        for problem in problems:
            assert problem in str(caught.value)
            assert problem in caplog.text
        assert (engine.config, dict(engine.catalog.apps), engine.sources) == before
        assert await look(operations, "one/v1/dist/file") == held


async def test_a_registry_that_cannot_be_one_changes_nothing(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(file) as (engine, _):
        apps = dict(engine.catalog.apps)
        file.write("one", after='[apps.web]\nrepository = "registry.example.com/web"\n[network]\ntries = 9')
        monkeypatch.setenv("https_proxy", "not a proxy")
        with pytest.raises(UsageError):
            await engine.reload(file.load())
        assert (dict(engine.catalog.apps), engine.config.network.tries) == (apps, 3)


# -------------------- as it is told to


async def test_the_actions_say_in_json_what_they_did_when_it_can_be_seen(
    file: File, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("fsmount.actions._KERNEL_SECONDS", 0.1)
    async with running(file) as (engine, operations):
        actions = Actions(engine, file.load)
        file.write("one", "three")
        began = trio.current_time()
        assert json.loads(await actions.reload(b"{}")) == {
            "added": ["three"],
            "removed": ["team/two"],
            "changed": [],
            "settings": [],
            "needs_restart": [],
        }
        assert trio.current_time() - began >= 0.1, "for so long the kernel keeps a name"
        assert "added three; removed team/two" in caplog.text
        await engine.catalog.tags(engine.catalog.apps["one"])
        before = await look(operations, "one/v1/dist/file")
        old = str((await engine.catalog.view(engine.catalog.apps["one"], "v1")).record.digest)
        peers.tar_layer_image(file.work / "one", "v1", [peers.pack(TAR), peers.pack(archive(Member(b"new")))])
        peers.tar_layer_image(file.work / "one", "v2", [peers.pack(TAR)])
        report = json.loads(await actions.refresh(b'{"what": "one"}'))
        (moved,) = report["moved"]
        assert (moved["app"], moved["tag"], moved["before"]) == ("one", "v1", old)
        assert report["appeared"] == [{"app": "one", "tag": "v2"}]
        assert (report["gone"], report["failures"], report["asked"]) == ([], [], 1)
        assert (await look(operations, "one/v1/new")).inode
        assert (await ask(operations.getattr(before.inode))).inode == before.inode
        assert json.loads(await actions.refresh(b'{"what": "one:v1"}'))["asked"] == 1
        assert json.loads(await actions.refresh(b""))["moved"] == []


@pytest.mark.parametrize("body", [b'{"what": "nothing"}', b'{"what": "nothing:v1"}'])
async def test_a_refresh_of_what_there_is_not_is_not_found(file: File, body: bytes) -> None:
    async with running(file) as (engine, _):
        with pytest.raises(NotFound, match="no app 'nothing'"):
            await Actions(engine, file.load).refresh(body)


@pytest.mark.parametrize("body", [b"what", b"[1]", b'{"what": 5}', b"\xff"])
async def test_a_body_of_another_form_is_refused(file: File, body: bytes) -> None:
    async with running(file) as (engine, _):
        with pytest.raises(UsageError, match="JSON"):
            await Actions(engine, file.load).refresh(body)
