"""Per-request randomness: fresh in every round, the same whatever is beside it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.engine import generate, schedulers
from dspark_jax.engine.models import Models
from dspark_jax.engine.sampling import request_keys, round_uniforms
from dspark_jax.ops.sampling import UNIT


def test_draws_depend_on_key_and_position_alone() -> None:
    keys = request_keys(3, jnp.arange(6))
    together = round_uniforms(keys, jnp.arange(6) + 10, 4)
    for i in range(6):
        alone = round_uniforms(request_keys(3, jnp.asarray([i])), jnp.asarray([i + 10]), 4)
        for name in ("draft", "accept", "next"):
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(together, name)[i])


def test_a_round_without_drafts_draws_as_plain_decoding_does() -> None:
    keys, positions = request_keys(3, jnp.arange(6)), jnp.arange(6) + 10
    alone = round_uniforms(keys, positions, 0).next
    for size in (1, 7, 16):
        np.testing.assert_array_equal(round_uniforms(keys, positions, size).next, alone)


@pytest.mark.parametrize(
    "scheduler", [schedulers.adaptive(1 / 1000, probe=0), schedulers.fixed(0)], ids=lambda s: s.name
)
def test_answers_without_drafts_are_those_of_plain_decoding(models: Any, scheduler: Any) -> None:
    """Token for token, at any temperature, in rounds that draft nothing and in those that verify nothing."""
    target, prompts = models.bigram_target(models.table(8, 1)), [[1, 2], [3], [2, 0, 1]]
    both = Models(target, models.bigram_drafter(models.table(8, 2), 3))
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": (1.0, 0.7, 0.0), "seed": 5}
    expected = generate(Models(target), prompts, **options).tokens
    for got, want in zip(generate(both, prompts, scheduler=scheduler, **options).tokens, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_no_two_draws_are_the_same() -> None:
    """Requests, positions, seeds and the 2G + 1 uses within a round are all distinct."""
    drawn = []
    for seed in (0, 1):
        for position in (5, 6):
            uniforms = round_uniforms(request_keys(seed, jnp.arange(8)), jnp.full(8, position), 3)
            assert uniforms.draft.shape == uniforms.accept.shape == (8, 3, 2) and uniforms.next.shape == (8, 2)
            drawn += [np.reshape(leaf, (-1, 2)) for leaf in jax.tree.leaves(uniforms)]
    values = np.concatenate(drawn)
    assert values.dtype == np.int32 and len(np.unique(values)) == values.size == 2 * 2 * 2 * 8 * 7
    assert values.min() >= 0 and values.max() < UNIT
    for word in range(2):  # every one of the 30 bits is a coin
        ones = (values[:, word, None] >> np.arange(30) & 1).mean(axis=0)
        assert ((ones > 0.3) & (ones < 0.7)).all()
