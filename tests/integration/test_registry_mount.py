"""`fsmount mount` over a real registry: what it asks for, and what it does when answers are late, wrong or missing."""

import base64
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from fsmount.fuse import mounts
from tests import peers
from tests.contract.conftest import PASSWORD, USER
from tests.contract.conftest import _token_server as token_server
from tests.fakes.front import CountingProxy, Fault
from tests.fakes.tar import Member, archive
from tests.integration.program import daemon, daemons, mounted, wait_until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.mount,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"
    ),
]

_MIB = 1 << 20
#: Of the large layer: enough of it comes before this place that two chunks of 4 MiB can be read.
_STALLED_AT = 19 * _MIB // 2
_MANY = 120

_EARLY, _MIDDLE, _LATE = (
    Random(5).randbytes(100_000),
    Random(6).randbytes(10 * _MIB),
    Random(7).randbytes(_MIB),
)
_LARGE = peers.pack(
    archive(
        Member(b"early", _EARLY),
        Member(b"middle", _MIDDLE),
        Member(b"late", _LATE),
        *(Member(b"many/%03d" % number, b"%d" % number) for number in range(_MANY)),
    ),
    "tar",
)
_BLOB = peers.digest_of(_LARGE.read())
_SIZE = len(_LARGE.read())


def _small(text: str) -> peers.LayerBlob:
    return peers.pack(archive(Member(b"text", text.encode())))


_FOUR = [_small(f"one of {number}") for number in range(4)]


@pytest.fixture(scope="module")
def storage() -> Iterator[Path]:
    """The storage of a registry: team/web with two tags that share the large layer, and others."""
    if why := peers.have("docker-registry"):
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="storage-") as name:
        layout, root = Path(name, "layout"), Path(name, "root")
        for tag in ("v1", "v2"):
            peers.tar_layer_image(layout, tag, [_LARGE, _small(tag)])
        peers.tar_layer_image(layout, "small", [_small("small")])
        peers.tar_layer_image(layout, "four", _FOUR)
        with peers.docker_registry(root) as registry:
            for tag in ("v1", "v2"):
                peers.push(layout, tag, registry.host, "team/web")
            peers.push(layout, "small", registry.host, "team/web", as_tag="v3")
            peers.push(layout, "small", registry.host, "team/other", as_tag="v1")
            peers.push(layout, "four", registry.host, "team/four", as_tag="v1")
        yield root


@pytest.fixture
def work() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mount-") as name:
        yield Path(name)


@dataclass(frozen=True)
class Front:
    """A registry behind a proxy that counts, and how it is configured."""

    registry: peers.Registry
    proxy: CountingProxy

    @property
    def plain_http(self) -> str:
        # By indexes, the large layer would be read in parts: it is a plain tar.
        return f'[defaults]\nindexes = "off"\n[registries."{self.proxy.host}"]\nplain_http = true\n'

    def app(self, name: str, repository: str) -> str:
        return f"{name}={self.proxy.host}/{repository}"

    def blobs(self, digest: str = "") -> list[tuple[str, int]]:
        """The range and the bytes of each answer with a blob."""
        return [
            (one.range_, one.sent) for one in self.proxy.passed(f"/blobs/{digest}") if one.method == "GET"
        ]


@pytest.fixture
def front(storage: Path) -> Iterator[Front]:
    with peers.docker_registry(storage) as registry, CountingProxy(registry.host) as proxy:
        yield Front(registry, proxy)


