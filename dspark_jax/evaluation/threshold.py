"""Confidence threshold against acceptance rate (paper, figure 5), from rounds in which everything was verified.

A threshold keeps the drafts before the first whose confidence is below it (`engine.schedulers.threshold`). Drafts,
confidences and verdicts up to the cut are what they were in the recorded round, since none of them depends on what
comes later in the block, so every threshold can be read off the same rounds. What that leaves out: a run with the
threshold starts its next round right after the cut, inside a stretch that is drafted well, while these rounds start
where full verification ended. The rates here are those of the threshold rule over the rounds of full verification.
Runs of the embedded target with thresholds of 0.3, 0.5 and 0.7 differ from them by at most 0.04, in both directions.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dspark_jax.evaluation.acceptance import interval, ratio, resample_weights
from dspark_jax.evaluation.calibration import conditional_probabilities
from dspark_jax.evaluation.traces import Traces

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclasses.dataclass(frozen=True)
class ThresholdSweep:
    """One prompt set under S thresholds; NaN where nothing was verified.

    Attributes:
      thresholds: [S].
      acceptance_rate: [S] accepted drafts / verified drafts.
      acceptance_rate_interval: [2, S], over prompts.
      verified: [S] verified drafts per round.
      tau: [S] accepted length per round.
    """

    thresholds: np.ndarray
    acceptance_rate: np.ndarray
    acceptance_rate_interval: np.ndarray
    verified: np.ndarray
    tau: np.ndarray


def sweep_thresholds(
    traces: Traces, resamples: int, seed: int, thresholds: Sequence[float] = THRESHOLDS
) -> dict[str, ThresholdSweep]:
    """The sweep of every prompt set; empty without a confidence head.

    Args:
      traces: recorded rounds.
      resamples: of the bootstrap over prompts.
      seed: of the resamples.
      thresholds: confidences in 0..1 below which a draft and all after it are not verified.
    """
    if traces.confidence is None:
        return {}
    kept = conditional_probabilities(traces.confidence)[:, None] >= np.asarray(thresholds)[:, None]  # [R, S, G]
    verified = np.minimum(np.cumprod(kept, axis=2).sum(axis=2), traces.proposed[:, None])
    accepted = np.minimum(verified, traces.accepted[:, None])
    # The bonus or correction; a round that still reaches its accepted stop token has none (trap 25).
    stopped = (traces.emitted == traces.accepted)[:, None] & (accepted == traces.accepted[:, None])
    emitted = accepted + ~stopped
    sets = {}
    for number, name in enumerate(traces.set_names):
        rows = traces.prompt_set[traces.request] == number
        owner = np.unique(traces.prompt[traces.request[rows]], return_inverse=True)[1]
        prompts = int(owner.max(initial=-1)) + 1
        sums = np.zeros((3, prompts, len(thresholds)))
        for total, values in zip(sums, (accepted, verified, emitted), strict=True):
            np.add.at(total, owner, values[rows])
        weights = resample_weights(prompts, resamples, np.random.default_rng([seed, number]))
        sets[name] = ThresholdSweep(
            thresholds=np.asarray(thresholds, np.float64),
            acceptance_rate=ratio(sums[0].sum(axis=0), sums[1].sum(axis=0)),
            acceptance_rate_interval=interval(ratio(weights @ sums[0], weights @ sums[1])),
            verified=ratio(sums[1].sum(axis=0), np.full(len(thresholds), rows.sum())),
            tau=ratio(sums[2].sum(axis=0), np.full(len(thresholds), rows.sum())),
        )
    return sets
