"""When to ask again, and after how long."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import trio
from tenacity import RetryError
from trio.testing import MockClock

from fsmount.errors import NotFound, Unreachable
from fsmount.registry.failures import causes
from fsmount.registry.retry import Again, Retry, retry_after_seconds


class Attempts:
    """Fails as told, then succeeds; remembers when it was called."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.times: list[float] = []

    async def __call__(self) -> str:
        self.times.append(trio.current_time())
        if self.failures:
            raise self.failures.pop(0)
        return "done"


async def test_an_attempt_that_may_succeed_later_is_repeated(autojump_clock: MockClock) -> None:
    attempts = Attempts(Again(Unreachable("1")), Again(Unreachable("2")))
    assert await Retry(tries=3, first_pause_seconds=1).run(attempts) == "done"
    first, second, third = attempts.times
    assert 0.75 <= second - first <= 1.25
    assert 1.5 <= third - second <= 2.5


async def test_after_the_last_try_its_error_is_raised_as_itself(autojump_clock: MockClock) -> None:
    attempts = Attempts(*(Again(Unreachable(str(number))) for number in range(9)))
    with pytest.raises(Unreachable, match="2"):
        await Retry(tries=3).run(attempts)
    assert len(attempts.times) == 3


@pytest.mark.parametrize("cause", [OSError("no route"), None])
async def test_what_is_raised_is_the_error_alone_with_the_cause_it_had(
    autojump_clock: MockClock, cause: OSError | None
) -> None:
    error = Unreachable("cannot be reached")
    error.__cause__, error.__suppress_context__ = cause, False
    with pytest.raises(Unreachable) as caught:
        await Retry(tries=2).run(Attempts(Again(error), Again(error)))
    assert caught.value is error
    assert (error.__cause__, error.__suppress_context__) == (cause, True)
    assert not [link for link in causes(error) if isinstance(link, RetryError)]


async def test_an_attempt_may_be_anything_that_can_be_awaited(autojump_clock: MockClock) -> None:
    attempts = Attempts(Again(Unreachable("1")))
    assert await Retry(tries=2).run(lambda: attempts()) == "done"


@pytest.mark.parametrize("failures", [0, 1])
async def test_attempts_and_pauses_can_be_cancelled(autojump_clock: MockClock, failures: int) -> None:
    attempts = Attempts(*[Again(Unreachable("1"), 30)] * failures)

    async def attempt() -> None:
        await attempts()
        await trio.sleep_forever()

    with trio.move_on_after(5) as scope:
        await Retry().run(attempt)
    assert scope.cancelled_caught
    assert (len(attempts.times), trio.current_time()) == (1, 5)


async def test_other_errors_are_not_repeated(autojump_clock: MockClock) -> None:
    attempts = Attempts(NotFound("gone"))
    with pytest.raises(NotFound):
        await Retry().run(attempts)
    assert len(attempts.times) == 1


async def test_a_server_that_asks_for_patience_gets_it(autojump_clock: MockClock) -> None:
    attempts = Attempts(Again(Unreachable("busy"), 42))
    await Retry().run(attempts)
    assert attempts.times[1] - attempts.times[0] >= 42


async def test_a_server_that_asks_for_more_than_a_minute_is_given_up_at_once(
    autojump_clock: MockClock,
) -> None:
    attempts = Attempts(Again(Unreachable("busy"), 3600))
    with pytest.raises(Unreachable):
        await Retry().run(attempts)
    assert len(attempts.times) == 1


def test_pauses_grow_to_a_limit() -> None:
    retry = Retry(first_pause_seconds=1, longest_pause_seconds=4)
    assert 0.75 <= retry.pause_seconds(1) <= 1.25
    assert 1.5 <= retry.pause_seconds(2) <= 2.5
    assert 3 <= retry.pause_seconds(50) <= 5


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("", None), ("7", 7.0), ("-7", None), ("soon", None), ("٧", None)],
)
def test_retry_after_is_a_number_of_seconds(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value) == seconds


def test_retry_after_may_be_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    seconds = retry_after_seconds(later)
    assert seconds is not None
    assert 3500 < seconds <= 3600
    assert retry_after_seconds("Thu, 01 Jan 1970 00:00:00 GMT") == 0
