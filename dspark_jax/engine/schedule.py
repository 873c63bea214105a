"""Second step of a round: how many of the drafted tokens are verified; and, before a round, whether it drafts at all.

A `Scheduler` names one of the rules of `engine.rules` and holds its parameters. The rules read survivals: of this
round's drafts, from the drafter's confidence head, or from the running estimate of `engine.estimator`, which works for
every drafter and is known before anything is drafted. What a rule remembers from round to round is a `History`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine import arguments, estimator, rules
from dspark_jax.engine.estimator import AcceptanceEstimate, EstimateSettings

NAMES = ("fixed", "threshold", "early_stop", "lagged", "adaptive")
"""The rules."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """What a scheduler remembers of earlier rounds; each part is there only where the rule needs it.

    Attributes:
      survival: [2, B, G] float32 survivals of the last round and of the one before.
      estimate: running acceptance of every request and of all of them.
      idle: [] int32, rounds since the last one with drafts.
    """

    survival: jax.Array | None = None
    estimate: AcceptanceEstimate | None = None
    idle: jax.Array | None = None

    def per_request(self, change: Callable[..., jax.Array], *others: "History") -> "History":
        """The history with `change(values, *other values, axis)` for everything with an axis of requests."""

        def apply(axis: int, name: str, *holders: Any) -> Any:
            values = [getattr(one, name) for one in holders]
            return None if values[0] is None else change(*values, axis)

        every, estimate = (self, *others), self.estimate
        if estimate is not None:
            estimates = [one.estimate for one in every]
            rows = {name: apply(0, name, *estimates) for name in ("accepted", "reached")}
            estimate = dataclasses.replace(estimate, **rows)
        return History(apply(1, "survival", *every), estimate, self.idle)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scheduler:
    """Which rule is used, and its parameters. Make one with the constructors named after the rules.

    Attributes:
      name: one of `NAMES`; static.
      confidence: [] least confidence of `threshold`.
      steps_per_second: [N + 1] cost table of `early_stop`, `lagged` and `adaptive`.
      plain_steps_per_second: [N + 1] cost table of rounds without drafts, for `adaptive`.
      prior: [G] survivals assumed for a request's first two rounds under `lagged`.
      temperatures: [G] or [B, G] of sequential temperature scaling; None is 1.
      bias: [] or [B] added to confidence logits before that; None is 0.
      minimum: [] or [B] drafts that are always verified.
      maximum: [] or [B] drafts that are verified at most; None is G.
      probe: [] rounds without drafts after which `adaptive` tries one with them; 0 is never.
      capacities: batch sizes of `lagged`; static.
      online: settings of the running estimate, which then replaces the confidence head; static.
    """

    name: str = dataclasses.field(metadata={"static": True})
    confidence: jax.Array | None = None
    steps_per_second: jax.Array | None = None
    plain_steps_per_second: jax.Array | None = None
    prior: jax.Array | None = None
    temperatures: jax.Array | None = None
    bias: jax.Array | None = None
    minimum: jax.Array | int = 0
    maximum: jax.Array | int | None = None
    probe: jax.Array | int = 0
    capacities: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    online: EstimateSettings | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def fixed(cls, length: Any = None) -> "Scheduler":
        """Verifies the first `length` drafts ([] or [B]), by default all."""
        return cls("fixed", maximum=None if length is None else arguments.array("length", length, jnp.int32))

    @classmethod
    def threshold(cls, confidence: Any, **bounds: Any) -> "Scheduler":
        """Verifies the drafts before the first one below `confidence` []; `bounds` are further attributes."""
        return cls("threshold", confidence=_floats("confidence", confidence), **_checked("threshold", bounds))

    @classmethod
    def early_stop(cls, steps_per_second: Any, **bounds: Any) -> "Scheduler":
        """Algorithm 1 over a cost table; `bounds` are further attributes."""
        table = _floats("steps_per_second", steps_per_second)
        return cls("early_stop", steps_per_second=table, **_checked("early_stop", bounds))

    @classmethod
    def lagged(cls, steps_per_second: Any, prior: Any, **bounds: Any) -> "Scheduler":
        """The production variant; `prior` might be the mean survival so far; `bounds` are further attributes."""
        table, prior = _floats("steps_per_second", steps_per_second), _floats("prior", prior)
        return cls("lagged", steps_per_second=table, prior=prior, **_checked("lagged", bounds))

    @classmethod
    def adaptive(
        cls,
        steps_per_second: Any,
        plain_steps_per_second: Any = 1.0,
        *,
        probe: int = 32,
        confident: bool = False,
        online: EstimateSettings | None = None,
        **bounds: Any,
    ) -> "Scheduler":
        """Drafts only in rounds that are expected to gain by it; the others are plain decoding.

        The running estimate decides, before anything is drafted, whether the batch drafts and how many drafts are
        verified: as many as give the most expected tokens per second, a global argmax, which is lossless here. Only
        rounds with drafts teach it. It drifts back to its prior in the others, and at the latest after `probe` of them
        everything is drafted and verified once, so that requests that become predictable are found out.

        Args:
          steps_per_second: [N + 1] of rounds with drafts against verified tokens, or one number. `adaptive(1 / 2.1)`
            is for rounds with drafts that last as long as 2.1 plain ones.
          plain_steps_per_second: [N + 1] of rounds without drafts, or one number, in the same unit.
          probe: see `Scheduler`.
          confident: learn what the confidence head expects of the drafts of a round, not what came of them: a round
            then tells more, so fewer are needed to find out what does not pay.
          online: of the estimate; by default it expects much of a new request and forgets within some thirty rounds.
          **bounds: further attributes.
        """
        rates = [
            jnp.atleast_1d(_floats("steps_per_second", steps_per_second)),
            jnp.atleast_1d(_floats("plain_steps_per_second", plain_steps_per_second)),
        ]
        if online is None:
            if arguments.boolean("confident", confident):
                online = EstimateSettings(strength=0.1, discount=0.95, prior=0.65, confident=True)
            else:
                online = EstimateSettings(strength=1.0, discount=0.97, prior=0.8)
        probe_after = arguments.array("probe", probe, jnp.int32)
        return cls("adaptive", None, *rates, probe=probe_after, online=online, **_checked("adaptive", bounds))

    @property
    def alternates(self) -> bool:
        """Whether rounds without drafts are possible; static."""
        return self.name == "adaptive"

    @property
    def selects(self) -> bool:
        """Whether it may admit less than everything; static."""
        return self.name != "fixed" or self.maximum is not None

    def filling(self, sizes: tuple[int, ...]) -> "Scheduler":
        """The rule for rounds that verify one of these numbers of tokens (rising): one that decides about a capacity
        fills what it would leave unused."""
        if self.name not in ("lagged", "adaptive") or self.capacities is not None:
            return self
        return dataclasses.replace(self, capacities=sizes)

    def start(self, batch: int, block_size: int) -> History | None:
        """History of requests that are about to start; None where the rule remembers nothing."""
        if self.prior is None and self.online is None:
            return None
        survival = None if self.prior is None else jnp.broadcast_to(self.prior, (2, batch, block_size))
        estimate = None if self.online is None else self.online.start(batch, block_size)
        return History(survival, estimate, jnp.int32(0) if self.alternates else None)

    def take(self, rows: Any) -> "Scheduler":
        """For some of the requests: what is given per request follows the indices `rows`."""

        def pick(values: Any, axes: int) -> Any:
            return values[jnp.asarray(rows)] if values is not None and jnp.ndim(values) == axes else values

        return dataclasses.replace(
            self,
            minimum=pick(self.minimum, 1),
            maximum=pick(self.maximum, 1),
            bias=pick(self.bias, 1),
            temperatures=pick(self.temperatures, 2),
        )


def _floats(name: str, values: Any) -> jax.Array:
    return arguments.array(name, values, jnp.float32)


_BOUNDS = {"minimum": jnp.int32, "maximum": jnp.int32, "temperatures": jnp.float32, "bias": jnp.float32}


def _checked(rule: str, bounds: dict[str, Any]) -> dict[str, Any]:
    """Further attributes of a rule, as arrays, so that numbers do not become constants of an executable.

    Raises:
      InputError: one that the rule does not have, or of the wrong type.
    """
    known = [*_BOUNDS, "online", *(["capacities"] if rule in ("lagged", "adaptive") else [])]
    found = {}
    for name, value in bounds.items():
        arguments.check_known(f"Scheduler.{rule}", name, known)
        if name in _BOUNDS and value is not None:
            value = arguments.array(name, value, _BOUNDS[name])
        elif name == "capacities" and value is not None:
            value = arguments.sizes(name, value)
        found[name] = value
    return found


def drafts_now(scheduler: Scheduler, history: History | None, active: jax.Array) -> jax.Array:
    """Whether the round that is about to begin drafts: [] bool, a function of earlier rounds alone."""
    if not scheduler.alternates:
        return jnp.bool_(True)
    assert history is not None and history.idle is not None
    return _pays(scheduler, history, active) | ((scheduler.probe > 0) & (history.idle >= scheduler.probe))


def _pays(scheduler: Scheduler, history: History, active: jax.Array) -> jax.Array:
    estimate, rates, plain = history.estimate, scheduler.steps_per_second, scheduler.plain_steps_per_second
    assert estimate is not None and rates is not None and plain is not None
    bounds = (active, scheduler.minimum, scheduler.maximum)
    return rules.drafting_pays(estimator.survival(estimate), rates, plain, *bounds)


def schedule(
    scheduler: Scheduler, proposal: Proposal, active: jax.Array, history: History | None = None
) -> tuple[jax.Array, History | None]:
    """Lengths of this round, by the scheduler's rule.

    Args:
      scheduler: rule and parameters.
      proposal: this round's drafts; only their number and their confidences are looked at.
      active: [B] bool; other requests get 0.
      history: of the rounds before; `Scheduler.start` is the first one, and the rows of a slot are set to it when a
        new request takes it.

    Returns:
      Lengths [B] int32, and the history with this round's survivals (None where there was none); `observe` adds what
      came of them.

    Raises:
      ValueError: the rule needs confidences or a history that are not there.
    """
    maximum = proposal.tokens.shape[1] if scheduler.maximum is None else scheduler.maximum
    bounds = (active, scheduler.minimum, maximum)
    if scheduler.name == "fixed":
        return _within(rules.fixed(proposal.tokens), *bounds), history
    if scheduler.name not in NAMES:
        raise ValueError(f"scheduler {scheduler.name!r} is unknown; use one of {', '.join(NAMES)}")
    remembers = scheduler.online is not None or scheduler.name in ("lagged", "adaptive")
    if scheduler.online is None and proposal.confidence is None:
        raise ValueError(f"scheduler {scheduler.name!r} needs a drafter with a confidence head, or `online`")
    if remembers and history is None:
        raise ValueError(f"scheduler {scheduler.name!r} needs a history; begin with Scheduler.start")
    logits = _logits(scheduler, proposal, history)
    if scheduler.name == "threshold":
        assert scheduler.confidence is not None
        return _within(rules.threshold(logits, scheduler.confidence), *bounds), history
    live = rules.survival(logits)
    rates = scheduler.steps_per_second
    assert rates is not None
    if scheduler.name == "early_stop":
        return rules.early_stop(live, rates, *bounds), history
    assert history is not None
    if scheduler.name == "adaptive":
        # All survivals are older than this round's drafts, so the capacity may follow them at once.
        chosen = rules.lagged(live, live, rates, *bounds, scheduler.capacities)
        everything = _within(rules.fixed(proposal.tokens), *bounds)
        return jnp.where(_pays(scheduler, history, active), chosen, everything), history
    assert history.survival is not None
    lengths = rules.lagged(live, history.survival[1], rates, *bounds, scheduler.capacities)
    return lengths, dataclasses.replace(history, survival=jnp.stack([live, history.survival[0]]))


def expected(scheduler: Scheduler, proposal: Proposal) -> jax.Array | None:
    """Survivals [B, G] that the confidence head gives this round's drafts, where `observe` is to learn from them."""
    if scheduler.online is None or not scheduler.online.confident:
        return None
    assert proposal.confidence is not None
    return rules.survival(proposal.confidence, scheduler.temperatures, scheduler.bias)


