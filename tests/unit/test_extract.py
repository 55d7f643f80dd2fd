"""The extracting process, spoken to as a snapshot does."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from fsmount.extract import LENGTH, REPLY, File, Folders, Part, encode

_NS = 1_600_000_000_123_456_789


def _file(name: bytes, data: bytes = b"", *, folder: bytes = b"", at: int = 0, **others: object) -> File:
    """A file whose bytes are those of the chunk from `at` on."""
    pieces = ((0, at, len(data)),) if data else ()
    plain = File(folder, name, 0o644, os.geteuid(), os.getegid(), len(data), _NS, pieces, ())
    return plain._replace(**others)  # type: ignore[arg-type]


class _Extractor:
    """The parent's end of the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def send(self, data: bytes, descriptor: int) -> None:
        socket.send_fds(self.connection, [LENGTH.pack(len(data))], [descriptor])
        self.connection.sendall(data)

    def ask(
        self, chunk: bytes, files: Sequence[File] = (), parts: Sequence[Part] = ()
    ) -> tuple[int, int, bytes]:
        """The answer to a batch: an errno, how many attributes were lost, and the name of the file that failed."""
        descriptor = os.memfd_create("chunk")
        try:
            os.write(descriptor, chunk)
            self.send(encode(list(files), list(parts)), descriptor)
        finally:
            os.close(descriptor)
        code, lost, length = REPLY.unpack(self.connection.recv(REPLY.size, socket.MSG_WAITALL))
        return code, lost, self.connection.recv(length, socket.MSG_WAITALL) if length else b""

    def ended(self) -> bool:
        """Waits for the end of the connection."""
        return self.connection.recv(1) == b""


