"""What becomes of the fields of a target's Hugging Face config: those that families share; each adds its own.

A field is read (it is a part of `TargetArchitecture`, or decides one), has to have the one value that is implemented
here, or cannot change the text that a frozen model computes. `tests/test_config_fields.py` walks through transformers'
config classes and through what their models read, and fails where one of them has a field that no list has.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from dspark_jax.errors import InputError, Unsupported
from dspark_jax.target import quantised


@dataclasses.dataclass(frozen=True)
class Field:
    """How a field is taken.

    Attributes:
      treatment: read, must (have one of `values`) or irrelevant.
      note: where it goes, what else would be needed, or why it does not matter.
      values: that are implemented, where it must have one of them.
      absent: what transformers takes where the file does not have it. None: null, or there has to be a value.
      own: a field of transformers' config class; else a key of older files, or one that every class accepts.
      kind: what it has to be where it is not null: size (a positive whole number), number (a positive one) or flag;
        empty: not checked.
      zero: a number may be 0 as well, which is none.
    """

    treatment: str
    note: str
    values: tuple[Any, ...] = ()
    absent: Any = None
    own: bool = True
    kind: str = ""
    zero: bool = False


def read(note: str, absent: Any = None, *, own: bool = True, kind: str = "", zero: bool = False) -> Field:
    """A field that is read."""
    return Field("read", note, (), absent, own, kind, zero)


def must(*values: Any, note: str, absent: Any = None, own: bool = True, kind: str = "") -> Field:
    """A field that must have one of these values."""
    return Field("must", note, values, values[0] if absent is None else absent, own, kind)


def irrelevant(*names: str, note: str, own: bool = True) -> dict[str, Field]:
    """Fields that do not matter, for one reason."""
    return {name: Field("irrelevant", note, own=own) for name in names}


EVERY_CLASS = {
    "model_type": read("decides the family", own=False),
    **irrelevant("architectures", "transformers_version", note="model_type decides the family"),
    **dict.fromkeys(
        ("quantization_config", "compression_config"),
        read("how weights are stored; see quantised checkpoints", own=False),
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
    "vocab_size": read("rows of embedding and LM head", kind="size"),
    "hidden_size": read("width of the residual stream", kind="size"),
    "intermediate_size": read("width of the MLP", kind="size"),
    "num_hidden_layers": read("number of layers", kind="size"),
    "num_attention_heads": read("query heads", kind="size"),
    "num_key_value_heads": read("key and value heads; null in a Qwen3 config: as many as query heads", kind="size"),
    "rms_norm_eps": read("of every norm", kind="number"),
    "max_position_embeddings": read("longest sequence", kind="size"),
    "attention_bias": must(False, note="linear layers have no bias"),
    "is_causal": must(True, note="a row sees earlier rows only; of a drafter it is about its blocks", own=False),
    **irrelevant("attention_dropout", note="a frozen model drops nothing"),
    **irrelevant("pad_token_id", "bos_token_id", note="tokens come from the tokenizer; the padding row is a row"),
    **irrelevant("eos_token_id", note="answers end at the tokens of generation_config.json and the tokenizer"),
    **irrelevant("use_cache", note="what a call returns"),
    **irrelevant("tie_last_hidden_states", note="features are the raw outputs of layers", own=False),
}
"""Fields of every language model."""

ROPE = {
    "rope_theta": read("base of the rotary frequencies", kind="number"),
    "rope_type": must("default", note="others, where a family has them, are in its section; type in older files"),
    "partial_rotary_factor": must(1.0, note="read where rope_type is proportional", kind="number"),
    "factor": must(1.0, note="of proportional, and read where rope_type is linear, llama3 or yarn; default has none"),
    **irrelevant(
        "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor",
        "high_freq_factor", "mscale", "mscale_all_dim", "truncate",
        note="read where rope_type is llama3 or yarn, as far as that has them; default has none",
    ),
    **irrelevant("short_factor", "long_factor", note="of longrope, which is refused"),
    **irrelevant("mrope_section", note="rows of text have the same position on every axis"),
}  # fmt: skip
"""Keys of `rope_parameters`."""

_WHOLE = {"full_attention"}

_DRAFTERS = {"block_size", "target_layer_ids", "dflash_config", "dspark_config", "eagle_aux_hidden_state_layer_ids"}
"""Keys that a drafter has and a target has not."""


def refuse_unsupported(raw: Mapping[str, Any], fields: Mapping[str, Field], instead: str, where: str) -> None:
    """Refuses a config in which a field has another value than those that are implemented.

    Args:
      raw: content of the file; of a model with other modalities, of its `text_config`.
      fields: its family's list.
      instead: what to use instead, e.g. "a plain Qwen3 model".
      where: the file, for messages.

    Raises:
      Unsupported: names the first such field and its value.
    """
    refuse_quantised(raw, where)
    for name, field in fields.items():
        if field.treatment != "must" or (name == "is_causal" and raw.keys() & _DRAFTERS):
            continue
        if name == "use_sliding_window" and "layer_types" in fields and set(raw.get("layer_types") or ()) == _WHOLE:
            continue  # which only says what absent layer_types mean
        value = raw[name] if raw.get(name) is not None else field.absent
        values = value if name == "layer_types" and isinstance(value, list) else [value]
        for one in values:
            if one not in field.values:
                stated = "" if raw.get(name) is not None else " (which an absent field means)"
                remedy = f"use {instead}, whose {name} is {json.dumps(field.values[0])}"
                raise Unsupported(where, f"{name} {json.dumps(one)}{stated}", remedy)


def refuse_quantised(raw: Mapping[str, Any], where: str) -> None:
    """Refuses a config that says that the weights are quantised in a way that is not read here.

    Raises:
      InputError: see `quantised.of_config`.
    """
    quantised.of_config(raw, where)


def check_rope(rope: Mapping[str, Any], kinds: Mapping[str, tuple[str, ...]], where: str) -> str:
    """The kind of RoPE, one of `kinds`, of which each has the keys that it reads besides `rope_theta`.

    Raises:
      Unsupported: it is of another kind, or a key says what this kind does not do here.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"  # older files call it `type`
    if kind not in kinds:
        raise Unsupported(where, f"rope_type {kind!r}", f"use a model whose rope_type is {' or '.join(kinds)}")
    for name, value in rope.items():
        field = ROPE.get(name)
        if name == "rope_type" or name in kinds[kind] or field is None or field.treatment != "must" or value is None:
            continue
        if value not in field.values:
            raise Unsupported(where, f"{name} {json.dumps(value)} of rope_type {kind!r}", "use a model without it")
    return kind


def check_values(raw: Mapping[str, Any], fields: Mapping[str, Field], where: str) -> None:
    """Refuses sizes that are not positive whole numbers, other numbers that are none, and flags; null is absent.

    Raises:
      InputError: names the first such field and its value.
    """
    for name, field in fields.items():
        value = raw.get(name)
        if not field.kind or value is None or (field.zero and value == 0 and not isinstance(value, bool)):
            continue
        if field.kind == "flag":
            good, wanted = isinstance(value, bool), "neither true nor false"
        else:
            whole = field.kind == "size"
            good = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            good, wanted = good and 0 < value < math.inf, f"not a positive {'whole ' if whole else ''}number"
        if not good:
            raise InputError(f"{where}: {name} {json.dumps(value)} is {wanted}; download it again")


def part(raw: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """A nested object of a config; empty where it is absent or null.

    Raises:
      InputError: it is something else.
    """
    found = raw.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise InputError(f"{where}: {name} {json.dumps(found)} is not an object; download it again")
    return found or {}


def require(values: Mapping[str, Any], names: Iterable[str], model_type: str, where: str) -> None:
    """Refuses a config without one of these fields.

    Raises:
      InputError: names those that are missing.
    """
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}; this is not a complete {model_type} config.json")
