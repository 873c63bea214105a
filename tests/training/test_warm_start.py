"""Warm start: a run begins with another drafter's parameters, on any mesh; what does not fit is refused in one line."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_jax import train
from dspark_jax.config import InputError, MeshConfig
from dspark_jax.convert.hf import drafter_tensors
from dspark_jax.run import Run
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import build_drafter, init_state, to_params


def state_of(config, mesh, source):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(source)))
    return train._fresh_state(Run(config, source, mesh), make_optimizer(config.optim, 4))


@pytest.fixture
def source(config, save_untrained, meshes, tmp_path):
    """A run with another seed, made on one device."""
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=5))
    save_untrained(other, tmp_path / "source", meshes["one"])
    return tmp_path / "source", init_state(other, make_optimizer(config.optim, 1), meshes["one"]).params


def test_parameters_of_a_run(config, source, meshes):
    folder, expected = source
    state = state_of(config, meshes["cube"], folder)
    fresh = state_of(config, meshes["cube"], "")
    assert state.step == 0
    for name, value in expected.items():
        np.testing.assert_array_equal(state.params[name], value, name)
        assert state.params[name].sharding == fresh.params[name].sharding
    assert not np.array_equal(fresh.params["backbone.fc"], expected["backbone.fc"])


def test_the_target_may_be_another_one(config, source, meshes):
    """Its weights have changed, or its files are no longer there."""
    moved = dataclasses.replace(config, target=dataclasses.replace(config.target, path="/nowhere"))
    state = state_of(moved, meshes["one"], source[0])
    np.testing.assert_array_equal(state.params["backbone.fc"], source[1]["backbone.fc"])


def test_parameters_of_an_exported_directory(config, meshes, tmp_path):
    drafter = build_drafter(config, jax.random.key(9))
    arch, shape = config.target.architecture, config.drafter
    written = {
        **arch.to_hf(), "architectures": ["Qwen3DSparkModel"], "num_hidden_layers": shape.num_layers,
        "block_size": shape.block_size, "mask_token_id": shape.mask_token_id, "markov_rank": shape.markov_rank,
        "target_layer_ids": list(shape.target_layer_ids), "markov_head_type": "vanilla",
        "enable_confidence_head": True, "confidence_head_with_markov": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(written))
    save_file(drafter_tensors(drafter, shape), tmp_path / "model.safetensors")
    train.check_source(dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(tmp_path))))
    state = state_of(config, meshes["one"], tmp_path)
    for name, value in to_params(drafter).items():
        np.testing.assert_array_equal(state.params[name], value, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"markov_rank": 4}, "confidence.weight has shape (40,), the config gives (36,)"),
        ({"markov_head_type": "rnn"}, "it has no markov.joint"),
        ({"kind": "dflash", "markov_rank": 0, "confidence_head": False}, "the config's drafter has no confidence"),
    ],
    ids=["shape", "missing", "left over"],
)
def test_another_drafter_is_refused_before_data_is_prepared(config, source, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(train, "prepare_run", lambda *_: pytest.fail("data was prepared"))
    changed = dataclasses.replace(config, drafter=dataclasses.replace(config.drafter, **changes))
    changed.train.init_from, changed.mesh = str(source[0]), MeshConfig()
    with pytest.raises(InputError) as caught:
        train.train(changed, tmp_path / "run")
    assert message in str(caught.value) and str(caught.value).startswith(f"train.init_from={source[0]}: ")


def test_nothing_there(config, tmp_path):
    for content, message in ((None, "no checkpoint and no config.json of a drafter here"), ("{}", "config.json")):
        if content:
            (tmp_path / "config.json").write_text(content)
        config.train.init_from = str(tmp_path)
        with pytest.raises(InputError, match=f"train.init_from={tmp_path}: .*{message}"):
            train.check_source(config)
