import os
import signal
import stat
import sys

import pytest

from fsmount.cli import background
from fsmount.cli.background import announce_failure, announce_ready, run_in_background
from fsmount.errors import FsmountError


@pytest.fixture
def log(tmp_path):
    return tmp_path / "state/fsmount/mount.log"


@pytest.fixture
def run(log, capsys):
    """Runs Python code as the child: the exit code, and what was written to stderr. Arguments are its sys.argv[1:]."""

    def run(code, *arguments):
        preamble = (
            "import os, signal, sys\nfrom fsmount.cli.background import announce_failure, announce_ready\n"
        )
        exit_code = run_in_background(list(arguments), log, program=(sys.executable, "-c", preamble + code))
        out, err = capsys.readouterr()
        assert out == ""
        return exit_code, err

    return run


@pytest.fixture
def gate(tmp_path):
    """A FIFO for hearing from a child that goes on: what it writes until it closes it."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


def test_a_child_that_is_ready_goes_on_after_its_parent_may_end(run, gate):
    code = (
        "announce_ready()\nwith open(sys.argv[1], 'w') as gate: gate.write(f'{os.getsid(0) == os.getpid()}')"
    )
    assert run(code, str(gate)) == (0, "")
    assert gate.read_text() == "True"


def test_a_child_has_the_arguments_no_input_and_writes_to_the_log(run, log):
    code = """
print(sys.argv[1:], repr(sys.stdin.read()))
print("and errors", file=sys.stderr)
sys.stdout.flush()
announce_ready()
"""
    assert run(code, "mount", "--foreground") == (0, "")
    assert sorted(log.read_text().splitlines()) == ["['mount', '--foreground'] ''", "and errors"]


def test_the_log_is_made_for_the_user_alone_and_appended_to(run, log):
    run("os.write(1, b'one ')\nannounce_ready()")
    run("os.write(1, b'two')\nannounce_ready()")
    assert log.read_text() == "one two"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_child_that_fails_is_reported_with_its_own_words_and_exit_code(run):
    assert run("announce_failure('fsmount: error: no such tag\\n')\nsys.exit(4)") == (
        4,
        "fsmount: error: no such tag\n",
    )


def test_an_error_of_the_command_itself_reaches_the_one_who_waits(log, capsys):
    code = run_in_background(["unmount", "/nonexistent"], log)
    assert (code, capsys.readouterr().err) == (3, "fsmount: error: nothing is mounted at /nonexistent\n")
    assert "nothing is mounted" in log.read_text()


def test_a_child_that_ends_without_a_word_is_reported_with_the_end_of_its_log(run, log):
    log.parent.mkdir(parents=True)
    log.write_text("of an earlier run\n")
    exit_code, err = run("os.write(2, b''.join(b'line %d\\n' % number for number in range(20)))\nsys.exit(9)")
    assert exit_code == 9
    first, *rest = err.splitlines()
    assert first == f"fsmount: error: it ended with exit code 9 before it was ready; the log {log} says:"
    assert rest == [f"line {number}" for number in range(10, 20)]


def test_a_child_that_ends_well_before_it_is_ready_has_failed(run):
    assert run("") == (1, "fsmount: error: it ended with exit code 1 before it was ready.\n")


def test_a_child_that_is_killed_is_reported_as_a_shell_would(run):
    exit_code, err = run("os.kill(os.getpid(), signal.SIGKILL)")
    assert exit_code == 128 + signal.SIGKILL
    assert "exit code 137 before it was ready" in err


def test_a_child_that_has_failed_and_does_not_end_is_ended(run, monkeypatch):
    monkeypatch.setattr(background, "_GRACE_SECONDS", 0)
    code = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nannounce_failure('bad')\nwhile True: signal.pause()"
    )
    assert run(code) == (128 + signal.SIGKILL, "bad\n")


def test_an_interrupt_while_waiting_ends_the_child(run, tmp_path):
    ended = tmp_path / "ended"
    code = """
signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], "w").close(), sys.exit(0)))
os.kill(os.getppid(), signal.SIGINT)
while True: signal.pause()
"""
    with pytest.raises(KeyboardInterrupt):
        run(code, str(ended))
    assert ended.exists()


def test_a_log_that_cannot_be_written_is_told_by_name(tmp_path):
    with pytest.raises(FsmountError, match=f"the log {tmp_path} cannot be written: Is a directory"):
        run_in_background([], tmp_path)


def test_announcing_without_a_parent_does_nothing(monkeypatch):
    monkeypatch.delenv("FSMOUNT_READY_FD", raising=False)
    announce_ready()
    announce_failure("unheard")


def test_only_the_first_announcement_counts(monkeypatch):
    reading, writing = os.pipe()
    monkeypatch.setenv("FSMOUNT_READY_FD", str(writing))
    announce_ready()
    announce_failure("too late")
    with open(reading, "rb") as pipe:
        assert pipe.read() == b"ready\n"
    assert "FSMOUNT_READY_FD" not in os.environ


def test_announcing_to_a_parent_that_is_gone_does_nothing(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setenv("FSMOUNT_READY_FD", str(writing))
    announce_ready()


def test_a_number_that_has_come_to_mean_another_file_is_not_written_to(monkeypatch, tmp_path):
    with open(tmp_path / "database", "wb") as file:
        monkeypatch.setenv("FSMOUNT_READY_FD", str(file.fileno()))
        announce_ready()
    assert (tmp_path / "database").read_bytes() == b""
