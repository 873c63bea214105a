"""Schedulers against plain loops in float64, on inputs full of ties, and what they promise whatever the input."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import InputError
from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine import estimator, schedulers
from dspark_jax.engine.estimator import EstimateSettings
from dspark_jax.engine.models import Models
from dspark_jax.engine.schedulers import History, Scheduler, check_scheduler
from dspark_jax.engine.schedulers.adaptive import drafting_pays
from dspark_jax.engine.schedulers.candidates import capacity
from dspark_jax.engine.schedulers.early_stop import admitted_until_stop
from dspark_jax.engine.schedulers.lagged import admitted_by_capacity
from dspark_jax.engine.schedulers.survival import survival
from dspark_jax.engine.schedulers.threshold import kept_drafts


def loop(confidence: np.ndarray, minimum: float) -> list[int]:
    lengths = []
    for row in confidence:
        count = 0
        while count < len(row) and not 1 / (1 + np.exp(-row[count])) < minimum:
            count += 1
        lengths.append(count)
    return lengths


@pytest.mark.parametrize("minimum", (0.0, 0.3, 0.5, 0.9, 1.0))
def test_threshold_cuts_before_the_first_low_confidence(minimum: float) -> None:
    confidence = 2 * np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    lengths = kept_drafts(jnp.asarray(confidence), minimum)
    assert lengths.tolist() == loop(confidence.astype(np.float64), minimum)
    assert len(set(lengths.tolist())) > 1 or minimum in (0.0, 1.0)


def test_confidence_at_the_threshold_is_kept() -> None:
    assert kept_drafts(jnp.zeros((1, 3)), 0.5).tolist() == [3]


def test_survival_is_the_product_of_scaled_confidences() -> None:
    rng = np.random.default_rng(1)
    logits, heat = 3 * rng.normal(size=(20, 4)), np.asarray([0.5, 1.0, 1.7, 3.0])
    wanted = np.cumprod(1 / (1 + np.exp(-logits / heat)), axis=1)
    np.testing.assert_allclose(survival(jnp.asarray(logits), jnp.asarray(heat)), wanted, rtol=2e-6)
    np.testing.assert_array_equal(survival(jnp.asarray(logits), jnp.ones(4)), survival(jnp.asarray(logits)))
    shift = rng.normal(size=20)
    wanted = np.cumprod(1 / (1 + np.exp(-(logits + shift[:, None]) / heat)), axis=1)
    np.testing.assert_allclose(survival(*map(jnp.asarray, (logits, heat, shift))), wanted, rtol=2e-6)
    wanted = np.cumprod(1 / (1 + np.exp(-(logits - 0.7))), axis=1)
    np.testing.assert_allclose(survival(jnp.asarray(logits), None, jnp.asarray(-0.7)), wanted, rtol=2e-6)
    assert (np.diff(survival(jnp.asarray(20 * logits)), axis=1) <= 0).all()


def bounds_of(case: dict[str, Any]) -> list[tuple[int, int]]:
    """Unconditional drafts and last candidate of each request; none of an inactive one."""
    size = case["live"].shape[1]
    most = [min(int(m), size) if on else 0 for m, on in zip(case["maximum"], case["active"], strict=True)]
    return [(min(int(low), top), top) for low, top in zip(case["minimum"], most, strict=True)]


def start_of(values: np.ndarray, case: dict[str, Any]) -> tuple[int, float, list[tuple[float, int, int]]]:
    """Tokens and expected tokens before any candidate, and the candidates in the order of admission."""
    bounds = bounds_of(case)
    tokens = sum(map(bool, case["active"])) + sum(low for low, _ in bounds)
    tau = float(sum(case["active"])) + sum(float(values[r, :low].sum()) for r, (low, _) in enumerate(bounds))
    slots = [(-float(values[r, k]), k, r) for r, (low, top) in enumerate(bounds) for k in range(low, top)]
    return tokens, tau, sorted(slots)


def rate(table: np.ndarray, tokens: int) -> float:
    return float(table[min(tokens, len(table) - 1)])


def algorithm_1(case: dict[str, Any]) -> list[int]:
    """The paper's Algorithm 1, line by line."""
    lengths = [low for low, _ in bounds_of(case)]
    tokens, tau, slots = start_of(case["live"], case)
    best = tau * rate(case["table"], tokens)
    for minus, _, request in slots:
        tokens, tau = tokens + 1, tau - minus
        theta = tau * rate(case["table"], tokens)
        if theta <= best:
            break
        best = theta
        lengths[request] += 1
    return lengths


