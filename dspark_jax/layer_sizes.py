"""Sizes of the layers of a dspark5 drafter: `drafter.layer_sizes`, by their names in a DeepSeek-V4's `config.json`.

What a config leaves out is the target's, if that is a DeepSeek-V4; of another target it follows from its sizes.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dspark_jax.target import families
from dspark_jax.target.families.deepseek_v4 import ROUTED
from dspark_jax.target.families.family import SLIDING

if TYPE_CHECKING:
    from dspark_jax.architecture import TargetArchitecture

FAMILY = "deepseek_v4"
"""The `model_type` of targets that have such layers themselves."""


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """Sizes and numbers of the layers.

    Attributes:
      num_attention_heads: N, with one key and value for all of them.
      head_dim: H of queries, and of that key.
      qk_rope_head_dim: how many of them, the last ones, RoPE turns.
      q_lora_rank: queries are made in two steps, with so many numbers between.
      o_lora_rank: the output likewise, in each group of heads.
      o_groups: groups of heads.
      n_routed_experts: E.
      num_experts_per_tok: how many of them a row goes through.
      moe_intermediate_size: width of each, and of the shared one.
      routed_scaling_factor: of the experts' weights, which add up to it.
      swiglu_limit: bound of what is multiplied in an expert.
      hc_mult: streams.
      hc_sinkhorn_iters: iterations that make their mixing doubly stochastic.
      hc_eps: what keeps their weights from 0.
      rope_theta: base of the rotary frequencies.
    """

    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    n_routed_experts: int = 16
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 0
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rope_theta: float = 1e4


NAMES = tuple(field.name for field in dataclasses.fields(LayerSizes))
_NUMBERS = tuple(field.name for field in dataclasses.fields(LayerSizes) if field.type is float)


def layer_sizes(arch: "TargetArchitecture", stated: Mapping[str, Any]) -> LayerSizes:
    """The sizes for a target of shape `arch`, of which a config states some."""
    heads = arch.num_attention_heads
    rank = max(arch.hidden_size // 4, 1)
    values = {
        "num_attention_heads": heads,
        "head_dim": arch.head_dim,
        "qk_rope_head_dim": max(arch.head_dim // 4 * 2, 2),
        "q_lora_rank": rank,
        "o_lora_rank": rank,
        "o_groups": next(groups for groups in (8, 4, 2, 1) if heads % groups == 0),
        "moe_intermediate_size": max(arch.intermediate_size // 4, 1),
    }
    if arch.model_type == FAMILY:
        values |= _of_deepseek_v4(arch)
    values |= stated
    exact: dict[str, Any] = {name: value if name in _NUMBERS else int(value) for name, value in values.items()}
    return LayerSizes(**exact)


def _of_deepseek_v4(arch: "TargetArchitecture") -> dict[str, Any]:
    """The sizes of a DeepSeek-V4's own layers, those without compressed rows and with a learned router."""
    shape = families.of_shape(arch).layer(arch, f"{SLIDING}/{ROUTED}")
    attention, experts, streams = shape.compressed, shape.experts, shape.hyper
    assert attention is not None and experts is not None and streams is not None
    return {
        "num_attention_heads": attention.heads,
        "head_dim": attention.width,
        "qk_rope_head_dim": attention.rotary,
        "q_lora_rank": attention.query_rank,
        "o_lora_rank": attention.group_rank,
        "o_groups": attention.groups,
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "moe_intermediate_size": experts.width,
        "routed_scaling_factor": experts.factor,
        "swiglu_limit": experts.limit,
        "hc_mult": streams.streams,
        "hc_sinkhorn_iters": streams.iterations,
        "hc_eps": streams.eps,
        "rope_theta": attention.theta,
    }


def problems(arch: "TargetArchitecture", stated: Mapping[str, Any]) -> Iterator[str]:
    """What does not hold of `drafter.layer_sizes`: one line each."""
    for name, value in stated.items():
        if name not in NAMES:
            yield f"drafter.layer_sizes has {name!r}, which is no size of such layers; use one of: {', '.join(NAMES)}"
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            yield f"drafter.layer_sizes has {name!r}: {value}; it must be positive"
            return
        if name not in _NUMBERS and value != int(value):
            yield f"drafter.layer_sizes has {name!r}: {value}; it must be a whole number"
            return
    sizes = layer_sizes(arch, stated)
    if sizes.num_experts_per_tok > sizes.n_routed_experts:
        yield (
            f"drafter.layer_sizes: num_experts_per_tok {sizes.num_experts_per_tok} exceeds n_routed_experts "
            f"{sizes.n_routed_experts}; lower it"
        )
    if sizes.qk_rope_head_dim % 2 or sizes.qk_rope_head_dim > sizes.head_dim:
        yield (
            f"drafter.layer_sizes: qk_rope_head_dim {sizes.qk_rope_head_dim} must be even, and at most head_dim "
            f"{sizes.head_dim}; correct it"
        )
    if sizes.num_attention_heads % sizes.o_groups:
        yield (
            f"drafter.layer_sizes: o_groups {sizes.o_groups} does not divide num_attention_heads "
            f"{sizes.num_attention_heads}; use a divisor"
        )
