"""`fsmount status` of a real mount over a real registry: while it reads, without its registry, and when it is gone."""

import json
import os
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fsmount.control.places import socket_name
from fsmount.fuse import mounts
from tests import peers
from tests.fakes.front import CountingProxy, Fault
from tests.fakes.tar import Member, archive
from tests.integration.program import daemon, fsmount, kill, mounted, wait_until
from tests.unit.test_metrics import parse

pytestmark = [
    pytest.mark.integration,
    pytest.mark.mount,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"
    ),
]

_MIB = 1 << 20
_RUN = Path("/run/fsmount")
_FILES = {f"file{number}": Random(number).randbytes(2 * _MIB) for number in range(8)}
#: Read in parts, as it is: its files are large, and it is not compressed.
_LAYER = peers.pack(archive(*(Member(name.encode(), data) for name, data in _FILES.items())), "tar")
_DIGEST = peers.digest_of(_LAYER.read())
_SIZE = len(_LAYER.read())


@pytest.fixture(scope="module")
def storage() -> Iterator[Path]:
    """The storage of a registry with one image of one layer."""
    if why := peers.have("docker-registry"):
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="storage-") as name:
        layout, root = Path(name, "layout"), Path(name, "root")
        peers.tar_layer_image(layout, "v1", [_LAYER])
        with peers.docker_registry(root) as registry:
            peers.push(layout, "v1", registry.host, "team/web")
        yield root


@pytest.fixture
def registry(storage: Path) -> Iterator[peers.Registry]:
    with peers.docker_registry(storage) as registry:
        yield registry


@pytest.fixture
def work() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mount-") as name:
        yield Path(name)


def status(mountpoint: Path, work: Path) -> dict[str, Any]:
    said = fsmount("status", mountpoint, "--json", cache=work / "cache").stdout
    found = json.loads(said)
    assert isinstance(found, dict)
    return found


def metrics(mountpoint: Path, work: Path) -> Mapping[str, Mapping[str, float]]:
    said = fsmount("status", mountpoint, "--format", "metrics", cache=work / "cache").stdout.decode()
    return parse(said, str(mounts.resolve(mountpoint)))


def socket_of(mountpoint: Path) -> Path:
    return _RUN / socket_name(mounts.resolve(mountpoint))


def test_a_lazy_read_shows_what_was_fetched_and_what_was_spared(registry: peers.Registry, work: Path) -> None:
    with CountingProxy(registry.host) as proxy:
        config = f'[apps.web]\nrepository = "{proxy.host}/team/web"\n'
        config += f'[registries."{proxy.host}"]\nplain_http = true\n'
        with mounted(work, config=config) as mountpoint:
            path = socket_of(mountpoint)
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            assert stat.S_IMODE(_RUN.stat().st_mode) in (0o700, 0o750)
            assert status(mountpoint, work)["layers"] == []

            assert (mountpoint / "web/v1/file3").read_bytes() == _FILES["file3"]
            found = status(mountpoint, work)
            assert (found["version"], found["pid"]) == (1, daemon(mountpoint))
            assert found["mountpoint"] == str(mounts.resolve(mountpoint))
            assert found["cache"]["path"] == str(work / "cache")
            assert found["cache"]["stored"] > 2 * _MIB
            (app,) = found["apps"]
            assert app == {
                "name": "web",
                "source": f"{proxy.host}/team/web",
                "failures": 0,
                "trouble": None,
            }
            (layer,) = found["layers"]
            assert (layer["digest"], layer["size"]) == (_DIGEST, _SIZE)
            assert (layer["read_as"], layer["trust"], layer["reason"]) == ("ranged tar", "hint", None)
            assert 2 * _MIB <= layer["fetched"] < _SIZE / 2
            # The headers of the tar were read beside that.
            assert layer["fetched"] <= sum(one.sent for one in proxy.passed(f"/blobs/{_DIGEST}"))
            assert layer["spared"] == _SIZE - layer["fetched"]
            assert 0 < layer["cached_chunks"] < layer["chunks"]

            counted = metrics(mountpoint, work)
            assert counted["fsmount_layer_fetched_bytes_total"] == {"": layer["fetched"]}
            assert counted["fsmount_layer_spared_bytes"] == {"": layer["spared"]}
            assert counted["fsmount_layers"] == {'read_as="ranged tar",trust="hint"': 1}
            assert counted["fsmount_layers_not_lazy_total"] == {}
            assert counted["fsmount_source_up"] == {'app="web"': 1}

            table = fsmount("status", mountpoint, cache=work / "cache").stdout.decode()
            assert f"process {daemon(mountpoint)}" in table
            assert "hint, read as ranged tar" in table and _DIGEST[:19] in table
    assert not path.exists()


