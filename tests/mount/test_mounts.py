"""Mounts against the kernel: living, dead, hung and busy ones are told apart, and taken away."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fsmount.errors import NotRunning, Refused
from fsmount.fuse import mounts
from tests.mount import toy

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"
    ),
]


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """A directory, from which whatever the test leaves mounted is taken away."""
    path = tmp_path / "mount point"
    path.mkdir()
    yield path
    toy.clean(path)


def _top(mountpoint: Path) -> mounts.Mount:
    mount = mounts.find(mountpoint)
    assert mount is not None
    return mount


def test_a_mount_that_answers_is_living(mountpoint: Path) -> None:
    with toy.process(mountpoint):
        assert mounts.probe(_top(mountpoint)) is mounts.Health.LIVING
        assert not mounts.is_dead(_top(mountpoint))


def test_a_mount_whose_daemon_is_gone_is_dead(mountpoint: Path) -> None:
    with toy.unserved(mountpoint):
        pass
    assert mounts.probe(_top(mountpoint)) is mounts.Health.DEAD


def test_a_mount_that_does_not_answer_is_hung_and_does_not_hang_us(mountpoint: Path) -> None:
    with toy.unserved(mountpoint):
        assert mounts.probe(_top(mountpoint), timeout_seconds=0.2) is mounts.Health.HUNG


def test_a_hung_mount_can_be_found_and_unmounted_without_touching_it(mountpoint: Path) -> None:
    # In a process of its own: what touched the mount could not even be interrupted.
    program = "import sys; from fsmount.fuse import mounts; mounts.unmount(mounts.Path(sys.argv[1]))"
    with toy.unserved(mountpoint):
        subprocess.run(
            [sys.executable, "-c", program, mountpoint], cwd=Path(__file__).parents[2], check=True, timeout=20
        )
        assert mounts.find(mountpoint) is None


def test_dead_mounts_stacked_on_each_other_are_cleared(mountpoint: Path) -> None:
    for _ in range(2):
        with toy.unserved(mountpoint):
            pass
    assert mounts.prepare(mountpoint)
    assert mounts.find(mountpoint) is None
    assert not mounts.prepare(mountpoint)


def test_a_dead_mount_is_cleared_although_somebody_stands_in_it(mountpoint: Path) -> None:
    with toy.process(mountpoint), subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=mountpoint):
        with toy.unserved(mountpoint):
            pass
        assert mounts.clear_stale(mountpoint) == 1
        assert mounts.is_ours(_top(mountpoint))


def test_a_living_mount_is_not_mounted_over(mountpoint: Path) -> None:
    with toy.process(mountpoint), pytest.raises(Refused, match="already mounted"):
        mounts.prepare(mountpoint)


def test_a_living_mount_below_a_dead_one_is_not_mounted_over(mountpoint: Path) -> None:
    with toy.process(mountpoint):
        with toy.unserved(mountpoint):
            pass
        with pytest.raises(Refused, match="already mounted"):
            mounts.prepare(mountpoint)


def test_another_file_system_is_neither_mounted_over_nor_unmounted(mountpoint: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "other", mountpoint], check=True)
    with pytest.raises(Refused, match="tmpfs"):
        mounts.prepare(mountpoint)
    with pytest.raises(Refused, match="tmpfs"):
        mounts.unmount(mountpoint)


def test_a_busy_mount_is_unmounted_only_lazily_and_its_users_are_named(mountpoint: Path) -> None:
    with toy.process(mountpoint), subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=mountpoint) as user:
        assert mounts.users_of(mountpoint) == [mounts.User(user.pid, "cat")]
        with pytest.raises(Refused) as caught:
            mounts.unmount(mountpoint)
        assert f"in use by cat ({user.pid})" in caught.value.message
        assert "--lazy" in str(caught.value.remedy)
        mounts.unmount(mountpoint, lazy=True)
        assert mounts.find(mountpoint) is None


def test_who_has_a_file_open_or_mapped_uses_the_mount(mountpoint: Path) -> None:
    hold = "import mmap, os, sys; file = open(sys.argv[1], 'rb'); "
    map_it = "mapped = mmap.mmap(file.fileno(), 9, mmap.MAP_PRIVATE, mmap.PROT_READ); os.closerange(3, 99); "
    with toy.process(mountpoint):
        for how in ("", map_it):
            program = hold + how + "print(flush=True); sys.stdin.read()"
            command = [sys.executable, "-c", program, f"{mountpoint}/same"]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
                assert user.stdout is not None
                user.stdout.readline()
                assert [found.pid for found in mounts.users_of(mountpoint)] == [user.pid]


def test_a_directory_with_a_longer_name_is_not_the_mount(mountpoint: Path) -> None:
    neighbour = mountpoint.with_name(f"{mountpoint.name} 2")
    neighbour.mkdir()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=neighbour):
        assert mounts.users_of(mountpoint) == []


def test_the_topmost_mount_is_unmounted_first(mountpoint: Path) -> None:
    with toy.process(mountpoint):
        with toy.unserved(mountpoint):
            pass
        mounts.unmount(mountpoint)
        assert mounts.probe(_top(mountpoint)) is mounts.Health.LIVING
        mounts.unmount(mountpoint)
        with pytest.raises(NotRunning):
            mounts.unmount(mountpoint)


def test_a_mount_hidden_by_one_on_its_parent_is_not_unmounted_by_mistake(mountpoint: Path) -> None:
    with toy.process(mountpoint):
        subprocess.run(["mount", "-t", "tmpfs", "other", mountpoint.parent], check=True)
        try:
            with pytest.raises(Refused, match="could not be unmounted"):
                mounts.unmount(mountpoint)
        finally:
            subprocess.run(["umount", mountpoint.parent], check=True)
        assert mounts.probe(_top(mountpoint)) is mounts.Health.LIVING


def test_the_read_ahead_of_a_mount_can_be_set(mountpoint: Path) -> None:
    with toy.process(mountpoint):
        assert mounts.set_read_ahead(mountpoint, 512)
        assert Path(f"/sys/class/bdi/{_top(mountpoint).device}/read_ahead_kb").read_text() == "512\n"
