"""What is known is asked for again at most once in its time, not by all servers at once, and less in an outage."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount.errors import AccessDenied, FsmountError, Unreachable
from fsmount.freshness import Freshness

GONE = Unreachable("the registry went away")


class Asker:
    """Somebody who is asked; when that was is in `times`."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.error: Exception | None = None
        self.answers: trio.Event | None = None

    async def ask(self) -> None:
        self.times.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if self.answers is not None:
            await self.answers.wait()
        if self.error is not None:
            raise self.error

    @property
    def pauses(self) -> list[float]:
        return [after - before for before, after in pairwise(self.times)]


@pytest.fixture
def asker() -> Asker:
    return Asker()


@asynccontextmanager
async def running() -> AsyncIterator[Freshness]:
    freshness = Freshness()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(freshness.run)
        yield freshness
        nursery.cancel_scope.cancel()


async def test_a_question_is_asked_again_after_its_time_and_up_to_a_fifth_more(
    autojump_clock: MockClock, asker: Asker
) -> None:
    async with running() as freshness:
        freshness.watch("a", asker.ask, source="web", seconds=60, asked_at=trio.current_time())
        await trio.sleep(60 * 100)
        assert 60 <= asker.times[0] <= 72
        assert all(60 <= pause <= 72.001 for pause in asker.pauses)
        assert max(asker.pauses) - min(asker.pauses) > 1, "servers drift apart"
        freshness.forget("a")
        count = len(asker.times)
        assert 83 <= count <= 100
        await trio.sleep(1000)
        assert len(asker.times) == count


async def test_what_another_process_has_asked_is_asked_at_any_moment_of_its_time_but_not_at_the_start(
    autojump_clock: MockClock,
) -> None:
    askers = [Asker() for _ in range(200)]
    async with running() as freshness:
        for number, one in enumerate(askers):
            freshness.watch(number, one.ask, source=str(number), seconds=60)
        await trio.sleep(60)
    firsts = sorted(one.times[0] for one in askers)
    assert 6 <= firsts[0] < 12 and 54 < firsts[-1] <= 60
    assert 20 < firsts[100] < 46


async def test_what_is_asked_for_another_reason_is_not_asked_again_before_its_time(
    autojump_clock: MockClock, asker: Asker
) -> None:
    async with running() as freshness:
        freshness.watch("a", asker.ask, source="web", seconds=60, asked_at=trio.current_time())
        for _ in range(10):
            await trio.sleep(59)
            freshness.note_asked("a")
        freshness.note_asked("never watched")
        assert asker.times == []
        await trio.sleep(72)
        assert len(asker.times) == 1


async def test_while_a_source_does_not_answer_it_is_asked_ever_more_rarely_and_once_for_all_questions(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    askers = [Asker() for _ in range(100)]
    other = Asker()
    async with running() as freshness:
        for number, one in enumerate(askers):
            one.error = GONE
            freshness.watch(number, one.ask, source="web", seconds=60, asked_at=trio.current_time())
        freshness.watch("other", other.ask, source="blog", seconds=60, asked_at=trio.current_time())
        await trio.sleep(3600)
        times = sorted(time for one in askers for time in one.times)
        assert len(times) <= 4 + 3600 / 240, "all of them together"
        late = [time for time in times if time > 1000]
        assert all(240 <= after - before <= 310 for before, after in pairwise(late))
        assert len(other.times) >= 50, "another source is asked as ever"
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        for one in askers:
            one.error = None
            one.times.clear()
        await trio.sleep(301 + 72)
        assert all(one.times for one in askers), "now everybody wants to know"
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
        firsts = sorted(one.times[0] for one in askers)
        assert firsts[50] - firsts[1] > 10, "but not all at once"


async def test_an_answer_that_somebody_else_gets_ends_the_wait(
    autojump_clock: MockClock, asker: Asker
) -> None:
    other = Asker()
    async with running() as freshness:
        asker.error = GONE
        freshness.watch("a", asker.ask, source="web", seconds=60, asked_at=trio.current_time())
        freshness.watch("b", other.ask, source="web", seconds=60, asked_at=trio.current_time() + 3600)
        await trio.sleep(3600)
        asker.error = None
        asker.times.clear()
        freshness.note_asked("b")
        await trio.sleep(60)
        assert len(asker.times) == 1


@pytest.mark.parametrize("error", [AccessDenied("no"), ZeroDivisionError("a bug")])
async def test_a_question_that_is_refused_is_asked_more_rarely_and_others_of_its_source_are_not(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, asker: Asker, error: Exception
) -> None:
    other = Asker()
    async with running() as freshness:
        asker.error = error
        for key, one in (("a", asker), ("b", other)):
            freshness.watch(key, one.ask, source="web", seconds=60, asked_at=trio.current_time())
        await trio.sleep(3600)
        assert 10 <= len(asker.times) <= 17
        assert len(other.times) >= 50
        if isinstance(error, FsmountError):
            assert len(caplog.records) == 1


async def test_a_slow_source_holds_up_no_other_and_is_asked_by_four_at_once(
    mock_clock: MockClock, asker: Asker
) -> None:
    slow = [Asker() for _ in range(50)]
    gate = trio.Event()
    async with running() as freshness:
        for number, one in enumerate(slow):
            one.answers = gate
            freshness.watch(number, one.ask, source="slow", seconds=60, asked_at=trio.current_time() - 72)
        freshness.watch("a", asker.ask, source="web", seconds=60, asked_at=trio.current_time() - 72)
        await wait_all_tasks_blocked()
        assert len(asker.times) == 1
        assert sum(len(one.times) for one in slow) == 4
        gate.set()
        await wait_all_tasks_blocked()
        assert [len(one.times) for one in slow] == [1] * 50
