"""engine: everything below a command, wired together from a configuration and taken down in order."""

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import trio

from fsmount import config as configuration
from fsmount.cache.chunks import open_chunk_store
from fsmount.cache.folder import CacheFolder
from fsmount.cache.numbers import Numbers
from fsmount.cache.warmsets import WarmSets
from fsmount.catalog import App, Catalog
from fsmount.change import ReloadReport, applicable, compare
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
from fsmount.singleflight import in_background, single_error
from fsmount.upkeep import Upkeep


class Engine:
    """The parts that commands and the mount use."""

    def __init__(
        self,
        config: configuration.Config,
        layers: Layers,
        warm_sets: WarmSets,
        sources: Sources,
        open_sources: Callable[[configuration.Config], Awaitable[Sources]],
    ) -> None:
        """sources are those of config; open_sources: opens those of another, until the end of the engine."""
        self.config = config
        self.layers = layers
        self.numbers = layers.numbers
        self.warm_sets = warm_sets
        self.sources = sources
        self.catalog = Catalog(
            [_app(name, app, sources) for name, app in config.apps.items()],
            layers,
            layers.nursery,
            names_seconds=config.deadlines.names_seconds,
        )
        self.upkeep = Upkeep(self.catalog, layers)
        #: Told of every configuration that takes the place of another.
        self.on_reload: list[Callable[[configuration.Config], None]] = []
        self._open_sources = open_sources
        self._reloading = trio.Lock()
        #: Every app that there ever was in this process.
        self._repositories = {name: app.repository for name, app in config.apps.items()}

    def find(
        self, text: str, *, platform: Platform | None = None, path: str | None = None
    ) -> tuple[App, str | None]:
        """What a user means by SOURCE, and its version: `APP[:TAG][@digest]` of the configuration comes first.

        path, if given, replaces the folder that the app shows. Raises: UsageError.
        """
        name, version = split_version(text)
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
        known = self._repositories.get(split_version(text)[0])
        return self.sources.destination(known if known is not None else parse_source(text))

    async def reload(self, config: configuration.Config) -> ReloadReport:
        """Serves by another configuration from now on; returns what is another.

        Apps of which nothing has changed are not touched. Who is below one that is gone stays there.

        Raises: UsageError (a registry, or a proxy, that cannot be asked): then nothing has changed.
        Cancellation: safe; nothing has changed then.
        """
        async with self._reloading:
            old, new = self.config, applicable(self.config, config)
            is_same_network = old.registries == new.registries and _as_told(old) == _as_told(new)
            sources = self.sources if is_same_network else await self._open_sources(new)
            apps = [self._app_of(new, name, sources) for name in new.apps]
            self.config, self.sources = new, sources
            self._repositories |= {name: app.repository for name, app in new.apps.items()}
            if (new.cache.size, new.cache.min_free) != (old.cache.size, old.cache.min_free):
                chunks = self.layers.chunks
                chunks.resize(size=new.cache.size, min_free=new.cache.min_free)
                self.layers.nursery.start_soon(in_background, "trimming the cache", chunks.trim)
            self.catalog.names_seconds = new.deadlines.names_seconds
            self.catalog.replace_apps(apps)
            for told in self.on_reload:
                told(new)
            return compare(old, config)

    def _app_of(self, config: configuration.Config, name: str, sources: Sources) -> App:
        """The app as the catalog has it, if nothing of it has changed."""
        app, known = config.apps[name], self.catalog.apps.get(name)
        is_remote = isinstance(app.repository, Reference)
        if known is not None and app == self.config.apps[name] and (sources is self.sources or not is_remote):
            return known
        return _app(name, app, sources)


@asynccontextmanager
async def open_engine(
    config: configuration.Config, *, mount: Path | None = None, is_offline: bool = False
) -> AsyncIterator[Engine]:
    """The engine of a configuration; passes and look-ups in the background end with the block.

    mount: the mount point that it serves, whose kernel remembers what it is told; what is shown there is looked after
    in the background. is_offline: no registry is asked anything.
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
        folder.make_room = numbers.make_room = chunks.free
        # Layers may ask the sources of an earlier configuration to the end.
        async with trio.open_nursery() as connections:

            async def open_sources(config: configuration.Config) -> Sources:
                sources = sources_of(config, is_offline=is_offline)
                await connections.start(_keep_open, sources)
                return sources

            sources = await open_sources(config)
            async with trio.open_nursery() as nursery:
                layers = Layers(
                    folder,
                    chunks,
                    numbers,
                    nursery,
                    mount=None if mount is None else os.fspath(mount),
                    max_layer_size=config.cache.max_layer_size,
                )
                engine = Engine(config, layers, warm_sets, sources, open_sources)
                if mount is not None and not is_offline:
                    nursery.start_soon(in_background, "looking after what is shown", engine.upkeep.run)
                try:
                    yield engine
                finally:
                    nursery.cancel_scope.cancel()
            connections.cancel_scope.cancel()


async def _keep_open(
    sources: Sources, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    async with sources:
        task_status.started()
        await trio.sleep_forever()


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


def _as_told(config: configuration.Config) -> configuration.Network:
    """What a configuration says of the network, as far as sources have to know it."""
    return config.network.model_copy(update={"background_rate": None})


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


def split_version(text: str) -> tuple[str, str | None]:
    """An app's name and the version after it: the digest, else the tag."""
    name, _, digest = text.partition("@")
    slash = name.rfind("/")
    colon = name.find(":", slash + 1)
    tag = None
    if colon >= 0:
        name, tag = name[:colon], name[colon + 1 :]
    return name, digest or tag or None
