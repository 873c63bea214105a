"""Contract and dispatch of `vocab_loss`."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dspark_jax.ops.dispatch import Operation
from dspark_jax.ops.vocab_loss.result import VocabLoss
from dspark_jax.ops.vocab_loss.term import VocabTerm

__all__ = ["VocabLoss", "vocab_loss"]

OPERATION = Operation(
    "vocab_loss", {"cpu": ["xla"], "gpu": ["pallas_gpu", "xla"], "tpu": ["pallas_tpu", "xla"]}, others=["reference"]
)


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
    implementation: str | None = None,
) -> VocabLoss:
    """Terms of the loss that need a row's whole distribution over the vocabulary (paper 3.3).

    Draft logits are hidden @ head.T + prev_embedding @ markov_w2.T, teacher logits teacher @ head.T, what the head
    gives being soft-capped where the target does that (trap 22); both softmaxes are float32 at
    temperature 1. Only `loss` is differentiable, and only in hidden, prev_embedding and markov_w2: the head and the
    teacher are frozen.

    Args:
      hidden: [B, T, D] rows of the drafter; their type is the type of all products (float32 accumulation). None: the
        draft logits are prev_embedding @ markov_w2.T alone, as of a drafter whose own LM head is markov_w2.
      prev_embedding: [B, T, R] Markov embedding of the token before each label, or None without a Markov head.
      teacher: [B, T, D] rows of the target after its final norm.
      head: [V, D] LM head of the target.
      markov_w2: [V, R], None exactly when prev_embedding is.
      labels: [B, T] integers in 0..V-1.
      weights: [B, T] float32, 0 or above. A row of weight 0 adds nothing to loss and gradients, even if it is NaN; its
        values and acceptance are undefined.
      terms: name -> term and its coefficient, 0 or above. With a coefficient of 0 only values are computed. The loss is
        the sum over rows and terms of coefficient * value, times the row's weight where the term is `weighted`.
      block: G; rows form blocks of G consecutive ones. Only `blockwise` terms ask for it.
      softcap: the head's logits are softcap * tanh(logits / softcap), the Markov bias is not capped; 0 = no cap.
      chunk: rows per device whose [rows, V] logits are in memory at once; with a `blockwise` term rounded up to whole
        blocks.
      candidates: K, at most V, of the likeliest draft tokens to name beside the target's likeliest; 0: none.
      implementation: None (the best one here), 'xla' (bounded memory), 'pallas_tpu' (the same, with a kernel; not every
        term) or 'reference' (the definition).

    Returns:
      `VocabLoss`.

    Raises:
      ValueError: shapes do not fit together, T is no multiple of the block, chunk is not positive, or the
        implementation is unknown; or there are more candidates than tokens; or without hidden there is a soft-cap.
    """
    b, t, d = (teacher if hidden is None else hidden).shape
    v = head.shape[0]
    if (prev_embedding is None) != (markov_w2 is None):
        raise ValueError("vocab_loss: prev_embedding and markov_w2 go together; give both or neither")
    if hidden is None and (prev_embedding is None or softcap):
        raise ValueError("vocab_loss: without hidden, prev_embedding gives the logits, and they are not capped")
    expected = {
        "teacher": (teacher, (b, t, d)),
        "head": (head, (v, d)),
        "labels": (labels, (b, t)),
        "weights": (weights, (b, t)),
    }
    if prev_embedding is not None and markov_w2 is not None:
        r = markov_w2.shape[-1]
        expected["prev_embedding"] = (prev_embedding, (b, t, r))
        expected["markov_w2"] = (markov_w2, (v, r))
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"vocab_loss: {name} is {array.shape}, with rows [{b}, {t}, {d}] it must be {shape}")
    if chunk <= 0 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"vocab_loss: chunk {chunk} must be positive and labels {labels.dtype} integers")
    if not 0 <= candidates <= v:
        raise ValueError(f"vocab_loss: {candidates} candidates of a vocabulary of {v}")
    if block < 1 or t % block:
        raise ValueError(f"vocab_loss: {t} rows are no multiple of block {block}")
    arrays = jax.tree.map(jnp.asarray, (hidden, prev_embedding, teacher, head, markov_w2, labels, weights))
    settings = {"terms": terms, "block": block, "softcap": softcap, "chunk": chunk, "candidates": candidates}
    return OPERATION(implementation, *arrays, **settings)
