"""The whole loop: lossless at temperature 0, stop tokens, budgets, batching, and what it refuses.

Sampled requests, alone and beside others, are in test_mixed_requests.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import DrafterConfig, InputError, MeshConfig
from dspark_jax.drafter import make_drafter
from dspark_jax.drafter.none import NO_DRAFTER
from dspark_jax.engine import Prompts, Requests, generate, prefill, schedulers
from dspark_jax.engine.generate import begin, ladder
from dspark_jax.engine.models import Models
from dspark_jax.engine.round import catch_up, decode_round
from dspark_jax.engine.sampling import request_keys, round_uniforms
from dspark_jax.ops.sampling import Sampling
from dspark_jax.sharding import make_mesh, state_shardings

VOCAB = 19


def prompts_of(count: int, longest: int = 12, seed: int = 0) -> list[list[int]]:
    """Random prompts; the first one has a single token."""
    rng = np.random.default_rng(seed)
    lengths = [1, *rng.integers(1, longest + 1, count - 1)]
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def target(models: Any) -> Any:
    return models.qwen3(VOCAB)


@pytest.fixture(scope="module")
def bigram(models: Any, target: Any) -> Any:
    return models.near(target, 3, noise=1.0, confidence=True)


@pytest.fixture(scope="module")
def dspark(target: Any) -> Any:
    config = DrafterConfig("dspark", 1, 3, (-1, 1), VOCAB - 1, 4, True, True)
    return make_drafter(target.arch, config, rngs=nnx.Rngs(3))


def greedy_without_cache(target: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Plain argmax decoding by whole forward passes, all prompts at once: no cache, no engine."""
    lengths, rows = np.asarray([len(prompt) for prompt in prompts]), np.arange(len(prompts))
    tokens = np.zeros((len(prompts), lengths.max() + new), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    for end in lengths + np.arange(new)[:, None]:
        tokens[rows, end] = forward_argmax(target, tokens)[rows, end - 1]
    return [tokens[row, length : length + new].tolist() for row, length in enumerate(lengths)]


@jax.jit
def forward_argmax(target: Any, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return jnp.argmax(target.unembed(target.forward(tokens, positions).last_hidden), axis=-1)


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return len(first) == len(second) and all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_greedy_speculation_equals_plain_decoding_on_100_prompts(target: Any, bigram: Any, dspark: Any) -> None:
    """In batches and one by one, padded alike so that either is one program, and once padded as is customary."""
    prompts = prompts_of(100)
    wide: dict[str, Any] = {"max_new_tokens": 16, "prompt_width": 12}
    plain = generate(Models(target), prompts, **wide, batch_size=20)
    assert plain.tau == 1.0 and (plain.rounds == 15).all() and plain.block_size == 0
    assert [tokens.tolist() for tokens in plain.tokens] == greedy_without_cache(target, prompts, 16)
    for drafter in (bigram, dspark):
        batched = generate(Models(target, drafter), prompts, **wide, batch_size=20)
        assert same(batched.tokens, plain.tokens)
        alone = generate(Models(target, drafter), prompts, **wide, batch_size=1)
        assert same(alone.tokens, plain.tokens)
        assert same(alone.acceptance_lengths, batched.acceptance_lengths)
        for emitted in batched.acceptance_lengths:
            assert 1 + emitted[:-1].sum() < 16 <= 1 + emitted.sum()  # no round too many, none too few
    tight = generate(Models(target, bigram), prompts, max_new_tokens=16, batch_size=20)
    assert same(tight.tokens, plain.tokens)
    assert set(np.concatenate(tight.accepted_lengths).tolist()) == {0, 1, 2, 3}


def test_equal_prompts_with_other_keys_differ(target: Any, bigram: Any) -> None:
    result = generate(Models(target, bigram), [[3, 1]] * 8, max_new_tokens=16, temperature=1.0)
    assert len({tuple(tokens.tolist()) for tokens in result.tokens}) > 1


def test_a_confidence_threshold_leaves_greedy_output_alone(target: Any, bigram: Any) -> None:
    prompts = prompts_of(20)
    free = generate(Models(target, bigram), prompts, max_new_tokens=16)
    cut = generate(Models(target, bigram), prompts, max_new_tokens=16, confidence_threshold=0.6)
    assert same(free.tokens, cut.tokens)
    assert {0, 1, 3} <= set(np.concatenate(cut.proposal_lengths).tolist())
    assert all((a <= p).all() for a, p in zip(cut.accepted_lengths, cut.proposal_lengths, strict=True))


@pytest.mark.slow
def test_rounds_without_drafts_leave_greedy_output_alone(target: Any, bigram: Any, dspark: Any) -> None:
    """Which rounds draft is decided by the batch; all drafts of a round are verified or nothing is drafted."""
    prompts = prompts_of(8)
    run = functools.partial(generate, prompts=prompts, max_new_tokens=16, prompt_width=12)
    plain = run(Models(target), batch_size=8)
    for drafter, size in ((bigram, 4), (dspark, 1)):
        mixed = run(
            Models(target, drafter),
            scheduler=schedulers.adaptive(1 / 1.7, probe=4, trial_share=np.inf),
            batch_size=size,
            trace=True,
        )
        assert same(mixed.tokens, plain.tokens)
        lengths = np.concatenate(mixed.proposal_lengths)
        assert set(lengths.tolist()) == {0, 3} and mixed.drafted is not None
        assert ((np.concatenate(mixed.drafted) >= 0) == (lengths > 0)[:, None]).all()
        assert np.concatenate(mixed.accepted_lengths).max() > 0 or drafter is dspark


@pytest.mark.slow
def test_the_drafter_is_shown_what_rounds_without_drafts_commit(target: Any, bigram: Any) -> None:
    """After any mix of rounds its cache, caught up, holds the features and tokens of everything before the anchor."""
    prompt = jnp.asarray([[3, 1, 4], [1, 5, 9]])
    lengths, sampling, scheduler = (
        jnp.full(2, 3),
        Sampling.constant(0.0, 2),
        schedulers.adaptive(1 / 1.7, probe=2, trial_share=np.inf),
    )
    keys, stops = request_keys(0, jnp.arange(2)), jnp.asarray([-1])
    models, prompts = Models(target, bigram), Prompts(prompt, lengths, lengths + 12, keys)
    first = Requests(round_uniforms(keys, lengths - 1, 0), sampling, stops)
    state = begin(models, scheduler, prefill(models, prompts, first, capacity=24))
    turn = jax.jit(functools.partial(decode_round, models, scheduler=scheduler))
    kinds = set()
    while not state.finished.all():
        state, entry = turn(state, Requests(round_uniforms(state.keys, state.positions, 3), sampling, stops))
        kinds.add(bool((entry.drafted >= 0).all()))
    assert kinds == {True, False}
    state = catch_up(models, state, jnp.bool_(True))
    shown, seen = state.draft_cache
    rows = state.tokens[:, :15]
    positions = jnp.broadcast_to(jnp.arange(15), rows.shape)
    features = target.forward(rows, positions, taps=bigram.taps).features
    np.testing.assert_array_equal(seen[:, :14], rows[:, :14])
    np.testing.assert_allclose(shown[:, :14], features[:, :14], atol=1e-5)


def cut_at(whole: np.ndarray, stop: int) -> tuple[list[int], bool]:
    hits = np.flatnonzero(whole == stop)
    return whole[: hits[0] + 1 if len(hits) else None].tolist(), bool(len(hits))


def test_stop_tokens_cut_where_they_first_appear(target: Any, bigram: Any, dspark: Any) -> None:
    prompts = prompts_of(20, seed=5)
    free = generate(Models(target), prompts, max_new_tokens=16)
    for drafter in (NO_DRAFTER, bigram, dspark):
        for stop in range(0, VOCAB, 4):
            result = generate(Models(target, drafter), prompts, max_new_tokens=16, stop_tokens=(stop, VOCAB + 5))
            for i, whole in enumerate(free.tokens):
                assert (result.tokens[i].tolist(), bool(result.stopped[i])) == cut_at(whole, stop)


def test_a_stop_token_at_every_place_of_a_round(models: Any) -> None:
    """The target counts upwards for ever and the drafter now and then miscounts: all places of a round come up."""
    count = jnp.arange(VOCAB)
    table = 9.0 * jax.nn.one_hot((count + 1) % VOCAB, VOCAB)
    wrong = jnp.where((count % 7 == 3)[:, None], jnp.roll(table, 1, axis=1), table)
    target, drafter = models.bigram_target(table), models.bigram_drafter(wrong, 3)
    places = set()
    for stop in range(VOCAB):
        result = generate(
            Models(target, drafter), [[start] for start in range(VOCAB)], max_new_tokens=24, stop_tokens=(stop,)
        )
        for start, tokens in enumerate(result.tokens):
            wanted = [(start + 1 + i) % VOCAB for i in range(VOCAB)]
            assert tokens.tolist() == wanted[: wanted.index(stop) + 1] and result.stopped[start]
            emitted, accepted = result.acceptance_lengths[start], result.accepted_lengths[start]
            assert 1 + emitted.sum() == len(tokens)
            assert (emitted[:-1] - accepted[:-1] == 1).all()
            if len(emitted):
                bonus = int(emitted[-1] - accepted[-1])
                places.add((int(accepted[-1]), bonus))
                assert result.proposal_lengths[start][-1] == (3 if bonus else accepted[-1])
            else:
                places.add((0, 0))  # the token of the prefill
    assert places == {(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (3, 1)}


@pytest.mark.parametrize("budget", (1, 2, 3, 4, 5, 7))
def test_budgets(target: Any, bigram: Any, budget: int) -> None:
    prompts = prompts_of(20)
    whole = generate(Models(target), prompts, max_new_tokens=16).tokens
    result = generate(Models(target, bigram), prompts, max_new_tokens=budget)
    assert same(result.tokens, [tokens[:budget] for tokens in whole])
    assert not result.stopped.any()
    if budget == 1:
        assert (result.rounds == 0).all() and np.isnan(result.tau)


@pytest.mark.slow
def test_the_drafter_is_shown_the_committed_tokens_and_their_features(target: Any, bigram: Any) -> None:
    """After every round its cache holds, for all positions before the anchor, the features of a fresh forward pass."""
    prompts = jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0], [6, 0, 0, 0, 0]])
    lengths = jnp.asarray([5, 2, 1])
    sampling, keys = Sampling.constant(1.0, 3), request_keys(0, jnp.arange(3))
    none, models = jnp.asarray([-1]), Models(target, bigram)
    first = Requests(round_uniforms(keys, lengths - 1, 0), sampling, none)
    batch = Prompts(prompts, lengths, lengths + 9, keys)
    state = jax.jit(prefill, static_argnames="capacity")(models, batch, first, capacity=24)
    turn = jax.jit(decode_round)
    features = jax.jit(lambda t, tokens: t.forward(tokens, jnp.broadcast_to(jnp.arange(24), (3, 24)), taps=(0,)))
    for _ in range(20):
        shown, seen = state.draft_cache
        fresh = features(target, state.tokens).features
        for b in range(3):
            end = int(state.lengths[b]) - 1
            if state.finished[b]:
                end = min(end, int(seen[b].max()))  # the last round's tokens may have been cut by the budget
            np.testing.assert_array_equal(seen[b, :end], state.tokens[b, :end])
            np.testing.assert_allclose(shown[b, :end], fresh[b, :end], atol=2e-5)
        if state.finished.all():
            break
        uniforms = round_uniforms(state.keys, state.positions, 3)
        state, _ = turn(models, state, Requests(uniforms, sampling, none))
    assert state.finished.all() and state.rounds.min() < state.rounds.max()


