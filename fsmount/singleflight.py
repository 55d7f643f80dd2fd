"""What trio leaves to its users: one fetch for all who wait for it, a nursery's single failure as itself, and work that
nobody waits for.
"""

import logging
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import trio

from fsmount.errors import FsmountError

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class _Flight(Generic[_Result]):
    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.landed = trio.Event()
        self.waiters = 0
        self.outcome: Callable[[], _Result] | None = None


class SingleFlight(Generic[_Result]):
    """Shares one run of a function among all who ask for the same key while it runs.

    The run is a task of the owner's nursery. A waiter that is cancelled leaves; when the last one has left, the
    run is cancelled. An error reaches every waiter and is not remembered.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._flights: dict[Hashable, _Flight[_Result]] = {}

    async def run(self, key: Hashable, fetch: Callable[[], Awaitable[_Result]]) -> _Result:
        """The result of the run under way for key, or of a new one. Raises: what fetch raises."""
        while True:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = _Flight()
                self._nursery.start_soon(self._fly, key, flight, fetch)
            flight.waiters += 1
            try:
                await flight.landed.wait()
            finally:
                flight.waiters -= 1
                if not flight.waiters and flight.outcome is None:
                    self._forget(key, flight)
                    flight.scope.cancel()
            if flight.outcome is not None:
                return flight.outcome()

    async def _fly(
        self, key: Hashable, flight: _Flight[_Result], fetch: Callable[[], Awaitable[_Result]]
    ) -> None:
        try:
            with flight.scope:
                result = await fetch()
                flight.outcome = lambda: result
        except Exception as error:
            failure = error

            def fail() -> _Result:
                raise failure.with_traceback(None)  # or every waiter would make it longer

            flight.outcome = fail
        finally:
            self._forget(key, flight)
            flight.landed.set()

    def _forget(self, key: Hashable, flight: _Flight[_Result]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


@contextmanager
def single_error(kind: type[Exception]) -> Iterator[None]:
    """A nursery's exception group of nothing but errors of one kind leaves as the first of them."""
    try:
        yield
    except BaseExceptionGroup as group:
        if group.split(kind)[1] is not None:
            raise
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


async def in_background(what: str, work: Callable[[], Awaitable[object]]) -> None:
    """Does work that nobody waits for, and whose failure must end nothing: it is logged as a failure of `what`."""
    try:
        await work()
    except FsmountError as error:
        log.warning("%s: %s", what, error.message)
    except Exception:
        log.exception("%s failed in a way nobody foresaw", what)
