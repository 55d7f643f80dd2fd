"""Platform: the operating system and processor that an image is for, in the names the registries use."""

import platform as host
import re
import sys
from dataclasses import dataclass
from typing import Self

from fsmount.errors import UsageError

# containerd's platforms.Normalize: every name here is seen in the wild.
_SYSTEMS = {"macos": "darwin"}
_ARCHITECTURES = {
    "x86_64": ("amd64", None),
    "x86-64": ("amd64", None),
    "i386": ("386", None),
    "i486": ("386", None),
    "i586": ("386", None),
    "i686": ("386", None),
    "aarch64": ("arm64", None),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv5l": ("arm", "v5"),
    "armv6l": ("arm", "v6"),
    "armv7l": ("arm", "v7"),
    "armv8l": ("arm", "v8"),
    "loongarch64": ("loong64", None),
}
#: The variant that is meant where none is written; it is never spelled out in a normal Platform.
_DEFAULT_VARIANTS = {"amd64": "v1", "arm": "v7", "arm64": "v8"}
#: Where each level runs all those below it, the lowest there is.
_LOWEST_LEVELS = {"amd64": 1, "arm": 5, "arm64": 8}
_WORD = re.compile("[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system, an architecture and its variant, normalised: equal platforms are equal values."""

    os: str
    architecture: str
    variant: str | None = None

    @classmethod
    def normal(cls, os: str, architecture: str, variant: str | None = None) -> Self:
        """Aliases resolved: x86_64 is amd64; the variants that go without saying (arm v7, arm64 v8) go."""
        os, architecture, variant = os.lower(), architecture.lower(), (variant or "").lower()
        architecture, implied = _ARCHITECTURES.get(architecture, (architecture, None))
        if variant[:1].isdigit():
            variant = f"v{variant}"
        variant = variant or implied or ""
        if variant == _DEFAULT_VARIANTS.get(architecture):
            variant = ""
        return cls(_SYSTEMS.get(os, os), architecture, variant or None)

    @classmethod
    def parse(cls, text: str) -> Self:
        """`os/architecture[/variant]`. Raises: UsageError."""
        words = text.split("/")
        if len(words) not in (2, 3) or not all(_WORD.fullmatch(word) for word in words):
            raise UsageError(
                f"{text[:80]!r} is no platform",
                remedy="A platform is os/architecture[/variant], like linux/amd64 or linux/arm/v6.",
            )
        return cls.normal(*words)

    @classmethod
    def current(cls) -> Self:
        """That of this machine; amd64 without its level, so that any amd64 processor could take over."""
        return cls.normal(sys.platform, host.machine())

    def runs(self) -> "tuple[Platform, ...]":
        """The platforms whose images run on this one, best first: itself, then lower variants."""
        lowest = _LOWEST_LEVELS.get(self.architecture)
        level = (self.variant or _DEFAULT_VARIANTS.get(self.architecture, "")).removeprefix("v")
        if lowest is None or len(level) != 1 or not level.isdecimal():
            return (self,)
        variants = [f"v{number}" for number in range(int(level), lowest - 1, -1)]
        return tuple(Platform.normal(self.os, self.architecture, variant) for variant in variants)

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))
