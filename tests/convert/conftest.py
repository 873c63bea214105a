"""A tiny target, and drafters trained for it in each of the dialects that are distinguished."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import save_file

from dspark_jax.config import DrafterConfig, MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.convert.dialect import Answer
from dspark_jax.convert.export import Source, frozen_tensors, write_export
from dspark_jax.convert.hf import stored_tensors
from dspark_jax.drafter import make_drafter
from dspark_jax.drafter.blocks import Anchors
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.sharding import make_mesh
from dspark_jax.target.families.family import LAYER_WEIGHTS
from dspark_jax.target.loading import load_target

VOCABULARY, WIDTH, LAYERS = 48, 32, 4
DRAFTER = DrafterConfig(num_layers=1, block_size=4, target_layer_ids=(0, 1), mask_token_id=45, markov_rank=8)


@dataclasses.dataclass(frozen=True)
class World:
    """The target, where it lies, its answers, and a directory of a drafter per dialect."""

    target: Any
    path: Path
    answers: list[Answer]
    drafters: dict[str, Path]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    path = folder / "target"
    write_target(path)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    arch = TargetArchitecture.from_hf(path)
    target = load_target(TargetConfig(path=str(path), dtype="float32", architecture=arch), mesh)
    # Any text will do, if a token tells the next: the drafters learn by heart what the target thinks of it.
    cycle = np.random.default_rng(0).permutation(40).astype(np.int32)
    answers = [Answer(np.roll(cycle, 8 * i), 4) for i in range(5)]
    drafters = {}
    for name, (first, raw) in {"good": (True, False), "fill-in": (False, False), "raw": (True, True)}.items():
        drafter = train(target, np.stack([one.tokens for one in answers]), anchor_first=first, raw_teacher=raw)
        drafters[name] = exported(drafter, arch, path, folder / name)
    return World(target, path, answers, drafters)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> tuple[Path, Path]:
    """The same target, and an untrained drafter for it: for tests that look at settings and shapes only."""
    folder = tmp_path_factory.mktemp("untrained")
    write_target(folder / "target")
    arch = TargetArchitecture.from_hf(folder / "target")
    shapes = nnx.eval_shape(lambda: make_drafter(arch, DRAFTER, rngs=nnx.Rngs(0)))
    drafter = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)
    return folder / "target", exported(drafter, arch, folder / "target", folder / "drafter")


def exported(drafter: DrafterModule, arch: TargetArchitecture, target: Path, output: Path) -> Path:
    tensors = functools.partial(stored_tensors, drafter, DRAFTER)
    config = json.loads((target / "config.json").read_text())
    source = Source(tensors, DRAFTER, arch, config, frozen_tensors(target), "org/target")
    return write_export(output, source, dtype="float32")


def write_target(path: Path) -> None:
    """A random Qwen3 with strong opinions."""
    rng, half = np.random.default_rng(3), WIDTH // 2
    shapes = {"q_proj": (WIDTH, WIDTH), "k_proj": (half, WIDTH), "v_proj": (half, WIDTH), "o_proj": (WIDTH, WIDTH)}
    shapes = {f"self_attn.{name}": shape for name, shape in shapes.items()}
    shapes |= {"mlp.gate_proj": (64, WIDTH), "mlp.up_proj": (64, WIDTH), "mlp.down_proj": (WIDTH, 64)}
    shapes |= {"self_attn.q_norm": (16,), "self_attn.k_norm": (16,)}
    shapes |= {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    tensors = {
        f"model.layers.{i}.{name}.weight": np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.3, shape)
        for i in range(LAYERS)
        for name, shape in shapes.items()
    }
    assert len(shapes) == len(LAYER_WEIGHTS)
    tensors["model.embed_tokens.weight"] = rng.normal(0, 0.5, (VOCABULARY, WIDTH))
    tensors["model.norm.weight"] = rng.normal(0, 1.5, WIDTH)  # without it the teacher is another one
    path.mkdir()
    save_file({name: np.asarray(value, np.float32) for name, value in tensors.items()}, path / "model.safetensors")
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "intermediate_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True,
        "max_position_embeddings": 256,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))


def train(target: Any, tokens: np.ndarray, *, anchor_first: bool, raw_teacher: bool) -> DrafterModule:
    """A drafter that knows some sequences [B, S] by heart."""
    drafter = make_drafter(target.arch, DRAFTER, rngs=nnx.Rngs(0))
    drafter, losses = fit(drafter, target, jnp.asarray(tokens), jnp.bool_(anchor_first), jnp.bool_(raw_teacher))
    assert losses[-1] < 0.7 * losses[0], losses
    return drafter


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})  # 750 steps pay for it
def fit(drafter: Any, target: Any, tokens: jax.Array, anchor_first: jax.Array, raw_teacher: jax.Array) -> Any:
    """250 steps of Adam on the cross-entropy with the teacher; the drafter and the losses."""
    size, taps = DRAFTER.block_size, (*DRAFTER.target_layer_ids, LAYERS - 1)
    out = target.forward(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), taps=taps)
    features, raw = out.features[..., :-WIDTH], out.features[..., -WIDTH:]
    teacher = jax.nn.softmax(target.unembed(jnp.where(raw_teacher, raw, out.last_hidden)))
    at = jnp.arange(4, tokens.shape[1] - size)
    anchors = Anchors(jnp.broadcast_to(at, (len(tokens), len(at))), jnp.ones((len(tokens), len(at)), bool))
    # Row k drafts the token after sequence row anchor + k, or in the fill-in layout anchor + k - 1; row 0 then rests.
    rows = at[:, None] + jnp.arange(size) - jnp.where(anchor_first, 0, 1)
    weight = jnp.where(anchor_first | (jnp.arange(size) > 0), 1.0, 0.0)
    optimizer = optax.adam(3e-3)

    def loss(model: Any) -> jax.Array:
        hidden = model(target, features, tokens, jnp.ones_like(tokens), anchors).hidden
        logits = target.unembed(hidden) + model.markov.bias(model.markov.embed(tokens[:, rows]))
        return (-(teacher[:, rows] * jax.nn.log_softmax(logits)).sum(-1) * weight).mean()

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(carry[0])
        updates, state = optimizer.update(grads, carry[1])
        return (optax.apply_updates(carry[0], updates), state), value

    (drafter, _), losses = jax.lax.scan(step, (drafter, optimizer.init(drafter)), None, 250)
    return drafter, losses
