"""The session against the kernel: it goes on answering, and leaves nothing behind."""

import os
import queue
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import trio

from fsmount.errors import DeadlineExpired, Refused
from fsmount.fuse import mounts, session
from tests.mount import toy

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs /dev/fuse"),
    pytest.mark.timeout(90),
]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

_SECONDS_OF_PATIENCE = 20.0
_NOBODY = 65534

# Opens as many files as told, and reads from each in a thread.
_READERS = """
import os, sys, threading
def read(name):
    with open(name, "rb", buffering=0) as file:
        file.read(10)
for number in range(int(sys.argv[2])):
    threading.Thread(target=read, args=(f"{sys.argv[1]}/stuck-{number}",)).start()
"""


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """A directory, from which whatever the test leaves mounted is taken away."""
    path = tmp_path / "mount point"
    path.mkdir()
    yield path
    toy.clean(path)


def look_at(path: Path) -> subprocess.CompletedProcess[str]:
    """Look at path, in another process, since the mount may be served by this one."""
    return subprocess.run(
        ["stat", "-t", path],
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C"},
        timeout=_SECONDS_OF_PATIENCE,
    )


def answers(process: toy.Process) -> bool:
    """Whether the loop of the process turns. (It answers in less than a millisecond.)"""
    process.tell("ping")
    try:
        process.wait_for("pong", timeout_seconds=1.5)
    except queue.Empty:
        return False
    return True


def test_pyfuse3_alone_freezes_when_a_caller_is_killed_before_its_request_is_read(mountpoint: Path) -> None:
    with toy.process(mountpoint, "--raw") as process:
        for _attempt in range(5):
            process.tell("trap")
            process.wait_for("killed")
            if not answers(process):
                break
        else:
            pytest.fail("it never froze: is the guard still needed?")
        look_at(mountpoint)  # any other request thaws it
        process.wait_for("pong")


def test_the_session_goes_on_when_a_caller_is_killed_before_its_request_is_read(mountpoint: Path) -> None:
    with toy.process(mountpoint) as process:
        for _attempt in range(5):
            process.tell("trap")
            process.wait_for("killed")
            assert answers(process)
        assert look_at(mountpoint / "same").returncode == 0


def test_pyfuse3_alone_dies_of_an_unexpected_exception(mountpoint: Path) -> None:
    with toy.process(mountpoint, "--raw") as process:
        look_at(mountpoint / "broken-bug")
        assert process.finish() != 0
        assert "not connected" in look_at(mountpoint).stderr
        assert mounts.is_dead(mounts.mounted()[-1])


def test_an_unexpected_exception_is_one_callers_io_error_and_is_logged_once(mountpoint: Path) -> None:
    with toy.process(mountpoint) as process:
        for _attempt in range(2):
            assert "Input/output error" in look_at(mountpoint / "broken-bug").stderr
        assert look_at(mountpoint / "same").returncode == 0
        mounts.unmount(mountpoint)
        assert process.finish() == 0
        assert process.log.count("ValueError: broken on purpose") == 1


def test_a_failure_with_a_name_reaches_the_caller_as_its_errno(mountpoint: Path) -> None:
    with toy.process(mountpoint):
        assert "Bad message" in look_at(mountpoint / "broken-corrupt").stderr


def test_110_waiting_readers_hold_up_neither_a_lookup_nor_another_reader(mountpoint: Path) -> None:
    with toy.process(mountpoint) as process:
        readers = subprocess.Popen([sys.executable, "-c", _READERS, mountpoint, "110"])
        process.wait_for("stuck 110")
        other = subprocess.run(["cat", mountpoint / "same"], stdout=subprocess.DEVNULL, timeout=20)
        assert other.returncode == 0
        process.tell("release")
        process.wait_for("released")
        assert readers.wait(_SECONDS_OF_PATIENCE) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("command", [("stat", "slow"), ("cat", "stuck-0")], ids=["lookup", "read"])
def test_a_caller_that_is_killed_while_it_waits_is_gone_at_once(
    mountpoint: Path, number: signal.Signals, command: tuple[str, str]
) -> None:
    program, name = command
    with toy.process(mountpoint) as process:
        caller = subprocess.Popen([program, mountpoint / name], stdout=subprocess.DEVNULL)
        process.wait_for("lookup slow" if name == "slow" else "stuck 1")
        caller.send_signal(number)
        assert caller.wait(_SECONDS_OF_PATIENCE) == -number
        if name == "slow":
            process.wait_for("given up")
        assert look_at(mountpoint / "same").returncode == 0


