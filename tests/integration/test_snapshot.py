"""A snapshot: a plain folder of what an image says, whole or absent, whatever the image and whoever takes it."""

import hashlib
import io
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest

from fsmount.cli.main import main
from tests import peers
from tests.fakes.front import CountingProxy, Fault
from tests.fakes.tar import (
    BLOCK_DEVICE,
    CHAR,
    DIRECTORY,
    END,
    FIFO,
    FILE,
    HARDLINK,
    SYMLINK,
    Member,
    archive,
    long_link,
    long_name,
    pax,
    sparse,
)
from tests.integration.program import command, environment, fsmount, mounted, wait_until

pytestmark = pytest.mark.integration

_ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not _ROOT, reason="needs root")

_SECONDS = 60
_CHUNK = 4 * 2**20
_NS = 1_600_000_000_123_456_789
_PRECIOUS = "precious\n"


# -------------------- making images, and taking snapshots of them


def _named(name: bytes, data: bytes = b"", *, type: bytes = FILE, link: bytes = b"") -> bytes:
    """A member whose name or target may be too long for its header."""
    head = bytes(long_name(name)) if len(name) > 100 else b""
    head += bytes(long_link(link)) if len(link) > 100 else b""
    return head + bytes(Member(name[:100], data, type=type, link=link[:100]))


def _image(layout: Path, *layers: bytes, tag: str = "v1") -> str:
    """The SOURCE of an image of these tars, uncompressed: bytes of a layer lie where they lie in its blob."""
    peers.tar_layer_image(layout, tag, [peers.pack(layer, "tar") for layer in layers])
    return f"oci-layout:{layout}:{tag}"


def _noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def _inside(*arguments: str | Path, cache: Path, code: int = 0) -> tuple[str, str]:
    """What `fsmount snapshot` writes to its two streams; as `program.fsmount`, but without a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, environment(cache), clear=True),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        found = main(["snapshot", *map(str, arguments)])
    assert found == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def _take(
    source: str,
    dest: str | Path,
    *flags: str | Path,
    cache: Path,
    cwd: Path | None = None,
    via: Sequence[str] = (),
) -> subprocess.CompletedProcess[bytes]:
    """`fsmount snapshot`, by way of another program, and from another folder, if need be."""
    return subprocess.run(
        [*via, *command("snapshot", source, dest, *flags)],
        env=environment(cache),
        cwd=cwd,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=_SECONDS,
        check=False,
    )


@contextmanager
def _started(
    source: str, dest: Path, *flags: str | Path, cache: Path, via: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A snapshot under way, as the leader of a process group; it is over at the end of the block."""
    process = subprocess.Popen(
        [*via, *command("snapshot", source, dest, *flags)],
        env=environment(cache),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[peers.Registry]:
    if why := peers.have("docker-registry"):
        pytest.skip(why)
    with peers.docker_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="module")
def as_user() -> Sequence[str]:
    """What precedes a command that is to run without root's rights.

    The interpreter may live in root's home: the user has root's files, as an owner has, and no capability.
    """
    via = ("unshare", "--user", "--map-user=1000", "--map-group=1000", "--")
    if not _ROOT:
        return ()
    if why := peers.have("unshare"):
        pytest.skip(why)
    if subprocess.run([*via, "true"], capture_output=True, check=False).returncode:
        pytest.skip("user namespaces are not permitted")
    return via


def _takes_xattrs(folder: Path) -> bool:
    probe = folder / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.probe", b"")
    except OSError:
        return False
    finally:
        probe.unlink()
    return True


# -------------------- what SOURCE may be


@dataclass(frozen=True)
class _Places:
    """One image in a layout, in a registry, and as an app of a configuration."""

    layout: Path
    host: str
    digest: str
    config: Path
    cache: Path


@pytest.fixture(scope="module")
def places(registry: peers.Registry, tmp_path_factory: pytest.TempPathFactory) -> _Places:
    work = tmp_path_factory.mktemp("places")
    _image(work / "layout", archive(Member(b"sub/file", b"content\n")))
    digest = peers.push(work / "layout", "v1", registry.host, "team/app")
    (work / "config.toml").write_text(
        f'[apps.web]\nrepository = "{registry.host}/team/app"\n'
        f'[apps."team/tools"]\nrepository = "oci-layout:{work / "layout"}"\n'
        f'[apps.sub]\nrepository = "{registry.host}/team/app"\npath = "/sub"\n'
    )
    return _Places(work / "layout", registry.host, digest, work / "config.toml", work / "cache")


@pytest.mark.parametrize(
    "source",
    [
        "oci-layout:{layout}:v1",
        "oci:{layout}:v1",
        "oci-layout:{layout}@{digest}",
        "oci-layout:{layout}:v1@{digest}",
        "oci-layout:{layout}",
        "{host}/team/app:v1",
        "{host}/team/app@{digest}",
        "{host}/team/app:v1@{digest}",
        "web:v1",
        "web@{digest}",
        "team/tools:v1",
    ],
)
def test_a_source_is_a_layout_a_registry_or_an_app_by_tag_or_digest(
    places: _Places, tmp_path: Path, source: str
) -> None:
    named = source.format(layout=places.layout, host=places.host, digest=places.digest)
    dest = tmp_path / "dest"
    out, err = _inside(named, dest, "--config", places.config, cache=places.cache)
    assert (dest / "sub" / "file").read_bytes() == b"content\n"
    line = rf"{re.escape(f'{dest}: 1 files, 8 bytes from {named}')} in \d+\.\d s\n"
    assert (bool(re.fullmatch(line, out)), err) == (True, "")


