"""Files of docker's and containers' form, read and written."""

import base64
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from fsmount.errors import FsmountError, UsageError
from fsmount.registry import authfile
from fsmount.registry.authfile import AuthFile
from fsmount.registry.credential import Credential, IdentityToken, Password, RegistryToken

NULL = "00000000-0000-0000-0000-000000000000"


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def parsed(auths: object, **more: object) -> AuthFile:
    return AuthFile.parse(json.dumps({"auths": auths, **more}).encode(), "config.json")


def found(file: AuthFile, name: str) -> Credential | None:
    domain, _, repository = name.partition("/")
    match = file.find(domain, repository)
    return match[1] if match else None


# -------------------- reading


@pytest.mark.parametrize(
    "data", [b"", b" \n", b"{}", b'{"auths": null, "credHelpers": null, "credsStore": ""}']
)
def test_an_empty_file_has_nothing(data: bytes) -> None:
    file = AuthFile.parse(data, "config.json")
    assert (found(file, "r.example/a"), file.helper("r.example"), file.has_secrets) == (None, None, False)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("r.example", "r.example"),
        ("r.example/other", "r.example"),
        ("r.example/team/api", "r.example/team"),
        ("r.example/team/web", "r.example/team/web"),
        ("r.example/team/web/x", "r.example/team/web"),
        ("r.example/teamwork", "r.example"),
    ],
)
def test_the_most_specific_key_wins(name: str, key: str) -> None:
    file = parsed({key: auth(key, "x") for key in ("r.example", "r.example/team", "r.example/team/web")})
    domain, _, repository = name.partition("/")
    assert file.find(domain, repository) == (key, Password(key, "x"))


@pytest.mark.parametrize(
    "key", ["r.example", "r.example/", "https://r.example", "http://r.example/v2/", "https://r.example/v1/"]
)
def test_keys_may_be_urls_and_end_in_slashes(key: str) -> None:
    assert found(parsed({key: auth("u", "p")}), "r.example/a/b") == Password("u", "p")


@pytest.mark.parametrize("url_first", [False, True])
def test_a_plain_key_wins_over_a_url_that_an_older_tool_left(url_first: bool) -> None:
    entries = [("https://r.example/v1/", auth("old", "p")), ("r.example", auth("new", "p"))]
    assert found(parsed(dict(entries if url_first else entries[::-1])), "r.example/a") == Password("new", "p")


@pytest.mark.parametrize(
    "key", ["https://index.docker.io/v1/", "index.docker.io/v1/", "docker.io", "registry-1.docker.io"]
)
def test_docker_hub_has_several_keys(key: str) -> None:
    file = parsed({key: auth("u", "p")}, credHelpers={key: "x"})
    assert found(file, "docker.io/library/web") == Password("u", "p")
    assert file.helper("docker.io") == "x"


def test_a_port_is_part_of_the_key() -> None:
    file = parsed({"r.example": auth("u", "p"), "r.example:5000": auth("v", "p")})
    assert found(file, "r.example:5000/a") == Password("v", "p")
    assert found(file, "r.example:5001/a") is None


@pytest.mark.parametrize(
    ("entry", "credential"),
    [
        (auth("u", "p:q"), Password("u", "p:q")),
        ({"auth": base64.b64encode(b"u:p\0\0").decode()}, Password("u", "p")),
        ({"auth": "dT\npw\n"}, Password("u", "p")),  # "u:p", wrapped as base64(1) does
        ({"username": "u", "password": "p"}, Password("u", "p")),
        ({**auth("u", ""), "identitytoken": "t"}, IdentityToken("t")),
        ({"registrytoken": "t"}, RegistryToken("t")),
        ({**auth(NULL, ""), "identitytoken": "t"}, IdentityToken("t")),
        (auth(NULL, "refresh"), IdentityToken("refresh")),  # az acr login, Kubernetes
        ({"username": NULL, "password": "refresh"}, IdentityToken("refresh")),
        (auth("robot$team+ci", "p"), Password("robot$team+ci", "p")),
        ({}, None),
        ({"email": "u@example"}, None),
    ],
)
def test_an_entry_holds_a_password_or_a_token(entry: object, credential: Credential | None) -> None:
    file = parsed({"r.example": entry})
    assert found(file, "r.example/a") == credential
    assert file.has_secrets == (credential is not None)


def test_an_empty_entry_leaves_it_to_a_less_specific_one() -> None:
    assert found(parsed({"r.example/a": {}, "r.example": auth("u", "p")}), "r.example/a") == Password(
        "u", "p"
    )


def test_the_helper_of_a_registry_is_its_own_else_that_of_all_and_an_empty_one_is_none() -> None:
    file = parsed({}, credsStore="all", credHelpers={"a.example": "own", "b.example": ""})
    assert [file.helper(name) for name in ("a.example", "b.example", "c.example")] == ["own", None, "all"]


