"""Drafters for Llama-3.1-8B with the hyperparameters of those that were released for Qwen3 (paper section 4).

    python -m dspark_jax.train --config configs/dspark_llama31_8b.py \
        --config.target.path=/models/Llama-3.1-8B-Instruct --config.data.prompts='("prompts.jsonl",)'
    python -m dspark_jax.plan --config configs/dspark_llama31_8b.py --topology v5e:4x4
"""

from dspark_jax.config import Config
from dspark_jax.presets import released


def get_config(arg: str = "dspark") -> Config:
    """`arg`: the kind of drafter, dspark if empty."""
    return released("llama31_8b", "meta-llama/Llama-3.1-8B-Instruct", arg)
