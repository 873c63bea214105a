"""Qwen3 targets with experts (30B-A3B, 235B-A22B, Qwen3-Coder): a Qwen3 with a mixture in the place of most MLPs."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspark_jax.config_fields import COMMON, Unsupported, irrelevant, must, read
from dspark_jax.errors import InputError
from dspark_jax.target.families.family import (
    FULL,
    FUSED_EXPERTS,
    LAYER_WEIGHTS,
    ExpertShape,
    Family,
    LayerShape,
    expert_weights,
)
from dspark_jax.target.families.plain import PLAIN, SCALED, heads, plain_config, rope_values, turns_of
from dspark_jax.target.weights import Weight

if TYPE_CHECKING:
    from dspark_jax.architecture import TargetArchitecture

QWEN3_MOE = {
    **COMMON,
    **PLAIN,
    "num_key_value_heads": read("key and value heads", 4, kind="size"),
    "intermediate_size": read("width of the MLP of layers without experts, and of drafters", 6144, kind="size"),
    "head_dim": read("width of a head; absent: hidden_size / num_attention_heads", own=False, kind="size"),
    "rms_norm_eps": read("of every norm", 1e-6, kind="number"),
    "max_position_embeddings": read("longest sequence", 32768, kind="size"),
    "num_experts": read("experts of a layer, 128 if it has neither name", kind="size"),
    "num_local_experts": read("another name of num_experts", own=False, kind="size"),
    "num_experts_per_tok": read("experts of a row", 8, kind="size"),
    "moe_intermediate_size": read("width of an expert", 768, kind="size"),
    "norm_topk_prob": read("whether the weights of a row's experts add up to 1", False, kind="flag"),
    "decoder_sparse_step": read("every so many layers, the last of them, has experts", 1, kind="size"),
    "mlp_only_layers": read("layers that have none all the same"),
    "use_sliding_window": must(False, note="every layer sees all earlier rows"),
    **irrelevant("sliding_window", note="use_sliding_window is false"),
    **irrelevant("output_router_logits", note="what a call returns"),
    **irrelevant("router_aux_loss_coef", note="of training"),
}
"""Fields of `Qwen3MoeConfig`."""

DENSE = "full_attention_dense"
"""The kind of layers without experts."""

_OWN = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step")


class Qwen3Moe(Family):
    """Qwen3 with experts; its drafters have the layers of a dense Qwen3."""

    name = "qwen3_moe"
    title = "Qwen3-MoE"
    configs = {"qwen3_moe": QWEN3_MOE}
    instead = "a plain Qwen3-MoE model"
    stacks = {FULL: "layers", DENSE: "dense_layers"}
    fused = FUSED_EXPERTS

    def values(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """See `Family`."""
        values: dict[str, Any] = {"rope_theta": raw.get("rope_theta") or 1e4}
        values |= rope_values(raw, where, self.instead, SCALED)
        stated = {raw[name] for name in ("num_experts", "num_local_experts") if raw.get(name) is not None}
        if len(stated) > 1:
            raise InputError(f"{where}: num_experts and num_local_experts differ ({stated}); keep the right one")
        own = {"num_experts": stated.pop() if stated else 128}
        own |= {name: raw[name] for name in _OWN[1:]} | {"mlp_only_layers": raw.get("mlp_only_layers") or []}
        layers, dense = raw["num_hidden_layers"], own["mlp_only_layers"]
        if not isinstance(dense, list | tuple) or not all(type(i) is int and 0 <= i < layers for i in dense):
            raise InputError(f"{where}: mlp_only_layers {dense} is no list of numbers of layers below {layers}")
        own["mlp_only_layers"] = sorted(dense)
        if own["num_experts_per_tok"] > own["num_experts"]:
            raise InputError(
                f"{where}: num_experts_per_tok {own['num_experts_per_tok']} is above num_experts "
                f"{own['num_experts']}; download it again"
            )
        if FULL not in _kinds(own, layers):
            raise Unsupported(
                where, "mlp_only_layers or decoder_sparse_step without any layer with experts", "use a Qwen3"
            )
        return {**values, **heads(raw), "own": values.get("own", {}) | own}

    def to_hf(self, arch: "TargetArchitecture") -> dict[str, Any]:
        """See `Family`."""
        own = {name: arch.own[name] for name in (*_OWN, "mlp_only_layers")}
        return plain_config(arch, "Qwen3MoeForCausalLM") | own

    def kinds(self, arch: "TargetArchitecture") -> tuple[str, ...]:
        """See `Family`."""
        return _kinds(arch.own, arch.num_hidden_layers)

    def layer(self, arch: "TargetArchitecture", kind: str = FULL) -> LayerShape:
        """See `Family`."""
        turns, sharper = turns_of(arch)
        attention = super().layer(arch, kind).attention
        attention = dataclasses.replace(attention, scale=attention.scale * sharper, turns=turns)
        own = arch.own
        sizes = own["num_experts"], own["num_experts_per_tok"], own["moe_intermediate_size"], own["norm_topk_prob"]
        return LayerShape(attention, experts=ExpertShape(*sizes) if kind == FULL else None)

    def layer_weights(self, arch: "TargetArchitecture", kind: str) -> Mapping[str, Weight]:
        """See `Family`."""
        if kind == DENSE:
            return LAYER_WEIGHTS
        others = {path: weight for path, weight in LAYER_WEIGHTS.items() if not path.startswith("mlp.")}
        return others | expert_weights(arch.own["num_experts"])


def _kinds(own: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """The kind of every layer."""
    every, dense = own["decoder_sparse_step"], own["mlp_only_layers"]
    return tuple(DENSE if (i + 1) % every or i in dense else FULL for i in range(layers))
