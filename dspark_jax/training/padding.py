"""What padding takes of a step, and how packing spends it on samples (`data.pack`)."""

from dspark_jax.config import Config
from dspark_jax.kinds import KINDS


def describe_padding(config: Config, samples: int, tokens: int, ways: int) -> str:
    """One line where samples share sequences, or two of them could on average; empty otherwise.

    Packed sequences with so many more anchors, and so many fewer of them in a batch, hold the same samples and blocks
    in a step (docs/results.md has what that gained).

    Args:
      config: of the run.
      samples: that there are.
      tokens: of all of them.
      ways: devices that the sequences of a micro-batch are split over.
    """
    together = config.data.max_length * samples / max(tokens, 1)
    train, anchors = config.train, not KINDS[config.drafter.kind].token_by_token
    if config.data.pack and samples:
        blocks = f", {train.num_anchors / together:.0f} blocks of each" if anchors else ""
        return (
            f"packing: about {together:.1f} samples in a sequence, {train.batch_size * together:.0f} in a step{blocks}"
        )
    each, multiple = int(together), train.accumulate * ways
    if each < 2:
        return ""
    batch = max(1, round(train.batch_size / each / multiple)) * multiple
    settings = f"data.pack=True train.batch_size={batch}"
    if anchors:
        settings += f" train.num_anchors={train.num_anchors * each}"
    share = 1 - tokens / (config.data.max_length * samples)
    return f"padding: {share:.0%} of the rows; {settings} would train on about as many samples and blocks in a step"