def test_while_a_read_waits_for_the_registry_the_mount_says_so(registry: peers.Registry, work: Path) -> None:
    with CountingProxy(registry.host) as proxy:
        proxy.faults.append(Fault("stall", 9 * _MIB, path=_DIGEST))
        config = f'[defaults]\nindexes = "off"\n[apps.web]\nrepository = "{proxy.host}/team/web"\n'
        config += f'[registries."{proxy.host}"]\nplain_http = true\n'
        with mounted(work, config=config) as mountpoint:
            assert (mountpoint / "web/v1/file0").read_bytes() == _FILES["file0"]
            assert proxy.wait_stalled()
            (layer,) = status(mountpoint, work)["layers"]
            assert layer["is_fetching"] and 4 * _MIB <= layer["fetched"] <= 9 * _MIB
            assert ", fetching" in fsmount("status", mountpoint, cache=work / "cache").stdout.decode()
            proxy.release()
            assert (mountpoint / "web/v1/file7").read_bytes() == _FILES["file7"]
            (layer,) = status(mountpoint, work)["layers"]
            assert (layer["read_as"], layer["reason"]) == ("streamed", "indexes are off")
            assert layer["whole_because"] is None


def test_a_registry_that_is_away_is_told_until_it_is_back(registry: peers.Registry, work: Path) -> None:
    config = f'[apps.web]\nrepository = "{registry.host}/team/web"\nrefresh = "100ms"\n'
    with mounted(work, config=config) as mountpoint:
        assert os.listdir(mountpoint / "web") == ["v1"]
        registry.stop()
        assert wait_until(lambda: os.listdir(mountpoint / "web") and _trouble(mountpoint, work))
        trouble = _trouble(mountpoint, work)
        assert trouble is not None and not trouble["is_over"]
        assert registry.host in trouble["message"] and "cannot be reached" in trouble["message"]
        assert metrics(mountpoint, work)["fsmount_source_up"] == {'app="web"': 0}
        table = fsmount("status", mountpoint, cache=work / "cache").stdout.decode()
        assert table.startswith(f"{mounts.resolve(mountpoint)}: degraded, registry unreachable since ")
        assert "cannot be reached" in table
        assert metrics(mountpoint, work)["fsmount_state"]['state="degraded"'] == 1
        registry.start()

        def is_over() -> bool:
            os.listdir(mountpoint / "web")
            found = _trouble(mountpoint, work)
            return found is not None and bool(found["is_over"])

        assert wait_until(is_over)
        assert metrics(mountpoint, work)["fsmount_source_up"] == {'app="web"': 1}
        assert status(mountpoint, work)["summary"] == "serving 1 app"


def _trouble(mountpoint: Path, work: Path) -> dict[str, Any] | None:
    (app,) = status(mountpoint, work)["apps"]
    found = app["trouble"]
    assert found is None or isinstance(found, dict)
    return found


def test_two_mounts_answer_each_for_itself(registry: peers.Registry, work: Path) -> None:
    (work / "other").mkdir()
    app = f"web={registry.host}/team/web"
    with mounted(work, app) as one:
        with mounted(work / "other", app, "more=oci-layout:/nowhere") as two:
            assert len(status(one, work)["apps"]) == 1
            assert len(status(two, work)["apps"]) == 2
        fsmount("status", two, cache=work / "cache", code=3)
        assert status(one, work)["pid"] == daemon(one)


def test_the_mount_of_the_configuration_is_asked_unless_another_is_named(work: Path) -> None:
    with mounted(work, config=f'mountpoint = "{work / "mnt"}"\n') as mountpoint:
        options = ["--config", work / "config.toml"]
        assert str(mountpoint) in fsmount("status", *options, cache=work / "cache").stdout.decode()
        for form in (["--json"], ["--format", "json"]):
            said = fsmount("status", *options, *form, cache=work / "cache").stdout
            assert json.loads(said)["mountpoint"] == str(mountpoint)
        failed = fsmount("status", *options, "--format", "xml", cache=work / "cache", code=2)
        assert b"'table', 'json', 'metrics'" in failed.stderr


def test_where_nothing_of_ours_is_mounted_the_exit_code_is_3(work: Path) -> None:
    for place in (work, Path("/proc")):
        failed = fsmount("status", place, cache=work / "cache", code=3)
        assert failed.stdout == b""
        assert failed.stderr.startswith(b"fsmount: error: ") and b"mounted at" in failed.stderr


def test_a_killed_mount_is_not_running_and_the_next_one_answers(work: Path) -> None:
    with mounted(work) as mountpoint:
        pid = daemon(mountpoint)
        kill(mountpoint)
        path = socket_of(mountpoint)
        assert wait_until(lambda: _refuses(path))
        failed = fsmount("status", mountpoint, cache=work / "cache", code=3)
        assert b"nobody answers" in failed.stderr
        fsmount("mount", mountpoint, cache=work / "cache")
        assert status(mountpoint, work)["pid"] == daemon(mountpoint) != pid
    assert not path.exists()


def _refuses(path: Path) -> bool:
    """Whether a socket is there to which nobody listens: the files of a killed process are closed a little later."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False


def test_no_client_holds_up_or_ends_the_mount(registry: peers.Registry, work: Path) -> None:
    with mounted(work, f"web={registry.host}/team/web") as mountpoint:
        path = socket_of(mountpoint)
        clients = [socket.socket(socket.AF_UNIX) for _ in range(30)]
        for number, client in enumerate(clients):
            client.connect(str(path))
            client.send(b"\0" * number)
        assert (mountpoint / "web/v1/file5").read_bytes() == _FILES["file5"]
        for client in clients:
            client.close()
        assert len(status(mountpoint, work)["layers"]) == 1
