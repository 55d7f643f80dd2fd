"""The state file: every form that it ever had opens or says why not, and damage costs what was in it, and no more."""

import logging
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fsmount.cache import state
from fsmount.cache.numbers import Numbers, ViewRecord
from fsmount.cache.warmsets import WarmSets
from fsmount.errors import Busy, FsmountError, NoSpace
from fsmount.oci.digest import Digest

ONE = Digest.of(b"1")
#: As it was made before it had a version.
FIRST = f"""
CREATE TABLE layers (number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE);
CREATE TABLE views (number INTEGER PRIMARY KEY AUTOINCREMENT,
    app TEXT NOT NULL, name TEXT NOT NULL, origin TEXT NOT NULL, digest TEXT);
CREATE INDEX views_by_name ON views (app, name, origin);
CREATE TABLE folders (number INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT NOT NULL UNIQUE);
CREATE TABLE warm_apps (number INTEGER PRIMARY KEY, app TEXT NOT NULL, origin TEXT NOT NULL, UNIQUE (app, origin));
CREATE TABLE warm_tags (app INTEGER, digest TEXT, PRIMARY KEY (app, digest)) WITHOUT ROWID;
CREATE TABLE warm_paths (app INTEGER, path BLOB, layer INTEGER, member INTEGER, recording INTEGER,
    missed INTEGER, PRIMARY KEY (app, path)) WITHOUT ROWID;
INSERT INTO layers (key) VALUES ('a'), ('b');
DELETE FROM layers WHERE key = 'b';
INSERT INTO views (app, name, origin, digest) VALUES ('web', 'v1', 'origin', '{ONE}');
INSERT INTO folders (path) VALUES ('web');
INSERT INTO warm_apps VALUES (1, 'web', 'origin');
INSERT INTO warm_paths VALUES (1, x'62696e', 1, 5, 1, 0);
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite"


def make(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def test_what_was_kept_before_there_were_versions_is_kept_on(path: Path) -> None:
    make(path, "PRAGMA journal_mode=WAL;" + FIRST)
    for _ in range(2):
        with closing(Numbers(path)) as numbers, closing(WarmSets(path)) as sets:
            assert (numbers.layer("a"), numbers.folder("web")) == (1, 1)
            assert numbers.view(1) == ViewRecord(1, "web", "v1", "origin", ONE)
            assert sets.paths("web", "origin") == {b"bin": (1, 5)}
            assert numbers.layer("new") == 3, "no number is given twice"
            assert numbers.views_of(1) == []
            assert len(numbers.identity) == 32
    assert version(path) == state.VERSION


def test_the_file_of_a_later_version_is_refused_and_left_alone(path: Path) -> None:
    make(path, f"PRAGMA user_version={state.VERSION + 1}; CREATE TABLE later (number);")
    for kind in (Numbers, WarmSets):
        with pytest.raises(FsmountError, match=r"state\.sqlite is of version 2.*up to 1") as caught:
            kind(path)
        assert caught.value.remedy is not None
    assert version(path) == state.VERSION + 1
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("later",)]


@pytest.mark.parametrize("kind", [Numbers, WarmSets])
@pytest.mark.parametrize("content", [b"garbage" * 1000, b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_file_is_moved_aside_and_another_begins(
    path: Path, caplog: pytest.LogCaptureFixture, kind: type[Numbers] | type[WarmSets], content: bytes
) -> None:
    path.write_bytes(content)
    kind(path).close()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and "state.sqlite is damaged" in record.getMessage()
    assert path.with_name("state.sqlite.damaged").read_bytes() == content
    caplog.clear()
    with closing(Numbers(path)) as numbers:
        assert numbers.layer("a") == 1
    assert not caplog.records


def test_damage_that_shows_only_when_it_is_asked_for_is_looked_into_when_the_file_is_opened_next(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Numbers(path)) as numbers:
        for number in range(3000):
            numbers.folder(f"a folder with a long name, {number}")
        identity = numbers.identity
    data = bytearray(path.read_bytes())
    data[-8192:] = b"\xff" * 8192
    path.write_bytes(data)
    with closing(Numbers(path)) as numbers:
        assert numbers.identity == identity
        with pytest.raises(FsmountError, match=r"(?s)state\.sqlite.*remove that file"):
            for number in range(3000):
                numbers.folder_path(number)
                numbers.folder(f"a folder with a long name, {number}")
    assert not caplog.records
    with closing(Numbers(path)) as numbers:
        assert numbers.identity != identity
        assert numbers.folder("web") == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    with closing(Numbers(path)) as numbers:
        assert numbers.folder_path(1) == "web"


def test_a_suspicion_that_proves_wrong_changes_nothing(path: Path) -> None:
    with closing(Numbers(path)) as numbers:
        identity = numbers.identity
    suspect = path.with_name("state.sqlite.suspect")
    suspect.touch()
    with closing(Numbers(path)) as numbers:
        assert numbers.identity == identity
    assert not suspect.exists()


_OPEN = """
import sys
from contextlib import closing
from pathlib import Path
from fsmount.cache.numbers import Numbers
print(end="ready\\n", flush=True)
sys.stdin.readline()
for number in range(20):
    with closing(Numbers(Path(sys.argv[1], str(number), "state.sqlite"))) as numbers:
        print(numbers.identity, numbers.layer("a"))
