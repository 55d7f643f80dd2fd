"""SignedUrls: where blobs were redirected to, for as long as such an address is good."""

from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl

import httpx

#: Those that may be held: 64 bytes of name and a URL of 1 KiB each.
_MOST = 10_000
#: The life of an address that does not tell, and what is left of one that does when it is used no more.
_UNKNOWN_SECONDS = 300.0
_MARGIN_SECONDS = 60.0
_LONGEST_SECONDS = 3600.0

#: What stores answer when an address has expired, or its object moved.
REFUSALS = frozenset({301, 302, 303, 307, 308, 400, 401, 403, 404, 410})


class SignedUrls:
    """The address of each blob that a registry has redirected away from itself."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[httpx.URL, float]] = OrderedDict()

    def find(self, path: str, now: float) -> httpx.URL | None:
        """Where the blob at a path of the registry is, if that is known and still good; now is trio's time."""
        found = self._known.get(path)
        if found is not None and found[1] <= now:
            del self._known[path]
            return None
        return found[0] if found else None

    def keep(self, path: str, url: httpx.URL, now: float) -> None:
        """Remember an address that was just given."""
        self._known[path] = url, now + _life_seconds(url, datetime.now(UTC))
        self._known.move_to_end(path)
        while len(self._known) > _MOST:
            self._known.popitem(last=False)

    def drop(self, path: str) -> None:
        """Forget an address that was refused."""
        self._known.pop(path, None)


def _life_seconds(url: httpx.URL, now: datetime) -> float:
    """How long an address may be used from now on, as its query says."""
    query = {name.lower(): value for name, value in parse_qsl(url.query.decode("ascii", "replace"))}
    expires = _signed(query, "x-amz") or _signed(query, "x-goog") or _instant(query)
    if expires is None:
        return _UNKNOWN_SECONDS
    return min((expires - now).total_seconds() - _MARGIN_SECONDS, _LONGEST_SECONDS)


def _signed(query: Mapping[str, str], prefix: str) -> datetime | None:
    """S3 and Google: when it was signed, and for how long."""
    try:
        signed_at = datetime.strptime(query[f"{prefix}-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        return signed_at + timedelta(seconds=int(query[f"{prefix}-expires"]))
    except (KeyError, ValueError, OverflowError):
        return None


def _instant(query: Mapping[str, str]) -> datetime | None:
    """Azure (`se`, ISO 8601); CloudFront and older S3 (`Expires`, seconds of the epoch)."""
    try:
        if "se" in query:
            instant = datetime.fromisoformat(query["se"])
            return instant if instant.tzinfo else instant.replace(tzinfo=UTC)
        return datetime.fromtimestamp(int(query["expires"]), UTC)
    except (KeyError, ValueError, OverflowError, OSError):
        return None
