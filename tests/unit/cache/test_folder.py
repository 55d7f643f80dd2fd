"""The cache folder: for its owner alone, and a file in it is whole or absent."""

import errno
import os
import stat
from pathlib import Path

import pytest

from fsmount.cache.folder import CacheFolder, disk_errors, from_os_error, publish, whole_file
from fsmount.errors import FsmountError, NoSpace, Refused, UsageError
from fsmount.oci.digest import Digest

DATA = b'{"schemaVersion": 2}'


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_all_folders_are_made_for_their_owner_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = CacheFolder(tmp_path / "deep" / "cache")
    finally:
        os.umask(before)
    for path in (folder.path, folder.chunks, folder.layers, folder.trees, folder.manifests):
        assert mode(path) == 0o700
    assert folder.state.parent == folder.path


def test_a_folder_that_others_could_enter_is_closed_to_them_and_keeps_its_content(tmp_path: Path) -> None:
    CacheFolder(tmp_path).save_manifest(Digest.of(DATA), DATA)
    tmp_path.chmod(0o777)
    assert CacheFolder(tmp_path).load_manifest(Digest.of(DATA)) == DATA
    assert mode(tmp_path) == 0o700


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(Refused, match="belongs to user"):
        CacheFolder(tmp_path)


def test_what_is_no_folder_cannot_be_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "cache"):
        with pytest.raises(UsageError, match="--cache"):
            CacheFolder(path)


# -------------------- manifests


@pytest.mark.parametrize("damaged", [b"", DATA[:-1], DATA.replace(b"2", b"1"), DATA + b" "])
def test_a_damaged_document_counts_as_absent_and_is_removed(tmp_path: Path, damaged: bytes) -> None:
    folder, digest = CacheFolder(tmp_path), Digest.of(DATA)
    assert folder.load_manifest(digest) is None
    folder.save_manifest(digest, DATA)
    assert folder.load_manifest(digest) == DATA
    folder.manifest_path(digest).write_bytes(damaged)
    assert folder.load_manifest(digest) is None
    assert list(folder.manifests.iterdir()) == []


# -------------------- files that are whole or absent


def test_a_file_gets_its_name_when_it_is_whole_and_has_reached_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    synced: list[bytes] = []

    def fsync(descriptor: int) -> None:
        assert path.read_bytes() == b"old"
        synced.append(os.pread(descriptor, 100, 0))

    monkeypatch.setattr(os, "fsync", fsync)
    with whole_file(path) as partial:
        assert partial.parent == tmp_path and partial.name.startswith(".partial-")
        assert mode(partial) == 0o600
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert synced == [b"new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["while it is written", "while it is synced"])
def test_a_file_that_cannot_be_finished_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)), whole_file(path) as partial:
        partial.write_bytes(b"new")
        if where == "while it is written":
            raise error
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_publishing_leaves_no_descriptor_open(tmp_path: Path) -> None:
    (tmp_path / "partial").write_bytes(b"new")
    before = os.listdir("/proc/self/fd")
    publish(tmp_path / "partial", tmp_path / "file")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EACCES, UsageError),
        (errno.EPERM, UsageError),
        (errno.EROFS, UsageError),
        (errno.ENOTDIR, UsageError),
        (errno.EEXIST, UsageError),
        (errno.EIO, FsmountError),
    ],
)
def test_what_the_operating_system_says_becomes_an_error_of_ours_that_names_the_path(
    code: int, kind: type[FsmountError]
) -> None:
    path = Path("/var/cache/fsmount")
    error = from_os_error(OSError(code, os.strerror(code)), path)
    assert type(error) is kind
    assert str(path) in error.message
    with pytest.raises(kind), disk_errors(path):
        raise OSError(code, os.strerror(code))
