"""How requests are sampled: their settings, and a key per request that is folded with an absolute position.

A request's draws depend on its key and on how far it has come, never on its neighbours in the batch, on padding or on
how many requests are decoded together.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.config import InputError
from dspark_jax.engine import arguments
from dspark_jax.ops.sampling import GREEDY_BELOW, Sampling

_RANGES = {
    "temperature": (lambda v: v >= 0, "use 0 for greedy decoding or a positive value"),
    "top_k": (lambda v: (v >= 0) & (v == np.floor(v)), "use a positive integer, or 0 to keep every token"),
    "top_p": (lambda v: (v > 0) & (v <= 1), "use a value above 0 and at most 1, which keeps every token"),
    "min_p": (lambda v: (v >= 0) & (v <= 1), "use a value from 0, which keeps every token, to 1"),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniforms:
    """Everything random about one decoding round: int32 pairs of 30 bits each, see `ops.sampling.words`.

    Attributes:
      draft: [B, G, 2] draws the drafted tokens.
      accept: [B, G, 2] accepts or rejects them; all are spent, also those after a rejection.
      next: [B, 2] draws the token that follows the accepted ones.
    """

    draft: jax.Array
    accept: jax.Array
    next: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """What the B requests of a round bring along.

    Attributes:
      uniforms: the round's random numbers.
      sampling: temperatures and filters, the drafter's and the target's alike.
      stop_tokens: [K] ids that end a request, or [B, K]; negative ids are padding.
    """

    uniforms: Uniforms
    sampling: Sampling
    stop_tokens: jax.Array

    def without_drafts(self) -> "Requests":
        """The same for a round that drafts nothing."""
        uniforms = Uniforms(self.uniforms.draft[:, :0], self.uniforms.accept[:, :0], self.uniforms.next)
        return dataclasses.replace(self, uniforms=uniforms)


def request_keys(seed: int, requests: jax.Array) -> jax.Array:
    """One key per request number: requests [B] int32 -> keys [B]."""
    return fold_keys(jax.random.key(seed), requests)


@jax.jit
def fold_keys(keys: jax.Array, numbers: jax.Array) -> jax.Array:
    """A key for each of numbers [B] int32, from one key or from as many."""
    return jax.vmap(jax.random.fold_in, in_axes=(0 if keys.ndim else None, 0))(keys, numbers)


def round_uniforms(keys: jax.Array, positions: jax.Array, block_size: int) -> Uniforms:
    """The uniforms of the round whose anchor is at `positions`.

    No two rounds of a request share an anchor position, so every round draws afresh. `next` is the same for every G: a
    round without drafts gives the token that plain decoding gives with the same key.

    Args:
      keys: [B] request keys.
      positions: [B] absolute position of each request's newest token.
      block_size: G; 0 leaves only `next`.
    """
    folded = jax.vmap(jax.random.fold_in)(keys, positions)
    bits = jax.vmap(lambda key: jax.random.bits(key, (2 * block_size + 1, 2), jnp.uint32))(folded)
    rows = (bits >> 2).astype(jnp.int32)  # a row depends on its number, not on how many there are
    return Uniforms(rows[:, 1 : block_size + 1], rows[:, block_size + 1 :], rows[:, 0])


def request_sampling(
    count: int,
    *,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
) -> Sampling:
    """Settings of `count` requests; each is one value for all of them or one per request.

    Args:
      count: number of requests.
      temperature: 0 (below 1e-5) is greedy.
      top_k: 0 is off.
      top_p: 1 is off.
      min_p: 0 is off.

    Raises:
      InputError: a value outside its range, or not as many values as requests.
    """
    heat = _setting("temperature", temperature, count)
    greedy = heat < GREEDY_BELOW

    def used(name: str, given: float | Sequence[float], off: float) -> jax.Array | None:
        # A greedy request takes the largest logit, which no filter removes.
        rows = _setting(name, given, count)
        return None if (greedy | (rows == off)).all() else jnp.asarray(rows)

    filters = (used("top_k", top_k, 0), used("top_p", top_p, 1), used("min_p", min_p, 0))
    return Sampling(jnp.asarray(heat), *filters, greedy=bool(greedy.all()))


def _setting(name: str, given: float | Sequence[float], count: int) -> np.ndarray:
    """A setting as an array of `count` rows, checked."""
    holds, remedy = _RANGES[name]
    values = np.asarray(arguments.numeric(name, given), np.float64)
    if values.ndim and values.shape != (count,):
        raise InputError(f"{name} has shape {values.shape} for {count} requests; give one value, or one per request")
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)  # as the device gets it: infinite if it is too large
    wrong = np.flatnonzero(~(holds(values) & holds(rounded) & np.isfinite(rounded)))
    if len(wrong):
        value = f"{name}={np.asarray(given).reshape(-1)[wrong[0]]}"
        where = f" of request {wrong[0]}" if values.ndim else ""
        raise InputError(f"{value}{where} is out of range; {remedy}")
    limit = np.iinfo(np.int32).max
    rows = np.broadcast_to(values, (count,))
    return np.minimum(rows, limit).astype(np.int32) if name == "top_k" else rows.astype(np.float32)
