"""The acceptance rule: recorded vectors, sampling through `verify`. Exact enumeration is in test_lossless.py."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine import schedulers
from dspark_jax.engine.commit import committed_round
from dspark_jax.engine.generate import Prompts, decode, decode_shape
from dspark_jax.engine.models import Models
from dspark_jax.engine.sampling import Requests, Uniforms, request_keys
from dspark_jax.engine.state import DecodeState
from dspark_jax.engine.verify import Verdict, judge, verify
from dspark_jax.ops.sampling import Sampling, draw, probabilities, token_probabilities, words
from dspark_jax.ops.speculative_verify import acceptance_probabilities, residual
from dspark_jax.ops.speculative_verify.xla import next_distribution

FLOAT32 = 2e-6  # a few roundings of numbers up to 1


@pytest.mark.parametrize("temperature", (0.0, 0.7, 1.0))
def test_golden_sampling(golden: Path, temperature: float) -> None:
    io = load_file(golden / "unit" / "sampling.safetensors")
    target_logits, draft_logits = jnp.asarray(io["target_logits"]), jnp.asarray(io["draft_logits"])
    tokens = jnp.asarray(io["tokens"], jnp.int32)
    target, draft = probabilities(target_logits, temperature), probabilities(draft_logits, temperature)

    def expect(value: Any, name: str) -> None:
        np.testing.assert_allclose(value, io[f"T{temperature}_{name}"], rtol=1e-5, atol=FLOAT32, err_msg=name)

    expect(target, "target_probs")
    expect(draft, "draft_probs")
    expect(residual(target, draft), "residual")
    expect(jnp.argmax(target_logits, axis=-1), "greedy_token")
    chosen = [
        token_probabilities(logits[:, None], tokens[:, None], Sampling.constant(temperature, len(tokens)))[:, 0]
        for logits in (draft_logits, target_logits)
    ]
    expect(acceptance_probabilities(*chosen), "accept_prob")


@pytest.mark.parametrize("static_greedy", (False, True))
def test_golden_verify(golden: Path, static_greedy: bool) -> None:
    """All recorded trials in one batch of mixed temperatures; greedy ones also through the greedy shortcut."""
    io = load_file(golden / "unit" / "verify.safetensors")
    trials = json.loads((golden / "unit" / "verify.json").read_text())["trials"]
    trials = [trial for trial in trials if not static_greedy or trial["temperature"] == 0]
    rows = np.asarray([trial["i"] for trial in trials])
    tokens = np.maximum(io["tokens"][rows], 0).astype(np.int32)
    proposal = Proposal(jnp.asarray(tokens), jnp.asarray(io["draft_logits"][rows]), None)
    lengths = jnp.asarray([trial["draft_token_count"] for trial in trials])
    uniforms = Uniforms(
        words(jnp.zeros(tokens.shape)), words(jnp.abs(io["u_accept"][rows])), words(jnp.full(len(rows), 0.4))
    )
    temperature = jnp.asarray([trial["temperature"] for trial in trials], jnp.float32)
    sampling = Sampling(temperature, greedy=static_greedy)
    target_logits = jnp.asarray(io["target_logits"][rows])
    verdict = jax.jit(judge)(target_logits, proposal, lengths, Requests(uniforms, sampling, NO_STOPS))
    following = next_distribution(target_logits, proposal.logits, verdict.accepted, lengths, sampling)
    assert sum(trial["terminated_by_stop_token"] for trial in trials) >= 1
    for row, trial in enumerate(trials):
        assert int(verdict.accepted[row]) == sum(trial["accept_prefix_mask"] or []), trial
        stops = jnp.asarray(trial["stop_token_ids"] or [-1, -1], jnp.int32)
        one = Proposal(proposal.tokens[row : row + 1], proposal.logits[row : row + 1], None)
        verdict_row = Verdict(verdict.accepted[row : row + 1], verdict.next_token[row : row + 1])
        entry, ended = jitted_settle(one, lengths[row : row + 1], verdict_row, stops)
        assert int(entry.accepted[0]) == trial["accepted_draft_tokens"], trial
        assert int(entry.proposed[0]) == trial["effective_proposal_length"], trial
        if trial["terminated_by_stop_token"]:
            assert ended[0] and int(entry.emitted[0]) == trial["accepted_draft_tokens"], trial
            continue
        np.testing.assert_allclose(following[row], io["next_dist"][trial["i"]], atol=FLOAT32, err_msg=str(trial))
        drawn = draw(jnp.asarray(io["next_dist"][trial["i"]]), words(jnp.float32(0.4)))
        assert int(verdict.next_token[row]) == int(drawn)
        assert int(entry.emitted[0]) == trial["accepted_draft_tokens"] + 1, trial


jitted_settle = jax.jit(committed_round)


NO_STOPS = jnp.asarray([-1])
PAIRS = [(0, 1), (2, 2), (3, 4)]  # seeds of the target's and the drafter's table; (2, 2) agree exactly


@jax.jit
def one_round(target: Any, drafter: Any, anchors: jax.Array, sampling: Sampling, key: jax.Array) -> Any:
    """Drafted tokens and verdict for many requests with fresh uniforms."""
    batch, size = len(anchors), drafter.block_size
    draft, accept, following = jax.random.split(key, 3)
    uniforms = Uniforms(
        words(jax.random.uniform(draft, (batch, size))),
        words(jax.random.uniform(accept, (batch, size))),
        words(jax.random.uniform(following, (batch,))),
    )
    ones, none = jnp.ones(batch, jnp.int32), jnp.zeros(batch, bool)
    state = DecodeState(anchors[:, None], ones, ones, ones, none, none, ones, ones, target.init_cache(batch, 1), None)
    proposal, _ = drafter.propose(target, None, anchors, ones, uniforms.draft, sampling)
    lengths = jnp.full(batch, size)
    requests = Requests(uniforms, sampling, NO_STOPS)
    return proposal.tokens, verify(Models(target, drafter), state, proposal, lengths, requests)[0]


@pytest.mark.parametrize("temperature", (1.0, 0.5))
@pytest.mark.parametrize("pair", PAIRS)
def test_first_token_of_a_jitted_round(models: Any, pair: tuple[int, int], temperature: float) -> None:
    """100,000 requests of mixed anchors through `verify`; the first token of each is distributed as the target says."""
    vocab, size, batch = 6, 3, 100_000
    target = models.bigram_target(models.table(vocab, pair[0], 1.5))
    drafter = models.bigram_drafter(models.table(vocab, pair[1], 1.5), size)
    anchors = np.arange(batch) % vocab
    sampling = Sampling.constant(temperature, batch)
    tokens, verdict = jax.device_get(one_round(target, drafter, jnp.asarray(anchors), sampling, jax.random.key(5)))
    if pair[0] == pair[1]:
        assert (verdict.accepted == size).all()
    else:
        assert set(verdict.accepted.tolist()) == set(range(size + 1))
    first = np.where(verdict.accepted > 0, tokens[:, 0], verdict.next_token)
    truth = np.asarray(probabilities(target.table[...], temperature), np.float64)
    for anchor in range(vocab):
        counts = np.bincount(first[anchors == anchor], minlength=vocab)
        assert models.chi_square(counts, truth[anchor]) > 1e-4, anchor
        assert models.chi_square(counts, truth[(anchor + 1) % vocab]) < 1e-6  # it has the power to refuse


@pytest.mark.parametrize("temperature", (1.0, 0.6))
@pytest.mark.parametrize("pair", PAIRS)
def test_joint_distribution_of_four_tokens(models: Any, pair: tuple[int, int], temperature: float) -> None:
    """160,000 tokens through the whole loop against the product of the target's conditionals, 4^4 cells."""
    vocab, batch, new = 4, 40_000, 4
    target = models.bigram_target(models.table(vocab, pair[0], 1.2))
    drafter = models.bigram_drafter(models.table(vocab, pair[1], 1.2), 3)
    ones, both = jnp.ones(batch, jnp.int32), Models(target, drafter)
    state, _ = decode(
        both,
        Prompts(jnp.full((batch, 1), 2), ones, ones + new, request_keys(11, jnp.arange(batch))),
        Sampling.constant(temperature, batch),
        jnp.asarray([-1]),
        schedulers.fixed(),
        shape=decode_shape(1, new, both, trace=False),
    )
    tokens = np.asarray(state.tokens)[:, 1 : 1 + new]
    counts = np.bincount(np.ravel_multi_index(tuple(tokens.T), (vocab,) * new), minlength=vocab**new)
    step = np.asarray(probabilities(target.table[...], temperature), np.float64)
    truth = step[2][:, None, None, None] * step[:, :, None, None] * step[None, :, :, None] * step[None, None]
    assert models.chi_square(counts, truth) > 1e-4
    shuffled = np.roll(truth.reshape(-1), 1)
    assert models.chi_square(counts, shuffled) < 1e-6  # the statistic has the power to refuse another distribution


def test_accepting_needs_a_smaller_uniform_and_the_prefix() -> None:
    """A uniform equal to the ratio rejects, and nothing after a rejection is accepted."""
    target_logits = jnp.log(jnp.asarray([[[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]]]))
    proposal = Proposal(jnp.asarray([[0, 1]]), jnp.log(jnp.asarray([[[0.5, 0.5], [0.5, 0.5]]])), None)
    sampling = Sampling.constant(1.0, 1)
    for first, expected in ((0.49, 2), (0.51, 0)):
        drawn = (jnp.zeros((1, 2)), jnp.asarray([[first, 0.0]]), jnp.asarray([0.9]))
        uniforms = Uniforms(*map(words, drawn))
        verdict = judge(target_logits, proposal, jnp.asarray([2]), Requests(uniforms, sampling, NO_STOPS))
        assert int(verdict.accepted[0]) == expected
    assert not bool(jnp.float32(1.0) < acceptance_probabilities(jnp.float32(0.5), jnp.float32(0.5)))
    assert float(acceptance_probabilities(jnp.float32(0.0), jnp.float32(0.0))) == 0.0