def test_an_app_shows_its_own_folder_unless_a_path_is_given(places: _Places, tmp_path: Path) -> None:
    for flags, listed in [((), ["file"]), (("--path", "/"), ["sub"])]:
        dest = tmp_path / f"dest-{listed[0]}"
        _inside("sub:v1", dest, *flags, "--config", places.config, cache=places.cache)
        assert os.listdir(dest) == listed


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("oci-layout:{layout}:v2", 4),
        ("oci-layout:{layout}/no-such-folder:v1", 4),
        ("oci-layout:{layout}@sha256:" + "0" * 64, 4),
        ("{host}/team/app:v2", 4),
        ("{host}/team/nothing:v1", 4),
        ("web:v2", 4),
        ("{host}/Team/app:v1", 2),
    ],
)
def test_a_source_that_is_not_there_makes_nothing(
    places: _Places, tmp_path: Path, source: str, code: int
) -> None:
    named = source.format(layout=places.layout, host=places.host)
    (tmp_path / "parent").mkdir()
    dest = tmp_path / "parent" / "dest"
    out, err = _inside(named, dest, "--config", places.config, cache=places.cache, code=code)
    assert (out, os.listdir(dest.parent)) == ("", [])
    assert err.startswith("fsmount: error: ")


# -------------------- --path


_SUBTREE = archive(
    pax({"mtime": "1600000000.123456789"}),
    Member(b"sub/", type=DIRECTORY, mode=0o1751, uid=3, gid=4),
    Member(b"outside", b"one file of three names\n", mode=0o600, mtime=1_500_000_000),
    Member(b"sub/crossing", type=HARDLINK, link=b"outside"),
    Member(b"sub/inner/crossing", type=HARDLINK, link=b"outside"),
    Member(b"sub/own", b"one file of two names\n"),
    Member(b"sub/inner/own", type=HARDLINK, link=b"sub/own"),
    Member(b"sub/inner/link", type=SYMLINK, link=b"../../outside", mode=0o777),
    Member(b"link", type=SYMLINK, link=b"sub", mode=0o777),
    Member(b"subordinate/file", b"of another folder\n"),
)


@pytest.fixture(scope="module")
def subtree(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """An image with the folder `sub`, its whole snapshot, and a cache."""
    work = tmp_path_factory.mktemp("subtree")
    source = _image(work / "layout", _SUBTREE)
    fsmount("snapshot", source, work / "whole", cache=work / "cache")
    return source, work / "whole", work / "cache"


@pytest.mark.parametrize("path", ["sub", "/sub/", "./sub//."])
def test_a_path_makes_a_snapshot_of_that_folder_as_it_is_in_the_whole(
    subtree: tuple[str, Path, Path], tmp_path: Path, path: str
) -> None:
    source, whole, cache = subtree
    out, _ = _inside(source, tmp_path / "dest", "--path", path, cache=cache)
    found = peers.tree_listing(tmp_path / "dest")
    assert peers.differences(peers.tree_listing(whole / "sub"), found) == []
    assert found[b"."] == peers.Node(
        "folder", 0o1751, *((3, 4) if _ROOT else (os.geteuid(), os.getegid())), mtime_ns=_NS
    )
    assert found[b"crossing"].links == (b"crossing", b"inner/crossing")
    assert ": 2 files, 46 bytes from " in out


@pytest.mark.parametrize("path", ["missing", "sub/missing", "outside", "outside/x", "link", "su"])
def test_a_path_that_is_no_folder_is_not_found_and_makes_nothing(
    subtree: tuple[str, Path, Path], tmp_path: Path, path: str
) -> None:
    source, _, cache = subtree
    (tmp_path / "parent").mkdir()
    _, err = _inside(source, tmp_path / "parent" / "dest", "--path", path, cache=cache, code=4)
    assert os.listdir(tmp_path / "parent") == []
    assert f"has no folder /{path}" in err


# -------------------- what is kept


_KINDS: Mapping[bytes, str] = {
    FILE: "file",
    DIRECTORY: "folder",
    SYMLINK: "link",
    CHAR: "char",
    BLOCK_DEVICE: "block",
    FIFO: "fifo",
}
#: struct vfs_cap_data, revision 2: CAP_NET_BIND_SERVICE, effective.
_CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)


def _entry(
    path: bytes,
    data: bytes = b"",
    *,
    type: bytes = FILE,
    mode: int,
    uid: int = 0,
    gid: int = 0,
    ns: int = _NS,
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
    xattrs: Mapping[str, bytes] | None = None,
) -> tuple[bytes, dict[bytes, peers.Node]]:
    """A member with all it can say, and the node that it makes."""
    xattrs = xattrs or {}
    seconds, rest = divmod(abs(ns), 10**9)
    records: dict[str, str | bytes] = {"mtime": f"{'-' if ns < 0 else ''}{seconds}.{rest:09}"}
    records |= {f"SCHILY.xattr.{name}": value for name, value in xattrs.items()}
    name = path + b"/" if type == DIRECTORY else path
    major, minor = device
    member = Member(name, data, type=type, mode=mode, uid=uid, gid=gid, link=link, major=major, minor=minor)
    kept = {name: value for name, value in xattrs.items() if not name.startswith(("user.overlay", "trusted"))}
    node = peers.Node(
        _KINDS[type],  # type: ignore[arg-type]
        mode=mode,
        uid=uid,
        gid=gid,
        size=len(data) + len(link),
        mtime_ns=ns,
        target=link if type == SYMLINK else None,
        rdev=os.makedev(*device),
        links=() if type == DIRECTORY else (path,),
        sha256=hashlib.sha256(data).hexdigest() if type == FILE else None,
        xattrs=tuple(sorted(kept.items())),
    )
    return bytes(pax(records)) + bytes(member), {path: node}


def _hardlink(path: bytes, target: bytes) -> bytes:
    return bytes(Member(path, type=HARDLINK, link=target))


_ISLANDS = {
    b"sparse": (64 * 2**20, [(8 * 2**20, b"island"), (40 * 2**20 + 5, _noise(5000))]),
    b"hole": (3_000_000, []),
    b"sparse-large": (40 * 2**20, [(2**20, _noise(5 * 2**20)), (20 * 2**20, _noise(2**20))]),
}
_SIZES = [0, 1, 511, 512, 513, _CHUNK - 1, _CHUNK, _CHUNK + 1, 2 * _CHUNK + 12_345]
_MANY = 1_100


