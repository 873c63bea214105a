"""Models by hub id: what is in the cache is found offline, everything else is one line."""

import pytest

from dspark_jax.config import Config, InputError, TargetArchitecture, TargetConfig, resolve
from dspark_jax.hub import is_hub_id, local_directory, with_architecture
from dspark_jax.target.loading import fingerprint


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


def test_directories_are_taken_as_they_are(tmp_path):
    assert local_directory(tmp_path) == tmp_path
    with pytest.raises(InputError, match=r"target.path='' has no config.json"):
        resolve(with_architecture(Config()))
