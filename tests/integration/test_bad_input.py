"""Whatever is malformed, missing, damaged, refused or full: one clear message, the right code, nothing half-written."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import random
import re
import shlex
import shutil
import socket
import sqlite3
import stat
import subprocess
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias
from unittest import mock

import pytest
import zstandard

from fsmount.cli.main import main
from fsmount.fuse import mounts
from tests import peers
from tests.fakes.front import CountingProxy, Fault
from tests.fakes.tar import DIRECTORY, END, HARDLINK, SYMLINK, Member, archive, base256, pax
from tests.integration import program
from tests.integration.program import command, daemons, environment, mounted, wait_until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.mount,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"
    ),
]

_TAR = f"{peers.OCI}layer.v1.tar"
_GZIP = f"{_TAR}+gzip"
_NAME = "org.opencontainers.image.ref.name"
#: A digest of the right form that nothing has.
_NONE = f"sha256:{'0' * 64}"

#: Every layer of this file is smaller, but for the bombs.
_CONFIG = '[cache]\nmax_layer_size = "4 MiB"\n'


# -------------------- what holds for every refusal


@dataclass(frozen=True)
class Outcome:
    """How a command ended, what it wrote, and the folder that its cache and its destination are in."""

    code: int
    out: bytes
    text: str
    work: Path

    def check(self, code: int, *words: str) -> None:
        """One message with these words, and no more; the exit code."""
        assert self.code == code, self.text
        assert [word for word in words if word not in self.text] == [], self.text
        assert "Traceback" not in self.text and "unforeseen" not in self.text
        assert self.text.startswith("fsmount: error: "), self.text
        assert self.text.count("error: ") == 1, self.text
        assert self.out == b""

    def check_nothing_left(self, *, kept: bool = False) -> None:
        """No destination, whole or partial, and in the cache no part of a layer; of a good one all if it is kept."""
        cache = self.work / "cache"
        assert os.listdir(self.work) == ["cache"]
        assert [path for path in cache.rglob("*") if "partial" in path.name] == []
        assert os.listdir(cache / "trees") == []
        assert len(os.listdir(cache / "layers")) == kept
        assert _chunks(cache) == kept


def _chunks(cache: Path) -> int:
    """How many chunks the cache has, in its database and as files, which must agree."""
    with sqlite3.connect(f"file:{cache}/chunks/cache.db?mode=ro", uri=True) as database:
        (rows,) = database.execute("SELECT count(*) FROM Cache").fetchone()
    database.close()
    assert len(list((cache / "chunks").rglob("*.val"))) == rows
    return int(rows)


def _run(work: Path, *arguments: str | Path) -> Outcome:
    """A command whose cache is in `work`, which is made if need be."""
    work.mkdir(parents=True, exist_ok=True)
    done = program.run(*arguments, cache=work / "cache")
    return Outcome(done.returncode, done.stdout, done.stderr.decode(errors="replace"), work)


def _call(work: Path, *arguments: str | Path) -> Outcome:
    """The same in this process, which saves its start; what the log says is not seen."""
    work.mkdir(parents=True, exist_ok=True)
    out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    with (
        mock.patch.dict(os.environ, environment(work / "cache"), clear=True),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        code = main([str(word) for word in arguments])
        out.seek(0)
        return Outcome(code, out.buffer.read(), err.getvalue(), work)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """For what mostly waits: pauses before another try, and deadlines."""
    with ThreadPoolExecutor(8) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(_CONFIG)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout with nothing wrong: its tag `v1` has a file, a folder and a layer of some size."""
    layout = tmp_path_factory.mktemp("good") / "layout"
    peers.tar_layer_image(layout, "v1", [peers.pack(_GOOD)])
    return layout


_FILE = random.Random(1).randbytes(200_000)
_GOOD = archive(
    Member(b"folder/", type=DIRECTORY, mode=0o755),
    Member(b"folder/inside", b"inside\n"),
    Member(b"file", _FILE),
    Member(b"last", b"last\n"),
)


# -------------------- arguments


#: A command line, in which WEB is a repository and GOOD a layout, and what it is told.
_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "an upper-case repository": ("snapshot R.example/Team/Web:v1 DEST", "'R.example/Team/Web:v1'", "'team/web'"),
    "a URL": ("ls https://WEB", "it is a URL", "Leave out everything up to and including '://'"),
    "a tag of odd characters": ("ls 'WEB:v 1'", "'v 1' is no tag", "A tag is up to 128 of"),
    "a tag that is too long": (f"ls WEB:{'v' * 129}", "is no tag", "A tag is up to 128 of"),
    "a repository with ..": ("ls r.example/../web:v1", "'../web' is no repository name", "Write registry/repository"),
    "a port that is none": ("ls r.example:99999/web", "99999 is no port", "Write registry/repository"),
    "a reference that is empty": ("ls ''", "'' is no image reference", "Write registry/repository"),
    "a reference that is too long": (f"ls {'a' * 700}", "longer than 600 characters", "Write registry/repository"),
    "a short digest": ("cat WEB@sha256:1234 file", "'sha256:1234' is no digest", "64", "lower-case hexadecimal"),
    "a digest of another algorithm": (f"ls WEB@md5:{'0' * 32}", "is no digest", "A digest is sha256:"),
    "a digest in upper case": (f"ls WEB@sha256:{'A' * 64}", "is no digest", "lower-case hexadecimal"),
    "a digest that leads elsewhere": ("ls WEB@sha256:../../etc/passwd", "is no digest", "A digest is sha256:"),
    "a short digest of an app": ("ls good@sha256:1234 --app good=GOOD", "'sha256:1234' is no digest"),
    "a layout without a folder": ("ls oci-layout:", "it names no folder", "Write oci-layout:DIR"),
    "a layout's short digest": ("inspect GOOD@sha256:1234", "'sha256:1234' is no digest"),
    "a layout's odd tag": ("inspect 'GOOD:v 1'", "'v 1' is no tag", "DIR ends at the first colon"),
    "a platform that is none": ("snapshot GOOD:v1 DEST --platform x", "'x' is no platform", "linux/amd64"),
    "an app without a repository": ("mount DEST --app web", "'web' has no '='", "NAME=REPOSITORY", "--help"),
    "an app twice": ("ls web --app web=WEB --app web=WEB", "'web' is given twice"),
    "an app called ..": ("mount DEST --app ..=WEB", "--app ..: ", "'..' is no folder name", "like web or team/web"),
    "an app without a name": ("mount DEST --app =WEB", "'' is no folder name", "like web or team/web"),
    "an app with an empty part": ("mount DEST --app a//b=WEB", "--app a//b: ", "'' is no folder name"),
    "an app within another": ("mount DEST --app a=WEB --app a/b=WEB", "is inside the app a", "rename one of the two"),
    "an app of one version": ("mount DEST --app a=WEB:v1", "names the version v1", "leave it out"),
    "an app of a bad repository": ("mount DEST --app a=Team/Web", "--app a: ", "repository names are lower-case"),
    "an unknown command": ("snapshoot x", "no command 'snapshoot'", "did you mean snapshot?"),
    "an unknown option": ("ls GOOD:v1 --colour", "--colour", "fsmount ls --help"),
    "a missing argument": ("snapshot GOOD:v1", "Missing argument", "fsmount snapshot --help"),
    "a missing configuration": ("ls x --config DEST/none", "DEST/none cannot be read: No such file or directory"),
}  # fmt: skip


@pytest.mark.parametrize("name", _ARGUMENTS)
def test_malformed_arguments_are_exit_code_2_and_nothing_is_made(
    name: str, good: Path, tmp_path: Path
) -> None:
    places = {"GOOD": f"oci-layout:{good}", "WEB": "r.example/team/web", "DEST": f"{tmp_path}/DEST"}
    line, *words = (_placed(text, places) for text in _ARGUMENTS[name])
    _call(tmp_path, *shlex.split(line)).check(2, *words)
    assert not (tmp_path / "DEST").exists()


