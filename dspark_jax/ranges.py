"""Which values the numbers of a config may have."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Numbers from `least` to `most`.

    Attributes:
      words: how a message says it.
      least: the smallest one.
      most: the largest one.
      open_below: leaves out `least`.
      open_above: leaves out `most`.
    """

    words: str
    least: float
    most: float = math.inf
    open_below: bool = False
    open_above: bool = True

    def __contains__(self, value: object) -> bool:
        """Whether a number is in it; NaN is in none, and where there is no largest number, infinity is not one."""
        assert isinstance(value, int | float)
        above = value > self.least if self.open_below else value >= self.least
        return above and (value < self.most if self.open_above else value <= self.most)


POSITIVE = Range("positive", 0, open_below=True)
NOT_NEGATIVE = Range("0 or above", 0)
SHARE = Range("from 0 to 1", 0, 1, open_above=False)
POSITIVE_SHARE = Range("above 0 and at most 1", 0, 1, open_below=True, open_above=False)
BELOW_ONE = Range("at least 0 and below 1", 0, 1)
WINDOW = Range("a whole number from 0 to 1073741824", 0, 2**30, open_above=False)  # rows are counted in 32 bits
SEED = Range("a whole number from 0 to 2147483647", 0, 2**31)

RANGES: Mapping[str, Range] = {
    "drafter.num_layers": POSITIVE,
    "drafter.block_size": POSITIVE,
    "drafter.initializer_range": POSITIVE,
    "drafter.conv_kernel_size": NOT_NEGATIVE,
    "drafter.conv_group_size": POSITIVE,
    "drafter.selector_top_k": POSITIVE,
    "drafter.draft_vocab_size": NOT_NEGATIVE,
    "drafter.sliding_window": WINDOW,
    "data.limit": NOT_NEGATIVE,
    "data.repeats": POSITIVE,
    "data.thinking_share": SHARE,
    "data.max_prompt_length": POSITIVE,
    "data.max_length": POSITIVE,
    "data.min_loss_tokens": NOT_NEGATIVE,
    "data.temperature": NOT_NEGATIVE,
    "data.answers.concurrency": POSITIVE,
    "data.answers.retries": NOT_NEGATIVE,
    "data.answers.retry_wait": NOT_NEGATIVE,
    "data.answers.timeout": POSITIVE,
    "data.answers.top_p": POSITIVE_SHARE,
    "data.answers.top_k": NOT_NEGATIVE,
    "data.answers.min_p": SHARE,
    "data.answers.max_new_tokens": NOT_NEGATIVE,
    "data.decode_batch_size": POSITIVE,
    "data.seed": SEED,
    "data.workers": POSITIVE,
    "loss.decay": POSITIVE,
    "loss.ce": NOT_NEGATIVE,
    "loss.l1": NOT_NEGATIVE,
    "loss.confidence": NOT_NEGATIVE,
    "loss.soft_ce": NOT_NEGATIVE,
    "loss.length": NOT_NEGATIVE,
    "optim.learning_rate": POSITIVE,
    "optim.muon_learning_rate": POSITIVE,
    "optim.warmup_ratio": SHARE,
    "optim.b1": BELOW_ONE,
    "optim.b2": BELOW_ONE,
    "optim.eps": POSITIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.max_grad_norm": POSITIVE,
    "train.steps": POSITIVE,
    "train.batch_size": POSITIVE,
    "train.accumulate": POSITIVE,
    "train.num_anchors": POSITIVE,
    "train.seed": SEED,
    "train.log_every": POSITIVE,
    "train.checkpoint_every": POSITIVE,
    "train.keep_checkpoints": POSITIVE,
    "train.evaluate_every": NOT_NEGATIVE,
    "train.evaluate_limit": NOT_NEGATIVE,
    "train.evaluate_tokens": POSITIVE,
    "train.refresh_every": NOT_NEGATIVE,
    "train.refresh_parts": POSITIVE,
    "train.vocab_chunk": POSITIVE,
    "eval.limit": NOT_NEGATIVE,
    "eval.batch_size": POSITIVE,
    "eval.max_new_tokens": POSITIVE,
    "eval.temperatures": NOT_NEGATIVE,
    "eval.speed_prompts": NOT_NEGATIVE,
    "eval.speed_threads": NOT_NEGATIVE,
    "eval.bootstrap": POSITIVE,
    "eval.seed": SEED,
    "compare.depths": POSITIVE,
    "compare.lengths": POSITIVE,
    "target.architecture.rms_norm_eps": POSITIVE,
    "target.architecture.rope_theta": POSITIVE,
    "target.architecture.sliding_rope_theta": NOT_NEGATIVE,
    "target.architecture.partial_rotary_factor": SHARE,
    "target.architecture.final_logit_softcapping": NOT_NEGATIVE,
}
"""By dotted path, for a tuple that of its entries. What is not here depends on other fields (`config_rules`)."""


def range_problems(config: Any) -> Iterator[str]:
    """Yields one line per number of a config that is out of its range."""
    for path, allowed in RANGES.items():
        value = config
        for name in path.split("."):
            value = getattr(value, name)
        if isinstance(value, tuple):
            yield from (f"{path} contains {one}; each must be {allowed.words}" for one in value if one not in allowed)
        elif value not in allowed:
            yield f"{path}={value} must be {allowed.words}" + (", and finite" if value == math.inf else "")
