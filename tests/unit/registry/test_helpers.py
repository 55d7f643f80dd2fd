"""The docker-credential-* protocol."""

import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount.errors import DeadlineExpired, FsmountError, Unreachable, UsageError
from fsmount.registry import helpers as module
from fsmount.registry.credential import Credential, IdentityToken, Password
from fsmount.registry.helpers import Helpers
from tests.fakes.helper import FakeHelper, install_program

HOST = "r.example:5000"
NULL = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
def bin(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


@pytest.fixture
def helpers(bin: Path) -> Helpers:
    return Helpers({"PATH": f"{bin}:/usr/bin:/bin"}, home=None)


@pytest.fixture
def helper(bin: Path) -> FakeHelper:
    return FakeHelper.install(bin, "fake", {HOST: ("me", "s3cret")})


@pytest.mark.parametrize(
    ("login", "credential"),
    [
        (("me", "pa:ss"), Password("me", "pa:ss")),
        (("<token>", "refresh"), IdentityToken("refresh")),
        ((NULL, "refresh"), IdentityToken("refresh")),
        (("", ""), None),
    ],
)
async def test_a_helper_answers_with_a_user_and_a_password_or_token(
    helpers: Helpers, helper: FakeHelper, login: tuple[str, str], credential: Credential | None
) -> None:
    helper.put({HOST: login})
    assert await helpers.get("fake", HOST) == credential


async def test_a_helper_that_does_not_know_a_registry_has_nothing(
    helpers: Helpers, helper: FakeHelper
) -> None:
    assert await helpers.get("fake", "other.example") is None


async def test_the_key_and_secrets_go_to_standard_input_and_never_into_arguments(
    helpers: Helpers, helper: FakeHelper
) -> None:
    await helpers.get("fake", HOST)
    await helpers.store("fake", HOST, "you", "n3w")
    assert helper.logins == {HOST: ["you", "n3w"]}
    await helpers.erase("fake", HOST)
    assert helper.logins == {}
    assert [run["arguments"] for run in helper.runs] == [["get"], ["store"], ["erase"]]
    assert helper.asked[0] == f"get {HOST}"  # bare: helpers compare it, with a newline too
    assert "n3w" not in str([run["environ"] for run in helper.runs])


@pytest.mark.parametrize(
    ("program", "kind", "message"),
    [
        ("echo s3cret; echo s3cret >&2; exit 3", Unreachable, "ended with exit code 3"),
        ("echo s3cret", Unreachable, "no credential in the form"),
        ("""echo '{"Username": "me", "Password": "s3cret"}'""", Unreachable, "no credential in the form"),
        ("""echo '{"Username": "me", "Secret": ["s3cret"]}'""", Unreachable, "no credential in the form"),
        ("echo '[\"s3cret\"]'", Unreachable, "no credential in the form"),
        ("printf 's3cret\\377'", Unreachable, "no credential in the form"),
        ("yes s3cret", Unreachable, "wrote more than any credential has"),
        ("kill -9 $$", Unreachable, "ended with exit code -9"),
        ("echo no credentials server URL; exit 1", UsageError, "takes 'r.example:5000' for no registry"),
        ("echo no credentials username; exit 1", UsageError, "has no user name"),
    ],
)
async def test_a_helper_that_fails_is_an_error_that_quotes_nothing(
    helpers: Helpers,
    bin: Path,
    caplog: pytest.LogCaptureFixture,
    program: str,
    kind: type[FsmountError],
    message: str,
) -> None:
    install_program(bin, "sh", f"#!/bin/sh\n{program}\n")
    with caplog.at_level(logging.DEBUG), pytest.raises(kind) as caught:
        await helpers.get("sh", HOST)
    told = "".join(traceback.format_exception(caught.value))
    assert "docker-credential-sh" in str(caught.value)
    assert message in str(caught.value)
    assert "s3cret" not in told + caplog.text


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("missing", "docker-credential-missing is not installed"),
        ("../sh", "is no credential helper"),
        ("a b", "is no credential helper"),
        ("", "is no credential helper"),
        ("broken", "cannot be run: Exec format error"),
    ],
)
async def test_a_helper_that_cannot_be_run_is_a_mistake_of_the_user(
    helpers: Helpers, bin: Path, suffix: str, message: str
) -> None:
    install_program(bin, "broken", "\0no program\n")
    assert helpers.is_installed(suffix) == (suffix == "broken")
    with pytest.raises(UsageError, match=message):
        await helpers.get(suffix, HOST)


@pytest.mark.parametrize("ending", ["the deadline", "a cancellation"])
async def test_a_helper_that_takes_too_long_or_is_not_waited_for_is_killed(
    helpers: Helpers, bin: Path, tmp_path: Path, mock_clock: MockClock, ending: str
) -> None:
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    # The FIFO is open for writing for as long as this process, which is the helper itself, lives.
    install_program(bin, "slow", f"#!/bin/sh\ntrap '' TERM\nexec >{alive}\necho up\nexec sleep 1000\n")
    expired = False

    async def get(scope: trio.CancelScope) -> None:
        nonlocal expired
        with scope:
            try:
                await helpers.get("slow", HOST)
            except DeadlineExpired as error:
                expired = "took more than 30 s" in error.message

    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(get, scope)
        async with await trio.open_file(alive, "rb", buffering=0) as pipe:
            assert await pipe.read(3) == b"up\n"
            if ending == "the deadline":
                mock_clock.jump(30)
            else:
                scope.cancel()
            assert await pipe.read(1) == b""
    assert expired == (ending == "the deadline")


