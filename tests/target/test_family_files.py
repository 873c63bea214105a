"""Files of targets of every family: weights that are not those of the config, other storages, what a config may say."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.command import load_config, parse
from dspark_jax.config import TargetArchitecture, to_json
from dspark_jax.config_fields import Unsupported
from dspark_jax.errors import InputError
from dspark_jax.target import families
from tests.target.random_models import LLAMA3, MOE, OSS, SIZES, V, alone, changed, load, torch, transformers

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
FUSED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("case", "config", "tensors", "message"),
    [
        ("moe_all", {"num_local_experts": None}, {}, "config.json gives more layers or experts than the weights have"),
        ("moe_all", {"num_local_experts": 6}, {}, r"experts.6.\w+_proj.weight is of a layer or expert that config"),
        ("llama2", {"num_hidden_layers": 3}, {}, r"layers.3.\S+ is of a layer or expert that config"),
        ("moe_all", {}, {EXPERT: None}, f"{EXPERT} is missing; as there are others like it.* a file is not whole"),
        ("moe_all", {}, {EXPERT: np.zeros((23, 32), np.float32)}, r"shape \(23, 32\), the config gives \(24, 32\)"),
        ("qwen2", {}, {"model.layers.1.self_attn.k_proj.bias": None}, "layers.1.self_attn.k_proj.bias is missing"),
        ("llama2", {}, {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}, "is unknown to llama"),
        (
            "moe_all",
            {},
            {FUSED: np.zeros((8, 48, 32), np.float32)},
            f"{FUSED} has all experts of a layer, and .* is one",
        ),
        (
            "moe_all",
            {},
            {FUSED: np.zeros((8, 47, 32), np.float32)},
            r"\(8, 47, 32\), which is not gate_proj and up_proj",
        ),
        ("moe_all", {}, {"model.layers.1.mlp.experts.odd": np.zeros(3, np.float32)}, "odd is unknown to qwen3_moe"),
        ("llama3", {}, {"lm_head.weight": np.zeros((V, 32), np.float32)}, "lm_head.weight is not model.embed_tokens"),
    ],
)
def test_weights_that_are_not_those_of_the_config(made, tmp_path, case, config, tensors, message):
    with pytest.raises(InputError, match=message):
        load(changed(made(case)[0], tmp_path / "changed", config, tensors), alone())


@pytest.mark.parametrize("case", ["moe_all", "hybrid_moe"])
def test_experts_that_are_stored_as_one_tensor(made, tmp_path, case):
    """As Qwen3.5's are published, in the layout that transformers has in memory."""
    directory, model, target = made(case)
    held = {name: value.float().numpy() for name, value in model.state_dict().items()}
    fused = {name: value for name, value in held.items() if ".mlp.experts." in name}
    assert fused and all(name.rpartition(".")[2] in ("gate_up_proj", "down_proj") for name in fused)
    single = {name: None for file in directory.glob("*.safetensors") for name in load_file(file) if ".experts." in name}
    found = load(changed(directory, tmp_path / "fused", tensors=single | fused), alone())
    for name in ("gate", "up", "down"):
        one, other = getattr(found.layers.mlp, name), getattr(target.layers.mlp, name)
        np.testing.assert_array_equal(one[...], other[...])


