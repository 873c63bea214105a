"""Drafters for Qwen2.5-7B with the hyperparameters of those that were released for Qwen3 (paper section 4).

    python -m dspark_jax.train --config configs/dspark_qwen25_7b.py \
        --config.target.path=/models/Qwen2.5-7B-Instruct --config.data.prompts='("prompts.jsonl",)'
    python -m dspark_jax.plan --config configs/dspark_qwen25_7b.py --topology v5e:4x4
"""

from dspark_jax.config import Config
from dspark_jax.presets import released


def get_config(arg: str = "dspark") -> Config:
    """`arg`: the kind of drafter, dspark if empty."""
    return released("qwen25_7b", "Qwen/Qwen2.5-7B-Instruct", arg)
