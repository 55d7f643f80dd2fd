"""login, logout and auth: what is kept where, what is told, and what is never shown."""

import base64
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from fsmount.cli.main import main
from fsmount.registry.retry import Retry
from fsmount.registry.transport import Transports
from tests.fakes.helper import FakeHelper
from tests.fakes.registry import FakeRegistry, Handler, Network, TokenServer, basic

HOST = "registry.example"
BEARER = 'Bearer realm="https://auth.example/token",service="s"'
NULL = "00000000-0000-0000-0000-000000000000"


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with nothing, whose helpers are in bin."""
    for name in (
        "DOCKER_CONFIG",
        "DOCKER_AUTH_CONFIG",
        "REGISTRY_AUTH_FILE",
        "FSMOUNT_CONFIG",
        "FSMOUNT_JSON",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "CREDENTIALS_DIRECTORY"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("fsmount.configfile.SYSTEM_FILE", Path("/nonexistent"))
    return tmp_path


@pytest.fixture
def docker(home: Path) -> Path:
    return home / ".docker/config.json"


@pytest.fixture
def fake() -> FakeRegistry:
    return FakeRegistry(HOST, challenge='Basic realm="r"', admit=lambda sent: sent == basic("me", "s3cret"))


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes handlers, by host, the network."""

    def serve(**hosts: Handler) -> None:
        handlers = {host.replace("_", "."): handler for host, handler in hosts.items()}
        monkeypatch.setattr(
            "fsmount.registry.open.Transports",
            lambda proxies, network: Transports(proxies, network=Network(handlers).transport),
        )

    return serve


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command with some standard input: exit code, output and errors. No secret may be in either."""

    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(list(arguments))
        out, err = capsys.readouterr()
        assert "s3cret" not in out + err
        return code, out, err

    return run


def log_in(
    run: Callable[..., tuple[int, str, str]], *more: str, stdin: bytes = b"s3cret\n"
) -> tuple[int, str, str]:
    return run("login", HOST, "-u", "me", "--password-stdin", *more, stdin=stdin)


def content(path: Path) -> object:
    return json.loads(path.read_text())


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    path.chmod(0o600)
    return path


# -------------------- login


@pytest.mark.parametrize("stdin", [b"s3cret", b"s3cret\n", b"s3cret\r\n"])
def test_a_login_that_the_registry_takes_is_kept_in_dockers_file(run, serve, fake, docker, stdin):
    serve(registry_example=fake)
    assert log_in(run, stdin=stdin) == (0, f"{HOST}: logged in as me; kept in {docker}\n", "")
    assert content(docker) == {"auths": {HOST: auth("me", "s3cret")}}


def test_a_login_that_the_registry_refuses_is_5_and_nothing_is_written(run, serve, fake, docker):
    serve(registry_example=fake)
    code, out, err = log_in(run, stdin=b"wrong")
    assert (code, out) == (5, "")
    assert err.startswith(f"fsmount: error: {HOST} does not take this user name and password\n")
    assert not docker.parent.exists()


def test_a_registry_that_cannot_be_reached_is_6_and_nothing_is_written(run, serve, docker, monkeypatch):
    monkeypatch.setattr("fsmount.registry.open.Retry", lambda: Retry(tries=1))
    serve()
    code, _, err = log_in(run)
    assert (code, docker.exists()) == (6, False)
    assert f"https://{HOST}/v2/ cannot be reached" in err


def test_the_registry_itself_is_asked_where_a_mirror_has_another_path(
    run, serve, docker, tmp_path, monkeypatch
):
    rules = tmp_path / "registries.conf"
    rules.write_text(
        f'[[registry]]\nlocation = "{HOST}"\n[[registry.mirror]]\nlocation = "mirror.example/proxy"\n'
    )
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(rules))
    serve(registry_example=FakeRegistry(host=HOST))
    assert log_in(run)[0] == 0
    assert docker.exists()


def test_a_registry_with_tokens_is_asked_for_one_without_a_scope(run, serve, fake, docker):
    server = TokenServer(admit=lambda request: request.headers.get("authorization") == basic("me", "s3cret"))
    fake.challenge, fake.admit = BEARER, lambda sent: sent in server.valid
    serve(registry_example=fake, auth_example=server)
    assert log_in(run)[0] == 0
    assert server.requests[0].query == {"service": ["s"], "account": ["me"]}
    assert [request.path for request in fake.requests] == ["/v2/", "/v2/"]
    docker.unlink()
    assert log_in(run, stdin=b"wrong")[0] == 5
    assert not docker.exists()


def test_azures_refresh_token_is_checked_as_what_it_will_be_read_as(run, serve, fake, docker):
    server = TokenServer(
        admit=lambda request: request.method == "POST" and b"refresh_token=s3cret" in request.body
    )
    fake.challenge, fake.admit = BEARER, lambda sent: sent in server.valid
    serve(registry_example=fake, auth_example=server)
    assert run("login", HOST, "-u", NULL, "--password-stdin", stdin=b"s3cret")[0] == 0
    assert b"scope" not in server.requests[0].body
    assert content(docker) == {"auths": {HOST: auth(NULL, "s3cret")}}


def test_a_registry_that_asks_nobody_is_logged_in_to_with_a_warning(run, serve, fake, docker):
    fake.challenge = None
    serve(registry_example=fake)
    code, _, err = log_in(run)
    assert (code, docker.exists()) == (0, True)
    assert err == f"fsmount: warning: {HOST} asks nobody for a password, so it was not checked\n"


@pytest.mark.parametrize("way", ["option", "variable"])
def test_the_file_may_be_named(run, serve, fake, docker, home, monkeypatch, way):
    serve(registry_example=fake)
    file = home / "auth.json"
    if way == "variable":
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(file))
    code, out, _ = log_in(run, *(["--authfile", str(file)] if way == "option" else []))
    assert (code, out) == (0, f"{HOST}: logged in as me; kept in {file}\n")
    assert content(file) == {"auths": {HOST: auth("me", "s3cret")}}
    assert not docker.exists()


@pytest.mark.parametrize(
    "names", [{"credsStore": "own"}, {"credHelpers": {HOST: "own"}, "credsStore": "other"}]
)
def test_a_helper_that_the_file_names_keeps_the_login(run, serve, fake, docker, home, names):
    helper = FakeHelper.install(home / "bin", "own")
    write(docker, {"auths": {HOST: auth("me", "plain")}, **names})
    serve(registry_example=fake)
    assert log_in(run) == (0, f"{HOST}: logged in as me; kept in docker-credential-own\n", "")
    assert helper.logins == {HOST: ["me", "s3cret"]}
    assert content(docker) == {"auths": {HOST: {}}, **names}
    assert [record["arguments"] for record in helper.runs] == [["store"]]


def test_a_helper_that_is_not_installed_is_an_error_and_the_file_stays(run, serve, fake, docker):
    before = {"auths": {HOST: auth("me", "plain")}, "credsStore": "missing"}
    write(docker, before)
    serve(registry_example=fake)
    code, _, err = log_in(run)
    assert code == 2
    assert "docker-credential-missing is not installed" in err
    assert content(docker) == before


def test_without_a_name_docker_hub_is_meant_and_written_as_docker_does(run, serve, docker):
    hub = FakeRegistry(challenge='Basic realm="r"', admit=lambda sent: sent == basic("me", "s3cret"))
    serve(**{"registry-1_docker_io": hub})
    code, out, _ = run("login", "-u", "me", "--password-stdin", stdin=b"s3cret")
    assert (code, out) == (0, f"docker.io: logged in as me; kept in {docker}\n")
    assert content(docker) == {"auths": {"https://index.docker.io/v1/": auth("me", "s3cret")}}


def test_the_configuration_says_whether_a_registry_is_reached_without_tls(run, home, monkeypatch):
    config = home / "config.toml"
    config.write_text('[registries."registry.example"]\nplain_http = true\n')
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(200)

    monkeypatch.setattr(
        "fsmount.registry.open.Transports",
        lambda proxies, network: Transports(proxies, network=httpx.MockTransport(answer)),
    )
    assert log_in(run, "--config", str(config))[0] == 0
    assert seen == ["http://registry.example/v2/"]


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["-u", "me"], b"s3cret", "there is no terminal"),
        (["--password-stdin"], b"s3cret", "give --username too"),
        (["-u", "a:b", "--password-stdin"], b"s3cret", "has a colon"),
        (["-u", "me", "--password-stdin"], b"\n", "the password is empty"),
        (["-u", "me", "--password-stdin"], b"s3cret\xff", "is not UTF-8"),
        (["-u", "me", "--password", "x"], b"", "No such option"),
        (["-u", "me", "-p", "x"], b"", "No such option"),
    ],
)
def test_what_cannot_be_a_login_is_told_and_nobody_is_asked(run, serve, docker, arguments, stdin, message):
    serve()
    code, _, err = run("login", HOST, *arguments, stdin=stdin)
    assert (code, docker.exists()) == (2, False)
    assert message in err


@pytest.mark.parametrize("command", ["login", "logout", "auth"])
@pytest.mark.parametrize("name", ["registry", "registry.example/team:x:y", "https://", "a b", "r.example:0"])
def test_a_registry_is_named_as_in_references(run, command, name):
    code, _, err = run(command, name)
    assert code == 2
    assert "is no registry" in err or "is no image reference" in err


@pytest.mark.parametrize("name", [f"https://{HOST}", f"{HOST}/", f"https://{HOST}/v2/"])
def test_dockers_urls_are_understood(run, docker, name):
    write(docker, {"auths": {HOST: auth("me", "s3cret")}})
    assert run("logout", name) == (0, f"{HOST}: removed from {docker}, key {HOST}\n", "")


def test_a_broken_file_is_told_before_anything_is_asked(run, serve, docker):
    write(docker, {}).write_text("{")
    code, _, err = run("login", HOST)  # not: there is no terminal
    assert code == 2
    assert f"broken credentials in {docker}" in err


def test_on_a_terminal_user_and_password_are_asked_for_and_the_password_is_not_shown(home):
    parent, child = pty.openpty()
    program = [sys.executable, "-m", "fsmount", "login", "127.0.0.1:1"]
    with subprocess.Popen(
        program, stdin=child, stdout=child, stderr=child, start_new_session=True
    ) as process:
        os.close(child)
        shown = read_until(parent, b"Username: ")
        os.write(parent, b"me\n")
        shown += read_until(parent, b"Password: ")
        os.write(parent, b"s3cret\n")
        shown += read_until(parent, b"")
    os.close(parent)
    assert process.returncode == 6
    assert b"127.0.0.1:1/v2/ cannot be reached" in shown
    assert b"me" in shown
    assert b"s3cret" not in shown


def read_until(terminal: int, end: bytes) -> bytes:
    """What is shown until a prompt; without one, until the other side is closed."""
    data = b""
    while not end or not data.endswith(end):
        try:
            data += os.read(terminal, 4096)
        except OSError:  # EIO: nobody has the terminal any more
            break
    return data


# -------------------- logout


def test_logout_takes_all_spellings_out_of_the_file(run, docker):
    write(docker, {"auths": {f"https://{HOST}/v1/": {}, HOST: auth("me", "x"), "s.example": {}}})
    code, out, _ = run("logout", HOST)
    assert code == 0
    assert out.splitlines() == [
        f"{HOST}: removed from {docker}, key https://{HOST}/v1/",
        f"{HOST}: removed from {docker}, key {HOST}",
    ]
    assert content(docker) == {"auths": {"s.example": {}}}


def test_logout_asks_the_helper_too(run, docker, home):
    helper = FakeHelper.install(home / "bin", "own", {HOST: ("me", "s3cret"), "s.example": ("x", "x")})
    write(docker, {"auths": {HOST: {}}, "credsStore": "own"})
    code, out, _ = run("logout", HOST)
    assert (code, len(out.splitlines())) == (0, 2)
    assert f"{HOST}: removed from docker-credential-own, key {HOST}" in out
    assert list(helper.logins) == ["s.example"]
    assert content(docker) == {"auths": {}, "credsStore": "own"}


def test_logout_of_docker_hub_knows_both_its_keys(run, docker, home):
    helper = FakeHelper.install(
        home / "bin", "own", {"docker.io": ("a", "x"), "https://index.docker.io/v1/": ("b", "x")}
    )
    write(docker, {"credsStore": "own"})
    assert run("logout")[0] == 0
    assert helper.logins == {}


@pytest.mark.parametrize("names", [{}, {"credsStore": "own"}])
def test_logout_where_nothing_is_kept_says_so_and_is_0(run, docker, home, names):
    FakeHelper.install(home / "bin", "own")
    write(docker, names)
    assert run("logout", HOST) == (0, f"{HOST}: nothing is kept for it in {docker}\n", "")
    assert content(docker) == names


def test_logout_erases_where_login_wrote(run, serve, fake, home):
    serve(registry_example=fake)
    file = str(home / "auth.json")
    assert log_in(run, "--authfile", file)[0] == 0
    assert run("logout", HOST, "--authfile", file)[1] == f"{HOST}: removed from {file}, key {HOST}\n"


# -------------------- auth


def test_auth_shows_every_place_and_the_one_that_wins(run, docker, home):
    write(docker, {"auths": {f"{HOST}/team": auth("me", "s3cret")}})
    code, out, _ = run("auth", f"{HOST}/team/web")
    assert code == 0
    assert [line.split() for line in out.splitlines()[:-2]] == [
        ["configuration", "[registries]", "has", "nothing", "for", "it"],
        ["systemd", f"{home}/CREDENTIALS_DIRECTORY/registry-auth", "does", "not", "exist"],
        ["DOCKER_AUTH_CONFIG", "not", "set"],
        ["REGISTRY_AUTH_FILE", "not", "set"],
        ["podman", f"{home}/XDG_RUNTIME_DIR/containers/auth.json", "does", "not", "exist"],
        ["podman", f"{home}/XDG_CONFIG_HOME/containers/auth.json", "does", "not", "exist"],
        ["docker", str(docker), "is", "used"],
        ["docker", f"{home}/.dockercfg", "is", "not", "asked"],
    ]
    assert out.endswith(f"\n\n{HOST}/team/web: password of me, from {docker}, under the key {HOST}/team\n")


@pytest.mark.parametrize(
    ("file", "config", "verdict"),
    [
        ({}, "", "nobody has credentials; it is used anonymously"),
        (
            {"auths": {HOST: {"identitytoken": "s3cret"}}},
            "",
            "identity token, from {docker}, under the key {host}",
        ),
        (
            {"auths": {HOST: {"registrytoken": "s3cret"}}},
            "",
            "registry token, from {docker}, under the key {host}",
        ),
        (
            {"credsStore": "own"},
            "",
            "password of me, from docker-credential-own, which {docker} names, under the key {host}",
        ),
        ({"auths": {HOST: auth("me", "x")}}, "anonymous = true", "anonymous, as [registries] wants it"),
        (
            {"auths": {HOST: auth("me\x1b]0;x", "x")}},
            "",
            "password of me\\033]0;x, from {docker}, under the key {host}",
        ),
    ],
)
def test_auth_says_who_we_are(run, docker, home, file, config, verdict):
    FakeHelper.install(home / "bin", "own", {HOST: ("me", "s3cret")})
    write(docker, file)
    (home / "config.toml").write_text(f'[registries."{HOST}"]\n{config}\n')
    code, out, _ = run("auth", HOST, "--config", str(home / "config.toml"))
    assert (code, out.splitlines()[-1]) == (0, f"{HOST}: {verdict.format(docker=docker, host=HOST)}")


def test_auth_names_the_variable_that_has_them(run, monkeypatch):
    monkeypatch.setenv("DOCKER_AUTH_CONFIG", json.dumps({"auths": {HOST: auth("me", "s3cret")}}))
    assert run("auth", HOST)[1].endswith(
        f"{HOST}: password of me, from DOCKER_AUTH_CONFIG, under the key {HOST}\n"
    )


def test_auth_for_programs_is_json(run, docker, home):
    FakeHelper.install(home / "bin", "own", {HOST: ("me", "s3cret")})
    write(docker, {"credHelpers": {HOST: "own"}})
    code, out, _ = run("auth", "--json", HOST)
    facts = json.loads(out)
    assert code == 0
    assert [place["result"] for place in facts.pop("places")] == [
        "nothing", "absent", "unset", "unset", "absent", "absent", "used", "not_asked",
    ]  # fmt: skip
    assert facts == {
        "version": 1,
        "name": HOST,
        "key": HOST,
        "helper": "docker-credential-own",
        "credential": {"kind": "password", "username": "me"},
    }


def test_auth_for_programs_says_that_nobody_has_any(run):
    facts = json.loads(run("auth", "--json", HOST)[1])
    assert (facts["key"], facts["helper"], facts["credential"]) == (None, None, None)


def test_auth_tells_what_is_broken_as_the_mount_would(run, docker):
    write(docker, {"auths": {HOST: {"auth": "czNjcmV0"}}})
    code, _, err = run("auth", HOST)
    assert code == 2
    assert f"broken credentials in {docker}, entry {HOST}" in err
    assert "czNj" not in err
