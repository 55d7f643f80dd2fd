"""The trouble: which fault comes when, drawn from a seed, and how each of them is made and ended."""

import heapq
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from scripts.soaking.builds import push_revision
from scripts.soaking.front import Front, Toxic
from scripts.soaking.subject import CONTENT_SECONDS, Broken, Subject
from tests.peers import Registry

#: How long after its end a fault may still show: what waits for it is told by the try that began under it.
_ECHO_SECONDS = 10.0
#: Who was refused is refused for half a minute without being asked again.
_REFUSED_ECHO_SECONDS = 35.0
#: A layer whose bytes were wrong is fetched again after a minute.
_WRONG_ECHO_SECONDS = 65.0
#: The watchdog's patience, and some for the next process to begin.
FREEZE_SECONDS = 36.0

#: Deaths within a minute from which on a mount is served from its cache alone, and from which on not at all.
CACHE_ONLY_DEATHS, REFUSING_DEATHS = 5, 10
_RECENT_SECONDS = 62.0
#: What it may take a next process to answer commands.
_REPLACING_SECONDS = 5.0

_AWAY = frozenset({"EHOSTUNREACH", "ETIMEDOUT"})

TOXICS: dict[str, Toxic] = {
    "late": Toxic("late", 1.0),
    "slow": Toxic("slow", 200_000),
    "stalling": Toxic("stall", share=0.5),
    "silent": Toxic("stall"),
    "cutting": Toxic("cut", 100_000),
    "resetting": Toxic("reset", 60_000),
    "hanging up": Toxic("reset", share=0.5),
    "wrong bytes": Toxic("flip"),
    "some wrong bytes": Toxic("flip", share=0.2),
    "no tokens": Toxic("deny"),
    "too many requests": Toxic("status", 429),
    "some 429": Toxic("status", 429, share=0.3),
    "500": Toxic("status", 500),
    "some 503": Toxic("status", 503, share=0.3),
}


