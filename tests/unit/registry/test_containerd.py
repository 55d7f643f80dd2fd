"""Containerd's hosts.toml."""

import logging
import tomllib
from pathlib import Path

import pytest

from fsmount.errors import Invalid
from fsmount.oci.shape import Shape
from fsmount.registry import containerd
from fsmount.registry.containerd import Address, Host, HostsFile
from fsmount.registry.endpoint import Capability, ClientCertificate, Tls

PATH = Path("/certs.d/r.example/hosts.toml")


def parse(text: str) -> HostsFile:
    return containerd.parse(Shape(tomllib.loads(text), str(PATH)), PATH)


def server(settings: str) -> Host:
    return parse(f'server = "https://r.example"\n{settings}').server


def address(server: str, *, override: str = "") -> Address | None:
    return parse(f'server = "{server}"\n{override}').server.address


@pytest.mark.parametrize(
    ("domain", "names"),
    [
        ("r.example", ["r.example", "_default"]),
        ("r.example:5000", ["r.example_5000_", "r.example:5000", "_default"]),
        ("[::1]", ["[::1]", "_default"]),
        ("[::1]:5000", ["[::1]_5000_", "[::1]:5000", "_default"]),
    ],
)
def test_a_registrys_folder_may_be_spelled_without_a_colon(domain: str, names: list[str]) -> None:
    folders = containerd.folders(Path("/root"), domain)
    assert list(folders) == [Path("/root/etc/containerd/certs.d") / name for name in names]


def test_hosts_are_asked_in_the_order_of_the_file_and_the_server_at_last() -> None:
    file = parse("""
        server = "https://r.example"
        [host."https://z.example"]
        [host."https://a.example".header]
        x = "1"
        [host."https://m.example"]
        [host."https://a.example"]
        skip_verify = true
    """)
    hosts = [host.address.host for host in file.mirrors if host.address]
    assert hosts == ["z.example", "a.example", "m.example"]
    assert file.server.address == Address("https", "r.example", "/v2/")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://m.example", ("https", "m.example", "/v2/")),
        ("https://m.example/", ("https", "m.example", "/v2/")),
        ("https://m.example/v2", ("https", "m.example", "/v2/")),
        ("https://m.example/v2/", ("https", "m.example", "/v2/")),
        ("http://m.example:5000", ("http", "m.example:5000", "/v2/")),
        ("https://M.example:443/Proj/../x//y", ("https", "m.example:443", "/x/y/v2/")),
        ("https://m.example/v2/proj", ("https", "m.example", "/v2/proj/v2/")),
        ("https://m.example/a%20b", ("https", "m.example", "/a%20b/v2/")),
        ("m.example:5000", ("https", "m.example:5000", "/v2/")),
        ("m.example/proj", ("https", "m.example", "/proj/v2/")),
        ("https://[::1]:5000", ("https", "[::1]:5000", "/v2/")),
    ],
)
def test_v2_ends_the_path_and_https_is_the_scheme_of_none(text: str, expected: tuple[str, str, str]) -> None:
    assert address(text) == Address(*expected)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("https://m.example", "/"),
        ("https://m.example/", "/"),
        ("https://m.example/v2/proj/", "/v2/proj/"),
        ("https://m.example/proj", "/proj/"),
    ],
)
def test_override_path_leaves_the_path_as_it_is_written(text: str, path: str) -> None:
    assert address(text, override="override_path = true") == Address("https", "m.example", path)
    assert address(text, override="override_path = false") != Address("https", "m.example", path)


def test_without_a_server_the_registry_itself_is_asked_for_everything_with_the_settings_at_the_top() -> None:
    host = parse("""
        capabilities = ["pull"]
        skip_verify = true
        dial_timeout = "1s"
        header = { x = "1" }
        [host."https://m.example"]
    """).server
    assert host == Host(None, Capability.ALL, Tls(verify=False), (("x", "1"),), 1.0)


def test_the_settings_at_the_top_are_those_of_the_server_alone() -> None:
    (mirror,) = parse("""
        server = "https://r.example"
        ca = "ca.crt"
        capabilities = ["pull"]
        [host."https://m.example"]
    """).mirrors
    assert mirror == Host(Address("https", "m.example", "/v2/"), Capability.ALL, Tls(), (), None)


@pytest.mark.parametrize(
    ("text", "capabilities"),
    [
        ("", Capability.ALL),
        ("capabilities = []", Capability.ALL),
        ('capabilities = ["pull"]', Capability.PULL),
        ('capabilities = ["pull", "Resolve"]', Capability.PULL | Capability.RESOLVE),
        ('capabilities = ["push"]', Capability.PUSH),
        ('capabilities = ["referrers"]', Capability.REFERRERS),
    ],
)
def test_capabilities_say_what_a_host_is_asked_for(text: str, capabilities: Capability) -> None:
    assert server(text).capabilities == capabilities