def _placed(text: str, places: Mapping[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(name, place)
    return text


_MISTAKES = """\
mountpoint = "srv/artifacts"
[cache]
size = "lots"
[apps.web]
repository = "registry.example.com/Team/Web"
platfrom = "linux/amd64"
[apps.".."]
repository = "registry.example.com/team/web"
tags = "v*"
[registries."https://registry.example.com"]
plain_http = "yes"
"""


@pytest.mark.parametrize("words", [("config", "check"), ("mount", "MOUNTPOINT"), ("ls", "web:v1")])
def test_a_configuration_is_told_all_its_mistakes_with_their_lines(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(_MISTAKES)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    line = (word.replace("MOUNTPOINT", str(mountpoint)) for word in words)
    outcome = _call(tmp_path, *line, "--config", file)
    wrong = {
        1: 'mountpoint: must be an absolute path',
        3: 'cache.size: must be a size above zero; write "20 GB"',
        5: "apps.web.repository:",
        6: "platform",
        7: "'..' is no folder name",
        9: 'must be a list of patterns; write ["v*", "main"]',
        10: 'is no registry; write its host and port',
        11: "must be true or false",
    }  # fmt: skip
    outcome.check(2, f"the configuration has {len(wrong)} problems:")
    told = outcome.text.splitlines()
    for number, words_ in wrong.items():
        assert [text for text in told if text.startswith(f"{file}:{number}: ") and words_ in text], (
            number,
            told,
        )
    assert mounts.find(mountpoint) is None and not daemons(mountpoint)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[apps.web]\nrepository = "registry.example.com/web\n', ("config.toml:2: ", "In TOML, text is in quotes")),
        (b"[cache]\npath = \xff\n", ("config.toml:2: ", "0xff is not UTF-8")),
    ],
    ids=["no TOML", "no UTF-8"],
)  # fmt: skip
def test_a_configuration_that_cannot_be_parsed_is_told_where(
    content: bytes, words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    _call(tmp_path, "config", "check", "--config", tmp_path / "config.toml").check(2, *words)


def test_an_app_that_is_not_configured_is_told_as_such(good: Path, tmp_path: Path) -> None:
    # Such a name may be one of Docker Hub, which a process without a network cannot ask.
    alone = ["unshare", "--net", *command("ls", "godo:v1", "--app", f"good=oci-layout:{good}")]
    done = subprocess.run(
        alone, env=environment(tmp_path / "cache"), capture_output=True, timeout=60, check=False
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr.decode(), tmp_path)
    outcome.check(done.returncode, "no app", "'godo'")
    assert outcome.code in (2, 4, 6)


# -------------------- images

Maker: TypeAlias = Callable[[Path, str], None]


#: The exit code of a command, and the errno in the mount.
_INVALID, _CORRUPT = (1, errno.EBADMSG), (7, errno.EBADMSG)
_UNSUPPORTED, _MISSING = (1, errno.EOPNOTSUPP), (4, errno.ENOENT)


class Bad:
    """An image that cannot be shown; `last` is the file in it that cannot be known before the whole is.

    `names` says whether the message must name the layer or the image. A layer that is `kept` is good by itself.
    """

    def __init__(
        self,
        codes: tuple[int, int],
        make: Maker,
        *words: str,
        names: Literal["layer", "image"] = "layer",
        kept: bool = False,
    ) -> None:
        self.code, self.errno = codes
        self.make, self.words, self.names, self.kept = make, words, names, kept


def _layers(*layers: peers.LayerBlob) -> Maker:
    def make(layout: Path, tag: str) -> None:
        peers.tar_layer_image(layout, tag, layers)

    return make


def _tar(*parts: Member | bytes, end: bytes = END) -> Maker:
    """One layer, of these members and of one before them that is good."""
    return _layers(peers.pack(archive(Member(b"first", b"first\n"), *parts, end=end)))


def _blob(content: bytes, media_type: str = _GZIP, *, diff_id: str = _NONE) -> Maker:
    """One layer of these bytes, whatever they are."""
    return _layers(peers.LayerBlob(content, media_type, diff_id))


def _spoilt(part: Literal["manifest", "config", "layer"], spoil: Callable[[Path], object]) -> Maker:
    """A good image, one of whose blobs came to harm in the layout."""

    def make(layout: Path, tag: str) -> None:
        layer = peers.pack(archive(Member(b"last", tag.encode() * 500)))
        top = peers.tar_layer_image(layout, tag, [layer], config={"author": tag})
        manifest = json.loads(_stored(layout, str(top["digest"])).read_bytes())
        digests = {"manifest": top, "config": manifest["config"], "layer": manifest["layers"][0]}
        spoil(_stored(layout, str(digests[part]["digest"])))

    return make


def _stored(layout: Path, digest: str) -> Path:
    return layout / "blobs/sha256" / digest.removeprefix("sha256:")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 20)


def _manifest(**fields: peers.Json) -> Maker:
    """An image with other fields in its manifest; those that are None are left out."""

    def make(layout: Path, tag: str) -> None:
        config: peers.Json = {"rootfs": {"type": "layers", "diff_ids": [_NONE]}, "author": tag}
        manifest: dict[str, peers.Json] = {
            "schemaVersion": 2,
            "mediaType": peers.MANIFEST,
            "config": peers.put_blob(
                layout, json.dumps(config).encode(), f"{peers.OCI}config.v1+json"
            ),
            "layers": [peers.put_blob(layout, gzip.compress(_GOOD, mtime=0), _GZIP)],
        }  # fmt: skip
        manifest |= fields
        shown = {key: value for key, value in manifest.items() if value is not None}
        peers.put_manifest(layout, tag, {"mediaType": "", **shown})

    return make


def _configured(content: bytes) -> Maker:
    """An image whose configuration is these bytes."""

    def make(layout: Path, tag: str) -> None:
        _manifest(config=peers.put_blob(layout, content, f"{peers.OCI}config.v1+json"))(layout, tag)

    return make


def _index(*platforms: str, depth: int = 1) -> Maker:
    """An index of images for these platforms, in as many indexes as it is deep."""

    def make(layout: Path, tag: str) -> None:
        listed = [
            peers.tar_layer_image(layout, None, [peers.pack(_GOOD)], platform=name) for name in platforms
        ]
        for _ in range(depth - 1):
            listed = [peers.image_index(layout, None, listed)]
        peers.image_index(layout, tag, listed)

    return make


def _titled(title: str) -> Maker:
    def make(layout: Path, tag: str) -> None:
        peers.oras_artifact(layout, tag, {title: b"content\n"})

    return make


def _of_layer(digest: str, size: int) -> Maker:
    """An image that describes its layer so."""
    return _manifest(layers=[{"mediaType": _GZIP, "digest": digest, "size": size}])


def _hardlink(target: bytes) -> Maker:
    folder = Member(b"folder/", type=DIRECTORY)
    return _tar(folder, Member(b"last", type=HARDLINK, link=target))


_schema_1 = _manifest(
    schemaVersion=1,
    mediaType=f"{peers.DOCKER}distribution.manifest.v1+prettyjws",
    fsLayers=[{"blobSum": _NONE}],
    config=None,
    layers=None,
)

_LAST = Member(b"last", b"last\n")
_TWICE = peers.pack(archive(Member(b"last", b"twice\n")))
_GZIPPED = gzip.compress(archive(Member(b"last", random.Random(2).randbytes(3000))), mtime=0)
_BROKEN = _GZIPPED[:1000] + bytes(100) + _GZIPPED[1100:]
_ZSTD = zstandard.ZstdCompressor().compress(archive(Member(b"last", random.Random(3).randbytes(3000))))
_BOMB = archive(Member(b"last", bytes(2**22)))
_TOO_MUCH = f"more than {2**22} bytes: refused as a bomb"
_TWO_LAYERS = json.dumps({"rootfs": {"diff_ids": [_NONE, _NONE]}}).encode()

_BAD: Mapping[str, Bad] = {
    # manifests
    "schema-1": Bad(_UNSUPPORTED, _schema_1, "schema 1", "Push it again", names="image"),
    "schema-3": Bad(_INVALID, _manifest(schemaVersion=3), "schemaVersion is not 2: 3", names="image"),
    "manifest-type": Bad(_UNSUPPORTED, _manifest(mediaType="a/b+json"), "'a/b+json' are not read", names="image"),
    "manifest-no-config": Bad(_INVALID, _manifest(config=None), "has no 'config'", names="image"),
    "manifest-no-size": Bad(_INVALID, _of_layer(_NONE, -1), "layers[0].size is not a size", "-1", names="image"),
    "manifest-bad-digest": Bad(
        _INVALID, _of_layer("sha256:../../etc/passwd", 9), "layers[0].digest", "is no digest", names="image"
    ),
    "manifest-of-two-kinds": Bad(_INVALID, _manifest(manifests=[]), "must not have 'manifests'", names="image"),
    "manifest-altered": Bad(_CORRUPT, _spoilt("manifest", _flip), "is not what its digest names", names="image"),
    "manifest-missing": Bad(_MISSING, _spoilt("manifest", Path.unlink), "is not there", names="image"),
    "many-layers": Bad(_UNSUPPORTED, _layers(*[_TWICE] * 512), "512 layers; at most 511 are read", names="image"),
    # indexes
    "other-platforms": Bad(
        _MISSING,
        _index("linux/s390x", "linux/riscv64"),
        "no image for linux/",
        "There are images for: linux/riscv64, linux/s390x.",
        names="image",
    ),
    "no-platforms": Bad(_MISSING, _index(), "no image for linux/", "lists no images at all", names="image"),
    "deep-index": Bad(_INVALID, _index("linux/amd64", depth=4), "more than 4 indexes deep", names="image"),
    # configurations
    "config-no-json": Bad(_INVALID, _configured(b"no json"), "configuration is no JSON", names="image"),
    "config-no-layers": Bad(_INVALID, _configured(b"{}"), "configuration has no 'rootfs'", names="image"),
    "config-of-two-layers": Bad(_INVALID, _configured(_TWO_LAYERS), "has 1 layers", "names 2", names="image"),
    "config-altered": Bad(_CORRUPT, _spoilt("config", _flip), "is not what its digest names", names="image"),
    "config-missing": Bad(_MISSING, _spoilt("config", Path.unlink), "is not there", names="image"),
    # blobs
    "encrypted": Bad(_UNSUPPORTED, _blob(_GZIPPED, f"{_GZIP}+encrypted"), "is encrypted"),
    "unknown-type": Bad(
        _UNSUPPORTED, _blob(_GZIPPED, "a/b"), "of type 'a/b', which is no file tree", "Mountable are tar layers"
    ),
    "xz": Bad(_UNSUPPORTED, _blob(lzma.compress(_GOOD)), "compressed with xz", "Push the image again with"),
    "bzip2": Bad(_UNSUPPORTED, _blob(bz2.compress(_GOOD)), "compressed with bzip2", "Push the image again with"),
    "no-layer": Bad(_INVALID, _blob(b"no layer at all " * 99), "b'no layer at all '", "expected a tar"),
    "empty-gzip": Bad(_INVALID, _blob(b"\x1f\x8b\x08"), "gzip stream is cut short"),
    "short-gzip": Bad(_INVALID, _blob(_GZIPPED[:-20]), "gzip stream is cut short"),
    "broken-gzip": Bad(_INVALID, _blob(_BROKEN), "gzip stream, member 1"),
    "short-zstd": Bad(_INVALID, _blob(_ZSTD[:-20]), "zstd stream is cut short"),
    "broken-zstd": Bad(_INVALID, _blob(_ZSTD + b"no frame"), "zstd stream"),
    "gzip-bomb": Bad(_INVALID, _layers(peers.pack(_BOMB)), _TOO_MUCH, "raise cache.max_layer_size"),
    "zstd-bomb": Bad(_INVALID, _layers(peers.pack(_BOMB, "zstd")), _TOO_MUCH, "raise cache.max_layer_size"),
    "plain-bomb": Bad(_INVALID, _layers(peers.pack(_BOMB, "tar")), _TOO_MUCH, "raise cache.max_layer_size"),
    "layer-altered": Bad(_CORRUPT, _spoilt("layer", _flip), "another digest", "push the image again if it"),
    "layer-truncated": Bad(_CORRUPT, _spoilt("layer", _shorten), "bytes, not the"),
    "layer-missing": Bad(_MISSING, _spoilt("layer", Path.unlink), "is not there"),
    "wrong-diff-id": Bad(_CORRUPT, _blob(_GZIPPED), "inflated it is sha256:", f"says {_NONE}", "push it again"),
    # archives
    "dot-dot": Bad(_INVALID, _tar(Member(b"a/../../b", b"x")), "'a/../../b'", "without .. components"),
    "pax-dot-dot": Bad(_INVALID, _tar(pax({"path": "../b"}), Member(b"b")), "'../b'", "without .. components"),
    "hardlink-to-dot-dot": Bad(_INVALID, _hardlink(b"../first"), "'last'", "hardlink target", "without .."),
    "hardlink-to-nothing": Bad(
        _INVALID, _hardlink(b"no/where"), "'last'", "'no/where'", "no file of the image", names="image", kept=True
    ),
    "hardlink-to-itself": Bad(_INVALID, _hardlink(b"./last"), "'last' is a hardlink to itself"),
    "hardlink-to-a-folder": Bad(_INVALID, _hardlink(b"folder"), "'last' is a hardlink to the directory 'folder'"),
    "whiteout-of-no-name": Bad(_INVALID, _tar(Member(b"d/.wh.")), "'d/.wh.' names nothing that could be removed"),
    "whiteout-of-dot": Bad(_INVALID, _tar(Member(b"d/.wh..")), "'d/.wh..' names nothing that could be removed"),
    "whiteout-of-dot-dot": Bad(_INVALID, _tar(Member(b"d/.wh...")), "'d/.wh...' names nothing"),
    "pax-length": Bad(_INVALID, _tar(Member(b"x", b"99 path=y\n", type=b"x"), _LAST), "expected a PAX record"),
    "pax-newline": Bad(_INVALID, _tar(Member(b"x", b"9 path=yz", type=b"x"), _LAST), "expected a PAX record"),
    "pax-size": Bad(_INVALID, _tar(pax({"size": "-1"}), _LAST), "expected size to be a number"),
    "pax-nul": Bad(_INVALID, _tar(pax({"path": "la\0st"}), _LAST), "expected no NUL"),
    "pax-alone": Bad(_INVALID, _tar(pax({"path": "last"})), "expected a member after its extension header"),
    "checksum": Bad(_INVALID, _tar(Member(b"last", checksum=b"000001\0 ")), "header whose checksum is right"),
    "negative-size": Bad(_INVALID, _tar(Member(b"last", size=base256(-1, 12))), "a size from 0", "-1"),
    "long-name": Bad(_INVALID, _tar(pax({"path": "n" * 256}), _LAST), "components of at most 255"),
    "member-type": Bad(_INVALID, _tar(Member(b"last", type=b"Z")), "expected a member type", "b'Z'"),
    "no-name": Bad(_INVALID, _tar(Member(b"./", b"x")), "where the path is the root"),
    "short-tar": Bad(_INVALID, _tar(Member(b"last", b"x", size=3000), end=b""), "'last'", "the archive ends"),
    # artifacts
    "title": Bad(_INVALID, _titled("../../etc/passwd"), "'../../etc/passwd' is no path within it", names="image"),
}  # fmt: skip

_EVERY_BAD = pytest.mark.parametrize("tag", _BAD)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout with a tag for each of `_BAD`, and `lower-missing`, the lower of whose two layers is not there."""
    layout = tmp_path_factory.mktemp("bad") / "layout"
    for tag, row in _BAD.items():
        row.make(layout, tag)
    folder = Member(b"folder/", type=DIRECTORY, mode=0o755)
    layers = [peers.pack(archive(folder, Member(b"folder/%s" % name))) for name in (b"lower", b"upper")]
    peers.tar_layer_image(layout, "lower-missing", layers)
    _stored(layout, peers.digest_of(layers[0].content)).unlink()
    return layout


@pytest.fixture(scope="module")
def snapshot(bad: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """What becomes of a snapshot of a tag, which is tried once."""

    @cache
    def snapshot(tag: str) -> Outcome:
        work = tmp_path_factory.mktemp("snapshot")
        return _call(work, "snapshot", f"oci-layout:{bad}:{tag}", work / "DEST", "--config", config)

    return snapshot


@_EVERY_BAD
def test_a_snapshot_of_a_bad_image_says_what_is_wrong_and_leaves_nothing(
    tag: str, snapshot: Callable[[str], Outcome]
) -> None:
    snapshot(tag).check(_BAD[tag].code, *_BAD[tag].words)
    snapshot(tag).check_nothing_left(kept=_BAD[tag].kept)


@_EVERY_BAD
def test_the_message_names_the_layer_or_the_image_that_is_bad(
    tag: str, snapshot: Callable[[str], Outcome], bad: Path
) -> None:
    # In the log of a mount the message is all there is to find it by.
    text = snapshot(tag).text
    listed = json.loads((bad / "index.json").read_text())["manifests"]
    (digest,) = (one["digest"] for one in listed if one["annotations"][_NAME] == tag)
    unreadable = tag in ("manifest-altered", "manifest-missing")
    manifest = {} if unreadable else json.loads(_stored(bad, digest).read_bytes())
    if _BAD[tag].names == "layer":
        assert manifest["layers"][0]["digest"] in text
    else:
        of_layout = re.escape(f"oci-layout:{bad}")
        config = manifest.get("config", {}).get("digest", digest)
        assert re.search(f"{digest}|{config}|{of_layout}:{tag}|sha256:[0-9a-f]{{64}} of {of_layout}", text), (
            text
        )


@dataclass(frozen=True)
class Mounted:
    """A mount, and its log."""

    path: Path
    log: Path

    def check_alive(self) -> None:
        """A good app is answered: its listing, a name that is not there, and the whole mount."""
        assert sorted(os.listdir(self.path / "good/v1")) == ["file", "folder", "last"]
        assert not (self.path / "good/v1" / f"{random.random()}").exists()
        assert (self.path / "good/v1/file").read_bytes() == _FILE
        os.statvfs(self.path)


def _code(operation: Callable[[Path], object], path: Path) -> str:
    """The name of the errno with which an operation fails."""
    try:
        operation(path)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "nothing"


def _is_of_listing(found: str, code: int) -> bool:
    """Whether a listing failed as it should: not with an ENOENT of READDIR, which readdir(3) takes for the end."""
    return found != "nothing" if code == errno.ENOENT else found == errno.errorcode[code]


@pytest.mark.usefixtures("troubled")  # that is, while registries stall, refuse and break off
@_EVERY_BAD
def test_in_the_mount_a_bad_image_has_its_errno_and_harms_no_other(mount: Mounted, tag: str) -> None:
    row, root = _BAD[tag], mount.path / "bad" / tag
    log = mount.log.stat().st_size
    last = root / "last"
    listing = _code(os.listdir, root)
    assert _is_of_listing(listing, row.errno), listing
    assert [_code(os.stat, last), _code(Path.read_bytes, last)] == [errno.errorcode[row.errno]] * 2
    said = mount.log.read_bytes()[log:].decode()
    assert f": {listing}: " in said and row.words[0] in said
    assert "Traceback" not in said
    mount.check_alive()


@pytest.mark.parametrize("folder", ["", "folder"])
def test_in_the_mount_no_folder_is_listed_in_part(mount: Mounted, folder: str) -> None:
    listing = _code(os.listdir, mount.path / "bad/lower-missing" / folder)
    assert _is_of_listing(listing, errno.ENOENT), listing


@pytest.mark.parametrize("words", [("ls", "-lR"), ("cat",), ("inspect",), ("snapshot",)], ids=" ".join)
@pytest.mark.parametrize("tag", ["schema-1", "layer-altered", "dot-dot"])
def test_every_command_says_the_same_of_a_bad_image(
    words: tuple[str, ...], tag: str, bad: Path, config: Path, tmp_path: Path
) -> None:
    row = _BAD[tag]
    more = {"cat": ["last"], "snapshot": [tmp_path / "DEST"]}.get(words[0], [])
    outcome = _run(tmp_path, *words, f"oci-layout:{bad}:{tag}", *more, "--config", config)
    if words == ("inspect",) and row.names == "layer":
        assert (outcome.code, outcome.text) == (0, "")  # it looks into no layer
    else:
        outcome.check(row.code, *row.words)
    outcome.check_nothing_left()


def test_after_a_refusal_inspect_shows_that_nothing_of_the_layer_is_here(bad: Path, tmp_path: Path) -> None:
    source = f"oci-layout:{bad}:layer-altered"
    assert _call(tmp_path, "ls", source).code == 7
    outcome = _call(tmp_path, "inspect", source, "--json")
    (layer,) = json.loads(outcome.out)["layers"]
    assert layer["indexed"] is False


def test_what_was_printed_of_a_bad_layer_ends_with_its_exit_code(tmp_path: Path) -> None:
    # All of the file has streamed before the digest at the layer's end tells that it is wrong.
    tar = archive(Member(b"file", bytes(range(256)) * 40_000), Member(b"last", b"last\n"))
    _layers(peers.LayerBlob(tar, _TAR, _NONE))(tmp_path / "layout", "v1")
    outcome = _call(tmp_path, "cat", f"oci-layout:{tmp_path / 'layout'}:v1", "file")
    assert outcome.code == 7
    assert "inflated it is" in outcome.text
    assert _chunks(tmp_path / "cache") == 0


def test_without_a_bound_of_its_own_a_layer_may_be_64_times_its_size_and_1_gib(tmp_path: Path) -> None:
    blob, layout = tmp_path / "blob", tmp_path / "layout"
    with blob.open("wb") as file, zstandard.ZstdCompressor(1).stream_writer(file) as packed:
        packed.write(Member(b"last", size=2**30 + 2**25).header())
        for _ in range(2**6 + 2):
            packed.write(bytes(2**24))
    bound = 64 * blob.stat().st_size + 2**30
    assert bound < 2**30 + 2**25
    peers.tar_layer_image(layout, "v1", [peers.LayerBlob(blob, f"{_TAR}+zstd", _NONE)])
    config = tmp_path / "config.toml"
    config.write_text('[cache]\nsize = "16 MiB"\n')  # so that the test does not write a gigabyte
    work = tmp_path / "work"
    outcome = _call(work, "snapshot", f"oci-layout:{layout}:v1", work / "DEST", "--config", config)
    outcome.check(1, f"more than {bound} bytes: refused as a bomb", "raise cache.max_layer_size")
    outcome.check_nothing_left()


# What looks dangerous and is none, because nothing leaves the tree.

_ODD: Mapping[str, tuple[Callable[[bytes], list[bytes]], set[bytes]]] = {
    "an absolute name": (lambda outside: [archive(Member(outside + b"/last", b"ours\n"))], {b"last"}),
    "an absolute hardlink": (
        lambda outside: [archive(_LAST, Member(b"link", type=HARDLINK, link=b"/last"))],
        {b"last", b"link"},
    ),
    "a name below a symlink of the layer": (
        lambda outside: [archive(Member(b"out", type=SYMLINK, link=outside), Member(b"out/last", b"ours\n"))],
        {b"last"},
    ),
    "a name below a symlink of a lower layer": (
        lambda outside: [
            archive(Member(b"out", type=SYMLINK, link=outside)),
            archive(Member(b"out/last", b"ours\n")),
        ],
        {b"last"},
    ),
    "a hardlink to a symlink": (
        lambda outside: [
            archive(Member(b"out", type=SYMLINK, link=outside), Member(b"link", type=HARDLINK, link=b"out"))
        ],
        {b"out", b"link"},
    ),
    "a whiteout of nothing": (lambda outside: [archive(Member(b"d/.wh.none"), _LAST)], {b"last"}),
}


@pytest.mark.parametrize("name", _ODD)
def test_no_archive_writes_outside_of_the_destination(name: str, tmp_path: Path) -> None:
    make, expected = _ODD[name]
    outside, layout = tmp_path / "outside", tmp_path / "layout"
    outside.mkdir()
    peers.tar_layer_image(layout, "v1", [peers.pack(tar) for tar in make(os.fsencode(outside))])
    assert _call(tmp_path, "snapshot", f"oci-layout:{layout}:v1", tmp_path / "DEST").code == 0
    tree = peers.tree_listing(tmp_path / "DEST")
    assert {os.path.basename(path) for path, node in tree.items() if node.kind != "folder"} == expected
    assert os.listdir(outside) == []


# -------------------- what is not there


#: As _ARGUMENTS.
_ABSENT: Mapping[str, tuple[str, ...]] = {
    "a tag of a layout": ("ls GOOD:v2", "GOOD has no image named 'v2'", "There are: v1."),
    "a digest of a layout": (f"ls GOOD@{_NONE}", f"manifest {_NONE} of GOOD is not there"),
    "a layout": ("ls GOOD-none:v1", "there is no folder /", "-none"),
    "a tag of an app": ("ls good:v2 --app good=GOOD", "GOOD has no image named 'v2'", "There are: v1."),
    "an odd tag of an app": ("ls good:.. --app good=GOOD", "GOOD has no image named '..'", "There are: v1."),
    "a path to list": ("ls GOOD:v1 no/such", "no 'no/such' in it", "fsmount ls SOURCE"),
    "a path to print": ("cat GOOD:v1 file/inside", "no 'file/inside", "fsmount ls SOURCE"),
    "a folder to write": ("snapshot GOOD:v1 DEST --path none", "of GOOD has no folder /none"),
    "a file as a folder": ("snapshot GOOD:v1 DEST --path file", "of GOOD has no folder /file"),
    "a tag of a registry": ("snapshot HOST/good:v2 DEST", "HOST/good:v2 does not exist"),
    "a repository": ("snapshot HOST/none:v1 DEST", "HOST/none:v1 does not exist"),
    "a digest of a registry": (f"ls HOST/good@{_NONE}", f"HOST/good@{_NONE} does not exist"),
}


@pytest.mark.parametrize("name", _ABSENT)
def test_what_is_missing_is_exit_code_4(name: str, good: Path, front: CountingProxy, tmp_path: Path) -> None:
    places = {"GOOD": f"oci-layout:{good}", "HOST": front.host, "DEST": f"{tmp_path}/DEST"}
    line, *words = (_placed(text, places) for text in _ABSENT[name])
    _call(tmp_path, *shlex.split(line)).check(4, *words)
    assert not (tmp_path / "DEST").exists()


def test_a_folder_that_is_no_layout_is_told_as_such(tmp_path: Path) -> None:
    outcome = _call(tmp_path, "ls", f"oci-layout:{tmp_path}:v1")
    outcome.check(2, f"{tmp_path} is no OCI image layout", "skopeo copy")


@pytest.mark.parametrize(
    ("index", "words"),
    [(b"{", "is no JSON"), (b"[]", "is not a JSON object"), (b'{"schemaVersion": 2}', "has no 'manifests'")],
    ids=["no JSON", "no object", "no list"],
)
def test_a_layout_whose_index_is_broken_is_told_as_such(index: bytes, words: str, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    peers.tar_layer_image(layout, "v1", [peers.pack(_GOOD)])
    (layout / "index.json").write_bytes(index)
    _call(tmp_path, "ls", f"oci-layout:{layout}:v1").check(1, words, f"{layout}/index.json")


def test_a_folder_is_no_file_to_print(good: Path, tmp_path: Path) -> None:
    outcome = _call(tmp_path, "cat", f"oci-layout:{good}:v1", "folder")
    outcome.check(2, "'folder' is no regular file", "fsmount ls -l")


# -------------------- registries


class Trouble:
    """What goes wrong with one part of an image in a registry; the repository has the name of the row.

    Without a kind, half of the layer is missing in the registry's own storage.
    """

    def __init__(
        self,
        kind: Literal["stall", "cut", "flip", "refuse"] | None,
        at: int,
        part: Literal["manifest", "config", "layer"],
        codes: tuple[int, int],
        *words: str,
    ) -> None:
        self.kind, self.at, self.part, self.words = kind, at, part, words
        self.code, self.errno = codes


_GONE, _SLOWER, _DENIED = (6, errno.EHOSTUNREACH), (6, errno.EAGAIN), (5, errno.EACCES)
_TROUBLES: Mapping[str, Trouble] = {
    "stall": Trouble("stall", 0, "manifest", (6, errno.ETIMEDOUT), "HOST/stall has not answered within 10 s"),
    "cut": Trouble("cut", 1000, "layer", _GONE, "/v2/cut/blobs/sha256:", "broke off"),
    "flip": Trouble("flip", 1000, "layer", _CORRUPT, "another digest", "push the image again if it persists"),
    "flip-manifest": Trouble("flip", 9, "manifest", _CORRUPT, "HOST/flip-manifest@sha256:", "its digest names"),
    "flip-config": Trouble("flip", 9, "config", _CORRUPT, "of HOST/flip-config", "its digest names"),
    "refuse-400": Trouble("refuse", 400, "manifest", _GONE, "HOST/refuse-400@sha256:", "answers 400"),
    "refuse-401": Trouble("refuse", 401, "manifest", _DENIED, "HOST/refuse-401@", "401", "fsmount login HOST"),
    "refuse-403": Trouble("refuse", 403, "manifest", _DENIED, "HOST/refuse-403@", "403", "fsmount login HOST"),
    "refuse-404": Trouble("refuse", 404, "manifest", _MISSING, "HOST/refuse-404@sha256:", "does not exist"),
    "refuse-429": Trouble("refuse", 429, "manifest", _SLOWER, "HOST/refuse-429@sha256:", "answers 429"),
    "refuse-500": Trouble("refuse", 500, "manifest", _GONE, "HOST/refuse-500@sha256:", "answers 500"),
    "config-403": Trouble("refuse", 403, "config", _DENIED, "of HOST/config-403", "blob sha256:", "answers 403"),
    "layer-403": Trouble("refuse", 403, "layer", _DENIED, "of HOST/layer-403", "blob sha256:", "answers 403"),
    "layer-404": Trouble("refuse", 404, "layer", _MISSING, "of HOST/layer-404", "blob sha256:", "does not exist"),
    "layer-416": Trouble("refuse", 416, "layer", _GONE, "of HOST/layer-416", "blob sha256:", "answers 416"),
    "layer-429": Trouble("refuse", 429, "layer", _SLOWER, "of HOST/layer-429", "blob sha256:", "answers 429"),
    "layer-503": Trouble("refuse", 503, "layer", _GONE, "of HOST/layer-503", "blob sha256:", "answers 503"),
    "half": Trouble(None, 0, "layer", _CORRUPT, "of HOST/half has", "bytes, not the", "descriptor promises"),
}  # fmt: skip

_EVERY_TROUBLE = pytest.mark.parametrize("name", _TROUBLES)

#: Repositories whose list of tags is refused.
_UNLISTED = {"tags-401": errno.EACCES, "tags-404": errno.ENOENT, "tags-500": errno.EHOSTUNREACH}


@dataclass(frozen=True)
class Registries:
    """The hosts: of all that is bad, of one that wants a password, and of one where nobody listens."""

    front: CountingProxy
    private: str
    dead: str


@pytest.fixture(scope="module")
def registries(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registries]:
    if why := peers.have("docker-registry"):
        pytest.skip(why)
    work = tmp_path_factory.mktemp("registry")
    storage, layout = work / "storage", work / "layout"
    with ExitStack() as stack:
        registry = stack.enter_context(peers.docker_registry(storage))
        front = stack.enter_context(CountingProxy(registry.host))
        private = stack.enter_context(peers.docker_registry(storage, htpasswd={"user": "right-word"}))
        nobody = stack.enter_context(socket.socket())
        nobody.bind(("127.0.0.1", 0))
        for name in ("good", *_UNLISTED):
            peers.push(good, "v1", registry.host, name)
        front.faults += [Fault("refuse", int(name[-3:]), f"/v2/{name}/tags/") for name in _UNLISTED]
        for name, trouble in _TROUBLES.items():
            # An image of its own: what is known by its digest is not asked for a second time.
            layer = peers.pack(archive(Member(b"last", random.Random(name).randbytes(3000))))
            top = peers.tar_layer_image(layout, name, [layer], config={"author": name})
            peers.push(layout, name, registry.host, name, as_tag="v1")
            _make_trouble(front, storage, layout, name, trouble, str(top["digest"]))
        yield Registries(front, private.host, f"127.0.0.1:{nobody.getsockname()[1]}")


def _make_trouble(
    front: CountingProxy, storage: Path, layout: Path, name: str, trouble: Trouble, digest: str
) -> None:
    manifest = json.loads(_stored(layout, digest).read_bytes())
    layer, config = manifest["layers"][0]["digest"], manifest["config"]["digest"]
    path = {"manifest": f"manifests/{digest}", "config": f"blobs/{config}", "layer": f"blobs/{layer}"}
    if trouble.kind is not None:
        front.faults.append(Fault(trouble.kind, trouble.at, f"/v2/{name}/{path[trouble.part]}"))
    else:
        (data,) = storage.glob(f"docker/registry/v2/blobs/sha256/*/{layer.removeprefix('sha256:')}/data")
        _shorten(data)


@pytest.fixture(scope="module")
def front(registries: Registries) -> CountingProxy:
    return registries.front


class Troubled(NamedTuple):
    """What becomes of a snapshot, and of a listing and a read in the mount."""

    snapshot: Future[Outcome]
    listing: Future[str]
    reading: Future[str]


@pytest.fixture(scope="module")
def troubled(
    pool: ThreadPoolExecutor, front: CountingProxy, mount: Mounted, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Troubled]:
    """All at once, for most of the time they wait."""
    outcomes = {}
    for name in _TROUBLES:
        work, root = tmp_path_factory.mktemp("troubled"), mount.path / "registry" / name / "v1"
        outcomes[name] = Troubled(
            pool.submit(_run, work, "snapshot", f"{front.host}/{name}:v1", work / "DEST"),
            pool.submit(_code, os.listdir, root),
            pool.submit(_code, Path.read_bytes, root / "last"),
        )
    return outcomes


@_EVERY_TROUBLE
def test_trouble_with_a_registry_is_told_and_leaves_nothing(
    troubled: Mapping[str, Troubled], front: CountingProxy, name: str
) -> None:
    row, outcome = _TROUBLES[name], troubled[name].snapshot.result()
    outcome.check(row.code, *(word.replace("HOST", front.host) for word in row.words))
    outcome.check_nothing_left()


@_EVERY_TROUBLE
def test_in_the_mount_trouble_with_a_registry_has_its_errno_and_a_logged_reason(
    troubled: Mapping[str, Troubled], front: CountingProxy, mount: Mounted, name: str
) -> None:
    row, listing = _TROUBLES[name], troubled[name].listing.result()
    mount.check_alive()
    assert _is_of_listing(listing, row.errno), listing
    assert troubled[name].reading.result() == errno.errorcode[row.errno]
    reason = row.words[0].replace("HOST", front.host)
    assert [
        line for line in mount.log.read_text().splitlines() if f": {listing}: " in line and reason in line
    ]


def test_a_registry_that_does_not_listen_is_exit_code_6(registries: Registries, tmp_path: Path) -> None:
    outcome = _call(tmp_path, "snapshot", f"{registries.dead}/team/web:v1", tmp_path / "DEST")
    outcome.check(6, registries.dead, "cannot be reached", "Connection refused")
    outcome.check_nothing_left()


_DENIAL = (5, "no access to HOST/good:v1", "fsmount login HOST")
_BROKEN_FILE = (2, "login writes a good one", "config.json")
_CREDENTIALS: Mapping[str, tuple[peers.Json, tuple[int, str, str]]] = {
    "none": ({}, _DENIAL),
    "a wrong password": ({"auths": {"HOST": {"auth": b64encode(b"user:wrong-word").decode()}}}, _DENIAL),
    "an unknown user": ({"auths": {"HOST": {"username": "who", "password": "wrong-word"}}}, _DENIAL),
    "a broken file": ({"auths": "wrong-word"}, _BROKEN_FILE),
    "a broken entry": ({"auths": {"HOST": {"auth": "wrong-word"}}}, _BROKEN_FILE),
}


@pytest.mark.parametrize("name", _CREDENTIALS)
def test_without_the_right_password_it_is_exit_code_5_and_no_secret_is_shown(
    name: str, registries: Registries, tmp_path: Path
) -> None:
    content, (code, *words) = _CREDENTIALS[name]
    _log_in(tmp_path, content, registries.private)
    outcome = _call(tmp_path, "snapshot", f"{registries.private}/good:v1", tmp_path / "DEST")
    shutil.rmtree(tmp_path / ".docker")
    outcome.check(code, *(word.replace("HOST", registries.private) for word in words))
    outcome.check_nothing_left()
    assert "wrong-word" not in outcome.text
    assert b64encode(b"user:wrong-word").decode() not in outcome.text


def test_with_the_right_password_it_is_shown(registries: Registries, tmp_path: Path) -> None:
    right = b64encode(b"user:right-word").decode()
    _log_in(tmp_path, {"auths": {"HOST": {"auth": right}}}, registries.private)
    outcome = _call(tmp_path, "cat", f"{registries.private}/good:v1", "last")
    assert (outcome.code, outcome.out, outcome.text) == (0, b"last\n", "")


def _log_in(home: Path, content: peers.Json, host: str) -> None:
    """Writes what `docker login` would, to where it would."""
    (home / ".docker").mkdir()
    (home / ".docker/config.json").write_text(json.dumps(content).replace("HOST", host))


# -------------------- one mount for all of the above


@pytest.fixture(scope="module")
def mount(
    good: Path, bad: Path, registries: Registries, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mounted]:
    work = tmp_path_factory.mktemp("mount")
    (work / "no-layout").mkdir()
    _log_in(work, {"auths": {"HOST": {"username": "user", "password": "wrong-word"}}}, registries.private)
    repositories = {
        "good": f"oci-layout:{good}",
        "bad": f"oci-layout:{bad}",
        "none": f"oci-layout:{work}/none",
        "no-layout": f"oci-layout:{work}/no-layout",
        "dead": f"{registries.dead}/team/web",
        "private": f"{registries.private}/good",
        "missing": f"{registries.front.host}/none",
    }
    for name in ("good", *_TROUBLES, *_UNLISTED):
        repositories[f"registry/{name}"] = f"{registries.front.host}/{name}"
    apps = (f"{name}={repository}" for name, repository in repositories.items())
    with mounted(work, *apps, config=_CONFIG) as path:
        yield Mounted(path, work / "cache/log/mount.log")


_PLACES: Mapping[str, tuple[str, int]] = {
    "an app": ("none-such", errno.ENOENT),
    "a folder of apps": ("registry/none-such", errno.ENOENT),
    "a tag": ("good/none-such", errno.ENOENT),
    "a tag of odd form": ("good/not a tag", errno.ENOENT),
    "a digest": (f"good/{_NONE}", errno.ENOENT),
    "a digest of bad form": ("good/sha256:1234", errno.ENOENT),
    "a tag of another digest": (f"good/v1@{_NONE}", errno.ENOENT),
    "a file": ("good/v1/none-such", errno.ENOENT),
    "a file below a file": ("good/v1/file/none-such", errno.ENOTDIR),
    "a name that is too long": (f"good/v1/{'n' * 256}", errno.ENAMETOOLONG),
    "a tag of a registry": ("registry/good/none-such", errno.ENOENT),
    "a digest of a registry": (f"registry/good/{_NONE}", errno.ENOENT),
    "a tag of a missing repository": ("missing/v1", errno.ENOENT),
    "a tag of a missing layout": ("none/v1", errno.ENOENT),
    "a tag of a dead registry": ("dead/v1", errno.EHOSTUNREACH),
    "a tag behind a password": ("private/v1", errno.EACCES),
}


@pytest.mark.parametrize("name", _PLACES)
def test_in_the_mount_what_is_not_there_has_its_errno(
    mount: Mounted, pool: ThreadPoolExecutor, name: str
) -> None:
    place, code = _PLACES[name]
    found = pool.map(_code, [os.stat, os.listdir, Path.read_bytes], [mount.path / place] * 3)
    assert list(found) == [errno.errorcode[code]] * 3
    mount.check_alive()


_FOLDERS: Mapping[str, int] = {
    "missing": errno.ENOENT,
    "none": errno.ENOENT,
    "no-layout": errno.EINVAL,
    "dead": errno.EHOSTUNREACH,
    "private": errno.EACCES,
    **{f"registry/{name}": code for name, code in _UNLISTED.items()},
}


@pytest.mark.parametrize("name", _FOLDERS)
def test_in_the_mount_tags_that_cannot_be_listed_have_their_errno(mount: Mounted, name: str) -> None:
    assert stat.S_ISDIR((mount.path / name).stat().st_mode)  # the app itself is there, whatever its registry
    listing = _code(os.listdir, mount.path / name)
    assert _is_of_listing(listing, _FOLDERS[name]), listing
    mount.check_alive()


def test_the_log_of_the_mount_shows_no_secret(mount: Mounted) -> None:
    _code(os.listdir, mount.path / "private")
    said = mount.log.read_text()
    assert ": EACCES: " in said
    assert "wrong-word" not in said and b64encode(b"user:wrong-word").decode() not in said


def test_nothing_that_can_be_named_is_unforeseen_by_the_mount(mount: Mounted) -> None:
    said = mount.log.read_text()
    assert "Traceback" not in said and ": EIO: " not in said


# -------------------- writing to the mount

_WRITES: Mapping[str, Callable[[Path], object]] = {
    "open for writing": lambda root: os.open(root / "file", os.O_WRONLY),
    "open for reading and writing": lambda root: os.open(root / "file", os.O_RDWR),
    "open to append": lambda root: os.open(root / "file", os.O_WRONLY | os.O_APPEND),
    "open to truncate": lambda root: os.open(root / "file", os.O_RDONLY | os.O_TRUNC),
    "create": lambda root: os.open(root / "new", os.O_CREAT | os.O_WRONLY),
    "create without a name": lambda root: os.open(root, os.O_TMPFILE | os.O_RDWR),
    "truncate": lambda root: os.truncate(root / "file", 0),
    "mkdir": lambda root: os.mkdir(root / "new"),
    "rmdir": lambda root: os.rmdir(root / "folder"),
    "unlink": lambda root: os.unlink(root / "file"),
    "rename": lambda root: os.rename(root / "file", root / "new"),
    "rename over another": lambda root: os.rename(root / "file", root / "last"),
    "link": lambda root: os.link(root / "file", root / "new"),
    "symlink": lambda root: os.symlink("file", root / "new"),
    "mknod": lambda root: os.mknod(root / "new", stat.S_IFREG | 0o644),
    "mkfifo": lambda root: os.mkfifo(root / "new"),
    "chmod": lambda root: os.chmod(root / "file", 0o600),
    "chown": lambda root: os.chown(root / "file", 1, 1),
    "utimensat": lambda root: os.utime(root / "file", (1, 1)),
    "setxattr": lambda root: os.setxattr(root / "file", "user.new", b"x"),
    "removexattr": lambda root: os.removexattr(root / "file", "user.old"),
}


@pytest.mark.parametrize("call", _WRITES)
def test_any_change_is_erofs_for_root_too(mount: Mounted, call: str) -> None:
    root = mount.path / "good/v1"
    before = peers.tree_listing(root)
    assert _code(_WRITES[call], root) == "EROFS"
    assert peers.tree_listing(root) == before


@pytest.mark.parametrize("folder", [".", "registry", "good", "good/v1", "good/v1/folder"])
@pytest.mark.parametrize("call", ["mkdir", "create", "symlink"])
def test_no_folder_of_the_mount_takes_a_new_name(mount: Mounted, folder: str, call: str) -> None:
    assert _code(_WRITES[call], mount.path / folder) == "EROFS"


@pytest.mark.parametrize("name", ["good", "registry", "good/v1"])
def test_no_app_or_tag_can_be_removed_or_renamed(mount: Mounted, name: str) -> None:
    path = mount.path / name
    assert _code(os.rmdir, path) == "EROFS"
    assert _code(lambda path: path.rename(path.with_name("new")), path) == "EROFS"
    mount.check_alive()


# -------------------- destinations of a snapshot


def _make_file(path: Path) -> None:
    path.write_text("theirs\n")


def _make_folder(path: Path) -> None:
    path.mkdir()
    (path / "theirs").touch()


_THERE: Mapping[str, Callable[[Path], object]] = {
    "a file": _make_file,
    "a folder": _make_folder,
    "an empty folder": Path.mkdir,
    "a symlink to nowhere": lambda path: path.symlink_to("nowhere"),
    "a fifo": os.mkfifo,
}


@pytest.mark.parametrize("name", _THERE)
def test_a_destination_that_exists_is_exit_code_9_and_stays(name: str, good: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    _THERE[name](work / "DEST")
    before = peers.tree_listing(work)
    line = ("snapshot", f"oci-layout:{good}:v1", work / "DEST")
    outcome = _call(tmp_path, *line)
    outcome.check(9, f"{work}/DEST exists already", "Choose another name, or move it away first")
    assert peers.tree_listing(work) == before


@pytest.mark.parametrize("parent", ["none", "none/such", "file"])
def test_a_destination_without_a_parent_is_exit_code_2(parent: str, good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = _call(tmp_path, "snapshot", f"oci-layout:{good}:v1", tmp_path / parent / "DEST")
    outcome.check(2, f"the folder {tmp_path / parent} does not exist", f"mkdir -p {tmp_path / parent}")
    assert not (tmp_path / "none").exists()


def test_a_destination_that_cannot_be_written_is_told_as_such(
    good: Path, mount: Mounted, tmp_path: Path
) -> None:
    dest = mount.path / "good/v1/DEST"
    outcome = _call(tmp_path, "snapshot", f"oci-layout:{good}:v1", dest)
    outcome.check(2, f"{dest} cannot be written", "Read-only file system")
    assert "--cache" not in outcome.text  # which is no remedy


# -------------------- mount points


@contextmanager
def _tmpfs(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    peers.run("mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", folder)
    try:
        yield folder
    finally:
        peers.run("umount", "--lazy", folder)


def test_a_mount_point_that_is_not_there_is_exit_code_2(good: Path, tmp_path: Path) -> None:
    place = tmp_path / "mnt"
    outcome = _run(tmp_path, "mount", place, "--app", f"good=oci-layout:{good}")
    outcome.check(2, f"{place} does not exist", f"mkdir -p {place}")
    assert not place.exists() and not daemons(place)


def test_a_mount_point_that_is_a_file_is_exit_code_2(good: Path, tmp_path: Path) -> None:
    place = tmp_path / "mnt"
    place.write_text("theirs\n")
    outcome = _run(tmp_path, "mount", place, "--app", f"good=oci-layout:{good}")
    outcome.check(2, f"{place} is not a directory", "Name a directory")
    assert place.read_text() == "theirs\n" and not daemons(place)


def test_the_mount_point_of_others_is_exit_code_9_and_stays(good: Path, tmp_path: Path) -> None:
    with _tmpfs(tmp_path / "mnt", "1m") as place:
        (place / "theirs").touch()
        outcome = _run(tmp_path, "mount", place, "--app", f"good=oci-layout:{good}")
        outcome.check(9, f"{place} is the mount point of tmpfs", "Mount fsmount at another directory")
        outcome = _run(tmp_path, "unmount", place)
        outcome.check(9, f"{place} is not fsmount's", "tmpfs")
        assert os.listdir(place) == ["theirs"] and not daemons(place)


def test_a_mount_point_that_is_ours_already_is_exit_code_9_and_goes_on(
    good: Path, mount: Mounted, tmp_path: Path
) -> None:
    before = daemons(mount.path)
    outcome = _run(tmp_path, "mount", mount.path, "--app", f"good=oci-layout:{good}")
    outcome.check(9, f"already mounted at {mount.path}", f"fsmount unmount {mount.path}")
    assert daemons(mount.path) == before
    mount.check_alive()


def test_a_mount_point_in_use_is_exit_code_9_with_its_users_and_goes_on(
    mount: Mounted, tmp_path: Path
) -> None:
    with (mount.path / "good/v1/file").open("rb"):
        outcome = _run(tmp_path, "unmount", mount.path)
    outcome.check(9, f"{mount.path} is in use by", f"({os.getpid()})", "--lazy")
    mount.check_alive()


@pytest.mark.parametrize("place", ["none", "empty", "file"])
def test_to_unmount_what_is_not_mounted_is_exit_code_3(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    outcome = _run(tmp_path, "unmount", tmp_path / place)
    outcome.check(3, f"nothing is mounted at {tmp_path / place}")


def test_a_cache_that_is_a_file_is_exit_code_2_and_nothing_is_mounted(good: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("theirs\n")
    (tmp_path / "mnt").mkdir()
    for line in (("mount", tmp_path / "mnt"), ("ls", "good:v1")):
        outcome = _run(tmp_path, *line, "--app", f"good=oci-layout:{good}")
        outcome.check(2, f"{tmp_path}/cache", "--cache")
    assert mounts.find(tmp_path / "mnt") is None and not daemons(tmp_path / "mnt")
    assert (tmp_path / "cache").read_text() == "theirs\n"


# -------------------- full disks

#: Else nothing is stored on a disk as small as these.
_ANY_DISK = "[cache]\nmin_free = 0\n"
_LARGE = random.Random(4).randbytes(9_000_000)
_MANY = b"".join(bytes(Member(b"folder/%05d-%s" % (number, b"n" * 80))) for number in range(8000))


@dataclass(frozen=True)
class Large:
    """A layout of two images: `bytes`, a file of 9 MB, and `names`, of many empty files.

    `disks` are so small that one of the things which the cache must keep of `names` does not fit.
    """

    layout: Path
    disks: Mapping[str, str]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    work = tmp_path_factory.mktemp("large")
    layout = work / "layout"
    peers.tar_layer_image(layout, "bytes", [peers.pack(archive(Member(b"file", _LARGE)), "tar")])
    peers.tar_layer_image(layout, "names", [peers.pack(_MANY + END, level=1)])
    assert _call(work, "ls", f"oci-layout:{layout}:names").code == 0
    (index,) = (path.stat().st_size for path in (work / "cache/layers").iterdir())
    (tree,) = (path.stat().st_size for path in (work / "cache/trees").iterdir())
    bare = 500_000  # what an empty cache takes, and some
    disks = {
        "numbers": 64_000,
        "chunks": 200_000,
        "index": bare + index // 2,
        "tree": bare + index + tree // 2,
    }
    return Large(layout, {name: str(size) for name, size in disks.items()})


def test_a_full_destination_is_exit_code_8_and_nothing_is_left(large: Large, tmp_path: Path) -> None:
    with _tmpfs(tmp_path / "small", "2m") as small:
        outcome = _run(tmp_path, "snapshot", f"oci-layout:{large.layout}:bytes", small / "DEST")
        outcome.check(8, f"no space left for {small}/DEST", "Free some space there")
        assert "--cache" not in outcome.text  # which is no remedy
        assert os.listdir(small) == []


def test_a_destination_without_inodes_is_exit_code_8_and_nothing_is_left(
    large: Large, tmp_path: Path
) -> None:
    with _tmpfs(tmp_path / "small", "64m,nr_inodes=1000") as small:
        outcome = _run(tmp_path, "snapshot", f"oci-layout:{large.layout}:names", small / "DEST")
        outcome.check(8, f"no space left for {small}/DEST")
        assert os.listdir(small) == []


def test_content_that_the_disk_of_the_cache_cannot_take_is_served(large: Large, tmp_path: Path) -> None:
    with _tmpfs(tmp_path / "cache", "6m"):
        outcome = _run(tmp_path, "cat", f"oci-layout:{large.layout}:bytes", "file")
        assert (outcome.code, outcome.out == _LARGE) == (0, True), outcome.text
        assert outcome.text.count("serving without caching") == 1 and "Traceback" not in outcome.text
        outcome = _run(tmp_path, "snapshot", f"oci-layout:{large.layout}:bytes", tmp_path / "DEST")
        assert outcome.code == 0, outcome.text
        assert (tmp_path / "DEST/file").read_bytes() == _LARGE


@pytest.mark.parametrize("what", ["numbers", "chunks", "index", "tree"])
def test_a_disk_too_full_for_what_the_cache_must_keep_is_exit_code_8(
    what: str, large: Large, tmp_path: Path
) -> None:
    with _tmpfs(tmp_path / "cache", large.disks[what]) as cache:
        outcome = _run(tmp_path, "snapshot", f"oci-layout:{large.layout}:names", tmp_path / "DEST")
        assert outcome.code == 8, outcome.text
        assert f"error: no space left for {cache}" in outcome.text
        assert "Traceback" not in outcome.text and "unforeseen" not in outcome.text
        assert [path for path in cache.rglob("*") if "partial" in path.name] == []
    assert not (tmp_path / "DEST").exists()


@pytest.mark.parametrize("left", [0, 256 * 1024])
def test_a_full_disk_costs_nothing_that_is_cached_but_for_what_it_takes_to_begin(
    left: int, good: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(_ANY_DISK)
    words = "cat", f"oci-layout:{good}:v1", "last", "--config", tmp_path / "config.toml"
    with _tmpfs(tmp_path / "cache", "3m") as cache:
        assert _run(tmp_path, *words).code == 0
        free = os.statvfs(cache)
        (cache / "theirs").write_bytes(bytes(free.f_bavail * free.f_bsize - left))
        outcome = _run(tmp_path, *words)
        assert outcome.code == 0, outcome.text
        assert [path.name for path in cache.iterdir() if "damaged" in path.name] == []
        (cache / "theirs").unlink()
        outcome = _run(tmp_path, "inspect", f"oci-layout:{good}:v1", "--json")
        (layer,) = json.loads(outcome.out)["layers"]
        assert layer["cached_chunks"] == (left > 0)


def test_no_mount_begins_on_a_full_disk(good: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    with _tmpfs(tmp_path / "cache", "64k") as cache:
        (cache / "theirs").write_bytes(bytes(64 * 1024))
        outcome = _run(tmp_path, "mount", tmp_path / "mnt", "--app", f"good=oci-layout:{good}")
        outcome.check(8, f"no space left for {cache}")
    assert mounts.find(tmp_path / "mnt") is None and not daemons(tmp_path / "mnt")


def test_a_tag_that_moves_while_the_disk_is_full_does_not_end_the_mount(good: Path, tmp_path: Path) -> None:
    log, layout = tmp_path / "mount.log", tmp_path / "layout"
    apps = (f"good=oci-layout:{good}", f"moving=oci-layout:{layout}")
    peers.tar_layer_image(layout, "v1", [peers.pack(archive(Member(b"old")))])
    with (
        _tmpfs(tmp_path / "cache", "3m") as cache,
        mounted(tmp_path, *apps, config='[defaults]\nrefresh = "100ms"\n', flags=("--log-file", log)) as path,
    ):
        seen = Mounted(path, log)
        seen.check_alive()
        assert os.listdir(path / "moving/v1") == ["old"]
        free = os.statvfs(cache)
        (cache / "theirs").write_bytes(bytes(free.f_bavail * free.f_bsize))
        peers.tar_layer_image(layout, "v1", [peers.pack(archive(Member(b"new")))])
        # Looking at it lets the mount look after the tag in the background; what it finds it cannot write down.
        assert wait_until(lambda: _code(os.stat, path / "moving/v1") and "has moved to" in log.read_text())
        wait_until(lambda: not daemons(path), seconds=0.5)
        seen.check_alive()


@pytest.mark.parametrize(("what", "absent"), [("index", "ENOSPC"), ("tree", "ENOENT")])
def test_in_the_mount_a_full_disk_is_enospc_for_what_needs_it_alone(
    what: str, absent: str, good: Path, large: Large, tmp_path: Path
) -> None:
    # Without its index nothing of a layer is known; without the tree, all but the listings.
    log = tmp_path / "mount.log"
    apps = (f"good=oci-layout:{good}", f"large=oci-layout:{large.layout}")
    with (
        _tmpfs(tmp_path / "cache", large.disks[what]),
        mounted(tmp_path, *apps, flags=("--log-file", log)) as path,
    ):
        seen = Mounted(path, log)
        root = path / "large/names"
        assert {_code(os.stat, root / "none-such") for _ in range(10)} == {absent}
        assert [_code(os.listdir, root), _code(os.listdir, root)] == ["ENOSPC"] * 2
        seen.check_alive()
        assert (path / "large/bytes/file").read_bytes() == _LARGE
        said = log.read_text()
        assert ": ENOSPC: no space left" in said and "Traceback" not in said
