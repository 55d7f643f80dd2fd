"""WatchedFile: a file with secrets as it is now, read again when it was replaced or changed."""

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import trio

from fsmount.errors import UsageError

_log = logging.getLogger(__name__)

#: How old an answer may be that was given without looking at the file again.
_FRESH_SECONDS = 5.0
_LARGEST_FILE = 1024 * 1024

_Content = TypeVar("_Content")


class WatchedFile(Generic[_Content]):
    """What one file holds, parsed."""

    def __init__(
        self,
        path: Path,
        parse: Callable[[bytes], _Content],
        *,
        has_secrets: Callable[[_Content], bool] = lambda content: True,
        is_asked_for: bool = True,
    ) -> None:
        """is_asked_for: somebody named this file. Of one that is only a usual place, a folder on the way that
        is closed to us means nothing: `ProtectHome=` of systemd closes /home.
        """
        self.path = path
        self._parse = parse
        self._has_secrets = has_secrets
        self._is_asked_for = is_asked_for
        self._content: _Content | None = None
        self._stamp: tuple[int, int, int] | None = None
        self._looked_at = float("-inf")
        self._warned: set[str] = set()

    async def load(self, *, fresh: bool = False) -> _Content | None:
        """The content; None if there is no such file.

        fresh: look at the file even if it was looked at a moment ago; for use after a refusal.

        Raises: UsageError, naming the file, if it cannot be read, or whatever parse raises.
        """
        now = trio.current_time()
        if fresh or now - self._looked_at > _FRESH_SECONDS:
            await trio.to_thread.run_sync(self._look)
            self._looked_at = now
        return self._content

    def _look(self) -> None:
        """Runs in a thread."""
        try:
            # Whatever stands there, opening it does not block; of a FIFO nothing is read.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
                if stamp != self._stamp:
                    self._take(file.read(_LARGEST_FILE + 1), status)
                    self._stamp = stamp
        except (FileNotFoundError, NotADirectoryError):
            self._content, self._stamp = None, None
        except OSError as error:
            if not self._is_asked_for and self._is_out_of_reach():
                self._content, self._stamp = None, None
                self._warn("%s is in a folder that is closed to us: going on without it")
                return
            raise UsageError(
                f"the credentials in {self.path} cannot be read: {error.strerror}",
                remedy="Make the file readable for the user that runs fsmount, or name another.",
            ) from error

    def _take(self, data: bytes, status: os.stat_result) -> None:
        if len(data) > _LARGEST_FILE:
            raise UsageError(f"{self.path} has more than {_LARGEST_FILE} bytes, too many for credentials")
        self._content = self._parse(data)
        if status.st_mode & stat.S_IROTH and self._has_secrets(self._content):
            self._warn("%s holds secrets, and every user of this machine may read it: chmod o-r")

    def _is_out_of_reach(self) -> bool:
        try:
            self.path.stat()
        except PermissionError:
            return True
        except OSError:
            return False
        return False

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            _log.warning(text, self.path)
