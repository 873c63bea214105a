"""The drafter's loss against float64 loops over blocks, and against the reference's terms, metrics and gradients."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.config import LossConfig, MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.convert.hf import drafter_tensors, import_drafter
from dspark_jax.drafter.blocks import Anchors
from dspark_jax.drafter.interface import BlockOutputs
from dspark_jax.metrics import values
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from dspark_jax.training.loss import _acceptance, drafter_loss

B, S, A, G, V, D, R = 2, 6, 3, 4, 29, 5, 3


def problem(heads=True, seed=0):
    """Stub drafter and target, block outputs with uneven and empty supervision, last hidden states."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    embedding, confidence = normal(V, R), normal(D + R)
    markov = SimpleNamespace(
        candidates=0,
        embed=lambda tokens: jnp.asarray(embedding)[tokens],
        latent=lambda hidden, previous: previous,
        w2=normal(V, R),
    )

    def predict(hidden, previous):
        return jnp.concatenate([hidden, previous], axis=-1) @ confidence - 0.5

    parts = {"markov": markov, "confidence": predict} if heads else {"markov": None, "confidence": None}
    drafter = SimpleNamespace(**parts, vocabulary=None)
    lengths = np.array([[4, 0, 2], [1, 3, 0]])
    outputs = BlockOutputs(
        hidden=normal(B, A, G, D),
        prev_tokens=rng.integers(0, V, (B, A, G)),
        labels=rng.integers(0, V, (B, A, G)),
        teacher_rows=rng.integers(0, S, (B, A, G)),
        mask=np.arange(G) < lengths[..., None],
    )
    return drafter, SimpleNamespace(head=normal(V, D), softcap=0.0), outputs, normal(B, S, D)


def definition(drafter, target, outputs, last_hidden, config):
    """Total, denominator and metrics in float64, block by block."""
    sums = {name: 0.0 for name in ("ce", "l1", "confidence", "bias", "error", "prefix")}
    accepted, counts, taus, denominator = np.zeros(G), np.zeros(G), [], 0.0
    head = target.head.astype(np.float64)

    def softmax(x):
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    for b, a in np.ndindex(B, A):
        survival, predicted, tau = 1.0, 1.0, 1.0
        for k in range(G):
            if not outputs.mask[b, a, k]:
                break
            hidden = outputs.hidden[b, a, k]
            logits = head @ hidden
            if drafter.markov is not None:
                previous = np.asarray(drafter.markov.embed(outputs.prev_tokens[b, a, k]))
                logits = logits + drafter.markov.w2.astype(np.float64) @ previous
            p, q = softmax(logits), softmax(head @ last_hidden[b, outputs.teacher_rows[b, a, k]])
            weight, l1 = np.exp(-k / config.decay), np.abs(p - q).sum()
            denominator += weight
            sums["ce"] -= weight * np.log(p[outputs.labels[b, a, k]])
            sums["l1"] += weight * l1
            accept = 1 - l1 / 2
            survival *= accept
            tau += survival
            accepted[k], counts[k] = accepted[k] + accept, counts[k] + 1
            if drafter.confidence is not None:
                c = 1 / (1 + np.exp(-float(drafter.confidence(hidden, previous))))
                predicted *= c
                sums["confidence"] -= weight * (accept * np.log(c) + (1 - accept) * np.log(1 - c))
                sums["bias"] += weight * (c - accept)
                sums["error"] += weight * abs(c - accept)
                sums["prefix"] += weight * (predicted - survival)
        if outputs.mask[b, a].any():
            taus.append(tau)
    total = config.ce * sums["ce"] + config.l1 * sums["l1"] + config.confidence * sums["confidence"]
    metrics = {name: sums[name] / denominator for name in ("ce", "l1")} | {"tv": sums["l1"] / 2 / denominator}
    metrics |= {f"accept@{k + 1}": accepted[k] / counts[k] for k in range(G)}
    metrics |= {"tau_expected": np.mean(taus), "supervised": outputs.mask.mean()}
    if drafter.confidence is not None:
        metrics["confidence"] = sums["confidence"] / denominator
        metrics["confidence_bias"] = sums["bias"] / denominator
        metrics["confidence_abs_error"] = sums["error"] / denominator
        metrics["confidence_prefix_bias"] = sums["prefix"] / denominator
    return total, denominator, metrics


