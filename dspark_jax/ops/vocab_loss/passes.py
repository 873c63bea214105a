"""Splits a function of rows of logits into passes over the vocabulary, for kernels that cannot hold a whole row.

What lies between two products is elementwise over [P, m, V], but for sums and maxima over V, which later steps need
whole. So a first pass goes over tiles of V and adds up what follows from the logits alone, the next one what needs
those sums, and a last one writes what is wanted of every token. Between the passes everything is [P, m] and left to
XLA, products along blocks of rows as well. The function is traced once, and split by which value needs which.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from dspark_jax.ops.dispatch import Unsupported

_SUMS = ("reduce_sum", "reduce_max")
_VIEWS = ("broadcast_in_dim", "copy", "reshape", "reshard", "sharding_constraint", "squeeze")
ELEMENTWISE = {
    "abs", "add", "add_any", "and", "convert_element_type", "div", "eq", "exp", "exp2", "expm1", "ge", "gt",
    "integer_pow", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow",
    "rsqrt", "select_n", "sign", "sqrt", "square", "sub", "tanh",
}  # fmt: skip
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
"""Parameters of primitives that do nothing but call a program."""


class Step(NamedTuple):
    """A primitive of the function.

    Attributes:
      primitive: of JAX.
      operands: names of values, or literals.
      results: names.
      parameters: of the primitive.
      before: passes over the vocabulary that must be over.
      wide: whether it is about all tokens of a row; its result is, too, unless the step `sums`.
      sums: whether it makes one number of them.
    """

    primitive: Any
    operands: tuple[Any, ...]
    results: tuple[int, ...]
    parameters: Mapping[str, Any]
    before: int
    wide: bool
    sums: bool

    def on_tile(self, operands: Sequence[Any], tokens: jax.Array) -> jax.Array:
        """What it gives for the tokens with these ids, of operands that are a tile of them or one number."""
        if self.primitive.name == "iota":
            return tokens.astype(self.parameters["dtype"])
        full = [jnp.broadcast_to(x, tokens.shape) for x in operands]
        return full[0] if self.primitive.name in _VIEWS else self.primitive.bind(*full, **self.parameters)


class Pass(NamedTuple):
    """One pass over the vocabulary: what is computed of a tile of a row.

    Attributes:
      steps: in their order.
      arrays: names of those of the function's arrays [P, m, V] that it reads; at least one.
      rows: names of the numbers [P, m] that it needs.
      sums: steps whose operands are summed over all tiles, or none; `wanted` then.
      wanted: names of what is written for every token.
    """

    steps: tuple[Step, ...]
    arrays: tuple[int, ...]
    rows: tuple[int, ...]
    sums: tuple[Step, ...]
    wanted: tuple[int, ...]

    def of_tile(self, arrays: Sequence[jax.Array], rows: Sequence[jax.Array], tokens: jax.Array) -> list[jax.Array]:
        """What is to be summed, or else written: a tile [tile] of each, from those of `arrays` and from `rows`."""
        found: dict[int, Any] = dict(zip((*self.arrays, *self.rows), (*arrays, *rows), strict=True))
        for step in self.steps:
            found[step.results[0]] = step.on_tile([_value(found, x) for x in step.operands], tokens)
        results = [step.operands[0] for step in self.sums] or self.wanted
        return [jnp.broadcast_to(_value(found, x), tokens.shape) for x in results]


OnePass = Callable[[Pass, list[Any], list[Any]], Sequence[Any]]
"""(a pass, its arrays [P, m, V], its numbers [P, m]) -> its sums [P, m], or what it writes [P, m, V]."""


class Passes:
    """A function split into passes; see the module.

    Attributes:
      inputs: names of its arguments.
      outputs: names of its results, or literals.
      structure: of its results.
    """

    def __init__(self, function: Callable[..., Any], wide: Sequence[Any], narrow: Sequence[Any]):
        """Traces the function and splits it.

        Args:
          function: of (*wide, *narrow).
          wide: arrays [P, m, V] or their shapes.
          narrow: arrays [P, m] or [P, m, 1], or their shapes.

        Raises:
          Unsupported: it needs more of a row's logits at once than sums and maxima.
        """
        closed, found = jax.make_jaxpr(function, return_shape=True)(*wide, *narrow)
        self.structure = jax.tree.structure(found)
        self._shape, self._names = tuple(wide[0].shape), itertools.count()
        self._steps: list[Step] = []
        self._constants: dict[int, Any] = {}
        self.inputs = [next(self._names) for _ in closed.jaxpr.invars]
        self._wide = set(self.inputs[: len(wide)])
        self._before = dict.fromkeys(self.inputs, 0)
        self.outputs = self._add_all(closed, self.inputs)
        self._made = {name: step for step in self._steps for name in step.results}

    def _add_all(self, program: Any, operands: Sequence[Any]) -> list[Any]:
        """Adds the steps of a program and of those that it calls; gives the names of its results."""
        jaxpr, known = getattr(program, "jaxpr", program), {}
        for variable, value in zip(jaxpr.constvars, getattr(program, "consts", ()), strict=True):
            self._check_own(value)
            known[variable] = name = next(self._names)
            self._constants[name], self._before[name] = value, 0
        known.update(zip(jaxpr.invars, operands, strict=True))
        for equation in jaxpr.eqns:
            given = tuple(x if isinstance(x, Literal) else known[x] for x in equation.invars)
            for literal in (x for x in given if isinstance(x, Literal)):
                self._check_own(literal.val)
            wide = any(map(self._is_wide, given)) or any(self._has_tokens(x.aval.shape) for x in equation.outvars)
            called = next((equation.params[key] for key in _CALLS if key in equation.params), None)
            results = self._add_all(called, given) if wide and called is not None else self._add(equation, given, wide)
            known.update(zip(equation.outvars, results, strict=True))
        return [x if isinstance(x, Literal) else known[x] for x in jaxpr.outvars]

    def _add(self, equation: Any, operands: tuple[Any, ...], wide: bool) -> tuple[int, ...]:
        """Adds a step; gives the names of its results."""
        primitive, shape = equation.primitive, equation.outvars[0].aval.shape
        before = max((self._before[x] for x in operands if not isinstance(x, Literal)), default=0)
        sums = wide and primitive.name in _SUMS
        if sums:
            summed = equation.invars[0].aval
            known = tuple(equation.params["axes"]) == (summed.ndim - 1,)
            if summed.dtype != jnp.float32:
                raise Unsupported(f"a term of the loss sums {summed.dtype}")
        elif primitive.name == "broadcast_in_dim" and any(map(self._is_wide, operands)):
            known = equation.params["broadcast_dimensions"][-1] == len(shape) - 1
        elif primitive.name == "iota":
            known = not wide or equation.params["dimension"] == len(shape) - 1
        else:
            known = not wide or (self._has_tokens(shape) and primitive.name in {*ELEMENTWISE, *_VIEWS})
        if not known:
            raise Unsupported(f"a term of the loss takes {primitive.name} of whole rows")
        results = tuple(next(self._names) for _ in equation.outvars)
        self._before.update(dict.fromkeys(results, before + sums))
        if wide and not sums:
            self._wide.update(results)
        self._steps.append(Step(primitive, operands, results, equation.params, before, wide, sums))
        return results

    def _check_own(self, value: Any) -> None:
        """Refuses a constant that kernels would have to read tile by tile."""
        if self._has_tokens(jnp.shape(value)):
            raise Unsupported("a term of the loss has an array of its own over the vocabulary")

    def _is_wide(self, name: Any) -> bool:
        return not isinstance(name, Literal) and name in self._wide

    def _has_tokens(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape has one number for every token, be it the same ones in every row."""
        v = self._shape[-1]
        return tuple(shape) in (self._shape, (v,), (1, 1, v))

    def run(self, arguments: Sequence[jax.Array], one_pass: OnePass) -> Any:
        """The function's result for these arguments.

        Args:
          arguments: of the function.
          one_pass: goes over the vocabulary.
        """
        known = {**self._constants, **dict(zip(self.inputs, arguments, strict=True))}

        def done(part: Pass) -> Sequence[Any]:
            rows = [jnp.broadcast_to(x[..., 0] if x.ndim == 3 else x, self._shape[:2]) for x in _all(known, part.rows)]
            return one_pass(part, _all(known, part.arrays), rows)

        for before, part in self._passes():
            for step in self._steps:
                if step.before == before and not step.wide:
                    values = step.primitive.bind(*_all(known, step.operands), **step.parameters)
                    known.update(
                        zip(step.results, values if step.primitive.multiple_results else [values], strict=True)
                    )
            if part.sums:
                known.update(zip((step.results[0] for step in part.sums), done(part), strict=True))
            elif part.wanted:
                known.update(zip(part.wanted, done(part), strict=True))
        return jax.tree.unflatten(self.structure, _all(known, self.outputs))

    def _passes(self) -> Iterator[tuple[int, Pass]]:
        """Every pass, with the number of those before it; the last one sums nothing."""
        for before in range(max(self._before.values()) + 1):
            yield before, self._pass([step for step in self._steps if step.sums and step.before == before], ())
        wanted = tuple(dict.fromkeys(x for x in self.outputs if self._is_wide(x)))
        yield -1, self._pass([], wanted)

    def _pass(self, sums: Sequence[Step], wanted: tuple[int, ...]) -> Pass:
        """The pass that gives these, with the steps that they need."""
        todo: list[Any] = [*wanted, *(step.operands[0] for step in sums)]
        needed, rows = set[int](), dict[int, None]()
        while todo:
            name = todo.pop()
            if isinstance(name, Literal) or name in needed:
                continue
            if name not in self._wide:
                rows[name] = None
                continue
            needed.add(name)
            todo += self._made[name].operands if name in self._made else ()
        steps = tuple(step for step in self._steps if step.results[0] in needed)
        arrays = tuple(name for name in self.inputs if name in needed) or tuple(self.inputs[:1])
        return Pass(steps, arrays, tuple(rows), tuple(sums), wanted)


def _value(known: Mapping[int, Any], x: Any) -> Any:
    return jnp.asarray(x.val) if isinstance(x, Literal) else known[x]


def _all(known: Mapping[int, Any], names: Sequence[Any]) -> list[Any]:
    return [_value(known, x) for x in names]
