"""skopeo as the oracle: the same files, and the same answer to who we are."""

import base64
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from fsmount.registry.credential import Credential, Password
from fsmount.registry.credentials import Credentials
from tests import peers
from tests.fakes.helper import FakeHelper
from tests.integration.program import command

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        bool(peers.have("skopeo", "docker-registry")), reason=peers.have("skopeo", "docker-registry")
    ),
]

RUNTIME = "run/containers/auth.json"
CONFIG = "home/.config/containers/auth.json"
DOCKER = "home/.docker/config.json"


def auth(user: str, password: str = "p") -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def auths(**users: str) -> dict[str, object]:
    """Entries of a user each; an underscore is a dot."""
    return {"auths": {key.replace("_", "."): auth(user) for key, user in users.items()}}


@dataclass(frozen=True, slots=True)
class Case:
    """Files and variables ({root} is where they are), a name, and the user that is found for it.

    A helper `own` has the user `helper` for h.example and docker.io.
    """

    id: str
    files: Mapping[str, object]
    name: str
    user: str | None
    environ: Mapping[str, str] = field(default_factory=dict)
    #: Where we differ on purpose: what skopeo 1.9 finds instead, and why we do not.
    skopeo: str | None = "the same"
    reason: str = ""


KEYS = {
    "auths": {"r.example": auth("root"), "r.example/team": auth("team"), "r.example/team/web": auth("web")}
}
CASES = [
    Case("nothing", {}, "r.example/web", None),
    # Keys.
    Case("the host", {DOCKER: KEYS}, "r.example/other", "root"),
    Case("a part", {DOCKER: KEYS}, "r.example/team/api", "team"),
    Case("the longest part", {DOCKER: KEYS}, "r.example/team/web", "web"),
    Case("below the longest part", {DOCKER: KEYS}, "r.example/team/web/x", "web"),
    Case("not half a name", {DOCKER: KEYS}, "r.example/teamwork", "root"),
    Case("parts in podman's file", {CONFIG: KEYS}, "r.example/team/api", "team"),
    Case("another port", {DOCKER: auths(r_example="u")}, "r.example:5000/web", None),
    Case("that port", {DOCKER: {"auths": {"r.example:5000": auth("u")}}}, "r.example:5000/web", "u"),
    Case("https", {DOCKER: {"auths": {"https://r.example": auth("u")}}}, "r.example/web", "u"),
    Case("http and v1", {DOCKER: {"auths": {"http://r.example/v1/": auth("u")}}}, "r.example/web", "u"),
    Case("v2", {DOCKER: {"auths": {"https://r.example/v2/": auth("u")}}}, "r.example/web", "u"),
    Case(
        "hub by docker",
        {DOCKER: {"auths": {"https://index.docker.io/v1/": auth("u")}}},
        "docker.io/library/x",
        "u",
    ),
    Case("hub by podman", {CONFIG: auths(docker_io="u")}, "docker.io/library/x", "u"),
    Case("a part of hub", {CONFIG: {"auths": {"docker.io/library": auth("u")}}}, "docker.io/library/x", "u"),
    Case(
        "a slash at the end",
        {DOCKER: {"auths": {"r.example/": auth("u")}}},
        "r.example/web",
        "u",
        skopeo=None,
        reason="docker takes it",
    ),
    # Entries.
    Case("NUL at the end", {DOCKER: {"auths": {"r.example": auth("u", "p\0\0")}}}, "r.example/web", "u"),
    Case("an empty entry", {DOCKER: {"auths": {"r.example": {}}}}, "r.example/web", None),
    Case(
        "an empty entry, next file",
        {CONFIG: {"auths": {"r.example": {}}}, DOCKER: auths(r_example="u")},
        "r.example",
        "u",
    ),
    Case(
        "plain fields",
        {DOCKER: {"auths": {"r.example": {"username": "u", "password": "p"}}}},
        "r.example/web",
        "u",
        skopeo=None,
        reason="docker takes them",
    ),
    # Files.
    Case(
        "runtime first", {RUNTIME: auths(r_example="run"), CONFIG: auths(r_example="cfg")}, "r.example", "run"
    ),
    Case(
        "podman before docker",
        {CONFIG: auths(r_example="cfg"), DOCKER: auths(r_example="dkr")},
        "r.example",
        "cfg",
    ),
    Case(
        "the first with a match",
        {RUNTIME: auths(s_example="run"), DOCKER: auths(r_example="dkr")},
        "r.example",
        "dkr",
    ),
    Case(
        "a part in a later file", {RUNTIME: auths(r_example="run"), DOCKER: KEYS}, "r.example/team/web", "run"
    ),
    Case("the old file", {"home/.dockercfg": {"r.example": auth("old")}}, "r.example/web", "old"),
    Case(
        "XDG_CONFIG_HOME",
        {"xdg/containers/auth.json": KEYS},
        "r.example",
        "root",
        {"XDG_CONFIG_HOME": "{root}/xdg"},
    ),
    Case(
        "DOCKER_CONFIG",
        {"dc/config.json": KEYS, DOCKER: auths(r_example="x")},
        "r.example",
        "root",
        {"DOCKER_CONFIG": "{root}/dc"},
    ),
    Case(
        "REGISTRY_AUTH_FILE",
        {"f": auths(r_example="f"), RUNTIME: auths(r_example="run")},
        "r.example",
        "f",
        {"REGISTRY_AUTH_FILE": "{root}/f"},
    ),
    Case(
        "REGISTRY_AUTH_FILE has nothing",
        {"f": auths(s_example="f"), DOCKER: auths(r_example="dkr")},
        "r.example",
        None,
        {"REGISTRY_AUTH_FILE": "{root}/f"},
        skopeo="dkr",
        reason="a file that is named stands alone since containers/image#1751",
    ),
    Case(
        "REGISTRY_AUTH_FILE is missing",
        {DOCKER: auths(r_example="dkr")},
        "r.example",
        None,
        {"REGISTRY_AUTH_FILE": "{root}/f"},
        skopeo="dkr",
        reason="a file that is named stands alone since containers/image#1751",
    ),
    Case(
        "DOCKER_AUTH_CONFIG",
        {},
        "r.example",
        "u",
        {"DOCKER_AUTH_CONFIG": json.dumps(auths(r_example="u"))},
        skopeo=None,
        reason="docker and GitLab read it",
    ),
    # Helpers.
    Case("a helper", {DOCKER: {"credHelpers": {"h.example": "own"}}}, "h.example/web", "helper"),
    Case(
        "a helper before entries",
        {DOCKER: {**auths(h_example="u"), "credHelpers": {"h.example": "own"}}},
        "h.example",
        "helper",
    ),
    Case(
        "a helper before longer entries",
        {DOCKER: {"auths": {"h.example/team": auth("u")}, "credHelpers": {"h.example": "own"}}},
        "h.example/team/web",
        "helper",
    ),
    Case(
        "a helper without it hides entries",
        {DOCKER: {**auths(n_example="u"), "credHelpers": {"n.example": "own"}}},
        "n.example",
        None,
    ),
    Case(
        "a helper without it, next file",
        {CONFIG: {"credHelpers": {"n.example": "own"}}, DOCKER: auths(n_example="u")},
        "n.example",
        "u",
    ),
    Case(
        "no helper for a part",
        {DOCKER: {**auths(h_example="u"), "credHelpers": {"h.example/team": "own"}}},
        "h.example/team",
        "u",
    ),
    Case(
        "a helper for hub", {DOCKER: {"credHelpers": {"docker.io": "own"}}}, "docker.io/library/x", "helper"
    ),
    Case(
        "entries before the store",
        {DOCKER: {**auths(h_example="u"), "credsStore": "own"}},
        "h.example/web",
        "u",
    ),
    Case("a store without it", {DOCKER: {**auths(n_example="u"), "credsStore": "own"}}, "n.example/web", "u"),
    Case(
        "a store",
        {DOCKER: {"auths": {"h.example": {}}, "credsStore": "own"}},
        "h.example/web",
        "helper",
        skopeo=None,
        reason="docker keeps logins there",
    ),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    FakeHelper.install(tmp_path / "bin", "own", dict.fromkeys(("h.example", "docker.io"), ("helper", "p")))
    (tmp_path / "run").mkdir()
    (tmp_path / "home").mkdir()
    return tmp_path


def environment(root: Path, more: Mapping[str, str]) -> dict[str, str]:
    base = {"PATH": f"{root}/bin:/usr/bin:/bin", "HOME": f"{root}/home", "XDG_RUNTIME_DIR": f"{root}/run"}
    return base | {name: value.replace("{root}", str(root)) for name, value in more.items()}


def skopeo_user(environ: Mapping[str, str], name: str) -> str | None:
    done = subprocess.run(
        ["skopeo", "login", "--get-login", name], env=environ, capture_output=True, text=True
    )
    if done.returncode:
        assert "not logged into" in done.stderr
        return None
    return done.stdout.strip()


def ours(environ: Mapping[str, str], name: str) -> Credential | None:
    domain, _, repository = name.partition("/")
    return trio.run(Credentials(environ=environ).find, domain, repository)


def our_user(environ: Mapping[str, str], name: str) -> str | None:
    found = ours(environ, name)
    assert found is None or isinstance(found, Password)
    return found.username if found else None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_skopeo_and_we_find_the_same_user_but_where_we_differ_on_purpose(root: Path, case: Case) -> None:
    for path, content in case.files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(content))
    environ = environment(root, case.environ)
    assert our_user(environ, case.name) == case.user
    assert skopeo_user(environ, case.name) == (case.user if case.skopeo == "the same" else case.skopeo)
    assert bool(case.reason) == (case.skopeo != "the same")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[peers.Registry]:
    with peers.docker_registry(tmp_path / "storage", htpasswd={"me": "s3:cret"}) as registry:
        yield registry


