"""How long a comparison will go on, from the steps that its runs have done so far."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from dspark_jax.evaluation.comparison_plan import Plan


def training_seconds(folder: Path, steps: int) -> float | None:
    """What all steps of a run take, by the median of the rows of its `metrics.jsonl`; None where there are none.

    Compiling, starting and measuring are not in it.
    """
    path = folder / "metrics.jsonl"
    found = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            found.append(float(json.loads(line)["seconds_per_step"]))
        except (ValueError, KeyError, TypeError):  # a line that was cut short, or of something else than steps
            continue
    return steps * float(np.median(found)) if found else None


def forecast(plan: Plan, seeds: int, finished: Collection[str], seconds: Mapping[str, float]) -> str:
    """One line: how many trainings there are, what one takes and what is left.

    Args:
      plan: of the comparison.
      seeds: of every drafter.
      finished: names of the runs that need nothing any more.
      seconds: what a training takes, by run, of those that are known. A run that is not takes as long as the one of the
        same drafter with another seed, or as long as the mean of all.
    """
    drafters = {run: point.run for point in plan.points for run in point.runs}
    of_drafter: dict[str, list[float]] = {}
    for run, one in seconds.items():
        of_drafter.setdefault(drafters[run], []).append(one)
    left = [name for name in plan.runs if name not in finished]
    every = list(seconds.values())
    line = f"{len(plan.runs)} trainings"
    if seeds > 1:
        line += f" ({len(plan.runs) // seeds} drafters x {seeds} seeds)"
    line += f", {len(finished)} of them finished"
    if not left:
        return line
    if not every:
        return f"{line}; how long they take is told when the first is done"
    rest = sum(float(np.mean(of_drafter.get(drafters[name], every))) for name in left)
    return (
        f"{line}; one takes about {_duration(float(np.mean(every)))}, so about {_duration(rest)} of training are left, "
        "and measuring"
    )


def _duration(seconds: float) -> str:
    """In the two largest units that say something."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{max(round(seconds), 1)} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{round(minutes / 60)} h"
