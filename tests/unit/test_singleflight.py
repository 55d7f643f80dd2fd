"""One fetch for all who wait for it, and a nursery's single failure as itself."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fsmount.errors import Corrupt, FsmountError, Unreachable
from fsmount.singleflight import SingleFlight, single_error


class Fetch:
    """A function to share: it counts its runs, and ends when it is told how."""

    def __init__(self) -> None:
        self.runs = 0
        self.cancelled = 0
        self.result: int | Exception = 0
        self.end = trio.Event()

    async def __call__(self) -> int:
        self.runs += 1
        try:
            await self.end.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def finish(self, result: int | Exception) -> None:
        self.result = result
        self.end.set()


class Waiters:
    """Who asks for a key, and what each has got."""

    def __init__(self, flights: SingleFlight[int], nursery: trio.Nursery) -> None:
        self._flights = flights
        self._nursery = nursery
        self.got: list[int | str] = []

    async def ask(self, fetch: Fetch, key: str = "key") -> trio.CancelScope:
        """A new waiter, waiting; cancelling the scope makes it leave."""
        scope = trio.CancelScope()
        self._nursery.start_soon(self._wait, fetch, key, scope)
        await wait_all_tasks_blocked()
        return scope

    async def _wait(self, fetch: Fetch, key: str, scope: trio.CancelScope) -> None:
        with scope:
            try:
                self.got.append(await self._flights.run(key, fetch))
            except FsmountError as error:
                self.got.append(error.message)
        if scope.cancelled_caught:
            self.got.append("left")


async def test_all_who_ask_for_the_same_key_while_it_runs_share_one_run(nursery: trio.Nursery) -> None:
    fetch, flights = Fetch(), SingleFlight[int](nursery)
    waiters = Waiters(flights, nursery)
    for _ in range(5):
        await waiters.ask(fetch)
    fetch.finish(7)
    await wait_all_tasks_blocked()
    assert waiters.got == [7] * 5
    assert fetch.runs == 1
    assert await flights.run("key", fetch) == 7
    assert fetch.runs == 2


async def test_other_keys_run_side_by_side(nursery: trio.Nursery) -> None:
    fetches = [Fetch(), Fetch()]
    waiters = Waiters(SingleFlight(nursery), nursery)
    for number, fetch in enumerate(fetches):
        await waiters.ask(fetch, str(number))
    for number, fetch in reversed(list(enumerate(fetches))):
        fetch.finish(number)
        await wait_all_tasks_blocked()
    assert waiters.got == [1, 0]


async def test_the_run_belongs_to_the_owner_and_not_to_who_asked_first(nursery: trio.Nursery) -> None:
    fetch = Fetch()
    waiters = Waiters(SingleFlight(nursery), nursery)
    first = await waiters.ask(fetch)
    await waiters.ask(fetch)
    first.cancel()
    await wait_all_tasks_blocked()
    assert waiters.got == ["left"]
    fetch.finish(7)
    await wait_all_tasks_blocked()
    assert waiters.got == ["left", 7]
    assert (fetch.runs, fetch.cancelled) == (1, 0)


async def test_the_run_ends_with_its_owners_nursery() -> None:
    fetch = Fetch()
    async with trio.open_nursery() as owner:
        waiters = Waiters(SingleFlight(owner), owner)
        await waiters.ask(fetch)
        owner.cancel_scope.cancel()
    assert fetch.cancelled == 1


async def test_when_the_last_waiter_has_left_the_run_is_cancelled(nursery: trio.Nursery) -> None:
    fetch = Fetch()
    waiters = Waiters(SingleFlight(nursery), nursery)
    scopes = [await waiters.ask(fetch) for _ in range(3)]
    for scope in scopes:
        assert fetch.cancelled == 0
        scope.cancel()
        await wait_all_tasks_blocked()
    assert fetch.cancelled == 1
    assert waiters.got == ["left"] * 3


async def test_who_asks_while_a_cancelled_run_still_cleans_up_gets_a_run_of_their_own(
    nursery: trio.Nursery,
) -> None:
    cleaned, fetch = trio.Event(), Fetch()

    class Slow(Fetch):
        async def __call__(self) -> int:
            try:
                return await super().__call__()
            finally:
                with trio.CancelScope(shield=True):
                    await cleaned.wait()

    waiters = Waiters(SingleFlight(nursery), nursery)
    (await waiters.ask(Slow())).cancel()
    await wait_all_tasks_blocked()
    await waiters.ask(fetch)
    assert fetch.runs == 1, "at once"
    cleaned.set()
    await wait_all_tasks_blocked()
    await waiters.ask(fetch)
    fetch.finish(7)
    await wait_all_tasks_blocked()
    assert waiters.got == ["left", 7, 7]
    assert fetch.runs == 1, "the end of the old run has not made the new one forgotten"


async def test_an_error_reaches_every_waiter_and_is_not_remembered(nursery: trio.Nursery) -> None:
    failing, fetch = Fetch(), Fetch()
    waiters = Waiters(SingleFlight(nursery), nursery)
    for _ in range(3):
        await waiters.ask(failing)
    failing.finish(Unreachable("gone"))
    await wait_all_tasks_blocked()
    await waiters.ask(fetch)
    fetch.finish(7)
    await wait_all_tasks_blocked()
    assert waiters.got == ["gone"] * 3 + [7]
    assert failing.runs == 1


# -------------------- single_error

GONE, BROKEN, BUG = Unreachable("gone"), Corrupt("broken"), ZeroDivisionError()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ExceptionGroup("", [GONE]), GONE),
        (ExceptionGroup("", [BROKEN, GONE]), BROKEN),
        (ExceptionGroup("", [ExceptionGroup("", [GONE]), BROKEN]), GONE),
        (GONE, GONE),
        (BUG, BUG),
    ],
)
def test_a_failure_of_one_kind_leaves_as_itself(raised: Exception, expected: Exception) -> None:
    with pytest.raises(type(expected)) as caught, single_error(FsmountError):
        raise raised
    assert caught.value is expected


def test_a_group_with_anything_else_in_it_stays_a_group() -> None:
    group = ExceptionGroup("", [GONE, BUG])
    with pytest.raises(ExceptionGroup) as caught, single_error(FsmountError):
        raise group
    assert caught.value is group