def test_trace_and_counts(target: Any, bigram: Any) -> None:
    prompts = prompts_of(8)
    result = generate(Models(target, bigram), prompts, max_new_tokens=16, trace=True, confidence_threshold=0.4)
    assert result.drafted is not None and result.confidence is not None
    for i, tokens in enumerate(result.tokens):
        assert result.drafted[i].shape == result.confidence[i].shape == (result.rounds[i], 3)
        position = 1
        for r, emitted in enumerate(result.acceptance_lengths[i]):
            row = result.drafted[i][r]
            kept = tokens[position : position + result.accepted_lengths[i][r]]
            np.testing.assert_array_equal(row[: len(kept)], kept)
            before = np.concatenate([tokens[position - 1 : position], row[:-1]])
            np.testing.assert_array_equal(result.confidence[i][r], bigram.confidence[...][before])
            position += emitted
    untraced = generate(Models(target, bigram), prompts, max_new_tokens=16)
    assert untraced.drafted is None and untraced.confidence is None
    assert untraced.tau == pytest.approx(np.concatenate(untraced.acceptance_lengths).mean())


def test_mesh_of_eight_devices_gives_the_same_tokens(target: Any, dspark: Any) -> None:
    prompts = prompts_of(8)
    alone = generate(Models(target, dspark), prompts, max_new_tokens=16)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        spread = [jax.device_put(module, state_shardings(module, mesh)) for module in (target, dspark)]
        meshed = generate(Models(spread[0], spread[1]), prompts, max_new_tokens=16)
    assert same(alone.tokens, meshed.tokens)


