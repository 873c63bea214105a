"""Where decoding lives: the same tokens wherever that is, and a choice by memory."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import (
    Config,
    DataConfig,
    DecodeMeshConfig,
    DrafterConfig,
    EvalConfig,
    InputError,
    MeshConfig,
    TargetArchitecture,
    TargetConfig,
)
from dspark_jax.drafter import make_drafter
from dspark_jax.engine import generate
from dspark_jax.engine.models import Models
from dspark_jax.engine.placement import (
    SPARE,
    Load,
    answering_load,
    beside_training,
    decoding_mesh,
    evaluation_load,
    place,
)
from dspark_jax.engine.serving import Engine
from dspark_jax.planning.hlo import program_cost
from dspark_jax.planning.programs import answering_programs, decode_program
from dspark_jax.sharding import bytes_per_device, make_mesh, mesh_of
from dspark_jax.target.model import Target
from tests.conftest import others_slow

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


@pytest.fixture(scope="module", params=others_slow(DRAFTERS, "dspark"))
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


@pytest.mark.parametrize("layout", others_slow(LAYOUTS, "groups of two"))
@pytest.mark.slow
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


def needed(load: Load, tensor: int) -> float:
    """Memory of a device in which a group of so many devices fits."""
    mesh = make_mesh(MeshConfig(-1, 1, tensor))
    return sum(load.on(mesh)) / (1 - 1 / SPARE) + 1


@pytest.fixture(scope="module")
def load() -> Load:
    """One short request: weights are most of it."""
    arch = dataclasses.replace(ARCH, num_key_value_heads=8)
    drafter = make_drafter(arch, DRAFTERS["dspark"], rngs=nnx.Rngs(3))
    return Load(Models(Target(arch, rngs=nnx.Rngs(0)), drafter), 1, 8)


def test_the_smallest_group_that_fits_is_chosen(load: Load) -> None:
    sizes = [needed(load, tensor) for tensor in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)
    for tensor, memory in zip((1, 2, 4, 8), sizes, strict=True):
        found = place(DecodeMeshConfig(), load, memory=memory)
        assert dict(found.mesh.shape) == {"data": 8 // tensor, "fsdp": 1, "tensor": tensor}
        assert place(DecodeMeshConfig(tensor=1), load, memory=2 * sizes[0]).mesh.shape["tensor"] == 1
        taken = dataclasses.replace(load, held=memory)  # as much again is taken by something else
        assert (
            place(DecodeMeshConfig(), taken, memory=memory * (1 + 1 / (1 - 1 / SPARE))).mesh.shape["tensor"] == tensor
        )
    # With little to spare, the one that holds least; nobody says what there is: copies.
    least = place(DecodeMeshConfig(), load, memory=0.9 * sizes[-1])
    assert least.mesh.shape["tensor"] == 8
    assert place(DecodeMeshConfig(), load, memory=float("inf")).mesh.shape["data"] == 8


def test_what_a_device_holds_is_what_arrays_take(models: Models) -> None:
    """Weights in their type and caches, of requests that do not divide evenly."""
    found = place(DecodeMeshConfig(tensor=2), Load(models, 3, 40))
    spread = models.moved(found.mesh)
    assert found.weights == bytes_per_device((spread.target, spread.drafter))
    with Engine(spread, slots=3, capacity=40 - models.block_size, prefill_chunk=8) as engine:
        state = engine._batch._device.state
    wider = models.pending_rows * 2 * 2 * 8 * 4  # rows of the drafter's cache that the engine's has more: none
    assert abs(bytes_per_device((state.target_cache, state.draft_cache)) - found.caches) <= wider


def test_what_does_not_fit_is_refused_in_one_line(load: Load) -> None:
    large = sum(load.on(make_mesh(MeshConfig(-1, 1, 1)))[:2])
    cases = [
        (DecodeMeshConfig(), 1000, "data=1 fsdp=1 tensor=8: a device would hold .* decode fewer or shorter requests"),
        (DecodeMeshConfig(tensor=1), large - 1, "data=8 .* leave mesh.decode.tensor=1 out, or decode fewer"),
        (DecodeMeshConfig(data=3), 1e9, "data=3 fsdp=1 tensor=2 needs 6 devices, 8 are here"),
        (DecodeMeshConfig(tensor=3), 1e9, "data=2 fsdp=1 tensor=3 needs 6 devices, 8 are here"),
    ]
    for wanted, memory, message in cases:
        with pytest.raises(InputError, match=f"^mesh.decode {message}") as raised:
            place(wanted, load, memory=memory)
        assert "\n" not in str(raised.value)


SMALL = TargetArchitecture("qwen3", 1024, 128, 3, 8, 4, 32, 256, 1e-6, 1e4, True, 256)


@pytest.fixture
def config() -> Config:
    """Of a model whose weights are large beside eight requests."""
    return Config(
        target=TargetConfig(architecture=SMALL, dtype="float32"),
        drafter=DrafterConfig("dspark", 1, 3, (0, 1), 5, 128, True, True, "float32"),
        data=DataConfig(max_prompt_length=16, max_length=48, decode_batch_size=8),
        eval=EvalConfig(batch_size=8, max_new_tokens=16),
    )


@pytest.mark.parametrize("layout", others_slow(LAYOUTS, "groups of two", "as in training"))
def test_a_round_collects_no_weights(config: Config, layout: str) -> None:
    """What devices give each other are activations and numbers; training's layout shows what would be seen."""
    load = evaluation_load(config)
    found = place(LAYOUTS[layout], load)
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves((load.models.target, load.models.drafter)))
    with jax.set_mesh(found.mesh):
        cost = program_cost(decode_program(config, found.mesh).traced.lower().compile().as_text())
    gathered = sum(cost.collectives[kind].bytes for kind in ("all-gather", "all-to-all") if kind in cost.collectives)
    if layout == "as in training":
        assert gathered > 0.7 * weights
    else:
        assert gathered < 0.02 * weights


def test_chunks_of_prompts_are_read_where_their_slots_are(config: Config) -> None:
    """Neither weights nor caches are collected, and no device reads another's prompt."""
    found = place(LAYOUTS["copies"], answering_load(config))
    with jax.set_mesh(found.mesh):
        _, reading = answering_programs(config, found.mesh, capacity=48, chunk=16)
        cost = program_cost(reading.traced.lower().compile().as_text())
    cache = bytes_per_device(reading.parts["caches"])
    assert sum(traffic.bytes for traffic in cost.collectives.values()) < 0.05 * cache


def test_the_choice_is_said_in_one_line(config: Config, capsys: Any) -> None:
    mesh = decoding_mesh(config.mesh.decode, evaluation_load(config))
    assert mesh.shape["data"] == 8
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "decoding on 8 devices: every device has a copy of the weights, requests split over 8; each holds" in said


def test_beside_training_the_rest_of_the_memory_counts(config: Config, monkeypatch: Any, capsys: Any) -> None:
    """Where there is none, the weights stay as they train; but what is asked for is not silently left."""
    mesh, load, memory = make_mesh(MeshConfig()), evaluation_load(config), 4e9
    full = dataclasses.replace(load, held=memory)
    monkeypatch.setattr("dspark_jax.platform.device_memory", lambda: memory)
    assert beside_training(DecodeMeshConfig(), load, mesh).shape["data"] == 8
    assert beside_training(DecodeMeshConfig(), full, mesh) is mesh
    assert "there is no room for other copies of the weights" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"mesh.decode data=4 fsdp=1 tensor=2: .* 3.73 GiB, 3.73 are taken"):
        beside_training(DecodeMeshConfig(tensor=2), full, mesh)
