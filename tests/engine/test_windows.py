"""A target with windows decodes many windows long from caches of one: greedy output is that of one pass over the whole
sequence, which has no cache at all."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import MeshConfig, TargetArchitecture
from dspark_jax.drafter.none import NO_DRAFTER
from dspark_jax.engine import generate, schedulers
from dspark_jax.engine.models import Models
from dspark_jax.engine.serving import Engine
from dspark_jax.engine.slots import open_slots
from dspark_jax.sharding import make_mesh
from dspark_jax.target.cache import ring_rows
from dspark_jax.target.families.family import FULL, SLIDING
from dspark_jax.target.model import Target
from tests.conftest import others_slow

VOCAB, WINDOW, SIZE, BUDGET, CAPACITY = 23, 14, 3, 40, 80
PROMPTS = [[int(t) for t in np.random.default_rng(i).integers(0, VOCAB, n)] for i, n in enumerate((1, 31, 6, 18, 38))]


@functools.cache
def target() -> Target:
    """Two sliding layers and a global one."""
    arch = TargetArchitecture(
        "gemma4", VOCAB, 16, 3, 4, 2, 8, 48, tie_word_embeddings=True, max_position_embeddings=128,
        layer_types=(SLIDING, SLIDING, FULL), sliding_window=WINDOW, sliding_rope_theta=1e4, global_head_dim=16,
        num_global_key_value_heads=1, attention_k_eq_v=True, partial_rotary_factor=0.25, final_logit_softcapping=5.0,
    )  # fmt: skip
    return Target(arch, rngs=nnx.Rngs(2), scale=0.1)  # says something new all the time


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
        assert (chosen > logits.max(axis=1) - 1e-5).all()


@pytest.mark.parametrize("how", others_slow(("plain", "drafts", "flat"), "plain", "flat"))
def test_batches(models: Any, how: str) -> None:
    """Prompts of several windows and of none, read in one piece; drafts are taken back all the time."""
    drafter = NO_DRAFTER if how == "plain" else models.near(target(), SIZE)
    sizes = (6,) if how == "flat" else ()
    result = generate(Models(target(), drafter), PROMPTS, max_new_tokens=BUDGET, verify_sizes=sizes, batch_size=8)
    assert_greedy(result.tokens)
    if drafter is not NO_DRAFTER:
        taken = np.concatenate(result.acceptance_lengths)
        assert (taken == 1).sum() > 20 and (taken > 1).sum() > 10


@pytest.mark.parametrize("chunk", others_slow((2, 32), 2))
@pytest.mark.slow
def test_slots(models: Any, chunk: int) -> None:
    """Prompts come in chunks while others decode, in such as a ring takes at once (on two devices) and in
    larger; slots are reused."""
    drafter, mesh = models.near(target(), SIZE), MeshConfig(2, 1, 1) if chunk == 2 else MeshConfig(1, 1, 1)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: mesh.data])):
        engine = Engine(Models(target(), drafter), slots=2, capacity=CAPACITY, prefill_chunk=chunk, max_stop_tokens=4)
    with engine:
        requests = [engine.submit(prompt, max_new_tokens=BUDGET, temperature=0.0) for prompt in PROMPTS]
        while engine.step():
            pass
        assert_greedy([request.result().tokens for request in requests])


def test_layers_with_a_window_keep_no_more_than_they_see(models: Any) -> None:
    slots = jax.eval_shape(
        functools.partial(open_slots, count=2, rows=CAPACITY, stops=4), Models(target(), models.near(target(), SIZE)),
        schedulers.fixed(),
    )  # fmt: skip
    caches = slots.state.target_cache
    for window, block in ((1, 1), (9, 8), (10, 8), (11, 8), (1024, 8), (1026, 17)):
        rows = ring_rows(window, block)
        assert window + block - 1 <= rows - 2 * block + 1 < window + block - 1 + 16 and rows % 16 == 0
    assert caches[FULL].length == CAPACITY and caches[SLIDING].length == 32  # 14 + 3 and 7 around them, in tiles
