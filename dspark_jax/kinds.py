"""The drafters of the paper's comparison as settings: what a config changes to train one instead of another.

    dspark   Markov head and confidence head           gated, rnn   dspark with another sequential head
    dflash   dspark without heads                      length       dspark that maximises its expected accepted length
    eagle3   one layer, fed with its own outputs       mtp          one token per round

Everything else of a config (target, data, steps, optimizer) stays, so that drafters are compared on equal terms. Those
that go token by token are trained on every row of a sequence, as the reference trains EAGLE-3, and not at anchors only.
"""

import dataclasses
import math

from dspark_jax.config import Config, InputError, LossConfig

KINDS = ("dspark", "dflash", "eagle3", "mtp", "gated", "rnn", "length")

MASKLESS = ("eagle3", "mtp")
"""They go token by token, so nothing fills a block: `mask_token_id` says nothing of them, and presets have 0 there."""

EAGLE3_LOSS = LossConfig(decay=-1.0 / math.log(0.8), ce=0.0, l1=0.0, confidence=0.0, soft_ce=1.0, per_row=True)
"""The reference's: soft cross-entropy, step s weighs 0.8^s, divided by all rows, those of prompts and padding too."""

MTP_LOSS = LossConfig(ce=1.0, l1=0.0, confidence=0.0)
"""DeepSeek-V3's: cross-entropy with the data."""


def as_kind(config: Config, kind: str) -> Config:
    """The config with another drafter; depth, block size, taps, rank and compute type stay where they apply.

    Args:
      config: of a dspark drafter.
      kind: one of `KINDS`.

    Raises:
      InputError: the kind is unknown.
    """
    if kind not in KINDS:
        raise InputError(f"drafter kind {kind!r} is unknown; use one of: {', '.join(KINDS)}")
    drafter, loss = config.drafter, config.loss
    headless = {"markov_rank": 0, "confidence_head": False, "confidence_with_markov": False}
    if kind in ("dspark", "length", "gated", "rnn"):
        head = "vanilla" if kind in ("dspark", "length") else kind
        drafter = dataclasses.replace(drafter, markov_head_type=head)
    elif kind == "dflash":
        drafter = dataclasses.replace(drafter, kind=kind, **headless)
    elif kind == "eagle3":
        drafter, loss = dataclasses.replace(drafter, kind=kind, num_layers=1, **headless), EAGLE3_LOSS
    elif kind == "mtp":
        drafter = dataclasses.replace(drafter, kind=kind, num_layers=1, block_size=1, target_layer_ids=(), **headless)
        loss = MTP_LOSS
    if kind == "length":  # instead of the total variation; everything else is dspark's
        loss = dataclasses.replace(loss, l1=0.0, length=1.0)
    train = config.train
    if kind in MASKLESS:
        drafter = dataclasses.replace(drafter, mask_token_id=0)
        train = dataclasses.replace(train, num_anchors=config.data.max_length)
    return dataclasses.replace(config, drafter=drafter, loss=dataclasses.replace(loss), train=train)
