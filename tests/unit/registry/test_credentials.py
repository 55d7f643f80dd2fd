"""Which of all the places that may have credentials is believed."""

import base64
import json
import os
import pwd
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from fsmount.config import Registry
from fsmount.errors import DeadlineExpired, Unreachable, UsageError
from fsmount.registry.credential import Credential, IdentityToken, Password
from fsmount.registry.credentials import Credentials, Match, Result, Step
from fsmount.registry.helpers import Helpers
from tests.fakes.helper import FakeHelper, install_program

HOST = "r.example"


def auth(user: str, password: str = "p") -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def text(auths: Mapping[str, object] | None = None, **more: object) -> str:
    return json.dumps({"auths": auths or {}, **more})


def write(path: Path, content: str | Mapping[str, object], mode: int = 0o600) -> Path:
    """Replace the file as docker does; a mapping is that of its auths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(content if isinstance(content, str) else text(content))
    temporary.chmod(mode)
    temporary.rename(path)
    return path


class World:
    """A machine below a folder: its files, its environment, our configuration."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.environ = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "XDG_RUNTIME_DIR": str(root / "run/user/7"),
            "CREDENTIALS_DIRECTORY": str(root / "systemd"),
        }
        self.registries: dict[str, Registry] = {}
        self.docker = root / "home/.docker/config.json"

    def credentials(self) -> Credentials:
        return Credentials(
            self.registries, environ=self.environ, home=self.root / "home", uid=7, run=self.root / "run"
        )

    async def find(self, name: str = HOST) -> Credential | None:
        domain, _, repository = name.partition("/")
        return await self.credentials().find(domain, repository)

    async def user(self, name: str = HOST) -> str | None:
        found = await self.find(name)
        return found.username if isinstance(found, Password) else None


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# -------------------- the places


async def test_nobody_has_credentials_means_anonymous(world: World) -> None:
    assert await world.find() is None


async def test_places_are_asked_in_their_order_and_the_first_that_has_something_wins(world: World) -> None:
    root = world.root
    password = write(root / "password", "p\n")
    world.registries = {HOST: Registry(username="own", password_file=password)}
    world.environ["DOCKER_AUTH_CONFIG"] = text({HOST: auth("variable")})
    files = {
        "systemd": root / "systemd/registry-auth",
        "runtime": root / "run/user/7/containers/auth.json",
        "config": root / "home/.config/containers/auth.json",
        "docker": world.docker,
    }
    for user, path in files.items():
        write(path, {HOST: auth(user)})
    write(root / "home/.dockercfg", json.dumps({HOST: auth("old")}))

    assert await world.user() == "own"
    world.registries.clear()
    assert await world.user() == "systemd"
    files["systemd"].unlink()
    assert await world.user() == "variable"
    del world.environ["DOCKER_AUTH_CONFIG"]
    assert await world.user() == "runtime"
    write(files["runtime"], {"other.example": auth("x")})  # a file without a match is passed over
    assert await world.user() == "config"
    files["config"].unlink()
    assert await world.user() == "docker"
    files["docker"].unlink()
    assert await world.user() == "old"


async def test_the_file_that_is_named_stands_alone_be_it_there_or_not(world: World) -> None:
    world.environ["REGISTRY_AUTH_FILE"] = str(world.root / "named.json")
    for path in (
        "run/user/7/containers/auth.json",
        "home/.config/containers/auth.json",
        "home/.docker/config.json",
    ):
        write(world.root / path, {HOST: auth("other")})
    assert await world.find() is None
    write(world.root / "named.json", {HOST: auth("named")})
    assert await world.user() == "named"
    write(world.root / "systemd/registry-auth", {HOST: auth("systemd")})
    assert await world.user() == "systemd"


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({}, "run/containers/7/auth.json"),
        ({"XDG_RUNTIME_DIR": ""}, "run/containers/7/auth.json"),
        ({"XDG_CONFIG_HOME": "{root}/xdg"}, "xdg/containers/auth.json"),
        ({"DOCKER_CONFIG": "{root}/dc"}, "dc/config.json"),
        ({"DOCKER_CONFIG": ""}, "home/.docker/config.json"),
        ({"REGISTRY_AUTH_FILE": ""}, "home/.docker/config.json"),
    ],
)
async def test_variables_move_the_files(world: World, environ: dict[str, str], path: str) -> None:
    world.environ = {name: value.format(root=world.root) for name, value in environ.items()}
    write(world.root / path, {HOST: auth("u")})
    assert await world.user() == "u"


