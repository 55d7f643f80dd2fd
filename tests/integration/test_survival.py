"""A mount outlives the processes that serve it: readers, open files, working directories and programs go on."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import pytest

from fsmount import notify
from fsmount.errors import Refused
from fsmount.fuse import mounts
from tests import peers
from tests.fakes.front import CountingProxy, Fault
from tests.fakes.tar import DIRECTORY, Member, archive
from tests.integration.program import (
    command,
    daemon,
    daemons,
    environment,
    fsmount,
    holder,
    mounted,
    take_down,
    wait_until,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.mount,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"
    ),
]

_MIB = 1 << 20
_FILES = {f"file{number}": Random(number).randbytes(number * 100_000 + 1) for number in range(20)}
_PROGRAM = Path("/bin/sleep").resolve()


def _layer() -> peers.LayerBlob:
    return peers.pack(
        archive(
            Member(b"folder/", type=DIRECTORY, mode=0o755),
            *(Member(b"folder/" + name.encode(), data) for name, data in _FILES.items()),
            Member(b"sleep", _PROGRAM.read_bytes(), mode=0o755),
        )
    )


@pytest.fixture
def work() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mount-") as name:
        yield Path(name)


@pytest.fixture
def app(work: Path) -> str:
    peers.tar_layer_image(work / "layout", "v1", [_layer()])
    return f"app=oci-layout:{work / 'layout'}"


def kill(mountpoint: Path) -> None:
    """Kills the process that serves, and returns when another does."""
    killed = daemon(mountpoint)
    os.kill(killed, signal.SIGKILL)
    assert wait_until(lambda: _serves(mountpoint, killed))


def _serves(mountpoint: Path, other_than: int) -> bool:
    with suppress(ValueError):  # there is none for a moment
        return daemon(mountpoint) != other_than and mounts.probe(_mount(mountpoint)) is mounts.Health.LIVING
    return False


def _is_followed(mountpoint: Path, killed: int) -> bool:
    with suppress(ValueError):  # there is none for a moment
        return daemon(mountpoint) != killed
    return False


def _mount(mountpoint: Path) -> mounts.Mount:
    mount = mounts.find(mountpoint)
    assert mount is not None
    return mount


@contextmanager
def many_readers(folder: Path, count: int) -> Iterator[Callable[[], int]]:
    """Threads of another process that read all files of a folder, again and again, and compare.

    Yields what says how often they have; it is a failure if any of them met an error or a wrong byte.
    """
    known = {name: hashlib.sha256(data).hexdigest() for name, data in _FILES.items()}
    script = folder.parents[3] / "readers.py"
    script.write_text(
        "import hashlib, os, sys, threading\n"
        f"known = {known!r}\n"
        "def read():\n"
        "    while True:\n"
        "        for name in os.listdir(sys.argv[1]):\n"
        "            with open(f'{sys.argv[1]}/{name}', 'rb') as file:\n"
        # Not from the kernel's cache alone.
        "                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)\n"
        "                data = file.read()\n"
        "            if hashlib.sha256(data).hexdigest() != known[name]:\n"
        "                raise ValueError(f'{name} is wrong')\n"
        "        os.write(1, b'.')\n"
        "def guard():\n"
        "    try:\n"
        "        read()\n"
        "    except BaseException as error:\n"
        "        os.write(2, repr(error).encode())\n"
        "        os._exit(1)\n"
        "for _ in range(int(sys.argv[2])):\n"
        "    threading.Thread(target=guard).start()\n"
    )
    with subprocess.Popen(
        [sys.executable, script, folder, str(count)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        rounds = 0

        def read_rounds() -> None:
            nonlocal rounds
            assert process.stdout is not None
            while dots := os.read(process.stdout.fileno(), 4096):
                rounds += len(dots)

        reading = threading.Thread(target=read_rounds)
        reading.start()
        try:
            yield lambda: rounds
            assert process.poll() is None
        finally:
            process.kill()
            reading.join()
            assert process.stderr is not None
            assert process.stderr.read() == b""


@pytest.mark.timeout(180)
def test_readers_notice_nothing_when_the_process_that_serves_them_is_killed(work: Path, app: str) -> None:
    with mounted(work, app) as mountpoint:
        folder = mountpoint / "app/v1/folder"
        with many_readers(folder, 32) as rounds:
            for _ in range(4):
                before = rounds()
                kill(mountpoint)
                assert wait_until(lambda before=before: rounds() > before + 32)


def test_open_files_working_directories_and_programs_go_on(work: Path, app: str) -> None:
    with mounted(work, app) as mountpoint:
        root = mountpoint / "app/v1"
        with subprocess.Popen([root / "sleep", "1000"], cwd=root / "folder") as program:
            with (root / "folder/file19").open("rb", buffering=0) as file:
                assert file.read(10) == _FILES["file19"][:10]
                inode = os.fstat(file.fileno()).st_ino
                for _ in range(2):
                    kill(mountpoint)
                    time.sleep(1.2)  # the kernel asks again about what may change
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    assert os.pread(file.fileno(), 1000, 900_000) == _FILES["file19"][900_000:901_000]
                    assert os.stat(root / "folder/file19").st_ino == inode
                    assert sorted(os.listdir(f"/proc/{program.pid}/cwd/")) == sorted(_FILES)
                    assert program.poll() is None
            program.kill()


def test_a_mount_that_nobody_has_looked_at_for_a_while_survives_as_well(work: Path, app: str) -> None:
    with mounted(work, app) as mountpoint:
        assert os.listdir(mountpoint) == ["app"]
        time.sleep(2.5)
        kill(mountpoint)
        assert os.listdir(mountpoint / "app") == ["v1"]


def test_what_was_read_of_a_layer_that_streams_is_answered_by_the_next_process(work: Path) -> None:
    if why := peers.have("docker-registry"):
        pytest.skip(why)
    early, late = Random(1).randbytes(100_000), Random(2).randbytes(20 * _MIB)
    layer = peers.pack(archive(Member(b"early", early), Member(b"late", late)), "gzip", level=1)
    peers.tar_layer_image(work / "layout", "v1", [layer])
    with peers.docker_registry(work / "root") as registry:
        peers.push(work / "layout", "v1", registry.host, "team/web")
        with CountingProxy(registry.host) as proxy:
            blob = peers.digest_of(layer.read())
            proxy.faults.append(Fault("stall", 10 * _MIB, path=blob, times=1))
            config = f'[registries."{proxy.host}"]\nplain_http = true\n'
            with mounted(work, f"web={proxy.host}/team/web", config=config) as mountpoint:
                reading = subprocess.Popen(["cat", mountpoint / "web/v1/late"], stdout=subprocess.PIPE)
                assert proxy.wait_stalled()
                assert (mountpoint / "web/v1/early").read_bytes() == early
                kill(mountpoint)
                proxy.release()
                said, _ = reading.communicate(timeout=60)
                assert (reading.returncode, said == late) == (0, True)
                assert (mountpoint / "web/v1/early").read_bytes() == early


def test_an_upgrade_replaces_both_processes_programs_and_readers_notice_nothing(work: Path, app: str) -> None:
    with mounted(work, app) as mountpoint:
        keeper, worker = holder(mountpoint), daemon(mountpoint)
        with many_readers(mountpoint / "app/v1/folder", 8) as rounds:
            done = fsmount("upgrade", mountpoint, cache=work / "cache")
            before = rounds()
            assert wait_until(lambda: rounds() > before + 8)
        assert f"process {daemon(mountpoint)}; before it was".encode() in done.stdout
        assert daemon(mountpoint) != worker
        assert holder(mountpoint) == keeper
        # The holder holds on as before.
        kill(mountpoint)
        assert os.listdir(mountpoint / "app") == ["v1"]
        said = fsmount("status", mountpoint, "--json", cache=work / "cache").stdout
        process = json.loads(said)["process"]
        assert (process["pid"], process["holder"], process["starts"]) == (daemon(mountpoint), keeper, 3)
        assert process["last_death"].startswith("killed by SIGKILL, at 2")


def test_an_upgrade_waits_for_the_process_that_follows_one_that_has_just_died(work: Path, app: str) -> None:
    with mounted(work, app) as mountpoint:
        os.kill(daemon(mountpoint), signal.SIGKILL)
        fsmount("upgrade", mountpoint, cache=work / "cache")
        assert os.listdir(mountpoint / "app") == ["v1"]


def test_a_mount_whose_holder_was_killed_is_served_on_and_an_upgrade_says_how_to_begin_anew(
    work: Path, app: str
) -> None:
    with mounted(work, app) as mountpoint:
        keeper, worker = holder(mountpoint), daemon(mountpoint)
        os.kill(keeper, signal.SIGKILL)
        assert wait_until(lambda: daemons(mountpoint) == [worker])
        said = fsmount("upgrade", mountpoint, cache=work / "cache", code=Refused.exit_code).stderr
        assert f"process {keeper}, which kept the mount at {mountpoint}, is gone".encode() in said
        assert os.listdir(mountpoint / "app") == ["v1"]
        fsmount("unmount", "--lazy", mountpoint, cache=work / "cache")
        fsmount("mount", mountpoint, "--app", app, cache=work / "cache")
        assert os.listdir(mountpoint / "app") == ["v1"]
        fsmount("upgrade", mountpoint, cache=work / "cache")


def test_what_was_unmounted_while_nobody_served_it_stays_unmounted(work: Path, app: str) -> None:
    with mounted(work, app) as mountpoint:
        os.kill(daemon(mountpoint), signal.SIGKILL)
        fsmount("unmount", mountpoint, cache=work / "cache")
        assert wait_until(lambda: not daemons(mountpoint))
        assert mounts.find(mountpoint) is None


def test_who_has_a_file_open_of_a_mount_that_was_taken_away_lazily_reads_on(work: Path, app: str) -> None:
    with mounted(work, app) as mountpoint:
        with (mountpoint / "app/v1/folder/file19").open("rb", buffering=0) as file:
            fsmount("unmount", "--lazy", mountpoint, cache=work / "cache")
            before = daemon(mountpoint)
            os.kill(before, signal.SIGKILL)
            assert wait_until(lambda: _is_followed(mountpoint, before))
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), 1000, 900_000) == _FILES["file19"][900_000:901_000]
            assert mounts.find(mountpoint) is None
        assert wait_until(lambda: not daemons(mountpoint))


def test_a_link_on_the_way_to_the_mount_point_may_be_switched(work: Path, app: str) -> None:
    for name in ("one", "two"):
        (work / name / "mnt").mkdir(parents=True)
    link = work / "link"
    link.symlink_to("one")
    mountpoint = work / "one/mnt"
    try:
        fsmount("mount", link / "mnt", "--app", app, cache=work / "cache")
        with (mountpoint / "app/v1/folder/file19").open("rb", buffering=0) as file:
            link.unlink()
            link.symlink_to("two")
            kill(mountpoint)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), 10, 0) == _FILES["file19"][:10]
    finally:
        take_down(mountpoint)


def test_no_process_takes_packages_from_the_folder_where_the_command_was_given(work: Path, app: str) -> None:
    poisoned = work / "poisoned"
    poisoned.mkdir()
    for name in ("trio", "h11", "httpx", "pydantic"):
        (poisoned / f"{name}.py").write_text(f"open({str(work / 'bitten')!r}, 'w')\nraise SystemExit(9)\n")
    mountpoint = work / "mnt"
    mountpoint.mkdir()
    script = Path(sys.executable).with_name("fsmount")
    try:
        subprocess.run(
            [script, "mount", mountpoint, "--app", app],
            env=environment(work / "cache"),
            cwd=poisoned,
            check=True,
        )
        kill(mountpoint)
        assert os.readlink(f"/proc/{holder(mountpoint)}/cwd") == "/"
        assert not (work / "bitten").exists()
    finally:
        take_down(mountpoint)


def test_a_mount_in_the_background_is_no_service_of_whoever_gave_the_command(work: Path, app: str) -> None:
    mountpoint = work / "mnt"
    mountpoint.mkdir()
    with notify.listen() as agent:
        environ = {**environment(work / "cache"), "NOTIFY_SOCKET": notify.address_of(agent)}
        try:
            subprocess.run(command("mount", mountpoint, "--app", app), env=environ, check=True)
            kill(mountpoint)
            assert os.listdir(mountpoint / "app") == ["v1"]
            assert notify.receive(agent) is None
        finally:
            take_down(mountpoint)
            notify.remove(agent)


def test_being_told_to_reload_before_it_serves_kills_no_process(work: Path, app: str) -> None:
    with mounted(work, app) as mountpoint:
        before = daemon(mountpoint)
        os.kill(before, signal.SIGKILL)
        assert wait_until(lambda: _is_followed(mountpoint, before))
        following = daemon(mountpoint)
        os.kill(holder(mountpoint), signal.SIGHUP)
        assert os.listdir(mountpoint / "app") == ["v1"]
        assert daemon(mountpoint) == following


def test_the_next_process_goes_by_the_configuration_of_before_when_the_present_one_is_not_good(
    work: Path, app: str
) -> None:
    config = f'[apps.other]\nrepository = "{app.removeprefix("app=")}"\n'
    with mounted(work, config=config) as mountpoint:
        assert os.listdir(mountpoint) == ["other"]
        (work / "config.toml").write_text("cache = 1\n[apps\n")
        kill(mountpoint)
        assert os.listdir(mountpoint / "other") == ["v1"]
        log = (work / "cache/log/mount.log").read_text()
        assert "the configuration is the one of before, for the present one is not good" in log
        assert "config.toml:2" in log


@pytest.mark.timeout(240)
def test_after_five_deaths_the_cache_alone_is_served_and_after_ten_readers_are_told_at_once(
    work: Path, app: str
) -> None:
    with mounted(work, app) as mountpoint:
        root = mountpoint / "app/v1"
        assert (root / "folder/file3").read_bytes() == _FILES["file3"]
        for _ in range(5):
            kill(mountpoint)
        assert wait_until(lambda: "the cache alone" in (work / "cache/log/mount.log").read_text())
        assert (root / "folder/file3").read_bytes() == _FILES["file3"]
        for _ in range(5):
            kill(mountpoint)
        with pytest.raises(OSError) as caught:
            os.listdir(mountpoint)
        assert caught.value.errno == errno.EIO
        assert os.statvfs(mountpoint).f_namemax == 255
        fsmount("unmount", "--lazy", mountpoint, cache=work / "cache")
        assert wait_until(lambda: not daemons(mountpoint))


def test_in_cache_only_mode_no_registry_is_asked(work: Path) -> None:
    if why := peers.have("docker-registry"):
        pytest.skip(why)
    peers.tar_layer_image(work / "layout", "v1", [_layer()])
    with peers.docker_registry(work / "root") as registry:
        for tag in ("v1", "v2"):
            peers.push(work / "layout", "v1", registry.host, "team/web", as_tag=tag)
        with CountingProxy(registry.host) as proxy:
            config = f'[registries."{proxy.host}"]\nplain_http = true\n[defaults]\nrefresh = "1s"\n'
            with mounted(work, f"web={proxy.host}/team/web", config=config) as mountpoint:
                os.listdir(mountpoint / "web/v1")  # which is known when all of the layer is
                assert (mountpoint / "web/v1/folder/file3").read_bytes() == _FILES["file3"]
                for _ in range(5):
                    kill(mountpoint)
                time.sleep(1.2)
                proxy.forget()
                assert (mountpoint / "web/v1/folder/file3").read_bytes() == _FILES["file3"]
                with pytest.raises(OSError) as caught:
                    (mountpoint / f"web/v2@sha256:{'0' * 64}/folder").stat()
                assert caught.value.errno in (errno.EHOSTUNREACH, errno.ENOENT)
                assert proxy.passed() == []


@pytest.mark.timeout(240)
def test_when_no_process_can_be_started_any_more_readers_are_told_and_an_upgrade_mends_it(
    work: Path, app: str
) -> None:
    # A program that breaks while it runs, as an upgrade of Python's packages that goes wrong.
    program = work / "program"
    shutil.copytree(
        Path(__file__).parents[2] / "fsmount", program / "fsmount", ignore=shutil.ignore_patterns("*.pyc")
    )
    environ = {**environment(work / "cache"), "PYTHONPATH": str(program)}
    mountpoint = work / "mnt"
    mountpoint.mkdir()
    try:
        subprocess.run(command("mount", mountpoint, "--app", app), env=environ, cwd=program, check=True)
        assert (mountpoint / "app/v1/folder/file3").read_bytes() == _FILES["file3"]
        broken = program / "fsmount/engine.py"
        good = broken.read_text()
        broken.write_text("raise SystemError('broken')\n")
        os.kill(daemon(mountpoint), signal.SIGKILL)
        log = work / "cache/log/mount.log"
        assert wait_until(lambda: "everything in it answers EIO" in log.read_text(), seconds=150)
        assert f"kill -USR2 {daemons(mountpoint)[0]}" in log.read_text()
        with pytest.raises(OSError) as caught:
            os.stat(mountpoint / "app/v1/folder/file4")
        assert caught.value.errno == errno.EIO
        broken.write_text(good)
        os.kill(daemons(mountpoint)[0], signal.SIGUSR2)
        assert wait_until(lambda: len(daemons(mountpoint)) == 2)
        assert wait_until(lambda: mounts.probe(_mount(mountpoint)) is mounts.Health.LIVING)
        assert wait_until(lambda: _reads(mountpoint / "app/v1/folder/file4"))
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=False)
        assert wait_until(lambda: not daemons(mountpoint))


def _reads(path: Path) -> bool:
    try:
        return path.read_bytes() == _FILES[path.name]
    except OSError:
        return False
