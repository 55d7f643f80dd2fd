"""The paths of tar members: which are refused, and how the others are written the one way that Entry has."""

from functools import lru_cache

from fsmount.archive.header import Malformed

#: Linux's NAME_MAX, and PATH_MAX less its NUL: nothing longer can be unpacked, looked up or linked to.
MAX_NAME = 255
MAX_PATH = 4095

#: What no file can be called: a path that ends so is a directory's.
NO_NAMES = (b"", b".", b"..")


def clean_path(path: bytes) -> bytes:
    """`path` without leading, trailing and double slashes and `.` components; b"" is the root.

    Raises: Malformed if it has a `..` component, or is longer than Linux can name.
    """
    directory, _, name = path.rstrip(b"/").rpartition(b"/")
    if len(path) > MAX_PATH or len(name) > MAX_NAME:
        raise Malformed(f"expected a path of at most {MAX_PATH} bytes, its components of at most {MAX_NAME}")
    if name in NO_NAMES:
        return clean_directory(path)[:-1]
    return clean_directory(directory) + name


@lru_cache(maxsize=1024)
def clean_directory(path: bytes) -> bytes:
    """The same, with a trailing slash unless it is the root. Members come grouped by directory, hence the cache."""
    parts = [part for part in path.split(b"/") if part and part != b"."]
    if b".." in parts:
        raise Malformed("expected a path without .. components")
    if max(map(len, parts), default=0) > MAX_NAME:
        raise Malformed(f"expected a path with components of at most {MAX_NAME} bytes")
    return b"".join([part + b"/" for part in parts])
