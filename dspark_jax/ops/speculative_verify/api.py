"""Contract and dispatch of `speculative_verify`."""

import jax

from dspark_jax.ops.dispatch import Operation
from dspark_jax.ops.sampling import Sampling

OPERATION = Operation(
    "speculative_verify", {"cpu": ["xla"], "gpu": ["pallas_gpu", "xla"], "tpu": ["pallas_tpu", "xla"]}
)


def speculative_verify(
    target_logits: jax.Array,
    draft_logits: jax.Array,
    first_rows: jax.Array | None,
    tokens: jax.Array,
    lengths: jax.Array,
    accept: jax.Array,
    following: jax.Array,
    sampling: Sampling,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Accepts a prefix of each request's drafts and draws the token after it (`rule`).

    Row first_rows[b] + k of the target's logits is what it expects after the anchor of request b and k drafts. Rows
    from lengths[b] + 1 on may be those of other requests.

    Args:
      target_logits: [T, V] float32.
      draft_logits: [B, G, V] float32, which the drafts were drawn from; G may be 0, which is plain decoding.
      first_rows: [B] int32, ascending; None is b * (G + 1): every request has all its rows.
      tokens: [B, G] the drafts.
      lengths: [B] how many of them count.
      accept: [B, G, 2] int32 uniforms (`ops.sampling.words`), one per draft.
      following: [B, 2] int32, draws the next token.
      sampling: of the requests; temperature and filters cut both distributions.
      implementation: None (the best one here), 'xla' (the definition), 'pallas_gpu' or 'pallas_tpu' (no filters).

    Returns:
      Accepted drafts [B] int32 in 0..lengths, and the next token [B] int32: the correction after a rejection, the bonus
      token after none.

    Raises:
      ValueError: shapes do not fit together, or the implementation is unknown.
    """
    b, g, v = draft_logits.shape
    rows = b * (g + 1) if first_rows is None else target_logits.shape[0]
    expected = {
        "target_logits": (target_logits, (rows, v)),
        "first_rows": (lengths if first_rows is None else first_rows, (b,)),
        "tokens": (tokens, (b, g)),
        "lengths": (lengths, (b,)),
        "accept": (accept, (b, g, 2)),
        "following": (following, (b, 2)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"speculative_verify: {name} has shape {array.shape}, it must be {shape}")
    arrays = (target_logits, draft_logits, first_rows, tokens, lengths, accept, following, sampling)
    return OPERATION(implementation, *arrays)
