"""`speculative_verify` in plain jnp, which is its definition as well."""

import jax
import jax.numpy as jnp

from dspark_jax.ops.sampling import Sampling, distribution, draw, is_below, largest, token_probabilities
from dspark_jax.ops.speculative_verify.rule import acceptance_probabilities, accepted_prefix, residual


def speculative_verify(
    target_logits: jax.Array,
    draft_logits: jax.Array,
    first_rows: jax.Array | None,
    tokens: jax.Array,
    lengths: jax.Array,
    accept: jax.Array,
    following: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """See `api.speculative_verify`."""
    b, g, _ = draft_logits.shape

    def per_request(values: jax.Array) -> jax.Array:
        """[T, ..] -> [B, G + 1, ..]."""
        if first_rows is None:
            return values.reshape(b, g + 1, *values.shape[1:])
        return values[jnp.minimum(first_rows[:, None] + jnp.arange(g + 1), values.shape[0] - 1)]

    if sampling.greedy:
        best = per_request(largest(target_logits))
        accepted = accepted_prefix(tokens == best[:, :g], lengths)
        return accepted, jnp.take_along_axis(best, accepted[:, None], axis=1)[:, 0]
    target = per_request(target_logits)
    scored = [token_probabilities(logits, tokens, sampling) for logits in (draft_logits, target[:, :g])]
    accepted = accepted_prefix(is_below(accept, acceptance_probabilities(*scored)), lengths)
    return accepted, draw(next_distribution(target, draft_logits, accepted, lengths, sampling), following)


def next_distribution(
    target_logits: jax.Array, draft_logits: jax.Array, accepted: jax.Array, lengths: jax.Array, sampling: Sampling
) -> jax.Array:
    """Distribution [B, V] of the token that follows the accepted drafts.

    Args:
      target_logits: [B, G + 1, V]; row k is what the target expects after the anchor and k drafts.
      draft_logits: [B, G, V].
      accepted: [B] in 0..lengths.
      lengths: [B] drafts that were verified.
      sampling: of the B requests; it cuts both rows before the residual is taken.
    """

    def row(logits: jax.Array, index: jax.Array) -> jax.Array:
        return distribution(jnp.take_along_axis(logits, index[:, None, None], axis=1)[:, 0], sampling)

    expected = row(target_logits, accepted)
    block_size = draft_logits.shape[1]
    if block_size == 0:
        return expected
    corrected = residual(expected, row(draft_logits, jnp.minimum(accepted, block_size - 1)))
    return jnp.where((accepted < lengths)[:, None], corrected, expected)
