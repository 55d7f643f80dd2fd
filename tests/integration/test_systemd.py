"""The units on a machine of their own, with real systemd as process 1: boot, restart, stop, crash, watchdog, fstab."""

import errno
import hashlib
import json
import random
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import peers
from tests.fakes.tar import Member, archive
from tests.integration import machine as machines
from tests.integration.machine import Machine
from tests.integration.program import wait_until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.mount,
    pytest.mark.skipif(bool(machines.missing()), reason=machines.missing()),
]

_ROOT = Path("/srv/artifacts/web")
_TAGS = ("v1.4.1", "v1.4.2")
_FILES = {f"share/{number}": random.Random(number).randbytes(3_000_000) for number in range(4)}
_PROGRAM = Path(sys.prefix, "bin/fsmount")
_CHECKOUT = Path(__file__).parents[2]

_SERVER = b"#!/bin/sh\necho started >> /run/web\nexec sleep 1000\n"

#: Reads all files again and again, not from the kernel's cache, until a file appears; says how often, and what failed.
_READER = """
import hashlib, json, os, pathlib, sys
root, work = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
expected = json.loads((work / "expected.json").read_text())
os.chdir(root)
count, failures = 0, []
while not (work / "stop").exists():
    for name, digest in expected.items():
        try:
            with open(name, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    failures.append(f"{name}: wrong bytes")
        except OSError as error:
            failures.append(f"{name}: {error}")
    count += 1
    (work / f"count-{os.getpid()}").write_text(str(count))
print(json.dumps({"count": count, "failures": failures}))
"""


# -------------------- machines


@pytest.fixture(scope="session", autouse=True)
def _can_boot() -> None:
    """Whether systemd runs here at all is not what these tests are about."""
    with tempfile.TemporaryDirectory(prefix="systemd-") as folder:
        try:
            with machines.booted(Path(folder)):
                pass
        except RuntimeError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def storage() -> Iterator[Path]:
    """The storage of a registry: team/web with two builds."""
    if why := peers.have("docker-registry"):
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="storage-") as name:
        layout, root = Path(name, "layout"), Path(name, "root")
        with peers.docker_registry(root) as registry:
            for tag in _TAGS:
                members = [Member(name.encode(), content) for name, content in _FILES.items()]
                programs = [
                    Member(b"bin/server", _SERVER, mode=0o755),
                    Member(b"bin/sleep", Path("/bin/sleep").read_bytes(), mode=0o755),
                    Member(b"tag", tag.encode()),
                ]
                layers = [peers.pack(archive(*members), "gzip"), peers.pack(archive(*programs), "gzip")]
                peers.tar_layer_image(layout, tag, layers)
                peers.push(layout, tag, registry.host, "team/web")
        yield root


@dataclass(frozen=True)
class Site:
    """A registry, and the disk of a machine that outlasts its being switched off."""

    registry: peers.Registry
    work: Path

    @contextmanager
    def booted(self, *, more: str = "true", generators: Sequence[str] = ()) -> Iterator[Machine]:
        """A machine on which fsmount was installed as docs/boot.md says; `more` is done to it before it boots."""
        install = f"""
            mkdir -p /etc/fsmount && cp {self.work}/config.toml /etc/fsmount/config.toml
            {_PROGRAM} install-units
            systemd-sysusers fsmount.conf && systemd-tmpfiles --create fsmount.conf
            systemctl enable fsmount
            {more}
        """
        with machines.booted(self.work, prepare=install, generators=generators) as machine:
            yield machine

    def drop_in(self, text: str, unit: str = "fsmount.service") -> str:
        """A command, for `more`, that changes a unit."""
        (self.work / f"{unit}.conf").write_text(text)
        folder = f"/etc/systemd/system/{unit}.d"
        return f"mkdir -p {folder} && cp {self.work}/{unit}.conf {folder}/test.conf"


@pytest.fixture
def site(storage: Path) -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="site-") as folder, peers.docker_registry(storage) as registry:
        site = Site(registry, Path(folder))
        (site.work / "config.toml").write_text(
            f'[cache]\npath = "{site.work}/cache"\nmin_free = 0\n'
            f'[apps.web]\nrepository = "{registry.host}/team/web"\n'
        )
        expected = {name: hashlib.sha256(content).hexdigest() for name, content in _FILES.items()}
        (site.work / "expected.json").write_text(json.dumps(expected))
        yield site


@pytest.fixture
def machine(site: Site) -> Iterator[Machine]:
    with site.booted() as machine:
        machine.wait_for("fsmount", ActiveState="active")
        yield machine


