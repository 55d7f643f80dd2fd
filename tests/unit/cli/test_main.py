import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fsmount import errors
from fsmount.cli import main as main_module
from fsmount.cli.main import COMMANDS, fsmount, main
from fsmount.fuse import mounts


@pytest.fixture
def outcome(monkeypatch, capsys):
    """Runs a command whose function raises an error: its exit code and what it wrote to stderr."""

    def outcome(error):
        @click.command()
        def failing():
            raise error

        monkeypatch.setattr(main_module._Commands, "get_command", lambda self, context, name: failing)
        code = main(["failing"])
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    monkeypatch.delenv("FSMOUNT_DEBUG", raising=False)
    return outcome


def kinds(root=errors.FsmountError):
    return [root, *(kind for inner in root.__subclasses__() for kind in kinds(inner))]


@pytest.mark.parametrize("kind", kinds())
def test_an_error_we_can_name_is_told_with_its_remedy_and_ends_with_its_exit_code(outcome, kind):
    code, err = outcome(kind("the thing is wrong", remedy="Make it right."))
    assert err == "fsmount: error: the thing is wrong\nMake it right.\n"
    assert code == kind.exit_code


def test_an_error_alone_in_groups_is_told_as_itself(outcome):
    group = ExceptionGroup("nursery", [ExceptionGroup("nursery", [errors.NotFound("no such tag")])])
    assert outcome(group) == (4, "fsmount: error: no such tag\n")


def test_several_errors_in_a_group_are_all_told(outcome):
    code, err = outcome(ExceptionGroup("nursery", [errors.NotFound("no such tag"), ValueError("odd")]))
    assert code == 4
    assert err.splitlines()[:2] == [
        "fsmount: error: no such tag",
        "fsmount: error: unforeseen ValueError: odd",
    ]


def test_an_unforeseen_error_is_one_line_and_how_to_see_more(outcome):
    code, err = outcome(KeyError("oops"))
    assert code == 1
    assert err == "fsmount: error: unforeseen KeyError: 'oops'\nSet FSMOUNT_DEBUG=1 for the traceback.\n"


def test_FSMOUNT_DEBUG_shows_the_traceback(outcome, monkeypatch):
    monkeypatch.setenv("FSMOUNT_DEBUG", "1")
    code, err = outcome(KeyError("oops"))
    assert code == 1
    assert "Traceback (most recent call last)" in err
    assert err.endswith("fsmount: error: unforeseen KeyError: 'oops'\n")


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), click.Abort(), BaseExceptionGroup("nursery", [KeyboardInterrupt(), ValueError()])],
)
def test_an_interrupt_is_silent_and_130(outcome, error):
    assert outcome(error) == (130, "")


def test_what_a_message_quotes_cannot_steer_the_terminal(outcome):
    assert outcome(errors.NotFound("no tag \x1b]0;owned\x07")) == (
        4,
        "fsmount: error: no tag \\033]0;owned\\007\n",
    )


def test_an_exit_code_of_a_command_is_that_of_fsmount(outcome):
    assert outcome(click.exceptions.Exit(1)) == (1, "")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["vresion"], "there is no command 'vresion'; did you mean version?\nTry 'fsmount --help'."),
        (["xyzzy"], "there is no command 'xyzzy'\nTry 'fsmount --help'."),
        (["version", "--nope"], "No such option '--nope'.\nTry 'fsmount version --help'."),
        (["unmount"], "Missing argument 'MOUNTPOINT'.\nTry 'fsmount unmount --help'."),
    ],
)
def test_a_command_line_that_is_not_understood_is_told_in_our_form_and_2(capsys, arguments, message):
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"fsmount: error: {message}\n"


@pytest.mark.parametrize("arguments", [[], ["config"]])
def test_without_a_command_the_help_is_shown_and_2(capsys, arguments):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("Usage: fsmount")


def test_the_version_is_told(capsys):
    assert main(["version"]) == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "fsmount 0.1.0\n" * 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_help_is_there_and_has_help_of_its_own(capsys, name):
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: fsmount {name} ")
    with click.Context(fsmount) as context:
        assert fsmount.get_command(context, name).name == name


def test_the_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


