"""daemon: one mount from start to end: limits, readiness, signals."""

import logging
import resource
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import trio

from fsmount import control, metrics
from fsmount.completion import Completer
from fsmount.config import Config
from fsmount.engine import open_engine
from fsmount.errors import FsmountError
from fsmount.fuse.operations import Operations
from fsmount.fuse.protocol import Opcode
from fsmount.fuse.requests import Deadlines
from fsmount.fuse.session import serve
from fsmount.publisher import Publisher
from fsmount.singleflight import in_background, single_error
from fsmount.status import Observer, as_json
from fsmount.warm import Warmer

log = logging.getLogger(__name__)

#: On first need a name waits for its layer too; what the registry itself may take to answer, the catalog bounds.
_DEADLINES = Deadlines(
    content=frozenset({Opcode.LOOKUP, Opcode.GETATTR, Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS})
)


async def run(config: Config, mountpoint: Path, *, ready: Callable[[], None]) -> None:
    """Serves the configuration's apps at mountpoint until it is unmounted, or SIGTERM or SIGINT comes.

    `ready` is called when the mount answers. Raises: what opening the cache and mounting raise.
    """
    _raise_descriptor_limit()
    with single_error(FsmountError):
        async with open_engine(config) as engine:
            completer = Completer(engine.layers.means.traffic, rate=config.network.background_rate)
            warmer = Warmer(engine.warm_sets, engine.layers)
            publisher = Publisher(
                engine.layers.means.traffic,
                engine.layers.folder.path,
                lambda app: engine.destination(app.name),
                max_layer_size=config.cache.max_layer_size,
            )
            engine.catalog.on_open += [
                lambda app, content: completer.use(content.tree.layers, app.complete),
                warmer.open,
                publisher.use,
            ]
            operations = Operations(engine.catalog, engine.layers, engine.numbers)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.layers.chunks.trim)
                nursery.start_soon(in_background, "completing layers", completer.run)
                nursery.start_soon(in_background, "recording what is read", warmer.run)
                nursery.start_soon(in_background, "publishing indexes", publisher.run)
                nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
                reports = _reports(Observer(engine, mountpoint))
                nursery.start_soon(_serve, operations, mountpoint, reports, ready, nursery)
    log.info("unmounted %s", mountpoint)


def _reports(observer: Observer) -> Mapping[str, control.Report]:
    return {
        "/status": control.Report("application/json", partial(observer.report, as_json)),
        "/metrics": control.Report(metrics.MEDIA_TYPE, partial(observer.report, metrics.as_text)),
    }


async def _serve(
    operations: Operations,
    mountpoint: Path,
    reports: Mapping[str, control.Report],
    ready: Callable[[], None],
    root: trio.Nursery,
) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, operations, mountpoint, deadlines=_DEADLINES))
        log.info("serving %s", mountpoint)
        # When the mount is ready, it can be asked too.
        await root.start(control.serve, mountpoint, reports)
        ready()
    root.cancel_scope.cancel()


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s: unmounting", signal.Signals(number).name)
            scope.cancel()


def _raise_descriptor_limit() -> None:
    # Chunks, indexes and connections together need a few hundred; distributions allow 1,024 unless asked.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
