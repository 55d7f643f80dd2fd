"""`python -m scripts.bench`: prepares, runs the scenarios, prints the table, leaves nothing behind."""

import argparse
import fcntl
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from scripts.bench import corpus
from scripts.bench.bench import Bench
from scripts.bench.report import rows, save, table
from scripts.bench.rivals import install_ratarmount
from scripts.bench.scenarios import ASKS, SCENARIOS
from tests.peers import docker_registry, have

MARK = ".fsmount-bench"


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0 all asked ratios met, or none measured; 1 not met; 2 cannot run; 130 interrupted."""
    options = _options(words)
    if reason := have("docker-registry", "curl", "tar", "gzip", "fusermount3"):
        print(reason, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _folder(options.work, options.keep) as work, _folder(options.disk, False) as disk:
        _say("making the corpus")
        made = corpus.make(work / "corpus")
        with docker_registry(work / "registry") as registry:
            corpus.publish(made, work / "corpus", registry.host)
            ratarmount = install_ratarmount(work, sys.executable)
            bench = Bench(
                work, disk, made, registry, _fsmount(options.fsmount), ratarmount, small=options.small
            )
            try:
                status = _measure(bench, options.only or list(SCENARIOS), options.runs)
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                bench.clean()
    lines = list(rows(bench.samples, ASKS))
    where = f"work folder {work}, disk {disk}; {os.cpu_count()} cores"
    notes = [f"{', '.join(scenarios)}: {why}" for why, scenarios in bench.notes.items()]
    print(table(lines, [*notes, where]))
    if options.json:
        save(options.json, lines, bench.samples, notes)
    return status or int(any(line.verdict == "FAIL" for line in lines))


def _measure(bench: Bench, names: Sequence[str], runs: int) -> int:
    try:
        for bench.scenario in names:
            for bench.run in range(runs):
                _say(f"{bench.scenario}, run {bench.run + 1} of {runs}")
                SCENARIOS[bench.scenario](bench)
    except KeyboardInterrupt:
        return 130
    return 0


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench/run", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=list(SCENARIOS), help="this scenario; may be repeated"
    )
    parser.add_argument("--runs", type=int, default=3, help="runs of each scenario (3)")
    parser.add_argument("--quick", dest="runs", action="store_const", const=1, help="one run of each")
    parser.add_argument(
        "--small", action="store_true", help="app-start with a tenth of its image: to see that it works"
    )
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/fsmount-bench"), help="a folder on tmpfs")
    parser.add_argument(
        "--disk", type=Path, default=Path("/var/tmp/fsmount-bench"), help="a folder on a disk"
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the corpus in the work folder for next time"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--fsmount", help="the command to measure (fsmount beside this Python)")
    return parser.parse_args(words)


def _fsmount(given: str | None) -> list[str] | str:
    if given:
        return shlex.split(given)
    beside = Path(sys.executable).with_name("fsmount")
    return [str(beside)] if beside.exists() else f"not installed: {beside}"


@contextmanager
def _folder(path: Path, keep: bool) -> Iterator[Path]:
    """A folder that is ours to empty: new, empty, or marked by an earlier bench that has ended."""
    if path.exists() and any(path.iterdir()) and not (path / MARK).exists():
        sys.exit(f"{path} holds something else; give another folder")
    path.mkdir(parents=True, exist_ok=True)
    with (path / MARK).open("w") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{path} is in use by another bench; give another folder")
        try:
            yield path.resolve()
        finally:
            if not keep:
                shutil.rmtree(path, ignore_errors=True)


def _say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
