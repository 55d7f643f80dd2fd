"""The control socket: who finds it, what it answers to whom, and what no client can do to it. Over real sockets."""

import json
import logging
import os
import socket
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount.control import Action, Report, ask, client, serve, server
from fsmount.control.places import runtime_folders, socket_name
from fsmount.errors import (
    AccessDenied,
    Corrupt,
    DeadlineExpired,
    FsmountError,
    Invalid,
    NoSpace,
    NotFound,
    NotRunning,
    RateLimited,
    Refused,
    Unreachable,
    UsageError,
)
from fsmount.fuse import mounts

ME = os.geteuid()


async def _hello() -> bytes:
    return b"hello\n"


async def _repeat(body: bytes) -> bytes:
    return f"did {body!r}".encode()


REPORTS = {"/hello": Report("text/x-hello", _hello)}


def mount(mountpoint: Path, user: int = ME) -> mounts.Mount:
    """What mountinfo says of a mount of ours."""
    options = frozenset({f"user_id={user}"})
    return mounts.Mount(1, 0, "0:99", mounts.resolve(mountpoint), options, mounts.FSTYPE, "fsmount")


@asynccontextmanager
async def serving(
    mountpoint: Path,
    folders: Sequence[Path],
    reports: Mapping[str, Report] = REPORTS,
    **actions: Action,
) -> AsyncIterator[None]:
    """As a daemon does."""
    named = {f"/{name}": action for name, action in actions.items()}
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, mountpoint, reports, named, folders=folders))
        yield
        nursery.cancel_scope.cancel()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
async def path(tmp_path: Path, folder: Path) -> AsyncIterator[str]:
    """A socket that answers."""
    async with serving(tmp_path / "mnt", [folder]):
        (path,) = folder.iterdir()
        yield str(path)


async def said(path: str, *sent: bytes) -> bytes:
    """All that is answered to what a client sends."""
    async with await trio.open_unix_socket(path) as stream:
        for piece in sent:
            await stream.send_all(piece)
        return await rest(stream)


async def rest(stream: trio.SocketStream) -> bytes:
    answer = bytearray()
    # A reset at its end says that not all was read of what was sent.
    with trio.fail_after(10), suppress(trio.BrokenResourceError):
        async for piece in stream:
            answer += piece
    return bytes(answer)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


# -------------------- where it lies


def test_root_s_sockets_are_in_run_and_those_of_others_in_their_session_s_folder() -> None:
    assert runtime_folders(0, {"XDG_RUNTIME_DIR": "/elsewhere"})[0] == Path("/run/fsmount")
    session = [Path("/run/user/4711/fsmount"), Path("/tmp/fsmount-4711")]
    assert runtime_folders(4711, {}) == session
    # The variable is of whoever asks, who may be root.
    assert runtime_folders(4711, {"XDG_RUNTIME_DIR": "/elsewhere"}) == session


def test_a_session_may_have_its_folder_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert runtime_folders(4711, {"XDG_RUNTIME_DIR": "/elsewhere"})[0] == Path("/elsewhere/fsmount")
    assert runtime_folders(4711, {"XDG_RUNTIME_DIR": "relative"})[0] == Path("/run/user/4711/fsmount")


async def test_the_socket_is_its_user_s_alone_and_gone_at_the_end(tmp_path: Path, folder: Path) -> None:
    async with serving(tmp_path / "mnt", [folder]):
        (path,) = folder.iterdir()
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == []


async def test_a_folder_that_others_may_look_into_is_closed_to_them(tmp_path: Path, folder: Path) -> None:
    folder.mkdir(mode=0o755)
    async with serving(tmp_path / "mnt", [folder]):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750


@pytest.mark.skipif(ME != 0, reason="needs root, to be other users")
@pytest.mark.parametrize(
    "mode, user, groups, said",
    [
        (0o750, 4711, [4242], "did b'{}'"),
        (0o750, 4711, [4243], "Refused"),
        (0o750, 4711, [], "Refused"),
        (0o700, 4711, [4242], "Refused"),
        (0o750, 0, [], "did b'{}'"),
    ],
)
async def test_the_folder_s_group_may_ask_and_act_if_the_administrator_lets_it_in(
    mode: int, user: int, groups: Sequence[int], said: str
) -> None:
    # Not in tmp_path, which is root's alone.
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        work.chmod(0o755)
        folder = work / "run"
        folder.mkdir()
        os.chown(folder, 0, 4242)
        folder.chmod(mode)
        async with serving(work / "mnt", [folder], act=Action(_repeat)):
            (path,) = folder.iterdir()
            assert (path.stat().st_gid, stat.S_IMODE(folder.stat().st_mode)) == (4242, mode)
            command = [sys.executable, "-c", _ASK_AS, str(work / "mnt"), str(folder), str(user)]
            asked = await trio.run_process([*command, *map(str, groups)], capture_stdout=True)
            assert asked.stdout.decode().strip() == said


