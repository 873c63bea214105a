"""The released targets' shapes, and the settings of the drafters that were released for them (paper section 4)."""

import dataclasses

from dspark_jax.benchmarks import BENCHMARKS
from dspark_jax.config import (
    Config,
    DataConfig,
    DrafterConfig,
    EvalConfig,
    MeshConfig,
    OptimConfig,
    TargetArchitecture,
    TargetConfig,
    TrainConfig,
)
from dspark_jax.kinds import as_kind
from dspark_jax.target.families.family import SIZES

_QWEN3 = {
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
}
_GEMMA4_12B = TargetArchitecture(
    model_type="gemma4",
    vocab_size=262144,
    hidden_size=3840,
    num_hidden_layers=48,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=256,
    intermediate_size=15360,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=True,
    max_position_embeddings=262144,
    layer_types=(("sliding_attention",) * 5 + ("full_attention",)) * 8,
    sliding_window=1024,
    sliding_rope_theta=1e4,
    global_head_dim=512,
    num_global_key_value_heads=1,
    attention_k_eq_v=True,
    partial_rotary_factor=0.25,
    final_logit_softcapping=30.0,
)


def _qwen3(width: int, layers: int, heads: int, mlp: int, *, tied: bool) -> TargetArchitecture:
    return TargetArchitecture(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        tie_word_embeddings=tied,
        **_QWEN3,
    )


TARGETS = {  # shape, tapped layers, mask token
    "Qwen/Qwen3-4B": (_qwen3(2560, 36, 32, 9728, tied=True), (1, 9, 17, 25, 33), 151669),
    "Qwen/Qwen3-8B": (_qwen3(4096, 36, 32, 12288, tied=False), (1, 9, 17, 25, 33), 151669),
    "Qwen/Qwen3-14B": (_qwen3(5120, 40, 40, 17408, tied=False), (1, 10, 19, 28, 37), 151669),
    "google/gemma-4-12B-it": (_GEMMA4_12B, (5, 17, 29, 41, 46), 4),
}
"""By id on the hub."""