"""


@pytest.mark.parametrize("content", [None, b"garbage" * 1000])
def test_processes_that_begin_a_file_at_the_same_time_get_the_same_one(
    tmp_path: Path, content: bytes | None
) -> None:
    for number in range(20):
        (tmp_path / str(number)).mkdir()
        if content is not None:
            (tmp_path / str(number) / "state.sqlite").write_bytes(content)
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _OPEN, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = {process.communicate(timeout=60)[0] for process in processes}
    assert len(said) == 1 and len(said.pop().splitlines()) == 20
    assert {process.returncode for process in processes} == {0}


# -------------------- while another process is in the middle of a write


@pytest.fixture
def other(path: Path) -> Iterator[sqlite3.Connection]:
    """A process that was stopped in the middle of a write; what it commits, it goes on from."""
    Numbers(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


def test_who_cannot_write_because_another_process_does_is_not_told_to_remove_anything(
    path: Path, other: sqlite3.Connection
) -> None:
    with closing(Numbers(path)) as numbers, pytest.raises(Busy, match=r"state\.sqlite") as caught:
        numbers.folder("web")
    assert caught.value.remedy is not None and "remove" not in caught.value.remedy
    assert not path.with_name("state.sqlite.suspect").exists()


async def test_who_can_wait_for_another_process_does_and_holds_up_nobody(
    path: Path, other: sqlite3.Connection
) -> None:
    got: list[int] = []

    async def give() -> None:
        got.append(await numbers.when_possible(lambda: numbers.folder("web")))

    with closing(Numbers(path)) as numbers:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(give)
            await wait_all_tasks_blocked()
            assert got == []
            other.execute("COMMIT")
        assert got == [numbers.folder("web")]


async def test_who_waits_for_another_process_does_not_do_so_for_ever(
    path: Path, other: sqlite3.Connection, autojump_clock: MockClock
) -> None:
    with closing(Numbers(path)) as numbers, trio.fail_after(30), pytest.raises(Busy):
        await numbers.when_possible(lambda: numbers.folder("web"))


def test_only_the_first_of_many_writes_in_a_row_waits_for_another_process(
    path: Path, other: sqlite3.Connection
) -> None:
    waits: list[int] = []

    def write() -> None:
        (milliseconds,) = numbers._state.rows("PRAGMA busy_timeout")[0]
        waits.append(milliseconds)
        numbers.folder("web")

    with closing(Numbers(path)) as numbers:
        for _ in range(3):
            with pytest.raises(Busy):
                write()
        other.execute("COMMIT")
        for _ in range(2):
            write()
    assert waits[0] == waits[-1] > 0 and waits[1:4] == [0, 0, 0]
    assert waits[0] <= 200, "the event loop stands still meanwhile"


async def test_a_recording_is_saved_when_another_process_has_written(
    path: Path, other: sqlite3.Connection
) -> None:
    with closing(WarmSets(path)) as sets:
        async with trio.open_nursery() as nursery:
            save = partial(sets.save, "web", "origin", {b"bin": (1, 5)})
            nursery.start_soon(trio.to_thread.run_sync, save)
            await trio.sleep(0.3)
            assert not sets.is_recorded("web", "origin", ONE), "who reads meanwhile does not wait"
            other.execute("COMMIT")
        assert sets.paths("web", "origin") == {b"bin": (1, 5)}


# -------------------- when others have filled the disk


async def test_room_is_made_for_what_the_disk_has_none_for(path: Path) -> None:
    with closing(Numbers(path)) as numbers:
        freed: list[int] = []
        numbers.make_room = freed.append

        def write() -> int:
            if not freed:
                raise NoSpace("no space left for state.sqlite")
            return numbers.folder("web")

        assert await numbers.when_possible(write) == 1
        assert len(freed) == 1


async def test_it_is_no_space_when_no_room_can_be_made(path: Path) -> None:
    def write() -> int:
        raise NoSpace("no space left for state.sqlite")

    with closing(Numbers(path)) as numbers, pytest.raises(NoSpace):
        await numbers.when_possible(write)
