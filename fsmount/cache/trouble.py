"""Trouble: a fault that lasts is told once, when it begins, and once when it is over."""

import logging
import threading
import time

log = logging.getLogger(__name__)

#: It is over when something has succeeded, and nothing has failed for so long: at the brink both alternate.
_QUIET_SECONDS = 10.0


class Trouble:
    """Whether what should be stored cannot be, and since when. For any thread."""

    def __init__(self, over: str) -> None:
        """over: what is said at the end."""
        self._over = over
        self._lock = threading.Lock()
        self._failed_at = 0.0
        #: What went wrong at its beginning; None if there is none.
        self.message: str | None = None

    def begin(self, message: str) -> None:
        """Something has failed."""
        with self._lock:
            self._failed_at = time.monotonic()
            is_news = self.message is None
            if is_news:
                self.message = message
        if is_news:
            log.error("%s: serving without caching", message)

    def end(self) -> None:
        """Something has succeeded."""
        if self.message is None:
            return
        with self._lock:
            is_news = self.message is not None and time.monotonic() >= self._failed_at + _QUIET_SECONDS
            if is_news:
                self.message = None
        if is_news:
            log.warning("%s", self._over)
