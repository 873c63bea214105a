"""`vocab_loss` with the work between the products as Pallas kernels for GPUs (Triton).

A row of logits does not fit into a multiprocessor, so that kernels go over it a few times, a tile after the other: once
for both sums of exponentials, once for what the terms add up from them (`passes`), once for the slopes. The products
are XLA's; the Markov bias is part of the draft's.

    grid (rows)         sums of one row, over all its tiles
    grid (rows, tiles)  slopes
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dspark_jax.ops import triton
from dspark_jax.ops.triton import LOG2E, MASKED, load, numbers, power_of_two, store
from dspark_jax.ops.vocab_loss import xla
from dspark_jax.ops.vocab_loss.passes import Pass, Passes
from dspark_jax.ops.vocab_loss.result import VocabLoss
from dspark_jax.ops.vocab_loss.term import Exponentials, VocabTerm
from dspark_jax.ops.vocab_loss.xla import Logits, RowResults, Settings
from dspark_jax.sharding import parts_of, per_device

_TILE, _WARPS, _STAGES = 2048, 8, 3


def vocab_loss(
    hidden: jax.Array | None,
    prev_embedding: jax.Array | None,
    teacher: jax.Array,
    head: jax.Array,
    markov_w2: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    *,
    terms: Mapping[str, tuple[VocabTerm, float]],
    block: int = 1,
    softcap: float = 0.0,
    chunk: int,
    candidates: int = 0,
) -> VocabLoss:
    """See `api.vocab_loss`. Over a mesh, devices split the sequences."""
    triton.check(
        the_vocabulary_is_split_over_devices=parts_of("vocab") == 1,
        a_chunk_has_over_2_to_31_logits=min(chunk + block, labels.size) * head.shape[0] < 1 << 31,
    )
    arrays = hidden, prev_embedding, teacher, head, markov_w2, labels, weights
    settings: Any = {"terms": terms, "block": block, "softcap": softcap, "chunk": chunk, "candidates": candidates}
    _check_terms(terms, block, head.shape[0])
    return xla.vocab_loss(*arrays, **settings, by_row=_rowwise, join=True)


def _check_terms(terms: Mapping[str, tuple[VocabTerm, float]], block: int, v: int) -> None:
    """Refuses terms that cannot be split into passes: here, since gradients may be asked for much later."""
    settings = Settings(tuple((name, *term) for name, term in terms.items()), block, 0.0, block, _rowwise)
    number, label = (jax.ShapeDtypeStruct((1, block), dtype) for dtype in (jnp.float32, jnp.int32))
    tokens, sums = (jax.ShapeDtypeStruct((1, block, size), jnp.float32) for size in (v, 1))
    narrow = [number, label, number, *[sums] * 4]
    Passes(functools.partial(_of_rows, settings=settings, dtype=jnp.float32), [tokens] * 2, narrow)


def _rowwise(logits: Logits, labels: jax.Array, weights: jax.Array, settings: Settings, dtype: Any) -> RowResults:
    """See `xla.Rowwise`."""
    v, wide = logits.draft.shape[-1], [logits.draft, logits.teacher]
    exponentials = functools.partial(_exponentials_kernel, v=v)
    sums = _go_over(exponentials, wide, [weights], [jnp.float32] * 4, sums=True)
    wide += [] if logits.capped is None else [logits.capped]
    narrow = [logits.label, labels, weights, *(x[..., None] for x in sums)]

    def one_pass(part: Pass, arrays: list[jax.Array], rows: list[jax.Array]) -> Sequence[jax.Array]:
        if part.sums:
            kernel, dtypes = functools.partial(_sums_kernel, part=part, v=v), [jnp.float32] * len(part.sums)
            return _go_over(kernel, arrays, [*rows, weights], dtypes, sums=True)
        kernel = functools.partial(_tokens_kernel, part=part, v=v)
        return _go_over(kernel, arrays, rows, [dtype] * len(part.wanted), sums=False)

    of_rows = functools.partial(_of_rows, settings=settings, dtype=dtype)
    return Passes(of_rows, wide, narrow).run([*wide, *narrow], one_pass)


def _of_rows(*arrays: jax.Array, settings: Settings, dtype: Any) -> RowResults:
    """The rows' results from logits [P, m, V] of draft, teacher and (if there are any) those before the bias, the
    label's logit, labels and weights [P, m], and the `Exponentials` of both."""
    draft, teacher, *capped = arrays[:-7]
    label, labels, weights, *sums = arrays[-7:]
    rows = Logits(draft, teacher, capped[0] if capped else None, label)
    found = xla.rowwise(rows, labels, weights, settings, dtype, (Exponentials(*sums[:2]), Exponentials(*sums[2:])))
    return found if capped else found._replace(slope=found.bent)  # they are the same then


