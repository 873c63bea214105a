"""DeepSeek-V4 (Flash, Pro): windows and compressed rows, hyper-connections, a mixture of experts in every layer.

Tensors have the names that DeepSeek publishes, which begin with nothing and call an expert's matrices w1, w3 and w2;
transformers writes a few of them in another way.
"""

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from dspark_jax.config_fields import COMMON, Unsupported, check_rope, check_values, irrelevant, must, part, read
from dspark_jax.errors import InputError
from dspark_jax.rope_scaling import problems, scaled
from dspark_jax.target.families.family import (
    FULL,
    SIZES,
    SLIDING,
    AttentionShape,
    CompressedShape,
    ExpertShape,
    Family,
    HyperShape,
    IndexShape,
    LayerShape,
)
from dspark_jax.target.weights import Weight

if TYPE_CHECKING:
    from dspark_jax.architecture import TargetArchitecture
    from dspark_jax.target.model import Target

SPARSE, HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"
HASHED, ROUTED = "hash_moe", "moe"
_KINDS = {0: SLIDING, 4: SPARSE, 128: HEAVY}

DEEPSEEK_V4 = {
    **COMMON,
    "num_attention_heads": read("query heads, of one key", kind="size"),
    "num_key_value_heads": must(1, note="all heads share it, and it is the value as well"),
    "intermediate_size": read("another name of moe_intermediate_size", own=False, kind="size"),
    "moe_intermediate_size": read("width of an expert, of the shared one too, and of drafters", 2048, kind="size"),
    "head_dim": read("width of a head", 512, kind="size"),
    "q_lora_rank": read("width between the two matrices that make queries", 1024, kind="size"),
    "partial_rotary_factor": read("share of a head that turns, at its end; absent: 64 numbers of 512", kind="number"),
    "qk_rope_head_dim": read("of older files: how many numbers turn", own=False, kind="size"),
    "max_position_embeddings": read("longest sequence", 1048576, kind="size"),
    "rms_norm_eps": read("of every norm", 1e-6, kind="number"),
    "rope_theta": read("base of the rotary frequencies of layers without compressed rows", 10000.0, kind="number"),
    "compress_rope_theta": read("base of those of the others", 160000.0, kind="number"),
    "rope_parameters": read("one object for main and one for compress; or the numbers of compress alone"),
    "rope_scaling": read("the older name of rope_parameters", own=False),
    "layer_types": read("which layers have compressed rows"),
    "compress_ratios": read("of older files: by layer 0, 4 or 128; what is beyond the last layer is of mtp", own=False),
    "compress_rates": read("rows of a compressed one, by the kind of layers; absent: 4 and 128"),
    "compress_rate_csa": read("of older files: rows of a compressed one, of which an index chooses", own=False),
    "compress_rate_hca": read("of older files: rows of the others", own=False),
    "sliding_window": read("rows that every layer sees as they are", 128, kind="size"),
    "index_n_heads": read("heads of the index", 64, kind="size"),
    "index_head_dim": read("width of each", 128, kind="size"),
    "index_topk": read("compressed rows that it chooses", 512, kind="size"),
    "o_groups": read("groups of heads", 8, kind="size"),
    "o_lora_rank": read("numbers that each group becomes", 1024, kind="size"),
    "mlp_layer_types": read("which layers route by token"),
    "num_hash_layers": read("of older files: so many first layers do; absent: 3", own=False),
    "n_routed_experts": read("experts of a layer", 256, kind="size"),
    "num_local_experts": read("another name of n_routed_experts", own=False, kind="size"),
    "num_experts_per_tok": read("experts of a row", 6, kind="size"),
    "n_shared_experts": must(1, note="experts that every row goes through"),
    "scoring_func": must("sqrtsoftplus", note="what makes scores of the router's logits"),
    "norm_topk_prob": must(True, note="the weights of a row's experts are normed"),
    "topk_method": must("noaux_tc", note="a stored number per expert corrects the choice", own=False),
    "routed_scaling_factor": read("factor of these weights", 1.5, kind="number"),
    "swiglu_limit": read("bound of what comes out of an expert's gate, and beside it", 10.0, kind="number"),
    "hidden_act": must("silu", note="of the experts' gates"),
    "mlp_bias": must(False, note="linear layers have no bias"),
    "hc_mult": read("residual streams", 4, kind="size"),
    "hc_sinkhorn_iters": read("iterations that make mixing weights doubly stochastic", 20, kind="size"),
    "hc_eps": read("what keeps these weights from 0", 1e-6, kind="number"),
    "tie_word_embeddings": read("whether the LM head is the embedding", False, kind="flag"),
    "per_layer_config": must({}, note="layers differ by their types only", own=False),
    "expert_dtype": read("fp4 or fp8: how experts are stored; see quantised checkpoints", own=False),
    **irrelevant("num_nextn_predict_layers", note="of its own drafter"),
    **irrelevant(
        "dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank",
        note="of its own drafter", own=False,
    ),
    **irrelevant("output_router_logits", note="what a call returns"),
    **irrelevant("router_aux_loss_coef", "router_jitter_noise", note="of training"),
}  # fmt: skip
"""Fields of `DeepseekV4Config`."""