def test_mxfp4_experts_of_gpt_oss_are_those_of_transformers(made, tmp_path):
    """As they are published: codes and scales of all experts of a layer, the outputs of gate and up alternating."""
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    directory, _, target = made("gpt_oss")
    rng, expected, tensors = np.random.default_rng(4), {}, dict[str, np.ndarray | None]()
    for i in range(4):
        for name, outputs, inputs in (("gate_up_proj", 128, 32), ("down_proj", 32, 64)):
            blocks = rng.integers(0, 256, (8, outputs, inputs // 32, 16), np.uint8)
            scales = rng.integers(120, 126, (8, outputs, inputs // 32), np.uint8)
            base = f"model.layers.{i}.mlp.experts.{name}"
            tensors |= {base: None, f"{base}_blocks": blocks, f"{base}_scales": scales}
            given = torch.from_numpy(blocks), torch.from_numpy(scales)
            expected[i, name] = _convert_moe_packed_tensors(*given, dtype=torch.float32).numpy()  # [E, inputs, outputs]
    stated = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    found = load(changed(directory, tmp_path / "quantised", stated, tensors), alone())
    for i in range(4):
        layers, at = (found.layers, found.sliding_layers)[i % 2 == 0], i // 2
        both = expected[i, "gate_up_proj"]
        np.testing.assert_array_equal(layers.mlp.gate[...][at], both[..., ::2])
        np.testing.assert_array_equal(layers.mlp.up[...][at], both[..., 1::2])
        np.testing.assert_array_equal(layers.mlp.down[...][at], expected[i, "down_proj"])
    np.testing.assert_array_equal(found.layers.mlp.down_bias[...], target.layers.mlp.down_bias[...])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types without any layer of full attention"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has 1 entries .* for 4 layers"),
        ({"sliding_window": None, "num_experts": 9}, "num_experts and num_local_experts differ"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is above num_local_experts 8"),
        ({"attention_bias": False}, "attention_bias false is not supported"),
    ],
)
def test_what_a_gpt_oss_may_not_say(change, message):
    raw = transformers.GptOssConfig(**SIZES | OSS).to_dict()
    assert TargetArchitecture.from_hf(raw).layer_types == ("sliding_attention", "full_attention") * 2
    with pytest.raises(InputError, match=message):
        TargetArchitecture.from_hf(raw | change)


def test_frequencies_that_older_checkpoints_hold_are_left_out(made, tmp_path):
    """Llama 2's files have them; transformers computes them, too."""
    directory, _, target = made("llama2")
    stored = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(4)}
    found = load(changed(directory, tmp_path / "older", tensors=stored), alone())
    np.testing.assert_array_equal(found.layers.attention.query[...], target.layers.attention.query[...])


def llama(**change):
    raw = transformers.LlamaConfig(**SIZES | {"rope_parameters": dict(LLAMA3)}).to_dict()
    return {name: value for name, value in (raw | change).items() if value is not None}


def test_an_older_llama_is_read_as_transformers_does():
    old = llama(rope_parameters=None, rope_theta=None, head_dim=None, num_key_value_heads=None)
    found, theirs = TargetArchitecture.from_hf(old), transformers.LlamaConfig.from_dict(dict(old))
    assert found.rope_theta == theirs.rope_parameters["rope_theta"] == 1e4
    assert (found.head_dim, found.num_key_value_heads) == (theirs.head_dim, theirs.num_key_value_heads) == (8, 4)
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    beside = llama(rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
    assert TargetArchitecture.from_hf(beside) == TargetArchitecture.from_hf(llama())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attention_bias": True}, Unsupported, "attention_bias true"),
        ({"mlp_bias": True}, Unsupported, "mlp_bias true"),
        ({"rope_parameters": LLAMA3 | {"rope_type": "dynamic"}}, Unsupported, "rope_type 'dynamic'"),
        ({"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, Unsupported, "partial_rotary_factor 0.5"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, InputError, "no 'low_freq_factor', which rope_type"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": "1"}}, InputError, "low_freq_factor '1' .* is not a number"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 5.0}}, InputError, "must be below high_freq_factor"),
    ],
)
def test_what_a_llama_may_not_say(change, error, message):
    with pytest.raises(error, match=message):
        TargetArchitecture.from_hf(llama(**change))


def moe(**change):
    raw = {"model_type": "qwen3_moe", **SIZES, **MOE, "rope_theta": 100.0}
    return {name: value for name, value in (raw | change).items() if value is not None}


def test_layers_with_experts_are_those_of_transformers():
    for step, dense in ((1, []), (2, []), (2, [1]), (1, [0, 3])):
        raw = moe(decoder_sparse_step=step, mlp_only_layers=dense)
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig.from_dict(dict(raw)))
        arch = TargetArchitecture.from_hf(raw)
        kinds = [kind == "full_attention" for kind in families.of_shape(arch).kinds(arch)]
        assert kinds == [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    assert TargetArchitecture.from_hf(moe(num_experts=None)).own["num_experts"] == 128


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mlp_only_layers": [4]}, InputError, r"mlp_only_layers \[4\] is no list of numbers of layers below 4"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, Unsupported, "without any layer with experts"),
        ({"decoder_sparse_step": 5}, Unsupported, "without any layer with experts"),
        ({"num_experts_per_tok": 9}, InputError, "num_experts_per_tok 9 is above num_experts 8"),
        ({"num_local_experts": 4}, InputError, "num_experts and num_local_experts differ"),
        ({"norm_topk_prob": "yes"}, InputError, 'norm_topk_prob "yes" is neither true nor false'),
        ({"use_sliding_window": True}, Unsupported, "use_sliding_window true"),
    ],
)
def test_what_a_mixture_may_not_say(change, error, message):
    with pytest.raises(error, match=message):
        TargetArchitecture.from_hf(moe(**change))


def test_the_config_of_a_run_is_read_with_a_familys_own_fields(tmp_path):
    """Those of an import: `--config config.json` is what its error messages say."""
    config = load_config("dspark_qwen3_30b_a3b")
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    found, _, _ = parse(["--config", str(file)])
    assert found.target.architecture.own == config.target.architecture.own != {}
