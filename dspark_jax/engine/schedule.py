"""Second step of a round: how many of the drafted tokens are verified.

A scheduler may use the confidences c_1..c_k to decide about draft k, never the drafted token k itself; anything else
biases the output (paper appendix A, trap 29). Since c_{k+1} depends on x_k, that also forbids weighing draft k by what
would come after it. `fixed` and `threshold` are prefix rules. `early_stop` and `lagged` admit the candidates of all
requests in one order, falling survival, then position, then request. Survival never rises along a request, so the next
candidate in that order is known from the drafts already admitted, and both stop by rules that look no further: the
admitted drafts of every request are a prefix of it, and no draft is judged before it is drawn in.

Equal survivals are common (c = 1, requests without history), so the order among them must not come from anything else.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.config import InputError
from dspark_jax.drafter.interface import Proposal


def scaled(confidence: jax.Array, temperatures: jax.Array | None) -> jax.Array:
    """Confidence logits [B, G] over their temperatures [G] or [B, G] (paper: STS), float32; as they are without."""
    confidence = confidence.astype(jnp.float32)
    return confidence if temperatures is None else confidence / temperatures


def survival(confidence: jax.Array, temperatures: jax.Array | None = None) -> jax.Array:
    """Probability a_k = sigmoid(c_1 / T_1) ... sigmoid(c_k / T_k) that the first k drafts are all accepted.

    Args:
      confidence: [B, G] logits.
      temperatures: [G] or [B, G] of sequential temperature scaling; None is 1.

    Returns:
      [B, G] float32, never rising along G.
    """
    return jnp.cumprod(jax.nn.sigmoid(scaled(confidence, temperatures)), axis=1)


def fixed(tokens: jax.Array) -> jax.Array:
    """Verifies every draft: tokens [B, G] -> lengths [B] = G."""
    return jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)


def threshold(confidence: jax.Array, minimum: jax.Array | float) -> jax.Array:
    """Keeps the drafts before the first one whose confidence is below `minimum` (trap 28).

    Args:
      confidence: [B, G] logits; draft k is kept while sigmoid(c_1), ..., sigmoid(c_k) >= minimum.
      minimum: in [0, 1]; 0 keeps everything.

    Returns:
      lengths [B] in 0..G; 0 verifies the anchor alone.
    """
    kept = jax.nn.sigmoid(confidence.astype(jnp.float32)) >= minimum
    return jnp.sum(jnp.cumprod(kept.astype(jnp.int32), axis=1), axis=1)


@dataclasses.dataclass(frozen=True)
class _Candidates:
    """Drafts that may be admitted, in the order of admission, and what is verified without any of them.

    Attributes:
      survival: [B * G], candidates first.
      request: [B * G].
      eligible: [B * G] bool, the candidates among them.
      floor: [B] drafts that are admitted unconditionally.
      tokens: [] int32, tokens verified at the floor: one per active request and the unconditional drafts.
      expected: [] float32, tokens committed at the floor.
    """

    survival: jax.Array
    request: jax.Array
    eligible: jax.Array
    floor: jax.Array
    tokens: jax.Array
    expected: jax.Array

    @classmethod
    def of(cls, survival: jax.Array, active: jax.Array, minimum: Any, maximum: Any) -> "_Candidates":
        """Of survivals [B, G]; see `early_stop` for the other arguments."""
        batch, size = survival.shape
        ceiling = jnp.clip(size if maximum is None else maximum, 0, size)
        ceiling = jnp.where(active, ceiling, 0).astype(jnp.int32)
        floor = jnp.minimum(jnp.clip(minimum, 0, size), ceiling).astype(jnp.int32)
        position = jnp.arange(size)
        eligible = (position >= floor[:, None]) & (position < ceiling[:, None])
        # Positions first: the stable sort then leaves ties in the order (position, request).
        flat = jnp.where(eligible, survival, -1.0).T.reshape(-1)
        order = jnp.argsort(-flat, stable=True)
        sure = jnp.sum(jnp.where(position < floor[:, None], survival, 0.0))
        requests = jnp.sum(active, dtype=jnp.int32)
        tokens = requests + jnp.sum(floor)
        return cls(flat[order], order % batch, eligible.T.reshape(-1)[order], floor, tokens, requests + sure)

    def throughput(self, steps_per_second: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Expected tokens per second at the floor [], and with the first 1, 2, ... candidates [B * G]."""
        expected = self.expected + jnp.cumsum(jnp.where(self.eligible, self.survival, 0.0))
        tokens = self.tokens + 1 + jnp.arange(len(self.survival))
        last = len(steps_per_second) - 1
        rate = steps_per_second[jnp.minimum(tokens, last)]
        return self.expected * steps_per_second[jnp.minimum(self.tokens, last)], expected * rate

    def admit(self, admitted: jax.Array) -> jax.Array:
        """Lengths [B] from a mask [B * G] over the candidates."""
        return self.floor.at[self.request].add((admitted & self.eligible).astype(jnp.int32))


