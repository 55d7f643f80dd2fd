"""What the readers do: each kind one thing, over and over, for as long as it is let."""

import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from scripts.soaking.builds import LIVE, MOVING, PROGRAM, REVISION, File, content, revision
from scripts.soaking.diary import Event, Stop
from scripts.soaking.reader import SIZES, Reader, Task, forget_pages

_LARGE = 1_000_000


def hash_files(reader: Reader) -> None:
    """Files at random, whole: many small ones, and now and then a large one."""
    while True:
        root, tree = reader.choose()
        large = [path for path, file in sorted(tree.files.items()) if file.size > _LARGE]
        for path in (*reader.dice.sample(sorted(tree.files), 6), reader.dice.choice(large)):
            reader.read_whole(root / path, tree.files[path])
            reader.pause()


def read_fresh(reader: Reader) -> None:
    """Tags that were never read before, one after the other, each until all of it was right."""
    for tag in reader.task.scope:
        _read_until_right(reader, [tag])
        reader.pause()
    while True:
        reader.pause()


def read_held(reader: Reader) -> None:
    """Large files that stay open for as long as this runs, at random offsets."""
    held: list[tuple[Path, int, bytes]] = []
    for tag in reader.task.scope:
        app, _, name = tag.partition("/")
        for path, file in reader.builds.trees[app][name].files.items():
            if file.size > _LARGE and file.seed:
                full = Path(reader.task.point, tag, path)
                descriptor = reader.open(full)
                if descriptor is not None:
                    held.append((full, descriptor, content(file.seed, file.size)))
    while True:
        large, descriptor, expected = reader.dice.choice(held)
        forget_pages(descriptor)
        offset, size = reader.dice.randrange(len(expected)), reader.dice.choice(SIZES)
        stop = min(offset + size, len(expected))
        while offset < stop:
            begin = time.monotonic()
            got = reader.read(str(large), descriptor, stop - offset, offset)
            # Less than was asked for is what could be had before an error: asking for the rest tells which.
            if got is None or not got:
                if got is not None:
                    reader.diary.wrong("read", str(large), begin, f"it ends at {offset}")
                break
            asked = expected[offset : offset + len(got)]
            reader.diary.compare("read", str(large), begin, got, asked, offset=offset)
            offset += len(got)
        reader.pause()


def stay_inside(reader: Reader) -> None:
    """A working directory in the mount, and all that a shell there does by relative paths."""
    root, tree = reader.choose()
    folders = [folder for folder in tree.folders if any(_parent(path) == folder for path in tree.files)]
    home = reader.dice.choice([folder for folder in folders if folder.count("/") == 1])
    while reader.diary.attempt("chdir", str(root / home), partial(_enter, root / home)) is None:
        reader.pause()
    while True:
        begin = time.monotonic()
        other = reader.dice.choice(folders)
        names = {path.rpartition("/")[2]: file for path, file in tree.files.items() if _parent(path) == other}
        here = os.path.relpath(other, home)
        inside = {path.rpartition("/")[2] for path in (*tree.files, *tree.folders) if _parent(path) == other}
        listed = reader.diary.attempt("list", here, partial(os.listdir, here))
        if listed is not None:
            reader.check_names("list", f"{home}/{here}", begin, set(listed), inside)
        for name, file in reader.dice.sample(sorted(names.items()), min(3, len(names))):
            path = f"{here}/{name}"
            status = reader.diary.attempt("stat", path, partial(os.stat, path))
            if status is not None and status.st_size != file.size:
                reader.diary.wrong("stat", path, begin, f"its size is {status.st_size}, not {file.size}")
            reader.read_whole(path, file)
        said = reader.run("ls", ("ls", "-l", here))
        if said is not None and len(said[0].splitlines()) != len(inside) + 1:
            reader.diary.wrong("ls", here, begin, f"{len(inside)} names, but it says {said[0]!r}")
        where = reader.diary.attempt("getcwd", home, os.getcwd)
        if where is not None and where != str(root / home):
            reader.diary.wrong("getcwd", home, begin, f"it is {where}, not {root / home}")
        reader.pause()


def _enter(folder: Path) -> bool:
    os.chdir(folder)
    return True


def run_programs(reader: Reader) -> None:
    """A program with its library, started again and again."""
    while True:
        root, _ = reader.choose()
        begin = time.monotonic()
        said = reader.run("run", (root / PROGRAM,))
        if said is not None and said != (f"{reader.builds.total}\n", 0):
            reader.diary.wrong("run", str(root), begin, f"it printed {said[0]!r} and ended with {said[1]}")
        reader.pause()