def _everything() -> tuple[bytes, dict[bytes, peers.Node]]:
    """A tar with one of everything, and the tree it makes where nothing is left out."""
    tar, nodes = bytearray(), dict[bytes, peers.Node]()

    def add(part: bytes, made: Mapping[bytes, peers.Node]) -> None:
        tar.extend(part)
        nodes.update(made)

    def folder(path: bytes) -> dict[bytes, peers.Node]:
        return {path: peers.Node("folder", 0o755)}

    def file(path: bytes, data: bytes) -> None:
        add(*_entry(path, data, mode=0o644, ns=0))

    add(*_entry(b".", type=DIRECTORY, mode=0o750, uid=7, gid=8))
    add(*_entry(b"folder/file", b"content\n", mode=0o640, uid=1000, gid=1001))
    add(*_entry(b"folder", type=DIRECTORY, mode=0o1777, uid=9, ns=-1_500_000_000))
    add(*_entry(b"closed", b"unreadable\n", mode=0o000, ns=1))
    add(*_entry(b"closed-folder", type=DIRECTORY, mode=0o000))
    add(*_entry(b"closed-folder/read-only", type=DIRECTORY, mode=0o500))
    add(*_entry(b"closed-folder/read-only/file", b"inside\n", mode=0o400))
    add(*_entry(b"sticky", b"a sticky file\n", mode=0o1644))
    add(*_entry(b"setuid", b"#!\n", mode=0o6755, uid=1000, gid=5))
    add(*_entry(b"setuid-root", b"#!\n", mode=0o4755))
    add(*_entry(b"setgid-folder", type=DIRECTORY, mode=0o2775, gid=5))
    add(*_entry(b"setgid-folder/file", b"of the other group\n", mode=0o664))
    add(*_entry(b"capable", b"#!\n", mode=0o755, uid=1, xattrs={"security.capability": _CAPABILITY}))
    notes = {"user.note": b"\0\xff\n", "user.empty": b"", "user.overlay.opaque": b"y", "trusted.secret": b"x"}
    add(*_entry(b"noted", b"with notes\n", mode=0o640, uid=2, xattrs=notes))
    add(*_entry(b"link", type=SYMLINK, mode=0o777, uid=5, gid=6, link=b"folder/\xff"))
    add(*_entry(b"fifo", type=FIFO, mode=0o642, uid=5, gid=6))
    add(*_entry(b"null", type=CHAR, mode=0o666, gid=6, device=(1, 3)))
    add(*_entry(b"loop", type=BLOCK_DEVICE, mode=0o660, gid=6, device=(7, 0)))
    large = _noise(2 * _CHUNK + 1)
    powers = {"security.capability": _CAPABILITY, "user.note": b"large"}
    add(*_entry(b"large", large, mode=0o4711, uid=1000, gid=5, xattrs=powers))
    add(*_entry(b"large-closed", large, mode=0o000))
    for path, target in [(b"again", b"folder/file"), (b"link-again", b"link"), (b"null-again", b"null")]:
        links = tuple(sorted((path, target)))
        made = {name: replace(nodes[target], links=links) for name in links}
        add(_hardlink(path, target), made)
    for path, (size, islands) in _ISLANDS.items():
        content = bytearray(size)
        for offset, data in islands:
            content[offset : offset + len(data)] = data
        digest = hashlib.sha256(content).hexdigest()
        node = peers.Node("file", 0o644, size=size, links=(path,), sha256=digest)
        add(sparse("1.0", path, size, islands), {path: node})
    for size in _SIZES:
        file(b"sizes/%d" % size, _noise(size))
    # One whose data begins where a chunk does, and one whose data ends there.
    for path in (b"edges/filler", b"edges/chunk", b"edges/filler-2"):
        header = len(_entry(path, mode=0o644, ns=0)[0])
        following = 0 if path == b"edges/filler-2" else len(_entry(b"edges/chunk", mode=0o644, ns=0)[0])
        size = _CHUNK if path == b"edges/chunk" else -(len(tar) + header + following) % _CHUNK
        file(path, _noise(size))
    for number in range(_MANY):
        file(b"many/%04d" % number, b"%d\n" % number)
    for path in (b"sizes", b"edges", b"many"):
        add(b"", folder(path))
    return bytes(tar) + END, nodes


@dataclass(frozen=True)
class _Whole:
    source: str
    cache: Path
    nodes: Mapping[bytes, peers.Node]


@pytest.fixture(scope="module")
def everything() -> Iterator[_Whole]:
    """An image with one of everything; not below pytest's folder, which ordinary users cannot enter."""
    tar, nodes = _everything()
    with TemporaryDirectory(prefix="everything-") as folder:
        source = _image(Path(folder) / "layout", tar)
        yield _Whole(source, Path(folder) / "cache", nodes)


def _without_privileges(nodes: Mapping[bytes, peers.Node]) -> dict[bytes, peers.Node]:
    """The tree without setuid and setgid bits, file capabilities and devices."""
    return {
        path: replace(
            node,
            mode=node.mode & 0o1777,
            xattrs=tuple(pair for pair in node.xattrs if pair[0] != "security.capability"),
        )
        for path, node in nodes.items()
        if node.kind not in ("char", "block")
    }


def _owned(nodes: Mapping[bytes, peers.Node], uid: int, gid: int) -> dict[bytes, peers.Node]:
    return {path: replace(node, uid=uid, gid=gid) for path, node in nodes.items()}


def _listing(root: Path) -> dict[bytes, peers.Node]:
    if not _takes_xattrs(root.parent):
        pytest.skip("the file system of the temporary folder takes no user attributes")
    return peers.tree_listing(root)


@as_root
@pytest.mark.parametrize("flags", [(), ("--keep-privileges",)])
def test_all_that_the_image_says_is_kept_but_privileges_only_on_demand(
    everything: _Whole, tmp_path: Path, flags: Sequence[str]
) -> None:
    fsmount("snapshot", everything.source, tmp_path / "dest", *flags, cache=everything.cache)
    expected = everything.nodes if flags else _without_privileges(everything.nodes)
    assert peers.differences(expected, _listing(tmp_path / "dest")) == []
    for name, (size, islands) in _ISLANDS.items():
        stored = (tmp_path / "dest" / os.fsdecode(name)).stat().st_blocks * 512
        assert stored < sum(len(data) for _, data in islands) + 2**18 < size


