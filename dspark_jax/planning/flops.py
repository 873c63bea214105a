"""Floating point operations of a traced program: its matrix products, loops counted as often as they turn.

XLA's own cost analysis counts the body of a loop once, and nothing of a Pallas kernel.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def matmul_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> float:
    """Operations (2 per multiply-add) of all products of a jaxpr, over all devices.

    A loop whose number of turns is not known when it is traced counts once; of branches the most expensive one counts.
    """
    return sum(_equation(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (left, _), _ = params["dimension_numbers"]
        contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * contracted
    if name == "ragged_dot_general":
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * equation.invars[0].aval.shape[-1]
    if name == "pallas_call":
        return float(getattr(params.get("cost_estimate"), "flops", 0) or 0)
    inner = [matmul_flops(jaxpr) for jaxpr in _jaxprs(params)]
    if name == "cond":
        return max(inner, default=0.0)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":  # inside, shapes are those of one device
        return params["mesh"].size * sum(inner)
    return sum(inner)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The programs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr | core.Jaxpr):
                yield item
