"""The holder and its worker, as processes; what stands for the device of a mount is a pipe."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_SECONDS = 20.0
_HOLDER = """
import logging, sys
from fsmount import holder
logging.basicConfig(level=logging.INFO, format="%(message)s")
holder._WATCHDOG_SECONDS = 1.0
command = [sys.executable, "-m", "tests.fakes.worker", *sys.argv[1:]]
sys.exit(holder.Holder(command).run())
"""


def _ignore(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)


class Held:
    """A holder that runs, and what its workers have written."""

    def __init__(self, folder: Path, plan: str, *, ignored: signal.Signals | None = None) -> None:
        self.folder = folder
        os.mkfifo(folder / "device")
        self.device = os.open(folder / "device", os.O_RDONLY | os.O_NONBLOCK)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, folder, plan],
            cwd=_ROOT,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=None if ignored is None else lambda: _ignore(ignored),
        )

    @property
    def events(self) -> list[dict[str, Any]]:
        log = self.folder / "log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    @property
    def serving(self) -> list[int]:
        """The processes that have come to serve, the last one last."""
        return [event["pid"] for event in self.events if "serving" in event]

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + _SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.events
            time.sleep(0.02)

    def unmount(self) -> None:
        """As somebody does from outside."""
        os.close(self.device)
        self.device = -1

    def end(self) -> str:
        """What the holder has written by its end."""
        return self.process.communicate(timeout=_SECONDS)[1]


@contextmanager
def held(folder: Path, plan: str, *, ignored: signal.Signals | None = None) -> Iterator[Held]:
    holder = Held(folder, plan, ignored=ignored)
    try:
        yield holder
    finally:
        holder.process.kill()
        for event in holder.events:
            with suppress(ProcessLookupError):
                os.kill(event["pid"], signal.SIGKILL)
        holder.process.communicate()
        if holder.device >= 0:
            os.close(holder.device)


def test_who_was_never_ready_ends_the_holder_with_its_own_exit_code(tmp_path: Path) -> None:
    with held(tmp_path, "f") as holder:
        holder.end()
        assert holder.process.returncode == 4
        assert len(holder.events) == 1


def test_who_is_killed_is_followed_by_another_that_inherits_what_was_stored(tmp_path: Path) -> None:
    with held(tmp_path, "s") as holder:
        holder.wait(lambda: holder.serving)
        os.kill(holder.serving[0], signal.SIGKILL)
        holder.wait(lambda: len(holder.serving) == 2)
        first, second = (event for event in holder.events if "start" in event)
        assert (first["inherited"], first["record"]) == ([], None)
        assert (second["inherited"], second["record"]) == (["mount-1-0.999", "record"], "kept")
        assert second["watchdog"] == 1
        holder.process.terminate()
        assert "killed by SIGKILL" in holder.end()


def test_who_crashes_again_and_again_is_followed_by_another_each_time(tmp_path: Path) -> None:
    with held(tmp_path, "ccfcs") as holder:
        holder.wait(lambda: holder.serving)
        assert [event["start"] for event in holder.events if "start" in event] == [0, 1, 2, 3, 4]


def test_who_is_stuck_is_replaced(tmp_path: Path) -> None:
    with held(tmp_path, "s") as holder:
        holder.wait(lambda: holder.serving)
        os.kill(holder.serving[0], signal.SIGSTOP)
        holder.wait(lambda: len(holder.serving) == 2)
        holder.process.terminate()
        assert "is stuck: silent for" in holder.end()


def test_sigterm_is_passed_on_and_the_holder_ends_with_its_worker(tmp_path: Path) -> None:
    with held(tmp_path, "s") as holder:
        holder.wait(lambda: holder.serving)
        holder.process.terminate()
        holder.end()
        assert holder.process.returncode == 0
        assert [event["signal"] for event in holder.events if "signal" in event] == ["SIGTERM"]


def test_sighup_is_passed_on(tmp_path: Path) -> None:
    with held(tmp_path, "s") as holder:
        holder.wait(lambda: holder.serving)
        holder.process.send_signal(signal.SIGHUP)
        holder.wait(lambda: [event["signal"] for event in holder.events if "signal" in event] == ["SIGHUP"])
        assert len(holder.serving) == 1


def test_a_worker_that_unmounts_is_the_end(tmp_path: Path) -> None:
    with held(tmp_path, "u") as holder:
        holder.end()
        assert holder.process.returncode == 0


def test_who_dies_after_the_mount_is_followed_by_nobody(tmp_path: Path) -> None:
    with held(tmp_path, "s") as holder:
        holder.wait(lambda: holder.serving)
        holder.unmount()
        os.kill(holder.serving[0], signal.SIGKILL)
        holder.end()
        assert holder.process.returncode == 128 + signal.SIGKILL
        assert len(holder.serving) == 1


def test_what_others_tell_is_not_believed(tmp_path: Path) -> None:
    with held(tmp_path, "s") as holder:
        holder.wait(lambda: holder.serving)
        script = (
            "from fsmount.notify import Service; import sys; Service(sys.argv[1]).remove('mount-1-0.999')"
        )
        environ = Path(f"/proc/{holder.serving[0]}/environ").read_bytes().split(b"\0")
        (address,) = (word[14:].decode() for word in environ if word.startswith(b"NOTIFY_SOCKET="))
        subprocess.run([sys.executable, "-c", script, address], cwd=_ROOT, check=True)
        os.kill(holder.serving[0], signal.SIGKILL)
        holder.wait(lambda: len(holder.serving) == 2)


def test_who_is_started_with_the_ends_of_children_ignored_hears_of_them_all_the_same(tmp_path: Path) -> None:
    with held(tmp_path, "s", ignored=signal.SIGCHLD) as holder:
        holder.wait(lambda: holder.serving)
        os.kill(holder.serving[0], signal.SIGKILL)
        holder.wait(lambda: len(holder.serving) == 2)


def test_sigterm_that_comes_while_a_newer_program_is_tried_is_not_lost(tmp_path: Path) -> None:
    with held(tmp_path, "s") as holder:
        holder.wait(lambda: holder.serving)
        holder.process.send_signal(signal.SIGUSR2)
        time.sleep(0.05)
        holder.process.terminate()
        holder.end()
        assert [event["signal"] for event in holder.events if "signal" in event] == ["SIGTERM"]


def test_a_worker_that_cannot_be_started_for_a_moment_is_started_later(tmp_path: Path) -> None:
    """As when a limit on processes is reached."""
    with held(tmp_path, "s") as holder:
        holder.wait(lambda: holder.serving)
        pid = holder.process.pid
        # Nothing can be opened any more, not even what tells of a child's end.
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 4096))
        os.kill(holder.serving[0], signal.SIGKILL)
        time.sleep(1.5)
        assert len(holder.serving) == 1
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (4096, 4096))
        holder.wait(lambda: len(holder.serving) > 1)


def test_nothing_is_left_of_a_holder_s_socket(tmp_path: Path) -> None:
    with held(tmp_path, "s") as holder:
        holder.wait(lambda: holder.serving)
        environ = Path(f"/proc/{holder.serving[0]}/environ").read_bytes().split(b"\0")
        (path,) = (Path(os.fsdecode(word[14:])) for word in environ if word.startswith(b"NOTIFY_SOCKET="))
        assert path.parent.stat().st_mode & 0o777 == 0o700
        holder.process.terminate()
        holder.end()
        assert not path.parent.exists()
