"""registries.conf: where podman, buildah and skopeo find images (containers-registries.conf(5), version 2)."""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fsmount.errors import AccessDenied, Invalid, UsageError
from fsmount.oci.reference import Reference
from fsmount.oci.shape import Shape
from fsmount.registry.endpoint import Capability

_log = logging.getLogger(__name__)

# Not REFERRERS: an empty list from a mirror that keeps none would hide what the origin has. Not PUSH: podman
# pushes past mirrors too.
MIRROR = Capability.PULL | Capability.RESOLVE

# An endpoint does not know whether a digest is asked for because a tag led to it. "tag-only" promises that
# the whole image of a tag may come from there, and where the origin is out of reach it must: so it includes
# PULL, and such a mirror is also asked for images that are pinned by digest, which podman would not do.
# "digest-only" is for all that is asked for by digest, also if a tag, resolved elsewhere, led to it.
_PULL_FROM_MIRROR = {
    "": MIRROR,
    "all": MIRROR,
    "tag-only": MIRROR,
    "digest-only": Capability.PULL,
}
_RULE_KEYS = frozenset({"prefix", "location", "insecure", "blocked", "mirror-by-digest-only", "mirror"})
_MIRROR_KEYS = frozenset({"location", "insecure", "pull-from-mirror"})


@dataclass(frozen=True, slots=True)
class Location:
    """What takes the prefix's place in a name."""

    #: `host[:port][/path]`; empty leaves the name as it is.
    text: str
    insecure: bool
    capabilities: Capability = Capability.ALL


@dataclass(frozen=True, slots=True)
class Rule:
    """A `[[registry]]` table: what holds for names that begin with its prefix."""

    prefix: str
    mirrors: tuple[Location, ...]
    location: Location
    blocked: bool
    written_in: Path


@dataclass(frozen=True, slots=True)
class Place:
    """A server, and the name that the repository has there."""

    host: str
    repository: str
    insecure: bool
    capabilities: Capability = Capability.ALL
    is_origin: bool = True
    written_in: Path | None = None


def files(root: Path, home: Path, environ: Mapping[str, str]) -> list[Path]:
    """The files that count; later ones overrule earlier ones, prefix by prefix. The first may be missing.

    Raises: UsageError, if the environment names one that does not exist.
    """
    system, user = root / "etc/containers", home / ".config/containers"
    named = environ.get("CONTAINERS_REGISTRIES_CONF") or environ.get("REGISTRIES_CONFIG_PATH")
    if named and not os.path.exists(named):
        raise UsageError(
            f"{named} does not exist, and CONTAINERS_REGISTRIES_CONF or REGISTRIES_CONFIG_PATH names it",
            remedy="Correct the variable, or take it out of the environment.",
        )
    if not named and os.path.exists(user / "registries.conf"):
        main, folders = user / "registries.conf", [user]
    else:
        main, folders = Path(named) if named else system / "registries.conf", [system, user]
    return [main, *(file for folder in folders for file in _drop_ins(folder / "registries.conf.d"))]


def parse(file: Shape, path: Path) -> dict[str, Rule]:
    """The rules of a file by their prefixes; of two for one prefix the first counts. Raises: Invalid."""
    if "registries" in file:
        raise Invalid(f"{file.where} is in the format of version 1, which is not read")
    rules: dict[str, Rule] = {}
    ignored: list[str] = []
    for table in _tables(file, "registry"):
        rule = _rule(table, path)
        rules.setdefault(rule.prefix, rule)
        ignored += _unknown(table, _RULE_KEYS)
        for mirror in _tables(table, "mirror"):
            ignored += _unknown(mirror, _MIRROR_KEYS)
    if ignored:
        _log.warning("unknown keys are ignored: %s", "; ".join(ignored))
    return rules


def places(rules: Mapping[str, Rule], domain: str, repository: str) -> tuple[Place, ...]:
    """Whom the rule with the longest matching prefix says to ask, the origin last; () if none matches.

    Raises: AccessDenied (blocked), UsageError (a location that makes no name).
    """
    name = f"{domain}/{repository}"
    rule = _find(rules, name)
    if rule is None:
        return ()
    _refuse_if_blocked(rule, name)
    found = []
    for location in (*rule.mirrors, rule.location):
        is_origin = location is rule.location
        target = _rewritten(name, rule, location)
        there = _find(rules, target.name)
        if there is not None and there.blocked and not is_origin:
            continue
        if there is not None:
            _refuse_if_blocked(there, target.name)
        found.append(
            Place(
                target.domain,
                target.repository,
                location.insecure,
                location.capabilities,
                is_origin,
                rule.written_in,
            )
        )
    return tuple(found)


