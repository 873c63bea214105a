"""The drafter that comes with DeepSeek-V4-Flash (DSpark-5), to be trained anew or further.

    python -m dspark_jax.train --config configs/dspark_deepseek_v4_flash.py \
        --config.target.path=/models/DeepSeek-V4-Flash --config.data.prompts='("prompts.jsonl",)'
    ... --config.train.init_from=/models/DeepSeek-V4-Flash  # begins with the released one
"""

from dspark_jax.config import Config
from dspark_jax.presets import deepseek_v4


def get_config(arg: str = "dspark5") -> Config:
    """`arg`: the kind of drafter, dspark5 if empty."""
    return deepseek_v4("deepseek_v4_flash", "deepseek-ai/DeepSeek-V4-Flash-0731", arg)
