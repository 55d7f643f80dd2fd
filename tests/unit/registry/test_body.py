"""Blobs, ranges, and bodies that break off."""

from dataclasses import replace

import httpx
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from fsmount.errors import Corrupt, FsmountError, NotFound, Unreachable
from fsmount.oci.manifest import Descriptor
from fsmount.oci.reference import Reference
from fsmount.registry.endpoint import Tls
from fsmount.registry.open import Sources
from tests.fakes.registry import (
    FakeRegistry,
    Network,
    Reply,
    Step,
    cut,
    descriptor_of,
    error,
    served,
    stall,
    unchanged,
)

DATA = bytes(range(256)) * 40


class Blob:
    """One blob in a fake registry, and a way to read it."""

    def __init__(self, data: bytes = DATA) -> None:
        self.fake = FakeRegistry()
        self.fake.put_blob(data)
        self.descriptor = descriptor_of(data)
        self.network = Network({self.fake.host: self.fake})

    def then(self, *steps: Step) -> None:
        self.fake.then("GET", "/blobs/", *steps)

    async def read(self, start: int = 0, descriptor: Descriptor | None = None) -> bytes:
        async with Sources(transport=self.network.transport) as sources:
            source = sources.open(Reference(self.fake.host, "team/web"))
            async with source.blob(descriptor or self.descriptor, start=start) as pieces:
                data = b"".join([piece async for piece in pieces])
        assert self.network.open_bodies == 0
        return data

    async def fails(
        self, kind: type[FsmountError], start: int = 0, descriptor: Descriptor | None = None
    ) -> str:
        with pytest.raises(kind) as caught:
            await self.read(start, descriptor)
        assert type(caught.value) is kind
        assert self.network.open_bodies == 0
        return str(caught.value)

    @property
    def ranges(self) -> list[str | None]:
        return [request.headers.get("range") for request in self.fake.requests]


@pytest.fixture
def blob() -> Blob:
    return Blob()


async def test_a_whole_blob_is_asked_for_without_a_range(blob: Blob) -> None:
    assert await blob.read() == DATA
    assert blob.ranges == [None]


async def test_the_rest_of_a_blob_is_asked_for_as_one_range_within_it(blob: Blob) -> None:
    assert await blob.read(start=100) == DATA[100:]
    assert blob.ranges == [f"bytes=100-{len(DATA) - 1}"]


async def test_nothing_is_asked_for_where_nothing_is_left() -> None:
    blob = Blob(b"")
    assert await blob.read() == b""
    blob = Blob()
    assert await blob.read(start=len(DATA)) == b""
    assert blob.ranges == []


async def test_an_offset_outside_the_blob_is_a_mistake_of_the_caller(blob: Blob) -> None:
    with pytest.raises(ValueError, match="no part of"):
        await blob.read(start=len(DATA) + 1)


async def test_a_body_that_breaks_off_is_resumed_at_the_last_good_byte(
    blob: Blob, autojump_clock: MockClock
) -> None:
    blob.then(cut(1500), cut(2500), unchanged)
    assert await blob.read() == DATA
    end = len(DATA) - 1
    assert blob.ranges == [None, f"bytes=1500-{end}", f"bytes=4000-{end}"]


async def test_a_body_may_break_off_any_number_of_times_if_each_try_brings_something(
    blob: Blob, autojump_clock: MockClock
) -> None:
    blob.then(*[cut(1)] * 20)
    assert await blob.read() == DATA


async def test_tries_that_bring_nothing_come_to_an_end(blob: Blob, autojump_clock: MockClock) -> None:
    blob.then(cut(1000), *[cut(0)] * 50)
    await blob.fails(Unreachable)
    assert len(blob.ranges) == 3


async def test_a_body_that_falls_silent_is_resumed(blob: Blob, autojump_clock: MockClock) -> None:
    blob.then(stall(1000))
    assert await blob.read() == DATA


async def test_a_body_without_a_length_that_ends_early_is_resumed(
    blob: Blob, autojump_clock: MockClock
) -> None:
    blob.then(lambda reply: replace(reply, body=reply.body[:700], length=None))
    assert await blob.read() == DATA


@pytest.mark.parametrize("start", [0, 100])
async def test_where_ranges_are_ignored_what_is_known_is_skipped(
    blob: Blob, autojump_clock: MockClock, start: int
) -> None:
    blob.then(cut(1500), *[Reply(body=DATA)] * 3)
    assert await blob.read(start=start) == DATA[start:]


async def test_a_registry_that_refuses_ranges_is_asked_for_the_whole(blob: Blob) -> None:
    blob.then(error(400, "UNSUPPORTED"))
    assert await blob.read(start=100) == DATA[100:]
    assert blob.ranges[1] is None


async def test_a_range_may_come_in_parts(blob: Blob) -> None:
    part = Reply(206, {"Content-Range": f"bytes 100-199/{len(DATA)}"}, DATA[100:200])
    blob.then(part)
    assert await blob.read(start=100) == DATA[100:]
    assert blob.ranges[1] == f"bytes=200-{len(DATA) - 1}"


