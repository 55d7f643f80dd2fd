"""WWW-Authenticate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsmount.registry.challenge import BasicChallenge, BearerChallenge, Challenge, parse_challenges

BEARER = BearerChallenge("https://auth.example/token", "registry", ("repository:a/b:pull,push",))
LINE = 'Bearer realm="https://auth.example/token",service="registry",scope="repository:a/b:pull,push"'


@pytest.mark.parametrize(
    ("lines", "challenge"),
    [
        ([LINE], BEARER),
        ([LINE.replace("Bearer realm", "bEARER REALM").replace(",", " , ", 1)], BEARER),
        (['Basic realm="r"'], BasicChallenge()),
        (["Basic"], BasicChallenge()),
        (['Basic realm="r"', LINE], BEARER),
        (['Basic realm="a, Bearer b=c", ' + LINE], BEARER),
        ([LINE + ', Basic realm="r"'], BEARER),
        (["Negotiate", "Negotiate YWJj==, Basic realm=r"], BasicChallenge()),
        (["Negotiate", 'Digest realm="r", nonce="n"'], None),
        (
            ["Bearer realm=https://auth.example/token"],
            BearerChallenge("https://auth.example/token", None, ()),
        ),
        (['Bearer realm="a\\"b"'], BearerChallenge('a"b', None, ())),
        (['Bearer realm="a",realm="b"'], BearerChallenge("a", None, ())),
        (['Bearer service="no realm"'], None),
        (['Bearer realm="r",scope="a b"'], BearerChallenge("r", None, ("a", "b"))),
        (['Bearer realm="unterminated'], None),
        ([""], None),
        ([], None),
    ],
)
def test_bearer_is_preferred_to_basic_and_others_are_passed_over(
    lines: list[str], challenge: Challenge | None
) -> None:
    assert parse_challenges(lines) == challenge


@given(st.lists(st.text(alphabet='Bearer realm="\\,=', max_size=60), max_size=3))
def test_any_header_is_read_without_failing(lines: list[str]) -> None:
    parse_challenges(lines)
