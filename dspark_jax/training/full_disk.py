"""One clear line when a checkpoint does not fit on the disk."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from dspark_jax.config import InputError
from dspark_jax.errors import is_full_disk


def check_space(directory: Path, state: Any) -> None:
    """Refuses to start a save for which there is no room.

    Args:
      directory: of the checkpoints.
      state: pytree of arrays that are going to be written.

    Raises:
      InputError: less is free than the arrays take.
    """
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(directory).free
    if free < needed:
        cause = f"a checkpoint takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free"
        raise InputError(_line(directory, f"the disk is full, {cause}"))


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


def _line(directory: Path, cause: str) -> str:
    complete = sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())
    kept = f"the checkpoint of step {complete[-1]} is intact" if complete else "there is no earlier checkpoint"
    return f"{directory}: {cause}; {kept}; free space and run again"