def best_capacity(case: dict[str, Any]) -> int:
    """Global argmax over the old survivals, the first of equals, rounded up to a rung."""
    tokens, tau, slots = start_of(case["old"], case)
    best, chosen = tau * rate(case["table"], tokens), tokens
    for minus, _, _ in slots:
        tokens, tau = tokens + 1, tau - minus
        if tau * rate(case["table"], tokens) > best:
            best, chosen = tau * rate(case["table"], tokens), tokens
    rungs = case["capacities"]
    return chosen if rungs is None else next((rung for rung in rungs if rung >= chosen), rungs[-1])


def production(case: dict[str, Any]) -> list[int]:
    """The lagged rule: as many of the best live candidates as the capacity has room for."""
    lengths = [low for low, _ in bounds_of(case)]
    tokens, _, slots = start_of(case["live"], case)
    for _, _, request in slots[: max(best_capacity(case) - tokens, 0)]:
        lengths[request] += 1
    return lengths


def random_case(seed: int, batch: int, size: int) -> dict[str, Any]:
    """Survivals 2^-n, so that ties abound and float32 is exact (14 bits of sum by 9 of rate), and a jagged table."""
    rng = np.random.default_rng(seed)
    factors = rng.choice([1.0, 1.0, 0.5], (2, batch, size))
    rates = np.sort(rng.integers(1, 400, batch * size // 2 + batch + 2))[::-1] + rng.integers(0, 60)
    rates[rng.integers(len(rates))] //= 2
    return {
        "live": np.cumprod(factors[0], axis=1),
        "old": np.cumprod(factors[1], axis=1),
        "table": rates.astype(np.float64),
        "active": rng.random(batch) < (0.0 if seed % 10 == 9 else 0.8),
        "minimum": rng.integers(0, 3, batch) * (seed % 2),
        "maximum": np.full(batch, size) if seed % 3 else rng.integers(0, size + 1, batch),
        "capacities": [None, (3, 7, 20)][seed % 4 == 3],
    }


def arguments(case: dict[str, Any]) -> list[jax.Array]:
    """Table, active, minimum and maximum as the schedulers take them."""
    return [jnp.asarray(case["table"], jnp.float32), *(jnp.asarray(case[n]) for n in ("active", "minimum", "maximum"))]


jitted_early_stop = jax.jit(admitted_until_stop)
jitted_lagged = jax.jit(admitted_by_capacity, static_argnames="capacities")
SHAPES = [(1, 1), (1, 5), (6, 4), (13, 7)]


@pytest.mark.parametrize(("batch", "size"), SHAPES)
def test_schedulers_against_loops(batch: int, size: int) -> None:
    """60 random cases each: ties, inactive requests, bounds, jagged tables that end early."""
    seen: dict[str, set[int]] = {"early": set(), "lagged": set()}
    for seed in range(60):
        case = random_case(seed, batch, size)
        live, old = (jnp.asarray(case[name], jnp.float32) for name in ("live", "old"))
        early = jitted_early_stop(live, *arguments(case))
        assert early.tolist() == algorithm_1(case), seed
        late = jitted_lagged(live, old, *arguments(case), capacities=case["capacities"])
        assert late.tolist() == production(case), seed
        seen["early"] |= set(early.tolist())
        seen["lagged"] |= set(late.tolist())
    for lengths in seen.values():
        assert len(lengths) > size // 2 + 1


def test_ties_are_broken_by_position_then_request() -> None:
    """All survivals are 1: room for seven drafts of three requests goes round by round."""
    ones, table = jnp.ones((3, 4)), jnp.zeros(20).at[10].set(1.0)
    assert admitted_by_capacity(ones, ones, table, jnp.ones(3, bool)).tolist() == [3, 2, 2]
    assert admitted_by_capacity(ones, ones, table, jnp.asarray([True, False, True])).tolist() == [4, 0, 4]


def test_the_table_ends_in_its_last_entry() -> None:
    alive = jnp.full((2, 3), 0.5)
    assert admitted_until_stop(alive, jnp.asarray([3.0]), jnp.ones(2, bool)).tolist() == [3, 3]
    assert int(capacity(alive, jnp.asarray([3.0, 3.0, 3.0, 3.0, 0.0]), jnp.ones(2, bool))) == 3


def test_capacities_round_up_and_cap() -> None:
    alive, table, on = jnp.full((2, 4), 0.5), jnp.zeros(12).at[5].set(1.0), jnp.ones(2, bool)
    for rungs, total in ((None, 5), ((4, 8), 8), ((2, 4), 4), ((1,), 1)):
        assert int(capacity(alive, table, on, capacities=rungs)) == total
        assert int(jnp.sum(admitted_by_capacity(alive, alive, table, on, capacities=rungs))) == max(total - 2, 0)


def throughput(case: dict[str, Any], values: np.ndarray, lengths: np.ndarray) -> float:
    """Expected tokens per second of verifying `lengths` drafts."""
    tau = sum(case["active"]) + sum(float(row[:n].sum()) for row, n in zip(values, lengths, strict=True))
    return tau * rate(case["table"], int(sum(case["active"]) + sum(lengths)))


def test_never_below_plain_decoding_and_never_looking_ahead() -> None:
    """Without minima both rules expect at least plain decoding's rate, the lagged one on the survivals it decides by.

    And whether draft k is verified stays the same whatever the request's confidences after k are (trap 29).
    """
    rng = np.random.default_rng(5)
    for seed in range(40):
        case = random_case(seed, 6, 4) | {"minimum": np.zeros(6, int), "capacities": None}
        live, old = (jnp.asarray(case[name], jnp.float32) for name in ("live", "old"))
        rules = {
            "early": jitted_early_stop(live, *arguments(case)),
            "lagged": jitted_lagged(live, old, *arguments(case), capacities=None),
        }
        plain = throughput(case, case["live"], np.zeros(6, int))
        assert throughput(case, case["live"], np.asarray(rules["early"])) >= plain - 1e-9
        same = jitted_lagged(old, old, *arguments(case), capacities=None)
        assert throughput(case, case["old"], np.asarray(same)) >= plain - 1e-9
        request, k = int(rng.integers(6)), int(rng.integers(1, 4))
        changed = case["live"].copy()
        changed[request, k:] = changed[request, k - 1] * np.cumprod(rng.choice([1.0, 0.5, 0.0], 4 - k))
        other = jnp.asarray(changed, jnp.float32)
        again = {
            "early": jitted_early_stop(other, *arguments(case)),
            "lagged": jitted_lagged(other, old, *arguments(case), capacities=None),
        }
        for name, lengths in rules.items():
            assert min(int(lengths[request]), k) == min(int(again[name][request]), k), (seed, name)


CONFIDENCE = jnp.asarray([[5.0, -5.0, 5.0], [5.0, 5.0, 5.0], [5.0, 5.0, -5.0]])
PROPOSAL = Proposal(jnp.zeros((3, 3), jnp.int32), jnp.zeros((3, 3, 1)), CONFIDENCE)
ACTIVE = jnp.asarray([True, True, False])


def test_schedule_dispatches() -> None:
    assert schedulers.fixed().schedule(PROPOSAL, jnp.ones(3, bool))[0].tolist() == [3, 3, 3]
    table = jnp.full(10, 2.0)
    expected = [
        (schedulers.fixed(), [3, 3, 0]),
        (schedulers.fixed(2), [2, 2, 0]),
        (schedulers.fixed([1, 9, 3]), [1, 3, 0]),
        (schedulers.threshold(0.5), [1, 3, 0]),
        (schedulers.threshold(0.5, minimum=2, maximum=[3, 2, 2]), [2, 2, 0]),
        (schedulers.threshold(0.4, temperatures=[1.0, 20.0, 1.0]), [3, 3, 0]),
        (schedulers.early_stop(table), [3, 3, 0]),
        (schedulers.early_stop(table, maximum=2), [2, 2, 0]),
    ]
    for scheduler, lengths in expected:
        chosen, history = scheduler.schedule(PROPOSAL, ACTIVE)
        assert chosen.tolist() == lengths and history is None


def test_the_history_is_two_rounds_old_and_starts_from_the_prior() -> None:
    """The capacity of a round follows the confidences of the one before the last; live ones only fill it."""
    table = jnp.asarray([9.0, 9.0, 8.9, 7.0, 5.0])  # two drafts of one request only where both are likely
    scheduler = schedulers.lagged(table, [0.9, 0.1])
    low, high = jnp.full((1, 2), -9.0), jnp.full((1, 2), 9.0)
    history, lengths = scheduler.start(1, 2), []
    assert history is not None
    for confidence in (low, high, low, high, low, high, high):
        proposal = Proposal(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2, 1)), confidence)
        chosen, history = scheduler.schedule(proposal, jnp.ones(1, bool), history)
        lengths.append(int(chosen[0]))
    assert lengths == [1, 1, 0, 2, 0, 2, 0]  # by the prior twice, then by the round before the last
    assert history is not None and history.survival is not None
    np.testing.assert_allclose(history.survival[0], survival(high))


