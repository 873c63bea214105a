"""A target: embeddings, stacked layers of one or more kinds, final norm, LM head.

How families differ is in their descriptions (`target.families`); training and the engine take any of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import TargetArchitecture
from dspark_jax.ops.cached_attention import Rows
from dspark_jax.sharding import constrain, gather
from dspark_jax.target import families
from dspark_jax.target.attend import Pass, attend
from dspark_jax.target.cache import KVCache, LayerCache
from dspark_jax.target.compressed import CompressedAttention, look
from dspark_jax.target.compressed_cache import CompressedCache
from dspark_jax.target.decode_weights import head_columns, head_logits
from dspark_jax.target.delta import GatedDelta, recall
from dspark_jax.target.delta_cache import DeltaCache
from dspark_jax.target.families.family import Family
from dspark_jax.target.layers import Layer, layer_at, norm_weight, normal, rms_norm, run_pattern

_COMPUTED: Mapping[type, Any] = {GatedDelta: recall, CompressedAttention: look}
"""What computes heads with the projections that are there in the place of an `Attention`."""

Cache = LayerCache | dict[str, LayerCache]
"""What the layers of a target keep of earlier rows: one stack, or one for each kind of layers."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetOutput:
    """What a forward pass of a target gives.

    Attributes:
      features: [B, S, M*D] raw outputs of the tapped layers, ascending ids (-1 = the embeddings).
      last_hidden: [B, S, D] after the final norm; `unembed` of it gives the logits.
      cache: the cache with the rows of this pass written, or None.
    """

    features: jax.Array
    last_hidden: jax.Array
    cache: Any


