"""The sizes of flat batches that are compiled for a round, one of which it takes (`round._verify`).

Under a scheduler that admits few drafts, or where slots are empty, G + 1 rows for everybody would be computed in vain.
So a round has a few sizes to choose from, on the device, after it has been scheduled. Every size is a copy of the
target in the program, which takes its time to compile; hence a short ladder.
"""

from collections.abc import Sequence

from dspark_jax.engine import arguments
from dspark_jax.engine.schedulers import Scheduler
from dspark_jax.sharding import parts_of

RUNGS = 3
"""Sizes below the full one: its half, quarter and eighth. An eighth of 8 rows is a request's anchor alone."""


def verified_sizes(
    wanted: Sequence[int] | None, scheduler: Scheduler, batch: int, rows: int, *, slots_may_be_empty: bool = False
) -> tuple[int, ...]:
    """Sizes of flat verification [tokens], rising, each below the `batch` * `rows` that a round has at most.

    Args:
      wanted: those of the caller, or None to choose; an empty sequence is none.
      scheduler: one that admits all drafts leaves nothing to choose.
      batch: requests decoded together.
      rows: G + 1.
      slots_may_be_empty: some of the batch are no requests for a while.

    Raises:
      InputError: something else than integers from 1.
    """
    most = batch * rows
    if wanted is None:
        chosen = ladder_below(most) if scheduler.selects or (slots_may_be_empty and batch > 1) else ()
        # Every device of a mesh computes a flat batch whole, and of the full one its own requests' rows.
        each = most if batch == 1 else most // parts_of("batch")
        return tuple(size for size in chosen if size < each)
    return tuple(sorted({size for size in arguments.sizes("verify_sizes", wanted) if size < most}))


def ladder_below(most: int) -> tuple[int, ...]:
    """Half, quarter and eighth of `most`, rounded up: rising, each once."""
    return tuple(sorted({-(-most >> power) for power in range(1, RUNGS + 1)} - {most}))