_OWN = (
    "q_lora_rank", "index_n_heads", "index_head_dim", "index_topk", "o_groups", "o_lora_rank", "n_routed_experts",
    "num_experts_per_tok", "routed_scaling_factor", "swiglu_limit", "hc_mult", "hc_sinkhorn_iters", "hc_eps",
)  # fmt: skip
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate")
_INSTEAD = "a DeepSeek-V4 Flash or Pro"

_INDEX = {
    "attention.index.query": Weight("layers.{i}.attn.indexer.wq_b.weight", inputs=1),
    "attention.index.weigh": Weight("layers.{i}.attn.indexer.weights_proj.weight", inputs=1),
}


def compressor_weights(path: str, name: str) -> dict[str, Weight]:
    """Parameters of a compressor and their tensors."""
    return {
        f"{path}.row": Weight(f"{name}.wkv.weight", inputs=1),
        f"{path}.gate": Weight(f"{name}.wgate.weight", inputs=1),
        f"{path}.bias": Weight(f"{name}.ape", exact=True),
        f"{path}.norm": Weight(f"{name}.norm.weight"),
    }


def streams_weights(path: str, name: str) -> dict[str, Weight]:
    """Parameters of hyper-connections, or of what collapses the last streams, and their tensors."""
    return {
        f"{path}.mix": Weight(f"{name}_fn", inputs=2, exact=True),
        f"{path}.base": Weight(f"{name}_base", exact=True),
        f"{path}.scale": Weight(f"{name}_scale", exact=True),
    }


def mixture_weights(name: str, shape: ExpertShape) -> dict[str, Weight]:
    """Parameters of a mixture and their tensors."""
    matrices = {"gate": "w1", "up": "w3", "down": "w2"}
    found = {
        f"mlp.{path}": Weight(f"{name}.experts.{{e}}.{w}.weight", inputs=1, experts=shape.count)
        for path, w in matrices.items()
    }
    found |= {
        f"mlp.shared.{path}": Weight(f"{name}.shared_experts.{w}.weight", inputs=1) for path, w in matrices.items()
    }
    found["mlp.router"] = Weight(f"{name}.gate.weight", inputs=1)
    if shape.hashed:
        return found | {"mlp.table": Weight(f"{name}.gate.tid2eid", below=shape.count)}
    return found | {"mlp.correction": Weight(f"{name}.gate.bias", exact=True)}


def layer_weights(name: str, experts: ExpertShape) -> dict[str, Weight]:
    """Parameters of a layer without compressed rows and their tensors, which begin with `name`."""
    return {
        "attention_norm": Weight(f"{name}.attn_norm.weight"),
        "attention.query_in": Weight(f"{name}.attn.wq_a.weight", inputs=1),
        "attention.query_norm": Weight(f"{name}.attn.q_norm.weight"),
        "attention.query": Weight(f"{name}.attn.wq_b.weight", inputs=1),
        "attention.row": Weight(f"{name}.attn.wkv.weight", inputs=1),
        "attention.row_norm": Weight(f"{name}.attn.kv_norm.weight"),
        "attention.sinks": Weight(f"{name}.attn.attn_sink", exact=True),
        "attention.group": Weight(f"{name}.attn.wo_a.weight"),
        "attention.out": Weight(f"{name}.attn.wo_b.weight", inputs=1),
        "mlp_norm": Weight(f"{name}.ffn_norm.weight"),
        **streams_weights("attention_streams", f"{name}.hc_attn"),
        **streams_weights("mlp_streams", f"{name}.hc_ffn"),
        **mixture_weights(f"{name}.ffn", experts),
    }


