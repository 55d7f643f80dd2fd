"""Every failure fsmount can name, with the errno the mount answers and the exit code the command ends with.

    FsmountError            EIO           1   anything below, for `except`
    ├── UsageError          EINVAL        2   a malformed reference, digest, name or configuration
    ├── NotRunning          ENOTCONN      3   nothing is mounted there
    ├── NotFound            ENOENT        4   the source says: no such tag, repository, platform, path
    ├── AccessDenied        EACCES        5   401, 403, or no credentials
    ├── Unreachable         EHOSTUNREACH  6   no answer from the source; transient
    │   ├── DeadlineExpired ETIMEDOUT     6   an answer that took too long; transient
    │   └── RateLimited     EAGAIN        6   429; transient
    ├── Corrupt             EBADMSG       7   bytes that are not what their digest promised
    │   └── Invalid         EBADMSG       1   bytes that are what was promised, and break the format
    ├── Unsupported         EOPNOTSUPP    1   a form fsmount knows and refuses (schema 1, encrypted, xz)
    ├── NoSpace             ENOSPC        8   the disk or the cache is full
    ├── Busy                EBUSY         1   another process has locked a file of the cache for long; transient
    └── Refused             EPERM         9   would overwrite, escape or endanger something

Foreign exceptions stop at the package that owns their library and leave it as one of these.
"""

import errno


class FsmountError(Exception):
    """The root. `str()` is a complete sentence: what, which, and what to do when `remedy` is given.

    Never put a secret, or a URL with its query, into a message.
    """

    errno = errno.EIO
    exit_code = 1
    #: Whether trying the same again later may succeed.
    transient = False

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class UsageError(FsmountError):
    """What the user wrote cannot be understood."""

    errno = errno.EINVAL
    exit_code = 2


class NotRunning(FsmountError):
    """No fsmount serves this mount point."""

    errno = errno.ENOTCONN
    exit_code = 3


class NotFound(FsmountError):
    """The authoritative source says that it does not exist."""

    errno = errno.ENOENT
    exit_code = 4


class AccessDenied(FsmountError):
    """The source knows who asks, or does not, and says no."""

    errno = errno.EACCES
    exit_code = 5


class Unreachable(FsmountError):
    """The source gave no usable answer; what is cached goes on being served."""

    errno = errno.EHOSTUNREACH
    exit_code = 6
    transient = True


class DeadlineExpired(Unreachable):
    """The source, or the disk, took longer than allowed."""

    errno = errno.ETIMEDOUT


class RateLimited(Unreachable):
    """The source asks to slow down (HTTP 429)."""

    errno = errno.EAGAIN


class Corrupt(FsmountError):
    """The bytes received are not those that the digest names."""

    errno = errno.EBADMSG
    exit_code = 7


class Invalid(Corrupt):
    """The bytes are those that the digest names, and are no valid instance of their format."""

    exit_code = 1


class Unsupported(FsmountError):
    """A format that is known and deliberately not read."""

    errno = errno.EOPNOTSUPP


class NoSpace(FsmountError):
    """The disk is full, and the request cannot be met without it."""

    errno = errno.ENOSPC
    exit_code = 8


class Busy(FsmountError):
    """Another process is in the middle of changing what would have to be changed."""

    errno = errno.EBUSY
    transient = True


class Refused(FsmountError):
    """Doing it would overwrite, escape or endanger something."""

    errno = errno.EPERM
    exit_code = 9
