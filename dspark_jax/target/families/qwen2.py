"""Qwen2 and Qwen2.5 targets: biases on queries, keys and values, and no norms of them."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspark_jax.config_fields import COMMON, irrelevant, read
from dspark_jax.target.families.family import FULL, LayerShape
from dspark_jax.target.families.llama import NORMLESS, Llama
from dspark_jax.target.families.plain import FULL_ONLY, PLAIN, plain_config
from dspark_jax.target.weights import Weight

if TYPE_CHECKING:
    from dspark_jax.architecture import TargetArchitecture

QWEN2 = {
    **COMMON,
    **PLAIN,
    "num_key_value_heads": read("key and value heads; null: as many as query heads", 32, kind="size"),
    "head_dim": read("width of a head; absent: hidden_size / num_attention_heads", own=False, kind="size"),
    "rms_norm_eps": read("of every norm", 1e-6, kind="number"),
    "max_position_embeddings": read("longest sequence", 32768, kind="size"),
    **FULL_ONLY,
    **irrelevant("attention_bias", note="queries, keys and values always have one, the output has none", own=False),
}
"""Fields of `Qwen2Config`."""

BIASES = {
    f"attention.{name}_bias": Weight(f"layers.{{i}}.self_attn.{name[0]}_proj.bias", flat=True)
    for name in ("query", "key", "value")
}
"""Parameters of such layers besides those of a Llama."""


class Qwen2(Llama):
    """Qwen2 and Qwen2.5; their drafters have the layers of a Qwen3 of their size, without biases."""

    name = "qwen2"
    title = "Qwen2"
    configs = {"qwen2": QWEN2}
    instead = "a plain Qwen2 or Qwen2.5 model"

    def to_hf(self, arch: "TargetArchitecture") -> dict[str, Any]:
        """See `Family`."""
        return plain_config(arch, "Qwen2ForCausalLM")

    def layer(self, arch: "TargetArchitecture", kind: str = FULL) -> LayerShape:
        """See `Family`."""
        shape = super().layer(arch, kind)
        return dataclasses.replace(shape, attention=dataclasses.replace(shape.attention, biases=True))

    def layer_weights(self, arch: "TargetArchitecture", kind: str) -> Mapping[str, Weight]:
        """See `Family`."""
        return NORMLESS | BIASES
