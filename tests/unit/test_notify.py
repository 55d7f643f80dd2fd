"""Both ends of the notify protocol, over real sockets and in real processes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fsmount import notify
from fsmount.notify import Service


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    listener = notify.listen()
    yield listener
    notify.remove(listener)


def service(listener: socket.socket) -> Service:
    return Service.from_environment({"NOTIFY_SOCKET": notify.address_of(listener)})


def test_what_a_service_tells_arrives_with_the_process_that_told_it(listener: socket.socket) -> None:
    told = service(listener)
    told.ready()
    told.describe("two\nlines")
    told.pet()
    told.remove("device")
    messages = [notify.receive(listener) for _ in range(5)]
    assert [message and dict(message.fields) for message in messages] == [
        {"READY": "1"},
        {"STATUS": "two lines"},
        {"WATCHDOG": "1"},
        {"FDSTOREREMOVE": "1", "FDNAME": "device"},
        None,
    ]
    assert {message.pid for message in messages if message} == {os.getpid()}


def test_a_descriptor_that_is_stored_is_another_of_the_same_file(listener: socket.socket) -> None:
    descriptor = os.memfd_create("test")
    os.write(descriptor, b"kept")
    service(listener).store("record", descriptor)
    os.close(descriptor)
    message = notify.receive(listener)
    assert message is not None
    assert message.fields == {"FDSTORE": "1", "FDNAME": "record"}
    (kept,) = message.descriptors
    assert os.pread(kept, 10, 0) == b"kept"
    assert not os.get_inheritable(kept)
    os.close(kept)


def test_a_service_that_nobody_started_tells_nobody(listener: socket.socket) -> None:
    alone = Service.from_environment({})
    alone.ready()
    assert not alone.is_held
    assert notify.receive(listener) is None


def test_whoever_is_gone_is_told_in_vain_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gone = notify.listen()
    told = service(gone)
    gone.close()
    told.ready()
    told.pet()
    assert [record.message for record in caplog.records] == [
        "whoever started this process does not hear it: Connection refused"
    ]


def test_a_path_is_an_address_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("n") / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        Service.from_environment({"NOTIFY_SOCKET": str(path)}).ready()
        assert listener.recv(100) == b"READY=1"


_CHILD = """
import json, os
from fsmount.notify import Service
service = Service.from_environment()
print(json.dumps({
    "held": service.is_held,
    "watchdog": service.watchdog_seconds,
    "inherited": {name: os.pread(fd, 10, 0).decode() for name, fd in service.inherited.items()},
    "inheritable": [os.get_inheritable(fd) for fd in service.inherited.values()],
    "left": [name for name in os.environ if name.startswith(("NOTIFY", "LISTEN", "WATCHDOG"))],
}))
"""


def test_a_child_finds_what_it_inherits_by_name_and_hands_nothing_of_it_on(listener: socket.socket) -> None:
    descriptors = []
    for text in (b"one", b"two"):
        descriptors.append(os.memfd_create("test"))
        os.write(descriptors[-1], text)
    # As a shell would: the process id must be the child's own.
    script = f'exec env LISTEN_PID=$$ WATCHDOG_PID=$$ "$@" {notify.FIRST_DESCRIPTOR}<&$0 4<&{descriptors[1]}'
    given = notify.environment(listener, ["a", "b"], watchdog_seconds=30)
    done = subprocess.run(
        ["bash", "-c", script, str(descriptors[0]), sys.executable, "-c", _CHILD],
        env={**os.environ, **given},
        pass_fds=descriptors,
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == {
        "held": True,
        "watchdog": 30,
        "inherited": {"a": "one", "b": "two"},
        "inheritable": [False, False],
        "left": [],
    }
    for descriptor in descriptors:
        os.close(descriptor)


def test_what_is_meant_for_another_process_is_not_ours() -> None:
    environ = {
        "LISTEN_PID": str(os.getpid() + 1),
        "LISTEN_FDS": "1",
        "LISTEN_FDNAMES": "a",
        "WATCHDOG_PID": str(os.getpid() + 1),
        "WATCHDOG_USEC": "1000000",
    }
    service = Service.from_environment(environ)
    assert service.inherited == {}
    assert service.watchdog_seconds is None
    assert environ == {}


def test_what_a_killed_process_has_left_goes_and_what_is_listened_at_stays(listener: socket.socket) -> None:
    left = notify.listen()
    address = Path(notify.address_of(left))
    left.close()  # as at a kill: nothing is taken away
    with closing(notify.listen()) as another:
        assert not address.parent.exists()
        service(listener).ready()
        assert notify.receive(listener) is not None
        notify.remove(another)
