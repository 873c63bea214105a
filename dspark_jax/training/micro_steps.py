"""The train step where features come from disk: micro-batch by micro-batch, so that no more are in memory at once.

The features of an optimizer batch of the released configs are 8 GB (128 sequences x 4096 tokens x 15.6 kB of Qwen3-4B
as int8). So the loop over micro-batches, which is inside the program where the target runs in it, is on the host here:
one program adds a micro-batch to the sums, another one ends the step. What they compute is defined in `training.step`.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dspark_jax.config import Config
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.platform import train_step_options
from dspark_jax.sharding import replicated
from dspark_jax.target.model import Target
from dspark_jax.training.state import Params, TrainState, state_layout, to_module, to_params
from dspark_jax.training.step import (
    Accumulated,
    Batch,
    StepMetrics,
    accumulate,
    apply_gradients,
    batch_layout,
    place_batch,
)

ON_DEVICE = 2
"""Micro-batches with their features that devices hold: one is computed with, the next one arrives."""


class MicroSteps:
    """An optimizer step in several programs. Use it inside `jax.set_mesh(mesh)`.

    Attributes:
      total: layout of the sums.
      zeros: () -> the sums of nothing.
      add: (sums, state, target parameters, batch of C = 1) -> (sums, the micro-batch's loss, to wait for); the sums are
        donated. The optimizer's state comes along so that a plan counts it.
      apply: (state, sums) -> (state, metrics); the state is donated.
    """

    def __init__(
        self,
        config: Config,
        drafter: DrafterModule,
        target: Target,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
    ):
        """`drafter` and `target` may be abstract."""
        self._config, self._mesh = config, mesh
        self._layout = state_layout(drafter, optimizer, mesh)
        self._running: collections.deque[jax.Array] = collections.deque()
        everywhere = replicated(mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self._layout)
        sums: Any = Accumulated(shardings.params, *(everywhere,) * 3)  # pyright: ignore[reportArgumentType]

        def micro(state: TrainState, frozen: Params, batch: Batch) -> Accumulated:
            found = accumulate(state.params, drafter, to_module(target, frozen), batch, state.step, config)
            return jax.lax.with_sharding_constraint(found, sums)

        def add(total: Accumulated, state: TrainState, frozen: Params, batch: Batch) -> tuple[Accumulated, jax.Array]:
            found = micro(state, frozen, batch)
            return jax.tree.map(jnp.add, total, found), found.sums.total

        shapes = jax.eval_shape(micro, self._layout, to_params(target), batch_layout(config, mesh))
        where: Any = dataclasses.replace(jax.tree.map(lambda _: everywhere, shapes), gradients=shardings.params)
        self.total = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, where)
        zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        apply = functools.partial(apply_gradients, optimizer=optimizer, shardings=shardings.params)
        options = train_step_options(mesh)
        self.zeros: Any = jax.jit(zeros, out_shardings=sums)
        self.add: Any = jax.jit(
            add, donate_argnums=0, keep_unused=True, out_shardings=(sums, everywhere), compiler_options=options
        )
        self.apply: Any = jax.jit(
            apply, donate_argnums=0, out_shardings=(shardings, everywhere), compiler_options=options
        )

    def compile(self, state: TrainState, frozen: Params) -> None:
        """Compiles all of it, before the clock starts."""
        self.add = self.add.lower(self.total, state, frozen, batch_layout(self._config, self._mesh)).compile()
        self.apply = self.apply.lower(state, self.total).compile()
        self.zeros = self.zeros.lower().compile()

    def __call__(
        self, state: TrainState, frozen: Params, micro_batches: Iterable[Mapping[str, np.ndarray]]
    ) -> tuple[TrainState, StepMetrics]:
        """One optimizer step; `state` is donated.

        Args:
          state: the state before.
          frozen: the target's parameters.
          micro_batches: train.accumulate of them, this process's rows of each.
        """
        total = self.zeros()
        for rows in micro_batches:
            while len(self._running) >= ON_DEVICE:  # also those of the step before
                self._running.popleft().block_until_ready()
            total, loss = self.add(total, state, frozen, place_batch(rows, 1, self._mesh))
            self._running.append(loss)
        return self.apply(state, total)
