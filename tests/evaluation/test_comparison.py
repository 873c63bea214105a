"""Drafters side by side: gains and their growth pair the prompts, what is missing is shown as such."""

import numpy as np
import pytest

from dspark_jax.evaluation.acceptance import Counts
from dspark_jax.evaluation.comparison import estimate_tau, gain, growth, table
from dspark_jax.evaluation.comparison_plots import study_plot


def test_gains_resample_the_prompts_of_both_alike() -> None:
    """One drafter accepts a fifth more on every prompt: the gain has no spread, though tau has."""
    rng = np.random.default_rng(0)
    rounds = rng.integers(20, 200, 30)
    block = np.ones((30, 2), int)
    names = ["a"] * 20 + ["b"] * 10
    base = rng.integers(100, 500, 30) * 5
    one, other = (estimate_tau(names, Counts(t, rounds, block, block, block), 200, 3) for t in (base // 5 * 6, base))
    value, bounds = gain(one, other)
    assert value == pytest.approx(0.2)
    np.testing.assert_allclose(bounds, 0.2, rtol=1e-9)
    assert np.ptp(one.interval) > 0.1
    expected = np.mean([base[:20].sum() / rounds[:20].sum(), base[20:].sum() / rounds[20:].sum()])
    assert other.tau == pytest.approx(expected)


def test_the_growth_of_a_gain_resamples_all_prompts_alike() -> None:
    """A fifth more on every prompt at length 4 and two fifths at 16: the gain grows by 20 points, without spread."""
    rng = np.random.default_rng(0)
    spent, block = rng.integers(20, 200, 12), np.ones((12, 2), int)
    base, longer = (rng.integers(100, 500, 12) * 5 for _ in range(2))
    taken = {4: {"rnn": base // 5 * 6, "dflash": base}, 16: {"rnn": longer // 5 * 7, "dflash": longer}}
    study = {
        length: {
            kind: estimate_tau(["a"] * 12, Counts(t, spent, block, block, block), 100, 3) for kind, t in kinds.items()
        }
        for length, kinds in taken.items()
    }
    (row,) = growth({16: study[16], 8: {}, 4: study[4]})
    assert (row["drafter"], row["baseline"], row["from"], row["to"]) == ("rnn", "dflash", 4, 16)
    np.testing.assert_allclose([row["growth"], *row["growth_ci95"]], 0.2, rtol=1e-9)
    assert growth({4: study[4]}) == [] and growth({4: study[4], 16: {"rnn": study[16]["rnn"]}}) == []


def test_the_table_shows_what_is_missing() -> None:
    entry = {"tau": None, "tau_ci95": [None, None], "prompt_sets": {"a": {"tau": None}}}
    printed = table({"dspark": entry}, {"mtp": "no memory"}, "title")
    assert "mtp" in printed.splitlines()[-1] and "failed: no memory" in printed
    assert "NaN" not in printed and "None" not in printed


def test_a_drafter_without_rounds_is_drawn() -> None:
    points = [{"drafter": "mtp", "depth": depth, "tau": None, "tau_ci95": [None, None]} for depth in (1, 2)]
    assert "mtp from nan to nan" in study_plot(points, "depth", "title").alt
