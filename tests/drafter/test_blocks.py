import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.drafter.blocks import Anchors, block_targets, block_tokens, sample_anchors

LOSS_MASK = np.array([[0, 0, 1, 1, 1, 0, 0, 1, 1, 0], [0] * 10, [1] * 10], np.uint8)


def test_anchors_are_all_candidates_when_there_is_room():
    anchors = sample_anchors(jax.random.split(jax.random.key(0), 3), jnp.asarray(LOSS_MASK), 12)
    assert np.asarray(anchors.positions)[0].tolist() == [2, 3, 7] + [0] * 9
    assert np.asarray(anchors.keep).sum(1).tolist() == [3, 0, 9]
    assert np.asarray(anchors.positions)[2, :9].tolist() == list(range(9))


def test_anchors_are_a_uniform_sorted_subset():
    """Each of 9 candidates is taken in 4 / 9 of the draws; 5 sigma of a binomial over 3000 draws."""
    draws = 3000
    keys = jax.random.split(jax.random.key(1), draws)
    anchors = sample_anchors(keys, jnp.ones((draws, 10), jnp.uint8), 4)
    positions = np.asarray(anchors.positions)
    assert np.asarray(anchors.keep).all() and (np.diff(positions, axis=1) > 0).all()
    share = np.bincount(positions.ravel(), minlength=10) / draws
    assert share[9] == 0
    np.testing.assert_allclose(share[:9], 4 / 9, atol=5 * np.sqrt(4 / 9 * 5 / 9 / draws))


def test_a_sequence_draws_the_same_anchors_in_any_batch():
    keys = jax.random.split(jax.random.key(2), 3)
    together = sample_anchors(keys, jnp.asarray(LOSS_MASK), 2)
    alone = sample_anchors(keys[2:], jnp.asarray(LOSS_MASK[2:]), 2)
    np.testing.assert_array_equal(together.positions[2], alone.positions[0])


def test_block_targets_against_a_loop():
    rng = np.random.default_rng(0)
    tokens, g = rng.integers(1, 50, (3, 10)), 4
    anchors = Anchors(jnp.array([[2, 3, 7], [0, 0, 0], [0, 6, 8]]), jnp.array([[1, 1, 1], [0, 0, 0], [1, 1, 1]], bool))
    targets = block_targets(jnp.asarray(tokens), jnp.asarray(LOSS_MASK), anchors, g)
    for b in range(3):
        for a in range(3):
            supervised = bool(anchors.keep[b, a])
            for k in range(g):
                label = int(anchors.positions[b, a]) + 1 + k
                supervised = supervised and label < 10 and LOSS_MASK[b, label] == 1
                assert bool(targets.mask[b, a, k]) == supervised
                if supervised:
                    assert targets.labels[b, a, k] == tokens[b, label]
                    assert targets.prev_tokens[b, a, k] == tokens[b, label - 1]
                    assert targets.teacher_rows[b, a, k] == label - 1
    assert int(targets.mask.sum()) > 10
    assert int(targets.teacher_rows.max()) <= 9


def test_block_tokens():
    assert np.asarray(block_tokens(jnp.array([[5], [7]]), 99, 3)).tolist() == [[[5, 99, 99]], [[7, 99, 99]]]
