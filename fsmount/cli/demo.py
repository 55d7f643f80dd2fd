"""demo: the whole tour on a sample it makes itself: mount, browse, run, compare, snapshot, unmount."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from fsmount.cli.sample import make_sample
from fsmount.errors import FsmountError
from fsmount.fuse import mounts

_STEP_SECONDS = 60


@click.command()
@click.option("--keep", is_flag=True, envvar="FSMOUNT_KEEP", help="Leave the sample and the snapshot behind.")
def demo(keep: bool) -> None:
    """Show in half a minute what fsmount does. Needs no registry and leaves nothing behind."""
    folder = Path(tempfile.mkdtemp(prefix="fsmount-demo-"))
    try:
        _tour(folder)
        click.echo("\nThat is all: every step did what it should.")
    finally:
        if mounts.find(folder / "artifacts") is not None:
            mounts.unmount(folder / "artifacts", lazy=True)
        if keep:
            click.echo(f"The sample is in {folder}.")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _tour(folder: Path) -> None:
    click.echo("A sample app, in two tags that share a large layer, as an OCI image layout:")
    make_sample(folder / "layout")
    (folder / "artifacts").mkdir()
    tour = _Tour(folder)
    tour.step("ls -l layout")
    tour.step("fsmount inspect oci-layout:layout:v1", expect="2 layers")
    click.echo("\nMounted, nothing is fetched until it is touched:")
    tour.step("fsmount mount artifacts --app hello=oci-layout:layout")
    tour.step("ls artifacts/hello", expect="v1\nv2\n")
    tour.step("ls -lR artifacts/hello/v1/bin", expect="VERSION")
    click.echo("\nThe app runs straight from the mount:")
    tour.step("artifacts/hello/v1/bin/hello", expect="hello from version v1, with 5000 words")
    tour.step("artifacts/hello/v2/bin/hello", expect="hello from version v2, with 5000 words")
    click.echo("\nWhat changed between two tags; the shared layer is not even read:")
    tour.step("diff -r artifacts/hello/v1 artifacts/hello/v2", expect="Only in", code=1)
    click.echo("\nThe tree is read-only:")
    tour.step("touch artifacts/hello/v1/bin/new", expect="Read-only file system", code=1)
    click.echo("\nA plain folder of a tag, with or without a mount:")
    tour.step("fsmount snapshot oci-layout:layout:v2 release", expect="release: ")
    tour.step("diff -r artifacts/hello/v2 release", expect="")
    tour.step("release/bin/hello", expect="hello from version v2")
    tour.step("fsmount cat oci-layout:layout:v2 bin/NEWS", expect="v2 has news.")
    tour.step("fsmount unmount artifacts")
    tour.step("ls -A artifacts", expect="")


class _Tour:
    """Runs commands as a user would type them, and checks what they say."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        shims = folder / "bin"
        shims.mkdir()
        (shims / "fsmount").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m fsmount "$@"\n')
        (shims / "fsmount").chmod(0o755)
        self._environment = {
            **os.environ,
            "PATH": f"{shims}:{os.environ.get('PATH', os.defpath)}",
            "FSMOUNT_CACHE": str(folder / "cache"),
            "FSMOUNT_CONFIG": os.devnull,
            "LC_ALL": "C",
        }

    def step(self, command: str, *, expect: str | None = None, code: int = 0) -> None:
        """Raises: FsmountError if the command ends with another code, or does not say what is expected.

        An empty expectation means no output at all.
        """
        click.echo(f"\n$ {command}")
        done = subprocess.run(
            shlex.split(command),
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_STEP_SECONDS,
            text=True,
            errors="replace",
            check=False,
        )
        click.echo(done.stdout, nl=False)
        if done.returncode != code:
            raise FsmountError(f"'{command}' ended with exit code {done.returncode}; expected was {code}")
        if expect is not None and (expect not in done.stdout or (not expect and done.stdout)):
            raise FsmountError(f"'{command}' did not say {expect!r}")
