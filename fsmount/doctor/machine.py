"""machine: whether this machine can have a mount, and one that comes back by itself."""

import os
import re
import resource
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from fsmount.doctor.finding import Check, Finding, ask_child, in_thread
from fsmount.fuse.mounts import FSTYPE

#: The kernel that can send again what a process that has died had not answered.
_RESENDS = (6, 9)
_CAP_SYS_ADMIN = 21
#: Chunks, indexes and connections of one mount (docs/operations.md, "What it needs").
_DESCRIPTORS = 4096
_UNIT = "fsmount.service"


def checks(root: Path = Path("/")) -> list[Check]:
    """root stands before all paths but those of programs, for tests."""
    user = os.geteuid()
    return [
        in_thread("kernel", lambda: [kernel(os.uname().release)]),
        in_thread("fuse", lambda: list(fuse(root, user))),
        in_thread("rights", lambda: [rights(root, user)]),
        in_thread("descriptors", lambda: [descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[1])]),
        in_thread("start", lambda: start(root)),
    ]


def kernel(release: str) -> Finding:
    """What of a mount survives the process that serves it."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and (int(numbers[1]), int(numbers[2])) >= _RESENDS:
        return Finding.ok("kernel", f"Linux {release}: a mount survives the process that serves it")
    return Finding.warning(
        "kernel",
        f"Linux {release}: when the process that serves a mount dies, it is mounted anew,"
        " and who has a file open there must open it again",
        remedy="Linux 6.9 and later hand over what was being asked, too.",
    )


def fuse(root: Path, user: int, search: str | None = None) -> Iterator[Finding]:
    """The device, and the program by which ordinary users mount. search: in place of PATH."""
    device = root / "dev/fuse"
    if not device.exists():
        yield Finding.problem(
            "fuse",
            "this machine has no /dev/fuse",
            remedy="Load the kernel module (modprobe fuse); give a container the device (--device /dev/fuse).",
        )
    elif not os.access(device, os.R_OK | os.W_OK):
        yield Finding.problem(
            "fuse",
            f"/dev/fuse may not be opened by user {user}",
            remedy="Its mode is usually 0666; some systems have a group fuse to be a member of.",
        )
    else:
        yield Finding.ok("fuse", "/dev/fuse can be opened")
    program = shutil.which("fusermount3", path=search)
    if program is None:
        say = Finding.problem if user else Finding.warning
        yield say(
            "fusermount3",
            "fusermount3 is not installed; ordinary users mount and unmount by it",
            remedy="Install the package fuse3.",
        )
    elif user and not os.stat(program).st_mode & stat.S_ISUID:
        yield Finding.problem(
            "fusermount3",
            f"{program} is not setuid root, and cannot mount for user {user}",
            remedy=f"Install the package fuse3 again, or: chmod u+s {program}",
        )
    else:
        yield Finding.ok("fusermount3", program)


def rights(root: Path, user: int) -> Finding:
    """Whether this user may mount, and for whom."""
    if user == 0:
        status = (root / "proc/self/status").read_text()
        effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
        if effective and not int(effective[1], 16) >> _CAP_SYS_ADMIN & 1:
            return Finding.problem(
                "rights",
                "root has no CAP_SYS_ADMIN here, and cannot mount",
                remedy="In a container: --cap-add SYS_ADMIN, and an AppArmor profile that allows to mount.",
            )
        return Finding.ok("rights", "root may mount, for all users")
    try:
        lines = (root / "etc/fuse.conf").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    if "user_allow_other" in map(str.strip, lines):
        return Finding.ok("rights", f"user {user} may mount, for all users")
    return Finding.warning(
        "rights",
        f"only user {user} will see what that user mounts; not even root does",
        remedy="For others to see it, have the line user_allow_other written into /etc/fuse.conf.",
    )


def descriptors(hard: int) -> Finding:
    """The hard limit, to which a mount raises its own."""
    if hard == resource.RLIM_INFINITY or hard >= _DESCRIPTORS:
        return Finding.ok("descriptors", f"{'any number' if hard < 0 else hard} may be open")
    return Finding.warning(
        "descriptors",
        f"only {hard} files may be open at once; a mount with many layers needs some thousands",
        remedy="Raise the hard limit: LimitNOFILE= in a unit, limits.conf(5), or ulimit -Hn.",
    )


def start(root: Path) -> Sequence[Finding]:
    """Whether a mount comes up when the machine does, where systemd decides that."""
    if not (root / "run/systemd/system").is_dir():
        return []
    if any(_is_of_ours(line) for line in _lines(root / "etc/fstab")):
        return [Finding.ok("start", "/etc/fstab has a line for a mount of fsmount")]
    said = ask_child("systemctl", "show", "--property=LoadState,UnitFileState,ActiveState", _UNIT)
    if said is None or said.code != 0:
        reason = "does not end" if said is None else said.complaint
        return [Finding.warning("start", f"systemctl cannot be asked for {_UNIT}: {reason}")]
    return [unit(dict(line.partition("=")[::2] for line in said.output.splitlines()))]


def unit(properties: dict[str, str]) -> Finding:
    """What systemctl knows of our unit."""
    if properties.get("LoadState") != "loaded":
        return Finding.warning(
            "start",
            "neither a systemd unit nor /etc/fstab starts a mount when the machine does",
            remedy="fsmount install-units",
        )
    if properties.get("ActiveState") == "failed":
        return Finding.problem("start", f"{_UNIT} has failed", remedy=f"See journalctl -u {_UNIT}.")
    if not properties.get("UnitFileState", "").startswith("enabled"):
        return Finding.warning(
            "start",
            f"{_UNIT} is installed, and does not start with the machine",
            remedy=f"systemctl enable --now {_UNIT}",
        )
    return Finding.ok("start", f"{_UNIT} is enabled, and {properties.get('ActiveState')}")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _is_of_ours(line: str) -> bool:
    """Whether a line of fstab(5) is a mount of fsmount."""
    fields = line.split()
    return len(fields) > 2 and not line.lstrip().startswith("#") and fields[2] in ("fsmount", FSTYPE)
