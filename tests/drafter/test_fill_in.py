"""Blocks that are filled in, against z-lab's published formulas in float64: rows 1..G of [anchor, G masks] predict."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import DrafterConfig, LossConfig, TargetArchitecture
from dspark_jax.convert.hf import drafter_tensors
from dspark_jax.drafter import make_drafter
from dspark_jax.drafter.blocks import Anchors
from dspark_jax.ops.sampling import Sampling
from dspark_jax.training.loss import drafter_loss

V, D, HEADS, KV, H, G, MASK = 23, 16, 4, 2, 8, 3, 22
ARCH = TargetArchitecture("qwen3", V, D, 4, HEADS, KV, H, 24, 1e-6, 1e4, True, 64)
DFLASH = DrafterConfig(
    "dflash", 2, G, (0, 2), MASK, 0, False, False, initializer_range=0.3, block_layout="fill_in"
)  # fmt: skip
RNG = np.random.default_rng(0)
EMBEDDING = RNG.normal(size=(V, D)).astype(np.float32)
FEATURES = RNG.normal(size=(2, 14, 2 * D)).astype(np.float32)
TOKENS = RNG.integers(0, V - 1, (2, 14)).astype(np.int32)
ANCHORS = np.array([[3, 4, 9], [1, 8, 11]], np.int32)


class Matrices:
    """A target's embedding, which is its LM head too."""

    arch, dtype = ARCH, jnp.float32
    softcap = 0.0
    head = jnp.asarray(EMBEDDING)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return jnp.asarray(EMBEDDING)[tokens]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.head.T


def drafter(config: DrafterConfig = DFLASH) -> Any:
    """Random also where parameters start as ones."""
    made, rng = make_drafter(ARCH, config, rngs=nnx.Rngs(1)), np.random.default_rng(5)
    shapes = jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape), nnx.state(made))
    nnx.update(made, shapes)
    return made


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * weight