async def test_a_service_without_HOME_has_that_of_its_user(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = list(pwd.getpwuid(0))
    entry[5] = str(world.root / "home")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.struct_passwd(entry) if uid == 7 else None)
    write(world.docker, {HOST: auth("u")})
    assert await Credentials(environ={}, uid=7, run=world.root).find(HOST, "a") == Password("u", "p")
    assert await Credentials(environ={"HOME": "/nonexistent"}, uid=7, run=world.root).find(HOST, "a") is None


async def test_a_user_without_any_home_has_no_files(world: World) -> None:
    assert await Credentials(environ={}, uid=4294967294, run=world.root).find(HOST, "a") is None


async def test_docker_hub_has_its_key_whatever_it_is_called(world: World) -> None:
    write(world.docker, {"https://index.docker.io/v1/": auth("hub")})
    for domain in ("docker.io", "index.docker.io", "registry-1.docker.io"):
        assert await world.user(f"{domain}/library/web") == "hub"


# -------------------- our configuration


async def test_the_configuration_names_a_user_and_the_file_of_the_password(world: World) -> None:
    password = write(world.root / "password", " pä:ss \r\n")
    world.registries = {"r.example:5000": Registry(username="robot$ci", password_file=password)}
    assert await world.find("r.example:5000/team/web") == Password("robot$ci", " pä:ss ")
    assert await world.find("r.example/team/web") is None


async def test_a_bare_name_of_a_password_file_is_a_systemd_credential(world: World) -> None:
    world.registries = {HOST: Registry(username="u", password_file="token")}
    write(world.root / "systemd/token", "t0ken")
    assert await world.find() == Password("u", "t0ken")
    del world.environ["CREDENTIALS_DIRECTORY"]
    with pytest.raises(
        UsageError, match=r"password for r\.example is in the systemd credential token"
    ) as caught:
        await world.find()
    assert "LoadCredential=token:FILE" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "password, which does not exist"), ("", "holds no password"), ("\n", "holds no password")],
)
async def test_a_password_that_is_not_there_is_an_error(
    world: World, content: str | None, message: str
) -> None:
    path = world.root / "password"
    if content is not None:
        write(path, content)
    world.registries = {HOST: Registry(username="u", password_file=path)}
    write(world.docker, {HOST: auth("other")})
    with pytest.raises(UsageError, match=message):
        await world.find()


async def test_the_configuration_may_make_us_anonymous_where_others_are_not(world: World) -> None:
    world.registries = {HOST: Registry(anonymous=True)}
    write(world.docker, {HOST: auth("u")})
    assert await world.find() is None


async def test_the_configuration_may_name_a_helper_and_what_that_lacks_others_may_have(world: World) -> None:
    FakeHelper.install(world.bin, "own", {HOST: ("<token>", "refresh")})
    world.registries = {name: Registry(helper="own") for name in (HOST, "s.example")}
    write(world.docker, {HOST: auth("u"), "s.example": auth("u")})
    assert await world.find() == IdentityToken("refresh")
    assert await world.find("s.example") == Password("u", "p")


async def test_a_registry_that_the_configuration_only_describes_is_left_to_others(world: World) -> None:
    world.registries = {HOST: Registry(plain_http=True)}
    write(world.docker, {HOST: auth("u")})
    assert await world.user() == "u"


# -------------------- within a file


