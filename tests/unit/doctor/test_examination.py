"""The checks side by side: each has its deadline, and none ends the others; what is mounted where is not touched."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import sleep

import pytest
import trio
from trio.testing import MockClock

from fsmount import __version__, control
from fsmount.configfile import load_config
from fsmount.doctor import Finding, Verdict, examination, examine, machine, mounting
from fsmount.doctor.finding import Check, in_thread
from fsmount.errors import NotRunning, Unreachable, UsageError
from fsmount.fuse import mounts

OK, WARNING, PROBLEM = Verdict


async def _good() -> Sequence[Finding]:
    return [Finding.ok("good", "it is")]


async def _raise(error: Exception) -> Sequence[Finding]:
    raise error


async def _for_ever() -> Sequence[Finding]:
    await trio.sleep_forever()
    raise AssertionError


async def test_what_a_check_raises_or_does_not_end_is_a_problem_and_the_others_go_on(
    autojump_clock: MockClock,
) -> None:
    hangs = trio.Event()
    checks = [
        Check("silent", "one.example", _for_ever),
        Check("away", "two.example", partial(_raise, Unreachable("it is away", remedy="Wait."))),
        Check("odd", None, partial(_raise, PermissionError(13, "Permission denied"))),
        Check("good", None, _good),
    ]
    began = trio.current_time()
    silent, away, odd, good = await examination._run(checks)
    assert not hangs.is_set() and trio.current_time() - began == 5
    assert silent == Finding(
        "silent", "one.example", PROBLEM, "the check of one.example did not end within 5 s", silent.remedy
    )
    assert silent.remedy
    assert away == Finding("away", "two.example", PROBLEM, "it is away", "Wait.")
    assert odd.verdict is PROBLEM and "Permission denied" in odd.message
    assert good == Finding("good", None, OK, "it is")


async def test_a_thread_that_hangs_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "_SECONDS", 0.05)
    let_go: list[bool] = []

    def hang() -> Sequence[Finding]:
        while not let_go:
            sleep(0.01)
        return []

    (found,) = await examination._run([in_thread("disk", hang)])
    let_go.append(True)
    assert found.verdict is PROBLEM and "did not end" in found.message


@pytest.fixture
def no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of the machine that the tests run on."""
    monkeypatch.setattr(machine, "checks", lambda: [])


@pytest.mark.usefixtures("no_machine")
async def test_a_configuration_with_mistakes_is_told_whole_and_the_mount_is_looked_at_even_so(
    tmp_path: Path,
) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[cache]\nsize = "many"\n[apps.web]\nrepositroy = "x"\n')
    with pytest.raises(UsageError) as raised:
        load_config(file, environ={})
    configuration, mount = await examine(raised.value, tmp_path)
    assert configuration.verdict is PROBLEM and "3 problems" in configuration.message
    assert ":2: " in configuration.message and ":4: " in configuration.message
    assert mount.check == "mount"
    assert [one.check for one in await examine(raised.value, None)] == ["configuration"]


@pytest.mark.usefixtures("no_machine")
async def test_a_configuration_without_apps_is_a_warning(tmp_path: Path) -> None:
    config = load_config(Path("/dev/null"), cache=tmp_path / "cache", environ={})
    found = await examine(config, tmp_path)
    assert [(one.check, one.verdict) for one in found] == [
        ("configuration", WARNING),
        ("mount", WARNING),
        ("cache", OK),
    ]
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("no_machine")
async def test_a_proxy_that_is_none_is_a_problem_and_its_password_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:s3/cret@proxy:3128")
    config = load_config(Path("/dev/null"), cache=tmp_path, apps={"web": "registry.example/web"}, environ={})
    found = {one.check: one for one in await examine(config, tmp_path)}
    assert found["proxy"].verdict is PROBLEM and "HTTPS_PROXY" in found["proxy"].message
    assert "cache" in found
    assert "cret" not in repr(found)


# -------------------- the mount


@pytest.mark.parametrize(
    "state, version, verdict",
    [
        ("serving", __version__, OK),
        ("serving", "0.0.1", WARNING),
        ("degraded", __version__, WARNING),
        ("cache-only", __version__, WARNING),
        ("refusing", __version__, PROBLEM),
    ],
)
def test_a_mount_is_as_good_as_it_says(state: str, version: str, verdict: Verdict) -> None:
    found = mounting.judge(Path("/mnt"), state, "it is so", version)
    assert found.verdict is verdict and "/mnt: it is so" in found.message
    assert (found.remedy is None) == (verdict is OK)


async def test_where_nothing_is_mounted_the_place_is_looked_at(tmp_path: Path) -> None:
    (found,) = await mounting.check(tmp_path)
    assert (found.verdict, found.remedy) == (WARNING, f"fsmount mount {tmp_path}")
    (found,) = await mounting.check(tmp_path / "absent")
    assert (found.verdict, found.remedy) == (PROBLEM, f"Make it: mkdir -p {tmp_path}/absent")
    (tmp_path / "file").write_text("")
    (found,) = await mounting.check(tmp_path / "file")
    assert found.verdict is PROBLEM and "no directory" in found.message


async def test_another_file_system_is_in_the_way() -> None:
    (found,) = await mounting.check(Path("/proc"))
    assert found.verdict is PROBLEM and "of type proc" in found.message


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mount point at which the kernel has a mount of ours, which nobody may touch."""
    place = Path("/nowhere/mnt")
    options = frozenset({f"user_id={os.geteuid()}"})
    mount = mounts.Mount(1, 0, "0:99", place, options, mounts.FSTYPE, "fsmount")
    monkeypatch.setattr(mounts, "find", lambda path: mount)
    return place


def answering(monkeypatch: pytest.MonkeyPatch, said: bytes | Exception | None) -> None:
    """Has the mount's process say that; None: nothing."""

    async def ask(mount: mounts.Mount, path: str) -> bytes:
        if said is None:
            await trio.sleep_forever()
        if isinstance(said, Exception):
            raise said
        assert isinstance(said, bytes)
        return said

    monkeypatch.setattr(control, "ask", ask)


async def test_its_process_says_how_a_mount_is(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = {"state": "serving", "summary": "serving 3 apps", "fsmount": __version__}
    answering(monkeypatch, json.dumps(status).encode())
    assert await mounting.check(ours) == [Finding.ok("mount", "/nowhere/mnt: serving 3 apps")]
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    one, other = await mounting.check(ours)
    assert one.verdict is OK and other.verdict is WARNING
    assert "as user 4711" in other.message


@pytest.mark.parametrize(
    "said, words",
    [
        (NotRunning("nobody answers", remedy="Mount it."), "nobody answers"),
        (b"<html>", "is not fsmount"),
        (b"[]", "is not fsmount"),
        (b"{}", "is not fsmount"),
        (None, "has not answered within 4 s"),
    ],
)
async def test_a_process_that_is_dead_hangs_or_is_another_is_a_problem(
    ours: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
    said: bytes | Exception | None,
    words: str,
) -> None:
    # The thread that reads mountinfo is not seen by the clock.
    autojump_clock.autojump_threshold = 0.2
    answering(monkeypatch, said)
    (found,) = await mounting.check(ours)
    assert found.verdict is PROBLEM and words in found.message
