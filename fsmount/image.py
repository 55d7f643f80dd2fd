"""Image: from a resolved descriptor to the layers of the one manifest that suits a platform."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime

import trio

from fsmount.cache.folder import CacheFolder
from fsmount.errors import Invalid, NotFound, Unsupported, UsageError
from fsmount.lazy import LayerSpec
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import (
    TITLE,
    UNPACK,
    Descriptor,
    ImageConfig,
    Manifest,
    parse_config,
    parse_manifest,
)
from fsmount.oci.platform import Platform
from fsmount.oci.selection import select
from fsmount.oci.soci import INDEX_DIGEST
from fsmount.registry.source import Source

log = logging.getLogger(__name__)

#: Indexes within indexes; one is usual, and a loop is impossible, but a chain may be made long.
_DEPTH = 4
#: More layers than this do not fit the inode numbers; Docker's limit is 127.
MOST_LAYERS = 511

_TAR = re.compile(r".*[.+]tar([.+](gzip|zstd))?")


@dataclass(frozen=True, slots=True)
class Image:
    """One manifest, its configuration if it is an image, and what its layers are. `digest` is the manifest's."""

    digest: Digest
    manifest: Manifest
    config: ImageConfig | None
    layers: tuple[LayerSpec, ...]

    @property
    def created(self) -> datetime | None:
        return self.config.created if self.config else None


async def open_image(source: Source, digest: Digest, platform: Platform, folder: CacheFolder) -> Image:
    """The image for platform that a manifest is, or an index leads to.

    Documents come from the cache folder if they are there, and are kept there: they are small, named by
    digest, and a known tag then opens without the network.

    Raises: NotFound (no such platform), Unsupported, Invalid, and what the source raises.
    """
    for _ in range(_DEPTH):
        data, media_type = await _document(source, digest, folder)
        with _named(f"{source.name}@{digest}"):
            parsed = parse_manifest(data, media_type)
            if isinstance(parsed, Manifest):
                break
            digest = select(parsed, platform).digest
    else:
        raise Invalid(f"index {digest} of {source.name} is more than {_DEPTH} indexes deep")
    document = await _config_document(source, parsed, folder)
    with _named(f"{source.name}@{digest}"):
        config = None if document is None else parse_config(document)
        return Image(digest, parsed, config, _layers(digest, parsed, config))


@contextmanager
def _named(image: str) -> Iterator[None]:
    """Says of which image something is wrong."""
    try:
        yield
    except (NotFound, Invalid, Unsupported) as error:
        raise type(error)(f"{image}: {error.message}", remedy=error.remedy) from error


async def _document(source: Source, digest: Digest, folder: CacheFolder) -> tuple[bytes, str | None]:
    kept = await trio.to_thread.run_sync(folder.load_manifest, digest)
    if kept is not None:
        return kept, None
    data, media_type = await source.manifest(digest)
    await trio.to_thread.run_sync(folder.save_manifest, digest, data)
    return data, media_type


async def _config_document(source: Source, manifest: Manifest, folder: CacheFolder) -> bytes | None:
    if not manifest.is_image:
        return None
    digest = manifest.config.digest
    data = await trio.to_thread.run_sync(folder.load_manifest, digest)
    if data is None:
        data = await source.small_blob(manifest.config)
        await trio.to_thread.run_sync(folder.save_manifest, digest, data)
    return data


def _layers(image: Digest, manifest: Manifest, config: ImageConfig | None) -> tuple[LayerSpec, ...]:
    if len(manifest.layers) > MOST_LAYERS:
        raise Unsupported(f"the image has {len(manifest.layers)} layers; at most {MOST_LAYERS} are read")
    diff_ids: tuple[Digest | None, ...] = (None,) * len(manifest.layers)
    if config is not None and config.diff_ids:
        if len(config.diff_ids) != len(manifest.layers):
            raise Invalid(
                f"the image has {len(manifest.layers)} layers, but its configuration {manifest.config.digest}"
                f" names {len(config.diff_ids)}"
            )
        diff_ids = config.diff_ids
    index = manifest.annotations.get(INDEX_DIGEST)
    try:
        soci_index = None if index is None else Digest.parse(index)
    except UsageError:
        log.warning("image %s names a SOCI index by what is no digest", image)
        soci_index = None
    specs = [_layer(layer) for layer in manifest.layers]
    return tuple(
        replace(
            spec,
            diff_id=diff_id if spec.title is None else None,
            image=image,
            soci_index=soci_index,
        )
        for spec, diff_id in zip(specs, diff_ids, strict=True)
    )


def _layer(descriptor: Descriptor) -> LayerSpec:
    descriptor.refuse_encrypted()
    title = descriptor.annotations.get(TITLE)
    if title is not None and descriptor.annotations.get(UNPACK) != "true":
        return LayerSpec(descriptor, title=_file_path(title))
    if title is None and not _TAR.fullmatch(descriptor.media_type):
        raise Unsupported(
            f"layer {descriptor.digest} is of type {descriptor.media_type[:200]!r}, which is no file tree",
            remedy="Mountable are tar layers, and files and folders as `oras push` makes them.",
        )
    return LayerSpec(descriptor)


def _file_path(title: str) -> bytes:
    """The path of a titled file, cleaned. Raises: Invalid."""
    parts = [part for part in title.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "\0" in title or any(len(part.encode()) > 255 for part in parts):
        raise Invalid(f"the artifact's file name {title[:200]!r} is no path within it")
    return "/".join(parts).encode()
