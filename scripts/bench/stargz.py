"""Writes an eStargz layer from a tar, a member at a time, with the cuts that stargz-snapshotter makes."""

import hashlib
import json
import mmap
import tarfile
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, TypeAlias

from tests.fakes import tar as tars
from tests.fakes.estargz import TOC_DIGEST, digest, footer_51

_CHUNK_SIZE = 4 << 20
_LEVEL = 6

_Fields: TypeAlias = dict[str, str | int]


@dataclass(frozen=True, slots=True)
class Written:
    """What is to be said of the layer; `toc_size` is that of the table of contents, compressed."""

    diff_id: str
    annotations: tuple[tuple[str, str], ...]
    toc_size: int


def write_estargz(tar: Path, blob: Path) -> Written:
    """Encode a tar of plain files and folders.

    Every chunk of a file begins a gzip member, which holds what follows it in the tar as well.
    """
    with (
        tar.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        tarfile.open(tar) as archive,
        blob.open("wb") as out,
    ):
        layer, at = _Layer(out), 0
        entries: list[_Fields] = []
        for member in archive:
            layer.write(data[at : member.offset_data])
            at = member.offset_data
            entry: _Fields = {
                "name": member.name + "/" * member.isdir(),
                "type": "dir" if member.isdir() else "reg",
                "mode": member.mode,
                "modtime": datetime.fromtimestamp(member.mtime, UTC).isoformat().replace("+00:00", "Z"),
            }
            if member.isdir():
                entries.append(entry)
                continue
            stop = at + member.size
            entry |= {"size": member.size, "digest": digest(data[at:stop])}
            for start in range(at, stop, _CHUNK_SIZE):
                chunk = data[start : min(start + _CHUNK_SIZE, stop)]
                place: _Fields = {
                    "offset": layer.cut(),
                    "chunkOffset": start - at,
                    "chunkDigest": digest(chunk),
                }
                if len(chunk) == _CHUNK_SIZE:
                    place["chunkSize"] = _CHUNK_SIZE
                entries.append(entry | place)
                layer.write(chunk)
                entry = {"name": member.name, "type": "chunk"}
            if not member.size:
                entries.append(entry)
            at = stop
        toc = json.dumps({"version": 1, "entries": entries}, indent="\t").encode()
        offset = layer.cut()
        layer.write(tars.archive(tars.Member(b"stargz.index.json", toc)))
        stop = layer.cut()
        out.write(footer_51(offset))
    return Written(layer.diff_id, ((TOC_DIGEST, digest(toc)),), stop - offset)


class _Layer:
    """A file of gzip members, and the hash of what they inflate to."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._open = bytearray()
        self._size = 0
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._open += data

    def cut(self) -> int:
        """Ends the open member; the offset of the next."""
        if self._open:
            self._hash.update(self._open)
            gzip = zlib.compressobj(_LEVEL, wbits=31)
            self._size += self._out.write(gzip.compress(self._open) + gzip.flush())
            self._open.clear()
        return self._size

    @property
    def diff_id(self) -> str:
        """Of all members that have ended; the footer inflates to nothing."""
        return f"sha256:{self._hash.hexdigest()}"
