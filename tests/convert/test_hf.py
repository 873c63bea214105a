"""Import of reference checkpoints is a table with exact set equality, and loses nothing."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.config import InputError, MeshConfig
from dspark_jax.convert.hf import import_drafter, stored_tensors
from dspark_jax.convert.mapping import FROZEN
from dspark_jax.sharding import make_mesh


def mesh():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def test_round_trip_is_exact(golden_case):
    directory = golden_case.folder / "draft"
    config, drafter = import_drafter(directory, mesh())
    stored, ours = load_file(directory / "model.safetensors"), dict(stored_tensors(drafter, config))
    assert set(ours) == set(stored) - set(FROZEN)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, stored[name], err_msg=name)
        assert value.shape == stored[name].shape


@pytest.fixture
def copy(golden_vanilla_case, tmp_path):
    shutil.copytree(golden_vanilla_case.folder / "draft", tmp_path / "draft")
    return tmp_path / "draft"


def edit_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_unknown_tensor_is_refused(copy):
    tensors = load_file(copy / "model.safetensors") | {"layers.0.extra.weight": np.ones(3, np.float32)}
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(InputError, match=r"layers.0.extra.weight is unknown"):
        import_drafter(copy, mesh())


def test_missing_tensor_is_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["confidence_head.proj.bias"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(InputError, match=r"confidence_head.proj.bias is missing"):
        import_drafter(copy, mesh())


def test_a_config_that_denies_a_head_does_not_drop_it_silently(copy):
    edit_config(copy, enable_confidence_head=False)
    with pytest.raises(InputError, match=r"confidence_head.proj.* is unknown"):
        import_drafter(copy, mesh())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"speculators_model_type": "peagle", "transformer_layer_config": {}}, "speculators_model_type 'peagle'"),
    ],
)
def test_other_drafters_are_refused_by_name(copy, fields, message):
    edit_config(copy, **fields)
    with pytest.raises(InputError, match=message):
        import_drafter(copy, mesh())
