"""daemon: one mount, as long as this process serves it: limits, readiness, signals, and what is done unasked."""

import logging
import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import trio

from fsmount import control, metrics
from fsmount.actions import Actions
from fsmount.completion import Completer
from fsmount.config import Config
from fsmount.control import Action, Report
from fsmount.engine import Engine, open_engine
from fsmount.errors import FsmountError, UsageError
from fsmount.fuse.inodes import content_inode
from fsmount.fuse.operations import Operations
from fsmount.fuse.protocol import Opcode
from fsmount.fuse.refusing import Refusing
from fsmount.fuse.requests import Deadlines, Handlers
from fsmount.fuse.session import Ending, Session
from fsmount.fuse.tally import Tally
from fsmount.notify import HOLDER, LAST_DEATH, Service
from fsmount.publisher import Publisher
from fsmount.singleflight import in_background, single_error
from fsmount.status import Observer, Process, State, as_json
from fsmount.succession import Mode, Succession
from fsmount.warm import Warmer

log = logging.getLogger(__name__)

#: For how long a mount is served from its cache alone, or refused, before everything is tried again.
_CACHE_ONLY_SECONDS = 300.0
_REFUSING_SECONDS = 60.0
#: How often is looked whether it has become another word for how the mount is.
_STATE_SECONDS = 2.0

#: On first need a name waits for its layer too; what the registry itself may take to answer, the catalog bounds.
_CONTENT = frozenset({Opcode.LOOKUP, Opcode.GETATTR, Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS})

_STATES = {Mode.FULL: None, Mode.CACHE_ONLY: State.CACHE_ONLY, Mode.REFUSING: State.REFUSING}