@contextmanager
def _extracting(root: Path) -> Iterator[_Extractor]:
    """A process that writes below `root`; it must end by itself, without a word, when the connection does."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fsmount.extract", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            umask=0o077,
        )
    try:
        with ours:
            ours.settimeout(20)
            extractor = _Extractor(ours)
            descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
            try:
                extractor.send(b"", descriptor)
            finally:
                os.close(descriptor)
            yield extractor
        assert (process.wait(20), process.stderr.read() if process.stderr else b"") == (0, b"")
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()


def test_it_starts_with_the_standard_library_alone() -> None:
    code = "import sys; old = set(sys.modules); import fsmount.extract; print(*set(sys.modules) - old)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    foreign = {name.partition(".")[0] for name in loaded.split()} - sys.stdlib_module_names
    assert foreign == {"fsmount"}
    assert {name for name in loaded.split() if name.startswith("fsmount")} == {"fsmount", "fsmount.extract"}


def test_files_are_cut_out_of_the_chunk_with_their_attributes(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    files = [
        _file(b"first", b"one", mode=0o600),
        _file(b"\xff\n", b"two", folder=b"folder", at=3, mode=0o4711),
        _file(b"empty", mode=0o000),
    ]
    with _extracting(tmp_path) as extractor:
        assert extractor.ask(b"onetwo", files) == (0, 0, b"")
        assert extractor.ask(b"three", [_file(b"third", b"three", mode=0o666)]) == (0, 0, b"")
    found = {}
    for path in (b"first", b"folder/\xff\n", b"empty", b"third"):
        status = os.stat(os.fsencode(tmp_path) + b"/" + path)
        assert status.st_mtime_ns == _NS
        found[path] = (status.st_mode & 0o7777, status.st_size)
    assert found == {
        b"first": (0o600, 3),
        b"folder/\xff\n": (0o4711, 3),
        b"empty": (0o000, 0),
        b"third": (0o666, 5),  # whatever the umask
    }
    assert (tmp_path / "first").read_bytes() + (tmp_path / "third").read_bytes() == b"onethree"
    assert (tmp_path / "folder" / os.fsdecode(b"\xff\n")).read_bytes() == b"two"


def test_what_no_piece_covers_is_a_hole(tmp_path: Path) -> None:
    size = 64 * 2**20
    file = _file(b"sparse", size=size, pieces=((5, 1, 3), (size - 2**20, 0, 4)))
    with _extracting(tmp_path) as extractor:
        assert extractor.ask(b"abcd", [file, _file(b"hole", size=size)]) == (0, 0, b"")
    with (tmp_path / "sparse").open("rb") as content:
        assert content.read(10) == b"\0\0\0\0\0bcd\0\0"
        assert os.pread(content.fileno(), 6, size - 2**20) == b"abcd\0\0"
    for name in ("sparse", "hole"):
        status = (tmp_path / name).stat()
        assert (status.st_size, status.st_blocks * 512 < 2**20) == (size, True)


def test_parts_fill_a_file_that_is_there_from_several_chunks(tmp_path: Path) -> None:
    (tmp_path / "large").touch()
    with _extracting(tmp_path) as extractor:
        assert extractor.ask(b"..world", parts=[Part(b"", b"large", ((6, 2, 5),))]) == (0, 0, b"")
        assert extractor.ask(b"hello ", parts=[Part(b"", b"large", ((0, 0, 6),))]) == (0, 0, b"")
    assert (tmp_path / "large").read_bytes() == b"hello world"


def test_extended_attributes_are_set_and_those_that_cannot_be_are_counted(tmp_path: Path) -> None:
    (tmp_path / "probe").touch()
    try:
        os.setxattr(tmp_path / "probe", "user.probe", b"")
    except OSError:
        pytest.skip("the file system of the temporary folder takes no user attributes")
    too_large = bytes(65_537)  # XATTR_SIZE_MAX and one
    kept, lost = ((b"user.kept", b"\0\xff"), (b"user.empty", b"")), ((b"user.large", too_large),)
    files = [_file(b"one", xattrs=kept + lost), _file(b"two", xattrs=lost)]
    with _extracting(tmp_path) as extractor:
        assert extractor.ask(b"", files) == (0, 2, b"")
        assert extractor.ask(b"", [_file(b"three", xattrs=lost)]) == (0, 1, b"")
    found = {name: os.getxattr(tmp_path / "one", name) for name in os.listxattr(tmp_path / "one")}
    assert {name: value for name, value in found.items() if name.startswith("user.")} == {
        "user.kept": b"\0\xff",
        "user.empty": b"",
    }
    assert (tmp_path / "one").stat().st_mtime_ns == (tmp_path / "two").stat().st_mtime_ns == _NS


@pytest.mark.skipif(os.geteuid() != 0, reason="owners need root")
def test_owners_do_not_cost_the_setuid_bit(tmp_path: Path) -> None:
    with _extracting(tmp_path) as extractor:
        assert extractor.ask(b"", [_file(b"tool", mode=0o6755, uid=12, gid=34)]) == (0, 0, b"")
    status = (tmp_path / "tool").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (12, 34, 0o6755)


def _outside(root: Path) -> Path:
    return root.parent / "outside"


def _link_to_file(root: Path) -> None:
    (root / "name").symlink_to(_outside(root) / "precious")


def _link_to_nothing(root: Path) -> None:
    (root / "name").symlink_to(_outside(root) / "new")


def _link_to_folder(root: Path) -> None:
    (root / "folder").symlink_to(_outside(root))


def _link_above_folder(root: Path) -> None:
    (root / "link").symlink_to(_outside(root).parent)


def _is_there(root: Path) -> None:
    (root / "name").write_text("precious")


@pytest.mark.parametrize(
    ("prepare", "batch", "codes"),
    [
        (_is_there, [_file(b"name", b"evil")], {errno.EEXIST}),
        (_link_to_file, [_file(b"name", b"evil")], {errno.EEXIST}),
        (_link_to_nothing, [_file(b"name", b"evil")], {errno.EEXIST}),
        (_link_to_file, [Part(b"", b"name", ((0, 0, 4),))], {errno.ELOOP}),
        (_link_to_nothing, [Part(b"", b"name", ((0, 0, 4),))], {errno.ELOOP}),
        (_link_to_folder, [_file(b"name", b"evil", folder=b"folder")], {errno.ELOOP, errno.ENOTDIR}),
        (_link_to_folder, [Part(b"folder", b"precious", ((0, 0, 4),))], {errno.ELOOP, errno.ENOTDIR}),
        (_link_above_folder, [_file(b"name", b"evil", folder=b"link/outside")], {errno.ELOOP, errno.ENOTDIR}),
        (lambda root: None, [_file(b"name", b"evil", folder=b"missing")], {errno.ENOENT}),
        (lambda root: None, [_file(b"name", b"longer than the chunk")], {errno.EIO}),
    ],
)
def test_it_follows_no_link_overwrites_nothing_and_says_which_file_failed(
    tmp_path: Path, prepare: Callable[[Path], None], batch: list[File | Part], codes: set[int]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    _outside(root).mkdir()
    (_outside(root) / "precious").write_text("precious")
    prepare(root)
    files = [one for one in batch if isinstance(one, File)]
    parts = [one for one in batch if isinstance(one, Part)]
    with _extracting(root) as extractor:
        code, _, name = extractor.ask(b"evil", files, parts)
        assert code in codes
        assert name == batch[0].name
        assert extractor.ended(), "after a failure it does nothing more"
    assert os.listdir(_outside(root)) == ["precious"]
    assert (_outside(root) / "precious").read_text() == "precious"
    if prepare is _is_there:
        assert (root / "name").read_text() == "precious"


def test_it_ends_silently_when_its_parent_is_gone_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    with _extracting(tmp_path) as extractor:
        extractor.connection.sendall(LENGTH.pack(1000) + b"only the beginning")
    assert os.listdir(tmp_path) == []


# -------------------- Folders


@contextmanager
def _folders(root: Path) -> Iterator[Folders]:
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with closing(Folders(descriptor)) as folders:
            yield folders
    finally:
        os.close(descriptor)


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_folders_are_found_name_by_name_and_the_root_is_the_empty_path(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    with _folders(tmp_path) as folders:
        for path in ("", "a", "a/b/c", "a/b", ""):
            found = os.fstat(folders.descriptor(path.encode()))
            assert os.path.samestat(found, (tmp_path / path).stat())


def test_folders_keeps_a_bounded_number_open_and_closes_all(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / str(number)).mkdir()
    before = _open_descriptors()
    with _folders(tmp_path) as folders:
        for _ in range(2):
            for number in range(300):
                found = os.fstat(folders.descriptor(b"%d" % number))
                assert os.path.samestat(found, (tmp_path / str(number)).stat())
            assert _open_descriptors() <= before + 130
    assert _open_descriptors() == before


def test_a_folder_may_lie_deeper_than_the_stack_and_the_longest_path(tmp_path: Path) -> None:
    levels = 3000
    before = _open_descriptors()
    try:
        with _folders(tmp_path) as folders:
            for level in range(levels):
                os.mkdir(b"d", dir_fd=folders.descriptor(b"/".join([b"d"] * level)))
            deepest = os.fstat(folders.descriptor(b"/".join([b"d"] * levels)))
            folders.descriptor(b"d")  # forgotten meanwhile
        with _folders(tmp_path) as folders:  # without a parent that is open
            assert os.path.samestat(os.fstat(folders.descriptor(b"/".join([b"d"] * levels))), deepest)
        assert _open_descriptors() == before
    finally:
        # pytest's own way recurses.
        subprocess.run(["rm", "-rf", "--", tmp_path / "d"], check=True)


def test_a_folder_that_is_missing_leaves_no_descriptor_open(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    before = _open_descriptors()
    with _folders(tmp_path) as folders, pytest.raises(FileNotFoundError):
        folders.descriptor(b"a/b/c/d")
    assert _open_descriptors() == before
