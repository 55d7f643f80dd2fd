"""Which proxy a URL goes through, by the rules of golang.org/x/net/http/httpproxy."""

from contextlib import suppress

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsmount.errors import UsageError
from fsmount.registry.proxies import Proxies

PROXY = "http://proxy.example:3128"
# The list that httpproxy's own tests use, and its answers.
NO_PROXY = (
    "foobar.com, .barbaz.net, *.wildcard.io, 192.168.1.1, 192.168.1.2:81, 192.168.1.3:80, 10.0.0.0/30, "
    "2001:db8::52:0:1, [2001:db8::52:0:2]:443, [2001:DB8::0:52:0:3]:80, 2002:db8:a::45/64, Host.Example:5000"
)


def proxy(url: str, **environ: str) -> str | None:
    found = Proxies.from_environment(environ).proxy_for(httpx.URL(url))
    return found and str(found)


@pytest.mark.parametrize(
    ("environ", "http", "https"),
    [
        ({}, None, None),
        ({"HTTP_PROXY": "http://a"}, "http://a", None),
        ({"HTTPS_PROXY": "http://b"}, None, "http://b"),
        ({"http_proxy": "http://a", "https_proxy": "https://b:1"}, "http://a", "https://b:1"),
        ({"HTTPS_PROXY": "http://upper", "https_proxy": "http://lower"}, None, "http://upper"),
        ({"HTTPS_PROXY": "", "https_proxy": "http://lower"}, None, "http://lower"),
        ({"ALL_PROXY": "http://a"}, None, None),
        # A program that a web server starts gets what the client wrote as HTTP_PROXY; fsmount is none.
        ({"HTTP_PROXY": "http://a", "REQUEST_METHOD": "GET"}, "http://a", None),
    ],
)
def test_each_scheme_has_its_variable_and_upper_case_comes_first(
    environ: dict[str, str], http: str | None, https: str | None
) -> None:
    assert proxy("http://registry.example/v2/", **environ) == http
    assert proxy("https://registry.example/v2/", **environ) == https
    assert proxy("ftp://registry.example/", **environ) is None


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("proxy.example", "http://proxy.example"),
        ("proxy.example:3128", "http://proxy.example:3128"),
        ("localhost", "http://localhost"),
        ("[::1]:3128", "http://[::1]:3128"),
        ("xn--proxy", "http://xn--proxy"),
        ("me:pass@proxy.example:3128", "http://me:pass@proxy.example:3128"),
        ("https://me:p%40ss%2F@proxy.example", "https://me:p%40ss%2F@proxy.example"),
    ],
)
def test_without_a_scheme_it_is_http_and_what_stands_before_the_host_is_for_the_proxy(
    value: str, url: str
) -> None:
    found = Proxies.from_environment({"HTTPS_PROXY": value})
    assert found.https == httpx.URL(url)
    assert "pass" not in repr(found)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"])
@pytest.mark.parametrize(
    "value",
    [
        "http://",
        "http://me:secret@",
        "//me:secret@proxy.example",
        "socks5://me:secret@proxy.example",
        "http://me:secret@proxy.example:port",
        "http://me:secret@proxy.example:99999",
        "http://me:secret@proxy .example",
        "http://me:secret@[::1",
        "http://me:secret@[::1%é]",
        "http://me:sec/secret@proxy.example",
        "http://me:123/secret@proxy.example",
        "http://me:123#secret@proxy.example",
        "http://me:secret\udc80@proxy.example",
        "http://me:secret\n@proxy.example",
    ],
)
def test_a_malformed_proxy_is_the_users_mistake_and_its_password_is_not_shown(
    variable: str, value: str
) -> None:
    with pytest.raises(UsageError, match=variable) as caught:
        Proxies.from_environment({variable: value})
    error: BaseException | None = caught.value
    assert "secret" not in str(error)
    assert error is not None
    assert (error.__cause__, error.__context__) == (None, None)


