"""Which file decides whom to ask, and how the servers that none describes are spoken to."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fsmount.errors import AccessDenied, UsageError
from fsmount.registry.endpoint import Capability, ClientCertificate, Endpoint, Tls
from fsmount.registry.hosts import Hosts

INSECURE = Tls(verify=False)
MIRROR = Capability.PULL | Capability.RESOLVE

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file below the root by its path from there; without a text it makes a folder."""

    def write(path: str, text: str | None = None) -> Path:
        target = tmp_path / path
        if text is None:
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(".new")
            temporary.write_text(text)
            temporary.rename(target)
        return target

    return write


def hosts(root: Path, *, plain_http: tuple[str, ...] = ()) -> Hosts:
    return Hosts(plain_http=frozenset(plain_http), root=root, environ={}, home=root / "home")


def asked(root: Path, name: str, *, plain_http: tuple[str, ...] = ()) -> tuple[Endpoint, ...]:
    domain, _, repository = name.partition("/")
    return hosts(root, plain_http=plain_http).endpoints(domain, repository)


def bases(root: Path, name: str, *, plain_http: tuple[str, ...] = ()) -> list[str]:
    return [base for endpoint in asked(root, name, plain_http=plain_http) for base in endpoint.bases]


CONTAINERD, CONTAINERS, DOCKER = (
    "etc/containerd/certs.d/docker.io/hosts.toml",
    "etc/containers/registries.conf",
    "etc/docker/daemon.json",
)
MIRRORS = {
    CONTAINERD: '[host."https://containerd.example"]',
    CONTAINERS: '[[registry]]\nlocation = "docker.io"\n[[registry.mirror]]\nlocation = "containers.example"',
    DOCKER: '{"registry-mirrors": ["https://docker.example"]}',
}


# -------------------- which file decides


@pytest.mark.parametrize(
    ("files", "mirrors"),
    [
        ([CONTAINERD, CONTAINERS, DOCKER], ["https://containerd.example/v2/"]),
        ([CONTAINERS, DOCKER], ["https://containers.example/v2/"]),
        ([DOCKER], ["https://docker.example/v2/"]),
        ([], []),
    ],
)
def test_the_first_of_containerd_containers_and_docker_that_says_something_decides_alone(
    tmp_path: Path, write: Write, files: list[str], mirrors: list[str]
) -> None:
    for path in files:
        write(path, MIRRORS[path])
    assert bases(tmp_path, "docker.io/library/web") == [*mirrors, "https://registry-1.docker.io/v2/"]


def test_what_does_not_match_decides_nothing(tmp_path: Path, write: Write) -> None:
    for path, text in MIRRORS.items():
        write(path, text)
    # docker's mirrors are for Docker Hub alone.
    assert asked(tmp_path, "r.example/a") == (
        Endpoint(("https://r.example/v2/",), "a", "r.example", is_origin=True),
    )


def test_broken_files_that_are_not_needed_are_not_read(tmp_path: Path, write: Write) -> None:
    write(CONTAINERD, MIRRORS[CONTAINERD])
    write(CONTAINERS, "[")
    write(DOCKER, "[")
    assert len(asked(tmp_path, "docker.io/library/web")) == 2


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        (CONTAINERD, "[host\n", r"hosts\.toml.*line 1"),
        (CONTAINERD, "\nserver = 1", r"hosts\.toml: server is not a string"),
        (CONTAINERS, "\n\n[[registry]", r"registries\.conf.*line 3"),
        (
            CONTAINERS,
            "[registries.search]\nregistries = []",
            r"registries\.conf is in the format of version 1",
        ),
        ("etc/containers/registries.conf.d/a.conf", "[[registry]]", r"a\.conf: registry\[0\] has neither"),
        (DOCKER, '{\n"registry-mirrors": }', r"daemon\.json.*line 2"),
        (DOCKER, "[]", r"daemon\.json is not a JSON object"),
        (DOCKER, '{"registry-mirrors": [1]}', r"daemon\.json: registry-mirrors\[0\]"),
        (DOCKER, "{" + " " * 2**20 + "}", r"daemon\.json has more than"),
    ],
)
def test_a_malformed_file_is_a_usage_error_with_a_remedy(
    tmp_path: Path, write: Write, path: str, text: str, message: str
) -> None:
    write(path, text)
    with pytest.raises(UsageError, match=message) as caught:
        asked(tmp_path, "docker.io/library/web")
    assert str(tmp_path) in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize("path", [CONTAINERD, CONTAINERS, DOCKER])
