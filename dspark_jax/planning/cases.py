"""Every operation at the shapes of an experiment, with random arrays: what `kernels` tries on a device."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax import platform
from dspark_jax.config import Config
from dspark_jax.kinds import KINDS
from dspark_jax.ops.attention import attention
from dspark_jax.ops.attention.api import OPERATION as ATTENTION
from dspark_jax.ops.block_attention import block_attention
from dspark_jax.ops.block_attention.api import OPERATION as BLOCK_ATTENTION
from dspark_jax.ops.cache_write import cache_write
from dspark_jax.ops.cache_write.api import OPERATION as CACHE_WRITE
from dspark_jax.ops.cached_attention import Rows, cached_attention
from dspark_jax.ops.cached_attention.api import OPERATION as CACHED_ATTENTION
from dspark_jax.ops.dispatch import Operation
from dspark_jax.ops.expert_mlp import Parts, expert_mlp
from dspark_jax.ops.expert_mlp.api import OPERATION as EXPERT_MLP
from dspark_jax.ops.markov_sample import markov_sample
from dspark_jax.ops.markov_sample.api import OPERATION as MARKOV_SAMPLE
from dspark_jax.ops.sampling import Sampling
from dspark_jax.ops.speculative_verify import speculative_verify
from dspark_jax.ops.speculative_verify.api import OPERATION as SPECULATIVE_VERIFY
from dspark_jax.ops.vocab_loss import vocab_loss
from dspark_jax.ops.vocab_loss.api import OPERATION as VOCAB_LOSS
from dspark_jax.target import families
from dspark_jax.target.families.family import AttentionShape, ExpertShape
from dspark_jax.target.layers import drafter_layer
from dspark_jax.training.losses import vocab_terms

Arrays = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation with one kind of arguments.

    Attributes:
      operation: which.
      label: what the arguments are like.
      function: (*arrays, implementation) -> arrays in any structure, with gradients where training needs some.
      arrays: makes the arguments; matrices and rows are in bfloat16, logits and the loss's W2 in float32.
      work: (*arrays) -> bytes that must be read and written, and floating point operations, of any implementation.
      in_place: how many of the first arrays it writes into and returns first.
    """

    operation: Operation
    label: str
    function: Callable[..., Any]
    arrays: Callable[[], Arrays]
    work: Callable[..., tuple[float, float]]
    in_place: int = 0


def cases(config: Config, *, requests: int = 32, context: int = 1024) -> Iterator[Case]:
    """All operations with kernels that the experiment's target and drafter use.

    Args:
      config: resolved; `target.architecture`, `drafter`, `loss`, `data.max_length`, `train.num_anchors` and
        `train.vocab_chunk`.
      requests: of a decoding round.
      context: tokens of each.
    """
    arch, rows = config.target.architecture, config.drafter.block_size + 1
    family = families.of_shape(arch)
    layers = [family.layer(arch, kind) for kind in family.stacks_of(arch)]
    plain = [one.attention for one in layers if one.delta is None and one.compressed is None]
    drafts = drafter_layer(arch)[1].attention
    for shape in dict.fromkeys(plain):
        yield from _attention(shape, config.data.max_length)
    yield _block_attention(drafts, config)
    cached = [_cached_attention(shape, requests, rows, context) for shape in (*plain, drafts)]
    yield from {case.label: case for case in cached}.values()
    yield _cache_write(drafts, requests, rows, context)
    for shape in dict.fromkeys(one.experts for one in layers if one.experts is not None):
        yield _expert_mlp(shape, arch.hidden_size, requests * rows)
    for heat in (0.0, 1.0) if _markov(config) else ():
        yield _markov_sample(config, requests, heat)
    for heat in (0.0, 1.0):
        yield _speculative_verify(config, requests, heat)
    yield _vocab_loss(config)


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _logits(seed: int, *shape: int) -> jax.Array:
    return 2 * jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def _uniforms(*shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(6), (*shape, 2), 0, 1 << 30)


