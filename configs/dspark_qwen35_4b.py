"""Drafters for Qwen3.5-4B with the hyperparameters of those that were released for Qwen3 (paper section 4).

    python -m dspark_jax.train --config configs/dspark_qwen35_4b.py \
        --config.target.path=/models/Qwen3.5-4B --config.data.prompts='("prompts.jsonl",)'
    python -m dspark_jax.plan --config configs/dspark_qwen35_4b.py --topology v6e:2x4
"""

from dspark_jax.config import Config
from dspark_jax.presets import released


def get_config(arg: str = "dspark") -> Config:
    """`arg`: the kind of drafter, dspark if empty."""
    return released("qwen35_4b", "Qwen/Qwen3.5-4B", arg)
