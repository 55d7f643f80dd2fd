"""What is said of the disk of a cache: real folders and file systems, and the figures of others."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fsmount.config import Cache
from fsmount.doctor import disk, finding
from fsmount.doctor.disk import _Disk, judge
from fsmount.doctor.finding import Verdict

GB = 10**9
OK, WARNING, PROBLEM = Verdict


def cache(path: Path, size: int = 10**6, min_free: int = 0) -> Cache:
    return Cache(path=path, size=size, min_free=min_free)


@dataclass(frozen=True)
class Case:
    disk: _Disk
    verdicts: list[Verdict]
    words: str = ""


@pytest.mark.parametrize(
    "case",
    [
        Case(_Disk("ext2/ext3", 100 * GB, 50 * GB, 10**6, 10**6), []),
        Case(_Disk("btrfs", 100 * GB, 50 * GB, 0, 0), []),
        Case(_Disk("nfs", 100 * GB, 50 * GB, 0, 0), [WARNING], "network file system (nfs)"),
        Case(_Disk("tmpfs", 100 * GB, 50 * GB, 10**6, 10**6), [WARNING], "in memory"),
        Case(_Disk("xfs", 100 * GB, 2 * GB, 10**6, 10**6), [PROBLEM], "has 2.0 GB left"),
        Case(_Disk("xfs", 15 * GB, 10 * GB, 10**6, 10**6), [WARNING], "as large as cache.size, 20.0 GB"),
        Case(_Disk("xfs", 100 * GB, 50 * GB, 10**6, 9), [WARNING], "only 9 more files"),
        Case(_Disk("tmpfs", 1 * GB, 1 * GB, 10**6, 10**6), [WARNING, PROBLEM], "left"),
    ],
    ids=lambda case: f"{case.disk.kind}-{case.words}",
)
def test_a_disk_is_to_be_local_lasting_and_large_enough(case: Case) -> None:
    found = list(judge(cache(Path("/cache"), 20 * GB, 2 * GB), case.disk))
    assert [one.verdict for one in found] == case.verdicts
    assert all(one.remedy for one in found)
    assert case.words in " ".join(one.message for one in found)


def test_a_good_folder_is_good_whether_it_is_there_yet_or_not(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    for path in (tmp_path / "cache", tmp_path / "cache/not/yet"):
        (found,) = disk.check(cache(path))
        assert found.verdict is OK and str(path) in found.message
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_others_may_enter_is_a_warning(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (found,) = disk.check(cache(tmp_path))
    assert (found.verdict, found.remedy) == (WARNING, f"chmod 0700 {tmp_path}")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make another user's folder")
def test_another_user_s_folder_is_a_problem(tmp_path: Path) -> None:
    os.chown(tmp_path, 4711, 4711)
    (found,) = disk.check(cache(tmp_path))
    assert found.verdict is PROBLEM and "belongs to user 4711" in found.message


def test_what_is_no_folder_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = disk.check(cache(tmp_path / "file"))
    assert found.verdict is PROBLEM and "no folder" in found.message
    (found,) = disk.check(cache(tmp_path / "file/below"))
    assert found.verdict is PROBLEM and "Not a directory" in found.message


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
@pytest.mark.parametrize(
    "option, verdict, words", [("rw", WARNING, "in memory (tmpfs)"), ("ro", PROBLEM, "cannot write")]
)
def test_a_cache_in_memory_or_read_only_is_found_by_what_is_mounted_there(
    tmp_path: Path, option: str, verdict: Verdict, words: str
) -> None:
    tmp_path.chmod(0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=100M,mode=700,{option}", "x", tmp_path], check=True)
    try:
        (found,) = disk.check(cache(tmp_path / "cache"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert found.verdict is verdict and words in found.message


@pytest.fixture
def deaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk that does not answer: `stat` does not end."""
    (tmp_path / "stat").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "stat").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(finding, "_CHILD_SECONDS", 0.2)
    return


@pytest.mark.usefixtures("deaf")
def test_a_disk_that_does_not_answer_is_a_problem_and_is_not_waited_for(tmp_path: Path) -> None:
    (found,) = disk.check(cache(tmp_path / "cache"))
    assert found.verdict is PROBLEM and "does not answer" in found.message


def test_without_its_tool_a_disk_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    (found,) = disk.check(cache(tmp_path))
    assert found.verdict is PROBLEM and "cannot be looked at" in found.message
