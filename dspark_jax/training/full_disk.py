"""One clear line when a checkpoint does not fit on the disk, or cannot be written where it belongs."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from dspark_jax.config import InputError
from dspark_jax.errors import is_full_disk


def check_space(directory: Path, state: Any) -> None:
    """Refuses to start a save for which there is no room, or where no directory can be made.

    Orbax would find out about the directory too late: threads that wait for it hold the process for five minutes.

    Args:
      directory: of the checkpoints.
      state: pytree of arrays that are going to be written.

    Raises:
      InputError: less is free than the arrays take, or the directory cannot be written in.
    """
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(directory).free
    if free < needed:
        cause = f"a checkpoint takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free"
        raise InputError(_line(directory, f"the disk is full, {cause}"))
    try:
        with reported_in_one_line(directory):
            tempfile.TemporaryDirectory(dir=directory, prefix="probe.").cleanup()
    except OSError as error:
        raise InputError(_line(directory, f"cannot be written in ({error.strerror})", _FORBIDDEN)) from error


@contextlib.contextmanager
def reported_in_one_line(directory: Path) -> Iterator[None]:
    """Turns the failure of a save for lack of space, whenever it shows, into an InputError.

    What the failed save has written is removed; earlier checkpoints are complete.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        # The writer reports operating system errors as text, in whichever of these types fits its status code.
        if not is_full_disk(error):
            raise
        _remove_partial(directory)
        raise InputError(_line(directory, "the disk is full, a checkpoint could not be written")) from error


def _remove_partial(directory: Path) -> None:
    """Removes what is half-written, again while other threads still write into it: they fail when it is gone."""
    for _ in range(50):
        for partial in directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)
        time.sleep(0.2)
        if not any(directory.glob("*.orbax-checkpoint-tmp*")):
            return


_FORBIDDEN = "change its permissions, or copy the run to another place, and run again"


def _line(directory: Path, cause: str, remedy: str = "free space and run again") -> str:
    complete = sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())
    kept = f"the checkpoint of step {complete[-1]} is intact" if complete else "there is no earlier checkpoint"
    return f"{directory}: {cause}; {kept}; {remedy}"