class DeepseekV4(Family):
    """DeepSeek-V4; its drafters have the layers of a Qwen3 of its size."""

    name = "deepseek_v4"
    title = "DeepSeek-V4"
    configs = {"deepseek_v4": DEEPSEEK_V4}
    instead = _INSTEAD
    stacks = {
        f"{attention}/{mixture}": f"{mixture.removesuffix('moe')}{name}_layers"
        for mixture in (HASHED, ROUTED)
        for attention, name in ((SLIDING, "sliding"), (SPARSE, "sparse"), (HEAVY, "heavy"))
    }
    identity_fields = (
        "model_type", *SIZES, "layer_types", "sliding_window", "partial_rotary_factor",
    )  # fmt: skip

    def values(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """See `Family`."""
        raw = {**raw, **_renamed(raw, where)}
        if raw.get("expert_dtype") not in (None, "fp4", "fp8"):
            raise Unsupported(where, f"expert_dtype {json.dumps(raw['expert_dtype'])}", f"use {_INSTEAD}")
        own = {name: raw[name] for name in _OWN}
        values = _ropes(raw, where)
        own |= values.pop("own") | {"compress_rates": _rates(raw, where), "mlp_layer_types": _mixtures(raw, where)}
        values |= {"layer_types": _attentions(raw, where), "intermediate_size": raw["moe_intermediate_size"]}
        values |= {"num_key_value_heads": 1, "sliding_window": raw["sliding_window"]}
        heads, width = raw["num_attention_heads"], raw["head_dim"]
        turning = width * values["partial_rotary_factor"]
        if not 0 < turning <= width or int(turning) % 2 or int(turning) != turning:
            raise InputError(f"{where}: {turning:g} of {width} numbers of a head turn, which are no whole pairs")
        if own["index_head_dim"] < turning:
            raise InputError(f"{where}: index_head_dim {own['index_head_dim']} is below the {turning:g} that turn")
        if heads % own["o_groups"]:
            raise InputError(f"{where}: o_groups {own['o_groups']} does not divide num_attention_heads {heads}")
        if own["num_experts_per_tok"] > own["n_routed_experts"]:
            raise InputError(
                f"{where}: num_experts_per_tok {own['num_experts_per_tok']} is above n_routed_experts "
                f"{own['n_routed_experts']}; download it again"
            )
        return {**values, "own": own}

    def to_hf(self, arch: "TargetArchitecture") -> dict[str, Any]:
        """See `Family`."""
        share = {"partial_rotary_factor": arch.partial_rotary_factor}
        theta = arch.own["compress_rope_theta"]
        yarn = {"attention_factor": 1.0, **arch.own["yarn"]} if arch.own["yarn"] else {}
        return {
            "architectures": ["DeepseekV4ForCausalLM"],
            **{name: getattr(arch, name) for name in SIZES if name != "intermediate_size"},
            **{name: arch.own[name] for name in (*_OWN, "compress_rates", "mlp_layer_types")},
            "model_type": self.name,
            "moe_intermediate_size": arch.intermediate_size,
            "layer_types": list(arch.layer_types),
            "sliding_window": arch.sliding_window,
            "compress_rope_theta": theta,
            **share,
            "rope_parameters": {
                "main": {"rope_type": "default", "rope_theta": arch.rope_theta, **share},
                "compress": {
                    "rope_type": "yarn" if yarn else "default", "rope_theta": theta, **share, **yarn,
                },
            },
            "hidden_act": "silu",
            "attention_bias": False,
            "scoring_func": "sqrtsoftplus",
        }  # fmt: skip

    def kinds(self, arch: "TargetArchitecture") -> tuple[str, ...]:
        """See `Family`: of each layer that of its attention, and that of its mixture."""
        pairs = zip(arch.layer_types, arch.own["mlp_layer_types"], strict=True)
        return tuple(f"{attention}/{mixture}" for attention, mixture in pairs)

    def layer(self, arch: "TargetArchitecture", kind: str = FULL) -> LayerShape:
        """See `Family`; of no kind in particular, one without compressed rows."""
        own = arch.own
        attention, _, mixture = kind.partition("/")
        experts = ExpertShape(
            own["n_routed_experts"], own["num_experts_per_tok"], arch.intermediate_size, normalised=True,
            scores="sqrtsoftplus", factor=own["routed_scaling_factor"], corrected=mixture != HASHED,
            hashed=arch.vocab_size if mixture == HASHED else 0, limit=own["swiglu_limit"],
            shared=arch.intermediate_size,
        )  # fmt: skip
        plain = AttentionShape(arch.num_attention_heads, 1, arch.head_dim, arch.rope_theta, arch.head_dim**-0.5)
        hyper = HyperShape(own["hc_mult"], own["hc_sinkhorn_iters"], own["hc_eps"])
        return LayerShape(plain, experts=experts, compressed=_compressed(arch, attention), hyper=hyper)

    def model(self) -> "type[Target]":
        """See `Family`."""
        from dspark_jax.target.hyper_model import HyperTarget

        return HyperTarget

    def layer_weights(self, arch: "TargetArchitecture", kind: str) -> Mapping[str, Weight]:
        """See `Family`."""
        shape = self.layer(arch, kind)
        assert shape.experts is not None and shape.compressed is not None
        found = layer_weights("layers.{i}", shape.experts)
        if shape.compressed.rate:
            found |= compressor_weights("attention.compressor", "layers.{i}.attn.compressor")
        if shape.compressed.index:
            found |= _INDEX | compressor_weights("attention.index.compressor", "layers.{i}.attn.indexer.compressor")
        return found

    def prefix(self, names: Collection[str]) -> str:
        """See `Family`; that of transformers."""
        return "model." if any(name.startswith("model.") for name in names) else ""

    def outer_weights(self, prefix: str) -> dict[str, Weight]:
        """See `Family`."""
        embedding, head = ("embed_tokens", "hc_head.hc") if prefix else ("embed", "hc_head")
        return {
            "embedding": Weight(f"{prefix}{embedding}.weight"),
            "norm": Weight(f"{prefix}norm.weight"),
            "lm_head": Weight("head.weight"),
            **streams_weights("streams_head", prefix + head),
        }

    def weights(self, arch: "TargetArchitecture", names: Collection[str] = ()) -> dict[str, Weight]:
        """See `Family`; transformers calls the norm of keys by the name that it has in a compressor."""
        found = super().weights(arch, names)
        if not self.prefix(names):
            return found
        ends = ".attn.kv_norm.weight", ".attn.norm.weight"
        return {path: weight._replace(name=weight.name.replace(*ends)) for path, weight in found.items()}

    def ignores(self, name: str) -> bool:
        """See `Family`; what belongs to the drafter that comes with it."""
        return super().ignores(name) or name.startswith("mtp.")

    def integers(self, name: str) -> bool:
        """See `Family`: the tables of tokens."""
        return name.endswith(".gate.tid2eid")


def _compressed(arch: "TargetArchitecture", kind: str) -> CompressedShape:
    """What the attention of a kind of layers is like."""
    own, rate = arch.own, arch.own["compress_rates"].get(kind, 0)
    rotary = int(arch.head_dim * arch.partial_rotary_factor)
    theta, turns = (own["compress_rope_theta"], _turns(arch, rotary)) if rate else (arch.rope_theta, ())
    index = IndexShape(own["index_n_heads"], own["index_head_dim"], own["index_topk"]) if kind == SPARSE else None
    return CompressedShape(
        arch.num_attention_heads, arch.head_dim, rotary, theta, turns, own["q_lora_rank"], own["o_groups"],
        own["o_lora_rank"], arch.sliding_window, rate, index,
    )  # fmt: skip


def _turns(arch: "TargetArchitecture", rotary: int) -> tuple[float, ...]:
    """Factors of the frequencies of layers with compressed rows."""
    return scaled("yarn", arch.own["yarn"], rotary, arch.own["compress_rope_theta"])[0] if arch.own["yarn"] else ()


def _renamed(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields that have two names, under those of transformers' class.

    Raises:
      InputError: both are there and differ.
    """
    found = dict[str, Any]()
    for name, other in (("moe_intermediate_size", "intermediate_size"), ("n_routed_experts", "num_local_experts")):
        if raw.get(other) is None:
            continue
        usual = DEEPSEEK_V4[name].absent
        if raw[name] not in (usual, raw[other]):
            raise InputError(f"{where}: {name} {raw[name]} and {other} {raw[other]} differ; keep the right one")
        found[name] = raw[other]
    return found


def _ropes(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Both bases, the share of a head that turns, and the numbers of a scaled RoPE in `own`."""
    share = raw.get("partial_rotary_factor")
    if share is None:
        share = (raw.get("qk_rope_head_dim") or 64) / (raw["head_dim"] if raw.get("qk_rope_head_dim") else 512)
    thetas = {"main": raw["rope_theta"], "compress": raw["compress_rope_theta"]}
    stated = part(raw, "rope_parameters", where) or part(raw, "rope_scaling", where)
    nested = "main" in stated and "compress" in stated
    ropes = {name: part(stated, name, where) for name in thetas} if nested else {"compress": stated}
    yarn = dict[str, Any]()
    for name, rope in ropes.items():
        check_values(rope, {"rope_theta": DEEPSEEK_V4["rope_theta"]}, where)
        known: dict[str, tuple[str, ...]] = {"default": ("partial_rotary_factor",)}
        if name == "compress":
            known["yarn"] = ("partial_rotary_factor", *_YARN)
        kind = check_rope(rope, known, where)
        if nested:
            thetas[name] = rope.get("rope_theta") or thetas[name]
            if rope.get("partial_rotary_factor") not in (None, share):
                raise Unsupported(where, f"partial_rotary_factor of {name} beside another one", f"use {_INSTEAD}")
        if kind == "yarn":
            yarn = {key: rope[key] for key in _YARN if rope.get(key) is not None}
            if nested and yarn.get("attention_factor") is None or yarn.pop("attention_factor", 1.0) != 1.0:
                raise Unsupported(where, "attention_factor other than 1 of its yarn", f"use {_INSTEAD}")
    for problem in problems("yarn", yarn) if yarn else ():
        raise InputError(f"{where}: {problem.replace('drafter.rope_scaling', 'its RoPE')}")
    return {
        "rope_theta": thetas["main"],
        "partial_rotary_factor": share,
        "own": {"compress_rope_theta": thetas["compress"], "yarn": yarn},
    }


def _rates(raw: Mapping[str, Any], where: str) -> dict[str, int]:
    """Rows of a compressed one, by the kind of layers."""
    rates = {SPARSE: 4, HEAVY: 128, **part(raw, "compress_rates", where)}
    for kind, name in ((SPARSE, "compress_rate_csa"), (HEAVY, "compress_rate_hca")):
        rates[kind] = raw[name] if raw.get(name) is not None else rates[kind]
    wrong = {kind: rate for kind, rate in rates.items() if kind not in _KINDS.values() or type(rate) is not int}
    if wrong or min(rates.values()) < 1:
        raise InputError(f"{where}: compress_rates {json.dumps(rates)} are not whole numbers of {SPARSE} and {HEAVY}")
    return {kind: rates[kind] for kind in (SPARSE, HEAVY)}


def _attentions(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The attention of every layer."""
    layers, ratios = raw["num_hidden_layers"], raw.get("compress_ratios")
    kinds = raw.get("layer_types")
    if kinds is None and ratios is not None:
        ratios = ratios if isinstance(ratios, list | tuple) else [ratios]
        kinds = [_KINDS.get(ratio, json.dumps(ratio)) for ratio in ratios]
    if kinds is None:
        kinds = [HEAVY if i < 2 or i % 2 == 0 else SPARSE for i in range(layers)]
    return _of_layers("layer_types or compress_ratios", kinds, layers, (SLIDING, SPARSE, HEAVY), where)


def _mixtures(raw: Mapping[str, Any], where: str) -> list[str]:
    """The mixture of every layer."""
    layers, kinds, first = raw["num_hidden_layers"], raw.get("mlp_layer_types"), raw.get("num_hash_layers")
    if kinds is None:
        first = 3 if first is None else first
        if type(first) is not int or first < 0:
            raise InputError(f"{where}: num_hash_layers {json.dumps(first)} is not a whole number; download it again")
        kinds = [HASHED if i < first else ROUTED for i in range(layers)]
    return list(_of_layers("mlp_layer_types", kinds, layers, (HASHED, ROUTED), where))


def _of_layers(name: str, kinds: Any, layers: int, known: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Kinds of all layers; those beyond the last one are of the drafter that comes with the model."""
    kinds = list(kinds)[:layers] if isinstance(kinds, list | tuple) else [json.dumps(kinds)]
    if len(kinds) != layers or set(map(str, kinds)) - set(known):
        raise InputError(
            f"{where}: {name} has {len(kinds)} entries {sorted(set(map(str, kinds)))} for {layers} layers; "
            f"one of {', '.join(known)} is needed for each"
        )
    return tuple(kinds)
