"""What a family of targets is: everything that depends on which one a model is of, in one class per family.

Modules of this package are loaded with the config, before JAX is: they describe. What computes is in `target.layers`
and `target.model`, which read the description; a family that needs layers of its own makes them in `Family.model`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from dspark_jax.config_fields import Field
from dspark_jax.target.weights import Weight, with_prefix

if TYPE_CHECKING:
    from dspark_jax.architecture import TargetArchitecture
    from dspark_jax.target.model import Target

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
"""Kinds of layers: all earlier rows are visible, or a window of them, or a state that they have left."""

SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip
"""Fields of `TargetArchitecture` that every family has."""

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
"""Parameters of a stack of `target.layers.Layer` and the tensors that most models of transformers have for them."""


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What the attention of one kind of layers is like.

    Attributes:
      heads: N query heads.
      kv_heads: K key and value heads.
      width: H of each.
      theta: base of the rotary frequencies.
      scale: factor of the scores.
      turns: factors of the frequencies of a head's H/2 pairs; empty: all 1. A pair with 0 does not turn.
      window: rows that a query sees, its own included; 0 = all before it.
      norms: queries and keys pass an RMS norm per head.
      value_is_key: values are the raw key projections (before their norm and rotation).
      value_norm: values pass an RMS norm without weight.
      biases: queries, keys and values have a bias each, added before norm and rotation.
      rotary: numbers of a head that RoPE turns, the first ones, whose halves are the pairs; 0 = all H.
      gated: every head's output is multiplied with the sigmoid of a projection, stored after the head's query.
      out_bias: the output has a bias.
      sinks: every query head has a score that takes its share of the softmax and gives nothing.
    """

    heads: int
    kv_heads: int
    width: int
    theta: float
    scale: float
    turns: tuple[float, ...] = ()
    window: int = 0
    norms: bool = True
    value_is_key: bool = False
    value_norm: bool = False
    biases: bool = False
    rotary: int = 0
    gated: bool = False
    out_bias: bool = False
    sinks: bool = False


@dataclasses.dataclass(frozen=True)
class DeltaShape:
    """What linear attention by the gated delta rule is like (`ops.delta_rule`).

    Attributes:
      heads: K key heads.
      values: R value heads of each.
      width: H of keys and queries.
      value_width: W of values.
      taps: rows that the convolution before it sees, its own included.
    """

    heads: int
    values: int
    width: int
    value_width: int
    taps: int

    @property
    def pieces(self) -> tuple[int, int, int]:
        """Widths of a key head's query, key and values."""
        return self.width, self.width, self.values * self.value_width


@dataclasses.dataclass(frozen=True)
class ExpertShape:
    """What a mixture of experts is like.

    Attributes:
      count: E experts.
      chosen: k of them that a row goes through.
      width: F of each.
      normalised: the weights of a row's experts add up to 1 (before `factor`).
      scores: what makes scores of the router's logits: softmax, sigmoid, or sqrtsoftplus.
      factor: of the weights.
      corrected: a stored number per expert is added to the scores that choose, not to those that weigh.
      hashed: a stored table says by a row's token which experts it goes through: its rows; 0: there is none.
      shared: width of an MLP that every row goes through besides; 0: there is none.
      shared_gated: its output is multiplied with the sigmoid of a projection.
      biases: router and experts have biases.
      limit: bound of what comes out of a gate (from above) and beside it; 0: there is none.
      sharpness: None: the gate's function is multiplied with what goes up. Else it is
        (1 + up) gate sigmoid(sharpness gate), of what the limit leaves.
    """

    count: int
    chosen: int
    width: int
    normalised: bool
    scores: str = "softmax"
    factor: float = 1.0
    corrected: bool = False
    hashed: int = 0
    shared: int = 0
    shared_gated: bool = False
    biases: bool = False
    limit: float = 0.0
    sharpness: float | None = None


@dataclasses.dataclass(frozen=True)
class HyperShape:
    """What hyper-connections are like (`target.hyper_connections`).

    Attributes:
      streams: N.
      iterations: of Sinkhorn-Knopp.
      eps: what keeps its sums, and the weights of streams, from 0.
    """

    streams: int
    iterations: int
    eps: float


@dataclasses.dataclass(frozen=True)
class IndexShape:
    """What chooses among the compressed rows that a row may see.

    Attributes:
      heads: I.
      width: of each, and of its own compressed rows.
      chosen: most of them that a row sees.
    """

    heads: int
    width: int
    chosen: int


@dataclasses.dataclass(frozen=True)
class CompressedShape:
    """What attention to a window of rows, and to compressed rows before it, is like (`target.compressed`).

    Attributes:
      heads: N query heads; all share one key, which is the value as well.
      width: H of each.
      rotary: numbers at the end of a head that RoPE turns, neighbours in pairs.
      theta: base of the rotary frequencies.
      turns: factors of the frequencies of its pairs; empty: all 1.
      query_rank: width between the two matrices that make queries.
      groups: of heads, each of which has a matrix of its own that makes its heads narrower ...
      group_rank: ... to so many numbers, of which one more matrix makes the output.
      window: rows that a query sees, its own included.
      rate: m, rows that become one compressed row; 0: there are none.
      index: what chooses compressed rows, which then are of 2 m rows each; None: all are seen, of m rows each.
    """

    heads: int
    width: int
    rotary: int
    theta: float
    turns: tuple[float, ...]
    query_rank: int
    groups: int
    group_rank: int
    window: int
    rate: int = 0
    index: IndexShape | None = None

    @property
    def series(self) -> int:
        """How many compressed rows a row takes part in."""
        return 1 if self.index is None else 2


