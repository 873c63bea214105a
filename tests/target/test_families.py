"""Targets of every family against transformers in PyTorch, on small random models: one suite for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.drafter import make_drafter
from dspark_jax.engine import Models, generate
from dspark_jax.target.decode_weights import decode_weights, unstacked
from tests.conftest import others_slow
from tests.target.random_models import CASES, DRAFTER, ONE, TAPS, V, assert_close, oracle

QUICK = set(CASES) - {"llama2", "qwen2_yarn", "moe_all", "hybrid"}
"""The others have no field that one of these has not, or that of `moe_all` which greedy answers depend on as well."""


@pytest.mark.parametrize("case", others_slow(CASES, *QUICK))
def test_logits_and_taps_are_those_of_transformers(made, case):
    """Of training's and decoding's form, and of two documents that are packed into one sequence."""
    _, model, target = made(case)
    tokens = np.random.default_rng(0).integers(0, V, (2, 40))
    starts = jnp.asarray([[0] * 40, [0] * 14 + [14] * 26])
    expected = [oracle(model, tokens[:1]), oracle(model, tokens[1:, :14]), oracle(model, tokens[1:, 14:])]
    for form in (target, unstacked(target), decode_weights(target, jnp.float32)):

        @jax.jit
        def run(form=form):
            out = form.forward(tokens, jnp.arange(40) - starts, taps=TAPS, starts=starts)
            return out.features, form.unembed(out.last_hidden)

        for found, part in zip(run(), range(2), strict=True):
            assert_close(case, found[:1], expected[0][part])
            assert_close(case, found[1:, :14], expected[1][part])
            assert_close(case, found[1:, 14:], expected[2][part])


@pytest.mark.parametrize("case", others_slow(CASES, *QUICK))
def test_cached_decoding_is_that_of_transformers(made, case):
    """Two requests of different lengths in uneven pieces, with stale rows of a rolled-back draft in between."""
    _, model, target = made(case)
    target = decode_weights(target, jnp.float32)
    tokens = np.random.default_rng(1).integers(0, V, (2, 30))
    expected, _ = oracle(model, tokens)
    cache, starts = target.init_cache(2, 48, 16), np.array([0, 0])
    step = jax.jit(lambda t, p, c: target.forward(t, p, c, taps=TAPS))
    for lengths in ([15, 9], [1, 1], [6, 12], [8, 8]):
        fed = np.full((2, 16), 7)  # rows after a request's own are drafts that get rejected
        for b, length in enumerate(lengths):
            fed[b, :length] = tokens[b, starts[b] : starts[b] + length]
        out = step(fed, starts[:, None] + np.arange(16), cache)
        cache = out.cache
        for b, length in enumerate(lengths):
            assert_close(case, out.features[b, :length], expected[b, starts[b] : starts[b] + length])
        starts = starts + np.array(lengths)
    assert (starts == 30).all()


@pytest.mark.parametrize("case", ONE)
def test_greedy_answers_with_a_drafter_are_those_of_transformers(made, case):
    _, model, target = made(case)
    drafter = make_drafter(target.arch, DRAFTER, rngs=nnx.Rngs(1))
    prompts = [[3, 5, 7, 9], [11, 2]]
    found = generate(Models(target, drafter), prompts, max_new_tokens=12).tokens
    assert [len(answer) for answer in found] == [12, 12]
    for prompt, answer in zip(prompts, found, strict=True):
        text = [*prompt, *answer]
        logits = oracle(model, np.asarray([text]))[1][0]
        assert list(answer) == list(np.argmax(logits, -1)[len(prompt) - 1 : -1])
