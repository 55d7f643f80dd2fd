"""App: one repository that is shown as a folder of tags, and what the names in that folder may be like."""

from collections.abc import Callable
from dataclasses import dataclass

from fsmount.errors import FsmountError, NotFound
from fsmount.oci.digest import Digest
from fsmount.oci.platform import Platform
from fsmount.oci.reference import is_tag
from fsmount.policy import Complete, Indexes
from fsmount.registry.source import Source


@dataclass(frozen=True, slots=True)
class App:
    """One repository shown as one folder of tags. `subtree` is the path that each tag's tree starts from."""

    name: str
    source: Source
    subtree: tuple[bytes, ...]
    platform: Platform
    #: Whether a tag is listed; others still open by name.
    listed: Callable[[str], bool]
    refresh_seconds: float
    indexes: Indexes = Indexes.ANY
    complete: Complete = Complete.IDLE
    publish_indexes: bool = False

    @property
    def origin(self) -> str:
        """What, if changed, makes the same name another view."""
        subtree = b"/".join(self.subtree).decode("utf-8", "backslashreplace")
        return f"{self.source.name} {self.platform} /{subtree}"


def parse_name(name: str) -> tuple[str | None, Digest | None]:
    """`tag`, `tag@digest` or `digest`. Raises: NotFound: nothing of another form exists."""
    tag, at, digest = name.rpartition("@")
    try:
        if at or name.startswith(("sha256:", "sha512:")):
            if at and not is_tag(tag):
                raise NotFound(f"{name!r} is no tag")
            return tag or None, Digest.parse(digest if at else name)
    except FsmountError:
        raise NotFound(f"{name!r} is no tag and no digest") from None
    if not is_tag(name):
        raise NotFound(f"{name!r} is no tag")
    return name, None
