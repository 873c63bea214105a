"""Requests with settings of their own in one batch, under every scheduler: alone as among others, and lossless."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import InputError, TargetArchitecture
from dspark_jax.engine import generate, schedulers
from dspark_jax.engine.estimator import EstimateSettings
from dspark_jax.engine.generate import Prompts, decode, decode_shape
from dspark_jax.engine.models import Models
from dspark_jax.engine.sampling import request_keys, request_sampling
from dspark_jax.ops.sampling import distribution
from dspark_jax.target.model import Target
from tests.conftest import others_slow

VOCAB, SIZE = 16, 3
JAGGED = [9.0, 9.0, 8.0, 7.0, 5.6, 5.4, 4.8, 4.6, 4.0, 3.9, 3.2, 3.0, 2.9, 2.8, 2.4, 2.2, 2.1]
PRIOR = [0.8, 0.6, 0.4]
SCHEDULERS = {
    "fixed": schedulers.fixed(),
    "threshold": schedulers.threshold(0.5),
    "early stop": schedulers.early_stop(JAGGED),
    "lagged": schedulers.lagged(JAGGED, PRIOR, capacities=(4, 7, 9, 12)),
    "online": schedulers.early_stop(JAGGED, online=EstimateSettings(strength=1.0, discount=0.7, prior=0.8)),
    "adaptive": schedulers.adaptive(
        [1.0] * 9 + [0.7], 1.5, probe=2, trial_share=np.inf, online=EstimateSettings(strength=0.5, prior=0.6)
    ),
    "confident": schedulers.adaptive(  # what it decides depends on drafts that were rejected in earlier rounds
        [1.0] * 9 + [0.7],
        1.9,
        probe=2,
        trial_share=np.inf,
        online=EstimateSettings(0.1, 0.5, prior=0.6, confident=True),
    ),
}
SETTINGS: dict[str, Any] = {
    "temperature": [0.0, 1.0, 0.7, 0.0, 1.2, 0.9, 1.0, 0.0],
    "top_k": [0, 0, 5, 3, 0, 0, 0, 0],
    "top_p": [1.0, 1.0, 1.0, 0.5, 0.8, 1.0, 0.9, 1.0],
    "min_p": [0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.05, 0.9],
}
GREEDY = [0, 3, 7]


def prompts_of(count: int) -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, VOCAB, length).tolist() for length in rng.integers(1, 9, count)]


@pytest.fixture(scope="module")
def target() -> Target:
    """A random Qwen3 of one layer."""
    arch = TargetArchitecture("qwen3", VOCAB, 16, 1, 2, 1, 8, 32, 1e-6, 1e4, True, 64)
    return Target(arch, rngs=nnx.Rngs(2), scale=0.3)


@pytest.fixture(scope="module")
def drafter(models: Any, target: Any) -> Any:
    return models.near(target, SIZE, noise=1.0, confidence=True, taps=())


@pytest.mark.slow
def test_a_request_does_not_see_its_neighbours_its_slot_or_the_batch_size(target: Any, drafter: Any) -> None:
    """Greedy and sampled, filtered or not: the same tokens together, one at a time, and in another order by threes."""
    prompts, keys = prompts_of(8), request_keys(4, jnp.arange(8))
    run = functools.partial(generate, Models(target, drafter), max_new_tokens=16, prompt_width=8)
    together = run(prompts, keys=keys, batch_size=8, **SETTINGS)
    seeded = run(prompts, seed=4, batch_size=8, **SETTINGS)
    assert all(np.array_equal(a, b) for a, b in zip(seeded.tokens, together.tokens, strict=True))
    others = run(prompts, seed=5, batch_size=8, **SETTINGS).tokens
    assert [i for i in range(8) if np.array_equal(others[i], together.tokens[i])] == GREEDY
    alone = run(prompts, keys=keys, batch_size=1, **SETTINGS)
    order = np.asarray([5, 2, 7, 0, 6, 1, 4, 3])
    moved = {name: [values[i] for i in order] for name, values in SETTINGS.items()}
    shuffled = run([prompts[i] for i in order], keys=keys[order], batch_size=3, **moved)
    for i in range(8):
        assert alone.tokens[i].tolist() == together.tokens[i].tolist()
        assert alone.acceptance_lengths[i].tolist() == together.acceptance_lengths[i].tolist()
        assert shuffled.tokens[order.tolist().index(i)].tolist() == together.tokens[i].tolist()
    scheduled = run(prompts, keys=keys, batch_size=8, scheduler=SCHEDULERS["lagged"], **SETTINGS)
    assert all(scheduled.tokens[i].tolist() == together.tokens[i].tolist() for i in GREEDY)
    assert len(set(np.concatenate(scheduled.proposal_lengths).tolist())) > 1


def test_what_is_given_per_request_follows_the_request(target: Any, drafter: Any) -> None:
    """Prompts are sorted and padded inside; a maximum per request stays with its own."""
    prompts, most = prompts_of(5), [0, 3, 1, 2, 3]
    result = generate(Models(target, drafter), prompts, max_new_tokens=12, scheduler=schedulers.fixed(most))
    for lengths, limit in zip(result.proposal_lengths, most, strict=True):
        assert set(lengths.tolist()) == {limit}


@pytest.mark.parametrize("name", others_slow(("fixed", "early stop", "adaptive"), "fixed"))
@pytest.mark.slow
def test_flat_verification_changes_nothing(target: Any, drafter: Any, name: str) -> None:
    """The target computes the scheduled tokens alone, in one of several sizes; tokens and counts are those of rows of
    G + 1 for everybody, greedy and sampled, filtered or not."""
    prompts, most = prompts_of(8), [0, 3, 1, 2, 3, 0, 1, 0]
    scheduler = schedulers.fixed(most) if name == "fixed" else SCHEDULERS[name]
    run = functools.partial(
        generate,
        Models(target, drafter),
        prompts,
        max_new_tokens=16,
        prompt_width=8,
        scheduler=scheduler,
        seed=4,
    )
    dense = run(batch_size=8, verify_sizes=(), **SETTINGS)
    flat = run(batch_size=8, verify_sizes=(3, 10, 18), **SETTINGS)
    for field in ("tokens", "acceptance_lengths", "proposal_lengths"):
        for a, b in zip(getattr(dense, field), getattr(flat, field), strict=True):
            assert a.tolist() == b.tolist()
    if name == "fixed":  # and for any batch
        alone = run(batch_size=3, verify_sizes=(5,), **SETTINGS)
        assert [one.tolist() for one in alone.tokens] == [one.tolist() for one in dense.tokens]
        with pytest.raises(InputError, match="verify_sizes"):
            run(batch_size=8, verify_sizes=(0,))


def deviation(tokens: np.ndarray, expected: np.ndarray, context: np.ndarray) -> float:
    """p-value of tokens [N] under their own distributions expected [N, V], summed by context [N].

    Differences between an outcome and its probability given the past have mean zero and a known covariance, whatever
    the past was, so their sums are normal in the limit, and the quadratic forms of all contexts chi-square.
    """
    statistic, freedom = 0.0, 0
    for value in np.unique(context):
        chosen = context == value
        p = expected[chosen].astype(np.float64)
        p /= p.sum(axis=1, keepdims=True)
        surplus = np.eye(VOCAB)[tokens[chosen]].sum(axis=0) - p.sum(axis=0)
        common = p.sum(axis=0) > 20
        if common.sum() > 1:
            covariance = (np.diag(p.sum(axis=0)) - p.T @ p)[np.ix_(common, common)]
            statistic += float(surplus[common] @ np.linalg.pinv(covariance, rcond=1e-9) @ surplus[common])
            freedom += int(np.linalg.matrix_rank(covariance, tol=1e-6 * np.trace(covariance)))
    return float(jax.scipy.stats.chi2.sf(statistic, freedom))


@pytest.mark.parametrize("name", others_slow(SCHEDULERS, "fixed", "early stop"))
def test_sampled_tokens_are_distributed_as_the_targets(target: Any, drafter: Any, name: str) -> None:
    """102,400 tokens of a real Qwen3 in batches of four requests, by the token before and by rank."""
    groups, batch, new, width = 3200, 4, 8, 3
    prompt = jnp.asarray([[1, 4, 9], [7, 7, 2], [3, 0, 15], [12, 5, 5]])
    sampling = request_sampling(4, temperature=[0.9, 1.0, 0.8, 1.0], min_p=[0.0, 0.0, 0.2, 0.1])
    lengths = jnp.full(batch, width)
    models = Models(target, drafter)
    shape = decode_shape(width, new, models, trace=False)

    def one(keys: jax.Array) -> Any:
        prompts = Prompts(prompt, lengths, lengths + new, keys)
        state, log = decode(models, prompts, sampling, jnp.asarray([-1]), SCHEDULERS[name], shape=shape)
        return state.tokens[:, : width + new], log.proposed, log.emitted > 0

    keys = request_keys(8, jnp.arange(groups * batch)).reshape(groups, batch)
    rows, proposed, active = jax.device_get(jax.jit(jax.vmap(one))(keys))
    counts = np.bincount(proposed[active], minlength=SIZE + 1)
    assert (counts > 0).sum() == (1 if name == "fixed" else SIZE + 1), counts

    @jax.jit
    def expected(rows: jax.Array) -> jax.Array:
        """The target's distribution of every generated token given all before it: [groups, 4, new, V]."""
        flat = rows.reshape(-1, width + new)
        positions = jnp.broadcast_to(jnp.arange(width + new), flat.shape)
        hidden = target.forward(flat, positions).last_hidden[:, width - 1 : -1]
        return jax.vmap(distribution, (0, None))(target.unembed(hidden).reshape(groups, batch, new, VOCAB), sampling)

    truth = np.asarray(expected(rows)).reshape(-1, VOCAB)
    tokens = np.asarray(rows[..., width:]).reshape(-1)
    before = np.asarray(rows[..., width - 1 : -1]).reshape(-1)
    assert len(tokens) == 102_400
    assert (truth[np.arange(len(tokens)), tokens] > 0).all()
    assert deviation(tokens, truth, before) > 1e-3
    # By rank in its own distribution (0 = likeliest): a target that is a little hotter is refused.
    order = np.argsort(-truth, axis=1, kind="stable")
    rank = np.argsort(order, axis=1)[np.arange(len(tokens)), tokens]
    ranked, everywhere = np.take_along_axis(truth, order, axis=1), np.zeros_like(tokens)
    assert deviation(rank, ranked, everywhere) > 1e-3
    assert deviation(rank, ranked**0.95, everywhere) < 1e-6
