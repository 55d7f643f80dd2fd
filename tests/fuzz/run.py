"""scripts/fuzz: every target for a while, each in a process of its own; what breaks one is shown, and kept."""

import argparse
import base64
import importlib.util
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from random import SystemRandom

from tests.fuzz.targets import TARGETS, seeds

#: Inputs that once broke a target, named for it: tests/unit/test_fuzz.py runs them all again.
FOUND = Path(__file__).with_name("found")

#: What one input may take.
_SECONDS = 10
_MEBIBYTES = 2048


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all, if none is given"
    )
    parser.add_argument("--seconds", type=int, default=300, help="for each target (300)")
    parser.add_argument("--seed", type=int, help="to do the same again")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}: expected one of {', '.join(TARGETS)}")
    if importlib.util.find_spec("atheris") is None:
        print(
            "atheris is not installed, and there is none but for x86_64: nothing is fuzzed", file=sys.stderr
        )
        return int(platform.machine() == "x86_64")
    seed = options.seed or SystemRandom().randrange(1, 2**31)
    broken = [target for target in options.targets or TARGETS if not _fuzz(target, options.seconds, seed)]
    return 1 if broken else 0


def _fuzz(target: str, seconds: int, seed: int) -> bool:
    """Whether the target stood it."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, data in enumerate(seeds(target)):
            (corpus / str(number)).write_bytes(data)
        worker = [sys.executable, "-m", "tests.fuzz.worker", target, str(seed), str(corpus)]
        limits = [f"-max_total_time={seconds}", f"-timeout={_SECONDS}", f"-rss_limit_mb={_MEBIBYTES}"]
        log = Path(folder) / "log"
        with log.open("wb") as output:
            command = [*worker, *limits, f"-artifact_prefix={FOUND}/{target}-"]
            code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
        text = log.read_text(errors="replace")
    runs, branches = re.search(r"Done (\d+) runs", text), re.findall(r"cov: (\d+)", text)
    if code == 0 and runs is not None:
        print(f"{target}: {runs[1]} inputs, {branches[-1]} branches, seed {seed}", flush=True)
        return True
    print("\n".join(line for line in text.splitlines() if not line.startswith("#")))
    print(f"{target}: broken; the same again: scripts/fuzz {target} --seconds {seconds} --seed {seed}")
    for name in re.findall(r"Test unit written to .*/(.*)", text):
        print(f"input, in base64: {base64.b64encode((FOUND / name).read_bytes()).decode()}")
        print(
            f"kept as {FOUND / name}; run it: .venv/bin/pytest tests/unit/test_fuzz.py -k {name}", flush=True
        )
    return False


if __name__ == "__main__":
    sys.exit(main())
