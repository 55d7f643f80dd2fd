"""Freshness: when what is known of a source is asked for again, behind the scenes."""

import logging
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from random import Random

import trio

from fsmount.errors import FsmountError

log = logging.getLogger(__name__)

#: Questions are put off by up to this part of their time, so that servers which started together drift apart.
_JITTER = 0.2
#: What an earlier process has asked is not asked again before this part of its time: a start has better things to do.
_CALM = 0.1
#: After failures a question waits twice as long each time, up to this.
_LONGEST_SECONDS = 300.0
_SHORTEST_SECONDS = 0.1
#: For one question to find out whether a source answers again, while the others wait.
_TRIAL_SECONDS = 30.0
#: Questions to one source at once: a slow one holds up no other.
_OF_ONE_SOURCE = 4


@dataclass(slots=True)
class _Question:
    """What is asked of a source every so many seconds, and when it is due."""

    source: str
    seconds: float
    ask: Callable[[], Awaitable[object]]
    due: float
    failures: int = 0
    is_asked: bool = False


@dataclass(slots=True)
class _Outage:
    """A source that has failed to answer so many times in a row; nobody asks it before `until`."""

    began: float
    until: float
    #: Who has found that out, or finds out whether it is over.
    trial: _Question
    failures: int = 0


class Freshness:
    """The questions that are asked again and again: at most once in their time, and less often while that fails.

    A source that cannot be reached is asked by one question at a time, and the log has one line when that begins, and
    one when it is over.
    """

    def __init__(self) -> None:
        self._questions: dict[Hashable, _Question] = {}
        self._outages: dict[str, _Outage] = {}
        self._limiters: dict[str, trio.CapacityLimiter] = {}
        self._changed = trio.Event()
        self._random = Random()

    def watch(
        self,
        key: Hashable,
        ask: Callable[[], Awaitable[object]],
        *,
        source: str,
        seconds: float,
        asked_at: float | None = None,
    ) -> None:
        """Has something asked every `seconds`, and a little more, from now on.

        asked_at: when it was asked last; None if that was in another process: then it is asked at a random moment
        within its time, so that a hundred servers that start together do not ask together, but not at the beginning.
        """
        seconds = max(seconds, _SHORTEST_SECONDS)
        if asked_at is None:
            due = trio.current_time() + seconds * self._random.uniform(_CALM, 1.0)
        else:
            due = asked_at + self._jittered(seconds)
        self._questions[key] = _Question(source, seconds, ask, due)
        self._wake()

    def is_watched(self, key: Hashable) -> bool:
        return key in self._questions

    def note_asked(self, key: Hashable) -> None:
        """It has been asked for another reason just now, and answered."""
        question = self._questions.get(key)
        if question is not None:
            self._note_answer(question)

    def forget(self, key: Hashable) -> None:
        """It is asked no more."""
        self._questions.pop(key, None)

    async def run(self) -> None:
        """Asks, for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                now = trio.current_time()
                waiting = [one for one in self._questions.values() if not one.is_asked]
                for question in waiting:
                    if question.due <= now:
                        question.is_asked = True
                        nursery.start_soon(self._take, question)
                due = min((one.due for one in waiting if one.due > now), default=float("inf"))
                self._changed = trio.Event()
                with trio.move_on_at(due):
                    await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()

    async def _take(self, question: _Question) -> None:
        limiter = self._limiters.setdefault(question.source, trio.CapacityLimiter(_OF_ONE_SOURCE))
        try:
            async with limiter:
                now = trio.current_time()
                outage = self._outages.get(question.source)
                if outage is not None and now < outage.until:
                    question.due = outage.until + question.seconds * self._random.random()
                    return
                if outage is not None:
                    outage.until, outage.trial = now + _TRIAL_SECONDS, question
                await self._ask(question)
        finally:
            question.is_asked = False
            self._wake()

    async def _ask(self, question: _Question) -> None:
        try:
            await question.ask()
        except FsmountError as error:
            if error.transient:
                self._note_outage(question, error)
                return
            self._end_outage(question)
            question.failures += 1
            level = logging.WARNING if question.failures == 1 else logging.DEBUG
            log.log(level, "what is known of %s is of before: %s", question.source, error.message)
        except Exception:
            question.failures += 1
            if question.failures == 1:
                log.exception("asking %s again failed in a way nobody foresaw", question.source)
        else:
            self._note_answer(question)
            return
        question.due = trio.current_time() + self._backed_off(question.seconds, question.failures)

    def _note_answer(self, question: _Question) -> None:
        question.failures = 0
        question.due = trio.current_time() + self._jittered(question.seconds)
        self._end_outage(question)

    def _end_outage(self, question: _Question) -> None:
        """Its source has answered: the others may ask too."""
        now = trio.current_time()
        outage = self._outages.pop(question.source, None)
        if outage is not None:
            log.info("%s answers again, after %.0f s", question.source, now - outage.began)
            for other in self._questions.values():
                if other.source == question.source and other is not question:
                    other.due = min(other.due, now + other.seconds * self._random.random())
            self._wake()

    def _note_outage(self, question: _Question, error: FsmountError) -> None:
        now = trio.current_time()
        outage = self._outages.get(question.source)
        if outage is None:
            outage = self._outages[question.source] = _Outage(now, now, question)
            log.warning("what is known of %s is of before: %s", question.source, error.message)
        # Those that were on their way meanwhile say nothing new.
        if outage.trial is question:
            outage.failures += 1
            outage.until = now + self._backed_off(question.seconds, outage.failures)
        question.due = outage.until + question.seconds * self._random.random()

    def _backed_off(self, seconds: float, failures: int) -> float:
        """How long nothing is asked after so many failures in a row."""
        longest = min(_LONGEST_SECONDS, seconds * 2.0 ** min(failures, 20))
        return longest * (1.0 - _JITTER * self._random.random())

    def _jittered(self, seconds: float) -> float:
        return seconds * (1.0 + _JITTER * self._random.random())