def _go_over(
    kernel: Any, wide: Sequence[jax.Array], narrow: Sequence[jax.Array], dtypes: Sequence[Any], *, sums: bool
) -> list[jax.Array]:
    """A kernel from rows [V] and numbers of them, [P, m, V] and [P, m], to one result of each type.

    With `sums` a program has a row, and gives numbers [P, m]; otherwise a tile of one, and gives a part of [P, m, V].
    """

    def here(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        p, m, v = arrays[0].shape
        row, one = pl.BlockSpec((None, v), lambda i, *_: (i, 0)), pl.BlockSpec((1,), lambda i, *_: (i,))
        inputs = [x.reshape(p * m, *x.shape[2:]) for x in arrays]
        shape = (p * m,) if sums else (p * m, v)
        out = [jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes]
        specs, grid = [row] * len(wide) + [one] * len(narrow), (p * m,) if sums else (p * m, pl.cdiv(v, _tile(v)))
        out_specs = [one if sums else row] * len(out)
        found = triton.call(kernel, inputs, specs, out, out_specs, grid=grid, warps=_WARPS, stages=_STAGES)
        return tuple(x.reshape(p, m, *shape[1:]) for x in found)

    of_rows, of_tokens = ("batch", None), ("batch", None, None)
    axes = [of_tokens] * len(wide) + [of_rows] * len(narrow)
    return list(per_device(here, axes, [of_rows if sums else of_tokens] * len(dtypes))(*wide, *narrow))


def _tile(v: int) -> int:
    """Tokens that a program goes over at a time."""
    return min(_TILE, power_of_two(v))


def _exponentials_kernel(draft_ref: Any, teacher_ref: Any, weight_ref: Any, *outs: Any, v: int) -> None:
    """References: logits [V] of the draft and of the teacher, the row's weight; `Exponentials` of both."""
    tile = _tile(v)

    def turn(j: jax.Array, carry: Any) -> Any:
        tokens = numbers(tile, j * tile)
        found = []
        for ref, (top, total) in zip((draft_ref, teacher_ref), carry, strict=True):
            x = load(ref, tokens, tokens < v, MASKED).astype(jnp.float32)
            less = jnp.exp2(-jnp.abs(x - top) * LOG2E)
            found.append((jnp.maximum(x, top), jnp.where(x > top, total * less + 1.0, total + less)))
        return tuple(found)

    nothing = jnp.full((tile,), MASKED, jnp.float32), jnp.zeros((tile,), jnp.float32)
    found = lax.fori_loop(jnp.int32(0), _turns(weight_ref, v, tile), turn, (nothing, nothing))
    for number, (top, total) in enumerate(found):
        most = jnp.max(top)
        outs[2 * number][0] = most
        outs[2 * number + 1][0] = jnp.sum(total * jnp.exp2((top - most) * LOG2E))


def _sums_kernel(*refs: Any, part: Pass, v: int) -> None:
    """References: rows [V] and numbers that the pass needs, the row's weight; its sums."""
    wide, rows, (weight, *outs) = _parted(refs, part)
    tile, most = _tile(v), [step.primitive.name == "reduce_max" for step in part.sums]
    numbers_of_row = [ref[0] for ref in rows]

    def turn(j: jax.Array, carry: Any) -> Any:
        tokens = numbers(tile, j * tile)
        found = part.of_tile(_tiles(wide, tokens, v), numbers_of_row, tokens)
        found = [jnp.where(tokens < v, x, -jnp.inf if top else 0.0) for x, top in zip(found, most, strict=True)]
        return [jnp.maximum(a, x) if top else a + x for a, x, top in zip(carry, found, most, strict=True)]

    start = [jnp.full((tile,), -jnp.inf if top else 0.0, jnp.float32) for top in most]
    found = lax.fori_loop(jnp.int32(0), _turns(weight, v, tile), turn, start)
    for ref, x, top in zip(outs, found, most, strict=True):
        ref[0] = jnp.max(x) if top else jnp.sum(x)


def _tokens_kernel(*refs: Any, part: Pass, v: int) -> None:
    """References: rows [V] and numbers that the pass needs; rows [V] of what it writes."""
    wide, rows, outs = _parted(refs, part)
    tokens = numbers(_tile(v), pl.program_id(1) * _tile(v))
    found = part.of_tile(_tiles(wide, tokens, v), [ref[0] for ref in rows], tokens)
    for ref, x in zip(outs, found, strict=True):
        store(ref, tokens, x, tokens < v)


def _parted(refs: Sequence[Any], part: Pass) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Those of the arrays that a pass reads, those of its numbers, and all others."""
    first, second = len(part.arrays), len(part.arrays) + len(part.rows)
    return refs[:first], refs[first:second], refs[second:]


def _tiles(refs: Sequence[Any], tokens: jax.Array, v: int) -> list[jax.Array]:
    """Logits of these tokens from rows [V]."""
    return [load(ref, tokens, tokens < v, MASKED) for ref in refs]


def _turns(weight_ref: Any, v: int, tile: int) -> jax.Array:
    """Tiles of a row that are gone over: none of one without a weight, whose sums do not matter."""
    return jnp.where(weight_ref[0] > 0, jnp.int32(pl.cdiv(v, tile)), jnp.int32(0))
