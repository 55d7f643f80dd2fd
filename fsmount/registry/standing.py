"""Standing: whether a repository could be asked when that was last tried, and what was wrong when it could not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import trio

from fsmount.errors import AccessDenied, FsmountError

#: Whoever gives up after so many seconds without an answer has met a failure, though the server never said so.
_SILENT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Trouble:
    """The last time that a repository could not be asked. `is_over`: it has answered since.

    `since`: when it began not to answer, as far as it was asked. `is_refusal`: it did answer, but will not have us.
    """

    at: datetime
    message: str
    is_over: bool
    since: datetime
    is_refusal: bool


class Standing:
    """What became of the questions to one repository: those that no server of it answered, or that were refused."""

    def __init__(self, name: str) -> None:
        """name: the repository's, for messages."""
        self.failures = 0
        self._name = name
        self._trouble: Trouble | None = None
        self._is_good = True

    @property
    def trouble(self) -> Trouble | None:
        """None if there never was any."""
        return None if self._trouble is None else replace(self._trouble, is_over=self._is_good)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """A question: how the block ends is what came of it. That something does not exist is an answer."""
        began = trio.current_time()
        try:
            yield
        except FsmountError as error:
            if error.transient or isinstance(error, AccessDenied):
                self._note(error.message, is_refusal=not error.transient)
            else:
                self._is_good = True
            raise
        except trio.Cancelled:
            waited = trio.current_time() - began
            if waited >= _SILENT_SECONDS:
                self._note(f"{self._name} has not answered for {waited:.0f} s")
            raise
        self._is_good = True

    def note_broken(self, error: FsmountError) -> None:
        """An answer broke off, and asking for its rest was no good; if it was that which failed, it is noted by now."""
        if self._is_good:
            self._note(error.message)

    def _note(self, message: str, *, is_refusal: bool = False) -> None:
        now = datetime.now(UTC)
        since = now if self._trouble is None or self._is_good else self._trouble.since
        self.failures += 1
        self._trouble = Trouble(now, message, is_over=False, since=since, is_refusal=is_refusal)
        self._is_good = False
