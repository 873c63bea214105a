"""GPT-OSS targets (20B, 120B): experts in every layer, windows in every second one, and heads with sinks."""

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspark_jax.config_fields import COMMON, Unsupported, irrelevant, must, read
from dspark_jax.errors import InputError
from dspark_jax.target.families.family import (
    FULL,
    LAYER_WEIGHTS,
    SIZES,
    SLIDING,
    ExpertShape,
    Family,
    Fused,
    LayerShape,
    expert_weights,
)
from dspark_jax.target.families.plain import PLAIN, SCALED, heads, plain_config, rope_values, turns_of
from dspark_jax.target.families.qwen2 import BIASES
from dspark_jax.target.weights import Weight

if TYPE_CHECKING:
    from dspark_jax.architecture import TargetArchitecture

GPT_OSS = {
    **COMMON,
    **PLAIN,
    "num_key_value_heads": read("key and value heads", 8, kind="size"),
    "intermediate_size": read("width of an expert, and of the MLP of drafters", 2880, kind="size"),
    "head_dim": read("width of a head", 64, kind="size"),
    "rms_norm_eps": read("of every norm", 1e-5, kind="number"),
    "max_position_embeddings": read("longest sequence", 131072, kind="size"),
    "attention_bias": must(True, note="queries, keys, values and the output have biases"),
    "num_local_experts": read("experts of a layer, 128 if it has neither name", kind="size"),
    "num_experts": read("another name of num_local_experts", own=False, kind="size"),
    "num_experts_per_tok": read("experts of a row; their weights add up to 1", 4, kind="size"),
    "swiglu_alpha": read("steepness of the experts' gates", 1.702, kind="number"),
    "swiglu_limit": read("bound inside of experts", 7.0, kind="number"),
    "sliding_window": read("rows that layers with a window see", 128, kind="size"),
    "layer_types": read("which layers have a window; absent: the first one and every second one after it"),
    **irrelevant("hidden_act", note="the experts' function is always the same"),
    **irrelevant("output_router_logits", note="what a call returns"),
    **irrelevant("router_aux_loss_coef", note="of training"),
    **irrelevant(
        "experts_per_token", "initial_context_length", note="older names of what is stated as well", own=False
    ),
}
"""Fields of `GptOssConfig`."""

_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""What transformers takes where a config says nothing of RoPE."""

_OWN = ("num_local_experts", "num_experts_per_tok", "swiglu_alpha", "swiglu_limit")


class GptOss(Family):
    """GPT-OSS; its drafters have the layers of a Qwen3 of its size."""

    name = "gpt_oss"
    title = "GPT-OSS"
    configs = {"gpt_oss": GPT_OSS}
    instead = "a plain GPT-OSS model"
    stacks = {SLIDING: "sliding_layers", FULL: "layers"}
    identity_fields = ("model_type", *SIZES, "layer_types", "sliding_window")
    fused = {
        ".mlp.experts.gate_up_proj": Fused(("gate_proj", "up_proj"), alternating=True, turned=True),
        ".mlp.experts.gate_up_proj_bias": Fused(("gate_proj", "up_proj"), alternating=True, bias=True),
        ".mlp.experts.down_proj": Fused(("down_proj",), turned=True),
        ".mlp.experts.down_proj_bias": Fused(("down_proj",), bias=True),
    }

    def values(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """See `Family`."""
        rope = raw if raw.get("rope_parameters") or raw.get("rope_scaling") else {**raw, "rope_parameters": _ROPE}
        values: dict[str, Any] = {"rope_theta": raw.get("rope_theta") or 1.5e5}
        values |= rope_values(rope, where, self.instead, SCALED)
        stated = {raw[name] for name in ("num_experts", "num_local_experts") if raw.get(name) is not None}
        if len(stated) > 1:
            raise InputError(f"{where}: num_experts and num_local_experts differ ({stated}); keep the right one")
        own = {"num_local_experts": stated.pop() if stated else 128} | {name: raw[name] for name in _OWN[1:]}
        if own["num_experts_per_tok"] > own["num_local_experts"]:
            raise InputError(
                f"{where}: num_experts_per_tok {own['num_experts_per_tok']} is above num_local_experts "
                f"{own['num_local_experts']}; download it again"
            )
        values["layer_types"] = _kinds(raw, where)
        if SLIDING in values["layer_types"] and not raw.get("sliding_window"):
            raise InputError(f"{where}: missing sliding_window, which {SLIDING} layers need; download it again")
        return {**values, **heads(raw), "own": values.get("own", {}) | own}

    def to_hf(self, arch: "TargetArchitecture") -> dict[str, Any]:
        """See `Family`."""
        config = plain_config(arch, "GptOssForCausalLM") | {name: arch.own[name] for name in _OWN}
        kinds = {"layer_types": list(arch.layer_types), "sliding_window": arch.sliding_window}
        return config | {"attention_bias": True} | kinds

    def kinds(self, arch: "TargetArchitecture") -> tuple[str, ...]:
        """See `Family`."""
        return tuple(arch.layer_types)

    def layer(self, arch: "TargetArchitecture", kind: str = FULL) -> LayerShape:
        """See `Family`."""
        turns, sharper = turns_of(arch)
        attention = super().layer(arch, kind).attention
        window = arch.sliding_window if kind == SLIDING else 0
        biased = {"norms": False, "biases": True, "out_bias": True, "sinks": True}
        scale = attention.scale * sharper
        attention = dataclasses.replace(attention, scale=scale, turns=turns, window=window, **biased)
        count, chosen, sharpness, limit = (arch.own[name] for name in _OWN)
        experts = ExpertShape(
            count, chosen, arch.intermediate_size, normalised=True, biases=True, limit=limit, sharpness=sharpness
        )
        return LayerShape(attention, experts=experts)

    def layer_weights(self, arch: "TargetArchitecture", kind: str) -> Mapping[str, Weight]:
        """See `Family`."""
        count, without = arch.own["num_local_experts"], ("mlp.", "attention.query_norm", "attention.key_norm")
        return {
            **{path: weight for path, weight in LAYER_WEIGHTS.items() if not path.startswith(without)},
            **BIASES,
            "attention.out_bias": Weight("layers.{i}.self_attn.o_proj.bias"),
            "attention.sinks": Weight("layers.{i}.self_attn.sinks"),
            **expert_weights(count, "router"),
            "mlp.router_bias": Weight("layers.{i}.mlp.router.bias"),
            **{
                f"mlp.{name}_bias": Weight(f"layers.{{i}}.mlp.experts.{{e}}.{name}_proj.bias", experts=count)
                for name in ("gate", "up", "down")
            },
        }


def _kinds(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The kind of every layer."""
    layers = raw["num_hidden_layers"]
    kinds = raw.get("layer_types") or [FULL if i % 2 else SLIDING for i in range(layers)]
    kinds = list(kinds) if isinstance(kinds, list | tuple) else [json.dumps(kinds)]
    if len(kinds) != layers or set(map(str, kinds)) - {FULL, SLIDING}:
        raise InputError(
            f"{where}: layer_types has {len(kinds)} entries {sorted(set(map(str, kinds)))} for {layers} layers; "
            f"one of {SLIDING} and {FULL} is needed for each"
        )
    if FULL not in kinds:
        raise Unsupported(where, "layer_types without any layer of full attention", "use a plain GPT-OSS model")
    return tuple(kinds)
