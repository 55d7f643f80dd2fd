"""Of two policies the one that allows less holds."""

from itertools import product

import pytest

from fsmount.policy import Indexes

#: From the one that allows everything.
ASCENDING = [Indexes.ANY, Indexes.BOUND, Indexes.OFF]


def test_no_policy_for_indexes_is_forgotten_here() -> None:
    assert set(ASCENDING) == set(Indexes)


@pytest.mark.parametrize("one, other", list(product(ASCENDING, repeat=2)))
def test_the_strictest_of_two_policies_is_the_one_that_allows_less(one: Indexes, other: Indexes) -> None:
    assert one.strictest(other) is ASCENDING[max(ASCENDING.index(one), ASCENDING.index(other))]
