"""Shown: what the kernel of a mount may remember of layers that this process, and those before it, have shown."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fsmount.cache.numbers import Numbers
from fsmount.errors import FsmountError
from fsmount.index import LayerIndex

log = logging.getLogger(__name__)


class Shown:
    """What was shown under the number of a layer, on disk: the next process of the mount has to know it.

    It is by which numbering members are told apart, and whether somebody has verified what was shown. A process that
    cannot write that down, because the disk is full, shows things all the same; whose they are has to try again.
    """

    def __init__(self, numbers: Numbers, mount: str) -> None:
        """mount: names the mount, for every process that serves it."""
        #: Told of a layer's number, and how many members it has, when the kernel may hold content of these (and targets
        #: of symlinks) that is not what the layer holds, and must be forgotten.
        self.on_stale: list[Callable[[int, int], None]] = []
        self._numbers = numbers
        self._mount = mount
        # What nobody had verified: shown in earlier processes, and in this one.
        self._left = numbers.unverified(mount)
        self._unverified: set[int] = set()
        #: What a pass of this process has begun to show, and nothing before it.
        self._begun: set[int] = set()
        #: What the next process should know of, and would not.
        self.unnoted: set[int] = set()

    @property
    def left_unverified(self) -> frozenset[int]:
        """The numbers of layers that an earlier process has shown, and nobody has verified since."""
        return frozenset(self._left)

    def forget(self) -> None:
        """The mount has just begun, and its kernel remembers nothing."""
        self._left.clear()
        try:
            self._numbers.forget_unverified(self._mount)
        except FsmountError as error:
            # The next process has the kernel forget more than it must.
            log.warning("that the mount is new is not noted for the next process: %s", error.message)

    def has_numbering(self, number: int, numbering: str) -> bool:
        """Whether members of a layer were shown by that numbering. Raises: FsmountError."""
        return self._numbers.numbering(number) == numbering

    def has_other_numbering(self, number: int, numbering: str) -> bool:
        """Whether members of a layer were shown by another numbering. Raises: FsmountError."""
        return self._numbers.numbering(number) not in (None, numbering)

    def note_index(self, number: int, index: LayerIndex) -> None:
        """A complete index is what is shown from now on."""
        self.unnoted.discard(number)
        with self._noting(number):
            self._begun.discard(number)
            self._note_numbering(number, index.numbering)

    def note_stream(self, number: int, numbering: str) -> None:
        """A pass begins to show members, and content that nobody has verified."""
        self.unnoted.discard(number)
        with self._noting(number):
            if self._note_numbering(number, numbering):
                self._begun.add(number)
        self.note_unverified(number)

    def note_nothing(self, number: int) -> None:
        """A pass broke off before it has shown anything."""
        self.unnoted.discard(number)
        if number in self._begun:
            self._begun.discard(number)
            self._unverified.discard(number)
            with _told(number):
                self._numbers.forget_unverified(self._mount, number)
                self._numbers.keep_numbering(number, None)

    def note_unverified(self, number: int) -> None:
        """Content that nobody has verified is shown from now on."""
        if number not in self._left | self._unverified:
            with self._noting(number):
                self._numbers.note_unverified(self._mount, number)
                self._unverified.add(number)

    def note_verified(self, number: int, members: int) -> None:
        """All of a layer has been verified, and what this process has shown of it was right."""
        if number in self._left | self._unverified:
            self._unverified.discard(number)
            with _told(number):
                self._numbers.forget_unverified(self._mount, number)
        if number in self._left:
            # What a process before this one has shown, nobody can compare.
            self._left.discard(number)
            self.note_void(number, members)

    def note_void(self, number: int, members: int) -> None:
        """What was shown under that number may be wrong."""
        self._begun.discard(number)
        self._left.discard(number)
        self._unverified.discard(number)
        for told in self.on_stale:
            told(number, members)

    @contextmanager
    def _noting(self, number: int) -> Iterator[None]:
        with _told(number):
            try:
                yield
            except FsmountError:
                self.unnoted.add(number)
                raise

    def _note_numbering(self, number: int, numbering: str) -> bool:
        """Whether there was none before."""
        known = self._numbers.numbering(number)
        if known != numbering:
            self._numbers.keep_numbering(number, numbering)
        return known is None


@contextmanager
def _told(number: int) -> Iterator[None]:
    try:
        yield
    except FsmountError as error:
        log.warning(
            "what is shown of layer number %d is not noted for the next process: %s", number, error.message
        )