def keep_running(reader: Reader) -> None:
    """One program that runs from the mount for as long as this does, and reads its own library by its mapping."""
    root, _ = reader.choose()
    command = [str(root / PROGRAM), "again"]
    process = None
    while process is None:
        process = reader.diary.attempt(
            "exec", command[0], lambda: subprocess.Popen(command, stdout=subprocess.PIPE)
        )
        reader.pause()
    assert process.stdout is not None
    try:
        while True:
            line = reader.diary.attempt("mapped", command[0], partial(_next_line, process.stdout))
            if line is None:
                continue
            words = line.split()
            if len(words) != 3:
                code = process.wait()
                reader.diary.wrong("mapped", command[0], time.monotonic(), f"the program has ended: {code}")
                return
            begin, end, said = float(words[0]), float(words[1]), words[2].decode()
            if said == "SIGBUS":
                reader.diary.note(Event(reader.task.name, "mapped", command[0], begin, end, "signal 7"))
            elif int(said) != reader.builds.total:
                reader.diary.wrong(
                    "mapped", command[0], begin, f"the sum is {said}, not {reader.builds.total}"
                )
            else:
                reader.diary.counts["mapped library"] += 1
    finally:
        process.kill()
        process.wait()


def _next_line(stream: IO[bytes]) -> bytes:
    while not select.select([stream], [], [], 0.5)[0]:
        pass
    return stream.readline()


def walk_trees(reader: Reader) -> None:
    """Whole trees by `find`, and two of them by `diff -r`."""
    while True:
        root, tree = reader.choose()
        begin = time.monotonic()
        expected = {f"f {file.size} {path}" for path, file in tree.files.items()}
        expected |= {f"d 0 {path}" for path in ("", *tree.folders)}
        expected |= {f"l {len(target)} {path}" for path, target in tree.links.items()}
        said = reader.run("find", ("find", root, "-printf", "%y %s %P\\n"))
        if said is not None:
            got = {re.sub(r"^d \d+", "d 0", line) for line in said[0].splitlines()}
            reader.check_names("find", str(root), begin, got, expected)
        reader.pause()
        both = sorted({tag.rpartition("/")[0] for tag in reader.task.scope})
        app = reader.dice.choice([app for app in both if f"{app}/v2" in reader.task.scope])
        left, right = (reader.builds.trees[app][tag] for tag in ("v1", "v2"))
        begin = time.monotonic()
        said = reader.run("diff", ("diff", "-rq", "v1", "v2"), cwd=Path(reader.task.point, app))
        if said is not None:
            got = {line for line in said[0].splitlines() if not line.startswith("Only in ")}
            both_have = left.files.keys() & right.files.keys()
            changed = {path for path in both_have if left.files[path].sha256 != right.files[path].sha256}
            changed |= {
                link
                for link in left.links.keys() & right.links.keys()
                if left.files[left.links[link]].sha256 != right.files[right.links[link]].sha256
            }
            reader.check_names(
                "diff", app, begin, got, {f"Files v1/{path} and v2/{path} differ" for path in changed}
            )
        reader.pause()


def ask_what_is_known(reader: Reader) -> None:
    """What never asks the network: df, the apps, the tags of an app, and names and sizes in trees that are known."""
    root = Path(reader.task.point)
    while True:
        reader.diary.attempt("known statfs", str(root), lambda: os.statvfs(root))
        begin = time.monotonic()
        apps = reader.diary.attempt("known list", str(root), lambda: os.listdir(root))
        if apps is not None:
            reader.check_names("known list", str(root), begin, set(apps), {*reader.builds.trees, MOVING})
        folder, tree = reader.choose()
        tags = reader.diary.attempt("known list", str(folder.parent), partial(os.listdir, folder.parent))
        if tags is not None:
            known = set(reader.builds.trees[folder.parent.name])
            reader.check_names("known list", str(folder.parent), begin, set(tags), known)
        for path in reader.dice.sample(sorted(tree.files), 3):
            status = reader.diary.attempt("known stat", str(folder / path), partial(os.stat, folder / path))
            if status is not None and status.st_size != tree.files[path].size:
                reader.diary.wrong("known stat", str(folder / path), begin, f"its size is {status.st_size}")
        reader.pause()


