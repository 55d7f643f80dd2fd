"""The inflate of zlib-ng or zlib, called natively: it alone says at which bit of its input a deflate block ended.

Python's zlib modules do not give that away, so this calls the C functions by ctypes, which releases the GIL: those
of zlib-ng, which are in the library of its Python package, else those of the system's libz, at half the speed.
"""

import contextlib
import ctypes
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from fsmount.archive.span import WINDOW_SIZE
from fsmount.errors import Unsupported

#: What `Inflater.inflate` yields at most in one call.
MAX_OUTPUT = 256 * 1024

# zlib.h: one gzip member with a window of 32 KiB, flushes, results, and the flags in data_type after an inflate.
_GZIP = 16 + 15
_NO_FLUSH, _BLOCK = 0, 5
_OK, _STREAM_END, _MEM_ERROR, _BUF_ERROR = 0, 1, -4, -5
_BITS, _LAST_BLOCK, _BOUNDARY = 7, 64, 128

#: What z_stream and zng_stream have in common. The size_t of the latter is as wide as a long on Linux.
_COMMON: list[tuple[str, Any]] = [
    ("next_in", ctypes.c_void_p),
    ("avail_in", ctypes.c_uint),
    ("total_in", ctypes.c_ulong),
    ("next_out", ctypes.c_void_p),
    ("avail_out", ctypes.c_uint),
    ("total_out", ctypes.c_ulong),
    ("msg", ctypes.c_char_p),
    ("state", ctypes.c_void_p),
    ("zalloc", ctypes.c_void_p),
    ("zfree", ctypes.c_void_p),
    ("opaque", ctypes.c_void_p),
    ("data_type", ctypes.c_int),
]


class _ZngStream(ctypes.Structure):
    _fields_ = (*_COMMON, ("adler", ctypes.c_uint32), ("reserved", ctypes.c_ulong))


class _ZStream(ctypes.Structure):
    _fields_ = (*_COMMON, ("adler", ctypes.c_ulong), ("reserved", ctypes.c_ulong))


@dataclass(frozen=True, slots=True)
class Library:
    """The functions of one loaded library. All but `init` take and return what zlib.h says of them."""

    name: str
    stream: type[_ZngStream] | type[_ZStream]
    init: Callable[[Any, int], int]
    inflate: Callable[[Any, int], int]
    reset: Callable[[Any], int]
    get_dictionary: Callable[[Any, Any, Any], int]
    end: Callable[[Any], int]


def load_zlib_ng() -> Library:
    """Raises: ImportError, OSError, AttributeError: it is not to be had here."""
    from zlib_ng import zlib_ng

    native = ctypes.CDLL(zlib_ng.__file__)
    init = _function(native.zng_inflateInit2, ctypes.c_int)
    return _library("zlib-ng", native, "zng_", _ZngStream, init)


def load_libz() -> Library:
    """Raises: OSError, AttributeError: it is not to be had here."""
    native = ctypes.CDLL("libz.so.1")
    native.zlibVersion.restype = ctypes.c_char_p
    version, size = native.zlibVersion(), ctypes.sizeof(_ZStream)
    init_ = _function(native.inflateInit2_, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
    return _library("libz", native, "", _ZStream, lambda stream, wbits: init_(stream, wbits, version, size))


def _library(
    name: str,
    native: ctypes.CDLL,
    prefix: str,
    stream: type[_ZngStream] | type[_ZStream],
    init: Callable[[Any, int], int],
) -> Library:
    return Library(
        name,
        stream,
        init,
        inflate=_function(native[f"{prefix}inflate"], ctypes.c_int),
        reset=_function(native[f"{prefix}inflateReset"]),
        get_dictionary=_function(
            native[f"{prefix}inflateGetDictionary"], ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint)
        ),
        end=_function(native[f"{prefix}inflateEnd"]),
    )


def _function(function: Any, *arguments: Any) -> Callable[..., int]:
    """A function whose first argument is a stream."""
    function.argtypes = (ctypes.c_void_p, *arguments)
    function.restype = ctypes.c_int
    result: Callable[..., int] = function
    return result


@cache
def library() -> Library | None:
    """What an Inflater uses here; None when there is nothing, and so no restart points can be recorded."""
    for load in (load_zlib_ng, load_libz):
        with contextlib.suppress(ImportError, OSError, AttributeError):
            return load()
    return None


