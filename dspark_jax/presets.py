"""The released targets' shapes, and the settings of the drafters that were released for them (paper section 4)."""

import dataclasses

from dspark_jax.benchmarks import BENCHMARKS
from dspark_jax.config import (
    Config,
    DataConfig,
    DrafterConfig,
    EvalConfig,
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
    config = Config(
        name=f"{kind}_{name}",
        target=TargetConfig(path=target, architecture=shape),
        drafter=DrafterConfig(num_layers=5, block_size=7, target_layer_ids=taps, mask_token_id=mask, markov_rank=256),
        data=DataConfig(prompts=("open-perfectblend",), max_prompt_length=2048, max_length=4096),
        optim=OptimConfig(learning_rate=6e-4, warmup_ratio=0.04),
        train=TrainConfig(
            steps=25390,
            batch_size=512,
            accumulate=32 if kind == "eagle3" else 8,  # EAGLE-3 learns from every row, not from 512 anchors
            num_anchors=512,
            checkpoint_every=1000,
        ),
        eval=EvalConfig(
            prompts=tuple(f"eval_datasets/{name}.jsonl" for name in BENCHMARKS),
            batch_size=64,
            max_new_tokens=2048,
            speed_prompts=4,
        ),
    )
    return as_kind(config, kind)
