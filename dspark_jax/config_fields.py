"""What becomes of every field of a target's Hugging Face config, family by family.

A field is read (it is a part of `TargetArchitecture`, or decides one), has to have the one value that is implemented
here, or cannot change the text that a frozen model computes. `tests/test_config_fields.py` walks through transformers'
config classes and through what their models read, and fails where one of them has a field that is not listed here.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from dspark_jax.errors import InputError


class Unsupported(InputError):
    """A model of a known family that uses what has no implementation here; `what` names it."""

    def __init__(self, where: str, what: str, remedy: str):
        super().__init__(f"{where}: {what} is not supported; {remedy}")
        self.what = what


@dataclasses.dataclass(frozen=True)
class Field:
    """How a field is taken.

    Attributes:
      treatment: read, must (have one of `values`) or irrelevant.
      note: where it goes, what else would be needed, or why it does not matter.
      values: that are implemented, where it must have one of them.
      absent: what transformers takes where the file does not have it. None: null, or there has to be a value.
      own: a field of transformers' config class; else a key of older files, or one that every class accepts.
    """

    treatment: str
    note: str
    values: tuple[Any, ...] = ()
    absent: Any = None
    own: bool = True


def read(note: str, absent: Any = None, *, own: bool = True) -> Field:
    """A field that is read."""
    return Field("read", note, (), absent, own)


def must(*values: Any, note: str, absent: Any = None, own: bool = True) -> Field:
    """A field that must have one of these values."""
    return Field("must", note, values, values[0] if absent is None else absent, own)


def irrelevant(*names: str, note: str, own: bool = True) -> dict[str, Field]:
    """Fields that do not matter, for one reason."""
    return {name: Field("irrelevant", note, own=own) for name in names}


EVERY_CLASS = {
    "model_type": read("decides the family", own=False),
    **irrelevant("architectures", "transformers_version", note="model_type decides the family"),
    **dict.fromkeys(
        ("quantization_config", "compression_config"),
        must(None, {}, note="weights are in float32, float16 or bfloat16", own=False),
    ),
    **irrelevant("dtype", note="the files say how weights are stored, target.dtype what is computed with"),
    **irrelevant("torch_dtype", note="the old name of dtype", own=False),
    **irrelevant("output_hidden_states", "return_dict", note="what a call returns"),
    **irrelevant("id2label", "label2id", "problem_type", note="of classifiers"),
    **irrelevant("chunk_size_feed_forward", "is_encoder_decoder", note="the model's code does not read it"),
    **irrelevant("_attn_implementation", "attn_implementation", note="which kernel computes the same", own=False),
    **irrelevant("auto_map", note="code that comes with a model is never run", own=False),
    **irrelevant("initializer_range", note="weights are loaded"),
}
"""Fields that every config has."""

COMMON = {
    **EVERY_CLASS,
    "vocab_size": read("rows of embedding and LM head"),
    "hidden_size": read("width of the residual stream"),
    "intermediate_size": read("width of the MLP"),
    "num_hidden_layers": read("number of layers"),
    "num_attention_heads": read("query heads"),
    "num_key_value_heads": read("key and value heads; null in a Qwen3 config: as many as query heads"),
    "rms_norm_eps": read("of every norm"),
    "max_position_embeddings": read("longest sequence"),
    "attention_bias": must(False, note="linear layers have no bias"),
    "is_causal": must(True, note="a row sees earlier rows only; of a drafter it is about its blocks", own=False),
    **irrelevant("attention_dropout", note="a frozen model drops nothing"),
    **irrelevant("pad_token_id", "bos_token_id", note="tokens come from the tokenizer; the padding row is a row"),
    **irrelevant("eos_token_id", note="answers end at the tokens of generation_config.json and the tokenizer"),
    **irrelevant("use_cache", note="what a call returns"),
    **irrelevant("tie_last_hidden_states", note="features are the raw outputs of layers", own=False),
}
"""Fields of every language model."""

QWEN3 = {
    **COMMON,
    "hidden_act": must("silu", note="of the MLP's gate"),
    "head_dim": read("width of a head", 128),
    "tie_word_embeddings": read("whether the LM head is the embedding", False),
    "rope_parameters": read("see its own table; null where an older file has rope_theta"),
    "rope_scaling": read("the older name of rope_parameters", own=False),
    "rope_theta": read("of older files: base of the rotary frequencies", own=False),
    "partial_rotary_factor": must(1.0, note="heads turn whole", own=False),
    "use_sliding_window": must(False, note="every layer sees all earlier rows"),
    "layer_types": must("full_attention", note="of every layer"),
    "per_layer_config": must({}, note="layers are alike", own=False),
    **irrelevant("sliding_window", "max_window_layers", note="use_sliding_window is false"),
}
"""Fields of `Qwen3Config`."""

GEMMA4 = {
    **COMMON,
    "hidden_activation": must("gelu_pytorch_tanh", note="of the MLP's gate"),
    "head_dim": read("width of the sliding layers' heads", 256),
    "tie_word_embeddings": read("whether the LM head is the embedding; the whole model's and the text's agree", True),
    "rope_parameters": read("see its own table, one for sliding_attention and one for full_attention"),
    "layer_types": read("which layers have a window; the last one has none"),
    "sliding_window": read("rows that sliding layers see", 512),
    "final_logit_softcapping": read("cap of the logits"),
    "attention_k_eq_v": read("whether the full layers' values are their raw keys", False),
    "global_head_dim": read("width of the full layers' heads", 512, own=False),
    "num_global_key_value_heads": read("key and value heads of the full layers", own=False),
    "per_layer_config": read("the newer form of the two above: head_dim and num_key_value_heads", own=False),
    "use_bidirectional_attention": must(None, "vision", note="text is causal"),
    "hidden_size_per_layer_input": must(0, note="layers have no inputs of their own", absent=256),
    "num_kv_shared_layers": must(0, note="every layer has its own keys and values"),
    "enable_moe_block": must(False, note="no experts"),
    **irrelevant("use_double_wide_mlp", note="of layers that share keys and values"),
    **irrelevant("vocab_size_per_layer_input", note="hidden_size_per_layer_input is 0"),
    **irrelevant("num_experts", "top_k_experts", "moe_intermediate_size", note="enable_moe_block is false"),
    "rope_scaling": must(None, {}, note="rope_parameters says it; transformers would take this one", own=False),
    **irrelevant("rope_theta", "partial_rotary_factor", note="this family has them in rope_parameters", own=False),
}
"""Fields of `Gemma4TextConfig`: the `text_config` of a model with other modalities, or the whole file."""

GEMMA4_UNIFIED = {
    **GEMMA4,
    "sliding_window": dataclasses.replace(GEMMA4["sliding_window"], absent=1024),
    "use_bidirectional_attention": must("vision", None, note="text is causal"),
    "hidden_size_per_layer_input": must(0, note="layers have no inputs of their own", own=False),
    "enable_moe_block": must(False, note="no experts", own=False),
    **irrelevant("num_experts", "top_k_experts", "moe_intermediate_size", note="enable_moe_block is false", own=False),
    **irrelevant("vocab_size_per_layer_input", note="hidden_size_per_layer_input is 0", own=False),
}
"""Fields of `Gemma4UnifiedTextConfig`."""

GEMMA4_WHOLE = {
    **EVERY_CLASS,
    "text_config": read("the language model"),
    "tie_word_embeddings": read("must say what text_config says", True),
    **irrelevant("vision_config", "audio_config", note="the other modalities take no part in text"),
    **irrelevant("boi_token_id", "eoi_token_id", "image_token_id", "video_token_id", note="no text has them"),
    **irrelevant("boa_token_id", "eoa_token_index", "audio_token_id", note="no text has them"),
}
"""Fields of `Gemma4Config` and `Gemma4UnifiedConfig`, around the language model's."""