def _mount_id(machine: Machine) -> str:
    return machine.run("findmnt", "-n", "-o", "ID", "/srv/artifacts").strip()


def _read(machine: Machine, name: str, tag: str = "v1.4.1") -> str:
    """What a file holds, by its digest."""
    return machine.run("sha256sum", _ROOT / tag / name).split()[0]


class Load:
    """Readers at work in a machine, with their working directory in the mount, and a program that runs from it."""

    def __init__(self, machine: Machine, site: Site, processes: ExitStack) -> None:
        root = _ROOT / "v1.4.1"
        self.machine = machine
        self._work = site.work
        self._processes = processes
        self._program = self._start(machine, root / "bin/sleep", "1000")
        self._readers = [
            self._start(machine, sys.executable, "-c", _READER, root, site.work) for _ in range(4)
        ]
        self.goes_on()

    def goes_on(self) -> None:
        """Every reader has read everything at least twice from now on; and nothing has ended."""
        before = self._counts()
        assert wait_until(
            lambda: (
                len(self._counts()) == len(self._readers)
                and all(count >= before.get(name, 0) + 2 for name, count in self._counts().items())
            ),
            seconds=60,
        )
        assert all(process.poll() is None for process in (self._program, *self._readers))

    def end(self) -> None:
        """No reader has seen anything amiss."""
        (self._work / "stop").touch()
        for reader in self._readers:
            said, complaint = reader.communicate(timeout=60)
            assert (reader.returncode, complaint) == (0, "")
            assert json.loads(said)["failures"] == [], self.machine.said()
        assert self._program.poll() is None

    def _start(self, machine: Machine, *words: str | Path) -> "subprocess.Popen[str]":
        process = self._processes.enter_context(machine.start(*words))
        self._processes.callback(process.kill)
        return process

    def _counts(self) -> dict[str, int]:
        texts = {file.name: file.read_text() for file in self._work.glob("count-*")}
        return {name: int(text) for name, text in texts.items() if text}


@pytest.fixture
def load(machine: Machine, site: Site) -> Iterator[Load]:
    with ExitStack() as processes:
        yield Load(machine, site, processes)


# -------------------- boot


def test_a_machine_boots_with_its_registry_down_and_shows_what_it_knows(site: Site) -> None:
    with site.booted() as machine:
        machine.wait_for("fsmount", ActiveState="active")
        for name in _FILES:
            _read(machine, name)
    site.registry.stop()
    with site.booted() as machine:
        machine.wait_for("multi-user.target", ActiveState="active")
        assert machine.show("fsmount", "ActiveState", "NRestarts") == ["active", "0"]
        for name, content in _FILES.items():
            assert _read(machine, name) == hashlib.sha256(content).hexdigest()
        script = f"import os, sys; os.stat({str(_ROOT / 'v9/tag')!r})"
        said = machine.run(sys.executable, "-c", f"try:\n {script}\nexcept OSError as e:\n print(e.errno)")
        assert int(said) == errno.EHOSTUNREACH


def test_the_units_are_no_part_of_a_cycle_and_hold_nothing_that_is_not_understood(machine: Machine) -> None:
    machine.wait_for("multi-user.target", ActiveState="active")
    machine.wait_for("remote-fs.target", ActiveState="active")
    folder = "/etc/systemd/system"
    units = [f"{folder}/fsmount.service", f"{folder}/fsmount-wait@.service", "multi-user.target"]
    assert machine.run("sh", "-c", f"systemd-analyze verify --man=no {' '.join(units)} 2>&1") == ""


def test_the_mount_is_seen_outside_of_the_service(machine: Machine) -> None:
    (pid,) = machine.show("fsmount", "MainPID")
    namespaces = machine.run("readlink", "/proc/1/ns/mnt", f"/proc/{pid}/ns/mnt").split()
    assert namespaces[0] == namespaces[1]
    assert _read(machine, "tag") == hashlib.sha256(b"v1.4.1").hexdigest()


def test_members_of_the_group_may_ask_it_and_others_may_not(machine: Machine) -> None:
    ask = ("setpriv", "--reuid=65534", "--regid=65534")
    machine.run(*ask, "--groups=fsmount", _PROGRAM, "status")
    machine.run(*ask, "--clear-groups", _PROGRAM, "status", code=9)


# -------------------- restart, stop, crash


