"""notify: how a service and whoever started it tell each other of readiness, life and descriptors.

The protocol is systemd's (sd_notify(3), sd_listen_fds(3)): datagrams of `NAME=value` lines to the socket that
NOTIFY_SOCKET names, with descriptors beside them; and, when a process starts, the descriptors from 3 on that
LISTEN_FDS counts and LISTEN_FDNAMES names.
"""

import array
import logging
import os
import socket
import struct
import tempfile
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

#: Variables of our own: the process id of the holder, where that is ours, and not systemd; and how the last process has
#: ended that was not told to.
HOLDER = "FSMOUNT_HOLDER"
LAST_DEATH = "FSMOUNT_LAST_DEATH"
#: Where inherited descriptors begin.
FIRST_DESCRIPTOR = 3
#: What the one message may take on which the next process depends, if the queue is full.
_PATIENCE_SECONDS = 2.0
_LARGEST_MESSAGE = 4096
_MOST_DESCRIPTORS = 16
_FOLDER, _SOCKET = "fsmount-notify-", "socket"
_CREDENTIALS = struct.Struct("=iII")
#: Hands over from a holder to the program that takes its place.
HANDED = "FSMOUNT_HANDED"
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


# -------------------- the service


def without_service(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child that is no service of whoever started this process."""
    ours = {*_VARIABLES, HOLDER, LAST_DEATH, HANDED}
    return {name: value for name, value in environ.items() if name not in ours}


class Service:
    """What this process was given by whoever started it, and what it tells in return.

    Nothing that it tells can fail: a process goes on serving when nobody hears it.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        inherited: Mapping[str, int] | None = None,
        watchdog_seconds: float | None = None,
    ) -> None:
        """address: None is nobody. inherited: descriptors by name, which are the caller's."""
        self._address = address
        self.inherited = dict(inherited or {})
        self.watchdog_seconds = watchdog_seconds
        self._is_deaf = False

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> "Service":
        """Takes the variables out of the environment: they mean nothing to children of this process."""
        given = {name: environ.pop(name) for name in _VARIABLES if name in environ}
        pid = str(os.getpid())
        inherited: dict[str, int] = {}
        if given.get("LISTEN_PID") == pid:
            names = given.get("LISTEN_FDNAMES", "").split(":")
            for number in range(int(given.get("LISTEN_FDS", "0"))):
                descriptor = FIRST_DESCRIPTOR + number
                os.set_inheritable(descriptor, False)
                inherited[names[number] if number < len(names) else f"unnamed-{number}"] = descriptor
        seconds = None
        if given.get("WATCHDOG_USEC") and given.get("WATCHDOG_PID", pid) == pid:
            seconds = int(given["WATCHDOG_USEC"]) / 1e6
        return cls(given.get("NOTIFY_SOCKET"), inherited=inherited, watchdog_seconds=seconds)

    @property
    def is_held(self) -> bool:
        """Whether there is somebody who starts the next process when this one ends."""
        return self._address is not None

    def ready(self) -> None:
        """This process does what it is for."""
        self._tell("READY=1")

    def describe(self, text: str) -> None:
        """One line on how it goes."""
        self._tell(f"STATUS={' '.join(text.split())}")

    def pet(self) -> None:
        """It is alive; to be said more often than every `watchdog_seconds`."""
        self._tell("WATCHDOG=1")

    def store(self, name: str, descriptor: int) -> None:
        """Has a descriptor kept for the next process, which inherits it under this name."""
        self._tell(f"FDSTORE=1\nFDNAME={name}", [descriptor], patience_seconds=_PATIENCE_SECONDS)

    def remove(self, name: str) -> None:
        """Has no descriptor of that name kept any more."""
        self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _tell(self, message: str, descriptors: Sequence[int] = (), *, patience_seconds: float = 0.0) -> None:
        if self._address is None:
            return
        # In systemd's spelling an @ stands for the zero byte of an abstract address.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                # Whoever is to hear must not make us wait: they may have stopped. 0 is not to wait at all.
                sender.settimeout(patience_seconds)
                sender.connect(address)
                socket.send_fds(sender, [message.encode()], list(descriptors))
            self._is_deaf = False
        except OSError as error:
            if not self._is_deaf:
                self._is_deaf = True
                log.warning("whoever started this process does not hear it: %s", error.strerror or error)


# -------------------- who starts it


@dataclass(frozen=True, slots=True)
class Message:
    """What a process has told. Ownership of the descriptors: the receiver's."""

    pid: int
    fields: Mapping[str, str]
    descriptors: Sequence[int] = field(default=())


def listen() -> socket.socket:
    """A socket to be told at, in a folder of its own; see `remove`.

    An abstract address would need no folder, but everybody may send to it: a descriptor, too, whose closing takes as
    long as its sender likes.
    """
    places = [Path("/run/fsmount"), Path(f"/run/user/{os.geteuid()}"), Path("/tmp")]
    place = next((place for place in places if os.access(place, os.W_OK)), Path("/tmp"))
    for left in place.glob(f"{_FOLDER}*"):
        _remove_if_dead(left)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=place))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    listener.bind(str(folder / _SOCKET))
    listener.setblocking(False)
    return listener


def _remove_if_dead(folder: Path) -> None:
    """Takes away what a process has left here that was killed, if it was this user's."""
    path = folder / _SOCKET
    try:
        if folder.lstat().st_uid != os.geteuid():
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as caller:
            caller.connect(str(path))
    except ConnectionRefusedError:
        with suppress(OSError):
            path.unlink()
            folder.rmdir()
    except OSError as error:  # somebody is about to listen there, or it is not what it looks like
        log.debug("%s: %s", folder, error)


def address_of(listener: socket.socket) -> str:
    """As NOTIFY_SOCKET spells it."""
    return str(listener.getsockname())


def remove(listener: socket.socket) -> None:
    """Closes a socket to be told at, and takes away its folder."""
    path = Path(address_of(listener))
    listener.close()
    with suppress(OSError):
        path.unlink()
        path.parent.rmdir()


def receive(listener: socket.socket) -> Message | None:
    """The next message; None if there is none. The kernel vouches for `pid`."""
    space = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(_MOST_DESCRIPTORS * 4)
    try:
        data, ancillary, _, _ = listener.recvmsg(_LARGEST_MESSAGE, space, socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        return None
    pid, descriptors = 0, array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid = _CREDENTIALS.unpack_from(content)[0]
        elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    lines = (line.partition("=") for line in data.decode(errors="replace").splitlines())
    return Message(pid, {name: value for name, _, value in lines}, tuple(descriptors))


def environment(listener: socket.socket, names: Sequence[str], *, watchdog_seconds: float) -> dict[str, str]:
    """What a child needs that inherits descriptors of these names, from FIRST_DESCRIPTOR on. For the child to call."""
    pid = str(os.getpid())
    return {
        "NOTIFY_SOCKET": address_of(listener),
        "WATCHDOG_USEC": str(round(watchdog_seconds * 1e6)),
        "WATCHDOG_PID": pid,
        "LISTEN_PID": pid,
        "LISTEN_FDS": str(len(names)),
        "LISTEN_FDNAMES": ":".join(names),
    }