def test_an_empty_file_says_nothing(tmp_path: Path, write: Write, path: str) -> None:
    write(path, "")
    assert bases(tmp_path, "docker.io/library/web") == ["https://registry-1.docker.io/v2/"]


@pytest.mark.parametrize("path", [CONTAINERD, CONTAINERS, DOCKER])
def test_a_file_is_read_again_when_it_is_replaced_changed_or_removed(
    tmp_path: Path, write: Write, path: str
) -> None:
    asker = hosts(tmp_path)

    def mirror() -> str:
        return asker.endpoints("docker.io", "library/web")[0].domain

    assert mirror() == "docker.io"
    write(path, MIRRORS[path])
    assert mirror() == f"{path.split('/')[1]}.example"
    write(path, MIRRORS[path].replace(".example", ".test"))
    assert mirror().endswith(".test")
    (tmp_path / path).write_text(MIRRORS[path].replace(".example", ".changed"))
    assert mirror().endswith(".changed")
    (tmp_path / path).unlink()
    assert mirror() == "docker.io"


@pytest.mark.parametrize("change", ["time", "inode", "size"])
def test_a_change_shows_in_the_time_the_inode_or_the_size(tmp_path: Path, write: Write, change: str) -> None:
    path = write(DOCKER, MIRRORS[DOCKER])
    asker, before = hosts(tmp_path), path.stat()
    assert asker.endpoints("docker.io", "library/web")[0].domain == "docker.example"
    text = MIRRORS[DOCKER].replace("docker.example", "dacker.example")
    if change == "inode":
        path.rename(tmp_path / "kept")  # or its number might be given out again
        write(DOCKER, text)
    else:
        path.write_text(text + (" " if change == "size" else ""))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (1 if change == "time" else 0)))
    after = path.stat()
    assert (
        after.st_mtime_ns != before.st_mtime_ns,
        after.st_ino != before.st_ino,
        after.st_size != before.st_size,
    ) == (change == "time", change == "inode", change == "size")
    assert asker.endpoints("docker.io", "library/web")[0].domain == "dacker.example"


