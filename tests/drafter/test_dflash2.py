"""DFlash 2 against its formulas in float64: convolutions inside a block, and drafts chosen among candidates."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import LossConfig
from dspark_jax.convert.hf import drafter_tensors
from dspark_jax.drafter import make_drafter
from dspark_jax.drafter.convolution import BlockConvolution
from dspark_jax.drafter.heads.selector import SelectorHead
from dspark_jax.ops.sampling import Sampling, distribution
from dspark_jax.training.loss import drafter_loss
from tests.drafter import test_fill_in as fill_in

K, V, D, G = 4, fill_in.V, fill_in.D, fill_in.G
DFLASH2 = dataclasses.replace(
    fill_in.DFLASH, kind="dflash2", markov_rank=6, markov_head_type="selector", selector_top_k=K, conv_kernel_size=2,
    conv_group_size=4,
)  # fmt: skip
KL = LossConfig(ce=0.0, l1=0.0, confidence=0.0, soft_ce=1.0)
SELECTOR = dataclasses.replace(KL, soft_ce=0.0, extra={"selector": 1.0})


def convolved(x: np.ndarray, base: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """One block x [rows, D] with base [taps, D] and delta [rows, taps, groups], row by row and tap by tap."""
    out, width = np.zeros_like(x), x.shape[1] // delta.shape[2]
    for row, tap in np.ndindex(delta.shape[:2]):
        if tap <= row:
            out[row] += (base[tap] + np.repeat(delta[row, tap], width)) * x[row - tap]
    return out


@pytest.mark.parametrize(("rows", "taps", "group"), [(4, 2, 16), (5, 3, 4), (2, 1, 8), (3, 3, 16)])
def test_convolutions_stay_in_their_block(rows: int, taps: int, group: int) -> None:
    """Of three blocks after each other: every one as if it were alone, with a sublayer between the two."""
    rng, width = np.random.default_rng(rows), 16
    module = BlockConvolution(width, rows, taps=taps, group=group)
    base, projection = rng.normal(size=(2, taps, width)), rng.normal(size=(width, 2 * taps * (width // group)))
    module.base[...], module.projection[...] = (jnp.asarray(x, jnp.float32) for x in (base, projection))
    x = rng.normal(size=(2, 3 * rows, width))
    found = module(jnp.asarray(x, jnp.float32), lambda y: y * jnp.abs(y))
    for b, block in np.ndindex(2, 3):
        part = x[b, block * rows : (block + 1) * rows]
        delta = (part @ projection).reshape(rows, 2, taps, -1)
        inner = convolved(part, base[0], delta[:, 0])
        want = convolved(inner * np.abs(inner), base[1], delta[:, 1])
        np.testing.assert_allclose(found[b, block * rows : (block + 1) * rows], want, rtol=2e-5, atol=2e-4)


@pytest.mark.slow
def test_convolutions_begin_as_nothing() -> None:
    """So a DFlash that gets them drafts what it drafted; and gradients reach their parameters."""
    with_conv = make_drafter(fill_in.ARCH, DFLASH2, rngs=nnx.Rngs(1))
    plain = make_drafter(fill_in.ARCH, dataclasses.replace(DFLASH2, conv_kernel_size=0), rngs=nnx.Rngs(1))
    found, want = (run(model).hidden for model in (with_conv, plain))
    np.testing.assert_allclose(found, want, atol=1e-6)
    grads = jax.grad(lambda model: jnp.sum(run(model).hidden ** 2))(with_conv).backbone.layers
    for around in (grads.around_attention, grads.around_mlp):
        assert float(jnp.abs(around.base[...]).min(axis=(0, 3)).max()) > 0  # each tap of each side, in some layer
        assert float(jnp.abs(around.projection[...]).max()) > 0


def run(model: Any) -> Any:
    return fill_in.forward(model, jnp.ones_like(fill_in.TOKENS))


def test_the_whole_backbone_is_z_labs_with_convolutions_around_its_sublayers() -> None:
    """In the order norm, convolution, sublayer, convolution, residual: the formulas of DFlash with these put in."""
    model = fill_in.drafter(DFLASH2)
    weights = {name: np.asarray(value, np.float64) for name, value in drafter_tensors(model, DFLASH2).items()}
    want = np.stack([
        [with_convolutions(weights, fill_in.FEATURES[b], a, fill_in.TOKENS[b, a]) for a in fill_in.ANCHORS[b]]
        for b in range(2)
    ])  # fmt: skip
    np.testing.assert_allclose(run(model).hidden, want, atol=1e-4)


def with_convolutions(w: dict[str, np.ndarray], features: np.ndarray, anchor: int, token: int) -> np.ndarray:
    """`test_fill_in.z_lab` with a convolution before and behind attention and MLP."""
    f, heads, kv, h = fill_in, fill_in.HEADS, fill_in.KV, fill_in.H
    x = f.EMBEDDING[[token] + [f.MASK] * G].astype(np.float64)
    context = f.rms(features[:anchor].astype(np.float64) @ w["fc.weight"].T, w["hidden_norm.weight"])
    rows = np.arange(anchor + G + 1)
    for i in range(DFLASH2.num_layers):
        p = {n.removeprefix(f"layers.{i}."): v for n, v in w.items() if n.startswith(f"layers.{i}.")}

        def around(name: str, normed: np.ndarray, sublayer: Any, p: Any = p) -> np.ndarray:
            base = p[f"{name}_conv.base_kernel"]
            delta = (normed @ p[f"{name}_conv.kernel_projection.weight"].T).reshape(len(normed), 2, base.shape[1], -1)
            return convolved(sublayer(convolved(normed, base[0], delta[:, 0])), base[1], delta[:, 1])

        def attend(normed: np.ndarray, p: Any = p) -> np.ndarray:
            both = np.concatenate([context, normed])
            query = (normed @ p["self_attn.q_proj.weight"].T).reshape(-1, heads, h)
            key, value = ((both @ p[f"self_attn.{n}_proj.weight"].T).reshape(-1, kv, h) for n in "kv")
            query = f.turned(f.rms(query, p["self_attn.q_norm.weight"]), rows[anchor:])
            key = f.turned(f.rms(key, p["self_attn.k_norm.weight"]), rows)
            key, value = (np.repeat(one, heads // kv, axis=1) for one in (key, value))
            scores = np.exp(np.einsum("qnh,knh->nqk", query, key) / np.sqrt(h))
            mixed = np.einsum("nqk,knh->qnh", scores / scores.sum(-1, keepdims=True), value)
            return mixed.reshape(len(normed), -1) @ p["self_attn.o_proj.weight"].T

        def mlp(normed: np.ndarray, p: Any = p) -> np.ndarray:
            gate, up = (normed @ p[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            return (gate / (1 + np.exp(-gate)) * up) @ p["mlp.down_proj.weight"].T

        x = x + around("attention", f.rms(x, p["input_layernorm.weight"]), attend)
        x = x + around("mlp", f.rms(x, p["post_attention_layernorm.weight"]), mlp)
    return f.rms(x, w["norm.weight"])[1:]


def test_drafts_are_what_the_training_pass_gives() -> None:
    """Decoding's rows, with stale ones behind the anchors, and the selector's walk."""
    fill_in.test_drafts_are_what_the_training_pass_gives(DFLASH2)


@functools.cache
def head() -> SelectorHead:
    made = SelectorHead(V, D, 6, scale=1.0, rngs=nnx.Rngs(2), candidates=K)
    return made


def score(base: np.ndarray, hidden: np.ndarray, previous: int) -> np.ndarray:
    """[V] in float64, minus infinity but for the K largest of base [V]."""
    w1, w2, projection = (np.asarray(x[...], np.float64) for x in (head().w1, head().w2, head().projection))
    out, chosen = np.full(V, -np.inf), np.argsort(-base)[:K]
    out[chosen] = base[chosen] + (w1[previous] * (hidden @ projection)) @ w2[chosen].T
    return out


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_walk_is_the_chain_over_candidates(temperature: float) -> None:
    """Greedy: the best candidate after the one before. Sampled: q is the distribution of the draw, over many draws."""
    rng, count = np.random.default_rng(3), 4000
    base, hidden = rng.normal(size=(2, V)), rng.normal(size=(2, D))
    bases, states = [
        jnp.broadcast_to(jnp.asarray(x, jnp.float32)[:, None], (2, count, x.shape[1])) for x in (base, hidden)
    ]
    uniforms = jax.random.randint(jax.random.key(0), (2, count, 2), 0, 1 << 30)
    sampling = Sampling.constant(temperature, count)
    tokens, logits = head().sample(bases, states, jnp.full(count, 5), uniforms, sampling)
    first = score(base[0], hidden[0], 5)
    np.testing.assert_allclose(logits[0, 0], first, atol=1e-5)
    for token in np.unique(tokens[0]):
        row = int(np.argmax(np.asarray(tokens[0]) == token))
        np.testing.assert_allclose(logits[1, row], score(base[1], hidden[1], int(token)), atol=1e-5)
    if not temperature:
        assert set(np.unique(tokens[0])) == {int(np.argmax(first))}
        assert set(np.unique(tokens[1])) == {int(np.argmax(score(base[1], hidden[1], int(tokens[0, 0]))))}
        return
    pairs = np.zeros((V, V))
    np.add.at(pairs, (np.asarray(tokens[0]), np.asarray(tokens[1])), 1)
    chain = softmax(first / temperature)
    want = np.stack([chain[a] * softmax(score(base[1], hidden[1], a) / temperature) for a in range(V)])
    scored = np.asarray(distribution(logits[0], sampling))
    np.testing.assert_allclose(scored[0], chain, atol=1e-6)
    kept = want > 0
    assert pairs[~kept].sum() == 0 and kept.sum() == K * K
    expected = count * want[kept]
    statistic, freedom = np.sum((pairs[kept] - expected) ** 2 / np.maximum(expected, 1)), K * K - 1
    assert statistic < freedom + 6 * np.sqrt(2 * freedom), statistic


def test_ties_are_drawn_as_they_are_scored() -> None:
    """Candidates are in the order of their ids: of equal ones a greedy draft is that which the rule scores with 1."""
    base = jnp.zeros((1, 2, V)).at[:, :, jnp.array([20, 3, 11, 7])].set(1.0)
    flat = SelectorHead(V, D, 6, scale=0.0, rngs=nnx.Rngs(0), candidates=K)
    sampling = Sampling.constant(0.0, 2)
    tokens, logits = flat.sample(base, jnp.ones((1, 2, D)), jnp.zeros(2, int), jnp.zeros((1, 2, 2), int), sampling)
    np.testing.assert_array_equal(jnp.argmax(distribution(logits[0], sampling), axis=-1), tokens[0])
    assert tokens.tolist() == [[3, 3]]


@pytest.mark.slow
def test_filters_cut_candidates_as_they_cut_the_vocabulary() -> None:
    """So a draft is drawn from what scores it: of a greedy request, and of top-k, top-p and min-p."""
    rng = np.random.default_rng(4)
    base, hidden = (jnp.asarray(rng.normal(size=(1, 4, n)), jnp.float32) for n in (V, D))
    sampling = Sampling(
        jnp.array([0.0, 0.8, 1.0, 1.2]), jnp.array([0, 2, 0, 0]), jnp.array([1.0, 1.0, 0.6, 1.0]),
        jnp.array([0.0, 0.0, 0.0, 0.4]),
    )  # fmt: skip
    unary, ids = head().best(base[0])
    scores = head().scores(unary, head().step(None, hidden[0], head().embed(jnp.full(4, 5)))[1], ids)
    uniforms = jax.random.randint(jax.random.key(1), (1, 4, 2), 0, 1 << 30)
    tokens, logits = head().sample(base, hidden, jnp.full(4, 5), uniforms, sampling)
    whole, few = distribution(logits[0], sampling), distribution(scores, sampling)
    np.testing.assert_allclose(jnp.take_along_axis(whole, ids, axis=-1), few, atol=1e-6)
    assert (np.take_along_axis(np.asarray(whole), np.asarray(tokens.T), axis=-1) > 0).all()
    assert [int((row > 0).sum()) for row in few][:2] == [1, 2] and (np.asarray(few)[2:] == 0).any()


def losses(config: LossConfig, chunk: int = 5) -> Any:
    """The loss as a compiled function of the drafter."""
    last = jnp.asarray(np.random.default_rng(9).normal(size=(2, 14, D)), jnp.float32)
    return jax.jit(lambda model: drafter_loss(model, fill_in.Matrices(), run(model), last, config, vocab_chunk=chunk))


def test_the_selectors_loss_is_a_cross_entropy_over_candidates() -> None:
    """With the target's likeliest token in the last place where it is no candidate, and after the true token before."""
    model = fill_in.drafter(DFLASH2)
    out = run(model)
    hidden, mask = np.asarray(out.hidden, np.float64), np.asarray(out.mask)
    w1, w2, projection = (
        np.asarray(x[...], np.float64) for x in (model.markov.w1, model.markov.w2, model.markov.projection)
    )
    last = np.random.default_rng(9).normal(size=(2, 14, D)).astype(np.float32)
    total = weight = found = 0.0
    for b, a, k in zip(*np.nonzero(mask), strict=True):
        base = fill_in.EMBEDDING.astype(np.float64) @ hidden[b, a, k]
        row = fill_in.ANCHORS[b, a] + k
        target, ids = int(np.argmax(fill_in.EMBEDDING @ last[b, row])), np.argsort(-base)[:K]
        found += target in ids
        ids = ids if target in ids else np.append(ids[:-1], target)
        latent = w1[fill_in.TOKENS[b, row]] * (hidden[b, a, k] @ projection)
        logits = base[ids] + w2[ids] @ latent
        total -= np.exp(-k / 4) * np.log(softmax(logits)[list(ids).index(target)])
        weight += np.exp(-k / 4)
    sums = losses(SELECTOR)(model)
    np.testing.assert_allclose(float(sums.total), total, rtol=1e-5)
    np.testing.assert_allclose(float(sums.denominator), weight, rtol=1e-5)
    recall = sums.metrics["candidate_recall"]
    assert (int(recall.num), int(recall.den)) == (found, mask.sum()) and 0 < found < mask.sum()


