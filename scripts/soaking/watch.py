"""The watch over processes: who sleeps uninterruptibly, since when and where, and which reader waits for too long."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from scripts.soaking import diary

_EVERY_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Asleep:
    """A thread in state D: the same sleep as long as `switches` stays what it is."""

    pid: int
    tid: int
    switches: str


@dataclass(frozen=True, slots=True)
class Sleep:
    """How long a thread was seen in one uninterruptible sleep, and where in the kernel."""

    seconds: float
    name: str
    pid: int
    where: str
    at: float


@dataclass(slots=True)
class Watch:
    """Looks at processes again and again, in a thread. `hung`: operations that go on for longer than `limit`."""

    folder: Path
    #: The processes to look at: those that use the mount, with all their children, and those that serve it.
    pids: Callable[[], Iterable[int]]
    readers: Callable[[], Iterable[str]]
    limit: Callable[[float, str], float]
    longest: Sleep | None = None
    #: Sleeps that were longer than the limit, and operations that were, each once.
    too_long: list[str] = field(default_factory=list)
    _since: dict[Asleep, float] = field(default_factory=dict)
    _told: set[tuple[str, float]] = field(default_factory=set)
    _is_over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Looks as long as the block runs."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(_EVERY_SECONDS):
            now = time.monotonic()
            asleep = set(self._asleep())
            for one in asleep:
                self._note(one, self._since.setdefault(one, now), now)
            self._since = {one: since for one, since in self._since.items() if one in asleep}
            for name in self.readers():
                at = diary.now(self.folder, name)
                if at is not None and (
                    now - at.begin > self.limit(at.begin, at.text) and (name, at.begin) not in self._told
                ):
                    self._told.add((name, at.begin))
                    self.too_long.append(
                        f"{name} has been at it since {at.begin:.2f}, for {now - at.begin:.1f} s: {at.text}"
                    )

    def _note(self, one: Asleep, since: float, now: float) -> None:
        if self.longest is not None and now - since <= self.longest.seconds:
            return
        name = where = "?"
        with suppress(OSError):
            name = (
                Path(f"/proc/{one.pid}/cmdline")
                .read_bytes()
                .replace(b"\0", b" ")
                .decode(errors="replace")[:150]
            )
            where = Path(f"/proc/{one.pid}/task/{one.tid}/wchan").read_text()
        self.longest = Sleep(now - since, name, one.pid, where, since)
        if now - since > self.limit(since, "") and ("D", since) not in self._told:
            self._told.add(("D", since))
            stack = ""
            with suppress(OSError):
                stack = Path(f"/proc/{one.pid}/task/{one.tid}/stack").read_text()
            self.too_long.append(
                f"process {one.pid} has been in state D since {since:.2f}, for {now - since:.1f} s, in {where}: "
                f"{name}\n{stack}"
            )

    def _asleep(self) -> Iterator[Asleep]:
        for pid in with_children(self.pids()):
            with suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    with suppress(OSError):
                        if (task / "stat").read_text().rpartition(")")[2].split()[0] == "D":
                            status = (task / "status").read_text()
                            yield Asleep(
                                pid, int(task.name), status[status.index("voluntary_ctxt_switches") :]
                            )


def with_children(pids: Iterable[int]) -> set[int]:
    """These processes, and all below them."""
    below: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                below.setdefault(parent, []).append(int(folder.name))
    found: set[int] = set()
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        found.add(pid)
        waiting += [child for child in below.get(pid, []) if child not in found]
    return found
