"""mount.fsmount: what lines of fstab come to."""

import sys

import click
import pytest

from fsmount.cli import main as main_module
from fsmount.cli.mount_helper import main, translate
from fsmount.errors import UsageError

WEB = "web=registry.example.com/team/web"


def command(options, spec="fsmount"):
    """What fsmount is told, without what is always so."""
    request = translate([spec, "/srv/artifacts", "-o", options])
    assert request.command[0] == "mount"
    assert request.command[-2:] == ["--", "/srv/artifacts"]
    return request.command[1:-2]


@pytest.mark.parametrize(
    "options, expected",
    [
        ("rw", []),
        (f"rw,app={WEB}", ["--app", WEB]),
        (f"app={WEB},app=a=r.example/a", ["--app", WEB, "--app", "a=r.example/a"]),
        ("config=/etc/x.toml,cache=/var/c", ["--config", "/etc/x.toml", "--cache", "/var/c"]),
        ('app="a=oci-layout:/builds, old",ro', ["--app", "a=oci-layout:/builds, old"]),
    ],
)
def test_its_own_options_are_those_of_fsmount_mount(options, expected):
    assert command(options) == expected


@pytest.mark.parametrize(
    "options",
    [
        "rw,noatime,_netdev,nofail,allow_other",
        "rw,exec,nosuid,nodev,user",
        "defaults,ro,x-systemd.requires=a,X-mount.mkdir=0755,comment=mine",
    ],
)
def test_what_mount_and_systemd_say_to_each_other_is_passed_over(options):
    assert command(options) == []


@pytest.mark.parametrize("option", ["suid", "dev", "noexec", "remount"])
@pytest.mark.parametrize("flags", [[], ["-s"]])
def test_what_somebody_would_rely_on_in_vain_is_refused_even_if_mount_is_sloppy(option, flags):
    with pytest.raises(UsageError, match=f"the option {option} is not possible"):
        translate(["fsmount", "/srv", *flags, "-o", f"rw,{option}"])


def test_an_unknown_option_is_refused_and_passed_over_if_mount_is_sloppy():
    with pytest.raises(UsageError, match="the option uid=5 is unknown"):
        translate(["fsmount", "/srv", "-o", "uid=5"])
    assert translate(["fsmount", "/srv", "-s", "-o", "uid=5"]).command == ["mount", "--", "/srv"]


@pytest.mark.parametrize("option", ["app", "app=", "config=", "cache"])
def test_an_option_without_its_value_is_refused(option):
    with pytest.raises(UsageError, match="has no value"):
        command(option)


@pytest.mark.parametrize(
    "spec, options, expected",
    [
        ("fsmount", "rw", []),
        ("none", "rw", []),
        ("/etc/fsmount/other.toml", "rw", ["--config", "/etc/fsmount/other.toml"]),
        ("registry.example.com/team/web", "rw", ["--app", WEB]),
        ("registry.example.com/team", "rw,app=web", ["--app", WEB]),
        ("registry.example.com/team/", "app=web,app=b=r.example/b", ["--app", WEB, "--app", "b=r.example/b"]),
    ],
)
def test_the_first_field_says_where_the_apps_are(spec, options, expected):
    assert command(options, spec) == expected


@pytest.mark.parametrize("spec", ["", "/", "/home/me/fsmount", "web", "registry.example.com/"])
def test_a_first_field_that_says_nothing_is_refused(spec):
    with pytest.raises(UsageError, match="is no configuration"):
        command("rw", spec)


def test_an_app_has_a_repository():
    with pytest.raises(UsageError, match="the app web has no repository"):
        command("app=web")


def test_a_mount_point_is_no_option_however_it_begins():
    assert translate(["fsmount", "-v", "/-x"]).command == ["mount", "--", "/-x"]


@pytest.mark.parametrize(
    "arguments, fake, verbose",
    [
        (["-f"], True, False),
        (["-n", "-v", "-o", "rw"], False, True),
        (["-fnv", "-orw", "-t", "fsmount"], True, True),
        (["-vo", "rw,noatime"], False, True),
    ],
)
def test_the_flags_are_those_that_mount_passes(arguments, fake, verbose):
    request = translate(["fsmount", "/srv", *arguments])
    assert (request.is_fake, request.is_verbose) == (fake, verbose)


@pytest.mark.parametrize(
    "arguments", [[], ["fsmount"], ["a", "b", "c"], ["a", "b", "-N", "1"], ["a", "b", "-o"]]
)
def test_other_arguments_are_refused(arguments):
    with pytest.raises(UsageError):
        translate(arguments)


class TestTheProgram:
    @pytest.fixture
    def run(self, monkeypatch, capsys):
        """Its exit code and output, when `fsmount mount` ends with `code`."""

        def run(*arguments, code=0):
            @click.command(context_settings={"ignore_unknown_options": True})
            @click.argument("words", nargs=-1)
            def mount(words):
                click.echo(" ".join(words))
                raise click.exceptions.Exit(code)

            monkeypatch.setattr(main_module._Commands, "get_command", lambda self, context, name: mount)
            monkeypatch.setattr(sys, "argv", ["mount.fsmount", *arguments])
            return main(), *capsys.readouterr()

        return run

    def test_it_mounts(self, run):
        assert run("fsmount", "/srv", "-o", f"rw,app={WEB}") == (0, f"--app {WEB} /srv\n", "")

    def test_told_only_to_look_it_mounts_nothing(self, run):
        assert run("fsmount", "/srv", "-f") == (0, "", "")
        assert run("fsmount", "/srv", "-fv") == (0, "mount.fsmount: fsmount mount -- /srv\n", "")

    @pytest.mark.parametrize("code, expected", [(0, 0), (1, 32), (2, 1), (6, 32), (9, 32), (130, 8)])
    def test_its_exit_codes_are_those_of_mount(self, run, code, expected):
        assert run("fsmount", "/srv", code=code)[0] == expected

    def test_what_is_not_understood_is_told_and_1(self, run):
        code, out, err = run("fsmount", "/srv", "-o", "uid=5")
        assert (code, out) == (1, "")
        assert err.startswith("mount.fsmount: the option uid=5 is unknown\n")