def test_an_ordinary_user_gets_the_same_as_their_own(
    everything: _Whole, as_user: Sequence[str], tmp_path: Path
) -> None:
    done = _take(everything.source, tmp_path / "dest", cache=tmp_path / "cache", via=as_user)
    try:
        assert (done.returncode, done.stderr) == (0, b"")
        expected = _owned(_without_privileges(everything.nodes), os.geteuid(), os.getegid())
        if _ROOT:  # who alone can read it all back
            assert peers.differences(expected, _listing(tmp_path / "dest")) == []
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", tmp_path / "dest"], check=False)  # for pytest


def test_a_user_keeps_the_attributes_of_files_that_nobody_may_write(
    as_user: Sequence[str], tmp_path: Path
) -> None:
    if not _takes_xattrs(tmp_path):
        pytest.skip("the file system of the temporary folder takes no user attributes")
    note = {"user.note": b"kept"}
    parts = [
        _entry(b"file", b"small", mode=0o444, xattrs=note)[0],
        _entry(b"large", _noise(_CHUNK + 1), mode=0o400, xattrs=note)[0],
    ]
    source = _image(tmp_path / "layout", archive(*parts))
    done = _take(source, tmp_path / "dest", cache=tmp_path / "cache", via=as_user)
    assert (done.returncode, done.stderr) == (0, b"")
    for name, mode in (("file", 0o444), ("large", 0o400)):
        assert os.getxattr(tmp_path / "dest" / name, "user.note") == b"kept"
        assert (tmp_path / "dest" / name).stat().st_mode & 0o7777 == mode


def test_folders_keep_their_attributes_too(tmp_path: Path) -> None:
    if not _takes_xattrs(tmp_path):
        pytest.skip("the file system of the temporary folder takes no user attributes")
    below = archive(
        _entry(b".", type=DIRECTORY, mode=0o755, xattrs={"user.note": b"root"})[0],
        _entry(b"folder", type=DIRECTORY, mode=0o555, xattrs={"user.note": b"folder"})[0],
        _entry(b"changed", type=DIRECTORY, mode=0o755, xattrs={"user.note": b"old"})[0],
        _entry(b"changed/inside", b"", mode=0o644)[0],
    )
    above = archive(
        _entry(b"folder/inside", b"", mode=0o644)[0],
        _entry(b"changed", type=DIRECTORY, mode=0o755, xattrs={"user.note": b"new"})[0],
    )
    source = _image(tmp_path / "layout", below, above)
    fsmount("snapshot", source, tmp_path / "dest", cache=tmp_path / "cache")
    nodes = peers.tree_listing(tmp_path / "dest")
    found = {path: node.xattrs for path, node in nodes.items() if node.kind == "folder"}
    assert found == {
        b".": (("user.note", b"root"),),
        b"folder": (("user.note", b"folder"),),
        b"changed": (("user.note", b"new"),),
    }


def test_attributes_that_the_file_system_does_not_take_are_counted_in_a_warning(tmp_path: Path) -> None:
    too_large = {"user.large": bytes(65_537)}  # XATTR_SIZE_MAX and one
    parts = [
        _entry(b"file", b"content", mode=0o644, xattrs=too_large)[0],
        _entry(b"large", _noise(_CHUNK + 1), mode=0o644, xattrs=too_large)[0],
    ]
    source = _image(tmp_path / "layout", archive(*parts))
    done = fsmount("snapshot", source, tmp_path / "dest", cache=tmp_path / "cache")
    assert b"warning: 2 extended attributes are missing" in done.stderr
    assert (tmp_path / "dest" / "file").read_bytes() == b"content"


def _setgid(folder: Path) -> None:
    os.chown(folder, -1, 1234)
    folder.chmod(0o2775)


def _default_acl(folder: Path) -> None:
    # linux/posix_acl_xattr.h: version 2, then (tag, permissions, id) of owner, group and others.
    entries = [(0x01, 7), (0x04, 5), (0x20, 0)]
    packed = b"".join(struct.pack("<HHI", tag, permissions, 0xFFFFFFFF) for tag, permissions in entries)
    try:
        os.setxattr(folder, "system.posix_acl_default", struct.pack("<I", 2) + packed)
    except OSError:
        pytest.skip("the file system of the temporary folder has no access control lists")


@as_root
@pytest.mark.parametrize("prepare", [_setgid, _default_acl])
def test_a_folder_passes_nothing_of_its_own_on_to_a_snapshot_in_it(
    tmp_path: Path, prepare: Callable[[Path], None]
) -> None:
    (tmp_path / "parent").mkdir()
    prepare(tmp_path / "parent")
    nodes: dict[bytes, peers.Node] = {}
    tar = b""
    for part, made in (
        _entry(b".", type=DIRECTORY, mode=0o755),
        _entry(b"folder", type=DIRECTORY, mode=0o777),
        _entry(b"folder/file", b"content", mode=0o666),
        _entry(b"large", _noise(_CHUNK + 1), mode=0o666),
        _entry(b"fifo", type=FIFO, mode=0o666),
        _entry(b"link", type=SYMLINK, mode=0o777, link=b"folder"),
    ):
        tar += part
        nodes |= made
    source = _image(tmp_path / "layout", archive(tar))
    fsmount("snapshot", source, tmp_path / "parent" / "dest", cache=tmp_path / "cache")
    assert peers.differences(nodes, peers.tree_listing(tmp_path / "parent" / "dest")) == []


_NAMES = [
    b"new\nline",
    b"\xff\xfe",
    b"\x1b[31mred",
    b"back\\slash",
    b"-rf",
    b" ",
    b"...",
    b"tab\t",
    b"n" * 255,
    "ä".encode() * 127,
    "a\u202eb".encode(),
]