def fsmount(environ: Mapping[str, str], *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env={**environ, "FSMOUNT_CONFIG": "/dev/null", "FSMOUNT_CACHE": environ["HOME"]},
        input=stdin,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("store", [False, True])
def test_skopeo_is_logged_in_with_what_we_wrote_until_we_log_out(
    root: Path, registry: peers.Registry, store: bool
) -> None:
    environ = environment(root, {})
    if store:  # skopeo reads credHelpers, and not credsStore
        (root / DOCKER).parent.mkdir()
        (root / DOCKER).write_text(json.dumps({"credHelpers": {registry.host: "own"}}))
    login = ("login", registry.host, "-u", "me", "--password-stdin")
    refused = fsmount(environ, *login, stdin="wrong")
    assert (refused.returncode, "does not take this user name" in refused.stderr) == (5, True)
    assert skopeo_user(environ, registry.host) is None
    done = fsmount(environ, *login, stdin="s3:cret\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert skopeo_user(environ, registry.host) == "me"
    listed = ["skopeo", "list-tags", "--tls-verify=false", f"docker://{registry.host}/no/such"]
    subprocess.run(listed, env=environ, capture_output=True)
    assert registry.requests()[-1].status == 404  # which is told to none but those who may know
    assert "s3:cret" not in (root / DOCKER).read_text() + done.stdout
    assert fsmount(environ, "logout", registry.host).returncode == 0
    assert skopeo_user(environ, registry.host) is None


def test_we_are_logged_in_with_what_skopeo_wrote(root: Path, registry: peers.Registry) -> None:
    environ = environment(root, {})
    words = ["skopeo", "login", "--tls-verify=false", "-u", "me", "--password-stdin", registry.host]
    subprocess.run(words, env=environ, input=b"s3:cret", check=True, capture_output=True)
    assert ours(environ, f"{registry.host}/team/web") == Password("me", "s3:cret")
    done = fsmount(environ, "ls", f"{registry.host}/team/web:v1")
    assert (done.returncode, "does not exist" in done.stderr) == (4, True)
    shown = fsmount(environ, "auth", registry.host)
    assert f"password of me, from {root / RUNTIME}" in shown.stdout
    assert fsmount(environ, "logout", registry.host, "--authfile", str(root / RUNTIME)).returncode == 0
    assert skopeo_user(environ, registry.host) is None
    assert fsmount(environ, "ls", f"{registry.host}/team/web:v1").returncode == 5
