"""When a mount publishes the index of what it shows: in a quiet moment, once, and only if it is told to."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount.catalog import App, Content
from fsmount.errors import AccessDenied
from fsmount.lazy import LayerSpec
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor
from fsmount.oci.platform import Platform
from fsmount.publisher import Publisher
from fsmount.traffic import Traffic
from tests.fakes.source import FakeSource

LAYER = Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", Digest.of(b"layer"), 1 << 25, {})


class Attempts:
    """The images for which an index was asked, and what became of that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[Digest] = []
        self.error: Exception | None = None
        monkeypatch.setattr("fsmount.publisher.publish_index", self._publish)
        monkeypatch.setattr("random.uniform", lambda least, most: most)

    async def _publish(self, source: object, image: Any, **options: object) -> object:
        assert options["destinations"] == ["where web is"]
        self.images.append(image.digest)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(index=Digest.of(b"index"), existed=False)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Attempts:
    caplog.set_level(logging.INFO)
    return Attempts(monkeypatch)


def app(*, publish_indexes: bool = True) -> App:
    return App(
        "web", FakeSource(), (), Platform.current(), lambda tag: True, 60.0, publish_indexes=publish_indexes
    )


def content(name: bytes = b"image", *, soci_index: Digest | None = None) -> Content:
    layers = (LayerSpec(LAYER, soci_index=soci_index),)
    return cast(Content, SimpleNamespace(image=SimpleNamespace(digest=Digest.of(name), layers=layers)))


@asynccontextmanager
async def publishing(traffic: Traffic, folder: Path) -> AsyncIterator[Publisher]:
    publisher = Publisher(traffic, folder, lambda app: cast(Any, f"where {app.name} is"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publisher.run)
        yield publisher
        nursery.cancel_scope.cancel()


async def passes_by(clock: MockClock, seconds: int) -> None:
    await wait_all_tasks_blocked()
    for _ in range(seconds // 5):
        clock.jump(5)
        await wait_all_tasks_blocked()


async def test_an_index_is_published_once_when_its_time_has_come(
    tmp_path: Path, mock_clock: MockClock, attempts: Attempts, caplog: pytest.LogCaptureFixture
) -> None:
    async with publishing(Traffic(), tmp_path) as publisher:
        for _ in range(3):
            publisher.use(app(), content())
        await passes_by(mock_clock, 295)
        assert attempts.images == [], "other servers of the fleet may have been quicker by then"
        await passes_by(mock_clock, 5)
        publisher.use(app(), content())
        await passes_by(mock_clock, 1000)
        assert attempts.images == [Digest.of(b"image")]
    assert "is published" in caplog.text


async def test_it_is_not_published_unasked_nor_where_the_image_names_one(
    tmp_path: Path, mock_clock: MockClock, attempts: Attempts
) -> None:
    async with publishing(Traffic(), tmp_path) as publisher:
        publisher.use(app(publish_indexes=False), content(b"one"))
        publisher.use(app(), content(b"other", soci_index=Digest.of(b"its own")))
        await passes_by(mock_clock, 1000)
    assert attempts.images == []


async def test_it_waits_while_somebody_waits_for_the_registry(
    tmp_path: Path, mock_clock: MockClock, attempts: Attempts
) -> None:
    traffic = Traffic()
    web = app()
    async with publishing(traffic, tmp_path) as publisher:
        publisher.use(web, content())
        async with traffic.turn(web.source.name, cast(Any, SimpleNamespace(urgent=True))):
            await passes_by(mock_clock, 600)
        await passes_by(mock_clock, 25)
        assert attempts.images == []
        await passes_by(mock_clock, 10)
        assert len(attempts.images) == 1


@pytest.mark.parametrize("error", [AccessDenied("no push"), RuntimeError("a mistake")])
async def test_a_failure_ends_nothing_and_is_tried_again_in_an_hour_if_it_was_foreseen(
    tmp_path: Path,
    mock_clock: MockClock,
    attempts: Attempts,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    attempts.error = error
    async with publishing(Traffic(), tmp_path) as publisher:
        publisher.use(app(), content())
        await passes_by(mock_clock, 3000)
        assert len(attempts.images) == 1
        publisher.use(app(), content(b"another"))
        await passes_by(mock_clock, 1500)
        assert attempts.images[1:] == (
            [Digest.of(b"another"), Digest.of(b"image")]
            if isinstance(error, AccessDenied)
            else [Digest.of(b"another")]
        )
    assert (
        "is not published: no push" if isinstance(error, AccessDenied) else "nobody foresaw"
    ) in caplog.text
