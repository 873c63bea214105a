"""Qwen3.5 and 3.6 text targets with experts (35B-A3B, 122B-A10B, 397B-A17B): a dense one with a mixture in every layer.

Every row goes through some of the experts, and through a shared one that has a gate.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspark_jax.config_fields import irrelevant, read
from dspark_jax.errors import InputError
from dspark_jax.target.families.family import FULL, FUSED_EXPERTS, ExpertShape, LayerShape, expert_weights
from dspark_jax.target.families.qwen3_5 import HYBRID, Qwen35
from dspark_jax.target.weights import Weight

if TYPE_CHECKING:
    from dspark_jax.architecture import TargetArchitecture

EXPERT_FIELDS = {
    "num_experts": read("experts of a layer", 256, kind="size"),
    "num_experts_per_tok": read("experts of a row", 8, kind="size"),
    "moe_intermediate_size": read("width of an expert", 512, kind="size"),
    "shared_expert_intermediate_size": read("width of the expert of all rows", 512, kind="size"),
}

QWEN3_5_MOE = {
    **HYBRID,
    **EXPERT_FIELDS,
    "intermediate_size": read("width of the MLP of drafters; absent: 3 hidden_size", own=False, kind="size"),
    "num_key_value_heads": read("key and value heads", 2, kind="size"),
    **irrelevant("output_router_logits", note="what a call returns"),
    **irrelevant("router_aux_loss_coef", note="of training"),
}
"""Fields of `Qwen3_5MoeTextConfig`."""


class Qwen35Moe(Qwen35):
    """Qwen3.5 with experts, with and without images; its drafters have the layers of a dense Qwen3."""

    name = "qwen3_5_moe"
    title = "Qwen3.5-MoE"
    configs = {"qwen3_5_moe": QWEN3_5_MOE, "qwen3_5_moe_text": QWEN3_5_MOE}
    architecture = "Qwen3_5MoeForCausalLM"
    fused = FUSED_EXPERTS

    def values(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """See `Family`."""
        values = super().values(raw, where)
        own = values["own"] | {name: raw[name] for name in EXPERT_FIELDS}
        if own["num_experts_per_tok"] > own["num_experts"]:
            raise InputError(
                f"{where}: num_experts_per_tok {own['num_experts_per_tok']} is above num_experts "
                f"{own['num_experts']}; download it again"
            )
        width = raw.get("intermediate_size") or 3 * raw["hidden_size"]
        return {**values, "own": own, "intermediate_size": width}

    def layer(self, arch: "TargetArchitecture", kind: str = FULL) -> LayerShape:
        """See `Family`."""
        count, chosen, width, shared = (arch.own[name] for name in EXPERT_FIELDS)
        experts = ExpertShape(count, chosen, width, normalised=True, shared=shared, shared_gated=True)
        return dataclasses.replace(super().layer(arch, kind), experts=experts)

    def layer_weights(self, arch: "TargetArchitecture", kind: str) -> Mapping[str, Weight]:
        """See `Family`."""
        found = super().layer_weights(arch, kind)
        others = {path: weight for path, weight in found.items() if not path.startswith("mlp.")}
        shared = {
            f"mlp.shared.{name}": Weight(f"layers.{{i}}.mlp.shared_expert.{name}_proj.weight", inputs=1)
            for name in ("gate", "up", "down")
        }
        gate = Weight("layers.{i}.mlp.shared_expert_gate.weight", inputs=1)
        return {**others, **expert_weights(arch.own["num_experts"]), **shared, "mlp.shared_gate": gate}