def test_names_are_kept_byte_for_byte(tmp_path: Path) -> None:
    parts = [_named(b"files/" + name, name) for name in _NAMES]
    parts += [_named(b"folders/" + name + b"/inside", name) for name in _NAMES]
    parts += [_named(b"links/" + name, type=SYMLINK, link=name) for name in _NAMES]
    parts += [_named(b"again/" + name, type=HARDLINK, link=b"files/" + name) for name in _NAMES]
    source = _image(tmp_path / "layout", archive(*parts))
    fsmount("snapshot", source, tmp_path / "dest", cache=tmp_path / "cache")
    dest = os.fsencode(tmp_path / "dest")
    for folder in (b"files", b"folders", b"links", b"again"):
        assert sorted(os.listdir(dest + b"/" + folder)) == sorted(_NAMES)
    for name in _NAMES:
        assert Path(os.fsdecode(dest + b"/folders/" + name + b"/inside")).read_bytes() == name
        assert os.readlink(dest + b"/links/" + name) == name
        assert os.path.samefile(dest + b"/files/" + name, dest + b"/again/" + name)


# -------------------- where DEST may be


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An image of one file, and a cache that has it."""
    work = tmp_path_factory.mktemp("small")
    source = _image(work / "layout", archive(Member(b"file", b"content\n")))
    fsmount("inspect", source, cache=work / "cache")
    return source, work / "cache"


def _make_file(dest: Path) -> None:
    dest.write_text(_PRECIOUS)


def _make_folder(dest: Path) -> None:
    dest.mkdir()
    (dest / "file").write_text(_PRECIOUS)


def _link_to_nothing(dest: Path) -> None:
    dest.symlink_to("nothing")


def _link_to_folder(dest: Path) -> None:
    (dest.parent / "elsewhere").mkdir()
    dest.symlink_to("elsewhere")


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize(
    "make", [_make_file, _make_folder, lambda dest: dest.mkdir(), _link_to_nothing, _link_to_folder]
)
def test_what_exists_is_refused_and_left_alone_before_anything_is_fetched(
    small: tuple[str, Path], tmp_path: Path, make: Callable[[Path], None], slash: str
) -> None:
    dest = tmp_path / "parent" / "dest"
    dest.parent.mkdir()
    make(dest)
    before = peers.tree_listing(dest.parent)
    _, err = _inside(small[0], f"{dest}{slash}", cache=tmp_path / "cache", code=9)
    assert f"{dest} exists already" in err
    assert peers.differences(before, peers.tree_listing(dest.parent)) == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("dest", ["missing/dest", "file/dest", "dangling/dest"])
def test_the_parent_of_dest_must_be_there(small: tuple[str, Path], tmp_path: Path, dest: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nothing")
    _inside(small[0], tmp_path / dest, cache=tmp_path / "cache", code=2)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]


@pytest.mark.parametrize(
    "dest",
    [
        "dest",
        "./dest/",
        "dest///",
        "folder/../dest",
        "link/dest",
        "-dest",
        "a name\nof two lines",
        "\udcff",
        "n" * 255,
        "ä" * 127,
    ],
)
def test_dest_is_any_name_seen_from_the_current_folder(
    small: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dest: str
) -> None:
    here = tmp_path / "here"
    (here / "folder").mkdir(parents=True)
    (here / "link").symlink_to("folder")
    flags = ("--",) if dest.startswith("-") else ()
    monkeypatch.chdir(here)
    out, err = _inside(*flags, small[0], dest, cache=small[1])
    assert (out.splitlines()[1:], err) == ([], "")
    assert (here / dest / "file").read_bytes() == b"content\n"
    made = [name for folder in (here, here / "folder") for name in os.listdir(folder)]
    assert sorted(made) == sorted(["folder", "link", Path(dest).name])


def test_a_parent_that_may_not_be_written_is_told(
    small: tuple[str, Path], as_user: Sequence[str], tmp_path: Path
) -> None:
    parent = tmp_path / "parent"
    parent.mkdir(mode=0o555)
    done = _take(small[0], parent / "dest", cache=tmp_path / "cache", via=as_user)
    assert (done.returncode, done.stdout, os.listdir(parent)) == (2, b"", [])
    assert b"cannot be written: Permission denied" in done.stderr
    assert b"--cache" not in done.stderr, "the cache has nothing to do with it"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not _ROOT:
        pytest.skip("mounting a file system needs root")
    peers.run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk)
    try:
        yield disk
    finally:
        peers.run("umount", disk)


@pytest.mark.parametrize("files", [1, 40])
def test_a_disk_that_is_too_small_is_told_and_left_empty(
    small_disk: Path, tmp_path: Path, files: int
) -> None:
    parts = [Member(b"%d" % number, _noise(6 * 2**20 // files)) for number in range(files)]
    source = _image(tmp_path / "layout", archive(*parts))
    done = fsmount("snapshot", source, small_disk / "dest", cache=tmp_path / "cache", code=8)
    assert os.listdir(small_disk) == []
    assert b"--cache" not in done.stderr, "the cache has nothing to do with it"


def test_what_an_upper_layer_hides_is_never_written(small_disk: Path, tmp_path: Path) -> None:
    large = bytes(6 * 2**20)
    below = archive(
        Member(b"removed", large),
        Member(b"replaced", large),
        Member(b"folder/removed", large),
        Member(b"opaque/removed", large),
        Member(b"file-now/removed", large),
        Member(b"kept", b"kept\n"),
        Member(b"twice", large),
        Member(b"twice", b"the last one counts\n"),
        Member(b"removed-link", type=HARDLINK, link=b"removed"),
    )
    above = archive(
        Member(b".wh.removed"),
        Member(b".wh.removed-link"),
        Member(b"replaced", b"small\n"),
        Member(b".wh.folder"),
        Member(b"opaque/.wh..wh..opq"),
        Member(b"opaque/new", b"new\n"),
        Member(b"file-now", b"a file\n"),
    )
    source = _image(tmp_path / "layout", below, above)
    done = fsmount("snapshot", source, small_disk / "dest", cache=tmp_path / "cache")
    tree = peers.tree_listing(small_disk / "dest")
    assert {path: node.size for path, node in tree.items() if node.kind == "file"} == {
        b"kept": 5,
        b"twice": 20,
        b"replaced": 6,
        b"opaque/new": 4,
        b"file-now": 7,
    }
    assert b": 5 files, 42 bytes from " in done.stdout


# -------------------- hostile images


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that images try to reach from a snapshot in a folder beside it."""
    (tmp_path / "parent").mkdir()
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "precious").write_text(_PRECIOUS)
    (outside / "precious").chmod(0o600)
    return outside


