"""The definition of `vocab_loss`: all logits at once, gradients by automatic differentiation of the terms' values."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dspark_jax.ops.vocab_loss.result import Favourites, VocabLoss
from dspark_jax.ops.vocab_loss.term import Distributions, VocabTerm


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
    chunk: int = 0,
    candidates: int = 0,
) -> VocabLoss:
    """See `api.vocab_loss`; `chunk` is ignored, and rows of weight 0 must be finite."""
    del chunk
    given = prev_embedding if hidden is None else hidden
    assert given is not None
    dtype = given.dtype
    head, teacher, weights = jax.lax.stop_gradient((head, teacher, weights))

    def logits(rows: jax.Array, matrix: jax.Array) -> jax.Array:
        rows, matrix = rows.astype(dtype), matrix.astype(dtype)
        return jnp.einsum("btd,vd->btv", rows, matrix, preferred_element_type=jnp.float32)

    def base(rows: jax.Array) -> jax.Array:
        return softcap * jnp.tanh(logits(rows, head) / softcap) if softcap else logits(rows, head)

    draft = jnp.zeros((*labels.shape, head.shape[0]), jnp.float32) if hidden is None else base(hidden)
    if prev_embedding is not None and markov_w2 is not None:
        draft += logits(prev_embedding, markov_w2)
    label_logit = jnp.take_along_axis(draft, labels[..., None], axis=-1)[..., 0]
    teacher_logits = base(teacher)
    rows = Distributions.of(draft, teacher_logits, label_logit, labels, weights, block)
    values = {name: term.value(rows) for name, (term, _) in terms.items()}
    loss = jnp.zeros((), jnp.float32)
    for name, (term, coefficient) in terms.items():
        loss += coefficient * jnp.sum(jnp.where(weights > 0, values[name] * (weights if term.weighted else 1.0), 0.0))
    favourites = Favourites.of(draft, teacher_logits, candidates)
    return VocabLoss(loss, *jax.lax.stop_gradient((values, rows.accept, favourites)))