def _excused(kind: str) -> tuple[frozenset[str], float]:
    """The errors that a fault excuses, and for how long after its end."""
    if kind in ("wrong bytes", "some wrong bytes"):
        return _AWAY | {"EBADMSG", "UNVERIFIED"}, _WRONG_ECHO_SECONDS
    if kind == "no tokens":
        return _AWAY | {"EACCES"}, _REFUSED_ECHO_SECONDS
    if kind in ("too many requests", "some 429"):
        return _AWAY | {"EAGAIN"}, _ECHO_SECONDS
    if kind == "full disk":
        return frozenset({"ENOSPC"}), _ECHO_SECONDS
    if kind in TOXICS or kind == "registry stopped":
        return _AWAY, _ECHO_SECONDS
    return frozenset(), 0.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What was wrong from when to when. Times are of CLOCK_MONOTONIC; `end` is inf while it is in force."""

    kind: str
    begin: float
    end: float = float("inf")

    def excuses(self, error: str, begin: float, end: float) -> bool:
        """Whether an operation may have failed of it with that error."""
        errors, echo = _excused(self.kind)
        # What a process sees of a page, or of its own program, that cannot be had is a signal.
        signals = {"signal 7", "signal 11"} if errors else set()
        return error in errors | signals and self.begin <= end and begin <= self.end + echo


@dataclass(frozen=True, slots=True)
class Step:
    """Something that is to happen `at` so many seconds after the beginning; one with `seconds` ends by itself."""

    at: float
    kind: str
    seconds: float = 0.0


def plan(
    dice: random.Random,
    *,
    seconds: float,
    kills: int,
    upgrades: int,
    freezes: int,
    faults: bool,
    pairs: bool,
    long: bool,
) -> list[Step]:
    """All steps of a phase in their order. Without `faults`: kills, hand-overs, and what the kernel forgets.

    pairs: whether kills come by twos, now and then, the second while the next process has hardly begun.
    """
    steps = [Step(at, "kill") for at in _spread(dice, seconds, kills)]
    if pairs:
        steps[1::3] = [
            Step(before.at + dice.uniform(0.05, 0.9), "kill") for before in steps[: len(steps[1::3]) * 3 : 3]
        ]
    steps += [Step(at, "upgrade") for at in _spread(dice, seconds, upgrades)]
    steps += [Step(at, "freeze", FREEZE_SECONDS) for at in _spread(dice, seconds - FREEZE_SECONDS, freezes)]
    steps += [Step(at, "forget names") for at in _spread(dice, seconds, int(seconds / 5))]
    if faults:
        steps += _registry_faults(dice, seconds, long)
        for at in _spread(dice, seconds, max(1, int(seconds / 25))):
            steps.append(Step(at, "full disk", dice.uniform(3, 10 if long else 5)))
        steps += [Step(at, "damage") for at in _spread(dice, seconds, int(seconds / 3))]
        steps += [Step(at, "push") for at in _spread(dice, seconds, max(2, int(seconds / 12)))]
        steps += [Step(at, "expire") for at in _spread(dice, seconds, int(seconds / 6))]
    return sorted(steps, key=lambda step: step.at)


def _registry_faults(dice: random.Random, seconds: float, long: bool) -> Iterator[Step]:
    """One after the other, each kind before any comes again, with pauses in which something can be fetched."""
    kinds: list[str] = []
    at = 1.0
    while at < seconds - 1:
        if not kinds:
            # Who was refused does not ask again for half a minute: in a short run that would leave out all the others.
            kinds = [kind for kind in (*TOXICS, "registry stopped") if long or kind != "no tokens"]
            dice.shuffle(kinds)
            if not long:
                # They are felt for a minute, which goes on when the run is over.
                kinds.sort(key=lambda kind: kind.endswith("wrong bytes"))
        # Now and then for longer than anybody waits.
        longest = CONTENT_SECONDS + 12 if dice.random() < 0.15 else 8
        length = dice.uniform(2, longest) if long else dice.uniform(1, 3)
        yield Step(at, kinds.pop(), min(length, seconds - at))
        at += length + (dice.uniform(1, 6) if long else dice.uniform(0.3, 1.2))


def _spread(dice: random.Random, seconds: float, count: int) -> list[float]:
    """So many times, evenly but not quite."""
    step = seconds / max(count, 1)
    shift = min(step / 2, 1.0)
    return [(number + 0.5) * step + dice.uniform(-shift, shift) for number in range(count)]


@dataclass(slots=True)
class Troublemaker:
    """Makes trouble for one mount. Everything it did is in `faults`, `done` and `kills`."""

    subject: Subject
    front: Front
    registry: Registry
    layout: Path
    seed: str
    dice: random.Random
    #: Where a line is written for each thing that is done.
    log: Path
    #: Deaths of the worker that there may be within a minute.
    most_deaths: int = CACHE_ONLY_DEATHS - 1
    faults: list[Fault] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    #: When the worker was killed, handed over, or woken.
    kills: list[float] = field(default_factory=list)
    upgrades: list[float] = field(default_factory=list)
    freezes: list[tuple[float, float]] = field(default_factory=list)
    #: When the moving tag began to be each revision.
    pushes: list[tuple[float, int]] = field(default_factory=list)
    #: Commands that failed though they should not have.
    failures: list[str] = field(default_factory=list)
    _frozen: int | None = None
    _upgrading: list[threading.Thread] = field(default_factory=list)

    def work(self, steps: list[Step], seconds: float, look: Callable[[], None]) -> None:
        """Takes the steps when their times have come, and ends what they began. Calls look every now and then."""
        began = time.monotonic()
        order = itertools.count()
        due = [(step.at, next(order), step, True) for step in steps]
        heapq.heapify(due)
        while time.monotonic() < began + seconds or due:
            look()
            if due and time.monotonic() >= began + due[0][0]:
                _, _, step, is_begin = heapq.heappop(due)
                if is_begin and step.at < seconds:
                    self._begin(step)
                    if step.seconds:
                        heapq.heappush(due, (min(step.at + step.seconds, seconds), next(order), step, False))
                elif not is_begin:
                    self._end(step)
            time.sleep(0.05)
        for thread in self._upgrading:
            thread.join()

    def push(self) -> None:
        """Moves the moving tag to its next revision."""
        number = len(self.pushes) + 1
        push_revision(number, self.layout, self.registry.host, self.seed)
        self.pushes.append((time.monotonic(), number))

    def stop_registry(self) -> None:
        self.front.close()
        self.registry.stop()
        self.faults.append(Fault("registry stopped", time.monotonic()))

    def start_registry(self) -> None:
        self.registry.start()
        self.front.open()
        self._over("registry stopped")

    def _note(self, *words: object) -> None:
        with self.log.open("a") as log:
            log.write(" ".join([f"{time.monotonic():.3f}", *map(str, words)]) + "\n")

    def _begin(self, step: Step) -> None:
        self._note(step.kind)
        match step.kind:
            case "kill":
                self._kill()
            case "upgrade":
                thread = threading.Thread(target=self._upgrade)
                thread.start()
                self._upgrading.append(thread)
            case "freeze":
                self._frozen = self.subject.kill_worker(signal.SIGSTOP)
                if self._frozen is not None:
                    self.done["freeze"] += 1
                    self.freezes.append((time.monotonic(), time.monotonic() + step.seconds))
            case "forget names":
                # 2: names and inodes, with the pages of those that nobody has open.
                Path("/proc/sys/vm/drop_caches").write_text("2")
                self.done[step.kind] += 1
            case "damage":
                self._damage()
            case "push":
                # Not to a registry that is stopped.
                if not self._is_stopped:
                    self.push()
                    self.done["push"] += 1
            case "expire":
                self.front.expire()
                self.done["tokens expired"] += 1
            case "registry stopped":
                self.done[step.kind] += 1
                self.stop_registry()
            case "full disk":
                self.done[step.kind] += 1
                self.faults.append(Fault("full disk", time.monotonic()))
                self._fill()
            case kind:
                self.done[kind] += 1
                self.faults.append(Fault(kind, time.monotonic()))
                self.front.set(TOXICS[kind])

    def _end(self, step: Step) -> None:
        self._note("end of", step.kind)
        match step.kind:
            case "freeze":
                if self._frozen in [process.pid for process in self.subject.processes()]:
                    self.failures.append(f"nobody has ended the frozen process {self._frozen}")
            case "registry stopped":
                self.start_registry()
            case "full disk":
                (self.subject.disk / "ballast").unlink()
                self._over(step.kind)
            case kind:
                self.front.set(None)
                self._over(kind)

    @property
    def _is_stopped(self) -> bool:
        return any(fault.kind == "registry stopped" and fault.end == float("inf") for fault in self.faults)

    def _over(self, kind: str) -> None:
        at = next(
            i for i, fault in enumerate(self.faults) if fault.kind == kind and fault.end == float("inf")
        )
        self.faults[at] = Fault(kind, self.faults[at].begin, time.monotonic())

    def _kill(self) -> None:
        at = time.monotonic()
        deaths = (*self.kills, *(end for _, end in self.freezes))
        is_frozen = any(begin <= at <= end for begin, end in self.freezes)
        if is_frozen or sum(at - death < _RECENT_SECONDS for death in deaths) >= self.most_deaths:
            self.done["kill left out"] += 1
        elif self.subject.kill_worker() is not None:
            self.kills.append(at)
            self.done["kill"] += 1
        else:
            self.done["kill of nobody"] += 1

    def _upgrade(self) -> None:
        at = time.monotonic()
        try:
            self.subject.say("upgrade", self.subject.point)
        except Broken as error:
            # It has to be asked of a process that answers, and is: not while that is being replaced.
            if not any(at - _REPLACING_SECONDS <= kill <= time.monotonic() for kill in self.kills):
                self.failures.append(f"{time.monotonic():.2f}: {error}")
            return
        self.upgrades.append(at)
        self.done["upgrade"] += 1

    def _fill(self) -> None:
        """Takes all that is free on the disk of the cache."""
        with (self.subject.disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
            while True:
                ballast.write(bytes(65536))

    def _damage(self) -> None:
        """Does something to a few files of cached content that no process of the mount would do."""
        files = [path for path in self.subject.chunks.rglob("*.val") if path.is_file()]
        for path in self.dice.sample(sorted(files), min(3, len(files))):
            how = self.dice.choice(("flipped", "truncated", "removed", "zeroed"))
            with suppress(OSError):  # it was evicted meanwhile, or the disk is full
                size = path.stat().st_size
                if how == "removed":
                    path.unlink()
                elif how == "truncated":
                    os.truncate(path, self.dice.randrange(size))
                else:
                    with path.open("r+b") as file:
                        at = file.seek(self.dice.randrange(size))
                        byte = file.read(1)[0]
                        file.seek(at)
                        file.write(bytes(min(4096, size - at)) if how == "zeroed" else bytes([byte ^ 0x20]))
                self.done[f"chunk {how}"] += 1
                self._note(how, path.relative_to(self.subject.chunks))