def early_stop(
    survival: jax.Array,
    steps_per_second: jax.Array,
    active: jax.Array,
    minimum: jax.Array | int = 0,
    maximum: jax.Array | int | None = None,
) -> jax.Array:
    """The paper's Algorithm 1: admits drafts by falling survival while expected tokens per second rise.

    It stops at the first draft that does not raise them, even if later ones would: that is what keeps it lossless.

    Args:
      survival: [B, G] float32 of this round's drafts.
      steps_per_second: [N + 1], entry n = engine steps per second with n tokens in the verified batch, anchors
        included; beyond N it is entry N.
      active: [B] bool; other requests get 0 and cost nothing.
      minimum: [] or [B] drafts that are admitted unconditionally, before all others; at most `maximum` of them.
      maximum: [] or [B] drafts beyond which a request has no candidates; None is G.

    Returns:
      lengths [B] int32 in 0..G.
    """
    candidates = _Candidates.of(survival, active, minimum, maximum)
    base, rates = candidates.throughput(steps_per_second)
    # Up to the stop every rate was a new best, so the best so far is the one before.
    improving = (rates > jnp.concatenate([base[None], rates[:-1]])) & candidates.eligible
    return candidates.admit(jnp.cumprod(improving.astype(jnp.int32)).astype(bool))


def capacity(
    survival: jax.Array,
    steps_per_second: jax.Array,
    active: jax.Array,
    minimum: jax.Array | int = 0,
    maximum: jax.Array | int | None = None,
    capacities: tuple[int, ...] | None = None,
) -> jax.Array:
    """Tokens to verify, anchors included, for the most expected tokens per second; the fewest of equally good ones.

    This is a global argmax: lossless only over survivals that were known before this round's drafts were drawn.

    Args:
      survival: [B, G] of an earlier round.
      steps_per_second: [N + 1], as in `early_stop`.
      active: [B] bool.
      minimum: [] or [B].
      maximum: [] or [B] or None.
      capacities: rising sizes; the result is rounded up to one of them, and never exceeds the last unless the anchors
        and the unconditional drafts alone do.

    Returns:
      [] int32.
    """
    candidates = _Candidates.of(survival, active, minimum, maximum)
    base, rates = candidates.throughput(steps_per_second)
    rates = jnp.where(candidates.eligible, rates, -jnp.inf)
    tokens = candidates.tokens + jnp.argmax(jnp.concatenate([base[None], rates])).astype(jnp.int32)
    if capacities is None:
        return tokens
    rungs = jnp.asarray(capacities, jnp.int32)
    return rungs[jnp.minimum(jnp.searchsorted(rungs, tokens), len(capacities) - 1)]


