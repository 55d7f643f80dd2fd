"""main: the command, and the one place where an error becomes a message and an exit code."""

import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

import click

from fsmount import __version__
from fsmount.cli.background import announce_failure
from fsmount.cli.output import printable
from fsmount.errors import FsmountError

#: Every command with its line in the help. It is the click command `name` in the module `fsmount.cli.name` (a hyphen
#: is an underscore there), which is imported when it is asked for: trio, httpx and pydantic take 100 ms each, and
#: `fsmount --help` 100 ms in all.
COMMANDS = {
    "mount": "Mount the configured apps.",
    "unmount": "Unmount what fsmount serves at a mount point.",
    "upgrade": "Have a newer program take over a running mount.",
    "status": "Show how a running mount is.",
    "doctor": "Find out what is wrong, and what to do.",
    "refresh": "Have a running mount look at once for tags that moved.",
    "reload": "Have a running mount take over the changed configuration.",
    "snapshot": "Make a plain folder of an image.",
    "ls": "List a folder of an image.",
    "cat": "Print a file of an image.",
    "prefetch": "Fetch files of an image before they are read.",
    "wait": "Return when what an app reads is here.",
    "inspect": "Show what an image is made of.",
    "verify": "Read all that is cached, and drop what the disk has spoilt.",
    "index": "Publish indexes with which an image's layers are read lazily.",
    "login": "Check a user and password with a registry, and keep them.",
    "logout": "Erase what is kept for a registry.",
    "auth": "Show where the credentials for a registry come from.",
    "demo": "Show in half a minute what fsmount does.",
    "config": "Look at the configuration.",
    "install-units": "Have a mount at boot: systemd units, fstab, configuration.",
    "version": "Print the version.",
}

_INTERRUPTED = 130
#: What a shell reports of a program that SIGPIPE ended, as it ends the coreutils.
_BROKEN_PIPE = 141


class _Commands(click.Group):
    """The group that knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            name = cmd_name.replace("-", "_")
            command: click.Command = getattr(importlib.import_module(f"fsmount.cli.{name}"), name)
            return command
        if not ctx.resilient_parsing:
            near = get_close_matches(cmd_name, COMMANDS, 1)
            ctx.fail(f"there is no command {cmd_name!r}" + (f"; did you mean {near[0]}?" if near else ""))
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="fsmount %(version)s")
def fsmount() -> None:
    """Mount the builds kept in a container registry as read-only trees."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; whatever goes wrong is told on stderr, without a traceback."""
    try:
        code = _run(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
        return code
    # Also what nobody foresaw, as where requests are answered and tasks end: a user is shown no traceback.
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
        return _tell(error)


def _run(arguments: list[str]) -> int:
    # Not click's own main(): that one would make BrokenPipeError an exit code of 1, and print its own messages.
    color = False if os.environ.get("NO_COLOR") else None
    try:
        with fsmount.make_context("fsmount", arguments, color=color) as context:
            fsmount.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    return 0


def _tell(error: BaseException) -> int:
    """Prints what went wrong; returns the exit code."""
    causes = list(_causes(error))
    if any(isinstance(cause, KeyboardInterrupt | click.Abort) for cause in causes):
        return _INTERRUPTED
    if all(isinstance(cause, BrokenPipeError) for cause in causes):
        # The interpreter flushes stdout once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    if os.environ.get("FSMOUNT_DEBUG"):
        traceback.print_exception(error)
    text = "".join(f"fsmount: error: {printable(_message(cause))}\n" for cause in causes)
    announce_failure(text)
    try:
        click.echo(text, err=True, nl=False)
    except OSError:
        # The log's disk is full, and what is left in the buffer would make the interpreter's own end a failure.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return next(_exit_code(cause) for cause in causes)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, or those in the groups that trio's nurseries make."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _causes(inner)
    else:
        yield error


def _message(error: BaseException) -> str:
    match error:
        case FsmountError():
            return str(error)
        case click.UsageError(ctx=click.Context() as context):
            return f"{error.format_message()}\nTry '{context.command_path} --help'."
        case click.ClickException():
            return error.format_message()
        case _:
            hint = "" if os.environ.get("FSMOUNT_DEBUG") else "\nSet FSMOUNT_DEBUG=1 for the traceback."
            return f"unforeseen {type(error).__name__}: {error}{hint}"


def _exit_code(error: BaseException) -> int:
    return error.exit_code if isinstance(error, FsmountError | click.ClickException) else 1
