"""`fsmount doctor` as users run it: with registries, good and bad, and with a mount that lives, hangs or is dead."""

import base64
import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from fsmount.fuse import mounts
from tests import peers
from tests.fakes.tar import Member, archive
from tests.integration.program import command, daemon, environment, kill, mounted

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(peers.have("docker-registry")), reason="needs docker-registry"),
]
needs_mount = [
    pytest.mark.mount,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"
    ),
]

_SECONDS = 60
_PASSWORD = "right-word-4711"
_LAYER = peers.pack(archive(Member(b"file", b"content\n")), "tar")


class Found(NamedTuple):
    """A finding, without what it is about."""

    verdict: str
    message: str
    remedy: str | None


@pytest.fixture(scope="module")
def storage() -> Iterator[Path]:
    """The storage of a registry with the image team/web:v1."""
    with tempfile.TemporaryDirectory(prefix="storage-") as name:
        layout, root = Path(name, "layout"), Path(name, "root")
        peers.tar_layer_image(layout, "v1", [_LAYER])
        with peers.docker_registry(root) as registry:
            peers.push(layout, "v1", registry.host, "team/web")
        yield root


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder with a place to mount at."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as name:
        Path(name, "mnt").mkdir()
        yield Path(name)


def doctor(
    work: Path, *options: str | Path, code: int, variables: Mapping[str, str] | None = None
) -> dict[tuple[str, str | None], Found]:
    """What is found, by check and subject. A problem, and only that, makes the exit code 1."""
    words = command("doctor", work / "mnt", "--format", "json", *options)
    done = subprocess.run(
        words,
        env={**environment(work / "cache"), **(variables or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_SECONDS,
        check=False,
    )
    assert done.returncode == code, done.stderr.decode() + done.stdout.decode()
    said = json.loads(done.stdout)
    assert said["version"] == 1
    found = {
        (one["check"], one["subject"]): Found(one["verdict"], one["message"], one["remedy"])
        for one in said["findings"]
    }
    assert len(found) == len(said["findings"])
    assert any(one.verdict == "problem" for one in found.values()) == (code == 1)
    assert all(one.remedy for one in found.values() if one.verdict == "problem")
    return found


def test_a_good_registry_is_found_good_piece_by_piece(storage: Path, work: Path) -> None:
    with peers.docker_registry(storage) as registry:
        host = registry.host
        found = doctor(work, "--app", f"web={host}/team/web", code=0)
    assert {check for check, _ in found} >= {
        *("configuration", "kernel", "fuse", "fusermount3", "rights", "descriptors", "mount", "cache"),
        *("registry", "credentials", "app", "clock"),
    }
    assert found["registry", host].verdict == found["clock", host].verdict == "ok"
    assert found["app", "web"] == Found("ok", f"{host}/team/web shows 1 tags", None)
    assert "anonymously" in found["credentials", host].message
    assert found["cache", None].verdict == "ok" and not (work / "cache").exists()


def test_a_port_where_nobody_listens_is_a_problem(work: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        found = doctor(work, "--app", f"web={host}/team/web", code=1)
    for key in (("registry", host), ("app", "web")):
        assert found[key].verdict == "problem" and "Connection refused" in found[key].message


def test_a_server_that_says_nothing_is_a_problem_and_the_rest_is_told(storage: Path, work: Path) -> None:
    with socket.socket() as silent, peers.docker_registry(storage) as registry:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        apps = ["--app", f"web={registry.host}/team/web", "--app", f"silent={host}/team/web"]
        found = doctor(work, *apps, code=1)
    for key in (("registry", host), ("app", "silent")):
        assert found[key].verdict == "problem" and "within 5 s" in found[key].message
    assert found["app", "web"].verdict == found["registry", registry.host].verdict == "ok"


def test_a_certificate_of_an_unknown_authority_is_a_problem_and_of_a_known_one_is_none(
    storage: Path, work: Path
) -> None:
    tls = peers.loopback_tls(work)
    with peers.docker_registry(storage, tls=tls) as registry:
        host, app = registry.host, f"web={registry.host}/team/web"
        found = doctor(work, "--app", app, code=1)["registry", host]
        assert found.verdict == "problem" and "not trusted" in found.message
        assert "update-ca-certificates" in (found.remedy or "")
        trusted = doctor(work, "--app", app, code=0, variables={"SSL_CERT_FILE": str(tls.authority)})
        assert trusted["registry", host].verdict == "ok"
        assert "trusted, and good until" in trusted["certificate", host].message


def test_a_wrong_password_is_found_with_its_place_and_is_not_told(storage: Path, work: Path) -> None:
    with peers.docker_registry(storage, htpasswd={"me": _PASSWORD}) as registry:
        host = registry.host
        for password, code, verdict in ((_PASSWORD, 0, "ok"), ("wrong-word-4712", 1, "problem")):
            auth = base64.b64encode(f"me:{password}".encode()).decode()
            file = work / "auth.json"
            file.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
            variables = {"REGISTRY_AUTH_FILE": str(file)}
            found = doctor(work, "--app", f"web={host}/team/web", code=code, variables=variables)
            assert found["registry", host].verdict == "ok", "at the front door anybody may knock"
            credentials = found["credentials", host]
            assert credentials.verdict == found["app", "web"].verdict == verdict
            assert str(file) in credentials.message
            assert password not in repr(found) and auth not in repr(found)
        assert credentials.remedy == f"fsmount login {host}"
        found = doctor(work, "--app", f"web={host}/team/web", code=1)
        assert "anonymously" in found["credentials", host].message
        assert "no access" in found["app", "web"].message


def test_a_file_of_credentials_that_is_broken_is_a_problem(storage: Path, work: Path) -> None:
    (work / "auth.json").write_text("{")
    with peers.docker_registry(storage) as registry:
        variables = {"REGISTRY_AUTH_FILE": str(work / "auth.json")}
        found = doctor(work, "--app", f"web={registry.host}/team/web", code=1, variables=variables)
    assert str(work / "auth.json") in found["credentials", registry.host].message


def test_what_is_no_registry_is_a_problem(work: Path) -> None:
    (work / "www").mkdir()
    with subprocess.Popen(
        ["python3", "-u", "-m", "http.server", "--bind", "127.0.0.1", "0"],
        cwd=work / "www",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().split()[5].decode()
            found = doctor(work, "--app", f"web=127.0.0.1:{port}/team/web", code=1)
        finally:
            server.kill()
    registry = found["registry", f"127.0.0.1:{port}"]
    assert registry.verdict == "problem" and "answers 404" in registry.message


def test_a_tool_that_is_absent_is_told(work: Path) -> None:
    (work / "bin").mkdir()
    (work / "bin/stat").symlink_to("/usr/bin/stat")
    (work / "bin/test").symlink_to("/usr/bin/test")
    found = doctor(work, code=0 if os.geteuid() == 0 else 1, variables={"PATH": str(work / "bin")})
    assert "not installed" in found["fusermount3", None].message
    assert found["fusermount3", None].remedy == "Install the package fuse3."


def test_all_mistakes_of_the_configuration_are_one_finding(work: Path) -> None:
    file = work / "config.toml"
    file.write_text('[cache]\nsize = "many"\n[apps.web]\ntag = "x"\n')
    found = doctor(work, "--config", file, code=1)
    message = found["configuration", None].message
    assert f"{file}:2: " in message and f"{file}:4: " in message
    assert found["kernel", None] and found["mount", None]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
def test_a_cache_in_memory_is_a_warning(work: Path) -> None:
    (work / "cache").mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3G,mode=700", "tmpfs", work / "cache"], check=True)
    try:
        file = work / "config.toml"
        file.write_text('[cache]\nsize = "500 MB"\nmin_free = "100 MB"\n')
        found = doctor(work, "--config", file, code=0)["cache", None]
        assert found.verdict == "warning" and "in memory (tmpfs)" in found.message
        file.write_text('[cache]\nsize = "500 MB"\nmin_free = "4 GB"\n')
        done = subprocess.run(
            command("doctor", work / "mnt", "--config", file),
            env=environment(work / "cache"),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        assert done.returncode == 1
        assert "problem cache" in done.stdout and "cache.min_free keeps 4.0 GB free" in done.stdout
        assert "→ Free some space there" in done.stdout
    finally:
        subprocess.run(["umount", work / "cache"], check=True)


class TestWithAMount:
    """The mount itself is never touched: one that hangs is told of as soon as any other."""

    pytestmark = needs_mount

    def test_one_that_serves_says_how_it_is(self, storage: Path, work: Path) -> None:
        with peers.docker_registry(storage) as registry:
            app = f"web={registry.host}/team/web"
            with mounted(work, app) as mountpoint:
                found = doctor(work, "--app", app, code=0)["mount", None]
                assert found == Found("ok", f"{mountpoint}: serving 1 app", None)
                registry.stop()
                with suppress(OSError):
                    os.listdir(mountpoint / "web")
                found = doctor(work, "--app", app, code=1)["mount", None]
                assert found.verdict == "warning"
                assert f"{mountpoint}: degraded, registry unreachable since" in found.message

    def test_one_whose_process_hangs_is_a_problem(self, work: Path) -> None:
        with mounted(work) as mountpoint:
            pid = daemon(mountpoint)
            os.kill(pid, signal.SIGSTOP)
            try:
                found = doctor(work, code=1)["mount", None]
            finally:
                os.kill(pid, signal.SIGCONT)
            assert "has not answered within 4 s" in found.message

    def test_one_that_is_dead_is_a_problem(self, work: Path) -> None:
        with mounted(work) as mountpoint:
            kill(mountpoint)
            found = doctor(work, code=1)["mount", None]
            assert "nobody answers" in found.message
            assert mounts.find(mountpoint) is not None