class TestConfigCheck:
    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch):
        monkeypatch.setattr("fsmount.configfile.SYSTEM_FILE", Path("/nonexistent"))
        for name in ("FSMOUNT_CONFIG", "FSMOUNT_CACHE"):
            monkeypatch.delenv(name, raising=False)

    def test_it_shows_what_is_in_force(self, capsys, tmp_path):
        file = tmp_path / "config.toml"
        file.write_text(
            '[cache]\nsize = "1.5 TB"\nmax_layer_size = "5 GB"\n[defaults]\nplatform = "linux/arm64"\n'
            '[apps.web]\nrepository = "registry.example.com/team/web"\npath = "/dist"\ntags = ["v*", "main"]\n'
            '[registries."localhost:5000"]\nplain_http = true\n'
        )
        assert (
            main(["config", "check", "--config", str(file), "--cache", "/c", "--app", "b=a.example/b"]) == 0
        )
        assert capsys.readouterr().out == (
            f"{file}: ok\n"
            "mountpoint  /srv/artifacts\n"
            "cache       /c, 1.5 TB\n"
            "            layers up to 5 GB\n"
            "app         b: a.example/b, folder /, linux/arm64\n"
            "            tags *, looked for every 60 s\n"
            "app         web: registry.example.com/team/web, folder /dist, linux/arm64\n"
            "            tags v* main, looked for every 60 s\n"
            "registry    localhost:5000: plain HTTP\n"
        )

    def test_without_a_file_it_says_so(self, capsys, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        assert main(["config", "check"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "no configuration file; the built-in defaults: ok",
            "mountpoint  /srv/artifacts",
            "cache       /var/cache/fsmount, 20 GB",
            'no apps: add [apps.NAME] with repository = "...", or use --app',
        ]

    def test_it_reads_the_file_and_the_cache_of_the_environment(self, capsys, monkeypatch, tmp_path):
        file = tmp_path / "config.toml"
        file.write_text('mountpoint = "/m"')
        monkeypatch.setenv("FSMOUNT_CONFIG", str(file))
        monkeypatch.setenv("FSMOUNT_CACHE", "/fast")
        assert main(["config", "check"]) == 0
        assert capsys.readouterr().out.splitlines()[:3] == [
            f"{file}: ok",
            "mountpoint  /m",
            "cache       /fast, 20 GB",
        ]

    def test_what_is_wrong_is_told_and_2(self, capsys, tmp_path):
        file = tmp_path / "config.toml"
        file.write_text("[cache]\nsiez = 1\n")
        assert main(["config", "check", "--config", str(file)]) == 2
        assert capsys.readouterr().err == (
            f"fsmount: error: {file}:2: cache.siez: unknown key; did you mean size?\n"
        )

    @pytest.mark.parametrize("given, reason", [(["web"], "has no '='"), (["a=b", "a=c"], "is given twice")])
    def test_an_app_option_that_is_not_understood_is_told(self, capsys, given, reason):
        assert main(["config", "check", *(word for app in given for word in ("--app", app))]) == 2
        assert reason in capsys.readouterr().err


def test_unmount_takes_a_mount_away(monkeypatch):
    calls = []
    monkeypatch.setattr(mounts, "unmount", lambda mountpoint, *, lazy: calls.append((mountpoint, lazy)))
    assert main(["unmount", "/srv/artifacts"]) == 0
    assert main(["unmount", "--lazy", "/m"]) == 0
    assert calls == [(Path("/srv/artifacts"), False), (Path("/m"), True)]


def test_unmount_of_what_is_not_mounted_is_3(capsys, tmp_path):
    assert main(["unmount", str(tmp_path)]) == 3
    assert capsys.readouterr().err == f"fsmount: error: nothing is mounted at {tmp_path}\n"


def test_NO_COLOR_turns_colour_off_for_every_command(monkeypatch):
    colours = []

    @click.command()
    @click.pass_context
    def painted(context):
        colours.append(context.color)

    monkeypatch.setattr(main_module._Commands, "get_command", lambda self, context, name: painted)
    monkeypatch.setenv("NO_COLOR", "1")
    main(["painted"])
    monkeypatch.setenv("NO_COLOR", "")
    main(["painted"])
    assert colours == [False, None]


def test_a_reader_that_went_away_is_silent_and_141():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "fsmount", "version"], stdout=pipe, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (141, b"")
