"""A mount that one session leaves to the next: in this process, with a keeper that keeps what it is given."""

import errno
import logging
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from fsmount.fuse import mounts, session
from fsmount.fuse.refusing import Refusing
from fsmount.fuse.session import Ending, Session
from tests.mount import toy

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs /dev/fuse"),
    pytest.mark.timeout(60),
]

_SECONDS = 20.0


class Keeper:
    """What a holder is to a session."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}
        self.inherited: dict[str, int] = {}

    def store(self, name: str, descriptor: int) -> None:
        self.kept[name] = os.dup(descriptor)

    def remove(self, name: str) -> None:
        descriptor = self.kept.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def next(self) -> "Keeper":
        """For the next session, which inherits everything."""
        self.inherited = {name: os.dup(descriptor) for name, descriptor in self.kept.items()}
        return self


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    keeper = Keeper()
    yield keeper
    for name in list(keeper.kept):
        keeper.remove(name)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mount"
    path.mkdir()
    yield path
    toy.clean(path)


def id_of(mountpoint: Path) -> int:
    mount = mounts.find(mountpoint)
    assert mount is not None
    return mount.id


async def stat(path: Path) -> int:
    """The exit code of looking at a path from another process."""
    done = await trio.run_process(["stat", "-t", path], check=False, capture_stdout=True, capture_stderr=True)
    return done.returncode


async def serve_and_leave(mountpoint: Path, keeper: Keeper) -> Session:
    """A session from beginning to end, after which the mount is there and nobody serves it."""
    first = Session(mountpoint, keeper=keeper)
    async with trio.open_nursery() as nursery:
        await nursery.start(first.serve, toy.Toy())
        assert await stat(mountpoint / "same") == 0
        first.leave()
    return first


async def test_the_next_session_goes_on_with_the_same_mount(mountpoint: Path, keeper: Keeper) -> None:
    with trio.fail_after(_SECONDS):
        first = await serve_and_leave(mountpoint, keeper)
        assert first.is_drained
        number = id_of(mountpoint)
        async with trio.open_nursery() as nursery:
            second = Session(mountpoint, keeper=keeper.next())
            await nursery.start(second.serve, toy.Toy())
            assert second.is_inherited
            assert id_of(mountpoint) == number
            assert await stat(mountpoint / "same") == 0
            second.ending = Ending.UNMOUNT
            nursery.cancel_scope.cancel()
    assert mounts.find(mountpoint) is None
    assert keeper.kept == {}


async def test_who_asks_while_nobody_serves_waits_for_the_next(mountpoint: Path, keeper: Keeper) -> None:
    with trio.fail_after(_SECONDS):
        await serve_and_leave(mountpoint, keeper)
        caller = await trio.lowlevel.open_process(
            ["stat", "-t", mountpoint / "stuck-1"], stdout=subprocess.DEVNULL
        )
        await trio.sleep(0.2)
        assert caller.poll() is None
        async with trio.open_nursery() as nursery:
            await nursery.start(Session(mountpoint, keeper=keeper.next()).serve, toy.Toy())
            assert await caller.wait() == 0
            mounts.unmount(mountpoint, lazy=True)


async def test_what_was_taken_and_not_answered_is_answered_by_the_next(
    mountpoint: Path, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsmount.fuse.requests._LEAVING_SECONDS", 0.1)
    stuck = toy.Toy()
    with trio.fail_after(_SECONDS):
        first = Session(mountpoint, keeper=keeper)
        async with trio.open_nursery() as nursery:
            await nursery.start(first.serve, stuck)
            reader = await trio.lowlevel.open_process(
                ["cat", mountpoint / "stuck-0"], stdout=subprocess.DEVNULL
            )
            await stuck.asked.wait()
            first.leave()
        assert not first.is_drained
        following = toy.Toy()
        following.names, following.released = stuck.names, trio.Event()
        following.released.set()
        async with trio.open_nursery() as nursery:
            await nursery.start(Session(mountpoint, keeper=keeper.next()).serve, following)
            assert await reader.wait() == 0
            mounts.unmount(mountpoint, lazy=True)


async def test_a_kernel_that_cannot_send_again_has_the_mount_made_anew_unless_all_was_answered(
    mountpoint: Path, keeper: Keeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    # As before 6.9: the code of the message is not known there.
    monkeypatch.setattr(session, "resend", lambda: b"\x10\0\0\0\x63\0\0\0" + bytes(8))
    with trio.fail_after(_SECONDS):
        await serve_and_leave(mountpoint, keeper)
        number = id_of(mountpoint)
        async with trio.open_nursery() as nursery:
            second = Session(mountpoint, keeper=keeper.next())
            await nursery.start(partial(second.serve, is_drained=True), toy.Toy())
            assert id_of(mountpoint) == number
            second.leave()
        async with trio.open_nursery() as nursery:
            third = Session(mountpoint, keeper=keeper.next())
            await nursery.start(third.serve, toy.Toy())
            assert "is mounted anew" in caplog.text
            assert not third.is_inherited
            assert len([mount for mount in mounts.mounted() if mount.mountpoint == mountpoint]) == 1
            assert await stat(mountpoint / "same") == 0
            assert len(keeper.kept) == 1
            mounts.unmount(mountpoint, lazy=True)


async def test_a_mount_that_is_no_longer_wanted_is_taken_away(
    mountpoint: Path, keeper: Keeper, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with trio.fail_after(_SECONDS):
        await serve_and_leave(mountpoint, keeper)
        async with trio.open_nursery() as nursery:
            await nursery.start(Session(other, keeper=keeper.next()).serve, toy.Toy())
            assert mounts.find(mountpoint) is None
            assert await stat(other / "same") == 0
            mounts.unmount(other, lazy=True)


async def test_a_mount_whose_kernel_knows_other_inode_numbers_is_made_anew(
    mountpoint: Path, keeper: Keeper
) -> None:
    with trio.fail_after(_SECONDS):
        for numbers, is_inherited in (("one", False), ("one", True), ("other", False), (None, True)):
            following = Session(mountpoint, keeper=keeper.next())
            following.numbers = numbers
            async with trio.open_nursery() as nursery:
                await nursery.start(following.serve, toy.Toy())
                assert following.is_inherited == is_inherited
                assert await stat(mountpoint / "same") == 0
                assert len(keeper.kept) == 1
                following.leave()


async def test_the_device_of_a_mount_that_was_unmounted_meanwhile_is_not_gone_on_with(
    mountpoint: Path, keeper: Keeper
) -> None:
    with trio.fail_after(_SECONDS):
        await serve_and_leave(mountpoint, keeper)
        mounts.unmount(mountpoint, lazy=True)
        async with trio.open_nursery() as nursery:
            second = Session(mountpoint, keeper=keeper.next())
            await nursery.start(second.serve, toy.Toy())
            assert not second.is_inherited
            assert await stat(mountpoint / "same") == 0
            assert len(keeper.kept) == 1
            mounts.unmount(mountpoint, lazy=True)


async def test_a_failure_leaves_the_mount_to_the_next(
    mountpoint: Path, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.fail_after(_SECONDS):
        with pytest.raises(ExceptionGroup):
            async with trio.open_nursery() as nursery:
                await nursery.start(Session(mountpoint, keeper=keeper).serve, toy.Toy())
                raise OSError("on purpose")
        assert mounts.find(mountpoint) is not None
        async with trio.open_nursery() as nursery:
            await nursery.start(Session(mountpoint, keeper=keeper.next()).serve, toy.Toy())
            assert await stat(mountpoint / "same") == 0
            mounts.unmount(mountpoint, lazy=True)


async def test_who_refuses_answers_eio_and_statfs(mountpoint: Path) -> None:
    def look() -> int | None:
        try:
            os.listdir(mountpoint)
        except OSError as error:
            return error.errno
        return None

    with trio.fail_after(_SECONDS):
        async with trio.open_nursery() as nursery:
            await nursery.start(Session(mountpoint).serve, Refusing())
            assert await trio.to_thread.run_sync(look) == errno.EIO
            assert (await trio.to_thread.run_sync(os.statvfs, mountpoint)).f_namemax == 255
            mounts.unmount(mountpoint, lazy=True)


async def test_the_kernel_forgets_what_it_is_told_to_and_the_rest_stays(mountpoint: Path) -> None:
    """Its pages are read again; an inode that it does not have is no failure."""
    served = toy.Toy()
    with trio.fail_after(_SECONDS):
        async with trio.open_nursery() as nursery:
            serving = Session(mountpoint)
            served.released.set()
            await nursery.start(serving.serve, served)
            for _ in range(2):
                await trio.run_process(["cat", mountpoint / "stuck-7"], capture_stdout=True)
            once = served.stuck
            assert once > 0
            inode = served.names[b"stuck-7"]
            await serving.forget([inode + 1000, inode])
            await trio.run_process(["cat", mountpoint / "stuck-7"], capture_stdout=True)
            assert served.stuck == 2 * once
            mounts.unmount(mountpoint, lazy=True)
