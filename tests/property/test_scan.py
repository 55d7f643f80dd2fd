"""TarScanner finds in any archive of the standard library's tarfile what tarfile itself reads there."""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import cycle

from hypothesis import given, settings
from hypothesis import strategies as st

from fsmount.archive.entry import Entry, EntryType
from fsmount.archive.scan import TarScanner

_TYPES = {
    tarfile.REGTYPE: EntryType.FILE,
    tarfile.AREGTYPE: EntryType.FILE,
    tarfile.CONTTYPE: EntryType.FILE,
    tarfile.LNKTYPE: EntryType.HARDLINK,
    tarfile.SYMTYPE: EntryType.SYMLINK,
    tarfile.CHRTYPE: EntryType.CHAR,
    tarfile.BLKTYPE: EntryType.BLOCK,
    tarfile.DIRTYPE: EntryType.DIRECTORY,
    tarfile.FIFOTYPE: EntryType.FIFO,
}
_LINKS = (EntryType.SYMLINK, EntryType.HARDLINK)
_DEVICES = (EntryType.CHAR, EntryType.BLOCK)
_XATTR = "SCHILY.xattr."


@dataclass(frozen=True)
class Member:
    type: bytes
    path: bytes
    target: bytes
    content: bytes
    mode: int
    uid: int
    gid: int
    mtime: int | float
    device: tuple[int, int]
    xattrs: dict[str, bytes]


_COMPONENTS = st.one_of(
    st.sampled_from([b"a", b"b", b" ", b"\xff\xfe", "ü".encode(), b"two\nlines", b"n" * 99, b"n" * 255]),
    st.binary(min_size=1, max_size=150)
    .map(lambda name: name.translate(None, b"/\0"))
    .filter(lambda name: name not in (b"", b".", b"..")),
)
#: With a component at least that is a name: only a directory may be the root.
_PATHS = st.builds(
    lambda before, names, after: before + b"/".join(names) + after,
    st.sampled_from([b"", b"", b"./", b"/", b"//./"]),
    st.lists(_COMPONENTS, min_size=1, max_size=4),
    st.sampled_from([b"", b"", b"/."]),
)
_IDS = st.one_of(st.integers(0, 70_000), st.integers(0, 2**32 - 2))
_TIMES = st.one_of(
    st.integers(0, 2**33), st.integers(-(2**33), 2**33), st.integers(-(10**11), 10**11).map(lambda n: n / 64)
)
_MEMBERS = st.builds(
    Member,
    type=st.sampled_from(list(_TYPES)),
    path=_PATHS,
    target=_PATHS,
    content=st.one_of(st.binary(max_size=600), st.integers(0, 3000).map(lambda size: b"c" * size)),
    mode=st.integers(0, 0o7777),
    uid=_IDS,
    gid=_IDS,
    mtime=_TIMES,
    device=st.tuples(st.integers(0, 2**21 - 1), st.integers(0, 2**21 - 1)),
    xattrs=st.dictionaries(
        st.sampled_from(["user.a", "user.b c", "security.capability"]), st.binary(max_size=30), max_size=2
    ),
)


def _archive(members: list[Member], format: int) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=format, encoding="utf-8") as archive:
        for member in members:
            if member.type == tarfile.AREGTYPE and len(member.path) >= 100:
                continue  # cut off at a slash, its name in the header makes tarfile take it for a folder
            info = tarfile.TarInfo(os.fsdecode(member.path))
            info.type = member.type
            info.linkname = os.fsdecode(member.target) if _TYPES[member.type] in _LINKS else ""
            info.size = len(member.content)
            info.mode, info.uid, info.gid, info.mtime = member.mode, member.uid, member.gid, member.mtime
            info.devmajor, info.devminor = member.device
            info.pax_headers = {_XATTR + name: os.fsdecode(value) for name, value in member.xattrs.items()}
            try:
                # Of links and devices the size is written all the same, and no data.
                archive.addfile(info, io.BytesIO(member.content) if info.isreg() else None)
            except ValueError:
                continue  # more than this format can say: nothing was written
    return data.getvalue()


def _cleaned(path: str) -> bytes:
    return b"/".join(part for part in os.fsencode(path).split(b"/") if part not in (b"", b"."))


def _by_tarfile(data: bytes) -> Iterator[tuple[Entry, bytes]]:
    """Every member as an entry without extents, and its content."""
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as archive:
        for info in archive:
            type_ = _TYPES[info.type]
            file = archive.extractfile(info) if info.isreg() else None
            content = file.read() if file is not None else b""
            target = _cleaned(info.linkname) if info.islnk() else os.fsencode(info.linkname)
            xattrs = {
                os.fsencode(key.removeprefix(_XATTR)): os.fsencode(value)
                for key, value in info.pax_headers.items()
                if key.startswith(_XATTR)
            }
            entry = Entry(
                path=_cleaned(info.name),
                type=type_,
                mode=info.mode & 0o7777,
                uid=info.uid,
                gid=info.gid,
                size=len(content),
                mtime_ns=int(Decimal(str(info.mtime)) * 10**9),
                link=target if type_ in _LINKS else b"",
                device=(info.devmajor, info.devminor) if type_ in _DEVICES else (0, 0),
                xattrs=xattrs,
            )
            yield entry, content


def _by_scanner(data: bytes, pieces: list[int]) -> Iterator[tuple[Entry, bytes]]:
    """The same, from an archive that is fed in pieces of these sizes, again and again."""
    scanner = TarScanner()
    entries: list[Entry] = []
    offset = 0
    for size in cycle(pieces):
        if offset >= len(data):
            break
        entries += scanner.feed(data[offset : offset + size])
        offset += size
    scanner.finish()
    for entry in entries:
        content = b"".join(data[extent.offset : extent.offset + extent.size] for extent in entry.extents)
        fields = {name: getattr(entry, name) for name in Entry.__dataclass_fields__}
        yield Entry(**fields | {"extents": ()}), content


@settings(max_examples=200, deadline=None)
@given(
    members=st.lists(_MEMBERS, max_size=6),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    pieces=st.lists(st.one_of(st.integers(1, 600), st.just(1 << 20)), min_size=1, max_size=5),
)
def test_any_archive_of_tarfile_s_has_the_members_that_tarfile_reads(
    members: list[Member], format: int, pieces: list[int]
) -> None:
    data = _archive(members, format)
    assert list(_by_scanner(data, pieces)) == list(_by_tarfile(data))