@contextmanager
def refused(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


def answers(look: Callable[[], object]) -> Callable[[], bool]:
    """Whether it does, now; for `wait_until`."""

    def answered() -> bool:
        try:
            look()
        except OSError:
            return False
        return True

    return answered


@contextmanager
def reader(*files: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that prints files; it can be left alone while it waits."""
    with subprocess.Popen(["cat", *files], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


# -------------------- what is asked for


def test_everything_is_fetched_once_however_many_want_it_and_for_whichever_tag_and_app(
    front: Front, work: Path
) -> None:
    apps = [front.app("web", "team/web"), front.app("again", "team/web")]
    content = {"early": _EARLY, "middle": _MIDDLE, "late": _LATE, "text": b"v1", "many/119": b"119"}
    with mounted(work, *apps, config=front.plain_http) as mountpoint, ThreadPoolExecutor(15) as pool:
        assert front.proxy.passed() == []
        for _ in range(2):
            with os.scandir(mountpoint / "web") as tags:
                assert sorted(tag.name for tag in tags if tag.stat()) == ["v1", "v2", "v3"]
        assert [one.path for one in front.proxy.passed()] == ["/v2/team/web/tags/list"]

        files = [*content] * 3
        read = pool.map(lambda name: (mountpoint / "web/v1" / name).read_bytes(), files)
        assert [data == content[name] for name, data in zip(files, read, strict=True)] == [True] * 15
        assert set(Counter((one.method, one.path) for one in front.proxy.passed()).values()) == {1}
        assert front.blobs(_BLOB) == [("", _SIZE)]

        front.proxy.forget()
        assert (mountpoint / "again/v1/late").read_bytes() == _LATE
        assert (mountpoint / "web/v2/middle").read_bytes() == _MIDDLE
        assert (mountpoint / "web/v2/text").read_text() == "v2"
        assert front.blobs(_BLOB) == []
        assert front.blobs(peers.digest_of(_small("v2").read())) == [("", len(_small("v2").read()))]
        # Beside that layer, the second tag's manifest and configuration.
        assert sum(front.proxy.body_bytes().values()) < 5_000


# -------------------- late


def test_a_stalled_layer_holds_up_neither_others_nor_what_has_gone_by(front: Front, work: Path) -> None:
    front.proxy.faults.append(Fault("stall", _STALLED_AT, path=_BLOB))
    apps = [front.app("web", "team/web"), front.app("other", "team/other")]
    with mounted(work, *apps, config=front.plain_http) as mountpoint:
        v1 = mountpoint / "web/v1"
        with reader(v1 / "middle") as stuck:
            assert front.proxy.wait_stalled()
            assert sorted(os.listdir(mountpoint)) == ["other", "web"]
            assert sorted(os.listdir(mountpoint / "web")) == ["v1", "v2", "v3"]
            assert (v1 / "text").read_text() == "v1"
            assert (v1 / "early").read_bytes() == _EARLY
            assert (v1 / "middle").stat().st_size == len(_MIDDLE)
            with (v1 / "middle").open("rb", buffering=0) as file:
                assert os.pread(file.fileno(), 4096, 5 * _MIB) == _MIDDLE[5 * _MIB :][:4096]
            assert (mountpoint / "web/v2/early").samefile(v1 / "early")
            assert (mountpoint / "web/v3/text").read_text() == "small"
            assert (mountpoint / "other/v1/text").read_text() == "small"
            assert os.statvfs(v1 / "middle").f_namemax == 255
            assert stuck.poll() is None
            assert len(front.blobs(_BLOB)) == 1
            front.proxy.release()
            assert stuck.communicate(timeout=20) == (_MIDDLE, b"")


def test_who_waits_for_a_name_holds_up_no_other_name_of_its_directory(front: Front, work: Path) -> None:
    front.proxy.faults.append(Fault("stall", _STALLED_AT, path=_BLOB))
    with mounted(work, front.app("web", "team/web"), config=front.plain_http) as mountpoint:
        v1 = mountpoint / "web/v1"
        with reader(v1 / "late") as late:
            assert front.proxy.wait_stalled()
            with reader(v1 / "early", v1 / "text") as other:
                try:
                    assert other.communicate(timeout=5) == (_EARLY + b"v1", b"")
                    assert late.poll() is None
                finally:
                    front.proxy.release()
            assert late.communicate(timeout=20) == (_LATE, b"")


# Reads each file in a thread of its own, and prints what they hold.
_READERS = """
import concurrent.futures, pathlib, sys
with concurrent.futures.ThreadPoolExecutor(200) as pool:
    print(*pool.map(pathlib.Path.read_text, map(pathlib.Path, sys.argv[1:])))
"""


def test_120_readers_of_a_stalled_layer_hold_up_no_one_else(front: Front, work: Path) -> None:
    apps = [front.app("web", "team/web"), front.app("other", "team/other")]
    with mounted(work, *apps, config=front.plain_http) as mountpoint:
        assert (mountpoint / "web/v1/late").read_bytes() == _LATE
    # What is known by now of names, attributes and places stays; the bytes do not.
    shutil.rmtree(work / "cache/chunks")
    front.proxy.faults.append(Fault("stall", _STALLED_AT, path=_BLOB))
    with mounted(work, *apps, config=front.plain_http) as mountpoint, _waiting(mountpoint, work) as waiting:
        files = [mountpoint / "web/v1/many" / f"{number:03}" for number in range(_MANY)]
        readers = subprocess.Popen([sys.executable, "-c", _READERS, *files], stdout=subprocess.PIPE)
        try:
            assert front.proxy.wait_stalled()
            assert wait_until(lambda: waiting() >= _MANY)
            assert sum(file.stat().st_size for file in files) == 10 + 2 * 90 + 3 * 20
            assert len(os.listdir(files[0].parent)) == _MANY
            assert (mountpoint / "web/v2/middle").stat().st_size == len(_MIDDLE)
            assert (mountpoint / "web/v1/early").read_bytes() == _EARLY
            assert (mountpoint / "other/v1/text").read_text() == "small"
            assert waiting() >= _MANY
        finally:
            front.proxy.release()
            said, _ = readers.communicate(timeout=30)
        assert said.split() == [b"%d" % number for number in range(_MANY)]


@contextmanager
def _waiting(mountpoint: Path, work: Path) -> Iterator[Callable[[], int]]:
    """How many requests of a mount have no answer yet, as the kernel counts."""
    mount = mounts.find(mountpoint)
    assert mount is not None
    control = work / "control"
    control.mkdir()
    peers.run("mount", "-t", "fusectl", "none", control)
    try:
        yield lambda: int((control / mount.device.partition(":")[2] / "waiting").read_text())
    finally:
        peers.run("umount", control)


def test_an_image_whose_layers_all_stall_holds_up_no_other_registry_s(front: Front, work: Path) -> None:
    for layer in _FOUR:
        front.proxy.faults.append(Fault("stall", 0, path=peers.digest_of(layer.read())))
    apps = [front.app("four", "team/four"), f"other={front.registry.host}/team/other"]
    with (
        mounted(work, *apps, config=front.plain_http) as mountpoint,
        subprocess.Popen(["ls", mountpoint / "four/v1"], stdout=subprocess.PIPE) as stuck,
    ):
        for _ in _FOUR:
            assert front.proxy.wait_stalled()
        with reader(mountpoint / "other/v1/text") as other:
            try:
                assert other.communicate(timeout=5) == (b"small", b"")
                assert stuck.poll() is None
            finally:
                front.proxy.release()
        assert stuck.communicate(timeout=20)[0] == b"text\n"


def test_sigterm_takes_the_mount_down_while_readers_wait(front: Front, work: Path) -> None:
    front.proxy.faults.append(Fault("stall", _STALLED_AT, path=_BLOB))
    with (
        mounted(work, front.app("web", "team/web"), config=front.plain_http) as mountpoint,
        reader(mountpoint / "web/v1/late") as late,
    ):
        assert front.proxy.wait_stalled()
        os.kill(daemon(mountpoint), signal.SIGTERM)
        assert wait_until(lambda: not daemons(mountpoint))
        assert mounts.find(mountpoint) is None
        assert late.wait(20) != 0
    assert not list((work / "cache/layers").glob(".partial-*"))


# -------------------- missing


def test_a_registry_that_is_down_at_the_start_is_used_once_it_is_up(storage: Path, work: Path) -> None:
    with peers.docker_registry(storage) as registry:
        registry.stop()
        with mounted(work, f"web={registry.host}/team/web") as mountpoint:
            assert os.listdir(mountpoint) == ["web"]
            for look in (os.listdir, os.stat):
                with refused(errno.EHOSTUNREACH):
                    look(mountpoint / "web" if look is os.listdir else mountpoint / "web/v3")
            registry.start()
            assert wait_until(answers(lambda: os.listdir(mountpoint / "web")))
            assert (mountpoint / "web/v3/text").read_text() == "small"


def test_what_is_known_and_cached_is_served_without_the_registry_also_by_a_new_process(
    storage: Path, work: Path
) -> None:
    log = work / "cache/log/mount.log"
    with peers.docker_registry(storage) as registry:
        app = f'[apps.web]\nrepository = "{registry.host}/team/web"\nrefresh = "200ms"\n'
        with mounted(work, config=app) as mountpoint:
            tags = sorted(os.listdir(mountpoint / "web"))
            whole = _whole(mountpoint / "web/v1")
            registry.stop()

            def noticed(web: Path = mountpoint / "web") -> bool:
                """Whether it has tried to look after what it knows, which is there all the time."""
                assert (web / "v1").is_dir()
                assert sorted(os.listdir(web)) == tags
                said = log.read_text()
                return f"what is known of {registry.host}/team/web is of before" in said

            assert wait_until(noticed)
            assert peers.differences(_whole(mountpoint / "web/v1"), whole) == []
        with mounted(work, config=app) as mountpoint:
            assert sorted(os.listdir(mountpoint / "web")) == tags
            assert peers.differences(_whole(mountpoint / "web/v1"), whole) == []
            with refused(errno.EHOSTUNREACH):
                os.listdir(mountpoint / "web/v2")  # nobody has looked into it yet


def _whole(tag: Path) -> dict[bytes, peers.Node]:
    """All of a tree; its root shows its own attributes only after somebody has looked inside."""
    assert sorted(os.listdir(tag)) == ["early", "late", "many", "middle", "text"]
    return peers.tree_listing(tag)


def test_credentials_are_those_of_docker_login_and_looked_for_again_after_a_refusal(
    storage: Path, work: Path
) -> None:
    with (
        peers.docker_registry(storage, htpasswd={USER: PASSWORD}) as basic,
        token_server(work) as server,
        peers.docker_registry(storage, token=server) as token,
        mounted(work, f"basic={basic.host}/team/web", f"token={token.host}/team/web") as mountpoint,
    ):
        with refused(errno.EACCES):
            os.listdir(mountpoint / "basic")
        _log_in(work, token.host, "wrong")
        with refused(errno.EACCES):
            (mountpoint / "token/v3").stat()
        _log_in(work, token.host, PASSWORD)
        _log_in(work, basic.host, PASSWORD)
        # A refusal is believed for some seconds: whoever asks a thousand times may be locked out.
        assert wait_until(answers(lambda: os.listdir(mountpoint / "basic")))
        assert wait_until(answers(lambda: (mountpoint / "token/v3").stat()))
        assert (mountpoint / "basic/v3/text").read_text() == "small"
        assert (mountpoint / "token/v3/text").read_text() == "small"


def _log_in(home: Path, host: str, password: str) -> None:
    """What `docker login` writes."""
    path = home / ".docker/config.json"
    path.parent.mkdir(exist_ok=True)
    auths = json.loads(path.read_text())["auths"] if path.exists() else {}
    auths[host] = {"auth": base64.b64encode(f"{USER}:{password}".encode()).decode()}
    path.with_suffix(".new").write_text(json.dumps({"auths": auths}))
    path.with_suffix(".new").replace(path)


_REFUSALS = {
    401: errno.EACCES,
    403: errno.EACCES,
    429: errno.EAGAIN,
    500: errno.EHOSTUNREACH,
    503: errno.EHOSTUNREACH,
}


def test_the_registry_s_answers_reach_programs_as_errnos(front: Front, work: Path) -> None:
    for status in _REFUSALS:
        front.proxy.faults.append(Fault("refuse", status, path=f"team/r{status}/"))
    apps = [front.app(f"r{status}", f"team/r{status}") for status in _REFUSALS]

    def code(folder: Path) -> int | None:
        with pytest.raises(OSError) as caught:
            os.listdir(folder)
        return caught.value.errno

    with (
        mounted(work, *apps, front.app("web", "team/web"), config=front.plain_http) as mountpoint,
        ThreadPoolExecutor(len(apps)) as pool,  # each that may be cured is asked three times
    ):
        codes = pool.map(code, [mountpoint / f"r{status}" for status in _REFUSALS])
        assert dict(zip(_REFUSALS, codes, strict=True)) == _REFUSALS
        assert (mountpoint / "web/v3/text").read_text() == "small"


def test_a_repository_that_is_not_there_is_no_empty_folder(front: Front, work: Path) -> None:
    with mounted(work, front.app("typo", "team/webb"), config=front.plain_http) as mountpoint:
        with refused(errno.ENOENT):
            (mountpoint / "typo/v1").stat()
        # readdir(3) takes ENOENT for the end of a listing: it has to be another code.
        with pytest.raises(OSError):
            os.listdir(mountpoint / "typo")


def test_a_registry_that_answers_nobody_holds_up_no_other(storage: Path, work: Path) -> None:
    count = 60
    layout = work / "layout"
    for number in range(count):
        peers.tar_layer_image(layout, f"v{number}", [_small(f"slow {number}")])
    with (
        peers.docker_registry(work / "root") as slow,
        peers.docker_registry(storage) as quick,
        CountingProxy(slow.host) as proxy,
    ):
        for number in range(count):
            peers.push(layout, f"v{number}", slow.host, "team/slow", as_tag=f"v{number}")
        config = f'[registries."{proxy.host}"]\nplain_http = true\n[registries."{quick.host}"]\nplain_http = true\n'
        apps = [f"slow={proxy.host}/team/slow", f"quick={quick.host}/team/web"]
        with mounted(work, *apps, config=config) as mountpoint, ExitStack() as stack:
            # Every way to wait for it: names, manifests, blobs.
            assert len(os.listdir(mountpoint / "slow")) == count
            proxy.faults.append(Fault("stall", 0))
            for number in range(count):
                stack.enter_context(reader(mountpoint / f"slow/v{number}/text"))
            assert proxy.wait_stalled()
            assert (mountpoint / "quick/v1/early").read_bytes() == _EARLY
            assert (mountpoint / "quick/v3/text").read_bytes() == b"small"
            assert sorted(os.listdir(mountpoint / "quick")) == ["v1", "v2", "v3"]
            assert os.statvfs(mountpoint / "slow").f_namemax == 255
            # Nobody of them has got anything, so all that was while they waited.
            proxy.release()


# -------------------- wrong


def test_of_an_altered_layer_readers_get_an_error_and_nothing_is_kept(front: Front, work: Path) -> None:
    front.proxy.faults.append(Fault("flip", 5 * _MIB, path=_BLOB, times=1))
    front.proxy.faults.append(Fault("stall", _STALLED_AT, path=_BLOB, times=1))
    cache, apps = work / "cache", [front.app("web", "team/web"), front.app("other", "team/other")]
    with mounted(work, *apps, config=front.plain_http) as mountpoint:
        v1 = mountpoint / "web/v1"
        with reader(v1 / "late") as one, reader(v1 / "many/000") as other:
            assert front.proxy.wait_stalled()
            with (mountpoint / "web/v2/middle").open("rb", buffering=0) as file:
                assert file.read(4096) == _MIDDLE[:4096]  # so far nobody can know
                inode = os.fstat(file.fileno()).st_ino
                front.proxy.release()
                for process in (one, other):
                    said, complaint = process.communicate(timeout=30)
                    assert (said, process.returncode) == (b"", 1)
                    assert b"Bad message" in complaint
                with refused(errno.EBADMSG):
                    os.pread(file.fileno(), 4096, 7 * _MIB)
        for name in ("early", "middle", "late"):
            with refused(errno.EBADMSG):
                (v1 / name).read_bytes()
        with refused(errno.EBADMSG):
            os.listdir(v1)
        # For a minute nobody asks for it again.
        assert front.blobs(_BLOB) == [("", _SIZE)]
        assert (mountpoint / "web/v3/text").read_text() == "small"
        assert (mountpoint / "other/v1/text").read_text() == "small"
        assert not list((cache / "layers").glob(f"*{_BLOB.removeprefix('sha256:')}*"))
        assert sum(path.stat().st_size for path in (cache / "chunks").rglob("*.val")) < _MIB
    assert "have another digest" in (cache / "log/mount.log").read_text()
    with mounted(work, *apps, config=front.plain_http) as mountpoint:
        for name, content in [("early", _EARLY), ("middle", _MIDDLE), ("late", _LATE)]:
            assert (mountpoint / "web/v1" / name).read_bytes() == content
        assert front.blobs(_BLOB) == [("", _SIZE)] * 2
        # What the kernel knows of the old number is of no use to it any more.
        assert (mountpoint / "web/v1/middle").stat().st_ino != inode


def test_a_download_that_breaks_off_goes_on_where_it_was(front: Front, work: Path) -> None:
    cut = 5 * _MIB + 12_345
    front.proxy.faults.append(Fault("cut", cut, path=_BLOB, times=1))
    with mounted(work, front.app("web", "team/web"), config=front.plain_http) as mountpoint:
        with reader(mountpoint / "web/v1/middle", mountpoint / "web/v1/late") as process:
            said, complaint = process.communicate(timeout=30)
        assert complaint == b""
        assert said == _MIDDLE + _LATE
        assert front.blobs(_BLOB) == [("", cut), (f"bytes={cut}-{_SIZE - 1}", _SIZE - cut)]
