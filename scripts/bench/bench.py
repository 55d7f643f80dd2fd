"""The state of one benchmark: where things are, what is mounted, what has been measured so far."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from scripts.bench.corpus import REPOSITORY, Corpus
from scripts.bench.machine import Failed, mounts_below, timed
from scripts.bench.report import Sample
from tests.peers import Registry

#: In the work folder: complete once they are there, and none of them made by fsmount.
REUSABLE = frozenset({".fsmount-bench", "corpus", "registry", "ratarmount"})


@dataclass(slots=True)
class Bench:
    """Ownership: everything made is below `work` or `disk`; `clean` unmounts and removes it."""

    work: Path
    disk: Path
    corpus: Corpus
    registry: Registry
    #: The command of fsmount and of ratarmount, or why there is none.
    fsmount: list[str] | str
    ratarmount: list[str] | str
    #: Whether an app's start is measured on a tenth of the image, to see that it works.
    small: bool = False
    scenario: str = ""
    run: int = 0
    samples: list[Sample] = field(default_factory=list)
    #: Why a contender is missing, and in which scenarios.
    notes: dict[str, dict[str, None]] = field(default_factory=dict)
    _names: int = 0

    def record(self, measure: str, contender: str, value: float) -> None:
        self.samples.append(Sample(self.scenario, measure, contender, self.run, value))

    def attempt(self, contender: str, measure: Callable[[], None]) -> None:
        """Let one contender try; if it cannot, say so below the table and go on."""
        try:
            measure()
        except Failed as problem:
            self.note(f"without {contender}: {problem}")

    def note(self, what: str) -> None:
        """Something to be said below the table."""
        self.notes.setdefault(what, {})[self.scenario] = None

    def blob_urls(self, tag: str) -> list[str]:
        base = f"http://{self.registry.host}/v2/{REPOSITORY}/blobs"
        return [f"{base}/{layer.digest}" for layer in self.corpus.blobs(tag)]

    def wire_bytes(self) -> int:
        """Body bytes of blobs that the registry has sent so far, counted when a body ends."""
        return sum(
            one.written for one in self.registry.requests() if "/blobs/" in one.path and one.method == "GET"
        )

    @contextmanager
    def folder(self, *, on_disk: bool = False) -> Iterator[Path]:
        """A new empty folder, removed afterwards: outside of every clock."""
        self._names += 1
        path = (self.disk if on_disk else self.work) / f"run{self._names}"
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)  # the daemon closes its cache after the unmount

    @contextmanager
    def mounted(
        self, cache: Path, *, repository: str | None = None, config: Path | None = None
    ) -> Iterator[tuple[Path, float]]:
        """fsmount over `cache`: the mount point, and the seconds until it answered. Raises: Failed.

        repository: with its host, if it is not that of the registry; its tags are in the folder `a`.
        """
        command = self.ours()
        self._names += 1
        point = self.work / f"mnt{self._names}"
        point.mkdir()
        app = f"a={repository or f'{self.registry.host}/{REPOSITORY}'}"
        options = ["--config", str(config)] if config is not None else []
        try:
            started = timed([*command, "mount", point, "--app", app, "--cache", cache, *options])
            try:
                yield point, started.seconds
            except BaseException:
                # What ended the scenario must leave as itself: a Ctrl-C that became Failed would be forgiven.
                with suppress(Failed):
                    timed([*command, "unmount", point])
                raise
            timed([*command, "unmount", point])
        finally:
            unmount(point)
            point.rmdir()

    def ours(self) -> list[str]:
        """The command of fsmount. Raises: Failed: there is none."""
        return _command(self.fsmount)

    def rats(self) -> list[str]:
        """The command of ratarmount. Raises: Failed: there is none."""
        return _command(self.ratarmount)

    def clean(self) -> None:
        """Unmount what is still mounted; remove all but what another bench may use again.

        Caches and unpacked trees go: an interrupt may have left them half made, or fsmount may change.
        """
        for folder in (self.work, self.disk):
            for point in mounts_below(folder):
                unmount(point)
            for left in folder.iterdir():
                if left.name not in REUSABLE and left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                elif left.name not in REUSABLE:
                    left.unlink()


def unmount(point: Path) -> None:
    """Take a mount away, lazily if it must be; nothing happens if there is none."""
    for flag in ("-u", "-uz"):
        if point not in mounts_below(point.parent):
            return
        try:
            timed(["fusermount3", flag, point])
        except Failed:
            continue


def _command(command: list[str] | str) -> list[str]:
    if isinstance(command, str):
        raise Failed(command)
    return command
