"""EAGLE-3 with a layer of Llama, further norms and a vocabulary of its own: against loops in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import Config, DrafterConfig, LossConfig, TargetArchitecture
from dspark_jax.convert.hf import drafter_tensors
from dspark_jax.drafter import make_drafter
from dspark_jax.drafter.blocks import Anchors
from dspark_jax.kinds import as_kind
from dspark_jax.metrics import values
from dspark_jax.ops.sampling import Sampling
from dspark_jax.target.decode_weights import decode_weights
from dspark_jax.training.loss import drafter_loss
from dspark_jax.vocabulary import encode_vocabulary

V, D, HEADS, KV, H, G, S, THETA = 23, 16, 4, 2, 8, 3, 9, 1e4
ARCH = TargetArchitecture("qwen3", V, D, 6, HEADS, KV, H, 24, 1e-6, THETA, False, 64)
IDS = np.array([0, 2, 3, 5, 7, 11, 12, 13, 17, 19, 22])
LLAMA = DrafterConfig(
    kind="eagle3", num_layers=1, block_size=G, target_layer_ids=(1, 2, 4), mask_token_id=0, markov_rank=0,
    confidence_head=False, confidence_with_markov=False, qk_norms=False,
)  # fmt: skip
REDUCED = dataclasses.replace(LLAMA, draft_vocab_size=len(IDS), draft_vocabulary=encode_vocabulary(IDS, V))
RNG = np.random.default_rng(5)
EMBEDDING, HEAD = (RNG.normal(size=(V, D)).astype(np.float32) for _ in range(2))
FEATURES = RNG.normal(size=(S, 3 * D)).astype(np.float32)
LAST = RNG.normal(size=(S, D)).astype(np.float32)
TOKENS = RNG.integers(0, V, S)
LOSS = as_kind(Config(), "eagle3").loss


class Matrices:
    """A target's embedding and LM head."""

    softcap, dtype, arch = 0.0, jnp.float32, ARCH
    head = jnp.asarray(HEAD)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return jnp.asarray(EMBEDDING)[tokens]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.head.T


def drafter(config: DrafterConfig) -> Any:
    """Random, with norms that are not 1."""
    made = make_drafter(ARCH, config, rngs=nnx.Rngs(2))
    draw = np.random.default_rng(3)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape) * 0.3 + (x.ndim < 3), jnp.float32), made)


def rms(x: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + ARCH.rms_norm_eps) * weight