def test_nothing_is_written_through_symlinks_of_the_image(outside: Path, tmp_path: Path) -> None:
    away = os.fsencode(outside)

    def link(name: bytes, target: bytes = away) -> bytes:
        return _named(name, type=SYMLINK, link=target)

    below = archive(
        link(b"parent"),
        _named(b"parent/planted"),
        link(b"up", b"../../outside"),
        _named(b"up/folder/planted"),
        link(b"first", b"second"),
        link(b"second"),
        _named(b"first/planted"),
        _named(b"late/planted"),
        link(b"late"),
        link(b"described"),
        Member(b"described/", type=DIRECTORY, mode=0o777, mtime=1),
        link(b"file", away + b"/precious"),
        _named(b"hard", type=HARDLINK, link=b"file"),
        _named(b"hard-in-layer", type=HARDLINK, link=b"file"),
        _named(b"hard-in-layer", b"overwritten\n"),
        _named(b"device", type=HARDLINK, link=b"file"),
        _named(away + b"/planted", b"absolute\n"),
        link(b"cross"),
        link(b"cross-folder"),
        link(b"cross-whiteout"),
        link(b"cross-opaque"),
        link(b"cross-file", away + b"/precious"),
        link(b"hidden"),
        link(b"kept"),
        link(b"kept-file", away + b"/precious"),
    )
    above = archive(
        _named(b"cross/planted"),
        Member(b"cross-folder/", type=DIRECTORY, mode=0o777, mtime=1),
        _named(b"cross-whiteout/.wh.precious"),
        _named(b"cross-opaque/.wh..wh..opq"),
        _named(b"cross-file", b"overwritten\n"),
        _named(b"hard", b"overwritten\n"),
        Member(b"device", type=CHAR, mode=0o666, major=1, minor=3),
        _named(b".wh.hidden"),
        _named(b"hidden/planted"),
    )
    source = _image(tmp_path / "layout", below, above)
    before = peers.tree_listing(outside)
    fsmount("snapshot", source, tmp_path / "parent" / "dest", cache=tmp_path / "cache")
    assert peers.differences(before, peers.tree_listing(outside)) == []
    assert os.listdir(tmp_path / "parent") == ["dest"]
    tree = peers.tree_listing(tmp_path / "parent" / "dest")
    for path in (
        b"parent/planted",
        b"up/folder/planted",
        b"first/planted",
        b"cross/planted",
        b"hidden/planted",
        b"hard",
        b"hard-in-layer",
        b"cross-file",
        away.strip(b"/") + b"/planted",
    ):
        assert tree[path].kind == "file"
    for path in (b"described", b"cross-folder"):
        assert tree[path].kind == "folder"
    for path in (b"second", b"late", b"kept", b"cross-whiteout", b"cross-opaque"):
        assert tree[path].target == away
    assert tree[b"file"].target == tree[b"kept-file"].target == away + b"/precious"
    assert b"device" not in tree


def _refused(outside: bytes) -> Mapping[str, bytes]:
    return {
        "the root as a symlink": _named(b"./", type=SYMLINK, link=outside),
        "the root as a file": _named(b"/", b"content"),
        "a path with ..": _named(b"folder/../../outside/planted"),
        "a folder ..": Member(b"../", type=DIRECTORY, mode=0o777).header(),
        "a hardlink to the outside": _named(b"hard", type=HARDLINK, link=outside + b"/precious"),
        "a hardlink to the outside by ..": _named(b"hard", type=HARDLINK, link=b"../outside/precious"),
        "a hardlink through a symlink": _named(b"link", type=SYMLINK, link=outside)
        + _named(b"hard", type=HARDLINK, link=b"link/precious"),
        "a hardlink to a folder": _named(b"folder/file") + _named(b"hard", type=HARDLINK, link=b"folder"),
        "a hardlink to itself": _named(b"hard", type=HARDLINK, link=b"hard"),
        "a name that no folder takes": _named(b"n" * 256),
    }


@pytest.mark.parametrize("name", _refused(b""))
def test_an_image_that_reaches_outside_is_refused_whole(outside: Path, tmp_path: Path, name: str) -> None:
    tar = archive(Member(b"first", b"content\n"), _refused(os.fsencode(outside))[name])
    source = _image(tmp_path / "layout", tar)
    before = peers.tree_listing(outside)
    _inside(source, tmp_path / "parent" / "dest", cache=tmp_path / "cache", code=1)
    assert os.listdir(tmp_path / "parent") == []
    assert peers.differences(before, peers.tree_listing(outside)) == []


