"""What drafters and losses need of a target, its embedding and its LM head; and what decodes."""

from typing import TYPE_CHECKING, Any, Protocol

import jax

from dspark_jax.config import TargetArchitecture

if TYPE_CHECKING:
    from dspark_jax.ops.cached_attention import Rows
    from dspark_jax.target.model import TargetOutput


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


class LanguageModel(EmbeddingAndHead, Protocol):
    """A target that decodes: one in JAX (`target.model`), or one that PyTorch runs (`target.in_torch`)."""

    @property
    def narrow(self) -> bool:
        """Whether every parameter is a bfloat16 number."""
        ...

    def init_cache(self, batch: int, length: int, block: int = 1) -> Any:
        """See `target.model.Target`."""
        ...

    def forward(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Any = None,
        *,
        taps: tuple[int, ...] = (),
        rows: "Rows | None" = None,
        counts: jax.Array | None = None,
    ) -> "TargetOutput":
        """See `target.model.Target`."""
        ...
