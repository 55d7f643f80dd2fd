"""Names are given on a disk that others have filled, as long as something on it can go."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fsmount.configfile import load_config
from fsmount.engine import open_engine
from fsmount.errors import NoSpace
from tests import peers
from tests.fakes.tar import Member, archive

_MIB = 1 << 20
#: As many as do not fit into what the file has to spare.
_TAGS = [f"v1.0.{number}-{'x' * 100}" for number in range(500)]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 16 MiB."""
    path = tmp_path / "cache"
    path.mkdir(mode=0o700)
    peers.run("mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "tmpfs", path)
    try:
        yield path
    finally:
        peers.run("umount", "-l", path)


@pytest.mark.parametrize("chunks", [4, 0])
async def test_tags_are_listed_on_a_disk_that_others_have_filled_if_chunks_can_go(
    tmp_path: Path, cache: Path, chunks: int
) -> None:
    peers.tar_layer_image(tmp_path / "layout", "v1", [peers.pack(archive(Member(b"file", b"content")))])
    config = tmp_path / "config.toml"
    config.write_text(
        f'[cache]\npath = "{cache}"\nmin_free = 0\n[apps.web]\nrepository = "oci-layout:{tmp_path}/layout"\n'
    )
    async with open_engine(load_config(config, environ={})) as engine:
        (app,) = engine.catalog.apps.values()
        for number in range(chunks):
            data = os.urandom(_MIB)
            assert engine.layers.chunks.put(f"a/{number}", data, hashlib.sha256(data).digest())
        _fill(cache / "of others")
        if chunks:
            views = await engine.catalog.views(app, _TAGS)
            assert len({view.number for view in views}) == len(_TAGS)
            assert engine.layers.chunks.evicted > 0
        else:
            with pytest.raises(NoSpace):
                await engine.catalog.views(app, _TAGS)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