@pytest.mark.parametrize(
    ("host", "proxied"),
    [
        ("192.168.1.1", False),
        ("192.168.1.2", True),  # another port
        ("192.168.1.3", False),
        ("192.168.1.3:81", True),
        ("192.168.1.4", True),
        ("10.0.0.2", False),
        ("10.0.0.4", True),
        ("[::ffff:10.0.0.2]", False),
        ("[2001:db8::52:0:1]", False),
        ("[2001:db8::52:0:1]:5000", False),
        ("[2001:db8::52:0:2]", True),  # another port
        ("[2001:db8::52:0:3]", False),
        ("[2002:db8:a::123]", False),
        ("[fe80::424b:c8be:1643:a1b6]", True),
        ("barbaz.net", True),
        ("www.barbaz.net", False),
        ("barbarbaz.net", True),
        ("foobar.com", False),
        ("foobar.com:5000", False),
        ("FOOBAR.com", False),
        ("www.foobar.com", False),
        ("a.b.foobar.com", False),
        ("foofoobar.com", True),
        ("foobar.com.example", True),
        ("wildcard.io", True),
        ("nested.wildcard.io", False),
        ("awildcard.io", True),
        ("host.example:5000", False),
        ("a.host.example:5000", False),
        ("host.example", True),
        ("[1000::%25.foobar.com]", True),
    ],
)
def test_what_no_proxy_names_is_reached_directly(host: str, proxied: bool) -> None:
    assert proxy(f"http://{host}/v2/", HTTP_PROXY=PROXY, NO_PROXY=NO_PROXY) == (PROXY if proxied else None)


def test_without_a_port_the_scheme_decides() -> None:
    environ = {"HTTP_PROXY": PROXY, "HTTPS_PROXY": PROXY, "no_proxy": "host.example:443"}
    assert proxy("https://host.example/", **environ) is None
    assert proxy("http://host.example/", **environ) == PROXY
    assert proxy("http://host.example:443/", **environ) is None


@pytest.mark.parametrize("host", ["registry.example", "10.1.2.3", "[2001:db8::1]", "a:5000", "[1::%25eth0]"])
def test_an_asterisk_anywhere_means_no_proxy_at_all(host: str) -> None:
    assert proxy(f"http://{host}/", HTTP_PROXY=PROXY, NO_PROXY="other.example, *") is None


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:5000", "127.0.0.1", "127.8.9.1:5000", "[::1]", "[::ffff:127.0.0.1]", "127.1"],
)
def test_this_machine_is_always_reached_directly(host: str) -> None:
    assert proxy(f"http://{host}/", HTTP_PROXY=PROXY) is None


@pytest.mark.parametrize("host", ["localhost.example", "a.localhost", "10.0.0.1", "[::2]"])
def test_what_only_looks_like_this_machine_is_not(host: str) -> None:
    assert proxy(f"http://{host}/", HTTP_PROXY=PROXY) == PROXY


@pytest.mark.parametrize("entry", ["münchen.example", "xn--mnchen-3ya.example"])
@pytest.mark.parametrize("host", ["münchen.example", "xn--mnchen-3ya.example", "www.xn--mnchen-3ya.example"])
def test_names_outside_ascii_are_compared_as_they_are_sent(entry: str, host: str) -> None:
    assert proxy(f"http://{host}/", HTTP_PROXY=PROXY, NO_PROXY=entry) is None


@pytest.mark.parametrize(
    "entry",
    [
        "",
        ",",
        " , ",
        ":1",
        ".",
        "*.",
        "*:80",
        "*.*",
        "registry.example:http",
        "10.0.0.0/99",
        "[",
        "a b",
        "\udc80",
        ".::%é",
    ],
)
def test_an_entry_that_means_nothing_is_passed_over(entry: str) -> None:
    environ = {"HTTP_PROXY": PROXY, "NO_PROXY": f"{entry},last.example"}
    assert proxy("http://registry.example/", **environ) == PROXY
    assert proxy("http://registry.example./", **environ) == PROXY
    assert proxy("http://last.example/", **environ) is None


@given(text=st.text(), variable=st.sampled_from(["NO_PROXY", "HTTP_PROXY"]))
def test_any_text_is_read_or_is_the_users_mistake(text: str, variable: str) -> None:
    with suppress(UsageError):
        Proxies.from_environment({variable: text}).proxy_for(httpx.URL("http://registry.example"))
