"""Foreign exceptions stop at the package that owns their library."""

import inspect

import httpcore
import httpx
import pytest

from fsmount.errors import FsmountError, Unreachable
from fsmount.registry.failures import OUR_MISTAKES, map_exceptions

URL = httpx.URL("https://registry.example/v2/x?sig=secret")


def exceptions_of(module: object) -> list[type[Exception]]:
    found = (value for _, value in inspect.getmembers(module, inspect.isclass))
    return [kind for kind in found if issubclass(kind, Exception)]


def made(kind: type[Exception]) -> Exception:
    """An instance, whatever its constructor wants; its message is one that must not be repeated."""
    try:
        return kind("secret")
    except TypeError:
        return kind.__new__(kind, "secret")


@pytest.mark.parametrize("kind", exceptions_of(httpx), ids=lambda kind: kind.__name__)
def test_every_exception_of_httpx_is_mapped_or_a_mistake_of_ours(kind: type[Exception]) -> None:
    if kind is httpx.HTTPError or issubclass(kind, tuple(OUR_MISTAKES)):
        return  # the first is only the ancestor of others
    with pytest.raises(FsmountError) as caught, map_exceptions(URL):
        raise made(kind)
    assert isinstance(caught.value, Unreachable)
    assert "secret" not in str(caught.value)


def test_httpx_has_no_ancestor_of_its_exceptions_that_we_have_not_heard_of() -> None:
    roots = {kind for kind in exceptions_of(httpx) if kind.__base__ in (Exception, ValueError, RuntimeError)}
    assert roots == {httpx.HTTPError, httpx.InvalidURL, httpx.CookieConflict, httpx.StreamError}


def test_httpcore_raises_nothing_that_httpx_does_not_translate() -> None:
    from httpx._transports.default import _load_httpcore_exceptions

    translated = tuple(_load_httpcore_exceptions())
    # A pool that is misused; it cannot come from outside.
    ours = {httpcore.ConnectionNotAvailable}
    assert [k for k in exceptions_of(httpcore) if k not in ours and not issubclass(k, translated)] == []
