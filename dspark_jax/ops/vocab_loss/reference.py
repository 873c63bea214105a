"""The definition of `vocab_loss`: all logits at once, gradients by automatic differentiation."""

import jax
import jax.numpy as jnp

from dspark_jax.ops.vocab_loss.result import VocabLoss


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
    chunk: int = 0,
) -> VocabLoss:
    """See `api.vocab_loss`; `chunk` is ignored, and rows of weight 0 must be finite."""
    del chunk
    head, teacher, weights = jax.lax.stop_gradient((head, teacher, weights))

    def logits(rows: jax.Array, matrix: jax.Array) -> jax.Array:
        rows, matrix = rows.astype(hidden.dtype), matrix.astype(hidden.dtype)
        return jnp.einsum("btd,vd->btv", rows, matrix, preferred_element_type=jnp.float32)

    def base(rows: jax.Array) -> jax.Array:
        return softcap * jnp.tanh(logits(rows, head) / softcap) if softcap else logits(rows, head)

    draft = base(hidden)
    if prev_embedding is not None and markov_w2 is not None:
        draft += logits(prev_embedding, markov_w2)
    log_draft = jax.nn.log_softmax(draft, axis=-1)
    ce_rows = -jnp.take_along_axis(log_draft, labels[..., None], axis=-1)[..., 0]
    expected = jax.nn.softmax(base(teacher), axis=-1)
    l1_rows = jnp.sum(jnp.abs(jnp.exp(log_draft) - expected), axis=-1)
    soft_rows = -jnp.sum(expected * log_draft, axis=-1)
    loss = jnp.sum(weights * (ce * ce_rows + l1 * l1_rows + soft_ce * soft_rows))
    supervised = (weights > 0).reshape(weights.shape[0], -1, block)
    survival = jnp.cumprod(jnp.where(supervised, 1.0 - 0.5 * l1_rows.reshape(supervised.shape), 0.0), axis=-1)
    loss += length * jnp.sum(supervised - survival)
    accept = jnp.clip(1.0 - 0.5 * l1_rows, 0.0, 1.0)
    return VocabLoss(loss, *jax.lax.stop_gradient((ce_rows, l1_rows, accept, soft_rows if soft_ce else None)))
