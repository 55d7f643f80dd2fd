"""Which manifest of an index is the image for a platform."""

from fsmount.errors import NotFound
from fsmount.oci.manifest import REFERENCE_TYPE, Descriptor, Index
from fsmount.oci.platform import Platform


def select(index: Index, platform: Platform) -> Descriptor:
    """The best entry for platform; where several are equally good, the first.

    It may itself be an index (`Descriptor.is_index`): fetch that and select again.

    Raises: NotFound, naming the platforms there are.
    """
    found = candidates(index, platform)
    if not found:
        images = filter(_is_image, index.manifests)
        there = sorted({str(entry.platform) for entry in images})
        raise NotFound(
            f"there is no image for {platform}",
            remedy=f"There are images for: {', '.join(there)}."
            if there
            else "The index lists no images at all.",
        )
    return found[0]


def candidates(index: Index, platform: Platform) -> list[Descriptor]:
    """All entries that can serve platform, best first; entries that name no platform come last.

    Artifacts, attestations and `unknown/unknown` are no images, and never candidates.
    """
    images = [entry for entry in index.manifests if _is_image(entry)]
    found = [entry for runnable in platform.runs() for entry in images if entry.platform == runnable]
    return found + [entry for entry in images if entry.platform is None]


def _is_image(entry: Descriptor) -> bool:
    return (
        entry.artifact_type is None
        and entry.annotations.get(REFERENCE_TYPE) != "attestation-manifest"
        and (entry.platform is None or "unknown" not in (entry.platform.os, entry.platform.architecture))
    )
