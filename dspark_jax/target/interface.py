"""What drafters and losses need of a target: its embedding and its LM head."""

from typing import Any, Protocol

import jax

from dspark_jax.config import TargetArchitecture


class EmbeddingAndHead(Protocol):
    """A target, or the two matrices of one (`target.frozen`)."""

    arch: TargetArchitecture
    dtype: Any

    @property
    def softcap(self) -> float:
        """Bound of the logits; 0 where there is none."""
        ...

    @property
    def head(self) -> jax.Array:
        """LM head [V, D]."""
        ...

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] -> [..., D] in the compute type."""
        ...

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 logits [..., V]."""
        ...
