"""What one process of a mount leaves to the next."""

import os
import socket
from collections.abc import Iterator

import pytest

from fsmount import notify, succession
from fsmount.notify import Service
from fsmount.succession import Mode, Record, Succession


class Chain:
    """Processes of one mount, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
        self.now = 1000.0
        monkeypatch.setattr(succession, "_now", lambda: self.now)
        self._listener = listener
        self._kept: dict[str, int] = {}

    def next(self, *, mounted: bool = True) -> Succession:
        """The next process, which serves at once."""
        inherited = {name: os.dup(descriptor) for name, descriptor in self._kept.items()}
        if mounted:
            inherited["mount-1-0.99"] = -1
        following = Succession(Service(notify.address_of(self._listener), inherited=inherited))
        while (message := notify.receive(self._listener)) is not None:
            self._kept[message.fields["FDNAME"]] = message.descriptors[0]
        return following


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chain]:
    listener = notify.listen()
    yield Chain(monkeypatch, listener)
    notify.remove(listener)


def test_the_first_process_may_do_everything(chain: Chain) -> None:
    first = chain.next(mounted=False)
    assert (first.mode, first.record.starts, first.record.deaths) == (Mode.FULL, 1, ())


def test_who_ends_as_it_was_told_has_not_died(chain: Chain) -> None:
    first = chain.next(mounted=False)
    first.serve_by("text")
    first.end(is_drained=True)
    second = chain.next()
    assert (second.record.starts, second.record.deaths) == (2, ())
    assert second.was_drained
    assert second.record.config == "text"
    second.serve_by("other")
    third = chain.next()
    assert not third.was_drained
    assert third.record.config == "other"


def test_after_five_deaths_within_a_minute_the_cache_alone_and_after_ten_nothing_is_served(
    chain: Chain,
) -> None:
    chain.next(mounted=False).serve_by("")
    modes = []
    for _ in range(11):
        chain.now += 5
        following = chain.next()
        modes.append(following.mode)
        following.serve_by("")
    assert modes == [Mode.FULL] * 4 + [Mode.CACHE_ONLY] * 5 + [Mode.REFUSING] * 2


def test_deaths_are_forgotten_after_a_minute(chain: Chain) -> None:
    chain.next(mounted=False).serve_by("")
    for _ in range(20):
        chain.now += 15
        following = chain.next()
        assert following.mode is Mode.FULL
        following.serve_by("")


def test_who_dies_before_it_serves_what_it_inherited_has_died_too(chain: Chain) -> None:
    chain.next(mounted=False).serve_by("")
    for _ in range(5):
        last = chain.next()
    assert last.mode is Mode.CACHE_ONLY


def test_of_a_mount_that_is_gone_nothing_counts(chain: Chain) -> None:
    for _ in range(6):
        last = chain.next(mounted=False)
        last.serve_by("text")
    assert (last.mode, last.record.deaths) == (Mode.FULL, ())


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"deaths": 1}', b'{"deaths": [], "more": 1}'])
def test_a_record_that_cannot_be_read_is_an_empty_one(text: bytes) -> None:
    assert Record.parse(text) == Record()