def _size(*arrays: Any) -> int:
    """Bytes of all of them."""
    return sum(x.nbytes for x in jax.tree.leaves(arrays))


def _kind(shape: AttentionShape) -> str:
    """The end of a label."""
    return (f", a window of {shape.window}" if shape.window else "") + (", sinks" if shape.sinks else "")


def _markov(config: Config) -> int:
    """Rank of the sequential head, 0 without one."""
    return config.drafter.markov_rank if KINDS[config.drafter.kind].has_heads else 0


def _called(operation: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`operation(*arrays, implementation=…)` with these settings."""
    return lambda *arrays, implementation: operation(*arrays, **settings, implementation=implementation)


def _sampling(operation: Callable[..., Any], heat: float, requests: int) -> Callable[..., Any]:
    """The same at a temperature."""
    return lambda *arrays, implementation: operation(
        *arrays, sampling=Sampling.constant(heat, requests), implementation=implementation
    )


def _with_gradients(operation: Callable[..., Any], first: int, **settings: Any) -> Callable[..., Any]:
    """The result, and the gradients in the first arrays of its sum, weighted unevenly."""

    def run(*arrays: jax.Array, implementation: str) -> Any:
        rest = arrays[first:]
        out, pull = jax.vjp(
            lambda *trained: operation(*trained, *rest, **settings, implementation=implementation), *arrays[:first]
        )
        return out, pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype))

    return run


def _attention(shape: AttentionShape, length: int) -> Iterator[Case]:
    n, k, h = shape.heads, shape.kv_heads, shape.width
    size = f"{n}/{k} heads of {h}, {length} rows"
    settings: dict[str, Any] = {"scale": shape.scale, "window": shape.window}
    settings |= {"sinks": np.linspace(-1, 1, n, dtype=np.float32)} if shape.sinks else {}
    end = 1 + np.arange(length)

    def arrays() -> Arrays:
        return _normal(0, 1, length, n, h), _normal(1, 1, length, k, h), _normal(2, 1, length, k, h)

    def case(label: str, arrays: Callable[[], Arrays], seen: np.ndarray, **more: Any) -> Case:
        """Of rows that see so many keys, if no window ends before."""
        pairs = int(np.minimum(seen, shape.window or length).sum())
        keys = min(length, (shape.window or length) + len(seen) - 1)

        def work(query: jax.Array, *context: jax.Array) -> tuple[float, float]:
            return 2 * _size(query) + keys / length * _size(context), 4 * n * h * pairs

        return Case(ATTENTION, f"{size}{_kind(shape)}{label}", _called(attention, **settings, **more), arrays, work)

    yield case("", arrays, end)
    starts = np.arange(length) // -(-length // 4) * -(-length // 4)
    yield case(", four documents", arrays, end - starts, starts=starts[None])
    rows = min(256, length // 2)

    def chunk() -> Arrays:
        query, *context = arrays()
        return query[:, -rows:], *context

    yield case(f", a prompt's last {rows}", chunk, end[-rows:], limit=end[None, -rows:])


def _block_attention(shape: AttentionShape, config: Config) -> Case:
    length, blocks, size = config.data.max_length, config.train.num_anchors, config.drafter.block_size
    blocks = min(blocks, length // 2)
    n, k, h = shape.heads, shape.kv_heads, shape.width
    document = -(-length // 4) if config.data.pack else length

    def arrays() -> Arrays:
        context = [_normal(i, 1, length, k, h) for i in (1, 2)]
        own = [_normal(i, 1, blocks, size, k, h) for i in (3, 4)]
        anchors = jnp.sort(jax.random.randint(jax.random.key(5), (1, blocks), 1, length), axis=1).astype(jnp.int32)
        keep, starts = jnp.arange(blocks)[None] % 9 != 4, anchors // document * document
        return _normal(0, 1, blocks, size, n, h), *context, *own, anchors, keep, starts

    def work(*arrays: Any) -> tuple[float, float]:
        """Two products of what blocks see forward, five backward; arrays, the result and gradients once."""
        anchors, keep, starts = arrays[-3:]
        seen = int(jnp.sum(jnp.where(keep, anchors - starts + size, 0))) * size
        return 2 * _size(arrays[:5]) + _size(arrays[0]), 7 * 2 * n * h * seen

    packed = ", four documents" if config.data.pack else ""
    label = f"{n}/{k} heads of {h}, {blocks} blocks of {size} over {length} rows{packed}, and gradients"
    return Case(BLOCK_ATTENTION, label, _with_gradients(block_attention, 5, scale=shape.scale), arrays, work)


def _cached_attention(shape: AttentionShape, requests: int, rows: int, context: int) -> Case:
    n, k, h, length = shape.heads, shape.kv_heads, shape.width, platform.cache_rows(context + rows)

    def arrays() -> Arrays:
        caches = [_normal(i, requests, k, length, h) for i in (1, 2)]
        return _normal(0, requests * rows, n, h), *caches, jnp.maximum(context - jnp.arange(requests), 0)

    def run(query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array, *, implementation: str) -> Any:
        settings: dict[str, Any] = {"sinks": jnp.linspace(-1, 1, n)} if shape.sinks else {}
        settings |= {"scale": shape.scale, "window": shape.window, "finite": True}
        return cached_attention(
            query, key, value, Rows.whole(positions, rows), **settings, implementation=implementation
        )

    def work(query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array) -> tuple[float, float]:
        """What rows see of the caches once, query and result."""
        seen = np.minimum(np.asarray(positions) + rows, (shape.window or length) + rows - 1).sum() / (requests * length)
        return seen * _size(key, value) + 2 * _size(query), 4 * rows * n * h * requests * length * seen

    label = f"{n}/{k} heads of {h}, {requests} x {rows} rows over {context}{_kind(shape)}"
    return Case(CACHED_ATTENTION, label, run, arrays, work)


def _cache_write(shape: AttentionShape, requests: int, rows: int, context: int) -> Case:
    k, h, length = shape.kv_heads, shape.width, platform.cache_rows(context + rows)

    def arrays() -> Arrays:
        new = [_normal(i, requests, k, rows, h) for i in (3, 4)]
        places = (7 * jnp.arange(requests, dtype=jnp.int32) % (length - rows))[None]
        return *(_normal(i, 2, requests, k, length, h) for i in (1, 2)), *new, places

    def work(*arrays: Any) -> tuple[float, float]:
        return 2 * _size(arrays[2:4]), 0.0

    label = f"{rows} rows of {requests} requests into {length}"
    return Case(CACHE_WRITE, label, _called(cache_write, layer=1), arrays, work, in_place=2)


def _expert_mlp(shape: ExpertShape, d: int, rows: int) -> Case:
    e, f = shape.count, shape.width

    def arrays() -> Arrays:
        parts = Parts(_normal(1, e, d, f) / d**0.5, _normal(2, e, d, f) / d**0.5, _normal(3, e, f, d) / f**0.5)
        chosen = jax.lax.top_k(_logits(4, rows, e), shape.chosen)[1]
        return _normal(0, rows, d), chosen, jnp.full((rows, shape.chosen), 1 / shape.chosen, jnp.bfloat16), parts

    def work(hidden: jax.Array, chosen: jax.Array, *_: Any) -> tuple[float, float]:
        """Each expert that is chosen once."""
        return len(np.unique(chosen)) * 3 * d * f * 2 + 2 * _size(hidden), 6 * chosen.size * d * f

    inner = functools.partial(expert_mlp, inner=lambda gate, up: jax.nn.silu(gate) * up)
    return Case(EXPERT_MLP, f"{rows} rows, {shape.chosen} of {e} experts of {f}", _called(inner), arrays, work)


def _how(heat: float) -> str:
    return "sampled" if heat else "greedy"


def _markov_sample(config: Config, requests: int, heat: float) -> Case:
    v, rank, size = config.target.architecture.vocab_size, _markov(config), config.drafter.block_size

    def arrays() -> Arrays:
        heads = _normal(1, v, rank), _normal(2, v, rank) / rank**0.5
        return _logits(0, size, requests, v), *heads, jnp.arange(requests, dtype=jnp.int32), _uniforms(size, requests)

    def work(base: jax.Array, w1: jax.Array, w2: jax.Array, *_: Any) -> tuple[float, float]:
        """W2 for every draft, logits read and written."""
        return size * _size(w2) + 2 * _size(base), 2 * base.size * rank

    def run(*arrays: Any, implementation: str) -> Any:
        return _sampling(markov_sample, heat, requests)(*arrays, implementation=implementation)[::-1]

    label = f"{size} drafts of {requests} requests, {_how(heat)}"
    return Case(MARKOV_SAMPLE, label, run, arrays, work, in_place=1)  # the biased logits take the base's place


def _speculative_verify(config: Config, requests: int, heat: float) -> Case:
    v, size = config.target.architecture.vocab_size, config.drafter.block_size

    def arrays() -> Arrays:
        target = _logits(1, requests * (size + 1), v)
        draft = target.reshape(requests, size + 1, v)[:, :size] + 0.3 * _logits(2, requests, size, v)
        tokens = jnp.argmax(draft, axis=-1).astype(jnp.int32)
        lengths = jnp.full((requests,), size, jnp.int32)
        return target, draft, None, tokens, lengths, _uniforms(requests, size), _uniforms(requests)

    def work(target: jax.Array, draft: jax.Array, *_: Any) -> tuple[float, float]:
        """Both logits once; greedy, the target's alone."""
        return _size(target) + (_size(draft) if heat else 0), 0.0

    run = _sampling(speculative_verify, heat, requests)
    return Case(SPECULATIVE_VERIFY, f"{size} drafts of {requests} requests, {_how(heat)}", run, arrays, work)


def _vocab_loss(config: Config) -> Case:
    arch, rank, size = config.target.architecture, _markov(config), config.drafter.block_size
    rows = min(config.train.num_anchors, config.data.max_length // 2) * size
    v, d = arch.vocab_size, arch.hidden_size
    settings = {"terms": vocab_terms(config.loss.coefficients()), "block": size, "chunk": config.train.vocab_chunk}
    settings |= {"softcap": arch.final_logit_softcapping}

    def arrays() -> Arrays:
        prev, w2 = (_normal(1, 1, rows, rank), _logits(4, v, rank) / rank**0.5) if rank else (None, None)
        labels, weights = jnp.arange(rows)[None] * 11 % v, (jnp.arange(rows)[None] % 5 != 0).astype(jnp.float32)
        return _normal(0, 1, rows, d), prev, w2, _normal(2, 1, rows, d), _normal(3, v, d) / d**0.5, labels, weights

    def run(hidden: Any, prev: Any, w2: Any, teacher: Any, head: Any, *rest: jax.Array, implementation: str) -> Any:
        def loss(hidden: Any, prev: Any, w2: Any) -> jax.Array:
            arrays: Arrays = (hidden, prev, teacher, head, w2, *rest)
            return _called(vocab_loss, **settings)(*arrays, implementation=implementation).loss

        return jax.value_and_grad(loss, argnums=(0, 1, 2) if rank else 0)(hidden, prev, w2)

    def work(*arrays: Any) -> tuple[float, float]:
        """Both logits, the slopes of rows, and of W2 with those of its rows; arrays once, and gradients."""
        hidden, prev, w2 = arrays[:3]
        return _size(arrays) + _size(hidden, prev, w2), 2.0 * rows * v * 3 * (d + rank)

    return Case(VOCAB_LOSS, f"{rows} rows over {v} tokens, and gradients", run, arrays, work)
