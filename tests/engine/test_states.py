"""A target whose layers keep states decodes with drafts that are taken back all the time: its greedy output is that of
one pass over the whole sequence, which has no cache at all."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import MeshConfig, TargetArchitecture
from dspark_jax.engine import generate, schedulers
from dspark_jax.engine.models import Models
from dspark_jax.engine.serving import Engine
from dspark_jax.sharding import make_mesh
from dspark_jax.target.families.family import FULL, LINEAR
from dspark_jax.target.model import Target
from tests.conftest import others_slow

VOCAB, SIZE, BUDGET, CAPACITY = 23, 3, 24, 80
PROMPTS = [[int(t) for t in np.random.default_rng(i).integers(0, VOCAB, n)] for i, n in enumerate((1, 31, 6, 3, 38))]


@functools.cache
def target(vocab: int = VOCAB) -> Target:
    """Two layers with states and one without."""
    own = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    own |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4}
    arch = TargetArchitecture(
        "qwen3_5", vocab, 16, 3, 4, 2, 8, 48, tie_word_embeddings=True, max_position_embeddings=128,
        layer_types=(LINEAR, FULL, LINEAR), partial_rotary_factor=0.5, own=own,
    )  # fmt: skip
    return Target(arch, rngs=nnx.Rngs(2), scale=0.3)


@jax.jit
def uncached(model: Target, tokens: jax.Array) -> jax.Array:
    return model.unembed(model.forward(tokens, jnp.arange(tokens.shape[1])[None]).last_hidden)


def assert_greedy(answers: Sequence[Any]) -> None:
    """Every token is the best one after those before it."""
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = np.zeros(CAPACITY, np.int32)
        tokens[: len(prompt) + BUDGET] = [*prompt, *map(int, answer)]  # of the full budget, or this does not fit
        logits = np.asarray(uncached(target(), tokens[None])[0])[len(prompt) - 1 :][:BUDGET]
        chosen = logits[np.arange(BUDGET), tokens[len(prompt) :][:BUDGET]]
        assert (chosen > logits.max(axis=1) - 1e-4).all()


@pytest.mark.parametrize("how", others_slow(("drafts", "plain", "flat"), "drafts"))
def test_batches(models: Any, how: str) -> None:
    drafting = Models(target(), models.near(target(), SIZE))
    sizes = (6,) if how == "flat" else ()
    result = generate(
        drafting.plain() if how == "plain" else drafting,
        PROMPTS,
        max_new_tokens=BUDGET,
        verify_sizes=sizes,
        batch_size=8,
    )
    assert_greedy(result.tokens)
    if how != "plain":
        taken = np.concatenate(result.acceptance_lengths)
        assert (taken == 1).sum() > 10 and (taken > 1).sum() > 10


SCHEDULERS = {
    "threshold": schedulers.threshold(0.5),
    "early stop": schedulers.early_stop([1.0] * 24),
    "lagged": schedulers.lagged([1.0] * 24, [0.7] * SIZE, capacities=(5, 9, 14, 20)),
    "adaptive": schedulers.adaptive(1 / 1.7, probe=2, trial_share=np.inf),
}


@pytest.mark.parametrize("name", others_slow(SCHEDULERS, "lagged"))
def test_every_scheduler_takes_back_what_it_verified_for_nothing(models: Any, name: str) -> None:
    drafting = Models(target(), models.near(target(), SIZE, confidence=True))
    result = generate(drafting, PROMPTS, max_new_tokens=BUDGET, batch_size=8, scheduler=SCHEDULERS[name])
    assert_greedy(result.tokens)
    assert len({int(n) for lengths in result.acceptance_lengths for n in lengths}) > 1


@pytest.mark.slow
def test_sampled_tokens_are_the_targets(models: Any) -> None:
    """4000 answers to one prompt: their first four tokens have the distribution of passes without a cache.

    The second token is drafted by a drafter that knows little, so that most rounds take rows back, and the third and
    fourth come out of what is left then.
    """
    vocab, prompt, samples = 5, [3, 1, 4, 0, 2, 2, 1], 4000
    model = target(vocab)
    drafter = models.near(model, SIZE, noise=2.0)
    result = generate(
        Models(model, drafter), [prompt] * samples, max_new_tokens=6, temperature=1.0, seed=5, batch_size=samples
    )
    ends = np.indices((vocab,) * 4).reshape(4, -1).T
    texts = jnp.concatenate([jnp.broadcast_to(jnp.asarray(prompt), (len(ends), len(prompt))), ends], axis=1)
    hidden = model.forward(texts, jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape)).last_hidden
    shares = np.asarray(jax.nn.softmax(model.unembed(hidden[:, len(prompt) - 1 : -1]), axis=-1), np.float64)
    exact = np.take_along_axis(shares, ends[..., None], axis=-1)[..., 0].prod(axis=1)
    drawn = np.stack([tokens[:4] for tokens in result.tokens]) @ vocab ** np.arange(3, -1, -1)
    counts = np.bincount(drawn, minlength=vocab**4)
    assert models.chi_square(counts, exact) > 1e-6
    wrong = exact.reshape(vocab, vocab, -1).swapaxes(0, 1).reshape(-1)
    assert models.chi_square(counts, wrong) < 1e-9  # the test tells other distributions from it
    taken = np.concatenate([lengths[:1] for lengths in result.acceptance_lengths])
    assert (taken == 1).sum() > 500 and (taken > 1).sum() > 500


@pytest.mark.parametrize("chunk", [2, 32])
@pytest.mark.slow
def test_slots(models: Any, chunk: int) -> None:
    """Prompts come in chunks while others decode, on two devices and on one; slots are reused."""
    drafter, mesh = models.near(target(), SIZE), MeshConfig(2, 1, 1) if chunk == 2 else MeshConfig(1, 1, 1)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: mesh.data])):
        engine = Engine(Models(target(), drafter), slots=2, capacity=CAPACITY, prefill_chunk=chunk, max_stop_tokens=4)
    with engine:
        requests = [engine.submit(prompt, max_new_tokens=BUDGET, temperature=0.0) for prompt in PROMPTS]
        while engine.step():
            pass
        assert_greedy([request.result().tokens for request in requests])


@pytest.mark.slow
def test_a_sampled_answer_does_not_depend_on_its_neighbours(models: Any) -> None:
    drafting = Models(target(), models.near(target(), SIZE))
    how = {"max_new_tokens": BUDGET, "temperature": 0.8, "seed": 3}
    together = generate(drafting, PROMPTS, batch_size=8, **how).tokens
    by_two = generate(drafting, PROMPTS, batch_size=2, **how).tokens
    for one, other in zip(together, by_two, strict=True):
        np.testing.assert_array_equal(one, other)
