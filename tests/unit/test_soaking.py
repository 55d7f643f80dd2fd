"""What scripts/soak holds for right and for wrong: a soak that finds nothing must have been able to."""

import http.client
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scripts.soaking.diary import Diary, Event, counts, events
from scripts.soaking.front import Front, Toxic
from scripts.soaking.trouble import TOXICS, Fault, plan
from scripts.soaking.verdict import Circumstances, Phase, judge, pauses

_READ = Event("hash1", "read", "/mnt/web/v1/file", 10.0, 11.0)
_PHASES = [Phase("faults", 0.0, 100.0), Phase("kills", 100.0, 200.0, is_calm=True)]


def _violations(event: Event, **circumstances: object) -> list[str]:
    return judge([event], Circumstances(**circumstances), _PHASES).violations  # type: ignore[arg-type]


# -------------------- errors


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("registry stopped", "EHOSTUNREACH"),
        ("silent", "ETIMEDOUT"),
        ("wrong bytes", "EBADMSG"),
        ("no tokens", "EACCES"),
        ("too many requests", "EAGAIN"),
        ("full disk", "ENOSPC"),
        ("500", "signal 7"),
    ],
)
def test_an_error_is_excused_by_a_fault_that_it_fits_and_that_was_in_force(kind: str, error: str) -> None:
    event = replace(_READ, error=error)
    assert _violations(event, faults=[Fault(kind, 5.0, 10.5)]) == []
    assert len(_violations(event, faults=[Fault(kind, 12.0, 20.0)])) == 1
    assert len(_violations(event)) == 1


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("registry stopped", "EACCES"),
        ("full disk", "EHOSTUNREACH"),
        ("wrong bytes", "ENOSPC"),
        ("no tokens", "EBADMSG"),
    ],
)
def test_an_error_is_not_excused_by_a_fault_of_another_kind(kind: str, error: str) -> None:
    assert len(_violations(replace(_READ, error=error), faults=[Fault(kind, 0.0)])) == 1


@pytest.mark.parametrize("error", ["ENOTCONN", "ECONNABORTED", "ESTALE", "EIO", "WRONG", "EINTR"])
def test_some_errors_are_excused_by_nothing(error: str) -> None:
    faults = [Fault(kind, 0.0) for kind in (*TOXICS, "registry stopped", "full disk")]
    assert len(_violations(replace(_READ, error=error), faults=faults)) == 1


def test_nothing_may_fail_while_only_kills_happen() -> None:
    event = replace(_READ, begin=150.0, end=151.0, error="EHOSTUNREACH")
    assert len(_violations(event, faults=[Fault("registry stopped", 0.0)])) == 1


def test_what_is_known_may_not_fail_whatever_is_wrong() -> None:
    event = replace(_READ, kind="known stat", error="EHOSTUNREACH")
    assert len(_violations(event, faults=[Fault("registry stopped", 0.0)])) == 1


def test_bytes_of_a_layer_that_streams_for_the_first_time_may_be_wrong_if_wrong_bytes_were_sent() -> None:
    event = replace(_READ, error="UNVERIFIED")
    assert _violations(event, faults=[Fault("wrong bytes", 0.0, 9.0)]) == []
    assert len(_violations(event, faults=[Fault("registry stopped", 0.0)])) == 1


# -------------------- waits


def test_an_operation_may_take_twice_its_deadline_and_no_more() -> None:
    assert _violations(replace(_READ, end=10.0 + 44)) == []
    assert len(_violations(replace(_READ, end=10.0 + 46))) == 1


def test_a_process_that_takes_over_begins_the_deadline_anew() -> None:
    assert _violations(replace(_READ, end=10.0 + 60), kills=[20.0]) == []
    assert len(_violations(replace(_READ, end=10.0 + 60), kills=[5.0])) == 1


def test_what_asks_no_network_is_answered_soon() -> None:
    assert len(_violations(replace(_READ, kind="known statfs", end=10.0 + 11))) == 1


def test_the_pause_after_a_kill_is_the_longest_wait_from_then_on() -> None:
    seen = [
        replace(_READ, begin=9.0, end=11.5),
        replace(_READ, begin=10.2, end=11.0),
        replace(_READ, begin=1.0, end=9.9),
        replace(_READ, begin=31.0, end=31.3),
    ]
    assert pauses(seen, [10.0, 30.0], _PHASES[0], known_only=False) == pytest.approx([1.5, 0.3])


