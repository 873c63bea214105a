"""Drafters side by side: accepted length by prompt set, and gains with paired bootstrap intervals.

All drafters have answered the same prompts, so a gain resamples the prompts of both alike. Where every drafter was
trained with several seeds, it resamples those of both alike, too: see `evaluation.comparison_seeds`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dspark_jax.evaluation.acceptance import Counts, estimate, interval, macro_average, ratio
from dspark_jax.evaluation.comparison_seeds import TauEstimate, paired
from dspark_jax.evaluation.rounds import PLAIN

BASELINES = ("dflash", "eagle3")
"""The gains over these are reported, ..."""
SEED_BASELINE = "dspark"
"""... and where the drafters of the main table were trained with several seeds, that over this one, too."""


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
    """Relative gain in tau of one drafter over another (0.1 = 10 %), and its interval [2]; NaN where undefined.

    Both have the same prompts in every resample and, where there are several trainings, the same seeds.
    """
    one, other = paired(one, other)
    draws = _gain_draws(one, other)
    return _gain(one, other), interval(draws) if len(draws) else np.full(2, np.nan)


def growth(study: Mapping[int, Mapping[str, TauEstimate]]) -> list[dict[str, Any]]:
    """By how much gains over the first baseline grow from the smallest depth or draft length to the largest.

    Args:
      study: estimates by value and kind.

    Returns:
      For every drafter that is there at both ends with the baseline: the values (`from`, `to`), and the difference of
      the two gains (0.1 = 10 percentage points) with its interval, which resamples the prompts (and seeds)
      of all four alike.
    """
    baseline, rows = BASELINES[0], []
    if len(study) < 2:
        return []
    ends = (min(study), max(study))
    first, last = (study[end] for end in ends)
    for kind in first:
        if kind == baseline or kind not in last or baseline not in first or baseline not in last:
            continue
        four = paired(first[kind], first[baseline], last[kind], last[baseline])
        before, after = four[:2], four[2:]
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
    one: TauEstimate,
    estimates: Mapping[str, TauEstimate],
    time: Mapping[str, float] | None,
    baselines: Sequence[str] = BASELINES,
) -> dict[str, Any]:
    """A drafter's entry in `compare.json`; NaN where something is not defined.

    Args:
      one: the drafter.
      estimates: of those that it is compared with, by kind.
      time: from `round_times`, if it was measured.
      baselines: kinds over which the gain is reported.
    """
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
        | _by_seed({seed: training.sets[name].tau for seed, training in one.trainings.items()})
        for name, found in one.sets.items()
    }
    entry: dict[str, Any] = {"tau": one.tau, "tau_ci95": one.interval, "prompt_sets": sets}
    entry |= _by_seed({seed: training.tau for seed, training in one.trainings.items()})
    for baseline in baselines:
        if baseline in estimates and estimates[baseline] is not one:
            value, bounds = gain(one, estimates[baseline])
            entry[f"gain_over_{baseline}"], entry[f"gain_over_{baseline}_ci95"] = value, bounds
    return entry | dict(time or {})


def _by_seed(taus: Mapping[int, float]) -> dict[str, Any]:
    return {"tau_by_seed": {str(seed): tau for seed, tau in taus.items()}} if taus else {}
