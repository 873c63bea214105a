"""`vocab_loss` in plain XLA: gradients are computed in the forward pass, chunk by chunk of rows.

The head is frozen and the weights are known up front, so the gradient of the summed loss is known, up to the factor
that arrives in the backward pass, while a chunk's logits are still there: no [T, V] array outlives its chunk and
nothing is computed twice. Per row this costs the products D, R (draft logits), D (teacher logits), D (hidden), R, R
(Markov) times 2 V.

The weights that the expected accepted length gives to the L1 distances of a block follow from those very distances, so
a chunk then holds whole blocks.

A chunk without any supervised row, such as those of prompts and padding in a loss over all rows, is not computed where
one device has the whole batch.
"""

import functools
import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from dspark_jax import sharding
from dspark_jax.ops.vocab_loss.result import VocabLoss


class _Terms(NamedTuple):
    """Coefficients of the loss, see `api.vocab_loss`."""

    ce: float
    l1: float
    soft_ce: float
    length: float
    block: int
    softcap: float


class _Rows(NamedTuple):
    """Rows of one chunk, [P, m, ..], or of all chunks, [n, P, m, ..]; P is the number of batch shards."""

    hidden: jax.Array  # [.., D]
    prev: jax.Array | None  # [.., R]
    teacher: jax.Array  # [.., D]
    labels: jax.Array  # [..]
    weights: jax.Array  # [..]


class _Gradients(NamedTuple):
    """Gradients of the loss of one chunk, or of all of it."""

    hidden: jax.Array
    prev: jax.Array | None
    w2: jax.Array | None  # [P, R, V] while it is summed up, the other way round from W2: the faster product on CPU