def test_a_restart_under_load_is_seen_by_no_reader_and_no_program(machine: Machine, load: Load) -> None:
    mount = _mount_id(machine)
    for _ in range(3):
        before = machine.show("fsmount", "MainPID")
        machine.run("systemctl", "restart", "fsmount")
        assert machine.show("fsmount", "MainPID") != before
        load.goes_on()
    load.end()
    assert _mount_id(machine) == mount


def test_a_killed_process_is_followed_by_one_that_goes_on_with_the_mount(
    machine: Machine, load: Load
) -> None:
    mount = _mount_id(machine)
    (pid,) = machine.show("fsmount", "MainPID")
    machine.run("kill", "-KILL", pid)
    machine.wait_for("fsmount", NRestarts="1", ActiveState="active")
    load.goes_on()
    load.end()
    assert _mount_id(machine) == mount


def test_a_process_that_stalls_is_replaced(site: Site) -> None:
    quick = site.drop_in("[Service]\nWatchdogSec=3\nTimeoutAbortSec=1\n")
    with site.booted(more=quick) as machine:
        machine.wait_for("fsmount", ActiveState="active")
        _read(machine, "tag")
        mount, (pid,) = _mount_id(machine), machine.show("fsmount", "MainPID")
        machine.run("kill", "-STOP", pid)
        machine.wait_for("fsmount", NRestarts="1", ActiveState="active")
        assert _mount_id(machine) == mount
        for name, content in _FILES.items():
            assert _read(machine, name) == hashlib.sha256(content).hexdigest()


def test_a_stop_unmounts_and_a_start_mounts_again(machine: Machine) -> None:
    _read(machine, "tag")
    machine.run("systemctl", "stop", "fsmount")
    assert machine.show("fsmount", "ActiveState", "Result", "NFileDescriptorStore") == [
        "inactive",
        "success",
        "0",
    ]
    machine.run("findmnt", "/srv/artifacts", code=1)
    machine.run("systemctl", "start", "fsmount")
    assert _read(machine, "tag") == hashlib.sha256(b"v1.4.1").hexdigest()


def test_what_somebody_has_unmounted_is_there_again(machine: Machine) -> None:
    machine.run("umount", "/srv/artifacts")
    machine.wait_for("fsmount", NRestarts="1", ActiveState="active")
    assert _read(machine, "tag") == hashlib.sha256(b"v1.4.1").hexdigest()


def test_an_upgrade_leaves_the_mount_to_a_process_of_the_program_as_it_is_now(machine: Machine) -> None:
    _read(machine, "tag")
    mount, before = _mount_id(machine), machine.show("fsmount", "MainPID")
    machine.run(_PROGRAM, "upgrade")
    machine.wait_for("fsmount", ActiveState="active")
    assert machine.show("fsmount", "MainPID") != before
    assert _mount_id(machine) == mount


# -------------------- reload


def test_a_reload_shows_what_was_added_and_ends_only_then(machine: Machine, site: Site) -> None:
    _read(machine, "tag")
    before = machine.show("fsmount", "MainPID")
    more = f'[apps.again]\nrepository = "{site.registry.host}/team/web"\n'
    machine.run("sh", "-c", f"echo '{more}' >> /etc/fsmount/config.toml && systemctl reload fsmount")
    assert machine.run("ls", "/srv/artifacts").split() == ["again", "web"]
    assert machine.show("fsmount", "MainPID") == before


def test_a_reload_of_a_file_with_a_mistake_fails_and_changes_nothing(machine: Machine) -> None:
    machine.run("sh", "-c", "echo '[aps.x]' >> /etc/fsmount/config.toml")
    machine.run("systemctl", "reload", "fsmount", code=1)
    assert "unknown key" in machine.said()
    assert machine.run("ls", "/srv/artifacts").split() == ["web"]
    assert machine.show("fsmount", "ActiveState", "NRestarts") == ["active", "0"]


# -------------------- what cannot start


def test_a_program_that_never_starts_has_failed_after_twenty_tries(site: Site) -> None:
    broken = site.drop_in("[Service]\nExecStart=\nExecStart=/bin/false\n")
    with site.booted(more=broken) as machine:
        machine.wait_for("fsmount", ActiveState="failed")
        assert machine.show("fsmount", "NRestarts") == ["20"]


def test_a_mistake_in_the_configuration_is_told_once_and_not_tried_again(site: Site) -> None:
    with site.booted(more="echo 'mountpiont = \"/srv/x\"' > /etc/fsmount/config.toml") as machine:
        machine.wait_for("fsmount", ActiveState="failed")
        assert machine.show("fsmount", "NRestarts", "ExecMainStatus") == ["0", "2"]
        assert machine.said().count("/etc/fsmount/config.toml:1: mountpiont: unknown key") == 1


