"""The drafter's loss (paper 3.3): the terms of `training.losses`, as numerators over one denominator."""

import dataclasses

import jax
import jax.numpy as jnp

from dspark_jax.config import LossConfig
from dspark_jax.drafter.interface import BlockOutputs, DrafterModule
from dspark_jax.metrics import Ratio
from dspark_jax.ops.vocab_loss import vocab_loss
from dspark_jax.target.interface import EmbeddingAndHead
from dspark_jax.training.losses import Blocks, block_terms, vocab_terms
from dspark_jax.training.vocabulary import inside_vocabulary

EPSILON = 1e-6
"""Added to the denominator, as the reference does; without any supervised token the loss is 0."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over a batch; sums of several batches add up to those of all of them (gradients of `total` too).

    Attributes:
      total: scalar, weighted sum of all terms, differentiable, not normalised.
      denominator: scalar, sum of the weights, or number of blocks (`loss.per_row`), shared by all terms.
      metrics: `Ratio`s by name, not differentiable; see `drafter_loss`.
    """

    total: jax.Array
    denominator: jax.Array
    metrics: dict[str, Ratio]

    def normalised(self) -> jax.Array:
        """The loss: total / (denominator + 1e-6)."""
        return self.total / (self.denominator + EPSILON)


def drafter_loss(
    drafter: DrafterModule,
    target: EmbeddingAndHead,
    outputs: BlockOutputs,
    last_hidden: jax.Array,
    config: LossConfig,
    *,
    vocab_chunk: int,
) -> LossSums:
    """Loss of a batch of draft blocks.

    Position k = 0..G-1 of a block weighs exp(-k / decay) where it is supervised.

    Args:
      drafter: its heads are used.
      target: its LM head is used; frozen.
      outputs: A blocks of G positions per sequence.
      last_hidden: [B, S, D] of the target, after its final norm; frozen.
      config: the terms' coefficients, and decay.
      vocab_chunk: rows whose [rows, V] logits are in memory at once, per device (see `ops.vocab_loss`).

    Returns:
      `LossSums` with the metrics
        the mean of every term that has a coefficient or is always reported (ce, l1, confidence): weighted, or that over
        supervised positions where the term is not `weighted`,
        tv: l1 / 2,
        accept@k: plain mean over supervised positions k = 1..G of 1 - tv, given that all before k were accepted; of a
        head that chooses among candidates it is the acceptance without it, as the terms over the vocabulary are,
        tau_expected: 1 + sum over k of the product of accept@1..k, mean over blocks whose first position is supervised,
        supervised: share of the block positions that are supervised,
        vocabulary_mass: the target's probability of the tokens that a drafter with a reduced vocabulary can draft, mean
        over supervised positions. There everything else is about both distributions within this vocabulary, positions
        at which the target's likeliest token is outside it are not supervised (the rule of EAGLE's authors and of
        SpecForge), and there is no ce,
        and what terms report besides.
    """
    b, a, g, d = outputs.hidden.shape
    vocabulary, mask = drafter.vocabulary, outputs.mask
    inside = None
    if vocabulary is not None:
        inside = inside_vocabulary(vocabulary, target, last_hidden, vocab_chunk)
        mask = mask & _at_rows(inside.supervised, outputs.teacher_rows)
        outputs = dataclasses.replace(outputs, mask=mask)
    weights = jnp.exp(-jnp.arange(g, dtype=jnp.float32) / config.decay) * mask
    weight_sum = jnp.sum(weights)
    denominator = jnp.asarray(b * a, jnp.float32) if config.per_row else weight_sum
    head, previous, latent = drafter.markov, None, None
    if head is not None:
        previous = head.embed(outputs.prev_tokens)
        latent = head.latent(outputs.hidden, previous)
    rows = outputs.teacher_rows.reshape(b, a * g)
    teacher = _at_rows(jax.lax.stop_gradient(last_hidden), rows)

    coefficients = config.coefficients()
    terms = vocab_terms(coefficients)
    if vocabulary is not None:
        del terms["ce"]
    states, latent_rows, lm_head, table, labels = _operands(drafter, target, outputs, latent)
    out = vocab_loss(
        states,
        latent_rows,
        teacher,
        lm_head,
        table,
        labels,
        weights.reshape(b, a * g),
        terms=terms,
        block=g,
        softcap=target.softcap,
        chunk=vocab_chunk,
        candidates=0 if head is None else head.candidates,
    )

    def cleared(x: jax.Array) -> jax.Array:
        """[B, A*G] -> [B, A, G]; rows without supervision hold whatever the padding gave, and are multiplied with 0."""
        return jnp.where(mask, x.reshape(b, a, g), 0.0)

    total, accept = out.loss, cleared(out.accept)
    metrics = _acceptance(accept, mask)
    for name, (term, _) in terms.items():
        each = weights if term.weighted else mask.astype(jnp.float32)
        metrics[name] = Ratio(jnp.sum(each * cleared(out.values[name])), jnp.sum(each))
    metrics["tv"] = Ratio(0.5 * metrics["l1"].num, weight_sum)
    if inside is not None:
        share = jnp.where(mask, _at_rows(inside.mass, outputs.teacher_rows), 0.0)
        metrics["vocabulary_mass"] = Ratio(jnp.sum(share), jnp.sum(mask, dtype=jnp.float32))
    favourites = jax.tree.map(lambda ids: ids.reshape(b, a, g, *ids.shape[2:]), out.favourites)
    blocks = Blocks(drafter, target, outputs, previous, accept, weights, latent, favourites)
    for name, (term, coefficient) in block_terms(coefficients, drafter).items():
        values, more = term(blocks)
        summed = jnp.sum(weights * values)
        total += coefficient * summed
        metrics |= {name: Ratio(summed, weight_sum), **more}
    return LossSums(total, denominator, jax.lax.stop_gradient(metrics))


