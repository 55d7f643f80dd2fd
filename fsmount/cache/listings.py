"""Listings: what each folder whose names may change has listed last, so that it is known before anybody is asked."""

import json
from dataclasses import dataclass

from fsmount.cache.state import State


@dataclass(frozen=True, slots=True)
class Listing:
    """The names in a folder.

    `shown` are those of them that are listed, and `changed_ns` is when these were others last, in nanoseconds of the
    epoch: the folder's mtime, by which a kernel knows that the listing which it keeps is old.
    """

    names: frozenset[str]
    shown: frozenset[str]
    changed_ns: int


class Listings:
    """On disk, by the path of a folder below the mount point, and the origin if it is that of an app."""

    def __init__(self, state: State) -> None:
        self._state = state

    def load(self, path: str, origin: str = "") -> Listing | None:
        """What is known of a folder. Raises: FsmountError."""
        query = "SELECT names, shown, changed_ns FROM listings WHERE app = ? AND origin = ?"
        row = self._state.row(query, path, origin)
        if row is None:
            return None
        names, shown, changed_ns = row
        return Listing(frozenset(json.loads(names)), frozenset(json.loads(shown)), int(changed_ns))

    def save(self, path: str, listing: Listing, origin: str = "") -> None:
        """Raises: FsmountError, NoSpace."""
        self._state.write(
            "INSERT OR REPLACE INTO listings VALUES (?, ?, ?, ?, ?)",
            path,
            origin,
            json.dumps(sorted(listing.names)),
            json.dumps(sorted(listing.shown)),
            listing.changed_ns,
        )
