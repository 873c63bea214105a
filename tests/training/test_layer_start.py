"""Draft layers that begin as the target's last ones (`drafter.init_layers`)."""

import dataclasses
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax import train
from dspark_jax.config import InputError, MeshConfig, TargetArchitecture
from dspark_jax.config_rules import problems
from dspark_jax.data.sources import Sample, write_samples
from dspark_jax.kinds import as_kind
from dspark_jax.start import check_start
from dspark_jax.target.loading import abstract_target, load_target
from dspark_jax.training.layer_start import plan_layers, start_layers
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import abstract_drafter, init_state, to_params


@pytest.fixture
def config(config):
    config.drafter.init_layers = "target"
    return config


@pytest.mark.parametrize("mesh", ["one", "cube"])
def test_parameters_are_those_of_the_targets_files(config, meshes, mesh):
    """Of its last layer, in the layout of the files; everything else is as in a run with random layers."""
    fresh = init_state(config, make_optimizer(config.optim, 4), meshes[mesh])
    state, start = start_layers(fresh, load_target(config.target, meshes[mesh]), config.drafter)
    assert start.line() == "draft layers begin as attention and MLP of the target's layers [1]"
    files = load_file(f"{config.target.path}/model.safetensors")
    d = config.target.architecture.hidden_size

    def stored(name):
        return files[f"model.layers.1.{name}.weight"].astype(np.float32)

    layer = {name.removeprefix("backbone.layers."): value for name, value in state.params.items()}
    for ours, theirs in {"query": "q", "key": "k", "value": "v"}.items():
        np.testing.assert_array_equal(
            layer[f"attention.{ours}"][0].reshape(d, -1), stored(f"self_attn.{theirs}_proj").T
        )
    np.testing.assert_array_equal(layer["attention.out"][0].reshape(-1, d), stored("self_attn.o_proj").T)
    for part in ("gate", "up", "down"):
        np.testing.assert_array_equal(layer[f"mlp.{part}"][0], stored(f"mlp.{part}_proj").T)
    np.testing.assert_array_equal(layer["attention_norm"][0], stored("input_layernorm"))
    np.testing.assert_array_equal(state.params["backbone.hidden_norm"], stored("input_layernorm"))
    np.testing.assert_array_equal(state.params["backbone.norm"], files["model.norm.weight"])
    taps = len(config.drafter.target_layer_ids)
    np.testing.assert_array_equal(state.params["backbone.fc"], np.eye(taps * d)[:, -d:])
    for name, value in fresh.params.items():
        assert state.params[name].sharding == value.sharding and state.params[name].dtype == value.dtype
        if not name.startswith("backbone"):
            np.testing.assert_array_equal(state.params[name], value, name)


class Reached(Exception):
    """A step would be compiled now, of this state."""


@pytest.mark.parametrize("found", ["init_from", "random", "target"])
def test_a_run_begins_so_unless_it_goes_on_from_another(config, meshes, tmp_path, monkeypatch, save_untrained, found):
    if found == "init_from":
        config.drafter.init_layers = "random"
        save_untrained(config, tmp_path / "other", meshes["one"])
        config.train.init_from = str(tmp_path / "other")
    config.drafter.init_layers = "target" if found == "target" else "random"
    monkeypatch.setattr(train, "prepare_run", lambda run: None)
    rows = np.arange(12, dtype=np.int32)
    write_samples(tmp_path / "data", [Sample(rows, np.ones(12, np.uint8), "set", i) for i in range(8)])

    def reached(state, *_):
        raise Reached(state)

    monkeypatch.setattr(train, "make_train_step", lambda *_: types.SimpleNamespace(lower=reached))
    with pytest.raises(Reached) as caught:
        train.train(dataclasses.replace(config, mesh=MeshConfig(2, 2, 2)), tmp_path)
    (state,) = caught.value.args
    norm = np.asarray(state.params["backbone.fc"])
    assert (np.count_nonzero(norm) == norm.shape[1]) == (found == "target")


def test_what_has_another_shape_is_random_and_said(config, tmp_path):
    """A draft layer for a mixture of experts has one MLP."""
    raw = config.target.architecture.to_hf() | {
        "model_type": "qwen3_moe",
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    raw |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    mixture = TargetArchitecture.from_hf(tmp_path)
    drafter = dataclasses.replace(config.drafter, num_layers=2)
    both = dataclasses.replace(config, drafter=drafter, target=dataclasses.replace(config.target, architecture=mixture))
    start = plan_layers(abstract_target(mixture, jnp.float32), to_params(abstract_drafter(both)), drafter)
    assert (start.layers, start.taken, start.new) == ((0, 1), ("attention",), ("MLP",))
    assert start.line().endswith("layers [0, 1]; MLP random, the target's have other shapes")


def test_what_cannot_begin_so_is_refused(config):
    deeper = dataclasses.replace(config, drafter=dataclasses.replace(config.drafter, num_layers=3))
    with pytest.raises(InputError, match="drafter.num_layers=3: the target has 2 layers; ask for fewer"):
        check_start(deeper)
    other = dataclasses.replace(config.target.architecture, num_attention_heads=8, intermediate_size=128)
    wanted = to_params(abstract_drafter(config))
    with pytest.raises(InputError, match=r"layers \[1\] have other shapes than a draft layer \(attention.out is"):
        plan_layers(abstract_target(other, jnp.float32), wanted, config.drafter)
    config.drafter.init_layers = "last"
    assert any("drafter.init_layers='last' is unknown; use random" in line for line in problems(config))
    config.drafter.init_layers, config.train.init_from = "target", "/elsewhere"
    assert any("both say how the layers begin; leave one out" in line for line in problems(config))
    eagle = as_kind(config, "eagle3")
    assert eagle.drafter.init_layers == "random"
    eagle.drafter.init_layers = "target"
    assert any("the layer of eagle3 reads more; set it to 'random'" in line for line in problems(eagle))
