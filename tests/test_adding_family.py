"""A target family that is added from outside, by one class: read, loaded, decoded, drafted for, trained for, exported.

The toy has what the families of the package have not: no norms of queries and keys, RoPE with scaled positions, an MLP
without a gate, a scaled embedding, a head of its own, a field of its own, and other names for its tensors.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from dspark_jax.config import (
    Config,
    DataConfig,
    DrafterConfig,
    InputError,
    MeshConfig,
    TargetArchitecture,
    TargetConfig,
    TrainConfig,
    from_json,
    resolve,
    to_json,
)
from dspark_jax.config_fields import COMMON, Unsupported, must, read
from dspark_jax.convert.export import Source, frozen_tensors, write_export
from dspark_jax.convert.hf import import_drafter, read_drafter_config, stored_tensors
from dspark_jax.convert.targets import fitting
from dspark_jax.engine import Models, generate
from dspark_jax.sharding import make_mesh
from dspark_jax.target import families
from dspark_jax.target.families.family import FULL, SIZES, AttentionShape, Family, LayerShape
from dspark_jax.target.loading import fingerprint, load_target
from dspark_jax.target.weights import Weight
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import abstract_drafter, init_state, to_module, to_params
from dspark_jax.training.step import make_train_step, place_batch

V, D, L, N, K, H, F = 40, 16, 2, 2, 1, 8, 24
RAW = {
    "model_type": "toy_text", "vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": N,
    "num_key_value_heads": K, "head_dim": H, "intermediate_size": F, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": False, "max_position_embeddings": 64, "position_scale": 2.0, "embedding_multiplier": 3,
}  # fmt: skip


@functools.cache
def toy_model() -> Any:
    from dspark_jax.target.layers import dense, normal
    from dspark_jax.target.model import Target

    class SquaredReLU(nnx.Module):
        """down(relu(up(x))^2), as in Nemotron."""

        def __init__(self, arch: TargetArchitecture, *, stack: tuple[int, ...], scale: float, rngs: nnx.Rngs):
            d, f = arch.hidden_size, arch.intermediate_size
            self.up = normal(rngs, stack, (d, f), ("embed", "mlp"), scale)
            self.down = normal(rngs, stack, (f, d), ("mlp", "embed"), scale)

        def __call__(self, x: jax.Array) -> jax.Array:
            return dense(jnp.square(jax.nn.relu(dense(x, self.up[...]))), self.down[...])

    class ToyModel(Target):
        def make_layers(self, kind: str, *, rngs: nnx.Rngs, scale: float) -> Any:
            layers = super().make_layers(kind, rngs=rngs, scale=scale)
            layers.mlp = SquaredReLU(self.arch, stack=(L,), scale=scale, rngs=rngs)
            return layers

    return ToyModel


class Toy(Family):
    name = "toy"
    title = "Toy"
    configs = {
        "toy_text": {
            **COMMON,
            "head_dim": read("width of a head", kind="size"),
            "rope_theta": read("base of the rotary frequencies", kind="number"),
            "tie_word_embeddings": read("whether the LM head is the embedding", False, kind="flag"),
            "position_scale": read("what positions are divided by", 1.0, kind="number"),
            "embedding_multiplier": read("factor of the embedding", 1.0, kind="number"),
            "use_gate": must(False, note="of the MLP"),
        }
    }
    instead = "a plain Toy"

    def values(self, raw: Any, where: str) -> dict[str, Any]:
        return {"own": {name: raw[name] for name in ("position_scale", "embedding_multiplier")}}

    def to_hf(self, arch: TargetArchitecture) -> dict[str, Any]:
        return {"model_type": "toy_text", **{name: getattr(arch, name) for name in SIZES}, **arch.own}

    def layer(self, arch: TargetArchitecture, kind: str = FULL) -> LayerShape:
        turns = (1 / arch.own["position_scale"],) * (arch.head_dim // 2)
        heads = arch.num_attention_heads, arch.num_key_value_heads
        scale = arch.head_dim**-0.5
        return LayerShape(AttentionShape(*heads, arch.head_dim, arch.rope_theta, scale, turns, norms=False))

    def embedding_scale(self, arch: TargetArchitecture) -> float:
        return arch.own["embedding_multiplier"]

    def model(self) -> Any:
        return toy_model()

    def layer_weights(self, arch: TargetArchitecture, kind: str) -> dict[str, Weight]:
        return {
            "attention_norm": Weight("block.{i}.norm_1"),
            "attention.query": Weight("block.{i}.wq", inputs=1),
            "attention.key": Weight("block.{i}.wk", inputs=1),
            "attention.value": Weight("block.{i}.wv", inputs=1),
            "attention.out": Weight("block.{i}.wo", inputs=2),
            "mlp_norm": Weight("block.{i}.norm_2"),
            "mlp.up": Weight("block.{i}.up", inputs=1),
            "mlp.down": Weight("block.{i}.down", inputs=1),
        }

    def prefix(self, names: Any) -> str:
        return "toy."

    def outer_weights(self, prefix: str) -> dict[str, Weight]:
        names = {"embedding": "words", "norm": "last_norm", "lm_head": "output"}
        return {path: Weight(prefix + name) for path, name in names.items()}

    def ignores(self, name: str) -> bool:
        return name == "toy.buffer"


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    """Known for one test."""
    families.register(Toy())
    yield
    del families.FAMILIES["toy"]


def tensors() -> dict[str, np.ndarray]:
    """A random toy, in its own layout: linear layers are [out, in]."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"words": (V, D), "output": (V, D), "last_norm": (D,), "buffer": (3,)}
    for i in range(L):
        own = {"norm_1": (D,), "norm_2": (D,), "wq": (N * H, D), "wk": (K * H, D), "wv": (K * H, D)}
        own |= {"wo": (D, N * H), "up": (F, D), "down": (D, F)}
        shapes |= {f"block.{i}.{name}": shape for name, shape in own.items()}
    return {f"toy.{name}": rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def oracle(weights: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits [S, V] of tokens [S], in float64 NumPy."""
    w = {name.removeprefix("toy."): value.astype(np.float64) for name, value in weights.items()}

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + RAW["rms_norm_eps"]) * weight

    def turned(x: np.ndarray) -> np.ndarray:  # [S, heads, H]
        at = np.arange(len(x))[:, None] / RAW["position_scale"] * 1e4 ** (-np.arange(H // 2) / (H // 2))
        pairs = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * at)[:, None]
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    x = RAW["embedding_multiplier"] * w["words"][tokens]
    for i in range(L):
        b = {name: w[f"block.{i}.{name}"] for name in ("norm_1", "norm_2", "wq", "wk", "wv", "wo", "up", "down")}
        y = norm(x, b["norm_1"])
        query, key = (turned((y @ b[name].T).reshape(len(x), -1, H)) for name in ("wq", "wk"))
        scores = np.einsum("snh,th->nst", query, key[:, 0]) / math.sqrt(H)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        heads = np.einsum("nst,th->snh", shares / shares.sum(-1, keepdims=True), y @ b["wv"].T)
        x = x + heads.reshape(len(x), -1) @ b["wo"].T
        x = x + np.maximum(norm(x, b["norm_2"]) @ b["up"].T, 0) ** 2 @ b["down"].T
    return norm(x, w["last_norm"]) @ w["output"].T


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    return tmp_path


def make_config(directory: Path) -> Config:
    drafter = DrafterConfig(
        num_layers=1, block_size=3, target_layer_ids=(-1, 0), mask_token_id=V - 1, markov_rank=4, initializer_range=0.2
    )
    config = Config(
        target=TargetConfig(str(directory)), drafter=drafter, data=DataConfig(max_length=24, max_prompt_length=8)
    )
    config.train = TrainConfig(steps=1, batch_size=2, num_anchors=4, vocab_chunk=16)
    config.mesh = MeshConfig(1, 1, 1)
    return resolve(config)


def test_its_config_is_read_and_what_it_has_not_is_refused(directory):
    config = make_config(directory)
    arch = config.target.architecture
    assert arch.model_type == "toy" and arch.own == {"position_scale": 2.0, "embedding_multiplier": 3}
    assert TargetArchitecture.from_hf(arch.to_hf()) == arch and from_json(to_json(config)) == config
    with pytest.raises(Unsupported, match="use_gate true is not supported; use a plain Toy, whose use_gate is false"):
        TargetArchitecture.from_hf(RAW | {"use_gate": True})
    with pytest.raises(InputError, match='position_scale "2" is not a positive number'):
        TargetArchitecture.from_hf(RAW | {"position_scale": "2"})
    with pytest.raises(
        Unsupported,
        match="model_type 'other' is not supported; use one of: qwen3, gemma4, .*, toy",
    ):
        TargetArchitecture.from_hf(RAW | {"model_type": "other"})
    with pytest.raises(
        InputError,
        match="model_type='other' is unknown; use one of: qwen3, gemma4, .*, toy",
    ):
        stated = dataclasses.replace(arch, model_type="other")
        resolve(dataclasses.replace(config, target=TargetConfig(architecture=stated)))
    before = fingerprint(directory)
    (directory / "config.json").write_text(json.dumps(RAW | {"position_scale": 3.0}))
    assert fingerprint(directory) != before
    with pytest.raises(ValueError, match="claims what another one has: toy, toy_text"):
        families.register(Toy())


def test_it_decodes_with_a_drafter_after_a_step_of_training(directory):
    """What it writes with a drafter is the float64 definition's greedy text."""
    config, weights = make_config(directory), tensors()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    target = load_target(config.target, mesh)
    tokens = np.random.default_rng(1).integers(0, V, 12)
    out = target.forward(jnp.asarray(tokens)[None], jnp.arange(12)[None])
    np.testing.assert_allclose(target.unembed(out.last_hidden)[0], oracle(weights, tokens), rtol=2e-4, atol=2e-4)

    optimizer = make_optimizer(config.optim, 1)
    batch = {"tokens": np.tile(tokens.astype(np.int32), (2, 2)), "loss_mask": np.ones((2, 24), np.uint8)}
    batch |= {"lengths": np.full(2, 24, np.int32), "sample_id": np.arange(2, dtype=np.int32)}
    with jax.set_mesh(mesh):
        state, drafter = init_state(config, optimizer, mesh), abstract_drafter(config)
        before = jax.tree.map(np.asarray, state.params)
        step = make_train_step(config, drafter, target, optimizer, mesh)
        state, metrics = step(state, to_params(target), place_batch(batch, 1, mesh))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(metrics))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True))

    prompts, expected = [[3, 5, 7], [11, 2]], []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(8):
            text.append(int(np.argmax(oracle(weights, np.asarray(text))[-1])))
        expected.append(text[len(prompt) :])
    found = generate(Models(target, to_module(drafter, state.params)), prompts, max_new_tokens=8).tokens
    assert [list(answer) for answer in found] == expected


def test_its_drafter_is_a_qwen3_and_comes_back_from_an_export(directory, tmp_path):
    config = make_config(directory)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    drafter = to_module(abstract_drafter(config), init_state(config, make_optimizer(config.optim, 1), mesh).params)
    arch, frozen = config.target.architecture, frozen_tensors(directory)
    np.testing.assert_allclose(frozen["embed_tokens.weight"], 3 * tensors()["toy.words"])  # as its layers get it
    stored = dict(stored_tensors(drafter, config.drafter))
    source = Source(stored.items, config.drafter, arch, RAW, frozen, "org/toy")
    path = write_export(tmp_path / "draft", source, dtype="float32")
    written = json.loads((path / "config.json").read_text())
    assert (written["architectures"], written["model_type"]) == (["Qwen3DSparkModel"], "qwen3")
    assert not {"position_scale", "embedding_multiplier"} & set(written)
    shape, settings = read_drafter_config(path)
    fitting(path, shape, str(directory), arch, whole=True)
    assert settings == dataclasses.replace(config.drafter, initializer_range=settings.initializer_range)
    back = dict(stored_tensors(import_drafter(path, mesh)[1], settings))
    assert back.keys() == stored.keys() and all(np.array_equal(back[name], stored[name]) for name in stored)
