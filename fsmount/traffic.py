"""traffic: who may ask a source for parts of blobs now: what somebody waits for goes first."""

import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from fsmount.errors import FsmountError

#: Requests to one source side by side for what nobody waits for.
PARALLEL = 4


class Traffic:
    """Who may fetch now: what readers wait for goes before what is fetched in the background."""

    def __init__(self) -> None:
        self._waited_for: Counter[str] = Counter()
        self._in_background: Counter[str] = Counter()
        self._quiet_since: dict[str, float] = {}
        self._lot = trio.lowlevel.ParkingLot()

    @asynccontextmanager
    async def turn(self, source: str, run: "Run") -> AsyncIterator[None]:
        """Waits until a run may ask its source; what somebody waits for need not."""
        while not run.urgent and (self._waited_for[source] or self._in_background[source] >= PARALLEL):
            await self._lot.park()
        run.place = source, self._waited_for if run.urgent else self._in_background
        run.place[1][source] += 1
        try:
            yield
        finally:
            run.place[1][source] -= 1
            run.place = None
            if run.urgent:
                self._quiet_since[source] = trio.current_time()
            self.wake()

    def quiet_seconds(self, source: str) -> float:
        """For how long nobody has waited for anything from a source."""
        if self._waited_for[source]:
            return 0.0
        return trio.current_time() - self._quiet_since.get(source, -math.inf)

    def promote(self, run: "Run") -> None:
        """Says that somebody waits for a run by now."""
        if run.urgent:
            return
        run.urgent = True
        if run.place is not None:
            source, active = run.place
            active[source] -= 1
            run.place = source, self._waited_for
            self._waited_for[source] += 1
        self.wake()

    def wake(self) -> None:
        """Says that something has changed for those who wait."""
        self._lot.unpark_all()


class Run:
    """Neighbouring chunks that come with one request."""

    def __init__(self, numbers: Sequence[int], *, urgent: bool, rate: float | None = None) -> None:
        """rate: bytes a second while nobody waits for any of it."""
        self.numbers = list(numbers)
        self.urgent = urgent
        self.rate = rate
        #: Chunks somebody waits for, which must be readable even if the disk is full.
        self.wanted: set[int] = set()
        self.left = set(self.numbers)
        self.done = False
        self.error: FsmountError | None = None
        #: The chunk that was not what it should be.
        self.failing: int | None = None
        #: Where it counts while it asks its source: see Traffic.
        self.place: tuple[str, Counter[str]] | None = None
        self._lot = trio.lowlevel.ParkingLot()

    def step(self) -> None:
        """Wakes everyone who waits: something more is here."""
        self._lot.unpark_all()

    async def wait(self, number: int) -> None:
        """Returns when the chunk can be read. Raises: what ended the run."""
        self.wanted.add(number)
        while number in self.left and not self.done:
            await self._lot.park()
        if number in self.left:
            self._raise()

    async def wait_done(self) -> None:
        """Returns at the end of the run. Raises: what ended it."""
        while not self.done:
            await self._lot.park()
        self._raise()

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)  # or every reader would make it longer