def test_a_signal_that_does_not_end_its_wait_tells_a_caller_nothing_wrong(mountpoint: Path) -> None:
    # The shell has a handler for the end of its children.
    script = 'sleep 0.05 & [ -e "$0" ] && echo there || echo missing'
    with toy.process(mountpoint) as process:
        shell = subprocess.Popen(
            ["bash", "-c", script, mountpoint / "late"], stdout=subprocess.PIPE, text=True
        )
        process.wait_for("lookup late")
        children = Path(f"/proc/{shell.pid}/task/{shell.pid}/children")
        deadline = time.monotonic() + _SECONDS_OF_PATIENCE
        while _is_running(children.read_text().split()) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)  # so that the kernel has told of it
        process.tell("release")
        assert shell.communicate(timeout=_SECONDS_OF_PATIENCE)[0] == "there\n"


def _is_running(pids: list[str]) -> bool:
    return any(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z" for pid in pids)


def test_root_s_mount_is_read_ahead_as_far_as_requests_are_large(mountpoint: Path) -> None:
    with toy.process(mountpoint):
        mount = mounts.find(mountpoint)
        assert mount is not None
        read_ahead = Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").read_text()
        assert read_ahead == ("1024\n" if os.geteuid() == 0 else "128\n")


def test_the_mount_is_read_only_safe_and_called_fsmount(mountpoint: Path) -> None:
    with toy.process(mountpoint):
        mount = mounts.find(mountpoint)
        assert mount is not None
        assert mounts.is_ours(mount)
        assert mount.source == "fsmount"
        assert mount.options >= {"ro", "nosuid", "nodev", "default_permissions"}


@as_root
def test_a_killed_daemon_s_mount_and_another_on_top_of_it_are_cleared_at_the_next_start(
    mountpoint: Path,
) -> None:
    with toy.process(mountpoint):
        pass
    with toy.unserved(mountpoint):
        pass
    assert [mounts.is_dead(mount) for mount in mounts.mounted() if mount.mountpoint == mountpoint] == [
        True
    ] * 2
    with toy.process(mountpoint) as process:
        assert len([mount for mount in mounts.mounted() if mount.mountpoint == mountpoint]) == 1
        mounts.unmount(mountpoint)
        process.finish()
        assert "cleared the dead mount" in process.log


@as_root
def test_an_ordinary_user_mounts_and_unmounts_through_fusermount3() -> None:
    # pytest's folders are for root alone; so is /dev/fuse on some machines: the user gets one of their own,
    # in a mount namespace.
    with tempfile.TemporaryDirectory() as folder:
        mountpoint, device = Path(folder, "mount point"), Path(folder, "fuse")
        os.mknod(device, stat.S_IFCHR, os.makedev(10, 229))
        device.chmod(0o666)
        mountpoint.mkdir()
        os.chown(mountpoint, _NOBODY, _NOBODY)
        Path(folder).chmod(0o755)
        _mount_as_nobody(mountpoint, device)


def _mount_as_nobody(mountpoint: Path, device: Path) -> None:
    # The interpreter may live in root's home.
    capabilities = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    as_nobody = ("setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", *capabilities)
    bind = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /dev/fuse && exec "$@"', str(device))
    with toy.process(mountpoint, via=(*bind, *as_nobody)) as process:
        inside = ("nsenter", f"--target={process.popen.pid}", "--mount")

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*inside, *command], capture_output=True, text=True, timeout=_SECONDS_OF_PATIENCE
            )

        # The machine may have other mounts of ours.
        folder = mountpoint.parent.name
        assert run(*as_nobody, "stat", f"{mountpoint}/same").returncode == 0
        assert run("stat", f"{mountpoint}/same").returncode != 0, "root is not let in without allow_other"
        mounted = [
            line
            for line in run("cat", "/proc/self/mountinfo").stdout.splitlines()
            if folder in line.split()[4]
        ]
        assert [" fuse.fsmount fsmount " in line for line in mounted] == [True]
        unmount = f"from fsmount.fuse import mounts; mounts.unmount(mounts.Path({os.fspath(mountpoint)!r}))"
        done = run(*as_nobody, sys.executable, "-c", unmount)
        assert (done.returncode, done.stderr) == (0, "")
        assert process.finish() == 0, process.log


