"""Windows and scaled RoPE of drafters: masks and rotations in float64 and by transformers, decoding far beyond both."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax import rope_scaling
from dspark_jax.config import Config, DrafterConfig, InputError, TargetConfig, resolve
from dspark_jax.convert.hf import drafter_tensors
from dspark_jax.drafter import make_drafter
from dspark_jax.drafter.blocks import Anchors
from dspark_jax.engine import Models, generate
from dspark_jax.engine.serving import Engine
from dspark_jax.kinds import as_kind
from dspark_jax.target.layers import rope
from dspark_jax.target.model import Target
from tests.drafter import test_fill_in as fill_in

WINDOW = 5
MIXED = dataclasses.replace(
    fill_in.DFLASH, sliding_window=WINDOW, layer_types=("sliding_attention", "full_attention"), rope_type="yarn",
    rope_scaling={"factor": 4.0, "original_max_position_embeddings": 8.0},
)  # fmt: skip
SLIDING = dataclasses.replace(fill_in.DFLASH, block_layout="anchor_first", sliding_window=WINDOW)
ROPES: dict[str, tuple[str, dict[str, float]]] = {
    "linear": ("linear", {"factor": 3.0}),
    "llama3": ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 64.0}),
    "yarn": ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32.0}),
    "yarn of a long model": ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32768.0}),
    "yarn with its ramp": ("yarn", {"factor": 2.5, "original_max_position_embeddings": 512.0, "beta_fast": 8.0,
                                    "beta_slow": 2.0, "truncate": 0.0}),
    "yarn with a factor": ("yarn", {"factor": 4.0, "original_max_position_embeddings": 64.0, "attention_factor": 1.3}),
    "yarn of deepseek": ("yarn", {"factor": 40.0, "original_max_position_embeddings": 4096.0, "mscale": 1.0,
                                  "mscale_all_dim": 0.7}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_scaled_rope_is_that_of_transformers(name: str) -> None:
    """Queries and keys of both, multiplied with each other at positions far apart."""
    torch = pytest.importorskip("torch")
    qwen = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    kind, numbers = ROPES[name]
    theirs = {**numbers, "rope_type": kind, "rope_theta": 1e4} | (
        {"truncate": False} if "truncate" in numbers else {}
    )  # fmt: skip
    config = qwen.Qwen3Config(
        head_dim=32, hidden_size=64, num_attention_heads=2, max_position_embeddings=1 << 20, rope_parameters=theirs
    )
    rng, at = np.random.default_rng(0), np.array([[0, 1, 7, 63, 500, 9001]])
    query, key = rng.normal(size=(2, 1, 2, 6, 32)).astype(np.float32)
    cos, sin = qwen.Qwen3RotaryEmbedding(config)(torch.from_numpy(query), torch.from_numpy(at))
    one, other = qwen.apply_rotary_pos_emb(torch.from_numpy(query), torch.from_numpy(key), cos, sin)
    want = (one @ other.transpose(-1, -2)).numpy()
    turns, factor = rope_scaling.scaled(kind, numbers, 32, 1e4)
    mine, others = (
        rope(jnp.asarray(x.swapaxes(1, 2)), jnp.asarray(at), 1e4, turns).swapaxes(1, 2) for x in (query, key)
    )
    # Phases of 9000 have 5e-4 of rounding in float32.
    np.testing.assert_allclose(factor**2 * (mine @ others.swapaxes(-1, -2)), want, atol=5e-3 * np.abs(want).max())
    assert max(turns) <= 1 and min(turns) < 1


def by_hand(
    tensors: dict[str, np.ndarray], config: DrafterConfig, features: np.ndarray, anchor: int, token: int
) -> Any:
    """`test_fill_in.z_lab` with windows and scaled RoPE: layer by layer, row by row, key by key, in float64."""
    f, w = fill_in, {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    turns, factor = rope_scaling.scaled(config.rope_type, config.rope_scaling, f.H, 1e4)
    frequency = 1e4 ** (-np.arange(0, f.H, 2) / f.H) * (turns or 1.0)

    def turned(head: np.ndarray, position: int) -> np.ndarray:
        cos, sin = np.cos(position * frequency), np.sin(position * frequency)
        first, second = head[: f.H // 2], head[f.H // 2 :]
        return factor * np.concatenate([first * cos - second * sin, second * cos + first * sin])

    x = f.EMBEDDING[[token] + [f.MASK] * (config.block_rows - 1)].astype(np.float64)
    context = f.rms(features[:anchor].astype(np.float64) @ w["fc.weight"].T, w["hidden_norm.weight"])
    for i, kind in enumerate(config.layer_kinds):
        p = {n.removeprefix(f"layers.{i}."): v for n, v in w.items() if n.startswith(f"layers.{i}.")}
        normed = f.rms(x, p["input_layernorm.weight"])
        rows = [(t, context[t]) for t in range(anchor)] + [(anchor + k, row) for k, row in enumerate(normed)]
        if kind == "sliding_attention":
            rows = [(t, row) for t, row in rows if t > anchor - config.sliding_window]
        heads = np.zeros((len(x), f.HEADS, f.H))
        for k, n in np.ndindex(len(x), f.HEADS):
            part = slice(n * f.H, (n + 1) * f.H)
            own = slice(n // 2 * f.H, (n // 2 + 1) * f.H)
            query = turned(
                f.rms(p["self_attn.q_proj.weight"][part] @ normed[k], p["self_attn.q_norm.weight"]), anchor + k
            )
            scores, values = [], []
            for t, row in rows:
                key = f.rms(p["self_attn.k_proj.weight"][own] @ row, p["self_attn.k_norm.weight"])
                scores.append(query @ turned(key, t) / np.sqrt(f.H))
                values.append(p["self_attn.v_proj.weight"][own] @ row)
            weights = np.exp(np.asarray(scores) - max(scores))
            heads[k, n] = weights @ np.asarray(values) / weights.sum()
        x = x + heads.reshape(len(x), -1) @ p["self_attn.o_proj.weight"].T
        normed = f.rms(x, p["post_attention_layernorm.weight"])
        gate, up = (normed @ p[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp.down_proj.weight"].T
    return f.rms(x, w["norm.weight"])[config.block_rows - config.block_size :]


@pytest.mark.parametrize("config", [MIXED, SLIDING], ids=["fill-in, mixed, yarn", "anchor-first, all sliding"])
def test_training_rows_see_a_window_of_the_context_and_each_other(config: DrafterConfig) -> None:
    tensors = drafter_tensors(fill_in.drafter(config), config)
    want = np.stack([
        [by_hand(tensors, config, fill_in.FEATURES[b], a, fill_in.TOKENS[b, a]) for a in fill_in.ANCHORS[b]]
        for b in range(2)
    ])  # fmt: skip
    np.testing.assert_allclose(fill_in.outputs(config).hidden, want, atol=3e-5)


@pytest.mark.parametrize("config", [MIXED, SLIDING], ids=["fill-in, mixed, yarn", "anchor-first, all sliding"])
def test_drafts_are_what_the_training_pass_gives(config: DrafterConfig) -> None:
    """Many windows on, from a ring that is filled by pieces of all sizes, with rejected rows in between."""
    model, rng, length = fill_in.drafter(config), np.random.default_rng(7), 120
    features = jnp.asarray(rng.normal(size=(2, length, 2 * fill_in.D)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, fill_in.V - 1, (2, length)))
    pieces, rows = [40, 1, 3, 4, 2, 29, 4, 4, 1], fill_in.G + 1
    ends = np.cumsum(pieces)
    anchors = Anchors(jnp.asarray([ends] * 2), jnp.ones((2, len(ends)), bool))
    train = jax.jit(lambda model: model(fill_in.Matrices(), features, tokens, jnp.ones((2, length)), anchors).hidden)
    want = train(model)

    @functools.partial(jax.jit, static_argnames="size")
    def absorb(model: Any, cache: Any, start: Any, count: Any, size: int) -> Any:
        def piece(values: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(values, start, size, axis=1)

        at = jnp.broadcast_to(start + jnp.arange(size), (2, size))
        return model.extend(cache, piece(features), piece(tokens), at, jnp.full(2, count))

    @jax.jit
    def draft(model: Any, cache: Any, anchor: Any) -> Any:
        sampling = fill_in.Sampling.constant(0.0, 2)
        uniforms = jnp.zeros((2, fill_in.G, 2), jnp.int32)
        at = jnp.full(2, anchor)
        return model.propose(fill_in.Matrices(), cache, jnp.take(tokens, anchor, axis=1), at, uniforms, sampling)

    cache, start = model.init_cache(2, length), 0
    assert {kind: part.length < 50 for kind, part in cache.items()} == {
        kind: kind == "sliding_attention" for kind in config.layer_kinds
    }
    for number, (count, end) in enumerate(zip(pieces, ends, strict=True)):
        cache = absorb(model, cache, start, count, rows if count <= rows else count + 2)
        proposal, cache = draft(model, cache, int(end))
        logits = fill_in.Matrices().unembed(want[:, number])
        np.testing.assert_allclose(proposal.logits, logits, atol=3e-4, err_msg=str(end))
        start = int(end)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dspark", "fill_in"])
def test_a_drafter_with_a_window_is_lossless(kind: str) -> None:
    """Greedy answers many windows long are those of plain decoding, and drafts are accepted; in slots as well, where
    prompts come in chunks that a ring takes at once and in larger ones."""
    config = as_kind(
        Config(drafter=DrafterConfig(num_layers=2, block_size=3, target_layer_ids=(0, 1), mask_token_id=fill_in.MASK,
                                     markov_rank=4, initializer_range=0.3)), kind
    ).drafter  # fmt: skip
    config = dataclasses.replace(config, sliding_window=WINDOW, rope_type="linear", rope_scaling={"factor": 2.0})
    drafter = make_drafter(fill_in.ARCH, config, rngs=nnx.Rngs(3))
    target = Target(dataclasses.replace(fill_in.ARCH, max_position_embeddings=128), rngs=nnx.Rngs(0), scale=0.5)
    prompts = [[1, 2, 3], [4], [int(t) for t in np.random.default_rng(0).integers(0, fill_in.V, 21)]]
    plain, drafted = (
        generate(models, prompts, max_new_tokens=40, batch_size=3)
        for models in (Models(target), Models(target, drafter))
    )
    for one, other in zip(plain.tokens, drafted.tokens, strict=True):
        np.testing.assert_array_equal(one, other)
    assert max(int(lengths.max()) for lengths in drafted.acceptance_lengths) > 1
    chunk = {"dspark": 4, "fill_in": 32}[kind]
    with Engine(Models(target, drafter), slots=2, capacity=80, prefill_chunk=chunk, max_stop_tokens=4) as engine:
        requests = [engine.submit(prompt, max_new_tokens=40, temperature=0.0) for prompt in prompts]
        while engine.step():
            pass
        for one, request in zip(plain.tokens, requests, strict=True):
            np.testing.assert_array_equal(one, request.result().tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 3}, "drafter.sliding_window=3 is less than the 4 rows of a block"),
        (
            {"layer_types": ("full_attention",) * 2, "sliding_window": 9},
            "drafter.sliding_window=9 and drafter.layer_types=.* has no layer with a window",
        ),
        ({"layer_types": ("sliding_attention",) * 2}, "has layers with a window and drafter.sliding_window is 0"),
        ({"layer_types": ("full_attention",)}, "for each of the 2 layers"),
        ({"rope_type": "dynamic"}, "rope_type='dynamic' is unknown; its frequencies change as a sequence grows"),
        ({"rope_type": "yarn", "rope_scaling": {"factor": 2.0}}, "has no 'original_max_position_embeddings'"),
        ({"rope_type": "linear", "rope_scaling": {"factor": 0.0}}, "has 'factor': 0.0; it must be positive"),
        ({"sliding_window": 2**30 + 1}, "sliding_window=1073741825 must be a whole number from 0 to 1073741824"),
        (
            {"rope_type": "yarn", "rope_scaling": MIXED.rope_scaling | {"beta_fast": 1.0, "beta_slow": 32.0}},
            "beta_slow 32.0 must be below beta_fast 1.0",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "no number of rope_type='default'; it has none"),
        ({"kind": "eagle3", "num_layers": 1, "sliding_window": 9}, "drafter.sliding_window=9: eagle3 has no window"),
    ],
)
def test_what_does_not_fit_is_one_line(changes: dict[str, Any], message: str) -> None:
    shape = dataclasses.replace(fill_in.DFLASH, **{"block_layout": "fill_in"} | changes)
    if shape.kind == "eagle3":
        shape = dataclasses.replace(shape, block_layout="anchor_first")
    config = Config(target=TargetConfig(architecture=fill_in.ARCH), drafter=shape)
    config.data.max_length, config.data.max_prompt_length = 32, 8
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        resolve(config)
