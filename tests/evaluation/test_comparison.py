"""Drafters side by side: gains and their growth pair prompts and seeds, what is missing is shown as such."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax.evaluation.acceptance import Counts
from dspark_jax.evaluation.comparison import describe, estimate_tau, gain, growth
from dspark_jax.evaluation.comparison_plan import Plan, Point
from dspark_jax.evaluation.comparison_plots import study_plot
from dspark_jax.evaluation.comparison_seeds import TauEstimate, over_seeds
from dspark_jax.evaluation.comparison_table import table
from dspark_jax.evaluation.comparison_time import forecast, training_seconds


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


RESAMPLES = 300
SETS = {"a": range(8), "b": range(8, 13)}
"""Prompts of each set."""


def trained(rng: np.random.Generator, better: float, seeds: Sequence[int]) -> dict[int, Counts]:
    """Counts of 13 prompts for each seed: seeds differ by a fifth, prompts by more."""
    found = {}
    for seed in seeds:
        rounds = rng.integers(10, 60, 13)
        tokens = np.round(rounds * better * rng.uniform(1.5, 2.5, 13) * rng.uniform(0.9, 1.1)).astype(int)
        reached = np.stack([rounds, rng.integers(0, 3, 13)], axis=1)
        found[seed] = Counts(tokens, rounds, np.minimum(reached, 1), reached, reached + 1)
    return found


def combined(counts: dict[int, Counts]) -> TauEstimate:
    names = [name for name, members in SETS.items() for _ in members]
    return over_seeds({seed: estimate_tau(names, one, RESAMPLES, 5) for seed, one in counts.items()})


def resampled(counts: dict[int, Counts], seeds: Sequence[int], value: Any) -> np.ndarray:
    """[S] by the definition: every resample is written out, prompt by prompt and seed by seed."""
    chosen = {}
    for number, (name, members) in enumerate(SETS.items()):
        rng = np.random.default_rng([5, number])
        often = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=RESAMPLES)
        chosen[name] = [np.repeat(list(members), row) for row in often]
    count = len(seeds)
    drawn = np.random.default_rng([count, RESAMPLES]).multinomial(count - 1, np.full(count, 1 / count), size=RESAMPLES)
    found = []
    for number in range(RESAMPLES):
        of_seeds = []
        for seed in np.repeat(list(seeds), drawn[number]):
            of_sets = [value(counts[seed], chosen[name][number]) for name in SETS]
            of_seeds.append(np.mean(of_sets))
        found.append(np.mean(of_seeds))
    return np.asarray(found)


def tau(counts: Counts, prompts: np.ndarray) -> float:
    return sum(int(counts.tokens[i]) for i in prompts) / sum(int(counts.rounds[i]) for i in prompts)


def test_intervals_of_several_seeds_are_those_of_the_written_out_resamples() -> None:
    rng = np.random.default_rng(0)
    counts, seeds = trained(rng, 1.0, (4, 5, 6)), (4, 5, 6)
    one = combined(counts)
    every = [np.mean([tau(counts[seed], np.asarray(list(m))) for m in SETS.values()]) for seed in seeds]
    assert one.tau == pytest.approx(np.mean(every))
    draws = resampled(counts, seeds, tau)
    np.testing.assert_allclose(one.interval, np.quantile(draws, [0.025, 0.975]), rtol=1e-12)
    # A set: mean over seeds of the ratio of sums; a position that a seed never reached is left out of its mean.
    entry = describe(one, {}, None)
    assert entry["tau_by_seed"] == pytest.approx(dict(zip("456", every, strict=True)))
    accepted = np.mean([sum(counts[s].accepted[:8, 1]) / sum(counts[s].reached[:8, 1]) for s in seeds])
    assert entry["prompt_sets"]["a"]["conditional_acceptance"][1] == pytest.approx(accepted)


def test_gains_of_several_seeds_are_paired_by_seed_and_prompt() -> None:
    rng = np.random.default_rng(1)
    one, other = trained(rng, 1.2, (0, 1, 2)), trained(rng, 1.0, (0, 1, 2))
    value, bounds = gain(combined(one), combined(other))
    draws = resampled(one, (0, 1, 2), tau) / resampled(other, (0, 1, 2), tau) - 1
    np.testing.assert_allclose(bounds, np.quantile(draws, [0.025, 0.975]), rtol=1e-12)
    assert value == pytest.approx(combined(one).tau / combined(other).tau - 1)
    # A fifth more everywhere, whatever the seeds and prompts: no spread is left.
    more = {s: Counts(6 * c.tokens, 5 * c.rounds, c.accepted, c.reached, c.proposed) for s, c in other.items()}
    np.testing.assert_allclose(np.hstack(gain(combined(more), combined(other))), 0.2, rtol=1e-9)
    # Where a training is missing, its seed counts for neither.
    without = {seed: more[seed] for seed in (0, 2)}
    np.testing.assert_allclose(np.hstack(gain(combined(without), combined(other))), 0.2, rtol=1e-9)
    assert np.isnan(np.hstack(gain(combined({3: more[0]}), combined(other)))).all()


def test_seeds_vary_in_the_interval_as_their_mean_does() -> None:
    """Prompts alike, so that only seeds vary: the variance of the draws is that of a mean of three, s^2 / 3."""
    rounds, block = np.full(13, 10), np.ones((13, 1), int)
    taus = np.asarray([20, 24, 31])
    one = combined({seed: Counts(rounds * t // 10, rounds, block, block, block) for seed, t in enumerate(taus)})
    pairs = [np.mean(pair) / 10 for pair in itertools.product(taus, repeat=2)]
    assert set(np.round(one.draws, 9)) == set(np.round(pairs, 9))
    assert np.var(pairs) == pytest.approx(np.var(taus / 10, ddof=1) / 3)
    assert np.var(one.draws) == pytest.approx(np.var(pairs), rel=0.15)


def test_the_table_of_several_seeds_shows_how_many_and_over_dspark() -> None:
    rng = np.random.default_rng(2)
    found = {"dspark": combined(trained(rng, 1.1, (0, 1, 2))), "mtp": combined(trained(rng, 0.7, (0, 1)))}
    entries = {kind: describe(one, found, None, ("dspark",)) | {"parameters": 1234567} for kind, one in found.items()}
    lines = table(entries, {"mtp-seed2": "no memory"}, "title").splitlines()
    assert "over dspark" in lines[1] and "over dflash" not in lines[1] and lines[1].endswith("parameters")
    assert lines[2].split()[:2] == ["dspark", "3"] and lines[3].split()[:2] == ["mtp", "2"]
    assert lines[3].endswith("1,234,567")
    assert "mtp-seed2" in lines[-1] and "failed: no memory" in lines[-1]


def test_how_long_it_will_take(tmp_path: Path) -> None:
    """From the rows of the runs that have any; a drafter that has none takes as long as the mean."""
    rows = ['{"step": 10, "seconds_per_step": 2.0}', '{"step": 20, "heldout/tau": 2}', '{"step": 20, "secon']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    assert training_seconds(tmp_path, 450) == 900 and training_seconds(tmp_path / "none", 450) is None
    names = ["dspark", "mtp", "dspark-seed1", "mtp-seed1"]
    points = [Point("main", kind, 0, (kind, f"{kind}-seed1")) for kind in ("dspark", "mtp")]
    plan = Plan(dict.fromkeys(names), points)  # type: ignore[arg-type]
    assert forecast(plan, 2, [], {}) == (
        "4 trainings (2 drafters x 2 seeds), 0 of them finished; how long they take is told when the first is done"
    )
    assert "1 of them finished; one takes about 15 min, so about 45 min of" in forecast(plan, 2, ["dspark"], {"dspark": 900})  # fmt: skip # noqa: E501
    both = {"dspark": 900.0, "mtp": 9000.0}
    assert "one takes about 1 h 22 min, so about 2 h 45 min of" in forecast(plan, 2, names[:2], both)
    assert forecast(plan, 2, names, both) == "4 trainings (2 drafters x 2 seeds), 4 of them finished"
