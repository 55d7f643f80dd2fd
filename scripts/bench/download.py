"""Downloads one blob to nowhere, and says how long that took and how long the event loop stood still.

`download fsmount HOST REPOSITORY DIGEST SIZE` goes through fsmount's source, `download httpx …` through a plain httpx
client that streams. Each prints seconds and, in seconds, the longest that another task waited beyond its time.
"""

import sys
import time
from collections.abc import Awaitable, Callable

import httpx
import trio

from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor
from fsmount.oci.reference import Reference
from fsmount.registry.open import Sources

_TICK_SECONDS = 0.001


async def by_fsmount(host: str, repository: str, digest: str, size: int) -> int:
    descriptor = Descriptor(media_type="", digest=Digest.parse(digest), size=size, annotations={})
    async with Sources() as sources:
        source = sources.open(Reference(host, repository))
        async with source.blob(descriptor) as pieces:
            return sum([len(piece) async for piece in pieces])


async def by_httpx(host: str, repository: str, digest: str, size: int) -> int:
    url = f"http://{host}/v2/{repository}/blobs/{digest}"
    async with httpx.AsyncClient() as client, client.stream("GET", url) as response:
        return sum([len(piece) async for piece in response.aiter_raw()])


async def _watch(lags: list[float]) -> None:
    while True:
        due = time.perf_counter() + _TICK_SECONDS
        await trio.sleep(_TICK_SECONDS)
        lags.append(time.perf_counter() - due)


async def measured(download: Callable[[], Awaitable[int]], size: int) -> None:
    """Prints the two figures. Raises: RuntimeError if other than size bytes came."""
    lags = [0.0]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch, lags)
        began = time.perf_counter()
        received = await download()
        seconds = time.perf_counter() - began
        nursery.cancel_scope.cancel()
    if received != size:
        raise RuntimeError(f"{received} of {size} bytes came")
    print(seconds, max(lags))


def main(way: str, host: str, repository: str, digest: str, size: str) -> None:
    """Download in one of the two ways."""
    download = {"fsmount": by_fsmount, "httpx": by_httpx}[way]
    trio.run(measured, lambda: download(host, repository, digest, int(size)), int(size))


if __name__ == "__main__":
    main(*sys.argv[1:])
