"""The scenario of a boot without the registry: a mount that knows 50 apps of 40 tags, until it answers."""

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import trio

from fsmount.catalog import App, Catalog
from fsmount.oci.platform import Platform
from scripts.bench.bench import Bench, unmount
from scripts.bench.machine import Failed, timed
from scripts.bench.report import OURS, Ask
from tests.fakes.source import FakeSource, open_layers
from tests.fakes.tar import Member, archive

APPS, TAGS = 50, 40
READY = f"start to READY, {APPS} apps × {TAGS} known tags, s"
ASKED = "connections to the registry until then"
LIST = "listing all apps, s"
LOOK = f"a file of each of {APPS} trees, s"
EMPTY = "no apps"

ASKS = (Ask(READY, None, 1.0), Ask(ASKED, None, 0))


def boot(bench: Bench) -> None:
    """What is known is known at once, and no registry is asked: one that would count it, and never answers."""
    with _registry() as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        cache = bench.work / "boot"
        try:
            trio.run(_make_known, cache, host)
            bench.attempt(OURS, lambda: _measure(bench, cache, host, listener))
            bench.attempt(EMPTY, lambda: _measure_empty(bench))
        finally:
            shutil.rmtree(cache, ignore_errors=True)


def _measure(bench: Bench, cache: Path, host: str, listener: socket.socket) -> None:
    config = cache / "config.toml"
    config.write_text("".join(_table(host, number) for number in range(APPS)))
    with _mounted(bench, cache, config) as (point, seconds):
        asked = _accepted(listener)
        bench.record(READY, OURS, seconds)
        bench.record(ASKED, OURS, asked)
        listed = timed("ls -l */ | grep -c ^d", cwd=point)
        if int(listed.output) != APPS * TAGS:
            raise Failed(f"{listed.output.strip()} tags are listed of {APPS * TAGS}")
        bench.record(LIST, OURS, listed.seconds)
        read = timed("cat */v7/file | grep -c .", cwd=point)
        if int(read.output) != APPS:
            raise Failed(f"{read.output.strip()} files could be read of {APPS}")
        bench.record(LOOK, OURS, read.seconds)


def _measure_empty(bench: Bench) -> None:
    """What a start takes that knows nothing."""
    with bench.folder() as cache:
        config = cache / "config.toml"
        config.write_text("")
        with _mounted(bench, cache, config) as (_, seconds):
            bench.record(READY, EMPTY, seconds)


@contextmanager
def _mounted(bench: Bench, cache: Path, config: Path) -> Iterator[tuple[Path, float]]:
    """The mount point, and the seconds until the command returned. Raises: Failed."""
    point = bench.work / "mnt-boot"
    point.mkdir()
    try:
        done = timed([*bench.ours(), "mount", point, "--config", config, "--cache", cache])
        try:
            yield point, done.seconds
        finally:
            with suppress(Failed):
                timed([*bench.ours(), "unmount", point])
    finally:
        unmount(point)
        point.rmdir()


@contextmanager
def _registry() -> Iterator[socket.socket]:
    """A place where a registry was: it takes connections, and does not answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        listener.setblocking(False)
        yield listener


def _accepted(listener: socket.socket) -> int:
    """How many have connected."""
    count = 0
    with suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            count += 1
    return count


def _repository(host: str, number: int) -> str:
    return f"{host}/team/app{number:02d}"


def _table(host: str, number: int) -> str:
    return f'[apps.app{number:02d}]\nrepository = "{_repository(host, number)}"\n'


async def _make_known(cache: Path, host: str) -> None:
    """A cache as a process leaves it that has looked into every tag of every app."""
    apps = []
    pairs = list(product(range(45), repeat=2))  # few layers, and another image for every tag
    for number in range(APPS):
        source = FakeSource(_repository(host, number))
        blobs = [source.put_layer(archive(Member(b"file", b"%d\n" % one)), packed=True) for one in range(45)]
        for tag in range(TAGS):
            source.put_image(f"v{tag}", [blobs[one] for one in pairs[number * TAGS + tag]])
        apps.append(App(f"app{number:02d}", source, (), Platform.current(), lambda tag: True, 60.0))
    async with open_layers(cache, mount="elsewhere") as layers:
        catalog = Catalog(apps, layers, layers.nursery)
        for app in apps:
            for tag in await catalog.tags(app):
                view = await catalog.view(app, tag)
                await (await catalog.content(view)).tree.stored()
                catalog.attributes(view)
