"""What is installed on a machine says what is so: the example of a configuration, and the units."""

import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

import pytest
from pydantic import BaseModel

from fsmount.cli.main import main
from fsmount.config import App, Cache, Config, Deadlines, Defaults, Metrics, Network, Registry
from fsmount.configfile import load_config

MACHINE = files("fsmount").joinpath("machine")
EXAMPLE = MACHINE.joinpath("config.toml").read_text()
BOOT = Path(__file__).parents[2] / "docs/boot.md"

#: What stands in a comment right behind the sign is a setting; prose has a space before it.
SETTING = re.compile(r"^#(?=[\[a-z_])", re.MULTILINE)


def load(folder, text):
    file = folder / "config.toml"
    file.write_text(text)
    return load_config(file, environ={"HOME": "/root"})


def keys(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def written(text):
    """By table, without the names of apps and registries, the keys that are written."""
    tables: dict[str, set[str]] = {"": set()}
    table = ""
    for line in text.splitlines():
        if header := re.fullmatch(r"\[(\w+).*\]", line):
            table = header[1]
            tables.setdefault(table, set())
        elif key := re.match(r"(\w+) =", line):
            tables[table].add(key[1])
    return tables


class TestTheExampleOfAConfiguration:
    def test_it_has_every_key_that_there_is_and_no_other(self):
        tables = written(SETTING.sub("", EXAMPLE))
        models = {"cache": Cache, "defaults": Defaults, "apps": App, "registries": Registry}
        models |= {"network": Network, "deadlines": Deadlines, "metrics": Metrics}
        assert tables.pop("") | tables.keys() == keys(Config)
        assert tables == {name: keys(model) for name, model in models.items()}

    def test_as_it_is_it_changes_nothing(self, tmp_path):
        assert load(tmp_path, EXAMPLE) == load(tmp_path, "")

    def test_with_all_its_comments_taken_off_it_is_valid(self, tmp_path):
        config = load(tmp_path, SETTING.sub("", EXAMPLE))
        assert list(config.apps) == ["web"]
        assert len(config.registries) == 3

    def test_what_it_shows_is_the_default_wherever_there_is_one(self, tmp_path):
        shown, default = load(tmp_path, SETTING.sub("", EXAMPLE)), load(tmp_path, "")
        assert shown.mountpoint == default.mountpoint
        app = App.model_validate({"repository": "registry.example.com/team/web"})
        pairs = [(getattr(shown, name), getattr(default, name)) for name in ("cache", "defaults", "network")]
        pairs += [(shown.deadlines, default.deadlines), (shown.metrics, default.metrics)]
        pairs += [(shown.apps["web"], app)]
        for table, expected in pairs:
            for name in type(table).model_fields:
                if name != "platform" and getattr(expected, name) is not None:
                    assert getattr(table, name) == getattr(expected, name), name

    def test_every_key_has_a_sentence_before_it_or_before_its_neighbours(self):
        blocks = EXAMPLE.split("\n\n")
        alone = [
            block for block in blocks if re.search("^#[a-z_]+ =", block, re.MULTILINE) and "# " not in block
        ]
        assert alone == []


#: systemd.exec(5): what gives a service a mount namespace, in which its mounts are seen by nobody else.
NAMESPACES = re.compile(
    "^(PrivateTmp|PrivateDevices|PrivateMounts|PrivateIPC|Protect(System|Home|KernelTunables|KernelModules|KernelLogs"
    "|ControlGroups|Proc)|ProcSubset|RootDirectory|RootImage|MountImages|ExtensionImages|MountFlags|DynamicUser"
    "|MountAPIVFS|Bind(ReadOnly)?Paths|TemporaryFileSystem|(ReadWrite|ReadOnly|Inaccessible|Exec|NoExec)Paths"
    "|LogNamespace)=",
    re.MULTILINE,
)


class TestTheUnits:
    def test_the_service_has_no_mount_namespace_of_its_own(self):
        assert not NAMESPACES.search(MACHINE.joinpath("fsmount.service").read_text())

    @pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
    def test_systemd_understands_every_line_of_them(self, tmp_path, capsys):
        assert main(["install-units", "--prefix", str(tmp_path)]) == 0
        self.verify("--system", *sorted((tmp_path / "etc/systemd/system").glob("*.service")))

    @pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
    def test_systemd_understands_every_line_of_the_units_in_the_documentation(self, tmp_path, capsys):
        main(["install-units", "--prefix", str(tmp_path)])
        fsmount = re.search("^ExecStart=(.+) mount", self.installed(tmp_path), re.MULTILINE)[1]
        units = re.findall(
            r"```ini\n# (?:/etc|~/\.config)/systemd/(system|user)/(\S+)\n(.*?)```",
            BOOT.read_text(),
            re.DOTALL,
        )
        assert {scope for scope, _, _ in units} == {"system", "user"}
        for scope, name, text in units:
            unit = tmp_path / "etc/systemd/system" / name
            # Programs that this machine does not have are no mistake of the unit.
            text = text.replace("=/srv/artifacts/web/v1.4.2/bin/server", "=/bin/true")
            unit.write_text(text.replace("=%h/.local/bin/fsmount ", f"={fsmount} "))
            self.verify(
                f"--{scope}", unit, environment={"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
            )

    def installed(self, prefix):
        return (prefix / "etc/systemd/system/fsmount.service").read_text()

    def verify(self, scope, *units, environment=MappingProxyType({})):
        command = ["systemd-analyze", "verify", scope, "--man=no", *units]
        environment = {"PATH": "/usr/bin:/bin", **environment}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
