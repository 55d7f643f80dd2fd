"""Whether a repository can be asked, as it turns out when it is."""

from datetime import UTC, datetime, timedelta

import pytest
import trio
from trio.testing import MockClock

from fsmount.errors import FsmountError, NotFound
from fsmount.oci.reference import Reference, parse_source
from fsmount.registry.open import Sources
from fsmount.registry.source import Source
from fsmount.registry.standing import Standing
from tests.fakes.registry import FakeRegistry, Network, Reply, cut, descriptor_of, error, silent

HOST = "registry.example"
BLOB = bytes(range(256)) * 40


@pytest.fixture
def fake() -> FakeRegistry:
    fake = FakeRegistry(host=HOST)
    fake.then("GET", "tags/list", Reply(body=b'{"tags": ["v1"]}'))
    fake.put_blob(BLOB)
    return fake


def opened(sources: Sources) -> tuple[Source, Standing]:
    source = sources.open(Reference.parse(f"{HOST}/team/web"))
    standing = sources.standing(source)
    assert standing is not None
    return source, standing


async def in_vain(source: Source) -> None:
    with pytest.raises(FsmountError):
        await source.resolve("v1")


async def test_of_a_repository_that_answers_there_is_nothing_to_tell(fake: FakeRegistry) -> None:
    async with Sources(transport=Network({HOST: fake}).transport) as sources:
        source, standing = opened(sources)
        assert standing.trouble is None
        assert await source.tags() == ["v1"]
        with pytest.raises(NotFound):
            await source.resolve("nothing")
        assert (standing.failures, standing.trouble) == (0, None)
        assert sources.standing(sources.open(parse_source("oci-layout:/layout"))) is None


@pytest.mark.parametrize("status, message", [(503, "503"), (401, "registry.example"), (429, "429")])
async def test_what_is_not_answered_or_refused_is_trouble_until_the_next_answer(
    fake: FakeRegistry, mock_clock: MockClock, status: int, message: str
) -> None:
    mock_clock.autojump_threshold = 0
    before = datetime.now(UTC)
    fake.then("HEAD", "manifests/v1", *[error(status, "X")] * 3)
    fake.then("GET", "manifests/v1", *[error(status, "X")] * 3)
    async with Sources(transport=Network({HOST: fake}).transport) as sources:
        source, standing = opened(sources)
        await in_vain(source)
        trouble = standing.trouble
        assert trouble is not None and not trouble.is_over and standing.failures == 1
        assert message in trouble.message
        assert timedelta(0) <= trouble.at - before < timedelta(minutes=1)
        await source.tags()
        assert standing.trouble is not None and standing.trouble.is_over
        assert standing.trouble.message == trouble.message
        assert standing.trouble.is_refusal == trouble.is_refusal == (status == 401)


async def test_trouble_is_told_with_its_beginning_and_its_last_time(
    fake: FakeRegistry, mock_clock: MockClock
) -> None:
    mock_clock.autojump_threshold = 0
    async with Sources(transport=Network({HOST: fake}).transport) as sources:
        source, standing = opened(sources)
        for method in ("HEAD", "GET"):
            fake.then(method, "manifests/v1", *[error(503, "UNAVAILABLE")] * 9)
        await in_vain(source)
        first = standing.trouble
        await in_vain(source)
        second = standing.trouble
        assert first is not None and second is not None
        assert first.since == first.at == second.since < second.at
        await source.tags()
        fake.then("GET", "tags/list", *[error(503, "UNAVAILABLE")] * 3)
        with pytest.raises(FsmountError):
            await source.tags()
        third = standing.trouble
        assert third is not None and second.at < third.since == third.at, "after an answer it is another"


async def test_two_apps_of_one_repository_have_the_same_trouble(fake: FakeRegistry) -> None:
    fake.then("HEAD", "manifests/v1", error(403, "DENIED"))
    fake.then("GET", "manifests/v1", error(403, "DENIED"))
    async with Sources(transport=Network({HOST: fake}).transport) as sources:
        (one, standing), (_, other) = opened(sources), opened(sources)
        await in_vain(one)
        assert standing.failures == other.failures == 1


async def test_a_server_that_says_nothing_is_trouble_for_whoever_gives_up(
    fake: FakeRegistry, mock_clock: MockClock
) -> None:
    mock_clock.autojump_threshold = 0
    fake.then("HEAD", "manifests/v1", silent(Reply()))
    async with Sources(transport=Network({HOST: fake}).transport) as sources:
        source, standing = opened(sources)
        with trio.move_on_after(1):  # as a user who has thought better of it
            await source.resolve("v1")
        assert standing.trouble is None
        fake.then("HEAD", "manifests/v1", silent(Reply()))
        with trio.move_on_after(10):
            await source.resolve("v1")
        assert standing.trouble is not None
        assert standing.trouble.message == f"{HOST}/team/web has not answered for 10 s"


async def test_a_blob_that_breaks_off_for_good_is_trouble_and_one_that_is_left_alone_is_none(
    fake: FakeRegistry, mock_clock: MockClock
) -> None:
    mock_clock.autojump_threshold = 0
    async with Sources(transport=Network({HOST: fake}).transport) as sources:
        source, standing = opened(sources)
        async with source.blob(descriptor_of(BLOB)) as pieces:
            with trio.move_on_after(60):
                await anext(pieces)
                await trio.sleep_forever()
        assert standing.trouble is None
        fake.then("GET", "blobs/", *[cut(0)] * 3)
        with pytest.raises(FsmountError):
            async with source.blob(descriptor_of(BLOB)) as pieces:
                async for _ in pieces:
                    pass
        assert standing.trouble is not None and not standing.trouble.is_over
        assert standing.failures == 1
        fake.then("GET", "blobs/", cut(100), *[error(503, "UNAVAILABLE")] * 3)
        with pytest.raises(FsmountError):
            async with source.blob(descriptor_of(BLOB)) as pieces:
                async for _ in pieces:
                    pass
        assert standing.failures == 2, "that its rest cannot be asked for is the same failure"
