"""What people do today to get at the same files: fetch and untar, skopeo and umoci, ratarmount, squashfs."""

import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from scripts.bench.bench import Bench, unmount
from scripts.bench.corpus import REPOSITORY
from scripts.bench.machine import Failed, timed
from tests.peers import have

FLOOR = "curl | tar xz"
UMOCI = "skopeo + umoci"
RATARMOUNT = "ratarmount"
SQUASHFUSE = "squashfuse_ll"
NATIVE = "native"
HTTPX = "plain httpx"


def floor(bench: Bench, tag: str, dest: Path) -> float:
    """Fetch and unpack one layer after the other, as deploy scripts do; seconds."""
    return fetch_and_unpack(bench.blob_urls(tag), dest)


def fetch_and_unpack(urls: Sequence[str], dest: Path, *, tar: str = "tar xz") -> float:
    """`floor` for blobs anywhere, in any encoding; seconds."""
    lines = [f"curl -sSf {shlex.quote(url)} | {tar} -f - -C {shlex.quote(str(dest))}" for url in urls]
    return timed(" && ".join(lines)).seconds


def skopeo_umoci(bench: Bench, tag: str, layout: Path, dest: Path) -> tuple[float, float]:
    """Copy to an OCI layout, then unpack to `dest`, which must not exist; seconds of each. Raises: Failed."""
    if reason := have("skopeo", "umoci"):
        raise Failed(reason)
    source = f"docker://{bench.registry.host}/{REPOSITORY}:{tag}"
    flags = ["--insecure-policy", "copy", "-q", "--src-tls-verify=false"]
    copied = timed(["skopeo", *flags, source, f"oci:{layout}:{tag}"])
    unpacked = timed(["umoci", "unpack", "--image", f"{layout}:{tag}", dest])
    return copied.seconds, unpacked.seconds


def native(bench: Bench, tag: str, *, on_disk: bool = False) -> Path:
    """The tag unpacked on tmpfs, or on the disk, once."""
    path = (bench.disk if on_disk else bench.work) / f"native-{tag}"
    if not path.exists():
        path.mkdir()
        floor(bench, tag, path)
    return path


@contextmanager
def ratarmounted(bench: Bench, tag: str) -> Iterator[Path]:
    """The first layer of the tag in ratarmount, over an index that was made before. Raises: Failed."""
    command, layer = bench.rats(), bench.corpus.blobs(tag)[0]
    index = bench.work / f"ratarmount-{tag}.index.sqlite"
    with bench.folder() as point:
        mount = [*command, "--index-file", str(index), layer.blob, str(point)]
        if not index.exists():
            timed(mount)
            unmount(point)
        timed(mount)
        try:
            yield point
        finally:
            unmount(point)


@contextmanager
def squashfused(bench: Bench, tag: str) -> Iterator[Path]:
    """The tag as a squashfs image, made once and mounted anew. Raises: Failed."""
    if reason := have("squashfuse_ll", "mksquashfs"):
        raise Failed(reason)
    image = bench.work / f"{tag}.squashfs"
    if not image.exists():
        timed(["mksquashfs", native(bench, tag), image, "-quiet", "-no-progress", "-comp", "gzip"])
    with bench.folder() as point:
        timed(["squashfuse_ll", image, point])
        try:
            yield point
        finally:
            unmount(point)


def install_ratarmount(work: Path, python: str) -> list[str] | str:
    """The command of ratarmount, installed into a folder of its own; or why there is none."""
    venv = work / "ratarmount"
    program = venv / "bin" / "ratarmount"
    try:
        if not program.exists():
            timed([python, "-m", "venv", venv])
            timed([venv / "bin/pip", "install", "-q", "ratarmount==1.3.0"])
    except Failed as problem:
        shutil.rmtree(venv, ignore_errors=True)
        return f"ratarmount does not install: {problem}"
    return [str(program)]
