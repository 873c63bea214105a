"""Qwen3 dense targets (0.6B to 32B): the plain `Family`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspark_jax.config_fields import COMMON, ROPE, Unsupported, check_rope, check_values, irrelevant, must, part, read
from dspark_jax.target.families.family import SIZES, Family

if TYPE_CHECKING:
    from dspark_jax.architecture import TargetArchitecture

QWEN3 = {
    **COMMON,
    "hidden_act": must("silu", note="of the MLP's gate"),
    "head_dim": read("width of a head", 128, kind="size"),
    "tie_word_embeddings": read("whether the LM head is the embedding", False, kind="flag"),
    "rope_parameters": read("see its own table; null where an older file has rope_theta"),
    "rope_scaling": read("the older name of rope_parameters", own=False),
    "rope_theta": read("of older files: base of the rotary frequencies", own=False, kind="number"),
    "partial_rotary_factor": must(1.0, note="heads turn whole", own=False, kind="number"),
    "use_sliding_window": must(False, note="every layer sees all earlier rows"),
    "layer_types": must("full_attention", note="of every layer"),
    "per_layer_config": must({}, note="layers are alike", own=False),
    **irrelevant("sliding_window", "max_window_layers", note="use_sliding_window is false"),
}
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
        values, stated = dict[str, Any](), list[Mapping[str, Any]]()
        for name in ("rope_scaling", "rope_parameters"):
            rope = part(raw, name, where)
            check_values(rope, ROPE, where)
            check_rope(rope, {"default": ()}, where)
            if any(isinstance(value, Mapping) for value in rope.values()):
                raise Unsupported(where, f"{name} by kind of layers", "use a plain Qwen3 model")
            if rope and rope not in stated:
                stated.append(rope)
        if len(stated) > 1:
            raise Unsupported(where, "rope_scaling beside another rope_parameters", "keep the right one of the two")
        if stated and stated[0].get("rope_theta") is not None:
            values["rope_theta"] = stated[0]["rope_theta"]
        if "num_key_value_heads" in raw and raw["num_key_value_heads"] is None:
            values["num_key_value_heads"] = raw.get("num_attention_heads")
        return values

    def to_hf(self, arch: "TargetArchitecture") -> dict[str, Any]:
        """See `Family`."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": self.name,
            **{name: getattr(arch, name) for name in SIZES},
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_parameters": {"rope_theta": arch.rope_theta, "rope_type": "default"},
        }

    def drafter_config(self, config: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`."""
        return {**config, "use_sliding_window": False, "sliding_window": None}

    def drafter_rope(self, arch: "TargetArchitecture") -> dict[str, Any]:
        """See `Family`."""
        rope = {"rope_theta": arch.rope_theta, "rope_type": "default"}
        return {"rope_theta": arch.rope_theta, "rope_scaling": None, "rope_parameters": rope}
