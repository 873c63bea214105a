"""What is said about padding: how to train on the same with less of it."""

import dataclasses

from dspark_jax.config import Config
from dspark_jax.presets import released
from dspark_jax.training.padding import describe_padding


def of(kind: str = "dspark") -> Config:
    """512 sequences of 4096 with 512 anchors, in 8 micro-batches."""
    config = released("qwen3_4b", "Qwen/Qwen3-4B", kind)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, pack=False),
        train=dataclasses.replace(config.train, batch_size=512, num_anchors=512),
    )


def test_settings_that_keep_samples_and_blocks() -> None:
    """Samples of 700 tokens: five to a sequence; 102 sequences are no whole number of micro-batches of four."""
    said = describe_padding(of(), samples=1000, tokens=700_000, ways=4)
    assert said.startswith("padding: 83% of the rows; data.pack=True train.batch_size=96 train.num_anchors=2560 would")


def test_a_batch_divides_over_devices_and_micro_batches() -> None:
    """32 devices and 8 micro-batches take 256 sequences at least."""
    assert "batch_size=256 " in describe_padding(of(), samples=10, tokens=1000, ways=32)


def test_drafters_that_learn_from_every_row_have_no_anchors() -> None:
    said = describe_padding(of("eagle3"), samples=1000, tokens=700_000, ways=1)
    assert "train.batch_size=104 would" in said and "anchors" not in said


def test_what_is_packed_is_said() -> None:
    """The released recipes hold about as many samples and blocks in a step as without packing, at 950 tokens each."""
    for kind, blocks in (("dspark", ", 475 blocks of each"), ("eagle3", "")):
        said = describe_padding(released("", "Qwen/Qwen3-4B", kind), samples=100, tokens=95_000, ways=4)
        assert said == f"packing: about 4.3 samples in a sequence, 552 in a step{blocks}"


def test_nothing_is_said_where_nothing_is_gained() -> None:
    assert not describe_padding(of(), samples=10, tokens=2049 * 10, ways=1)


def test_what_is_packed_is_said_of_long_samples_too() -> None:
    """A step has fewer of them than the recipe then, which is for its owner to see."""
    said = describe_padding(released("", "Qwen/Qwen3-4B", "dspark"), samples=10, tokens=32_000, ways=1)
    assert said == "packing: about 1.3 samples in a sequence, 164 in a step, 1600 blocks of each"
    assert not describe_padding(released("", "Qwen/Qwen3-4B", "dspark"), samples=0, tokens=0, ways=1)
