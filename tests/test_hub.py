"""Models by hub id: what is in the cache is found offline, everything else is one line."""

import dataclasses

import jax
import pytest
from huggingface_hub import constants

from dspark_jax.config import Config, DrafterConfig, InputError, MeshConfig, TargetArchitecture, TargetConfig, resolve
from dspark_jax.hub import is_hub_id, local_directory, with_architecture
from dspark_jax.run import Run
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import fingerprint, load_target
from dspark_jax.training.feature_cache import feature_identity


@pytest.fixture
def cache(hub_cache, tiny_target):
    """A hub cache that holds `me/tiny` and nothing else."""
    hub_cache("me/tiny", tiny_target)


def test_an_id_is_owner_and_name(tmp_path, monkeypatch):
    assert is_hub_id("Qwen/Qwen3-4B") and is_hub_id("google/gemma-4-12B-it")
    assert not any(map(is_hub_id, ("", "model", "/models/Qwen3-4B", "./a/b", "a/b/c", str(tmp_path))))
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("a/b")  # a directory of that name is meant


def test_what_is_in_the_cache_is_found(cache, tiny_target):
    assert fingerprint("me/tiny") == fingerprint(tiny_target)
    config = with_architecture(Config(target=TargetConfig(path="me/tiny")))
    assert config.target.architecture == TargetArchitecture.from_hf(tiny_target)
    assert config.target.path == "me/tiny"


def test_what_is_not_is_one_line(cache):
    with pytest.raises(
        InputError, match=r"^me/other: not in the hub's cache, and HF_HUB_OFFLINE is set; download"
    ) as e:
        local_directory("me/other")
    assert "\n" not in str(e.value)


def test_a_stated_shape_needs_no_hub(cache):
    arch = TargetArchitecture("qwen3", 512, 64, 6, 4, 2, 16, 128)
    config = Config(target=TargetConfig(path="me/other", architecture=arch))
    assert with_architecture(config) is config


def test_a_stated_shape_is_compared_when_the_model_is_loaded(cache, tiny_target):
    """Nothing else would tell: weights fit with any rope_theta."""
    arch = dataclasses.replace(TargetArchitecture.from_hf(tiny_target), rope_theta=5e6)
    config = Config(target=TargetConfig("me/tiny", "float32", arch), drafter=DrafterConfig(target_layer_ids=(0,)))
    assert with_architecture(config) is config
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with pytest.raises(InputError, match=r"target.architecture.rope_theta=5000000.0 but me/tiny/config.json has "):
        load_target(config.target, mesh)
    with pytest.raises(InputError, match=r"target.architecture.rope_theta=5000000.0 but me/tiny/config.json has "):
        feature_identity(Run(config, tiny_target))


@pytest.mark.parametrize("name", ["runs/my--drafter", "a/b..c", "a/b.", "models/" + "x" * 100])
def test_what_no_id_can_be_is_one_line(cache, name):
    with pytest.raises(InputError, match="neither a directory here nor a model on the hub; check the name"):
        local_directory(name)


def test_offline_is_said_only_where_it_is_so(cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no net")))
    with pytest.raises(InputError, match="not in the hub's cache, and the hub cannot be reached"):
        local_directory("me/other")


def test_directories_are_taken_as_they_are(tmp_path):
    assert local_directory(tmp_path) == tmp_path
    with pytest.raises(InputError, match=r"target.path='' has no config.json"):
        resolve(with_architecture(Config()))
