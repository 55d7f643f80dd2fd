"""client: the end of who asks a mount, or tells it what to do."""

import logging
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

import h11
import trio

from fsmount.control import failures, places
from fsmount.control.server import ACTION_SECONDS, JSON, LARGEST_BODY, REPORT_SECONDS
from fsmount.errors import DeadlineExpired, FsmountError, NotRunning, Refused
from fsmount.fuse import mounts

log = logging.getLogger(__name__)

#: How much longer this end waits: the other may need as long to say that it cannot.
_MARGIN_SECONDS = 15.0
_LARGEST_ANSWER = 256 * 1024 * 1024
_PIECE = 65536


async def ask(
    mount: mounts.Mount,
    path: str,
    body: bytes | None = None,
    *,
    seconds: float = ACTION_SECONDS,
    folders: Sequence[Path] | None = None,
) -> bytes:
    """What the process that serves a mount answers to GET path, or with a body to POST path.

    seconds: what the action may take (`Action`); the answer is waited for a little longer.

    Raises: what the action raised; NotRunning (nobody answers), Refused (another user's), DeadlineExpired,
        FsmountError.
    """
    assert body is None or len(body) <= LARGEST_BODY
    owner = int(mount.option("user_id") or 0)
    wait = (REPORT_SECONDS if body is None else seconds) + _MARGIN_SECONDS
    try:
        with trio.fail_after(wait):
            stream = await _connect(
                mount, owner, places.runtime_folders(owner) if folders is None else folders
            )
            async with stream:
                response, content = await _exchange(stream, path, body)
    except trio.TooSlowError:
        raise DeadlineExpired(
            f"the mount at {mount.mountpoint} has not answered {path} within {wait:g} s"
        ) from None
    except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
        raise FsmountError(f"the mount at {mount.mountpoint} broke off its answer: {error}") from error
    if response.status_code != HTTPStatus.OK:
        raise _failure(mount, path, response, content)
    return content


def _failure(mount: mounts.Mount, path: str, response: h11.Response, content: bytes) -> FsmountError:
    """What the action raised, or else what is wrong with the answer."""
    if (b"content-type", JSON.encode()) in response.headers:
        with suppress(ValueError):
            return failures.decode(content)
    return FsmountError(
        f"the mount at {mount.mountpoint} answers {path} with {response.status_code}",
        remedy="Its log says why.",
    )


async def _connect(mount: mounts.Mount, owner: int, folders: Sequence[Path]) -> trio.SocketStream:
    """Raises: NotRunning, Refused."""
    is_denied = False
    for path in folders:
        client = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with places.opened(path, owner) as folder:
                await client.connect(places.address(folder, places.socket_name(mount.mountpoint)))
            return trio.SocketStream(client)
        except OSError as error:
            # No such file; or one that a process left which was killed, and nobody listens.
            client.close()
            is_denied |= isinstance(error, PermissionError)
            log.debug("%s: %s", path, error)
        except BaseException:
            client.close()
            raise
    if is_denied and os.geteuid() not in (0, owner):
        raise Refused(
            f"the mount at {mount.mountpoint} is user {owner}'s",
            remedy="Ask as that user, as root, or as a member of the group that its runtime folder was given to.",
        )
    raise NotRunning(
        f"nobody answers for the mount at {mount.mountpoint}",
        remedy="If its process was killed, `fsmount mount` there begins anew. If it runs, its log says more.",
    )


async def _exchange(stream: trio.SocketStream, path: str, body: bytes | None) -> tuple[h11.Response, bytes]:
    """The answer and its content. Raises: RemoteProtocolError, BrokenResourceError."""
    connection = h11.Connection(h11.CLIENT)
    headers = [("Host", "fsmount"), ("Connection", "close")]
    if body is not None:
        headers += [("Content-Type", JSON), ("Content-Length", str(len(body)))]
    request = h11.Request(method="GET" if body is None else "POST", target=path, headers=headers)
    parts = [connection.send(request)]
    if body:
        parts.append(connection.send(h11.Data(data=body)))
    parts.append(connection.send(h11.EndOfMessage()))
    await stream.send_all(b"".join(part or b"" for part in parts))
    response, content = None, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(_PIECE))
        elif isinstance(event, h11.Response):
            response = event
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > _LARGEST_ANSWER:
                raise h11.RemoteProtocolError(f"it has more than {_LARGEST_ANSWER} bytes")
        elif response is None:
            raise h11.RemoteProtocolError("there is none")
        else:
            return response, bytes(content)
