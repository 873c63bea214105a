"""The drafter that drafts nothing, which stands for plain decoding: nobody asks whether there is a drafter."""

from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.drafter.interface import Proposal
from dspark_jax.ops.sampling import Sampling
from dspark_jax.target.interface import EmbeddingAndHead


@jax.tree_util.register_static
class NoDrafter:
    """Proposes no tokens, needs no features, keeps nothing; see `drafter.interface.Drafter`."""

    def __init__(self) -> None:
        self.block_size = 0
        self.taps: tuple[int, ...] = ()
        self.dtype: Any = jnp.float32

    def __eq__(self, other: object) -> bool:
        """All of them are the same."""
        return isinstance(other, NoDrafter)

    def __hash__(self) -> int:
        """As `__eq__`."""
        return hash(NoDrafter)

    def init_cache(self, batch: int, length: int) -> None:
        """Nothing."""
        del batch, length

    def extend(
        self, cache: Any, features: jax.Array, tokens: jax.Array, positions: jax.Array, counts: jax.Array
    ) -> Any:
        """The cache as it is, that of another drafter too."""
        del features, tokens, positions, counts
        return cache

    def propose(
        self,
        target: EmbeddingAndHead,
        cache: Any,
        anchors: jax.Array,
        positions: jax.Array,
        uniforms: jax.Array,
        sampling: Sampling,
    ) -> tuple[Proposal, Any]:
        """A proposal of no tokens; the cache as it is."""
        del positions, uniforms, sampling
        batch = anchors.shape[0]
        logits = jnp.zeros((batch, 0, target.arch.vocab_size), jnp.float32)
        return Proposal(jnp.zeros((batch, 0), jnp.int32), logits, None), cache


NO_DRAFTER = NoDrafter()