async def test_unmounting_from_outside_ends_the_session(mountpoint: Path) -> None:
    with trio.fail_after(_SECONDS_OF_PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(session.Session(mountpoint).serve, toy.Toy())
            await trio.to_thread.run_sync(mounts.unmount, mountpoint)
    assert mounts.find(mountpoint) is None


async def test_unmounting_by_force_ends_the_session_although_a_reader_waits(mountpoint: Path) -> None:
    with trio.fail_after(_SECONDS_OF_PATIENCE):
        async with trio.open_nursery() as nursery:
            stuck = await _start_with_a_stuck_reader(nursery, mountpoint)
            await trio.run_process(["umount", "--force", "--lazy", mountpoint])
        assert await stuck.wait() != 0
    assert mounts.find(mountpoint) is None


async def test_cancelling_the_session_unmounts_and_fails_whoever_waits(mountpoint: Path) -> None:
    with trio.fail_after(_SECONDS_OF_PATIENCE):
        async with trio.open_nursery() as nursery:
            stuck = await _start_with_a_stuck_reader(nursery, mountpoint)
            nursery.cancel_scope.cancel()
        assert await stuck.wait() != 0
    assert mounts.find(mountpoint) is None


async def test_a_session_that_ends_leaves_the_mount_that_took_its_place(mountpoint: Path) -> None:
    with trio.fail_after(_SECONDS_OF_PATIENCE):
        async with trio.open_nursery() as nursery:
            stuck = await _start_with_a_stuck_reader(nursery, mountpoint)
            await trio.to_thread.run_sync(partial(mounts.unmount, mountpoint, lazy=True))
            with ExitStack() as stack:
                await trio.to_thread.run_sync(stack.enter_context, toy.process(mountpoint))
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    assert await stuck.wait() != 0
                    assert (await trio.to_thread.run_sync(look_at, mountpoint / "same")).returncode == 0


@as_root
async def test_aborting_the_connection_ends_the_session_and_leaves_no_dead_mount(
    mountpoint: Path, tmp_path: Path
) -> None:
    control = tmp_path / "control"
    control.mkdir()
    with trio.fail_after(_SECONDS_OF_PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(session.Session(mountpoint).serve, toy.Toy())
            mount = mounts.find(mountpoint)
            assert mount is not None
            await trio.run_process(["mount", "-t", "fusectl", "none", control])
            try:
                (control / mount.device.partition(":")[2] / "abort").write_text("1")
            finally:
                await trio.run_process(["umount", control])
    assert mounts.find(mountpoint) is None


async def test_the_death_of_the_loop_leaves_as_itself(
    mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer_requests(*arguments: object, **options: object) -> None:
        async with trio.open_nursery():
            raise OSError("on purpose")

    monkeypatch.setattr(session, "answer_requests", answer_requests)
    with pytest.raises(OSError, match="on purpose"):
        await session.Session(mountpoint).serve(toy.Toy())
    assert mounts.find(mountpoint) is None


async def test_a_mount_that_does_not_answer_is_given_up(
    mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer_requests(*arguments: object, **options: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(session, "answer_requests", answer_requests)
    monkeypatch.setattr(session, "_READY_SECONDS", 0.2)
    with pytest.raises(DeadlineExpired):
        await session.Session(mountpoint).serve(toy.Toy())
    assert mounts.find(mountpoint) is None


async def test_a_machine_without_dev_fuse_is_told_so(
    mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*arguments: object) -> None:
        raise RuntimeError("fuse_session_mount failed")

    monkeypatch.setattr("pyfuse3.init", init)
    monkeypatch.setattr(session, "_DEVICE", tmp_path / "nothing")
    with pytest.raises(Refused, match="has no"):
        await session.Session(mountpoint).serve(toy.Toy())


async def _start_with_a_stuck_reader(nursery: trio.Nursery, mountpoint: Path) -> trio.Process:
    """Serve a toy in nursery, and return a process that waits for its content."""
    stuck = toy.Toy()
    await nursery.start(session.Session(mountpoint).serve, stuck)
    reader = await trio.lowlevel.open_process(["cat", mountpoint / "stuck-0"], stderr=subprocess.DEVNULL)
    await stuck.asked.wait()
    return reader
