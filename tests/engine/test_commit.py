"""Stop tokens and budgets at every position of a round, and frozen requests."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.drafter.interface import Proposal
from dspark_jax.drafter.none import NO_DRAFTER
from dspark_jax.engine.commit import append, commit, committed_round, is_stop
from dspark_jax.engine.state import DecodeState
from dspark_jax.engine.verify import Verdict
from dspark_jax.target.model import TargetOutput

SIZE, STOP = 4, 99
NONE = jnp.asarray([-1])
ALONE: Any = SimpleNamespace(drafter=NO_DRAFTER)


def proposal_of(rows: list[list[int]]) -> Proposal:
    tokens = jnp.asarray(rows, jnp.int32)
    return Proposal(tokens, jnp.zeros((*tokens.shape, 1)), None)


def expected_round(drafts: list[int], length: int, accepted: int, following: int) -> tuple[list[int], int, bool]:
    """Committed tokens, counted proposal and whether the request ends, written as a loop (traps 25, 27)."""
    committed = []
    for token in drafts[:accepted]:
        committed.append(token)
        if token == STOP:
            return committed, len(committed), True
    return [*committed, following], length, following == STOP


def test_a_stop_token_at_every_position() -> None:
    """Every stop position x every accepted length x every scheduled length, in one batch."""
    cases = [
        (stop, accepted, length)
        for stop in range(SIZE + 2)
        for length in range(SIZE + 1)
        for accepted in range(length + 1)
    ]
    blocks = [[STOP if stop == k else 10 + k for k in range(SIZE + 1)] for stop, _, _ in cases]
    lengths = jnp.asarray([length for _, _, length in cases])
    accepted = jnp.asarray([n for _, n, _ in cases])
    following = jnp.asarray([block[n] for block, (_, n, _) in zip(blocks, cases, strict=True)])
    proposal = proposal_of([block[:SIZE] for block in blocks])
    entry, ended = jax.jit(committed_round)(proposal, lengths, Verdict(accepted, following), jnp.asarray([-1, STOP]))
    for i, (block, (_, n, length)) in enumerate(zip(blocks, cases, strict=True)):
        committed, proposed, stopped = expected_round(block[:SIZE], length, n, block[n])
        assert int(entry.emitted[i]) == len(committed), cases[i]
        assert int(entry.proposed[i]) == proposed, cases[i]
        assert int(entry.accepted[i]) == len(committed) - (committed == block[: n + 1]), cases[i]
        assert bool(ended[i]) == stopped, cases[i]


def state_of(batch: int, capacity: int, lengths: Any, limits: Any, finished: Any = False) -> DecodeState:
    column = jnp.zeros(batch, jnp.int32)
    finished = jnp.broadcast_to(jnp.asarray(finished), (batch,))
    return DecodeState(
        tokens=jnp.tile(jnp.arange(capacity), (batch, 1)),
        lengths=column + jnp.asarray(lengths),
        prompt_lengths=column + 1,
        limits=column + jnp.asarray(limits),
        finished=finished,
        stopped=finished,
        rounds=column + 3,
        keys=column,
        target_cache=None,
        draft_cache=None,
    )


def output() -> TargetOutput:
    return TargetOutput(jnp.zeros(0), jnp.zeros(0), None)


def test_the_budget_ends_a_request_at_every_position() -> None:
    """Five tokens are accepted with room for 1..7: never more than the room is taken, all five are counted."""
    room = jnp.arange(1, 8)
    batch = len(room)
    state = state_of(batch, 16, 5, 5 + room)
    proposal = proposal_of([[50, 51, 52, 53]] * batch)
    verdict = Verdict(jnp.full(batch, SIZE), jnp.full(batch, 54))
    after, entry = commit(ALONE, state, proposal, jnp.full(batch, SIZE), verdict, output(), NONE)
    assert entry.emitted.tolist() == [5] * batch
    assert after.lengths.tolist() == [6, 7, 8, 9, 10, 10, 10]
    assert after.finished.tolist() == [True] * 5 + [False] * 2
    assert not after.stopped.any()
    for row, length in zip(after.tokens, after.lengths, strict=True):
        assert row[:length].tolist() == [0, 1, 2, 3, 4, 50, 51, 52, 53, 54][: int(length)]


@pytest.mark.parametrize(("room", "stopped"), [(2, False), (3, True), (4, True)])
def test_a_stop_token_behind_the_budget_was_never_said(room: int, stopped: bool) -> None:
    state = state_of(1, 16, 5, 5 + room)
    verdict = Verdict(jnp.asarray([SIZE]), jnp.asarray([54]))
    proposal = proposal_of([[50, 51, STOP, 53]])
    after, entry = commit(ALONE, state, proposal, jnp.asarray([SIZE]), verdict, output(), jnp.asarray([STOP]))
    assert after.finished[0] and bool(after.stopped[0]) == stopped
    assert after.tokens[0, 5 : int(after.lengths[0])].tolist() == [50, 51, STOP][:room]
    assert int(entry.emitted[0]) == int(entry.proposed[0]) == 3


def test_finished_requests_stay_frozen() -> None:
    state = state_of(3, 12, [4, 5, 6], 12, jnp.asarray([True, False, True]))
    verdict = Verdict(jnp.asarray([4, 1, 0]), jnp.asarray([70, 71, STOP]))
    proposal = proposal_of([[60, 61, 62, 63]] * 3)
    after, _ = commit(ALONE, state, proposal, jnp.full(3, SIZE), verdict, output(), jnp.asarray([STOP]))
    assert after.lengths.tolist() == [4, 7, 6]
    assert after.rounds.tolist() == [3, 4, 3]
    assert after.finished.tolist() == [True, False, True]
    assert after.stopped.tolist() == [True, False, True]
    np.testing.assert_array_equal(after.tokens[::2], state.tokens[::2])
    assert after.tokens[1].tolist()[:7] == [0, 1, 2, 3, 4, 60, 71]


def test_is_stop_ignores_padding_ids() -> None:
    assert is_stop(jnp.asarray([-1, 3, 5]), jnp.asarray([-1, 5])).tolist() == [False, False, True]


@pytest.mark.parametrize("start", (0, 3, 5, 6))
def test_append_drops_what_exceeds_the_buffer(start: int) -> None:
    tokens, block = jnp.arange(6)[None], jnp.asarray([[20, 21, 22]])
    wanted = [*range(start), 20, 21, 22, *range(start + 3, 6)][:6]
    assert append(tokens, jnp.asarray([start]), block)[0].tolist() == wanted