def turned(heads: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rotary embedding of [rows, heads, H]: the second half is the sine's partner of the first."""
    phase = positions[:, None, None] * 1e4 ** (-np.arange(0, H, 2) / H)
    cos, sin = (np.concatenate([f(phase)] * 2, axis=-1) for f in (np.cos, np.sin))
    first, second = heads[..., : H // 2], heads[..., H // 2 :]
    return heads * cos + np.concatenate([-second, first], axis=-1) * sin


def z_lab(tensors: dict[str, np.ndarray], features: np.ndarray, anchor: int, token: int) -> np.ndarray:
    """[G, D] of the rows that predict, after the final norm: one block after the features of all rows before it.

    The block's rows are at anchor..anchor + G, and see the context and each other in both directions. Queries come from
    the block alone; keys and values from the context, which is normed once, and from the block's own normed rows.
    """
    w = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    x = EMBEDDING[[token] + [MASK] * G].astype(np.float64)
    context = rms(features[:anchor].astype(np.float64) @ w["fc.weight"].T, w["hidden_norm.weight"])
    rows = np.arange(anchor + G + 1)
    for i in range(DFLASH.num_layers):
        p = {n.removeprefix(f"layers.{i}."): v for n, v in w.items() if n.startswith(f"layers.{i}.")}
        normed = rms(x, p["input_layernorm.weight"])
        both = np.concatenate([context, normed])
        query = (normed @ p["self_attn.q_proj.weight"].T).reshape(-1, HEADS, H)
        key, value = ((both @ p[f"self_attn.{n}_proj.weight"].T).reshape(-1, KV, H) for n in "kv")
        query = turned(rms(query, p["self_attn.q_norm.weight"]), rows[anchor:])
        key = turned(rms(key, p["self_attn.k_norm.weight"]), rows)
        key, value = (np.repeat(one, HEADS // KV, axis=1) for one in (key, value))
        scores = np.einsum("qnh,knh->nqk", query, key) / np.sqrt(H)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads = np.einsum("nqk,knh->qnh", weights / weights.sum(-1, keepdims=True), value)
        x = x + heads.reshape(G + 1, -1) @ p["self_attn.o_proj.weight"].T
        normed = rms(x, p["post_attention_layernorm.weight"])
        gate, up = (normed @ p[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp.down_proj.weight"].T
    return rms(x, w["norm.weight"])[1:]


def expected() -> np.ndarray:
    tensors = drafter_tensors(drafter(), DFLASH)
    return np.stack([
        [z_lab(tensors, FEATURES[b], a, TOKENS[b, a]) for a in ANCHORS[b]] for b in range(len(ANCHORS))
    ])  # fmt: skip


def outputs(config: DrafterConfig = DFLASH, loss_mask: Any = None) -> Any:
    return forward(drafter(config), jnp.ones_like(TOKENS) if loss_mask is None else jnp.asarray(loss_mask))


@jax.jit
def forward(model: Any, loss_mask: jax.Array) -> Any:
    anchors = Anchors(jnp.asarray(ANCHORS), jnp.ones(ANCHORS.shape, bool))
    return model(Matrices(), jnp.asarray(FEATURES), jnp.asarray(TOKENS), loss_mask, anchors)


def test_training_rows() -> None:
    """Hidden states of rows 1..G; row k is supervised by the token at its own position, anchor + k."""
    found = outputs()
    np.testing.assert_allclose(found.hidden, expected(), atol=2e-5)
    at = ANCHORS[..., None] + 1 + np.arange(G)
    inside = at < TOKENS.shape[1]
    labels = np.take_along_axis(TOKENS[:, None], np.minimum(at, 13), axis=2)
    np.testing.assert_array_equal(found.mask, inside)
    np.testing.assert_array_equal(np.where(inside, found.labels, 0), np.where(inside, labels, 0))
    np.testing.assert_array_equal(np.where(inside, found.teacher_rows, 0), np.where(inside, at - 1, 0))


def test_the_loss_is_the_cross_entropy_of_the_masks_rows() -> None:
    """Its first row weighs 1, and the anchor's row has no part in it."""
    loss_mask = np.ones_like(TOKENS)
    loss_mask[0, 6:9] = 0
    terms = LossConfig(ce=1.0, l1=0.0, confidence=0.0)
    last, out = jnp.zeros((2, 14, D)), outputs(loss_mask=loss_mask)
    found = drafter_loss(drafter(), Matrices(), out, last, terms, vocab_chunk=8)
    logits = expected() @ EMBEDDING.T.astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    total = weight = 0.0
    for b, a in np.ndindex(ANCHORS.shape):
        for k in range(G):
            label = ANCHORS[b, a] + 1 + k
            if label >= 14 or not loss_mask[b, label]:
                break
            total -= np.exp(-k / 4) * logits[b, a, k, TOKENS[b, label]]
            weight += np.exp(-k / 4)
    np.testing.assert_allclose(float(found.normalised()), total / weight, rtol=1e-5)


@jax.jit
def drafts(model: Any, features: jax.Array, tokens: jax.Array, positions: jax.Array, anchors: jax.Array) -> Any:
    """What is drafted greedily after rows [N] of sequences, of which the cache has all rows."""
    count, length = tokens.shape
    cache = model.init_cache(count, length + G + 1)
    cache = model.extend(cache, features, tokens, jnp.broadcast_to(jnp.arange(length), tokens.shape), positions)
    uniforms = jnp.zeros((count, G, 2), jnp.int32)
    return model.propose(Matrices(), cache, anchors, positions, uniforms, Sampling.constant(0.0, count))[0]


@pytest.mark.parametrize(
    "config", [DFLASH, dataclasses.replace(DFLASH, kind="dspark", markov_rank=4, confidence_head=True)]
)
def test_drafts_are_what_the_training_pass_gives(config: DrafterConfig) -> None:
    """From a cache that has more behind the anchors: stale rows, of which nothing may be seen. With heads as well."""
    model, anchors = drafter(config), ANCHORS.shape[1]
    flat, tokens = ANCHORS.reshape(-1), np.repeat(TOKENS, anchors, axis=0)
    features = jnp.asarray(np.repeat(FEATURES, anchors, axis=0))
    first = jnp.asarray(tokens[np.arange(len(flat)), flat])
    proposal = drafts(model, features, jnp.asarray(tokens), jnp.asarray(flat), first)
    assert proposal.tokens.shape == (len(flat), G) and proposal.logits.shape == (len(flat), G, V)
    hidden = outputs(config).hidden.reshape(-1, G, D)
    logits = Matrices().unembed(hidden)
    if model.markov is not None:
        previous = model.markov.embed(jnp.concatenate([first[:, None], proposal.tokens[:, :-1]], axis=1))
        logits = model.markov.logits(logits, hidden, previous)
    np.testing.assert_allclose(proposal.logits, logits, atol=2e-4)
    np.testing.assert_array_equal(proposal.tokens, np.argmax(logits, axis=-1))