@pytest.mark.parametrize(
    ("text", "tls"),
    [
        ("", Tls()),
        ('ca = "ca.crt"', Tls((PATH.parent / "ca.crt",))),
        ('ca = ["/etc/a.crt", "sub/b.crt"]', Tls((Path("/etc/a.crt"), PATH.parent / "sub/b.crt"))),
        ('client = "c.pem"', Tls(client=ClientCertificate(PATH.parent / "c.pem"))),
        ('client = ["/c.pem"]', Tls(client=ClientCertificate(Path("/c.pem")))),
        (
            'client = [["c.cert", "/c.key"]]',
            Tls(client=ClientCertificate(PATH.parent / "c.cert", Path("/c.key"))),
        ),
        ('client = [["c.pem", ""]]', Tls(client=ClientCertificate(PATH.parent / "c.pem"))),
        ("skip_verify = true", Tls(verify=False)),
        ("skip_verify = false", Tls()),
    ],
)
def test_certificates_lie_beside_the_file_unless_their_paths_are_absolute(text: str, tls: Tls) -> None:
    assert server(text).tls == tls


def test_headers_have_one_value_or_several_and_stay_in_order() -> None:
    text = """
        [header]
        X-Dragonfly-Registry = "https://r.example"
        Authorization = ["Bearer a", "Bearer b"]
    """
    assert server(text).headers == (
        ("X-Dragonfly-Registry", "https://r.example"),
        ("Authorization", "Bearer a"),
        ("Authorization", "Bearer b"),
    )
    assert "Bearer" not in repr(server(text))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("200ms", 0.2),
        ("1s", 1.0),
        ("1m30s", 90.0),
        ("1h", 3600.0),
        ("1.5s", 1.5),
        (".5s", 0.5),
        ("+2s", 2.0),
        ("5µs", 5e-6),
        ("0", None),
        ("0s", None),
        ("", None),
    ],
)
def test_dial_timeout_is_a_duration_of_go(text: str, seconds: float | None) -> None:
    assert server(f'dial_timeout = "{text}"').connect_seconds == (
        None if seconds is None else pytest.approx(seconds)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server = 1", r"server is not a string"),
        ('server = "ftp://r.example"', r"server is no http or https URL"),
        ('server = "https://"', r"server is no http or https URL"),
        ('server = "https://r.example:port"', r"server is no URL"),
        ('server = "https://xn--"', r"server is no URL"),
        ('server = "https://r.example/?x=1"', r"server has more"),
        ('server = "https://r.example/#x"', r"server has more"),
        ('host = "https://m.example"', r"host is not an object"),
        ('[host]\n"https://m.example" = 1', r"host 'https://m.example' is not an object"),
        ('[host."ftp://m.example"]', r"host 'ftp://m.example' is no http"),
        ('[host."https://m.example"]\nskip_verify = "yes"', r"host 'https://m.example'.skip_verify"),
        ('[host."https://m.example".host."https://n.example"]', r"host 'https://m.example' holds a host"),
        ('capabilities = "pull"', r"capabilities is not a list"),
        ('capabilities = ["pull", "fly"]', r"capabilities\[1\] is none of pull, resolve, push, referrers"),
        ("ca = 1", r"ca is not a list"),
        ("ca = [1]", r"ca\[0\] is not a string"),
        ("client = 1", r"client is no path"),
        ("client = []", r"client is empty"),
        ('client = ["a", 1]', r"client is no path"),
        ('client = [["a"]]', r"client is no path"),
        ('client = [["a", "b", "c"]]', r"client is no path"),
        ('client = [["a", 1]]', r"client is no path"),
        ("override_path = 1", r"override_path is not a boolean"),
        ('dial_timeout = "10"', r"dial_timeout is no duration"),
        ('dial_timeout = "-1s"', r"dial_timeout is no duration"),
        ('dial_timeout = "1 s"', r"dial_timeout is no duration"),
        ("dial_timeout = 10", r"dial_timeout is not a string"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_place(text: str, message: str) -> None:
    if not text.startswith(("server", "host", "[")):
        text = f'server = "https://r.example"\n{text}'
    with pytest.raises(Invalid, match=rf"^{PATH}: {message}"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        'header = "secret"',
        "header = { x = { secret = 1 } }",
        'header = { x = ["secret", 1] }',
        'header = { x = "secret\\nY: 1" }',
        'header = { x = "sécret" }',
        'header = { "x y" = "secret" }',
        '[host."https://user:secret@m.example"]',
        '[host."https://m.example?x=secret"]',
    ],
)
def test_what_may_be_a_secret_is_not_quoted(text: str) -> None:
    with pytest.raises(Invalid, match=str(PATH)) as caught:
        parse(text)
    assert "secret" not in str(caught.value)
    assert "sécret" not in str(caught.value)


def test_what_is_ignored_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse("""
            insecure = true
            [host."https://m.example"]
            server = "https://r.example"
            client = ["a.pem", "b.pem"]
        """)
    assert len(caplog.records) == 1
    for words in (
        str(PATH),
        "key 'insecure'",
        "host 'https://m.example': the unknown key 'server'",
        "client",
    ):
        assert words in caplog.text


def test_of_several_client_certificates_the_first_is_used_which_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert server('client = ["/a.pem", "/b.pem"]').tls.client == ClientCertificate(Path("/a.pem"))
    assert "every client but the first" in caplog.text


def test_a_file_without_anything_to_ignore_is_not_worth_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse("""
            server = "https://r.example"
            capabilities = ["pull"]
            ca = "a"
            client = ["b"]
            skip_verify = true
            override_path = false
            dial_timeout = "1s"
            header = {}
            [host."https://m.example"]
            header = {}
        """)
    assert caplog.records == []
