"""Qwen3 dense targets (0.6B to 32B): embeddings, stacked pre-norm layers with query/key norms, final norm, LM head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import TargetArchitecture
from dspark_jax.sharding import constrain
from dspark_jax.target.layers import KVCache, Layer, attend_in_chunks, layer_at, normal, ones, rms_norm, run_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetOutput:
    """What a forward pass of a target gives.

    Attributes:
      features: [B, S, M*D] raw outputs of the tapped layers, ascending ids (-1 = the embeddings).
      last_hidden: [B, S, D] after the final norm; `unembed` of it gives the logits.
      cache: the KV cache with the rows of this pass written, or None.
    """

    features: jax.Array
    last_hidden: jax.Array
    cache: KVCache | None


class Qwen3(nnx.Module):
    """A Qwen3 language model. Parameters of the layers are stacked on a leading axis L."""

    def __init__(self, arch: TargetArchitecture, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, scale: float = 0.02):
        """Random float32 parameters; `dtype` is the compute type."""
        self.arch = arch
        self.dtype = dtype
        self.embedding = normal(rngs, (), (arch.vocab_size, arch.hidden_size), ("vocab", "embed"), scale)
        self.layers = Layer(arch, stack=(arch.num_hidden_layers,), scale=scale, rngs=rngs)
        self.norm = ones((), arch.hidden_size)
        if not arch.tie_word_embeddings:
            self.lm_head = normal(rngs, (), (arch.vocab_size, arch.hidden_size), ("vocab", "embed"), scale)

    @property
    def head(self) -> jax.Array:
        """LM head [V, D]; the embedding itself when tied."""
        return self.embedding[...] if self.arch.tie_word_embeddings else self.lm_head[...]

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] -> [..., D] in the compute type."""
        return self.embedding[...][tokens].astype(self.dtype)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 logits [..., V], padded vocabulary rows included."""
        head = self.head.astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` positions of `batch` requests."""
        return KVCache.zeros(self.arch.num_hidden_layers, batch, length, self.arch, self.dtype)

    def forward(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: KVCache | None = None,
        *,
        taps: tuple[int, ...] = (),
        unroll: bool = False,
    ) -> TargetOutput:
        """Runs the model.

        Args:
          tokens: [B, S] ids.
          positions: [B, S] consecutive within each row. Without a cache row t attends to rows 0..t; with one, to the
            cache rows 0..positions[b, t], this pass's own rows included.
          cache: a cache with room for positions[b, 0] + S rows, or None.
          taps: ascending layer ids whose raw outputs become `features`; -1 is the embeddings.
          unroll: lay the layers out one by one instead of in a loop (faster decoding on CPU, more to compile).

        Returns:
          `TargetOutput`; M = len(taps), features are [B, S, 0] without taps.
        """
        arch = self.arch
        row_limit = jnp.broadcast_to(jnp.arange(tokens.shape[1]) + 1, tokens.shape)
        limit = row_limit if cache is None else positions + 1
        scale = arch.head_dim**-0.5

        def body(carry: tuple[jax.Array, KVCache | None], index: jax.Array | int) -> tuple[jax.Array, KVCache | None]:
            x, cache = carry
            layer = layer_at(self.layers, index)
            written = cache

            def attention(projections: Any, normed: jax.Array) -> jax.Array:
                nonlocal written
                query = projections.queries(normed, positions)
                key, value = projections.keys_values(normed, positions)
                if cache is not None:
                    written = cache.write(index, key, value, positions[:, 0])
                    key, value = written.layer(index)
                return attend_in_chunks(query, key, value, limit, scale)

            x = constrain(layer(x, attention), "batch", None, None)
            return x, written

        x = constrain(self.embed(tokens), "batch", None, None)
        carry, tapped, done = (x, cache), [], 0
        for tap in taps:
            carry = run_layers(body, carry, done, tap + 1, unroll=unroll)
            done = tap + 1
            tapped.append(carry[0])
        x, cache = run_layers(body, carry, done, arch.num_hidden_layers, unroll=unroll)
        features = jnp.concatenate(tapped, axis=-1) if tapped else jnp.zeros((*x.shape[:2], 0), x.dtype)
        return TargetOutput(features, rms_norm(x, self.norm[...], arch.rms_norm_eps), cache)
