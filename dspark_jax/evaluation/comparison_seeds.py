"""Several trainings of one drafter, which differ in their seed: the mean over them, and what chance can do to it.

A drafter's figure is the mean over its seeds. Its interval is a percentile bootstrap over seeds and prompts: every
resample draws prompts with replacement within each prompt set, and independently of that K - 1 of the K seeds with
replacement. All seeds have answered the same prompts, so that seeds and prompts are crossed: the prompts of a resample
are the same for all its seeds. K - 1 and not K, since the mean of K draws varies less than the mean over K seeds does,
by the factor (K - 1) / K of its variance: a third at three seeds (Rao and Wu 1988). With very few seeds the ends of
such an interval are still somewhat too near, as the spread itself is known from so few.

Drafters are compared seed by seed and prompt by prompt: a resample has the same seeds and prompts for all of them, and
where a training is missing, that seed is left out for both.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dspark_jax.evaluation.acceptance import Acceptance, interval, ratio


@dataclasses.dataclass(frozen=True)
class TauEstimate:
    """How one drafter did.

    Attributes:
      sets: acceptance by prompt set.
      tau: mean over the prompt sets.
      interval: [2] of tau, 95 %.
      draws: [S] tau of every resample; resample s draws the same prompts and seeds for every drafter.
      trainings: what this is the mean of, by seed; empty where it is one training and no seeds were asked for.
    """

    sets: Mapping[str, Acceptance]
    tau: float
    interval: np.ndarray
    draws: np.ndarray
    trainings: Mapping[int, "TauEstimate"] = dataclasses.field(default_factory=dict)


def over_seeds(trainings: Mapping[int, TauEstimate]) -> TauEstimate:
    """The mean over trainings of one drafter with its intervals, see the module's docstring.

    Args:
      trainings: K estimates by seed, from the same resamples of the same prompts. NaN is the figure of none.
    """
    found = list(trainings.values())
    names = list(dict.fromkeys(name for one in found for name in one.sets))
    sets = {name: _mean_acceptance([one.sets[name] for one in found if name in one.sets]) for name in names}
    draws = _mean_draws([one.draws for one in found])
    bounds = interval(draws) if len(draws) else np.full(2, np.nan)
    return TauEstimate(sets, float(_mean([one.tau for one in found])), bounds, draws, dict(trainings))


def paired(*estimates: TauEstimate) -> list[TauEstimate]:
    """The same drafters over the seeds that all of them have; as they are where that is no restriction."""
    seeds = [seed for seed in estimates[0].trainings if all(seed in one.trainings for one in estimates)]
    if all(len(one.trainings) == len(seeds) for one in estimates):
        return list(estimates)
    return [over_seeds({seed: one.trainings[seed] for seed in seeds}) for one in estimates]


def _mean_acceptance(found: Sequence[Acceptance]) -> Acceptance:
    """Of one prompt set; rounds and tokens are summed."""
    tau = _mean_draws([one.tau_resamples for one in found])
    conditional = _mean_draws([one.conditional_resamples for one in found])
    survival = _mean_draws([one.survival_resamples for one in found])
    return Acceptance(
        tau=float(_mean([one.tau for one in found])),
        tau_interval=interval(tau),
        tau_resamples=tau,
        rounds=sum(one.rounds for one in found),
        tokens=sum(one.tokens for one in found),
        conditional=_mean([one.conditional for one in found]),
        conditional_interval=interval(conditional),
        conditional_resamples=conditional,
        survival=_mean([one.survival for one in found]),
        survival_interval=interval(survival),
        survival_resamples=survival,
    )


def _mean(values: Sequence[np.ndarray | float]) -> np.ndarray:
    """Mean of what is defined; NaN where nothing is."""
    stacked = np.asarray(values, np.float64)
    return ratio(np.nansum(stacked, axis=0), np.sum(~np.isnan(stacked), axis=0))


def _mean_draws(draws: Sequence[np.ndarray]) -> np.ndarray:
    """[S, ...] mean over the seeds that each resample draws, from the resamples [S, ...] of every seed's prompts."""
    if not draws or not all(map(len, draws)):
        return np.zeros((0, *(draws[0].shape[1:] if draws else ())))
    values = np.stack(draws, axis=1)  # [S, K, ...]
    weights = _seed_weights(len(draws), len(values)).reshape(values.shape[:2] + (1,) * (values.ndim - 2))
    known = weights * ~np.isnan(values)
    return ratio((known * np.nan_to_num(values)).sum(axis=1), known.sum(axis=1))


def _seed_weights(seeds: int, resamples: int) -> np.ndarray:
    """[S, K] how often each seed occurs in each resample: K - 1 draws with replacement; one seed is always there."""
    if seeds == 1:
        return np.ones((resamples, 1), np.int64)
    return np.random.default_rng([seeds, resamples]).multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=resamples)