@pytest.mark.slow
def test_terms_over_the_vocabulary_see_the_base_logits() -> None:
    """The selector changes neither the KL nor the acceptance that is reported, and gets no gradient from them."""
    model = fill_in.drafter(DFLASH2)
    plain = fill_in.drafter(DFLASH2)
    plain.markov = None
    one, other = (losses(KL)(x) for x in (model, plain))
    np.testing.assert_allclose(one.total, other.total, rtol=1e-6)
    np.testing.assert_allclose(one.metrics["accept@1"].num, other.metrics["accept@1"].num, rtol=1e-6)
    grads = jax.grad(lambda x: losses(KL)(x).total)(model)
    assert float(jnp.abs(grads.markov.w2[...]).max()) == 0 < float(jnp.abs(grads.backbone.fc[...]).max())


def test_gradients_of_the_selectors_loss() -> None:
    """Of every parameter, against differences of the loss; all its parts, and the backbone through the base logits."""
    model, loss = fill_in.drafter(DFLASH2), losses(SELECTOR)
    grads = jax.grad(lambda x: loss(x).total)(model)
    for path in (("markov", "w1"), ("markov", "w2"), ("markov", "projection"), ("backbone", "fc")):
        at, grad = (functools.reduce(getattr, path, x) for x in (model, grads))
        direction = jnp.sign(grad[...])
        before = at[...]
        ends = []
        for step in (1e-3, -1e-3):
            at[...] = before + step * direction
            ends.append(float(loss(model).total))
        at[...] = before
        np.testing.assert_allclose(
            (ends[0] - ends[1]) / 2e-3, float(jnp.abs(grad[...]).sum()), rtol=2e-2, err_msg=str(path)
        )
