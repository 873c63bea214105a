"""`vocab_loss` in plain XLA: gradients are computed in the forward pass, chunk by chunk of rows.

The head is frozen and the weights are known up front, so the gradient of the summed loss is known, up to the factor
that arrives in the backward pass, while a chunk's logits are still there: no [T, V] array outlives its chunk and
nothing is computed twice. Per row this costs the products D, R (draft logits), D (teacher logits), D (hidden), R, R
(Markov) times 2 V.

Where a term looks at whole blocks, a chunk holds whole blocks.

A chunk without any supervised row, such as those of prompts and padding in a loss over all rows, is not computed where
one device has the whole batch.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from dspark_jax import sharding
from dspark_jax.ops.vocab_loss.result import Favourites, VocabLoss
from dspark_jax.ops.vocab_loss.term import Distributions, Exponentials, VocabTerm


class Settings(NamedTuple):
    """What is static, see `api.vocab_loss`."""

    terms: tuple[tuple[str, VocabTerm, float], ...]
    block: int
    softcap: float
    chunk: int
    rowwise: "Rowwise"
    candidates: int = 0
    join: bool = False


class Logits(NamedTuple):
    """Of the rows of a chunk, float32.

    Attributes:
      draft: [P, m, V].
      teacher: [P, m, V].
      capped: [P, m, V] what the head gives of `draft`, where a Markov bias comes after a cap; or None.
      label: [P, m] the draft's logit of the label.
    """

    draft: jax.Array
    teacher: jax.Array
    capped: jax.Array | None
    label: jax.Array


class RowResults(NamedTuple):
    """Of the rows of a chunk.

    Attributes:
      values: [P, m] by term.
      accept: [P, m].
      slope: [P, m, V] gradient of the loss in the draft's logits; 0 on rows of weight 0.
      bent: [P, m, V] the same in what the head gives before the cap.
    """

    values: dict[str, jax.Array]
    accept: jax.Array
    slope: jax.Array
    bent: jax.Array


Rowwise = Callable[[Logits, jax.Array, jax.Array, Settings, Any], RowResults]
"""(logits, labels [P, m], weights [P, m], settings, type of the slopes) -> what follows from them, row by row."""


class _Rows(NamedTuple):
    """Rows of one chunk, [P, m, ..], or of all chunks, [n, P, m, ..]; P is the number of batch shards."""

    hidden: jax.Array | None  # [.., D]
    prev: jax.Array | None  # [.., R]
    teacher: jax.Array  # [.., D]
    labels: jax.Array  # [..]
    weights: jax.Array  # [..]

    @property
    def dtype(self) -> Any:
        """Type of all products: that of the rows that the drafter gives."""
        return self.prev.dtype if self.hidden is None and self.prev is not None else cast(jax.Array, self.hidden).dtype


class _Matrices(NamedTuple):
    """What rows are multiplied with, in their type."""

    head: jax.Array  # [V, D]
    w2: jax.Array | None  # [V, R]
    joined: jax.Array | None  # [V, D + R] both of them, for the draft's logits


class _Gradients(NamedTuple):
    """Gradients of the loss of one chunk, or of all of it."""

    hidden: jax.Array | None
    prev: jax.Array | None
    w2: jax.Array | None


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
    by_row: Rowwise | None = None,
    join: bool = False,
) -> VocabLoss:
    """See `api.vocab_loss`.

    `by_row` is another way from logits to slopes than `rowwise`. `join` puts the head and W2 beside each other, where
    no cap comes between them: one product in the place of two, and no pass over [rows, V] to add their results, for a
    copy of the head.
    """
    named = tuple((name, *term) for name, term in terms.items())
    join = join and hidden is not None and markov_w2 is not None and not softcap
    settings = Settings(named, block, softcap, chunk, by_row or rowwise, candidates, join)
    head, teacher, weights = jax.lax.stop_gradient((head, teacher, weights))
    rows = _Rows(hidden, prev_embedding, teacher, labels, weights.astype(jnp.float32))
    out = cast(VocabLoss, _loss(rows, head, markov_w2, settings))
    return VocabLoss(out.loss, *jax.lax.stop_gradient((out.values, out.accept, out.favourites)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _loss(rows: _Rows, head: jax.Array, w2: jax.Array | None, settings: Settings) -> VocabLoss:
    return _run(rows, head, w2, settings, with_gradients=False)[0]


def _forward(rows: _Rows, head: jax.Array, w2: jax.Array | None, settings: Settings) -> tuple[VocabLoss, _Gradients]:
    out, gradients = _run(rows, head, w2, settings, with_gradients=True)
    assert gradients is not None
    return out, gradients


def _backward(settings: Settings, gradients: _Gradients, cotangent: VocabLoss) -> tuple:
    hidden, prev, w2 = jax.tree.map(lambda x: (cotangent.loss * x).astype(x.dtype), gradients)
    return _Rows._make((hidden, prev, None, None, None)), None, w2  # None: a zero gradient


_loss.defvjp(_forward, _backward)


def _run(
    rows: _Rows, head: jax.Array, w2: jax.Array | None, settings: Settings, *, with_gradients: bool
) -> tuple[VocabLoss, _Gradients | None]:
    """Scans over the chunks; rows are [B, T, ..]. Gradients are those of `loss`."""
    b, t, _ = rows.teacher.shape
    shards = _batch_shards(b)
    local = b // shards * t
    count = -(-local // settings.chunk)
    size = -(-local // count)  # the fewest chunks, all of one size
    if any(term.blockwise for _, term, _ in settings.terms):
        size = -(-size // settings.block) * settings.block
        count = -(-local // size)
    dtype = rows.dtype
    w2_type = None if w2 is None else w2.dtype
    # Gathered here once, where they are split over more than the vocabulary, and not in every chunk.
    head = sharding.constrain(head.astype(dtype), "vocab", None)
    w2 = None if w2 is None else sharding.constrain(w2.astype(dtype), "vocab", None)
    matrices = _Matrices(head, w2, jnp.concatenate([head, w2], axis=1) if settings.join and w2 is not None else None)

    def split(x: jax.Array) -> jax.Array:
        """[B, T, ..] -> [count, P, size, ..]; every shard's own rows are cut up, so that no row changes device."""
        x = x.reshape(shards, local, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, count * size - local)] + [(0, 0)] * (x.ndim - 2))  # weight 0
        return x.reshape(shards, count, size, *x.shape[2:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        """Inverse of `split`."""
        x = x.swapaxes(0, 1).reshape(shards, count * size, *x.shape[3:])[:, :local]
        return x.reshape(b, t, *x.shape[2:])

    compute = functools.partial(_chunk, matrices=matrices, settings=settings, with_gradients=with_gradients)

    def body(w2_sum: jax.Array | None, chunk_rows: _Rows) -> tuple[jax.Array | None, tuple]:
        if shards > 1 or count == 1:  # several devices would have to agree about every chunk
            metrics, gradients, slope = compute(chunk_rows)
        else:
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, chunk_rows))
            supervised = jnp.any(chunk_rows.weights > 0)
            metrics, gradients, slope = jax.lax.cond(supervised, compute, lambda _: nothing, chunk_rows)
        if slope is not None and w2_sum is not None and chunk_rows.prev is not None:
            # Not in the branch: what goes through one is copied.
            previous = jnp.where(chunk_rows.weights[..., None] > 0, chunk_rows.prev, 0).astype(slope.dtype)
            w2_sum = w2_sum + _product("pmr,pmv->prv", previous, slope)
        return w2_sum, (metrics, gradients)

    # One sum [P, R, V] per batch shard: a single one would be reduced over the devices after every chunk. It lies the
    # other way round from W2: the faster product on CPU.
    start = None
    if with_gradients and w2 is not None:
        start = sharding.constrain(jnp.zeros((shards, *w2.shape[::-1]), jnp.float32), "batch", None, "vocab")
    w2_sum, (metrics, gradients) = jax.lax.scan(body, start, jax.tree.map(split, rows))

    (values, accept, favourites), gradients = jax.tree.map(join, (metrics, gradients))
    out = VocabLoss(_total(values, rows.weights, settings), values, accept, favourites)
    if w2_sum is not None:
        gradients = gradients._replace(w2=jnp.sum(w2_sum, axis=0).T.astype(w2_type))
    return out, gradients