def observed(outcomes: list[tuple[list[int], list[int]]], settings: EstimateSettings, batch: int) -> Any:
    """The estimate of `batch` requests with 3 drafts after rounds of (proposed, accepted)."""
    estimate = settings.start(batch, 3)
    for proposed, accepted in outcomes:
        estimate = estimator.update(estimate, jnp.asarray(proposed), jnp.asarray(accepted), jnp.ones(batch, bool))
    return estimate


OUTCOMES = [([3, 3, 3], [3, 0, 2]), ([3, 3, 0], [2, 0, 0]), ([3, 2, 1], [3, 1, 1])]


def test_every_rule_reads_the_running_estimate_where_it_is_told_to() -> None:
    """The same lengths as from a head whose confidences are the estimate; a drafter needs none."""
    online = EstimateSettings(strength=2.0)
    estimate = observed(OUTCOMES, online, 3)
    head = Proposal(PROPOSAL.tokens, PROPOSAL.logits, jax.scipy.special.logit(estimator.conditional(estimate)))
    bare = Proposal(PROPOSAL.tokens, PROPOSAL.logits, None)
    table = jnp.asarray([9.0, 9.0, 8.0, 7.0, 5.0, 4.9, 4.8, 3.0, 3.0, 2.0])
    for make in (
        lambda **more: schedulers.threshold(0.55, **more),
        lambda **more: schedulers.early_stop(table, **more),
        lambda **more: schedulers.lagged(table, [0.9, 0.8, 0.7], **more),
    ):
        by_head, by_estimate = make(), make(online=online)
        first, second = by_head.start(3, 3), by_estimate.start(3, 3)
        assert second is not None
        wanted, _ = by_head.schedule(head, ACTIVE, first)
        got, after = by_estimate.schedule(bare, ACTIVE, dataclasses.replace(second, estimate=estimate))
        assert got.tolist() == wanted.tolist() and sum(got.tolist()) > 0
        if by_head.name == "lagged":
            assert after is not None and after.survival is not None
            np.testing.assert_allclose(after.survival[0], estimator.survival(estimate), rtol=1e-6)
    with pytest.raises(ValueError, match="needs a history"):
        schedulers.threshold(0.5, online=online).schedule(PROPOSAL, ACTIVE)


