"""mount_helper: mount.fsmount, which mount(8) runs for lines of fstab: what fstab says, as a command of fsmount."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fsmount.errors import FsmountError, UsageError

_USAGE = "mount.fsmount SPEC DIRECTORY [-sfnv] [-o OPTIONS] [-t TYPE]"

#: The first field of a line that stands for nothing: the configuration says it all.
_NO_SPEC = frozenset({"fsmount", "none"})

# mount(8) passes rw where nobody has said ro, and every option of fstab but x-*: so rw is no wish of anybody.
_IGNORED = frozenset(
    {
        *("ro", "rw", "nosuid", "nodev", "exec", "allow_other", "default_permissions", "defaults"),
        *("auto", "noauto", "nofail", "_netdev", "silent", "loud", "async", "sync", "dirsync"),
        *("atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime"),
        *("nostrictatime", "lazytime", "nolazytime", "iversion", "noiversion", "mand", "nomand"),
        *("user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup"),
    }
)
#: What somebody relies on, and does not get.
_REFUSED = {
    "suid": "setuid bits have no effect in it",
    "dev": "device nodes cannot be opened in it",
    "noexec": "programs are run from it; after the option user, write exec",
    "remount": "nothing of it can be changed so; fsmount reload follows a changed configuration",
}

# mount(8), EXIT CODES
_INCORRECT, _INTERRUPTED, _FAILED = 1, 8, 32
_EXIT_CODES = {0: 0, UsageError.exit_code: _INCORRECT, 130: _INTERRUPTED}


@dataclass(slots=True)
class Request:
    """What mount(8) wants. `command`: the arguments of fsmount for it."""

    command: list[str] = field(default_factory=list)
    is_fake: bool = False
    is_verbose: bool = False


def translate(arguments: Sequence[str]) -> Request:
    """What is to be run for the arguments of a mount helper (mount(8), EXTERNAL HELPERS).

    SPEC is `fsmount` or `none`; or a configuration, an absolute path with the suffix .toml; or the repository of the
    one app, named as its last part is; or what the repositories of the options `app=NAME` have in common.

    Raises: UsageError.
    """
    request = Request()
    is_sloppy = False
    places: list[str] = []
    options: list[str] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-") or word == "-":
            places.append(word)
            continue
        for place, flag in enumerate(word[1:], 2):
            match flag:
                case "f":
                    request.is_fake = True
                case "s":
                    is_sloppy = True
                case "v":
                    request.is_verbose = True
                case "n":
                    pass  # there is no /etc/mtab to be kept
                case "o" | "t":
                    value = word[place:] or next(words, None)
                    if value is None:
                        raise UsageError(f"-{flag} has no value", remedy=_USAGE)
                    if flag == "o":
                        options += _split(value)
                    break
                case _:
                    raise UsageError(f"the option -{flag} is unknown", remedy=_USAGE)
    if len(places) != 2:
        raise UsageError(f"{len(places)} arguments instead of two", remedy=_USAGE)
    spec, mountpoint = places
    request.command = ["mount", *_translate(spec, options, is_sloppy=is_sloppy), "--", mountpoint]
    return request


def main() -> int:
    """The program. Its exit code is one of mount(8)."""
    try:
        request = translate(sys.argv[1:])
    except FsmountError as error:
        print(f"mount.fsmount: {error}", file=sys.stderr)
        return _INCORRECT
    if request.is_verbose:
        print(f"mount.fsmount: {shlex.join(['fsmount', *request.command])}")
    if request.is_fake:
        return 0
    from fsmount.cli.main import main as fsmount

    return _EXIT_CODES.get(fsmount(request.command), _FAILED)


def _translate(spec: str, options: Sequence[str], *, is_sloppy: bool) -> Iterator[str]:
    repository = _repository(spec)
    if spec.startswith("/"):
        yield from ("--config", spec)
    has_app = False
    for option in options:
        name, equals, value = option.partition("=")
        match name:
            case "config" | "cache" if value:
                yield from (f"--{name}", value)
            case "app" if value:
                has_app = True
                yield from ("--app", _app(value, repository))
            case "config" | "cache" | "app":
                raise UsageError(f"the option {name} has no value", remedy=f"Write {name}=… .")
            case _ if not equals and name in _REFUSED:
                raise UsageError(f"the option {name} is not possible: {_REFUSED[name]}")
            case _ if is_sloppy or (not equals and name in _IGNORED) or name in ("", "comment"):
                pass
            case _ if name.startswith(("x-", "X-")):
                pass
            case _:
                raise UsageError(
                    f"the option {option} is unknown",
                    remedy="Its own are config=FILE, cache=DIR and app=NAME=REPOSITORY.",
                )
    if repository is not None and not has_app:
        yield from ("--app", f"{repository.rpartition('/')[2]}={repository}")


def _repository(spec: str) -> str | None:
    """The repository, or part of one, that the first field names; None if it names something else."""
    if spec in _NO_SPEC or (spec.startswith("/") and spec.endswith(".toml")):
        return None
    host, slash, path = spec.partition("/")
    if host and slash and path.strip("/"):
        return spec.rstrip("/")
    # mount(8) makes a path of a word which is the name of something in the current folder.
    raise UsageError(
        f"{spec} is no configuration (an absolute path with the suffix .toml) and no repository",
        remedy="Write the word fsmount, and say the rest in the options or in /etc/fsmount/config.toml;"
        " where a file of that name is in the current folder, go to another.",
    )


def _app(value: str, prefix: str | None) -> str:
    """NAME=REPOSITORY; NAME alone is the repository of that name below the first field's."""
    if "=" in value:
        return value
    if prefix is None:
        raise UsageError(f"the app {value} has no repository", remedy=f"Write app={value}=REPOSITORY.")
    return f"{value}={prefix}/{value}"


def _split(options: str) -> Iterator[str]:
    """At commas that are in no quotes, as mount(8) does; the quotes go."""
    option, is_quoted = "", False
    for character in options:
        if character == '"':
            is_quoted = not is_quoted
        elif character == "," and not is_quoted:
            yield option
            option = ""
        else:
            option += character
    yield option


if __name__ == "__main__":
    sys.exit(main())