def _total(values: Mapping[str, jax.Array], weights: jax.Array, settings: Settings) -> jax.Array:
    """The loss of rows [B, T]. A row of weight 0 may be NaN, which a product would let through."""
    loss = jnp.zeros((), jnp.float32)
    for weighted in (True, False):
        parts = [c * values[name] for name, term, c in settings.terms if c and term.weighted == weighted]
        if parts:
            factor = weights if weighted else 1.0
            loss += jnp.sum(jnp.where(weights > 0, factor * functools.reduce(jnp.add, parts), 0.0))
    return loss


def _chunk(
    rows: _Rows, matrices: _Matrices, settings: Settings, *, with_gradients: bool
) -> tuple[tuple[dict[str, jax.Array], jax.Array, Favourites | None], _Gradients | None, jax.Array | None]:
    """Values by term, acceptance and favourites, all [P, m, ..], gradients of the rows of one chunk, and the slopes
    [P, m, V] of which those of W2 are made."""
    head, w2, joined = matrices
    if joined is not None and rows.hidden is not None and rows.prev is not None:
        both = jnp.concatenate([rows.hidden, rows.prev.astype(rows.dtype)], axis=-1)
        capped, draft, label = None, _logits(both, joined), _label_logit(both, joined, rows.labels)
    else:
        capped, draft, label = _draft_logits(rows, head, w2, settings.softcap)
    teacher = _capped(_logits(rows.teacher, head), settings.softcap)
    logits = Logits(draft, teacher, capped if settings.softcap and capped is not draft else None, label)
    favourites = Favourites.of(draft, teacher, settings.candidates)
    if not with_gradients:
        both = Distributions.of(draft, teacher, label, rows.labels, rows.weights, settings.block)
        return ({name: term.value(both) for name, term, _ in settings.terms}, both.accept, favourites), None, None
    dtype = rows.dtype
    values, accept, slope, bent = settings.rowwise(logits, rows.labels, rows.weights, settings, dtype)
    if joined is not None:
        hidden, prev = jnp.split(_product("pmv,vd->pmd", slope, joined), [head.shape[1]], axis=-1)
    else:
        hidden = None if rows.hidden is None else _product("pmv,vd->pmd", bent, head)
        prev = None if w2 is None else _product("pmv,vr->pmr", slope, w2)
    hidden = None if hidden is None else hidden.astype(dtype)
    prev = None if prev is None or rows.prev is None else prev.astype(rows.prev.dtype)
    return (values, accept, favourites), _Gradients(hidden, prev, None), slope if rows.prev is not None else None


