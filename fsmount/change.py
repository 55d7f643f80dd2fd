"""change: what differs between two configurations, and what of that a running process cannot take over."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from fsmount.config import Cache, Config, Deadlines, Defaults, Metrics, Network, Registry

#: What a process was started with it keeps: the kernel, and other processes of the cache, rely on it.
_NEEDS_RESTART = frozenset({"mountpoint", "cache.path", "cache.max_layer_size", "metrics.textfile"})


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """What a new configuration has changed in a running mount.

    `added`, `removed` and `changed` are apps; `settings` are other keys, as the file spells them, whose new values are
    in force; `needs_restart` are those whose values are as before.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()


def compare(old: Config, new: Config) -> ReloadReport:
    """What is another in the new configuration."""
    keys = (*_keys(old, new), *_registries(old.registries, new.registries))
    return ReloadReport(
        added=tuple(sorted(new.apps.keys() - old.apps.keys())),
        removed=tuple(sorted(old.apps.keys() - new.apps.keys())),
        changed=tuple(sorted(name for name, app in new.apps.items() if old.apps.get(name, app) != app)),
        settings=tuple(key for key in keys if key not in _NEEDS_RESTART),
        needs_restart=tuple(key for key in keys if key in _NEEDS_RESTART),
    )


def applicable(old: Config, new: Config) -> Config:
    """The new configuration, with the old one's values of what needs a restart."""
    kept = {"path": old.cache.path, "max_layer_size": old.cache.max_layer_size}
    cache = new.cache.model_copy(update=kept)
    return new.model_copy(update={"mountpoint": old.mountpoint, "cache": cache, "metrics": old.metrics})


_Table: TypeAlias = Cache | Defaults | Network | Deadlines | Metrics


def _keys(old: Config | _Table, new: Config | _Table, prefix: str = "") -> Iterator[str]:
    """The keys outside of apps and registries whose values differ, as the file spells them."""
    for name, field in type(new).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        key = prefix + (field.alias or name)
        if isinstance(after, _Table):
            yield from _keys(before, after, f"{key}.")
        elif before != after and key not in ("apps", "registries"):
            yield key


def _registries(old: Mapping[str, Registry], new: Mapping[str, Registry]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f'registries."{name}"'