async def test_a_group_that_the_socket_cannot_be_given_to_stays_outside_and_its_user_does_not(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: str, user: int, group: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    # As for root without CAP_CHOWN.
    monkeypatch.setattr(os, "chown", refuse)
    async with serving(tmp_path / "mnt", [folder]):
        (path,) = folder.iterdir()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await ask(mount(tmp_path / "mnt"), "/hello", folders=[folder]) == b"hello\n"
    assert "may not ask about the mount" in caplog.text


#: It has loaded what it needs when it becomes the other user, who may not see where we are installed.
_ASK_AS = """
import os, sys, trio
from functools import partial
from pathlib import Path
from fsmount.control import ask
from fsmount.errors import FsmountError
from tests.unit.test_control import mount
mountpoint, folder, user, *groups = sys.argv[1:]
point = mount(Path(mountpoint), user=0)
os.setgroups([int(group) for group in groups])
os.setresgid(int(user), int(user), int(user))
os.setresuid(int(user), int(user), int(user))
try:
    print(trio.run(partial(ask, point, "/act", b"{}", folders=[Path(folder)])).decode())
except FsmountError as error:
    print(type(error).__name__)
"""


async def test_a_path_may_be_longer_than_a_socket_s_address(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["x" * 100] * 5)
    folder.parent.mkdir(parents=True)
    async with serving(tmp_path / "mnt", [folder]):
        assert await ask(mount(tmp_path / "mnt"), "/hello", folders=[folder]) == b"hello\n"


async def test_mounts_at_different_points_have_sockets_of_their_own(tmp_path: Path, folder: Path) -> None:
    async def other() -> bytes:
        return b"other"

    one, two = tmp_path / "one", tmp_path / "two"
    async with serving(one, [folder]):
        async with serving(two, [folder], {"/hello": Report("", other)}):
            assert await ask(mount(two), "/hello", folders=[folder]) == b"other"
            assert await ask(mount(one), "/hello", folders=[folder]) == b"hello\n"
        assert await ask(mount(one), "/hello", folders=[folder]) == b"hello\n"
        with pytest.raises(NotRunning):
            await ask(mount(two), "/hello", folders=[folder])


async def test_a_link_to_the_mount_point_is_the_mount_point(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "link").symlink_to("mnt")
    async with serving(tmp_path / "link", [folder]):
        assert await ask(mount(tmp_path / "mnt"), "/hello", folders=[folder]) == b"hello\n"


async def test_a_socket_that_a_killed_process_left_is_replaced_and_answers_nobody(
    tmp_path: Path, folder: Path
) -> None:
    async with serving(tmp_path / "mnt", [folder]):
        (path,) = folder.iterdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(NotRunning, match="nobody answers"):
        await ask(mount(tmp_path / "mnt"), "/hello", folders=[folder])
    async with serving(tmp_path / "mnt", [folder]):
        assert await ask(mount(tmp_path / "mnt"), "/hello", folders=[folder]) == b"hello\n"


async def test_what_killed_processes_left_is_cleared_away_by_whoever_comes_next_and_nothing_else(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(name: str) -> str:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(folder / name))
        return name

    mounted = mount(tmp_path / "mounted")
    monkeypatch.setattr(mounts, "mounted", lambda: [mounted])
    async with serving(tmp_path / "living", [folder]):
        (living,) = os.listdir(folder)
        # The next process that serves it is about to take its name.
        kept = {living, leave(socket_name(mounted.mountpoint)), leave("another.sock"), leave(f".{living}.1")}
        left = {leave(socket_name(tmp_path / str(number))) for number in range(3)}
        file = socket_name(tmp_path / "file")
        (folder / file).touch()
        link = socket_name(tmp_path / "link")
        (folder / link).symlink_to(sorted(left)[0])
        async with serving(tmp_path / "next", [folder]):
            found = {*os.listdir(folder)}
            assert found == {*kept, file, link, socket_name(tmp_path / "next")}
            assert await ask(mount(tmp_path / "living"), "/hello", folders=[folder]) == b"hello\n"


async def test_a_process_that_is_too_busy_to_be_asked_keeps_its_socket(tmp_path: Path, folder: Path) -> None:
    folder.mkdir(mode=0o700)
    path = folder / socket_name(tmp_path / "busy")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))
        async with serving(tmp_path / "next", [folder]):
            assert path.exists()


