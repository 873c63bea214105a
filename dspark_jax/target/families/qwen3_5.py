"""Qwen3.5 and 3.6 text targets, dense: linear attention with a state in most layers, full attention in every fourth.

The full layers' heads have gates, a quarter of them turns, and the weights of norms are what is to be added to 1.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from dspark_jax.config_fields import COMMON, EVERY_CLASS, Unsupported, irrelevant, must, part, read, refuse_quantised
from dspark_jax.errors import InputError
from dspark_jax.target.families.family import (
    FULL,
    LAYER_WEIGHTS,
    LINEAR,
    SIZES,
    DeltaShape,
    Family,
    LayerShape,
)
from dspark_jax.target.families.plain import PLAIN, heads, plain_config, rope_of, rope_values
from dspark_jax.target.weights import Weight

if TYPE_CHECKING:
    from dspark_jax.architecture import TargetArchitecture

LINEAR_FIELDS = {
    "linear_num_key_heads": read("key heads of linear attention", 16, kind="size"),
    "linear_num_value_heads": read("value heads of linear attention, a multiple of them", 32, kind="size"),
    "linear_key_head_dim": read("width of a key head", 128, kind="size"),
    "linear_value_head_dim": read("width of a value head", 128, kind="size"),
    "linear_conv_kernel_dim": read("rows that the convolution before it sees", 4, kind="size"),
}

HYBRID = {
    **COMMON,
    **PLAIN,
    **LINEAR_FIELDS,
    "num_key_value_heads": read("key and value heads", 4, kind="size"),
    "head_dim": read("width of a head of full attention", 256, kind="size"),
    "rms_norm_eps": read("of every norm", 1e-6, kind="number"),
    "max_position_embeddings": read("longest sequence", 32768, kind="size"),
    "layer_types": read("which layers have linear attention"),
    "full_attention_interval": read(
        "of files without layer_types: every so many layers, the last of them, has full attention; absent: 4",
        own=False,
        kind="size",
    ),
    "partial_rotary_factor": read(
        "share of a head that turns, where rope_parameters does not say it; absent: 0.25", own=False, kind="number"
    ),
    "attn_output_gate": must(True, note="heads of full attention have gates", own=False),
    "output_gate_type": must("swish", "silu", note="of linear attention's gates", own=False),
    "mamba_ssm_dtype": must("float32", note="of the states", own=False),
    **irrelevant("sliding_window", note="no layer has a window", own=False),
    **irrelevant("mlp_only_layers", note="the model's code does not read it", own=False),
    **irrelevant("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", note="of its own drafter", own=False),
}
"""Fields that the dense and the mixture models share."""

QWEN3_5 = {**HYBRID, "intermediate_size": read("width of the MLP", 12288, kind="size")}
"""Fields of `Qwen3_5TextConfig`."""

QWEN3_5_WHOLE = {
    **EVERY_CLASS,
    **irrelevant("initializer_range", note="weights are loaded", own=False),
    "text_config": read("the language model"),
    "tie_word_embeddings": read(
        "whether the LM head is the embedding; text_config may say the same", False, kind="flag"
    ),
    **irrelevant("vision_config", note="images take no part in text"),
    **irrelevant("language_model_only", note="images take no part in text", own=False),
    **irrelevant("image_token_id", "video_token_id", note="no text has them"),
    **irrelevant("vision_start_token_id", "vision_end_token_id", note="no text has them"),
}
"""Fields of `Qwen3_5Config`, around the language model's."""

_MIXER = "layers.{i}.linear_attn."
_OWN = tuple(LINEAR_FIELDS)


def delta_weights(shape: DeltaShape) -> dict[str, Weight]:
    """Parameters of linear attention and their tensors."""
    return {
        "attention.mixed": Weight(_MIXER + "in_proj_qkv.weight", inputs=1, pieces=shape.pieces),
        "attention.gate": Weight(_MIXER + "in_proj_z.weight", inputs=1),
        "attention.rate": Weight(_MIXER + "in_proj_b.weight", inputs=1),
        "attention.decay": Weight(_MIXER + "in_proj_a.weight", inputs=1),
        "attention.filters": Weight(_MIXER + "conv1d.weight", pieces=shape.pieces, filters=True),
        "attention.decay_scale": Weight(_MIXER + "A_log", flat=True, exact=True),
        "attention.decay_bias": Weight(_MIXER + "dt_bias", flat=True, exact=True),
        "attention.norm": Weight(_MIXER + "norm.weight", exact=True),
        "attention.out": Weight(_MIXER + "out_proj.weight", inputs=2),
    }