class Target(nnx.Module):
    """A frozen language model. Parameters of the layers are stacked, one stack per kind of layers.

    Attributes:
      first: kinds of the first layers.
      pattern: kinds of the layers after them, again and again.
      softcap: logits are softcap * tanh(logits / softcap); 0 leaves them as they are.
      narrow: whether every parameter is a bfloat16 number, as in most checkpoints.
    """

    layers: Layer

    def __init__(self, arch: TargetArchitecture, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, scale: float = 0.02):
        """Random float32 parameters; `dtype` is the compute type."""
        self.arch = arch
        self.dtype = dtype
        self.narrow = False
        self.first, self.pattern = layer_pattern(self.family.kinds(arch))
        self.softcap = arch.final_logit_softcapping
        self.embedding = normal(rngs, (), (arch.vocab_size, arch.hidden_size), ("vocab", "embed"), scale)
        for kind, name in self.stacks.items():
            setattr(self, name, self.make_layers(kind, rngs=rngs, scale=scale))
        self.norm = norm_weight((), arch.hidden_size, centred=self.family.layer(arch).centred)
        if not arch.tie_word_embeddings:
            self.lm_head = normal(rngs, (), (arch.vocab_size, arch.hidden_size), ("vocab", "embed"), scale)

    def make_layers(self, kind: str, *, rngs: nnx.Rngs, scale: float) -> Layer:
        """The random layers of a kind, as a stack; what a family's own class overrides."""
        stack, shape = (len(self.family.stack_layers(self.arch, kind)),), self.family.layer(self.arch, kind)
        return Layer(self.arch, stack=stack, scale=scale, rngs=rngs, shape=shape)

    @property
    def family(self) -> Family:
        """What its family says of it."""
        return families.of_shape(self.arch)

    @property
    def stacks(self) -> Mapping[str, str]:
        """Kind of layers -> the attribute that holds their stack."""
        return self.family.stacks_of(self.arch)

    @property
    def head(self) -> jax.Array:
        """LM head [V, D]; the embedding itself when tied."""
        return gather(self.embedding[...] if self.arch.tie_word_embeddings else self.lm_head[...], "vocab", "embed")

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] -> [..., D] in the compute type, scaled as the compute type can hold the factor."""
        rows = gather(self.embedding[...], "vocab", "embed")[tokens].astype(self.dtype)
        scale = self.family.embedding_scale(self.arch)
        return rows if scale == 1 else rows * jnp.asarray(scale, self.dtype)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 logits [..., V], soft-capped, padded vocabulary rows included."""
        columns = getattr(self, "columns", None), getattr(self, "draft_columns", None)
        logits = head_logits(hidden, lambda: self.head, *columns)
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `decode_weights`."""
        del join
        self.columns = head_columns(self.head, dtype)

    def hold_head(self, dtype: Any) -> None:
        """Holds the LM head for rows of type `dtype` as well, see `decode_weights`."""
        self.draft_columns = head_columns(self.head, dtype)

    def init_cache(self, batch: int, length: int, block: int = 1) -> Cache:
        """An empty cache for `length` positions of `batch` requests.

        Layers with a window keep no more rows than they can see, and `block`: most rows of one pass of which some may
        be taken back afterwards (a bonus token and its drafts), 1 where none ever is. Layers with a state keep that,
        and so many rows that it does not know yet.
        """
        separate = getattr(self, "separate_caches", False)

        def empty(kind: str) -> LayerCache:
            layers, shape = len(self.family.stack_layers(self.arch, kind)), self.family.layer(self.arch, kind)
            if shape.delta is not None:
                return DeltaCache.zeros(layers, batch, block, shape.delta, self.dtype, separate=separate)
            how = {"separate": separate, "block": block}
            if shape.compressed is not None:
                return CompressedCache.zeros(
                    layers, batch, length, block, shape.compressed, self.dtype, separate=separate
                )
            return KVCache.zeros(layers, batch, length, self.arch, self.dtype, shape.attention, **how)

        caches = {kind: empty(kind) for kind in self.stacks}
        return caches if len(caches) > 1 else next(iter(caches.values()))

    def enter(self, embedded: jax.Array) -> jax.Array:
        """What the first layer reads, of embeddings [B, S, D]; what a family's own class overrides."""
        return embedded

    def run_layer(self, layer: Any, x: jax.Array, attention: Any, tokens: jax.Array) -> jax.Array:
        """x through a layer, whose attention is `attention`; what a family's own class overrides."""
        del tokens
        return layer(x, attention)

    def tapped(self, x: jax.Array) -> jax.Array:
        """What drafters read of what a layer gives, [B, S, D]; what a family's own class overrides."""
        return x

    def leave(self, x: jax.Array) -> jax.Array:
        """What the final norm reads of what the last layer gives, [B, S, D]; what a family's own class overrides."""
        return x

    def forward(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Any = None,
        *,
        taps: tuple[int, ...] = (),
        starts: jax.Array | None = None,
        rows: Rows | None = None,
        counts: jax.Array | None = None,
    ) -> TargetOutput:
        """Runs the model.

        Args:
          tokens: [B, S] ids.
          positions: [B, S] consecutive within each row (or document). Without a cache row t attends to rows 0..t; with
            one, to the cache rows 0..positions[b, t], this pass's own rows included. Sliding layers see the last
            `sliding_window` of these. A pass begins where the last one ended, or, where that one had no more rows
            than `init_cache` was told of, at any of its rows: those from there on are taken back.
          cache: a cache with room for positions[b, 0] + S rows, or None.
          taps: ascending layer ids whose raw outputs become `features`; -1 is the embeddings.
          starts: [B, S] first row of each row's document, where several are packed into a sequence (without a cache):
            a row attends to its own document only. Positions then begin at 0 in every document.
          rows: the rows of all requests follow one another: tokens and positions are [1, T], of which `rows`
            says what belongs to whom. Only attention and the cache, which must be there, see the requests.
          counts: [B] real rows of each request, the first ones (None: all S). With a cache, a pass that is padded by
            more rows than `init_cache` was told of has to say so: in a layer with a window the padding would take the
            place of rows that are still seen, and a state would know it.

        Returns:
          `TargetOutput`; M = len(taps), features are [B, S, 0] without taps.
        """

        run = Pass(positions, starts, rows, counts)

        def body(carry: Any, kind: str, index: jax.Array | int, number: jax.Array | int) -> Any:
            x, cache, features = carry
            layer = layer_at(getattr(self, self.stacks[kind]), index)
            written = cache

            def heads_of(projections: Any, normed: jax.Array) -> jax.Array:
                nonlocal written
                part = cache[kind] if isinstance(cache, dict) else cache
                part, heads = _COMPUTED.get(type(projections), attend)(part, index, projections, normed, run)
                written = {**cache, kind: part} if isinstance(cache, dict) else part
                return heads

            x = self.run_layer(layer, x, heads_of, tokens)
            x = constrain(x, "batch", *(None,) * (x.ndim - 1))
            return x, written, features.put(number, self.tapped(x))

        embedded = constrain(self.embed(tokens), "batch", None, None)
        one_by_one = isinstance(getattr(self, next(iter(self.stacks.values()))), nnx.List)
        carry = self.enter(embedded), cache, Features.start(taps, embedded, one_by_one=one_by_one)
        carry = run_pattern(self.first, self.pattern, body, carry, self.arch.num_hidden_layers, one_by_one=one_by_one)
        x, cache, features = carry
        x = self.leave(x)
        centred = self.family.layer(self.arch).centred
        last = rms_norm(x, self.norm[...], self.arch.rms_norm_eps, centred=centred)
        return TargetOutput(features.joined(x), last, cache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """Outputs of the tapped layers, collected while the layers run.

    Attributes:
      rows: M arrays [B, S, D] where the layers go one by one. For a loop, which cannot grow a tuple, one
        array [M + 1, B, S, D], whose last entry takes what no tap asks for.
      taps: ascending layer ids, static.
    """

    rows: Any
    taps: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def start(cls, taps: tuple[int, ...], embedded: jax.Array, *, one_by_one: bool) -> "Features":
        """Before the first layer, whose input [B, S, D] is layer -1."""
        if one_by_one or not taps:
            return cls((), taps).put(-1, embedded)
        rows = jnp.zeros((len(taps) + 1, *embedded.shape), embedded.dtype)
        return cls(constrain(rows, None, "batch", None, None), taps).put(-1, embedded)

    def put(self, number: jax.Array | int, x: jax.Array) -> "Features":
        """After layer `number`, whose output is x [B, S, D]."""
        if not self.taps or (isinstance(number, int) and number not in self.taps):
            return self
        if isinstance(self.rows, tuple):
            return Features((*self.rows, x), self.taps)
        wanted = jnp.asarray(self.taps) == number
        slot = jnp.where(jnp.any(wanted), jnp.argmax(wanted), len(self.taps))
        return Features(jax.lax.dynamic_update_index_in_dim(self.rows, x, slot, 0), self.taps)

    def joined(self, x: jax.Array) -> jax.Array:
        """[B, S, M*D], like x [B, S, D] in all else."""
        tapped = [self.rows[i] for i in range(len(self.taps))]
        return jnp.concatenate(tapped, axis=-1) if tapped else jnp.zeros((*x.shape[:2], 0), x.dtype)


def layer_pattern(kinds: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The kinds of the first layers, and those whose repetition gives the others': as few as possible."""
    found = kinds, ()
    for begin in range(len(kinds)):
        rest = kinds[begin:]
        for period in range(1, len(rest) + 1):
            repeated = len(rest) % period == 0 and rest == rest[:period] * (len(rest) // period)
            if repeated and (not found[1] or begin + period < len(found[0]) + len(found[1])):
                found = kinds[:begin], rest[:period]
    return found
