"""background: how a command goes on in a process of its own, and when the one that started it may end.

The child inherits the writing end of a pipe, named by FSMOUNT_READY_FD. It writes `ready` and a newline, or the text of
its error; the end of the pipe without either means that all who hold it have died. Where a process of the child's is
to announce, it must be handed the descriptor and the variable, and the child must close its own copy.
"""

import contextlib
import os
import stat
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fsmount.cache.folder import from_os_error
from fsmount.cli.output import printable
from fsmount.errors import NoSpace
from fsmount.notify import without_service
from fsmount.program import PROGRAM

if TYPE_CHECKING:
    from subprocess import Popen

_READY_FD = "FSMOUNT_READY_FD"
_READY = b"ready\n"
#: How long a child that has failed, or is told to end, may take to clean up before it is killed.
_GRACE_SECONDS = 10
_LOG_LINES = 10


def run_in_background(arguments: list[str], log: Path, *, program: tuple[str, ...] = PROGRAM) -> int:
    """Starts fsmount with these arguments in a session of its own, and waits until it is ready or has failed.

    The exit code: 0 when the child is ready, and goes on; else the child's own, after its message was printed.
    It writes to `log`, which is created for the user alone. An interrupt (Ctrl-C) while waiting ends the child.

    Raises: FsmountError when the log cannot be written.
    """
    import subprocess  # 10 ms, which only this command needs

    reading, writing = os.pipe()
    with FileIO(reading) as pipe, FileIO(writing, "w") as ready, _open_log(log) as output:
        log_start = output.tell()
        child = subprocess.Popen(
            [*program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=[ready.fileno()],
            # It keeps no folder busy, and is no service of whoever started this command.
            cwd="/",
            env={**without_service(os.environ), _READY_FD: str(ready.fileno())},
        )
        ready.close()
        try:
            said = _listen(pipe)
            if said == _READY:
                child.returncode = 0  # it lives on; without this, Popen would warn that nobody waited for it
                return 0
            code = _wait(child)
        except BaseException:
            _end(child)
            raise
    click.echo(said.decode(errors="replace").rstrip() or _last_words(code, log, log_start), err=True)
    return code


def announce_ready() -> None:
    """Tells the process that started this one that it may end; nothing if there is none, or it was told already."""
    _announce(_READY)


def announce_failure(text: str) -> None:
    """Tells the process that started this one why there will be nothing; it prints text as it is."""
    _announce(text.encode(errors="backslashreplace"))


def _announce(message: bytes) -> None:
    # Taken out of the environment: the number means nothing to a child of ours, or something else.
    descriptor = int(os.environ.pop(_READY_FD, "-1"))
    if descriptor < 0:
        return
    with contextlib.suppress(OSError):  # whoever waited is gone, or closed it on our way here
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            with open(descriptor, "wb") as pipe:
                pipe.write(message)


def _open_log(log: Path) -> FileIO:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return FileIO(log, "a", opener=lambda path, flags: os.open(path, flags, 0o600))
    except OSError as error:
        remedy = "Choose another place with --cache, or for the log alone with --log-file."
        failure = from_os_error(error, log, elsewhere=remedy)
        if isinstance(failure, NoSpace):
            raise failure from error
        raise type(failure)(f"the log {log} cannot be written: {error.strerror}", remedy=remedy) from error


def _listen(pipe: FileIO) -> bytes:
    """All that comes until the child is ready, or the pipe ends."""
    said = b""
    while said != _READY and (piece := pipe.read(4096)):
        said += piece
    return said


def _wait(child: "Popen[bytes]") -> int:
    """The exit code of a child that has failed, as a shell would give it; never 0."""
    import subprocess

    try:
        code = child.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        _end(child)
        code = child.returncode
    return 128 - code if code < 0 else code or 1


def _end(child: "Popen[bytes]") -> None:
    import subprocess

    child.terminate()
    try:
        child.wait(_GRACE_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        child.kill()
        child.wait()


def _last_words(code: int, log: Path, start: int) -> str:
    """For a child that died without a word: the end of what it wrote to the log."""
    with log.open("rb") as file:
        file.seek(start)
        lines = printable(file.read().decode(errors="replace")).splitlines()
    message = f"fsmount: error: it ended with exit code {code} before it was ready"
    return "\n".join([f"{message}; the log {log} says:", *lines[-_LOG_LINES:]] if lines else [f"{message}."])
