"""Qwen3 dense targets (0.6B to 32B): the plain `Family`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspark_jax.config_fields import COMMON, read
from dspark_jax.target.families.family import Family
from dspark_jax.target.families.plain import FULL_ONLY, PLAIN, plain_config, rope_values

if TYPE_CHECKING:
    from dspark_jax.architecture import TargetArchitecture

QWEN3 = {**COMMON, **PLAIN, "head_dim": read("width of a head", 128, kind="size"), **FULL_ONLY}
"""Fields of `Qwen3Config`."""


class Qwen3(Family):
    """Qwen3; what a model without a definition here is to a drafter, too."""

    name = "qwen3"
    title = "Qwen3"
    configs = {"qwen3": QWEN3}
    instead = "a plain Qwen3 model"
    drafter_class = "Qwen3"
    long_drafters = True
    drafter_fields = (
        "num_attention_heads", "intermediate_size", "rms_norm_eps", "rope_theta", "num_key_value_heads", "head_dim"
    )  # fmt: skip
    dflash_class = "DFlashDraftModel"
    eagle3_class = "Eagle3Qwen3ForCausalLM"

    def values(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """See `Family`."""
        values = rope_values(raw, where, self.instead)
        if "num_key_value_heads" in raw and raw["num_key_value_heads"] is None:
            values["num_key_value_heads"] = raw.get("num_attention_heads")
        return values

    def to_hf(self, arch: "TargetArchitecture") -> dict[str, Any]:
        """See `Family`."""
        return plain_config(arch, "Qwen3ForCausalLM")

    def drafter_config(self, config: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`."""
        return {**config, "use_sliding_window": False, "sliding_window": None}

    def drafter_rope(self, arch: "TargetArchitecture") -> dict[str, Any]:
        """See `Family`."""
        rope = {"rope_theta": arch.rope_theta, "rope_type": "default"}
        return {"rope_theta": arch.rope_theta, "rope_scaling": None, "rope_parameters": rope}
