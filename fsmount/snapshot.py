"""snapshot: a plain folder of what a tag shows, whole or absent."""

import contextlib
import ctypes
import os
import stat
import subprocess
import tempfile
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from fsmount import extract
from fsmount.archive.entry import EntryType
from fsmount.cache.folder import from_os_error
from fsmount.catalog import Content
from fsmount.errors import Corrupt, FsmountError, Refused, UsageError
from fsmount.extract import File, Folders, Part
from fsmount.index import unpack_xattrs
from fsmount.layer import Layer, Piece
from fsmount.overlay import Node
from fsmount.singleflight import in_background, single_error
from fsmount.tree import StoredTree, directory_key
from fsmount.workers import Batch, ChangedMeanwhile, Workers, start_workers

#: Files in one batch at most, so that a chunk of tiny files keeps more than one process busy.
_BATCH = 500


@dataclass(slots=True)
class Progress:
    """How far a snapshot is, for whoever shows it."""

    files: int = 0
    bytes: int = 0
    #: 0 while it is not known, or never for a part of an image.
    total_bytes: int = 0
    #: Extended attributes that the destination's file system does not take.
    lost_xattrs: int = 0


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a file's bytes are: the chunks of its layer, in order."""

    file: File
    pieces: tuple[Piece, ...]


@dataclass(slots=True)
class _Plan:
    """What to make besides files: folders, parents first, by number too; others; links to what is made."""

    paths: dict[int, bytes]
    #: The root among them; with extended attributes as an index keeps them.
    folders: list[tuple[bytes, Node, str | None]] = field(default_factory=list)
    others: list[tuple[bytes, Node]] = field(default_factory=list)
    links: list[tuple[bytes, bytes]] = field(default_factory=list)


async def snapshot(
    content: Content, destination: Path, *, keep_privileges: bool = False, progress: Progress | None = None
) -> Progress:
    """Writes what content shows to a new folder: made beside its final name, synced, and renamed at the end.

    Kept are modes, times, symlinks, hardlinks, holes, `user.` attributes and, as root, owners; the setuid and
    setgid bits, file capabilities and device nodes only with keep_privileges: the mount, which is nosuid and
    nodev, does not honour them either.

    Raises: Refused (destination exists), UsageError (its parent does not), NoSpace, and what fetching raises.
    Cancellation: safe; nothing is left.
    """
    progress = progress or Progress()
    check_destination(destination)
    parent = destination.absolute().parent
    with single_error(FsmountError):
        async with trio.open_nursery() as nursery:
            for layer in content.tree.layers:
                nursery.start_soon(layer.wait_trusted)
    await content.tree.stored()
    try:
        name = os.fsdecode(os.fsencode(destination.name)[:200])
        partial = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=parent))
        try:
            _disinherit(partial)
            await _Writer(content, partial, keep_privileges, progress).write()
            if os.path.lexists(destination):
                raise Refused(f"{destination} has come to exist meanwhile", remedy="Choose another name.")
            partial.rename(destination)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_remove_tree, partial)
            raise
    except ChangedMeanwhile as error:
        raise Corrupt(
            f"{destination} is not made: {error.strerror}",
            remedy="Run it again: what was changed is fetched again. If it happens again, look at the disk.",
        ) from error
    except OSError as error:
        raise from_os_error(error, destination, elsewhere="Choose another place.") from error
    return progress


@asynccontextmanager
async def _fetching(layers: Sequence[Layer]) -> AsyncIterator[None]:
    """Has what is missing of layers fetched ahead, several parts at once; who needs a part hears what went wrong."""
    async with trio.open_nursery() as nursery:
        for layer in layers:
            what = f"fetching layer {layer.spec.descriptor.digest} ahead"
            nursery.start_soon(in_background, what, layer.fill)
        yield
        nursery.cancel_scope.cancel()


def check_destination(destination: Path) -> None:
    """Raises: Refused (it exists), UsageError (its parent does not)."""
    parent = destination.absolute().parent
    if os.path.lexists(destination):
        raise Refused(f"{destination} exists already", remedy="Choose another name, or move it away first.")
    if not parent.is_dir():
        raise UsageError(f"the folder {parent} does not exist", remedy=f"Make it: mkdir -p {parent}")