def test_the_old_file_of_docker_has_nothing_but_entries() -> None:
    data = json.dumps({"r.example": auth("u", "p")}).encode()
    assert found(AuthFile.parse(data, ".dockercfg", flat=True), "r.example/a") == Password("u", "p")


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"[]",
        b"s3cret",
        b'{"auths": [1]}',
        b'{"auths": {"a": "s3cret"}}',
        b'{"credHelpers": 1}',
        b'{"credHelpers": {"a": 1}}',
        b'{"credsStore": 1}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_a_broken_file_is_an_error_that_names_it_and_does_not_quote_it(data: bytes) -> None:
    with pytest.raises(UsageError, match=r"config\.json") as caught:
        AuthFile.parse(data, "config.json")
    assert caught.value.remedy
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize(
    "entry", [{"auth": "c2VjcmV0"}, {"auth": "$$$"}, {"auth": 1}, {"identitytoken": [1]}]
)
def test_a_broken_entry_is_an_error_only_for_its_registry_and_is_not_quoted(entry: object) -> None:
    file = parsed({"r.example": entry, "s.example": auth("u", "p")})
    assert found(file, "s.example/a") == Password("u", "p")
    with pytest.raises(UsageError, match=r"config\.json, entry r\.example") as caught:
        found(file, "r.example/a")
    assert "secret" not in str(caught.value)
    assert "c2Vj" not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    entry = {"identitytoken": "s3cret", **auth("u", "s3cret")}
    shown = repr(
        [Password("u", "s3cret"), IdentityToken("s3cret"), RegistryToken("s3cret"), parsed({"r": entry})]
    )
    assert "s3cret" not in shown
    assert entry["auth"] not in shown


# -------------------- writing


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "docker/config.json"


def written(path: Path, content: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def content(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_first_login_makes_a_file_for_its_owner_alone(path: Path) -> None:
    authfile.put(path, "r.example", ("u", "p:q"))
    assert content(path) == {"auths": {"r.example": auth("u", "p:q")}}
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
    assert os.listdir(path.parent) == ["config.json"]


def test_what_else_is_in_the_file_stays_in_its_order(path: Path) -> None:
    before = {
        "HttpHeaders": {"X-Meta": "é"},
        "auths": {"b.example": auth("b", "p"), "r.example": auth("u", "old"), "a.example": {"email": "x"}},
        "plugins": {"z": {"n": 1}},
    }
    authfile.put(written(path, before), "r.example", ("u", "new"))
    before["auths"]["r.example"] = auth("u", "new")
    assert json.dumps(content(path)) == json.dumps(before)
    assert "é" in path.read_text()
    path.chmod(0o644)
    authfile.put(path, "c.example", ("c", "p"))
    assert list(content(path)["auths"]) == ["b.example", "r.example", "a.example", "c.example"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_login_replaces_other_spellings_of_its_registry_and_spares_parts_of_it(path: Path) -> None:
    old = {
        "https://r.example/v1/": auth("u", "old"),
        "r.example/team": auth("t", "p"),
        "r.example:1": auth("o", "p"),
    }
    authfile.put(written(path, {"auths": old}), "r.example", ("u", "new"))
    assert list(content(path)["auths"]) == ["r.example/team", "r.example:1", "r.example"]


def test_docker_hub_is_written_as_docker_spells_it(path: Path) -> None:
    authfile.put(written(path, {"auths": {"docker.io": auth("u", "old")}}), "docker.io", ("u", "new"))
    assert content(path) == {"auths": {"https://index.docker.io/v1/": auth("u", "new")}}


def test_a_login_that_a_helper_keeps_leaves_an_empty_entry_and_no_secret(path: Path) -> None:
    authfile.put(written(path, {"auths": {"r.example": auth("u", "old")}}), "r.example", None)
    assert content(path) == {"auths": {"r.example": {}}}


def test_of_a_symbolic_link_the_target_is_replaced(path: Path, tmp_path: Path) -> None:
    target = written(tmp_path / "elsewhere/real.json", {"auths": {}})
    path.parent.mkdir()
    path.symlink_to("../elsewhere/real.json")
    inode = target.stat().st_ino
    authfile.put(path, "r.example", ("u", "p"))
    assert path.is_symlink()
    assert content(target)["auths"] == {"r.example": auth("u", "p")}
    assert target.stat().st_ino != inode  # renamed into place, not written over
    assert os.listdir(target.parent) == ["real.json"]


def test_a_file_that_cannot_be_replaced_stays_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(path, {"auths": {"r.example": auth("u", "old")}})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FsmountError, match=r"config\.json cannot be changed: No space left"):
        authfile.put(path, "r.example", ("u", "new"))
    assert content(path)["auths"] == {"r.example": auth("u", "old")}
    assert os.listdir(path.parent) == ["config.json"]


@pytest.mark.parametrize("text", ["{", '{"auths": {"r.example": 1}}'])
def test_a_broken_file_is_not_written_to(path: Path, text: str) -> None:
    written(path, {}).write_text(text)
    with pytest.raises(UsageError):
        authfile.put(path, "s.example", ("u", "p"))
    with pytest.raises(UsageError):
        authfile.remove(path, "r.example")
    assert path.read_text() == text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has files of others")
def test_a_file_of_another_user_stays_hers(path: Path) -> None:
    os.chown(written(path, {}), 1234, 2345)
    authfile.put(path, "r.example", ("u", "p"))
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_removing_takes_every_spelling_and_tells_them(path: Path) -> None:
    auths = {"https://r.example/v2/": auth("u", "p"), "s.example": auth("s", "p"), "r.example": {}}
    assert authfile.remove(written(path, {"auths": auths, "x": 1}), "r.example") == [
        "https://r.example/v2/",
        "r.example",
    ]
    assert content(path) == {"auths": {"s.example": auth("s", "p")}, "x": 1}


def test_removing_what_is_not_there_touches_nothing(path: Path) -> None:
    assert authfile.remove(path, "r.example") == []
    assert not path.parent.exists()
    inode = written(path, {"auths": {"s.example": {}}}).stat().st_ino
    assert authfile.remove(path, "r.example") == []
    assert path.stat().st_ino == inode
