"""control: the socket by which a running mount is asked what it does, over HTTP/1.1; both of its ends."""

import hashlib
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path

import h11
import trio

from fsmount.errors import DeadlineExpired, FsmountError, NotRunning, Refused
from fsmount.fuse import mounts
from fsmount.singleflight import in_background

log = logging.getLogger(__name__)

#: Of a request's line and headers, in bytes; its body is not read.
_LARGEST_HEAD = 16 * 1024
#: Who is answered at once; whoever else comes waits in the kernel's queue.
_MOST_CLIENTS = 8
#: What a client may take to send its request, and to take its answer; and what making that may take.
_CLIENT_SECONDS = 5.0
_REPORT_SECONDS = 30.0
#: What the whole answer may take, for our own end: more than the other may take to say that it cannot.
_ANSWER_SECONDS = 45.0
_LARGEST_ANSWER = 256 * 1024 * 1024
#: After a connection could not be taken: the process is out of descriptors.
_PAUSE_SECONDS = 1.0
_PIECE = 65536
_READABLE = frozenset({b"GET", b"HEAD"})


@dataclass(frozen=True, slots=True)
class Report:
    """What a path answers: its media type, and what makes its content, anew for everyone who asks."""

    media_type: str
    make: Callable[[], Awaitable[bytes]]


# -------------------- where it lies


