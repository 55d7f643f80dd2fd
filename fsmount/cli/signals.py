"""signals: SIGTERM ends a command in order, with what it was making removed."""

import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import click
import trio

from fsmount.errors import FsmountError
from fsmount.singleflight import single_error

_Result = TypeVar("_Result")


def run_until_told(command: Callable[[], Awaitable[_Result]]) -> _Result:
    """What command returns; SIGTERM cancels it, and ends the program with the exit code that a shell would give."""
    results: list[_Result] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop, nursery.cancel_scope)
            results.append(await command())
            nursery.cancel_scope.cancel()

    async def stop(scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                scope.cancel()

    with single_error(FsmountError):
        trio.run(main)
    if not results:
        raise click.exceptions.Exit(128 + signal.SIGTERM)
    return results[0]
