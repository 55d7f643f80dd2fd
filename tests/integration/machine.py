"""A machine of our own: real systemd as process 1, in namespaces, over a copy-on-write view of this machine's files.

Its root is an overlay whose upper half is in memory, so whatever systemd and its tools write or empty, /tmp and the
homes too, is gone with it. They find no units but those of ours and the targets that every machine has. The network
is this machine's.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fsmount
from tests import peers
from tests.integration.program import wait_until

SYSTEMD = Path("/lib/systemd/systemd")
_SYSTEM_UNITS = Path("/lib/systemd/system")
_CHECKOUT = Path(fsmount.__file__).parents[1]
_PROGRAM = Path(sys.prefix, "bin/fsmount")
_SECONDS = 100
_BOOT_SECONDS = 30
#: Nothing of the user's who runs the tests.
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}

#: Of them a machine is made; not the folders of what they want, in which are all the services of this machine.
_TARGETS = (
    *(
        "sysinit",
        "basic",
        "multi-user",
        "shutdown",
        "umount",
        "final",
        "sockets",
        "timers",
        "paths",
        "slices",
    ),
    *("local-fs-pre", "local-fs", "remote-fs-pre", "remote-fs", "network", "network-online", "time-set"),
)

# Arguments: the folder for what is mounted, the folder of units, the folder of generators; then paths that are the same
# inside, w:PATH or r:PATH; then --; then a script to be run before the boot.
_BOOT = r"""
set -eu
top=$1 units=$2 generators=$3; shift 3
mount --make-rprivate /
mount -t tmpfs -o mode=0755 tmpfs "$top"
mkdir "$top/up" "$top/wk" "$top/root"
mount -t overlay -o "lowerdir=/,upperdir=$top/up,workdir=$top/wk" overlay "$top/root"
root=$top/root
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
# The limits that systemd sets as process 1 would be those of the whole kernel.
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
for place in run tmp root var/tmp var/cache srv; do
    case $place in
        # The program may be below it.
        root) ;;
        *) mount -t tmpfs -o mode=0755 tmpfs "$root/$place" ;;
    esac
done
while [ "$1" != -- ]; do
    path=${1#?:}
    mkdir -p "$root$path"
    mount --bind "$path" "$root$path"
    case $1 in r:*) mount -o remount,bind,ro "$root$path" ;; esac
    shift
done
shift
mkdir -p "$root/run/old"
cd "$root"
pivot_root . run/old
cd /
umount -l /run/old
tr -d - </proc/sys/kernel/random/uuid >/etc/machine-id
: >/etc/fstab
mkdir -p /run/systemd/system
export SYSTEMD_UNIT_PATH="/etc/systemd/system:/run/systemd/generator:$units" SYSTEMD_GENERATOR_PATH="$generators"
rm -rf /etc/systemd/system
mkdir -p /etc/systemd/system
SYSTEMD_OFFLINE=1 sh -euc "$1"
# Nothing of this machine is where systemd, which tidies up, could reach it.
[ "$(stat -f -c %T /)" = overlayfs ] && [ "$(stat -f -c %T /tmp /var/tmp | sort -u)" = tmpfs ]
mount --bind /dev/null /dev/console
exec env -i container=other PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    SYSTEMD_UNIT_PATH="$SYSTEMD_UNIT_PATH" SYSTEMD_GENERATOR_PATH="$generators" \
    SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/run/none /lib/systemd/systemd --system --unit=multi-user.target
