"""The multi-token-prediction module against loops in float64, and its decoding against its training pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter.blocks import Anchors, block_targets, sample_anchors
from dspark_jax.drafter.mtp import MTP
from dspark_jax.ops.sampling import Sampling
from dspark_jax.target.model import Target

S, D, N, K, H = 11, 16, 4, 2, 8
ARCH = TargetArchitecture("qwen3", 40, D, 3, N, K, H, 24, 1e-6, 1e4, False, 64)


@pytest.fixture(scope="module")
def models():
    config = DrafterConfig("mtp", 1, 1, (2,), 0, 0, False, False, initializer_range=0.3)
    drafter = MTP(ARCH, config, rngs=nnx.Rngs(1))
    for part in (drafter.hidden_norm, drafter.embedding_norm, drafter.norm, drafter.layers.attention_norm):
        part[...] = part[...] * np.linspace(0.5, 1.5, D, dtype=np.float32)
    return Target(ARCH, rngs=nnx.Rngs(0), scale=0.3), drafter


def definition(target, drafter, features, tokens):
    """[S - 1, D]: the output for every row t that has a next token, in float64."""

    layer = drafter.layers

    def array(param):
        return np.asarray(param[...], np.float64)

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2) + ARCH.rms_norm_eps) * weight

    def turn(x, position):
        half = H // 2
        phase = position * ARCH.rope_theta ** (-np.arange(half) / half)
        a, b = x[:half], x[half:]
        return np.concatenate([a * np.cos(phase) - b * np.sin(phase), b * np.cos(phase) + a * np.sin(phase)])

    embedding = np.asarray(target.embedding[...], np.float64)
    weights = {n: np.asarray(getattr(layer.attention, n)[...], np.float64)[0] for n in ("query", "key", "value", "out")}
    head_norms = [np.asarray(p[...], np.float64)[0] for p in (layer.attention.query_norm, layer.attention.key_norm)]
    mlp = [np.asarray(p[...], np.float64)[0] for p in (layer.mlp.gate, layer.mlp.up, layer.mlp.down)]
    keys, values, out = [], [], []
    for t in range(S - 1):
        hidden = norm(features[t], array(drafter.hidden_norm))
        embedded = norm(embedding[tokens[t + 1]], array(drafter.embedding_norm))
        x = np.concatenate([hidden, embedded]) @ array(drafter.projection)
        z = norm(x, np.asarray(layer.attention_norm[...], np.float64)[0])
        keys.append([turn(norm(z @ weights["key"][:, k], head_norms[1]), t) for k in range(K)])
        values.append([z @ weights["value"][:, k] for k in range(K)])
        heads = []
        for n in range(N):
            query = turn(norm(z @ weights["query"][:, n], head_norms[0]), t)
            scores = np.array([key[n // (N // K)] @ query for key in keys]) / np.sqrt(H)
            share = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            heads.append(sum(p * value[n // (N // K)] for p, value in zip(share, values, strict=True)))
        x = x + np.einsum("nh,nhd->d", np.asarray(heads), weights["out"])
        z = norm(x, np.asarray(layer.mlp_norm[...], np.float64)[0])
        gate = z @ mlp[0]
        x = x + (gate / (1 + np.exp(-gate)) * (z @ mlp[1])) @ mlp[2]
        out.append(norm(x, array(drafter.norm)))
    return np.asarray(out)


def test_training_pass_equals_loops(models):
    target, drafter = models
    assert drafter.taps == (-1, 2) and drafter.block_size == 1
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (1, S)), jnp.int32)
    out = target.forward(tokens, jnp.arange(S)[None], taps=drafter.taps)
    anchors = Anchors(jnp.zeros((1, S), jnp.int32), jnp.zeros((1, S), bool))
    outputs = jax.jit(lambda d: d(target, out.features, tokens, jnp.ones((1, S)), anchors))(drafter)
    want = definition(target, drafter, np.asarray(out.features, np.float64)[0, :, D:], np.asarray(tokens)[0])
    np.testing.assert_allclose(outputs.hidden[0, :-1, 0], want, atol=2e-5)
    np.testing.assert_array_equal(outputs.mask[0, :, 0], np.arange(S) < S - 2)
    np.testing.assert_array_equal(outputs.labels[0, : S - 2, 0], tokens[0, 2:])
    np.testing.assert_array_equal(outputs.prev_tokens[0, : S - 1, 0], tokens[0, 1:])
    np.testing.assert_array_equal(outputs.teacher_rows[0, : S - 1, 0], np.arange(1, S))


def test_a_row_is_supervised_where_an_anchor_behind_it_is(models):
    """As DSpark with blocks of one: from the last prompt token on, up to the pair before the answer's last token."""
    drafter = models[1]
    cut = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1])  # up to the end of the sequence
    padded = np.array([0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0])
    two = np.array([0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0])  # answers that begin at 2 and 6, one document or two
    bare = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0])  # supervised from its first token on, which no row precedes
    masks = np.stack([cut, padded, two, two, bare, bare])
    starts = np.zeros_like(masks)
    starts[3] = starts[5] = np.where(np.arange(S) < 5, 0, 5)
    want = [(3, 9), (3, 6), (1, 3, 5, 8), (1, 3, 5, 8), (0, 6), (0, 3, 5, 6)]  # [first, end) of each run of rows
    got = np.asarray(drafter.supervised(jnp.asarray(masks), jnp.asarray(starts)))
    for b, bounds in enumerate(want):
        rows = [t for begin, end in zip(bounds[::2], bounds[1::2], strict=True) for t in range(begin, end)]
        assert np.flatnonzero(got[b]).tolist() == rows, b
    for b in (0, 1, 2, 4):  # the rows before the anchors
        every = sample_anchors(jax.random.split(jax.random.key(0), 6), jnp.asarray(masks), S)
        block = block_targets(jnp.zeros((6, S), jnp.int32), jnp.asarray(masks), every, 1)
        anchors = np.asarray(every.positions[b])[np.asarray(block.mask[b, :, 0])]
        assert [t - 1 for t in anchors if t] == np.flatnonzero(got[b]).tolist()


@pytest.mark.slow
def test_the_draft_is_the_prediction_of_the_newest_row(models):
    target, drafter = models
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (1, S)), jnp.int32)
    out = target.forward(tokens, jnp.arange(S)[None], taps=drafter.taps)
    anchors = Anchors(jnp.zeros((1, S), jnp.int32), jnp.zeros((1, S), bool))
    outputs = drafter(target, out.features, tokens, jnp.ones((1, S)), anchors)
    for start in (1, 6, S - 1):
        cache = drafter.extend(
            drafter.init_cache(1, 16), out.features, tokens, jnp.arange(S)[None], jnp.full((1,), start)
        )
        at = jnp.full((1,), start)
        proposal, _ = drafter.propose(
            target, cache, tokens[:, start], at, jnp.zeros((1, 1, 2), jnp.int32), Sampling.constant(0.0, 1)
        )
        want = target.unembed(outputs.hidden[:, start - 1])
        np.testing.assert_allclose(proposal.logits, want, atol=2e-5)
