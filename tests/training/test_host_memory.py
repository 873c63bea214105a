"""Features that do not fit are refused; memory that is kept by the C library is given back."""

import resource
import sys
from pathlib import Path

import pytest

from dspark_jax import platform
from dspark_jax.config import InputError
from dspark_jax.training import host_memory
from dspark_jax.training.host_memory import (
    check_host_memory,
    describe_feature_memory,
    feature_memory,
    return_freed_memory,
)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_returned():
    """64 MB in small pieces, freed but for the last one, which keeps the C library from shrinking its heap."""
    pieces = [bytes(4096) for _ in range(16384)]
    pinned = pieces[-1]
    del pieces
    before = resident()
    return_freed_memory()
    assert pinned is not None and resident() < before - 32e6


def test_micro_batches_that_do_not_fit_are_refused(config, meshes, monkeypatch):
    monkeypatch.setattr(host_memory, "host_memory", lambda: 20_000)
    check_host_memory(config, meshes["one"])  # online, there are none
    config.data.features = "cache"
    # Three times eight sequences x 24 tokens x three layers of 32 bytes with a scale of two bytes each.
    assert feature_memory(config, meshes["one"]) == 3 * 8 * 24 * 3 * (32 + 2)
    assert describe_feature_memory(config, meshes["one"]).endswith("at most 0.06 MB of host memory")
    with pytest.raises(InputError) as error:
        check_host_memory(config, meshes["one"])
    message = str(error.value)
    assert "3 micro-batches of 8 sequences x 24 tokens take 0.0 GB" in message
    assert "; set train.accumulate=4, or data.pack=True" in message
    config.train.accumulate = 4
    check_host_memory(config, meshes["one"])
    monkeypatch.setattr(host_memory, "host_memory", lambda: 5_000)
    with pytest.raises(InputError, match="lower data.max_length"):
        check_host_memory(config, meshes["one"])


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(platform, "_GROUP_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "none")))
    assert platform.host_memory() > 2**20
    (tmp_path / "memory.max").write_text("4096\n")
    assert platform.host_memory() == 4096
