"""The form in which models decode on a CPU: what a drafter reads has its type, so that no call converts it."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import Config, DataConfig, DrafterConfig, TargetArchitecture, TargetConfig, resolve
from dspark_jax.drafter import make_drafter
from dspark_jax.engine import schedulers
from dspark_jax.engine.generate import Prompts, decode, decode_shape, padded_stops
from dspark_jax.engine.models import Models
from dspark_jax.engine.sampling import request_keys, request_sampling
from dspark_jax.target.model import Target
from dspark_jax.vocabulary import encode_vocabulary

VOCAB, WIDTH, RANK = 96, 32, 8
ARCH = TargetArchitecture("qwen3", VOCAB, WIDTH, 3, 2, 1, 16, 48, 1e-6, 1e4, True, 256)


def models(head: str = "vanilla") -> Models:
    """A float32 target and a drafter that computes in bfloat16."""
    drafter = DrafterConfig(
        num_layers=1, block_size=3, target_layer_ids=(0, 1), mask_token_id=VOCAB - 1, markov_rank=RANK,
        markov_head_type=head, initializer_range=0.5,
    )  # fmt: skip
    given = TargetConfig(architecture=ARCH, dtype="float32")
    config = resolve(Config(target=given, drafter=drafter, data=DataConfig(max_length=64, max_prompt_length=16)))
    target = Target(ARCH, rngs=nnx.Rngs(0), scale=0.5)
    return Models(target, make_drafter(ARCH, config.drafter, dtype=jnp.bfloat16, rngs=nnx.Rngs(3)))


def conversions(both: Models) -> list[str]:
    """Tables whose type the compiled program of `decode` changes."""
    length = np.asarray([3], np.int32)
    prompts = Prompts(np.zeros((1, 4), np.int32), length, length + 16, request_keys(0, jnp.arange(1)))
    shape = decode_shape(4, 16, both, trace=False)
    arguments: Any = (both, prompts, request_sampling(1), padded_stops([]), schedulers.adaptive(0.5))
    program = decode.lower(*arguments, shape=shape).compile().as_text()
    tables = "|".join(f"{a},{b}" for a, b in ((VOCAB, WIDTH), (WIDTH, VOCAB), (VOCAB, RANK)))
    return re.findall(rf"\w+\[(?:{tables})\]\S* convert\(", program)


@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_no_table_is_converted_at_a_call(head: str) -> None:
    """Neither the LM head nor W1 and W2, which a loop would convert before it begins, whether or not it drafts."""
    given = models(head)
    both = given.for_decoding(batch_size=1)
    assert not conversions(both)
    wide, narrow = both.target.columns[...], both.target.draft_columns[...]
    assert (wide.dtype, narrow.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))
    for table in ("w1", "w2"):  # rounded to the drafter's type, as an accelerator holds them
        held, trained = (getattr(one.drafter.markov, table)[...] for one in (both, given))
        np.testing.assert_array_equal(held, trained.astype(jnp.bfloat16).astype(jnp.float32))
    both.target.draft_columns = None
    assert conversions(both)  # they are found where there are any


def test_the_head_is_held_twice_only_for_a_drafter_that_reads_it() -> None:
    both = models()
    assert not hasattr(both.plain().for_decoding(batch_size=1).target, "draft_columns")
    alike = Models(both.target, models().drafter)
    alike.drafter.dtype = jnp.float32
    assert not hasattr(alike.for_decoding(batch_size=1).target, "draft_columns")
    plain = models().plain()
    plain.target.dtype = jnp.bfloat16  # plain decoding has a type, but no rows of it
    assert not hasattr(plain.for_decoding(batch_size=1).target, "draft_columns")
    own = DrafterConfig(
        kind="eagle3", num_layers=1, block_size=3, target_layer_ids=(0, 1, 2), initializer_range=0.5,
        draft_vocab_size=3, draft_vocabulary=encode_vocabulary(np.array([0, 2, 3]), VOCAB),
    )  # fmt: skip
    some = Models(models().target, make_drafter(ARCH, own, dtype=jnp.bfloat16, rngs=nnx.Rngs(3)))
    assert not hasattr(some.for_decoding(batch_size=1).target, "draft_columns")
