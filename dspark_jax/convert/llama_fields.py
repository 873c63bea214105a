"""EAGLE-3 drafters with Llama's layers: the fields of their config.json, each read, refused or irrelevant.

Such a layer is Qwen3's without norms of queries and keys, so it is described to the rest of the package as one.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dspark_jax.config_rules import EAGLE3_NORMS
from dspark_jax.target.families.qwen3 import QWEN3

_DEFAULTS = {"intermediate_size": 11008, "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 2048}
"""Of LlamaConfig, where they differ from Qwen3's or Qwen3 has none."""

_LLAMA = {"mlp_bias": False, "bias": False}
"""Fields that Qwen3 has not, and the only value of each that is implemented."""

_READ = {
    "draft_vocab_size", "eagle_aux_hidden_state_layer_ids", "eagle_config", "ttt_length", "target_hidden_size",
    "use_aux_norm", "target_layer_ids", "num_aux_hidden_states", *EAGLE3_NORMS, *_LLAMA,
    "speculators_model_type", "speculators_config", "transformer_layer_config",
}  # fmt: skip
_IRRELEVANT = {
    "pretraining_tp", "_name_or_path", "num_target_layers", "num_anchors", "step_loss_decay",
    "draft_num_hidden_layers", "target_model_name_or_path", "target_model_type", "target_vocab_size",
    "speculators_version", "embed_requires_grad", "has_no_defaults_at_init", "mode",
}  # fmt: skip
"""Notes, what a call returns, and how training went."""

_EAGLE_CONFIG = {"eagle_aux_hidden_state_layer_ids", "use_aux_hidden_state", *EAGLE3_NORMS}


def unread_fields(raw: Mapping[str, Any], layers: Mapping[str, Any]) -> Iterator[str]:
    """Fields of such a config that nobody here has read: what they mean may change every draft."""
    nested = raw.get("eagle_config") or {}
    known = set(QWEN3) | _READ | _IRRELEVANT
    for name in sorted({*raw, *layers} - known):
        yield f"config field {name}"
    for name in sorted(set(nested) - _EAGLE_CONFIG):
        yield f"config field eagle_config.{name}"
    if nested.get("use_aux_hidden_state") is False:
        yield "eagle_config.use_aux_hidden_state false"
    for name, value in _LLAMA.items():
        stated = {**layers, **raw}.get(name)
        if stated not in (None, value):
            yield f"{name} {stated}"


def as_qwen3(layers: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that both have, with what an absent one means to Llama."""
    found = {name: value for name, value in layers.items() if name in QWEN3 and value is not None}
    found |= {name: value for name, value in _DEFAULTS.items() if name not in found}
    heads = found.get("num_attention_heads")
    found.setdefault("num_key_value_heads", heads)
    if isinstance(heads, int) and heads > 0 and isinstance(found.get("hidden_size"), int):
        found.setdefault("head_dim", found["hidden_size"] // heads)
    ropes = [found.get(name) for name in ("rope_parameters", "rope_scaling")]
    if not any(isinstance(rope, Mapping) and rope.get("rope_theta") for rope in ropes):
        found.setdefault("rope_theta", 10000.0)
    layout = {"num_hidden_layers": found.get("num_hidden_layers") or 1, "tie_word_embeddings": False}
    return found | layout | {"model_type": "qwen3", "layer_types": None}
