"""The rules by which schedulers decide how many of the drafted tokens are verified; `schedule` applies them.

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


def scaled(confidence: jax.Array, temperatures: jax.Array | None, bias: jax.Array | None = None) -> jax.Array:
    """Confidence logits [B, G] after calibration, float32: plus a bias, then over the temperatures (paper: STS).

    Args:
      confidence: [B, G] logits.
      temperatures: [G] or [B, G]; None is 1.
      bias: [] or [B], shared by all positions and fitted before the temperatures; None is 0.
    """
    logits = confidence.astype(jnp.float32)
    if bias is not None:
        logits += bias if jnp.ndim(bias) == 0 else bias[:, None]
    return logits if temperatures is None else logits / temperatures


def survival(confidence: jax.Array, temperatures: jax.Array | None = None, bias: jax.Array | None = None) -> jax.Array:
    """Probability a_k = sigmoid(c_1 / T_1) ... sigmoid(c_k / T_k) that the first k drafts are all accepted.

    Args:
      confidence: [B, G] logits.
      temperatures: see `scaled`.
      bias: see `scaled`.

    Returns:
      [B, G] float32, never rising along G.
    """
    return jnp.cumprod(jax.nn.sigmoid(scaled(confidence, temperatures, bias)), axis=1)


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
class Candidates:
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
    def of(cls, survival: jax.Array, active: jax.Array, minimum: Any, maximum: Any) -> "Candidates":
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
    candidates = Candidates.of(survival, active, minimum, maximum)
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
    candidates = Candidates.of(survival, active, minimum, maximum)
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
    candidates = Candidates.of(live, active, minimum, maximum)
    return candidates.admit(jnp.arange(live.size) < room - candidates.tokens)


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