async def test_an_answer_is_kept_for_an_hour_unless_asked_afresh(
    helpers: Helpers, helper: FakeHelper, mock_clock: MockClock
) -> None:
    await helpers.get("fake", HOST)
    helper.put({HOST: ("me", "second")})
    mock_clock.jump(3599)
    assert await helpers.get("fake", HOST) == Password("me", "s3cret")
    mock_clock.jump(2)
    assert await helpers.get("fake", HOST) == Password("me", "second")
    helper.put({HOST: ("me", "third")})
    assert await helpers.get("fake", HOST, fresh=True) == Password("me", "third")
    assert await helpers.get("fake", HOST) == Password("me", "third")
    assert helper.asked == [f"get {HOST}"] * 3


async def test_that_there_is_nothing_is_kept_too(
    helpers: Helpers, helper: FakeHelper, mock_clock: MockClock
) -> None:
    for fresh in (False, False, True):
        assert await helpers.get("fake", "other.example", fresh=fresh) is None
    assert len(helper.runs) == 2


async def test_after_a_failure_nobody_asks_for_five_seconds(
    helpers: Helpers, bin: Path, mock_clock: MockClock
) -> None:
    program = install_program(bin, "fake", "#!/bin/sh\nexit 1\n")
    with pytest.raises(Unreachable):
        await helpers.get("fake", HOST)
    program.unlink()
    FakeHelper.install(bin, "fake", {HOST: ("me", "s3cret")})
    for fresh in (False, True):
        with pytest.raises(Unreachable):
            await helpers.get("fake", HOST, fresh=fresh)
    mock_clock.jump(5.1)
    assert await helpers.get("fake", HOST) == Password("me", "s3cret")


@pytest.fixture
def gated(bin: Path, tmp_path: Path) -> Callable[[], int]:
    """A helper `gated` that counts its runs, and ends when its gate is opened; the function tells the count."""
    os.mkfifo(tmp_path / "gate")
    answer = '{"Username": "me", "Secret": "s3cret"}'
    log = tmp_path / "runs"
    log.touch()
    install_program(
        bin, "gated", f"#!/bin/sh\necho run >>{log}\nread -r _ <{tmp_path}/gate\necho '{answer}'\n"
    )
    return lambda: len(log.read_text().splitlines())


async def open_gate(tmp_path: Path) -> None:
    """Let one helper go on, waiting until it is there."""
    async with await trio.open_file(tmp_path / "gate", "w") as gate:
        await gate.write("\n")


@pytest.mark.parametrize("fresh", [False, True])
async def test_many_who_ask_at_once_share_one_run(
    helpers: Helpers, gated: Callable[[], int], tmp_path: Path, mock_clock: MockClock, fresh: bool
) -> None:
    found: list[Credential | None] = []

    async def get() -> None:
        found.append(await helpers.get("gated", HOST, fresh=fresh))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(get)
        await wait_all_tasks_blocked()
        await open_gate(tmp_path)
    assert found == [Password("me", "s3cret")] * 5
    assert gated() == 1


async def test_when_the_one_who_asks_is_cancelled_another_takes_over(
    helpers: Helpers, gated: Callable[[], int], tmp_path: Path, mock_clock: MockClock
) -> None:
    found: list[Credential | None] = []

    async def get(scope: trio.CancelScope) -> None:
        with scope:
            found.append(await helpers.get("gated", HOST))

    async with trio.open_nursery() as nursery:
        first = trio.CancelScope()
        nursery.start_soon(get, first)
        while gated() < 1:
            await trio.lowlevel.checkpoint()
        nursery.start_soon(get, trio.CancelScope())
        await wait_all_tasks_blocked()
        assert gated() == 1
        first.cancel()
        while gated() < 2:
            await trio.lowlevel.checkpoint()
        await open_gate(tmp_path)
    assert found == [Password("me", "s3cret")]


async def test_a_helper_has_a_path_and_a_home_even_where_a_service_has_none(
    monkeypatch: pytest.MonkeyPatch, bin: Path, tmp_path: Path, helper: FakeHelper
) -> None:
    monkeypatch.setattr(module, "_USUAL_PATH", str(bin))
    await Helpers({"PATH": "", "AWS_PROFILE": "ci"}, home=tmp_path).get("fake", HOST)
    await Helpers({"HOME": "/own"}, home=tmp_path).get("fake", HOST)
    await Helpers({}, home=None).get("fake", HOST)
    environs = [run["environ"] for run in helper.runs]
    assert [environ["PATH"] for environ in environs] == [str(bin)] * 3
    assert [environ.get("HOME") for environ in environs] == [str(tmp_path), "/own", None]
    assert environs[0]["AWS_PROFILE"] == "ci"
