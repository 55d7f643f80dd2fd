"""finding: what a check is, and what it finds."""

import enum
import os
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

import trio

#: What the child process of a check may take; less than the check itself, so that it can say so.
_CHILD_SECONDS = 4.0


class Verdict(enum.StrEnum):
    """How bad it is. A mount works with warnings, and not, or not for long, with problems."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check has found. `remedy` says what to do, where there is something to do."""

    #: What was looked at, in a word; and which of them, if there may be several.
    check: str
    subject: str | None
    verdict: Verdict
    message: str
    remedy: str | None = None

    @classmethod
    def ok(cls, check: str, message: str, *, subject: str | None = None) -> Self:
        """Nothing is wrong with it."""
        return cls(check, subject, Verdict.OK, message)

    @classmethod
    def warning(
        cls, check: str, message: str, *, remedy: str | None = None, subject: str | None = None
    ) -> Self:
        """It is not as it should be; a mount works even so."""
        return cls(check, subject, Verdict.WARNING, message, remedy)

    @classmethod
    def problem(
        cls, check: str, message: str, *, remedy: str | None = None, subject: str | None = None
    ) -> Self:
        """A mount does not work with it, or not for long."""
        return cls(check, subject, Verdict.PROBLEM, message, remedy)


class Check(NamedTuple):
    """A question, and how its answer is found. What it raises is a problem."""

    name: str
    subject: str | None
    run: Callable[[], Awaitable[Sequence[Finding]]]


def in_thread(name: str, look: Callable[[], Sequence[Finding]]) -> Check:
    """A check that blocks. Its thread is abandoned when it takes too long."""
    return Check(name, None, partial(trio.to_thread.run_sync, look, abandon_on_cancel=True))


class Said(NamedTuple):
    """How a child process ended."""

    code: int
    output: str
    complaint: str


def ask_child(*command: str) -> Said | None:
    """What another program says; None if it does not end. Blocks.

    What may hang is asked by a child: a thread that the kernel does not let go would keep this process from ending.
    """
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        return Said(127, "", f"{command[0]} is not installed")
    try:
        output, complaint = child.communicate(timeout=_CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        with suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=0.1)
        return None
    return Said(child.returncode, output, complaint.strip())
