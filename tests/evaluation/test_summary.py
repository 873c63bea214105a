"""Accepted lengths by prompt set and domain, beside the paper's."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dspark_jax.benchmarks import BENCHMARKS, paper_tau
from dspark_jax.data.chat import PLAIN
from dspark_jax.evaluation.acceptance import Counts
from dspark_jax.evaluation.report import report
from dspark_jax.evaluation.summary import Measured, metrics_at, overview, paper_metrics, table

TAUS = {"gsm8k": 4.0, "math500": 3.0, "mbpp": 2.0, "mine": 1.0}


def measured(taus: dict[str, float]) -> Measured:
    """Two prompts per set, one round of twice as many tokens as the other's."""
    names = [name for name in taus for _ in range(2)]
    tokens = np.asarray([round(10 * taus[name]) for name in names]) + np.tile([-2, 2], len(taus))
    rounds, none = np.full(len(names), 10), np.zeros((len(names), 1), np.int64)
    conversations: Any = [SimpleNamespace(prompt=SimpleNamespace(prompt_set=name), options=PLAIN) for name in names]
    requests: Any = SimpleNamespace(owners=np.arange(len(names)))
    result: Any = SimpleNamespace(tokens=[np.zeros(3)] * len(names), stopped=np.ones(len(names)))
    return Measured(1.0, conversations, requests, result, Counts(tokens, rounds, none, none, none), None, None)


def metrics(paper: dict[str, Any] | None, taus: dict[str, float] = TAUS) -> dict[str, Any]:
    found = metrics_at(measured(taus), 50, 0)
    about = {"name": "x", "step": 1, "block_size": 1, "max_new_tokens": 8, "greedy_identical": True}
    return {**found, **about, "greedy_compared": 8, "greedy_different": 0, "temperatures": {}, "paper": paper}


def test_a_domain_is_the_mean_of_its_benchmarks():
    found = metrics_at(measured(TAUS), 50, 0)
    assert {name: one["tau"] for name, one in found["domains"].items()} == pytest.approx({"math": 3.5, "code": 2.0})
    low, high = found["domains"]["math"]["tau_ci95"]
    assert 3.3 <= low < 3.5 < high <= 3.7
    assert found["tau"] == pytest.approx(2.5)  # of all four
    assert metrics_at(measured({"mine": 1.0}), 50, 0)["domains"] == {}


def test_the_paper_s_means_are_over_the_sets_that_were_measured():
    assert paper_metrics("", "dspark", TAUS) is None and paper_metrics("Qwen/Qwen3-4B", "dspark", ["mine"]) is None
    found = paper_metrics("Qwen/Qwen3-4B", "dspark", TAUS)
    assert found["prompt_sets"] == {"gsm8k": 6.11, "math500": 5.70, "mbpp": 5.13}
    assert found["domains"] == pytest.approx({"math": (6.11 + 5.70) / 2, "code": 5.13})
    assert found["tau"] == pytest.approx((6.11 + 5.70 + 5.13) / 3)
    whole = paper_metrics("Qwen/Qwen3-4B", "dspark", BENCHMARKS)
    assert whole["tau"] == pytest.approx(np.mean(list(paper_tau("Qwen/Qwen3-4B", "dspark").values())))


def test_the_overview_has_the_paper_s_figures_beside_ours():
    lines = overview(metrics(paper_metrics("Qwen/Qwen3-4B", "dspark", TAUS)), Path("report.html")).splitlines()
    cells = {line.split("  ")[0]: line.split()[-1] for line in lines if re.search(r"\(.* to .*\)", line)}
    assert cells == {"gsm8k": "6.11", "math500": "5.70", "mbpp": "5.13", "mine": "-", "math": "5.91", "code": "5.13",
                     "macro average": "5.65"}  # fmt: skip
    assert lines[2].endswith("temperature 1            paper, T=1") and max(map(len, lines)) <= 80
    (math,) = (line for line in lines if line.startswith("math "))
    assert " 3.50 (" in math
    silent = overview(metrics(None, {"mine": 1.0}), Path("report.html"))
    assert "paper" not in silent and len(re.findall(r"\(\S+ to \S+\)", silent)) == 2


def load(users: list[int], **other: Any) -> dict[str, Any]:
    """Two users get 100 tokens per second each, four 75 each; with drafts a quarter more and a tenth less."""
    plain = np.asarray([{2: 200.0, 4: 300.0}[count] for count in users])
    drafted = plain * [{2: 1.25, 4: 0.9}[count] for count in users]
    curves = {
        name: {"concurrency": users, "tokens_per_second": [*rates], "per_user": [*(rates / users)]}
        for name, rates in (("plain", plain), ("fixed 1", drafted))
    }
    return {"cost_table": "a card", "invented": False, "curves": curves, **other}


def test_the_overview_says_what_the_rounds_would_bring_on_a_card_that_was_measured():
    lines = overview(metrics(None), Path("report.html"), load([2, 4])).splitlines()
    at = lines.index("these rounds at the times of a card (temperature 1)")
    assert [line.split("  ") for line in (re.sub("  +", "  ", one) for one in lines[at + 1 : at + 5])] == [
        ["", "2 users", "4 users"],
        ["plain", "200 tokens/s, 100 each", "300 tokens/s, 75 each"],
        ["drafting every round", "250, 125 each, x 1.25", "270, 68 each, x 0.90"],
        [""],
    ]
    assert max(map(len, lines)) <= 80
    fewest = overview(metrics(None), Path("report.html"), load([2])).splitlines()
    (alone,) = (line for line in fewest if line.startswith("plain  "))
    assert alone.split("  ")[-1] == "200 tokens/s, 100 each"
    without = overview(metrics(None), Path("report.html"))
    for none in (load([2, 4], invented=True), load([])):
        assert overview(metrics(None), Path("report.html"), none) == without


def test_table_and_report_show_domains_and_the_paper():
    found = metrics(paper_metrics("Qwen/Qwen3-4B", "dspark", TAUS))
    assert any(line.startswith("math ") and "3.500" in line for line in table(found).splitlines())
    page = report(found, None, None, {}, [])
    assert "Beside the figures of the paper, dspark for Qwen/Qwen3-4B" in page and "<td>5.91</td>" in page
    assert "Beside the figures" not in report(metrics(None), None, None, {}, [])