@dataclass(frozen=True, slots=True)
class Daemon:
    """What serves a mount, and on whose behalf. `ready` is called when the mount answers."""

    config: Config
    #: Reads the configuration as it is now. Raises: UsageError, with all that is wrong.
    load: Callable[[], Config]
    session: Session
    service: Service
    succession: Succession
    ready: Callable[[], None]

    async def run(self) -> None:
        """Serves the configuration's apps until the mount is unmounted, or a signal comes.

        SIGTERM and SIGINT unmount; SIGUSR2 leaves the mount to the next process; SIGHUP reads the configuration again.
        Raises: what opening the cache and mounting raise.
        """
        _raise_descriptor_limit()
        session, succession = self.session, self.succession
        with single_error(FsmountError):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._obey, nursery.cancel_scope)
                nursery.start_soon(self._pet)
                if succession.mode is Mode.REFUSING:
                    nursery.start_soon(self._try_again, _REFUSING_SECONDS)
                    await self._serve(Refusing(), None, nursery)
                else:
                    await self._serve_apps(nursery)
                nursery.cancel_scope.cancel()
        succession.end(is_drained=session.is_drained)
        if session.ending is Ending.LEAVE:
            log.info("left %s to the next process", session.mountpoint)
        else:
            log.info("unmounted %s", session.mountpoint)

    async def _serve_apps(self, root: trio.Nursery) -> None:
        is_offline = self.succession.mode is Mode.CACHE_ONLY
        if is_offline:
            log.error(
                "%s is served from the cache alone for %.0f s: the processes that served it have died %d times"
                " within a minute",
                self.session.mountpoint,
                _CACHE_ONLY_SECONDS,
                len(self.succession.record.deaths),
            )
            root.start_soon(self._try_again, _CACHE_ONLY_SECONDS)
        engine_s = open_engine(self.config, mount=self.session.mountpoint, is_offline=is_offline)
        async with engine_s as engine, trio.open_nursery() as nursery:
            nursery.start_soon(in_background, "keeping the cache in bounds", engine.layers.chunks.keep_room)
            self.session.numbers = engine.numbers.identity
            shown = engine.layers.shown
            if shown is not None:
                if not self.session.may_inherit:
                    shown.forget()
                shown.on_stale.append(partial(self._forget, nursery))
            if not is_offline:
                _work_unasked(engine, nursery)
            await self._serve(Operations(engine.catalog, engine.layers, engine.numbers), engine, nursery)
            nursery.cancel_scope.cancel()

    def _forget(self, nursery: trio.Nursery, layer: int, members: int) -> None:
        """Has the kernel forget what it holds of a layer's members."""
        inodes = (content_inode(layer, member) for member in range(members))
        forget = partial(self.session.forget, inodes)
        nursery.start_soon(in_background, "forgetting what was not verified", forget)

    async def _serve(self, handlers: Handlers, engine: Engine | None, root: trio.Nursery) -> None:
        """engine: None of who refuses everything."""
        session, tally = self.session, Tally()
        deadlines = Deadlines(content=_CONTENT)
        _set(deadlines, self.config)
        if engine is not None:
            engine.on_reload.append(partial(_set, deadlines))
        observer = Observer(engine, session.mountpoint, process=self._process(), tally=tally)
        async with trio.open_nursery() as nursery:
            await nursery.start(
                partial(
                    session.serve,
                    handlers,
                    deadlines=deadlines,
                    is_drained=self.succession.was_drained,
                    tally=tally,
                )
            )
            log.info("serving %s", session.mountpoint)
            actions = {}
            if engine is not None:
                does = Actions(engine, self.load)
                root.start_soon(_reload_on_sighup, does)
                actions = {"/reload": Action(does.reload), "/refresh": Action(does.refresh)}
            root.start_soon(self._describe, observer)
            if self.config.metrics.textfile is not None:
                make = partial(observer.report, metrics.as_text)
                root.start_soon(metrics.write_textfile, self.config.metrics.textfile, make)
            # When the mount is ready, it can be asked too.
            await root.start(
                control.serve,
                session.mountpoint,
                {
                    "/status": Report("application/json", partial(observer.report, as_json)),
                    "/metrics": Report(metrics.MEDIA_TYPE, partial(observer.report, metrics.as_text)),
                },
                actions,
            )
            self.ready()

    def _process(self) -> Process:
        holder, record = os.environ.get(HOLDER), self.succession.record
        return Process(
            holder=int(holder) if holder is not None else None,
            starts=record.starts,
            last_death=os.environ.get(LAST_DEATH),
            mode=_STATES[self.succession.mode],
        )

    async def _obey(self, scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGUSR2) as signals:
            async for number in signals:
                if number == signal.SIGUSR2:
                    log.info("SIGUSR2: leaving the mount to the next process")
                    self.session.leave()
                else:
                    log.info("%s: unmounting", signal.Signals(number).name)
                    self.session.ending = Ending.UNMOUNT
                    scope.cancel()

    async def _pet(self) -> None:
        """Tells whoever watches this process that its loop turns."""
        while self.service.watchdog_seconds is not None:
            self.service.pet()
            await trio.sleep(self.service.watchdog_seconds / 4)

    async def _describe(self, observer: Observer) -> None:
        """Says how the mount is, whenever that changes."""
        last: State | None = None
        told = ""
        while True:
            state, summary = observer.state()
            if summary != told:
                told = summary
                self.service.describe(summary)
            if state is not last:
                if last is not None:
                    log.log(logging.INFO if state is State.SERVING else logging.WARNING, "%s", summary)
                last = state
            await trio.sleep(_STATE_SECONDS)

    async def _try_again(self, seconds: float) -> None:
        """What a process did not dare, the next one may: by then nothing has died for long enough."""
        await trio.sleep(seconds)
        log.info("the next process may do everything again")
        self.session.leave()


def _set(deadlines: Deadlines, config: Config) -> None:
    deadlines.names_seconds = config.deadlines.names_seconds
    deadlines.content_seconds = config.deadlines.content_seconds


async def _reload_on_sighup(actions: Actions) -> None:
    async def reload() -> None:
        with suppress(UsageError):  # it is in the log
            await actions.reload()

    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        async for _ in signals:
            await in_background("reading the configuration again", reload)


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

    def bound(config: Config) -> None:
        completer.rate = config.network.background_rate

    engine.on_reload.append(bound)
    engine.catalog.on_open += [
        lambda app, content: completer.use(content.tree.layers, app.complete),
        warmer.open,
        publisher.use,
    ]
    nursery.start_soon(in_background, "completing layers", completer.run)
    nursery.start_soon(in_background, "recording what is read", warmer.run)
    nursery.start_soon(in_background, "publishing indexes", publisher.run)


def _raise_descriptor_limit() -> None:
    # Chunks, indexes and connections together need a few hundred; distributions allow 1,024 unless asked.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
