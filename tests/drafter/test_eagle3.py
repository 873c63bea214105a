"""EAGLE-3 against the PyTorch reference: every step's logits, the loss, all gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.config import Config, MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.convert.hf import drafter_tensors, import_drafter
from dspark_jax.drafter.blocks import Anchors
from dspark_jax.kinds import as_kind
from dspark_jax.metrics import values
from dspark_jax.ops.sampling import Sampling
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from dspark_jax.training.loss import drafter_loss

EAGLE3_LOSS = as_kind(Config(), "eagle3").loss

LOGITS = 4e-5  # as in test_golden


@pytest.fixture(scope="module")
def case(golden_eagle3_case):
    """Target, drafter, its config, recorded arrays, and our features: embeddings first, then the recorded taps."""
    directory, path = golden_eagle3_case.folder, golden_eagle3_case.target
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    arch = TargetArchitecture.from_hf(path)
    target = load_target(TargetConfig(path=str(path), dtype="float32", architecture=arch), mesh)
    config, drafter = import_drafter(directory / "draft", mesh)
    io = load_file(directory / "io.safetensors")
    tokens = jnp.asarray(io["input_ids"], jnp.int32)
    features = jnp.concatenate([target.embed(tokens), io["target_hidden_states"]], axis=-1)
    return target, config, drafter, io, tokens, features


def everywhere(tokens):
    return Anchors(jnp.zeros_like(tokens), jnp.zeros(tokens.shape, bool))


@pytest.fixture(scope="module")
def trained(case):
    """(loss, (sums, outputs)) and gradients over all rows."""
    target, _, drafter, io, tokens, features = case

    @jax.jit
    def step(drafter):
        def loss(drafter):
            outputs = drafter(target, features, tokens, jnp.asarray(io["loss_mask"]), everywhere(tokens))
            states = jnp.asarray(io["target_last_hidden_states"])
            sums = drafter_loss(drafter, target, outputs, states, EAGLE3_LOSS, vocab_chunk=100)
            return sums.normalised(), (sums, outputs)

        return jax.value_and_grad(loss, has_aux=True)(drafter)

    return step(drafter)


def test_every_step_of_the_training_time_test(case, trained, golden_eagle3_case):
    target, config, drafter, io, _, _ = case
    steps, about = io["step_position_mask"].shape[0], golden_eagle3_case.about
    assert config.kind == "eagle3" and drafter.block_size == steps == about["ttt"]
    assert drafter.taps == (-1, *about["ids"])
    outputs = trained[0][1][1]
    logits = np.asarray(target.unembed(outputs.hidden))
    masks = np.asarray(outputs.mask)
    lengths, rows = io["attention_mask"].sum(1, keepdims=True), np.arange(masks.shape[1])
    for step in range(steps):
        want = io["step_position_mask"][step].astype(bool)
        np.testing.assert_array_equal(masks[:, :, step], want, f"step {step}")
        real = want | (rows < lengths - 2 - step)  # rows whose tokens are all there, supervised or not
        got, recorded = logits[:, :, step], io["step_draft_logits"][step]
        np.testing.assert_allclose(got[real], recorded[real], atol=LOGITS, err_msg=f"step {step}")


def test_loss_and_metrics(case, trained, golden_eagle3_case):
    expected, tokens = golden_eagle3_case.read("io.json"), case[4]
    loss, (sums, _) = trained[0]
    np.testing.assert_allclose(loss, expected["loss"]["total"], rtol=1e-6)
    assert sums.denominator == tokens.size  # prompts and padding included
    got = values(sums.metrics)
    for step in range(expected["ttt_length"]):
        want = expected["metrics"][f"train/accept_rate@{step}"]
        np.testing.assert_allclose(got[f"accept@{step + 1}"], want, rtol=1e-5, err_msg=f"step {step}")


def test_gradients(case, trained, golden_eagle3_case):
    expected = load_file(golden_eagle3_case.folder / "grads.safetensors")
    grads = drafter_tensors(trained[1], case[1])
    assert set(grads) == set(expected)
    for name, grad in expected.items():
        np.testing.assert_allclose(grads[name], grad, atol=1e-5 * np.abs(grad).max(), err_msg=name)


def test_some_rows_are_those_rows_of_all(case, trained):
    target, _, drafter, io, tokens, features = case
    anchors = Anchors(jnp.array([[12, 17, 30], [4, 18, 0]]), jnp.array([[1, 1, 1], [1, 1, 0]], bool))
    some = jax.jit(lambda d: d(target, features, tokens, jnp.asarray(io["loss_mask"]), anchors))(drafter)
    whole = trained[0][1][1]
    assert not some.mask[1, 2].any() and some.mask[1, 1].any()
    for b, a in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        row = int(anchors.positions[b, a])
        for name in ("labels", "prev_tokens", "teacher_rows", "mask"):
            np.testing.assert_array_equal(getattr(some, name)[b, a], getattr(whole, name)[b, row], name)
        kept = np.asarray(some.mask[b, a])
        np.testing.assert_allclose(some.hidden[b, a][kept], whole.hidden[b, row][kept], atol=2e-5)


def test_decoding_equals_training(case):
    """Rows come from the cache, extended in pieces with garbage after them, instead of from the sequence."""
    target, _, drafter, io, tokens, features = case
    batch, steps = tokens.shape[0], drafter.block_size
    start = min(17, tokens.shape[1] - steps - 1)
    cache = drafter.init_cache(batch, 48)
    extend = jax.jit(drafter.extend)
    for begin, end in ((0, 9), (9, 10), (10, start)):
        rows = jnp.full((batch, 12, features.shape[-1]), 1e6).at[:, : end - begin].set(features[:, begin:end])
        positions = jnp.broadcast_to(begin + jnp.arange(12), (batch, 12))
        counts = jnp.full((batch,), end - begin)
        cache = extend(cache, rows, jnp.zeros((batch, 12), jnp.int32), positions, counts)
        untouched = extend(cache, rows, jnp.zeros((batch, 12), jnp.int32), positions + end - begin, 0 * counts)
        np.testing.assert_array_equal(untouched.newest, cache.newest)
    propose = jax.jit(lambda *args: drafter.propose(target, *args, Sampling.constant(0.0, batch)))
    proposal, _ = propose(cache, tokens[:, start], jnp.full((batch,), start), jnp.zeros((batch, steps, 2), jnp.int32))
    forced = tokens.at[:, start + 1 : start + 1 + steps].set(proposal.tokens)
    embedded = jnp.concatenate([target.embed(forced), features[..., target.arch.hidden_size :]], axis=-1)
    anchors = Anchors(jnp.full((batch, 1), start - 1), jnp.ones((batch, 1), bool))
    out = jax.jit(lambda d: d(target, embedded, forced, jnp.ones_like(tokens), anchors))(drafter)
    logits = target.unembed(out.hidden)[:, 0]
    np.testing.assert_allclose(proposal.logits, logits, atol=LOGITS)
    np.testing.assert_array_equal(proposal.tokens, jnp.argmax(logits, axis=-1))


def test_the_weights_of_the_steps():
    steps = np.exp(-np.arange(7) / EAGLE3_LOSS.decay)
    np.testing.assert_allclose(steps, 0.8 ** np.arange(7), rtol=1e-12)
    assert math.isclose(EAGLE3_LOSS.soft_ce, 1.0)
