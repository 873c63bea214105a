"""Processes that we start and that do not outlive us, not even where we are killed and can tell them nothing.

Their standard input is a pipe of which only this process has the other end, so that it ends when this process does.
They are started through this module, which then sends them SIGTERM: training writes a checkpoint and ends.

    python -m dspark_jax.attached MODULE ARGUMENTS
"""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from dspark_jax.interrupt import INTERRUPTED

STATUS = 128 + signal.SIGTERM
"""With which a process ends that was told to, so that whoever started it can tell that it is to be started again."""

_COMMAND = [sys.executable, "-m", "dspark_jax.attached"]


@contextlib.contextmanager
def _leash() -> Iterator[int]:
    """The end of a pipe that is to be the standard input of a process."""
    theirs, ours = os.pipe()  # not inherited by other processes
    try:
        yield theirs
    finally:
        os.close(theirs)
        os.close(ours)


def run_quietly(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs `python -m ARGUMENTS` with `environment` added to ours; its output is in the result."""
    with _leash() as stdin:
        return subprocess.run(
            [*_COMMAND, *arguments],
            env={**os.environ, **environment},
            stdin=stdin,
            capture_output=True,
            text=True,
            check=False,
        )


def run_module(arguments: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Runs `python -m ARGUMENTS`, showing its output; returns its last words if it failed.

    When this process is told to stop, so is that one, and it is waited for: it may be writing a checkpoint.

    Raises:
      KeyboardInterrupt: it was interrupted.
      SystemExit: it was told to stop.
    """
    last: deque[str] = deque(maxlen=50)
    with _leash() as stdin:
        process = subprocess.Popen(
            [*_COMMAND, *arguments],
            env={**os.environ, **environment},
            stdin=stdin,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line != INTERRUPTED:  # which this process says itself
                    sys.stderr.write(line)
                last.append(line.strip())
            status = process.wait()
        finally:
            if process.poll() is None:  # we are leaving early: nobody else would stop it
                _stop(process)
    if status in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if status in (STATUS, -signal.SIGTERM):
        raise SystemExit(STATUS)
    if not status:
        return None
    said = [line for line in last if line]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    if status < 0:
        return f"killed by signal {-status}, perhaps for its memory ({arguments[0]})"
    reason = errors[-1] if errors else said[-1] if said else "no message"
    return f"{reason} ({arguments[0]}, status {status})"


def _stop(process: subprocess.Popen[str]) -> None:
    """Tells a process to stop and waits until it has; who is told to stop a second time does not wait any more."""
    process.terminate()
    try:
        said = process.communicate()[1]
    except BaseException:
        process.kill()
        raise
    sys.stderr.write(said)


def main() -> None:
    """Runs the module that the command line names, as `python -m` would."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _stop_with_parent() -> None:
    while os.read(0, 1):
        pass
    with open(os.devnull, "wb") as nowhere:  # who read these is gone: the next line would end us before the checkpoint
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
