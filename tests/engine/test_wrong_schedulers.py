"""Schedulers that look at what they must not: their texts are biased, in batches of four and in an engine's four slots.

In a batch, a rule that peeks decides for all requests together, so what it sees of one of them is diluted by the
others. The case below is a vote of four: second drafts are verified for everybody, or for nobody, by how many of them
are token 0. What one request drafted turns the vote in three of eight cases.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.engine import generate, rules
from dspark_jax.engine import schedule as schedule_module
from dspark_jax.engine.models import Models
from dspark_jax.engine.schedule import Scheduler
from dspark_jax.engine.serving import Engine

REQUESTS, SIZE = 4, 3
# One draft per request always pays. More do from 14 tokens on, all second drafts and two third ones, but only if these
# two are likely: 0.57 * 12.5 and 0.57 * 11.7 expected tokens are on either side of 0.9 * 7.6.
TABLE = [1.0] * 5 + [0.9] * 4 + [0.1] * 5 + [0.57] * 3
# The third draft is likely after token 0 and hopeless after token 1; the first two are the same after all tokens.
CONFIDENCE = np.asarray([[2.2, 2.2], [2.2, 2.2], [8.0, -8.0]])
SCHEDULERS: dict[str, Callable[[Any], Scheduler]] = {
    "early_stop": Scheduler.early_stop,
    "lagged": lambda table: Scheduler.lagged(table, [0.9, 0.8, 0.4]),
    "adaptive": Scheduler.adaptive,
}


def peeks(table: jax.Array) -> jax.Array:
    """Entry 0 of a cost table is never looked up; here it tells the wrong rules apart, which share an executable."""
    return table[0] > 5.0


early_stop, lagged, logits = rules.early_stop, rules.lagged, schedule_module._logits


def wrong_early_stop(survival: Any, table: Any, *bounds: Any) -> Any:
    """Goes on after a draft that lowers the throughput, if later ones raise it more: a global argmax."""
    right, wrong = early_stop(survival, table, *bounds), lagged(survival, survival, table, *bounds)
    return jnp.where(peeks(table), wrong, right)


def wrong_lagged(live: Any, old: Any, table: Any, *bounds: Any) -> Any:
    """Takes the capacity from the survivals of now."""
    return lagged(live, jnp.where(peeks(table), live, old), table, *bounds)


def wrong_logits(scheduler: Scheduler, proposal: Any, history: Any) -> Any:
    """Takes the confidences of now for the running estimate."""
    wrong = rules.scaled(proposal.confidence, scheduler.temperatures, scheduler.bias)
    return jnp.where(peeks(scheduler.steps_per_second), wrong, logits(scheduler, proposal, history))


@pytest.fixture(params=SCHEDULERS)
def rule(request: Any, monkeypatch: Any) -> Iterator[Callable[[Any], Scheduler]]:
    """The constructor of a scheduler whose rule is wrong where entry 0 of its table says so."""
    place, name, wrong = {
        "early_stop": (rules, "early_stop", wrong_early_stop),
        "lagged": (rules, "lagged", wrong_lagged),
        "adaptive": (schedule_module, "_logits", wrong_logits),
    }[request.param]
    monkeypatch.setattr(place, name, wrong)
    yield SCHEDULERS[request.param]


@pytest.fixture
def pair(models: Any, rule: Any) -> tuple[Any, Any]:
    """Target and drafter, both a fair coin. Their class is new: no executable of another rule is taken for them."""
    coin = jnp.zeros((2, 2))
    drafter = type("Drafter", (models.bigram_drafter,), {})(coin, SIZE, (), jnp.asarray(CONFIDENCE, jnp.float32))
    target = models.bigram_target(coin)
    target.arch = dataclasses.replace(target.arch, max_position_embeddings=0)  # texts may be as long as they like
    return target, drafter


def bias(tokens: list[Any]) -> float:
    """Standard deviations between the share of token 0 in all texts and one half."""
    every = np.concatenate([np.asarray(one) for one in tokens])
    return abs(np.mean(every == 0) - 0.5) * 2 * len(every) ** 0.5


def test_a_batch_of_four_shows_a_rule_that_peeks(pair: Any, rule: Callable[[Any], Scheduler]) -> None:
    target, drafter = pair

    def texts(table: list[float]) -> Any:
        options: dict[str, Any] = {"max_new_tokens": 4000, "temperature": 1.0, "seed": 1}
        return generate(Models(target, drafter), [[0]] * REQUESTS, scheduler=rule(table), **options)

    right, wrong = texts(TABLE), texts([9.0, *TABLE[1:]])
    assert right.tau > 1.9
    assert bias(right.tokens) < 3.3 and bias(wrong.tokens) > 6


@pytest.mark.slow
def test_four_slots_show_a_rule_that_peeks(pair: Any, rule: Callable[[Any], Scheduler]) -> None:
    def texts(table: list[float]) -> Any:
        engine = Engine(Models(*pair), slots=REQUESTS, capacity=4008, prefill_chunk=8, scheduler=rule(table))
        handles = [engine.submit([0], max_new_tokens=4000, temperature=1.0, seed=seed) for seed in range(REQUESTS)]
        while engine.step():
            pass
        return [one.result().tokens for one in handles]

    right, wrong = texts(TABLE), texts([9.0, *TABLE[1:]])
    assert bias(right) < 3.3 and bias(wrong) > 6
