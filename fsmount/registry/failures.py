"""What went wrong, in the words of errors.py: the one reader of httpx's exceptions and of HTTP statuses."""

import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import trio

from fsmount.errors import AccessDenied, DeadlineExpired, FsmountError, NotFound, RateLimited, Unreachable
from fsmount.registry.urls import shown

# The nearest ancestor counts. Messages of httpx and h11 are not repeated: they may quote a header.
_SENTENCES: dict[type[Exception], tuple[type[Unreachable], str]] = {
    httpx.ConnectTimeout: (DeadlineExpired, "did not take our connection in time"),
    httpx.TimeoutException: (DeadlineExpired, "was silent for too long"),
    httpx.ConnectError: (Unreachable, "cannot be reached"),
    httpx.ReadError: (Unreachable, "closed the connection"),
    httpx.RemoteProtocolError: (Unreachable, "broke off, or does not speak HTTP"),
    httpx.RequestError: (Unreachable, "cannot be asked"),
    httpx.InvalidURL: (Unreachable, "gave a URL that is none"),
}

#: httpx exceptions that only a mistake of ours can raise, and that therefore stay what they are.
OUR_MISTAKES: frozenset[type[Exception]] = frozenset(
    {
        httpx.HTTPStatusError,  # raise_for_status is not called
        httpx.CookieConflict,  # cookies are not kept
        httpx.StreamError,  # a body read twice, or after its end
    }
)

_NOT_FOUND_CODES = frozenset({"MANIFEST_UNKNOWN", "NAME_UNKNOWN", "BLOB_UNKNOWN"})
_LONGEST_EXPLANATION = 300


@contextmanager
def map_exceptions(url: httpx.URL) -> Iterator[None]:
    """Turn what httpx raises, and a deadline of ours that expires, into Unreachable and its kinds."""
    try:
        yield
    except trio.TooSlowError as error:
        raise DeadlineExpired(f"{shown(url)} was silent for too long") from error
    except (httpx.RequestError, httpx.InvalidURL) as error:
        kind, sentence = _sentence(type(error))
        reason, remedy = _reason(error)
        # LocalProtocolError quotes the header that h11 refused: no chain, so no traceback shows it.
        cause = None if isinstance(error, httpx.LocalProtocolError) else error
        raise kind(f"{shown(url)} {sentence}{reason}", remedy=remedy) from cause


def from_status(status: int, body: bytes, *, what: str, host: str) -> FsmountError:
    """The error that an answer other than the expected one means; what is what was asked for."""
    codes, explanation = _explain(body)
    said = f"{host} answers {status}" + (f" ({explanation})" if explanation else "")
    if status == 404 or codes & _NOT_FOUND_CODES or (codes == {"UNKNOWN"} and "not found" in explanation):
        return NotFound(f"{what} does not exist: {said}")
    if status in (401, 403):
        return AccessDenied(
            f"no access to {what}: {said}",
            remedy=f"Check that it exists, and that your credentials may read it: fsmount login {host}",
        )
    if status == 429:
        return RateLimited(f"{what} cannot be fetched now: {said}")
    return Unreachable(f"{what} cannot be fetched: {said}")


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all that led to it; trio keeps the failures of several addresses as a group."""
    waiting: list[BaseException] = [error]
    seen: set[int] = set()
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if isinstance(current, BaseExceptionGroup):
            waiting.extend(current.exceptions)
        waiting.extend(cause for cause in (current.__cause__, current.__context__) if cause)


def is_untrusted(error: BaseException) -> bool:
    """Whether a certificate was refused: asking again is of no use, plain http out of the question."""
    return any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes(error))


def speaks_no_tls(error: BaseException) -> bool:
    """Whether the server answered our TLS greeting with something else, or nobody listens."""
    return any(
        isinstance(cause, ConnectionRefusedError)
        or (isinstance(cause, ssl.SSLError) and cause.reason == "WRONG_VERSION_NUMBER")
        for cause in causes(error)
    )


def _sentence(kind: type[Exception]) -> tuple[type[Unreachable], str]:
    return next(_SENTENCES[ancestor] for ancestor in kind.__mro__ if ancestor in _SENTENCES)


def _reason(error: Exception) -> tuple[str, str | None]:
    """What the system or the TLS library said; on trio it is only in the causes."""
    for cause in causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            remedy = "Add the authority's certificate to the system's store (update-ca-certificates)."
            return f": its certificate is not trusted: {cause.verify_message}", remedy
        if isinstance(cause, ssl.SSLError) and cause.reason == "WRONG_VERSION_NUMBER":
            return ": it does not speak TLS", "If it shall be used over plain http, say so with plain_http."
        if isinstance(cause, ssl.SSLError):
            return f": TLS: {cause.reason}", None
        if isinstance(cause, socket.gaierror):
            return f": {cause.strerror}", "Check the name, and the DNS servers of this machine."
        if isinstance(cause, OSError) and cause.errno:
            return f": {cause.strerror}", None
    return "", None


def _explain(body: bytes) -> tuple[set[str], str]:
    """The error codes of a distribution-spec error body, and its text made safe for a terminal."""
    try:
        errors = json.loads(body)["errors"]
        codes = {str(error.get("code", "")) for error in errors}
        text = "; ".join(f"{error.get('code', '')}: {error.get('message', '')}" for error in errors)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return set(), ""
    return codes, "".join(c if c.isprintable() else " " for c in text)[:_LONGEST_EXPLANATION]
