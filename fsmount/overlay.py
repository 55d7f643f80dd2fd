"""Overlay: the merging of layers into one tree, by the rules of the image specification, which nothing else knows."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fsmount.archive.entry import EntryType
from fsmount.errors import Invalid
from fsmount.index import EXPLICIT, GHOST, IMPLIED_DIRECTORY, ROOT, LayerIndex, Member, Name

#: How many hardlinks into lower layers may follow each other before it is a loop.
_LINK_DEPTH = 40


class Undecided(Exception):
    """The answer depends on what has not streamed yet of the layer at `position`."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


class Node(NamedTuple):
    """One name of a merged tree. `layer` is a position in the image, 0 the lowest; `member` is of that layer.

    (layer, member) of a directory is the topmost layer that has it and its number there: it names the
    directory within the tree, and is known as soon as it is found.
    """

    name: bytes
    layer: int
    member: Member

    @property
    def is_directory(self) -> bool:
        return self.member.type is EntryType.DIRECTORY


#: Where a merged directory lies: (position, directory number) of each layer that contributes, topmost first.
#: The number _UNDECIDED stands for "from this layer down, wait".
Stack = tuple[tuple[int, int], ...]

_UNDECIDED = -1


class Overlay:
    """Answers for the merged tree straight from the layers' indexes, also while some are streaming.

    The rules (image-spec layer.md; docs/semantics.md says where tools differ): an upper entry hides a lower
    one of the same name unless both are directories; whiteouts and opaque markers hide what is below their
    layer; a directory takes its attributes from the topmost layer that has it as a member; a directory
    replaces a lower symlink of that name rather than being resolved through it.

    While a layer streams, what it has shown is believed, and whatever it might still change is Undecided.
    """

    def __init__(self, index_at: Callable[[int], LayerIndex | None], layers: int) -> None:
        """index_at: the index of the layer at a position, as far as it is known now."""
        self._index_at = index_at
        self._top = layers - 1

    def root(self) -> tuple[Node, Stack]:
        """The root, which always exists; its attributes may still change while a layer streams."""
        return self._root(self._top)

    def _root(self, top: int) -> tuple[Node, Stack]:
        parts: list[tuple[int, int]] = []
        explicit: Member | None = None
        for position in range(top, -1, -1):
            index = self._index_at(position)
            if index is None:
                parts.append((position, _UNDECIDED))
                break
            root = index.root()
            parts.append((position, ROOT))
            if root.origin == EXPLICIT:
                explicit = explicit or root.member
            if not index.complete:
                parts.append((position, _UNDECIDED))
                break
            if root.opaque:
                break
        return Node(b"", max(top, 0), (explicit or IMPLIED_DIRECTORY)._replace(number=ROOT)), tuple(parts)

    def lookup(self, stack: Stack, name: bytes) -> tuple[Node, Stack] | None:
        """A name in a merged directory; None if the tree does not have it. Raises: Undecided, Invalid."""
        return self._combine(name, self._candidates(stack, name), _LINK_DEPTH)

    def xattrs(self, stack: Stack) -> str | None:
        """Those of a merged directory, as an index keeps them: of the topmost layer that describes it."""
        for position, number in stack:
            index = self._known(position, number)
            if index.origin(number) == EXPLICIT:
                return index.packed_xattrs(number)
        return None

    def walk(self, path: Sequence[bytes]) -> tuple[Node, Stack] | None:
        """The node at a path of names. Raises: Undecided, Invalid."""
        node, stack = self._root(self._top)
        for name in path:
            found = self.lookup(stack, name) if node.is_directory else None
            if found is None:
                return None
            node, stack = found
        return node, stack

    def children(self, stack: Stack) -> Iterator[tuple[Node, Stack]]:
        """Every name of a merged directory, sorted. Raises: Undecided, Invalid."""
        parts: list[tuple[int, dict[bytes, Name], set[bytes]]] = []
        for position, number in stack:
            index = self._known(position, number)
            if not index.complete:
                raise Undecided(position)
            parts.append((position, dict(index.names(number)), index.whiteouts(number)))
        if len(parts) == 1:
            yield from self._sole(*parts[0])
            return
        every: set[bytes] = set()
        for _, names, _ in parts:
            every.update(names)
        for name in sorted(every):
            candidates = ((position, names.get(name), name in hidden) for position, names, hidden in parts)
            found = self._combine(name, candidates, _LINK_DEPTH)
            if found is not None:
                yield found

    def _sole(
        self, position: int, names: dict[bytes, Name], hidden: set[bytes]
    ) -> Iterator[tuple[Node, Stack]]:
        """The children of a directory that one layer alone contributes to, as most are; names come sorted."""
        for name, found in names.items():
            member = found.member
            if member is not None and member.type is not EntryType.DIRECTORY:
                yield Node(name, position, member), ()
            elif member is not None and found.origin == EXPLICIT:
                yield Node(name, position, member), ((position, member.number),)
            else:
                combined = self._combine(name, iter([(position, found, name in hidden)]), _LINK_DEPTH)
                if combined is not None:
                    yield combined

    def _known(self, position: int, number: int) -> LayerIndex:
        index = self._index_at(position)
        if index is None or number == _UNDECIDED:
            raise Undecided(position)
        return index

    def _candidates(
        self, stack: Stack, name: bytes, *, below: int | None = None
    ) -> Iterator[tuple[int, Name | None, bool]]:
        """What each layer has under a name; of the layer `below`, only what it removes from those below it."""
        for position, number in stack:
            index = self._known(position, number)
            found = index.name(number, name)
            if not index.complete and (found is None or position == below):
                raise Undecided(position)
            if position == below and found is not None:
                # Its folders still lead to the whiteouts in them.
                found = found._replace(origin=GHOST) if found.origin is not None else None
            yield position, found, index.whiteout(number, name)

    def _combine(
        self, name: bytes, candidates: Iterator[tuple[int, Name | None, bool]], links: int
    ) -> tuple[Node, Stack] | None:
        """Decides one name from what each layer has under it and whether the layer removes it, topmost first."""
        real: tuple[int, int] | None = (
            None  # the topmost layer that has it as a directory, and its number there
        )
        explicit: Member | None = None  # the topmost member that describes that directory
        parts: list[tuple[int, int]] = []
        closed = False
        while True:
            try:
                position, found, removed = next(candidates)
            except StopIteration:
                break
            except Undecided as undecided:
                if real is None or explicit is None:
                    raise
                if not closed:
                    parts.append((undecided.position, _UNDECIDED))
                break
            if found is not None:
                member = found.member
                if member is None or member.type is not EntryType.DIRECTORY:
                    if real is not None:
                        break
                    if member is None:
                        return self._link(name, found.link, position, links), ()
                    return Node(name, position, member), ()
                if not closed:
                    parts.append((position, member.number))
                if found.origin != GHOST:
                    real = real or (position, member.number)
                if found.origin == EXPLICIT:
                    explicit = explicit or member
                closed = closed or found.opaque
                index = self._index_at(position)
                if index is None or not index.complete:
                    # It may yet turn out to be opaque, or to be removed from the layers below.
                    if real is None or explicit is None:
                        raise Undecided(position)
                    parts.append((position, _UNDECIDED))
                    break
            if removed:
                break
        if real is None:
            return None
        layer, number = real
        return Node(name, layer, (explicit or IMPLIED_DIRECTORY)._replace(number=number)), tuple(parts)

    def _link(self, name: bytes, target: bytes | None, position: int, links: int) -> Node:
        """A hardlink whose target its own layer did not have at that point: it is what the layers below have there."""
        assert target is not None
        found: tuple[Node, Stack] | None = self._root(position)
        for part in target.split(b"/") if links else ():
            if found is not None and found[0].is_directory:
                found = self._combine(part, self._candidates(found[1], part, below=position), links - 1)
            else:
                found = None
        if found is None or found[0].is_directory:
            shown = [text.decode("utf-8", "backslashreplace") for text in (name, target)]
            raise Invalid(f"the hardlink {shown[0]!r} leads to {shown[1]!r}, which is no file of the image")
        return Node(name, found[0].layer, found[0].member)
