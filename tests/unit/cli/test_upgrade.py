"""Whom `fsmount upgrade` signals, and what it says when there is nobody to be signalled."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from fsmount.cli import upgrade as upgrade_module
from fsmount.cli.main import main
from fsmount.errors import NotRunning, Refused
from fsmount.fuse import mounts

_POINT = Path("/srv/artifacts")
#: A shell says that it is there, and ends when its input does, or of the signal.
_WAITS = "echo; read line; exit 42"


@pytest.fixture(autouse=True)
def _mount(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount of this user's."""
    options = frozenset({f"user_id={os.geteuid()}"})
    mount = mounts.Mount(1, 0, "0:99", _POINT, options, mounts.FSTYPE, "fsmount")
    monkeypatch.setattr(mounts, "find", lambda mountpoint: mount)


def _served_by(monkeypatch: pytest.MonkeyPatch, pid: int, holder: int | None) -> None:
    """Of such a mount; once it was asked, another process serves it."""
    pids = iter([pid])

    def ask(mountpoint: Path, path: str) -> bytes:
        process = {"pid": next(pids, pid + 1), "holder": holder}
        return json.dumps({"fsmount": "1.0", "process": process}).encode()

    monkeypatch.setattr(upgrade_module, "ask", ask)


@contextmanager
def _running(words: Sequence[str], user: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process with these words in its command line, which would die of the signal."""
    command = [words[0], "-c", _WAITS, *words[1:]]
    with subprocess.Popen(
        command, executable="/bin/sh", stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=user, cwd="/"
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def _is_unharmed(process: subprocess.Popen[bytes]) -> bool:
    """Ends it."""
    process.communicate(timeout=20)
    return process.returncode == 42


def _gone() -> int:
    """The number of a process that is no more."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


@pytest.mark.parametrize(
    "words",
    [
        ["python3", "/opt/bin/fsmount", "mount", "--foreground"],
        ["python3", "-P", "-m", "fsmount", "mount", "/srv/artifacts", "--foreground"],
    ],
)
@pytest.mark.parametrize("is_held", [True, False])
def test_the_holder_is_signalled_or_else_the_process_that_serves(
    words: list[str], is_held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _running(words) as process:
        _served_by(monkeypatch, _gone() if is_held else process.pid, process.pid if is_held else None)
        assert main(["upgrade", str(_POINT)]) == 0
        assert process.wait(20) == -signal.SIGUSR2


def test_a_mount_whose_holder_is_gone_is_not_upgraded_and_its_user_hears_how_to_begin_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = _gone()
    _served_by(monkeypatch, os.getpid(), holder)
    assert main(["upgrade", str(_POINT)]) == Refused.exit_code
    said = capsys.readouterr().err
    assert f"process {holder}, which kept the mount at {_POINT}, is gone" in said
    assert f"process {os.getpid()} serves it on, and nobody would follow it" in said
    assert f"fsmount unmount --lazy {_POINT}, and fsmount mount {_POINT}" in said


def test_a_process_that_has_ended_since_it_was_asked_is_no_unforeseen_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = _gone()
    _served_by(monkeypatch, worker, None)
    assert main(["upgrade", str(_POINT)]) == NotRunning.exit_code
    assert f"process {worker}, which served {_POINT}, has just ended" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["editor", "fsmount"], ["cat", "mount"], ["python3", "-m", "fsmount", "status", "mount"]]
)
def test_a_process_that_has_got_the_holder_s_number_is_not_signalled(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with _running(words) as other:
        _served_by(monkeypatch, os.getpid(), other.pid)
        assert main(["upgrade", str(_POINT)]) == Refused.exit_code
        assert _is_unharmed(other)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_another_user_s_process_is_not_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    with _running(["python3", "fsmount", "mount", "/mnt"], user=4711) as other:
        _served_by(monkeypatch, os.getpid(), other.pid)
        assert main(["upgrade", str(_POINT)]) == Refused.exit_code
        assert _is_unharmed(other)
