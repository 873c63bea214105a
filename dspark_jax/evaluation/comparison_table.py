"""The tables that `compare` prints, from the entries of `compare.json`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dspark_jax.config import Config
from dspark_jax.evaluation.comparison import BASELINES, SEED_BASELINE


def table(entries: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str], title: str) -> str:
    """The main table (paper, table 1) from the entries of `compare.json`: one line per drafter.

    Where there are several seeds it says how many, and has the gain over `SEED_BASELINE` and the parameters.
    """
    sets = list(dict.fromkeys(name for entry in entries.values() for name in entry["prompt_sets"]))
    several = any("tau_by_seed" in entry for entry in entries.values())
    compared = (SEED_BASELINE,) if several else BASELINES
    baselines = compared_with(compared, entries.values())
    width = max(8, *(len(name) for name in (*entries, *failures)))
    head = f"{'drafter':{width}}" + ("  seeds" if several else "") + "".join(f"  {name:>14}" for name in sets)
    head += f"  {'macro average':>22}" + "".join(f"  {'over ' + name:>24}" for name in baselines)
    lines = [title, head + "  ms/round  speed" + ("  parameters" if several else "")]
    for name, entry in entries.items():
        line = f"{name:{width}}" + (f"  {len(entry['tau_by_seed']):>5}" if several else "")
        line += "".join(f"  {_number(entry['prompt_sets'].get(one, {}).get('tau'), '.3f'):>14}" for one in sets)
        line += _results(entry, baselines)
        lines.append(line + (f"  {_number(entry.get('parameters'), ',d'):>10}" if several else ""))
    lines += [f"{name:{width}}  failed: {error}" for name, error in failures.items()]
    return "\n".join(lines)


def study_table(points: Sequence[Mapping[str, Any]], growths: Sequence[Mapping[str, Any]], label: str) -> str:
    """A line per depth or draft length and drafter, from a study in `compare.json`; gains are over the same value.

    Below it how much the gains grow, in percentage points.
    """
    points = sorted(points, key=lambda point: point[label])
    baselines = compared_with(BASELINES, points)
    width = max(8, *(len(point["drafter"]) for point in points)) if points else 8
    head = f"{label:8}  {'drafter':{width}}  {'macro average':>22}"
    head += "".join(f"  {'over ' + name:>24}" for name in baselines) + "  ms/round  speed"
    lines = [head]
    for point in points:
        lines.append(f"{point[label]:<8}  {point['drafter']:{width}}" + _results(point, baselines))
    for one in growths:
        grown = f"{_number(one['growth'], '+.1%')} {_bounds(one['growth_ci95'], '+.1%')}"
        lines.append(f"{one['drafter']} over {one['baseline']}, {label} {one['from']} -> {one['to']}: {grown}")
    return "\n".join(lines)


def compared_with(names: Sequence[str], entries: Collection[Mapping[str, Any]]) -> list[str]:
    """Those of `names` over which some entry has a gain."""
    return [name for name in names if any(f"gain_over_{name}" in entry for entry in entries)]


def _results(entry: Mapping[str, Any], baselines: Sequence[str]) -> str:
    """The end of a line: tau, gains, time."""
    line = f"  {_number(entry['tau'], '.3f') + ' ' + _bounds(entry['tau_ci95'], '.3f'):>22}"
    for baseline in baselines:
        value, bounds = entry.get(f"gain_over_{baseline}"), entry.get(f"gain_over_{baseline}_ci95")
        shown = "" if value is None else f"{_number(value, '+.1%')} {_bounds(bounds, '+.1%')}"
        line += f"  {shown:>24}"
    return line + f"  {_number(entry.get('round_ms'), '.2f'):>8}  {_number(entry.get('speedup'), '.2f'):>5}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _bounds(bounds: Sequence[float | None] | None, form: str) -> str:
    if bounds is None or any(bound is None for bound in bounds):
        return ""
    return "(" + ", ".join(_number(bound, form) for bound in bounds) + ")"


def method(seeds: int, config: Config, entries: Collection[Mapping[str, Any]]) -> list[str]:
    """What the figures of several seeds are, for below the tables; `evaluation.comparison_seeds` has the reasons."""
    first, resamples = config.train.seed, config.eval.bootstrap
    gains = ["gains: paired by seed and prompt, over the seeds that both drafters have"]
    return [
        f"tau: mean over {seeds} trainings of each drafter (train.seed={first}..{first + seeds - 1}: initial weights "
        "and order of the same data); macro average: mean over the prompt sets",
        f"intervals: 95 %, percentile bootstrap of {resamples} resamples: prompts within each prompt set and, crossed "
        f"with them, {seeds - 1} of the {seeds} seeds, both with replacement",
        *(gains if compared_with((SEED_BASELINE,), entries) else []),
        "ms/round and speed: at batch 1, of the first seed of each drafter",
    ]
