"""The learning rate against its recorded series, and six optimizer steps against the reference's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from dspark_jax.config import (
    Config,
    DataConfig,
    DrafterConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    TargetArchitecture,
    TargetConfig,
    resolve,
)
from dspark_jax.convert.hf import drafter_tensors, import_drafter
from dspark_jax.drafter import make_drafter
from dspark_jax.drafter.blocks import Anchors
from dspark_jax.kinds import as_kind, names
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from dspark_jax.training.loss import drafter_loss
from dspark_jax.training.optim import learning_rate, make_optimizer, matrix_axes
from dspark_jax.training.state import to_params


def series(config, total_steps):
    return np.asarray(jax.jit(jax.vmap(learning_rate(config, total_steps)))(jnp.arange(total_steps)), np.float64)


def test_learning_rate_equals_the_recorded_series(golden):
    for row in json.loads((golden / "unit" / "lr_schedule.json").read_text())["rows"]:
        config = OptimConfig(learning_rate=row["lr"], warmup_ratio=row["warmup_ratio"])
        ours, warmup = series(config, row["total_steps"]), row["warmup_steps"]
        # As older torch releases have it, which is the closed form: the peak, once more after the warm-up.
        np.testing.assert_allclose(ours, row["legacy_lr_used_at_step"], rtol=2e-6, atol=1e-6 * row["lr"])
        # torch 2.13 multiplies the whole decay by its overshoot, which is the first cosine step undone.
        overshoot = 2 / (1 + np.cos(np.pi / (row["total_steps"] - warmup)))
        recorded = np.array(row["lr_used_at_step"][warmup:])
        np.testing.assert_allclose(overshoot * ours[warmup:], recorded, rtol=2e-6, atol=1e-6 * row["lr"])


def test_learning_rate_by_hand():
    rates = series(OptimConfig(learning_rate=1.0, warmup_ratio=0.25), 8)
    decay = [(1 + np.cos(np.pi * i / 6)) / 2 for i in range(6)]
    np.testing.assert_allclose(rates, [0.5, 1.0, *decay], atol=1e-6)
    assert learning_rate(OptimConfig(learning_rate=1.0), 8)(8) < 1e-12  # nothing is left after the last step
    np.testing.assert_array_equal(series(OptimConfig(learning_rate=1.0, warmup_ratio=0.04), 1), [1.0])


def test_clips_by_the_norm_of_all_parameters_then_adam_then_decays():
    config = OptimConfig(learning_rate=0.1, warmup_ratio=0.0, max_grad_norm=1.0, weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    params = {"a": jnp.array([2.0, -1.0]), "b": jnp.array([4.0])}
    state = optimizer.init(params)
    rates = series(config, 10)
    first, second = {name: 0.0 for name in params}, {name: 0.0 for name in params}
    want = {name: np.asarray(value, np.float64) for name, value in params.items()}
    for step, scale in enumerate([0.1, 7.0]):  # below and above the largest norm
        grads = {"a": scale * np.array([1.0, -2.0]), "b": scale * np.array([2.0])}
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, params)
        params = optax.apply_updates(params, updates)
        for name, grad in grads.items():
            clipped = grad / max(1.0, 3.0 * scale)
            first[name] = 0.9 * first[name] + 0.1 * clipped
            second[name] = 0.999 * second[name] + 0.001 * clipped**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            want[name] = want[name] - rates[step] * (mean / (np.sqrt(square) + 1e-8) + 0.5 * want[name])
            np.testing.assert_allclose(params[name], want[name], rtol=1e-5, err_msg=f"{name} after step {step}")


def test_six_steps_equal_the_reference(golden_vanilla_case):
    directory, target_directory = golden_vanilla_case.folder, golden_vanilla_case.target
    if not (directory / "train6.json").exists():
        pytest.skip(f"no training steps are on record for {directory.name}")
    recorded = json.loads((directory / "train6.json").read_text())
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    arch = TargetArchitecture.from_hf(target_directory)
    target = load_target(TargetConfig(path=str(target_directory), architecture=arch), mesh)
    config, drafter = import_drafter(directory / "draft", mesh)
    io = load_file(directory / "io.safetensors")
    anchors = Anchors(jnp.asarray(io["anchor_positions"], jnp.int32), jnp.asarray(io["block_keep_mask"], bool))
    tokens, loss_mask = jnp.asarray(io["input_ids"], jnp.int32), jnp.asarray(io["loss_mask"])
    features, states = jnp.asarray(io["target_hidden_states"]), jnp.asarray(io["target_last_hidden_states"])
    rates = jnp.array([row["lr_used"] for row in recorded["history"]])  # with torch 2.13's overshoot
    optimizer = make_optimizer(OptimConfig(), recorded["total_steps"], schedule=lambda step: rates[step])
    structure, params = nnx.split(drafter)

    @jax.jit
    def step(params, state):
        def loss(params):
            drafter = nnx.merge(structure, params)
            outputs = drafter(target, features, tokens, loss_mask, anchors)
            return drafter_loss(drafter, target, outputs, states, LossConfig(), vocab_chunk=64).normalised()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return value, optax.global_norm(grads), optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for row in recorded["history"]:
        value, norm, params, state = step(params, state)
        np.testing.assert_allclose(value, row["loss"], rtol=2e-5, err_msg=f"step {row['step']}")
        np.testing.assert_allclose(norm, row["grad_norm_before_clip"], rtol=2e-4, err_msg=f"step {row['step']}")
    after = drafter_tensors(nnx.merge(structure, params), config)
    expected = load_file(directory / "train6_params.safetensors")
    before = load_file(directory / "draft" / "model.safetensors")
    for name, value in after.items():
        moved = np.abs(expected[name] - before[name]).max()
        assert moved > 1e-3, name
        # Adam divides by the gradient's own size, so entries with tiny gradients carry its relative error.
        wrong = np.abs(value - expected[name])
        assert np.mean(wrong) < 1e-3 * moved, name
        np.testing.assert_allclose(value, expected[name], atol=0.1 * moved, err_msg=name)


@pytest.mark.parametrize("total", [1, 7, 1000])
def test_learning_rate_never_leaves_its_bounds(total):
    rates = series(OptimConfig(), total)
    assert (rates > 0).all() and rates.max() <= OptimConfig().learning_rate * (1 + 1e-6)


@pytest.mark.slow
def test_muon_moves_every_matrix_of_a_drafter_by_an_orthogonal_update_of_its_own() -> None:
    """After one step each layer's matrix has singular values near 1 (times optax's shape factor): layers do not mix."""
    config = OptimConfig(kind="muon", learning_rate=1e-3, muon_learning_rate=0.5, warmup_ratio=0.0, max_grad_norm=1e9)
    arch = TargetArchitecture("qwen3", 40, 16, 3, 4, 2, 8, 24, 1e-6, 1e4, False, 64)
    drafter = make_drafter(arch, DrafterConfig("dspark", 2, 3, (0, 1), 39, 4, True, True), rngs=nnx.Rngs(0))
    params = to_params(drafter)
    axes = matrix_axes(params)
    assert {path for path, axis in axes.items() if axis is None} == {
        path for path in params if "norm" in path or path.startswith(("markov", "confidence"))
    }
    optimizer = make_optimizer(config, 10)
    rng = np.random.default_rng(0)
    grads = {path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for path, leaf in params.items()}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for path, axis in axes.items():
        if axis is None:
            # The first step of Adam has the same size in every entry (1.47 learning rates with Nesterov momentum).
            np.testing.assert_allclose(np.abs(updates[path]), 1.4737e-3, rtol=1e-3)
            continue
        update = np.asarray(updates[path])
        inputs = int(np.prod([update.shape[i] for i in np.atleast_1d(axis.reduction_axis)]))
        layers = update.reshape(-1, inputs, update.size // inputs // (1 if path.endswith("fc") else 2))
        for layer in layers:
            values = np.linalg.svd(layer, compute_uv=False) / 0.5
            assert values.min() > 0.6 and values.max() < 1.3 * np.sqrt(max(1, layer.shape[1] / layer.shape[0]))


@pytest.mark.parametrize("kind", names())
def test_muon_takes_the_matrices_of_every_kind(kind: str) -> None:
    """All with two axes or more (a layer's axis apart), but for tables by token, what is by channel, hyper-connections,
    and matrices of groups of heads; experts are a further axis."""
    arch = TargetArchitecture("qwen3", 40, 16, 3, 4, 2, 8, 24, 1e-6, 1e4, False, 64)
    base = DrafterConfig("dspark", 2, 3, (0, 1), 39, 4, True, True)
    data = DataConfig(max_length=64, max_prompt_length=16)
    config = resolve(as_kind(Config(target=TargetConfig(architecture=arch), drafter=base, data=data), kind))
    params = to_params(nnx.eval_shape(lambda: make_drafter(arch, config.drafter, rngs=nnx.Rngs(0))))
    stacked = {path: leaf.ndim - ("layers." in path) for path, leaf in params.items()}
    wanted = {path for path, axes in stacked.items() if axes > 1 and not path.endswith((".base", ".mix"))}
    wanted -= {"markov.w1", "markov.w2", "backbone.layers.attention.group"}
    found = {path: axes for path, axes in matrix_axes(params).items() if axes is not None}
    assert set(found) == wanted
    for path, axes in found.items():  # every axis is of the matrix, of layers, or of experts
        others = set(range(params[path].ndim)) - {*axes.reduction_axis, *axes.output_axis}
        experts = kind == "dspark5" and path.endswith((".mlp.gate", ".mlp.up", ".mlp.down"))
        assert others == ({0, 1} if experts else {0} if "layers." in path else set()), path
