"""Programs that `tests.compiled.tpus` compiles for a TPU, each in a process of its own; the last line is their JSON."""

import functools
import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dspark_jax.ops.attention import attention
from dspark_jax.ops.block_attention import block_attention
from dspark_jax.ops.cache_write import cache_write
from dspark_jax.ops.cached_attention import Rows, cached_attention
from dspark_jax.ops.expert_mlp import Parts, expert_mlp
from dspark_jax.ops.markov_sample import markov_sample
from dspark_jax.ops.sampling import Sampling
from dspark_jax.ops.speculative_verify import speculative_verify
from dspark_jax.ops.vocab_loss import vocab_loss
from dspark_jax.planning.topology import devices_of
from dspark_jax.sharding import MESH_AXES, spec
from dspark_jax.training.losses import vocab_terms

HEADS, KEY_HEADS, WIDTH = 32, 8, 128  # Qwen3-4B

Shapes = dict[str, tuple[tuple[int, ...], Any, tuple[str | None, ...]]]
"""Name -> sizes, type and logical axes of an argument."""


def figures(run: Any, shapes: Shapes, mesh: Mesh, given_up: tuple[int, ...] = ()) -> dict[str, Any]:
    """Compiles `run`, to which some arguments are given up, and says what is known of it."""

    def placed(sizes: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> Any:
        cut = spec(axes, sizes, mesh) if mesh.size > 1 else PartitionSpec()
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, cut))

    with jax.set_mesh(mesh):
        program = jax.jit(run, donate_argnums=given_up).lower(*(placed(*shape) for shape in shapes.values())).compile()
    text = program.as_text()
    return {
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": len(re.findall(r" (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", text)),
    }


def train_attention(
    mesh: Mesh, batch: int = 1, heads: int = HEADS, width: int = WIDTH, size: int = 7, dtype: Any = jnp.bfloat16
) -> dict[str, Any]:
    """Forward and backward of `block_attention`: 4096 rows, 512 blocks of `size`."""

    def both(*arrays: Any) -> Any:
        out, pull = jax.vjp(lambda *x: block_attention(*x, *arrays[5:], scale=width**-0.5), *arrays[:5])
        return out, pull(out)

    context = (batch, 4096, KEY_HEADS, width), dtype, ("batch", None, "kv_heads", None)
    own = (batch, 512, size, KEY_HEADS, width), dtype, ("batch", None, None, "kv_heads", None)
    query = (batch, 512, size, heads, width), dtype, ("batch", None, None, "heads", None)
    blocks = (batch, 512), jnp.int32, ("batch", None)
    shapes = {"query": query, "key": context, "value": context, "block_key": own, "block_value": own}
    return figures(both, shapes | {"anchors": blocks, "keep": (blocks[0], jnp.bool_, blocks[2])}, mesh)


PASSES: dict[str, dict[str, Any]] = {
    "a train step": {},
    "packed documents": {"documents": True},
    "a window": {"window": 1024, "heads": 16, "width": 256},
    "wide heads, one key head": {"heads": 16, "key_heads": 1, "width": 512},
    "32 query heads of one key head": {"heads": 32, "key_heads": 1, "width": 256},
    "narrow heads with sinks": {"heads": 64, "width": 64, "window": 128, "sinks": True},
    "5 query heads per key head": {"heads": 40},
    "a chunk of a prompt": {"t": 256, "limits": True},
    "float32, rows that fill no tile": {"t": 300, "s": 300, "heads": 7, "key_heads": 1, "dtype": jnp.float32},
}
"""Name -> what `full_attention` is compiled for."""


def full_attention(
    mesh: Mesh,
    batch: int = 2,
    t: int = 4096,
    s: int = 4096,
    heads: int = HEADS,
    key_heads: int = KEY_HEADS,
    width: int = WIDTH,
    window: int = 0,
    documents: bool = False,
    limits: bool = False,
    sinks: bool = False,
    dtype: Any = jnp.bfloat16,
) -> dict[str, Any]:
    """`attention` of a target over the rows of a pass."""

    def run(query: Any, key: Any, value: Any, limit: Any, starts: Any, own: Any) -> Any:
        given: dict[str, Any] = {"limit": limit if limits else None, "starts": starts if documents else None}
        return attention(query, key, value, scale=0.1, window=window, sinks=own if sinks else None, **given)

    context = (batch, s, key_heads, width), dtype, ("batch", None, "kv_heads", None)
    rows = (batch, t), jnp.int32, ("batch", None)
    query = (batch, t, heads, width), dtype, ("batch", None, "heads", None)
    shapes: Shapes = {"query": query, "key": context, "value": context, "limit": rows, "starts": rows}
    return figures(run, shapes | {"sinks": ((heads,), jnp.float32, (None,))}, mesh)


def full_attentions(mesh: Mesh) -> dict[str, Any]:
    """Figures of all of them."""
    return {name: full_attention(mesh, **how) for name, how in PASSES.items()}


WRITES: dict[str, dict[str, Any]] = {
    "rounds": {"batch": 32, "length": 1024, "t": 8},
    "a ring": {"batch": 16, "length": 1056, "t": 8, "places": 2, "width": 256},
    "plain steps": {"batch": 32, "length": 1024, "t": 1},
    "five rows, float32": {"batch": 3, "length": 208, "t": 5, "key_heads": 1, "width": 512, "dtype": jnp.float32},
    "many rows": {"batch": 2, "length": 1024, "t": 64},
}
"""Name -> what `write` is compiled for."""


def write(
    mesh: Mesh,
    batch: int,
    length: int,
    t: int,
    places: int = 1,
    key_heads: int = KEY_HEADS,
    width: int = WIDTH,
    dtype: Any = jnp.bfloat16,
) -> dict[str, Any]:
    """`cache_write` in a loop over the caches of four layers, which are stacked and given up."""

    def run(key: Any, value: Any, new: Any, at: Any) -> Any:
        return jax.lax.fori_loop(0, 4, lambda i, both: cache_write(*both, new, new + 1, at, layer=i), (key, value))

    cache = (4, batch, key_heads, length, width), dtype, (None, "batch", "kv_heads", None, None)
    new = (batch, key_heads, t, width), dtype, ("batch", "kv_heads", None, None)
    shapes: Shapes = {"key": cache, "value": cache, "new": new, "at": ((places, batch), jnp.int32, (None, "batch"))}
    return figures(run, shapes, mesh, given_up=(0, 1))


def writes(mesh: Mesh) -> dict[str, Any]:
    """Figures of all of them."""
    return {name: write(mesh, **how) for name, how in WRITES.items()}


DECODING: dict[str, dict[str, Any]] = {
    "rounds": {"batch": 32, "length": 1024, "most": 8},
    "rounds, longer": {"batch": 32, "length": 4096, "most": 8},
    "rounds of one": {"batch": 1, "length": 4096, "most": 8},
    "plain steps": {"batch": 32, "length": 1024, "most": 1},
    "a drafter's blocks": {"batch": 32, "length": 1024, "most": 7, "causal": False},
    "ragged": {"batch": 32, "length": 1040, "most": 8, "size": 64},
    "a window": {"batch": 32, "length": 4096, "most": 8, "window": 512},
    "a ring": {"batch": 32, "length": 544, "most": 8, "window": 512, "front": 8},
    "5 query heads per key head": {"batch": 8, "length": 1024, "most": 8, "heads": 40},
    "sinks over a ring": {
        "batch": 32,
        "length": 160,
        "most": 8,
        "window": 128,
        "front": 8,
        "heads": 64,
        "sinks": True,
    },
    "one wide key head": {"batch": 4, "length": 1024, "most": 32, "heads": 16, "key_heads": 1, "width": 512},
    "blocks of 127": {"batch": 2, "length": 1024, "most": 128},
    "float32": {"batch": 2, "length": 200, "most": 8, "width": 256, "dtype": jnp.float32},
}
"""Name -> what `decode_attention` is compiled for."""


def decode_attention(
    mesh: Mesh,
    batch: int,
    length: int,
    most: int,
    size: int = 0,
    heads: int = HEADS,
    key_heads: int = KEY_HEADS,
    width: int = WIDTH,
    dtype: Any = jnp.bfloat16,
    sinks: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """`cached_attention` in a loop over the caches of four layers, which are stacked; with `size`, that many rows."""

    def run(query: Any, key: Any, value: Any, positions: Any, counts: Any) -> Any:
        rows = Rows.of(counts, positions, size=size, most=most) if size else Rows.whole(positions, most)
        settings: Any = {"scale": 0.1, "finite": True, **how, "sinks": jnp.linspace(-1, 2, heads) if sinks else None}
        return jax.lax.fori_loop(0, 4, lambda i, x: cached_attention(x, key, value, rows, layer=i, **settings), query)

    cache = (4, batch, key_heads, length, width), dtype, (None, "batch", "kv_heads", None, None)
    query = (size or batch * most, heads, width), dtype, ("batch", "heads", None)
    numbers = (batch,), jnp.int32, ("batch",)
    return figures(run, {"q": query, "k": cache, "v": cache, "positions": numbers, "counts": numbers}, mesh)


def decode_attentions(mesh: Mesh) -> dict[str, Any]:
    """Figures of all of them."""
    return {name: decode_attention(mesh, **how) for name, how in DECODING.items()}


def verification(mesh: Mesh, batch: int, greedy: bool = False, ragged: bool = False, vocabulary: int = 151936) -> Any:
    """`speculative_verify` of seven drafts per request, whose logits the drafter leaves position by position."""

    def run(target: Any, draft: Any, first: Any, tokens: Any, lengths: Any, accept: Any, following: Any) -> Any:
        sampling = Sampling(jnp.full((batch,), 0.0 if greedy else 1.0), greedy=greedy)
        rows = first if ragged else None
        return speculative_verify(target, draft.swapaxes(0, 1), rows, tokens, lengths, accept, following, sampling)

    shapes: Shapes = {
        "target": ((batch * 8, vocabulary), jnp.float32, ("batch", None)),
        "draft": ((7, batch, vocabulary), jnp.float32, (None, "batch", None)),
        "first": ((batch,), jnp.int32, ("batch",)),
        "tokens": ((batch, 7), jnp.int32, ("batch", None)),
        "lengths": ((batch,), jnp.int32, ("batch",)),
        "accept": ((batch, 7, 2), jnp.int32, ("batch", None, None)),
        "following": ((batch, 2), jnp.int32, ("batch", None)),
    }
    return figures(run, shapes, mesh)


VERIFICATIONS: dict[str, dict[str, Any]] = {
    "one request": {"batch": 1},
    "32 requests": {"batch": 32},
    "ragged": {"batch": 32, "ragged": True},
    "greedy": {"batch": 32, "greedy": True},
    "three requests, a tile and a bit": {"batch": 3, "vocabulary": 41344},
}
"""Name -> what `verification` is compiled for."""


def verifications(mesh: Mesh) -> dict[str, Any]:
    """Figures of all of them."""
    return {name: verification(mesh, **how) for name, how in VERIFICATIONS.items()}


def drafts(
    mesh: Mesh, batch: int, g: int = 7, greedy: bool = False, vocabulary: int = 151936, dtype: Any = jnp.bfloat16
) -> dict[str, Any]:
    """`markov_sample` of rank 256; the base logits are made in the same program, and their place is taken."""

    def run(base: Any, w1: Any, w2: Any, anchors: Any, uniforms: Any) -> Any:
        sampling = Sampling(jnp.full((batch,), 0.0 if greedy else 1.0), greedy=greedy)
        return markov_sample(base.astype(jnp.float32), w1, w2, anchors, uniforms, sampling)

    shapes: Shapes = {
        "base": ((g, batch, vocabulary), jnp.bfloat16, (None, "batch", "vocab")),
        "w1": ((vocabulary, 2, 128), dtype, (None, None, None)),
        "w2": ((vocabulary, 256), dtype, ("vocab", None)),
        "anchors": ((batch,), jnp.int32, ("batch",)),
        "uniforms": ((g, batch, 2), jnp.int32, (None, "batch", None)),
    }
    return figures(run, shapes, mesh)


DRAFTS: dict[str, dict[str, Any]] = {
    "one request": {"batch": 1},
    "32 requests": {"batch": 32},
    "128 requests": {"batch": 128},
    "16 drafts": {"batch": 8, "g": 16},
    "greedy": {"batch": 32, "greedy": True},
    "five requests, float32": {"batch": 5, "dtype": jnp.float32},
    "Gemma's vocabulary": {"batch": 8, "vocabulary": 262144},
    "less than a tile": {"batch": 3, "vocabulary": 1152},
}
"""Name -> what `drafts` is compiled for."""


def all_drafts(mesh: Mesh) -> dict[str, Any]:
    """Figures of all of them."""
    return {name: drafts(mesh, **how) for name, how in DRAFTS.items()}


def loss(mesh: Mesh, batch: int, vocabulary: int = 151936, softcap: float = 0.0) -> dict[str, Any]:
    """`vocab_loss` and its gradients, of 900 rows per sequence."""

    def run(hidden: Any, prev: Any, w2: Any, teacher: Any, head: Any, labels: Any, weights: Any) -> Any:
        def value(hidden: Any, prev: Any, w2: Any) -> Any:
            terms = vocab_terms({"ce": 0.1, "l1": 0.9})
            settings: Any = {"terms": terms, "softcap": softcap, "chunk": 1024}
            return vocab_loss(hidden, prev, teacher, head, w2, labels, weights, **settings).loss

        return jax.value_and_grad(value, argnums=(0, 1, 2))(hidden, prev, w2)

    def rows(*width: int, dtype: Any = jnp.bfloat16) -> Any:
        return (batch, 900, *width), dtype, ("batch", None, *(None for _ in width))

    shapes: Shapes = {
        "hidden": rows(2560),
        "prev": rows(256),
        "w2": ((vocabulary, 256), jnp.float32, ("vocab", None)),
        "teacher": rows(2560),
        "head": ((vocabulary, 2560), jnp.bfloat16, ("vocab", "embed")),
        "labels": rows(dtype=jnp.int32),
        "weights": rows(dtype=jnp.float32),
    }
    return figures(run, shapes, mesh)


def experts(mesh: Mesh) -> dict[str, Any]:
    """`expert_mlp` of a layer's experts in a stack of four, by what reads them; `temporary_bytes` are to be compared
    with a layer's matrices, `layer_bytes`."""
    return {name: mixture(mesh, **how) for name, how in MIXTURES.items()}


def mixture(mesh: Mesh, t: int, k: int, e: int, d: int, f: int, biases: bool = False, dtype: Any = jnp.bfloat16) -> Any:
    """One of them."""

    def inner(gate: Any, up: Any) -> Any:
        return jnp.clip(up, -7, 7) * gate * jax.nn.sigmoid(1.7 * gate) if biases else jax.nn.silu(gate) * up

    def run(layer: Any, rows: Any, chosen: Any, weights: Any, *parts: Any) -> Any:
        return expert_mlp(rows, chosen, weights, Parts(*parts), inner, layer=layer)

    added: Shapes = {name: ((e, n), dtype, (None, None)) for name, n in {"gate": f, "up": f, "down": d}.items()}
    shapes: Shapes = {
        "layer": ((), jnp.int32, ()),
        "rows": ((t, d), dtype, (None, None)),
        "chosen": ((t, k), jnp.int32, (None, None)),
        "weights": ((t, k), dtype, (None, None)),
        "gates": ((4, e, d, f), dtype, (None,) * 4),
        "ups": ((4, e, d, f), dtype, (None,) * 4),
        "downs": ((4, e, f, d), dtype, (None,) * 4),
        **(added if biases else {}),
    }
    return figures(run, shapes, mesh) | {"layer_bytes": 3 * e * d * f * jnp.dtype(dtype).itemsize}


MIXTURES: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B, a round": {"t": 32, "k": 8, "e": 128, "d": 2048, "f": 768},
    "Qwen3-30B-A3B, a prompt": {"t": 4096, "k": 8, "e": 128, "d": 2048, "f": 768},
    "GPT-OSS, one row": {"t": 1, "k": 4, "e": 32, "d": 2880, "f": 2880, "biases": True},
    "float32": {"t": 40, "k": 2, "e": 8, "d": 256, "f": 256, "dtype": jnp.float32},
    "DeepSeek-V4-Flash, an eighth": {"t": 64, "k": 6, "e": 32, "d": 4096, "f": 2048},
}
"""Name -> what `mixture` is compiled for."""


JOBS: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "attention": (full_attentions, (1, 1, 1)),
    "attention on a mesh": (full_attention, (1, 2, 2)),
    "block_attention": (train_attention, (1, 1, 1)),
    "block_attention on a mesh": (functools.partial(train_attention, batch=2), (1, 2, 2)),
    "block_attention, 5 query heads per key head": (functools.partial(train_attention, heads=40, size=16), (1, 1, 1)),
    "cache_write": (writes, (1, 1, 1)),
    "cache_write on a mesh": (functools.partial(write, **WRITES["rounds"]), (1, 2, 2)),
    "cached_attention": (decode_attentions, (1, 1, 1)),
    "cached_attention on a mesh": (functools.partial(decode_attention, **DECODING["rounds"]), (1, 2, 2)),
    "expert_mlp": (experts, (1, 1, 1)),
    "speculative_verify": (verifications, (1, 1, 1)),
    "speculative_verify on a mesh": (functools.partial(verification, batch=32), (2, 2, 1)),
    "markov_sample": (all_drafts, (1, 1, 1)),
    "markov_sample on a mesh": (functools.partial(drafts, batch=32), (2, 2, 1)),
    "markov_sample, split vocabulary": (functools.partial(drafts, batch=32), (1, 2, 2)),
    "vocab_loss": (functools.partial(loss, batch=1), (1, 1, 1)),
    "vocab_loss on a mesh": (functools.partial(loss, batch=4), (2, 2, 1)),
    "vocab_loss, split vocabulary": (functools.partial(loss, batch=2), (1, 2, 2)),
    "vocab_loss, Gemma's vocabulary and cap": (
        functools.partial(loss, batch=1, vocabulary=262144, softcap=30.0),
        (1, 1, 1),
    ),
    "block_attention, wide": (functools.partial(train_attention, width=256, dtype=jnp.float32), (1, 1, 1)),
}
"""Name -> job and sizes of its mesh (data, fsdp, tensor)."""


def main(name: str, topology: str) -> None:
    job, sizes = JOBS[name]
    devices = np.asarray(devices_of(topology)[1][: int(np.prod(sizes))]).reshape(sizes)
    print(json.dumps(job(Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3))))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(*sys.argv[1:])
