"""The binary form of FlatBuffers, read from bytes that strangers wrote (flatbuffers.dev, "FlatBuffers Binary Format").

The package of that name writes it for us; its reader checks no bounds.

    table  ──i32 back to──▶ vtable: u16 its size, u16 the table's, then where in the table each field is, or 0
      └─ field: a number, or a u32 onward to a table, a vector (u32 count, members) or a string (u32 length, bytes)
"""

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from fsmount.archive.header import Malformed

#: A writer may let tables share what they have in common, such as a string. So more can be read than is there, but
#: not twice as much; who makes all of a million references lead to the same megabyte is refused.
_MOST_READ = 2
#: Vtables are shared by all tables that lack the same fields: in a ztoc there are some dozens.
_MOST_VTABLES = 1000

_U32 = struct.Struct("<I")
_I32 = struct.Struct("<i")
_TWO_U16 = struct.Struct("<HH")


class Form:
    """One kind of table: how each of its fields is written, by struct's letters, or R for a reference."""

    def __init__(self, kinds: str, *, byte: int = 0) -> None:
        """byte: what a field `b` is when it is absent; all others are 0 then."""
        self.formats = kinds.replace("R", "I")
        self.references = [slot for slot, kind in enumerate(kinds) if kind == "R"]
        self.defaults = tuple(byte if kind == "b" else 0 for kind in kinds)


class _Layout(NamedTuple):
    """What a vtable says: how to take all fields of a table at once."""

    size: int
    unpack: Callable[[Any, int], tuple[int, ...]]
    #: Of each slot, where its value is in what was unpacked and the defaults after it.
    picks: list[int]
    #: Slots of references that are there, and their places in the table.
    references: list[tuple[int, int]]


class Flatbuffer:
    """Tables, vectors and strings by their offsets in `data`. What leads outside raises Malformed.

    A reference that is absent is the offset 0, where the reference to the root is and nothing else can be.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._unread = _MOST_READ * len(data)
        self._layouts: dict[tuple[int, Form], _Layout] = {}

    def root(self) -> int:
        """Where the first table is."""
        return self._number(0)

    def table(self, at: int, form: Form) -> list[int]:
        """The fields of a table, in order of their slots; references as the offset of what they refer to."""
        data = self._data
        if not 0 < at <= len(data) - 4:
            raise Malformed(f"expected a table at {at}, and there are {len(data)} bytes")
        vtable = at - _I32.unpack_from(data, at)[0]
        layout = self._layouts.get((vtable, form))
        if layout is None:
            layout = self._layouts[vtable, form] = self._layout(vtable, form)
        self._take(at, layout.size)
        found = layout.unpack(data, at) + form.defaults
        values = [found[pick] for pick in layout.picks]
        for slot, place in layout.references:
            values[slot] += at + place
        return values

    def text(self, at: int, most: int = 1 << 32) -> bytes:
        """The bytes of a string, or of a vector of bytes: so many at most."""
        size = self._number(at) if at else 0
        if size > most:
            raise Malformed(f"expected a string of at most {most} bytes, not {size}")
        self._take(at + 4, size)
        return self._data[at + 4 : at + 4 + size]

    def references(self, at: int) -> list[int]:
        """A vector of references, as the offsets of what they refer to."""
        count = self._number(at) if at else 0
        if not count:
            return []
        at += 4
        self._take(at, 4 * count)
        found = struct.unpack_from(f"<{count}I", self._data, at)
        return [
            place + reference for place, reference in zip(range(at, at + 4 * count, 4), found, strict=True)
        ]

    def _number(self, at: int) -> int:
        if at > len(self._data) - 4:
            raise Malformed(f"expected 4 bytes at {at}, and there are {len(self._data)}")
        number: int = _U32.unpack_from(self._data, at)[0]
        return number

    def _take(self, at: int, size: int) -> None:
        if size > len(self._data) - at:
            raise Malformed(f"expected {size} bytes at {at}, and there are {len(self._data)}")
        # What costs no bytes costs time: the reference to it counts.
        self._unread -= size + 4
        if self._unread < 0:
            raise Malformed(f"expected {len(self._data)} bytes not to be read again and again")

    def _layout(self, vtable: int, form: Form) -> _Layout:
        data = self._data
        if len(self._layouts) >= _MOST_VTABLES:
            raise Malformed(f"expected at most {_MOST_VTABLES} vtables")
        if not 0 <= vtable <= len(data) - 4:
            raise Malformed(f"expected a vtable at {vtable}, and there are {len(data)} bytes")
        vtable_size, table_size = _TWO_U16.unpack_from(data, vtable)
        if not 4 <= vtable_size <= len(data) - vtable:
            raise Malformed(f"expected a vtable at {vtable}, not {vtable_size} bytes of {len(data)}")
        # Slots that are not ours are those of a later version.
        count = min((vtable_size - 4) // 2, len(form.formats))
        places = struct.unpack_from(f"<{count}H", data, vtable + 4)
        present = sorted((place, slot) for slot, place in enumerate(places) if place)
        picks = [len(present) + slot for slot in range(len(form.formats))]
        text, stop = "<", 0
        for number, (place, slot) in enumerate(present):
            if place < max(stop, 4):
                raise Malformed(f"expected a vtable at {vtable} whose fields do not overlap")
            text += f"{place - stop}x{form.formats[slot]}"
            stop = place + struct.calcsize("<" + form.formats[slot])
            picks[slot] = number
        if stop > table_size:
            raise Malformed(
                f"expected a vtable at {vtable} whose fields are in the table's {table_size} bytes"
            )
        references = [(slot, places[slot]) for slot in form.references if slot < count and places[slot]]
        return _Layout(max(stop, 4), struct.Struct(text).unpack_from, picks, references)