def test_a_file_that_has_not_changed_is_not_parsed_again(
    tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write(CONTAINERD, "unknown = 1")
    asker = hosts(tmp_path)
    with caplog.at_level(logging.WARNING):
        first = asker.endpoints("docker.io", "library/web")
        assert asker.endpoints("docker.io", "library/web") == first
    assert len(caplog.records) == 1


def test_a_broken_file_can_be_mended(tmp_path: Path, write: Write) -> None:
    write(CONTAINERS, "[")
    asker = hosts(tmp_path)
    for _ in range(2):
        with pytest.raises(UsageError):
            asker.endpoints("docker.io", "library/web")
    write(CONTAINERS, MIRRORS[CONTAINERS])
    assert len(asker.endpoints("docker.io", "library/web")) == 2


def test_a_drop_in_that_appears_counts(tmp_path: Path, write: Write) -> None:
    asker = hosts(tmp_path)
    assert len(asker.endpoints("docker.io", "library/web")) == 1
    write("etc/containers/registries.conf.d/a.conf", MIRRORS[CONTAINERS])
    assert len(asker.endpoints("docker.io", "library/web")) == 2
    write("etc/containers/registries.conf.d/b.conf", '[[registry]]\nlocation = "docker.io"\nblocked = true')
    with pytest.raises(AccessDenied, match=r"b\.conf"):
        asker.endpoints("docker.io", "library/web")
    (tmp_path / "etc/containers/registries.conf.d/b.conf").unlink()
    assert len(asker.endpoints("docker.io", "library/web")) == 2


@pytest.mark.parametrize("path", [CONTAINERD, CONTAINERS, DOCKER])
def test_an_endpoint_names_the_file_that_describes_it(tmp_path: Path, write: Write, path: str) -> None:
    write(path, MIRRORS[path])
    mirror, origin = asked(tmp_path, "docker.io/library/web")
    assert mirror.written_in == tmp_path / path
    assert origin.written_in == (None if path == DOCKER else tmp_path / path)


# -------------------- servers that nobody wrote a URL for


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("r.example/a", ["https://r.example/v2/"]),
        ("r.example:5000/a", ["https://r.example:5000/v2/"]),
        ("10.0.0.1:5000/a", ["https://10.0.0.1:5000/v2/"]),
        ("docker.io/library/web", ["https://registry-1.docker.io/v2/"]),
        ("localhost/a", ["https://localhost/v2/", "http://localhost/v2/"]),
        ("localhost:443/a", ["https://localhost:443/v2/", "http://localhost:443/v2/"]),
        ("127.0.0.2:5000/a", ["https://127.0.0.2:5000/v2/", "http://127.0.0.2:5000/v2/"]),
        ("[::1]:5000/a", ["https://[::1]:5000/v2/", "http://[::1]:5000/v2/"]),
        ("localhost.example/a", ["https://localhost.example/v2/"]),
    ],
)
def test_only_this_machine_is_spoken_to_without_tls_unasked_and_with_it_at_first(
    tmp_path: Path, name: str, expected: list[str]
) -> None:
    (endpoint,) = asked(tmp_path, name)
    assert list(endpoint.bases) == expected
    assert endpoint == Endpoint(endpoint.bases, endpoint.repository, name.partition("/")[0], is_origin=True)


def test_a_registry_that_docker_calls_insecure_is_spoken_to_with_any_certificate_or_none(
    tmp_path: Path, write: Write
) -> None:
    path = write(DOCKER, '{"insecure-registries": ["r.example:5000", "10.0.0.0/8"]}')
    for domain in ("r.example:5000", "10.1.1.1"):
        (endpoint,) = asked(tmp_path, f"{domain}/a")
        assert endpoint.bases == (f"https://{domain}/v2/", f"http://{domain}/v2/")
        assert (endpoint.tls, endpoint.is_origin, endpoint.written_in) == (INSECURE, True, path)
    assert bases(tmp_path, "r.example/a") == ["https://r.example/v2/"]


@pytest.mark.parametrize("host", ["r.example", "m.example"])
def test_our_own_plain_http_wins_over_every_scheme(tmp_path: Path, write: Write, host: str) -> None:
    plain = {host: "http"}
    expected = [f"{plain.get(name, 'https')}://{name}/" for name in ("m.example", "r.example")]
    write(
        "etc/containerd/certs.d/r.example/hosts.toml",
        'server = "https://r.example"\noverride_path = true\n'
        '[host."https://m.example"]\noverride_path = true\n',
    )
    assert bases(tmp_path, "r.example/a", plain_http=(host,)) == expected


def test_our_own_plain_http_is_for_a_host_with_its_port(tmp_path: Path) -> None:
    assert bases(tmp_path, "r.example:5000/a", plain_http=("r.example",)) == ["https://r.example:5000/v2/"]
    assert bases(tmp_path, "localhost:5000/a", plain_http=("localhost:5000",)) == [
        "http://localhost:5000/v2/"
    ]
    assert bases(tmp_path, "docker.io/a/b", plain_http=("docker.io",)) == ["http://registry-1.docker.io/v2/"]


def test_a_registry_that_no_url_can_have_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no registry host"):
        asked(tmp_path, "xn--/a")


# -------------------- containerd


