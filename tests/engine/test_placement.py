"""Where decoding lives: the same tokens wherever that is, and a choice by memory."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import DecodeMeshConfig, DrafterConfig, TargetArchitecture
from dspark_jax.drafter import make_drafter
from dspark_jax.engine import generate
from dspark_jax.engine.models import Models
from dspark_jax.engine.placement import Load, place
from dspark_jax.engine.serving import Engine
from dspark_jax.sharding import mesh_of
from dspark_jax.target.model import Target

LAYOUTS = {
    "copies": DecodeMeshConfig(tensor=1),
    "groups of two": DecodeMeshConfig(tensor=2),
    "one group": DecodeMeshConfig(tensor=8),
    "as in training": DecodeMeshConfig(data=1, fsdp=-1),
}
DRAFTERS = {
    "dspark": DrafterConfig("dspark", 1, 3, (-1, 1), 39, 8, True, True),
    "eagle3": DrafterConfig("eagle3", 1, 3, (0, 1), 39, 0, False, False),
}
ARCH = TargetArchitecture("qwen3", 40, 16, 3, 8, 4, 8, 32, 1e-6, 1e4, False, 256)
"""Eight heads and a vocabulary that eight devices split, but four key heads, which they do not."""


@pytest.fixture(scope="module", params=DRAFTERS)
def models(request: Any) -> Models:
    target = Target(ARCH, rngs=nnx.Rngs(0), scale=0.3)
    return Models(target, make_drafter(ARCH, DRAFTERS[request.param], rngs=nnx.Rngs(3)))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Five, which neither eight nor four devices divide."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, 40, length).tolist() for length in (1, 9, 4, 12, 7)]


@pytest.fixture(scope="module")
def alone(models: Models, prompts: list[list[int]]) -> list[list[int]]:
    return [one.tolist() for one in generate(models, prompts, max_new_tokens=12).tokens]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_those_of_one_device(models: Models, prompts: Any, alone: Any, layout: str) -> None:
    """`generate` and the engine, whose slots are filled again and again, neither with a mesh set by the caller."""
    mesh = place(LAYOUTS[layout], Load(models, 5, 64)).mesh
    spread = models.moved(mesh)
    assert mesh_of(spread) == mesh and spread.moved(mesh).target is spread.target
    found = generate(spread, prompts, max_new_tokens=12)
    assert [one.tolist() for one in found.tokens] == alone
    with Engine(spread, slots=3, capacity=40, prefill_chunk=8) as engine:
        asked = [engine.submit(prompt, max_new_tokens=12) for prompt in prompts]
        assert [list(one.result().tokens) for one in asked] == alone
        caches = jax.tree.leaves(engine._batch._device.state.target_cache)
    heads = 4 if mesh.shape["tensor"] != 2 else 2
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-3 // split) if split > 1 else 3
    assert all(leaf.sharding.shard_shape(leaf.shape)[-4:-2] == (rows, heads) for leaf in caches)
