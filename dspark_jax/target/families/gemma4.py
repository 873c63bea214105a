"""Gemma 4 text targets (12B): what differs from the plain `Family` (traps 21 to 23).

Sliding and global layers of different head widths, values that are the raw keys, scale-less value norms, partial
rotation, norms after attention and MLP, layer scalars, scaled embeddings, capped logits, and the names.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from dspark_jax.config_fields import (
    COMMON,
    EVERY_CLASS,
    ROPE,
    Unsupported,
    check_rope,
    check_values,
    irrelevant,
    must,
    part,
    read,
    refuse_quantised,
)
from dspark_jax.errors import InputError
from dspark_jax.target.families.family import FULL, SIZES, SLIDING, AttentionShape, Family, LayerShape
from dspark_jax.target.families.family import LAYER_WEIGHTS as PLAIN
from dspark_jax.target.weights import Weight

if TYPE_CHECKING:
    from dspark_jax.architecture import TargetArchitecture

GEMMA4 = {
    **COMMON,
    "hidden_activation": must("gelu_pytorch_tanh", note="of the MLP's gate"),
    "head_dim": read("width of the sliding layers' heads", 256, kind="size"),
    "tie_word_embeddings": read(
        "whether the LM head is the embedding; the whole model's and the text's agree", True, kind="flag"
    ),
    "rope_parameters": read("see its own table, one for sliding_attention and one for full_attention"),
    "layer_types": read("which layers have a window; the last one has none"),
    "sliding_window": read("rows that sliding layers see", 512, kind="size", zero=True),
    "final_logit_softcapping": read("cap of the logits", kind="number", zero=True),
    "attention_k_eq_v": read("whether the full layers' values are their raw keys", False, kind="flag"),
    "global_head_dim": read("width of the full layers' heads", 512, own=False, kind="size", zero=True),
    "num_global_key_value_heads": read("key and value heads of the full layers", own=False, kind="size", zero=True),
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
    "tie_word_embeddings": read("must say what text_config says", True, kind="flag"),
    **irrelevant("vision_config", "audio_config", note="the other modalities take no part in text"),
    **irrelevant("boi_token_id", "eoi_token_id", "image_token_id", "video_token_id", note="no text has them"),
    **irrelevant("boa_token_id", "eoa_token_index", "audio_token_id", note="no text has them"),
}
"""Fields of `Gemma4Config` and `Gemma4UnifiedConfig`, around the language model's."""

LAYER_WEIGHTS = PLAIN | {
    "attention_out_norm": Weight("layers.{i}.post_attention_layernorm.weight"),
    "mlp_norm": Weight("layers.{i}.pre_feedforward_layernorm.weight"),
    "mlp_out_norm": Weight("layers.{i}.post_feedforward_layernorm.weight"),
    "scalar": Weight("layers.{i}.layer_scalar"),
}
"""Parameters of a stack of Gemma 4's layers. Where values are keys there is no `attention.value`."""

OTHER_TOWERS = ("vision", "audio", "embed_vision", "embed_audio", "multi_modal_projector")
"""What the names of the other modalities' tensors begin with after `model.`; they take no part in text."""

_FIELDS = (
    "layer_types", "sliding_window", "sliding_rope_theta", "global_head_dim", "num_global_key_value_heads",
    "attention_k_eq_v", "partial_rotary_factor", "final_logit_softcapping", "unsupported",
)  # fmt: skip
"""Fields of `TargetArchitecture` that this family has besides `SIZES`."""


