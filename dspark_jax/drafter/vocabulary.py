"""The part of the vocabulary that a drafter can draft, with an LM head of its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.sharding import gather
from dspark_jax.target.decode_weights import head_columns, head_logits
from dspark_jax.target.layers import narrow, normal
from dspark_jax.vocabulary import as_map, decode_vocabulary


class DraftVocabulary(nnx.Module):
    """Vd of the target's V tokens, by ascending id.

    Attributes:
      head: [Vd, D] LM head; in training it begins as the target's rows (`training.vocabulary`).
      trained: whether it learns.
    """

    def __init__(self, arch: TargetArchitecture, config: DrafterConfig, *, rngs: nnx.Rngs):
        """A random head."""
        self.size, self.vocab_size = config.draft_vocab_size, arch.vocab_size
        # Text compares fast at every call of a compiled program, an array would not.
        self.text = config.draft_vocabulary
        self.trained = config.train_head
        shape = (self.size, arch.hidden_size)
        self.head: Any = normal(rngs, (), shape, ("vocab", "embed"), config.initializer_range)

    @property
    def ids(self) -> np.ndarray:
        """[Vd] int32, the target's tokens."""
        return decode_vocabulary(self.text, self.size, self.vocab_size)

    @property
    def inside(self) -> np.ndarray:
        """[V] bool, true at `ids`."""
        return as_map(self.ids, self.vocab_size)

    def learned(self) -> jax.Array:
        """The head for the loss: without a gradient where it is not trained."""
        head = gather(self.head[...], "vocab", "embed")
        return head if self.trained else jax.lax.stop_gradient(head)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 logits [..., V], minus infinity at tokens that it has not."""
        logits = head_logits(hidden, lambda: gather(self.head[...], "vocab", "embed"), getattr(self, "columns", None))
        if self.size == self.vocab_size:
            return logits
        # Gathered, not scattered: XLA would turn the product round for it, which a CPU cannot do in bfloat16.
        place = np.maximum(np.cumsum(self.inside) - 1, 0)
        return jnp.where(self.inside, jax.lax.optimization_barrier(logits)[..., place], -jnp.inf)

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `target.decode_weights`."""
        del join
        narrow(self.head, dtype)
        self.columns = head_columns(self.head[...], dtype)
        if self.columns is not None:
            self.head = None  # nothing is kept twice
