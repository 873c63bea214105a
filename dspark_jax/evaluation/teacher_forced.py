"""A quick figure from features that are on disk: how much of its drafts a target would accept along given answers.

Nothing is decoded and the target does not run. Blocks are drafted from places in the answers of the training data, as
in training, with the answer's own tokens before every position; how much of the draft's distribution the target's
covers (1 - total variation) is the chance that a draft is accepted there at temperature 1. That is not tau: a drafter
that decodes goes on after what the target accepted, from other text than it was trained on.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.config import Config, InputError
from dspark_jax.data.features import frozen_file
from dspark_jax.data.packing import empty_features, pad_batch, read_features
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.evaluation.acceptance import interval, ratio, resample_weights
from dspark_jax.evaluation.setup import open_drafter
from dspark_jax.json_file import write_json
from dspark_jax.metrics import Ratio
from dspark_jax.progress import Progress
from dspark_jax.run import Run
from dspark_jax.sharding import one_device
from dspark_jax.target.frozen import load_frozen
from dspark_jax.target.loading import compute_dtype
from dspark_jax.training.feature_cache import open_features
from dspark_jax.training.state import to_params
from dspark_jax.training.step import loss_sums


def measure_teacher_forced(run: Run, samples: int, checkpoint: str) -> dict[str, Any]:
    """Measures a checkpoint along some samples of its training data, and writes `eval/teacher_forced.json`.

    Args:
      run: its features are on disk.
      samples: at most so many, evenly spread over the data.
      checkpoint: `newest`, `best` or a step, see `training.checkpoint.load_drafter`.

    Returns:
      The content of the file.

    Raises:
      InputError: there are no features of this target and data, no checkpoint, or less than one sample is asked for.
    """
    config = run.config
    if samples < 1:
        raise InputError(f"--teacher_forced={samples}: at least one sample is needed, e.g. --teacher_forced=256")
    if config.data.features == "online":
        raise InputError(
            f"--teacher_forced={samples} reads features that are stored, and a run with data.features=online stores "
            "none; leave it out, which measures tau by decoding"
        )
    run = run.on(one_device())
    stored = open_features(run)
    step, drafter = open_drafter(run, checkpoint)
    arch, dtype = config.target.architecture, compute_dtype(config.target.dtype)
    target = load_frozen(frozen_file(run.feature_folder), arch, run.mesh, dtype)
    chosen = np.unique(np.linspace(0, len(stored) - 1, samples).astype(int))
    measure = jax.jit(functools.partial(_measure, config=config))
    rows: list[dict[str, Ratio]] = []
    with Progress("teacher-forced", len(chosen), unit="sample") as progress, jax.set_mesh(run.mesh):
        for index in chosen:
            sample = stored[int(index)]
            batch = pad_batch([sample], config.data.max_length)
            del batch["unread"]
            features = empty_features(1, config.data.max_length, stored.identity)
            read_features(features, 0, [sample])
            rows.append(jax.device_get(measure(drafter, target, batch | features)))
            progress.advance(1)
    found = {
        "name": config.name,
        "step": step,
        "kind": "teacher-forced",
        "answers": "of the training data",
        "features": stored.identity.source,
        "samples": len(chosen),
        "temperature": 1.0,
        **_summary(rows, config),
    }
    run.eval_folder.mkdir(parents=True, exist_ok=True)
    return write_json(run.eval_folder / "teacher_forced.json", found)


def _measure(drafter: DrafterModule, target: Any, batch: Any, *, config: Config) -> dict[str, Ratio]:
    """What `training.loss` reports of the blocks of a sequence."""
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    _, (sums, _) = loss_sums(to_params(drafter), drafter, target, batch, jnp.int32(0), config)
    return {name: one for name, one in sums.metrics.items() if name.startswith("accept@") or name in _OF_BLOCKS}


_OF_BLOCKS = ("tau_expected", "vocabulary_mass")


def _summary(rows: list[dict[str, Ratio]], config: Config) -> dict[str, Any]:
    """The figures of all samples; intervals are of samples."""
    weights = resample_weights(len(rows), config.eval.bootstrap, np.random.default_rng(config.eval.seed))

    def means(name: str) -> tuple[float, list[float], float]:
        """Mean over all, its interval, and of how many."""
        num, den = (np.asarray([float(getattr(one[name], part)) for one in rows]) for part in ("num", "den"))
        bounds = interval(ratio(weights @ num, weights @ den))
        return float(ratio(num.sum(), den.sum())), bounds.tolist(), float(den.sum())

    expected, bounds, blocks = means("tau_expected")
    positions = sum(name.startswith("accept@") for name in rows[0])
    found = {
        "blocks": int(blocks),
        "conditional_acceptance": [means(f"accept@{k}")[0] for k in range(1, positions + 1)],
        "expected_tokens_per_round": expected,
        "expected_tokens_per_round_ci95": bounds,
    }
    return found | ({"vocabulary_mass": means("vocabulary_mass")[0]} if "vocabulary_mass" in rows[0] else {})


def describe(found: dict[str, Any]) -> str:
    """What is printed of the file's content."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    low, high = map(number, found["expected_tokens_per_round_ci95"])
    lines = [
        f"{found['name']}, step {found['step']}, teacher-forced: {found['blocks']} blocks along the answers of "
        f"{found['samples']} training samples, temperature 1",
        f"  acceptance of draft k after accepted ones: {' '.join(map(number, found['conditional_acceptance']))}",
        f"  expected tokens per round: {number(found['expected_tokens_per_round'])} ({low} to {high})",
    ]
    if "vocabulary_mass" in found:
        lines.append(f"  within the draft vocabulary, which has {number(found['vocabulary_mass'])} of the probability")
    return "\n".join([*lines, "  nothing was decoded; evaluate without --teacher_forced measures tau"])