def _operands(
    drafter: DrafterModule, target: EmbeddingAndHead, outputs: BlockOutputs, latent: jax.Array | None
) -> tuple[jax.Array | None, jax.Array | None, jax.Array, jax.Array | None, jax.Array]:
    """What `vocab_loss` multiplies, of all blocks: states, latent vectors, LM head and table; and the labels.

    A reduced vocabulary has a head of its own, which takes the place of a Markov head's table; the data may have tokens
    outside of it. A head that chooses among candidates has no part in the logits over the vocabulary.
    """
    b, a, g, d = outputs.hidden.shape
    states, labels = outputs.hidden.reshape(b, a * g, d), outputs.labels.reshape(b, a * g)
    vocabulary, head = drafter.vocabulary, drafter.markov
    if vocabulary is not None:
        return None, states, target.head[vocabulary.ids], vocabulary.learned(), jnp.zeros_like(labels)
    if head is None or latent is None or head.candidates:
        return states, None, target.head, None, labels
    return states, latent.reshape(b, a * g, -1), target.head, head.w2[...], labels


def _at_rows(values: jax.Array, rows: jax.Array) -> jax.Array:
    """values [B, S, ...] at sequence rows [B, ...]."""
    return jax.vmap(lambda one, at: one[at])(values, rows)


def _acceptance(accept: jax.Array, mask: jax.Array) -> dict[str, Ratio]:
    """Acceptance by position and expected accepted length; accept [B, A, G] is 0 where the mask is."""
    blocks = mask[..., 0]  # EAGLE-3 has rows that are supervised from a later step on: nothing is accepted of those
    expected = jnp.where(blocks, 1.0 + jnp.sum(jnp.cumprod(accept, axis=-1), axis=-1), 0.0)
    metrics = {
        f"accept@{k + 1}": Ratio(jnp.sum(accept[..., k]), jnp.sum(mask[..., k], dtype=jnp.float32))
        for k in range(mask.shape[-1])
    }
    metrics["tau_expected"] = Ratio(jnp.sum(expected), jnp.sum(blocks, dtype=jnp.float32))
    metrics["supervised"] = Ratio(jnp.sum(mask, dtype=jnp.float32), jnp.asarray(mask.size, jnp.float32))
    return metrics
