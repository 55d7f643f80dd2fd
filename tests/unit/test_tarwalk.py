"""Walking a tar finds what scanning it finds, in few reads; and stops where that would not pay."""

import gzip

import pytest
from backports import zstd

from fsmount import tarwalk
from fsmount.archive.entry import Entry
from fsmount.archive.scan import TarScanner
from fsmount.errors import Invalid, Unreachable, Unsupported
from fsmount.tarwalk import walk_tar
from tests.fakes import tar
from tests.fakes.tar import END, SPARSE_FORMS, Member, archive, long_link, long_name, pax, sparse

MIB = 1024 * 1024
LEAST, MOST = tarwalk._LEAST, tarwalk._MOST

#: Larger than what a walk reads at once when it is told to read little.
LARGE = b"large" * 2000


class Blob:
    """Bytes at offsets, and zeros between them: it may be larger than memory. Notes from where to where it was read."""

    def __init__(self, size: int, parts: dict[int, bytes]) -> None:
        self.size = size
        self.reads: list[tuple[int, int]] = []
        self._parts = parts

    async def read(self, start: int, stop: int) -> bytes:
        self.reads.append((start, stop))
        data = bytearray(stop - start)
        for at, part in self._parts.items():
            first, last = max(at, start), min(at + len(part), stop)
            if first < last:
                data[first - start : last - start] = part[first - at : last - at]
        return bytes(data)

    async def walk(self) -> list[Entry] | None:
        return await walk_tar(self.read, self.size)


def whole(data: bytes) -> Blob:
    return Blob(len(data), {0: data})