@pytest.mark.parametrize(
    ("name", "user"),
    [
        ("helped.example/a", "helper"),  # its own helper comes before entries, longer ones too
        ("lost.example/a", None),  # and if that has nothing, the file has nothing
        ("plain.example/a", "entry"),  # an entry comes before the helper of all registries
        ("plain.example/team", "team"),
        ("stored.example/a", "store"),  # marked by an empty entry, as docker does
        ("unmarked.example/a", "store"),
        ("opted-out.example/a", None),  # an empty helper: not even the store
        ("opted-out.example/team", "team"),
        ("unknown.example/a", None),
    ],
)
async def test_in_a_file_the_registrys_helper_comes_first_then_entries_then_the_store(
    world: World, name: str, user: str | None
) -> None:
    FakeHelper.install(world.bin, "own", {"helped.example": ("helper", "p")})
    stored = ["plain.example", "lost.example", "stored.example", "unmarked.example", "opted-out.example"]
    FakeHelper.install(world.bin, "all", dict.fromkeys(stored, ("store", "p")))
    auths = {
        "helped.example/a": auth("entry"),
        "lost.example": auth("entry"),
        "plain.example": auth("entry"),
        "plain.example/team": auth("team"),
        "stored.example": {},
        "opted-out.example/team": auth("team"),
    }
    helpers = {"helped.example": "own", "https://lost.example": "own", "opted-out.example": ""}
    write(world.docker, text(auths, credHelpers=helpers, credsStore="all"))
    assert await world.user(name) == user


async def test_what_the_helpers_of_one_file_lack_the_next_may_have(world: World) -> None:
    FakeHelper.install(world.bin, "own")
    write(world.root / "home/.config/containers/auth.json", text(credHelpers={HOST: "own"}, credsStore="own"))
    write(world.docker, {HOST: auth("u"), "s.example": auth("u")})
    assert [await world.user(name) for name in (HOST, "s.example")] == ["u", "u"]


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io"])
async def test_helpers_know_docker_hub_by_one_of_two_keys(world: World, key: str) -> None:
    helper = FakeHelper.install(world.bin, "own", {key: ("hub", "p")})
    write(world.docker, text(credsStore="own"))
    assert await world.user("docker.io/library/web") == "hub"
    assert helper.asked[0] == "get https://index.docker.io/v1/"


async def test_a_store_that_is_not_installed_is_gone_without_which_is_logged_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    write(world.root / "home/.config/containers/auth.json", text({HOST: {}}, credsStore="desktop"))
    write(world.docker, {"s.example": auth("u")})
    credentials = world.credentials()
    assert await credentials.find(HOST, "a") is None
    assert await credentials.find("s.example", "a") == Password("u", "p")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "docker-credential-desktop" in caplog.text


async def test_a_helper_of_a_registry_that_is_not_installed_is_an_error_that_names_the_file(
    world: World,
) -> None:
    write(world.docker, text({HOST: auth("u")}, credHelpers={HOST: "ecr-login"}))
    message = rf"{world.docker}: the credential helper docker-credential-ecr-login is not installed"
    with pytest.raises(UsageError, match=message):
        await world.find()


@pytest.mark.parametrize("more", [{"credsStore": "sh"}, {"credHelpers": {HOST: "sh"}}])
async def test_a_helper_that_fails_is_not_the_same_as_one_that_has_nothing(
    world: World, more: dict[str, object]
) -> None:
    world.bin.mkdir()
    install_program(world.bin, "sh", "#!/bin/sh\nexit 1\n")
    write(world.docker, text(**more))
    with pytest.raises(Unreachable, match=rf"{world.docker}: .*docker-credential-sh failed for r\.example"):
        await world.find()


async def test_a_helper_that_is_too_slow_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(*_: object, **__: object) -> None:
        raise DeadlineExpired("too slow")

    monkeypatch.setattr(Helpers, "get", slow)
    write(world.docker, text(credHelpers={HOST: "own"}))
    with pytest.raises(DeadlineExpired, match=f"{world.docker}: too slow"):
        await world.find()


# -------------------- DOCKER_AUTH_CONFIG


async def test_the_variable_may_hold_all_that_a_file_may(world: World) -> None:
    FakeHelper.install(world.bin, "own", {"s.example": ("helper", "p")})
    world.environ["DOCKER_AUTH_CONFIG"] = text({f"{HOST}/team": auth("u")}, credHelpers={"s.example": "own"})
    assert await world.user(f"{HOST}/team/web") == "u"
    assert await world.user(f"{HOST}/web") is None
    assert await world.user("s.example/web") == "helper"