@pytest.mark.parametrize(
    ("folders", "mirror"),
    [
        (["r.example_5000_", "r.example:5000", "_default"], "0.example"),
        (["r.example:5000", "_default"], "0.example"),
        (["_default"], "0.example"),
        (["r.example"], None),
    ],
)
def test_the_first_folder_of_containerd_counts(
    tmp_path: Path, write: Write, folders: list[str], mirror: str | None
) -> None:
    for number, name in enumerate(folders):
        write(f"etc/containerd/certs.d/{name}/hosts.toml", f'[host."https://{number}.example"]')
    found = [endpoint.domain for endpoint in asked(tmp_path, "r.example:5000/a")]
    assert found == [*([mirror] if mirror else []), "r.example:5000"]


def test_a_folder_without_a_hosts_file_hides_the_default_one(tmp_path: Path, write: Write) -> None:
    write("etc/containerd/certs.d/_default/hosts.toml", '[host."https://m.example"]')
    write("etc/containerd/certs.d/r.example/ca.crt", "PEM")
    assert bases(tmp_path, "r.example/a") == ["https://r.example/v2/"]


def test_all_that_a_hosts_file_says_of_a_server_is_in_its_endpoint(tmp_path: Path, write: Write) -> None:
    folder = tmp_path / "etc/containerd/certs.d/r.example"
    write(
        "etc/containerd/certs.d/r.example/hosts.toml",
        """
        [host."http://M.example:5000/proj"]
        capabilities = ["pull", "resolve"]
        ca = "ca.crt"
        client = [["c.cert", "c.key"]]
        skip_verify = true
        dial_timeout = "200ms"
        header = { Authorization = "Bearer x" }
        """,
    )
    assert asked(tmp_path, "r.example/team/web") == (
        Endpoint(
            bases=("http://m.example:5000/proj/v2/",),
            repository="team/web",
            domain="m.example:5000",
            capabilities=MIRROR,
            is_origin=False,
            namespace="r.example",
            tls=Tls(
                (folder / "ca.crt",),
                ClientCertificate(folder / "c.cert", folder / "c.key"),
                verify=False,
            ),
            headers=(("Authorization", "Bearer x"),),
            connect_seconds=0.2,
        ),
        Endpoint(("https://r.example/v2/",), "team/web", "r.example", is_origin=True),
    )


@pytest.mark.parametrize(
    ("domain", "url", "namespace"),
    [
        ("r.example", "https://m.example", "r.example"),
        ("r.example:5000", "https://r.example", "r.example:5000"),
        ("r.example", "https://r.example/proj", None),
        ("R.example", "https://r.example", None),
        ("docker.io", "https://m.example", "docker.io"),
        ("docker.io", "https://registry-1.docker.io", None),
        ("docker.io", "https://docker.io", None),
        ("r.example", "https://registry-1.docker.io", "r.example"),
    ],
)
def test_a_server_under_another_name_is_told_which_registry_is_meant(
    tmp_path: Path, write: Write, domain: str, url: str, namespace: str | None
) -> None:
    write(f"etc/containerd/certs.d/{domain}/hosts.toml", f'server = "{url}"\n[host."{url}"]')
    mirror, server = asked(tmp_path, f"{domain}/a")
    assert (mirror.namespace, server.namespace) == (namespace, namespace)


def test_a_registry_under_its_own_name_is_told_nothing(tmp_path: Path, write: Write) -> None:
    write("etc/containerd/certs.d/R.example/hosts.toml", '[host."https://m.example"]')
    mirror, origin = asked(tmp_path, "R.example/a")
    assert (mirror.namespace, origin.namespace) == ("R.example", None)


def test_the_server_is_the_origin_also_where_it_is_a_mirror(tmp_path: Path, write: Write) -> None:
    write("etc/containerd/certs.d/_default/hosts.toml", 'server = "https://m.example"')
    (endpoint,) = asked(tmp_path, "r.example/a")
    assert (endpoint.domain, endpoint.is_origin) == ("m.example", True)


