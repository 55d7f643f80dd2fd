"""daemon: one mount, as long as this process serves it: limits, readiness, signals, and what is done unasked."""

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
from fsmount.engine import Engine, open_engine
from fsmount.errors import FsmountError
from fsmount.fuse.operations import Operations
from fsmount.fuse.protocol import Opcode
from fsmount.fuse.refusing import Refusing
from fsmount.fuse.requests import Deadlines, Handlers
from fsmount.fuse.session import Ending, Session
from fsmount.notify import Service
from fsmount.publisher import Publisher
from fsmount.singleflight import in_background, single_error
from fsmount.status import Observer, as_json
from fsmount.succession import Mode, Succession
from fsmount.warm import Warmer

log = logging.getLogger(__name__)

#: For how long a mount is served from its cache alone, or refused, before everything is tried again.
_CACHE_ONLY_SECONDS = 300.0
_REFUSING_SECONDS = 60.0
#: On first need a name waits for its layer too; what the registry itself may take to answer, the catalog bounds.
_DEADLINES = Deadlines(
    content=frozenset({Opcode.LOOKUP, Opcode.GETATTR, Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS})
)


async def run(
    config: Config,
    mountpoint: Path,
    *,
    service: Service,
    succession: Succession,
    ready: Callable[[], None],
) -> None:
    """Serves the configuration's apps at mountpoint until it is unmounted, or a signal comes.

    SIGTERM and SIGINT unmount; SIGUSR2 leaves the mount to the next process. `ready` is called when the mount
    answers. Raises: what opening the cache and mounting raise.
    """
    _raise_descriptor_limit()
    session = Session(mountpoint, keeper=service if service.is_held else None)
    with single_error(FsmountError):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_obey, session, nursery.cancel_scope)
            nursery.start_soon(_pet, service)
            if succession.mode is Mode.REFUSING:
                nursery.start_soon(_try_again, session, _REFUSING_SECONDS)
                await _serve(session, Refusing(), {}, succession, ready, nursery)
            else:
                await _serve_apps(config, session, succession, ready, nursery)
            nursery.cancel_scope.cancel()
    succession.end(is_drained=session.is_drained)
    if session.ending is Ending.LEAVE:
        log.info("left %s to the next process", mountpoint)
    else:
        log.info("unmounted %s", mountpoint)


async def _serve_apps(
    config: Config, session: Session, succession: Succession, ready: Callable[[], None], root: trio.Nursery
) -> None:
    is_offline = succession.mode is Mode.CACHE_ONLY
    if is_offline:
        log.error(
            "%s is served from the cache alone for %.0f s: the processes that served it have died %d times lately",
            session.mountpoint,
            _CACHE_ONLY_SECONDS,
            len(succession.record.deaths),
        )
        root.start_soon(_try_again, session, _CACHE_ONLY_SECONDS)
    async with open_engine(config, is_offline=is_offline) as engine, trio.open_nursery() as nursery:
        nursery.start_soon(engine.layers.chunks.trim)
        if not is_offline:
            _work_unasked(engine, nursery)
        operations = Operations(engine.catalog, engine.layers, engine.numbers)
        reports = _reports(Observer(engine, session.mountpoint))
        await _serve(session, operations, reports, succession, ready, nursery)
        nursery.cancel_scope.cancel()


def _work_unasked(engine: Engine, nursery: trio.Nursery) -> None:
    """What a mount does beside answering."""
    completer = Completer(engine.layers.means.traffic, rate=engine.config.network.background_rate)
    warmer = Warmer(engine.warm_sets, engine.layers)
    publisher = Publisher(
        engine.layers.means.traffic,
        engine.layers.folder.path,
        lambda app: engine.destination(app.name),
        max_layer_size=engine.config.cache.max_layer_size,
    )
    engine.catalog.on_open += [
        lambda app, content: completer.use(content.tree.layers, app.complete),
        warmer.open,
        publisher.use,
    ]
    nursery.start_soon(in_background, "completing layers", completer.run)
    nursery.start_soon(in_background, "recording what is read", warmer.run)
    nursery.start_soon(in_background, "publishing indexes", publisher.run)


def _reports(observer: Observer) -> Mapping[str, control.Report]:
    return {
        "/status": control.Report("application/json", partial(observer.report, as_json)),
        "/metrics": control.Report(metrics.MEDIA_TYPE, partial(observer.report, metrics.as_text)),
    }


async def _serve(
    session: Session,
    handlers: Handlers,
    reports: Mapping[str, control.Report],
    succession: Succession,
    ready: Callable[[], None],
    root: trio.Nursery,
) -> None:
    async with trio.open_nursery() as nursery:
        serve = partial(session.serve, handlers, deadlines=_DEADLINES, is_drained=succession.was_drained)
        await nursery.start(serve)
        log.info("serving %s", session.mountpoint)
        # When the mount is ready, it can be asked too.
        await root.start(control.serve, session.mountpoint, reports)
        ready()


async def _obey(session: Session, scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGUSR2) as signals:
        async for number in signals:
            if number == signal.SIGUSR2:
                log.info("SIGUSR2: leaving the mount to the next process")
                session.leave()
            else:
                log.info("%s: unmounting", signal.Signals(number).name)
                session.ending = Ending.UNMOUNT
                scope.cancel()


async def _pet(service: Service) -> None:
    """Tells whoever watches this process that its loop turns."""
    while service.watchdog_seconds is not None:
        service.pet()
        await trio.sleep(service.watchdog_seconds / 4)


async def _try_again(session: Session, seconds: float) -> None:
    """What a process did not dare, the next one may: by then nothing has died for long enough."""
    await trio.sleep(seconds)
    log.info("the next process may do everything again")
    session.leave()


def _raise_descriptor_limit() -> None:
    # Chunks, indexes and connections together need a few hundred; distributions allow 1,024 unless asked.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
