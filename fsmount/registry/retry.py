"""When to ask again, and after how long."""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import trio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from fsmount.errors import FsmountError

T = TypeVar("T")

#: Statuses that another try may cure; 499 and 522 are what proxies make of a lost connection.
RETRYABLE_STATUSES = frozenset({408, 429, 499, 500, 502, 503, 504, 522})


class Again(Exception):
    """An attempt failed with `error`, and another may succeed; the server may have said after how long."""

    def __init__(self, error: FsmountError, after_seconds: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.after_seconds = after_seconds


@dataclass(frozen=True, slots=True)
class Retry:
    """Exponential pauses with jitter, so that a thousand clients do not come back at the same moment."""

    tries: int = 3
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 10.0
    #: A server that asks for more patience than this gets its answer at once: the failure is reported.
    longest_asked_seconds: float = 60.0

    async def run(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The first result of attempt; one that raises Again is repeated.

        Raises: the error of the last Again, and at once whatever else attempt raises.
        """

        async def once() -> T:
            return await attempt()  # tenacity would take the coroutine of a lambda for its result

        retrying = AsyncRetrying(
            retry=retry_if_exception(self._is_worth_waiting),
            stop=stop_after_attempt(self.tries),
            wait=self._wait_seconds,
            sleep=trio.sleep,
            reraise=True,
        )
        try:
            return await retrying(once)
        except Again as again:
            raise again.error from again.error.__cause__

    def pause_seconds(self, failures: int) -> float:
        """How long to wait after so many failures in a row."""
        pause = min(self.first_pause_seconds * 2.0 ** (failures - 1), self.longest_pause_seconds)
        return pause * random.uniform(0.75, 1.25)

    def _is_worth_waiting(self, error: BaseException) -> bool:
        return isinstance(error, Again) and (error.after_seconds or 0.0) <= self.longest_asked_seconds

    def _wait_seconds(self, state: RetryCallState) -> float:
        error = state.outcome and state.outcome.exception()
        asked = error.after_seconds if isinstance(error, Again) else None
        return max(asked or 0.0, self.pause_seconds(state.attempt_number))


def retry_after_seconds(value: str | None) -> float | None:
    """What a Retry-After header asks for: a number of seconds, or a date; None if it is neither."""
    if not value:
        return None
    if value.isascii() and value.isdecimal():
        return float(value[:9])
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