def vocab_loss(
    hidden: jax.Array,
    prev_embedding: jax.Array | None,
    teacher: jax.Array,
    head: jax.Array,
    markov_w2: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    *,
    ce: float,
    l1: float,
    soft_ce: float = 0.0,
    length: float = 0.0,
    block: int = 1,
    softcap: float = 0.0,
    chunk: int,
) -> VocabLoss:
    """See `api.vocab_loss`."""
    head, teacher, weights = jax.lax.stop_gradient((head, teacher, weights))
    rows = _Rows(hidden, prev_embedding, teacher, labels, weights.astype(jnp.float32))
    terms = _Terms(ce, l1, soft_ce, length, block, softcap)
    out = cast(VocabLoss, _loss(rows, head, markov_w2, terms, chunk))
    return VocabLoss(out.loss, *jax.lax.stop_gradient((out.ce, out.l1, out.accept, out.soft_ce)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _loss(rows: _Rows, head: jax.Array, w2: jax.Array | None, terms: _Terms, chunk: int) -> VocabLoss:
    return _run(rows, head, w2, terms, chunk, with_gradients=False)[0]


def _forward(
    rows: _Rows, head: jax.Array, w2: jax.Array | None, terms: _Terms, chunk: int
) -> tuple[VocabLoss, _Gradients]:
    out, gradients = _run(rows, head, w2, terms, chunk, with_gradients=True)
    assert gradients is not None
    return out, gradients


def _backward(terms: _Terms, chunk: int, gradients: _Gradients, cotangent: VocabLoss) -> tuple:
    hidden, prev, w2 = jax.tree.map(lambda x: (cotangent.loss * x).astype(x.dtype), gradients)
    return _Rows._make((hidden, prev, None, None, None)), None, w2  # None: a zero gradient


_loss.defvjp(_forward, _backward)


def _run(
    rows: _Rows, head: jax.Array, w2: jax.Array | None, terms: _Terms, chunk: int, *, with_gradients: bool
) -> tuple[VocabLoss, _Gradients | None]:
    """Scans over the chunks; rows are [B, T, ..]. Gradients are those of `loss`."""
    b, t, _ = rows.hidden.shape
    shards = _batch_shards(b)
    local = b // shards * t
    count = -(-local // chunk)
    size = -(-local // count)  # the fewest chunks, all of one size
    if terms.length:
        size = -(-size // terms.block) * terms.block
        count = -(-local // size)
    dtype = rows.hidden.dtype
    w2_type = None if w2 is None else w2.dtype
    # Gathered here once, where they are split over more than the vocabulary, and not in every chunk.
    head = sharding.constrain(head.astype(dtype), "vocab", None)
    w2 = None if w2 is None else sharding.constrain(w2.astype(dtype), "vocab", None)

    def split(x: jax.Array) -> jax.Array:
        """[B, T, ..] -> [count, P, size, ..]; every shard's own rows are cut up, so that no row changes device."""
        x = x.reshape(shards, local, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, count * size - local)] + [(0, 0)] * (x.ndim - 2))  # weight 0
        return x.reshape(shards, count, size, *x.shape[2:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        """Inverse of `split`."""
        x = x.swapaxes(0, 1).reshape(shards, count * size, *x.shape[3:])[:, :local]
        return x.reshape(b, t, *x.shape[2:])

    def compute(w2_sum: jax.Array | None, chunk_rows: _Rows) -> tuple[jax.Array | None, tuple]:
        metrics, gradients = _chunk(chunk_rows, head, w2, terms, with_gradients=with_gradients)
        if gradients is not None and gradients.w2 is not None and w2_sum is not None:
            w2_sum = w2_sum + gradients.w2
            gradients = gradients._replace(w2=None)
        return w2_sum, (metrics, gradients)

    def body(w2_sum: jax.Array | None, chunk_rows: _Rows) -> tuple[jax.Array | None, tuple]:
        if shards > 1 or count == 1:  # several devices would have to agree about every chunk
            return compute(w2_sum, chunk_rows)
        _, outputs = jax.eval_shape(compute, w2_sum, chunk_rows)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
        supervised = jnp.any(chunk_rows.weights > 0)
        return jax.lax.cond(supervised, compute, lambda w2_sum, _: (w2_sum, nothing), w2_sum, chunk_rows)

    # One sum [P, R, V] per batch shard: a single one would be reduced over the devices after every chunk.
    start = None
    if with_gradients and w2 is not None:
        start = sharding.constrain(jnp.zeros((shards, *w2.shape[::-1]), jnp.float32), "batch", None, "vocab")
    w2_sum, (metrics, gradients) = jax.lax.scan(body, start, jax.tree.map(split, rows))

    metrics, gradients = jax.tree.map(join, (metrics, gradients))
    ce_rows, l1_rows, soft_rows = metrics
    summed = terms.ce * ce_rows + terms.l1 * l1_rows
    if soft_rows is not None:
        summed += terms.soft_ce * soft_rows
    # A row of weight 0 may be NaN, which the product would let through.
    loss = jnp.sum(jnp.where(rows.weights > 0, rows.weights * summed, 0.0))
    if terms.length:
        accept = _block_accept(l1_rows, rows.weights, terms.block)
        possible = jnp.sum(rows.weights > 0, dtype=jnp.float32)
        loss += terms.length * (possible - jnp.sum(jnp.cumprod(accept, axis=-1)))
    out = VocabLoss(loss, ce_rows, l1_rows, jnp.clip(1.0 - 0.5 * l1_rows, 0.0, 1.0), soft_rows)
    if w2_sum is not None:
        gradients = gradients._replace(w2=jnp.sum(w2_sum, axis=0).T.astype(w2_type))
    return out, gradients


def _chunk(
    rows: _Rows, head: jax.Array, w2: jax.Array | None, terms: _Terms, *, with_gradients: bool
) -> tuple[tuple[jax.Array, jax.Array, jax.Array | None], _Gradients | None]:
    """(ce, l1, soft ce or None, all [P, m]) and gradients of the rows of one chunk."""
    base = draft = _capped(_logits(rows.hidden, head), terms.softcap)
    label_logit = _capped(_label_logit(rows.hidden, head, rows.labels), terms.softcap)
    if rows.prev is not None and w2 is not None:
        draft += _logits(rows.prev, w2)
        label_logit += _label_logit(rows.prev, w2, rows.labels)
    # p = draft / draft_sum is never stored: passes over [rows, V] are what this costs besides the products.
    draft_logits = draft
    draft, draft_top, draft_sum = _exponentials(draft)
    teacher, _, teacher_sum = _exponentials(_capped(_logits(rows.teacher, head), terms.softcap))
    draft_scale, teacher_scale = 1.0 / draft_sum, 1.0 / teacher_sum
    difference = draft * draft_scale - teacher * teacher_scale
    sign = jnp.sign(difference)  # 0 where both are equal, which then pull nowhere
    l1_rows = jnp.sum(jnp.abs(difference), axis=-1)
    ce_rows = (draft_top + jnp.log(draft_sum))[..., 0] - label_logit
    soft_rows = None
    if terms.soft_ce:
        mean_logit = jnp.sum(teacher * (draft_logits - draft_top), axis=-1) * teacher_scale[..., 0]
        soft_rows = jnp.log(draft_sum)[..., 0] - mean_logit
    if not with_gradients:
        return (ce_rows, l1_rows, soft_rows), None

    # d CE / d logit = p - [v = label]; d soft CE / d logit = p - q; d L1 / d logit = p (sign - sum_u p_u sign_u).
    mean_sign = jnp.sum(draft * sign, axis=-1, keepdims=True) * draft_scale
    weights = rows.weights[..., None]
    pull = weights * terms.l1
    if terms.length:
        pull += terms.length * _length_slope(_block_accept(l1_rows, rows.weights, terms.block), rows.weights)[..., None]
    scaled = weights * draft_scale
    label_slope = jnp.where(jnp.arange(head.shape[0]) == rows.labels[..., None], weights * terms.ce, 0.0)
    pulled = pull * draft_scale
    slope = draft * (scaled * terms.ce - pulled * mean_sign + pulled * sign) - label_slope
    if terms.soft_ce:
        slope += weights * terms.soft_ce * difference
    slope = jnp.where(weights > 0, slope, 0.0)
    # The cap lies between hidden states and logits, the Markov bias joins after it.
    bent = slope if not terms.softcap else slope * jnp.where(weights > 0, 1.0 - jnp.square(base / terms.softcap), 0.0)
    slope, bent = slope.astype(rows.hidden.dtype), bent.astype(rows.hidden.dtype)

    gradients = _Gradients(_product("pmv,vd->pmd", bent, head).astype(rows.hidden.dtype), None, None)
    if rows.prev is not None and w2 is not None:
        prev = jnp.where(weights > 0, rows.prev, 0).astype(slope.dtype)
        gradients = gradients._replace(
            prev=_product("pmv,vr->pmr", slope, w2).astype(rows.prev.dtype),
            w2=_product("pmr,pmv->prv", prev, slope),
        )
    return (ce_rows, l1_rows, soft_rows), gradients


def _block_accept(l1_rows: jax.Array, weights: jax.Array, block: int) -> jax.Array:
    """Acceptance [.., m/G, G] of rows [.., m], 0 where the weight is."""
    accept = jnp.where(weights > 0, jnp.clip(1.0 - 0.5 * l1_rows, 0.0, 1.0), 0.0)
    return accept.reshape(*accept.shape[:-1], -1, block)


def _length_slope(accept: jax.Array, weights: jax.Array) -> jax.Array:
    """d(minus the expected length) / d L1 of every row: accept [.., n, G] -> [.., n G], 0 where the weight is.

    d(sum_k a_1 .. a_k) / d a_j = a_1 .. a_{j-1} (1 + a_{j+1} + a_{j+1} a_{j+2} + ...), and d a / d L1 = -1/2; without
    divisions, as an acceptance may be 0.
    """
    size = accept.shape[-1]
    before, after = [jnp.ones_like(accept[..., 0])], [jnp.ones_like(accept[..., 0])]
    for j in range(size - 1):
        before.append(before[-1] * accept[..., j])
        after.append(1.0 + accept[..., size - 1 - j] * after[-1])
    slope = 0.5 * jnp.stack(before, axis=-1) * jnp.stack(after[::-1], axis=-1)
    return jnp.where(weights > 0, slope.reshape(weights.shape), 0.0)


def _logits(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """Float32 logits [P, m, V], split over the devices that hold the vocabulary."""
    logits = _product("pmd,vd->pmv", rows.astype(matrix.dtype), matrix)
    return sharding.constrain(logits, "batch", None, "vocab")


def _capped(logits: jax.Array, softcap: float) -> jax.Array:
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def _exponentials(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """exp(logits - top) [.., V], top [.., 1] and the sum of the exponentials [.., 1]."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    return exponentials, top, jnp.sum(exponentials, axis=-1, keepdims=True)


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
