"""Round times of accelerators that were measured and come with the package, in `costs/`.

A file says what was measured on which device with which versions, for which drafters, and what it says nothing about.
A further accelerator is a file: `tests/benchmarks/released.py` measures what stands in one.
"""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.evaluation.load import CONCURRENCIES, CostTable, read_cost_table, saturating

INVENTED = "saturating"
"""In the place of a file: the shape of an accelerator, under any load."""


def cost_tables() -> list[dict[str, Any]]:
    """The contents of all files, in the order of their names."""
    folder = resources.files("dspark_jax.evaluation") / "costs"
    files = sorted((one for one in folder.iterdir() if one.name.endswith(".json")), key=lambda one: one.name)
    return [json.loads(one.read_text("utf-8")) for one in files]


def costs_for(given: str | None, kind: str, block_size: int) -> CostTable:
    """What load is replayed on.

    Args:
      given: a file in SGLang's layout, `INVENTED`, or None: what was measured with such a drafter, and if there is
        nothing, what `INVENTED` gives.
      kind: of drafter.
      block_size: drafts per round.

    Raises:
      InputError: the file cannot be read, or is no cost table.
    """
    if given and given != INVENTED:
        return read_cost_table(Path(given))
    measured = None if given else measured_with(kind, block_size)
    return measured or saturating(max(CONCURRENCIES) * (block_size + 1))


def measured_with(kind: str, block_size: int) -> CostTable | None:
    """The first table that was measured with such a drafter, or None.

    Args:
      kind: of drafter.
      block_size: drafts per round.
    """
    for content in cost_tables():
        if kind in content["kinds"] and block_size == content["block_size"]:
            return as_cost_table(content)
    return None


def as_cost_table(content: Mapping[str, Any]) -> CostTable:
    """A file's round times, on straight lines between what was measured; less than the least costs as much as that.

    Args:
      content: `drafted_rounds` by `rows` in the verified batch, `plain_rounds` by `requests`, each ascending, in
        `milliseconds`; its `name`, `source` and `limits`.
    """
    drafted = _rates(content["drafted_rounds"], "rows")
    plain = _rates(content["plain_rounds"], "requests")
    return CostTable(content["name"], drafted, plain=plain, about=f"{content['source']} {content['limits']}")


def _rates(measured: Sequence[Mapping[str, float]], size: str) -> np.ndarray:
    """Rounds per second [N + 1] for 0..N."""
    sizes, times = ([point[key] for point in measured] for key in (size, "milliseconds"))
    return 1e3 / np.interp(np.arange(sizes[-1] + 1), sizes, times)
