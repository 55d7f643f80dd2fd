"""`scripts/soak`: mounts builds of its own, has them read while everything fails, and says what came of it."""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from scripts.soaking import builds, diary, verdict
from scripts.soaking.front import Front
from scripts.soaking.reader import Task, start
from scripts.soaking.subject import CACHE_BYTES, Broken, Subject, descriptors_and_memory, prepared
from scripts.soaking.trouble import REFUSING_DEATHS, Troublemaker, plan
from scripts.soaking.verdict import Circumstances, Phase
from scripts.soaking.watch import Watch
from tests.peers import docker_registry, have

#: How soon all must be right again when nothing is wrong any more.
_RECOVERY_SECONDS = 60.0
_CACHED = tuple("/".join(tag) for tag in builds.CACHED)
#: What a reader may take to end that is told to, also if it waits for the mount.
_ENDING_SECONDS = 10.0
_MEASURING_SECONDS = 0.5
#: Of the kills: what may be left out because too many came together, or nobody was there to be killed.
_LEFT_OUT_SHARE = 0.11
#: Of a run: what goes to kills of cached content, once with the registry and once without.
_CALM_SHARE = 0.14
#: For `--only kills`: how many read, and how long after one kill the next comes.
_MANY_READERS, _KILL_SECONDS = 32, 16.5


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0 nothing was wrong; 1 something was; 2 cannot run; 130 interrupted."""
    options = _options(words)
    if reason := have("docker-registry", "gcc", "fusermount3", "diff", "find"):
        print(reason, file=sys.stderr)
        return 2
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        print(
            "needs root and /dev/fuse: it mounts a small tmpfs for the cache, and drops names that the kernel keeps"
        )
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1, 2**31)
    work = Path(tempfile.mkdtemp(prefix="fsmount-soak-", dir=options.work))
    print(f"soak: seed {seed}, in {work}", flush=True)
    with ExitStack() as stack:
        soak = Soak(options, str(seed), work, stack)
        try:
            soak.prepare()
            soak.run()
        except Broken as error:
            if not soak.phases:
                print(f"soak: nothing could be tried: {error}", file=sys.stderr)
                return 1
            soak.violations.append(f"{time.monotonic():.2f}: {error}")
        except KeyboardInterrupt:
            return 130
        finally:
            soak.end()
    print(soak.report())
    if soak.violations:
        print(f"soak: NOT GOOD; the same faults again: --seed {seed}; what was seen is in {work}")
        return 1
    shutil.rmtree(work)
    print("soak: good")
    return 0


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--seconds", type=float, help="of trouble (840, short 45)")
    parser.add_argument("--kills", type=int, help="of the worker, in all (56, short 9)")
    parser.add_argument("--no-kills", dest="kills", action="store_const", const=0, help="none")
    parser.add_argument("--seed", type=int, help="to have the same faults again")
    parser.add_argument("--short", action="store_true", help="about a minute: every kind of fault once")
    parser.add_argument(
        "--only", choices=["kills"], help=f"kills under {_MANY_READERS} readers of what is cached"
    )
    parser.add_argument("--work", type=Path, help="where the working folder is made")
    options = parser.parse_args(words)
    only = options.only is not None
    options.kills = (20 if only else 9 if options.short else 56) if options.kills is None else options.kills
    if options.seconds is None:
        options.seconds = options.kills * _KILL_SECONDS if only else 45.0 if options.short else 840.0
    return options


@dataclass(slots=True)
class Soak:
    """One run. Ownership: `end` takes away all but the working folder."""

    options: argparse.Namespace
    seed: str
    work: Path
    stack: ExitStack
    began: float = field(default_factory=time.monotonic)
    violations: list[str] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    known: builds.Builds = field(init=False)
    subject: Subject = field(init=False)
    trouble: Troublemaker = field(init=False)
    front: Front = field(init=False)
    watch: Watch = field(init=False)
    #: What the chunks have taken of the disk at most.
    most_bytes: int = 0
    _measured: float = 0.0
    _readers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def diaries(self) -> Path:
        return self.work / "readers"

    def prepare(self) -> None:
        """Builds, registry, front, and the mount."""
        self.diaries.mkdir()
        layout = self.work / "layout"
        self.known = builds.make(layout, self.work / "compiled", self.seed)
        self.known.save(self.work / "builds.json")
        registry = self.stack.enter_context(docker_registry(self.work / "registry"))
        self.front = self.stack.enter_context(Front(registry.host, self.seed, log=self.work / "front.log"))
        plain = self.work / "plain.toml"
        plain.write_text(f'[registries."{registry.host}"]\nplain_http = true\n')
        builds.publish(self.known, layout, registry.host, plain)
        apps = [*self.known.trees, builds.MOVING]
        self.subject = self.stack.enter_context(prepared(self.work, self.front.host, apps))
        dice = random.Random(f"{self.seed}/trouble")
        self.trouble = Troublemaker(
            self.subject, self.front, registry, layout, self.seed, dice, self.work / "trouble.log"
        )
        self.trouble.push()
        self.watch = Watch(
            self.diaries,
            lambda: [
                *(process.pid for process in self._readers.values()),
                *(process.pid for process in self.subject.processes()),
            ],
            lambda: list(self._readers),
            lambda begin, text: self.circumstances.limit(begin, time.monotonic(), kind=_kind(text)) + 1,
        )
        self.stack.enter_context(self.watch.looking())
        # Nothing is read before it was verified once: while a layer streams for the first time its bytes are not.
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(self._prefetch, self._everything))
        self.subject.start()

    def _prefetch(self, tag: str) -> None:
        self.subject.say("prefetch", tag.replace("/", ":"), "--all", "--config", self.subject.config)

    @property
    def circumstances(self) -> Circumstances:
        trouble = self.trouble
        return Circumstances(
            tuple(trouble.faults),
            tuple(trouble.kills),
            tuple(trouble.upgrades),
            tuple(trouble.freezes),
            tuple(trouble.pushes),
        )

    def run(self) -> None:
        """All phases."""
        with self._phase("reading everything", is_calm=True):
            self._read("all", 1, self._everything, pause=0.0, wait=_RECOVERY_SECONDS)
            self._read("all", 1, _CACHED, pause=0.0, wait=_RECOVERY_SECONDS)
        if self.options.only == "kills":
            self._read("hash", _MANY_READERS, _CACHED, pause=0.01)
            self._kill_calmly("kills under 32 readers", self.options.seconds, self.options.kills)
        else:
            self._soak()
        self._stop_readers(list(self._readers))
        self.notes += descriptors_and_memory([process.pid for process in self.subject.processes()])
        self._unmount()

    @property
    def _everything(self) -> tuple[str, ...]:
        return self._tags(app for app in self.known.trees if app != builds.FRESH)

    def _tags(self, apps: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"{app}/{tag}" for app in apps for tag in self.known.trees[app])

    def _soak(self) -> None:
        seconds, kills = self.options.seconds, self.options.kills
        # Not more than leave the mount its network; the others when all is in the cache.
        busy_kills = min(kills // 2, 4) if self.options.short else int(kills * 0.66)
        calm_kills = kills - busy_kills
        for kind in ("inside", "programs", "running", "held"):
            self._read(kind, 1, ("web/v1",) if kind in ("programs", "running") else _CACHED, pause=0.3)
        self._read("known", 1, _CACHED, pause=0.1)
        with self._phase("faults"):
            passing = [
                *self._read("hash", 4, self._everything, pause=0.1),
                *self._read("held", 1, ("bulk/v1", "soci/v1", "star/v2"), pause=0.2),
                *self._read("walk", 1, self._everything, pause=1.0),
                *self._read("fresh", 1, self._tags([builds.FRESH]), pause=1.0),
                *self._read("snapshots", 1, self._everything, pause=4.0),
                *self._read("moves", 1, (), pause=0.5),
            ]
            self._make_trouble(seconds * (1 - 2 * _CALM_SHARE), busy_kills, faults=True)
            self._stop_readers(passing)
        with self._phase("recovery"):
            began = time.monotonic()
            self._read("all", 1, self._tags(self.known.trees), pause=0.0, wait=_RECOVERY_SECONDS)
            self._check_revision(began)
            self.notes.append(
                f"everything was right again {time.monotonic() - began:.1f} s after the last fault"
            )
            self._read("all", 1, _CACHED, pause=0.0, wait=_RECOVERY_SECONDS)
            if self.violations:
                return
        self.trouble.most_deaths = REFUSING_DEATHS - 1
        busy = self._read("hash", 6, _CACHED, pause=0.02)
        self._kill_calmly("kills alone", seconds * _CALM_SHARE, calm_kills // 2)
        self._read("all", 1, _CACHED, pause=0.0, wait=_RECOVERY_SECONDS)
        self.trouble.stop_registry()
        self._kill_calmly("kills without a registry", seconds * _CALM_SHARE, calm_kills - calm_kills // 2)
        self.trouble.start_registry()
        self._stop_readers(busy)

    def _kill_calmly(self, name: str, seconds: float, kills: int) -> None:
        with self._phase(name, is_calm=True):
            self._make_trouble(seconds, kills, faults=False)
            time.sleep(2)

    def _make_trouble(self, seconds: float, kills: int, *, faults: bool) -> None:
        is_long = not self.options.short
        steps = plan(
            self.trouble.dice,
            seconds=seconds,
            kills=kills,
            upgrades=0 if self.options.only or not kills else max(1, int(seconds / 60)),
            freezes=int(faults and is_long and kills > 0),
            faults=faults,
            pairs=not faults and self.options.only is None,
            long=is_long,
        )
        self.trouble.work(steps, seconds, self._look)

    @contextmanager
    def _phase(self, name: str, *, is_calm: bool = False) -> Iterator[None]:
        begin = time.monotonic()
        print(f"soak: {begin - self.began:.0f} s: {name}", flush=True)
        yield
        self.phases.append(Phase(name, begin, time.monotonic(), is_calm))

    def _read(
        self, kind: str, count: int, scope: tuple[str, ...], *, pause: float, wait: float | None = None
    ) -> list[str]:
        """Starts readers; their names. With `wait` they must end by themselves, having read all, in so many seconds."""
        names = []
        for _ in range(count):
            number = sum(1 for name in self.diaries.glob(f"{kind}*.now")) + 1
            name = f"{kind}{number}"
            task = Task(
                kind,
                name,
                str(self.subject.point),
                str(self.work / "builds.json"),
                str(self.diaries),
                self.seed,
                scope,
                pause,
            )
            (self.diaries / f"{name}.now").touch()
            self._readers[name] = start(task)
            names.append(name)
        if wait is not None:
            deadline = time.monotonic() + wait
            while any(self._readers[name].poll() is None for name in names):
                if time.monotonic() > deadline:
                    at = [diary.now(self.diaries, name) for name in names]
                    self.violations.append(f"not all could be read within {wait:g} s; at the end: {at}")
                    self._stop_readers(names)
                    return []
                self._look()
                time.sleep(0.1)
            for name in names:
                self._readers.pop(name)
        return names

    def _look(self) -> None:
        """Readers end only when they are told to, and nothing hangs. Raises: Broken."""
        if self.watch.too_long:
            raise Broken("something waits for too long: nothing further is tried")
        if time.monotonic() > self._measured + _MEASURING_SECONDS:
            self._measured = time.monotonic()
            self.most_bytes = max(self.most_bytes, self.subject.chunk_bytes())
        for name, process in list(self._readers.items()):
            if process.poll() not in (None, 0):
                self._readers.pop(name)
                said = (self.diaries / f"{name}.log").read_text()[-2000:]
                self.violations.append(f"the reader {name} has ended with {process.returncode}: {said}")

    def _stop_readers(self, names: Iterable[str]) -> None:
        """A reader that waits is to end at once."""
        stopping = {name: self._readers.pop(name) for name in names if name in self._readers}
        for process in stopping.values():
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _ENDING_SECONDS
        for name, process in stopping.items():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                at = diary.now(self.diaries, name)
                self.violations.append(f"the reader {name} did not end when it was told to; it is at {at}")
                process.kill()

    def _check_revision(self, since: float) -> None:
        """The moving tag must show its last revision."""
        last = self.trouble.pushes[-1][1]
        path = self.subject.point / builds.MOVING / builds.LIVE / builds.REVISION
        said = ""
        while time.monotonic() < since + _RECOVERY_SECONDS:
            with suppress(OSError):
                said = path.read_text().strip()
            if said == str(last):
                return
            time.sleep(0.5)
        self.violations.append(
            f"{_RECOVERY_SECONDS:g} s after the last fault {path} holds {said!r}, not {last}"
        )

    def _unmount(self) -> None:
        self.subject.say("unmount", self.subject.point)
        if left := self.subject.leftovers():
            self.violations.append(f"left behind after the unmount: {', '.join(left)}")

    def end(self) -> None:
        """Ends what is still there of the readers."""
        for process in self._readers.values():
            process.kill()

    def report(self) -> str:
        """What was done, and what came of it; `violations` is complete then."""
        events = diary.events(self.diaries)
        found = verdict.judge(events, self.circumstances, self.phases)
        self.violations += [*found.violations, *self.trouble.failures, *self.watch.too_long]
        if self.most_bytes > CACHE_BYTES:
            self.violations.append(
                f"the chunks took {self.most_bytes} bytes of the {CACHE_BYTES} that they may"
            )
        done = self.trouble.done
        if done["kill"] < (1 - _LEFT_OUT_SHARE) * self.options.kills - 0.5:
            self.violations.append(f"{done['kill']} kills of the {self.options.kills} that were to be")
        operations, verified = diary.counts(self.diaries)
        lines = [
            f"operations: {_listed(operations)}; {verified / 1e6:.0f} MB verified",
            f"done: {_listed(done)}",
            f"the front: {self.front.served} answers passed on; met {_listed(self.front.met)}",
            "errors that a fault excuses: "
            + (
                ", ".join(f"{n} {error} ({fault})" for (error, fault), n in found.excused.most_common())
                or "none"
            ),
        ]
        for phase in self.phases:
            waits = sorted(found.longest[phase.name].items(), key=lambda item: item[0])
            longest = ", ".join(f"{kind} {event.end - event.begin:.2f} s" for kind, event in waits) or "none"
            lines.append(f"{phase.name}, {phase.end - phase.begin:.0f} s: longest waits {longest}")
            felt = verdict.pauses(events, self.trouble.kills, phase, known_only=not phase.is_calm)
            if felt:
                what = "any reader" if phase.is_calm else "what needs no network"
                lines.append(f"  pause of {what} after a kill: {verdict.median_and_longest(felt)}")
                lines.append(f"    each: {' '.join(f'{seconds:.2f}' for seconds in felt)}")
        if (sleep := self.watch.longest) is not None:
            lines.append(f"longest in state D: {sleep.seconds:.1f} s in {sleep.where}, {sleep.name}")
        lines.append(f"the chunks took {self.most_bytes / 1e6:.1f} of {CACHE_BYTES / 1e6:.0f} MB at most")
        lines += self.notes
        lines.append(verdict.report(self.violations, "violations"))
        return "\n".join(lines)


def _kind(text: str) -> str:
    """The kind of operation that a reader says it is at."""
    words = text.split(" ")
    return " ".join(words[:2]) if words[0] == "known" else words[0]


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
