"""Accepted length and acceptance by position, with bootstrap intervals over prompts.

Two acceptance rates are in use and both are given (trap 26). Conditional: of the rounds in which draft k was verified
after all before it had been accepted, the share that accepted it (paper, figure 2). Survival: of the rounds that
verified at least k drafts, the share that accepted all k (what the reference prints as `accept_rate@k`).

Rounds of one prompt resemble each other, so intervals resample prompts and not rounds.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dspark_jax.engine.result import DecodeResult

LEVEL = 0.95
"""Coverage of the intervals."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """Round statistics of N prompts (or requests), summed over the rounds of each.

    Attributes:
      tokens: [N] accepted lengths, bonus tokens included; the first token, from the prefill, is not (trap 25).
      rounds: [N].
      accepted: [N, G] rounds that accepted at least k drafts, k = 1..G.
      reached: [N, G] rounds in which draft k was verified and all before it were accepted.
      proposed: [N, G] rounds that verified at least k drafts.
    """

    tokens: np.ndarray
    rounds: np.ndarray
    accepted: np.ndarray
    reached: np.ndarray
    proposed: np.ndarray

    def grouped(self, owners: np.ndarray, groups: int) -> "Counts":
        """Sums of the rows that have the same owner: owners [N] in 0..groups - 1 -> Counts of `groups` rows."""

        def add(values: np.ndarray) -> np.ndarray:
            total = np.zeros((groups, *values.shape[1:]), np.int64)
            np.add.at(total, owners, values)
            return total

        return Counts(*(add(getattr(self, field.name)) for field in dataclasses.fields(self)))


def count(
    emitted: Sequence[np.ndarray], accepted: Sequence[np.ndarray], proposed: Sequence[np.ndarray], block_size: int
) -> Counts:
    """Counts per request from its rounds.

    Args:
      emitted: [rounds] accepted length of each round, per request.
      accepted: [rounds] accepted drafts, per request.
      proposed: [rounds] verified drafts, per request; those up to the stop token where one was accepted.
      block_size: G.
    """
    depth = np.arange(1, block_size + 1)

    def at_least(lengths: Sequence[np.ndarray]) -> np.ndarray:
        sums = [np.sum(np.asarray(rows, np.int64)[:, None] >= depth, axis=0) for rows in lengths]
        return np.asarray(sums, np.int64).reshape(len(lengths), block_size)

    return Counts(
        tokens=np.asarray([np.sum(rows) for rows in emitted], np.int64),
        rounds=np.asarray([len(rows) for rows in emitted], np.int64),
        accepted=at_least(accepted),
        reached=at_least([np.minimum(np.add(a, 1), p) for a, p in zip(accepted, proposed, strict=True)]),
        proposed=at_least(proposed),
    )


def count_rounds(result: DecodeResult) -> Counts:
    """`count` of a decoding result, one row per request."""
    lengths = (result.acceptance_lengths, result.accepted_lengths, result.proposal_lengths)
    return count(*lengths, block_size=result.block_size)


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """What a prompt set shows. Ratios of sums over its prompts; NaN where there was no round.

    Attributes:
      tau: accepted length per round, bonus token included.
      tau_interval: [2].
      tau_resamples: [S] tau of each bootstrap resample, for averages over prompt sets.
      rounds: total.
      tokens: total of the accepted lengths; tau = tokens / rounds.
      conditional: [G], see the module's docstring.
      conditional_interval: [2, G].
      conditional_resamples: [S, G].
      survival: [G].
      survival_interval: [2, G].
      survival_resamples: [S, G].
    """

    tau: float
    tau_interval: np.ndarray
    tau_resamples: np.ndarray
    rounds: int
    tokens: int
    conditional: np.ndarray
    conditional_interval: np.ndarray
    conditional_resamples: np.ndarray
    survival: np.ndarray
    survival_interval: np.ndarray
    survival_resamples: np.ndarray


def estimate(counts: Counts, resamples: int, rng: np.random.Generator) -> Acceptance:
    """Ratio estimates with percentile bootstrap intervals over prompts.

    Args:
      counts: one row per prompt.
      resamples: S; below 1, or with a single prompt, there are no intervals (NaN).
      rng: draws the resamples.
    """
    weights = resample_weights(len(counts.rounds), resamples, rng)
    tau, tau_draws = _estimate(counts.tokens, counts.rounds, weights)
    conditional, conditional_draws = _estimate(counts.accepted, counts.reached, weights)
    survival, survival_draws = _estimate(counts.accepted, counts.proposed, weights)
    return Acceptance(
        tau=float(tau),
        tau_interval=interval(tau_draws),
        tau_resamples=tau_draws,
        rounds=int(counts.rounds.sum()),
        tokens=int(counts.tokens.sum()),
        conditional=conditional,
        conditional_interval=interval(conditional_draws),
        conditional_resamples=conditional_draws,
        survival=survival,
        survival_interval=interval(survival_draws),
        survival_resamples=survival_draws,
    )


def macro_average(sets: Sequence[Acceptance]) -> tuple[float, np.ndarray]:
    """Mean tau over prompt sets, each counting the same (as the paper averages), and its interval [2].

    The interval resamples prompts within every set. A set without any round has no tau and does not count. NaN where
    there is nothing to average or resample.
    """
    sets = [one for one in sets if one.rounds]
    tau = float(np.mean([one.tau for one in sets])) if sets else float("nan")
    if not all(len(one.tau_resamples) for one in sets):  # a set of a single prompt says nothing about its spread
        return tau, np.full(2, np.nan)
    return tau, interval(np.mean([one.tau_resamples for one in sets], axis=0)) if sets else np.full(2, np.nan)


def resample_weights(items: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[S, N] how often each of N items occurs in each of S resamples with replacement; S = 0 if N < 2."""
    if items < 2 or resamples < 1:
        return np.zeros((0, items), np.int64)
    return rng.multinomial(items, np.full(items, 1.0 / items), size=resamples)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """float64 quotient; NaN where the denominator is 0."""
    out = np.full(np.broadcast_shapes(np.shape(numerator), np.shape(denominator)), np.nan)
    return np.divide(numerator, denominator, out=out, where=np.asarray(denominator) != 0)


def interval(draws: np.ndarray) -> np.ndarray:
    """Central percentile interval [2, ...] of bootstrap draws [S, ...].

    Draws that are NaN (a resample in which a position was never reached) are left out; NaN where none is left.
    """
    tail = (1 - LEVEL) / 2
    flat = draws.reshape(len(draws), int(np.prod(draws.shape[1:])))
    columns = [column[~np.isnan(column)] for column in flat.T]
    bounds = [np.quantile(column, [tail, 1 - tail]) if len(column) else np.full(2, np.nan) for column in columns]
    return np.reshape(np.transpose(bounds), (2, *draws.shape[1:]))


def _estimate(numerator: np.ndarray, denominator: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ratio of sums over the first axis, and the same of every resample."""
    value = ratio(numerator.sum(axis=0), denominator.sum(axis=0))
    return value, ratio(weights @ numerator, weights @ denominator)