@pytest.mark.parametrize("heads", [True, False], ids=["dspark", "dflash"])
@pytest.mark.parametrize("config", [LossConfig(), LossConfig(decay=1.5, ce=0.7, l1=0.2, confidence=0.3)], ids=str)
def test_equals_loops(heads, config):
    drafter, target, outputs, last_hidden = problem(heads)
    loss = jax.jit(lambda outputs, states: drafter_loss(drafter, target, outputs, states, config, vocab_chunk=5))
    sums = loss(outputs, last_hidden)
    total, denominator, metrics = definition(drafter, target, outputs, last_hidden, config)
    np.testing.assert_allclose(sums.total, total, rtol=3e-6)
    np.testing.assert_allclose(sums.denominator, denominator, rtol=3e-6)
    np.testing.assert_allclose(sums.normalised(), total / denominator, rtol=3e-6)
    got = values(sums.metrics)
    assert set(got) == set(metrics)
    for name, value in metrics.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_unsupervised_rows_may_be_nan():
    drafter, target, outputs, last_hidden = problem()

    def total(hidden):
        replaced = BlockOutputs(**{**vars(outputs), "hidden": hidden})
        sums = drafter_loss(drafter, target, replaced, last_hidden, LossConfig(), vocab_chunk=5)
        return sums.total, sums

    step = jax.jit(jax.grad(total, has_aux=True))
    want_grad, want = step(outputs.hidden)
    poisoned = np.where(outputs.mask[..., None], outputs.hidden, np.nan)
    grad, sums = step(poisoned)
    for got, expected in zip(jax.tree.leaves(sums), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.asarray(grad)[outputs.mask], np.asarray(want_grad)[outputs.mask])


def test_without_supervision_the_loss_is_zero():
    drafter, target, outputs, last_hidden = problem()
    nothing = BlockOutputs(**{**vars(outputs), "mask": np.zeros_like(outputs.mask)})
    sums = drafter_loss(drafter, target, nothing, last_hidden, LossConfig(), vocab_chunk=5)
    assert sums.normalised() == 0.0 and sums.denominator == 0.0
    assert values(sums.metrics) == {"supervised": 0.0}


