"""Drafters for Qwen3-14B with the hyperparameters of the released ones (paper section 4: ten epochs of 1.3 M).

    python -m dspark_jax.train --config configs/dspark_qwen3_14b.py \
        --config.target.path=/models/Qwen3-14B --config.data.prompts='("prompts.jsonl",)'
    python -m dspark_jax.train --config configs/dspark_qwen3_14b.py:dflash  # or eagle3, mtp (`dspark_jax.kinds`)
    python -m dspark_jax.plan --config configs/dspark_qwen3_14b.py --topology v6e:4x4
"""

from dspark_jax.config import Config
from dspark_jax.presets import released


def get_config(arg: str = "dspark") -> Config:
    """`arg`: the kind of drafter, dspark if empty."""
    return released("qwen3_14b", "Qwen/Qwen3-14B", arg)
