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