_LEVELS = 1_010
_DEEP = b"/".join([b"d"] * _LEVELS)


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An image with a file deeper than a stack is, and the folder for its snapshot; without pytest, which recurses."""
    (tmp_path / "parent").mkdir()
    tar = archive(
        _named(_DEEP + b"/file", b"deep\n"),
        _named(_DEEP + b"/large", _noise(_CHUNK + 1)),
        _named(_DEEP + b"/link", type=SYMLINK, link=b"file"),
        _named(b"again", type=HARDLINK, link=_DEEP + b"/file"),
    )
    yield _image(tmp_path / "layout", tar), tmp_path / "parent"
    subprocess.run(["rm", "-rf", tmp_path / "parent"], check=True)


def test_a_tree_may_be_deeper_than_a_stack(deep: tuple[str, Path], tmp_path: Path) -> None:
    source, parent = deep
    fsmount("snapshot", source, parent / "dest", cache=tmp_path / "cache")
    tree = peers.tree_listing(parent / "dest")
    assert len(tree) == 1 + _LEVELS + 4
    assert tree[_DEEP + b"/file"].sha256 == hashlib.sha256(b"deep\n").hexdigest()
    assert tree[_DEEP + b"/file"].links == (b"again", _DEEP + b"/file")
    assert tree[_DEEP + b"/large"].size == _CHUNK + 1
    assert tree[_DEEP].mtime_ns == 0


def test_what_is_deep_is_removed_again_after_a_failure(deep: tuple[str, Path], tmp_path: Path) -> None:
    source, parent = deep
    endless = sparse("1.0", b"endless", 2**62, [(0, b"x")])
    blob = Path(source.split(":")[1])
    tar = archive(_named(_DEEP + b"/file", b"deep\n"), endless)
    source = _image(blob, tar, tag="endless")
    done = fsmount("snapshot", source, parent / "dest", cache=tmp_path / "cache", code=1)
    assert b"File too large" in done.stderr
    assert os.listdir(parent) == []


# -------------------- interrupted, and disturbed


@dataclass(frozen=True)
class _Slow:
    """An image behind a front that stops in the middle of its layer, and the folder for its snapshot."""

    source: str
    front: CountingProxy
    parent: Path
    cache: Path
    nodes: Mapping[bytes, peers.Node]
    writes: bool

    @property
    def dest(self) -> Path:
        return self.parent / "dest"


_FIRST = _noise(1000)
_SLOW_TAR = archive(
    Member(b"folder/", type=DIRECTORY, mode=0o755),
    Member(b"folder/first", _FIRST),
    Member(b"closed/file", b"inside a folder that nobody may write\n"),
    Member(b"closed/", type=DIRECTORY, mode=0o555),
    Member(b"large", _noise(3 * _CHUNK)),
)
#: Within the large file, after chunks that can be written.
_STALL = 2 * _CHUNK + 5


@pytest.fixture(scope="module")
def image(registry: peers.Registry, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The expected tree of a registry's image, beside a cache that knows the tree and has no chunks; its layer."""
    work = tmp_path_factory.mktemp("slow")
    source = _image(work / "layout", _SLOW_TAR)
    peers.push(work / "layout", "v1", registry.host, "team/slow")
    fsmount("snapshot", source, work / "expected", cache=work / "cache")
    shutil.rmtree(work / "cache" / "chunks")
    return work, peers.digest_of(_SLOW_TAR)


@pytest.fixture(params=["fetching", "writing"])
def slow(
    request: pytest.FixtureRequest, registry: peers.Registry, image: tuple[Path, str], tmp_path: Path
) -> Iterator[_Slow]:
    """While it is fetching, nothing has been made; while it is writing, some files have: its chunks were evicted."""
    work, layer = image
    cache, writes = tmp_path / "cache", request.param == "writing"
    if writes:
        shutil.copytree(work / "cache", cache)
    (tmp_path / "parent").mkdir()
    nodes = peers.tree_listing(work / "expected")
    with CountingProxy(registry.host, faults=[Fault("stall", _STALL, f"/blobs/{layer}")]) as front:
        yield _Slow(f"{front.host}/team/slow:v1", front, tmp_path / "parent", cache, nodes, writes)


_fetching = pytest.mark.parametrize("slow", ["fetching"], indirect=True)
_writing = pytest.mark.parametrize("slow", ["writing"], indirect=True)


@contextmanager
def _stalled(slow: _Slow, *, via: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """A snapshot that waits for bytes which do not come."""
    with _started(slow.source, slow.dest, cache=slow.cache, via=via) as process:
        assert slow.front.wait_stalled(20), process.poll()
        if slow.writes:
            assert wait_until(lambda: list(slow.parent.glob(".dest.partial-*/folder/first")))
        yield process


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False)],
    ids=["SIGINT", "SIGINT-from-a-terminal", "SIGTERM"],
)
def test_a_snapshot_that_is_interrupted_leaves_nothing(
    slow: _Slow, number: signal.Signals, whole_group: bool
) -> None:
    with _stalled(slow) as process:
        workers = _children(process.pid)
        assert bool(workers) == slow.writes
        assert "dest" not in os.listdir(slow.parent)
        if whole_group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        said, complaints = process.communicate(timeout=_SECONDS)
        assert os.listdir(slow.parent) == []
        assert process.returncode in (128 + number, -number)
        assert (said, complaints) == (b"", b"")
        assert not list(slow.cache.rglob(".partial-*"))
        assert wait_until(lambda: not any(map(_runs, workers)))


def test_after_a_snapshot_was_killed_there_is_no_dest_and_another_succeeds(slow: _Slow) -> None:
    with _stalled(slow) as process:
        workers = _children(process.pid)
        for partial in slow.parent.iterdir():
            assert partial.name.startswith(".dest.partial-")
            assert partial.stat().st_mode & 0o7777 == 0o700, "nobody sees it before it is whole"
        process.kill()
        process.wait()
        assert wait_until(lambda: not any(map(_runs, workers)))
    assert not slow.dest.exists()
    slow.front.release()
    fsmount("snapshot", slow.source, slow.dest, cache=slow.cache)
    assert peers.differences(slow.nodes, peers.tree_listing(slow.dest)) == []


@_fetching
def test_dest_that_came_to_exist_meanwhile_is_refused_and_left_alone(
    slow: _Slow, as_user: Sequence[str]
) -> None:
    with _stalled(slow, via=as_user) as process:
        slow.dest.mkdir()
        slow.front.release()
        _, complaints = process.communicate(timeout=_SECONDS)
    assert (process.returncode, b"has come to exist meanwhile" in complaints) == (9, True)
    assert os.listdir(slow.dest) == []
    assert os.listdir(slow.parent) == ["dest"]


@_writing
def test_a_snapshot_whose_writing_processes_die_fails_and_leaves_nothing(slow: _Slow) -> None:
    with _stalled(slow) as process:
        workers = _children(process.pid)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        slow.front.release()
        said, complaints = process.communicate(timeout=_SECONDS)
    assert (process.returncode, said, os.listdir(slow.parent)) == (1, b"", [])
    assert complaints.startswith(b"fsmount: error: ")


