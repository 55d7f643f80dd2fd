"""Times inflating a gzip layer: as a stream, with restart points being noted, and span by span.

`python -m scripts.bench.spans [ROUNDS]` makes 240 MB of prose and machine code, packs it with gzip -6, and takes turns
with the contenders; it prints the median MB of output a CPU second of each, and what it costs of isal's time.
"""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median

from isal import igzip_lib

from fsmount.archive import zstream
from fsmount.archive.codecs import PIECE_SIZE, Compression, Decoder, decoder
from fsmount.archive.inflate import inflate_span
from fsmount.archive.restarts import RestartDecoder, chunk_spans
from fsmount.archive.span import Codec, Restart
from scripts.bench.corpus import binary_pool, text_pool

SIZE = 240_000_000
CHUNK_SIZE = 4 * 1024 * 1024
#: What the blob is fed in: what one read of a socket brings.
_BLOCK = 256 * 1024


def main(rounds: int = 5) -> None:
    library = zstream.library()
    assert library is not None, "neither zlib-ng nor libz can be called here"
    plain = b"".join(_mix())
    blob = subprocess.run(["gzip", "-6n"], input=plain, capture_output=True, check=True).stdout
    noted = RestartDecoder(spacing=CHUNK_SIZE)
    _stream(noted, blob)
    contenders: dict[str, Callable[[], int]] = {
        "isal, raw deflate as a stream": lambda: _isal(blob, noted.restarts[0].offset),
        "the gzip decoder": lambda: _stream(decoder(Compression.GZIP, max_output=SIZE), blob),
        f"RestartDecoder, by {library.name}": lambda: _stream(RestartDecoder(spacing=CHUNK_SIZE), blob),
        "inflate_span, spans of 4 MiB": lambda: _spans(noted.restarts, blob, len(plain)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.process_time()
            size = run()
            seconds[name].append(time.process_time() - began)
            assert size == len(plain), name
    least = median(seconds["isal, raw deflate as a stream"])
    print(f"{len(blob) / 1e6:.0f} MB inflate to {len(plain) / 1e6:.0f} MB; median of {rounds}")
    for name, samples in seconds.items():
        spent = median(samples)
        print(f"{name:32} {len(plain) / spent / 1e6:5.0f} MB/s  {spent / least:4.2f} of isal's CPU time")


def _mix() -> Iterator[bytes]:
    """Pieces of both kinds in random order; gzip's window is too small to see that they come again."""
    rng = random.Random(7)
    left = SIZE
    while left:
        pool = rng.choice((text_pool, binary_pool))()
        at = rng.randrange(len(pool) - 1_000_000)
        piece = pool[at : at + min(left, rng.randrange(1000, 1_000_000))]
        left -= len(piece)
        yield piece


def _blocks(blob: bytes, start: int = 0) -> Iterator[bytes]:
    for at in range(start, len(blob), _BLOCK):
        yield blob[at : at + _BLOCK]


def _isal(blob: bytes, start: int) -> int:
    inflater = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE)
    size = 0
    for block in _blocks(blob, start):
        size += len(inflater.decompress(block, PIECE_SIZE))
        while not inflater.needs_input and not inflater.eof:
            size += len(inflater.decompress(b"", PIECE_SIZE))
    return size


def _stream(one: Decoder, blob: bytes) -> int:
    size = sum(len(piece) for block in _blocks(blob) for piece in one.feed(block))
    one.finish()
    return size


def _spans(restarts: list[Restart], blob: bytes, size: int) -> int:
    """Chunks that are cut at the restart points, as in an index that a pass has made."""
    outs = [*(restart.out for restart in restarts), size]
    chunks = [(start, stop - start, None) for start, stop in pairwise(outs)]
    spans = chunk_spans(restarts, chunks, len(blob))
    return sum(
        len(inflate_span(Codec.RESTART, span, blob[span.offset : span.offset + span.length]))
        for span in spans
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
