"""Per-request randomness: fresh in every round, the same whatever is beside it."""

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.engine.sampling import request_keys, round_uniforms
from dspark_jax.ops.sampling import UNIT


def test_draws_depend_on_key_and_position_alone() -> None:
    keys = request_keys(3, jnp.arange(6))
    together = round_uniforms(keys, jnp.arange(6) + 10, 4)
    for i in range(6):
        alone = round_uniforms(request_keys(3, jnp.asarray([i])), jnp.asarray([i + 10]), 4)
        for name in ("draft", "accept", "next"):
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(together, name)[i])


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
