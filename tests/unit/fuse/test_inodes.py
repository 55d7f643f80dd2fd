"""An inode number says what it names, and says it to every process."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsmount.catalog import VIEW_ROOT
from fsmount.fuse.inodes import (
    ROOT,
    Content,
    Directory,
    Folder,
    content_inode,
    directory_inode,
    folder_inode,
    parse_inode,
)
from fsmount.image import MOST_LAYERS

_PLACES = st.one_of(
    st.builds(Folder, st.integers(1, 2**40)),
    st.builds(Content, st.integers(1, 2**29 - 1), st.integers(0, 2**32 - 1)),
    st.builds(Directory, st.integers(1, 2**20 - 1), st.integers(0, VIEW_ROOT)),
)


def _inode(place: Folder | Content | Directory) -> int:
    match place:
        case Folder(number):
            return folder_inode(number)
        case Content(layer, member):
            return content_inode(layer, member)
        case Directory(view, directory):
            return directory_inode(view, directory)


@given(_PLACES)
def test_an_inode_number_says_what_it_names(place: Folder | Content | Directory) -> None:
    assert parse_inode(_inode(place)) == place
    assert type(parse_inode(_inode(place))) is type(place)


@given(_PLACES)
def test_an_inode_number_is_one_that_programs_can_hold_and_not_the_root_s(
    place: Folder | Content | Directory,
) -> None:
    assert ROOT < _inode(place) < 2**63


@given(_PLACES, _PLACES)
def test_different_things_have_different_inode_numbers(
    one: Folder | Content | Directory, other: Folder | Content | Directory
) -> None:
    same = type(one) is type(other) and one == other
    assert (_inode(one) == _inode(other)) == same


@pytest.mark.parametrize(
    ("place", "inode"),
    [
        (Folder(0), 1),
        (Folder(1), 2),
        (Content(1, 2), 0x2000000100000002),
        (Directory(1, 2), 0x4000020000000002),
        (Directory(1, VIEW_ROOT), 0x400003FFFFFFFFFF),
    ],
)
def test_the_numbers_do_not_change_from_version_to_version(
    place: Folder | Content | Directory, inode: int
) -> None:
    assert parse_inode(inode) == place
    assert place == Folder(0) or _inode(place) == inode


def test_the_root_of_a_view_is_no_directory_of_any_image() -> None:
    assert directory_inode(7) == directory_inode(7, VIEW_ROOT)
    topmost = MOST_LAYERS - 1
    assert (topmost << 32 | 2**32 - 1) < VIEW_ROOT


def test_after_a_million_views_there_are_no_numbers_left() -> None:
    assert parse_inode(directory_inode(2**20 - 1, 5)) == Directory(2**20 - 1, 5)
    with pytest.raises(OverflowError, match="new cache folder"):
        directory_inode(2**20)
