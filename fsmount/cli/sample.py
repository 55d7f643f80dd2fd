"""sample: a small application in two versions, as an OCI image layout, for the demonstration."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

_TIME = 1735689600  # 2025-01-01, so that the sample is the same wherever it is made

_APP = '''#!/usr/bin/env python3
"""Greets, with what a large library layer knows."""
import pathlib, sys
here = pathlib.Path(__file__).resolve().parent
words = (here.parent / "lib" / "words" / "0007.txt").read_text().split()
print(f"hello from version {(here / 'VERSION').read_text().strip()}, with {len(words)} words")
sys.exit(0 if len(words) == 5000 else 1)
'''


def make_sample(layout: Path) -> None:
    """Writes an image layout with the tags v1 and v2.

    Both have the same large layer, the libraries, that rarely changes, and a small one of their own, the
    application, as a build with one COPY for each would have.
    """
    (layout / "blobs" / "sha256").mkdir(parents=True)
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    words = {f"lib/words/{number:04}.txt": _words(number) for number in range(400)}
    library = _layer(layout, words)
    manifests = []
    for version in ("v1", "v2"):
        files = {
            "bin/hello": _APP,
            "bin/VERSION": version + "\n",
            "etc/hello.conf": f"greeting = {version}\n",
        }
        if version == "v2":
            files["bin/NEWS"] = "v2 has news.\n"
        manifests.append(_image(layout, version, [library, _layer(layout, files)]))
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": manifests,
    }
    (layout / "index.json").write_text(json.dumps(index))


def _words(number: int) -> str:
    return "\n".join(f"word-{number * 5000 + count:x}" for count in range(5000)) + "\n"


def _layer(layout: Path, files: Mapping[str, str]) -> tuple[dict[str, object], str]:
    """The descriptor of a new layer, and its diff ID."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for folder in sorted(
            {"/".join(name.split("/")[:depth]) for name in files for depth in (1, 2)} - set(files)
        ):
            _add(archive, folder, None)
        for name, text in files.items():
            _add(archive, name, text.encode())
    blob = gzip.compress(tar.getvalue(), mtime=0)
    diff_id = f"sha256:{hashlib.sha256(tar.getvalue()).hexdigest()}"
    return _blob(layout, blob, "application/vnd.oci.image.layer.v1.tar+gzip"), diff_id


def _add(archive: tarfile.TarFile, name: str, content: bytes | None) -> None:
    member = tarfile.TarInfo(name)
    member.mtime = _TIME
    member.mode = 0o755 if content is None or name.startswith("bin/hello") else 0o644
    member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
    member.size = len(content or b"")
    archive.addfile(member, io.BytesIO(content or b""))


def _image(layout: Path, tag: str, layers: list[tuple[dict[str, object], str]]) -> dict[str, object]:
    config = {
        "created": "2025-01-01T00:00:00Z",
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _blob(layout, json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [descriptor for descriptor, _ in layers],
    }
    descriptor = _blob(layout, json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    return descriptor | {"annotations": {"org.opencontainers.image.ref.name": tag}}


def _blob(layout: Path, data: bytes, media_type: str) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
