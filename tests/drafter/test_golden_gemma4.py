"""EAGLE-3 on Gemma 4 against the PyTorch reference; DSpark is in `test_golden`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.config import Config, InputError, MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.convert.hf import drafter_tensors, import_drafter, stored_tensors
from dspark_jax.drafter.blocks import Anchors
from dspark_jax.kinds import as_kind
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from dspark_jax.training.loss import drafter_loss

EAGLE3_LOSS = as_kind(Config(), "eagle3").loss


def one_device():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def trained(golden_gemma4_eagle3_case):
    """Recorded arrays, and our logits, loss and gradients over all rows."""
    directory, path = golden_gemma4_eagle3_case.folder, golden_gemma4_eagle3_case.target
    arch = TargetArchitecture.from_hf(path)
    target = load_target(TargetConfig(path=str(path), dtype="float32", architecture=arch), one_device())
    config, drafter = import_drafter(directory / "draft", one_device())
    io = load_file(directory / "io.safetensors")
    tokens = jnp.asarray(io["input_ids"], jnp.int32)
    features = jnp.concatenate([target.embed(tokens), io["target_hidden_states"]], axis=-1)
    everywhere = Anchors(jnp.zeros_like(tokens), jnp.zeros(tokens.shape, bool))

    @jax.jit
    def step(drafter):
        def loss(drafter):
            outputs = drafter(target, features, tokens, jnp.asarray(io["loss_mask"]), everywhere)
            states = jnp.asarray(io["target_last_hidden_states"])
            sums = drafter_loss(drafter, target, outputs, states, EAGLE3_LOSS, vocab_chunk=100)
            return sums.normalised(), (target.unembed(outputs.hidden), outputs.mask)

        return jax.value_and_grad(loss, has_aux=True)(drafter)

    (loss, (logits, masks)), grads = step(drafter)
    return io, config, loss, np.asarray(logits), np.asarray(masks), grads


def test_every_step_of_the_training_time_test(trained):
    io, _, _, logits, masks, _ = trained
    for step in range(len(io["step_position_mask"])):
        want = io["step_position_mask"][step].astype(bool)
        np.testing.assert_array_equal(masks[:, :, step], want, f"step {step}")
        got, recorded = logits[:, :, step], io["step_draft_logits"][step]
        np.testing.assert_allclose(got[want], recorded[want], atol=2e-4, err_msg=f"step {step}")


def test_loss_and_gradients(trained, golden_gemma4_eagle3_case):
    _, config, loss, _, _, grads = trained
    recorded = golden_gemma4_eagle3_case.read("io.json")
    np.testing.assert_allclose(loss, recorded["loss"]["total"], rtol=1e-6)
    expected, grads = load_file(golden_gemma4_eagle3_case.folder / "grads.safetensors"), drafter_tensors(grads, config)
    assert set(grads) == set(expected)
    for name, grad in expected.items():
        # Case 6, of the same layers, records an error of the reference's own float32 of 1.1e-5.
        np.testing.assert_allclose(grads[name], grad, atol=2.5e-5 * np.abs(grad).max(), err_msg=name)


def test_names_and_values_go_back_as_they_came(golden_case):
    directory = golden_case.folder / "draft"
    config, drafter = import_drafter(directory, one_device())
    stored, original = dict(stored_tensors(drafter, config)), load_file(directory / "model.safetensors")
    assert set(original) - set(stored) == {"embed_tokens.weight", "lm_head.weight"} and set(stored) <= set(original)
    for name, tensor in stored.items():
        np.testing.assert_array_equal(tensor, original[name], name)


def test_another_layer_scalar_is_refused(golden_gemma4_eagle3_case, tmp_path):
    directory = golden_gemma4_eagle3_case.folder / "draft"
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"layers.0.layer_scalar": np.full(1, 0.5, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(InputError, match=r"layers.0.layer_scalar is not 1"):
        import_drafter(tmp_path, one_device())