@pytest.mark.parametrize("host", ["docker.io", "index.docker.io", "registry-1.docker.io"])
def test_docker_hub_is_one_server_with_one_login_whatever_it_is_called(
    tmp_path: Path, write: Write, host: str
) -> None:
    write("etc/containerd/certs.d/r.example/hosts.toml", f'server = "https://{host}"')
    (endpoint,) = asked(tmp_path, "r.example/a")
    assert endpoint.bases == ("https://registry-1.docker.io/v2/",)
    assert endpoint.domain == "docker.io"


def test_a_loopback_origin_that_a_hosts_file_leaves_open_may_do_without_tls(
    tmp_path: Path, write: Write
) -> None:
    write("etc/containerd/certs.d/_default/hosts.toml", 'skip_verify = true\n[host."https://m.example"]')
    _, origin = asked(tmp_path, "localhost:5000/a")
    assert origin.bases == ("https://localhost:5000/v2/", "http://localhost:5000/v2/")
    assert (origin.tls, origin.namespace, origin.domain) == (INSECURE, None, "localhost:5000")


def test_certificates_of_others_do_not_count_beside_a_hosts_file(tmp_path: Path, write: Write) -> None:
    write("etc/containerd/certs.d/r.example/hosts.toml", 'server = "https://r.example"')
    write("etc/containerd/certs.d/r.example/ca.crt", "PEM")
    write("etc/docker/certs.d/r.example/ca.crt", "PEM")
    (endpoint,) = asked(tmp_path, "r.example/a")
    assert endpoint.tls == Tls()


# -------------------- podman


def test_a_place_of_registries_conf_is_a_server_with_its_name_for_the_repository(
    tmp_path: Path, write: Write
) -> None:
    write(
        CONTAINERS,
        """
        [[registry]]
        prefix = "r.example/team"
        location = "docker.io/library"
        [[registry.mirror]]
        location = "m.example:5000/proj"
        insecure = true
        [[registry.mirror]]
        location = "localhost:5000"
        pull-from-mirror = "digest-only"
        """,
    )
    assert asked(tmp_path, "r.example/team/web") == (
        Endpoint(
            ("https://m.example:5000/v2/", "http://m.example:5000/v2/"),
            "proj/web",
            "m.example:5000",
            MIRROR,
            tls=INSECURE,
        ),
        Endpoint(
            ("https://localhost:5000/v2/", "http://localhost:5000/v2/"),
            "web",
            "localhost:5000",
            Capability.PULL,
        ),
        Endpoint(("https://registry-1.docker.io/v2/",), "library/web", "docker.io", is_origin=True),
    )


def test_the_users_rules_overrule_the_systems(tmp_path: Path, write: Write) -> None:
    write(CONTAINERS, '[[registry]]\nlocation = "r.example"\nblocked = true')
    write("home/.config/containers/registries.conf.d/a.conf", '[[registry]]\nlocation = "r.example"')
    assert bases(tmp_path, "r.example/a") == ["https://r.example/v2/"]


# -------------------- docker


def test_dockers_mirrors_are_asked_in_order_over_the_scheme_that_is_written(
    tmp_path: Path, write: Write
) -> None:
    write(
        DOCKER,
        '{"registry-mirrors": ["http://z.example:5000", "https://a.example"], '
        '"insecure-registries": ["a.example"]}',
    )
    assert asked(tmp_path, "docker.io/library/web") == (
        Endpoint(("http://z.example:5000/v2/",), "library/web", "z.example:5000", MIRROR),
        Endpoint(("https://a.example/v2/",), "library/web", "a.example", MIRROR, tls=INSECURE),
        Endpoint(("https://registry-1.docker.io/v2/",), "library/web", "docker.io", is_origin=True),
    )


# -------------------- certificates

