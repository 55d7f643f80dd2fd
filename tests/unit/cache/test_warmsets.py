"""WarmSets: what each app was seen to read, until three recordings in a row have missed it."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from fsmount.cache.numbers import Numbers
from fsmount.cache.warmsets import WarmSets
from fsmount.errors import FsmountError
from fsmount.oci.digest import Digest

ONE, TWO = Digest.of(b"1"), Digest.of(b"2")
WEB = ("web", "registry.example/web linux/amd64 /")
#: The same name, from elsewhere.
MOVED = ("web", "registry.example/moved linux/amd64 /")
#: A path need not be UTF-8.
ODD = b"lib/\xff\xfe"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite"


@pytest.fixture
def sets(path: Path) -> Iterator[WarmSets]:
    with closing(WarmSets(path)) as sets:
        yield sets


@pytest.fixture
def other(path: Path, sets: WarmSets) -> Iterator[WarmSets]:
    """Another process."""
    with closing(WarmSets(path)) as other:
        yield other


def test_what_was_read_is_kept_for_every_process_and_by_app_and_origin(
    path: Path, sets: WarmSets, other: WarmSets
) -> None:
    assert sets.paths(*WEB) == {}
    sets.save(*WEB, {b"bin/web": (1, 5), ODD: (2, 6)})
    other.save(*WEB, {b"bin/web": (3, 7)})
    other.save(*MOVED, {b"elsewhere": (1, 1)})
    assert sets.paths(*WEB) == {b"bin/web": (3, 7), ODD: (2, 6)}
    assert sets.paths(*MOVED) == {b"elsewhere": (1, 1)}
    with closing(WarmSets(path)) as later, closing(Numbers(path)) as numbers:
        assert later.paths(*WEB) == other.paths(*WEB)
        assert numbers.layer("a")  # they live in one file


def test_a_path_is_forgotten_when_three_recordings_in_a_row_have_missed_it(sets: WarmSets) -> None:
    read = {b"always": (1, 1)}
    sets.save(*WEB, read | {b"once": (1, 2), b"again": (1, 3)})
    for _ in range(2):
        sets.save(*WEB, read, missed=[b"once", b"again"])
    assert set(sets.paths(*WEB)) == {b"always", b"once", b"again"}
    sets.save(*WEB, read | {b"again": (1, 3)}, missed=[b"once"])
    assert set(sets.paths(*WEB)) == {b"always", b"again"}
    for _ in range(2):
        sets.save(*WEB, read, missed=[b"again"])
    assert b"again" in sets.paths(*WEB), "it was read in between"
    sets.save(*WEB, read, missed=[b"again"])
    assert set(sets.paths(*WEB)) == {b"always"}


def test_missing_the_path_of_one_app_costs_no_other_app_its(sets: WarmSets) -> None:
    for app in (WEB, MOVED):
        sets.save(*app, {b"bin": (1, 1)})
    for _ in range(3):
        sets.save(*WEB, {}, missed=[b"bin", b"unknown"])
    assert sets.paths(*WEB) == {}
    assert sets.paths(*MOVED) == {b"bin": (1, 1)}


def test_of_more_paths_than_are_kept_those_go_that_were_missed_and_then_the_oldest(
    sets: WarmSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsmount.cache.warmsets.MOST_PATHS", 4)
    sets.save(*WEB, {b"missed": (1, 1), b"old": (1, 2)})
    sets.save(*WEB, {b"newer": (1, 3), b"newest": (1, 4)}, missed=[b"missed"])
    sets.save(*WEB, {b"a": (1, 5)})
    assert set(sets.paths(*WEB)) == {b"old", b"newer", b"newest", b"a"}
    sets.save(*WEB, {b"b": (1, 6)})
    assert set(sets.paths(*WEB)) == {b"newer", b"newest", b"a", b"b"}
    sets.save(*WEB, {b"%d" % number: (2, number) for number in range(6)})
    assert set(sets.paths(*WEB)) == {b"0", b"1", b"2", b"3"}


def test_only_a_whole_recording_counts_as_one(sets: WarmSets, other: WarmSets) -> None:
    sets.save(*WEB, {b"bin": (1, 1)})
    assert not sets.is_recorded(*WEB, ONE)
    for _ in range(2):
        sets.save(*WEB, {b"bin": (1, 1)}, digest=ONE)
    assert other.is_recorded(*WEB, ONE)
    assert not other.is_recorded(*WEB, TWO)
    assert not other.is_recorded(*MOVED, ONE)


def test_what_fails_leaves_all_as_it_was(path: Path, sets: WarmSets) -> None:
    sets.save(*WEB, {b"bin": (1, 1)})

    def broken() -> Iterator[bytes]:
        yield b"bin"
        raise ValueError("what is missed cannot be told")

    for _ in range(3):
        with pytest.raises(ValueError):
            sets.save(*WEB, {b"new": (1, 2)}, missed=broken(), digest=ONE)
    sets.save(*WEB, {})
    assert sets.paths(*WEB) == {b"bin": (1, 1)}
    assert not sets.is_recorded(*WEB, ONE)


def test_it_may_be_closed_while_another_thread_uses_it(path: Path, sets: WarmSets) -> None:
    sets.save(*WEB, {b"%d" % number: (1, number) for number in range(300)})

    def use(other: WarmSets, go: threading.Event) -> None:
        go.set()
        with suppress(FsmountError):  # it may be too late
            for _ in range(100):
                assert len(other.paths(*WEB)) == 300

    for _ in range(50):
        other, go = WarmSets(path), threading.Event()
        thread = threading.Thread(target=use, args=(other, go))
        thread.start()
        go.wait()
        other.close()
        thread.join()


def test_a_damaged_file_is_an_error_that_names_it_and_then_begins_anew(path: Path) -> None:
    with closing(WarmSets(path)) as sets:
        sets.save(*WEB, {b"%d" % number: (1, number) for number in range(3000)})
    data = bytearray(path.read_bytes())
    data[16384:] = b"no database" * ((len(data) - 16384) // 11 + 1)
    path.write_bytes(data)
    with closing(WarmSets(path)) as sets, pytest.raises(FsmountError, match=str(path)) as caught:
        sets.paths(*WEB)
    assert caught.value.remedy is not None
    assert isinstance(caught.value.__cause__, sqlite3.Error)
    with closing(WarmSets(path)) as sets:
        assert sets.paths(*WEB) == {}
