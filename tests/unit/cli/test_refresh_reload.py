"""What `fsmount refresh` and `fsmount reload` ask of a mount, and what they say."""

import json
from pathlib import Path

import pytest

from fsmount.cli import refresh as refresh_module
from fsmount.cli import reload as reload_module
from fsmount.cli.main import main
from fsmount.errors import NotRunning, UsageError

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64
NOTHING = {"moved": [], "appeared": [], "gone": [], "failures": [], "asked": 3}


class Mount:
    """A mount that answers what the test says."""

    def __init__(self) -> None:
        self.asked: list[tuple[Path, str, bytes | None]] = []
        self.answer: object = NOTHING

    def ask(self, mountpoint: Path, path: str, body: bytes | None = None) -> bytes:
        self.asked.append((mountpoint, path, body))
        if isinstance(self.answer, Exception):
            raise self.answer
        return json.dumps(self.answer).encode()


@pytest.fixture
def mount(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mount:
    mount = Mount()
    for module in (refresh_module, reload_module):
        monkeypatch.setattr(module, "ask", mount.ask)
    config = tmp_path / "config.toml"
    config.write_text('mountpoint = "/srv/configured"\n')
    monkeypatch.setenv("FSMOUNT_CONFIG", str(config))
    return mount


@pytest.mark.parametrize(
    ("words", "mountpoint", "what"),
    [
        ([], "/srv/configured", ""),
        (["web"], "/srv/configured", "web"),
        (["team/web:v1", "--mountpoint", "/mnt"], "/mnt", "team/web:v1"),
    ],
)
def test_a_refresh_is_asked_of_the_mount_that_is_meant(
    mount: Mount, words: list[str], mountpoint: str, what: str
) -> None:
    assert main(["refresh", *words]) == 0
    ((where, path, body),) = mount.asked
    assert (where, path) == (Path(mountpoint), "/refresh")
    assert json.loads(body or b"") == {"what": what}


def test_a_refresh_says_what_has_moved_come_and_gone(
    mount: Mount, capsys: pytest.CaptureFixture[str]
) -> None:
    mount.answer = NOTHING | {
        "moved": [{"app": "web", "tag": "main", "before": ONE, "digest": TWO}],
        "appeared": [{"app": "web", "tag": "v2"}],
        "gone": [{"app": "blog", "tag": "v\x1b[31m"}],
    }
    assert main(["refresh"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "web:main has moved from sha256:111111111111 to sha256:222222222222",
        "web:v2 is new",
        "blog:v\\033[31m is gone",
    ]
    mount.answer = NOTHING
    assert main(["refresh"]) == 0
    assert capsys.readouterr().out == "nothing has changed; 3 tags were looked after one by one\n"


def test_what_a_refresh_could_not_find_out_is_an_error(
    mount: Mount, capsys: pytest.CaptureFixture[str]
) -> None:
    mount.answer = NOTHING | {
        "appeared": [{"app": "web", "tag": "v2"}],
        "failures": [
            {"app": "blog", "tag": None, "message": "it is away", "exit_code": 6},
            {"app": "web", "tag": "v1", "message": "no", "exit_code": 5},
        ],
    }
    assert main(["refresh"]) == 6
    out, err = capsys.readouterr()
    assert out == "web:v2 is new\n"
    assert err == "blog is as it was: it is away\nweb:v1 is as it was: no\n"


def test_a_reload_says_what_is_another_now(mount: Mount, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = {"added": [], "removed": [], "changed": [], "settings": [], "needs_restart": []}
    mount.answer = nothing
    assert main(["reload"]) == 0
    assert mount.asked == [(Path("/srv/configured"), "/reload", b"{}")]
    assert capsys.readouterr().out == "nothing has changed\n"
    mount.answer = nothing | {
        "added": ["a", "b"],
        "settings": ["cache.size"],
        "needs_restart": ["cache.path"],
    }
    assert main(["reload", "/mnt"]) == 0
    assert mount.asked[1][0] == Path("/mnt")
    assert capsys.readouterr().out.splitlines() == [
        "added: a, b",
        "in force: cache.size",
        "only after a restart: cache.path",
    ]


@pytest.mark.parametrize("command", ["refresh", "reload"])
def test_an_error_of_the_mount_is_the_command_s(
    mount: Mount, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    mount.answer = UsageError("f.toml:3: size: no\nf.toml:4: path: no", remedy="Write another.")
    assert main([command]) == 2
    assert "f.toml:3: size: no\nf.toml:4: path: no\nWrite another." in capsys.readouterr().err
    mount.answer = NotRunning("nothing is mounted")
    assert main([command]) == 3
