"""Llama targets (2 to 3.3, and what others have made in their layout): no query and key norms, scaled RoPE."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspark_jax.config_fields import COMMON, irrelevant, must, read
from dspark_jax.target.families.family import FULL, LAYER_WEIGHTS, Family, LayerShape
from dspark_jax.target.families.plain import PLAIN, SCALED, heads, plain_config, rope_values, turns_of
from dspark_jax.target.weights import Weight

if TYPE_CHECKING:
    from dspark_jax.architecture import TargetArchitecture

LLAMA = {
    **COMMON,
    **PLAIN,
    "num_key_value_heads": read("key and value heads; null: as many as query heads", kind="size"),
    "head_dim": read("width of a head; null: hidden_size / num_attention_heads", kind="size"),
    "rms_norm_eps": read("of every norm", 1e-6, kind="number"),
    "max_position_embeddings": read("longest sequence", 2048, kind="size"),
    "mlp_bias": must(False, note="the MLP's linear layers have no bias"),
    **irrelevant("pretraining_tp", note="how a training was split"),
    **irrelevant("sliding_window", note="no layer has a window", own=False),
}
"""Fields of `LlamaConfig`."""

NORMLESS = {path: weight for path, weight in LAYER_WEIGHTS.items() if not path.endswith(("query_norm", "key_norm"))}
"""Parameters of layers whose queries and keys pass no norm."""


class Llama(Family):
    """Llama; its drafters have the layers of a Qwen3 of its size."""

    name = "llama"
    title = "Llama"
    configs = {"llama": LLAMA}
    instead = "a plain Llama model"

    def values(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """See `Family`."""
        return {"rope_theta": raw.get("rope_theta") or 1e4} | rope_values(raw, where, self.instead, SCALED) | heads(raw)

    def to_hf(self, arch: "TargetArchitecture") -> dict[str, Any]:
        """See `Family`."""
        return plain_config(arch, "LlamaForCausalLM")

    def layer(self, arch: "TargetArchitecture", kind: str = FULL) -> LayerShape:
        """See `Family`."""
        turns, sharper = turns_of(arch)
        attention = super().layer(arch, kind).attention
        scale = attention.scale * sharper
        return LayerShape(dataclasses.replace(attention, scale=scale, turns=turns, norms=False))

    def layer_weights(self, arch: "TargetArchitecture", kind: str) -> Mapping[str, Weight]:
        """See `Family`."""
        return NORMLESS