def test_a_tag_that_moved_is_to_be_followed_when_nothing_was_wrong() -> None:
    seen = Event("moves1", "revision", "1", 50.0, 50.1)
    pushes = [(1.0, 1), (20.0, 2)]
    assert len(_violations(seen, pushes=pushes)) == 1
    assert _violations(replace(seen, what="2"), pushes=pushes) == []
    assert _violations(seen, pushes=pushes, faults=[Fault("silent", 30.0, 40.0)]) == []
    assert _violations(replace(seen, begin=22.0), pushes=pushes) == []


# -------------------- plans


def test_a_seed_always_gives_the_same_plan() -> None:
    def made() -> list[object]:
        return [
            *plan(
                random.Random("7"),
                seconds=300,
                kills=9,
                upgrades=2,
                freezes=1,
                faults=True,
                pairs=True,
                long=True,
            )
        ]

    assert made() == made()


def test_a_long_plan_has_every_fault_and_as_many_kills_as_were_asked_for() -> None:
    steps = plan(
        random.Random("7"), seconds=600, kills=38, upgrades=5, freezes=1, faults=True, pairs=True, long=True
    )
    kinds = [step.kind for step in steps]
    assert {*TOXICS, "registry stopped", "full disk", "damage", "push", "expire", "freeze"} <= set(kinds)
    assert (kinds.count("kill"), kinds.count("upgrade")) == (38, 5)


# -------------------- the front

_BODY = bytes(range(256)) * 100


class _Upstream(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(_BODY)))
        self.end_headers()
        self.wfile.write(_BODY)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def front() -> Iterator[Front]:
    with _serving() as host, Front(host, "7") as front:
        front.tokens.add("good")
        yield front


@contextmanager
def _serving() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Upstream) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def _get(front: Front, path: str = "/v2/a/blobs/sha256:b", token: str = "good") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(front.host, timeout=10)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_the_front_passes_answers_on(front: Front) -> None:
    assert _get(front) == (200, _BODY)


def test_the_front_asks_for_tokens_which_may_expire_or_be_refused(front: Front) -> None:
    front.expire()
    assert _get(front)[0] == 401
    front.set(Toxic("deny"))
    assert _get(front, "/token")[0] == 401
    front.set(None)
    assert _get(front, "/token")[0] == 200


def test_the_front_changes_one_byte_of_what_a_digest_names_and_of_nothing_else(front: Front) -> None:
    front.set(Toxic("flip"))
    _, body = _get(front)
    assert sum(a != b for a, b in zip(body, _BODY, strict=True)) == 1
    assert _get(front, "/v2/a/tags/list") == (200, _BODY)


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_the_front_breaks_answers_off(front: Front, kind: str) -> None:
    front.set(Toxic(kind, 1000))  # type: ignore[arg-type]
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        _get(front)


def test_the_front_answers_with_a_status(front: Front) -> None:
    front.set(Toxic("status", 429))
    assert _get(front)[0] == 429


def test_what_stalls_breaks_off_when_the_fault_is_over(front: Front) -> None:
    front.set(Toxic("stall"))
    timer = threading.Timer(0.05, front.set, [None])
    timer.start()
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        _get(front)
    timer.join()
    assert _get(front) == (200, _BODY)


def test_a_front_that_is_closed_refuses_and_opens_again_where_it_was(front: Front) -> None:
    host = front.host
    front.close()
    with pytest.raises(ConnectionRefusedError):
        _get(front)
    front.open()
    assert (front.host, _get(front)) == (host, (200, _BODY))


# -------------------- diaries


def test_a_diary_tells_failures_wrong_bytes_and_what_was_right(tmp_path: Path) -> None:
    diary = Diary(tmp_path, "one")
    assert diary.attempt("open", "nothing", lambda: (tmp_path / "nothing").read_bytes()) is None
    assert diary.compare("read", "file", 0.0, b"abc", b"abc")
    assert not diary.compare("read", "file", 0.0, b"abx", b"abc", offset=100)
    diary.close()
    failed, wrong = events(tmp_path)
    assert (failed.kind, failed.what, failed.error) == ("open", "nothing", "ENOENT")
    assert (wrong.error, "byte 102 on" in wrong.text) == ("WRONG", True)
    assert (tmp_path / "wrong-one-0").read_bytes() == b"abx"
    assert counts(tmp_path) == ({"open": 1, "wrong": 1}, 3)
