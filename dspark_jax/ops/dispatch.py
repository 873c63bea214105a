"""Which implementation of an operation runs: the first one, in the platform's order, that can do the case."""

import collections
import contextlib
import contextvars
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dspark_jax import platform

SWITCHED_OFF = "DSPARK_JAX_WITHOUT"
"""Environment variable: implementations that are passed over, e.g. `pallas_tpu` or
`block_attention.pallas_tpu,attention.cudnn`. It is read when a program is traced."""


class Unsupported(NotImplementedError):
    """Raised by an implementation, before it computes anything, for a case that it cannot do; says which."""


class Choice(NamedTuple):
    """Which implementation of an operation was taken, and why those before it were not."""

    operation: str
    implementation: str
    refusals: tuple[str, ...]


_watching: contextvars.ContextVar[collections.Counter[Choice] | None] = contextvars.ContextVar("watching", default=None)


@contextlib.contextmanager
def watched() -> Iterator[collections.Counter[Choice]]:
    """Counts the choices of what is traced inside; a loop's body is traced once, and what was traced before is not."""
    counted: collections.Counter[Choice] = collections.Counter()
    before = _watching.set(counted)
    try:
        yield counted
    finally:
        _watching.reset(before)


class Operation:
    """An operation and its implementations, each a module beside the operation's `api` (or a registered function).

    Implementations share one signature. They are imported when they are first asked, so that nobody pays for the
    kernels of another platform.
    """

    def __init__(self, name: str, order: Mapping[str, Sequence[str]], others: Sequence[str] = ()):
        """An operation.

        Args:
          name: of the operation, of its folder here, and of the function in every module that implements it.
          order: platform (cpu, gpu, tpu) -> implementations, the one to ask first first.
          others: implementations that run only when they are asked for by name.
        """
        self.name = name
        self.order = {platform: list(names) for platform, names in order.items()}
        self._functions: dict[str, Callable[..., Any] | None] = dict.fromkeys(
            [name for names in order.values() for name in names] + list(others)
        )

    @property
    def names(self) -> list[str]:
        """All implementations."""
        return list(self._functions)

    def register(self, name: str, function: Callable[..., Any], platforms: Sequence[str]) -> None:
        """Adds an implementation from anywhere, asked first on `platforms`."""
        if name in self._functions:
            raise ValueError(f"{self.name} has an implementation {name!r} already; give another name")
        self._functions[name] = function
        for platform_name in platforms:
            self.order[platform_name].insert(0, name)

    def unregister(self, name: str) -> None:
        """Takes back `register`."""
        del self._functions[name]
        for names in self.order.values():
            names[:] = [other for other in names if other != name]

    def __call__(self, implementation: str | None, *arrays: Any, **settings: Any) -> Any:
        """Runs an implementation.

        Args:
          implementation: its name, and it never falls back; or None, the first one here that can do the case.
          *arrays: of the operation.
          **settings: of the operation.

        Raises:
          ValueError: the implementation is unknown.
          Unsupported: the one asked for, or every one here, cannot do the case.
        """
        if implementation is not None:
            return self._function(implementation)(*arrays, **settings)
        refusals = []
        for name in self.order[platform.current()]:
            if self.switched_off(name):
                refusals.append(f"{name}: switched off by {SWITCHED_OFF}")
                continue
            try:
                result = self._function(name)(*arrays, **settings)
            except Unsupported as refusal:
                refusals.append(f"{name}: {refusal}")
                continue
            if (counted := _watching.get()) is not None:
                counted[Choice(self.name, name, tuple(refusals))] += 1
            return result
        raise Unsupported(f"{self.name}: no implementation can do this here; {'; '.join(refusals)}")

    def switched_off(self, name: str) -> bool:
        """Whether the environment says to do without an implementation."""
        listed = {entry.strip() for entry in os.environ.get(SWITCHED_OFF, "").split(",")}
        return name in listed or f"{self.name}.{name}" in listed

    def _function(self, name: str) -> Callable[..., Any]:
        if name not in self._functions:
            raise ValueError(f"{self.name}: implementation {name!r} is not one of {self.names}")
        found = self._functions[name]
        if found is None:
            found = self._functions[name] = getattr(
                importlib.import_module(f"dspark_jax.ops.{self.name}.{name}"), self.name
            )
        assert found is not None
        return found
