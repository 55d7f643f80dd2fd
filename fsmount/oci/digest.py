"""Digest: the name of content by its hash, checked before it can name a file or a URL."""

import hashlib
import re
from dataclasses import dataclass
from typing import Self

from fsmount.errors import UsageError

# image-spec descriptor.md, "Digests"; anything else would let a registry choose a path (CVE-2024-3727).
_FORMS = {"sha256": re.compile("[a-f0-9]{64}"), "sha512": re.compile("[a-f0-9]{128}")}


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """`algorithm:hex`, of sha256 or sha512; lower-case, of the right length, safe in paths and URLs."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises: UsageError for any other form."""
        algorithm, _, encoded = text.partition(":")
        form = _FORMS.get(algorithm)
        if form is None or not form.fullmatch(encoded):
            raise UsageError(
                f"{text[:160]!r} is no digest",
                remedy="A digest is sha256: and 64 (or sha512: and 128) lower-case hexadecimal digits.",
            )
        return cls(algorithm, encoded)

    @classmethod
    def of(cls, data: bytes) -> Self:
        """The sha256 digest of data."""
        return cls("sha256", hashlib.sha256(data).hexdigest())

    def hasher(self) -> "hashlib._Hash":
        """A fresh hash object of this digest's algorithm; `hexdigest()` compares with `hex`."""
        return hashlib.new(self.algorithm)

    def matches(self, data: bytes) -> bool:
        """Whether data hashes to this digest."""
        return hashlib.new(self.algorithm, data).hexdigest() == self.hex

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"
