"""engine: everything below a command, wired together from a configuration and taken down in order."""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace

import trio

from fsmount import config as configuration
from fsmount.cache.chunks import open_chunk_store
from fsmount.cache.folder import CacheFolder
from fsmount.cache.numbers import Numbers
from fsmount.cache.warmsets import WarmSets
from fsmount.catalog import App, Catalog
from fsmount.errors import FsmountError
from fsmount.layer import Layers
from fsmount.oci.platform import Platform
from fsmount.oci.reference import Reference, parse_source
from fsmount.registry.credentials import Credentials
from fsmount.registry.destination import Destination
from fsmount.registry.hosts import Hosts
from fsmount.registry.open import Sources
from fsmount.registry.retry import Retry
from fsmount.registry.transport import Timeouts
from fsmount.registry.wire import Limits
from fsmount.singleflight import single_error


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts that commands and the mount use."""

    config: configuration.Config
    catalog: Catalog
    layers: Layers
    numbers: Numbers
    warm_sets: WarmSets
    sources: Sources

    def find(
        self, text: str, *, platform: Platform | None = None, path: str | None = None
    ) -> tuple[App, str | None]:
        """What a user means by SOURCE, and its version: `APP[:TAG][@digest]` of the configuration comes first.

        path, if given, replaces the folder that the app shows. Raises: UsageError.
        """
        name, version = _split(text)
        known = self.catalog.apps.get(name)
        if known is not None:
            subtree = known.subtree if path is None else _subtree(path)
            app = replace(known, subtree=subtree, platform=platform or known.platform)
            return app, version
        reference = parse_source(text)
        app = App(
            name=reference.name if isinstance(reference, Reference) else f"oci-layout:{reference.path}",
            source=self.sources.open(reference),
            subtree=_subtree(path or "/"),
            platform=platform or self.config.defaults.platform,
            listed=lambda tag: True,
            refresh_seconds=self.config.defaults.refresh_seconds,
            indexes=self.config.defaults.indexes,
            complete=self.config.defaults.complete,
        )
        return app, reference.version

    def destination(self, text: str) -> Destination:
        """Where what refers to an image is published: beside what `find` finds. Raises: UsageError."""
        known = self.config.apps.get(_split(text)[0])
        return self.sources.destination(known.repository if known is not None else parse_source(text))


@asynccontextmanager
async def open_engine(config: configuration.Config, *, is_offline: bool = False) -> AsyncIterator[Engine]:
    """The engine of a configuration; passes and look-ups in the background end with the block.

    is_offline: no registry is asked anything.
    Raises: UsageError, Refused, NoSpace (the cache folder), FsmountError.
    """
    # Decoding threads hold the GIL for at most this long while the kernel waits: 5 ms is the default.
    sys.setswitchinterval(0.0005)
    folder = CacheFolder(config.cache.path)
    with (
        single_error(FsmountError),
        # First: on a full disk it makes room for what is opened after it.
        open_chunk_store(
            folder.chunks,
            size=config.cache.size,
            min_free=config.cache.min_free,
            beside=(folder.layers, folder.trees, folder.manifests),
        ) as chunks,
        closing(Numbers(folder.state)) as numbers,
        closing(WarmSets(folder.state)) as warm_sets,
    ):
        async with sources_of(config, is_offline=is_offline) as sources, trio.open_nursery() as nursery:
            layers = Layers(folder, chunks, numbers, nursery, max_layer_size=config.cache.max_layer_size)
            apps = [_app(name, app, sources) for name, app in config.apps.items()]
            catalog = Catalog(apps, layers, nursery)
            try:
                yield Engine(config, catalog, layers, numbers, warm_sets, sources)
            finally:
                nursery.cancel_scope.cancel()


def sources_of(config: configuration.Config, *, is_offline: bool = False) -> Sources:
    """The clients of registries as a configuration has them. Raises: UsageError (a proxy)."""
    plain_http = frozenset(name for name, registry in config.registries.items() if registry.plain_http)
    network = config.network
    return Sources(
        hosts=Hosts(plain_http=plain_http),
        credentials=Credentials(config.registries),
        timeouts=Timeouts(connect_seconds=network.connect_seconds, stall_seconds=network.stall_seconds),
        limits=Limits(
            manifest_bytes=network.manifest_size,
            token_bytes=network.token_size,
            error_bytes=network.error_size,
            requests=network.requests_per_server,
        ),
        retry=Retry(tries=network.tries),
        is_offline=is_offline,
    )


def _app(name: str, app: configuration.App, sources: Sources) -> App:
    return App(
        name=name,
        source=sources.open(app.repository),
        subtree=_subtree(app.path),
        platform=app.platform,
        listed=app.shows,
        refresh_seconds=app.refresh_seconds,
        indexes=app.indexes,
        complete=app.complete,
        publish_indexes=app.publish_indexes,
    )


def _subtree(path: str) -> tuple[bytes, ...]:
    return tuple(os.fsencode(part) for part in path.split("/") if part not in ("", "."))


def _split(text: str) -> tuple[str, str | None]:
    """An app's name and the version after it: the digest, else the tag."""
    name, _, digest = text.partition("@")
    slash = name.rfind("/")
    colon = name.find(":", slash + 1)
    tag = None
    if colon >= 0:
        name, tag = name[:colon], name[colon + 1 :]
    return name, digest or tag or None