def follow_moves(reader: Reader) -> None:
    """A tag that moves: by its path the newest revision, by a folder that is open always the same one."""
    tag = Path(reader.task.point, MOVING, LIVE)
    newest = 0
    inside: list[tuple[int, int]] = []
    while True:
        begin = time.monotonic()
        folder = reader.diary.attempt("open", str(tag), lambda: os.open(tag, os.O_RDONLY | os.O_DIRECTORY))
        if folder is not None:
            number = _revision_in(reader, folder)
            if number is None:
                os.close(folder)
            else:
                reader.diary.note(Event(reader.task.name, "revision", str(number), begin, time.monotonic()))
                if number < newest:
                    reader.diary.wrong("revision", str(tag), begin, f"revision {number} after {newest}")
                newest = max(newest, number)
                inside.append((folder, number))
                # The first stays open to the end, and the latest two.
                if len(inside) > 3:
                    os.close(inside.pop(1)[0])
        for folder, number in inside:
            files = revision(number, reader.task.seed)
            path = reader.dice.choice(sorted(files))
            data = files[path]
            file = File(len(data), hashlib.sha256(data).hexdigest(), "")
            if not reader.read_whole(path, file, folder=folder):
                break
        reader.pause()


def take_snapshots(reader: Reader) -> None:
    """Plain folders of tags, by processes that share the cache with the mount."""
    config = Path(reader.task.builds).with_name("config.toml")
    # No snapshot waits for the mount; but its bytes are as right.
    codes = {5: "EACCES", 6: "EHOSTUNREACH", 7: "EBADMSG", 8: "ENOSPC"}
    while True:
        root, tree = reader.choose()
        source = f"{root.parent.name}:{root.name}"
        with TemporaryDirectory(prefix="snapshot-", dir=reader.task.folder) as folder:
            there = Path(folder, "there")
            words = (sys.executable, "-P", "-m", "fsmount", "snapshot", source, there, "--config", config)
            begin = time.monotonic()
            if reader.run("snapshot", words, codes=codes) is not None:
                found = {path for path in there.rglob("*") if path.is_file() and not path.is_symlink()}
                names = {str(path.relative_to(there)) for path in found}
                reader.check_names("snapshot", source, begin, names, set(tree.files))
                for path in names & tree.files.keys():
                    if hashlib.sha256((there / path).read_bytes()).hexdigest() != tree.files[path].sha256:
                        reader.diary.wrong(
                            "snapshot", f"{source} {path}", begin, "its content is not that of the image"
                        )
        reader.pause()


def _revision_in(reader: Reader, folder: int) -> int | None:
    """Which revision an open folder shows, if that could be read."""
    descriptor = reader.open(REVISION, folder=folder)
    if descriptor is None:
        return None
    try:
        said = reader.read(REVISION, descriptor, 100, 0)
    finally:
        os.close(descriptor)
    if said is not None and not said.strip().isdigit():
        reader.diary.wrong("revision", REVISION, time.monotonic(), f"it holds {said!r}")
        return None
    return int(said) if said is not None else None


def read_all(reader: Reader) -> None:
    """Everything of the scope once, in order; then the end."""
    _read_until_right(reader, reader.task.scope)


def _read_until_right(reader: Reader, tags: Sequence[str]) -> None:
    left = [
        (Path(reader.task.point, tag, path), file)
        for tag in tags
        for path, file in reader.builds.trees[tag.partition("/")[0]][tag.partition("/")[2]].files.items()
    ]
    while left:
        left = [(path, file) for path, file in left if not reader.read_whole(path, file)]
        if left:
            reader.diary.pause(1)


KINDS: dict[str, Callable[[Reader], None]] = {
    "hash": hash_files,
    "held": read_held,
    "inside": stay_inside,
    "programs": run_programs,
    "running": keep_running,
    "walk": walk_trees,
    "known": ask_what_is_known,
    "moves": follow_moves,
    "snapshots": take_snapshots,
    "fresh": read_fresh,
    "all": read_all,
}


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def main() -> None:
    said = json.loads(sys.argv[1])
    reader = Reader(Task(**{**said, "scope": tuple(said["scope"])}))
    signal.signal(signal.SIGTERM, reader.diary.stop)
    with suppress(Stop):
        KINDS[reader.task.kind](reader)
    # Before the diary is complete: what is open, or a working directory, keeps the mount in use.
    os.chdir("/")
    reader.diary.close()


if __name__ == "__main__":
    main()
