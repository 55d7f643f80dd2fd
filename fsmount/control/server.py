"""server: the end of the mount: what it answers, what it does, and for whom."""

import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import h11
import trio

from fsmount.control import failures, places
from fsmount.errors import DeadlineExpired, FsmountError, RateLimited
from fsmount.fuse import mounts
from fsmount.singleflight import in_background, single_error

log = logging.getLogger(__name__)

#: Of a request's line and headers, and of its body, in bytes.
_LARGEST_HEAD = 16 * 1024
LARGEST_BODY = 64 * 1024
#: Who is answered at once; whoever else comes waits in the kernel's queue.
_MOST_CLIENTS = 8
#: Of them, those whose action is under way: reports are made even then.
_MOST_ACTIONS = 4
#: What a client may take to send its request, and to take its answer; and what making that may take.
_CLIENT_SECONDS = 5.0
REPORT_SECONDS = 30.0
ACTION_SECONDS = 60.0
#: Names in the folder of the sockets that are looked at for what was left there.
_MOST_CLEARED = 1000
#: After a connection could not be taken: the process is out of descriptors.
_PAUSE_SECONDS = 1.0
JSON = "application/json"
# struct ucred (unix(7))
_CREDENTIALS = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class Report:
    """What a path answers: its media type, and what makes its content, anew for everyone who asks."""

    media_type: str
    make: Callable[[], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Action:
    """What a path does when it is told to.

    do: takes the body, JSON of the action's own form, and returns JSON. What it raises reaches who asked. It is done
    to its end, or to its bound, even if who asked has left.
    seconds: its bound; who asks has to know it (`ask`).
    """

    do: Callable[[bytes], Awaitable[bytes]]
    seconds: float = ACTION_SECONDS


#: For a mount that does nothing on request.
_NO_ACTIONS: Mapping[str, Action] = MappingProxyType({})


async def serve(
    mountpoint: Path,
    reports: Mapping[str, Report],
    actions: Mapping[str, Action] = _NO_ACTIONS,
    *,
    folders: Sequence[Path] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answers GET for the paths in `reports`, and POST for those in `actions`, for ever.

    `await nursery.start(serve, ...)` returns when it does.

    Whatever goes wrong is logged, and ends the mount in no case: without a socket this returns.
    """
    with ExitStack() as stack:
        listener: trio.socket.SocketType | None = None

        async def listen() -> None:
            nonlocal listener
            where = places.runtime_folders(os.geteuid()) if folders is None else folders
            listener = stack.enter_context(_listening(places.socket_name(mounts.resolve(mountpoint)), where))

        await in_background(f"{mountpoint} cannot be asked for its status", listen)
        task_status.started()
        if listener is not None:
            await in_background("the control socket", _Server(listener, reports, actions).run)


@contextmanager
def _listening(name: str, folders: Sequence[Path]) -> Iterator[trio.socket.SocketType]:
    """The socket of that name in the first place that will do. Raises: FsmountError."""
    problems: list[str] = []
    for place in folders:
        with ExitStack() as stack:
            try:
                place.mkdir(mode=0o700, exist_ok=True)
                folder = stack.enter_context(places.opened(place, os.geteuid()))
                _close_to_others(folder)
                listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                made = _bind(listener, folder, name)
            except OSError as error:
                problems.append(f"{place}: {error.strerror or error}")
                continue
            stack.callback(_remove, folder, name, made)
            _clear(folder, name)
            yield trio.socket.from_stdlib_socket(listener)
            return
    raise FsmountError(f"there is no place for a socket: {'; '.join(problems)}")


def _close_to_others(folder: int) -> None:
    # RuntimeDirectory= of systemd makes it 0755. What its group may is for the administrator to say.
    mode = stat.S_IMODE(os.fstat(folder).st_mode)
    os.chmod(places.address(folder, "."), mode & 0o750)


def _bind(listener: socket.socket, folder: int, name: str) -> os.stat_result:
    """Gives the socket its name; one that was left there by a process that was killed, or lazily unmounted, goes."""
    partial_name = f".{name}.{os.getpid()}"
    address = places.address(folder, partial_name)
    Path(address).unlink(missing_ok=True)
    listener.bind(address)
    os.chmod(address, 0o660 if _give_to_group_of(folder, address) else 0o600)
    listener.listen()
    os.rename(partial_name, name, src_dir_fd=folder, dst_dir_fd=folder)
    return os.stat(name, dir_fd=folder, follow_symlinks=False)


def _give_to_group_of(folder: int, address: str) -> bool:
    """Whether that is permitted: to a group of ours, or by CAP_CHOWN."""
    group = os.fstat(folder).st_gid
    try:
        os.chown(address, -1, group)
    except PermissionError as error:
        log.warning("group %d may not ask about the mount: %s", group, error.strerror)
        return False
    return True


def _clear(folder: int, own: str) -> None:
    """Removes what processes left beside ours that were killed, and whose mounts are gone: nobody else would.

    Never waits; what cannot be removed stays.
    """
    with suppress(OSError):
        # Who serves one that is mounted is there, or about to follow one that has died, and to take the name.
        kept = {places.socket_name(mount.mountpoint) for mount in mounts.mounted() if mounts.is_ours(mount)}
        kept.add(own)
        with os.scandir(places.address(folder, ".")) as entries:
            for entry in islice(entries, _MOST_CLEARED):
                if places.SOCKET_NAME.fullmatch(entry.name) and entry.name not in kept:
                    _remove_if_refused(folder, entry.name)


def _remove_if_refused(folder: int, name: str) -> None:
    # A socket that has such a name listens already; of a file that is none, a connection is refused as well.
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        if stat.S_ISSOCK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            try:
                client.connect(places.address(folder, name))
            except ConnectionRefusedError:
                os.unlink(name, dir_fd=folder)


def _remove(folder: int, name: str, made: os.stat_result) -> None:
    """Unless another process has taken the name over."""
    path = Path(places.address(folder, name))
    try:
        if os.path.samestat(path.lstat(), made):
            path.unlink()
    except OSError as error:
        log.info("the control socket cannot be removed: %s", error.strerror)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    content: bytes
    media_type: str = "text/plain; charset=utf-8"
    allow: str | None = None

    @classmethod
    def refusal(cls, status: int) -> "_Answer":
        """What a person who asks with curl wants to see."""
        known = HTTPStatus(status)
        return cls(known, f"{known.value} {known.phrase}\n".encode())

    @classmethod
    def failure(cls, error: FsmountError) -> "_Answer":
        """The same error is raised where it was asked for."""
        return cls(failures.status_of(error), failures.encode(error), JSON)


@dataclass(frozen=True, slots=True)
class _Request:
    head: h11.Request
    body: bytes
    #: What our end knows of the other: not what it says of itself.
    user: int


class _Server:
    """Takes clients, and answers each of them once."""

    def __init__(
        self,
        listener: trio.socket.SocketType,
        reports: Mapping[str, Report],
        actions: Mapping[str, Action],
    ) -> None:
        self._listener = listener
        self._reports = reports
        self._actions = actions
        self._places = trio.Semaphore(_MOST_CLIENTS)
        self._hands = trio.Semaphore(_MOST_ACTIONS)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await self._places.acquire()
                while True:
                    try:
                        client, _ = await self._listener.accept()
                        break
                    except OSError as error:
                        log.warning("nobody can ask about the mount now: %s", error.strerror)
                        await trio.sleep(_PAUSE_SECONDS)
                nursery.start_soon(self._serve, client)

    async def _serve(self, client: trio.socket.SocketType) -> None:
        try:
            async with trio.SocketStream(client) as stream:
                await in_background("an answer about the mount", partial(self._converse, stream))
        finally:
            self._places.release()

    async def _converse(self, stream: trio.SocketStream) -> None:
        """One request, and its answer."""
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_LARGEST_HEAD)
        request, answer = None, _Answer.refusal(408)
        try:
            with trio.move_on_after(_CLIENT_SECONDS):
                request = await _receive(connection, stream)
                if request is None:
                    return
            if request is not None:
                answer = await self._find_answer(request)
        except h11.RemoteProtocolError as error:
            answer = _Answer.refusal(error.error_status_hint)
        except trio.BrokenResourceError:
            return
        is_head = request is not None and request.head.method == b"HEAD"
        with trio.move_on_after(_CLIENT_SECONDS):
            try:
                await stream.send_all(_encode(connection, answer, is_head=is_head))
            except trio.BrokenResourceError:
                log.debug("who asked about the mount has left")

    async def _find_answer(self, request: _Request) -> _Answer:
        path, method = request.head.target.decode("ascii").partition("?")[0], request.head.method
        report, action = self._reports.get(path), self._actions.get(path)
        if report is not None and method in (b"GET", b"HEAD"):
            return await self._report(path, report)
        if action is not None and method == b"POST":
            return await self._act(path, action, request)
        allowed = ["GET, HEAD"] * (report is not None) + ["POST"] * (action is not None)
        return replace(_Answer.refusal(405), allow=", ".join(allowed)) if allowed else _Answer.refusal(404)

    async def _report(self, path: str, report: Report) -> _Answer:
        answer = _Answer.refusal(500)

        async def make() -> None:
            nonlocal answer
            with trio.move_on_after(REPORT_SECONDS) as scope:
                answer = _Answer(HTTPStatus.OK, await report.make(), report.media_type)
            if scope.cancelled_caught:
                answer = _Answer.refusal(503)

        await in_background(f"{path} of the mount", make)
        return answer

    async def _act(self, path: str, action: Action, request: _Request) -> _Answer:
        answer = _Answer.refusal(500)

        async def do() -> None:
            nonlocal answer
            try:
                with single_error(FsmountError):
                    answer = _Answer(HTTPStatus.OK, await self._do(path, action, request), JSON)
            except FsmountError as error:
                answer = _Answer.failure(error)

        await in_background(f"{path} of the mount", do)
        return answer

    async def _do(self, path: str, action: Action, request: _Request) -> bytes:
        try:
            self._hands.acquire_nowait()
        except trio.WouldBlock:
            raise RateLimited(
                f"the mount has {_MOST_ACTIONS} things to do already", remedy="Ask again when they are done."
            ) from None
        log.info("%s: asked for by user %d", path, request.user)
        try:
            with trio.move_on_after(action.seconds):
                return await action.do(request.body)
        finally:
            self._hands.release()
        raise DeadlineExpired(f"{path} was not done within {action.seconds:g} s")


async def _receive(connection: h11.Connection, stream: trio.SocketStream) -> _Request | None:
    """The request, with the body of a POST; None if the client leaves.

    Raises: RemoteProtocolError, BrokenResourceError.
    """
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            # h11 bounds what is not complete: what comes in one piece must not be more by itself.
            connection.receive_data(await stream.receive_some(_LARGEST_HEAD // 4))
            continue
        if isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > LARGEST_BODY:
                raise h11.RemoteProtocolError("the body is too large", error_status_hint=413)
        elif not isinstance(event, h11.EndOfMessage):
            return None
        if head is not None and (head.method != b"POST" or isinstance(event, h11.EndOfMessage)):
            return _Request(head, bytes(body), _user_of(stream))


def _user_of(stream: trio.SocketStream) -> int:
    """Who connected, as the kernel noted it then."""
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    assert isinstance(credentials, bytes)
    user: int = _CREDENTIALS.unpack(credentials)[1]
    return user


def _encode(connection: h11.Connection, answer: _Answer, *, is_head: bool) -> bytes:
    headers = [
        ("Content-Type", answer.media_type),
        ("Content-Length", str(len(answer.content))),
        ("Connection", "close"),
    ]
    if answer.allow is not None:
        headers.append(("Allow", answer.allow))
    response = h11.Response(status_code=answer.status, reason=answer.status.phrase, headers=headers)
    parts = [connection.send(response)]
    if not is_head:
        parts.append(connection.send(h11.Data(data=answer.content)))
    parts.append(connection.send(h11.EndOfMessage()))
    return b"".join(part or b"" for part in parts)
