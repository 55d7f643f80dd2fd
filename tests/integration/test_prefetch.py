"""Files that are here before they are read: `fsmount prefetch`, `fsmount wait`, and what a mount learns from apps."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from tests import peers
from tests.fakes.front import CountingProxy, Fault
from tests.fakes.tar import SYMLINK, Member, archive
from tests.integration.program import command, daemon, daemons, environment, fsmount, mounted, wait_until

pytestmark = pytest.mark.integration

needs_fuse = [
    pytest.mark.mount,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"
    ),
]

_MIB = 1 << 20
_TAGS = ("v1", "v2")


def _content(tag: str, name: bytes) -> bytes:
    """Of a file: the part of the layer that an app reads is small."""
    size = {b"bin/web": 3 * _MIB, b"lib/used": 3 * _MIB, b"lib/unused": 3 * _MIB, b"share/large": 90 * _MIB}
    return Random(repr((tag, name))).randbytes(size[name])


def _layers(tag: str) -> list[peers.LayerBlob]:
    names = [b"lib/unused", b"bin/web", b"share/large", b"lib/used"]
    large = archive(
        *(Member(name, _content(tag, name)) for name in names),
        Member(b"current", type=SYMLINK, link=b"bin/web"),
        Member(b"empty"),
    )
    # One that is read in parts, and one that is streamed.
    return [peers.pack(large, "tar"), peers.pack(archive(Member(b"etc/tag", tag.encode())), "zstd")]


_BLOBS = {tag: [peers.digest_of(layer.read()) for layer in _layers(tag)] for tag in _TAGS}
_SIZES = {tag: sum(len(layer.read()) for layer in _layers(tag)) for tag in _TAGS}


@pytest.fixture(scope="module")
def storage() -> Iterator[Path]:
    """The storage of a registry: team/web with two builds."""
    if why := peers.have("docker-registry"):
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="storage-") as name:
        layout, root = Path(name, "layout"), Path(name, "root")
        for tag in _TAGS:
            peers.tar_layer_image(layout, tag, _layers(tag))
        with peers.docker_registry(root) as registry:
            for tag in _TAGS:
                peers.push(layout, tag, registry.host, "team/web")
        shutil.rmtree(layout)
        yield root


@dataclass(frozen=True)
class Front:
    """A registry behind a proxy that counts, and how commands are told of it."""

    registry: peers.Registry
    proxy: CountingProxy
    work: Path

    @property
    def cache(self) -> Path:
        return self.work / "cache"

    @property
    def source(self) -> str:
        return f"{self.proxy.host}/team/web"

    @property
    def config(self) -> str:
        return (
            f'[defaults]\ncomplete = "never"\n[apps.web]\nrepository = "{self.source}"\n'
            f'[registries."{self.proxy.host}"]\nplain_http = true\n'
        )

    def run(self, *words: str, code: int = 0) -> tuple[str, str]:
        """What a command writes to its two streams."""
        done = fsmount(*words, "--config", self._config_file, cache=self.cache, code=code)
        return done.stdout.decode(), done.stderr.decode()

    @property
    def _config_file(self) -> Path:
        file = self.work / "command.toml"
        file.write_text(self.config)
        return file

    def start(self, *words: str) -> "subprocess.Popen[str]":
        line = command(*words, "--config", self._config_file)
        return subprocess.Popen(
            line, env=environment(self.cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def fetched(self, tag: str) -> int:
        """Bytes that were sent of the layers of a tag."""
        return sum(one.sent for blob in _BLOBS[tag] for one in self.proxy.passed(f"/blobs/{blob}"))

    @property
    def chunks(self) -> int:
        """Bytes in the cache."""
        return sum(path.stat().st_size for path in (self.cache / "chunks").rglob("*.val"))


@pytest.fixture
def front(storage: Path) -> Iterator[Front]:
    with (
        tempfile.TemporaryDirectory(prefix="prefetch-") as work,
        peers.docker_registry(storage) as registry,
        CountingProxy(registry.host) as proxy,
    ):
        yield Front(registry, proxy, Path(work))


def _learned(front: Front) -> None:
    """A mount has been, from which an app read two files of v1."""
    with mounted(front.work, config=front.config) as mountpoint:
        for name in (b"bin/web", b"lib/used"):
            path = mountpoint / "web/v1" / os.fsdecode(name)
            assert path.read_bytes() == _content("v1", name)
        assert (mountpoint / "web/v1/etc/tag").read_text() == "v1"
        os.kill(daemon(mountpoint), signal.SIGTERM)
        assert wait_until(lambda: not daemons(mountpoint))


# -------------------- what a mount learns


class TestWarmSet:
    pytestmark = needs_fuse

    def test_what_was_read_of_one_tag_comes_for_the_next_before_it_is_asked_for(self, front: Front) -> None:
        _learned(front)
        front.proxy.forget()
        log = front.cache / "log/mount.log"
        with mounted(front.work, config=front.config) as mountpoint:
            before = front.chunks
            assert sorted(os.listdir(mountpoint / "web/v2")) == [
                "bin",
                "current",
                "empty",
                "etc",
                "lib",
                "share",
            ]
            assert wait_until(lambda: "the warm set of web: 3 files" in log.read_text())
            assert wait_until(lambda: front.chunks >= before + 6 * _MIB)
            assert front.fetched("v2") < _SIZES["v2"] / 3
            front.registry.stop()
            front.proxy.break_connections()
            for name in (b"bin/web", b"lib/used"):
                path = mountpoint / "web/v2" / os.fsdecode(name)
                assert path.read_bytes() == _content("v2", name)

    def test_wait_returns_when_it_is_here_and_needs_no_registry_then(self, front: Front) -> None:
        _learned(front)
        front.proxy.forget()
        assert front.run("wait", "web:v2", "--timeout", "60s") == ("", "")
        assert 6 * _MIB < front.fetched("v2") < _SIZES["v2"] / 3
        front.registry.stop()
        began = time.monotonic()
        assert front.run("wait", "web:v2", "--recorded", "--timeout", "60s") == ("", "")
        assert time.monotonic() - began < 30
        with mounted(front.work, config=front.config) as mountpoint:
            assert (mountpoint / "web/v2/bin/web").read_bytes() == _content("v2", b"bin/web")

    def test_prefetch_recorded_says_how_much_of_it_was_here(self, front: Front) -> None:
        _learned(front)
        out, err = front.run("prefetch", "web:v2", "--recorded")
        assert (out, err) == (f"web:v2: 3 files, {6 * _MIB + 2} bytes; 0 were here already\n", "")
        out, _ = front.run("prefetch", "web:v2", "--recorded")
        assert out.endswith("; 3 were here already\n")

    def test_wait_ends_with_6_and_one_line_when_its_time_is_over(self, front: Front) -> None:
        _learned(front)
        front.proxy.faults.append(Fault("stall", 3 * _MIB, path=_BLOBS["v2"][0]))
        began = time.monotonic()
        out, err = front.run("wait", "web:v2", "--timeout", "3s", code=6)
        assert out == ""
        assert re.fullmatch("fsmount: error: web:v2 is not here after 3 s\n", err)
        assert 3 <= time.monotonic() - began < 20
        assert not list((front.cache / "layers").glob(".partial-*"))

    def test_wait_goes_on_trying_until_the_registry_is_there(self, front: Front) -> None:
        _learned(front)
        front.proxy.faults.append(Fault("refuse", 503, path=_BLOBS["v2"][0]))
        with front.start("wait", "web:v2", "--timeout", "90s") as waiting:
            try:
                # A command that asks once tries it three times.
                assert wait_until(lambda: len(front.proxy.passed(_BLOBS["v2"][0])) > 3)
                assert waiting.poll() is None
                front.proxy.faults.clear()
                assert waiting.wait(60) == 0
            finally:
                waiting.kill()
        assert front.chunks >= 12 * _MIB

    def test_a_mount_finds_what_a_command_fetched_while_it_runs(self, front: Front) -> None:
        with mounted(front.work, config=front.config) as mountpoint:
            assert sorted(os.listdir(mountpoint / "web")) == ["v1", "v2"]
            front.run("prefetch", "web:v1", "bin", "lib/used")
            front.registry.stop()
            for name in (b"bin/web", b"lib/used"):
                path = mountpoint / "web/v1" / os.fsdecode(name)
                assert path.read_bytes() == _content("v1", name)

    def test_what_was_fetched_is_read_without_the_registry(self, front: Front) -> None:
        front.run("prefetch", "web:v1", "--all")
        front.registry.stop()
        with mounted(front.work, config=front.config) as mountpoint:
            for name in (b"bin/web", b"lib/used", b"lib/unused", b"share/large"):
                path = mountpoint / "web/v1" / os.fsdecode(name)
                assert path.read_bytes() == _content("v1", name)
            assert (mountpoint / "web/v1/etc/tag").read_text() == "v1"


# -------------------- prefetch


def test_prefetch_fetches_files_and_what_is_in_folders_and_no_more(front: Front) -> None:
    out, err = front.run("prefetch", "web:v1", "current", "lib/used", "etc/")
    assert (out, err) == (f"web:v1: 3 files, {6 * _MIB + 2} bytes; 0 were here already\n", "")
    assert front.fetched("v1") < _SIZES["v1"] / 3
    front.proxy.forget()
    out, _ = front.run("prefetch", "web:v1", "bin", "lib", "empty")
    assert out == f"web:v1: 4 files, {9 * _MIB} bytes; 3 were here already\n"
    assert 0 < front.fetched("v1") <= 5 * _MIB
    front.registry.stop()
    front.run("cat", "web:v1", "bin/web", code=6)
    out, _ = front.run("prefetch", "web:v1", "bin", "lib")
    assert out.endswith("3 files, 9437184 bytes; 3 were here already\n")


def test_prefetch_all_verifies_what_was_read_on_nobody_s_word(front: Front) -> None:
    front.run("prefetch", f"{front.source}:v1", "bin")
    assert "hint" in front.run("inspect", f"{front.source}:v1")[0]
    out, _ = front.run("prefetch", f"{front.source}:v1", "--all")
    assert re.fullmatch(r".*:v1: 2 layers, \d+ bytes; 1 were here already\n", out), "the streamed one"
    report, _ = front.run("inspect", f"{front.source}:v1")
    assert "hint" not in report
    assert report.count("; 0 bytes need not be here") + report.count("1 of 1 chunks cached") == 2
    front.proxy.forget()
    out, _ = front.run("prefetch", f"{front.source}:v1", "--all")
    assert out.endswith("; 2 were here already\n")
    assert front.fetched("v1") == 0
    front.run("wait", f"{front.source}:v1", "--all")


def test_a_path_that_is_not_there_is_said_before_any_other_is_fetched(front: Front) -> None:
    out, err = front.run("prefetch", "web:v1", "bin", "share/none", code=4)
    assert out == "" and "share/none" in err
    assert front.fetched("v1") < 2 * _MIB
    assert front.chunks < _MIB


@pytest.mark.parametrize(
    "words, said",
    [
        (["prefetch", "web:v1"], "it is not said what to fetch"),
        (["prefetch", "web:v1", "bin", "--all"], "exclude each other"),
        (["prefetch", "web:v1", "--recorded", "--all"], "exclude each other"),
        (["prefetch", "oci-layout:/nowhere:v1", "--recorded"], "is no app of the configuration"),
        (["wait", "oci-layout:/nowhere:v1"], "is no app of the configuration"),
        (["wait", "web:v1", "--recorded", "--all"], "exclude each other"),
        (["wait", "web:v1", "--timeout", "soon"], '--timeout soon: must be a time above zero; write "60s"'),
    ],
    ids=" ".join,
)
def test_what_makes_no_sense_is_a_usage_error_and_nobody_is_asked(
    front: Front, words: list[str], said: str
) -> None:
    out, err = front.run(*words, code=2)
    assert out == "" and said in err
    assert front.proxy.passed() == []


def test_what_the_cache_cannot_hold_is_refused_with_what_helps(front: Front) -> None:
    small = front.work / "small.toml"
    small.write_text(f'{front.config}\n[cache]\nsize = "60 MB"\n')
    for words in (
        ["prefetch", "web:v1", "share"],
        ["prefetch", "web:v1", "--all"],
        ["wait", "web:v1", "--all"],
    ):
        done = fsmount(*words, "--config", small, cache=front.cache, code=8)
        assert b"of the cache, which holds 60000000 at most" in done.stderr
        assert b"cache.size" in done.stderr
    assert front.fetched("v1") < 3 * _MIB


def test_sigterm_ends_a_command_and_leaves_nothing_unfinished(front: Front) -> None:
    front.proxy.faults.append(Fault("stall", 20 * _MIB, path=_BLOBS["v1"][0]))
    with front.start("prefetch", "web:v1", "--all") as process:
        try:
            assert front.proxy.wait_stalled()
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert not list((front.cache / "layers").glob(".partial-*"))


# -------------------- wait


def test_there_is_nothing_to_wait_for_while_nothing_was_recorded(front: Front) -> None:
    out, err = front.run("wait", "web:v1")
    assert (out, err) == (
        "",
        "fsmount: note: nothing was recorded for web yet: there is nothing to wait for\n",
    )
    assert front.proxy.passed() == []
    out, _ = front.run("prefetch", "web:v1", "--recorded")
    assert out == "web:v1: nothing was recorded for web that is in it\n"


def test_wait_of_a_tag_that_is_not_there_does_not_wait(front: Front) -> None:
    began = time.monotonic()
    front.run("wait", "web:v9", "--all", "--timeout", "1h", code=4)
    assert time.monotonic() - began < 30