class _Writer:
    """One snapshot being written below `partial`, which nobody else can enter until it is done."""

    def __init__(self, content: Content, partial: Path, keep_privileges: bool, progress: Progress) -> None:
        self._content = content
        self._layers = content.tree.layers
        self._keep_privileges = keep_privileges
        self._progress = progress
        self._root = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._folders = Folders(self._root)

    async def write(self) -> None:
        umask = os.umask(0)
        stored = self._content.tree.reopen()  # for threads, one at a time
        try:
            plan = await trio.to_thread.run_sync(self._plan_folders, stored)
            await trio.to_thread.run_sync(self._make_folders, plan)
            crossing: list[File] = []
            async with start_workers(self._root) as workers, _fetching(self._layers):
                for position, layer in enumerate(self._layers):
                    with contextlib.closing(self._plan_files(plan, stored, position, layer)) as files:
                        await self._write_layer(layer, files, workers, crossing)
            self._progress.lost_xattrs += workers.lost_xattrs
            await trio.to_thread.run_sync(self._finish, plan, crossing)
        finally:
            os.umask(umask)
            stored.close()
            self._folders.close()
            os.close(self._root)

    def _plan_folders(self, stored: StoredTree) -> _Plan:
        plan = _Plan({})
        for parent, node, xattrs in stored.folders():
            key = directory_key(node)
            if key == self._content.root:
                path = b""
                if not node.name:
                    _, self._progress.total_bytes = stored.counts()
            elif parent in plan.paths:
                path = _join(plan.paths[parent], node.name)
            else:  # outside the folder that is shown
                continue
            plan.paths[key] = path
            plan.folders.append((path, node, xattrs))
        return plan

    def _plan_files(
        self, plan: _Plan, stored: StoredTree, position: int, layer: Layer
    ) -> Generator[list[_Source], None, None]:
        """The files of a layer, some at a time, in the order of their bytes in it; the rest goes into the plan."""
        made: tuple[int, bytes] | None = None  # the last member, and its first name; others follow at once
        sources: list[_Source] = []
        for parent, node, content, xattrs in stored.members(position, layer.index_path):
            folder = plan.paths.get(parent)
            if folder is None:  # outside the folder that is shown
                continue
            member = node.member
            path = _join(folder, node.name)
            if made is not None and made[0] == member.number:
                plan.links.append((path, made[1]))
                continue
            made = member.number, path
            if member.type is not EntryType.FILE:
                plan.others.append((path, node))
                continue
            kept = tuple(self._kept_xattrs(xattrs))
            mode = self._mode(node)
            file = File(
                folder, node.name, mode, member.uid, member.gid, member.size, member.mtime_ns, (), kept
            )
            sources.append(_Source(file, tuple(layer.pieces(content))))
            if len(sources) == _BATCH:
                yield sources
                sources = []
        yield sources

    def _kept_xattrs(self, text: str | None) -> Iterator[tuple[bytes, bytes]]:
        for name, value in unpack_xattrs(text).items():
            privilege = name == b"security.capability" and self._keep_privileges
            if privilege or (name.startswith(b"user.") and not name.startswith(b"user.overlay.")):
                yield name, value

    def _mode(self, node: Node) -> int:
        return node.member.mode & (0o7777 if self._keep_privileges else 0o1777)

    def _make_folders(self, plan: _Plan) -> None:
        for path, _, _ in plan.folders[1:]:
            folder, _, name = path.rpartition(b"/")
            os.mkdir(name, 0o700, dir_fd=self._folders.descriptor(folder))

    async def _write_layer(
        self, layer: Layer, files: Iterator[list[_Source]], workers: Workers, crossing: list[File]
    ) -> None:
        """Sends a layer's files to the workers in the layer's order, so that each chunk is opened once.

        A file in several chunks is made here, filled in parts by whichever workers are free, and finished
        when all are done: `crossing`.
        """
        batch: Batch | None = None
        current = -1
        async for source in _from_thread(files):
            file, pieces = source.file, source.pieces
            whole = len({piece.chunk for piece in pieces}) <= 1
            if not whole:
                self._create_file(file)
                crossing.append(file)
                self._progress.bytes += file.size - sum(piece.size for piece in pieces)
            for piece in pieces or (None,):
                chunk = piece.chunk if piece else current
                if batch is None or chunk != current or len(batch.files) >= _BATCH:
                    if batch is not None:
                        await workers.batches.send(batch)
                    if chunk >= 0:
                        descriptor = await layer.open_chunk(chunk)
                        batch = Batch(os.dup(descriptor), checked=layer.checked(descriptor))
                    else:
                        # A file without bytes needs no chunk: any descriptor will do.
                        batch = Batch(os.dup(self._root))
                    current = chunk
                if piece and not whole:
                    part = ((piece.file_offset, piece.offset, piece.size),)
                    batch.parts.append(Part(file.folder, file.name, part))
                    self._progress.bytes += piece.size
            if whole:
                assert batch is not None
                placed = tuple((piece.file_offset, piece.offset, piece.size) for piece in pieces)
                batch.files.append(file._replace(pieces=placed))
                self._progress.bytes += file.size
            self._progress.files += 1
        if batch is not None:
            await workers.batches.send(batch)

    def _create_file(self, file: File) -> None:
        folder = self._folders.descriptor(file.folder)
        descriptor = os.open(file.name, extract.CREATE, file.mode & 0o777 | 0o200, dir_fd=folder)
        try:
            os.ftruncate(descriptor, file.size)
        finally:
            os.close(descriptor)

    def _finish(self, plan: _Plan, crossing: list[File]) -> None:
        """All that has no bytes, and the attributes that later work would have undone; then everything to disk."""
        for file in crossing:
            descriptor = os.open(file.name, extract.REOPEN, dir_fd=self._folders.descriptor(file.folder))
            try:
                self._progress.lost_xattrs += extract.set_attributes(descriptor, file)
                os.fchmod(descriptor, file.mode)
            finally:
                os.close(descriptor)
        for path, node in plan.others:
            self._make_other(path, node)
        for path, target in plan.links:
            self._link(path, target)
        # Innermost first: making something in a folder changes its time.
        for path, node, xattrs in reversed(plan.folders):
            self._finish_folder(path, node, xattrs)
        ctypes.CDLL(None).syncfs(self._root)

    def _make_other(self, path: bytes, node: Node) -> None:
        member = node.member
        folder, _, name = path.rpartition(b"/")
        parent = self._folders.descriptor(folder)
        if member.type is EntryType.SYMLINK:
            os.symlink(member.link, name, dir_fd=parent)
        elif member.type is EntryType.FIFO:
            os.mkfifo(name, self._mode(node), dir_fd=parent)
        elif self._keep_privileges:
            kind = stat.S_IFCHR if member.type is EntryType.CHAR else stat.S_IFBLK
            os.mknod(name, kind | self._mode(node), os.makedev(member.major, member.minor), dir_fd=parent)
        else:
            return
        if os.geteuid() == 0:
            os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
            if member.type is not EntryType.SYMLINK and member.mode & 0o7000:
                os.chmod(name, self._mode(node), dir_fd=parent)
        os.utime(name, ns=(member.mtime_ns, member.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _link(self, path: bytes, target: bytes) -> None:
        target_folder, _, target_name = target.rpartition(b"/")
        folder, _, name = path.rpartition(b"/")
        source = os.dup(self._folders.descriptor(target_folder))
        try:
            parent = self._folders.descriptor(folder)
            with contextlib.suppress(FileNotFoundError):  # a link to a device that was left out
                os.link(target_name, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(source)

    def _finish_folder(self, path: bytes, node: Node, xattrs: str | None) -> None:
        member = node.member
        descriptor = self._folders.descriptor(path)
        if os.geteuid() == 0:
            os.fchown(descriptor, member.uid, member.gid)
        self._progress.lost_xattrs += extract.set_xattrs(descriptor, self._kept_xattrs(xattrs))
        os.fchmod(descriptor, self._mode(node))
        os.utime(descriptor, ns=(member.mtime_ns, member.mtime_ns))


async def _from_thread(blocks: Iterator[list[_Source]]) -> AsyncIterator[_Source]:
    """Makes each block in a thread, while the workers do what came of those before."""
    while (block := await trio.to_thread.run_sync(next, blocks, None)) is not None:
        for source in block:
            yield source


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder else name


def _disinherit(folder: Path) -> None:
    """Takes from a new folder what its parent passes on: the group, the setgid bit and access control lists."""
    os.chown(folder, os.geteuid(), os.getegid())
    for name in ("system.posix_acl_access", "system.posix_acl_default"):
        with contextlib.suppress(OSError):
            os.removexattr(folder, name)
    folder.chmod(0o700)


def _remove_tree(path: Path) -> None:
    if os.geteuid() != 0:  # folders that are finished may be closed to their owner
        subprocess.run(["chmod", "-R", "u+rwX", "--", str(path)], stderr=subprocess.DEVNULL, check=False)
    # rm walks any depth with descriptors; shutil.rmtree recurses, and gives up at 1,000 levels.
    subprocess.run(["rm", "-rf", "--one-file-system", "--", str(path)], check=False)