CERTS = [
    "etc/containerd/certs.d/r.example_5000_",
    "etc/containerd/certs.d/r.example:5000",
    "home/.config/containers/certs.d/r.example:5000",
    "etc/containers/certs.d/r.example:5000",
    "etc/docker/certs.d/r.example:5000",
    "etc/containerd/certs.d/_default",
]


@pytest.mark.parametrize("first", range(len(CERTS)))
def test_the_first_folder_of_certificates_wins(tmp_path: Path, write: Write, first: int) -> None:
    for folder in CERTS[first:]:
        write(f"{folder}/ca.crt", "PEM")
    (endpoint,) = asked(tmp_path, "r.example:5000/a")
    assert endpoint.tls == Tls((tmp_path / CERTS[first] / "ca.crt",))


def test_a_folder_of_certificates_wins_even_if_it_is_empty(tmp_path: Path, write: Write) -> None:
    write(CERTS[2])
    write(f"{CERTS[3]}/ca.crt", "PEM")
    (endpoint,) = asked(tmp_path, "r.example:5000/a")
    assert endpoint.tls == Tls()


def test_certificates_are_those_of_the_server_that_is_asked(tmp_path: Path, write: Write) -> None:
    write(CONTAINERS, MIRRORS[CONTAINERS])
    for host in ("docker.io", "registry-1.docker.io", "containers.example"):
        write(f"etc/docker/certs.d/{host}/ca.crt", "PEM")
    mirror, origin = asked(tmp_path, "docker.io/library/web")
    assert mirror.tls == Tls((tmp_path / "etc/docker/certs.d/containers.example/ca.crt",))
    # Docker Hub's folder is called as in references.
    assert origin.tls == Tls((tmp_path / "etc/docker/certs.d/docker.io/ca.crt",))


def test_a_server_that_is_insecure_is_still_shown_who_we_are(tmp_path: Path, write: Write) -> None:
    write(DOCKER, '{"insecure-registries": ["r.example"]}')
    for name in ("c.cert", "c.key"):
        write(f"etc/docker/certs.d/r.example/{name}", "PEM")
    folder = tmp_path / "etc/docker/certs.d/r.example"
    (endpoint,) = asked(tmp_path, "r.example/a")
    assert endpoint.tls == Tls(client=ClientCertificate(folder / "c.cert", folder / "c.key"), verify=False)


def test_a_folder_with_a_hosts_file_is_none_of_certificates(tmp_path: Path, write: Write) -> None:
    write(CONTAINERS, MIRRORS[CONTAINERS])
    write("etc/containerd/certs.d/containers.example/hosts.toml", 'server = "https://x.example"')
    write("etc/containerd/certs.d/containers.example/ca.crt", "PEM")
    write("etc/docker/certs.d/containers.example/ca.crt", "PEM")
    mirror, _ = asked(tmp_path, "docker.io/library/web")
    assert mirror.tls == Tls((tmp_path / "etc/docker/certs.d/containers.example/ca.crt",))
    write("etc/containerd/certs.d/containers.example/hosts.toml", "")
    mirror, _ = asked(tmp_path, "docker.io/library/web")
    assert mirror.tls == Tls((tmp_path / "etc/containerd/certs.d/containers.example/ca.crt",))


def test_only_containerds_certificates_may_hold_their_keys(tmp_path: Path, write: Write) -> None:
    write("etc/containerd/certs.d/r.example/c.cert", "PEM")
    (endpoint,) = asked(tmp_path, "r.example/a")
    assert endpoint.tls.client == ClientCertificate(tmp_path / "etc/containerd/certs.d/r.example/c.cert")
    write("etc/docker/certs.d/s.example/c.cert", "PEM")
    with pytest.raises(UsageError, match=r"s\.example/c\.cert has no key"):
        asked(tmp_path, "s.example/a")


