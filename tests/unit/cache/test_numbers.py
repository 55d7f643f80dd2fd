"""Numbers: the same for the same name in every process and after every restart, and never given twice."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fsmount.cache.listings import Listing
from fsmount.cache.numbers import Numbers, Origin, Root, ViewRecord
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


def test_a_layer_that_gets_another_number_never_gets_an_old_one_back(path: Path) -> None:
    given = []
    for _ in range(3):  # of several processes; the highest number is the one that SQLite would give again
        with closing(Numbers(path)) as numbers:
            given.append(numbers.layer("a"))
            given.append(numbers.renew_layer("a"))
            assert numbers.layer("a") == given[-1]
            assert numbers.layer_key(given[-1]) == "a"
            assert numbers.layer_key(given[-2]) is None
    assert sorted(set(given)) == [1, 2, 3, 4]


def test_the_views_of_a_layer_are_found_by_its_number_the_latest_first(
    path: Path, numbers: Numbers, other: Numbers
) -> None:
    one, two = numbers.layer("a"), numbers.layer("b")
    views = [numbers.new_view("web", name, "origin", ONE) for name in ("v1", "v2", "v3")]
    for _ in range(2):
        numbers.note_shown(views[0].number, [one, two])
    other.note_shown(views[1].number, [one])
    assert numbers.views_of(one) == [views[1], views[0]]
    assert other.views_of(two) == [views[0]]
    assert numbers.views_of(99) == []
    again = numbers.renew_layer("a")
    assert (numbers.views_of(one), other.views_of(again)) == ([], [views[1], views[0]])


def test_by_what_a_layer_s_members_are_numbered_belongs_to_the_number(
    numbers: Numbers, other: Numbers
) -> None:
    number = numbers.layer("a")
    assert numbers.numbering(number) is numbers.numbering(99) is None
    numbers.keep_numbering(number, "streamed")
    assert other.numbering(number) == "streamed"
    assert numbers.numbering(numbers.renew_layer("a")) is None


def test_what_was_shown_unverified_is_known_by_mount_until_it_is_forgotten(
    numbers: Numbers, other: Numbers
) -> None:
    one, two, three = (numbers.layer(key) for key in "abc")
    for mount, layer in (("/srv", one), ("/srv", two), ("/srv", one), ("/mnt", one), ("/mnt", three)):
        numbers.note_unverified(mount, layer)
    assert (other.unverified("/srv"), other.unverified("/mnt")) == ({one, two}, {one, three})
    other.forget_unverified("/srv", one)
    assert (numbers.unverified("/srv"), numbers.unverified("/mnt")) == ({two}, {one, three})
    numbers.renew_layer("a")
    assert other.unverified("/mnt") == {three}
    other.forget_unverified("/mnt")
    assert (numbers.unverified("/srv"), numbers.unverified("/mnt")) == ({two}, set())


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


def test_of_every_name_the_latest_view_is_found_if_it_is_bound(numbers: Numbers) -> None:
    numbers.new_view(*VIEW, ONE)
    latest = numbers.new_view(*VIEW, TWO)
    gone = ("web", "gone", VIEW[2])
    numbers.new_view(*gone, ONE)
    numbers.new_view(*gone, None)
    other = numbers.new_view("web", "v2", VIEW[2], ONE)
    for elsewhere in (("blog", "v1", VIEW[2]), ("web", "v1", "registry.example/elsewhere")):
        numbers.new_view(*elsewhere, ONE)
    assert numbers.bound_views("web", VIEW[2]) == [latest, other]
    assert numbers.bound_views("nothing", VIEW[2]) == []


def test_what_the_folder_of_a_view_is_like_is_kept_with_the_view(numbers: Numbers, other: Numbers) -> None:
    view = numbers.new_view(*VIEW, ONE)
    assert view.root is None
    root = Root(0o750, 1, 2, 10**18)
    kept = numbers.keep_root(view, root)
    assert kept.root == root
    assert other.view(view.number) == other.latest_view(*VIEW) == kept
    assert other.bound_views(VIEW[0], VIEW[2]) == [kept]


@pytest.mark.parametrize("subtree", [(), (b"dist",), (b"a b", b"\xff", b" linux/amd64 ")])
def test_what_an_origin_stands_for_is_known_when_nobody_has_it_any_more(
    numbers: Numbers, other: Numbers, subtree: tuple[bytes, ...]
) -> None:
    origin = Origin("registry.example/web", "linux/amd64", subtree)
    assert numbers.origin("one") is None
    for _ in range(2):
        numbers.keep_origin("one", origin)
    assert other.origin("one") == origin


def test_what_a_folder_has_listed_is_known_to_the_next_process(numbers: Numbers, other: Numbers) -> None:
    listing = Listing(frozenset({"v1", "main", "é"}), frozenset({"v1"}), 10**18)
    assert numbers.listings.load("web", "origin") is None
    numbers.listings.save("web", listing, "origin")
    assert other.listings.load("web", "origin") == listing
    assert other.listings.load("web") is other.listings.load("web", "elsewhere") is None
    empty = Listing(frozenset(), frozenset(), 10**18 + 1)
    other.listings.save("web", empty, "origin")
    assert numbers.listings.load("web", "origin") == empty


def test_numbers_that_begin_anew_have_another_identity(path: Path, numbers: Numbers, other: Numbers) -> None:
    assert numbers.identity == other.identity
    assert numbers.began_ns == other.began_ns
    with closing(Numbers(path.with_name("new.sqlite"))) as new:
        assert new.identity != numbers.identity
        assert abs(new.began_ns - time.time_ns()) < 10**10


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(FsmountError, match="missing"):
        Numbers(tmp_path / "missing" / "state.sqlite")
