"""The candidate selector's error (DFlash 2): which of the candidates does the target find likeliest?"""

import jax
import jax.numpy as jnp

from dspark_jax.drafter.heads.selector import SelectorHead
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.metrics import Ratio
from dspark_jax.ops.vocab_loss import Favourites
from dspark_jax.target.interface import EmbeddingAndHead
from dspark_jax.training.losses.base import Blocks, BlockTerm


class Selector(BlockTerm):
    """Cross-entropy over the candidates with the target's likeliest token, after the true token before it.

    Where the target's token is no candidate, it takes the place of the least likely one: in the loss only, so that
    every position has a label. The gradient reaches the base logits of the candidates as well.
    """

    def applies(self, drafter: DrafterModule) -> bool:
        """Where there is a selector."""
        return isinstance(drafter.markov, SelectorHead)

    def __call__(self, blocks: Blocks) -> tuple[jax.Array, dict[str, Ratio]]:
        """See `BlockTerm`.

        The metrics are the share of supervised positions whose token is a candidate (`candidate_recall`), and the share
        of these at which the selector's likeliest candidate is it (`selector_accuracy`).
        """
        head, favourites, mask = blocks.drafter.markov, blocks.favourites, blocks.outputs.mask
        assert isinstance(head, SelectorHead) and favourites is not None and blocks.latent is not None
        ids, place, found = _with_target(favourites)
        hidden = jnp.where(mask[..., None], blocks.outputs.hidden, 0)
        latent = jnp.where(mask[..., None], blocks.latent, 0)
        scores = _scores(blocks.target, head.w2[...], hidden, latent, ids)
        label = jnp.take_along_axis(scores, place[..., None], axis=-1)[..., 0]
        right = (jnp.argmax(scores, axis=-1) == place) & found & mask
        inside = jnp.sum(found & mask, dtype=jnp.float32)
        metrics = {
            "candidate_recall": Ratio(inside, jnp.sum(mask, dtype=jnp.float32)),
            "selector_accuracy": Ratio(jnp.sum(right, dtype=jnp.float32), inside),
        }
        return jax.nn.logsumexp(scores, axis=-1) - label, metrics


def _with_target(favourites: Favourites) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Candidates [.., K] with the target's token among them, its place [..], and whether it was there before [..]."""
    same = favourites.draft == favourites.target[..., None]
    found, last = jnp.any(same, axis=-1), favourites.draft.shape[-1] - 1
    place = jnp.where(found, jnp.argmax(same, axis=-1), last)
    missing = ~found[..., None] & (jnp.arange(last + 1) == last)
    return jnp.where(missing, favourites.target[..., None], favourites.draft), place, found


def _scores(target: EmbeddingAndHead, w2: jax.Array, hidden: jax.Array, latent: jax.Array, ids: jax.Array) -> jax.Array:
    """Logits [.., K] of candidates ids [.., K] from hidden [.., D] and latent [.., R], one candidate after another.

    So no more than one row of the LM head per position is in memory; the backward pass fetches them again.
    """
    lm_head = jax.lax.stop_gradient(target.head)

    def dot(rows: jax.Array, matrix: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.sum(rows.astype(jnp.float32) * matrix[tokens].astype(jnp.float32), axis=-1)

    @jax.checkpoint
    def score(tokens: jax.Array) -> jax.Array:
        unary = dot(hidden, lm_head, tokens)
        if target.softcap:
            unary = target.softcap * jnp.tanh(unary / target.softcap)
        return unary + dot(latent, w2, tokens)

    return jnp.moveaxis(jax.lax.map(score, jnp.moveaxis(ids, -1, 0)), 0, -1)