def test_drafting_pays_against_a_loop() -> None:
    """The best rate with drafts, candidate by candidate in float64, against that of a round without any."""
    seen = []
    for seed in range(60):
        case = random_case(seed, 6, 4)
        plain = np.random.default_rng(seed).integers(200, 900, 9).astype(np.float64)
        tokens, tau, slots = start_of(case["live"], case)
        best = tau * rate(case["table"], tokens)
        for minus, _, _ in slots:
            tokens, tau = tokens + 1, tau - minus
            best = max(best, tau * rate(case["table"], tokens))
        requests = int(sum(case["active"]))
        table, *bounds = arguments(case)
        live = jnp.asarray(case["live"], jnp.float32)
        pays = drafting_pays(live, table, jnp.asarray(plain, jnp.float32), *bounds)
        assert bool(pays) == (best > requests * rate(plain, requests)), seed
        seen.append(bool(pays))
    assert 10 < sum(seen) < 50


def test_adaptive_drafts_where_it_pays_and_tries_again() -> None:
    """A round with drafts costs two plain ones: it pays for requests that accept much, until they stop doing so."""
    now, everyone = jax.jit(lambda one, *given: one.drafts_now(*given)), jnp.ones(1, bool)
    bare, none = Proposal(jnp.zeros((1, 3)), jnp.zeros((1, 3, 1)), None), jnp.zeros(1, jnp.int32)

    @jax.jit
    def turn(scheduler: Scheduler, history: Any, accepted: jax.Array) -> Any:
        lengths, history = scheduler.schedule(bare, everyone, history)
        return lengths, scheduler.observe(history, lengths, accepted, everyone, drafted=True)

    skip = jax.jit(lambda history: one.observe(history, none, none, everyone, drafted=False))
    one = schedulers.adaptive(1 / 2, probe=6, trial_share=np.inf)
    history, drafted = one.start(1, 3), ""
    for number in range(100):
        drafts = bool(now(one, history, everyone))
        drafted += "x" if drafts else "."
        if drafts:
            lengths, history = turn(one, history, none if 10 <= number < 60 else none + 3)
            assert lengths.tolist() == [3]
        else:
            history = skip(history)
    assert set(drafted[:10] + drafted[80:]) == {"x"} and drafted[30:60].count("x") < 8
    assert max(map(len, drafted.split("x"))) == 6
    quiet = schedulers.adaptive(1 / 9, probe=0)
    history = quiet.start(1, 3)
    for _ in range(80):
        assert not now(quiet, history, everyone)
        history = skip(history)