async def test_who_has_lost_the_name_to_another_leaves_it_to_that_one(tmp_path: Path, folder: Path) -> None:
    async def serve_until(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            await serve(tmp_path / "mnt", {}, folders=[folder], task_status=task_status)

    old = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_until, old)
        # As after a lazy unmount: the old process lives as long as somebody uses its mount.
        async with serving(tmp_path / "mnt", [folder]):
            old.cancel()
            await wait_all_tasks_blocked()
            assert await ask(mount(tmp_path / "mnt"), "/hello", folders=[folder]) == b"hello\n"


async def test_the_next_place_is_taken_where_one_will_not_do(tmp_path: Path, folder: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    places = [tmp_path / "absent/deep", open_to_all, link, folder]
    async with serving(tmp_path / "mnt", places):
        assert len(list(folder.iterdir())) == 1
        assert await ask(mount(tmp_path / "mnt"), "/hello", folders=places) == b"hello\n"


@pytest.mark.skipif(ME != 0, reason="needs root, to make another user's folder")
async def test_what_another_user_has_put_there_is_not_asked(tmp_path: Path, folder: Path) -> None:
    async with serving(tmp_path / "mnt", [folder]):
        os.chown(folder, 4711, 4711)
        with pytest.raises(NotRunning):
            await ask(mount(tmp_path / "mnt"), "/hello", folders=[folder])
        # It is that user's own mount that answers so.
        assert await ask(mount(tmp_path / "mnt", user=4711), "/hello", folders=[folder]) == b"hello\n"


async def test_another_user_s_mount_is_root_s_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4712)
    with pytest.raises(Refused, match="user 4711's"):
        await ask(mount(tmp_path, user=4711), "/hello", folders=[tmp_path])


async def test_without_any_place_the_mount_goes_on_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, tmp_path / "mnt", REPORTS, folders=[tmp_path / "a/b"]))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{tmp_path}/a/b: No such file" in caplog.text


# -------------------- what it answers


async def test_a_report_is_made_anew_for_each_request(path: str, tmp_path: Path, folder: Path) -> None:
    answer = await said(path, b"GET /hello?x=1 HTTP/1.1\r\nHost: x\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/x-hello\r\nContent-Length: 6\r\n")
    assert body == b"hello\n"


