"""JSON that strangers wrote, read so that every wrong shape is named by its place (`manifests[2].size`)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from fsmount.errors import Invalid, UsageError
from fsmount.oci.digest import Digest

_MAX_SIZE = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Shape:
    """A value inside a JSON document, and the path that led to it. Every method raises: Invalid."""

    value: Any
    where: str

    @classmethod
    def parse(cls, data: bytes, what: str) -> Self:
        """The root of a document that must be a JSON object; what names it in messages."""
        try:
            value = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise Invalid(f"{what} is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise Invalid(f"{what} is not a JSON object")
        return cls(value, what)

    def __contains__(self, key: str) -> bool:
        """Whether key is there and not null: Go's encoders write null for absent lists and objects."""
        return self.value.get(key) is not None

    def get(self, key: str) -> "Shape | None":
        return Shape(self.value[key], self._place(key)) if key in self else None

    def __getitem__(self, key: str) -> "Shape":
        if key not in self:
            raise Invalid(f"{self.where} has no {key!r}")
        return Shape(self.value[key], self._place(key))

    def object(self) -> "Shape":
        return self._expect(dict, "an object")

    def items(self) -> "Iterator[Shape]":
        """The members of a list of objects."""
        for number, item in enumerate(self._expect(list, "a list").value):
            yield Shape(item, f"{self.where}[{number}]").object()

    def strings(self) -> "Iterator[Shape]":
        """The members of a list of strings."""
        for number, item in enumerate(self._expect(list, "a list").value):
            yield Shape(item, f"{self.where}[{number}]")._expect(str, "a string")

    def string_map(self) -> dict[str, str]:
        entries: dict[str, str] = self.object().value
        for key, value in entries.items():
            Shape(value, f"{self.where}[{key[:80]!a}]").string()
        return entries

    def string(self) -> str:
        text: str = self._expect(str, "a string").value
        return text

    def boolean(self) -> bool:
        truth: bool = self._expect(bool, "a boolean").value
        return truth

    def size(self) -> int:
        """A count of bytes: an integer from 0 to 2⁶³-1."""
        number = self.value
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= _MAX_SIZE:
            raise Invalid(f"{self.where} is not a size in bytes: {_shown(number)}")
        return number

    def digest(self) -> Digest:
        try:
            return Digest.parse(self.string())
        except UsageError as error:
            raise Invalid(f"{self.where}: {error.message}") from error

    def time(self) -> datetime:
        """An RFC 3339 time, with its offset; digits beyond microseconds are cut."""
        text = self.string()
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            time = None
        if time is None or time.tzinfo is None:
            raise Invalid(f"{self.where} is not an RFC 3339 time: {_shown(text)}")
        return time

    def _place(self, key: str) -> str:
        return f"{self.where}: {key}" if ": " not in self.where else f"{self.where}.{key}"

    def _expect(self, kind: type, called: str) -> "Shape":
        if not isinstance(self.value, kind):
            raise Invalid(f"{self.where} is not {called}: {_shown(self.value)}")
        return self


def _shown(value: object) -> str:
    """A value as a message may show it: short, and nothing but printable ASCII."""
    simple = value is None or isinstance(value, str | int | float)
    return ascii(value)[:80] if simple else type(value).__name__
