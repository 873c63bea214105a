"""What decoding carries from round to round, and what a round reports."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.engine.models import Models
from dspark_jax.engine.sampling import request_keys
from dspark_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pending:
    """What rounds without drafts have committed and the drafter has not read yet: it reads several rows at once.

    Attributes:
      features: [B, P, M*D] of the target, oldest first; undefined from `counts` on.
      counts: [B] int32. The rows' tokens are the last `counts` before the anchor.
    """

    features: jax.Array
    counts: jax.Array

    @classmethod
    def empty(cls, models: Models, batch: int) -> "Pending":
        """Nothing, with room for P = `models.most_pending(batch)` rows."""
        row = jnp.zeros((batch, 1), jnp.int32)
        like = jax.eval_shape(lambda: models.target.forward(row, row, taps=models.taps).features)
        shape = (batch, models.most_pending(batch), like.shape[-1])
        return cls(constrain(jnp.zeros(shape, like.dtype), "batch", None, None), jnp.zeros((batch,), jnp.int32))

    @classmethod
    def of_prompt(cls, models: Models, features: jax.Array, counts: jax.Array) -> "Pending":
        """The features [1, S, M*D] of a prompt of `counts` [1] tokens, with room for P more rows."""
        batch, width, _ = features.shape
        size = models.most_pending(batch) + -(-width // models.pending_rows) * models.pending_rows
        return cls(jnp.pad(features, ((0, 0), (0, size - width), (0, 0))), counts)

    @property
    def full(self) -> jax.Array:
        """[] bool, whether a request has no room for another row."""
        return jnp.max(self.counts) >= self.features.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch of requests in the middle of decoding. Rolling back is a shorter length, never a copy.

    The newest committed token of a request, its anchor, is at position lengths - 1; the target has not seen it
    yet, so the caches hold the rows 0..lengths - 2 (what they hold beyond is stale and invisible).

    Attributes:
      tokens: [B, C] int32, prompt and committed tokens; undefined from `lengths` on.
      lengths: [B] int32, committed tokens, the prompt's included.
      prompt_lengths: [B] int32.
      limits: [B] int32, the length at which a request ends: prompt plus token budget.
      finished: [B] bool; a finished request changes no more.
      stopped: [B] bool, ended by a stop token rather than by its budget.
      rounds: [B] int32, decoding rounds that the request took part in.
      keys: [B] request keys.
      target_cache: the target's key/value cache.
      draft_cache: whatever the drafter keeps.
      history: what the scheduler remembers of earlier rounds (`schedule.History`), None where it needs nothing; a new
        request in a slot starts from `Scheduler.start`.
      pending: committed rows that the drafter's cache is still to learn; None where every round teaches it.
    """

    tokens: jax.Array
    lengths: jax.Array
    prompt_lengths: jax.Array
    limits: jax.Array
    finished: jax.Array
    stopped: jax.Array
    rounds: jax.Array
    keys: jax.Array
    target_cache: Any
    draft_cache: Any
    history: Any = None
    pending: Pending | None = None

    @classmethod
    def empty(cls, models: Models, batch: int, capacity: int) -> "DecodeState":
        """Requests that have finished before they begin, with caches of C rows; no history, nothing pending."""
        numbers = jnp.zeros((batch,), jnp.int32)
        return cls(
            tokens=jnp.zeros((batch, capacity), jnp.int32),
            lengths=numbers + 1,
            prompt_lengths=numbers + 1,
            limits=numbers + 1,
            finished=numbers == 0,
            stopped=numbers > 0,
            rounds=numbers,
            keys=request_keys(0, numbers),
            target_cache=models.target_cache(batch, capacity),
            draft_cache=models.draft_cache(batch, capacity),
        )

    @property
    def positions(self) -> jax.Array:
        """[B] absolute position of each anchor."""
        return self.lengths - 1

    @property
    def anchors(self) -> jax.Array:
        """[B] newest committed token of each request."""
        return jnp.take_along_axis(self.tokens, self.positions[:, None], axis=1)[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Round:
    """What one decoding round did to each request; undefined where the request had finished before.

    Attributes:
      drafted: [B, G] all drafted tokens, scheduled or not; -1 in a round without drafts.
      confidence: [B, G] confidence logits, or None.
      proposed: [B] drafts that were verified; in a round ended by an accepted stop token, those up to it.
      accepted: [B] drafts that were committed.
      emitted: [B] accepted length: accepted + 1 for the bonus or correction, which a stop token among the accepted
        drafts leaves out (trap 25). The token budget does not shorten it.
      next_token: [B] bonus or correction, drawn in every round and dropped after a stop token.
      rows: [] int32, rows that the target computed, of all requests together.
    """

    drafted: jax.Array
    confidence: jax.Array | None
    proposed: jax.Array
    accepted: jax.Array
    emitted: jax.Array
    next_token: jax.Array
    rows: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundLog:
    """Rounds of a whole decoding run. All requests start together, so round r is row r for each of them.

    Attributes:
      emitted: [R, B] int32; 0 where the request had finished.
      accepted: [R, B] int32.
      proposed: [R, B] int32.
      drafted: [R, B, G] int32, or None when not traced.
      confidence: [R, B, G] float32, or None when not traced or when the drafter has none.
    """

    emitted: jax.Array
    accepted: jax.Array
    proposed: jax.Array
    drafted: jax.Array | None
    confidence: jax.Array | None

    @classmethod
    def empty(cls, rounds: int, batch: int, block_size: int, *, trace: bool, confidence: bool) -> "RoundLog":
        """A log of no rounds with room for `rounds`."""
        counts = jnp.zeros((rounds, batch), jnp.int32)
        wide = (rounds, batch, block_size)
        drafted = jnp.zeros(wide, jnp.int32) if trace else None
        return cls(counts, counts, counts, drafted, jnp.zeros(wide, jnp.float32) if trace and confidence else None)

    def put(self, row: jax.Array, entry: Round, active: jax.Array) -> "RoundLog":
        """The log with `entry` as its row, for the requests [B] that were active."""

        def store(log: jax.Array, values: jax.Array) -> jax.Array:
            mask = active.reshape(active.shape + (1,) * (values.ndim - 1))
            return jax.lax.dynamic_update_index_in_dim(log, jnp.where(mask, values, 0).astype(log.dtype), row, 0)

        drafted = None if self.drafted is None else store(self.drafted, entry.drafted)
        confidence = self.confidence
        if confidence is not None and entry.confidence is not None:
            confidence = store(confidence, entry.confidence)
        return RoundLog(
            store(self.emitted, entry.emitted),
            store(self.accepted, entry.accepted),
            store(self.proposed, entry.proposed),
            drafted,
            confidence,
        )
