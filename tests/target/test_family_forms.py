"""Targets of every family in other forms: on a mesh, in their stacks, as shapes alone, in an export's config."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax import platform
from dspark_jax.config import MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.convert.check import check_directory
from dspark_jax.convert.dialect import Answer
from dspark_jax.convert.export import Source, frozen_tensors, write_export
from dspark_jax.convert.hf import read_drafter_config, stored_tensors
from dspark_jax.convert.targets import fitting, frozen_of_target
from dspark_jax.drafter import make_drafter
from dspark_jax.ops.expert_mlp.api import OPERATION
from dspark_jax.sharding import Param, make_mesh
from dspark_jax.target.decode_weights import decode_weights
from dspark_jax.target.experts import Experts
from dspark_jax.target.loading import abstract_target, load_target
from tests.target.random_models import CASES, DRAFTER, ONE, V, alone, assert_close, load, mixed


@pytest.mark.parametrize("case", ONE)
def test_a_mesh_computes_what_one_device_does(made, case):
    directory, _, target = made(case)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, V, (4, 12)))
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices())

    def run(model):
        trained = model.forward(tokens, positions).last_hidden
        decoding = decode_weights(model, jnp.float32)
        cached = decoding.forward(tokens, positions, decoding.init_cache(4, 12)).last_hidden
        return model.unembed(trained), model.unembed(cached)

    with jax.set_mesh(mesh):
        split: Any = load(directory, mesh)
        found = jax.jit(run)(split)
    layers = getattr(split, next(iter(split.stacks.values())))
    matrix = layers.mlp.gate[...].sharding.spec
    whole = layers.mlp.gate.shape[1] % 4 == 0  # experts are split, each of them whole where there are enough
    experts = jax.P(None, ("tensor", "fsdp"), None, None) if whole else jax.P(None, "tensor", "fsdp", None)
    assert matrix == (experts if mixed(case) else jax.P(None, "fsdp", "tensor"))
    for a, b in zip(found, jax.jit(run)(target), strict=True):
        assert_close(case, np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("case", ["v4", "hybrid_moe"])
def test_shapes_alone_have_the_types_of_loaded_weights(made, case):
    """Some are held in float32, and tables of experts are whole numbers, whatever the compute type is."""
    directory, _, target = made(case)
    loaded = load_target(TargetConfig(str(directory), "bfloat16", target.arch), alone())
    types = {
        name: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(model)]
        for name, model in {"loaded": loaded, "shapes": abstract_target(target.arch, jnp.bfloat16)}.items()
    }
    assert types["loaded"] == types["shapes"]
    kinds = {dtype for _, dtype in types["loaded"]}
    assert kinds == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)} | (
        {jnp.dtype(jnp.int32)} if case == "v4" else set()
    )


FORMS = [*((case, "pallas_tpu") for case in ONE), ("moe_all", "xla")]


@pytest.mark.parametrize(("case", "implementation"), FORMS)
def test_the_form_in_which_a_tpu_decodes_gives_the_same(made, case, implementation, monkeypatch):
    """Matrices of heads the other way round, layers and experts in their stack, of which a kernel is told the layer;
    on a mesh that splits heads and experts."""
    directory, _, target = made(case)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, V, (2, 7)))
    positions = jnp.broadcast_to(jnp.arange(7), tokens.shape)
    expected = jax.jit(lambda: target.forward(tokens, positions).last_hidden)()
    monkeypatch.setattr(platform, "unstacks_layers", lambda: False)
    monkeypatch.setattr(platform, "joins_heads", lambda: False)
    monkeypatch.setitem(OPERATION.order, "cpu", [implementation])
    mesh = make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        decoding = decode_weights(load(directory, mesh), jnp.float32)
        layers = [getattr(decoding, name) for name in decoding.stacks.values()]
        mixtures = [layer.mlp for layer in layers if isinstance(layer.mlp, Experts)]
        assert any(mlp.number is not None for mlp in mixtures) == mixed(case)
        found = jax.jit(lambda: decoding.forward(tokens, positions, decoding.init_cache(2, 8)).last_hidden)()
    turned = [leaf.axes for leaf in jax.tree.leaves(layers, is_leaf=is_param) if leaf.get_metadata().get("across")]
    assert len(turned) >= len(layers) and all(axes[0] == "layers" and "head" in axes[-2] for axes in turned)
    assert_close(case, found, np.asarray(expected))


def is_param(leaf):
    return isinstance(leaf, Param)


@pytest.mark.parametrize("case", ONE)
def test_a_drafter_for_it_is_exported_with_layers_of_a_qwen3(made, case, tmp_path):
    directory, _, target = made(case)
    arch, raw = target.arch, json.loads((directory / "config.json").read_text())
    drafter = make_drafter(arch, DRAFTER, rngs=nnx.Rngs(1))
    stored, frozen = dict(stored_tensors(drafter, DRAFTER)), frozen_tensors(directory)
    of_target = frozen_of_target(frozen, directory, arch, 0.0)
    assert target.family.title in of_target.notes[0] and not of_target.own_embedding
    source = Source(stored.items, DRAFTER, arch, raw, frozen, "org/model", notes=of_target.notes)
    path = write_export(tmp_path / "draft", source, dtype="float32")
    written = json.loads((path / "config.json").read_text())
    assert (written["architectures"], written["model_type"]) == (["Qwen3DSparkModel"], "qwen3")
    assert written["rope_parameters"] == {"rope_theta": arch.rope_theta, "rope_type": "default"}
    assert not {"num_experts", "mlp_bias", "moe_intermediate_size", "qkv_bias", "hc_mult"} & set(written)
    shape, settings = read_drafter_config(path)
    fitting(path, shape, str(directory), arch, whole=True)
    answer = Answer(np.random.default_rng(3).integers(0, V, 24).astype(np.int32), 4)
    found = check_directory(path, target, directory, [answer], alone())
    assert found.dialect is not None and not found.unsupported
    notes = [note for verdict in found.verdicts if not verdict.refusals for note in verdict.notes]
    assert any(f"not run with a {target.family.title} as the target" in note for note in notes)
    assert not [problem for problem in found.problems if "another target" in problem or "tensor" in problem]
    assert settings == dataclasses.replace(DRAFTER, initializer_range=settings.initializer_range)


@pytest.mark.parametrize("case", CASES)
def test_a_config_that_is_written_is_read_as_the_same(made, case):
    arch = made(case)[2].arch
    assert TargetArchitecture.from_hf(arch.to_hf()) == arch