def turned(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Heads [T, N, H] with their halves rotated."""
    phase = positions[:, None, None] * THETA ** (-np.arange(H // 2) / (H // 2))
    a, b = x[..., : H // 2], x[..., H // 2 :]
    return np.concatenate([a * np.cos(phase) - b * np.sin(phase), b * np.cos(phase) + a * np.sin(phase)], axis=-1)


def steps(w: dict[str, np.ndarray], norms: tuple[str, ...] = ()) -> np.ndarray:
    """[G, S, D] after the final norm: each step of the training-time test, row after row, as published."""
    features = FEATURES.astype(np.float64)
    if "norm_before_fc" in norms:
        features = rms(features, w["input_norm.weight"])
    if "fc_norm" in norms:
        parts = np.split(features, 3, axis=-1)
        features = np.concatenate([rms(x, w[f"fc_norm.{i}.weight"]) for i, x in enumerate(parts)], axis=-1)
    layer = {n.removeprefix("layers.0."): v for n, v in w.items() if n.startswith("layers.0.")}
    hidden, keys, vals, found = features @ w["fc.weight"].T, [], [], []
    for step in range(G):
        following = EMBEDDING[np.append(TOKENS[step + 1 :], [TOKENS[-1]] * (step + 1))].astype(np.float64)
        normed = rms(hidden, layer["hidden_norm.weight"])
        both = np.concatenate([rms(following, layer["input_layernorm.weight"]), normed], axis=-1)
        at = np.arange(S) + step
        query, key, value = ((both @ layer[f"self_attn.{n}_proj.weight"].T).reshape(S, -1, H) for n in ("q", "k", "v"))
        query = turned(query, at)
        keys.append(np.repeat(turned(key, at), HEADS // KV, axis=1))
        vals.append(np.repeat(value, HEADS // KV, axis=1))
        heads = np.zeros((S, HEADS, H))
        for row, head in np.ndindex(S, HEADS):
            seen_keys = [*keys[0][: row + 1, head], *(k[row, head] for k in keys[1:])]
            seen = [*vals[0][: row + 1, head], *(v[row, head] for v in vals[1:])]
            scores = np.exp([query[row, head] @ k / np.sqrt(H) for k in seen_keys])
            heads[row, head] = scores / scores.sum() @ np.asarray(seen)
        x = normed if "norm_before_residual" in norms else hidden
        x = x + heads.reshape(S, -1) @ layer["self_attn.o_proj.weight"].T
        mid = rms(x, layer["post_attention_layernorm.weight"])
        gate, up = (mid @ layer[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
        found.append(rms(x, w["norm.weight"]))
        hidden = found[-1] if "norm_output" in norms else x
    return np.stack(found)


def run(model: Any, tokens: np.ndarray = TOKENS) -> Any:
    features = jnp.concatenate([jnp.asarray(EMBEDDING)[tokens], FEATURES], axis=-1)[None]
    every = Anchors(jnp.zeros((1, S), jnp.int32), jnp.zeros((1, S), bool))
    return _run(model, features, jnp.asarray(tokens)[None], every)


@jax.jit
def _run(model: Any, features: jax.Array, tokens: jax.Array, every: Anchors) -> Any:
    return model(Matrices(), features, tokens, jnp.ones((1, S)), every)


def weights_of(model: Any, config: DrafterConfig) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float64) for name, value in drafter_tensors(model, config).items()}


NORMS = [(), ("norm_before_residual",), ("norm_before_fc", "norm_output"), ("fc_norm", "norm_before_residual")]


@pytest.mark.parametrize(
    "norms", [NORMS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in NORMS[1:3]), NORMS[3]]
)
def test_every_step_with_a_layer_of_llama(norms: tuple[str, ...]) -> None:
    config = dataclasses.replace(LLAMA, eagle3_norms=norms)
    model = drafter(config)
    weights = weights_of(model, config)
    assert not any("q_norm" in name or "k_norm" in name for name in weights)
    want, found = steps(weights, norms), run(model).hidden
    for step in range(G):
        real = S - 1 - step
        np.testing.assert_allclose(found[0, :real, step], want[step, :real], atol=2e-4)


@pytest.mark.parametrize("norms", [NORMS[2], *(pytest.param(one, marks=pytest.mark.slow) for one in NORMS[:2])])
def test_drafts_are_what_the_training_pass_gives(norms: tuple[str, ...]) -> None:
    """Rows of the cache, fused weights, and logits of the whole vocabulary: minus infinity outside the draft's."""
    config = dataclasses.replace(REDUCED, eagle3_norms=norms)
    model, start = drafter(config), 4
    decoding = decode_weights(model, jnp.float32)
    features = jnp.concatenate([jnp.asarray(EMBEDDING)[TOKENS], FEATURES], axis=-1)[None]
    cache = decoding.init_cache(1, 16)
    place = jnp.arange(start)[None]
    cache = decoding.extend(cache, features[:, :start], jnp.asarray(TOKENS)[None, :start], place, jnp.array([start]))
    anchor = jnp.asarray(TOKENS[start : start + 1])
    greedy = Sampling.constant(0.0, 1)
    at, draws = jnp.array([start]), jnp.zeros((1, G, 2), jnp.int32)
    proposal, _ = jax.jit(lambda *given: decoding.propose(Matrices(), *given, greedy))(cache, anchor, at, draws)
    tokens = np.concatenate([TOKENS[: start + 1], np.asarray(proposal.tokens[0]), TOKENS[start + 1 + G :]])
    hidden = run(model, tokens).hidden[0, start - 1]
    logits = np.asarray(proposal.logits[0])
    np.testing.assert_allclose(logits[:, IDS], hidden @ model.vocabulary.head[...].T, atol=2e-4)
    outside = np.setdiff1d(np.arange(V), IDS)
    assert np.isneginf(logits[:, outside]).all() and set(np.asarray(proposal.tokens[0])) <= {*IDS}


def test_logits_in_bfloat16_of_several_requests() -> None:
    """A CPU has no product in bfloat16 that is turned round."""
    head = drafter(REDUCED).vocabulary
    rows = jnp.asarray(LAST, jnp.bfloat16)
    want = np.asarray(rows, np.float32) @ np.asarray(head.head[...].astype(jnp.bfloat16), np.float32).T
    for module in (head, fused(head)):
        logits = np.asarray(jax.jit(lambda module, x: module.unembed(x))(module, rows))
        np.testing.assert_allclose(logits[:, IDS], want, atol=1e-4)
        assert np.isneginf(np.delete(logits, IDS, axis=1)).all()


def fused(module: Any) -> Any:
    """A copy with the weights that decoding wants."""
    copy = jax.tree.map(lambda x: x, module)
    copy.fuse_weights(jnp.bfloat16, join=True)
    return copy


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def definition(model: Any) -> tuple[float, np.ndarray, float]:
    """Loss times rows, gradient of the head and covered mass: SpecForge's rule, position by position.

    The target's distribution is renormalised over the draft vocabulary; positions at which its likeliest token is
    outside have weight 0; step s weighs 0.8^s.
    """
    out = run(model)
    hidden, head = np.asarray(out.hidden[0], np.float64), np.asarray(model.vocabulary.head[...], np.float64)
    total, gradient, masses = 0.0, np.zeros_like(head), []
    for row, step in np.ndindex(S, G):
        if not out.mask[0, row, step]:
            continue
        logits = HEAD.astype(np.float64) @ LAST[row + step + 1]
        if logits.argmax() not in IDS:
            continue
        masses.append(softmax(logits)[IDS].sum())
        q, p = softmax(logits[IDS]), softmax(head @ hidden[row, step])
        total += 0.8**step * -np.sum(q * np.log(p))
        gradient += 0.8**step * np.outer(p - q, hidden[row, step])
    return total, gradient, float(np.mean(masses))


@functools.cache
def trained(*, train_head: bool) -> tuple[Any, Any, Any]:
    """Model, sums and gradients."""
    model = drafter(dataclasses.replace(REDUCED, train_head=train_head))

    def loss(model: Any, terms: LossConfig = LOSS) -> Any:
        sums = drafter_loss(model, Matrices(), run(model), jnp.asarray(LAST)[None], terms, vocab_chunk=4)
        return sums.total, sums

    (_, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
    return model, sums, grads


def test_the_loss_is_that_of_the_field() -> None:
    model, sums, grads = trained(train_head=True)
    total, gradient, mass = definition(model)
    np.testing.assert_allclose(sums.total, total, rtol=1e-5)
    assert sums.denominator == S  # per row, supervised or not, as without a reduced vocabulary
    np.testing.assert_allclose(grads.vocabulary.head[...], gradient, atol=1e-5 * np.abs(gradient).max())
    found = values(sums.metrics)
    np.testing.assert_allclose(found["vocabulary_mass"], mass, rtol=1e-5)
    assert "ce" not in found and 0 < found["supervised"] < 1


def test_a_head_that_is_not_trained_changes_no_other_gradient() -> None:
    _, sums, grads = trained(train_head=True)
    _, same, frozen = trained(train_head=False)
    np.testing.assert_allclose(same.total, sums.total, rtol=1e-6)
    assert not np.any(frozen.vocabulary.head[...])
    np.testing.assert_allclose(frozen.fc[...], grads.fc[...], rtol=1e-4, atol=1e-5)