@_fetching
def test_a_layer_that_was_altered_on_the_way_leaves_nothing(slow: _Slow) -> None:
    slow.front.faults[:] = [Fault("flip", _STALL, slow.front.faults[0].path)]
    fsmount("snapshot", slow.source, slow.dest, cache=slow.cache, code=7)
    assert os.listdir(slow.parent) == []
    slow.front.faults.clear()
    fsmount("snapshot", slow.source, slow.dest, cache=slow.cache)
    assert peers.differences(slow.nodes, peers.tree_listing(slow.dest)) == []


# -------------------- the cache


@pytest.mark.parametrize("size", ["1 MB", "10 MB"])
def test_a_cache_smaller_than_the_image_is_enough(tmp_path: Path, size: str) -> None:
    contents = {b"%d" % number: _noise(_CHUNK - number) for number in range(6)}
    source = _image(tmp_path / "layout", archive(*(Member(*item) for item in contents.items())))
    (tmp_path / "config.toml").write_text(f'[cache]\nsize = "{size}"\n')
    flags = ("--config", tmp_path / "config.toml")
    with _started(source, tmp_path / "dest", *flags, cache=tmp_path / "cache") as process:
        _, complaints = process.communicate(timeout=20)
    assert process.returncode == 0
    # That it could not be cached is told, and nothing else.
    assert [line for line in complaints.splitlines() if not line.endswith(b"without caching")] == []
    found = {os.fsencode(path.name): path.read_bytes() for path in (tmp_path / "dest").iterdir()}
    assert found == contents


def test_a_chunk_that_the_disk_has_changed_is_fetched_again(tmp_path: Path) -> None:
    content = _noise(1000)
    source = _image(tmp_path / "layout", archive(Member(b"file", content)))
    cache = tmp_path / "cache"
    fsmount("snapshot", source, tmp_path / "first", cache=cache)
    (chunk,) = (path for path in (cache / "chunks").rglob("*") if path.suffix == ".val")
    data = chunk.read_bytes()
    chunk.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
    fsmount("snapshot", source, tmp_path / "second", cache=cache)
    assert (tmp_path / "second" / "file").read_bytes() == content


@_fetching
def test_two_snapshots_at_once_share_a_cache(slow: _Slow) -> None:
    other = slow.parent / "other"
    with _stalled(slow) as one, _started(slow.source, other, cache=slow.cache) as two:
        assert slow.front.wait_stalled(20)
        slow.front.release()
        for process in (one, two):
            _, complaints = process.communicate(timeout=_SECONDS)
            assert (process.returncode, complaints) == (0, b"")
    for dest in (slow.dest, other):
        assert peers.differences(slow.nodes, peers.tree_listing(dest)) == []


@pytest.mark.mount
@pytest.mark.skipif(not _ROOT or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse")
@_fetching
def test_a_mount_and_a_snapshot_share_a_cache(slow: _Slow, tmp_path: Path) -> None:
    with mounted(tmp_path, f"app={slow.source.removesuffix(':v1')}", cache=slow.cache) as mountpoint:
        with _stalled(slow) as process:
            assert (mountpoint / "app" / "v1" / "folder" / "first").read_bytes() == _FIRST
            slow.front.release()
            _, complaints = process.communicate(timeout=_SECONDS)
            assert (process.returncode, complaints) == (0, b"")
            digest = peers.digest_of(mountpoint / "app" / "v1" / "large")
        assert digest == f"sha256:{slow.nodes[b'large'].sha256}"
        slow.front.forget()
        fsmount("snapshot", slow.source, slow.parent / "again", cache=slow.cache)
        assert [one.method for one in slow.front.passed("/blobs/")] == [], "the mount's bytes are there"
    for dest in (slow.dest, slow.parent / "again"):
        assert peers.differences(slow.nodes, peers.tree_listing(dest)) == []


# -------------------- what is shown, and what is needed


def test_a_terminal_shows_a_bar_and_the_same_line(registry: peers.Registry, tmp_path: Path) -> None:
    source = _image(tmp_path / "layout", archive(Member(b"file", _noise(_CHUNK + 1))))
    plain = fsmount("snapshot", source, tmp_path / "dest", cache=tmp_path / "cache")
    shutil.rmtree(tmp_path / "dest")
    ours, theirs = pty.openpty()
    try:
        termios.tcsetwinsize(theirs, (24, 120))
        process = subprocess.Popen(
            command("snapshot", source, tmp_path / "dest"),
            env={**environment(tmp_path / "new-cache"), "TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
        )
    finally:
        os.close(theirs)
    shown = bytearray()
    with open(ours, "rb", buffering=0) as terminal, suppress(OSError):  # EIO: nobody has the other end
        while piece := terminal.read(4096):
            shown += piece
    said, _ = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0
    assert b"fetching" in shown and b"writing" in shown

    def without_time(line: bytes) -> bytes:
        return re.sub(rb"in \d+\.\d s", b"", line)

    assert without_time(said) == without_time(plain.stdout)
    assert plain.stdout.count(b"\n") == 1
    assert plain.stderr == b""


def test_neither_snapshots_nor_looking_need_libfuse(small: tuple[str, Path], tmp_path: Path) -> None:
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "pyfuse3.py").write_text('raise ImportError("libfuse3.so.3: cannot open shared object file")\n')

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            arguments,
            env={**environment(tmp_path / "cache"), "PYTHONPATH": str(shim)},
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )

    assert b"libfuse3.so.3" in run(sys.executable, "-c", "import pyfuse3").stderr
    for arguments in (
        ("snapshot", small[0], tmp_path / "dest"),
        ("ls", small[0]),
        ("cat", small[0], "file"),
        ("inspect", small[0]),
        ("config", "check"),
        ("version",),
    ):
        done = run(*command(*arguments))
        assert (done.returncode, done.stderr) == (0, b""), arguments
    assert (tmp_path / "dest" / "file").read_bytes() == b"content\n"
