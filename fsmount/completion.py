"""completion: in quiet times the rest of the layers in use is fetched: what is mounted outlives its registry."""

import logging
from collections.abc import Sequence

import trio

from fsmount.errors import FsmountError
from fsmount.layer import Layer
from fsmount.policy import Complete
from fsmount.traffic import Traffic

log = logging.getLogger(__name__)

#: For so long readers must have waited for nothing from a registry.
_QUIET_SECONDS = 30.0
_LOOK_SECONDS = 5.0
#: After a failure.
_PAUSE_SECONDS = 60.0


class Completer:
    """Completes one layer after the other, as what is configured for the apps that use them allows.

    A layer is left alone while the cache has no room for all of it: others would be evicted for what nobody asked for.
    """

    def __init__(self, traffic: Traffic, *, rate: float | None) -> None:
        #: Bytes a second, at most, from the next layer on.
        self.rate = rate
        self._traffic = traffic
        self._waiting: dict[Layer, Complete] = {}
        self._paused_until: dict[Layer, float] = {}

    def use(self, layers: Sequence[Layer], when: Complete) -> None:
        """Takes note of the layers of an app; of several apps' wishes the last counts."""
        for layer in layers:
            if when is Complete.NEVER:
                self._waiting.pop(layer, None)
            else:
                self._waiting[layer] = when

    async def run(self) -> None:
        """For ever."""
        while True:
            for layer, when in list(self._waiting.items()):
                if layer in self._waiting and self._is_due(layer, when):
                    await self._complete(layer)
            await trio.sleep(_LOOK_SECONDS)

    def _is_due(self, layer: Layer, when: Complete) -> bool:
        if trio.current_time() < self._paused_until.get(layer, 0.0):
            return False
        if when is Complete.NOW:
            return True
        return layer.was_read and self._traffic.quiet_seconds(layer.source.name) >= _QUIET_SECONDS

    async def _complete(self, layer: Layer) -> None:
        digest = layer.spec.descriptor.digest
        extra = {"layer": digest}
        try:
            if not await layer.has_room():
                log.info("layer %s is not completed: the cache has no room for it", digest, extra=extra)
            elif not await layer.fill(rate=self.rate):
                log.info("layer %s is not completed: the cache does not take it now", digest, extra=extra)
            else:
                self._waiting.pop(layer, None)
                log.info("layer %s is complete", digest, extra=extra)
                return
        except FsmountError as error:
            log.info("layer %s is not completed: %s", digest, error.message, extra=extra)
        except Exception:
            log.exception("layer %s: completing it failed in a way nobody foresaw", digest, extra=extra)
        self._paused_until[layer] = trio.current_time() + _PAUSE_SECONDS
