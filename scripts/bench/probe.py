"""Times one kind of access from a process of its own, so that a mount that hangs cannot hang the bench.

`probe stat ROOT` takes relative paths, a line each, on standard input; it stats all once unmeasured, then
three times. `probe first PATH` reads one byte, `probe read PATH` reads to the end. Each prints seconds.
`probe start ROOT` takes a size, a blank and a relative path a line, and reads so much of each file, one after the
other, as a program does that starts; it prints the sha256 of the sha256 of what it read of each, too.
"""

import hashlib
import os
import sys
import time

PIECE = 1 << 20


def main(kind: str, path: str) -> None:
    """Do what the first argument names, and print how many seconds it took."""
    if kind == "stat":
        paths = [os.path.join(path, line.rstrip("\n")) for line in sys.stdin]
        stat_all(paths)
        began = time.perf_counter()
        for _ in range(3):
            stat_all(paths)
        print((time.perf_counter() - began) / 3)
        return
    if kind == "start":
        lines = [line.rstrip("\n").partition(" ") for line in sys.stdin]
        start([(os.path.join(path, name), int(size)) for size, _, name in lines])
        return
    began = time.perf_counter()
    fd = os.open(path, os.O_RDONLY)
    if kind == "first":
        os.read(fd, 1)
    else:
        buffer = bytearray(PIECE)
        while os.readv(fd, [buffer]):
            pass
    print(time.perf_counter() - began)


def stat_all(paths: list[str]) -> None:
    for path in paths:
        os.lstat(path)


def start(wanted: list[tuple[str, int]]) -> None:
    began = time.perf_counter()
    seen = hashlib.sha256()
    for path, size in wanted:
        fd = os.open(path, os.O_RDONLY)
        one = hashlib.sha256()
        while size and (data := os.read(fd, min(size, PIECE))):
            one.update(data)
            size -= len(data)
        os.close(fd)
        seen.update(one.digest())
    print(time.perf_counter() - began, seen.hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
