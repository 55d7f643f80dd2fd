"""Docker's daemon.json."""

import json

import pytest

from fsmount.errors import Invalid
from fsmount.oci.shape import Shape
from fsmount.registry import dockerd
from fsmount.registry.dockerd import DaemonFile, Mirror


def parse(**content: object) -> DaemonFile:
    return dockerd.parse(Shape.parse(json.dumps(content).encode(), "daemon.json"))


def test_what_does_not_concern_registries_is_not_read() -> None:
    assert parse(**{"log-driver": "journald", "registry-mirrors": None}) == DaemonFile()


def test_mirrors_are_urls_of_servers_in_their_order() -> None:
    urls = ["https://One.example", "http://two.example:5000/", "https://[::1]:5000"]
    assert parse(**{"registry-mirrors": urls}).mirrors == (
        Mirror("https", "one.example"),
        Mirror("http", "two.example:5000"),
        Mirror("https", "[::1]:5000"),
    )


@pytest.mark.parametrize(
    "url",
    [
        "mirror.example",
        "ftp://mirror.example",
        "https://mirror.example/path",
        "https://mirror.example?x=secret",
        "https://mirror.example/#secret",
        "https://user:secret@mirror.example",
        "https://mirror.example:port",
        "https://xn--",
        "https://",
    ],
)
def test_a_mirror_that_is_more_or_less_than_a_server_is_an_error_that_quotes_nothing(url: str) -> None:
    with pytest.raises(Invalid, match=r"daemon\.json: registry-mirrors\[1\]") as caught:
        parse(**{"registry-mirrors": ["https://good.example", url]})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "domain", "insecure"),
    [
        ("r.example", "r.example", True),
        ("R.example", "r.Example", True),
        ("r.example:5000", "r.example:5000", True),
        # As for docker, a host without its port is another registry.
        ("r.example", "r.example:5000", False),
        ("r.example", "sub.r.example", False),
        ("http://r.example:5000", "r.example:5000", True),
        ("https://r.example", "r.example", True),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "10.1.2.3:5000", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.9.9.9/8", "10.1.2.3", True),
        ("10.1.2.3/32", "10.1.2.3:443", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("fd00::/8", "[fd00::1]:5000", True),
        ("fd00::/8", "10.1.2.3", False),
        # No name is looked up.
        ("0.0.0.0/0", "localhost:5000", False),
    ],
)
def test_insecure_registries_are_hosts_and_networks(entry: str, domain: str, insecure: bool) -> None:
    assert parse(**{"insecure-registries": ["other.example", entry]}).is_insecure(domain) is insecure


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"registry-mirrors": "https://mirror.example"}, "registry-mirrors"),
        ({"registry-mirrors": [1]}, r"registry-mirrors\[0\]"),
        ({"insecure-registries": {"r.example": True}}, "insecure-registries"),
        ({"insecure-registries": ["10.0.0.0/99"]}, r"insecure-registries\[0\]"),
        ({"insecure-registries": ["r.example/path"]}, r"insecure-registries\[0\]"),
    ],
)
def test_a_wrong_shape_is_named_by_its_place(content: dict[str, object], place: str) -> None:
    with pytest.raises(Invalid, match=f"daemon.json: {place}"):
        parse(**content)