"""


def missing() -> str:
    """Why there can be no such machine; empty if nothing is known against it."""
    if os.geteuid() != 0:
        return "needs root"
    for path in (SYSTEMD, Path("/dev/fuse"), _PROGRAM):
        if not path.exists():
            return f"there is no {path}"
    if _cgroups() is None:
        return "no cgroup2 is mounted"
    return peers.have("unshare", "nsenter", "systemctl", "findmnt")


@dataclass(frozen=True)
class Machine:
    """A machine that has booted."""

    pid: int
    #: What its services write.
    output: Path

    def run(self, *words: str | Path, code: int = 0) -> str:
        """What a command prints that is run there; fails with what it said if its exit code is not `code`."""
        done = subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            env=_ENVIRONMENT,
        )
        assert done.returncode == code, (
            f"{words}: {done.returncode}: {done.stdout}{done.stderr}\n{self.said()}"
        )
        return done.stdout

    def start(self, *words: str | Path) -> "subprocess.Popen[str]":
        """A command that is run there beside others, with its streams in pipes."""
        return subprocess.Popen(
            self.command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_ENVIRONMENT
        )

    def command(self, *words: str | Path) -> list[str]:
        """Whose exit code is that of the command."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--cgroup", "--uts", "--ipc", "--"]
        return [*enter, *map(str, words)]

    def show(self, unit: str, *names: str) -> list[str]:
        """Properties of a unit."""
        said = self.run("systemctl", "show", *(f"--property={name}" for name in names), unit).splitlines()
        values = dict(line.split("=", 1) for line in said)
        return [values[name] for name in names]

    def wait_for(self, unit: str, **wanted: str) -> None:
        """Until the properties of a unit are so."""
        values = list(wanted.values())

        def is_so() -> bool:
            return self.show(unit, *wanted) == values

        wait_until(lambda: is_so() or self.show(unit, "ActiveState") == ["failed"], seconds=_SECONDS)
        assert is_so(), f"{unit}: {self.show(unit, *wanted)}\n{self.said()}"

    def said(self) -> str:
        """What the services have written so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


@contextmanager
def booted(work: Path, *, prepare: str = "true", generators: Sequence[str] = ()) -> Iterator[Machine]:
    """A machine in which `work` is the same folder as outside, and everything else is its own.

    prepare: a shell script that is run in it before systemd is. It is switched off by force at the end.
    Raises: RuntimeError if it does not boot.
    """
    cgroups = _cgroups()
    assert cgroups is not None
    control = cgroups / f"fsmount-test-{os.getpid()}-{time.monotonic_ns()}"
    own = work / "machine"
    shutil.rmtree(own, ignore_errors=True)
    (own / "top").mkdir(parents=True)
    _write_units(own / "units", own / "output")
    (own / "generators").mkdir()
    for name in generators:
        (own / "generators" / name).symlink_to(f"/lib/systemd/system-generators/{name}")
    log = own / "boot.log"
    same = [f"r:{path}" for path in (_CHECKOUT, Path(sys.prefix), Path(sys.base_prefix))] + [f"w:{work}"]
    arguments = [own / "top", own / "units", own / "generators", *same, "--", prepare]
    control.mkdir()
    try:
        with log.open("wb") as output:
            boot = subprocess.Popen(
                [
                    # The namespace of control groups begins where the process is when it is made.
                    *("sh", "-c", 'echo $$ >"$0" && exec "$@"', control / "cgroup.procs"),
                    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--uts", "--ipc"),
                    *("sh", "-c", _BOOT, "boot", *map(str, arguments)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_ENVIRONMENT,
            )
        try:
            machine = Machine(_child(boot), own / "output")
            is_up = wait_until(lambda: boot.poll() is not None or _is_up(machine), seconds=_BOOT_SECONDS)
            if not is_up or boot.poll() is not None:
                raise RuntimeError(f"systemd does not boot here: {log.read_text()}")
            yield machine
        finally:
            _switch_off(boot)
    finally:
        for folder in [*sorted(control.rglob("*/"), reverse=True), control]:
            assert wait_until(partial(_is_removed, folder)), f"{folder} is left"


def _write_units(folder: Path, output: Path) -> None:
    folder.mkdir()
    for target in _TARGETS:
        shutil.copy(_SYSTEM_UNITS / f"{target}.target", folder)
    (folder / "multi-user.target.wants").mkdir()
    (folder / "multi-user.target.wants/remote-fs.target").symlink_to("../remote-fs.target")
    (folder / "service.d").mkdir()
    told = f"[Service]\nStandardOutput=append:{output}\nStandardError=append:{output}\n"
    (folder / "service.d/output.conf").write_text(told)


def _cgroups() -> Path | None:
    """Where version 2 of control groups is mounted: alone, or beside version 1."""
    places = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
    return next((place for place in places if (place / "cgroup.procs").exists()), None)


def _child(process: "subprocess.Popen[bytes]") -> int:
    """The process that another one has started; its own number, if it has ended without."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: process.poll() is not None or children.read_text())
    return process.pid if process.poll() is not None else int(children.read_text())


def _is_up(machine: Machine) -> bool:
    words = machine.command("systemctl", "is-active", "basic.target")
    return subprocess.run(words, capture_output=True, check=False).stdout == b"active\n"


def _switch_off(boot: "subprocess.Popen[bytes]") -> None:
    """With process 1 of a namespace all others in it end, and with them its mounts."""
    if boot.poll() is None:
        os.kill(_child(boot), signal.SIGKILL)
        boot.wait(_SECONDS)


def _is_removed(group: Path) -> bool:
    with suppress(OSError):  # it is not empty yet
        group.rmdir()
    return not group.exists()
