"""The embedded default: a drafter for the small target that ships with the package, on a CPU.

    python -m dspark_jax.train --config configs/quickstart.py
    python -m dspark_jax.train --config configs/quickstart.py:dflash

DSpark, or one of the other kinds of `dspark_jax.kinds`: dflash, dflash2, eagle3, eagle3_llama, mtp, gated, rnn,
fill_in, length, distilled.
"""

from pathlib import Path

import dspark_jax
from dspark_jax.config import (
    Config,
    DataConfig,
    DrafterConfig,
    EvalConfig,
    OptimConfig,
    TargetConfig,
    TrainConfig,
)
from dspark_jax.kinds import as_kind

QUICKSTART = Path(dspark_jax.__file__).resolve().parent / "quickstart"
DOMAINS = ("math", "code", "chat")


def get_config(arg: str = "dspark") -> Config:
    """`arg`: the kind of drafter, dspark if empty."""
    kind = arg or "dspark"
    config = Config(
        name=f"quickstart_{kind}",
        target=TargetConfig(path=str(QUICKSTART / "target")),
        drafter=DrafterConfig(
            num_layers=2,
            block_size=7,
            target_layer_ids=(0, 1, 2, 3, 4),
            mask_token_id=4095,
            markov_rank=64,
            dtype="bfloat16",
        ),
        data=DataConfig(
            prompts=tuple(str(QUICKSTART / "prompts" / f"{name}.train.jsonl") for name in DOMAINS),
            limit=360,
            max_prompt_length=128,
            max_length=256,
            pack=True,
        ),
        optim=OptimConfig(kind="muon", learning_rate=1e-2),
        train=TrainConfig(steps=450, batch_size=4, num_anchors=64, checkpoint_every=225, log_every=10, vocab_chunk=256),
        eval=EvalConfig(
            prompts=tuple(str(QUICKSTART / "prompts" / f"{name}.heldout.jsonl") for name in DOMAINS),
            limit=64,
            max_new_tokens=128,
            speed_prompts=8,
            speed_threads=1,
        ),
    )
    return as_kind(config, kind)
