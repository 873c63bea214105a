"""The scheduler that drafts only in rounds that are expected to gain by it; the others are plain decoding."""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from dspark_jax.config import InputError
from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine import arguments, estimator
from dspark_jax.engine.estimator import EstimateSettings
from dspark_jax.engine.models import Models
from dspark_jax.engine.schedulers import checks
from dspark_jax.engine.schedulers.base import History, Measured, Scheduler, bounds_of, floats
from dspark_jax.engine.schedulers.candidates import Candidates
from dspark_jax.engine.schedulers.lagged import admitted_by_capacity
from dspark_jax.engine.schedulers.survival import survival


def drafting_pays(
    estimated: jax.Array,
    steps_per_second: jax.Array,
    plain_steps_per_second: jax.Array,
    active: jax.Array,
    minimum: jax.Array | int = 0,
    maximum: jax.Array | int | None = None,
) -> jax.Array:
    """Whether a round with drafts promises more tokens per second than one without, for the batch as a whole.

    Args:
      estimated: [B, G] survivals that were known before the round: nothing of it may have been drafted yet.
      steps_per_second: [N + 1] of rounds with drafts, as in `early_stop`.
      plain_steps_per_second: [N + 1] of rounds without drafts, which verify one token per request.
      active: [B] bool.
      minimum: [] or [B] drafts that a round with drafts verifies in any case.
      maximum: [] or [B], or None for G.

    Returns:
      [] bool; False where both promise the same.
    """
    candidates = Candidates.of(estimated, active, minimum, maximum)
    base, rates = candidates.throughput(steps_per_second)
    best = jnp.maximum(base, jnp.max(jnp.where(candidates.eligible, rates, 0.0), initial=0.0))
    requests = jnp.sum(active, dtype=jnp.int32)
    return best > requests * plain_steps_per_second[jnp.minimum(requests, len(plain_steps_per_second) - 1)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptive(Scheduler):
    """Decides before a round, by the running estimate, whether it drafts, and how many drafts are verified.

    As many as give the most expected tokens per second: a global argmax, which is lossless here, since all it reads is
    older than the round. Only rounds with drafts teach the estimate. It drifts back to its prior in the others, and
    after `probe` of them everything is drafted and verified once, so that requests that become predictable are found
    out.

    Where drafting does not pay, finding that out costs little whatever a round costs: every plain round earns the time
    of `trial_share` of one, a trial waits until that pays for a round with drafts that are all rejected, and what
    rounds with drafts have lost (their time in plain rounds, less the tokens that they gave) is earned back before
    drafting begins again. Gains make up for losses, and pay for the next trial at most.

    Attributes:
      steps_per_second: [N + 1] of rounds with drafts by verified tokens.
      plain_steps_per_second: [N + 1] of rounds without drafts.
      probe: [] rounds without drafts after which one with them is tried, if there is credit for it; 0 is never.
      trial_share: [] share of the time that may be lost by it; inf is no limit.
      capacities: batch sizes that are filled; None is any. Static.
    """

    name: ClassVar[str] = "adaptive"
    needed: ClassVar[tuple[str, ...]] = ("steps_per_second", "plain_steps_per_second", "online")
    reads_confidence: ClassVar[bool] = False
    alternates: ClassVar[bool] = True
    steps_per_second: jax.Array | None = None
    plain_steps_per_second: jax.Array | None = None
    probe: jax.Array | int = 0
    trial_share: jax.Array | float = 0.02
    capacities: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def remembers(self) -> bool:
        """The estimate, for how long nothing was drafted, and what trials may cost."""
        return True

    def filling(self, sizes: tuple[int, ...]) -> Self:
        """Fills the size that it would leave room in."""
        return self if self.capacities is not None else dataclasses.replace(self, capacities=sizes)

    def start(self, batch: int, block_size: int) -> History:
        """Nothing seen."""
        assert self.online is not None
        return History(estimate=self.online.start(batch, block_size), idle=jnp.int32(0), credit=jnp.float32(0))

    def admit(self, proposal: Proposal, active: jax.Array, history: History) -> tuple[jax.Array, History]:
        """As many drafts as pay, or all of them in a round that is a trial."""
        assert self.steps_per_second is not None
        known, bounds = survival(self.logits(proposal, history)), (active, self.minimum, self.maximum)
        chosen = admitted_by_capacity(known, known, self.steps_per_second, *bounds, self.capacities)
        batch, size = proposal.tokens.shape
        everything = self.within(jnp.full(batch, size, jnp.int32), active, size)
        return jnp.where(self._pays(history, active), chosen, everything), history

    def drafts_now(self, history: History, active: jax.Array) -> jax.Array:
        """Where it pays, and in trials, as far as there is credit."""
        idle, credit = history.idle, history.credit
        assert idle is not None and credit is not None
        begins = (self.probe > 0) & (idle >= self.probe) & (credit >= self._trial_loss(history, active))
        return begins | (self._pays(history, active) & ((idle == 0) | (credit >= 0)))

    def observe(
        self,
        history: Any,
        proposed: jax.Array,
        accepted: jax.Array,
        active: jax.Array,
        *,
        drafted: bool,
        expected: jax.Array | None = None,
    ) -> Any:
        """As `Scheduler.observe`; and the credit after the round."""
        gain = jnp.float32(self.trial_share)
        if drafted:
            tokens = jnp.where(active, 1 + jnp.stack([proposed, accepted]), 0).sum(axis=1)
            requests = jnp.sum(active, dtype=jnp.int32)
            gain = tokens[1] / jnp.maximum(requests, 1) - self._cost(tokens[0], requests)
        credit = jnp.minimum(history.credit + gain, self._trial_loss(history, active))
        after = super().observe(history, proposed, accepted, active, drafted=drafted, expected=expected)
        return dataclasses.replace(after, credit=credit)

    def _cost(self, tokens: jax.Array, requests: jax.Array) -> jax.Array:
        """Time of a round with drafts that verifies so many tokens, in rounds without."""
        rates, plain = self.steps_per_second, self.plain_steps_per_second
        assert rates is not None and plain is not None
        rate = rates[jnp.minimum(tokens, len(rates) - 1)]
        # Rates may be 0; a finite cost keeps the credit a number.
        return jnp.minimum(plain[jnp.minimum(requests, len(plain) - 1)] / jnp.maximum(rate, 1e-30), 1e6)

    def _trial_loss(self, history: History, active: jax.Array) -> jax.Array:
        """What a trial loses at most, in rounds without drafts: every request gets a token in any round."""
        estimate, requests = history.estimate, jnp.sum(active, dtype=jnp.int32)
        assert estimate is not None
        batch, size = estimate.reached.shape
        everything = self.within(jnp.full(batch, size, jnp.int32), active, size)
        return jnp.maximum(self._cost(requests + jnp.sum(everything), requests) - 1, 0)

    def _pays(self, history: History, active: jax.Array) -> jax.Array:
        estimate, rates, plain = history.estimate, self.steps_per_second, self.plain_steps_per_second
        assert estimate is not None and rates is not None and plain is not None
        return drafting_pays(estimator.survival(estimate), rates, plain, active, self.minimum, self.maximum)

    @classmethod
    def from_run(cls, measured: Measured) -> Scheduler:
        """With the run's costs; rounds with drafts are assumed to take twice as long where nothing was measured."""
        plain = measured.plain_steps_per_second
        if plain is None and measured.cost_file is not None:
            raise InputError(
                f"{measured.cost_file}: says nothing about rounds without drafts; run profile again, or remove it"
            )
        rates = (0.5, 1.0) if plain is None else (measured.steps_per_second, plain)
        bounds = measured.calibration if measured.confident else {}
        return adaptive(*rates, confident=measured.confident, **bounds)

    def check(self, models: Models, requests: int) -> None:
        """As `Scheduler.check`, and cost tables, probe and capacities."""
        super().check(models, requests)
        checks.check_rates(self, "steps_per_second")
        checks.check_rates(self, "plain_steps_per_second")
        checks.check_capacities(self)
        checks.check_counts(self, "probe", ((),))
        checks.check_share(self, "trial_share")


def adaptive(
    steps_per_second: Any,
    plain_steps_per_second: Any = 1.0,
    *,
    probe: int = 32,
    trial_share: float = 0.02,
    confident: bool = False,
    online: EstimateSettings | None = None,
    **bounds: Any,
) -> Adaptive:
    """Drafts only in rounds that are expected to gain by it; see `Adaptive`.

    Args:
      steps_per_second: [N + 1] of rounds with drafts against verified tokens, or one number. `adaptive(1 / 2.1)` is for
        rounds with drafts that last as long as 2.1 plain ones.
      plain_steps_per_second: [N + 1] of rounds without drafts, or one number, in the same unit.
      probe: see `Adaptive`.
      trial_share: see `Adaptive`.
      confident: learn what the confidence head expects of the drafts of a round, not what came of them: a round then
        tells more, so fewer are needed to find out what does not pay.
      online: of the estimate; by default it expects much of a new request and forgets within some thirty rounds.
      **bounds: attributes of `Scheduler`, and `capacities`.
    """
    if online is None:
        if arguments.boolean("confident", confident):
            online = EstimateSettings(strength=0.1, discount=0.95, prior=0.65, confident=True)
        else:
            online = EstimateSettings(strength=1.0, discount=0.97, prior=0.8)
    return Adaptive(
        steps_per_second=jnp.atleast_1d(floats("steps_per_second", steps_per_second)),
        plain_steps_per_second=jnp.atleast_1d(floats("plain_steps_per_second", plain_steps_per_second)),
        probe=arguments.array("probe", probe, jnp.int32),
        trial_share=arguments.array("trial_share", trial_share, jnp.float32),
        online=online,
        **bounds_of("adaptive", bounds, capacities=True),
    )
