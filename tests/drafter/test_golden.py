"""DSpark and DFlash against the PyTorch reference: logits, masks, confidence (losses and gradients: tests/training)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.config import MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.convert.hf import import_drafter
from dspark_jax.drafter.blocks import Anchors, anchor_candidates, block_targets, block_tokens
from dspark_jax.ops.sampling import Sampling
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target


@pytest.fixture(scope="module")
def case(golden_block_case):
    directory, target_directory = golden_block_case.folder, golden_block_case.target
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    arch = TargetArchitecture.from_hf(target_directory)
    target = load_target(TargetConfig(path=str(target_directory), architecture=arch), mesh)
    config, drafter = import_drafter(directory / "draft", mesh)
    # The rounding of the reference's own logits, float32 against float64, is on record.
    rounding = golden_block_case.read("io.json")["fp32_vs_fp64"]["max_abs_draft_logits"]
    io = load_file(directory / "io.safetensors") | {"tolerance": 2.5 * max(rounding, 1.6e-5)}
    anchors = Anchors(jnp.asarray(io["anchor_positions"], jnp.int32), jnp.asarray(io["block_keep_mask"], bool))
    return target, config, drafter, io, anchors


def test_target_features(case):
    target, config, _, io, _ = case
    tokens = jnp.asarray(io["input_ids"], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    out = jax.jit(lambda t: target.forward(t, positions, taps=config.target_layer_ids))(tokens)
    real = io["attention_mask"].astype(bool)
    for ours, name in ((out.features, "target_hidden_states"), (out.last_hidden, "target_last_hidden_states")):
        np.testing.assert_allclose(np.asarray(ours)[real], io[name][real], rtol=0, atol=1e-4)


def test_labels_and_masks(case):
    _, config, _, io, anchors = case
    tokens, loss_mask = jnp.asarray(io["input_ids"], jnp.int32), jnp.asarray(io["loss_mask"])
    np.testing.assert_array_equal(anchor_candidates(loss_mask)[:, :-1], io["anchor_candidate_mask"].astype(bool))
    assert not anchor_candidates(loss_mask)[:, -1].any()
    targets = block_targets(tokens, loss_mask, anchors, config.block_size)
    mask, keep = io["eval_mask"].astype(bool), io["block_keep_mask"].astype(bool)
    np.testing.assert_array_equal(targets.mask, mask)
    np.testing.assert_array_equal(np.asarray(targets.labels)[keep], io["target_ids"][keep])
    np.testing.assert_array_equal(np.asarray(targets.prev_tokens)[keep], io["prev_token_ids"][keep])
    np.testing.assert_array_equal(np.asarray(targets.teacher_rows)[mask], io["label_indices"][mask] - 1)
    inputs = block_tokens(targets.prev_tokens[:, :, 0], config.mask_token_id, config.block_size)
    np.testing.assert_array_equal(np.asarray(inputs)[keep], io["noise_ids"].reshape(inputs.shape)[keep])


def test_training_pass(case):
    target, config, drafter, io, anchors = case
    tokens, loss_mask = jnp.asarray(io["input_ids"], jnp.int32), jnp.asarray(io["loss_mask"])
    out = jax.jit(lambda d, f: d(target, f, tokens, loss_mask, anchors))(drafter, io["target_hidden_states"])
    keep, tolerance = io["block_keep_mask"].astype(bool), io["tolerance"]
    # Half, as processors add in different orders: 9e-6 of the largest, next to a quarter, was seen on an AMD EPYC.
    np.testing.assert_allclose(np.asarray(out.hidden)[keep], io["output_hidden"][keep], rtol=0, atol=tolerance / 2)
    logits = target.unembed(out.hidden)
    embedding = None
    if drafter.markov is not None:
        embedding = drafter.markov.embed(out.prev_tokens)
        logits = logits + drafter.markov.bias(drafter.markov.latent(out.hidden, embedding))
    np.testing.assert_allclose(np.asarray(logits)[keep], io["draft_logits"][keep], rtol=0, atol=io["tolerance"])
    assert (drafter.confidence is None) == ("confidence_pred" not in io)
    if drafter.confidence is not None:
        confidence = drafter.confidence(out.hidden, embedding)
        np.testing.assert_allclose(np.asarray(confidence)[keep], io["confidence_pred"][keep], rtol=0, atol=tolerance)
    rows = jax.vmap(lambda hidden, at: hidden[at])(jnp.asarray(io["target_last_hidden_states"]), out.teacher_rows)
    mask = io["eval_mask"].astype(bool)
    teacher = np.asarray(target.unembed(rows))
    np.testing.assert_allclose(teacher[mask], io["aligned_target_logits"][mask], rtol=0, atol=io["tolerance"])


def test_decoding_pass_equals_training_pass(case):
    """The context comes from the cache, in two pieces with garbage rows after, instead of from the sequence."""
    target, config, drafter, io, _ = case
    tokens = jnp.asarray(io["input_ids"], jnp.int32)
    features = jnp.asarray(io["target_hidden_states"])
    batch, g = tokens.shape[0], config.block_size
    start = min(17, tokens.shape[1] - g - 1)
    cache = drafter.init_cache(batch, 48)
    for begin, end in ((0, 9), (9, start)):
        rows = jnp.full((batch, 12, features.shape[-1]), 1e6).at[:, : end - begin].set(features[:, begin:end])
        positions = jnp.broadcast_to(begin + jnp.arange(12), (batch, 12))
        counts = jnp.full((batch,), end - begin)
        cache = drafter.extend(cache, rows, jnp.zeros((batch, 12), jnp.int32), positions, counts)
    at = jnp.full((batch,), start)
    proposal, _ = drafter.propose(
        target, cache, tokens[:, start], at, jnp.zeros((batch, g, 2), jnp.int32), Sampling.constant(0.0, batch)
    )
    anchors = Anchors(at[:, None], jnp.ones((batch, 1), bool))
    forced = tokens.at[:, start + 1 : start + 1 + g].set(proposal.tokens)
    out = drafter(target, features, forced, jnp.ones_like(tokens), anchors)
    logits = target.unembed(out.hidden)
    if drafter.markov is not None:
        latent = drafter.markov.latent(out.hidden, drafter.markov.embed(out.prev_tokens))
        logits = logits + drafter.markov.bias(latent)
    np.testing.assert_allclose(proposal.logits, logits[:, 0], rtol=0, atol=io["tolerance"])
    np.testing.assert_array_equal(proposal.tokens, jnp.argmax(logits[:, 0], axis=-1))
    if drafter.confidence is not None:
        expected = drafter.confidence(out.hidden, drafter.markov.embed(out.prev_tokens))[:, 0]
        np.testing.assert_allclose(proposal.confidence, expected, rtol=0, atol=io["tolerance"])
