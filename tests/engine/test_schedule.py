"""Schedulers against a loop, and the reference's strictness at the threshold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine.schedule import fixed, schedule, threshold


def loop(confidence: np.ndarray, minimum: float) -> list[int]:
    lengths = []
    for row in confidence:
        count = 0
        while count < len(row) and not 1 / (1 + np.exp(-row[count])) < minimum:
            count += 1
        lengths.append(count)
    return lengths


@pytest.mark.parametrize("minimum", (0.0, 0.3, 0.5, 0.9, 1.0))
def test_threshold_cuts_before_the_first_low_confidence(minimum: float) -> None:
    confidence = 2 * np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    lengths = threshold(jnp.asarray(confidence), minimum)
    assert lengths.tolist() == loop(confidence.astype(np.float64), minimum)
    assert len(set(lengths.tolist())) > 1 or minimum in (0.0, 1.0)


def test_confidence_at_the_threshold_is_kept() -> None:
    assert threshold(jnp.zeros((1, 3)), 0.5).tolist() == [3]


def test_a_later_confidence_never_changes_an_earlier_decision() -> None:
    """Trap 29: whether draft k is verified depends on c_1..c_k alone."""
    confidence = jax.random.normal(jax.random.key(0), (40, 4))
    for k in range(1, 5):
        changed = confidence.at[:, k:].set(-confidence[:, k:])
        before, after = (jnp.minimum(threshold(c, 0.5), k) for c in (confidence, changed))
        np.testing.assert_array_equal(before, after)


def test_schedule_chooses_by_the_minimum() -> None:
    tokens, logits = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3, 1))
    confident = Proposal(tokens, logits, jnp.asarray([[5.0, -5.0, 5.0], [5.0, 5.0, 5.0]]))
    assert schedule(confident, None).tolist() == fixed(tokens).tolist() == [3, 3]
    assert schedule(confident, 0.5).tolist() == [1, 3]
    with pytest.raises(ValueError, match="confidence head"):
        schedule(Proposal(tokens, logits, None), 0.5)
