"""Terms of the drafter's loss, one per file. `registry.LOSS_TERMS` has them by name."""

from collections.abc import Mapping

from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.ops.vocab_loss import Distributions, VocabTerm
from dspark_jax.registry import LOSS_TERMS, Entry
from dspark_jax.training.losses.base import Blocks, BlockTerm

__all__ = ["LOSS_TERMS", "BlockTerm", "Blocks", "Distributions", "Entry", "VocabTerm", "block_terms", "vocab_terms"]


def vocab_terms(weights: Mapping[str, float]) -> dict[str, tuple[VocabTerm, float]]:
    """Those of the terms that need the vocabulary and are wanted here, as `ops.vocab_loss` takes them.

    Args:
      weights: name -> coefficient. Terms that are always reported are there with a coefficient of 0, too.
    """
    return {name: (term, weight) for name, (term, weight) in _wanted(weights).items() if isinstance(term, VocabTerm)}


def block_terms(weights: Mapping[str, float], drafter: DrafterModule) -> dict[str, tuple[BlockTerm, float]]:
    """The other ones, as far as they apply to a drafter; see `vocab_terms`."""
    return {
        name: (term, weight)
        for name, (term, weight) in _wanted(weights).items()
        if isinstance(term, BlockTerm) and term.applies(drafter)
    }


def _wanted(weights: Mapping[str, float]) -> dict[str, tuple[VocabTerm | BlockTerm, float]]:
    made = {name: (entry.load()(), float(weights.get(name, 0.0))) for name, entry in LOSS_TERMS.items()}
    return {name: (term, weight) for name, (term, weight) in made.items() if weight or term.reported}