class Qwen35(Family):
    """Qwen3.5, with and without images; its drafters have the layers of a Qwen3 of its size."""

    name = "qwen3_5"
    title = "Qwen3.5"
    configs = {"qwen3_5": QWEN3_5, "qwen3_5_text": QWEN3_5}
    instead = "a plain Qwen3.5 or 3.6 model"
    stacks = {LINEAR: "linear_layers", FULL: "layers"}
    identity_fields = ("model_type", *SIZES, "layer_types", "partial_rotary_factor")
    architecture = "Qwen3_5ForCausalLM"

    def language_model(self, raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """See `Family`; `text_config`, where there are images."""
        text = part(raw, "text_config", where)
        if not text:
            return raw
        refuse_quantised(raw, where)
        outer, inner = raw.get("tie_word_embeddings"), text.get("tie_word_embeddings")
        if None not in (outer, inner) and outer != inner:
            raise InputError(
                f"{where}: tie_word_embeddings is {json.dumps(outer)}, and {json.dumps(inner)} in text_config; "
                "write into both whether the LM head is the embedding"
            )
        return text if outer is None else {**text, "tie_word_embeddings": outer}

    def values(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """See `Family`."""
        values: dict[str, Any] = {"rope_theta": raw.get("rope_theta") or 1e4}
        values |= rope_values(raw, where, self.instead, {"default": ("partial_rotary_factor",)})
        rope = part(raw, "rope_parameters", where) or part(raw, "rope_scaling", where)
        share = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 0.25
        turning = raw["head_dim"] * share
        if share > 1 or int(turning) % 2 or int(turning) != turning:
            raise InputError(
                f"{where}: partial_rotary_factor {share} of head_dim {raw['head_dim']} gives no whole pairs; "
                "download it again"
            )
        own = {name: raw[name] for name in _OWN}
        if own["linear_num_value_heads"] % own["linear_num_key_heads"]:
            raise InputError(
                f"{where}: linear_num_value_heads {own['linear_num_value_heads']} is no multiple of "
                f"linear_num_key_heads {own['linear_num_key_heads']}; download it again"
            )
        values |= {"partial_rotary_factor": share, "layer_types": _kinds(raw, where)}
        return {**values, **heads(raw), "own": own}

    def to_hf(self, arch: "TargetArchitecture") -> dict[str, Any]:
        """See `Family`."""
        config = plain_config(arch, self.architecture) | {"model_type": f"{arch.model_type}_text"}
        rope = {**rope_of(arch), "partial_rotary_factor": arch.partial_rotary_factor}
        return config | {"rope_parameters": rope, "layer_types": list(arch.layer_types), **arch.own}

    def kinds(self, arch: "TargetArchitecture") -> tuple[str, ...]:
        """See `Family`."""
        return tuple(arch.layer_types)

    def layer(self, arch: "TargetArchitecture", kind: str = FULL) -> LayerShape:
        """See `Family`."""
        rotary = int(arch.head_dim * arch.partial_rotary_factor)
        attention = dataclasses.replace(super().layer(arch, kind).attention, rotary=rotary, gated=True)
        return LayerShape(attention, delta=_delta(arch) if kind == LINEAR else None, centred=True)

    def layer_weights(self, arch: "TargetArchitecture", kind: str) -> Mapping[str, Weight]:
        """See `Family`."""
        if kind == FULL:
            return LAYER_WEIGHTS
        others = {path: weight for path, weight in LAYER_WEIGHTS.items() if not path.startswith("attention.")}
        return others | delta_weights(_delta(arch))

    def prefix(self, names: Collection[str]) -> str:
        """See `Family`; a model with images has one more part in its names."""
        prefix = "model.language_model."
        return prefix if any(name.startswith(prefix) for name in names) else "model."

    def ignores(self, name: str) -> bool:
        """See `Family`; what belongs to images, or to the drafter that comes with it."""
        return super().ignores(name) or name.startswith(("model.visual.", "mtp."))


def _delta(arch: "TargetArchitecture") -> DeltaShape:
    """What linear attention is like."""
    heads, values, width, value_width, taps = (arch.own[name] for name in _OWN)
    return DeltaShape(heads, values // heads, width, value_width, taps)


def _kinds(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The kind of every layer."""
    layers, every = raw["num_hidden_layers"], raw.get("full_attention_interval") or 4
    kinds = raw.get("layer_types") or [LINEAR if (i + 1) % every else FULL for i in range(layers)]
    kinds = list(kinds) if isinstance(kinds, list | tuple) else [json.dumps(kinds)]
    if len(kinds) != layers or set(map(str, kinds)) - {FULL, LINEAR}:
        raise InputError(
            f"{where}: layer_types has {len(kinds)} entries {sorted(set(map(str, kinds)))} for {layers} layers; "
            f"one of {LINEAR} and {FULL} is needed for each"
        )
    if FULL not in kinds:
        raise Unsupported(where, "layer_types or full_attention_interval without any layer of full attention",
                          "use a plain Qwen3.5 or 3.6 model")  # fmt: skip
    return tuple(kinds)
