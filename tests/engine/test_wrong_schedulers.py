"""Schedulers that look at what they must not: their texts are biased, in batches of four and in an engine's four slots.

In a batch, a rule that peeks decides for all requests together, so what it sees of one of them is diluted by the
others. The case below is a vote of four: second drafts are verified for everybody, or for nobody, by how many of them
are token 0. What one request drafted turns the vote in three of eight cases.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.engine import generate, schedulers
from dspark_jax.engine.models import Models
from dspark_jax.engine.schedulers import Scheduler
from dspark_jax.engine.schedulers.adaptive import Adaptive
from dspark_jax.engine.schedulers.early_stop import EarlyStop, admitted_until_stop
from dspark_jax.engine.schedulers.lagged import Lagged, admitted_by_capacity
from dspark_jax.engine.schedulers.survival import scaled, survival
from dspark_jax.engine.serving import Engine

REQUESTS, SIZE = 4, 3
# One draft per request always pays. More do from 14 tokens on, all second drafts and two third ones, but only if these
# two are likely: 0.57 * 12.5 and 0.57 * 11.7 expected tokens are on either side of 0.9 * 7.6.
TABLE = [1.0] * 5 + [0.9] * 4 + [0.1] * 5 + [0.57] * 3
# The third draft is likely after token 0 and hopeless after token 1; the first two are the same after all tokens.
CONFIDENCE = np.asarray([[2.2, 2.2], [2.2, 2.2], [8.0, -8.0]])


def peeks(table: Any) -> jax.Array:
    """Entry 0 of a cost table is never looked up; here it tells the wrong rules apart, which share an executable."""
    return table[0] > 5.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PeekingEarlyStop(EarlyStop):
    """Goes on after a draft that lowers the throughput, if later ones raise it more: a global argmax."""

    def admit(self, proposal: Any, active: Any, history: Any) -> Any:
        live = survival(self.logits(proposal, history))
        bounds = (self.steps_per_second, active, self.minimum, self.maximum)
        wrong = admitted_by_capacity(live, live, *bounds)
        return jnp.where(peeks(self.steps_per_second), wrong, admitted_until_stop(live, *bounds)), history


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PeekingLagged(Lagged):
    """Takes the capacity from the survivals of now."""

    def admit(self, proposal: Any, active: Any, history: Any) -> Any:
        live = survival(self.logits(proposal, history))
        known = jnp.where(peeks(self.steps_per_second), jnp.stack([live, live]), history.survival)
        lengths, _ = super().admit(proposal, active, dataclasses.replace(history, survival=known))
        return lengths, dataclasses.replace(history, survival=jnp.stack([live, history.survival[0]]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PeekingAdaptive(Adaptive):
    """Takes the confidences of now for the running estimate."""

    def logits(self, proposal: Any, history: Any) -> jax.Array:
        wrong = scaled(proposal.confidence, self.temperatures, self.bias)
        return jnp.where(peeks(self.steps_per_second), wrong, super().logits(proposal, history))


MADE: dict[str, tuple[type[Scheduler], Callable[[Any], Scheduler]]] = {
    "early_stop": (PeekingEarlyStop, schedulers.early_stop),
    "lagged": (PeekingLagged, lambda table: schedulers.lagged(table, [0.9, 0.8, 0.4])),
    "adaptive": (PeekingAdaptive, schedulers.adaptive),
}


@pytest.fixture(params=MADE)
def rule(request: Any) -> Callable[[Any], Scheduler]:
    """The constructor of a scheduler whose rule is wrong where entry 0 of its table says so."""
    peeking, make = MADE[request.param]
    return lambda table: peeking(**vars(make(table)))


@pytest.fixture
def pair(models: Any) -> tuple[Any, Any]:
    """Target and drafter, both a fair coin."""
    coin = jnp.zeros((2, 2))
    drafter = models.bigram_drafter(coin, SIZE, (), jnp.asarray(CONFIDENCE, jnp.float32))
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
