"""Qwen3 dense targets (0.6B to 32B): embeddings, stacked pre-norm layers with query/key norms, final norm, LM head."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.config import TargetArchitecture
from dspark_jax.ops.product import product
from dspark_jax.sharding import Param, constrain, gather
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


class Weight(NamedTuple):
    """Where a parameter is in a checkpoint in the PyTorch layout.

    Attributes:
      name: tensor name; `{i}` runs over layers and makes the parameter a stack.
      inputs: how many leading axes of the parameter are inputs of a linear layer, which is stored as [out, in];
        0 = stored as it is, up to merged axes.
      row: a vector that is stored as a linear layer with one output, [1, in].
    """

    name: str
    inputs: int = 0
    row: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading layer axis."""
        return "{i}" in self.name

    def names(self, layers: int) -> list[str]:
        """Tensor names, one per layer for a stack."""
        return [self.name.format(i=i) for i in range(layers)] if self.stacked else [self.name]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor of one layer whose parameter has `shape`."""
        if self.row:
            return (1, *shape)
        if self.inputs:
            return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])
        return (shape[0], math.prod(shape[1:])) if len(shape) > 2 else shape

    def load(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Stored tensor -> parameter of one layer, as a view where possible."""
        return (stored.T if self.inputs else stored).reshape(shape)

    def store(self, value: np.ndarray) -> np.ndarray:
        """Parameter of one layer -> tensor to store."""
        shape = self.stored_shape(value.shape)
        return np.ascontiguousarray(value.reshape(shape[::-1]).T if self.inputs else value.reshape(shape))


LAYER_WEIGHTS = {
    "attention_norm": Weight("layers.{i}.input_layernorm.weight"),
    "attention.query": Weight("layers.{i}.self_attn.q_proj.weight", inputs=1),
    "attention.key": Weight("layers.{i}.self_attn.k_proj.weight", inputs=1),
    "attention.value": Weight("layers.{i}.self_attn.v_proj.weight", inputs=1),
    "attention.out": Weight("layers.{i}.self_attn.o_proj.weight", inputs=2),
    "attention.query_norm": Weight("layers.{i}.self_attn.q_norm.weight"),
    "attention.key_norm": Weight("layers.{i}.self_attn.k_norm.weight"),
    "mlp_norm": Weight("layers.{i}.post_attention_layernorm.weight"),
    "mlp.gate": Weight("layers.{i}.mlp.gate_proj.weight", inputs=1),
    "mlp.up": Weight("layers.{i}.mlp.up_proj.weight", inputs=1),
    "mlp.down": Weight("layers.{i}.mlp.down_proj.weight", inputs=1),
}
"""Parameters of a `target.layers.Layer` stack, for targets (behind the prefix `model.`) and drafters (without)."""

WEIGHTS = {
    "embedding": Weight("model.embed_tokens.weight"),
    "norm": Weight("model.norm.weight"),
    "lm_head": Weight("lm_head.weight"),
} | {f"layers.{path}": weight._replace(name="model." + weight.name) for path, weight in LAYER_WEIGHTS.items()}
"""Every parameter of `Qwen3` and the tensor it is loaded from. A tied checkpoint may carry lm_head all the same."""


class Qwen3(nnx.Module):
    """A Qwen3 language model. Parameters of the layers are stacked on a leading axis L."""

    def __init__(self, arch: TargetArchitecture, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, scale: float = 0.02):
        """Random float32 parameters; `dtype` is the compute type."""
        self.arch = arch
        self.dtype = dtype
        self.narrow = False  # whether every parameter is a bfloat16 number, as in most checkpoints
        self.embedding = normal(rngs, (), (arch.vocab_size, arch.hidden_size), ("vocab", "embed"), scale)
        self.layers = Layer(arch, stack=(arch.num_hidden_layers,), scale=scale, rngs=rngs)
        self.norm = ones((), arch.hidden_size)
        if not arch.tie_word_embeddings:
            self.lm_head = normal(rngs, (), (arch.vocab_size, arch.hidden_size), ("vocab", "embed"), scale)

    @property
    def head(self) -> jax.Array:
        """LM head [V, D]; the embedding itself when tied."""
        return gather(self.embedding[...] if self.arch.tie_word_embeddings else self.lm_head[...], "vocab", "embed")

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] -> [..., D] in the compute type."""
        return gather(self.embedding[...], "vocab", "embed")[tokens].astype(self.dtype)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 logits [..., V], padded vocabulary rows included."""
        if getattr(self, "columns", None) is not None:
            logits = product(hidden.reshape(-1, hidden.shape[-1]), self.columns[...], jnp.float32)
            return logits.reshape(*hidden.shape[:-1], -1)
        head = self.head.astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)

    def lay_out(self, dtype: Any) -> None:
        """See `layers.decode_layout`."""
        self.columns = Param(self.head.T.astype(dtype), axes=(None,) * 2)

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
        starts: jax.Array | None = None,
        unroll: bool = False,
    ) -> TargetOutput:
        """Runs the model.

        Args:
          tokens: [B, S] ids.
          positions: [B, S] consecutive within each row (or document). Without a cache row t attends to rows 0..t; with
            one, to the cache rows 0..positions[b, t], this pass's own rows included.
          cache: a cache with room for positions[b, 0] + S rows, or None.
          taps: ascending layer ids whose raw outputs become `features`; -1 is the embeddings.
          starts: [B, S] first row of each row's document, where several are packed into a sequence (without a cache):
            a row attends to its own document only. Positions then begin anew in every document.
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
                query, key, value = projections.all(normed, positions)
                if cache is not None:
                    written = cache.write(index, key, value, positions[:, 0])
                    key, value = written.layer(index)
                return attend_in_chunks(query, key, value, limit, scale, starts)

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