def test_sums_of_parts_are_the_sums_of_the_whole():
    drafter, target, outputs, last_hidden = problem()
    loss = jax.jit(lambda outputs, states: drafter_loss(drafter, target, outputs, states, LossConfig(), vocab_chunk=5))
    whole = loss(outputs, last_hidden)
    parts = [loss(jax.tree.map(lambda x, b=b: x[b : b + 1], outputs), last_hidden[b : b + 1]) for b in range(B)]
    summed = jax.tree.map(jnp.add, *parts)
    for got, expected in zip(jax.tree.leaves(summed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, expected, rtol=3e-6, atol=1e-6)


def test_the_length_term_is_what_is_missing_of_the_expected_length():
    """Supervised positions minus expected accepted drafts, which the metrics report independently."""
    drafter, target, outputs, last_hidden = problem()
    without, with_term = (
        drafter_loss(drafter, target, outputs, last_hidden, LossConfig(length=length), vocab_chunk=5)
        for length in (0.0, 2.0)
    )
    tau = without.metrics["tau_expected"]
    missing = outputs.mask.sum() - (tau.num - tau.den)
    np.testing.assert_allclose(with_term.total - without.total, 2.0 * missing, rtol=1e-5)
    assert missing > 1


def test_rows_supervised_from_a_later_step_on_have_no_expected_length():
    """Of EAGLE-3: the row before an answer. Steps that are not supervised end a block's length."""
    mask = np.array([[[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 0]]], bool)
    tau = _acceptance(jnp.where(mask, 0.5, 0.0), jnp.asarray(mask))["tau_expected"]
    assert (tau.num, tau.den) == (1.875 + 1.5, 2)


def test_confidence_target_is_constant_but_its_features_are_not():
    drafter, target, outputs, last_hidden = problem()

    @jax.jit
    @jax.grad
    def gradient(hidden):
        replaced = BlockOutputs(**{**vars(outputs), "hidden": hidden})
        config = LossConfig(ce=0.0, l1=0.0, confidence=1.0)
        return drafter_loss(drafter, target, replaced, last_hidden, config, vocab_chunk=5).total

    # The head is linear, so its gradient is along one direction; anything else would have come through the target.
    got = np.asarray(gradient(outputs.hidden))
    previous = drafter.markov.embed(outputs.prev_tokens)
    direction = np.asarray(jax.grad(lambda h: jnp.sum(drafter.confidence(h, previous)))(outputs.hidden))
    along = np.sum(got * direction, axis=-1, keepdims=True) / np.sum(direction**2, axis=-1, keepdims=True) * direction
    np.testing.assert_allclose(got, along, atol=1e-6)
    assert np.abs(got[outputs.mask]).max() > 1e-2


RENAMED = {"confidence_cumprod_bias": "confidence_prefix_bias", "tau_probabilistic": "tau_expected"}


@pytest.fixture(scope="module")
def case(golden_block_case):
    """What the reference computed, and ours with its gradient."""
    directory, target_directory = golden_block_case.folder, golden_block_case.target
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    arch = TargetArchitecture.from_hf(target_directory)
    target = load_target(TargetConfig(path=str(target_directory), architecture=arch), mesh)
    config, drafter = import_drafter(directory / "draft", mesh)
    io, expected = load_file(directory / "io.safetensors"), golden_block_case.read("io.json")
    weights = expected["loss"]["weights"]
    loss_config = LossConfig(
        expected["loss"]["loss_decay_gamma"],
        weights["ce_loss_alpha"],
        weights["l1_loss_alpha"],
        weights["confidence_head_alpha"],
    )
    anchors = Anchors(jnp.asarray(io["anchor_positions"], jnp.int32), jnp.asarray(io["block_keep_mask"], bool))
    tokens, loss_mask = jnp.asarray(io["input_ids"], jnp.int32), jnp.asarray(io["loss_mask"])

    @jax.jit
    def step(drafter, features, states):
        def loss(drafter):
            outputs = drafter(target, features, tokens, loss_mask, anchors)
            sums = drafter_loss(drafter, target, outputs, states, loss_config, vocab_chunk=50)
            return sums.normalised(), sums

        return jax.value_and_grad(loss, has_aux=True)(drafter)

    (loss, sums), grads = step(drafter, io["target_hidden_states"], io["target_last_hidden_states"])
    return expected, load_file(directory / "grads.safetensors"), loss, sums, drafter_tensors(grads, config)


def test_golden_terms_and_metrics(case):
    expected, _, loss, sums, _ = case
    terms = expected["loss"]["terms"]
    np.testing.assert_allclose(loss, expected["loss"]["total"], rtol=1e-6)
    for name in ("ce", "l1", "confidence"):
        if terms[f"{name}_loss_den"]:
            np.testing.assert_allclose(sums.metrics[name].num, terms[f"{name}_loss_num"], rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(sums.metrics[name].den, terms[f"{name}_loss_den"], rtol=1e-6, err_msg=name)
        elif name == "confidence":
            assert name not in sums.metrics
    ours = values(sums.metrics)
    for key, value in expected["metrics"].items():
        name = key.removeprefix("train/").removesuffix("_loss")
        if name.startswith("accept_rate@"):
            name = f"accept@{int(name.split('@')[1]) + 1}"
        if name != "loss":
            np.testing.assert_allclose(ours[RENAMED.get(name, name)], value, rtol=1e-5, atol=1e-6, err_msg=key)


def test_golden_gradients(case):
    _, expected, _, _, grads = case
    assert set(grads) == set(expected)
    for name, grad in expected.items():
        # The reference's own float32 error is 3e-6 of the largest entry.
        np.testing.assert_allclose(grads[name], grad, atol=1e-5 * np.abs(grad).max(), err_msg=name)
