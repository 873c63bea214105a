"""Parts that descendants of Llama share: how their configs state RoPE and heads, and writing them again."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspark_jax.config_fields import ROPE, Unsupported, check_rope, check_values, irrelevant, must, part, read
from dspark_jax.errors import InputError
from dspark_jax.rope_scaling import NEEDED, OPTIONAL, problems, scaled
from dspark_jax.target.families.family import SIZES

if TYPE_CHECKING:
    from dspark_jax.architecture import TargetArchitecture

UNSCALED: Mapping[str, tuple[str, ...]] = {"default": ()}
SCALED: Mapping[str, tuple[str, ...]] = {kind: NEEDED[kind] + OPTIONAL.get(kind, ()) for kind in NEEDED}
"""Kinds of RoPE that a family reads, and the numbers of each."""

PLAIN = {
    "hidden_act": must("silu", note="of the MLP's gate"),
    "tie_word_embeddings": read("whether the LM head is the embedding", False, kind="flag"),
    "rope_parameters": read("see its own table; null where an older file has rope_theta"),
    "rope_scaling": read("the older name of rope_parameters", own=False),
    "rope_theta": read("of older files: base of the rotary frequencies", own=False, kind="number"),
    "partial_rotary_factor": must(1.0, note="heads turn whole", own=False, kind="number"),
    "per_layer_config": must({}, note="layers are alike", own=False),
}
"""Fields of such a config besides those of every language model."""

FULL_ONLY = {
    "use_sliding_window": must(
        False, note="every layer sees all earlier rows; true as well, where layer_types says so"
    ),
    "layer_types": must("full_attention", note="of every layer"),
    **irrelevant("sliding_window", "max_window_layers", note="use_sliding_window is false"),
}
"""Fields of a Qwen's windows."""


def rope_values(
    raw: Mapping[str, Any], where: str, instead: str, kinds: Mapping[str, tuple[str, ...]] = UNSCALED
) -> dict[str, Any]:
    """`rope_theta`, where it is stated in one of the two objects, and `own` with the kind and numbers of a scaled RoPE.

    Args:
      raw: the fields that are read.
      where: the file, for messages.
      instead: what to use instead of a model that is not supported.
      kinds: of RoPE that the family has.

    Raises:
      InputError: the objects differ, a number is missing or wrong, or the kind is not supported.
    """
    stated = list[Mapping[str, Any]]()
    for name in ("rope_scaling", "rope_parameters"):
        rope = part(raw, name, where)
        check_values(rope, ROPE, where)
        check_rope(rope, kinds, where)
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise Unsupported(where, f"{name} by kind of layers", f"use {instead}")
        if rope and rope not in stated:
            stated.append(rope)
    if len(stated) > 1:
        raise Unsupported(where, "rope_scaling beside another rope_parameters", "keep the right one of the two")
    rope = stated[0] if stated else {}
    values = {} if rope.get("rope_theta") is None else {"rope_theta": rope["rope_theta"]}
    kind = check_rope(rope, kinds, where)
    return values if kind == "default" else values | {"own": _scaling(kind, rope, raw, where)}


def _scaling(kind: str, rope: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The kind of a scaled RoPE and its numbers, as a config states them."""
    numbers = {name: rope[name] for name in SCALED[kind] if rope.get(name) is not None}
    if "original_max_position_embeddings" in NEEDED[kind]:  # as transformers takes it where it is not stated
        numbers.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings", 0))
    for name, value in numbers.items():
        if not isinstance(value, int | float):
            raise InputError(f"{where}: {name} {value!r} of rope_type {kind!r} is not a number; download it again")
    for problem in problems(kind, numbers):
        raise InputError(f"{where}: {problem.replace('drafter.rope_scaling', 'its RoPE')}")
    return {"rope_type": kind, **numbers}


def rope_of(arch: "TargetArchitecture") -> dict[str, Any]:
    """`rope_parameters` as a config.json states them."""
    kind = arch.own.get("rope_type", "default")
    numbers = {name: arch.own[name] for name in SCALED[kind] if name in arch.own}
    return {"rope_theta": arch.rope_theta, "rope_type": kind, **numbers}


def turns_of(arch: "TargetArchitecture") -> tuple[tuple[float, ...], float]:
    """Factors of the frequencies of a head's pairs (empty: all 1), and of the scores."""
    rope = rope_of(arch)
    turns, factor = scaled(rope["rope_type"], rope, arch.head_dim, arch.rope_theta)
    return turns, factor * factor  # of queries and keys each


def heads(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of heads that a config does not state: as many keys and values as queries, which share the width D."""
    values, count = dict[str, Any](), raw.get("num_attention_heads")
    if raw.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = count
    if raw.get("head_dim") is None and raw.get("hidden_size") and count:
        values["head_dim"] = raw["hidden_size"] // count
    return values


def plain_config(arch: "TargetArchitecture", architecture: str) -> dict[str, Any]:
    """The fields as a config.json states them."""
    return {
        "architectures": [architecture],
        **{name: getattr(arch, name) for name in SIZES},
        "model_type": arch.model_type,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_parameters": rope_of(arch),
    }
