"""A tiny run: a random target on disk, a config that fits it, prepared samples, batches."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from dspark_jax.config import (
    Config,
    DataConfig,
    DrafterConfig,
    MeshConfig,
    TargetArchitecture,
    TargetConfig,
    TrainConfig,
    resolve,
)
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import parameter_paths
from dspark_jax.target.model import Target

VOCAB, LENGTH = 67, 24


def write_target(directory: Path, seed: int = 0) -> Path:
    """A random two-layer Qwen3 as a Hugging Face directory, with weights large enough to have opinions."""
    arch = TargetArchitecture("qwen3", VOCAB, 32, 2, 4, 2, 8, 64, 1e-6, 1e4, True, 256)
    model = Target(arch, rngs=nnx.Rngs(seed), scale=0.3)
    tensors, weights = {}, model.family.weights(arch)
    for path, variable in parameter_paths(model).items():
        weight, value = weights[path], np.asarray(variable.get_value())
        layers = list(value) if weight.stacked else [value]
        tensors |= {name: weight.store(x) for name, x in zip(weight.names(len(layers)), layers, strict=True)}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(arch.to_hf()))
    return directory


def make_config(target: Path) -> Config:
    """Eight sequences of up to 24 tokens, six anchors, blocks of four."""
    return resolve(
        Config(
            name="tiny",
            target=TargetConfig(path=str(target)),
            drafter=DrafterConfig(
                num_layers=1, block_size=4, target_layer_ids=(-1, 0), mask_token_id=VOCAB - 1, markov_rank=8
            ),
            data=DataConfig(max_length=LENGTH, max_prompt_length=8),
            train=TrainConfig(
                steps=8, batch_size=8, num_anchors=6, log_every=2, checkpoint_every=3, vocab_chunk=16, evaluate=False
            ),
            mesh=MeshConfig(1, 1, 1),
        )
    )


def make_batch(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Sequences of uneven lengths: three prompt tokens, the rest supervised but for a gap in the first row."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, rows).astype(np.int32)
    real = np.arange(LENGTH) < lengths[:, None]
    tokens = np.where(real, rng.integers(0, VOCAB - 1, (rows, LENGTH)), 0).astype(np.int32)
    loss_mask = (real & (np.arange(LENGTH) >= 3)).astype(np.uint8)
    loss_mask[0, 7:9] = 0
    ids = (1000 * seed + np.arange(rows)).astype(np.int32)
    return {"tokens": tokens, "loss_mask": loss_mask, "lengths": lengths, "sample_id": ids}


@pytest.fixture(scope="session")
def target_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target."""
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def config(target_directory: Path) -> Config:
    """A resolved config of a tiny run; every test has its own."""
    return make_config(target_directory)


@pytest.fixture(scope="session")
def meshes() -> dict[str, Any]:
    """`one`: a single device; `cube`: data x fsdp x tensor = 2 x 2 x 2; `wide`: fsdp over four devices."""
    return {
        "one": make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]),
        "cube": make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8]),
        "wide": make_mesh(MeshConfig(1, 4, 1), jax.devices()[:4]),
    }


@pytest.fixture(scope="session")
def batch() -> dict[str, np.ndarray]:
    """Eight sequences, as the data pipeline gives them."""
    return make_batch(8)


@pytest.fixture(scope="session")
def new_target() -> Any:
    """(directory, seed) -> another target written there."""
    return write_target


@pytest.fixture(scope="session")
def make_tiny_config() -> Any:
    """(target directory) -> the resolved config of a tiny run."""
    return make_config
