"""Qwen3 dense targets (0.6B to 32B): the plain `Target`, with its checkpoint's names."""

from dspark_jax.target.model import Target, TargetOutput
from dspark_jax.target.weights import Weight, behind

__all__ = ["LAYER_WEIGHTS", "WEIGHTS", "Qwen3", "TargetOutput", "Weight"]

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
"""Parameters of a `target.layers.Layer` stack, for targets (with the prefix `model.`) and drafters (without)."""

WEIGHTS = {
    "embedding": Weight("model.embed_tokens.weight"),
    "norm": Weight("model.norm.weight"),
    "lm_head": Weight("lm_head.weight"),
} | {f"layers.{path}": weight for path, weight in behind("model.", LAYER_WEIGHTS).items()}
"""Every parameter of `Qwen3` and the tensor it is loaded from. A tied checkpoint may carry lm_head all the same."""


class Qwen3(Target):
    """A Qwen3 language model."""