def of_files(count: int, size: int) -> Blob:
    """A tar of so many files, each of `size` zeros."""
    step = 512 + tar.BLOCK * -(-size // tar.BLOCK)
    headers = {at * step: Member(b"file%d" % at, size=size).header() for at in range(count)}
    return Blob(count * step + len(END), headers)


def scanned(data: bytes) -> list[Entry]:
    scanner = TarScanner()
    entries = scanner.feed(data)
    scanner.finish()
    return entries


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one block at first, so that small members are passed over as well."""
    monkeypatch.setattr("fsmount.tarwalk._LEAST", 512)
    monkeypatch.setattr("fsmount.tarwalk._MOST", 2048)
    monkeypatch.setattr("fsmount.tarwalk._STAKE", 10**9)


# -------------------- what is found


REGIONS = [(0, LARGE), (20_000, b"x" * 700), (50_000, LARGE)]
TARS = {
    "small and large members": archive(
        *(Member(b"%d" % n, LARGE[: n * 777]) for n in range(10)), Member(b"d/", type=tar.DIRECTORY)
    ),
    "empty files": archive(*(Member(b"%d" % n) for n in range(20))),
    "GNU long names before large members": archive(
        *(part for n in range(3) for part in (long_name(b"%d" % n * 200), Member(b"short", LARGE)))
    ),
    "a GNU long link": archive(
        Member(b"a", LARGE), long_link(b"t" * 200), Member(b"l", type=tar.SYMLINK), Member(b"b", LARGE)
    ),
    "PAX headers before large members": archive(
        *(
            part
            for n in range(3)
            for part in (pax({"path": f"é{n}", "mtime": "1.5"}), Member(b"short", LARGE))
        )
    ),
    "a size in a PAX header": archive(
        pax({"size": str(len(LARGE))}), Member(b"a", LARGE, size=0), Member(b"b", b"b")
    ),
    "a large PAX header": archive(pax({"comment": "c" * 9000}), Member(b"a", LARGE), Member(b"b", b"b")),
    "a global header": archive(pax({"comment": "c"}, type=b"g"), Member(b"a", LARGE), Member(b"b", b"b")),
    **{
        f"sparse members, form {form}": archive(
            Member(b"before", LARGE), sparse(form, b"holes", 70_000, REGIONS), Member(b"after", LARGE)
        )
        for form in SPARSE_FORMS
    },
    **{
        f"a sparse map of many blocks, form {form}": archive(
            sparse(form, b"holes", 10**6, [(n * 1000, b"x" * 90) for n in range(400)]), Member(b"after", b"a")
        )
        for form in SPARSE_FORMS
    },
    "data that ends with a block": archive(Member(b"a", bytes(512)), Member(b"b", bytes(4096)), Member(b"c")),
    "no end blocks": archive(Member(b"a", LARGE), Member(b"b", LARGE), end=b""),
    "one end block": archive(Member(b"a", LARGE), end=bytes(512)),
    "no members": END,
    "nothing": b"",
}


@pytest.mark.parametrize("data", TARS.values(), ids=TARS)
async def test_a_walk_finds_what_a_scan_finds(data: bytes) -> None:
    assert await whole(data).walk() == scanned(data)


@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize("data", TARS.values(), ids=TARS)
async def test_a_walk_that_passes_over_data_finds_what_a_scan_finds(data: bytes) -> None:
    blob = whole(data)
    assert await blob.walk() == scanned(data)
    places = [place for read in blob.reads for place in read]
    assert places == sorted(places), "nothing is read twice"


@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize(
    "data",
    [TARS["small and large members"], TARS["PAX headers before large members"], TARS["a GNU long link"]]
    + [TARS[f"sparse members, form {form}"] for form in SPARSE_FORMS],
)
async def test_a_tar_that_is_cut_short_is_refused_where_a_scan_refuses_it(data: bytes) -> None:
    data = data.removesuffix(END)
    refused = 0
    for stop in [*range(0, len(data), 512), *range(612, len(data), 512)]:
        try:
            expected = scanned(data[:stop])
        except Invalid:
            refused += 1
            with pytest.raises(Invalid):
                await whole(data[:stop]).walk()
        else:
            assert stop % tar.BLOCK or await whole(data[:stop]).walk() == expected
    assert refused


async def test_the_last_padding_may_be_missing() -> None:
    data = archive(Member(b"a", b"data"), end=b"")[: 512 + 4]
    assert await whole(data).walk() == scanned(data)


async def test_what_is_shorter_than_a_header_is_refused() -> None:
    with pytest.raises(Invalid):
        await walk_tar(whole(TARS["empty files"][:148]).read, 148)


async def test_a_member_that_says_more_than_there_is_is_refused_without_a_read_past_the_end() -> None:
    blob = whole(archive(Member(b"a", b"data"), Member(b"huge", size=b"7" * 11), end=b""))
    with pytest.raises(Invalid):
        await blob.walk()
    assert blob.reads == [(0, blob.size)]


# -------------------- what it costs


def doubling(start: int, stop: int) -> list[tuple[int, int]]:
    """Reads from start to stop, each twice as large as the one before."""
    reads, size = [], LEAST
    while start < stop:
        reads.append((start, min(start + size, stop)))
        start, size = start + size, 2 * size
    return reads


async def test_large_members_cost_one_small_read_each() -> None:
    blob = of_files(50, 16 * MIB)
    entries = await blob.walk()
    assert entries is not None and len(entries) == 50
    step = 16 * MIB + 512
    headers = [(at * step, at * step + LEAST) for at in range(50)]
    assert blob.reads == [*headers, (50 * step, 50 * step + len(END))]


async def test_where_there_is_nothing_to_pass_over_each_read_is_twice_the_one_before() -> None:
    blob = of_files(3000, 512)
    entries = await blob.walk()
    assert entries is not None and len(entries) == 3000
    assert blob.reads == doubling(0, blob.size) and len(blob.reads) > 5


async def test_after_a_gap_reads_are_small_again() -> None:
    small = archive(*(Member(b"%d" % n) for n in range(1000)), end=b"")
    large = Member(b"large", size=100 * MIB).header()
    stop = len(small) + 512 + 100 * MIB
    blob = Blob(stop + len(small) + len(END), {0: small, len(small): large, stop: small})
    entries = await blob.walk()
    assert entries is not None and len(entries) == 2001
    after = doubling(stop, blob.size)
    before = blob.reads[: -len(after)]
    assert blob.reads == before + after and len(after) > 2
    assert before == doubling(0, blob.size)[: len(before)] and before[-2][1] < len(small) < before[-1][1]


async def test_reads_do_not_grow_for_ever() -> None:
    # In the first half the walk has won so much that it goes on among the small ones.
    headers = {at * (64 * MIB + 512): Member(b"large", size=64 * MIB).header() for at in range(20)}
    start = 20 * (64 * MIB + 512)
    small = archive(*(Member(b"%d" % n) for n in range(30_000)))
    blob = Blob(start + len(small), {**headers, start: small})
    entries = await blob.walk()
    assert entries is not None and len(entries) == 30_020
    assert max(stop - start for start, stop in blob.reads) == MOST


async def test_a_walk_among_tiny_members_is_given_up_before_it_has_cost_much() -> None:
    tiny = archive(*(Member(b"%d" % n, b"x") for n in range(20_000)), end=b"")
    blob = Blob(10 * len(tiny), {0: tiny})
    assert await blob.walk() is None
    assert sum(stop - start for start, stop in blob.reads) < 12 * MIB


@pytest.mark.parametrize("pack", [gzip.compress, zstd.compress])
async def test_what_is_compressed_is_not_walked(pack: object) -> None:
    assert callable(pack)
    blob = Blob(100 * MIB, {0: pack(TARS["small and large members"])})
    assert await blob.walk() is None
    assert len(blob.reads) == 1


@pytest.mark.parametrize("magic, error", [(b"\xfd7zXZ\0", Unsupported), (b"no layer", Invalid)])
async def test_what_is_no_tar_is_refused_after_one_read(magic: bytes, error: type[Exception]) -> None:
    blob = Blob(100 * MIB, {0: magic})
    with pytest.raises(error):
        await blob.walk()
    assert len(blob.reads) == 1


async def test_nothing_is_read_after_the_end_blocks() -> None:
    data = archive(Member(b"a", b"data"))
    blob = Blob(100 * MIB, {0: data, LEAST: b"what is no header" * 100})
    assert await blob.walk() == scanned(data)
    assert blob.reads == [(0, LEAST)]


async def test_what_reading_raises_comes_through() -> None:
    async def read(start: int, stop: int) -> bytes:
        raise Unreachable("the registry went away")

    with pytest.raises(Unreachable):
        await walk_tar(read, 10**6)
