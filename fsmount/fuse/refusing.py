"""Refusing: the handlers of a process that does nothing, because every other has died: each request fails, and soon."""

from typing import NoReturn

from fsmount.archive.paths import MAX_NAME
from fsmount.errors import FsmountError
from fsmount.fuse.protocol import pack_statfs


class Refusing:
    """A file system that answers EIO."""

    def lookup(self, parent: int, name: bytes) -> NoReturn:
        self._refuse()

    def getattr(self, inode: int) -> NoReturn:
        self._refuse()

    def readlink(self, inode: int) -> NoReturn:
        self._refuse()

    def read(self, inode: int, offset: int, size: int) -> NoReturn:
        self._refuse()

    def readdir(self, inode: int, after: int, size: int, *, plus: bool) -> NoReturn:
        self._refuse()

    def statfs(self) -> bytes:
        return pack_statfs(block_size=4096, name_max=MAX_NAME)

    def _refuse(self) -> NoReturn:
        raise FsmountError(
            "nothing is served: the processes that served this mount have died, one after another"
        )
