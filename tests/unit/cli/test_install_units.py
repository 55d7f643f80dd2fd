"""fsmount install-units: what it writes, what it leaves alone, and what it takes away."""

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fsmount.cli import install_units as installer
from fsmount.cli.main import main

SERVICE = "etc/systemd/system/fsmount.service"
WAIT = "etc/systemd/system/fsmount-wait@.service"
CONFIG = "etc/fsmount/config.toml"
HELPER = "sbin/mount.fsmount"
FILES = {SERVICE, WAIT, "etc/tmpfiles.d/fsmount.conf", "etc/sysusers.d/fsmount.conf", CONFIG, HELPER}


@pytest.fixture
def machine(tmp_path):
    return tmp_path / "machine"


@pytest.fixture
def install(machine, capsys):
    """Runs the command below a folder: what it says, by file, without the folder's name."""

    def install(*options, code=0):
        assert main(["install-units", "--prefix", str(machine), *options]) == code
        out, err = capsys.readouterr()
        if code:
            return err
        found = re.findall(rf"^(.+?):? {re.escape(str(machine))}/(\S+)$", out, re.MULTILINE)
        return {file: done for done, file in found}

    return install


def present(machine):
    """What lies there, with its content."""
    files = (path for path in machine.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(machine)): path.read_bytes() for path in files}


def test_it_writes_everything_that_a_mount_at_boot_needs(install, machine):
    assert install() == dict.fromkeys(FILES, "wrote")
    assert present(machine).keys() == FILES


def test_the_units_are_readable_for_all_and_the_helper_can_be_run(install, machine):
    before = os.umask(0o077)
    try:
        install()
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((machine / name).stat().st_mode) for name in FILES}
    assert modes == dict.fromkeys(FILES, 0o644) | {HELPER: 0o755}


