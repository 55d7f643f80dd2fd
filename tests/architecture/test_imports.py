"""Each foreign library has one home, and a command that needs none of them loads none."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fsmount

ROOT = Path(fsmount.__file__).parent


def imported_packages(file):
    """The top-level packages that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize(
    "library, home",  # or several, between spaces
    [
        ("pyfuse3", "fuse"),
        ("httpx", "registry"),
        ("httpcore", "registry"),
        ("diskcache", "cache"),
        ("click", "cli"),
        ("rich", "cli"),
        ("pydantic", "config.py configfile.py"),
        ("flatbuffers", "archive"),
        ("h11", "control"),
    ],
)
def test_a_foreign_library_has_one_home(library, home):
    homes = {
        file.relative_to(ROOT).parts[0]
        for file in ROOT.rglob("*.py")
        if library in set(imported_packages(file))
    }
    assert homes <= set(home.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["version"],
        ["--version"],
        ["unmount", "--help"],
        ["config", "--help"],
        ["status", "--help"],
    ],
)
def test_a_command_that_needs_no_heavy_library_loads_none(arguments):
    code = (
        "import sys\n"
        "from fsmount.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'trio', 'httpx', 'pyfuse3', 'pydantic', 'diskcache', 'rich'}\n"
        "print(*sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT.parent
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