@pytest.mark.parametrize(
    "content_range",
    [
        f"bytes 0-99/{len(DATA)}",
        f"bytes 101-199/{len(DATA)}",
        "bytes 100-199/200",
        f"bytes 100-{len(DATA)}/{len(DATA)}",
        f"bytes 100-99/{len(DATA)}",
        f"bytes 100-198/{len(DATA)}",
        "bytes */200",
        "100-199",
        "",
    ],
)
async def test_another_range_than_asked_for_is_not_believed(blob: Blob, content_range: str) -> None:
    blob.then(Reply(206, {"Content-Range": content_range}, DATA[100:200]))
    await blob.fails(Corrupt, start=100)


async def test_a_range_of_unknown_total_is_believed(blob: Blob) -> None:
    blob.then(Reply(206, {"Content-Range": f"bytes 100-{len(DATA) - 1}/*"}, DATA[100:]))
    assert await blob.read(start=100) == DATA[100:]


@pytest.mark.parametrize("difference", [-1, 1])
@pytest.mark.parametrize("start", [0, 100])
async def test_a_blob_of_another_length_than_described_is_corrupt(
    blob: Blob, autojump_clock: MockClock, difference: int, start: int
) -> None:
    descriptor = replace(blob.descriptor, size=len(DATA) + difference)
    assert str(descriptor.digest) in await blob.fails(Corrupt, start, descriptor)


@pytest.mark.parametrize("difference", [-1, 1])
async def test_a_length_that_only_the_body_shows_counts_as_well(
    blob: Blob, autojump_clock: MockClock, difference: int
) -> None:
    blob.then(*[lambda reply: replace(reply, length=None)] * 9)
    await blob.fails(Corrupt, descriptor=replace(blob.descriptor, size=len(DATA) + difference))


async def test_a_range_beyond_the_end_means_that_the_blob_is_too_short(blob: Blob) -> None:
    # docker-registry 2.8 announces the length of the blob for this body, and never sends it.
    blob.then(Reply(416, {}, b"x" * 33, length=len(DATA), stall_after=10))
    await blob.fails(Corrupt, start=100)


async def test_a_compressed_transfer_is_refused(blob: Blob) -> None:
    blob.then(lambda reply: reply.with_headers(Content_Encoding="gzip"))
    assert "compressed" in await blob.fails(Corrupt)


async def test_a_missing_blob_is_not_found_on_opening(blob: Blob) -> None:
    blob.fake.blobs.clear()
    assert "BLOB_UNKNOWN" in await blob.fails(NotFound)


@given(start=st.integers(0, len(DATA)), cuts=st.lists(st.integers(0, 3000), max_size=6))
def test_any_cuts_give_the_bytes_from_start(start: int, cuts: list[int]) -> None:
    async def read() -> bytes:
        blob = Blob()
        # A cut that brings nothing counts as a try: two in a row are allowed.
        fruitful = [max(1, after) for after in cuts]
        blob.then(*[cut(after) for after in fruitful])
        return await blob.read(start)

    assert trio.run(read, clock=MockClock(autojump_threshold=0)) == DATA[start:]


async def test_leaving_early_closes_the_connection(blob: Blob) -> None:
    async with Sources(transport=blob.network.transport) as sources:
        source = sources.open(Reference(blob.fake.host, "team/web"))
        async with source.blob(blob.descriptor) as pieces:
            await anext(pieces)
            assert blob.network.open_bodies == 1
        assert blob.network.open_bodies == 0


@pytest.mark.parametrize("step", [unchanged, stall(1000), cut(0)], ids=["running", "silent", "between tries"])
@pytest.mark.parametrize("checkpoints", range(12))
async def test_cancellation_at_any_point_closes_the_connection(
    blob: Blob, step: Step, checkpoints: int
) -> None:
    blob.then(step)
    async with Sources(transport=blob.network.transport) as sources:
        source = sources.open(Reference(blob.fake.host, "team/web"))

        async def read() -> None:
            async with source.blob(blob.descriptor) as pieces:
                async for _ in pieces:
                    pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for _ in range(checkpoints):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    assert blob.network.open_bodies == 0


# -------------------- through a real socket


async def test_through_a_socket_a_cut_body_is_resumed_and_a_silent_one_closed() -> None:
    fake = FakeRegistry()
    fake.put_blob(DATA)
    async with served(fake) as host, Sources() as sources:
        source = sources.open(Reference(host, "team/web"))
        fake.then("GET", "/blobs/", cut(3000))
        async with source.blob(descriptor_of(DATA)) as pieces:
            assert b"".join([piece async for piece in pieces]) == DATA
        fake.then("GET", "/blobs/", stall(3000))
        with trio.CancelScope() as scope:
            async with source.blob(descriptor_of(DATA)) as pieces:
                await anext(pieces)
                scope.cancel()
                await trio.sleep_forever()
        fake.then("GET", "/blobs/", Reply(206, {"Content-Range": "bytes 1-2/9"}, b"12"))
        with pytest.raises(Corrupt):
            async with source.blob(descriptor_of(DATA), start=5):
                raise AssertionError
        transport = await sources._transports.find(httpx.URL(f"http://{host}/"), Tls())
        assert isinstance(transport, httpx.AsyncHTTPTransport)
        # Those that were left early are closed, not kept; the one whose body was not read either.
        assert [c for c in transport._pool.connections if not c.is_idle()] == []
