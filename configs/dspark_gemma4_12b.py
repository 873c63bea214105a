"""Drafters for Gemma 4 12B with the hyperparameters of the released ones (paper section 4: ten epochs of 1.3 M).

    python -m dspark_jax.train --config configs/dspark_gemma4_12b.py \
        --config.target.path=/models/gemma-4-12B-it --config.data.prompts='("prompts.jsonl",)'
    python -m dspark_jax.train --config configs/dspark_gemma4_12b.py:dflash  # or eagle3, mtp (`dspark_jax.kinds`)
    python -m dspark_jax.plan --config configs/dspark_gemma4_12b.py --topology v6e:4x4
"""

from dspark_jax.config import Config
from dspark_jax.presets import released


def get_config(arg: str = "dspark") -> Config:
    """`arg`: the kind of drafter, dspark if empty."""
    return released("gemma4_12b", "google/gemma-4-12B-it", arg)
