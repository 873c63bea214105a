"""Contract and dispatch of `expert_mlp`."""

import jax

from dspark_jax.ops.dispatch import Operation
from dspark_jax.ops.expert_mlp.parts import Inner, Parts

OPERATION = Operation("expert_mlp", {"cpu": ["xla"], "gpu": ["pallas_gpu", "xla"], "tpu": ["pallas_tpu", "xla"]})


def expert_mlp(
    rows: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    parts: Parts,
    inner: Inner,
    *,
    layer: jax.Array | int | None = None,
    count: int | None = None,
    trained: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Every row through its experts: sum over k of weights[t, k] * down(inner(gate(rows[t]), up(rows[t]))) of
    expert chosen[t, k].

    That is 6 T k D F operations, and each chosen expert's matrices, 3 D F values, should be read once.

    Args:
      rows: [T, D].
      chosen: [T, k] int32, the experts of each row, each at most once; numbers other than 0 to E - 1 are experts of
        another device, and give nothing.
      weights: [T, k], of the rows' type.
      parts: of E experts, or of a stack of layers.
      inner: what is between an expert's matrices.
      layer: which of a stack; None: `parts` are one layer's.
      count: experts of all devices, among which the pairs are; None: E.
      trained: gradients are asked for.
      implementation: None (the best one here), 'xla', 'pallas_gpu' or 'pallas_tpu' (no gradients).

    Returns:
      [T, D], of the rows' type.

    Raises:
      ValueError: shapes do not fit together, or the implementation is unknown.
    """
    (t, d), e, f = rows.shape, parts.count, parts.gate.shape[-1]
    lead = parts.gate.shape[:-3]
    expected = {
        "chosen": (chosen, (t, *chosen.shape[1:2])),
        "weights": (weights, chosen.shape),
        "gate": (parts.gate, (*lead, e, d, f)),
        "up": (parts.up, (*lead, e, d, f)),
        "down": (parts.down, (*lead, e, f, d)),
        "gate_bias": (parts.gate_bias, (e, f)),
        "up_bias": (parts.up_bias, (e, f)),
        "down_bias": (parts.down_bias, (e, d)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"expert_mlp: {name} has shape {array.shape}, it must be {shape}")
    if len(lead) != (layer is not None):
        raise ValueError(f"expert_mlp: gate has shape {parts.gate.shape}; `layer` is of a stack [L, E, D, F] only")
    settings = {"layer": layer, "count": count or e, "trained": trained}
    return OPERATION(implementation, rows, chosen, weights, parts, inner, **settings)
