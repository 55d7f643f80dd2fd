"""Looking without a mount: ls, cat and inspect, and the options that every command has."""

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest

from fsmount.cli.main import main
from tests import peers
from tests.fakes.front import CountingProxy
from tests.fakes.tar import (
    BLOCK_DEVICE,
    CHAR,
    DIRECTORY,
    FIFO,
    HARDLINK,
    SYMLINK,
    Member,
    archive,
    pax,
    sparse,
)
from tests.integration.program import command, environment, fsmount

pytestmark = pytest.mark.integration

_CHUNK = 4 * 2**20


def _run(*arguments: str | Path, cache: Path, code: int = 0) -> tuple[bytes, str]:
    """What a command writes to its two streams; as `program.fsmount`, but without a process of its own."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with (
        patch.dict(os.environ, environment(cache), clear=True),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        found = main([str(word) for word in arguments])
    assert found == code, err.getvalue()
    buffer = out.detach()
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue(), err.getvalue()


def _noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def _link(name: bytes, target: bytes) -> Member:
    return Member(name, type=SYMLINK, link=target, mode=0o777)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[peers.Registry]:
    if why := peers.have("docker-registry"):
        pytest.skip(why)
    with peers.docker_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


# -------------------- ls


_BYTES = bytes(range(256)) * 3
_LARGE = _noise(2 * _CHUNK + 12_345)
_TIME = 1_600_000_000  # 2020-09-13 12:26:40

_BELOW = archive(
    Member(b"bin/", type=DIRECTORY, mode=0o755, mtime=_TIME),
    pax({"mtime": "1600000000.999999999"}),
    Member(b"bin/tool", b"#!/bin/sh\n", mode=0o4755, uid=1000, gid=1001),
    Member(b"bin/again", type=HARDLINK, link=b"bin/tool"),
    Member(b"bin/removed", b"an upper layer removes this\n"),
    Member(b"data/deep/deeper/file", b"deep\n"),
    Member(b"data/bytes", _BYTES, mtime=_TIME),
    Member(b"data/large", _LARGE),
    Member(b"data/empty"),
    bytes(sparse("1.0", b"data/sparse", 2_500_000, [(1_200_000, b"island")])),
    Member(b"dev/null", type=CHAR, mode=0o666, major=1, minor=3, mtime=_TIME),
    Member(b"dev/loop", type=BLOCK_DEVICE, mode=0o660, gid=6, major=7, minor=200, mtime=_TIME),
    Member(b"dev/fifo", type=FIFO, mode=0o640, uid=70_000, mtime=-1),
    Member(b"dev/tmp/", type=DIRECTORY, mode=0o1777, mtime=0),
    _link(b"links/folder", b"../data"),
    _link(b"links/file", b"../bin/tool"),
    _link(b"links/absolute", b"/data/deep"),
    _link(b"links/chain", b"folder/deep/./deeper"),
    _link(b"links/root", b"../../../.."),
    _link(b"links/slash", b"folder/"),
    _link(b"links/dangling", b"no/where"),
    _link(b"links/loop", b"loop"),
    _link(b"links/odd", b"to\x1b[31m\n\xff"),
)
_ABOVE = archive(Member(b"bin/.wh.removed"), Member(b"bin/upper", b"from the upper layer\n"))

_ODD = {
    b"new\nline": r"new\nline",
    b"tab\t": r"tab\t",
    b"\x1b[31mred": r"\033[31mred",
    b"back\\slash": r"back\\slash",
    b"\xff\xfe": r"\377\376",
    "ä".encode(): "ä",
    "bidi\u202e".encode(): r"bidi\342\200\256",
    "c1\x85".encode(): r"c1\302\205",
    b" a space ": " a space ",
}


@dataclass(frozen=True)
class _Image:
    source: str
    cache: Path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> _Image:
    work = tmp_path_factory.mktemp("browse")
    layers = [peers.pack(_BELOW), peers.pack(_ABOVE, "zstd")]
    peers.tar_layer_image(work / "layout", "v1", layers)
    odd = [Member(b"odd/" + name) for name in _ODD]
    odd += [Member(b"inside/" + name + b"/file") for name in _ODD]
    peers.tar_layer_image(work / "layout", "odd", [peers.pack(archive(*odd))])
    return _Image(f"oci-layout:{work / 'layout'}", work / "cache")


@pytest.mark.parametrize(
    ("path", "listed"),
    [
        ((), ["bin", "data", "dev", "links"]),
        (("/",), ["bin", "data", "dev", "links"]),
        (("bin",), ["again", "tool", "upper"]),
        (("/bin//",), ["again", "tool", "upper"]),
        (("./data/./deep/",), ["deeper"]),
        (("data/../bin",), ["again", "tool", "upper"]),
        (("../../bin",), ["again", "tool", "upper"]),
        (("bin/tool",), ["bin/tool"]),
        (("data/deep/../bytes",), ["data/bytes"]),
        (("links/file",), ["links/file"]),
        (("links/folder",), ["links/folder"]),
        (("links/folder/",), ["bytes", "deep", "empty", "large", "sparse"]),
        (("links/folder/deep",), ["deeper"]),
        (("links/absolute/",), ["deeper"]),
        (("links/chain/",), ["file"]),
        (("links/chain/..",), ["deeper"]),
        (("links/root/bin",), ["again", "tool", "upper"]),
        (("links/slash/deep",), ["deeper"]),
        (("links/dangling",), ["links/dangling"]),
        (("links/loop",), ["links/loop"]),
    ],
)
def test_ls_lists_a_folder_or_names_what_else_the_path_leads_to(
    image: _Image, path: Sequence[str], listed: list[str]
) -> None:
    out, err = _run("ls", f"{image.source}:v1", *path, cache=image.cache)
    assert (out.decode().splitlines(), err) == (listed, "")


_MISSING = ["no", "bin/no", "bin/removed", "bin/tool/inside", "links/dangling/", "links/loop/", "links/no/.."]


@pytest.mark.parametrize("path", [*_MISSING, "bin/tool/..", "bin/tool/../tool", "bin/tool/./x"])
def test_a_path_that_leads_nowhere_is_not_found(image: _Image, path: str) -> None:
    for words in (("ls",), ("ls", "-lR"), ("cat",)):
        name, *flags = words
        out, err = _run(name, *flags, f"{image.source}:v1", path, cache=image.cache, code=4)
        assert out == b""
        assert err.startswith("fsmount: error: ")


def test_ls_escapes_what_could_steer_a_terminal_and_keeps_one_name_a_line(image: _Image) -> None:
    source = f"{image.source}:odd"
    out, _ = _run("ls", source, "odd", cache=image.cache)
    assert out.decode().splitlines() == [_ODD[name] for name in sorted(_ODD)]
    out, _ = _run("ls", "-R", source, "inside", cache=image.cache)
    names = [_ODD[name] for name in sorted(_ODD)]
    assert out.decode().splitlines() == names + [f"{name}/file" for name in names]
    for name in (b"\xff\xfe", b"new\nline"):
        out, _ = _run("ls", source, f"inside/{os.fsdecode(name)}", cache=image.cache)
        assert out == b"file\n"
    out, _ = _run("ls", "-l", f"{image.source}:v1", "links/odd", cache=image.cache)
    assert out.endswith(rb" links/odd -> to\033[31m\n\377" + b"\n")
    _, err = _run("ls", source, "\x1b[31m\n", cache=image.cache, code=4)
    assert "\x1b" not in err


def test_ls_l_tells_mode_owner_size_or_device_and_utc(image: _Image) -> None:
    lines = {
        "bin": [
            "-rwsr-xr-x  1000  1001           10 2020-09-13 12:26:40 again",
            "-rwsr-xr-x  1000  1001           10 2020-09-13 12:26:40 tool",
            "-rw-r--r--     0     0           21 1970-01-01 00:00:00 upper",
        ],
        "dev": [
            "prw-r----- 70000     0            0 1969-12-31 23:59:59 fifo",
            "brw-rw----     0     6       7, 200 2020-09-13 12:26:40 loop",
            "crw-rw-rw-     0     0         1, 3 2020-09-13 12:26:40 null",
            "drwxrwxrwt     0     0            0 1970-01-01 00:00:00 tmp",
        ],
        "links/absolute": [
            "lrwxrwxrwx     0     0            0 1970-01-01 00:00:00 links/absolute -> /data/deep"
        ],
        "data/sparse": ["-rw-r--r--     0     0      2500000 1970-01-01 00:00:00 data/sparse"],
    }
    for path, expected in lines.items():
        out, _ = _run("ls", "-l", f"{image.source}:v1", path, cache=image.cache)
        assert out.decode().splitlines() == expected


def test_ls_R_shows_everything_below_with_its_path_once(image: _Image) -> None:
    out, _ = _run("ls", "-R", f"{image.source}:v1", "data", cache=image.cache)
    assert out.decode().splitlines() == [
        "bytes",
        "deep",
        "empty",
        "large",
        "sparse",
        "deep/deeper",
        "deep/deeper/file",
    ]
    out, _ = _run("ls", "-l", "-R", f"{image.source}:v1", cache=image.cache)
    paths = [line[56:].partition(" -> ")[0] for line in out.decode(errors="replace").splitlines()]
    assert len(paths) == len(set(paths)) == 27
    assert {"bin/tool", "data/deep/deeper/file", "links/root", "dev/tmp"} <= set(paths)
    assert "links/folder/bytes" not in paths, "links are not followed"


def test_ls_R_goes_deeper_than_a_stack(tmp_path: Path) -> None:
    deep = b"/".join([b"d"] * 1_010)
    tar = archive(pax({"path": deep + b"/file"}), Member(b"file", b"deep\n"))
    peers.tar_layer_image(tmp_path / "layout", "v1", [peers.pack(tar)])
    source = f"oci-layout:{tmp_path / 'layout'}:v1"
    out, _ = _run("ls", "-R", source, cache=tmp_path / "cache")
    assert out.splitlines()[-1] == deep + b"/file"
    assert out.count(b"\n") == 1_011
    assert _run("cat", source, f"{deep.decode()}/file", cache=tmp_path / "cache") == (b"deep\n", "")


def test_an_app_is_looked_at_from_its_own_folder(image: _Image, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'[apps.web]\nrepository = "{image.source}"\npath = "/links"\n')
    config = ("--config", tmp_path / "config.toml")
    out, _ = _run("ls", "web:v1", *config, cache=image.cache)
    assert b"chain\n" in out
    for path in ("folder/", "../bin", "absolute/"):  # all of them are outside
        _run("ls", "web:v1", path, *config, cache=image.cache, code=4)


# -------------------- cat


_SPARSE = bytes(1_200_000) + b"island" + bytes(1_299_994)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("data/bytes", _BYTES),
        ("/data//bytes", _BYTES),
        ("data/empty", b""),
        ("data/large", _LARGE),
        ("data/sparse", _SPARSE),
        ("bin/again", b"#!/bin/sh\n"),
        ("bin/upper", b"from the upper layer\n"),
        ("links/file", b"#!/bin/sh\n"),
        ("links/folder/bytes", _BYTES),
        ("links/chain/file", b"deep\n"),
        ("links/chain/../../bytes", _BYTES),
    ],
)
def test_cat_prints_exactly_the_bytes_of_the_file(image: _Image, path: str, content: bytes) -> None:
    out, err = _run("cat", f"{image.source}:v1", path, cache=image.cache)
    assert (hashlib.sha256(out).digest(), err) == (hashlib.sha256(content).digest(), "")


@pytest.mark.parametrize("path", ["", "/", "data", "links/folder", "links/folder/", "dev/fifo", "dev/null"])
def test_cat_of_what_is_no_file_is_a_usage_error(image: _Image, path: str) -> None:
    out, err = _run("cat", f"{image.source}:v1", path, cache=image.cache, code=2)
    assert (out, "is no regular file" in err) == (b"", True)


def test_a_process_prints_the_same_bytes(image: _Image) -> None:
    assert fsmount("cat", f"{image.source}:v1", "data/bytes", cache=image.cache).stdout == _BYTES


def test_cat_ends_silently_when_nobody_reads_on(image: _Image) -> None:
    process = subprocess.Popen(
        command("cat", f"{image.source}:v1", "data/large"),
        env=environment(image.cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        assert process.stdout.read(10) == _LARGE[:10]
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 141)


@pytest.mark.parametrize("at", [600, 2 * _CHUNK])
def test_cat_of_a_corrupt_layer_ends_with_7_wherever_the_wrong_byte_is(tmp_path: Path, at: int) -> None:
    tar = archive(Member(b"file", b"f" * 1000), Member(b"large", _noise(3 * _CHUNK)))
    peers.tar_layer_image(tmp_path / "layout", "v1", [peers.pack(tar, "tar")])
    source = f"oci-layout:{tmp_path / 'layout'}:v1"
    blob = tmp_path / "layout/blobs/sha256" / peers.digest_of(tar).removeprefix("sha256:")
    blob.write_bytes(tar[:at] + bytes([tar[at] ^ 1]) + tar[at + 1 :])
    for path in ("file", "large"):
        _, err = _run("cat", source, path, cache=tmp_path / "cache", code=7)
        assert f"layer {peers.digest_of(tar)}" in err
    blob.write_bytes(tar)
    out, _ = _run("cat", source, "file", cache=tmp_path / "cache")
    assert out == b"f" * 1000, "nothing of the wrong bytes was kept"


# -------------------- inspect


_LAYERS: Mapping[str, tuple[peers.Packing, bytes]] = {
    "gzip": ("gzip", archive(Member(b"one", b"1"))),
    "zstd": ("zstd", archive(Member(b"two", b"22"), Member(b"three", b"333"))),
    "tar": ("tar", archive(Member(b"large", _noise(_CHUNK + 5)))),
}


@pytest.fixture
def layers(registry: peers.Registry, tmp_path: Path) -> Iterator[tuple[str, CountingProxy, str]]:
    """An image with a layer of each kind behind a front that counts; and its digest."""
    blobs = [peers.pack(tar, packing) for packing, tar in _LAYERS.values()]
    config: dict[str, peers.Json] = {"created": "2026-01-02T03:04:05Z"}
    peers.tar_layer_image(tmp_path / "layout", "v1", blobs, platform="linux/arm64", config=config)
    digest = peers.push(tmp_path / "layout", "v1", registry.host, "team/layers")
    with CountingProxy(registry.host) as front:
        yield f"{front.host}/team/layers", front, digest


def _facts(source: str, *flags: str | Path, cache: Path) -> dict[str, object]:
    out, _ = _run("inspect", "--json", source, *flags, cache=cache)
    facts = json.loads(out)
    assert isinstance(facts, dict)
    return facts


def test_inspect_tells_what_an_image_is_made_of_and_how_much_of_it_is_here(
    layers: tuple[str, CountingProxy, str], tmp_path: Path
) -> None:
    source, front, digest = layers
    version, cache, platform = f"{source}:v1", tmp_path / "cache", ("--platform", "linux/arm64")
    blobs = [peers.pack(tar, packing) for packing, tar in _LAYERS.values()]
    unread = [
        {
            "digest": peers.digest_of(blob.read()),
            "media_type": blob.media_type,
            "size": len(blob.read()),
            "kind": "unknown until it is read",
            "indexed": False,
        }
        for blob in blobs
    ]
    expected = {
        "version": 1,
        "digest": digest,
        "media_type": peers.MANIFEST,
        "platform": "linux/arm64",
        "created": "2026-01-02T03:04:05+00:00",
        "size": sum(len(blob.read()) for blob in blobs),
        "layers": unread,
    }
    assert _facts(version, *platform, cache=cache) == expected
    assert len(front.passed("/blobs/")) == 1, "only the configuration was fetched"

    assert _run("cat", version, "large", *platform, cache=cache)[0] == _noise(_CHUNK + 5)
    chunks = {"gzip": 1, "zstd": 1, "tar": 2}
    gzip, _, tar = (len(blob.read()) for blob in blobs)
    # The header of a gzip blob is in no span; and of a zstd blob nothing can be had alone.
    spans = {"gzip": gzip - 10, "zstd": None, "tar": tar}
    read = [
        facts
        | {
            "kind": kind,
            "indexed": True,
            "read_as": "streamed",
            "trust": "certified",
            "reason": "it has no index" if kind == "tar" else "it is small",
            "inflated_size": len(tar),
            "diff_id": peers.digest_of(tar),
            "members": 1 + tar.count(b"ustar"),  # and the root
            "chunks": chunks[kind],
            "cached_chunks": chunks[kind],
            "cached_size": spans[kind],
        }
        for facts, (kind, (_, tar)) in zip(unread, _LAYERS.items(), strict=True)
    ]
    found = _facts(version, *platform, cache=cache)
    assert found == expected | {"layers": [*unread[:2], read[2]]}, "only one layer was needed"
    _run("ls", version, *platform, cache=cache)
    assert _facts(version, *platform, cache=cache) == expected | {"layers": read}
    shutil.rmtree(cache / "chunks")
    evicted = [
        facts | {"cached_chunks": 0, "cached_size": 0 if facts["cached_size"] else None} for facts in read
    ]
    assert _facts(version, *platform, cache=cache) == expected | {"layers": evicted}


def test_inspect_tells_people_the_same(layers: tuple[str, CountingProxy, str], tmp_path: Path) -> None:
    source, _, digest = layers
    cache = tmp_path / "cache"
    sizes = [
        (peers.digest_of(blob), len(blob)) for blob in (peers.pack(t, p).read() for p, t in _LAYERS.values())
    ]
    head = [
        f"digest      {digest}",
        f"media_type  {peers.MANIFEST}",
        "platform    linux/arm64",
        "created     2026-01-02T03:04:05+00:00",
        f"size        {sum(size for _, size in sizes)} bytes in 3 layers, lowest first:",
    ]
    out, _ = _run("inspect", f"{source}@{digest}", cache=cache)
    unread = [f"  {layer}  {size} bytes, unknown until it is read" for layer, size in sizes]
    assert out.decode().splitlines() == head + unread
    _run("ls", f"{source}@{digest}", cache=cache)
    out, _ = _run("inspect", f"{source}@{digest}", cache=cache)
    lines = out.decode().splitlines()
    assert lines[:5] == head
    assert lines[5::3] == [
        f"  {layer}  {size} bytes, {kind}" for kind, (layer, size) in zip(_LAYERS, sizes, strict=True)
    ]
    assert lines[13] == "    certified, read as streamed because it has no index; 0 bytes need not be here"
    assert lines[12] == f"    2 members, {len(_LAYERS['tar'][1])} bytes inflated, 2 of 2 chunks cached"


def test_inspect_knows_the_files_of_artifacts(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "index.html").write_text("<p>\n")
    layout = tmp_path / "layout"
    peers.oras_artifact(layout, "v1", {"readme.txt": b"hello\n", "empty": b"", "site": folder})
    source, cache = f"oci-layout:{layout}:v1", tmp_path / "cache"

    def kinds() -> list[object]:
        layers = _facts(source, cache=cache)["layers"]
        assert isinstance(layers, list)
        return [layer["kind"] for layer in layers]

    assert kinds() == ["file", "file", "unknown until it is read"]
    assert _run("cat", source, "site/index.html", cache=cache)[0] == b"<p>\n"
    assert kinds() == ["file", "file", "gzip"]
    assert _run("cat", source, "readme.txt", cache=cache)[0] == b"hello\n"
    assert _facts(source, cache=cache)["platform"] is None


def test_inspect_chooses_a_platform(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    manifests = [
        peers.tar_layer_image(
            layout, None, [peers.pack(archive(Member(name)))], platform=f"linux/{name.decode()}"
        )
        for name in (b"amd64", b"arm64")
    ]
    peers.image_index(layout, "v1", manifests)
    source, cache = f"oci-layout:{layout}:v1", tmp_path / "cache"
    for manifest, name in zip(manifests, ("amd64", "arm64"), strict=True):
        facts = _facts(source, "--platform", f"linux/{name}", cache=cache)
        assert (facts["digest"], facts["platform"]) == (manifest["digest"], f"linux/{name}")
        assert _run("ls", source, "--platform", f"linux/{name}", cache=cache)[0] == f"{name}\n".encode()
    for name in ("inspect", "ls"):
        _run(name, source, "--platform", "linux/s390x", cache=cache, code=4)
        _run(name, source, "--platform", "no platform", cache=cache, code=2)


def test_inspect_of_an_app_with_a_folder_fetches_no_layer(registry: peers.Registry, tmp_path: Path) -> None:
    tar = archive(
        Member(b"sub/", type=DIRECTORY), Member(b"sub/first"), Member(b"sub/large", _noise(9 * 2**20))
    )
    peers.tar_layer_image(tmp_path / "layout", "v1", [peers.pack(tar, "tar")])
    peers.push(tmp_path / "layout", "v1", registry.host, "team/sub")
    with CountingProxy(registry.host) as front:
        (tmp_path / "config.toml").write_text(
            f'[apps.web]\nrepository = "{front.host}/team/sub"\npath = "/sub"\n'
        )
        facts = _facts("web:v1", "--config", tmp_path / "config.toml", cache=tmp_path / "cache")
        assert front.passed(f"/blobs/{peers.digest_of(tar)}") == []
    (layer,) = facts["layers"]  # type: ignore[misc]
    assert layer["indexed"] is False


# -------------------- options


@pytest.mark.parametrize(
    "words",
    [
        ("ls", "web:v1"),
        ("cat", "web:v1", "bin/upper"),
        ("inspect", "web:v1"),
        ("prefetch", "web:v1", "bin/upper"),
        ("wait", "web:v1", "--all"),
        ("snapshot", "web:v1", "{dest}"),
        ("config", "check"),
    ],
    ids=lambda words: words[0],
)
def test_every_command_takes_configuration_and_cache_as_option_and_from_the_environment(
    image: _Image, tmp_path: Path, words: Sequence[str]
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        f'[cache]\npath = "{tmp_path / "configured"}"\n[apps.web]\nrepository = "{image.source}"\n'
    )
    other = tmp_path / "other.toml"
    other.write_text(f'[cache]\npath = "{tmp_path / "wrong"}"\n')

    def check(made: str, *flags: str | Path, **variables: str | Path) -> None:
        """The command works, with its cache in `made` and nowhere else."""
        dest = tmp_path / f"dest-{made}"
        arguments = [word.format(dest=dest) for word in words]
        texts = {name: str(value) for name, value in variables.items()}
        plain = {
            name: value for name, value in environment(tmp_path).items() if not name.startswith("FSMOUNT_")
        }
        out = io.TextIOWrapper(io.BytesIO(), "utf-8")
        with patch.dict(os.environ, plain | texts, clear=True), redirect_stdout(out):
            assert main([*arguments, *map(str, flags)]) == 0
        if words[0] == "config":
            out.seek(0)
            assert f"cache       {tmp_path / made}, 20 GB" in out.read()
        else:
            made_now = [path.name for path in tmp_path.iterdir() if (path / "state.sqlite").exists()]
            assert made_now == [made]
            shutil.rmtree(tmp_path / made)

    check("configured", "--config", config)
    check("configured-by-variable", FSMOUNT_CONFIG=config, FSMOUNT_CACHE=tmp_path / "configured-by-variable")
    check("option", "--cache", tmp_path / "option", FSMOUNT_CONFIG=config, FSMOUNT_CACHE=tmp_path / "wrong")
    check("both", "--config", config, FSMOUNT_CONFIG=other, FSMOUNT_CACHE=tmp_path / "both")
    app = f"web={image.source}"
    check("app", "--app", app, "--cache", tmp_path / "app", FSMOUNT_CONFIG=other)


@pytest.mark.parametrize(
    "words",
    [("ls",), ("cat",), ("cat", "oci-layout:/x"), ("inspect",), ("prefetch",), ("wait",), ("snapshot", "x")],
)
def test_a_command_without_its_arguments_is_a_usage_error(words: Sequence[str], tmp_path: Path) -> None:
    _, err = _run(*words, cache=tmp_path / "cache", code=2)
    assert "Missing argument" in err
    assert not (tmp_path / "cache").exists()
