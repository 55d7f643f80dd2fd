"""Fuzzes one target in this process, guided by the branches of fsmount that an input reaches; ends with the process.

    python -m tests.fuzz.worker TARGET SEED CORPUS [libFuzzer's options]

Bytes are changed by libFuzzer, and then, for parsers that would see no more of it than a checksum that is wrong, made
right again; of JSON the values are changed as well.
"""

import json
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import atheris

with atheris.instrument_imports(include=["fsmount"], enable_loader_override=False):
    from tests.fuzz import targets

#: data, the most that it may become, and a seed.
_Mutator = Callable[[bytes, int, int], bytes]

_BLOCK = 512
_CHECKSUM = re.compile(rb"[ 0]*[0-7]+[ \0]*")
_VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        1.5,
        1e400,
        100,
        512,
        2**31,
        2**32 - 1,
        2**63 - 1,
        2**63,
        -(2**63),
        10**30,
    ),
    *("", "a", "..", "/", "a/../b", "./a", "\0", "\ud800", "é", "a/" * 3000, "2024-02-30T00:00:00Z", "YQ=="),
    *(
        "reg",
        "dir",
        "symlink",
        "hardlink",
        "char",
        "chunk",
        "zeros",
        "sha256:" + "0" * 64,
        ".prefetch.landmark",
    ),
    *([], {}, [[]], {"a": "YQ=="}),
]


def _summed(data: bytes, start: int) -> bytes:
    """A tar from `start` on, with the checksum of what looks like a header made right."""
    changed = bytearray(data)
    for at in range(start, len(data) - _BLOCK + 1, _BLOCK):
        if _CHECKSUM.fullmatch(data, at + 148, at + 156):
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + _BLOCK])
    return bytes(changed)


def _trailed(data: bytes, start: int) -> bytes:
    """A gzip member from `start` on, with its checksum and length made right, if it has a plain header and an end."""
    if data[start : start + 4] != b"\x1f\x8b\x08\0":
        return data
    inflate = zlib.decompressobj(-15)
    try:
        plain = inflate.decompress(data[start + 10 :], 1 << 20)
    except zlib.error:
        return data
    if not inflate.eof:
        return data
    at = len(data) - len(inflate.unused_data)
    return data[:at] + struct.pack("<II", zlib.crc32(plain), len(plain)) + data[at + 8 :]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every object and list in a JSON value, with each key in it."""
    pairs = list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in pairs:
        yield value, key
        yield from _places(inner)


def _changed_json(text: bytes, random: Random) -> bytes:
    """One value changed, dropped, or put in another's place. Raises: ValueError."""
    whole = json.loads(text.decode("utf-8", "surrogateescape"))
    places = list(_places(whole))
    if not places:
        return json.dumps(random.choice(_VALUES)).encode()
    inside, key = random.choice(places)
    what = random.randrange(6)
    if what == 0:
        del inside[key]
    elif what == 1:
        other, name = random.choice(places)
        if isinstance(inside, list):
            inside.insert(key, other[name])
        else:
            inside[key] = other[name]
    elif what == 2 and type(inside[key]) is int:
        inside[key] += random.choice([-512, -100, -1, 1, 2, 100, 512])
    else:
        inside[key] = random.choice(_VALUES)
    return json.dumps(whole).encode()  # which refuses what now is in itself


def _raw(data: bytes, most: int, seed: int) -> bytes:
    mutated: bytes = atheris.Mutate(data, most)
    return mutated


def _tar_after(start: int) -> _Mutator:
    def mutate(data: bytes, most: int, seed: int) -> bytes:
        mutated = _raw(data, most, seed)
        return _summed(mutated, start) if seed % 4 else mutated

    return mutate


def _json_after(start: int) -> _Mutator:
    def mutate(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        if random.randrange(3):
            try:
                mutated = data[:start] + _changed_json(data[start:], random)
            except (ValueError, RecursionError):
                pass
            else:
                if len(mutated) <= most:
                    return mutated
        return _raw(data, most, seed)

    return mutate


def _gzip_after(start: int) -> _Mutator:
    def mutate(data: bytes, most: int, seed: int) -> bytes:
        mutated = _raw(data, most, seed)
        return _trailed(mutated, start) if seed % 4 else mutated

    return mutate


def _by_first_byte(kinds: dict[bytes, _Mutator]) -> _Mutator:
    return lambda data, most, seed: kinds.get(data[:1], _raw)(data, most, seed)


_MUTATORS: dict[str, _Mutator] = {
    "toc": _json_after(4),
    "estargz": _by_first_byte({b"\1": _tar_after(1), b"\2": _json_after(1)}),
    "zstdchunked": _by_first_byte({b"\1": _json_after(1)}),
    "tar": _tar_after(1),
    "span": _gzip_after(8),
    "gzip": _gzip_after(2),
}


def main() -> None:
    target, seed, corpus, *options = sys.argv[1:]

    def run(data: bytes) -> None:
        targets.TARGETS[target](data)

    arguments = [sys.argv[0], f"-seed={seed}", *options, corpus]
    atheris.Setup(arguments, run, custom_mutator=_MUTATORS.get(target, _raw))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
