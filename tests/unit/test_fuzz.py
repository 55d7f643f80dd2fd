"""What scripts/fuzz begins with is good, and what it once found stays found."""

from pathlib import Path

import pytest

from tests.fuzz.run import FOUND
from tests.fuzz.targets import TARGETS, seeds


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_accepts_what_others_are_made_from(target: str) -> None:
    assert [TARGETS[target](data) for data in seeds(target)] == [True] * len(seeds(target))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("path", sorted(FOUND.iterdir()), ids=lambda path: path.name)
def test_what_once_broke_a_target_does_so_no_more(path: Path) -> None:
    TARGETS[path.name.partition("-")[0]](path.read_bytes())
