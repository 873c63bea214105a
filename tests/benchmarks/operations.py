"""Times every implementation of every operation at the shapes of Qwen3-4B; run by released.py."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax import platform
from dspark_jax.ops.attention import attention
from dspark_jax.ops.attention.api import OPERATION as ATTENTION
from dspark_jax.ops.block_attention import block_attention
from dspark_jax.ops.block_attention.api import OPERATION as BLOCK_ATTENTION
from dspark_jax.ops.cache_write import cache_write
from dspark_jax.ops.cache_write.api import OPERATION as CACHE_WRITE
from dspark_jax.ops.cached_attention import Rows, cached_attention
from dspark_jax.ops.cached_attention.api import OPERATION as CACHED_ATTENTION
from dspark_jax.ops.dispatch import Operation, Unsupported
from dspark_jax.ops.expert_mlp import Parts, expert_mlp
from dspark_jax.ops.expert_mlp.api import OPERATION as EXPERT_MLP
from dspark_jax.ops.markov_sample import markov_sample
from dspark_jax.ops.markov_sample.api import OPERATION as MARKOV_SAMPLE
from dspark_jax.ops.sampling import Sampling
from dspark_jax.ops.speculative_verify import speculative_verify
from dspark_jax.ops.speculative_verify.api import OPERATION as SPECULATIVE_VERIFY
from dspark_jax.ops.vocab_loss import vocab_loss
from dspark_jax.ops.vocab_loss.api import OPERATION as VOCAB_LOSS
from dspark_jax.training.losses import vocab_terms

HEADS, KEY_HEADS, WIDTH = 32, 8, 128


def here(operation: Operation) -> list[str]:
    """Implementations that this platform asks, in its order."""
    return operation.order[platform.current()]


def normal(seed: int, *shape: int) -> jax.Array:
    """A random bfloat16 array."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def operations(rates: Any, row: Callable[..., Any], best: Callable[..., float], quick: bool) -> list[Any]:
    """Lines as `row` makes them."""
    return [
        *_attention(rates, row, best, 256 if quick else 4096),
        *_block_attention(rates, row, best, *((8, 256) if quick else (512, 4096))),
        *_cached_attention(rates, row, best, quick),
        *_cache_write(rates, row, best, quick),
        *_expert_mlp(rates, row, best, quick),
        *_markov_sample(rates, row, best, quick),
        *_speculative_verify(rates, row, best, quick),
        *_vocab_loss(rates, row, best, quick),
    ]


