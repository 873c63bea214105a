"""Third step of a round: the target scores the drafts, accepts a prefix of them and draws the token that follows.

Draft x, drawn from p, is accepted with probability min(1, q(x) / p(x)); at the first rejection the next token comes
from the residual (q - p)+, and behind a fully accepted proposal from the target's last row. The output then has the
target's distribution q whatever the drafter (paper section 2.1; trap 24). Temperature, top-k, top-p and min-p are part
of both p and q, so a filtered token is neither drafted nor accepted nor drawn (trap 30).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine.sampling import Uniforms
from dspark_jax.engine.state import DecodeState
from dspark_jax.ops.cached_attention import Rows
from dspark_jax.ops.sampling import Sampling, distribution, draw, is_below, largest, token_probabilities
from dspark_jax.target.model import Target, TargetOutput

_FLOOR = 1e-8  # smallest residual mass that is divided by


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verdict:
    """What verification says about a proposal, before stop tokens are looked for.

    Attributes:
      accepted: [B] length of the accepted prefix.
      next_token: [B] the correction after a rejection, the bonus token after none.
    """

    accepted: jax.Array
    next_token: jax.Array


def acceptance_probabilities(draft: jax.Array, target: jax.Array) -> jax.Array:
    """min(1, q(x) / p(x)) of the drafted tokens, from their probabilities under drafter and target, of any shape.

    No floor but float32's own: of a large vocabulary much mass is in tokens of less than 1e-8 each.
    """
    return jnp.minimum(1.0, target / jnp.maximum(draft, jnp.finfo(jnp.float32).tiny))


def residual(target: jax.Array, draft: jax.Array) -> jax.Array:
    """Distribution [..., V] of the correction after a rejection: (q - p)+ normalised, or q where nothing is left."""
    surplus = jnp.maximum(target - draft, 0.0)
    mass = jnp.sum(surplus, axis=-1, keepdims=True)
    return jnp.where(mass <= _FLOOR, target, surplus / jnp.maximum(mass, _FLOOR))


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


def judge(
    target_logits: jax.Array, proposal: Proposal, lengths: jax.Array, uniforms: Uniforms, sampling: Sampling
) -> Verdict:
    """The acceptance rule on logits.

    Args:
      target_logits: [B, G + 1, V].
      proposal: G drafts per request.
      lengths: [B] how many of them count.
      uniforms: `accept` and `next` are used.
      sampling: the drafter's and the target's alike.
    """
    if sampling.greedy:
        return _judge_greedy(largest(target_logits), proposal, lengths)
    draft = token_probabilities(proposal.logits, proposal.tokens, sampling)
    target = token_probabilities(target_logits[:, : proposal.tokens.shape[1]], proposal.tokens, sampling)
    agree = is_below(uniforms.accept, acceptance_probabilities(draft, target))
    accepted = _prefix(agree, lengths)
    weights = next_distribution(target_logits, proposal.logits, accepted, lengths, sampling)
    return Verdict(accepted, draw(weights, uniforms.next))


def _judge_greedy(best: jax.Array, proposal: Proposal, lengths: jax.Array) -> Verdict:
    """The acceptance rule at temperature 0; `best` [B, G + 1] are the target's likeliest tokens."""
    accepted = _prefix(proposal.tokens == best[:, : proposal.tokens.shape[1]], lengths)
    return Verdict(accepted, jnp.take_along_axis(best, accepted[:, None], axis=1)[:, 0])


def _prefix(agree: jax.Array, lengths: jax.Array) -> jax.Array:
    """Length [B] of the agreeing prefix of agree [B, G], at most `lengths`."""
    agree &= jnp.arange(agree.shape[1]) < lengths[:, None]
    return jnp.sum(jnp.cumprod(agree.astype(jnp.int32), axis=1), axis=1)


def verify(
    target: Target,
    state: DecodeState,
    proposal: Proposal,
    lengths: jax.Array,
    uniforms: Uniforms,
    sampling: Sampling,
    *,
    taps: tuple[int, ...],
) -> tuple[Verdict, TargetOutput]:
    """Runs the target over the anchor and the drafts, and judges them.

    Returns:
      The verdict, and the target's output for the G + 1 rows: features for the drafter, and the cache with all of
      them written. Rows behind the accepted prefix are stale; the next round overwrites them.
    """
    tokens = jnp.concatenate([state.anchors[:, None], proposal.tokens], axis=1)  # [B, G + 1]
    positions = state.positions[:, None] + jnp.arange(tokens.shape[1])
    output = target.forward(tokens, positions, state.target_cache, taps=taps)
    logits: Any = target.unembed(output.last_hidden)
    return judge(logits, proposal, lengths, uniforms, sampling), output


def verify_flat(
    target: Target,
    state: DecodeState,
    proposal: Proposal,
    lengths: jax.Array,
    uniforms: Uniforms,
    sampling: Sampling,
    *,
    size: int,
    taps: tuple[int, ...],
) -> tuple[Verdict, TargetOutput]:
    """`verify` over the scheduled tokens alone: the target computes `size` rows, whatever B and G are.

    Args:
      target: as for `verify`, like what is not named here.
      state: before the round; finished requests have no rows.
      proposal: all drafts.
      lengths: [B]; those of the active requests and one more for each are at most `size` together.
      uniforms: of the round.
      sampling: of the requests.
      size: T, static.
      taps: layers whose outputs the drafter wants.

    Returns:
      What `verify` returns. Rows of `features` behind a request's scheduled tokens are those of other requests, and
      the verdicts of finished requests mean nothing.
    """
    tokens = jnp.concatenate([state.anchors[:, None], proposal.tokens], axis=1)  # [B, G + 1]
    counts = jnp.where(state.finished, 0, lengths + 1)
    rows = Rows.of(counts, state.positions, size=size, most=tokens.shape[1])
    flat = rows.flatten(tokens)[None]  # [1, T]
    output = target.forward(flat, rows.at[None], state.target_cache, taps=taps, rows=rows)
    logits = target.unembed(output.last_hidden[0])  # [T, V]
    padded = dataclasses.replace(
        output, features=rows.pad(output.features[0]), last_hidden=rows.pad(output.last_hidden[0])
    )
    if sampling.greedy:
        return _judge_greedy(rows.pad(largest(logits)), proposal, lengths), padded
    return judge(rows.pad(logits), proposal, lengths, uniforms, sampling), padded