class Gemma4(Family):
    """Gemma 4, with and without other modalities."""

    name = "gemma4"
    title = "Gemma 4"
    configs = {
        "gemma4": GEMMA4,
        "gemma4_text": GEMMA4,
        "gemma4_unified": GEMMA4_UNIFIED,
        "gemma4_unified_text": GEMMA4_UNIFIED,
    }
    instead = "a dense Gemma 4 such as google/gemma-4-12B-it"
    stacks = {SLIDING: "layers", FULL: "global_layers"}
    drafter_class = "Gemma4"
    drafter_fields = (
        "num_attention_heads", "intermediate_size", "rms_norm_eps", "rope_theta", "num_global_key_value_heads",
        "global_head_dim", "attention_k_eq_v", "partial_rotary_factor", "final_logit_softcapping",
    )  # fmt: skip
    drafter_constants = (LAYER_WEIGHTS["scalar"].name,)
    slim_refusal = "vLLM, the one server of drafters for Gemma 4, wants them in the file"
    speculators_refusal = (
        "speculators scales no embeddings and caps no logits, so a Gemma 4 drafter would draft other tokens there; use "
        "--format universal and serve it with vLLM"
    )

    def language_model(self, raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """See `Family`; `text_config`, where there are other modalities."""
        text = part(raw, "text_config", where)
        if not text:
            return raw
        tied = [json.dumps(of.get("tie_word_embeddings", True)) for of in (raw, text)]
        if tied[0] != tied[1]:
            raise InputError(
                f"{where}: tie_word_embeddings is {tied[0]}, and {tied[1]} in text_config; "
                "write into both whether the LM head is the embedding"
            )
        refuse_quantised(raw, where)
        return text

    def values(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """See `Family`; the released files mix several dialects (trap 23)."""
        kinds = _layer_kinds(raw, where)
        values: dict[str, Any] = {"model_type": "gemma4", "layer_types": kinds}
        values["global_head_dim"], values["num_global_key_value_heads"] = _full_heads(raw, kinds, where)
        if SLIDING in kinds and not raw.get("sliding_window"):
            raise InputError(f"{where}: missing sliding_window, which {SLIDING} layers need; download it again")
        ropes = part(raw, "rope_parameters", where) or _DEFAULT_ROPES
        for kind in (FULL, SLIDING):
            rope = part(ropes, kind, where)
            check_values(rope, ROPE, where)
            found = check_rope(rope, _ROPES[kind], where)
            if kind in kinds and rope.get("rope_theta") is None:
                raise InputError(f"{where}: missing rope_theta in rope_parameters.{kind}; download it again")
            rope = rope or _DEFAULT_ROPES[kind]  # of layers that are not there
            values["rope_theta" if kind == FULL else "sliding_rope_theta"] = rope["rope_theta"]
            if kind == FULL:
                share = rope.get("partial_rotary_factor") if found == "proportional" else None
                if share is not None and share > 1:
                    raise InputError(f"{where}: partial_rotary_factor {share} is above 1; download it again")
                values["partial_rotary_factor"] = 1.0 if share is None else share
        values["final_logit_softcapping"] = raw.get("final_logit_softcapping") or 0.0
        return values

    def to_hf(self, arch: "TargetArchitecture") -> dict[str, Any]:
        """See `Family`."""
        rope = {"rope_theta": arch.rope_theta, "rope_type": "proportional"}
        rope |= {"partial_rotary_factor": arch.partial_rotary_factor}
        sliding = {"rope_theta": arch.sliding_rope_theta, "rope_type": "default"}
        return {
            "architectures": ["Gemma4ForCausalLM"],
            **{name: getattr(arch, name) for name in SIZES if name != "rope_theta"},
            "model_type": "gemma4_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "rope_parameters": {FULL: rope, SLIDING: sliding},
            "layer_types": list(arch.layer_types),
            "sliding_window": arch.sliding_window,
            "global_head_dim": arch.global_head_dim,
            "num_global_key_value_heads": arch.num_global_key_value_heads,
            "attention_k_eq_v": arch.attention_k_eq_v,
            "final_logit_softcapping": arch.final_logit_softcapping or None,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": False,
            "num_kv_shared_layers": 0,
        }

    def identity(self, arch: "TargetArchitecture") -> str:
        """See `Family`; the plain fields twice, as they have always been."""
        return super().identity(arch) + repr(tuple(getattr(arch, name) for name in (*self.identity_fields, *_FIELDS)))

    def kinds(self, arch: "TargetArchitecture") -> tuple[str, ...]:
        """See `Family`."""
        return tuple(arch.layer_types)

    def layer(self, arch: "TargetArchitecture", kind: str = FULL) -> LayerShape:
        """See `Family`; of its drafters, full layers without the scalar (trap 21)."""
        heads = arch.num_attention_heads
        if kind == SLIDING:
            settings = (heads, arch.num_key_value_heads, arch.head_dim, arch.sliding_rope_theta, 1.0)
            attention = AttentionShape(*settings, window=arch.sliding_window, value_norm=True)
        else:
            width, half = arch.global_head_dim, arch.global_head_dim // 2
            turning = min(int(arch.partial_rotary_factor * half), half)  # at the frequencies that they have among all
            turns = (1.0,) * turning + (0.0,) * (half - turning) if turning < half else ()
            settings = (heads, arch.num_global_key_value_heads, width, arch.rope_theta, 1.0, turns)
            attention = AttentionShape(*settings, value_is_key=arch.attention_k_eq_v, value_norm=True)
        return LayerShape(attention, "gelu_tanh", out_norms=True, scalar=True)

    def embedding_scale(self, arch: "TargetArchitecture") -> float:
        """See `Family`; 62 for 12B in bfloat16."""
        return arch.hidden_size**0.5

    def layer_weights(self, arch: "TargetArchitecture", kind: str) -> Mapping[str, Weight]:
        """See `Family`."""
        without = "attention.value" if kind == FULL and arch.attention_k_eq_v else ""
        return {path: weight for path, weight in LAYER_WEIGHTS.items() if path != without}

    def prefix(self, names: Collection[str]) -> str:
        """See `Family`; a model with other modalities has one more part in its names."""
        prefix = "model.language_model."
        return prefix if any(name.startswith(prefix) for name in names) else "model."

    def ignores(self, name: str) -> bool:
        """See `Family`; what belongs to vision or audio."""
        return super().ignores(name) or name.removeprefix("model.").startswith(OTHER_TOWERS)

    def drafter_weights(self) -> Mapping[str, Weight]:
        """See `Family`; the scalar is no parameter there."""
        return {path: weight for path, weight in LAYER_WEIGHTS.items() if path != "scalar"}

    def drafter_config(self, config: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`."""
        text = target.get("text_config") or target
        types = {"target_model_type": target["model_type"], "target_text_model_type": text["model_type"]}
        return {**config, **{name: target.get(name, value) for name, value in types.items()}}


_ROPES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    FULL: {"proportional": ("partial_rotary_factor",), "default": ()},
    SLIDING: {"default": ()},
}
_DEFAULT_ROPES: Mapping[str, Any] = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
"""What transformers takes where a Gemma 4 config has no `rope_parameters`."""


def _layer_kinds(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Kinds of the layers of a Gemma 4, the last of which always sees everything."""
    layers = raw.get("num_hidden_layers") or 0
    kinds = raw.get("layer_types") or [SLIDING if (i + 1) % 6 else FULL for i in range(layers)]
    kinds = list(kinds) if isinstance(kinds, list | tuple) else [json.dumps(kinds)]
    if layers and (len(kinds) != layers or set(map(str, kinds)) - {FULL, SLIDING}):
        raise InputError(
            f"{where}: layer_types has {len(kinds)} entries {sorted(set(map(str, kinds)))} for {layers} layers; "
            "one of sliding_attention and full_attention is needed for each"
        )
    return (*kinds[:-1], FULL) if layers else ()


def _full_heads(raw: Mapping[str, Any], kinds: tuple[str, ...], where: str) -> tuple[Any, Any]:
    """(width, key and value heads) of the full layers of a Gemma 4, in which they may differ from the sliding ones.

    Newer files say it layer by layer, where it does differ; older ones by name.
    """
    usual = raw.get("head_dim"), raw.get("num_key_value_heads")
    if "per_layer_config" not in raw:
        few = raw.get("num_global_key_value_heads") if raw.get("attention_k_eq_v") else None
        return raw.get("global_head_dim") or 512, few or usual[1]
    stated = part(raw, "per_layer_config", where)
    own = {name.lstrip("0") or "0": part(stated, name, where) for name in stated}
    others = [f"layer {i}" for i in own if i not in map(str, range(len(kinds)))]
    others += [name for layer in own.values() for name in layer if name not in ("head_dim", "num_key_value_heads")]
    if others and kinds:
        raise Unsupported(
            where, f"per_layer_config of {others[0]}", "use a dense Gemma 4 such as google/gemma-4-12B-it"
        )
    heads: dict[str, set[tuple[Any, Any]]] = {FULL: set(), SLIDING: {usual}}
    for i, kind in enumerate(kinds):
        layer = own.get(str(i), {})
        check_values(layer, GEMMA4, where)
        heads[kind].add((layer.get("head_dim", usual[0]), layer.get("num_key_value_heads", usual[1])))
    if max(map(len, heads.values())) > 1:
        raise Unsupported(where, "per_layer_config that differs among layers of a kind", "use a dense Gemma 4")
    return heads[FULL].pop() if kinds else usual