async def test_head_is_answered_without_the_content(path: str) -> None:
    answer = await said(path, b"HEAD /hello HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status_of(answer) == 200
    assert b"Content-Length: 6\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


async def test_a_request_may_come_byte_by_byte(path: str) -> None:
    request = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"
    assert (await said(path, *(request[n : n + 1] for n in range(len(request))))).endswith(b"hello\n")


@pytest.mark.parametrize(
    "request_, status",
    [
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET http://x/hello HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 404),
        (b"POST /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"DELETE /hello HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET /hello HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"GET /hello\r\n\r\n", 400),
        (b"\0" * 100 + b"\r\n\r\n", 400),
        (b"GET /hello HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 30_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"x" * 40_000, 431),
    ],
)
async def test_what_is_no_good_request_is_refused(path: str, request_: bytes, status: int) -> None:
    answer = await said(path, request_)
    assert status_of(answer) == status
    assert (b"\r\nAllow: GET, HEAD\r\n" in answer) == (status == 405)
    assert answer.count(b"HTTP/1.1") == 1
    assert (await said(path, b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")).endswith(b"hello\n")


async def test_who_leaves_in_the_middle_disturbs_nobody(path: str, caplog: pytest.LogCaptureFixture) -> None:
    for sent in (b"", b"GET /he", b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"):
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(sent)
    assert (await said(path, b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")).endswith(b"hello\n")
    assert caplog.records == []


# -------------------- what it does


@pytest.mark.parametrize("body", [b"", b"{}", b'{"app": "web"}', b"x" * 65536])
async def test_an_action_gets_the_body_and_its_answer_is_who_asked_s(
    tmp_path: Path, folder: Path, body: bytes
) -> None:
    async with serving(tmp_path / "mnt", [folder], act=Action(_repeat)):
        answer = await ask(mount(tmp_path / "mnt"), "/act", body, folders=[folder])
        assert answer == await _repeat(body)


async def test_the_body_may_come_in_any_pieces(tmp_path: Path, folder: Path) -> None:
    async with serving(tmp_path / "mnt", [folder], act=Action(_repeat)):
        (path,) = map(str, folder.iterdir())
        head = b"POST /act?x HTTP/1.1\r\nHost: x\r\n"
        sized = head + b"Content-Length: 5\r\n\r\n[123]"
        chunked = head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n[1\r\n3\r\n23]\r\n0\r\n\r\n"
        for request in (sized, chunked):
            answer = await said(path, *(request[n : n + 1] for n in range(len(request))))
            assert answer.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
            assert answer.endswith(b"did b'[123]'")


async def test_a_body_that_is_too_large_is_not_taken(tmp_path: Path, folder: Path) -> None:
    async with serving(tmp_path / "mnt", [folder], act=Action(_never)):
        (path,) = map(str, folder.iterdir())
        head = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        assert status_of(await said(path, head, bytes(70_000))) == 413


async def test_a_body_that_breaks_off_does_nothing(tmp_path: Path, folder: Path) -> None:
    async with serving(tmp_path / "mnt", [folder], act=Action(_never)):
        (path,) = map(str, folder.iterdir())
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{}")
            await stream.send_eof()
            assert status_of(await rest(stream)) == 400


async def _never(body: bytes) -> bytes:
    raise AssertionError("it was not to be done")


async def test_what_is_read_is_not_told_to_act_and_the_other_way_round(tmp_path: Path, folder: Path) -> None:
    reports = {**REPORTS, "/both": REPORTS["/hello"]}
    async with serving(tmp_path / "mnt", [folder], reports, act=Action(_never), both=Action(_repeat)):
        (path,) = map(str, folder.iterdir())
        for method, target, allowed in (
            (b"GET", b"/act", b"POST"),
            (b"HEAD", b"/act", b"POST"),
            (b"PUT", b"/act", b"POST"),
            (b"POST", b"/hello", b"GET, HEAD"),
            (b"DELETE", b"/both", b"GET, HEAD, POST"),
        ):
            answer = await said(path, method + b" " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            assert status_of(answer) == 405
            assert b"\r\nAllow: " + allowed + b"\r\n" in answer
        point = mount(tmp_path / "mnt")
        assert await ask(point, "/both", folders=[folder]) == b"hello\n"
        assert await ask(point, "/both", b"{}", folders=[folder]) == b"did b'{}'"


@pytest.mark.parametrize(
    "error, status",
    [
        (UsageError("what is this", remedy="Write it so."), 400),
        (NotFound("there is no such app"), 404),
        (AccessDenied("no", remedy="Log in."), 403),
        (Refused("it is in use"), 409),
        (RateLimited("slowly"), 429),
        (Unreachable("nobody answers", remedy="Wait.\nThen wait."), 502),
        (DeadlineExpired("it took too long"), 504),
        (Corrupt("these are not the bytes"), 502),
        (Invalid("these make no sense \udcff ü"), 502),
        (NoSpace("full"), 507),
        (FsmountError("something else"), 500),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
async def test_what_an_action_raises_is_raised_where_it_was_asked_for(
    tmp_path: Path, folder: Path, error: FsmountError, status: int
) -> None:
    async def fail(body: bytes) -> bytes:
        # As a nursery does.
        raise ExceptionGroup("", [error]) if body == b"[]" else error

    async with serving(tmp_path / "mnt", [folder], act=Action(fail)):
        for body in (b"{}", b"[]"):
            with pytest.raises(FsmountError) as raised:
                await ask(mount(tmp_path / "mnt"), "/act", body, folders=[folder])
            assert type(raised.value) is type(error)
            assert (raised.value.message, raised.value.remedy) == (error.message, error.remedy)
            assert (raised.value.exit_code, raised.value.errno) == (error.exit_code, error.errno)
        (path,) = map(str, folder.iterdir())
        answer = await said(path, b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert status_of(answer) == status
        fields = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert fields["message"] == error.message and fields["exit_code"] == error.exit_code


async def test_an_error_of_a_kind_that_is_not_known_here_keeps_its_exit_code(
    tmp_path: Path, folder: Path
) -> None:
    content = b'{"error": {"kind": "Newer", "message": "m", "remedy": null, "exit_code": 42}}'
    error = await _told(tmp_path, folder, content)
    assert type(error) is FsmountError
    assert (error.message, error.remedy, error.exit_code) == ("m", None, 42)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"null", b"{}", b"\xff", b'{"error": 3}', b'{"error": {"kind": "NotFound"}}'),
        b'{"error": {"kind": "NotFound", "message": "m", "remedy": null, "exit_code": "x"}}',
    ],
)
async def test_an_error_that_is_none_is_told_by_its_status(
    tmp_path: Path, folder: Path, content: bytes
) -> None:
    error = await _told(tmp_path, folder, content)
    assert "answers /act with 500" in error.message


async def _told(tmp_path: Path, folder: Path, content: bytes) -> FsmountError:
    """What who asks learns from a mount that answers with this error."""
    head = b"HTTP/1.1 500 x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
    async with _impostor(tmp_path / "mnt", folder, head + content):
        with pytest.raises(FsmountError) as raised:
            await ask(mount(tmp_path / "mnt"), "/act", b"{}", folders=[folder])
    return raised.value


async def test_an_action_has_its_own_bound_and_who_asks_waits_for_it(
    mock_clock: MockClock, tmp_path: Path, folder: Path
) -> None:
    done: list[bytes] = []

    async def slow(body: bytes) -> bytes:
        await trio.sleep(int(body))
        done.append(body)
        return body

    mock_clock.autojump_threshold = 0.05
    point = mount(tmp_path / "mnt")
    async with serving(tmp_path / "mnt", [folder], act=Action(slow, seconds=300)):
        assert await ask(point, "/act", b"299", seconds=300, folders=[folder]) == b"299"
        with pytest.raises(DeadlineExpired, match="/act was not done within 300 s"):
            await ask(point, "/act", b"301", seconds=300, folders=[folder])
        with pytest.raises(DeadlineExpired, match="has not answered /act within 75 s"):
            await ask(point, "/act", b"298", folders=[folder])
        # It goes on, for whoever has asked for it wanted it.
        await trio.sleep(300)
        assert done == [b"299", b"298"]


async def test_what_the_mount_does_keeps_nobody_from_its_reports(tmp_path: Path, folder: Path) -> None:
    gate = trio.Event()

    async def wait(body: bytes) -> bytes:
        await gate.wait()
        return b"{}"

    point = mount(tmp_path / "mnt")
    async with serving(tmp_path / "mnt", [folder], act=Action(wait)):
        async with trio.open_nursery() as nursery:
            for _ in range(server._MOST_ACTIONS):
                nursery.start_soon(partial(ask, point, "/act", b"", folders=[folder]))
            await wait_all_tasks_blocked(0.05)
            with pytest.raises(RateLimited, match="things to do already"):
                await ask(point, "/act", b"", folders=[folder])
            assert await ask(point, "/hello", folders=[folder]) == b"hello\n"
            gate.set()
        assert await ask(point, "/act", b"", folders=[folder]) == b"{}"


async def test_an_action_that_fails_unforeseen_ends_nothing_and_the_log_has_it(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path / "mnt", [folder], act=Action(_never)):
        with pytest.raises(FsmountError, match="answers /act with 500"):
            await ask(mount(tmp_path / "mnt"), "/act", b"", folders=[folder])
        assert await ask(mount(tmp_path / "mnt"), "/hello", folders=[folder]) == b"hello\n"
    assert "it was not to be done" in caplog.text
    assert f"/act: asked for by user {ME}" in caplog.text


# -------------------- what it takes


async def test_who_is_slow_to_ask_is_sent_away(mock_clock: MockClock, path: str) -> None:
    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(b"GET /hello HT")
        await wait_all_tasks_blocked()
        mock_clock.jump(6)
        assert status_of(await rest(stream)) == 408


async def test_who_does_not_take_the_answer_is_left(
    mock_clock: MockClock, tmp_path: Path, folder: Path
) -> None:
    async def large() -> bytes:
        return bytes(10_000_000)

    async with serving(tmp_path / "mnt", [folder], {"/large": Report("", large)}):
        (path,) = map(str, folder.iterdir())
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            await wait_all_tasks_blocked()
            mock_clock.jump(6)
            await wait_all_tasks_blocked()
            assert len(await rest(stream)) < 10_000_000


async def test_only_so_many_are_answered_at_once_and_the_others_after_them(
    mock_clock: MockClock, path: str
) -> None:
    idle = [await trio.open_unix_socket(path) for _ in range(server._MOST_CLIENTS)]
    answers: list[bytes] = []

    async def another() -> None:
        answers.append(await said(path, b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(another)
        await wait_all_tasks_blocked()
        assert answers == []
        mock_clock.jump(6)
    assert answers[0].endswith(b"hello\n")
    for stream in idle:
        await stream.aclose()


async def test_a_report_that_takes_too_long_or_fails_is_an_error_and_ends_nothing(
    mock_clock: MockClock, tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> bytes:
        raise KeyError("unforeseen")

    reports = {"/slow": Report("", trio.sleep_forever), "/bad": Report("", fail)}  # type: ignore[arg-type]
    point = mount(tmp_path / "mnt")
    async with serving(tmp_path / "mnt", [folder], REPORTS | reports):
        with pytest.raises(FsmountError, match="answers /bad with 500"):
            await ask(point, "/bad", folders=[folder])
        assert "unforeseen" in caplog.text
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def slow() -> None:
                with pytest.raises(FsmountError, match="answers /slow with 503"):
                    await ask(point, "/slow", folders=[folder])

            await wait_all_tasks_blocked(0.05)
            mock_clock.jump(31)
        assert await ask(point, "/hello", folders=[folder]) == b"hello\n"


async def test_no_descriptor_for_a_client_is_a_pause(
    path: str, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def full(self: trio.socket.SocketType) -> None:
        await trio.lowlevel.wait_readable(self)
        raise OSError(24, "Too many open files")

    # The one under way was begun before.
    with trio.socket.socket() as some:
        monkeypatch.setattr(type(some), "accept", full)
    await said(path, b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def another() -> None:
            assert (await said(path, b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")).endswith(b"hello\n")

        await wait_all_tasks_blocked(0.05)
        monkeypatch.undo()
        assert "Too many open files" in caplog.text
        mock_clock.jump(2)


# -------------------- who asks


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nless", b"\0\n\r\n\r\n"]
)
async def test_an_answer_that_is_none_is_told(tmp_path: Path, folder: Path, answer: bytes) -> None:
    async with _impostor(tmp_path / "mnt", folder, answer):
        with pytest.raises(FsmountError, match="broke off its answer"):
            await ask(mount(tmp_path / "mnt"), "/hello", folders=[folder])


async def test_an_answer_of_any_length_is_not_waited_for(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_LARGEST_ANSWER", 1000)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(5000)
    async with _impostor(tmp_path / "mnt", folder, answer):
        with pytest.raises(FsmountError, match="more than 1000 bytes"):
            await ask(mount(tmp_path / "mnt"), "/hello", folders=[folder])


async def test_a_mount_that_does_not_answer_is_waited_for_so_long(
    mock_clock: MockClock, tmp_path: Path, folder: Path
) -> None:
    async with _impostor(tmp_path / "mnt", folder, None), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def slow() -> None:
            with pytest.raises(DeadlineExpired, match="within 45 s"):
                await ask(mount(tmp_path / "mnt"), "/hello", folders=[folder])

        await wait_all_tasks_blocked(0.05)
        mock_clock.jump(46)


@asynccontextmanager
async def _impostor(mountpoint: Path, folder: Path, answer: bytes | None) -> AsyncIterator[None]:
    """A process at the socket of a mount that gives everybody this answer; None: none."""
    async with serving(mountpoint, [folder]):
        (path,) = folder.iterdir()

    async def reply(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(1000)
            if answer is None:
                await trio.sleep_forever()
            else:
                await stream.send_all(answer)

    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
        bound.listen()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(bound))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, reply, [listener])
            yield
            nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def _warnings_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
