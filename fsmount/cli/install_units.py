"""install-units: has a mount at boot: what systemd, mount(8) and the administrator find of fsmount on a machine."""

import hashlib
import os
import re
import shlex
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import click

from fsmount.cli.output import printable
from fsmount.errors import FsmountError, Refused

_UNITS = "etc/systemd/system"
_CONFIG = "etc/fsmount/config.toml"
_ENABLED = f"{_UNITS}/multi-user.target.wants/fsmount.service"

#: In the first lines of a file, the digest of the others: so it is known whether somebody has changed it since.
_STAMP = "# Written by fsmount install-units, which replaces it only as it was: sha256:"
_STAMP_LINE = re.compile(f"^{re.escape(_STAMP)}([0-9a-f]{{64}})\n", re.MULTILINE)

_NEXT = (
    "systemd-sysusers fsmount.conf && systemd-tmpfiles --create fsmount.conf &&"
    " systemctl daemon-reload && systemctl enable --now fsmount"
)


@dataclass(frozen=True, slots=True)
class _File:
    """A file to be installed. `is_yours`: written where there is none, and the administrator's from then on."""

    path: Path
    text: str
    mode: int = 0o644
    is_yours: bool = False


@click.command("install-units")
@click.option(
    "--prefix",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default=Path("/"),
    show_default=True,
    envvar="FSMOUNT_PREFIX",
    help="Write below DIR, for a package or an image; the program stays the one that runs now.",
)
@click.option(
    "--dry-run", "-n", is_flag=True, envvar="FSMOUNT_DRY_RUN", help="Say what would be done, and do nothing."
)
@click.option(
    "--uninstall", is_flag=True, envvar="FSMOUNT_UNINSTALL", help="Remove what was written and not changed."
)
def install_units(prefix: Path, dry_run: bool, uninstall: bool) -> None:
    """Install what has a mount at boot: fsmount.service, fsmount-wait@.service, mount.fsmount for fstab.

    And what they need: tmpfiles.d, sysusers.d, and /etc/fsmount/config.toml with every key, if there is none. What was
    changed since it was written is left as it is.
    """
    installed = [*_files(prefix)]
    if uninstall:
        if os.path.lexists(prefix / _ENABLED):
            raise Refused("fsmount.service is enabled", remedy="First: systemctl disable --now fsmount")
        for file in installed:
            _say(_remove(file, dry_run=dry_run), file)
        _tell_next("systemctl daemon-reload")
        return
    for file in installed:
        _say(_write(file, dry_run=dry_run), file)
    _tell_next(f"name your repositories in {prefix / _CONFIG}, then:\n  {_NEXT}")


# -------------------- the files


def _files(prefix: Path) -> Iterator[_File]:
    fsmount = _program("fsmount", "fsmount")
    for unit in ("fsmount.service", "fsmount-wait@.service"):
        text = _resource(unit).replace("@FSMOUNT@", _as_systemd_has_it(fsmount))
        yield _File(prefix / _UNITS / unit, _stamped(text))
    for kind in ("tmpfiles", "sysusers"):
        yield _File(prefix / f"etc/{kind}.d/fsmount.conf", _stamped(_resource(f"fsmount-{kind}.conf")))
    yield _File(prefix / _CONFIG, _resource("config.toml"), is_yours=True)
    # A script and no link: whether it is ours can be told as of the others.
    helper = shlex.join(_program("mount.fsmount", "fsmount.cli.mount_helper"))
    yield _File(prefix / "sbin/mount.fsmount", "#!/bin/sh\n" + _stamped(f'exec {helper} "$@"\n'), mode=0o755)


def _resource(name: str) -> str:
    return files("fsmount").joinpath("machine", name).read_text()


def _program(name: str, module: str) -> list[str]:
    """The command line, absolute, of an installed program of this very installation; else of its module."""
    # As it was called: the name in PATH may stay where it leads changes with an upgrade. Then where pip has put it.
    called = Path(sys.argv[0]).absolute()
    folders = [Path(sysconfig.get_path("scripts")), Path(sys.executable).parent]
    if called.name == "fsmount":
        folders.insert(0, called.parent)
    for folder in folders:
        if os.access(folder / name, os.X_OK):
            return [str(folder / name)]
    # -P: no module is taken from the current folder, which may be anybody's.
    return [sys.executable, "-P", "-m", module]


def _as_systemd_has_it(command: list[str]) -> str:
    """Raises: Refused."""
    program, *arguments = command
    if not program.isprintable() or set(program) & set("\"'\\$"):
        raise Refused(f"systemd cannot be told of the program {program!r}", remedy="Install it elsewhere.")
    program = program.replace("%", "%%")
    return " ".join([f'"{program}"' if " " in program else program, *arguments])


def _stamped(text: str) -> str:
    return f"{_STAMP}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def _is_as_written(text: str) -> bool:
    """Whether nobody has changed what this command, of whatever version, has written."""
    stamp = _STAMP_LINE.search(text)
    return stamp is not None and hashlib.sha256(text[stamp.end() :].encode()).hexdigest() == stamp[1]


# -------------------- what is done with them


def _write(file: _File, *, dry_run: bool) -> str:
    """What was done. Raises: FsmountError."""
    present = _present(file)
    if present == file.text:
        return "is as it should be:"
    if present is not None:
        if file.is_yours:
            return "left, for it is yours:"
        if not _is_as_written(present):
            return "left, for it is not as this command wrote it:"
    if dry_run:
        return "would write"
    # It is whole or absent; a reader of the folder (systemd, tmpfiles) does not look at such a name.
    fresh = file.path.with_name(f".{file.path.name}.new")
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(file.text)
        fresh.chmod(file.mode)
        fresh.replace(file.path)
    except OSError as error:
        raise _failure(error, file, "written") from error
    return "wrote"


def _remove(file: _File, *, dry_run: bool) -> str:
    """What was done. Raises: FsmountError."""
    present = _present(file)
    if present is None:
        return "is not there:"
    if file.is_yours and present != file.text:
        return "left, for it is yours:"
    if not file.is_yours and not _is_as_written(present):
        return "left, for it is not as this command wrote it:"
    if dry_run:
        return "would remove"
    try:
        file.path.unlink()
    except OSError as error:
        raise _failure(error, file, "removed") from error
    return "removed"


def _present(file: _File) -> str | None:
    """What is there; None if nothing is. Of what is no text of ours, as a link to /dev/null, its being there."""
    if not os.path.lexists(file.path):
        return None
    if file.path.is_symlink() or not file.path.is_file():
        return ""
    try:
        return file.path.read_text(errors="replace")
    except OSError as error:
        raise _failure(error, file, "read") from error


def _failure(error: OSError, file: _File, done: str) -> FsmountError:
    remedy = None
    if isinstance(error, PermissionError):
        remedy = "Run it as root, or with --prefix below a folder of yours."
    return FsmountError(f"{file.path} cannot be {done}: {error.strerror}", remedy=remedy)


def _say(what: str, file: _File) -> None:
    click.echo(printable(f"{what} {file.path}"))


def _tell_next(text: str) -> None:
    click.echo(printable(f"Next: {text}"))
