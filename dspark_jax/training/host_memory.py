"""Host memory between compiling and running."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Gives memory that was freed, but is kept by the C library, back to the operating system.

    Compiling a train step leaves several hundred MB of it behind. Array buffers are mapped on their own and cannot use
    it, so without this it stays in the process for as long as training runs. Does nothing where there is no glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