def test_it_says_what_to_type_next(machine, capsys):
    main(["install-units", "--prefix", str(machine)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("systemctl daemon-reload && systemctl enable --now fsmount")


def test_run_again_it_changes_nothing(install, machine):
    install()
    before = present(machine)
    assert install() == dict.fromkeys(FILES, "is as it should be")
    assert present(machine) == before


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(install, machine):
    assert install("--dry-run") == dict.fromkeys(FILES, "would write")
    assert not machine.exists()


@pytest.mark.parametrize("name", sorted(FILES - {CONFIG}))
def test_a_file_that_somebody_has_changed_is_left(install, machine, name):
    install()
    with (machine / name).open("a") as file:
        file.write("# mine\n")
    before = present(machine)
    assert install()[name] == "left, for it is not as this command wrote it"
    assert install("--uninstall")[name] == "left, for it is not as this command wrote it"
    assert present(machine) == {name: before[name]}


def test_a_file_that_somebody_else_has_written_is_left(install, machine):
    (machine / HELPER).parent.mkdir(parents=True)
    (machine / HELPER).write_text("#!/bin/sh\n")
    assert install()[HELPER] == "left, for it is not as this command wrote it"
    assert (machine / HELPER).read_text() == "#!/bin/sh\n"


def test_a_unit_that_is_masked_stays_masked(install, machine):
    (machine / SERVICE).parent.mkdir(parents=True)
    (machine / SERVICE).symlink_to("/dev/null")
    assert install()[SERVICE] == "left, for it is not as this command wrote it"
    assert (machine / SERVICE).is_symlink()


def test_what_another_version_has_written_and_nobody_changed_is_replaced(install, machine, monkeypatch):
    resource = installer._resource
    monkeypatch.setattr(installer, "_resource", lambda name: resource(name) + "# an older version\n")
    install()
    monkeypatch.undo()
    done = install()
    assert {name for name, what in done.items() if what == "wrote"} == FILES - {CONFIG, HELPER}
    assert b"an older version" not in (machine / SERVICE).read_bytes()


def test_a_configuration_that_is_there_is_never_replaced(install, machine):
    (machine / CONFIG).parent.mkdir(parents=True)
    (machine / CONFIG).write_text('mountpoint = "/srv/builds"\n')
    assert install()[CONFIG] == "left, for it is yours"
    assert install("--uninstall")[CONFIG] == "left, for it is yours"
    assert (machine / CONFIG).read_text() == 'mountpoint = "/srv/builds"\n'


def test_uninstall_removes_what_was_written(install, machine):
    install()
    assert install("--uninstall", "-n") == dict.fromkeys(FILES, "would remove")
    assert present(machine).keys() == FILES
    assert install("--uninstall") == dict.fromkeys(FILES, "removed")
    assert present(machine) == {}
    assert install("--uninstall") == dict.fromkeys(FILES, "is not there")


def test_what_starts_at_boot_is_not_uninstalled(install, machine):
    install()
    wants = machine / "etc/systemd/system/multi-user.target.wants/fsmount.service"
    wants.parent.mkdir()
    wants.symlink_to(f"/{SERVICE}")
    before = present(machine)
    assert "First: systemctl disable --now fsmount" in install("--uninstall", code=9)
    assert present(machine) == before


def test_a_place_that_cannot_be_written_is_told(install, machine):
    (machine / "etc").parent.mkdir()
    (machine / "etc").write_text("")
    assert "cannot be written: Not a directory" in install(code=1)


# -------------------- the program


def commands(machine, unit=SERVICE):
    """The command lines of a unit, by their keys."""
    return dict(re.findall("^(Exec[A-Za-z]+)=(.+)$", (machine / unit).read_text(), re.MULTILINE))


def test_the_units_name_the_installed_program_by_its_absolute_path(install, machine):
    install()
    lines = [*commands(machine).values(), *commands(machine, WAIT).values()]
    assert len(lines) == 3
    for line in lines:
        program, *words = shlex.split(line)
        assert Path(program).is_absolute()
        modules = ["-P", "-m", "fsmount"] if Path(program).name.startswith("python") else []
        done = subprocess.run(
            [program, *modules, words[len(modules)], "--help"], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_the_program_is_named_as_it_was_called(install, machine, monkeypatch, tmp_path):
    called = tmp_path / "bin" / "fsmount"
    called.parent.mkdir()
    called.symlink_to("/bin/true")
    monkeypatch.setattr(sys, "argv", [str(called)])
    install()
    assert commands(machine)["ExecStart"] == f"{called} mount --foreground"


def test_a_program_that_pip_has_not_installed_is_named_by_its_module(install, machine, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(installer.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/opt/python/bin/python3")
    install()
    assert commands(machine)["ExecStart"] == "/opt/python/bin/python3 -P -m fsmount mount --foreground"


def test_spaces_and_percent_signs_in_its_path_are_as_systemd_wants_them(
    install, machine, monkeypatch, tmp_path
):
    called = tmp_path / "100% ours" / "fsmount"
    called.parent.mkdir()
    called.symlink_to("/bin/true")
    monkeypatch.setattr(sys, "argv", [str(called)])
    install()
    assert commands(machine)["ExecStart"] == f'"{tmp_path}/100%% ours/fsmount" mount --foreground'


@pytest.mark.parametrize("name", ['quo"te', "new\nline", "dol$lar", "back\\slash"])
def test_a_path_that_systemd_would_misunderstand_is_refused(install, machine, monkeypatch, tmp_path, name):
    called = tmp_path / name / "fsmount"
    called.parent.mkdir()
    called.symlink_to("/bin/true")
    monkeypatch.setattr(sys, "argv", [str(called)])
    assert "systemd cannot be told of the program" in install(code=9)
    assert not machine.exists()


def test_the_helper_of_mount_passes_on_its_arguments_and_exit_code(install, machine):
    install()
    done = subprocess.run(
        [machine / HELPER, "fsmount", "/srv", "-fv", "-o", "rw,app=a b=r.example/b"], capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"mount.fsmount: fsmount mount --app 'a b=r.example/b' -- /srv\n"
    assert subprocess.run([machine / HELPER], capture_output=True).returncode == 1