class Inflater:
    """Inflates gzip members one after the other, and can stop where a block ends.

    Its calls may come from several threads, and then wait for each other.
    Ownership: it keeps the data given last until it is given more, and its native memory until `close`, or until
    nobody refers to it.
    """

    def __init__(self) -> None:
        """Raises: Unsupported (there is neither zlib-ng nor libz); MemoryError."""
        self._library: Library | None = None  # until there is something to free
        used = library()
        if used is None:
            raise Unsupported("neither zlib-ng nor libz can be called here: expected one of them")
        self._lock = threading.Lock()
        self._stream = used.stream()
        self._reference = ctypes.addressof(self._stream)
        # The output's memory cannot move: an array of ctypes, other than a bytearray, has one size for ever.
        self._output = ctypes.create_string_buffer(MAX_OUTPUT)
        self._output_at = ctypes.addressof(self._output)
        self._data = b""
        self._ended = False
        if (status := used.init(self._reference, _GZIP)) != _OK:
            raise MemoryError(f"inflateInit2 of {used.name} answers {status}")
        self._library = used

    def give(self, data: bytes, start: int = 0) -> None:
        """Replaces what is left of the data given before by `data` from `start` on."""
        if not isinstance(data, bytes):
            raise TypeError("expected bytes: other buffers may move or change while they are read")
        if not 0 <= start <= len(data) < 2**32:
            raise ValueError(f"expected a start within less than 4 GiB, not {start} of {len(data)}")
        with self._lock:
            self._data = data
            # A bytes object does not move; the reference just stored keeps it.
            address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
            assert address is not None
            self._stream.next_in = address + start
            self._stream.avail_in = len(data) - start

    @property
    def left(self) -> int:
        """How many of the bytes given have not been read yet."""
        return int(self._stream.avail_in)

    @property
    def ended(self) -> bool:
        """Whether the member is complete, its checksum and length right."""
        return self._ended

    @property
    def boundary(self) -> int | None:
        """Where the last call of `inflate` stopped: None if no block begins there.

        Else how many high bits, 0 to 7, of the byte read last belong to the block. After a member's header one
        begins as well; after its last block none.
        """
        kind = int(self._stream.data_type)
        return kind & _BITS if kind & _BOUNDARY and not kind & _LAST_BLOCK else None

    def inflate(self, max_output: int, *, stop_at_boundary: bool = False) -> bytes:
        """The next bytes, as many as the data gives, but at most `max_output` (and 256 KiB).

        Fewer than that many come when more data is needed, when the member has ended, or, if wanted, at the next
        boundary. With max_output 0 all is passed that inflates to nothing.
        Raises: zlib.error (the member is broken; then only `close` is left); MemoryError.
        """
        with self._lock:
            native = self._library
            if native is None or self._ended:
                raise RuntimeError("the inflater is closed, or its member has ended: reset it first")
            stream = self._stream
            room = max(0, min(max_output, MAX_OUTPUT))  # never more than the memory there is
            stream.next_out = self._output_at
            stream.avail_out = room
            status = native.inflate(self._reference, _BLOCK if stop_at_boundary else _NO_FLUSH)
            if status == _STREAM_END:
                self._ended = True
            elif status not in (_OK, _BUF_ERROR):  # the latter: nothing to read, or no room
                self._fail(status)
            return ctypes.string_at(self._output_at, room - stream.avail_out)

    def _fail(self, status: int) -> None:
        if status == _MEM_ERROR:
            raise MemoryError("no memory for inflating")
        message = self._stream.msg or b""
        raise zlib.error(message.decode("ascii", "replace") or f"inflate answers {status}")

    def window(self) -> bytes:
        """The last 32 KiB that the member inflated to, or all of it if that is less."""
        with self._lock:
            if self._library is None:
                raise RuntimeError("the inflater is closed")
            window = ctypes.create_string_buffer(WINDOW_SIZE)
            size = ctypes.c_uint()
            self._library.get_dictionary(self._reference, window, ctypes.byref(size))
            return window.raw[: size.value]

    def reset(self) -> None:
        """Begins the next member with the data that is left."""
        with self._lock:
            if self._library is None:
                raise RuntimeError("the inflater is closed")
            self._library.reset(self._reference)
            self._ended = False

    def close(self) -> None:
        """Frees the native memory. May be called again."""
        with self._lock:
            used, self._library = self._library, None
            if used is not None:
                used.end(self._reference)
            self._data = b""
            self._stream.avail_in = 0

    def __del__(self) -> None:
        if self._library is not None:
            self.close()
