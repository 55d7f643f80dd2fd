"""publisher: a mount that makes the SOCI indexes of what it shows, for the other servers of its fleet."""

import logging
import random
from collections.abc import Callable
from pathlib import Path

import trio

from fsmount.catalog import App, Content
from fsmount.errors import FsmountError
from fsmount.image import Image
from fsmount.oci.digest import Digest
from fsmount.publish import publish_index
from fsmount.registry.destination import Destination
from fsmount.traffic import Traffic

log = logging.getLogger(__name__)

#: For so long readers must have waited for nothing from a registry.
_QUIET_SECONDS = 30.0
_LOOK_SECONDS = 5.0
#: A fleet opens a new build all at once: each of its mounts waits for a time of its own, and most then find an index.
_SPREAD_SECONDS = 300.0
#: After a failure.
_PAUSE_SECONDS = 3600.0


class Publisher:
    """Publishes the indexes of images, one after the other, for apps whose configuration says so."""

    def __init__(
        self,
        traffic: Traffic,
        folder: Path,
        destination: Callable[[App], Destination],
        *,
        max_layer_size: int | None = None,
    ) -> None:
        """folder: on the disk, for one layer's blob at a time. destination: where an app's indexes go."""
        self._traffic = traffic
        self._folder = folder
        self._destination = destination
        self._max_layer_size = max_layer_size
        self._due: dict[Digest, float] = {}
        self._images: dict[Digest, tuple[App, Image]] = {}
        self._done: set[Digest] = set()

    def use(self, app: App, content: Content) -> None:
        """Takes note of what an app shows."""
        image = content.image
        if not app.publish_indexes or image.digest in self._done or image.digest in self._images:
            return
        if any(layer.soci_index is not None for layer in image.layers):
            return  # its maker has seen to that
        self._images[image.digest] = app, image
        self._due[image.digest] = trio.current_time() + random.uniform(0, _SPREAD_SECONDS)

    async def run(self) -> None:
        """For ever."""
        while True:
            for digest, (app, image) in list(self._images.items()):
                quiet = self._traffic.quiet_seconds(app.source.name) >= _QUIET_SECONDS
                if quiet and trio.current_time() >= self._due[digest]:
                    await self._publish(app, image)
            await trio.sleep(_LOOK_SECONDS)

    async def _publish(self, app: App, image: Image) -> None:
        what = f"the index of {image.digest} of {app.name}"
        try:
            published = await publish_index(
                app.source,
                image,
                folder=self._folder,
                destinations=[self._destination(app)],
                max_layer_size=self._max_layer_size,
            )
        except FsmountError as error:
            log.warning("%s is not published: %s", what, error.message)
            self._due[image.digest] = trio.current_time() + _PAUSE_SECONDS
            return
        except Exception:
            log.exception("%s: publishing it failed in a way nobody foresaw", what)
        else:
            if published.index is None:
                log.info("%s: no layer needs one, or none can have one", what)
            else:
                log.info("%s %s", what, "is there" if published.existed else "is published")
        self._done.add(image.digest)
        del self._images[image.digest], self._due[image.digest]
