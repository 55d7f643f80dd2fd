"""What is said of a machine, made of files in a folder."""

import os
import resource
from collections.abc import Sequence
from pathlib import Path

import pytest

from fsmount.doctor import machine
from fsmount.doctor.finding import Finding, Verdict

OK, WARNING, PROBLEM = Verdict


def write(path: Path, text: str = "", mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def verdicts(found: Sequence[Finding]) -> dict[str, Verdict]:
    return {finding.check: finding.verdict for finding in found}


@pytest.mark.parametrize(
    "release, verdict",
    [
        ("6.9.0", OK),
        ("6.18.44-fc-v657", OK),
        ("7.0", OK),
        ("6.1.0-28-amd64", WARNING),
        ("5.15.0", WARNING),
        ("odd", WARNING),
    ],
)
def test_a_kernel_before_6_9_is_a_warning_that_says_what_it_costs(release: str, verdict: Verdict) -> None:
    found = machine.kernel(release)
    assert found.verdict is verdict and release in found.message
    assert ("mounted anew" in found.message) == (verdict is WARNING)


def test_without_the_device_nothing_can_be_mounted(tmp_path: Path) -> None:
    found = list(machine.fuse(tmp_path, 0, search=""))
    assert verdicts(found) == {"fuse": PROBLEM, "fusermount3": WARNING}
    assert "modprobe fuse" in (found[0].remedy or "")
    write(tmp_path / "dev/fuse")
    assert verdicts(list(machine.fuse(tmp_path, 0, search=""))) == {"fuse": OK, "fusermount3": WARNING}


def test_an_ordinary_user_needs_a_fusermount3_that_is_setuid(tmp_path: Path) -> None:
    write(tmp_path / "dev/fuse")
    for mode, verdict in ((None, PROBLEM), (0o755, PROBLEM), (0o4755, OK)):
        if mode is not None:
            write(tmp_path / "bin/fusermount3", mode=mode)
        found = list(machine.fuse(tmp_path, 1000, search=str(tmp_path / "bin")))
        assert verdicts(found)["fusermount3"] is verdict
        assert (found[1].remedy is None) == (verdict is OK)
    write(tmp_path / "bin/fusermount3", mode=0o755)
    assert verdicts(list(machine.fuse(tmp_path, 0, search=str(tmp_path / "bin"))))["fusermount3"] is OK


@pytest.mark.parametrize("capabilities, verdict", [("000001ffffffffff", OK), ("00000000a80425fb", PROBLEM)])
def test_root_in_a_container_may_lack_the_right_to_mount(
    tmp_path: Path, capabilities: str, verdict: Verdict
) -> None:
    write(tmp_path / "proc/self/status", f"Name:\tx\nCapPrm:\t0\nCapEff:\t{capabilities}\nCapBnd:\t0\n")
    assert machine.rights(tmp_path, 0).verdict is verdict


@pytest.mark.parametrize(
    "conf, verdict",
    [
        (None, WARNING),
        ("#user_allow_other\n", WARNING),
        ("# x\n  user_allow_other  \n", OK),
        ("user_allow_other yes\n", WARNING),
    ],
)
def test_whether_others_see_an_ordinary_user_s_mount_is_said_in_fuse_conf(
    tmp_path: Path, conf: str | None, verdict: Verdict
) -> None:
    if conf is not None:
        write(tmp_path / "etc/fuse.conf", conf)
    assert machine.rights(tmp_path, 1000).verdict is verdict


@pytest.mark.parametrize(
    "hard, verdict", [(resource.RLIM_INFINITY, OK), (524288, OK), (4096, OK), (1024, WARNING)]
)
def test_few_descriptors_are_a_warning(hard: int, verdict: Verdict) -> None:
    assert machine.descriptors(hard).verdict is verdict


# -------------------- what starts it


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with systemd, whose systemctl says what is in the file `said`."""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    write(tmp_path / "bin/systemctl", f"#!/bin/sh\ncat {tmp_path}/said\n", 0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


def test_without_systemd_nothing_is_said_of_it(tmp_path: Path) -> None:
    assert machine.start(tmp_path) == []


@pytest.mark.parametrize(
    "said, verdict, word",
    [
        ("LoadState=loaded\nUnitFileState=enabled\nActiveState=active\n", OK, "enabled"),
        ("LoadState=loaded\nUnitFileState=enabled-runtime\nActiveState=inactive\n", OK, "inactive"),
        ("LoadState=loaded\nUnitFileState=disabled\nActiveState=active\n", WARNING, "does not start"),
        ("LoadState=loaded\nUnitFileState=enabled\nActiveState=failed\n", PROBLEM, "failed"),
        ("LoadState=not-found\nUnitFileState=\nActiveState=inactive\n", WARNING, "neither"),
        ("", WARNING, "neither"),
    ],
)
def test_the_unit_is_to_be_there_enabled_and_not_failed(
    systemd: Path, said: str, verdict: Verdict, word: str
) -> None:
    write(systemd / "said", said)
    (found,) = machine.start(systemd)
    assert found.verdict is verdict and word in found.message
    assert (found.remedy is None) == (verdict is OK)


def test_a_line_in_fstab_starts_it_too(systemd: Path) -> None:
    write(systemd / "said", "LoadState=not-found\n")
    write(systemd / "etc/fstab", "# a b fsmount x\n/dev/sda1 / ext4 defaults 0 1\n")
    assert machine.start(systemd)[0].verdict is WARNING
    write(systemd / "etc/fstab", "registry.example.com/team /srv/artifacts fsmount _netdev,nofail 0 0\n")
    assert machine.start(systemd)[0].verdict is OK


def test_a_systemctl_that_is_absent_or_fails_is_a_warning(
    systemd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = machine.start(systemd)  # its cat finds no file
    assert found.verdict is WARNING and "No such file" in found.message
    monkeypatch.setenv("PATH", "/nowhere")
    (found,) = machine.start(systemd)
    assert found.verdict is WARNING and "systemctl is not installed" in found.message
