"""Every field of a target's config is read, refused or irrelevant: the lists against transformers' config classes.

That a field is irrelevant is not believed: transformers computes the same logits whatever it says.
"""

import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.config import InputError, TargetArchitecture
from dspark_jax.config_fields import COMMON, ROPE, Field, Unsupported
from dspark_jax.target.families.deepseek_v4 import DEEPSEEK_V4
from dspark_jax.target.families.gemma4 import GEMMA4, GEMMA4_UNIFIED, GEMMA4_WHOLE
from dspark_jax.target.families.gpt_oss import GPT_OSS
from dspark_jax.target.families.llama import LLAMA
from dspark_jax.target.families.qwen2 import QWEN2
from dspark_jax.target.families.qwen3 import QWEN3
from dspark_jax.target.families.qwen3_5 import QWEN3_5, QWEN3_5_WHOLE
from dspark_jax.target.families.qwen3_5_moe import QWEN3_5_MOE
from dspark_jax.target.families.qwen3_moe import QWEN3_MOE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLASSES: dict[str, tuple[str, Mapping[str, Field]]] = {  # config class -> model class, its list
    "Qwen3Config": ("Qwen3ForCausalLM", QWEN3),
    "LlamaConfig": ("LlamaForCausalLM", LLAMA),
    "Qwen2Config": ("Qwen2ForCausalLM", QWEN2),
    "Qwen3MoeConfig": ("Qwen3MoeForCausalLM", QWEN3_MOE),
    "Qwen3_5TextConfig": ("Qwen3_5ForCausalLM", QWEN3_5),
    "DeepseekV4Config": ("DeepseekV4ForCausalLM", DEEPSEEK_V4),
    "Qwen3_5MoeTextConfig": ("Qwen3_5MoeForCausalLM", QWEN3_5_MOE),
    "GptOssConfig": ("GptOssForCausalLM", GPT_OSS),
    "Gemma4TextConfig": ("Gemma4ForCausalLM", GEMMA4),
    "Gemma4UnifiedTextConfig": ("Gemma4UnifiedForCausalLM", GEMMA4_UNIFIED),
}
WHOLE = {"Gemma4Config": GEMMA4_WHOLE, "Gemma4UnifiedConfig": GEMMA4_WHOLE, "Qwen3_5Config": QWEN3_5_WHOLE}
WHOLE["Qwen3_5MoeConfig"] = QWEN3_5_WHOLE
SMALL = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
GEMMA_SMALL = {
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "global_head_dim": 16,
    "num_global_key_value_heads": 1, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 5.0,
}  # fmt: skip
HYBRID_SMALL = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 3,
}  # fmt: skip
V4_SMALL = {
    "num_attention_heads": 8, "moe_intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 16,
    "partial_rotary_factor": 0.25, "q_lora_rank": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "o_groups": 2,
    "o_lora_rank": 4, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 2, "sliding_window": 4, "hc_mult": 2,
    "layer_types": ["compressed_sparse_attention", "sliding_attention"], "mlp_layer_types": ["hash_moe", "moe"],
    "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
}  # fmt: skip
MIXED_SMALL = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16,
}  # fmt: skip
OSS_SMALL = {
    "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
OSS_OTHER = {
    "layer_types": ["full_attention"] * 2, "num_experts_per_tok": 3, "attention_bias": False, "swiglu_alpha": 1.0,
    "swiglu_limit": 2.0, "experts_per_token": 3, "initial_context_length": 7,
}  # fmt: skip
OTHER: dict[str, Any] = {  # field -> another value than the one of a small model
    **{name: 2 * value for name, value in SMALL.items() if isinstance(value, int)},
    "num_hidden_layers": 1, "num_key_value_heads": 4, "initializer_range": 0.1, "rms_norm_eps": 1e-3,
    "hidden_act": "gelu", "hidden_activation": "silu", "attention_bias": True, "is_causal": False,
    "quantization_config": {"quant_method": "gptq"}, "compression_config": {"quant_method": "compressed-tensors"},
    "attention_dropout": 0.5, "dtype": "bfloat16", "torch_dtype": "bfloat16", "pad_token_id": 7, "bos_token_id": 9,
    "eos_token_id": [5, 6], "use_cache": False, "output_hidden_states": True, "return_dict": False,
    "tie_last_hidden_states": False, "architectures": ["Other"], "transformers_version": "4.0.0",
    "id2label": {0: "a"}, "label2id": {"a": 0}, "problem_type": "regression", "chunk_size_feed_forward": 3,
    "is_encoder_decoder": True, "_attn_implementation": "eager", "attn_implementation": "eager",
    "auto_map": {"AutoModelForCausalLM": "modeling.Other"}, "tie_word_embeddings": None,
    "rope_theta": 500.0, "partial_rotary_factor": 0.5, "use_sliding_window": True, "sliding_window": 3,
    "max_window_layers": 1, "final_logit_softcapping": 3.0, "attention_k_eq_v": False, "global_head_dim": 32,
    "num_global_key_value_heads": 4, "use_bidirectional_attention": "all", "num_kv_shared_layers": 1,
    "enable_moe_block": True, "use_double_wide_mlp": True, "vocab_size_per_layer_input": 5, "num_experts": 16,
    "top_k_experts": 2, "moe_intermediate_size": 8, "model_type": "other",
    "layer_types": ["full_attention", "sliding_attention"],
    "per_layer_config": {"1": {"num_key_value_heads": 4}}, "mlp_bias": True, "pretraining_tp": 2,
    "num_local_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 2,
    "mlp_only_layers": [0], "output_router_logits": True, "router_aux_loss_coef": 0.5,
}  # fmt: skip
GEMMA_OTHER = {
    "layer_types": ["full_attention"] * 2, "hidden_size_per_layer_input": 4,
    "rope_parameters": {kind: {"rope_theta": 77.0, "rope_type": "default"} for kind in GEMMA_SMALL["layer_types"]},
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
}  # fmt: skip
HYBRID_OTHER = {
    "layer_types": ["full_attention"] * 2, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    "linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_conv_kernel_dim": 4, "attn_output_gate": False,
    "output_gate_type": "sigmoid", "mamba_ssm_dtype": "bfloat16", "full_attention_interval": 1,
    "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": True, "mlp_only_layers": [0],
    "shared_expert_intermediate_size": 8, "num_experts_per_tok": 3,
}  # fmt: skip
V4_OTHER = {
    **{name: 2 * value for name, value in V4_SMALL.items() if isinstance(value, int | float)},
    "num_experts_per_tok": 1, "partial_rotary_factor": 0.5, "qk_rope_head_dim": 8,
    "intermediate_size": 48, "n_shared_experts": 2, "scoring_func": "sigmoid", "norm_topk_prob": False,
    "topk_method": "greedy", "routed_scaling_factor": 2.0, "swiglu_limit": 3.0, "compress_rope_theta": 77.0,
    "hc_sinkhorn_iters": 5, "hc_eps": 1e-3, "num_hash_layers": 2, "mlp_layer_types": ["moe", "moe"],
    "layer_types": ["sliding_attention"] * 2, "compress_ratios": [4, 128, 0], "compress_rate_csa": 2,
    "compress_rates": {"compressed_sparse_attention": 2}, "compress_rate_hca": 64, "expert_dtype": "int4",
    "num_nextn_predict_layers": 3, "dspark_block_size": 5, "dspark_noise_token_id": 7,
    "dspark_target_layer_ids": [0], "dspark_markov_rank": 4, "router_jitter_noise": 0.5,
    "rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "default"},
}  # fmt: skip
V4_WITHOUT = {
    "compress_ratios": "layer_types", "num_hash_layers": "mlp_layer_types", "rope_scaling": "rope_parameters",
    "intermediate_size": "moe_intermediate_size", "num_local_experts": "n_routed_experts",
}  # fmt: skip
PLAIN_OTHER = {"rope_parameters": {"rope_theta": 77.0}, "rope_scaling": {"rope_theta": 77.0}}
WITHOUT = {
    "use_sliding_window": "layer_types",
    "rope_theta": "rope_parameters",
    "rope_scaling": "rope_parameters",
    "num_experts": "num_local_experts",
    "full_attention_interval": "layer_types",
}  # another name of it
MASKS = ("create_causal_mask", "create_sliding_window_causal_mask")
IMAGES = tuple(f"Qwen3_5{kind}{of}" for kind in ("", "Moe") for of in ("Model", "ForConditionalGeneration"))
DERIVED = {"kv_sharing_modes": "num_kv_shared_layers", "get_text_config": "text_config"}


def small(kind: str) -> dict[str, Any]:
    """What transformers writes of a small model."""
    own = {"Gemma": GEMMA_SMALL, "Qwen3_5": HYBRID_SMALL, "DeepseekV4": V4_SMALL, "GptOss": OSS_SMALL}
    sizes = SMALL | next((values for name, values in own.items() if kind.startswith(name)), {})
    sizes |= MIXED_SMALL if kind.startswith("Qwen3_5Moe") else {}
    if kind == "DeepseekV4Config":  # in the older form of RoPE, in which its fields can be changed
        del sizes["intermediate_size"]
        raw = getattr(transformers, kind)(**sizes | {"rope_parameters": dict(sizes["rope_parameters"])}).to_dict()
        del raw["qk_rope_head_dim"], raw["compress_rates"]
        return raw | {"rope_parameters": sizes["rope_parameters"]}
    raw = getattr(transformers, kind)(**sizes).to_dict()
    if kind.startswith("Gemma"):  # in the older form, in which all of its fields can be changed
        del raw["per_layer_config"]
        raw |= sizes
    return raw


def changed(kind: str, name: str) -> dict[str, Any]:
    """The same with another value of a field."""
    raw = small(kind)
    others = OTHER | (GEMMA_OTHER if kind.startswith("Gemma") else PLAIN_OTHER)
    own = {"Qwen3_5": HYBRID_OTHER, "DeepseekV4": V4_OTHER, "GptOss": OSS_OTHER}
    others |= next((values for name, values in own.items() if kind.startswith(name)), {})
    value = not raw["tie_word_embeddings"] if name == "tie_word_embeddings" else others[name]
    assert raw.get(name) != value, f"give {name} another value"
    if name == "partial_rotary_factor" and kind.startswith("Qwen3_5"):
        del raw["rope_parameters"][name]
    if kind.startswith("DeepseekV4"):
        raw.pop(V4_WITHOUT.get(name, ""), None)
        if name == "qk_rope_head_dim":
            del raw["partial_rotary_factor"]
    elif not kind.startswith("Gemma"):
        raw.pop(WITHOUT.get(name, ""), None)
    return raw | {name: value}


@pytest.mark.parametrize("kind", [*CLASSES, *WHOLE])
def test_every_field_of_the_class_is_listed(kind):
    table = CLASSES[kind][1] if kind in CLASSES else WHOLE[kind]
    fields = {field.name: field.default for field in dataclasses.fields(getattr(transformers, kind))}
    listed = {name for name, field in table.items() if field.own}
    unlisted, gone = sorted(set(fields) - listed), sorted(listed - set(fields))
    assert not unlisted, f"say in target/families what becomes of {unlisted}"
    assert not gone, f"transformers' {kind} has no {gone} any more"
    for name in listed:
        if table[name].absent is not None and fields[name] is not None:
            assert table[name].absent == fields[name], f"what an absent {name} means"


def test_every_key_of_rope_parameters_is_listed():
    from transformers.modeling_rope_utils import RopeParameters

    assert set(RopeParameters.__annotations__) == set(ROPE)


def names_read(source: Any) -> set[str]:
    """Attributes of a config that a class or function of transformers reads."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(source))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("config"):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            of, name = node.args[:2]
            if ast.unparse(of).endswith("config") and isinstance(name, ast.Constant):
                found.add(name.value)
    return found


@pytest.mark.parametrize("kind", CLASSES)
def test_what_the_models_code_reads_is_listed(kind):
    """Some of it is no field of the class: `is_causal` turns a causal model into one that sees everything."""
    from transformers import masking_utils

    model, table = CLASSES[kind]
    module = inspect.getmodule(getattr(transformers, model))
    of_text = (kind.removesuffix("Config"), model, model.removesuffix("ForCausalLM") + "TextModel", "Qwen3")
    classes = [value for name, value in vars(module).items() if inspect.isclass(value) and name.startswith(of_text)]
    classes = [value for value in classes if not re.search("Vision|Config$", value.__name__)]
    classes = [value for value in classes if value.__name__ not in IMAGES]
    assert len(classes) >= 6
    read = set().union(*map(names_read, classes), *(names_read(getattr(masking_utils, name)) for name in MASKS))
    read = {DERIVED.get(name, name) for name in read} - {"text_config"}
    assert {"num_hidden_layers", "rms_norm_eps", "is_causal"} <= read
    assert not read - set(table), "say in target/families what becomes of them"


@pytest.fixture(scope="module")
def models():
    """Config class -> a model, and its logits on some tokens."""
    torch.manual_seed(0)
    tokens = torch.randint(0, SMALL["vocab_size"], (1, 11))
    made = {kind: build(kind, small(kind)) for kind in CLASSES}
    return {kind: (model, tokens, logits(model, tokens)) for kind, model in made.items()}


def build(kind: str, raw: dict[str, Any]) -> Any:
    return getattr(transformers, CLASSES[kind][0])(getattr(transformers, kind).from_dict(raw)).eval()


def logits(model: Any, tokens: Any) -> Any:
    model.config.return_dict = True  # or transformers' own code could not call its model
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (_, table) in CLASSES.items() for name in table])
def test_a_field_is_what_the_list_says(models, kind, name):
    field, raw = CLASSES[kind][1][name], changed(kind, name)
    if field.treatment == "must":
        with pytest.raises(Unsupported, match=name):
            TargetArchitecture.from_hf(raw)
        return
    before = TargetArchitecture.from_hf(small(kind))
    if field.treatment == "read":
        try:
            assert TargetArchitecture.from_hf(raw) != before
        except InputError as error:
            assert name in str(error) or "layer_types has" in str(error)  # for so many layers
        return
    assert TargetArchitecture.from_hf(raw) == before
    model, tokens, expected = models[kind]
    other = build(kind, raw)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(other, tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ROPE)
def test_a_key_of_rope_parameters_is_what_the_list_says(models, name):
    values = {"rope_theta": 5.0, "rope_type": "linear", "mrope_section": [1, 1, 2], "truncate": True}
    raw = small("Qwen3Config")
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    before = TargetArchitecture.from_hf(raw | {"rope_parameters": rope})
    raw |= {"rope_parameters": rope | {name: values.get(name, 0.5)}}
    if ROPE[name].treatment == "must":
        with pytest.raises(Unsupported, match=name):
            TargetArchitecture.from_hf(raw)
        return
    assert (TargetArchitecture.from_hf(raw) == before) == (ROPE[name].treatment == "irrelevant")
    if ROPE[name].treatment == "irrelevant":
        model, tokens, expected = models["Qwen3Config"]
        other = build("Qwen3Config", raw)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(logits(other, tokens), expected, rtol=0, atol=0)


ROPES = {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}}
ROPES |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "missing rope_theta in .*full_attention"),
        ({"rope_parameters": {"full_attention": ROPES["full_attention"]}}, "missing rope_theta in .*sliding_attention"),
        ({"full_attention": {"factor": 2.0}}, "factor 2.0 of rope_type 'proportional' is not supported"),
        ({"full_attention": {"rope_type": "default"}}, "partial_rotary_factor 0.25 of rope_type 'default'"),
        ({"full_attention": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor 1.5 is above 1"),
        ({"sliding_attention": {"rope_type": "proportional"}}, "rope_type 'proportional' is not supported"),
        ({"sliding_attention": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 of rope_type 'default'"),
        ({"per_layer_config": {"0": {"head_dim": 16}, "1": {"head_dim": 16}, "3": {"head_dim": 16}}}, "among layers"),
        ({"per_layer_config": {"1": {"head_dim": 16}, "3": {"head_dim": 8}}}, "differs among layers of a kind"),
        ({"per_layer_config": {"1": {"head_dim": 16}}}, "differs among layers of a kind"),
        ({"per_layer_config": {"3": {"intermediate_size": 16}}}, "per_layer_config of intermediate_size is not"),
        ({"per_layer_config": {"7": {"head_dim": 16}}}, "per_layer_config of layer 7 is not"),
        ({"sliding_window": 0}, "missing sliding_window"),
        ({"attention_k_eq_v": "false"}, 'attention_k_eq_v "false" is neither true nor false'),
        ({"head_dim": None}, "missing head_dim"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps NaN is not a positive number"),
    ],
)
def test_what_a_gemma_may_not_say(change, message):
    raw = small("Gemma4TextConfig") | {"num_hidden_layers": 4, "rope_parameters": ROPES}
    raw |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    assert TargetArchitecture.from_hf(raw).partial_rotary_factor == 0.25
    ropes = {kind: rope | change.get(kind, {}) for kind, rope in ROPES.items()}
    raw |= {"rope_parameters": ropes} | {name: value for name, value in change.items() if name not in ROPES}
    with pytest.raises(InputError, match=message):
        TargetArchitecture.from_hf(raw)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_absent_field_means_what_transformers_takes(kind):
    table, raw = CLASSES[kind][1], small(kind)
    given = {name for name, field in table.items() if field.treatment == "read" and field.absent is not None}
    assert "tie_word_embeddings" in given
    raw = {name: value for name, value in raw.items() if name not in given}
    ours, theirs = TargetArchitecture.from_hf(raw), getattr(transformers, kind).from_dict(raw)
    for name in given - {"global_head_dim"}:
        if hasattr(ours, name) and name not in (theirs.per_layer_attributes or ()):
            assert getattr(ours, name) == getattr(theirs, name), name
    if kind.startswith("Gemma"):
        heads = [(layer.head_dim, layer.num_key_value_heads) for layer in theirs.per_layer_config]
        assert heads == [
            (ours.head_dim, ours.num_key_value_heads),
            (ours.global_head_dim, ours.num_global_key_value_heads),
        ]


def test_full_heads_that_do_not_differ_are_stated_by_nothing():
    """transformers leaves out of `per_layer_config` what is as in the other layers."""
    same = {"global_head_dim": 8, "num_global_key_value_heads": 2}
    raw = transformers.Gemma4TextConfig(**SMALL | GEMMA_SMALL | same).to_dict()
    assert "global_head_dim" not in raw
    found = TargetArchitecture.from_hf(raw)
    assert (found.global_head_dim, found.num_global_key_value_heads) == (8, 2)


def test_a_qwen_without_key_value_heads_has_as_many_as_heads():
    raw = small("Qwen3Config") | {"num_key_value_heads": None}
    assert TargetArchitecture.from_hf(raw).num_key_value_heads == 4


def test_the_whole_model_and_its_text_agree():
    text = small("Gemma4TextConfig")
    whole = {"model_type": "gemma4", "text_config": text, "vision_config": None, "hidden_size": 3, "attention_bias": 1}
    assert TargetArchitecture.from_hf(whole) == TargetArchitecture.from_hf(text)
    with pytest.raises(InputError, match="tie_word_embeddings is false, and true in text_config"):
        TargetArchitecture.from_hf(whole | {"tie_word_embeddings": False})
    with pytest.raises(Unsupported, match='quantised checkpoint .*quant_method "gptq"'):
        TargetArchitecture.from_hf(whole | {"quantization_config": {"quant_method": "gptq"}})


def test_is_causal_of_a_drafter_is_about_its_blocks():
    raw = small("Qwen3Config") | {"is_causal": False}
    with pytest.raises(Unsupported, match="is_causal false"):
        TargetArchitecture.from_hf(raw)
    assert TargetArchitecture.from_hf(raw | {"block_size": 7}) == TargetArchitecture.from_hf(small("Qwen3Config"))


PAGE = Path(__file__).parents[1] / "docs" / "targets.md"


def taken_as(field: Field) -> str:
    """How the page says it."""
    if field.treatment == "irrelevant":
        return field.treatment
    values = [f"`{json.dumps(value)}`" for value in field.values if value != {} or len(field.values) == 1]
    stated = " or ".join(values) or "read"
    return stated if field.absent in (None, *field.values) else f"{stated} (absent: `{json.dumps(field.absent)}`)"


@pytest.mark.parametrize(
    ("title", "table", "base"),
    [
        ("Every language model", COMMON, {}),
        ("Qwen3", QWEN3, COMMON),
        ("Llama", LLAMA, COMMON),
        ("Qwen2", QWEN2, COMMON),
        ("Qwen3-MoE", QWEN3_MOE, COMMON),
        ("Qwen3.5", QWEN3_5, COMMON),
        ("Qwen3.5-MoE", QWEN3_5_MOE, QWEN3_5),
        ("GPT-OSS", GPT_OSS, COMMON),
        ("Qwen3.5 with images", QWEN3_5_WHOLE, COMMON),
        ("DeepSeek-V4", DEEPSEEK_V4, COMMON),
        ("Gemma 4", GEMMA4, COMMON),
        ("Gemma 4 unified", GEMMA4_UNIFIED, GEMMA4),
        ("Gemma 4 with other modalities", GEMMA4_WHOLE, COMMON),
        ("`rope_parameters`", ROPE, {}),
    ],
)
def test_the_page_says_what_the_list_says(title, table, base):
    section = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    found = {name.strip("`"): (how, note) for names, how, note in rows for name in names.split(", ")}
    expected = {name: (taken_as(field), field.note) for name, field in table.items()}
    usual = {name: (taken_as(field), field.note) for name, field in base.items()}
    shorter = {name: entry for name, entry in expected.items() if usual.get(name) != entry}
    assert found == {**shorter, **{name: expected[name] for name in found if name in expected}}