ROPE = {
    "rope_theta": read("base of the rotary frequencies"),
    "rope_type": must("default", note="proportional in Gemma 4's full layers; type in older files"),
    "partial_rotary_factor": must(1.0, note="read where rope_type is proportional"),
    "factor": must(1.0, note="of proportional; default has none"),
    **irrelevant(
        "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "short_factor",
        "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate",
        note="of rope types that are refused",
    ),
    **irrelevant("mrope_section", note="rows of text have the same position on every axis"),
}  # fmt: skip
"""Keys of `rope_parameters`."""

FAMILIES: Mapping[str, Mapping[str, Field]] = {
    "qwen3": QWEN3,
    "gemma4": GEMMA4,
    "gemma4_text": GEMMA4,
    "gemma4_unified": GEMMA4_UNIFIED,
    "gemma4_unified_text": GEMMA4_UNIFIED,
}
"""`model_type` -> the fields of its language model."""

_REMEDY = {"qwen3": "use a plain Qwen3 model", "gemma4": "use a dense Gemma 4 such as google/gemma-4-12B-it"}

_DRAFTERS = {"block_size", "target_layer_ids", "dflash_config", "dspark_config", "eagle_aux_hidden_state_layer_ids"}
"""Keys that a drafter has and a target has not."""


def refuse_unsupported(raw: Mapping[str, Any], model_type: str, where: str) -> None:
    """Refuses a config in which a field has another value than those that are implemented.

    Args:
      raw: content of the file; of a model with other modalities, of its `text_config`.
      model_type: a key of `FAMILIES`.
      where: the file, for messages.

    Raises:
      Unsupported: names the first such field and its value.
    """
    refuse_quantised(raw, where)
    for name, field in FAMILIES[model_type].items():
        if field.treatment != "must" or (name == "is_causal" and raw.keys() & _DRAFTERS):
            continue
        value = raw[name] if raw.get(name) is not None else field.absent
        values = value if name == "layer_types" and isinstance(value, list) else [value]
        for one in values:
            if one not in field.values:
                stated = "" if raw.get(name) is not None else " (which an absent field means)"
                remedy = f"{_REMEDY[model_type.partition('_')[0]]}, whose {name} is {json.dumps(field.values[0])}"
                raise Unsupported(where, f"{name} {json.dumps(one)}{stated}", remedy)


def refuse_quantised(raw: Mapping[str, Any], where: str) -> None:
    """Refuses a config that says that the weights are quantised.

    Raises:
      Unsupported: names the method.
    """
    for name in ("quantization_config", "compression_config"):
        stated = raw.get(name)
        if stated:
            method = stated.get("quant_method", "unknown") if isinstance(stated, Mapping) else stated
            remedy = "use the checkpoint in bfloat16 or float32"
            raise Unsupported(where, f"a quantised checkpoint ({name}: quant_method {json.dumps(method)})", remedy)


def check_rope(rope: Mapping[str, Any], kinds: tuple[str, ...], where: str) -> str:
    """The kind of RoPE, one of `kinds`.

    Raises:
      Unsupported: it is of another kind, or a key says what this kind does not do here.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"  # older files call it `type`
    if kind not in kinds:
        raise Unsupported(where, f"rope_type {kind!r}", f"use a model whose rope_type is {' or '.join(kinds)}")
    for name, value in rope.items():
        field = ROPE.get(name)
        partial = name == "partial_rotary_factor" and kind == "proportional"
        if name == "rope_type" or field is None or field.treatment != "must" or value is None or partial:
            continue
        if value not in field.values:
            raise Unsupported(where, f"{name} {json.dumps(value)} of rope_type {kind!r}", "use a model without it")
    return kind
