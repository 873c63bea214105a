"""The one kind of error that is the user's to mend; programs print it as one line and end with status 2."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator

from dspark_jax import interrupt
from dspark_jax.shown_paths import as_given


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, where, the value, the remedy."""


class Unsupported(InputError):
    """A model of a known family that uses what has no implementation here; `what` names it."""

    def __init__(self, where: str, what: str, remedy: str):
        super().__init__(f"{where}: {what} is not supported; {remedy}")
        self.what = what


class HostLost(Exception):
    """Another host of this run is gone: nobody's mistake, and the same command goes on with what is there.

    A command then ends with `AGAIN`, so that whoever started it can tell this from bad input.
    """


AGAIN = os.EX_TEMPFAIL

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_MISPLACED = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG)
_REMEDIES = {
    _FULL: "free space and run again",
    _FORBIDDEN: "change its permissions, or use another place",
    _MISPLACED: "put back what belongs there, or use another place",
}


UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
"""Numbers of errors that say that a path cannot be written, whatever room there is."""


def as_os_error(error: Exception, path: str | os.PathLike[str]) -> OSError | None:
    """The error of the operating system that a writer in another language reports as text; None if it is another."""
    stated = re.search(r"\(os error (\d+)\)", str(error))  # so Rust writes them
    named = [number for number in (*_FULL, *UNWRITABLE) if os.strerror(number) in str(error)]
    numbers = [int(stated[1])] if stated else named
    return OSError(numbers[0], os.strerror(numbers[0]), str(path)) if numbers else None


def is_full_disk(error: Exception) -> bool:
    """Whether an error says that the disk is full: by its number, or, as writers in other languages do, in its text."""
    return getattr(error, "errno", None) in _FULL or any(os.strerror(number) in str(error) for number in _FULL)


_ON_CHIP = ("Shared memory size limit exceeded", "memory space vmem")
"""What the compilers for GPUs and TPUs say of a kernel that does not fit, in an error of the same kind."""

_WITHOUT_KERNELS = (
    "set DSPARK_JAX_WITHOUT=pallas_gpu (on a TPU pallas_tpu) to go without all kernels, or run "
    "python -m dspark_jax.kernels with this config, which names the one"
)

_SMALLER = (
    "lower train.batch_size, eval.batch_size or data.decode_batch_size, use more devices, or train with "
    "train.recompute=layers"
)


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Turns what the user can mend into one line on stderr, `error: ...`, and status 2; Ctrl-C into one and 130.

    A host that is gone is one line as well, and status 75.

    That is `InputError`; memory that does not suffice, a device's or the host's; and of the operating system's errors a
    full disk, a file that may not be used, and a path at which something else is than should be.
    """
    try:
        with interrupt.interruptible():
            yield
    except InputError as error:
        print("error: " + as_given(" ".join(str(error).split())), file=sys.stderr)
        raise SystemExit(2) from error
    except HostLost as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(AGAIN) from error
    except OSError as error:
        known = [remedy for numbers, remedy in _REMEDIES.items() if error.errno in numbers]
        if not known or (error.errno in _MISPLACED and error.filename is None):
            raise
        print(f"error: {as_given(str(error.filename or 'a file'))}: {error.strerror}; {known[0]}", file=sys.stderr)
        raise SystemExit(2) from error
    except (MemoryError, RuntimeError) as error:
        device = "RESOURCE_EXHAUSTED" in str(error)  # as JAX begins the message of its own kind of RuntimeError
        if not (device or isinstance(error, MemoryError)):
            raise
        why = str(error).split("\n")[0][:200] or "no message"
        what, remedy = f"the memory of {'a device' if device else 'this machine'} is full", _SMALLER
        if device and any(sign in str(error) for sign in _ON_CHIP):
            what, remedy = "a kernel takes more memory than there is on the chip", _WITHOUT_KERNELS
        print(f"error: {what} ({why}); {remedy}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        print(interrupt.INTERRUPTED, end="", file=sys.stderr)
        raise SystemExit(interrupt.STATUS) from error
