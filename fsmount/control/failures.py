"""failures: how an error of an action travels, and is the same error again for who asked."""

import json
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from types import MappingProxyType

from fsmount.errors import (
    AccessDenied,
    Corrupt,
    DeadlineExpired,
    FsmountError,
    NoSpace,
    NotFound,
    RateLimited,
    Refused,
    Unreachable,
    Unsupported,
    UsageError,
)

#: How HTTP has the failures of an action; what is not named is 500.
_STATUSES: Mapping[type[FsmountError], HTTPStatus] = MappingProxyType(
    {
        UsageError: HTTPStatus.BAD_REQUEST,
        NotFound: HTTPStatus.NOT_FOUND,
        AccessDenied: HTTPStatus.FORBIDDEN,
        Refused: HTTPStatus.CONFLICT,
        RateLimited: HTTPStatus.TOO_MANY_REQUESTS,
        Unsupported: HTTPStatus.NOT_IMPLEMENTED,
        Corrupt: HTTPStatus.BAD_GATEWAY,
        Unreachable: HTTPStatus.BAD_GATEWAY,
        DeadlineExpired: HTTPStatus.GATEWAY_TIMEOUT,
        NoSpace: HTTPStatus.INSUFFICIENT_STORAGE,
    }
)


def status_of(error: FsmountError) -> HTTPStatus:
    """What HTTP calls it."""
    kinds = (kind for kind in type(error).__mro__ if kind in _STATUSES)
    return next((_STATUSES[kind] for kind in kinds), HTTPStatus.INTERNAL_SERVER_ERROR)


def encode(error: FsmountError) -> bytes:
    """JSON of what `decode` needs."""
    fields = {
        "kind": type(error).__name__,
        "message": error.message,
        "remedy": error.remedy,
        "exit_code": error.exit_code,
    }
    return json.dumps({"error": fields}).encode() + b"\n"


def decode(content: bytes) -> FsmountError:
    """The error. Raises: ValueError, if there is none in it."""
    try:
        fields = json.loads(content)["error"]
        name, message, remedy = fields["kind"], str(fields["message"]), fields["remedy"]
        kind = next((kind for kind in _kinds(FsmountError) if kind.__name__ == name), FsmountError)
        error = kind(message, remedy=None if remedy is None else str(remedy))
        # Of a kind that only the other end knows, this is what it said.
        error.exit_code = int(fields["exit_code"])
    except (LookupError, TypeError) as wrong:
        raise ValueError(f"not the form of an error: {wrong!r}") from wrong
    return error


def _kinds(root: type[FsmountError]) -> Iterator[type[FsmountError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _kinds(kind)