def test_a_certificate_that_appears_counts_and_folders_and_dangling_links_do_not(
    tmp_path: Path, write: Write
) -> None:
    folder = write("etc/docker/certs.d/r.example")
    asker = hosts(tmp_path)
    assert asker.endpoints("r.example", "a")[0].tls == Tls()
    (folder / "folder.crt").mkdir()
    (folder / "dangling.crt").symlink_to("nowhere")
    write("etc/pki/ca.pem", "PEM")
    (folder / "link.crt").symlink_to(tmp_path / "etc/pki/ca.pem")
    assert asker.endpoints("r.example", "a")[0].tls == Tls((folder / "link.crt",))


# -------------------- what we may not read


@pytest.fixture
def close(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Closes a file, or what is in a folder, also to root."""

    def close(closed: Path) -> None:
        def guarded(call: Callable[..., object], *, also_itself: bool) -> Callable[..., object]:
            def guard(path: object, *arguments: object, **more: object) -> object:
                where = Path(path) if isinstance(path, str | os.PathLike) else Path("/")
                if closed in where.parents or (where == closed and also_itself):
                    raise PermissionError(13, "Permission denied", str(path))
                return call(path, *arguments, **more)

            return guard

        monkeypatch.setattr(os, "stat", guarded(os.stat, also_itself=False))
        monkeypatch.setattr(os, "open", guarded(os.open, also_itself=True))
        monkeypatch.setattr(os, "scandir", guarded(os.scandir, also_itself=True))

    return close


@pytest.mark.parametrize("path", [CONTAINERD, CONTAINERS, DOCKER])
def test_a_file_that_we_may_not_read_is_an_error(
    tmp_path: Path, write: Write, close: Callable[[Path], None], path: str
) -> None:
    close(write(path, MIRRORS[path]))
    with pytest.raises(UsageError, match="cannot be read: Permission denied") as caught:
        asked(tmp_path, "docker.io/library/web")
    assert str(tmp_path / path) in caught.value.message
    assert caught.value.remedy


def test_drop_ins_that_we_may_not_list_are_an_error(
    tmp_path: Path, write: Write, close: Callable[[Path], None]
) -> None:
    close(write("etc/containers/registries.conf.d"))
    with pytest.raises(UsageError, match=r"registries\.conf\.d cannot be read"):
        asked(tmp_path, "r.example/a")


@pytest.mark.parametrize("folder", ["etc/containerd", "etc/containers", "etc/docker", "etc/docker/certs.d"])
def test_what_lies_in_a_folder_that_is_closed_to_us_is_passed_over_which_is_logged_once(
    tmp_path: Path,
    write: Write,
    close: Callable[[Path], None],
    folder: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for path, text in MIRRORS.items():
        if path.startswith(f"{folder}/"):
            write(path, text)
    close(tmp_path / folder)
    asker = hosts(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len(asker.endpoints("docker.io", "library/web")) == 1
        messages = [record.getMessage() for record in caplog.records]
        asker.endpoints("docker.io", "library/web")
        asker.endpoints("r.example", "a")
    assert len(messages) > 0
    assert all(str(tmp_path / folder) in message for message in messages)
    assert len(caplog.records) == len(messages)


def test_a_home_that_is_closed_to_us_is_as_good_as_empty(
    tmp_path: Path, write: Write, close: Callable[[Path], None]
) -> None:
    write("home/.config/containers/registries.conf.d/a.conf", "[")
    close(tmp_path / "home")
    assert bases(tmp_path, "r.example/a") == ["https://r.example/v2/"]


def test_what_is_no_file_does_not_make_us_wait(tmp_path: Path, write: Write) -> None:
    write("etc/docker")
    os.mkfifo(tmp_path / DOCKER)
    assert bases(tmp_path, "docker.io/library/web") == ["https://registry-1.docker.io/v2/"]


def test_the_home_is_the_environments(tmp_path: Path, write: Write) -> None:
    write("home/.config/containers/registries.conf", '[[registry]]\nlocation = "r.example"\nblocked = true')
    asker = Hosts(root=tmp_path, environ={"HOME": os.fspath(tmp_path / "home")})
    with pytest.raises(AccessDenied):
        asker.endpoints("r.example", "a")