@pytest.mark.parametrize("cost", (1.5, 4.5, 20.0))
@pytest.mark.parametrize("prior", (0.3, 0.95))
def test_finding_out_that_drafting_does_not_pay_costs_a_known_share(cost: float, prior: float) -> None:
    """Drafts are never accepted: what trials cost, and drafting from the prior, is paid out of the plain rounds."""
    scheduler = schedulers.adaptive(1 / cost, online=EstimateSettings(strength=1.0, discount=0.9, prior=prior))
    everyone, none, three = jnp.ones(1, bool), jnp.zeros(1, jnp.int32), jnp.full(1, 3)

    def turn(history: History, _: None) -> tuple[History, jax.Array]:
        drafts = scheduler.drafts_now(history, everyone)
        tried = scheduler.observe(history, three, none, everyone, drafted=True)
        left = scheduler.observe(history, none, none, everyone, drafted=False)
        return jax.tree.map(functools.partial(jnp.where, drafts), tried, left), drafts

    _, drafted = jax.jit(lambda: jax.lax.scan(turn, scheduler.start(1, 3), length=3000))()
    drafted = np.asarray(drafted)
    burst = int(np.argmin(drafted))  # rounds at the start, which nothing has been earned for
    lost = (cost - 1) * np.cumsum(drafted)
    assert burst <= 4 and lost[-1] > 0.01 * 3000  # it does go on trying
    assert (lost <= (cost - 1) * burst * 2 + 0.02 * np.arange(1, 3001) + 1e-3).all()


def test_adaptive_learns_from_the_confidence_head() -> None:
    """What it expects of a round counts, calibrated, and not what was accepted."""
    everyone, three = jnp.ones(1, bool), jnp.full(1, 3)
    sure = Proposal(jnp.zeros((1, 3)), jnp.zeros((1, 3, 1)), jnp.full((1, 3), 4.0))
    for confident, bias, pays in ((True, None, True), (True, -6.0, False), (False, None, False)):
        scheduler = schedulers.adaptive(1 / 2, confident=confident, bias=bias)
        history = scheduler.start(1, 3)
        for _ in range(20):
            seen = scheduler.expected(sure)
            history = scheduler.observe(history, three, 0 * three, everyone, drafted=True, expected=seen)
        assert bool(scheduler.drafts_now(history, everyone)) == pays


