"""Small random models of transformers, one case for every form of a family, for tests against PyTorch."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.config import DrafterConfig, MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, TAPS = 67, (-1, 0, 2)
SIZES = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=4, intermediate_size=48, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.15,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LAYERS = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
HYBRID = {
    "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default", "mrope_section": [1, 1, 0]},
}  # fmt: skip
SCALED = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
V4 = {  # so many heads of the index that no score is 0: of equal scores PyTorch takes any
    "num_key_value_heads": 1, "intermediate_size": None, "moe_intermediate_size": 24, "head_dim": 16,
    "q_lora_rank": 12, "n_routed_experts": 8, "num_experts_per_tok": 3, "num_hash_layers": 1, "o_groups": 2,
    "o_lora_rank": 6, "index_n_heads": 16, "index_head_dim": 8, "index_topk": 3, "sliding_window": 6,
    "qk_rope_head_dim": 4, "swiglu_limit": 0.5, "rope_theta": 100.0, "compress_rope_theta": 500.0,
    "compress_rate_csa": 4, "compress_rate_hca": 8, "compress_ratios": [0, 4, 128, 4, 128, 0], "rope_scaling": SCALED,
    "num_hidden_layers": 5,
}  # fmt: skip
MIXED = {**MOE, "shared_expert_intermediate_size": 20}
OSS = {
    "num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 64, "head_dim": 16, "sliding_window": 6,
    "swiglu_limit": 0.5, "rope_parameters": {**YARN, "truncate": False},
}  # fmt: skip
CASES = {  # model class, its fields besides `SIZES`
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama2": ("Llama", {"rope_parameters": {"rope_theta": 100.0}, "num_key_value_heads": 4}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_theta": 100.0}, "tie_word_embeddings": True}),
    "moe": ("Qwen3Moe", {**MOE, "rope_parameters": YARN, "mlp_only_layers": [2], "norm_topk_prob": True}),
    "moe_all": ("Qwen3Moe", {**MOE, "rope_parameters": {"rope_theta": 100.0}, "tie_word_embeddings": True}),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": YARN, "num_key_value_heads": 1}),
    "hybrid": ("Qwen3_5", HYBRID),
    "v4": ("DeepseekV4", V4),
    "hybrid_tied": ("Qwen3_5", {**HYBRID, "tie_word_embeddings": True, "layer_types": LAYERS}),
    "gpt_oss": ("GptOss", OSS),
    "hybrid_moe": ("Qwen3_5Moe", {**HYBRID, **MIXED}),
}
ONE = tuple({name: case for case, (name, _) in CASES.items()}.values())
"""A case of every family, for what does not depend on the fields."""
DRAFTER = DrafterConfig(
    num_layers=1, block_size=3, target_layer_ids=(0, 2), mask_token_id=V - 1, markov_rank=4, initializer_range=0.2
)


def load(directory, mesh):
    return load_target(TargetConfig(path=str(directory), architecture=TargetArchitecture.from_hf(directory)), mesh)


def mixed(case):
    """Whether it has experts."""
    return "moe" in case or case in ("gpt_oss", "v4")


def alone():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def write_model(case, directory):
    """A random model of a case, saved in three files or more, with norms and biases that matter."""
    name, fields = CASES[case]
    torch.manual_seed(0)
    kind = f"{name}TextConfig" if name.startswith("Qwen3_5") else f"{name}Config"
    given = {name: value for name, value in (SIZES | fields).items() if value is not None}
    config = getattr(transformers, kind)(**given)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if "Moe" in name or name in ("DeepseekV4", "GptOss"):
        model.set_experts_implementation("eager")  # the others have no float64
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path:
                parameter.uniform_(0.5, 1.5)
            elif path.endswith(("bias", "sinks")):
                parameter.normal_(0, 0.5)
            elif path.endswith("A_log"):  # states that last, as those that do not can be next to 0, and are normed
                parameter.uniform_(-5, -1)
            elif path.endswith(("sinks", "base", "position_bias")):
                parameter.normal_(0, 0.5)
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
            elif path.endswith("tid2eid"):
                buffer.copy_(torch.stack([torch.randperm(8)[:3] for _ in range(V)]))
    model.save_pretrained(directory, max_shard_size=4 * sum(p.numel() for p in model.parameters()) // 4)
    assert len(list(directory.glob("*.safetensors"))) >= 3
    return model


def oracle(model, tokens):
    """Hidden states at the taps and logits, in float64."""
    with torch.no_grad():
        out = model.double()(torch.tensor(tokens), output_hidden_states=True)
    states = [out.hidden_states[i + 1].numpy() for i in TAPS]
    states = [x.mean(axis=2) if x.ndim == 4 else x for x in states]  # of several streams
    return np.concatenate(states, axis=-1), out.logits.numpy()


def assert_close(case, ours, theirs):
    """float32 accuracy: a few hundred roundings of the largest value.

    Linear attention norms what can be next to 0, in float32 in transformers as well.
    """
    share = 3e-5 if case.startswith(("hybrid", "v4")) else 6e-6
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=share * np.abs(theirs).max())


def changed(directory, to, config=None, tensors=None):
    """A copy with other fields, and with tensors that are replaced, added, or taken out (None)."""
    shutil.copytree(directory, to)
    raw = json.loads((to / "config.json").read_text()) | (config or {})
    (to / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
    found = {}
    for file in to.glob("*.safetensors"):
        found |= load_file(file)
        file.unlink()
    (to / "model.safetensors.index.json").unlink()
    found |= tensors or {}
    save_file({name: value for name, value in found.items() if value is not None}, to / "model.safetensors")
    return to