def runtime_folders(user: int, environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Where the sockets of a user's mounts may lie, the best place first.

    Not in the cache folder: who asks knows the mount point alone. The last one is for users without a session.
    """
    if user == 0:
        return [Path("/run/fsmount"), Path("/tmp/fsmount-0")]
    folders = [Path(f"/run/user/{user}/fsmount"), Path(f"/tmp/fsmount-{user}")]
    own = Path(environ.get("XDG_RUNTIME_DIR", ""))
    # The XDG Base Directory Specification has relative paths ignored. Root may ask for another user's mount.
    return [own / "fsmount", *folders] if own.is_absolute() and user == os.geteuid() else folders


def _name(mountpoint: Path) -> str:
    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16] + ".sock"


def _address(folder: int, name: str) -> str:
    """A socket's address by a descriptor of its folder: a path may be longer than the 107 bytes of sun_path."""
    return f"/proc/self/fd/{folder}/{name}"


@contextmanager
def _opened(path: Path, owner: int) -> Iterator[int]:
    """A descriptor of a folder to which nobody but its owner writes. Raises: OSError."""
    folder = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(folder)
        if status.st_uid != owner or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            # In /tmp anybody may have made it, to read our questions or to answer those of others.
            raise PermissionError(f"{path} is not for user {owner} alone")
        yield folder
    finally:
        os.close(folder)


# -------------------- the end of the mount


async def serve(
    mountpoint: Path,
    reports: Mapping[str, Report],
    *,
    folders: Sequence[Path] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answers GET for the paths in `reports` for ever; `await nursery.start(serve, ...)` returns when it does.

    Whatever goes wrong is logged, and ends the mount in no case: without a socket this returns.
    """
    with ExitStack() as stack:
        listener: trio.socket.SocketType | None = None

        async def listen() -> None:
            nonlocal listener
            places = runtime_folders(os.geteuid()) if folders is None else folders
            listener = stack.enter_context(_listening(_name(mounts.resolve(mountpoint)), places))

        await in_background(f"{mountpoint} cannot be asked for its status", listen)
        task_status.started()
        if listener is not None:
            await in_background("the control socket", partial(_take_clients, listener, reports))


@contextmanager
def _listening(name: str, places: Sequence[Path]) -> Iterator[trio.socket.SocketType]:
    """The socket of that name in the first place that will do. Raises: FsmountError."""
    problems: list[str] = []
    for place in places:
        with ExitStack() as stack:
            try:
                place.mkdir(mode=0o700, exist_ok=True)
                folder = stack.enter_context(_opened(place, os.geteuid()))
                # RuntimeDirectory= of systemd makes it 0755.
                os.chmod(_address(folder, "."), 0o700)
                listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                made = _bind(listener, folder, name)
            except OSError as error:
                problems.append(f"{place}: {error.strerror or error}")
                continue
            stack.callback(_remove, folder, name, made)
            yield trio.socket.from_stdlib_socket(listener)
            return
    raise FsmountError(f"there is no place for a socket: {'; '.join(problems)}")


def _bind(listener: socket.socket, folder: int, name: str) -> os.stat_result:
    """Gives the socket its name; one that was left there by a process that was killed, or lazily unmounted, goes."""
    partial_name = f".{name}.{os.getpid()}"
    address = _address(folder, partial_name)
    Path(address).unlink(missing_ok=True)
    listener.bind(address)
    os.chmod(address, 0o600)
    listener.listen()
    os.rename(partial_name, name, src_dir_fd=folder, dst_dir_fd=folder)
    return os.stat(name, dir_fd=folder, follow_symlinks=False)


def _remove(folder: int, name: str, made: os.stat_result) -> None:
    """Unless another process has taken the name over."""
    path = Path(_address(folder, name))
    try:
        if os.path.samestat(path.lstat(), made):
            path.unlink()
    except OSError as error:
        log.info("the control socket cannot be removed: %s", error.strerror)


async def _take_clients(listener: trio.socket.SocketType, reports: Mapping[str, Report]) -> None:
    places = trio.Semaphore(_MOST_CLIENTS)

    async def answer(client: trio.socket.SocketType) -> None:
        try:
            async with trio.SocketStream(client) as stream:
                await in_background("an answer about the mount", partial(_converse, stream, reports))
        finally:
            places.release()

    async with trio.open_nursery() as nursery:
        while True:
            await places.acquire()
            while True:
                try:
                    client, _ = await listener.accept()
                    break
                except OSError as error:
                    log.warning("nobody can ask about the mount now: %s", error.strerror)
                    await trio.sleep(_PAUSE_SECONDS)
            nursery.start_soon(answer, client)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    content: bytes
    media_type: str = "text/plain; charset=utf-8"

    @classmethod
    def refusal(cls, status: int) -> "_Answer":
        """What a person who asks with curl wants to see."""
        known = HTTPStatus(status)
        return cls(known, f"{known.value} {known.phrase}\n".encode())


async def _converse(stream: trio.SocketStream, reports: Mapping[str, Report]) -> None:
    """One request, and its answer."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_LARGEST_HEAD)
    request, answer = None, _Answer.refusal(408)
    try:
        with trio.move_on_after(_CLIENT_SECONDS):
            request = await _receive(connection, stream)
            if request is None:
                return
        if request is not None:
            answer = await _find_answer(request, reports)
    except h11.RemoteProtocolError as error:
        answer = _Answer.refusal(error.error_status_hint)
    except trio.BrokenResourceError:
        return
    with trio.move_on_after(_CLIENT_SECONDS):
        try:
            await stream.send_all(
                _encode(connection, answer, is_head=request is not None and request.method == b"HEAD")
            )
        except trio.BrokenResourceError:
            log.debug("who asked about the mount has left")


async def _receive(connection: h11.Connection, stream: trio.SocketStream) -> h11.Request | None:
    """The request, without its body; None if the client leaves. Raises: RemoteProtocolError, BrokenResourceError."""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            # h11 bounds what is not complete: what comes in one piece must not be more by itself.
            connection.receive_data(await stream.receive_some(_LARGEST_HEAD // 4))
        else:
            return event if isinstance(event, h11.Request) else None


async def _find_answer(request: h11.Request, reports: Mapping[str, Report]) -> _Answer:
    path = request.target.decode("ascii").partition("?")[0]
    if path not in reports:
        return _Answer.refusal(404)
    if request.method not in _READABLE:
        return _Answer.refusal(405)
    report, answer = reports[path], _Answer.refusal(500)

    async def make() -> None:
        nonlocal answer
        with trio.move_on_after(_REPORT_SECONDS) as scope:
            answer = _Answer(HTTPStatus.OK, await report.make(), report.media_type)
        if scope.cancelled_caught:
            answer = _Answer.refusal(503)

    await in_background(f"{path} of the mount", make)
    return answer


def _encode(connection: h11.Connection, answer: _Answer, *, is_head: bool) -> bytes:
    headers = [
        ("Content-Type", answer.media_type),
        ("Content-Length", str(len(answer.content))),
        ("Connection", "close"),
    ]
    if answer.status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append(("Allow", "GET, HEAD"))
    response = h11.Response(status_code=answer.status, reason=answer.status.phrase, headers=headers)
    parts = [connection.send(response)]
    if not is_head:
        parts.append(connection.send(h11.Data(data=answer.content)))
    parts.append(connection.send(h11.EndOfMessage()))
    return b"".join(part or b"" for part in parts)


# -------------------- the end of who asks


async def ask(mount: mounts.Mount, path: str, *, folders: Sequence[Path] | None = None) -> bytes:
    """What the process that serves a mount answers to GET path.

    Raises: NotRunning (nobody answers), Refused (another user's), DeadlineExpired, FsmountError.
    """
    owner = int(mount.option("user_id") or 0)
    if os.geteuid() not in (0, owner):
        raise Refused(
            f"the mount at {mount.mountpoint} is user {owner}'s", remedy="Ask as that user, or as root."
        )
    try:
        with trio.fail_after(_ANSWER_SECONDS):
            stream = await _connect(mount, owner, runtime_folders(owner) if folders is None else folders)
            async with stream:
                status, content = await _get(stream, path)
    except trio.TooSlowError:
        raise DeadlineExpired(
            f"the mount at {mount.mountpoint} has not said within {_ANSWER_SECONDS:g} s how it is"
        ) from None
    except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
        raise FsmountError(f"the mount at {mount.mountpoint} broke off its answer: {error}") from error
    if status != HTTPStatus.OK:
        raise FsmountError(
            f"the mount at {mount.mountpoint} answers {path} with {status}", remedy="Its log says why."
        )
    return content


async def _connect(mount: mounts.Mount, owner: int, folders: Sequence[Path]) -> trio.SocketStream:
    """Raises: NotRunning."""
    for path in folders:
        client = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _opened(path, owner) as folder:
                await client.connect(_address(folder, _name(mount.mountpoint)))
            return trio.SocketStream(client)
        except OSError as error:
            # No such file; or one that a process left which was killed, and nobody listens.
            client.close()
            log.debug("%s: %s", path, error)
        except BaseException:
            client.close()
            raise
    raise NotRunning(
        f"nobody answers for the mount at {mount.mountpoint}",
        remedy="If its process was killed, `fsmount mount` there begins anew. If it runs, its log says more.",
    )


async def _get(stream: trio.SocketStream, path: str) -> tuple[int, bytes]:
    """Status and content. Raises: RemoteProtocolError, BrokenResourceError."""
    connection = h11.Connection(h11.CLIENT)
    request = h11.Request(method="GET", target=path, headers=[("Host", "fsmount"), ("Connection", "close")])
    await stream.send_all((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
    status, content = 0, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(_PIECE))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > _LARGEST_ANSWER:
                raise h11.RemoteProtocolError(f"it has more than {_LARGEST_ANSWER} bytes")
        else:
            return status, bytes(content)