def _attention(rates: Any, row: Any, best: Any, length: int) -> list[Any]:
    arrays = normal(0, 1, length, HEADS, WIDTH), *(normal(i, 1, length, KEY_HEADS, WIDTH) for i in (1, 2))
    starts = (jnp.arange(length) // (length // 4) * (length // 4))[None]
    floor = rates.floor(2 * sum(x.nbytes for x in arrays), 2 * HEADS * WIDTH * length * length)
    found = []
    for name in here(ATTENTION):
        for label, more in (("causal", {}), ("window 512", {"window": 512}), ("four documents", {"starts": starts})):
            run = jax.jit(functools.partial(attention, scale=0.1, implementation=name, **more))
            try:
                found.append(row(f"attention {length}, {label}: {name}", best(run, *arrays), floor))
            except Unsupported as refusal:
                print(f"attention, {label}: {name} refuses: {refusal}")
    return found


def _block_attention(rates: Any, row: Any, best: Any, blocks: int, length: int) -> list[Any]:
    size = 7
    context = [normal(i, 1, length, KEY_HEADS, WIDTH) for i in (1, 2)]
    own = [normal(i, 1, blocks, size, KEY_HEADS, WIDTH) for i in (3, 4)]
    query = normal(0, 1, blocks, size, HEADS, WIDTH)
    anchors = jnp.sort(jax.random.randint(jax.random.key(5), (1, blocks), 0, length - size), axis=1)
    keep, found, first = jnp.ones((1, blocks), bool), [], jnp.zeros(())
    seen = float(jnp.sum(anchors)) * size * HEADS
    for name in here(BLOCK_ATTENTION):
        run = functools.partial(block_attention, scale=WIDTH**-0.5, implementation=name)

        def both(*arrays: jax.Array, run: Any = run) -> Any:
            out, pull = jax.vjp(lambda *x: run(*x, anchors, keep), *arrays)
            return pull(out)

        arrays = (query, *context, *own)
        forward = jax.jit(lambda *x, run=run: run(*x, anchors, keep))
        out = forward(*arrays).astype(jnp.float32)
        first = out if name == here(BLOCK_ATTENTION)[0] else first
        print(f"    differs from the first by {float(jnp.linalg.norm(out - first) / jnp.linalg.norm(first)):.1e}")
        for label, call, products in (("forward", forward, 2), ("forward and backward", jax.jit(both), 7)):
            seconds = best(call, *arrays)
            found.append(row(f"block_attention {label}: {name}", seconds, rates.floor(0, products * 2 * seen * WIDTH)))
    return found


def _cached_attention(rates: Any, row: Any, best: Any, quick: bool) -> list[Any]:
    found, first = [], jnp.zeros(())
    for batch, length in ((2, 64),) if quick else ((1, 1024), (1, 8192), (32, 1024), (32, 4096), (128, 1024)):
        caches = [[normal(9 * i + j, batch, KEY_HEADS, length, WIDTH) for j in (1, 2)] for i in range(4)]
        query, rows = normal(0, batch * 8, HEADS, WIDTH), Rows.whole(jnp.full((batch,), length - 8), 8)
        for name in here(CACHED_ATTENTION):

            def run(query: jax.Array, caches: Any, name: str = name, rows: Rows = rows) -> jax.Array:
                def once(_: Any, query: jax.Array) -> jax.Array:
                    for key, value in caches:  # several, so that the second-level cache does not hold them
                        query, key, value = jax.lax.optimization_barrier((query, key, value))
                        out = cached_attention(query, key, value, rows, scale=0.1, finite=True, implementation=name)
                        query = query + 0.001 * out
                    return query

                return jax.lax.fori_loop(0, 10, once, query)

            call = jax.jit(functools.partial(cached_attention, scale=0.1, finite=True, implementation=name))
            out = call(query, *caches[0], rows).astype(jnp.float32)
            first = out if name == here(CACHED_ATTENTION)[0] else first
            print(f"    differs from the first by {float(jnp.linalg.norm(out - first) / jnp.linalg.norm(first)):.1e}")
            seconds = best(jax.jit(run), query, caches, calls=1) / 40
            floor = rates.floor(caches[0][0].nbytes * 2)
            found.append(row(f"cached_attention {batch} x {length}: {name}", seconds, floor))
    return found


def _cache_write(rates: Any, row: Any, best: Any, quick: bool) -> list[Any]:
    """A round's eight rows of every request, into each of four layers; the floor reads and writes these rows."""
    found = []
    for batch in (2,) if quick else (1, 32, 128):
        caches = [normal(i, 4, batch, KEY_HEADS, 64 if quick else 1024, WIDTH) for i in (1, 2)]
        new, places = normal(3, batch, KEY_HEADS, 8, WIDTH), (7 * jnp.arange(batch) % 50)[None]
        for name in here(CACHE_WRITE):

            def run(new: jax.Array, places: jax.Array, *caches: jax.Array, name: str = name) -> Any:
                def once(turn: Any, both: Any, name: str = name) -> Any:
                    return cache_write(*both, new, new, places, layer=turn % 4, implementation=name)

                return jax.lax.fori_loop(0, 40, once, caches)

            seconds = best(jax.jit(run), new, places, *caches, calls=1) / 40
            found.append(row(f"cache_write {batch} x 8: {name}", seconds, rates.floor(4 * new.nbytes)))
    return found


def _expert_mlp(rates: Any, row: Any, best: Any, quick: bool) -> list[Any]:
    """A layer of Qwen3-30B-A3B, of one row, of rounds of 32 requests and of a prompt; the floor reads each expert that
    is chosen once."""
    e, k, d, f = (4, 2, 128, 64) if quick else (128, 8, 2048, 768)
    parts = Parts(normal(1, e, d, f) / d**0.5, normal(2, e, d, f) / d**0.5, normal(3, e, f, d) / f**0.5)
    found, first = [], jnp.zeros(())
    for t in (1, 8) if quick else (1, 32, 256, 4096):
        rows, scores = normal(0, t, d), jax.random.normal(jax.random.key(4), (t, e))
        chosen = jax.lax.top_k(scores, k)[1]
        weights = jnp.full((t, k), 1 / k, jnp.bfloat16)
        read = int(jnp.sum(jnp.bincount(chosen.reshape(-1), length=e) > 0)) * 3 * d * f * 2
        floor = rates.floor(read + 2 * rows.nbytes, 6 * t * k * d * f)
        for name in here(EXPERT_MLP):
            run = jax.jit(
                functools.partial(expert_mlp, inner=lambda gate, up: jax.nn.silu(gate) * up, implementation=name)
            )
            out = run(rows, chosen, weights, parts).astype(jnp.float32)
            first = out if name == here(EXPERT_MLP)[0] else first
            print(f"    differs from the first by {float(jnp.linalg.norm(out - first) / jnp.linalg.norm(first)):.1e}")
            found.append(row(f"expert_mlp {t} rows: {name}", best(run, rows, chosen, weights, parts), floor))
    return found


def _logits(seed: int, *shape: int) -> jax.Array:
    return 2 * jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def _uniforms(*shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(6), (*shape, 2), 0, 1 << 30)


def _markov_sample(rates: Any, row: Any, best: Any, quick: bool) -> list[Any]:
    """Milliseconds of a whole block; the floor reads W2 for every draft and reads and writes the logits."""
    found = []
    for batch, size in ((2, 3),) if quick else ((1, 7), (32, 7), (128, 7), (128, 16)):
        v, rank = (1024, 128) if quick else (151936, 256)
        base, w1, w2 = _logits(0, size, batch, v), normal(1, v, rank), normal(2, v, rank)
        anchors = jnp.arange(batch, dtype=jnp.int32)
        floor = rates.floor(size * w2.nbytes + 2 * base.nbytes)
        for label, heat in (("greedy", 0.0), ("sampled", 1.0)):
            for name in here(MARKOV_SAMPLE):
                run = jax.jit(functools.partial(markov_sample, implementation=name))
                arguments = (base, w1, w2, anchors, _uniforms(size, batch), Sampling.constant(heat, batch))
                title = f"markov_sample {size} x {batch}, {label}: {name}"
                found.append(row(title, best(run, *arguments, calls=5), floor))
    return found


def _verify(target: jax.Array, draft: jax.Array, *rest: Any, implementation: str) -> Any:
    """With the drafter's logits [G, B, V], as drafters leave them."""
    return speculative_verify(target, draft.swapaxes(0, 1), *rest, implementation=implementation)


def _speculative_verify(rates: Any, row: Any, best: Any, quick: bool) -> list[Any]:
    """The floor reads every row of both logits once; greedy, the target's alone."""
    found = []
    for batch, size in ((2, 3),) if quick else ((1, 7), (32, 7), (128, 7)):
        v = 1024 if quick else 151936
        draft = _logits(0, size, batch, v)
        target = _logits(1, batch * (size + 1), v)
        first = jnp.arange(0, batch * (size + 1), size + 1, dtype=jnp.int32)
        lengths = jnp.full((batch,), size)
        for label, heat in (("greedy", 0.0), ("sampled", 1.0)):
            floor = rates.floor(target.nbytes + (draft.nbytes if heat else 0))
            for name in here(SPECULATIVE_VERIFY):
                run = functools.partial(_verify, implementation=name)
                tokens = jnp.argmax(draft, axis=-1).T
                rest = (_uniforms(batch, size), _uniforms(batch), Sampling.constant(heat, batch))
                title = f"speculative_verify {batch} x {size + 1}, {label}: {name}"
                found.append(
                    row(title, best(jax.jit(run), target, draft, first, tokens, lengths, *rest, calls=5), floor)
                )
    return found


def _vocab_loss(rates: Any, row: Any, best: Any, quick: bool) -> list[Any]:
    """Loss and gradients of a sequence's blocks; the floor is the products, and after them logits and slopes once."""
    rows, v, width, rank = (14, 1024, 64, 128) if quick else (3584, 151936, 2560, 256)
    hidden, prev, teacher = normal(0, 1, rows, width), normal(1, 1, rows, rank), normal(2, 1, rows, width)
    head, w2 = normal(3, v, width) * width**-0.5, normal(4, v, rank).astype(jnp.float32) * rank**-0.5
    labels, weights = jnp.arange(rows)[None] * 11 % v, jnp.ones((1, rows))
    floor = rates.floor(10 * rows * v) + rates.floor(0, 2 * rows * v * 3 * (width + rank))
    terms, found = vocab_terms({"ce": 0.1, "l1": 0.9}), []
    for name in here(VOCAB_LOSS):

        def loss(hidden: jax.Array, prev: jax.Array, w2: jax.Array, head: jax.Array, name: str = name) -> jax.Array:
            arrays = hidden, prev, teacher, head, w2, labels, weights
            return vocab_loss(*arrays, terms=terms, block=7, chunk=1024, implementation=name).loss

        seconds = best(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))), hidden, prev, w2, head, calls=2)
        found.append(row(f"vocab_loss {rows} rows: {name}", seconds, floor))
    return found
