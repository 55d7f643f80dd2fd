"""Helpers: the docker-credential-* programs, which keep secrets or make them, and what they last answered."""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from fsmount.errors import DeadlineExpired, FsmountError, Unreachable, UsageError
from fsmount.registry.credential import Credential, from_login
from fsmount.singleflight import single_error

# What a program may take that asks a cloud, or a person for the passphrase of a key.
_RUN_SECONDS = 30.0
_LARGEST_OUTPUT = 64 * 1024
_KEPT_SECONDS = 3600.0
_KEPT_AFTER_FAILURE_SECONDS = 5.0
_SUFFIX = re.compile("[A-Za-z0-9_.-]+")
# systemd gives a service little of a PATH, and a bare environment none at all.
_USUAL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# docker-credential-helpers, credentials/error.go; they are told on standard output.
_NOT_FOUND = b"credentials not found in native keychain"
_MISUSED = (b"no credentials server URL", b"no credentials username")


@dataclass(slots=True)
class _Answer:
    """What one helper last said for one key, or why it did not."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    credential: Credential | None = None
    error: FsmountError | None = None
    until: float = float("-inf")
    #: How often it was asked; who waited for the lock sees by it whether somebody else has asked meanwhile.
    runs: int = 0


class Helpers:
    """Runs helpers; one run at a time for one helper and key, shared by all who want its answer.

    What a helper writes is a secret, and is neither logged nor quoted; secrets go to it on standard input only.
    """

    def __init__(self, environ: Mapping[str, str], home: Path | None) -> None:
        """home: of the user that we are; helpers of clouds keep their own configuration there."""
        self._environ = dict(environ)
        if not environ.get("PATH"):
            self._environ["PATH"] = _USUAL_PATH
        if not environ.get("HOME") and home:
            self._environ["HOME"] = str(home)
        self._answers: dict[tuple[str, str], _Answer] = {}

    def is_installed(self, suffix: str) -> bool:
        """Whether the helper is among the programs that are found."""
        return bool(_SUFFIX.fullmatch(suffix)) and self._find(suffix) is not None

    async def get(self, suffix: str, key: str, *, fresh: bool = False) -> Credential | None:
        """The credential that a helper has for key, a registry's host; None if it has none.

        It is asked at most once an hour, or when fresh; after a failure not for 5 s.

        Raises: UsageError (no such program, misuse), DeadlineExpired, Unreachable.
        """
        answer = self._answers.setdefault((suffix, key), _Answer())
        runs = answer.runs
        async with answer.lock:
            is_kept = trio.current_time() < answer.until and (not fresh or answer.error is not None)
            if answer.runs == runs and not is_kept:
                await self._ask(answer, suffix, key)
        if answer.error is not None:
            raise answer.error.with_traceback(None)
        return answer.credential

    async def store(self, suffix: str, key: str, username: str, secret: str) -> None:
        """Let a helper keep a secret. Raises: as get."""
        login = {"ServerURL": key, "Username": username, "Secret": secret}
        await self._run(suffix, "store", key, json.dumps(login).encode())

    async def erase(self, suffix: str, key: str) -> None:
        """Let a helper forget what it has for key. Raises: as get."""
        await self._run(suffix, "erase", key, key.encode())

    async def _ask(self, answer: _Answer, suffix: str, key: str) -> None:
        answer.credential, answer.error = None, None
        kept = _KEPT_SECONDS
        try:
            output = await self._run(suffix, "get", key, key.encode())
            answer.credential = None if output is None else _parse(output, suffix, key)
        except FsmountError as error:
            answer.error, kept = error, _KEPT_AFTER_FAILURE_SECONDS
        answer.until = trio.current_time() + kept
        answer.runs += 1

    async def _run(self, suffix: str, action: str, key: str, text: bytes) -> bytes | None:
        """What the helper wrote; None if it does not know the key."""
        name = f"docker-credential-{suffix}"
        program = self._find(suffix)
        if program is None:
            raise UsageError(
                f"the credential helper {name} is not installed",
                remedy=f"Install it where the PATH of fsmount leads: {self._environ['PATH']}",
            )
        try:
            with trio.fail_after(_RUN_SECONDS):
                status, output = await _communicate([program, action], text, self._environ)
        except trio.TooSlowError:
            raise DeadlineExpired(f"{name} {action} took more than {_RUN_SECONDS:g} s for {key}") from None
        except OSError as error:
            raise UsageError(f"the credential helper {program} cannot be run: {error.strerror}") from error
        if len(output) > _LARGEST_OUTPUT:
            raise _failure(name, key, "wrote more than any credential has")
        if status == 0:
            return output
        if output.strip() == _NOT_FOUND:
            return None
        if output.strip() in _MISUSED:
            raise UsageError(f"{name} takes {key!r} for no registry, or has no user name for it")
        raise _failure(name, key, f"ended with exit code {status}")

    def _find(self, suffix: str) -> str | None:
        if not _SUFFIX.fullmatch(suffix):
            raise UsageError(
                f"{suffix[:80]!r} is no credential helper",
                remedy="Write what follows docker-credential- in its name, like ecr-login.",
            )
        return shutil.which(f"docker-credential-{suffix}", path=self._environ["PATH"])


async def _communicate(command: list[str], text: bytes, environ: Mapping[str, str]) -> tuple[int, bytes]:
    """Exit code and standard output, of which no more is taken than is allowed.

    Cancellation: the process is killed.
    """
    output = bytearray()
    with single_error(OSError):
        async with trio.open_nursery() as nursery:
            run = partial(
                trio.run_process,
                command,
                stdin=text,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=False,
                env=environ,
                deliver_cancel=_kill,
            )
            process: trio.Process = await nursery.start(run)
            assert process.stdout is not None
            async with process.stdout as pieces:
                async for piece in pieces:
                    output += piece
                    if len(output) > _LARGEST_OUTPUT:
                        nursery.cancel_scope.cancel()
                        break
    assert process.returncode is not None
    return process.returncode, bytes(output)


async def _kill(process: trio.Process) -> None:
    process.kill()


def _parse(output: bytes, suffix: str, key: str) -> Credential | None:
    # No error of json's is chained: it would hold what was parsed.
    try:
        content = json.loads(output)
        username, secret = content["Username"], content["Secret"]
    except (ValueError, TypeError, KeyError, RecursionError):
        username = secret = None
    if not isinstance(username, str) or not isinstance(secret, str):
        raise _failure(
            f"docker-credential-{suffix}", key, "wrote no credential in the form of docker's helpers"
        )
    return from_login(username, secret) if secret else None


def _failure(name: str, key: str, reason: str) -> Unreachable:
    return Unreachable(
        f"the credential helper {name} failed for {key}: it {reason}",
        remedy=f"See what it says, as the user that runs fsmount: echo {key} | {name} get",
    )
