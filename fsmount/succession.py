"""succession: what one process of a mount leaves to the next beside the device: how it ended, and what it was told."""

import enum
import json
import logging
import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Self

from fsmount.fuse.stored import is_device
from fsmount.notify import Service

log = logging.getLogger(__name__)

_NAME = "record"
#: Deaths within this time say that there is something which kills whoever does the same again.
_RECENT_SECONDS = 60.0
_MOST_DEATHS = 5
_FAR_TOO_MANY = 10
_LARGEST = 4 * 1024 * 1024


class Mode(enum.StrEnum):
    """What a process does, after how many of those before it have died."""

    FULL = "full"
    #: It asks no source, and does nothing of its own accord.
    CACHE_ONLY = "cache-only"
    #: It answers EIO.
    REFUSING = "refusing"


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of the processes that have served a mount. Times are seconds since the machine has started."""

    starts: int = 0
    deaths: tuple[float, ...] = ()
    #: Whether one serves it, or has died at that.
    is_serving: bool = False
    #: Whether the last one has answered all that it had taken.
    is_drained: bool = False
    #: The text of the configuration file that the last one has served by.
    config: str | None = None

    def recent(self, now: float) -> tuple[float, ...]:
        """Those of the deaths that still count."""
        return tuple(death for death in self.deaths if now - death < _RECENT_SECONDS)

    def mode(self, now: float) -> Mode:
        """What the next process may do."""
        deaths = len(self.recent(now))
        if deaths >= _FAR_TOO_MANY:
            return Mode.REFUSING
        return Mode.CACHE_ONLY if deaths >= _MOST_DEATHS else Mode.FULL

    def begun(self, now: float, *, is_serving: bool) -> Self:
        """As the next process finds it: if the last one has not said that it ends, it has died."""
        deaths = self.recent(now)
        if self.is_serving:
            deaths = (*deaths, now)
        return replace(self, starts=self.starts + 1, deaths=deaths, is_serving=is_serving, is_drained=False)

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """A record that cannot be read is an empty one."""
        try:
            fields = json.loads(text)
            return cls(**{**fields, "deaths": tuple(map(float, fields["deaths"]))})
        except (ValueError, TypeError, KeyError):
            return cls()


class Succession:
    """The record, in memory that whoever keeps the mount's device keeps too: it lives as long as the mount."""

    def __init__(self, service: Service) -> None:
        """Takes the place of the process before, and says so."""
        descriptor = service.inherited.pop(_NAME, None)
        known = Record()
        if descriptor is not None:
            known = Record.parse(os.pread(descriptor, _LARGEST, 0))
        else:
            descriptor = os.memfd_create("fsmount-record", os.MFD_CLOEXEC)
            service.store(_NAME, descriptor)
        self._descriptor = descriptor
        #: Whether the process before has answered all that it had taken.
        self.was_drained = known.is_drained
        # Of a mount that is gone, nothing counts any more.
        is_inherited = any(map(is_device, service.inherited))
        self.record = (known if is_inherited else Record()).begun(_now(), is_serving=is_inherited)
        self._save()

    @property
    def mode(self) -> Mode:
        """What this process may do."""
        return self.record.mode(_now())

    def serve_by(self, config: str | None) -> None:
        """This process serves, by a configuration that works."""
        self.record = replace(self.record, config=config, is_serving=True)
        self._save()

    def end(self, *, is_drained: bool) -> None:
        """This process ends because it was told to."""
        self.record = replace(self.record, is_serving=False, is_drained=is_drained)
        self._save()

    def _save(self) -> None:
        data = json.dumps(asdict(self.record)).encode()
        os.pwrite(self._descriptor, data, 0)
        os.ftruncate(self._descriptor, len(data))


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