def _draft_logits(
    rows: _Rows, head: jax.Array, w2: jax.Array | None, softcap: float
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """What the head gives [P, m, V], the draft's logits, and that of the label [P, m]."""
    capped = draft = label = None
    if rows.hidden is not None:
        capped = draft = _capped(_logits(rows.hidden, head), softcap)
        label = _capped(_label_logit(rows.hidden, head, rows.labels), softcap)
    if rows.prev is not None and w2 is not None:
        bias, bias_of_label = _logits(rows.prev, w2), _label_logit(rows.prev, w2, rows.labels)
        draft = bias if draft is None else draft + bias
        label = bias_of_label if label is None else label + bias_of_label
    assert draft is not None and label is not None
    return capped, draft, label


def rowwise(
    logits: Logits,
    labels: jax.Array,
    weights: jax.Array,
    settings: Settings,
    dtype: Any,
    known: tuple[Exponentials, Exponentials] | None = None,
) -> RowResults:
    """See `Rowwise`. It is a function of single rows but for `blockwise` terms: kernels call it on a few of them.

    `known` are the sums of exponentials of the draft's and the teacher's logits, where they have been added up.
    """
    both = Distributions.of(logits.draft, logits.teacher, logits.label, labels, weights, settings.block, known)
    values, accept = {name: term.value(both) for name, term, _ in settings.terms}, both.accept
    weight = weights[..., None]
    slopes = [
        term.slope(both, c * (weight if term.weighted else jnp.ones_like(weight))) for _, term, c in settings.terms if c
    ]
    slope = functools.reduce(jnp.add, slopes) if slopes else jnp.zeros_like(logits.draft)
    slope = bent = jnp.where(weight > 0, slope, 0.0)
    if cap := settings.softcap:  # it lies between hidden states and logits, the Markov bias joins after it
        capped = logits.draft if logits.capped is None else logits.capped
        bent = slope * jnp.where(weight > 0, 1.0 - jnp.square(capped / cap), 0.0)
    return RowResults(values, accept, slope.astype(dtype), bent.astype(dtype))


def _logits(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """Float32 logits [P, m, V], split over the devices that hold the vocabulary."""
    logits = _product("pmd,vd->pmv", rows.astype(matrix.dtype), matrix)
    return sharding.constrain(logits, "batch", None, "vocab")


def _capped(logits: jax.Array, softcap: float) -> jax.Array:
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def _label_logit(rows: jax.Array, matrix: jax.Array, labels: jax.Array) -> jax.Array:
    """Float32 logits [P, m] of the labels alone: cheaper than picking them out of [P, m, V]."""
    chosen = sharding.constrain(matrix[labels], "batch", None, None)
    return jnp.sum(rows.astype(jnp.float32) * chosen.astype(jnp.float32), axis=-1)


def _product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product with float32 accumulation and result."""
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def _batch_shards(batch: int) -> int:
    """How many devices a batch axis of this size is split over, under the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    entry = sharding.spec(("batch",), (batch,), mesh)[0]
    names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
    return math.prod(mesh.shape[name] for name in names)
