"""A running mount that is told to look for tags that moved, and to take over another configuration."""

import errno
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import peers
from tests.fakes.tar import DIRECTORY, Member, archive
from tests.integration.program import daemon, fsmount, mounted, run, wait_until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.mount,
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs /dev/fuse"),
]


@pytest.fixture
def work() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="mount-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def put(layout: Path, **tags: str) -> None:
    """Has a layout hold these tags and no others, each of an image whose file says a text."""
    (layout / "index.json").unlink(missing_ok=True)
    for tag, text in tags.items():
        tar = archive(Member(b"folder/", type=DIRECTORY), Member(b"folder/file", text.encode()))
        peers.tar_layer_image(layout, tag, [peers.pack(tar)])


def config(work: Path, *apps: str, refresh: str = "1h", more: str = "") -> str:
    tables = "".join(f'[apps.{app}]\nrepository = "oci-layout:{work / app}"\n' for app in apps)
    return f'[defaults]\nrefresh = "{refresh}"\n{more}\n{tables}'


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_first_look_after_a_refresh_finds_what_has_moved_come_and_gone(work: Path) -> None:
    put(work / "web", main="old", v1="one", v2="two")
    with mounted(work, config=config(work, "web")) as mountpoint:
        web = mountpoint / "web"
        assert names(web) == ["main", "v1", "v2"]
        for tag in ("main", "v1", "v2"):
            assert (web / tag / "folder/file").read_text() in ("old", "one", "two")
        assert not (web / "v3").exists()
        user = subprocess.Popen(
            ["sh", "-c", "read go; cat file"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=web / "main/folder",
        )
        with (web / "main/folder/file").open() as file:
            put(work / "web", main="new", v1="one", v3="three")
            said = fsmount("refresh", "web", "--mountpoint", mountpoint, cache=work / "cache").stdout.decode()
            # No waiting here: the kernel has forgotten what it knew.
            assert (web / "main/folder/file").read_text() == "new"
            assert (web / "v3/folder/file").read_text() == "three"
            assert not (web / "v2").exists()
            assert names(web) == ["main", "v1", "v3"]
            assert file.read() == "old"
        assert user.communicate(b"\n", timeout=20)[0] == b"old"
        lines = said.splitlines()
        assert lines[0].startswith("web:main has moved from sha256:")
        assert lines[1:] == ["web:v3 is new", "web:v2 is gone"]
        put(work / "web", main="newer", v1="other", v3="three")
        fsmount("refresh", "web:main", "--mountpoint", mountpoint, cache=work / "cache")
        assert (web / "main/folder/file").read_text() == "newer"
        assert (web / "v1/folder/file").read_text() == "one", "nobody has asked for that one"
        done = run("refresh", "blog", "--mountpoint", mountpoint, cache=work / "cache")
        assert (done.returncode, b"there is no app 'blog'" in done.stderr) == (4, True)


@pytest.mark.parametrize("by", ["command", "SIGHUP"])
def test_a_mount_takes_over_another_configuration_and_who_is_in_it_goes_on(work: Path, by: str) -> None:
    for app in ("web", "blog", "news"):
        put(work / app, v1=app)
    log = work / "log"

    def reload(text: str, *, code: int = 0) -> str:
        """Returns what is said."""
        (work / "config.toml").write_text(text)
        before = log.stat().st_size
        if by == "command":
            done = run("reload", mountpoint, cache=work / "cache")
            assert done.returncode == code
            return (done.stdout + done.stderr).decode()
        os.kill(daemon(mountpoint), signal.SIGHUP)
        assert wait_until(lambda: "configuration is" in log.read_text()[before:])
        return log.read_text()[before:]

    with mounted(work, config=config(work, "web", "blog"), flags=("--log-file", log)) as mountpoint:
        pid = daemon(mountpoint)
        assert names(mountpoint) == ["blog", "web"]
        inode = (mountpoint / "web/v1").stat().st_ino
        with (mountpoint / "blog/v1/folder/file").open() as file:
            said = reload(config(work, "web", "news"))
            assert "news" in said and "blog" in said
            assert wait_until(lambda: names(mountpoint) == ["news", "web"])
            assert (mountpoint / "news/v1/folder/file").read_text() == "news"
            assert wait_until(lambda: not (mountpoint / "blog").exists())
            assert file.read() == "blog"
        assert (mountpoint / "web/v1").stat().st_ino == inode
        said = reload('[apps.web]\nrepository = 5\nrefresh = "no"\n', code=2)
        assert "config.toml:2" in said and "config.toml:3" in said
        assert names(mountpoint) == ["news", "web"]
        assert daemon(mountpoint) == pid


def test_what_is_below_an_app_that_was_removed_survives_its_process_too(work: Path) -> None:
    for app in ("web", "blog"):
        put(work / app, v1=app)
    with mounted(work, config=config(work, "web", "blog")) as mountpoint:
        user = subprocess.Popen(
            ["sh", "-c", "read go; ls . ..; cat file"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=mountpoint / "blog/v1/folder",
        )
        assert (mountpoint / "blog/v1/folder/file").read_text() == "blog"
        (work / "config.toml").write_text(config(work, "web"))
        fsmount("reload", mountpoint, cache=work / "cache")
        shutil.rmtree(work / "blog")
        pid = daemon(mountpoint)
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: _other(mountpoint, pid))
        with pytest.raises(OSError) as caught:
            os.stat(mountpoint / "blog")
        assert caught.value.errno == errno.ENOENT
        said, _ = user.communicate(b"\n", timeout=20)
        assert said.split() == [b".:", b"file", b"..:", b"folder", b"blog"]


def _other(mountpoint: Path, pid: int) -> bool:
    """Whether another process serves the mount than before."""
    try:
        return daemon(mountpoint) != pid
    except ValueError:
        return False
