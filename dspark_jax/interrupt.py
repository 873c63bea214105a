"""Ctrl-C in a command: one line and status 130, whatever is under way.

A command needs seconds for its imports, in which Python would answer with a traceback. Afterwards JAX waits for
compilations in such a way that they can be interrupted, but they go on in threads of its own: the end of the
interpreter destroys JAX's client, waits for the compilation, and crashes when its last step uses what is destroyed. So
an interrupted command first undoes what it has begun (`with`, `finally`), and then ends the process itself.

That holds for processes that were started as `python -m dspark_jax.SOMETHING`; elsewhere nothing is changed.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

STATUS = 128 + signal.SIGINT
INTERRUPTED = "interrupted\n"
"""What an interrupted command says."""


def leave(number: int = signal.SIGINT, frame: FrameType | None = None) -> NoReturn:
    """Ends the process: no thread is waited for, no function of `atexit` runs. Also a handler of signals."""
    # Not through sys.stderr: a signal may come while something is written to it, and it takes no second writer then.
    os.write(2, INTERRUPTED.encode())
    os._exit(STATUS)


def guard_imports() -> None:
    """From here on Ctrl-C ends the process at once, if it is one of a command whose modules are being imported."""
    # Python's own words for "the module is still being looked for": its package is imported at that time.
    if sys.argv[:1] != ["-m"] or not _names_ours(sys.orig_argv):
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored: nohup, `&` in a script
        signal.signal(signal.SIGINT, leave)


def _names_ours(arguments: list[str]) -> bool:
    """Whether a command line of Python says `-m dspark_jax.SOMETHING`."""
    module = arguments[arguments.index("-m") + 1] if "-m" in arguments[:-1] else ""
    return module.partition(".")[0] == __package__


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within it Ctrl-C raises `KeyboardInterrupt`, and the process ends when that has come out; a second one ends it.

    Does nothing in a process that `guard_imports` has left alone.
    """
    if signal.getsignal(signal.SIGINT) is not leave:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, leave)
        raise KeyboardInterrupt

    def unraisable(event: Any) -> None:
        if not isinstance(event.exc_value, KeyboardInterrupt):
            return hook(event)
        # It was raised where Python drops errors, e.g. in JAX's function for garbage collections: once more, then.
        signal.signal(signal.SIGINT, interrupt)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BaseException:  # libraries make other errors of a KeyboardInterrupt, `ImportError` for one
        if signal.getsignal(signal.SIGINT) is leave:
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                sys.stdout.flush()
            leave()
        raise
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, leave)