def _drop_ins(folder: Path) -> list[Path]:
    if not os.path.isdir(folder):
        return []
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(".conf") and not entry.is_dir()]
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be read: {error.strerror}",
            remedy="Make it readable: it decides which servers may be asked.",
        ) from error
    return [folder / name for name in sorted(names)]


def _rule(table: Shape, path: Path) -> Rule:
    location = _location(table, "location")
    prefix = _location(table, "prefix") or location
    if not prefix:
        raise Invalid(f"{table.where} has neither prefix nor location")
    if prefix.startswith("*."):
        if set(prefix) & set("/@:"):
            raise Invalid(f"{table.where}: only a host may follow the * of prefix: {prefix[:80]!a}")
    elif not location:
        raise Invalid(f"{table.where} has no location, which only a prefix like *.example.com needs not")
    if "pull-from-mirror" in table:
        raise Invalid(f"{table.where} has pull-from-mirror, which belongs to a mirror")
    by_digest_only = _is_set(table, "mirror-by-digest-only")
    return Rule(
        prefix,
        tuple(_mirror(mirror, by_digest_only=by_digest_only) for mirror in _tables(table, "mirror")),
        Location(location, _is_set(table, "insecure")),
        _is_set(table, "blocked"),
        path,
    )


def _mirror(table: Shape, *, by_digest_only: bool) -> Location:
    location = _location(table, "location")
    if not location:
        raise Invalid(f"{table.where} has no location")
    use = table["pull-from-mirror"].string() if "pull-from-mirror" in table else ""
    if use not in _PULL_FROM_MIRROR:
        raise Invalid(f"{table.where}: pull-from-mirror is none of all, digest-only, tag-only: {use[:80]!a}")
    if use and by_digest_only:
        raise Invalid(f"{table.where} has pull-from-mirror, and its registry mirror-by-digest-only")
    capabilities = Capability.PULL if by_digest_only else _PULL_FROM_MIRROR[use]
    return Location(location, _is_set(table, "insecure"), capabilities)


def _location(table: Shape, key: str) -> str:
    text = table[key].string().rstrip("/") if key in table else ""
    if "://" in text:
        raise Invalid(f"{table.where}: {key} has a scheme; write host[:port][/path] alone")
    return text


def _tables(table: Shape, key: str) -> list[Shape]:
    return list(table[key].items()) if key in table else []


def _unknown(table: Shape, known: frozenset[str]) -> list[str]:
    return [f"{table.where}.{key[:80]}" for key in table.value if key not in known]


def _is_set(table: Shape, key: str) -> bool:
    return key in table and table[key].boolean()


def _find(rules: Mapping[str, Rule], name: str) -> Rule | None:
    # Sorted, so that of two prefixes of one length podman's choice is ours.
    matching = (rules[prefix] for prefix in sorted(rules) if _matched(prefix, name) is not None)
    return max(matching, key=lambda rule: len(rule.prefix), default=None)


def _matched(prefix: str, name: str) -> int | None:
    """How much of the name the prefix covers; None if it does not match."""
    if prefix.startswith("*."):
        host = re.split("[:/]", name, maxsplit=1)[0]
        return len(host) if host.endswith(prefix[1:]) else None
    end = len(prefix)
    return end if name.startswith(prefix) and name[end : end + 1] in ("", "/", ":") else None


def _rewritten(name: str, rule: Rule, location: Location) -> Reference:
    text = location.text + name[_matched(rule.prefix, name) :] if location.text else name
    try:
        target = Reference.parse(text)
    except UsageError as error:
        reason = error.message
    else:
        # `mirror/app` is a name on Docker Hub; who writes `mirror` means a server of theirs.
        if target.name == text:
            return target
        reason = f"{text!r} would be {target.name}"
    raise UsageError(
        f"{rule.written_in} leads from {name} to what is no full name: {reason}",
        remedy=f"Correct the location {location.text!r}: a host has a dot or a port, or is localhost.",
    )


def _refuse_if_blocked(rule: Rule, name: str) -> None:
    if rule.blocked:
        raise AccessDenied(
            f"{name} is blocked: {rule.written_in} says so of {rule.prefix}",
            remedy="Remove blocked = true there if that is not meant.",
        )
