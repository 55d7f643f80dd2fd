"""Where a registry may send us, and where not."""

import httpx
import pytest

from fsmount.errors import Refused, Unreachable
from fsmount.registry.urls import follow, is_loopback, origin, shown

FAR = httpx.URL("https://registry.example/v2/a/blobs/x")
NEAR = httpx.URL("http://127.0.0.1:5000/v2/a/blobs/x")


def followed(base: httpx.URL, location: str) -> str:
    return str(follow(base, location, registry=base, purpose="redirect"))


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("https://cdn.example/x?sig=a%2Bb+c", "https://cdn.example/x?sig=a%2Bb+c"),
        ("/elsewhere?a=b", "https://registry.example/elsewhere?a=b"),
        ("//cdn.example/x", "https://cdn.example/x"),
        ("https://10.0.0.1/x", "https://10.0.0.1/x"),
    ],
)
def test_another_https_server_is_allowed_and_its_query_kept(location: str, url: str) -> None:
    assert followed(FAR, location) == url


@pytest.mark.parametrize(
    "location",
    [
        "http://cdn.example/x",
        "ftp://cdn.example/x",
        "file:///etc/passwd",
        "https://user:secret@cdn.example/x",
        "https://127.0.0.1/x",
        "https://127.1/x",
        "https://2130706433/x",
        "https://0x7f000001/x",
        "https://[::1]/x",
        "https://[::ffff:127.0.0.1]/x",
        "https://localhost/x",
        "https://localhost./x",
        "https://a.localhost/x",
        "https://169.254.169.254/latest/meta-data",
        "https://[fe80::1]/x",
        "https://0.0.0.0/x",
    ],
)
def test_a_far_registry_may_not_lead_to_plain_http_or_to_this_machine(location: str) -> None:
    with pytest.raises((Refused, Unreachable)) as caught:
        followed(FAR, location)
    assert "secret" not in str(caught.value)


def test_a_registry_on_this_machine_may_lead_to_this_machine_and_to_plain_http() -> None:
    assert followed(NEAR, "http://127.0.0.1:9000/x") == "http://127.0.0.1:9000/x"
    assert followed(NEAR, "https://cdn.example/x") == "https://cdn.example/x"


def test_what_is_no_url_is_the_servers_fault() -> None:
    with pytest.raises(Unreachable):
        followed(FAR, "https://a.example/\0")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1"])
def test_loopback_names(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["registry.example", "10.0.0.1", "localhost.example", "192.168.0.1"])
def test_other_names_are_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_an_origin_is_scheme_host_and_port() -> None:
    assert origin(httpx.URL("https://a/x")) == origin(httpx.URL("https://a:443/y"))
    assert origin(httpx.URL("https://a/")) != origin(httpx.URL("https://a:444/"))
    assert origin(httpx.URL("https://a/")) != origin(httpx.URL("http://a/"))


def test_queries_and_passwords_are_not_shown() -> None:
    assert shown(httpx.URL("https://u:secret@a.example/x?sig=secret#secret")) == "https://a.example/x"