def test_a_mistake_that_was_made_since_does_not_take_the_mount_down(machine: Machine) -> None:
    _read(machine, "tag")
    mount = _mount_id(machine)
    machine.run("sh", "-c", "echo '[apps' > /etc/fsmount/config.toml")
    machine.run("systemctl", "restart", "fsmount")
    assert _mount_id(machine) == mount
    assert _read(machine, "tag") == hashlib.sha256(b"v1.4.1").hexdigest()


# -------------------- apps that wait for their files


_APP = """
[Unit]
{0}=fsmount-wait@web:v1.4.2.service
After=fsmount.service fsmount-wait@web:v1.4.2.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
"""


def _documented_unit(name: str) -> str:
    pattern = rf"```ini\n# (?:/etc/systemd/system|~/\.config/systemd/user)/{re.escape(name)}\n(.*?)```"
    found = re.search(pattern, (_CHECKOUT / "docs/boot.md").read_text(), re.DOTALL)
    assert found
    return found[1]


def _learn(site: Site) -> None:
    """A machine has been up, and an app has run on it from the tag before."""
    with site.booted() as machine:
        machine.wait_for("fsmount", ActiveState="active")
        for name in ("bin/server", "share/1"):
            _read(machine, name)
        machine.run("systemctl", "stop", "fsmount")


def test_the_unit_of_the_documentation_starts_an_app_when_its_files_are_here(site: Site) -> None:
    _learn(site)
    (site.work / "web.service").write_text(_documented_unit("web.service"))
    with site.booted(more=f"cp {site.work}/web.service /etc/systemd/system; systemctl enable web") as machine:
        machine.wait_for("web", ActiveState="active")
        wait, app = "fsmount-wait@web:v1.4.2", "web"
        assert machine.show(wait, "Result", "ExecMainStatus") == ["success", "0"]
        (fetched,), (started,) = (
            machine.show(wait, "ExecMainExitTimestampMonotonic"),
            machine.show(app, "ExecMainStartTimestampMonotonic"),
        )
        assert 0 < int(fetched) <= int(started)
        site.registry.stop()
        assert _read(machine, "share/1", "v1.4.2") == hashlib.sha256(_FILES["share/1"]).hexdigest()
        # A restart of the mount is none of the app.
        before = machine.show(app, "MainPID", "ExecMainStartTimestampMonotonic")
        machine.run("systemctl", "restart", "fsmount")
        assert machine.show(app, "MainPID", "ExecMainStartTimestampMonotonic") == before


@pytest.mark.parametrize(
    "dependency, code, state",
    [("Wants", 0, "active"), ("Requires", 1, "inactive")],
    ids=["wants", "requires"],
)
def test_when_the_time_is_over_the_app_starts_or_does_not_as_its_unit_says(
    site: Site, dependency: str, code: int, state: str
) -> None:
    _learn(site)
    site.registry.stop()
    (site.work / "app.service").write_text(_APP.format(dependency))
    quick = site.drop_in("[Service]\nEnvironment=FSMOUNT_TIMEOUT=2s\n", "fsmount-wait@.service")
    with site.booted(more=f"cp {site.work}/app.service /etc/systemd/system; {quick}") as machine:
        machine.run("systemctl", "start", "app", code=code)
        assert machine.show("fsmount-wait@web:v1.4.2", "ActiveState", "ExecMainStatus") == ["failed", "6"]
        assert machine.show("app", "ActiveState") == [state]


def test_as_long_as_nothing_was_recorded_nobody_waits(machine: Machine, site: Site) -> None:
    site.registry.stop()
    machine.run("systemctl", "start", "fsmount-wait@web:v1.4.2")


# -------------------- fstab


@pytest.fixture
def with_fstab(site: Site) -> Iterator[Machine]:
    options = f"_netdev,nofail,noatime,app=web,cache={site.work}/cache"
    line = f"{site.registry.host}/team /srv/artifacts fsmount {options} 0 0"
    more = f"systemctl disable fsmount; echo '{line}' > /etc/fstab"
    with site.booted(more=more, generators=["systemd-fstab-generator"]) as machine:
        machine.wait_for("srv-artifacts.mount", ActiveState="active")
        yield machine