def test_adaptive_decides_for_the_batch_and_by_the_cost_of_tokens() -> None:
    online = EstimateSettings(strength=0.5, prior=0.5)
    estimate = observed([([3, 3], [3, 0])] * 8, online, 2)
    flat = schedulers.adaptive(1 / 2.2, online=online)
    history = History(estimate=estimate, idle=jnp.int32(0), credit=jnp.float32(8))
    both, bare = jnp.ones(2, bool), Proposal(jnp.zeros((2, 3)), jnp.zeros((2, 3, 1)), None)
    assert bool(flat.drafts_now(history, jnp.asarray([True, False])))
    assert not flat.drafts_now(history, jnp.asarray([False, True]))
    assert bool(flat.drafts_now(history, both))  # (4 + 1) / 2 tokens per request
    assert flat.schedule(bare, both, history)[0].tolist() == [3, 3]
    steep = schedulers.adaptive([1.0, 1.0, 0.9, 0.8, 0.7, 0.65, 0.2], 1.0, online=online)
    assert steep.schedule(bare, both, history)[0].tolist() == [3, 0]  # tokens of the other one would only cost
    probing = dataclasses.replace(history, idle=jnp.int32(32))
    dear = schedulers.adaptive(1 / 9, online=online)
    assert not dear.drafts_now(history, both) and bool(dear.drafts_now(probing, both))
    assert dear.schedule(bare, both, probing)[0].tolist() == [3, 3]  # a try verifies everything


def test_take_follows_requests() -> None:
    scheduler = schedulers.early_stop([1.0], minimum=[0, 1, 2], maximum=3, temperatures=np.ones((3, 2))).take([2, 0, 0])
    assert np.asarray(scheduler.minimum).tolist() == [2, 0, 0] and int(np.asarray(scheduler.maximum)) == 3
    assert scheduler.temperatures is not None and scheduler.temperatures.shape == (3, 2)


def test_schedule_refuses_what_is_missing() -> None:
    bare = Proposal(PROPOSAL.tokens, PROPOSAL.logits, None)
    for scheduler in (schedulers.threshold(0.5), schedulers.early_stop([1.0]), schedulers.lagged([1.0], [1.0] * 3)):
        with pytest.raises(ValueError, match="confidence head"):
            scheduler.schedule(bare, ACTIVE)
    with pytest.raises(ValueError, match="needs a history"):
        schedulers.lagged([1.0], [1.0] * 3).schedule(PROPOSAL, ACTIVE)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (schedulers.early_stop([]), "steps_per_second"),
        (schedulers.early_stop([1.0, np.nan]), "impossible value"),
        (schedulers.early_stop([1.0, -1.0]), "impossible value"),
        (schedulers.lagged([1.0], [0.5]), r"prior .* has shape \(1,\)"),
        (schedulers.lagged([1.0], [0.5, 1.5, 0.5]), "prior .* outside 0..1"),
        (schedulers.early_stop([1.0], minimum=[1, 2]), r"minimum .* shape \(2,\) for 4 requests"),
        (schedulers.fixed([1, 2]), r"maximum .* shape \(2,\)"),
        (schedulers.threshold(0.5, temperatures=[1.0, 0.0, 1.0]), "temperatures"),
        (schedulers.threshold(0.5, bias=[1.0, 0.0, 1.0]), r"bias .* shape \(3,\)"),
        (schedulers.adaptive([1.0], [-1.0]), "plain_steps_per_second"),
        (schedulers.adaptive(0.5, online=EstimateSettings(prior=1.0)), "prior=1.0 of the running estimate"),
        (schedulers.early_stop([1.0], online=EstimateSettings(discount=0.0)), "discount=0.0"),
        (schedulers.lagged([1.0], [0.5] * 3, capacities=(8, 4)), "rising"),
        (schedulers.lagged([1.0], [0.5] * 3, capacities=()), "rising"),
    ],
)
def test_bad_schedulers(models: Any, scheduler: Scheduler, message: str) -> None:
    target = models.bigram_target(models.table(5, 0))
    drafter = models.bigram_drafter(models.table(5, 0), 3, confidence=jnp.zeros(5))
    headless = Models(target, models.bigram_drafter(models.table(5, 0), 3))
    with pytest.raises(InputError, match=message) as error:
        check_scheduler(scheduler, Models(target, drafter), 4)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="confidence head"):
        check_scheduler(schedulers.threshold(0.5), headless, 4)
    check_scheduler(schedulers.adaptive(0.5), headless, 4)
    with pytest.raises(InputError, match="learn from a confidence head"):
        check_scheduler(schedulers.adaptive(0.5, confident=True), headless, 4)
    with pytest.raises(InputError, match="give a drafter"):
        check_scheduler(schedulers.adaptive(0.5), Models(target), 4)
