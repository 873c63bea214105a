"""Drafters for Qwen3-4B with the hyperparameters of the released ones (paper section 4: ten epochs of 1.3 M).

    python -m dspark_jax.train --config configs/dspark_qwen3_4b.py \
        --config.target.path=/models/Qwen3-4B --config.data.prompts='("prompts.jsonl",)'
    python -m dspark_jax.train --config configs/dspark_qwen3_4b.py:dflash  # or eagle3, mtp (`dspark_jax.kinds`)
    python -m dspark_jax.plan --config configs/dspark_qwen3_4b.py --topology v5e:4x4

`target.architecture` states the shape of the model, so that the config can be checked and planned without its weights.
"""

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

BENCHMARKS = ("gsm8k", "math500", "aime25", "mbpp", "humaneval", "livecodebench", "mt-bench", "alpaca", "arena-hard-v2")


def get_config(arg: str = "dspark") -> Config:
    """`arg`: the kind of drafter, dspark if empty."""
    kind = arg or "dspark"
    config = Config(
        name=f"{kind}_qwen3_4b",
        target=TargetConfig(
            path="Qwen/Qwen3-4B",
            architecture=TargetArchitecture(
                vocab_size=151936,
                hidden_size=2560,
                num_hidden_layers=36,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                intermediate_size=9728,
                rms_norm_eps=1e-6,
                rope_theta=1e6,
                tie_word_embeddings=True,
                max_position_embeddings=40960,
            ),
        ),
        drafter=DrafterConfig(
            num_layers=5,
            block_size=7,
            target_layer_ids=(1, 9, 17, 25, 33),
            mask_token_id=151669,
            markov_rank=256,
        ),
        data=DataConfig(prompts=("prompts/open_perfectblend.jsonl",), max_prompt_length=2048, max_length=4096),
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