@pytest.mark.parametrize("value", ["s3cret", "[]", '{"auths": "s3cret"}', text({HOST: {"auth": "czNjcmV0"}})])
async def test_a_broken_variable_is_ignored_which_is_logged_once(
    world: World, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    world.environ["DOCKER_AUTH_CONFIG"] = value
    write(world.docker, {HOST: auth("u")})
    credentials = world.credentials()
    for _ in range(2):
        assert await credentials.find(HOST, "a") == Password("u", "p")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "DOCKER_AUTH_CONFIG" in record.message
    assert "s3cret" not in record.message
    assert "czNj" not in record.message


# -------------------- files as they are now


async def test_a_broken_file_is_an_error_that_names_it_unless_an_earlier_place_has_a_match(
    world: World,
) -> None:
    write(world.docker, "{")
    with pytest.raises(UsageError, match=str(world.docker)):
        await world.find()
    write(world.root / "home/.config/containers/auth.json", {HOST: auth("u")})
    assert await world.user() == "u"


async def test_a_file_that_is_replaced_is_read_again_when_asked_afresh_or_after_a_while(
    world: World, autojump_clock: MockClock
) -> None:
    write(world.docker, {HOST: auth("u", "1")})
    credentials = world.credentials()
    assert await credentials.find(HOST, "a") == Password("u", "1")
    write(world.docker, {HOST: auth("u", "2")})
    assert await credentials.find(HOST, "a") == Password("u", "1")
    assert await credentials.find(HOST, "a", fresh=True) == Password("u", "2")
    write(world.docker, {HOST: auth("u", "3")})
    await trio.sleep(6)
    assert await credentials.find(HOST, "a") == Password("u", "3")
    await trio.Path(world.docker).unlink()
    await trio.sleep(6)
    assert await credentials.find(HOST, "a") is None


async def test_a_file_that_is_not_replaced_is_not_read_again(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(world.docker, {HOST: auth("u")})
    credentials = world.credentials()
    await credentials.find(HOST, "a")
    monkeypatch.setattr("fsmount.registry.authfile.json.loads", lambda text: pytest.fail("it was read again"))
    await trio.sleep(60)
    assert await credentials.find(HOST, "a", fresh=True) == Password("u", "p")


async def test_a_password_file_that_is_replaced_is_read_again(world: World) -> None:
    path = write(world.root / "password", "1")
    world.registries = {HOST: Registry(username="u", password_file=path)}
    credentials = world.credentials()
    assert await credentials.find(HOST, "a") == Password("u", "1")
    write(path, "2")
    assert await credentials.find(HOST, "a") == Password("u", "1")
    assert await credentials.find(HOST, "a", fresh=True) == Password("u", "2")


async def test_a_helper_is_asked_again_only_afresh(world: World, mock_clock: MockClock) -> None:
    helper = FakeHelper.install(world.bin, "own", {HOST: ("u", "1")})
    write(world.docker, text(credHelpers={HOST: "own"}))
    credentials = world.credentials()
    assert await credentials.find(HOST, "a") == Password("u", "1")
    helper.put({HOST: ("u", "2")})
    assert await credentials.find(HOST, "b") == Password("u", "1")
    assert await credentials.find(HOST, "a", fresh=True) == Password("u", "2")


@pytest.mark.parametrize(
    ("content", "mode", "warns"),
    [
        ({HOST: auth("u")}, 0o644, True),
        ({HOST: {"identitytoken": "t"}}, 0o604, True),
        ({HOST: auth("u")}, 0o660, False),
        ({HOST: {}}, 0o644, False),
    ],
)
async def test_that_everybody_may_read_a_secret_is_logged_once(
    world: World, caplog: pytest.LogCaptureFixture, content: dict[str, object], mode: int, warns: bool
) -> None:
    write(world.docker, content, mode)
    credentials = world.credentials()
    await credentials.find(HOST, "a")
    write(world.docker, {**content, "s.example": {}}, mode)
    await credentials.find(HOST, "a", fresh=True)
    assert [str(world.docker) in record.message for record in caplog.records] == [True] * warns


async def test_that_everybody_may_read_a_password_file_is_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.registries = {
        HOST: Registry(username="u", password_file=write(world.root / "password", "p", 0o644))
    }
    await world.find()
    assert "every user of this machine may read it" in caplog.text


@contextmanager
def closed(folder: Path) -> Iterator[None]:
    """Nobody enters a folder, and neither does root."""
    was_root = os.geteuid() == 0
    folder.chmod(0)
    try:
        if was_root:
            os.seteuid(65534)
        yield
    finally:
        if was_root:
            os.seteuid(0)
        folder.chmod(0o700)


async def test_a_usual_place_in_a_folder_that_is_closed_to_us_is_gone_without_which_is_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.environ = {}
    write(world.docker, {HOST: auth("u")})
    credentials = world.credentials()
    with closed(world.root / "home"):
        assert await credentials.find(HOST, "a") is None
        assert await credentials.find(HOST, "a", fresh=True) is None
    assert f"{world.docker} is in a folder that is closed to us" in caplog.text
    assert await credentials.find(HOST, "a", fresh=True) == Password("u", "p")


async def test_a_file_that_somebody_named_must_be_readable(world: World) -> None:
    world.environ = {"REGISTRY_AUTH_FILE": str(write(world.root / "home/named.json", {HOST: auth("u")}))}
    credentials = world.credentials()
    with (
        closed(world.root / "home"),
        pytest.raises(UsageError, match=r"named\.json cannot be read: Permission"),
    ):
        await credentials.find(HOST, "a")
    world.environ = {"REGISTRY_AUTH_FILE": str(world.root)}
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        await world.find()


async def test_what_is_no_plain_file_does_not_block(world: World) -> None:
    world.environ["REGISTRY_AUTH_FILE"] = "/dev/null"
    assert await world.find() is None
    os.mkfifo(world.root / "fifo")
    world.environ["REGISTRY_AUTH_FILE"] = str(world.root / "fifo")
    assert await world.find() is None


async def test_a_file_that_is_far_too_large_is_an_error(world: World) -> None:
    write(world.docker, " " * (1024 * 1024 + 1))
    with pytest.raises(UsageError, match="more than 1048576 bytes"):
        await world.find()


# -------------------- explaining


async def test_it_tells_which_places_were_asked_and_which_one_has_the_credential(world: World) -> None:
    del world.environ["CREDENTIALS_DIRECTORY"]
    root = world.root
    write(root / "home/.config/containers/auth.json", {"other.example": auth("x")})
    write(world.docker, {f"{HOST}/team": auth("u", "s3cret")})
    explanation = await world.credentials().explain(HOST, "team/web")
    assert explanation.steps == (
        Step("configuration", "[registries]", Result.NOTHING),
        Step("systemd", "CREDENTIALS_DIRECTORY", Result.UNSET),
        Step("DOCKER_AUTH_CONFIG", "", Result.UNSET),
        Step("REGISTRY_AUTH_FILE", "", Result.UNSET),
        Step("podman", str(root / "run/user/7/containers/auth.json"), Result.ABSENT),
        Step("podman", str(root / "home/.config/containers/auth.json"), Result.NOTHING),
        Step("docker", str(world.docker), Result.USED),
        Step("docker", str(root / "home/.dockercfg"), Result.NOT_ASKED),
    )
    assert explanation.match == Match(Password("u", "s3cret"), f"{HOST}/team")
    assert "s3cret" not in repr(explanation)


async def test_it_tells_which_helper_has_the_credential(world: World) -> None:
    FakeHelper.install(world.bin, "own", {HOST: ("u", "p")})
    world.environ["REGISTRY_AUTH_FILE"] = str(
        write(world.root / "named.json", text(credHelpers={HOST: "own"}))
    )
    explanation = await world.credentials().explain(HOST, "")
    assert explanation.match == Match(Password("u", "p"), HOST, "docker-credential-own")
    assert explanation.steps[-1] == Step("REGISTRY_AUTH_FILE", str(world.root / "named.json"), Result.USED)


async def test_it_tells_that_nobody_has_any_and_that_none_is_wanted(world: World) -> None:
    explanation = await world.credentials().explain(HOST, "a")
    assert explanation.match is None
    assert {step.result for step in explanation.steps} == {Result.NOTHING, Result.UNSET, Result.ABSENT}
    world.registries = {HOST: Registry(anonymous=True)}
    assert (await world.credentials().explain(HOST, "a")).match == Match(None, HOST)