def lagged(
    live: jax.Array,
    old: jax.Array,
    steps_per_second: jax.Array,
    active: jax.Array,
    minimum: jax.Array | int = 0,
    maximum: jax.Array | int | None = None,
    capacities: tuple[int, ...] | None = None,
) -> jax.Array:
    """Production variant: the batch size from confidences two rounds old, filled with the best drafts of now.

    Two rounds, because the size must be known before the round that precedes it has ended. The old survivals decide
    one number, and they decide it before this round's drafts are drawn, so any values do no harm to the output
    distribution: stale ones, those of a request that has been replaced, or a prior for a request without history. A
    bad prior costs speed, never losslessness.

    Args:
      live: [B, G] survivals of this round's drafts.
      old: [B, G] survivals two rounds old.
      steps_per_second: [N + 1], as in `early_stop`.
      active: [B] bool.
      minimum: [] or [B] drafts that are admitted unconditionally.
      maximum: [] or [B], or None for G.
      capacities: sizes that the batch is rounded up to, as in `capacity`; the room is filled.

    Returns:
      lengths [B] int32 in 0..G. Their sum and the active requests never exceed the capacity, but for `minimum`.
    """
    room = capacity(old, steps_per_second, active, minimum, maximum, capacities)
    candidates = _Candidates.of(live, active, minimum, maximum)
    return candidates.admit(jnp.arange(live.size) < room - candidates.tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scheduler:
    """Which rule is used, and its parameters. Make one with the constructors named after the rules.

    Attributes:
      name: `fixed`, `threshold`, `early_stop` or `lagged`; static.
      confidence: [] least confidence of `threshold`.
      steps_per_second: [N + 1] cost table of `early_stop` and `lagged`.
      prior: [G] survivals assumed for a request's first two rounds under `lagged`.
      temperatures: [G] or [B, G] of sequential temperature scaling; None is 1.
      minimum: [] or [B] drafts that are always verified.
      maximum: [] or [B] drafts that are verified at most; None is G.
      capacities: batch sizes of `lagged`; static.
    """

    name: str = dataclasses.field(metadata={"static": True})
    confidence: jax.Array | None = None
    steps_per_second: jax.Array | None = None
    prior: jax.Array | None = None
    temperatures: jax.Array | None = None
    minimum: jax.Array | int = 0
    maximum: jax.Array | int | None = None
    capacities: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def fixed(cls, length: Any = None) -> "Scheduler":
        """Verifies the first `length` drafts ([] or [B]), by default all."""
        return cls("fixed", maximum=None if length is None else jnp.asarray(length, jnp.int32))

    @classmethod
    def threshold(cls, confidence: Any, **bounds: Any) -> "Scheduler":
        """Verifies the drafts before the first one below `confidence`; `bounds` are further attributes."""
        return cls("threshold", confidence=jnp.float32(confidence), **_arrays(bounds))

    @classmethod
    def early_stop(cls, steps_per_second: Any, **bounds: Any) -> "Scheduler":
        """Algorithm 1 over a cost table; `bounds` are further attributes."""
        return cls("early_stop", steps_per_second=jnp.asarray(steps_per_second, jnp.float32), **_arrays(bounds))

    @classmethod
    def lagged(cls, steps_per_second: Any, prior: Any, **bounds: Any) -> "Scheduler":
        """The production variant; `prior` might be the mean survival so far; `bounds` are further attributes."""
        table, prior = (jnp.asarray(values, jnp.float32) for values in (steps_per_second, prior))
        return cls("lagged", steps_per_second=table, prior=prior, **_arrays(bounds))

    def start(self, batch: int) -> jax.Array | None:
        """History [2, B, G] of requests that are about to start; None where the rule remembers nothing."""
        return None if self.prior is None else jnp.broadcast_to(self.prior, (2, batch, self.prior.shape[-1]))

    def take(self, rows: Any) -> "Scheduler":
        """For some of the requests: what is given per request follows the indices `rows`."""

        def pick(values: Any, axes: int) -> Any:
            return values[jnp.asarray(rows)] if values is not None and jnp.ndim(values) == axes else values

        return dataclasses.replace(
            self,
            minimum=pick(self.minimum, 1),
            maximum=pick(self.maximum, 1),
            temperatures=pick(self.temperatures, 2),
        )


def _arrays(bounds: dict[str, Any]) -> dict[str, Any]:
    """Attributes as arrays, so that numbers do not become constants of an executable."""
    kinds = {"minimum": jnp.int32, "maximum": jnp.int32, "temperatures": jnp.float32}
    return {
        name: jnp.asarray(value, kinds[name]) if name in kinds and value is not None else value
        for name, value in bounds.items()
    }


def schedule(
    scheduler: Scheduler, proposal: Proposal, active: jax.Array, history: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Lengths of this round, by the scheduler's rule.

    Args:
      scheduler: rule and parameters.
      proposal: this round's drafts; only their number and their confidences are looked at.
      active: [B] bool; other requests get 0.
      history: [2, B, G] survivals of the last round and of the one before, for `lagged`; `Scheduler.start` is the
        first one, and the rows of a slot are set to the prior when a new request takes it.

    Returns:
      Lengths [B] int32, and the history for the next round (None where there was none).

    Raises:
      ValueError: the rule needs confidences or a history that are not there.
    """
    maximum = proposal.tokens.shape[1] if scheduler.maximum is None else scheduler.maximum
    bounds = (active, scheduler.minimum, maximum)
    if scheduler.name == "fixed":
        return _within(fixed(proposal.tokens), *bounds), history
    if proposal.confidence is None:
        raise ValueError(f"scheduler {scheduler.name!r} needs a drafter with a confidence head")
    if scheduler.name == "threshold":
        assert scheduler.confidence is not None
        logits = scaled(proposal.confidence, scheduler.temperatures)
        return _within(threshold(logits, scheduler.confidence), *bounds), history
    live = survival(proposal.confidence, scheduler.temperatures)
    assert scheduler.steps_per_second is not None
    if scheduler.name == "early_stop":
        return early_stop(live, scheduler.steps_per_second, *bounds), history
    if scheduler.name != "lagged":
        raise ValueError(f"scheduler {scheduler.name!r} is unknown; use fixed, threshold, early_stop or lagged")
    if history is None:
        raise ValueError("scheduler 'lagged' needs a history; begin with Scheduler.start")
    lengths = lagged(live, history[1], scheduler.steps_per_second, *bounds, scheduler.capacities)
    return lengths, jnp.stack([live, history[0]])


def _within(lengths: jax.Array, active: jax.Array, minimum: Any, maximum: Any) -> jax.Array:
    """Lengths [B] of a prefix rule between the bounds, 0 for inactive requests; neither bound knows any draft."""
    return jnp.where(active, jnp.minimum(jnp.maximum(lengths, minimum), maximum), 0).astype(jnp.int32)


def check_scheduler(scheduler: Scheduler, drafter: Any, requests: int) -> None:
    """Refuses a scheduler that cannot work for `requests` requests with this drafter (or None).

    Raises:
      InputError: no confidence head, a table or prior of the wrong shape or with impossible values, or settings per
        request that are not as many as the requests.
    """
    size, name = 0 if drafter is None else drafter.block_size, scheduler.name
    if name not in ("fixed", "threshold", "early_stop", "lagged"):
        raise InputError(f"scheduler {name!r} is unknown; use fixed, threshold, early_stop or lagged")
    if name != "fixed" and getattr(drafter, "confidence", None) is None:
        raise InputError(f"scheduler {name!r} needs a drafter with a confidence head; use fixed")
    table, prior = scheduler.steps_per_second, scheduler.prior
    if table is not None:
        rates = np.asarray(table)
        if rates.ndim != 1 or not rates.size or not (np.isfinite(rates) & (rates >= 0)).all():
            raise InputError(
                f"steps_per_second of scheduler {name!r} has shape {rates.shape} or an impossible value; give one "
                "finite rate of 0 or more for each number of tokens from 0"
            )
    if prior is not None and (prior.shape != (size,) or not ((prior >= 0) & (prior <= 1)).all()):
        raise InputError(
            f"prior of scheduler {name!r} has shape {prior.shape} or a value outside 0..1; "
            f"give {size} survival probabilities"
        )
    for field in ("minimum", "maximum"):
        shape = np.shape(getattr(scheduler, field))
        if shape not in ((), (requests,)):
            raise InputError(f"{field} of scheduler {name!r} has shape {shape} for {requests} requests; give one each")
    heat = scheduler.temperatures
    if heat is not None and (heat.shape not in ((size,), (requests, size)) or not (heat > 0).all()):
        raise InputError(
            f"temperatures of scheduler {name!r} have shape {heat.shape} or a value of 0 or less; "
            f"give {size} positive ones"
        )
    rungs = scheduler.capacities
    if rungs is not None and (not rungs or [*rungs] != sorted({*rungs}) or rungs[0] < 1):
        raise InputError(f"capacities={rungs} of scheduler {name!r} are not rising sizes from 1; sort them")
