"""Round times of accelerators that were measured and come with the package, in `costs/`.

A file says what was measured on which device with which versions, for which drafters, and what it says nothing about.
A further accelerator is a file: `tests/benchmarks/released.py` measures what stands in one.

Few rounds are measured, so what lies between follows from a rule. A round with drafts takes what a plain round of as
many requests takes (on straight lines between those that were measured), the time to draft, and a time for every
drafted token that is verified; the last two are fitted to the rounds with drafts. That holds the caches' share, which
the requests make, apart from that of the verified rows.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dspark_jax.config import InputError
from dspark_jax.evaluation.load import CONCURRENCIES, Costs, CostTable, read_cost_table, saturating

INVENTED = "saturating"
"""In the place of a file: the shape of an accelerator, under any load."""


@dataclasses.dataclass(frozen=True)
class Card:
    """Round times of an accelerator.

    Attributes:
      name: what was measured.
      about: how, and what is not known.
      plain: [M + 1] seconds of plain rounds of 0..M requests; the entry of 0 is never used.
      draft: seconds that drafting adds to a round.
      row: seconds that every verified draft adds.
      most_rows: of a verified batch; more were not measured.
    """

    name: str
    about: str
    plain: np.ndarray
    draft: float
    row: float
    most_rows: int
    invented: bool = False

    def covers(self, users: int, rows: int) -> bool:
        """See `Costs`."""
        return users < len(self.plain) and users * rows <= self.most_rows

    def at(self, users: int) -> CostTable:
        """See `Costs`."""
        drafts = np.maximum(np.arange(self.most_rows + 1) - users, 0)
        seconds = self.plain[users] + self.row * drafts
        return CostTable(self.name, 1.0 / seconds, self.draft, about=self.about)


def as_card(content: Mapping[str, Any]) -> Card:
    """A file's round times.

    Args:
      content: `plain_rounds` by `requests`, ascending from 1, and `drafted_rounds` by `requests` and `rows` of the
        verified batch, two or more, each in `milliseconds`; `name`, `source` and `limits`.
    """
    sizes, times = ([one[key] for one in content["plain_rounds"]] for key in ("requests", "milliseconds"))
    plain = np.interp(np.arange(sizes[-1] + 1), sizes, times)
    drafted = content["drafted_rounds"]
    verified = [[1.0, one["rows"] - one["requests"]] for one in drafted]
    more = [one["milliseconds"] - plain[one["requests"]] for one in drafted]
    draft, row = np.linalg.lstsq(np.asarray(verified), np.asarray(more))[0] / 1e3
    about = f"{content['source']} {content['limits']}"
    return Card(content["name"], about, plain / 1e3, float(draft), float(row), max(one["rows"] for one in drafted))


@functools.cache
def cost_files() -> tuple[dict[str, Any], ...]:
    """The contents of all files, in the order of their names."""
    folder = resources.files("dspark_jax.evaluation") / "costs"
    files = sorted((one for one in folder.iterdir() if one.name.endswith(".json")), key=lambda one: one.name)
    return tuple(json.loads(one.read_text("utf-8")) for one in files)


def shown_costs() -> list[dict[str, Any]]:
    """The same for the page of `serve`: with `draft_milliseconds` and `row_milliseconds` of the rule besides."""
    cards = [(content, as_card(content)) for content in cost_files()]
    return [
        {**content, "draft_milliseconds": 1e3 * card.draft, "row_milliseconds": 1e3 * card.row}
        for content, card in cards
    ]


def _card_of(path: Path) -> Card | None:
    """What a file in the layout of `costs/` says; None if it is in another one, or cannot be read.

    Raises:
      InputError: it is in this layout, and wrong.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or "plain_rounds" not in content:
        return None
    try:
        card = as_card(content)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        cause = f"no round times of a card ({type(error).__name__}: {error})"
        raise InputError(f"{path}: {cause}; measure it again with released.py --card") from None
    most_drafts = np.maximum(card.most_rows - np.arange(1, len(card.plain)), 0)
    if not (card.plain[1:] + np.minimum(card.row * most_drafts, 0) + min(card.draft, 0) > 0).all():
        raise InputError(f"{path}: times are not positive; measure it again with released.py --card")
    return card


def costs_for(given: str | None, kind: str, block_size: int) -> Costs:
    """What load is replayed on.

    Args:
      given: a file in SGLang's layout or in that of `costs/`, `INVENTED`, or None: what was measured with such a
        drafter, on this device if it was, and if there is nothing, what `INVENTED` gives.
      kind: of drafter.
      block_size: drafts per round.

    Raises:
      InputError: the file cannot be read, or is no cost table.
    """
    if given and given != INVENTED:
        return _card_of(Path(given)) or read_cost_table(Path(given))
    if not given:
        here = jax.devices()[0].device_kind
        for content in sorted(cost_files(), key=lambda one: one["device"] != here):  # and by their names, as before
            if kind in content["kinds"] and block_size == content["block_size"]:
                return as_card(content)
    return saturating(max(CONCURRENCIES) * (block_size + 1))
