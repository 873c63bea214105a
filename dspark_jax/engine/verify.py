"""Third step of a round: the target scores the drafts, accepts a prefix of them and draws the token that follows.

The rule is in `ops.speculative_verify`: after the accepted prefix comes a token of the residual (q - p)+, and after a
fully accepted proposal one of the target's last row. The output then has the
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
from dspark_jax.ops.sampling import Sampling
from dspark_jax.ops.speculative_verify import speculative_verify
from dspark_jax.target.model import Target, TargetOutput


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


def judge(
    target_logits: jax.Array, proposal: Proposal, lengths: jax.Array, uniforms: Uniforms, sampling: Sampling
) -> Verdict:
    """The acceptance rule on logits of all rows of all requests.

    Args:
      target_logits: [B, G + 1, V].
      proposal: G drafts per request.
      lengths: [B] how many of them count.
      uniforms: `accept` and `next` are used.
      sampling: the drafter's and the target's alike.
    """
    flat = target_logits.reshape(-1, target_logits.shape[-1])
    return _judge(flat, None, proposal, lengths, uniforms, sampling)


def _judge(
    target_logits: jax.Array,
    first_rows: jax.Array | None,
    proposal: Proposal,
    lengths: jax.Array,
    uniforms: Uniforms,
    sampling: Sampling,
) -> Verdict:
    """The same on flat rows [T, V]."""
    drafts = (proposal.logits, first_rows, proposal.tokens, lengths)
    return Verdict(*speculative_verify(target_logits, *drafts, uniforms.accept, uniforms.next, sampling))


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
      them written. Rows after the accepted prefix are stale; the next round overwrites them.
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
      What `verify` returns. Rows of `features` after a request's scheduled tokens are those of other requests, and
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
    return _judge(logits, rows.offsets, proposal, lengths, uniforms, sampling), padded
