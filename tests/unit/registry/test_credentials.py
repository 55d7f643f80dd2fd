"""registry.md §3: docker's config.json."""

import base64
import json
import logging
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from fsmount.errors import UsageError
from fsmount.registry.credentials import Credential, DockerConfig, IdentityToken, Password, RegistryToken


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


def write(path: Path, auths: object = None, **more: object) -> None:
    """Replace the file as docker does."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"auths": auths, **more}))
    temporary.rename(path)


async def found(path: Path, name: str) -> Credential | None:
    domain, _, repository = name.partition("/")
    return await DockerConfig(path).find(domain, repository)


async def test_a_missing_file_means_anonymous(path: Path) -> None:
    assert await found(path, "registry.example/a") is None


async def test_the_most_specific_key_wins(path: Path) -> None:
    write(path, {key: auth(key, "x") for key in ("r.example", "r.example/team", "r.example/team/web")})
    for name, user in [
        ("r.example/other", "r.example"),
        ("r.example/team/api", "r.example/team"),
        ("r.example/team/web", "r.example/team/web"),
        ("r.example/team/web/x", "r.example/team/web"),
        ("r.example/teamwork", "r.example"),
    ]:
        assert await found(path, name) == Password(user, "x")


@pytest.mark.parametrize(
    "key", ["r.example", "r.example/", "https://r.example", "http://r.example/v2/", "https://r.example/v1/"]
)
async def test_keys_may_be_urls_and_end_in_slashes(path: Path, key: str) -> None:
    write(path, {key: auth("u", "p")})
    assert await found(path, "r.example/a/b") == Password("u", "p")


@pytest.mark.parametrize(
    "key", ["https://index.docker.io/v1/", "index.docker.io/v1/", "docker.io", "registry-1.docker.io"]
)
async def test_docker_hub_has_several_keys(path: Path, key: str) -> None:
    write(path, {key: auth("u", "p")})
    assert await found(path, "docker.io/library/web") == Password("u", "p")


async def test_a_port_is_part_of_the_key(path: Path) -> None:
    write(path, {"r.example": auth("u", "p"), "r.example:5000": auth("v", "p")})
    assert await found(path, "r.example:5000/a") == Password("v", "p")
    assert await found(path, "r.example:5001/a") is None


@pytest.mark.parametrize(
    ("entry", "credential"),
    [
        (auth("u", "p:q"), Password("u", "p:q")),
        ({"auth": base64.b64encode(b"u:p\0\0").decode()}, Password("u", "p")),
        ({"username": "u", "password": "p"}, Password("u", "p")),
        ({**auth("u", ""), "identitytoken": "t"}, IdentityToken("t")),
        ({"registrytoken": "t"}, RegistryToken("t")),
        ({}, None),
    ],
)
async def test_an_entry_holds_a_password_or_a_token(
    path: Path, entry: object, credential: Credential | None
) -> None:
    write(path, {"r.example": entry})
    assert await found(path, "r.example/a") == credential


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"auths": [1]}', '{"auths": {"a": 1}}', '{"credHelpers": 1}', "\xff"]
)
async def test_a_broken_file_is_a_usage_error_that_names_it(path: Path, text: str) -> None:
    await trio.Path(path).write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=r"config\.json") as caught:
        await found(path, "r.example/a")
    assert caught.value.remedy


@pytest.mark.parametrize(
    "entry", [{"auth": "c2VjcmV0"}, {"auth": "$$$"}, {"auth": 1}, {"identitytoken": [1]}]
)
async def test_a_broken_entry_is_an_error_only_for_its_registry_and_is_not_quoted(
    path: Path, entry: object
) -> None:
    write(path, {"r.example": entry, "s.example": auth("u", "p")})
    assert await found(path, "s.example/a") == Password("u", "p")
    with pytest.raises(UsageError, match=r"r\.example") as caught:
        await found(path, "r.example/a")
    assert "secret" not in str(caught.value)
    assert "c2Vj" not in str(caught.value)


async def test_a_replaced_file_is_read_again_when_asked_afresh_or_after_a_while(
    path: Path, autojump_clock: MockClock
) -> None:
    write(path, {"r.example": auth("u", "1")})
    config = DockerConfig(path)
    assert await config.find("r.example", "a") == Password("u", "1")
    write(path, {"r.example": auth("u", "2")})
    assert await config.find("r.example", "a") == Password("u", "1")
    assert await config.find("r.example", "a", fresh=True) == Password("u", "2")
    await trio.Path(path).unlink()
    await trio.sleep(60)
    assert await config.find("r.example", "a") is None


@pytest.mark.parametrize("more", [{"credsStore": "pass"}, {"credHelpers": {"r.example": "pass"}}])
async def test_a_helper_is_not_asked_which_is_logged_once(
    path: Path, more: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    write(path, {"r.example": {}}, **more)
    config = DockerConfig(path)
    with caplog.at_level(logging.WARNING):
        assert await config.find("r.example", "a") is None
        assert await config.find("r.example", "b") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "r.example" in caplog.text


async def test_a_plain_entry_counts_beside_a_helper(path: Path) -> None:
    write(path, {"r.example": auth("u", "p")}, credsStore="pass")
    assert await found(path, "r.example/a") == Password("u", "p")


async def test_the_folder_is_docker_config_or_below_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "here"))
    assert DockerConfig().path == tmp_path / "here/config.json"
    monkeypatch.delenv("DOCKER_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DockerConfig().path == tmp_path / ".docker/config.json"


def test_secrets_are_not_shown() -> None:
    shown = repr([Password("u", "secret"), IdentityToken("secret"), RegistryToken("secret")])
    assert "secret" not in shown
