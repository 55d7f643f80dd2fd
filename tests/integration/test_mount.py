"""`fsmount mount` over layout folders: what it shows, and how it comes and goes."""

import ctypes
import errno
import os
import platform
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from fsmount.fuse import mounts
from scripts.bench.machine import timed
from tests import peers
from tests.fakes.tar import DIRECTORY, SYMLINK, Member, archive
from tests.integration.program import (
    command,
    daemon,
    daemons,
    environment,
    fsmount,
    holder,
    kill,
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

_NOBODY = 65534
_AS_NOBODY = ("setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups")
_HERE = "linux/" + {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
_ELSEWHERE = "linux/arm64" if _HERE == "linux/amd64" else "linux/amd64"


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder that every user may enter."""
    with _folder() as folder:
        yield folder


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mount-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def _image(layout: Path, tag: str | None, *layers: peers.LayerBlob, on: str = _HERE) -> str:
    """Writes an image; its digest."""
    return str(peers.tar_layer_image(layout, tag, layers, platform=on)["digest"])


def _layer(*members: Member) -> peers.LayerBlob:
    return peers.pack(archive(*members))


def _says(text: str) -> peers.LayerBlob:
    """A layer with a file, and a folder with the same file."""
    return _layer(
        Member(b"file", text.encode()),
        Member(b"folder/", type=DIRECTORY, mode=0o755),
        Member(b"folder/" + text.encode(), text.encode()),
    )


@contextmanager
def refused(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# -------------------- what it shows

_RANDOM = Random(3).randbytes(3_000_000)
_SHARED = _layer(
    *(Member(b"shared/%d" % number, _RANDOM[number * 1_000_000 :][:1_000_000]) for number in range(3)),
    Member(b"dist/index.html", b"<p>"),
    Member(b"dist/up", type=SYMLINK, link=b"../gone"),
    Member(b"gone", b"an upper layer removes this"),
    Member(b"opaque/", type=DIRECTORY, mode=0o755),
    Member(b"opaque/old", b"and hides this"),
    Member(b"private", b"root's", mode=0o600),
)
_HOUSEKEEPING = [f"sha256-{'a' * 64}{suffix}" for suffix in ("", ".sig", ".att", ".sbom")]


@dataclass(frozen=True)
class Shown:
    """A mount of many apps, and the digests that its images have."""

    root: Path
    v1: str
    v2: str
    elsewhere: str


@pytest.fixture(scope="module")
def shown() -> Iterator[Shown]:
    with _folder() as work:
        web, multi = work / "web", work / "multi"
        v1 = _image(web, "v1", _SHARED, _layer(Member(b"changed", b"one"), Member(b"same", b"same")))
        upper = [Member(b".wh.gone"), Member(b"opaque/.wh..wh..opq"), Member(b"opaque/new", b"new")]
        v2 = _image(web, "v2", _SHARED, _layer(Member(b"changed", b"two"), Member(b"same", b"same"), *upper))
        for tag in ("main", *_HOUSEKEEPING):
            _image(web, tag, _says(tag[-8:]))
        images = [
            peers.tar_layer_image(multi, None, [_says(on.replace("/", "-"))], platform=on)
            for on in (_HERE, _ELSEWHERE)
        ]
        peers.image_index(multi, "v1", images)
        peers.image_index(multi, "only-elsewhere", images[1:])
        config = f"""
            [apps."team/web"]
            repository = "oci-layout:{web}"
            [apps."team/tools/lint"]
            repository = "oci-layout:{multi}"
            [apps.dist]
            repository = "oci-layout:{web}"
            path = "/dist"
            [apps.releases]
            repository = "oci-layout:{web}"
            tags = ["v*", "r-[0-9]"]
            [apps.elsewhere]
            repository = "oci-layout:{multi}"
            platform = "{_ELSEWHERE}"
        """
        with mounted(work, config=config) as root:
            yield Shown(root, v1, v2, str(images[1]["digest"]))


def test_an_app_whose_name_has_slashes_lies_in_folders(shown: Shown) -> None:
    assert names(shown.root) == ["dist", "elsewhere", "releases", "team"]
    assert names(shown.root / "team") == ["tools", "web"]
    assert names(shown.root / "team/tools") == ["lint"]
    assert names(shown.root / "team/tools/lint") == ["only-elsewhere", "v1"]
    for nothing in ("nothing", "team/nothing", "lint", "web"):
        assert not (shown.root / nothing).exists()


def test_an_app_lists_its_tags_without_those_of_housekeeping(shown: Shown) -> None:
    assert names(shown.root / "team/web") == ["main", "v1", "v2"]


def test_an_app_with_patterns_lists_the_tags_that_match(shown: Shown) -> None:
    assert names(shown.root / "releases") == ["v1", "v2"]


@pytest.mark.parametrize("tag", ["main", *_HOUSEKEEPING])
def test_a_tag_that_exists_opens_also_when_it_is_not_listed(shown: Shown, tag: str) -> None:
    assert (shown.root / "releases" / tag / "file").read_text() == tag[-8:]
    assert names(shown.root / "releases") == ["v1", "v2"]


def test_an_image_opens_by_its_digest_with_or_without_a_tag(shown: Shown) -> None:
    app = shown.root / "team/web"
    for name, content in [(shown.v1, "one"), (f"v1@{shown.v1}", "one"), (f"v1@{shown.v2}", "two")]:
        assert (app / name / "changed").read_text() == content
    assert names(app) == ["main", "v1", "v2"]


_NOWHERE = f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    "name",
    [
        "v3",
        _NOWHERE,
        f"v1@{_NOWHERE}",
        "v1@",
        "v1@v2",
        "sha256:abc",
        "@",
        ".hidden",
        "-v",
        "v 1",
        "v1:v2",
        "é",
        "t" * 129,
    ],
)
def test_a_name_that_is_no_tag_and_no_digest_of_the_app_does_not_exist(shown: Shown, name: str) -> None:
    with refused(errno.ENOENT):
        (shown.root / "team/web" / name).stat()


def test_an_app_with_a_path_shows_that_folder_of_each_tag(shown: Shown) -> None:
    app = shown.root / "dist"
    assert names(app / "v1") == ["index.html", "up"]
    assert (app / "v1/index.html").read_text() == "<p>"
    assert names(app / "v1/..") == names(app)
    # A link that leads out of the folder leaves the tree, as on any mount.
    assert os.readlink(app / "v1/up") == "../gone"
    assert not (app / "v1/up").exists()


def test_a_tag_without_the_folder_that_its_app_shows_does_not_open(shown: Shown) -> None:
    assert "main" in names(shown.root / "dist")
    _does_not_open(shown.root / "dist/main")


def _does_not_open(tag: Path) -> None:
    with refused(errno.ENOENT):
        (tag / "file").stat()
    # readdir(3) takes ENOENT for the end of a listing: whatever the code is, it is no empty folder.
    with pytest.raises(OSError):
        names(tag)


def test_of_an_index_the_image_for_the_platform_is_shown(shown: Shown) -> None:
    here, elsewhere = shown.root / "team/tools/lint", shown.root / "elsewhere"
    assert (here / "v1/file").read_text() == _HERE.replace("/", "-")
    assert (elsewhere / "v1/file").read_text() == _ELSEWHERE.replace("/", "-")
    assert (elsewhere / "only-elsewhere/file").read_text() == _ELSEWHERE.replace("/", "-")
    # Whoever names a digest means that image.
    assert (here / shown.elsewhere / "file").read_text() == _ELSEWHERE.replace("/", "-")
    _does_not_open(here / "only-elsewhere")


def test_whiteouts_take_effect_and_are_not_seen(shown: Shown) -> None:
    v1, v2 = shown.root / "team/web/v1", shown.root / "team/web/v2"
    assert (v1 / "gone").exists()
    assert not (v2 / "gone").exists()
    assert names(v1 / "opaque") == ["old"]
    assert names(v2 / "opaque") == ["new"]
    assert not (v2 / "opaque/old").exists()
    assert not (v2 / ".wh.gone").exists()
    assert not [path for path in peers.tree_listing(v2, leave_out=["sha256"]) if b".wh." in path]


# -------------------- inodes


def test_a_member_of_a_shared_layer_is_one_inode_in_all_tags_and_apps(shown: Shown) -> None:
    tags = [
        shown.root / name for name in ("team/web/v1", "team/web/v2", "releases/v2", f"releases/{shown.v1}")
    ]
    for name in ("shared/0", "shared/1", "private"):
        assert len({(tag / name).stat().st_ino for tag in tags}) == 1
    assert (tags[0] / "dist/index.html").samefile(shown.root / "dist/v2/index.html")


def test_equal_files_of_different_layers_are_different_inodes(shown: Shown) -> None:
    v1, v2 = shown.root / "team/web/v1", shown.root / "team/web/v2"
    assert (v1 / "same").read_bytes() == (v2 / "same").read_bytes()
    assert (v1 / "same").stat().st_ino != (v2 / "same").stat().st_ino


def test_every_directory_of_the_mount_is_an_inode_of_its_own(shown: Shown) -> None:
    seen: dict[int, str] = {}
    for folder, folders, _ in os.walk(shown.root):
        with os.scandir(folder) as entries:
            assert all(entry.inode() == entry.stat(follow_symlinks=False).st_ino for entry in entries)
        for name in ([""] if folder == str(shown.root) else []) + folders:
            path = os.path.join(folder, name)
            inode = os.stat(path).st_ino
            assert seen.setdefault(inode, path) == path
    assert len(seen) > 20


def test_comparing_two_tags_reads_nothing_of_the_layers_that_they_share(shown: Shown) -> None:
    v1, v2 = shown.root / "team/web/v1", shown.root / "team/web/v2"
    compared = timed(["diff", "-r", "--no-dereference", v1, v2], ok=1)
    assert [line for line in compared.output.splitlines() if line.startswith(("Only", "diff", "Binary"))] == [
        f"diff -r --no-dereference {v1}/changed {v2}/changed",
        f"Only in {v1}: gone",
        f"Only in {v2}/opaque: new",
        f"Only in {v1}/opaque: old",
    ]
    assert compared.read_bytes < len(_RANDOM) / 10


# -------------------- the kernel


def test_the_mount_is_read_only_safe_and_open_to_all_users(shown: Shown) -> None:
    mount = mounts.find(shown.root)
    assert mount is not None
    assert (mount.fstype, mount.source) == ("fuse.fsmount", "fsmount")
    assert mount.options >= {"ro", "nosuid", "nodev", "default_permissions", "allow_other"}
    read_ahead = Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").read_text()
    assert read_ahead == "1024\n"


@pytest.mark.parametrize(("name", "code"), [("changed", 0), ("shared/0", 0), ("private", 1)])
def test_another_user_may_do_what_the_image_s_modes_say(shown: Shown, name: str, code: int) -> None:
    path = shown.root / "team/web/v1" / name
    done = subprocess.run([*_AS_NOBODY, "cat", path], capture_output=True, timeout=20, check=False)
    assert done.returncode == code
    assert done.stdout == (b"" if code else path.read_bytes())


_CHANGES: dict[str, Callable[[Path], object]] = {
    "create a file": lambda place: (place / "new").write_text(""),
    "make a folder": lambda place: (place / "new").mkdir(),
    "make a symlink": lambda place: (place / "new").symlink_to("x"),
    "make a fifo": lambda place: os.mkfifo(place / "new"),
    "change the mode": lambda place: place.chmod(0o777),
    "change the owner": lambda place: os.chown(place, 1, 1),
    "change the times": lambda place: os.utime(place, (0, 0)),
    "set an attribute": lambda place: os.setxattr(place, "user.a", b""),
    "rename": lambda place: place.rename(place.with_name("new")),
}
_FILE_CHANGES: dict[str, Callable[[Path], object]] = {
    "write": lambda file: file.open("r+b"),
    "append": lambda file: file.open("ab"),
    "truncate": lambda file: os.truncate(file, 0),
    "remove": lambda file: file.unlink(),
    "link": lambda file: file.with_name("new").hardlink_to(file),
    **{
        name: _CHANGES[name] for name in ("change the mode", "change the times", "set an attribute", "rename")
    },
}


@pytest.mark.parametrize("place", ["team", "team/web", "team/web/v1", "team/web/v1/shared"])
def test_no_folder_can_be_changed(shown: Shown, place: str) -> None:
    for change in _CHANGES.values():
        with refused(errno.EROFS):
            change(shown.root / place)


@pytest.mark.parametrize("what", _FILE_CHANGES)
def test_no_file_can_be_changed(shown: Shown, what: str) -> None:
    with refused(errno.EROFS):
        _FILE_CHANGES[what](shown.root / "team/web/v1/changed")


def test_the_file_system_says_that_it_is_read_only_and_has_no_room(shown: Shown) -> None:
    for place in ("", "team/web", "team/web/v1/shared/0"):
        said = os.statvfs(shown.root / place)
        assert said.f_flag & os.ST_RDONLY
        assert (said.f_namemax, said.f_blocks, said.f_bavail) == (255, 0, 0)


# -------------------- coming


def test_a_mount_in_the_background_answers_when_the_command_ends(work: Path) -> None:
    _image(work / "layout", "v1", _says("text"))
    with mounted(work, f"app=oci-layout:{work / 'layout'}") as mountpoint:
        pid = holder(mountpoint)
        assert os.getsid(daemon(mountpoint)) == pid
        assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
        assert (mountpoint / "app/v1/file").read_text() == "text"
        log = work / "cache/log/mount.log"
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
        assert f"serving {mountpoint}" in log.read_text()


def test_a_mount_in_the_foreground_stays_and_logs_to_stderr(work: Path) -> None:
    _image(work / "layout", "v1", _says("text"))
    with _in_foreground(work, "--app", f"app=oci-layout:{work / 'layout'}") as (process, mountpoint):
        assert (mountpoint / "app/v1/file").read_text() == "text"
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert f"serving {mountpoint}".encode() in log
    assert b"SIGINT: unmounting" in log
    assert not (work / "cache/log").exists()


@contextmanager
def _in_foreground(work: Path, *options: str) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    mountpoint = work / "mnt"
    mountpoint.mkdir()
    words = command("mount", mountpoint, "--foreground", *options)
    with subprocess.Popen(words, env=environment(work / "cache"), stderr=subprocess.PIPE) as process:
        try:
            assert wait_until(lambda: mounts.find(mountpoint) or process.poll() is not None)
            yield process, mountpoint
        finally:
            process.terminate()
            take_down(mountpoint)


def test_without_apps_the_mount_is_empty_and_the_log_says_so(work: Path) -> None:
    with mounted(work) as mountpoint:
        assert names(mountpoint) == []
        assert not (mountpoint / "app").exists()
    assert "no apps are configured" in (work / "cache/log/mount.log").read_text()


def test_the_environment_can_say_it_all(work: Path) -> None:
    _image(work / "layout", "v1", _says("text"))
    mountpoint = work / "elsewhere/mnt"
    mountpoint.mkdir(parents=True)
    (work / "config.toml").write_text(
        f'mountpoint = "{mountpoint}"\n[apps.app]\nrepository = "oci-layout:{work / "layout"}"\n'
    )
    variables = {
        "FSMOUNT_CONFIG": str(work / "config.toml"),
        "FSMOUNT_CACHE": str(work / "here"),
        "FSMOUNT_LOG_FILE": str(work / "logs/mount.log"),
    }
    try:
        done = subprocess.run(
            command("mount"), env={**environment(work), **variables}, capture_output=True, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert (mountpoint / "app/v1/file").read_text() == "text"
        assert (work / "here/state.sqlite").exists()
        assert "serving" in (work / "logs/mount.log").read_text()
    finally:
        take_down(mountpoint)


def test_a_second_mount_at_the_same_place_is_refused_and_the_first_goes_on(work: Path) -> None:
    _image(work / "layout", "v1", _says("text"))
    app = f"app=oci-layout:{work / 'layout'}"
    with mounted(work, app) as mountpoint:
        (work / "link").symlink_to(mountpoint)
        for place in (mountpoint, work / "link"):
            done = fsmount("mount", place, "--app", app, cache=work / "cache", code=9)
            assert b"already mounted" in done.stderr
            assert b"fsmount unmount" in done.stderr
        assert (mountpoint / "app/v1/file").read_text() == "text"
        assert len([mount for mount in mounts.mounted() if mount.mountpoint == mountpoint]) == 1


def test_what_is_left_when_a_process_and_its_holder_were_killed_is_cleared_by_the_next(work: Path) -> None:
    _image(work / "layout", "v1", _says("text"))
    app = f"app=oci-layout:{work / 'layout'}"
    with mounted(work, app) as mountpoint:
        kill(mountpoint)
        with refused(errno.ENOTCONN):
            os.stat(mountpoint)
        fsmount("mount", mountpoint, "--app", app, cache=work / "cache")
        assert (mountpoint / "app/v1/file").read_text() == "text"
        assert len([mount for mount in mounts.mounted() if mount.mountpoint == mountpoint]) == 1
        kill(mountpoint)
        fsmount("unmount", mountpoint, cache=work / "cache")
        assert mounts.find(mountpoint) is None
        assert names(mountpoint) == []


def _other_user_s_cache(work: Path) -> list[str | Path]:
    (work / "cache").mkdir()
    os.chown(work / "cache", _NOBODY, _NOBODY)
    return [work / "mnt"]


def _no_mountpoint(work: Path) -> list[str | Path]:
    return [work / "missing"]


def _a_file(work: Path) -> list[str | Path]:
    (work / "file").touch()
    return [work / "file"]


def _bad_app(work: Path) -> list[str | Path]:
    return [work / "mnt", "--app", "a/b=registry.example.com/x", "--app", "a=registry.example.com/y"]


@pytest.mark.parametrize(
    ("arrange", "code", "said"),
    [
        (_other_user_s_cache, 9, "belongs to user 65534"),
        (_no_mountpoint, 2, "mkdir -p"),
        (_a_file, 2, "not a directory"),
        (_bad_app, 2, "inside the app a"),
    ],
)
def test_a_start_that_fails_in_the_background_tells_why_and_leaves_nothing(
    work: Path, arrange: Callable[[Path], list[str | Path]], code: int, said: str
) -> None:
    (work / "mnt").mkdir()
    done = fsmount("mount", *arrange(work), cache=work / "cache", code=code)
    message = done.stderr.decode()
    assert said in message
    assert message.count("fsmount: error:") == 1
    assert "Traceback" not in message
    assert mounts.find(work / "mnt") is None
    assert wait_until(lambda: not daemons(work / "mnt"))


# -------------------- going


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_takes_the_mount_down_also_while_it_is_used(work: Path, number: signal.Signals) -> None:
    _image(work / "layout", "v1", _says("text"))
    with (
        mounted(work, f"app=oci-layout:{work / 'layout'}") as mountpoint,
        (mountpoint / "app/v1/file").open() as file,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=mountpoint / "app/v1/folder"),
    ):
        os.kill(daemon(mountpoint), number)
        assert wait_until(lambda: not daemons(mountpoint))
        assert mounts.find(mountpoint) is None
        with refused(errno.ENOTCONN):
            os.fstatvfs(file.fileno())
    assert f"{number.name}: unmounting" in (work / "cache/log/mount.log").read_text()
    assert f"unmounted {mountpoint}" in (work / "cache/log/mount.log").read_text()


def test_unmount_ends_the_process_and_says_when_there_is_nothing(work: Path) -> None:
    cache = work / "cache"
    with mounted(work) as mountpoint:
        done = fsmount("unmount", mountpoint, cache=cache)
        assert (done.stdout, done.stderr) == (b"", b"")
        assert mounts.find(mountpoint) is None
        assert wait_until(lambda: not daemons(mountpoint))
        assert b"nothing is mounted" in fsmount("unmount", mountpoint, cache=cache, code=3).stderr


def test_a_busy_mount_is_unmounted_only_lazily_and_lives_as_long_as_its_user(work: Path) -> None:
    _image(work / "layout", "v1", _says("text"))
    with mounted(work, f"app=oci-layout:{work / 'layout'}") as mountpoint:
        folder = mountpoint / "app/v1/folder"
        user = subprocess.Popen(
            ["sh", "-c", "read go; cat ../file"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder
        )
        try:
            refusal = fsmount("unmount", mountpoint, cache=work / "cache", code=9).stderr.decode()
            assert f"in use by sh ({user.pid})" in refusal
            assert "--lazy" in refusal
            assert (mountpoint / "app/v1/file").read_text() == "text"
            fsmount("unmount", "--lazy", mountpoint, cache=work / "cache")
            assert mounts.find(mountpoint) is None
            assert daemons(mountpoint)
        finally:
            said, _ = user.communicate(b"\n", timeout=20)
        assert said == b"text"
        assert wait_until(lambda: not daemons(mountpoint))


# -------------------- staying the same


def _retag(layout: Path, **tags: str) -> None:
    """Has a layout hold these tags and no others, each of an image that says a text."""
    (layout / "index.json").unlink(missing_ok=True)
    for tag, text in tags.items():
        _image(layout, tag, _says(text))


@contextmanager
def _refreshed(work: Path) -> Iterator[Path]:
    """The folder of an app that looks after its tags all the time."""
    config = f'[apps.app]\nrepository = "oci-layout:{work / "layout"}"\nrefresh = "200ms"\n'
    with mounted(work, config=config) as mountpoint:
        yield mountpoint / "app"


def test_a_tag_that_moves_shows_its_new_tree_and_who_is_in_the_old_one_stays_there(work: Path) -> None:
    _retag(work / "layout", latest="old")
    with _refreshed(work) as app:
        latest = app / "latest"
        inode = latest.stat().st_ino
        user = subprocess.Popen(
            ["sh", "-c", "read go; cat ../file; ls; ls .."],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=latest / "folder",
        )
        try:
            with (latest / "file").open() as file:
                _retag(work / "layout", latest="new", v2="new")
                assert wait_until(lambda: (latest / "file").read_text() == "new")
                assert file.read() == "old"
        finally:
            said, _ = user.communicate(b"\n", timeout=20)
        assert said.split() == [b"oldold", b"file", b"folder"]
        assert names(latest / "folder") == ["new"]
        assert latest.stat().st_ino != inode
        assert (app / "v2/file").samefile(latest / "file")
        assert wait_until(lambda: names(app) == ["latest", "v2"])


def test_a_tag_that_is_gone_does_not_exist_whether_it_was_entered_or_not(work: Path) -> None:
    _retag(work / "layout", untouched="old", entered="old", stays="old", third="old")
    with _refreshed(work) as app:
        assert names(app) == ["entered", "stays", "third", "untouched"]
        assert (app / "entered/file").read_text() == "old"
        _retag(work / "layout", stays="old", third="old")
        for tag in ("entered", "untouched"):
            assert wait_until(lambda tag=tag: not (app / tag).exists(), seconds=5), tag
        _retag(work / "layout", stays="old")
        assert wait_until(lambda: names(app) == ["stays"])
        assert wait_until(lambda: not (app / "third").exists(), seconds=5)
        assert (app / "stays/file").read_text() == "old"


class _Dirent(ctypes.Structure):
    _fields_ = (
        ("ino", ctypes.c_uint64),
        ("off", ctypes.c_int64),
        ("reclen", ctypes.c_uint16),
        ("type", ctypes.c_uint8),
    )


def _listing(folder: Path, after: int = 0) -> list[tuple[bytes, int, int]]:
    """What readdir(3) gives from a place that telldir(3) may have given: (name, inode, place after it)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = ctypes.c_void_p
    libc.readdir.restype = ctypes.POINTER(_Dirent)
    stream = ctypes.c_void_p(libc.opendir(os.fsencode(folder)))
    assert stream.value
    try:
        libc.seekdir(stream, ctypes.c_long(after))
        found = []
        while entry := libc.readdir(stream):
            name = ctypes.string_at(ctypes.addressof(entry.contents) + 19)
            found.append((name, entry.contents.ino, entry.contents.off))
        return found
    finally:
        libc.closedir(stream)


def test_inodes_and_half_read_listings_are_the_same_after_a_restart(work: Path) -> None:
    wide = (Member(b"wide/%03d" % number, b"%d" % number) for number in range(500))
    layer = _layer(Member(b"top", b"top"), *wide)
    for tag in ("v1", "v2", "main"):
        _image(work / "layout", tag, layer, _says(tag))
    apps = [f"{name}=oci-layout:{work / 'layout'}" for name in ("app", "team/web", "team/api")]
    places = ["", "team", "app", "app/v1", "app/v1/wide", "team/api/main", "team/api/main/folder"]
    with mounted(work, *apps) as mountpoint:
        before = {place: _listing(mountpoint / place) for place in places}
        whole = _inodes(mountpoint)
    # Others come first this time.
    with mounted(work, "new=oci-layout:/nowhere", *reversed(apps)) as mountpoint:
        (mountpoint / "team/web/v2/top").stat()
        for place in reversed(places[1:]):
            assert _listing(mountpoint / place) == before[place]
            for stop in {1, len(before[place]) // 2 or 1, len(before[place])}:
                seen, rest = before[place][:stop], before[place][stop:]
                assert _listing(mountpoint / place, after=seen[-1][2]) == rest
        assert {path: inode for path, inode in _inodes(mountpoint).items() if path != "new"} == whole


def _inodes(mountpoint: Path) -> dict[str, int]:
    """All inodes of a mount, by path; of `new` only its own."""
    found = {".": mountpoint.stat().st_ino}
    for folder, folders, files in os.walk(mountpoint):
        folders[:] = [name for name in folders if name != "new" or Path(folder) != mountpoint]
        for name in folders + files:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, mountpoint)] = os.lstat(path).st_ino
    return found


def test_two_mounts_share_one_cache_at_the_same_time(work: Path) -> None:
    content = Random(4).randbytes(9_000_000)
    _image(
        work / "layout", "v1", peers.pack(archive(Member(b"first", b"first"), Member(b"big", content)), "tar")
    )
    app, cache = f"app=oci-layout:{work / 'layout'}", work / "cache"
    (work / "one").mkdir()
    (work / "two").mkdir()
    with mounted(work / "one", app, cache=cache) as one:
        with mounted(work / "two", app, cache=cache) as two, ThreadPoolExecutor(8) as pool:
            for mountpoint in (one, two):
                assert names(mountpoint / "app") == ["v1"]
            files = [mountpoint / "app/v1/big" for mountpoint in (one, two)] * 4
            assert [data == content for data in pool.map(Path.read_bytes, files)] == [True] * 8
            for path in (".", "app", "app/v1", "app/v1/big", "app/v1/first"):
                assert (one / path).stat().st_ino == (two / path).stat().st_ino
        assert (one / "app/v1/first").read_text() == "first"


# -------------------- an ordinary user


@pytest.mark.parametrize("others", [False, True], ids=["alone", "with user_allow_other"])
def test_an_ordinary_user_mounts_and_unmounts(work: Path, others: bool) -> None:
    _image(work / "layout", "v1", _says("text"))
    home, mountpoint, device, conf = (work / name for name in ("home", "mnt", "fuse", "fuse.conf"))
    for folder in (home, mountpoint):
        folder.mkdir()
        os.chown(folder, _NOBODY, _NOBODY)
    # On some machines /dev/fuse is for root alone: the user gets one of their own, in a mount namespace.
    os.mknod(device, stat.S_IFCHR, os.makedev(10, 229))
    device.chmod(0o666)
    conf.write_text("user_allow_other\n" if others else "")
    bind = 'mount --bind "$0" /dev/fuse && mount --bind "$1" /etc/fuse.conf && shift && exec "$@"'
    # The interpreter may live in root's home.
    as_nobody = (*_AS_NOBODY, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")

    def run(*words: str | Path) -> tuple[int, str, str]:
        variables = {"HOME": str(home), "PATH": "/usr/bin:/bin", "FSMOUNT_CONFIG": "/dev/null"}
        done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout, done.stderr

    app = f"app=oci-layout:{work / 'layout'}"
    try:
        unshare = ("unshare", "--mount", "sh", "-c", bind, device, conf)
        assert run(*unshare, *as_nobody, *command("mount", mountpoint, "--app", app)) == (0, "", "")
        inside = ("nsenter", f"--target={daemon(mountpoint)}", "--mount")
        cat = ("cat", mountpoint / "app/v1/file")
        assert run(*inside, *as_nobody, *cat) == (0, "text", "")
        assert run(*inside, *cat)[:2] == ((0, "text") if others else (1, ""))
        _, mountinfo, _ = run(*inside, "cat", "/proc/self/mountinfo")
        (mount,) = [one for one in mounts.parse(mountinfo.encode()) if one.mountpoint == mountpoint]
        assert mount.fstype == "fuse.fsmount"
        assert mount.options >= {"ro", "nosuid", "nodev", f"user_id={_NOBODY}"}
        assert ("allow_other" in mount.options) == others
        assert (home / ".cache/fsmount/log/mount.log").stat().st_uid == _NOBODY
        assert run(*inside, *as_nobody, *command("unmount", mountpoint)) == (0, "", "")
        assert wait_until(lambda: not daemons(mountpoint))
    finally:
        for pid in daemons(mountpoint):
            os.kill(pid, signal.SIGTERM)
        assert wait_until(lambda: not daemons(mountpoint))
