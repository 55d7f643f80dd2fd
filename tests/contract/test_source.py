"""What every Source promises, whatever it is (registry/source.py)."""

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
import trio

from fsmount.errors import Corrupt, NotFound
from fsmount.oci.digest import Digest
from fsmount.oci.manifest import Descriptor, Index, Manifest, parse_config, parse_manifest
from fsmount.oci.platform import Platform
from fsmount.oci.reference import Reference, parse_source
from fsmount.oci.selection import select
from fsmount.registry.credentials import Credentials
from fsmount.registry.open import Sources
from fsmount.registry.retry import Retry
from fsmount.registry.source import Source, is_housekeeping
from tests.contract.conftest import SIGNATURE_TAG, Address
from tests.fakes.registry import Network, served

pytestmark = pytest.mark.integration

GONE = Digest.of(b"gone")


@pytest.fixture
async def source(address: Address, kind: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Source]:
    address.renew()
    if address.authority:
        monkeypatch.setenv("SSL_CERT_FILE", str(address.authority))
    reference = parse_source(address.text)
    transport = None
    async with AsyncExitStack() as stack:
        if address.fake and "socket" in kind:
            assert isinstance(reference, Reference)
            host = await stack.enter_async_context(served(address.fake))
            reference = replace(reference, domain=host)
        elif address.fake:
            transport = Network({address.fake.host: address.fake}).transport
        credentials = Credentials(environ={"REGISTRY_AUTH_FILE": str(address.config)})
        retry = Retry(first_pause_seconds=0.01)
        sources = Sources(credentials=credentials, transport=transport, retry=retry)
        await stack.enter_async_context(sources)
        yield sources.open(reference)


async def image(source: Source) -> Manifest:
    found = await source.resolve("v1")
    parsed = parse_manifest(*await source.manifest(found.digest))
    assert isinstance(parsed, Manifest)
    return parsed


async def largest_layer(source: Source) -> tuple[Descriptor, bytes]:
    """A descriptor, and the bytes, which are verified here and not by the source."""
    layer = max((await image(source)).layers, key=lambda layer: layer.size)
    async with source.blob(layer) as pieces:
        data = b"".join([piece async for piece in pieces])
    assert hashlib.sha256(data).hexdigest() == layer.digest.hex
    return layer, data


async def test_tags_are_sorted_and_housekeeping_is_among_them(source: Source) -> None:
    tags = await source.tags()
    assert tags == sorted(["v1", "many", SIGNATURE_TAG])
    assert [tag for tag in tags if is_housekeeping(tag)] == [SIGNATURE_TAG]


async def test_a_tag_stands_for_the_digest_and_size_of_its_manifest(source: Source) -> None:
    found = await source.resolve("v1")
    data, _ = await source.manifest(found.digest)
    assert found.digest == Digest.of(data)
    assert found.size == len(data)


async def test_a_digest_stands_for_itself(source: Source) -> None:
    found = await source.resolve("v1")
    again = await source.resolve(str(found.digest))
    assert (again.digest, again.size) == (found.digest, found.size)


async def test_a_tag_that_is_not_there_is_not_found(source: Source) -> None:
    with pytest.raises(NotFound, match="gone"):
        await source.resolve("gone")


async def test_a_digest_that_is_not_there_is_not_found(source: Source) -> None:
    with pytest.raises(NotFound, match=GONE.hex):
        await source.resolve(str(GONE))


async def test_a_manifest_that_is_not_there_is_not_found(source: Source) -> None:
    with pytest.raises(NotFound, match=GONE.hex):
        await source.manifest(GONE)


async def test_a_blob_that_is_not_there_is_not_found(source: Source) -> None:
    with pytest.raises(NotFound, match=GONE.hex):
        async with source.blob(Descriptor("x", GONE, 4, {})):
            raise AssertionError


async def test_the_default_is_not_found_where_there_is_neither_latest_nor_a_single_image(
    source: Source,
) -> None:
    with pytest.raises(NotFound):
        await source.resolve(None)


async def test_an_index_leads_to_the_image_of_a_platform(source: Source) -> None:
    found = await source.resolve("many")
    index = parse_manifest(*await source.manifest(found.digest))
    assert isinstance(index, Index)
    chosen = select(index, Platform.parse("linux/arm64"))
    assert isinstance(parse_manifest(*await source.manifest(chosen.digest)), Manifest)
    assert (await source.resolve(str(chosen.digest))).size == chosen.size


async def test_a_configuration_is_a_small_blob(source: Source) -> None:
    manifest = await image(source)
    data = await source.small_blob(manifest.config)
    assert len(parse_config(data).diff_ids) == len(manifest.layers)
    assert json.loads(data)["os"] == "linux"


@pytest.mark.parametrize("start", [0, 1, 65_536, 1_234_567, -1, None])
async def test_a_blob_is_read_from_any_offset_to_its_end(source: Source, start: int | None) -> None:
    layer, data = await largest_layer(source)
    offset = layer.size if start is None else start % layer.size
    async with source.blob(layer, start=offset) as pieces:
        assert b"".join([piece async for piece in pieces]) == data[offset:]


@pytest.mark.parametrize("difference", [-1, 1])
@pytest.mark.parametrize("start", [0, 10])
async def test_a_blob_of_another_length_than_described_is_corrupt(
    source: Source, start: int, difference: int
) -> None:
    layer = max((await image(source)).layers, key=lambda layer: layer.size)
    with pytest.raises(Corrupt, match=layer.digest.hex):
        async with source.blob(replace(layer, size=layer.size + difference), start=start) as pieces:
            async for _ in pieces:
                pass


async def test_a_blob_may_be_left_early_and_read_again(source: Source) -> None:
    layer, data = await largest_layer(source)
    for _ in range(3):
        async with source.blob(layer) as pieces:
            assert data.startswith(await anext(pieces))
    async with source.blob(layer, start=layer.size - 7) as pieces:
        assert b"".join([piece async for piece in pieces]) == data[-7:]


async def test_a_read_may_be_cancelled_anywhere_and_the_source_goes_on(source: Source) -> None:
    layer, data = await largest_layer(source)
    for checkpoints in range(0, 40, 3):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(largest_layer, source)
            for _ in range(checkpoints):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    assert await largest_layer(source) == (layer, data)


async def test_many_may_read_at_once(source: Source) -> None:
    layer, data = await largest_layer(source)
    results: list[bytes] = []

    async def read(start: int) -> None:
        async with source.blob(layer, start=start) as pieces:
            results.append(b"".join([piece async for piece in pieces]))

    starts = range(0, layer.size, layer.size // 20)
    async with trio.open_nursery() as nursery:
        for start in starts:
            nursery.start_soon(read, start)
    assert sorted(map(len, results)) == sorted(layer.size - start for start in starts)
    assert all(data.endswith(result) for result in results)
