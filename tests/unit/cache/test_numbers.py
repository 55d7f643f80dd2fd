"""Numbers: the same for the same name in every process and after every restart, and never given twice."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fsmount.cache.numbers import Numbers, ViewRecord
from fsmount.errors import FsmountError
from fsmount.oci.digest import Digest

ONE, TWO = Digest.of(b"1"), Digest.of(b"2")
VIEW = ("web", "v1", "registry.example/web")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite"


@pytest.fixture
def numbers(path: Path) -> Iterator[Numbers]:
    with closing(Numbers(path)) as numbers:
        yield numbers


@pytest.fixture
def other(path: Path, numbers: Numbers) -> Iterator[Numbers]:
    """Another process."""
    with closing(Numbers(path)) as other:
        yield other


def test_a_name_has_one_number_and_a_number_one_name(numbers: Numbers) -> None:
    layers = [numbers.layer(key) for key in ("a", "b", "a")]
    folders = [numbers.folder(name) for name in ("a", "b", "a")]
    for first, second, third in (layers, folders):
        assert first == third != second
        assert 0 not in (first, second)
    assert [numbers.layer_key(number) for number in layers[:2]] == ["a", "b"]
    assert [numbers.folder_path(number) for number in folders[:2]] == ["a", "b"]
    assert numbers.layer_key(99) is numbers.folder_path(99) is numbers.view(99) is None


def test_numbers_are_the_same_after_a_restart(path: Path) -> None:
    with closing(Numbers(path)) as numbers:
        layer, folder = numbers.layer("a"), numbers.folder("team")
        view = numbers.new_view(*VIEW, None)
        numbers.bind_view(view.number, ONE)
    with closing(Numbers(path)) as numbers:
        assert (numbers.layer("a"), numbers.folder("team")) == (layer, folder)
        assert numbers.layer_key(layer) == "a" and numbers.folder_path(folder) == "team"
        assert numbers.latest_view(*VIEW) == numbers.view(view.number) == ViewRecord(view.number, *VIEW, ONE)


def test_two_processes_give_the_same_numbers(numbers: Numbers, other: Numbers) -> None:
    for key in map(str, range(20)):
        first, second = (numbers, other) if int(key) % 3 else (other, numbers)
        assert first.layer(key) == second.layer(key)
        assert first.folder(key) == second.folder(key)
    assert len({numbers.layer(str(key)) for key in range(20)}) == 20
    views = [each.new_view(*VIEW, None).number for each in (numbers, other, numbers)]
    assert len(set(views)) == 3
    assert numbers.latest_view(*VIEW) == other.latest_view(*VIEW) == other.view(max(views))


def test_a_number_that_was_retired_is_never_given_again(path: Path) -> None:
    given = set()
    for _ in range(3):  # of several processes; the highest number is the one that SQLite would give again
        with closing(Numbers(path)) as numbers:
            given.add(numbers.layer("a"))
            numbers.retire_layer("a")
            given.add(number := numbers.layer("a"))
            numbers.retire_layer("a")
            assert numbers.layer_key(number) is None
    assert len(given) == 6


def test_the_latest_view_of_a_name_counts_and_older_ones_stay_what_they_are(numbers: Numbers) -> None:
    old = numbers.new_view(*VIEW, ONE)
    new = numbers.new_view(*VIEW, TWO)
    assert numbers.latest_view(*VIEW) == new
    assert numbers.view(old.number) == old
    for other in (("blog", *VIEW[1:]), (VIEW[0], "v2", VIEW[2]), (*VIEW[:2], "registry.example/elsewhere")):
        assert numbers.latest_view(*other) is None


def test_a_view_is_bound_once_by_whoever_comes_first(numbers: Numbers, other: Numbers) -> None:
    view = numbers.new_view(*VIEW, None)
    assert other.view(view.number) == view
    bound = ViewRecord(view.number, *VIEW, ONE)
    assert numbers.bind_view(view.number, ONE) == bound
    assert other.bind_view(view.number, TWO) == bound
    assert numbers.view(view.number) == bound


@pytest.mark.parametrize("content", [b"garbage" * 1000, b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_file_is_refused_with_the_way_out(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(FsmountError, match=r"(?s)state\.sqlite.*remove that file"):
        Numbers(path)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(FsmountError, match="missing"):
        Numbers(tmp_path / "missing" / "state.sqlite")
