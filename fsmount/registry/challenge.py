"""WWW-Authenticate: what a registry that answered 401 wants to see."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_TOKEN = "[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_PARAMETER = re.compile(rf'({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))')
_SCHEME = re.compile(_TOKEN)
_SEPARATOR = re.compile(r"[\s,]*")
#: Longer headers are cut: no registry has them, and an attacker's would take quadratic time.
_LONGEST_HEADER = 8192


@dataclass(frozen=True, slots=True)
class BasicChallenge:
    """User and password, with every request."""


@dataclass(frozen=True, slots=True)
class BearerChallenge:
    """A token from the server at realm, for service; scope is what this request would have needed."""

    realm: str
    service: str | None
    scope: tuple[str, ...]


Challenge = BasicChallenge | BearerChallenge


def parse_challenges(headers: Iterable[str]) -> Challenge | None:
    """The best challenge that we can meet: Bearer before Basic; others (Negotiate, …) are passed over."""
    found = [challenge for header in headers for challenge in _split(header[:_LONGEST_HEADER])]
    for scheme, parameters in found:
        if scheme == "bearer" and parameters.get("realm"):
            scope = tuple(parameters.get("scope", "").split())
            return BearerChallenge(parameters["realm"], parameters.get("service"), scope)
    return BasicChallenge() if any(scheme == "basic" for scheme, _ in found) else None


def _split(header: str) -> list[tuple[str, dict[str, str]]]:
    """All challenges of one header line: schemes and parameter names in lower case, the first of equals."""
    challenges: list[tuple[str, dict[str, str]]] = []
    position = 0
    while True:
        separator = _SEPARATOR.match(header, position)
        position = separator.end() if separator else position
        if challenges and (match := _PARAMETER.match(header, position)):
            name, quoted, bare = match.groups()
            value = bare if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            challenges[-1][1].setdefault(name.lower(), value)
        elif match := _SCHEME.match(header, position):
            challenges.append((match.group().lower(), {}))
        else:
            return challenges
        position = match.end()
