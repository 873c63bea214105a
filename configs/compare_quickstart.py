"""The drafters of the paper side by side on the embedded target, on a CPU.

    python -m dspark_jax.compare --config configs/compare_quickstart.py --studies main

trains each of them with the settings of `configs/quickstart.py`; without `--studies` also by depth and draft length.
"""

import dataclasses
import runpy
from pathlib import Path

from dspark_jax.config import CompareConfig, Config

MAIN_TABLE = (
    "dspark",
    "dflash",
    "fill_in",
    "dflash2",
    "eagle3",
    "eagle3_llama",
    "mtp",
    "gated",
    "rnn",
    "distilled",
)
"""Names of `dspark_jax.kinds`; a further drafter is a line."""


def get_config(arg: str = "") -> Config:
    """Takes no argument."""
    if arg:
        raise ValueError(f"compare_quickstart takes no argument, got {arg!r}")
    config = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]("dspark")
    return dataclasses.replace(
        config,
        name="compare_quickstart",
        eval=dataclasses.replace(config.eval, temperatures=(1.0,)),
        compare=CompareConfig(drafters=MAIN_TABLE),
    )