def observe(
    history: History | None,
    proposed: jax.Array,
    accepted: jax.Array,
    active: jax.Array,
    *,
    drafted: bool,
    expected: jax.Array | None = None,
) -> History | None:
    """The history after a round.

    Args:
      history: after `schedule`, or None.
      proposed: [B] drafts that were verified; 0 in a round without drafts.
      accepted: [B] drafts that were accepted.
      active: [B] bool, requests that took part.
      drafted: whether the round drafted.
      expected: of the round's drafts, from the function of that name.
    """
    if history is None:
        return None
    estimate, idle = history.estimate, history.idle
    if estimate is not None:
        estimate = estimator.update(estimate, proposed, accepted, active, expected)
    if idle is not None:
        idle = jnp.int32(0) if drafted else idle + 1
    return History(history.survival, estimate, idle)


def _logits(scheduler: Scheduler, proposal: Proposal, history: History | None) -> jax.Array:
    """[B, G] logits of the probability that draft k is accepted given that all before it are."""
    if scheduler.online is None:
        assert proposal.confidence is not None
        return rules.scaled(proposal.confidence, scheduler.temperatures, scheduler.bias)
    assert history is not None and history.estimate is not None
    return jax.scipy.special.logit(estimator.conditional(history.estimate))


def _within(lengths: jax.Array, active: jax.Array, minimum: Any, maximum: Any) -> jax.Array:
    """Lengths [B] of a prefix rule between the bounds, 0 for inactive requests; neither bound knows any draft."""
    return jnp.where(active, jnp.minimum(jnp.maximum(lengths, minimum), maximum), 0).astype(jnp.int32)
