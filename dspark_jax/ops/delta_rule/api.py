"""Contract and dispatch of `delta_rule`."""

import jax

from dspark_jax.ops.dispatch import Operation

OPERATION = Operation("delta_rule", {"cpu": ["xla"], "gpu": ["xla"], "tpu": ["xla"]}, others=["reference"])


def delta_rule(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    decay: jax.Array,
    rate: jax.Array,
    state: jax.Array,
    *,
    starts: jax.Array | None = None,
    kept: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention by the gated delta rule.

    Each head has a state S [H, W], which maps keys to values. Row t lets it fade, corrects what it says of the row's
    key towards the row's value, and reads it with the row's query:

        S <- exp(decay_t) S
        S <- S + rate_t k_t (v_t - k_t S)
        o_t = q_t S

    A row with decay 0 and rate 0 leaves the state as it is, exactly.

    Args:
      query: [B, T, K, H] float32, scaled.
      key: [B, T, K, H] float32, of length 1 or shorter.
      value: [B, T, K, R, W] float32: every key head has R value heads.
      decay: [B, T, K, R] float32, at most 0.
      rate: [B, T, K, R] float32, from 0 to 1.
      state: [B, K, R, H, W] float32, before row 0.
      starts: [B, T] first row of each row's document, where several are packed into a sequence: a document begins with
        a state of zeros. A negative one is before row 0, and goes on from `state`. None: all do.
      kept: static: the state after so many rows is returned; None: after all.
      implementation: None (the best one here), 'xla' or 'reference' (the definition, row by row).

    Returns:
      [B, T, K, R, W] float32, and the state after the first `kept` rows.

    Raises:
      ValueError: shapes do not fit together, or the implementation is unknown.
    """
    (b, t, k, h), (r, w) = key.shape, value.shape[3:]
    shapes = [x.shape for x in (query, value, decay, rate, state)]
    if shapes != [(b, t, k, h), (b, t, k, r, w), (b, t, k, r), (b, t, k, r), (b, k, r, h, w)]:
        raise ValueError(f"delta_rule: query, value, decay, rate and state {shapes} do not fit key {key.shape}")
    if starts is not None and starts.shape != (b, t):
        raise ValueError(f"delta_rule: starts {starts.shape} do not fit key {key.shape}")
    kept = t if kept is None else kept
    if not 0 < kept <= t:
        raise ValueError(f"delta_rule: kept={kept} is not among {t} rows")
    return OPERATION(implementation, query, key, value, decay, rate, state, starts=starts, kept=kept)