_LLAMA31_8B = TargetArchitecture(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    tie_word_embeddings=False,
    max_position_embeddings=131072,
    own={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
_QWEN25_7B = dataclasses.replace(
    _qwen3(3584, 28, 28, 18944, tied=False),
    model_type="qwen2",
    vocab_size=152064,
    num_key_value_heads=4,
    max_position_embeddings=32768,
)
_QWEN3_30B_A3B = dataclasses.replace(
    _qwen3(2048, 48, 32, 6144, tied=False),
    model_type="qwen3_moe",
    num_key_value_heads=4,
    own={
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
)
_QWEN35_4B = TargetArchitecture(
    model_type="qwen3_5",
    vocab_size=248320,
    hidden_size=2560,
    num_hidden_layers=32,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=256,
    intermediate_size=9216,
    rms_norm_eps=1e-6,
    rope_theta=1e7,
    tie_word_embeddings=True,
    max_position_embeddings=262144,
    layer_types=(("linear_attention",) * 3 + ("full_attention",)) * 8,
    partial_rotary_factor=0.25,
    own={
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    },
)
OTHER_TARGETS = {  # the same; layers from 1 to the third from last, evenly
    "meta-llama/Llama-3.1-8B-Instruct": (_LLAMA31_8B, (1, 8, 15, 22, 29), 128002),
    "Qwen/Qwen2.5-7B-Instruct": (_QWEN25_7B, (1, 7, 13, 19, 25), 151669),
    "Qwen/Qwen3-30B-A3B": (_QWEN3_30B_A3B, (1, 12, 23, 34, 45), 151669),
    "Qwen/Qwen3.5-4B": (_QWEN35_4B, (1, 8, 15, 22, 29), 248070),
}
"""Targets for which the paper has no drafter, and which have its settings all the same."""


def deepseek_v4(name: str, target: str, kind: str) -> Config:
    """The drafter that comes with a DeepSeek-V4: three layers, blocks of five, the last three layers tapped.

    How DeepSeek trained it is not published; steps and learning rate are those of the drafters that are released apart.

    Args:
      name: of the target in the config's name.
      target: Flash's or Pro's id on the hub.
      kind: of drafter; dspark5 if empty.
    """
    raw = _DEEPSEEK_V4 | (_PRO if "Pro" in target else _FLASH)
    shape = TargetArchitecture.from_hf({key: value for key, value in raw.items() if not key.startswith("dspark_")})
    last, kind = shape.num_hidden_layers, kind or "dspark5"
    drafter = DrafterConfig(
        num_layers=3, block_size=5, target_layer_ids=(last - 3, last - 2, last - 1), mask_token_id=128799,
        markov_rank=raw["dspark_markov_rank"],
    )  # fmt: skip
    config = _experiment(f"{kind}_{name}", target, shape, drafter, together=1)  # its layers need the memory
    # All experts of a layer are 13 GB in Flash. Of a v5p:4x4x4 a step takes half as long as with fsdp alone (`plan`).
    return as_kind(dataclasses.replace(config, mesh=MeshConfig(tensor=4)), kind)


_DEEPSEEK_V4 = {
    "model_type": "deepseek_v4", "vocab_size": 129280, "num_key_value_heads": 1, "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_lora_rank": 1024, "index_n_heads": 64, "index_head_dim": 128, "sliding_window": 128, "num_hash_layers": 3,
    "num_experts_per_tok": 6, "n_shared_experts": 1, "swiglu_limit": 10.0, "hc_mult": 4, "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "rope_theta": 10000, "compress_rope_theta": 160000,
    "max_position_embeddings": 1048576, "tie_word_embeddings": False,
    "rope_scaling": {
        "type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1,
    },
}  # fmt: skip
_FLASH = {
    "hidden_size": 4096, "num_hidden_layers": 43, "num_attention_heads": 64, "q_lora_rank": 1024, "o_groups": 8,
    "n_routed_experts": 256, "moe_intermediate_size": 2048, "routed_scaling_factor": 1.5, "index_topk": 512,
    "compress_ratios": [0, 0, *(4, 128) * 20, 4], "dspark_markov_rank": 256,
}  # fmt: skip
_PRO = {
    "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536, "o_groups": 16,
    "n_routed_experts": 384, "moe_intermediate_size": 3072, "routed_scaling_factor": 2.5, "index_topk": 1024,
    "compress_ratios": [128, 128, *(4, 128) * 29, 4], "dspark_markov_rank": 512,
}  # fmt: skip
"""Of the releases of July and August 2026 (DeepSeek-V4-Flash-0731, DeepSeek-V4-Pro-0813)."""


def target_like(arch: TargetArchitecture) -> str:
    """Id of the released target that has this shape, as its fine-tunes have; '' if there is none."""
    same = ("model_type", *SIZES)
    return next(
        (name for name, (shape, *_) in TARGETS.items() if all(getattr(shape, x) == getattr(arch, x) for x in same)), ""
    )


def released(name: str, target: str, kind: str) -> Config:
    """The experiment of a released drafter: ten epochs of 1.3 M answers.

    The target's shape is stated, so that the config can be checked and planned without its weights.

    Args:
      name: of the target in the config's name.
      target: one of `TARGETS` or `OTHER_TARGETS`; `--config.target.path` names where its weights are.
      kind: of drafter; DSpark if empty.
    """
    kind = kind or "dspark"
    shape, taps, mask = (TARGETS | OTHER_TARGETS)[target]
    drafter = DrafterConfig(num_layers=5, block_size=7, target_layer_ids=taps, mask_token_id=mask, markov_rank=256)
    return as_kind(_experiment(f"{kind}_{name}", target, shape, drafter, together=4), kind)


def _experiment(name: str, target: str, shape: TargetArchitecture, drafter: DrafterConfig, *, together: int) -> Config:
    """Ten epochs of 1.3 M answers with a dspark drafter: 512 of them in a step, with 512 blocks of each.

    Answers of Qwen3-4B take 950 tokens with their prompts (DeepSeek's features of them, 31 kB a token, are 38 TB), so
    that `together` of them share a sequence of 4096. `train` says how many of one's own do.
    """
    return Config(
        name=name,
        target=TargetConfig(path=target, architecture=shape),
        drafter=drafter,
        data=DataConfig(prompts=("open-perfectblend",), max_prompt_length=2048, max_length=4096, pack=together > 1),
        optim=OptimConfig(learning_rate=6e-4, warmup_ratio=0.04),
        train=TrainConfig(
            steps=25390,
            batch_size=512 // together,
            accumulate=8,
            num_anchors=512 * together,
            checkpoint_every=1000,
        ),
        eval=EvalConfig(
            prompts=tuple(f"eval_datasets/{name}.jsonl" for name in BENCHMARKS),
            batch_size=64,
            max_new_tokens=2048,
            speed_prompts=4,
        ),
    )