@dataclasses.dataclass(frozen=True)
class Fused:
    """How a tensor of all experts of a layer is stored: matrices [E, outputs, inputs], or biases [E, outputs].

    Attributes:
      parts: what each expert has in it, by the names that they have in checkpoints with a tensor for each.
      alternating: the outputs of the parts alternate; otherwise they follow one another.
      turned: inputs come before outputs, but in a quantised tensor.
      bias: these are biases.
    """

    parts: tuple[str, ...]
    alternating: bool = False
    turned: bool = False
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What one kind of layers is like: pre-norm attention and a gated MLP, each added to the residual stream.

    Attributes:
      attention: its attention.
      gate: function of the MLP's gate: silu, or gelu_tanh (the tanh approximation of GELU).
      out_norms: what attention and MLP give is normed once more before it is added.
      scalar: the layer's output is multiplied with a stored number.
      experts: of the mixture that is there instead of the MLP, if any.
      delta: of the linear attention that is there instead of `attention`, if any.
      centred: the stored weights of norms are what is to be added to 1.
      compressed: of the attention with compressed rows that is there instead of `attention`, if any.
      hyper: of the hyper-connections around attention and MLP, if any.
    """

    attention: AttentionShape
    gate: str = "silu"
    out_norms: bool = False
    scalar: bool = False
    experts: ExpertShape | None = None
    delta: DeltaShape | None = None
    centred: bool = False
    compressed: CompressedShape | None = None
    hyper: HyperShape | None = None


FUSED_EXPERTS = {
    ".mlp.experts.gate_up_proj": Fused(("gate_proj", "up_proj")),
    ".mlp.experts.down_proj": Fused(("down_proj",)),
}
"""How transformers holds experts, and some checkpoints store them."""


def expert_weights(count: int, router: str = "gate") -> dict[str, Weight]:
    """Parameters of a mixture of so many experts and their tensors, one per expert; `router` is what that is called."""
    experts = {
        f"mlp.{name}": Weight(f"layers.{{i}}.mlp.experts.{{e}}.{name}_proj.weight", inputs=1, experts=count)
        for name in ("gate", "up", "down")
    }
    return {"mlp.router": Weight(f"layers.{{i}}.mlp.{router}.weight", inputs=1), **experts}


class Family:
    """A family of targets. What is given here is a dense model with the names of Qwen3 and Llama; others override it.

    Attributes:
      name: `TargetArchitecture.model_type` of its models.
      title: what it is called in messages.
      configs: every `model_type` that a config.json of it may have -> what becomes of the fields there (of the language
        model's part, where there are other modalities).
      instead: what to use instead of a model of it that is not supported, e.g. "a plain Qwen3 model".
      fused: how names of tensors end that a checkpoint may have for all experts of a layer, and how these are stored.
      stacks: kind of layers -> the attribute of the model that holds their stack; every model has `FULL` layers.
      identity_fields: fields of `TargetArchitecture` that a target's fingerprint is made of, besides `own`. To add one,
        or to reorder them, makes every checkpoint of the family one for another target.
      drafter_class: with what the names of the classes begin that servers have for drafters with this family's layers:
        Qwen3 in Qwen3DSparkModel. Empty: there are none, and drafters have Qwen3's layers.
      long_drafters: whether drafters with its layers may have windows and scaled RoPE.
      drafter_fields: fields of `TargetArchitecture` that a drafter's layers depend on.
      drafter_constants: tensors of a drafter's file that are always 1 and no parameters here.
      dflash_class: of servers' fill-in DFlash with its layers; empty: no server has one.
      eagle3_class: of vLLM's EAGLE-3 for it; empty: no server has one.
      slim_refusal: why a drafter's file cannot go without embedding and LM head; empty if it can.
      speculators_refusal: why the speculators package would draft other tokens; empty if it would not.
    """

    name: str
    title: str
    configs: Mapping[str, Mapping[str, Field]]
    instead: str
    fused: Mapping[str, Fused] = {}
    stacks: Mapping[str, str] = {FULL: "layers"}
    identity_fields: tuple[str, ...] = ("model_type", *SIZES)
    drafter_class: str = ""
    long_drafters: bool = False
    drafter_fields: tuple[str, ...] = ()
    drafter_constants: tuple[str, ...] = ()
    dflash_class: str = ""
    eagle3_class: str = ""
    slim_refusal: str = ""
    speculators_refusal: str = ""

    # config.json

    def language_model(self, raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The part of a config.json that describes the language model: all of it, where there is nothing else.

        Raises:
          InputError: the file, `where`, contradicts itself.
        """
        return raw

    def values(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Fields of `TargetArchitecture` that are not in the config under their own names.

        What only this family has goes into `own`, as JSON has it: no tuples.

        Args:
          raw: the fields whose treatment is "read", with what an absent one means.
          where: the file, for messages.

        Raises:
          InputError: a value is wrong, missing or not supported.
        """
        return {}

    def to_hf(self, arch: "TargetArchitecture") -> dict[str, Any]:
        """The fields as a config.json states them; `TargetArchitecture.from_hf` of it gives `arch` again."""
        raise NotImplementedError(f"{self.name}: config.json")

    def identity(self, arch: "TargetArchitecture") -> str:
        """The text that tells the shape of one target from another in a fingerprint."""
        named = ", ".join(f"{name}={getattr(arch, name)!r}" for name in self.identity_fields)
        return f"TargetArchitecture({named})" + (repr(sorted(arch.own.items())) if arch.own else "")

    # The model

    def kinds(self, arch: "TargetArchitecture") -> tuple[str, ...]:
        """The kind of every layer."""
        return (FULL,) * arch.num_hidden_layers

    def stacks_of(self, arch: "TargetArchitecture") -> dict[str, str]:
        """`stacks` without those kinds of which it has no layers."""
        kinds = {FULL, *self.kinds(arch)}
        return {kind: name for kind, name in self.stacks.items() if kind in kinds}

    def stack_layers(self, arch: "TargetArchitecture", kind: str) -> tuple[int, ...]:
        """The numbers of the layers of a kind: what its stack holds, in this order."""
        return tuple(i for i, other in enumerate(self.kinds(arch)) if other == kind)

    def layer(self, arch: "TargetArchitecture", kind: str = FULL) -> LayerShape:
        """What layers of a kind are like."""
        width = arch.head_dim
        heads = arch.num_attention_heads, arch.num_key_value_heads
        return LayerShape(AttentionShape(*heads, width, arch.rope_theta, width**-0.5))

    def embedding_scale(self, arch: "TargetArchitecture") -> float:
        """Factor between the stored embedding and what the first layer reads; rounded to the compute type."""
        return 1.0

    def model(self) -> "type[Target] | None":
        """The class of its models, the same one in every call; None for `target.model.Target` itself.

        Subclasses override `make_layers`, or more. Import what needs JAX in here, and cache what is made.
        """
        return None

    # Names of tensors

    def layer_weights(self, arch: "TargetArchitecture", kind: str) -> Mapping[str, Weight]:
        """Parameters of the layers of a kind and their tensors, without the prefix of all."""
        return LAYER_WEIGHTS

    def prefix(self, names: Collection[str]) -> str:
        """With what all names of embedding, norm and layers begin; `names` are those of a checkpoint's tensors."""
        return "model."

    def outer_weights(self, prefix: str) -> dict[str, Weight]:
        """Parameters outside the layers and their tensors. A tied checkpoint may carry lm_head all the same."""
        return {
            "embedding": Weight(f"{prefix}embed_tokens.weight"),
            "norm": Weight(f"{prefix}norm.weight"),
            "lm_head": Weight("lm_head.weight"),
        }

    def weights(self, arch: "TargetArchitecture", names: Collection[str] = ()) -> dict[str, Weight]:
        """Every parameter of a target and the tensor it is loaded from.

        Args:
          arch: its shape.
          names: of the checkpoint's tensors, where these may differ from one to another.
        """
        prefix = self.prefix(names)
        found = self.outer_weights(prefix)
        for kind, stack in self.stacks_of(arch).items():
            table = with_prefix(prefix, self.layer_weights(arch, kind), self.stack_layers(arch, kind))
            found |= {f"{stack}.{path}": weight for path, weight in table.items()}
        return found

    def ignores(self, name: str) -> bool:
        """Whether a tensor of a checkpoint takes no part in text, or is RoPE's frequencies, which older ones hold."""
        return name.endswith(".rotary_emb.inv_freq")

    def integers(self, name: str) -> bool:
        """Whether a tensor of a checkpoint holds whole numbers, and is not quantised because of that."""
        del name
        return False

    # Drafters

    def drafter_weights(self) -> Mapping[str, Weight]:
        """Parameters of drafters' layers and their tensors, some of which a drafter may not have."""
        return LAYER_WEIGHTS

    def drafter_shape(self, arch: "TargetArchitecture") -> "TargetArchitecture":
        """The shape of a drafter's layers: the target's; a Qwen3's of its size, where there is no `drafter_class`."""
        if self.drafter_class:
            return arch
        return type(arch)(**{name: getattr(arch, name) for name in SIZES}, unsupported=arch.unsupported)

    def drafter_config(self, config: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
        """A drafter's config.json with what this family's have besides, or without what they do not have.

        Args:
          config: all that every drafter's config.json has.
          target: that of the target.
        """
        return dict(config)

    def drafter_rope(self, arch: "TargetArchitecture") -> dict[str, Any]:
        """RoPE in the form of transformers 4 and in that of 5, where servers read the older one of such a drafter."""
        return {}