def test_a_line_of_fstab_has_a_mount_at_boot_and_stopping_it_leaves_no_process(with_fstab: Machine) -> None:
    machine = with_fstab
    assert _read(machine, "tag") == hashlib.sha256(b"v1.4.1").hexdigest()
    machine.run("systemctl", "stop", "srv-artifacts.mount")
    machine.run("findmnt", "/srv/artifacts", code=1)
    assert wait_until(lambda: not machine.run("ps", "-e", "-o", "args").count("--foreground"))


def test_mount_and_umount_do_by_a_line_of_fstab_what_they_are_told(with_fstab: Machine) -> None:
    machine = with_fstab
    machine.run("mount", "/srv/artifacts", code=32)
    machine.run("umount", "/srv/artifacts")
    machine.run("mount", "-f", "/srv/artifacts")
    machine.run("findmnt", "/srv/artifacts", code=1)
    assert "fsmount mount --app web=" in machine.run("mount", "-v", "/srv/artifacts")
    assert _read(machine, "tag") == hashlib.sha256(b"v1.4.1").hexdigest()
    machine.run("umount", "/srv/artifacts")
    machine.run("mount", "-o", "mode=5", "/srv/artifacts", code=1)
    machine.run("mount", "-s", "-o", "mode=5", "/srv/artifacts")
    machine.run("umount", "/srv/artifacts")


# -------------------- an ordinary user


_MANAGER = """
[Service]
User=builder
Type=notify
Delegate=yes
RuntimeDirectory=builder
Environment=XDG_RUNTIME_DIR=/run/builder SYSTEMD_UNIT_PATH=/home/builder/.config/systemd/user:{0}
ExecStart=/lib/systemd/systemd --user --unit=default.target
"""


def test_the_unit_of_the_documentation_for_an_ordinary_user_mounts_and_survives_a_kill(site: Site) -> None:
    targets = site.work / "user-targets"
    targets.mkdir()
    for name in ("default", "basic", "shutdown", "sockets", "timers", "paths"):
        shutil.copy(f"/lib/systemd/user/{name}.target", targets)
    (site.work / "manager.service").write_text(_MANAGER.format(targets))
    (site.work / "fsmount.service").write_text(_documented_unit("fsmount.service"))
    (site.work / "user.toml").write_text(f'[apps.web]\nrepository = "{site.registry.host}/team/web"\n')
    site.work.chmod(0o755)
    above = {folder for prefix in (sys.prefix, sys.base_prefix) for folder in Path(prefix).parents}
    closed = [folder for folder in above if not folder.stat().st_mode & stat.S_IXOTH]
    more = f"""
        for folder in {" ".join(map(str, closed))}; do chmod a+x "$folder"; done
        # As udev has it.
        mknod -m 0666 /run/fuse c 10 229
        mount --bind /run/fuse /dev/fuse
        useradd --create-home builder
        cd /home/builder
        mkdir -p builds .local/bin .config/systemd/user .config/fsmount
        ln -s {_PROGRAM} .local/bin/fsmount
        cp {site.work}/fsmount.service .config/systemd/user
        cp {site.work}/user.toml .config/fsmount/config.toml
        chown -R builder: .
        cp {site.work}/manager.service /etc/systemd/system
        systemctl disable fsmount
    """
    with site.booted(more=more) as machine:
        machine.run("systemctl", "start", "manager")
        as_user = (
            "setpriv",
            "--reuid=builder",
            "--regid=builder",
            "--init-groups",
            "env",
            "HOME=/home/builder",
        )
        as_user = (*as_user, "XDG_RUNTIME_DIR=/run/builder")
        tell = (*as_user, "systemctl", "--user")
        file = "/home/builder/builds/web/v1.4.1/tag"
        machine.run(*tell, "start", "fsmount")
        assert machine.run(*as_user, "cat", file) == "v1.4.1"
        mount = machine.run("findmnt", "-n", "-o", "ID", "/home/builder/builds")
        pid = machine.run(*tell, "show", "--value", "--property=MainPID", "fsmount").strip()
        machine.run("kill", "-KILL", pid)
        restarts = (*tell, "show", "--value", "--property=NRestarts", "--property=ActiveState", "fsmount")
        assert wait_until(lambda: sorted(machine.run(*restarts).split()) == ["1", "active"]), machine.run(
            *restarts
        )
        assert machine.run("findmnt", "-n", "-o", "ID", "/home/builder/builds") == mount
        assert machine.run(*as_user, "cat", file) == "v1.4.1"
        machine.run(*tell, "stop", "fsmount")
        machine.run("findmnt", "/home/builder/builds", code=1)
