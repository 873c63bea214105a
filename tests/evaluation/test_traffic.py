"""Open-loop traffic: the arrivals, that nothing is lost, and what is reported of it."""

import math
from typing import Any

import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import DrafterConfig, InputError, TargetArchitecture
from dspark_jax.drafter import make_drafter
from dspark_jax.engine import generate
from dspark_jax.engine.models import Models
from dspark_jax.engine.request import RequestMetrics
from dspark_jax.engine.serving import Engine
from dspark_jax.evaluation.traffic import (
    Arrival,
    Served,
    drive,
    parse_rates,
    poisson_arrivals,
    summarise,
    traffic_contenders,
    traffic_curves,
    traffic_table,
)
from dspark_jax.target.model import Target

PROMPTS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
SETS = ["a", "a", "a", "b"]


@pytest.fixture(scope="module")
def target() -> Target:
    arch = TargetArchitecture("qwen3", 32, 16, 1, 2, 1, 8, 32, 1e-6, 1e4, True, 128)
    return Target(arch, rngs=nnx.Rngs(2), scale=0.3)


@pytest.fixture(scope="module")
def drafter(target: Target) -> Any:
    return make_drafter(target.arch, DrafterConfig("dspark", 1, 3, (-1,), 31, 8, True, True), rngs=nnx.Rngs(1))


def test_arrivals_are_poisson_and_prompt_sets_alike() -> None:
    arrivals = poisson_arrivals(PROMPTS, SETS, 5.0, 4000, seed=3)
    gaps = np.diff([0.0, *(one.seconds for one in arrivals)])
    # Exponential gaps: mean and standard deviation are both 1 / rate (standard errors 1.6 % and 2.2 %).
    assert abs(gaps.mean() * 5 - 1) < 0.08 and abs(gaps.std() * 5 - 1) < 0.12
    assert abs(sum(one.prompt_set == "b" for one in arrivals) / 4000 - 0.5) < 0.04
    assert all(PROMPTS[3] == one.prompt for one in arrivals if one.prompt_set == "b")


def test_another_rate_is_the_same_traffic_at_another_pace() -> None:
    slow, fast = (poisson_arrivals(PROMPTS, SETS, rate, 20, seed=3) for rate in (1.0, 4.0))
    assert [(one.prompt, one.seed) for one in slow] == [(one.prompt, one.seed) for one in fast]
    np.testing.assert_allclose([one.seconds for one in slow], [4 * one.seconds for one in fast])


@pytest.mark.slow
def test_every_request_is_served_with_its_own_tokens(target: Target, drafter: Any) -> None:
    arrivals = poisson_arrivals(PROMPTS, SETS, 1e4, 9, seed=1)
    with Engine(Models(target, drafter), slots=2, capacity=16, prefill_chunk=4) as engine:
        served = drive(engine, arrivals, max_new_tokens=6, temperature=0.0)
    plain = generate(Models(target), [[*one.prompt] for one in arrivals], max_new_tokens=6, temperature=0.0)
    assert [one.tokens for one in served] == [len(tokens) for tokens in plain.tokens]
    assert [one.arrival for one in served] == arrivals
    assert all(one.metrics is not None and one.metrics.total_seconds for one in served)


def test_a_full_queue_turns_requests_away_and_they_are_counted(target: Target) -> None:
    arrivals = poisson_arrivals(PROMPTS, SETS, 1e6, 12, seed=1)
    engine = Engine(Models(target), slots=1, capacity=64, prefill_chunk=4, max_queue=1)
    with engine:
        served = drive(engine, arrivals, max_new_tokens=40, temperature=0.0)
    point = summarise(served, 1e6)
    assert point.refused == engine.metrics.refused > 0
    assert point.served + point.refused == 12


def test_summary_of_known_times() -> None:
    def served(at: float, tokens: int, first: float, total: float, rounds: int, emitted: int, admitted: int) -> Served:
        metrics = RequestMetrics(0.5, first, total, rounds, 0, admitted, emitted)
        return Served(Arrival(at, [1], "a", 0), tokens, metrics)

    runs = [
        served(1.0, 11, 1.0, 3.0, 5, 10, 15),
        served(2.0, 21, 2.0, 4.0, 10, 20, 30),
        Served(Arrival(3.0, [1], "a", 0), 0, None),
    ]
    point = summarise(runs, 2.0)
    assert (point.served, point.refused, point.offered) == (2, 1, 2.0)
    assert math.isclose(point.tokens_per_second, 32 / 5.0)  # from 1.0 to 6.0
    assert math.isclose(point.per_user, 7.5)  # 10 tokens in 2 s and 20 in 2 s
    assert math.isclose(point.first_token_p50, 1.5) and math.isclose(point.queue_p95, 0.5)
    assert math.isclose(point.accepted_length, 2.0) and math.isclose(point.budget, 4.0)
    nothing = summarise([runs[2]], 2.0)
    assert nothing.served == 0 and math.isnan(nothing.tokens_per_second) and math.isnan(nothing.per_user)


@pytest.mark.slow
def test_every_contender_sees_the_same_traffic(target: Target, drafter: Any) -> None:
    contenders = traffic_contenders(Models(target, drafter), np.linspace(1.0, 0.5, 20))
    assert list(contenders) == ["plain", "fixed 2", "fixed 3", "threshold 0.5", "early stop"]
    headless = make_drafter(target.arch, DrafterConfig("dflash", 1, 3, (-1,), 31, 0, False, False), rngs=nnx.Rngs(1))
    assert list(traffic_contenders(Models(target, headless), None)) == ["plain", "fixed 2", "fixed 3"]
    chosen = {name: contenders[name] for name in ("plain", "fixed 3")}
    done: list[int] = []
    curves = traffic_curves(
        chosen,
        lambda models, scheduler: Engine(models, slots=2, capacity=16, scheduler=scheduler, prefill_chunk=4),
        lambda rate: poisson_arrivals(PROMPTS, SETS, rate, 5, 0),
        (1e3, 1e4),
        max_new_tokens=6,
        temperature=0.0,
        advance=done.append,
    )
    assert sum(done) == 2 * 2 * 5
    assert [point.offered for point in curves["plain"]] == [1e3, 1e4]
    assert all(point.served == 5 and point.budget == 1.0 for point in curves["plain"])
    assert all(1.0 < point.budget <= 4.0 for point in curves["fixed 3"])
    assert "fixed 3" in traffic_table(curves)


@pytest.mark.parametrize("text", ["fast", "0", "-1,2", "nan", ","])
def test_rates_must_be_positive_numbers(text: str) -> None:
    with pytest.raises(InputError, match="--traffic="):
        parse_rates(text)
    assert parse_rates("2, 4.5") == (2.0, 4.5)
