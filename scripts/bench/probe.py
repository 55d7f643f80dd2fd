"""Times one kind of access from a process of its own, so that a mount that hangs cannot hang the bench.

`probe stat ROOT` takes relative paths, a line each, on standard input; it stats all once unmeasured, then
three times. `probe first PATH` reads one byte, `probe read PATH` reads to the end. Each prints seconds.
"""

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


if __name__ == "__main__":
    main(*sys.argv[1:])
