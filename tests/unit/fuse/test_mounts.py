"""What mountinfo says, and what a mount point is called."""

import os
from pathlib import Path

import pytest

from fsmount.errors import NotRunning, UsageError
from fsmount.fuse import mounts

# proc_pid_mountinfo(5), with no, one and two optional fields.
MOUNTINFO = rb"""22 27 0:21 / /proc rw,relatime - proc proc rw
36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
42 27 0:39 / /srv/my\040builds\011of\012\134today\303\251 ro,nosuid shared:7 master:2 - fuse.fsmount fsmount user_id=7
"""


def test_a_line_of_mountinfo_becomes_a_mount() -> None:
    assert mounts.parse(MOUNTINFO)[1] == mounts.Mount(
        id=36,
        parent=35,
        device="98:0",
        mountpoint=Path("/mnt2"),
        options=frozenset({"rw", "noatime", "errors=continue"}),
        fstype="ext3",
        source="/dev/root",
    )


def test_octal_escapes_in_a_mount_point_are_undone() -> None:
    assert os.fsencode(mounts.parse(MOUNTINFO)[2].mountpoint) == b"/srv/my builds\tof\n\\today\xc3\xa9"


def test_a_mount_point_that_is_not_utf_8_stays_what_it_is() -> None:
    (mount,) = mounts.parse(b"1 2 0:3 / /srv/\xff rw - tmpfs tmpfs rw\n")
    assert os.fsencode(mount.mountpoint) == b"/srv/\xff"


@pytest.mark.parametrize("odd", [b"\r", b"\v\f\x1c\x85", b"\xe2\x80\xa8"])
def test_a_mount_point_may_have_what_elsewhere_ends_a_line(odd: bytes) -> None:
    (mount,) = mounts.parse(b"1 2 0:3 / /srv/a" + odd + b"b rw - tmpfs tmpfs rw\n")
    assert os.fsencode(mount.mountpoint) == b"/srv/a" + odd + b"b"


@pytest.mark.parametrize(
    "line", [b"", b"nonsense", b"1 2 0:3 / /a rw", b"x 2 0:3 / /a rw - t t rw", b"1 2 \xff / /a rw - t t rw"]
)
def test_what_is_no_line_of_mountinfo_hides_no_other(line: bytes) -> None:
    first, second, third = MOUNTINFO.splitlines(keepends=True)
    assert mounts.parse(first + line + b"\n" + second + third) == mounts.parse(MOUNTINFO)


def test_an_option_has_a_value() -> None:
    mount = mounts.parse(MOUNTINFO)[2]
    assert mount.option("user_id") == "7"
    assert mount.option("user") is None


def test_only_mounts_of_type_fuse_fsmount_are_ours() -> None:
    assert [mounts.is_ours(mount) for mount in mounts.parse(MOUNTINFO)] == [False, False, True]


@pytest.mark.parametrize(
    "lines",
    [
        "1 0 0:1 / / rw - ext4 a rw\n2 1 0:2 / /m rw - fuse b rw\n3 2 0:3 / /m rw - fuse c rw\n",
        "1 0 0:1 / / rw - ext4 a rw\n3 2 0:3 / /m rw - fuse c rw\n2 1 0:2 / /m rw - fuse b rw\n",
    ],
)
def test_of_mounts_on_one_another_the_topmost_is_found(lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "mounted", lambda: mounts.parse(lines.encode()))
    found = mounts.find(Path("/m"))
    assert found is not None
    assert found.source == "c"


def test_what_this_process_sees_mounted_can_be_parsed() -> None:
    assert mounts.find(Path("/proc")) in mounts.mounted()


@pytest.mark.parametrize(
    "given", ["real/point", "real/../real/point/", "link/point", "to-point", "real/point/sub/.."]
)
def test_a_mount_point_is_called_what_the_kernel_calls_it(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real" / "point" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "to-point").symlink_to("link/point")
    monkeypatch.chdir(tmp_path)
    assert mounts.resolve(Path(given)) == tmp_path / "real" / "point"


def test_a_link_of_proc_is_followed() -> None:
    assert mounts.resolve(Path("/proc/self/root")) == Path("/")


def test_a_circle_of_links_is_no_mount_point(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UsageError):
        mounts.prepare(tmp_path / "circle")


def test_a_missing_mount_point_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        mounts.prepare(tmp_path / "missing")
    assert caught.value.remedy == f"Make it: mkdir -p {tmp_path}/missing"


def test_a_file_is_no_mount_point(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not a directory"):
        mounts.prepare(tmp_path / "file")


def test_a_directory_with_files_in_it_is_a_mount_point(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not mounts.prepare(tmp_path)


def test_where_nothing_is_mounted_nothing_is_unmounted(tmp_path: Path) -> None:
    with pytest.raises(NotRunning):
        mounts.unmount(tmp_path)


def test_where_nothing_is_mounted_nothing_is_read_ahead(tmp_path: Path) -> None:
    assert not mounts.set_read_ahead(tmp_path)