def test_no_prompts(target: Any) -> None:
    result = generate(Models(target), [], max_new_tokens=4)
    assert result.tokens == [] and result.rounds.shape == (0,)


def test_progress_counts_requests(target: Any) -> None:
    seen: list[int] = []
    generate(Models(target), prompts_of(16), max_new_tokens=2, batch_size=8, progress=seen.append)
    assert seen == [8, 8]


@pytest.mark.parametrize("size", (1, 2, 3, 4, 5, 7, 9, 13, 17, 100))
def test_ladder(size: int) -> None:
    step = ladder(size)
    assert size <= step <= max(1.5 * size, 2) and ladder(step) == step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, VOCAB]]}, "outside the vocabulary 0..18"),
        ({"prompts": [[-1]]}, "outside the vocabulary"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 256}, "max_position_embeddings=256"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": [1.0, 1.0]}, r"temperature has shape \(2,\) for 1 requests"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "warm"}, "temperature='warm'"),
        ({"top_k": -1}, "top_k=-1 is out of range"),
        ({"top_k": [1.5]}, "top_k=1.5 of request 0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": [1.01]}, "top_p=1.01 of request 0"),
        ({"min_p": 2}, "min_p=2"),
        ({"scheduler": schedulers.early_stop([1.0])}, "'early_stop' needs a drafter with a confidence head"),
        ({"scheduler": schedulers.fixed(), "confidence_threshold": 0.5}, "exclude each other"),
        ({"confidence_threshold": 0.5}, "confidence head"),
        ({"confidence_threshold": 1.5}, "confidence_threshold=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_input(target: Any, change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"prompts": [[1]], "max_new_tokens": 4} | change
    with pytest.raises(InputError, match=message) as error:
        generate(Models(target), settings.pop("prompts"), **settings)
    assert "\n" not in str(error.value)
