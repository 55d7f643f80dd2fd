"""A credential helper: a program docker-credential-NAME that keeps logins in a file and records how it was run."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PROGRAM = """#!{python} -IS
import json, os, sys
state = {state!r}
action, text = sys.argv[1], sys.stdin.read()
with open(state + ".log", "a") as log:
    log.write(json.dumps({{"arguments": sys.argv[1:], "input": text, "environ": dict(os.environ)}}) + "\\n")
with open(state) as file:
    logins = json.load(file)
if action == "store":
    login = json.loads(text)
    logins[login["ServerURL"]] = [login["Username"], login["Secret"]]
elif text not in logins:
    print("credentials not found in native keychain")
    sys.exit(1)
elif action == "erase":
    del logins[text]
else:
    print(json.dumps({{"ServerURL": text, "Username": logins[text][0], "Secret": logins[text][1]}}))
with open(state, "w") as file:
    json.dump(logins, file)
"""


@dataclass(frozen=True, slots=True)
class FakeHelper:
    """The helper `name` in a folder that PATH leads to."""

    folder: Path
    name: str

    @classmethod
    def install(
        cls, folder: Path, name: str, logins: Mapping[str, tuple[str, str]] | None = None
    ) -> "FakeHelper":
        helper = cls(folder, name)
        folder.mkdir(parents=True, exist_ok=True)
        helper.put(logins or {})
        install_program(folder, name, _PROGRAM.format(python=sys.executable, state=str(helper._state)))
        return helper

    def put(self, logins: Mapping[str, tuple[str, str]]) -> None:
        """Replace what it keeps: user and secret by key."""
        self._state.write_text(json.dumps(logins))

    @property
    def logins(self) -> dict[str, list[str]]:
        logins: dict[str, list[str]] = json.loads(self._state.read_text())
        return logins

    @property
    def runs(self) -> list[dict[str, object]]:
        """Arguments, input and environment of every run, oldest first."""
        log = Path(f"{self._state}.log")
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    @property
    def asked(self) -> list[str]:
        """Action and input of every run."""
        return [f"{' '.join(run['arguments'])} {run['input']}" for run in self.runs]  # type: ignore[arg-type]

    @property
    def _state(self) -> Path:
        return self.folder / f"{self.name}.json"


def install_program(folder: Path, name: str, text: str) -> Path:
    """A helper of any kind."""
    program = folder / f"docker-credential-{name}"
    program.write_text(text)
    program.chmod(0o755)
    return program
