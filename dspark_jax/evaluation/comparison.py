"""Drafters side by side: accepted length by prompt set, gains with paired bootstrap intervals, the table of the paper.

All drafters have answered the same prompts, so a gain resamples the prompts of both alike.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dspark_jax.evaluation.acceptance import Acceptance, Counts, estimate, interval, macro_average, ratio
from dspark_jax.evaluation.rounds import PLAIN

BASELINES = ("dflash", "eagle3")
"""The gains over these are reported."""


@dataclasses.dataclass(frozen=True)
class TauEstimate:
    """How one drafter did.

    Attributes:
      sets: acceptance by prompt set.
      tau: mean over the prompt sets.
      interval: [2] of tau, 95 %.
      draws: [S] tau of every resample; resample s draws the same prompts for every drafter.
    """

    sets: Mapping[str, Acceptance]
    tau: float
    interval: np.ndarray
    draws: np.ndarray


def estimate_tau(names: Sequence[str], counts: Counts, resamples: int, seed: int) -> TauEstimate:
    """Estimates from the counts of every prompt.

    Args:
      names: [N] prompt set of every prompt.
      counts: of N prompts.
      resamples: S.
      seed: the same for drafters that are to be compared.
    """
    sets = {}
    for number, name in enumerate(dict.fromkeys(names)):
        members = np.flatnonzero(np.asarray(names) == name)
        part = Counts(**{field: values[members] for field, values in vars(counts).items()})
        sets[name] = estimate(part, resamples, np.random.default_rng([seed, number]))
    tau, bounds = macro_average(list(sets.values()))
    used = [one.tau_resamples for one in sets.values() if one.rounds]
    draws = np.mean(used, axis=0) if used and all(map(len, used)) else np.zeros(0)
    return TauEstimate(sets, tau, bounds, draws)


def gain(one: TauEstimate, other: TauEstimate) -> tuple[float, np.ndarray]:
    """Relative gain in tau of one drafter over another (0.1 = 10 %), and its interval [2]; NaN where undefined."""
    draws = _gain_draws(one, other)
    return _gain(one, other), interval(draws) if len(draws) else np.full(2, np.nan)


def growth(study: Mapping[int, Mapping[str, TauEstimate]]) -> list[dict[str, Any]]:
    """By how much gains over the first baseline grow from the smallest depth or draft length to the largest.

    Args:
      study: estimates by value and kind.

    Returns:
      For every drafter that is there at both ends with the baseline: the values (`from`, `to`), and the difference of
      the two gains (0.1 = 10 percentage points) with its interval, which resamples the prompts of all four alike.
    """
    baseline, rows = BASELINES[0], []
    if len(study) < 2:
        return []
    ends = (min(study), max(study))
    first, last = (study[end] for end in ends)
    for kind in first:
        if kind == baseline or kind not in last or baseline not in first or baseline not in last:
            continue
        before, after = ((one[kind], one[baseline]) for one in (first, last))
        draws = (_gain_draws(*before), _gain_draws(*after))
        same = len(draws[0]) and len(draws[0]) == len(draws[1])
        bounds = interval(draws[1] - draws[0]) if same else np.full(2, np.nan)
        row = {"drafter": kind, "baseline": baseline, "from": ends[0], "to": ends[1]}
        rows.append(row | {"growth": _gain(*after) - _gain(*before), "growth_ci95": bounds})
    return rows


def _gain(one: TauEstimate, other: TauEstimate) -> float:
    return float(ratio(np.asarray(one.tau), np.asarray(other.tau))) - 1.0


def _gain_draws(one: TauEstimate, other: TauEstimate) -> np.ndarray:
    """[S] the gain in every resample; none where they cannot be paired."""
    paired = len(one.draws) == len(other.draws)
    return ratio(one.draws, other.draws) - 1.0 if paired else np.zeros(0)


def round_times(times: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Milliseconds per round and tokens per second by name, from `rounds.measure_times`."""
    described = {}
    for name, one in times.items():
        seconds, rounds, tokens = (float(np.sum(one[field])) for field in ("seconds", "rounds", "tokens"))
        described[name] = {"round_ms": 1e3 * seconds / max(rounds, 1.0), "tokens_per_second": tokens / seconds}
    if PLAIN in described:
        for one in described.values():
            one["speedup"] = one["tokens_per_second"] / described[PLAIN]["tokens_per_second"]
    return described


def describe(
    one: TauEstimate, estimates: Mapping[str, TauEstimate], time: Mapping[str, float] | None
) -> dict[str, Any]:
    """A drafter's entry in `compare.json`; NaN where something is not defined."""
    sets = {
        name: {
            "tau": found.tau,
            "tau_ci95": found.tau_interval,
            "rounds": found.rounds,
            "tokens": found.tokens,
            "conditional_acceptance": found.conditional,
            "conditional_acceptance_ci95": found.conditional_interval.T,
            "survival": found.survival,
        }
        for name, found in one.sets.items()
    }
    entry: dict[str, Any] = {"tau": one.tau, "tau_ci95": one.interval, "prompt_sets": sets}
    for baseline in BASELINES:
        if baseline in estimates and estimates[baseline] is not one:
            value, bounds = gain(one, estimates[baseline])
            entry[f"gain_over_{baseline}"], entry[f"gain_over_{baseline}_ci95"] = value, bounds
    return entry | dict(time or {})


def table(entries: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str], title: str) -> str:
    """The main table (paper, table 1) from the entries of `compare.json`: one line per drafter."""
    sets = list(dict.fromkeys(name for entry in entries.values() for name in entry["prompt_sets"]))
    baselines = [name for name in BASELINES if any(f"gain_over_{name}" in entry for entry in entries.values())]
    width = max(8, *(len(name) for name in (*entries, *failures)))
    head = f"{'drafter':{width}}" + "".join(f"  {name:>14}" for name in sets) + f"  {'macro average':>22}"
    head += "".join(f"  {'over ' + name:>24}" for name in baselines) + "  ms/round  speed"
    lines = [title, head]
    for name, entry in entries.items():
        line = f"{name:{width}}"
        line += "".join(f"  {_number(entry['prompt_sets'].get(one, {}).get('tau'), '.3f'):>14}" for one in sets)
        lines.append(line + _results(entry, baselines))
    lines += [f"{name:{width}}  failed: {error}" for name, error in failures.items()]
    return "\n".join(lines)


def study_table(points: Sequence[Mapping[str, Any]], growths: Sequence[Mapping[str, Any]], label: str) -> str:
    """A line per depth or draft length and drafter, from a study in `compare.json`; gains are over the same value.

    Below it how much the gains grow, in percentage points.
    """
    points = sorted(points, key=lambda point: point[label])
    baselines = [name for name in BASELINES if any(f"gain_over_{name}" in point for point in points)]
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
