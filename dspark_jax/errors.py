"""The one kind of error that is the user's to mend; programs print it as one line and end with status 2."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

from dspark_jax import interrupt


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, where, the value, the remedy."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
"""Numbers of errors that say that a path cannot be written, whatever room there is."""


def as_os_error(error: Exception, path: str | os.PathLike[str]) -> OSError | None:
    """The error of the operating system that a writer in another language reports as text; None if it is another."""
    for number in (*_FULL, *UNWRITABLE):
        if os.strerror(number) in str(error):
            return OSError(number, os.strerror(number), str(path))
    return None


def is_full_disk(error: Exception) -> bool:
    """Whether an error says that the disk is full: by its number, or, as writers in other languages do, in its text."""
    return getattr(error, "errno", None) in _FULL or any(os.strerror(number) in str(error) for number in _FULL)


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Turns what the user can mend into one line on stderr, `error: ...`, and status 2; Ctrl-C into one and 130.

    That is `InputError`, and of the operating system's errors a full disk and a file that may not be used.
    """
    try:
        with interrupt.interruptible():
            yield
    except InputError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from error
    except OSError as error:
        if error.errno not in _FULL + _FORBIDDEN:
            raise
        remedy = "free space and run again" if error.errno in _FULL else "change its permissions, or use another place"
        print(f"error: {error.filename or 'a file'}: {error.strerror}; {remedy}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise SystemExit(interrupt.STATUS) from error
