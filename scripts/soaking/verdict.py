"""The verdict: which failures the faults excuse, which waits were too long, and how long each kill was felt."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scripts.soaking.diary import Event
from scripts.soaking.subject import CONTENT_SECONDS, REFRESH_SECONDS
from scripts.soaking.trouble import FREEZE_SECONDS, Fault

#: What a loaded machine may add.
MARGIN_SECONDS = 5.0
#: What asks no network: a new process may have to begin meanwhile.
_KNOWN_SECONDS = 5.0
#: Programs make many calls: they are told to end after 40 s, and must then do so.
_PROGRAM_SECONDS = 46.0
_PROGRAMS = frozenset({"run", "find", "diff", "ls", "snapshot"})
#: How long nothing may have been wrong before a tag must have been followed.
_CALM_SECONDS = 2 * REFRESH_SECONDS + 5.0
#: Errors that are never right for what is configured and mounted.
_NEVER = frozenset({"ENOTCONN", "ECONNABORTED", "ESTALE", "EIO", "WRONG"})
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the run. `calm`: nothing but kills happens to what is read, so nothing may fail."""

    name: str
    begin: float
    end: float
    is_calm: bool = False


@dataclass(slots=True)
class Circumstances:
    """What had been done to the mount. Times are of CLOCK_MONOTONIC."""

    faults: Sequence[Fault] = ()
    kills: Sequence[float] = ()
    upgrades: Sequence[float] = ()
    freezes: Sequence[tuple[float, float]] = ()
    pushes: Sequence[tuple[float, int]] = ()

    def limit(self, begin: float, end: float, *, kind: str = "read") -> float:
        """What an operation may take that went on from begin to end.

        Twice the deadline: the kernel asks again for the one page that its read-ahead did not bring. A process that
        takes over begins the deadline anew; one that is frozen cannot keep any.
        """
        anew = sum(begin <= at <= end for at in (*self.kills, *self.upgrades))
        frozen = FREEZE_SECONDS * sum(start <= end and begin <= stop for start, stop in self.freezes)
        if kind in _PROGRAMS:
            return _PROGRAM_SECONDS + MARGIN_SECONDS + frozen
        once = _KNOWN_SECONDS if kind.startswith("known") else 2 * CONTENT_SECONDS
        return once * (1 + anew) + MARGIN_SECONDS + frozen


@dataclass(slots=True)
class Verdict:
    """What was found. `violations`: all that must not be, one line each."""

    violations: list[str] = field(default_factory=list)
    #: Errors by their name and the latest fault that excuses them.
    excused: Counter[tuple[str, str]] = field(default_factory=Counter)
    #: Of each phase, the longest wait for each kind of operation.
    longest: dict[str, dict[str, Event]] = field(default_factory=lambda: defaultdict(dict))


def judge(events: Iterable[Event], circumstances: Circumstances, phases: Sequence[Phase]) -> Verdict:
    """The verdict over all that readers have noted."""
    verdict = Verdict()
    for event in events:
        phase = next((one for one in phases if one.begin <= event.end <= one.end), None)
        where = phase.name if phase is not None else "outside"
        if event.kind == "revision" and event.error is None:
            _judge_revision(event, circumstances, verdict)
            continue
        if event.error is not None:
            _judge_error(event, circumstances, phase, verdict)
        took = event.end - event.begin
        limit = circumstances.limit(event.begin, event.end, kind=event.kind)
        if took > limit:
            verdict.violations.append(
                f"{shown(event)}: it took {took:.1f} s, and {limit:.0f} at most were allowed"
            )
        if event.error != "WRONG" and took > _took(verdict.longest[where].get(event.kind)):
            verdict.longest[where][event.kind] = event
    return verdict


def _judge_error(event: Event, circumstances: Circumstances, phase: Phase | None, verdict: Verdict) -> None:
    assert event.error is not None
    # Of programs that were told to end, because they had taken long enough.
    if event.error == "EINTR" and event.kind in _PROGRAMS:
        verdict.excused["EINTR", "told to end"] += 1
        return
    excuses = [
        fault.kind for fault in circumstances.faults if fault.excuses(event.error, event.begin, event.end)
    ]
    is_calm = phase is not None and phase.is_calm
    if event.error in _NEVER or is_calm or event.kind.startswith("known") or not excuses:
        around = {
            fault.kind
            for fault in circumstances.faults
            if fault.begin <= event.end and event.begin <= fault.end
        }
        verdict.violations.append(f"{shown(event)}; faults then: {', '.join(sorted(around)) or 'none'}")
    else:
        verdict.excused[event.error, excuses[-1]] += 1


def _judge_revision(event: Event, circumstances: Circumstances, verdict: Verdict) -> None:
    """A tag that has moved must be followed, when nothing was wrong for a while."""
    due = [number for at, number in circumstances.pushes if at <= event.begin - _CALM_SECONDS]
    if not due or int(event.what) >= max(due):
        return
    since = max(at for at, number in circumstances.pushes if number == max(due))
    troubles = [
        *(fault.begin for fault in circumstances.faults),
        *circumstances.kills,
        *circumstances.upgrades,
    ]
    ends = [*(fault.end for fault in circumstances.faults), *circumstances.kills, *circumstances.upgrades]
    troubles += [begin for begin, _ in circumstances.freezes]
    ends += [end for _, end in circumstances.freezes]
    if not any(
        begin <= event.end and since - REFRESH_SECONDS <= end + 2 * REFRESH_SECONDS
        for begin, end in zip(troubles, ends, strict=True)
    ):
        verdict.violations.append(
            f"{shown(event)}: revision {max(due)} was pushed {event.begin - since:.0f} s before"
        )


def pauses(events: Sequence[Event], kills: Sequence[float], phase: Phase, *, known_only: bool) -> list[float]:
    """For each kill of a phase, the longest time that a reader waited from then on, until the next kill.

    known_only: of what waits for no network.
    """
    felt = []
    inside = [at for at in kills if phase.begin <= at <= phase.end]
    for number, at in enumerate(inside):
        following = inside[number + 1] if number + 1 < len(inside) else phase.end
        waits = [
            event.end - max(event.begin, at)
            for event in events
            if event.end > at
            and event.begin < following
            and event.begin >= phase.begin
            and event.kind not in _PROGRAMS | {"mapped", "revision"}
            and (event.kind.startswith("known") or not known_only)
        ]
        felt.append(max(waits, default=0.0))
    return felt


def shown(event: Event) -> str:
    """One line: who, when, what."""
    error = f": {event.error}" if event.error else ""
    text = f" ({event.text})" if event.text else ""
    return f"{event.begin:.2f}–{event.end:.2f} {event.reader}: {event.kind} {event.what}{error}{text}"


def report(lines: Sequence[str], title: str) -> str:
    """A title, and the first lines of many."""
    more = [f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join([f"{title}: {len(lines)}", *(f"  {line}" for line in [*lines[:_SHOWN], *more])])


def median_and_longest(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    return f"median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s, of {len(seconds)}"


def _took(event: Event | None) -> float:
    return 0.0 if event is None else event.end - event.begin
