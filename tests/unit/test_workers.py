"""The extracting processes: which program they run."""

import os
from pathlib import Path

import pytest

from fsmount.extract import File
from fsmount.workers import Batch, start_workers


async def test_they_run_this_program_whatever_the_current_folder_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    planted = f"open({os.fspath(tmp_path / 'planted')!r}, 'x')\n"
    (theirs / "fsmount").mkdir(parents=True)
    ours.mkdir()
    for name in ("fsmount/__init__.py", "fsmount/extract.py", "runpy.py", "marshal.py", "struct.py"):
        (theirs / name).write_text(planted)
    monkeypatch.chdir(theirs)
    chunk = os.memfd_create("chunk")
    os.write(chunk, b"text")
    root = os.open(ours, os.O_RDONLY | os.O_DIRECTORY)
    try:
        async with start_workers(root) as workers:
            file = File(b"", b"file", 0o644, os.geteuid(), os.getegid(), 4, 0, ((0, 0, 4),), ())
            await workers.batches.send(Batch(chunk, [file]))
    finally:
        os.close(root)
    assert (ours / "file").read_bytes() == b"text"
    assert not (tmp_path / "planted").exists()


async def test_a_chunk_that_was_changed_while_it_was_copied_is_a_failure(tmp_path: Path) -> None:
    chunk = os.memfd_create("chunk")
    os.write(chunk, b"text")
    status = os.fstat(chunk)
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    file = File(b"", b"file", 0o644, os.geteuid(), os.getegid(), 4, 0, ((0, 0, 4),), ())
    checked = status.st_size, status.st_mtime_ns
    try:
        async with start_workers(root) as workers:
            await workers.batches.send(Batch(os.dup(chunk), [file], checked=checked))
        with pytest.raises(OSError, match="was changed while it was copied"):
            async with start_workers(root) as workers:
                later = file._replace(name=b"later")
                await workers.batches.send(
                    Batch(chunk, [later], checked=(status.st_size, status.st_mtime_ns - 1))
                )
    finally:
        os.close(root)
