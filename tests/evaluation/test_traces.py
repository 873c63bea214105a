from pathlib import Path

import numpy as np
import pytest

from dspark_jax.engine.result import DecodeResult
from dspark_jax.evaluation.traces import Traces, record, usable_positions

STOP = (7, 9)
# Request 0 drafts stop 9 at position 2 and it is accepted; 1 has no round; 2 drafts a stop at 1 that is not accepted.
DRAFTED = [np.array([[1, 2, 3], [4, 9, 7]]), np.zeros((0, 3), int), np.array([[7, 1, 1], [5, 5, 7]])]
ACCEPTED = [np.array([3, 2]), np.zeros(0, int), np.array([0, 2])]
PROPOSED = [np.array([3, 2]), np.zeros(0, int), np.array([3, 3])]
EMITTED = [np.array([4, 2]), np.zeros(0, int), np.array([1, 3])]


@pytest.fixture
def traces() -> Traces:
    result = DecodeResult(
        block_size=3,
        tokens=[np.zeros(6), np.zeros(1), np.zeros(4)],
        stopped=np.array([True, False, False]),
        acceptance_lengths=EMITTED,
        accepted_lengths=ACCEPTED,
        proposal_lengths=PROPOSED,
        drafted=DRAFTED,
        confidence=[rows.astype(np.float32) / 10 for rows in DRAFTED],
    )
    return record(result, np.array([0, 1, 1]), ["math", "chat"], STOP)


def test_positions_up_to_the_first_drafted_stop_are_usable():
    assert usable_positions(np.concatenate(DRAFTED), STOP).tolist() == [3, 2, 1, 3]
    assert usable_positions(np.concatenate(DRAFTED), ()).tolist() == [3, 3, 3, 3]


def test_record(traces: Traces):
    assert traces.set_names == ("math", "chat")
    assert traces.prompt_set.tolist() == [0, 1, 1]
    assert traces.request.tolist() == [0, 0, 2, 2]
    assert traces.rounds_of.tolist() == [0, 2, 2, 4]
    assert traces.accepted.tolist() == [3, 2, 0, 2]
    assert traces.proposed.tolist() == [3, 2, 3, 3]
    assert traces.emitted.tolist() == [4, 2, 1, 3]
    assert traces.usable.tolist() == [3, 2, 1, 3]
    assert traces.confidence is not None and traces.confidence.shape == (4, 3)


def test_whether_a_position_counts_does_not_depend_on_its_outcome():
    """Drafts survive with probability 0.6 each, and one in four is a stop token. Taking the rounds that "verified at
    least k drafts" (trap 25) would bias survival at the third position; taking drafted stops does not."""
    rng = np.random.default_rng(0)
    rounds = 200_000
    drafted = np.where(rng.random((rounds, 3)) < 0.25, 9, 1)
    survives = (rng.random((rounds, 3)) < 0.6).cumprod(axis=1).astype(bool)
    usable = usable_positions(drafted, STOP)
    accepted = np.minimum(survives.sum(axis=1), usable)
    ended = (accepted == usable) & (usable < 3)
    proposed = np.where(ended, usable, 3)
    by_drafted = np.mean(accepted[usable > 2] > 2)
    by_accepted = np.mean(accepted[proposed > 2] > 2)
    assert by_drafted == pytest.approx(0.216, abs=0.006)  # five standard errors
    assert by_accepted < 0.18


def test_taking_requests_renumbers_them(traces: Traces):
    part = traces.take(np.array([False, True, True]))
    assert part.request.tolist() == [1, 1]
    assert part.rounds_of.tolist() == [0, 0, 2]
    assert part.prompt.tolist() == [1, 1] and part.prompt_set.tolist() == [1, 1]
    assert part.accepted.tolist() == [0, 2]
    assert part.confidence is not None
    np.testing.assert_array_equal(part.confidence, np.float32([[7, 1, 1], [5, 5, 7]]) / np.float32(10))


def test_halves_share_no_prompt_and_keep_the_sets_balanced():
    rng = np.random.default_rng(1)
    prompts = np.sort(rng.integers(0, 30, 50))
    request = np.repeat(np.arange(50), 2)
    rows = np.ones(100, int)
    traces = Traces(3, ("a", "b"), prompts % 2, prompts, request, rows, rows, rows, rows, None)
    first, second = traces.halves()
    assert not set(first.prompt) & set(second.prompt)
    assert len(first.prompt) + len(second.prompt) == 50
    assert len(first.accepted) + len(second.accepted) == 100
    for number in (0, 1):
        counts = [len(set(half.prompt[half.prompt_set == number])) for half in (first, second)]
        assert abs(counts[0] - counts[1]) <= 1


def test_saved_and_loaded(traces: Traces, tmp_path: Path):
    for one in (traces, Traces(**{**vars(traces), "confidence": None})):
        one.save(tmp_path / "traces.npz")
        loaded = Traces.load(tmp_path / "traces.npz")
        for name, value in vars(one).items():
            np.testing.assert_array_equal(getattr(loaded, name), value)
        assert isinstance(loaded.block_size, int) and loaded.set_names == one.set_names
