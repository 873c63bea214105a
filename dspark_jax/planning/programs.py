"""The programs that `plan` compiles: the train step as `train` runs it, and the decoding round as serving runs it.

All arguments are shapes with shardings, so nothing is allocated and no weight is read.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dspark_jax.config import Config
from dspark_jax.engine import schedulers
from dspark_jax.engine.models import Models
from dspark_jax.engine.placement import answering_load, evaluation_load
from dspark_jax.engine.slots import Chunk, Mode, Slots, open_slots, parts, pin, prefill_chunk, serve_round
from dspark_jax.ops.sampling import GREEDY_BELOW
from dspark_jax.sharding import evenly, replicated, sharding, state_shardings
from dspark_jax.target.frozen import abstract_frozen
from dspark_jax.target.loading import abstract_target, compute_dtype
from dspark_jax.training.micro_steps import ON_DEVICE, MicroSteps
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import abstract_drafter, param_shardings, state_layout, to_params
from dspark_jax.training.step import batch_layout, check_micro_steps, make_train_step

STOP_TOKENS = 4
"""Room for stop tokens in every slot."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced program and what it is given.

    Attributes:
      name: for messages.
      traced: not yet lowered.
      parts: what devices hold by what it is for, e.g. `target_parameters`; trees of shapes with shardings.
      calls: of `traced`, per step or round.
      last: a program that ends them and needs less memory, traced; or None.
      beside: of `parts`, what is no argument of `traced`; a tree of shapes with shardings.
    """

    name: str
    traced: Any
    parts: dict[str, Any]
    calls: int = 1
    last: Any = None
    beside: Any = ()


def with_dtypes(config: Config) -> Config:
    """The config with the types that `auto` means on an accelerator."""

    def fixed(part: Any) -> Any:
        return dataclasses.replace(part, dtype="bfloat16") if part.dtype == "auto" else part

    return dataclasses.replace(config, target=fixed(config.target), drafter=fixed(config.drafter))


def train_program(config: Config, mesh: Mesh) -> Program:
    """The train step of a config (types resolved) on a mesh of any devices.

    Where features come from disk, only the target's embedding and LM head are used, and the program is called for every
    micro-batch while the next one arrives, as in `train`.

    Raises:
      InputError: the batch cannot be divided over the mesh.
    """
    train = config.train
    check_micro_steps(config, mesh)
    arch, dtype = config.target.architecture, compute_dtype(config.target.dtype)
    online = config.data.features == "online"
    target: Any = abstract_target(arch, dtype) if online else abstract_frozen(arch, dtype, arch.final_logit_softcapping)
    drafter = abstract_drafter(config)
    optimizer = make_optimizer(config.optim, train.steps)
    state, batch = state_layout(drafter, optimizer, mesh), batch_layout(config, mesh)
    target_params = _laid(to_params(target), param_shardings(target, mesh))
    parts = {
        "target_parameters": target_params,
        "drafter_parameters": state.params,
        "optimizer": state.optimizer,
        "batch": (state.step, batch),
    }
    with jax.set_mesh(mesh):
        if online:
            traced = make_train_step(config, drafter, target, optimizer, mesh).trace(state, target_params, batch)
            return Program("train step", traced, parts)
        steps = MicroSteps(config, drafter, target, optimizer, mesh)
        traced, last = steps.add.trace(steps.total, state, target_params, batch), steps.apply.trace(state, steps.total)
    ahead = (batch,) * (ON_DEVICE - 1)
    parts |= {"gradients": steps.total, "batch": (state.step, batch, *ahead)}
    return Program("train step", traced, parts, train.accumulate, last, ahead)


def decode_program(config: Config, mesh: Mesh) -> Program:
    """One decoding round of `eval.batch_size` requests of the longest prompts and answers, sampling at temperature 1.

    `mesh` is the one that decoding lives on (`engine.placement`).
    """
    load = evaluation_load(config)
    models, slots, scheduler = serving_shapes(load.models, load.requests, load.rows, mesh)
    with jax.set_mesh(mesh):
        released = jax.ShapeDtypeStruct((evenly(load.requests),), jnp.bool_, sharding=replicated(mesh))
        traced = serve_round.trace(models, slots, released, scheduler, mode=Mode(greedy=False))
    return Program("decoding round", traced, _parts(models, slots))


def answering_programs(config: Config, mesh: Mesh, *, capacity: int, chunk: int) -> tuple[Program, Program]:
    """A round of `prepare`'s engine, which decodes plainly, and the reading of a chunk of a prompt by every copy.

    Args:
      config: types resolved.
      mesh: that decoding lives on.
      capacity: of the engine.
      chunk: tokens of a chunk.
    """
    load, answers = answering_load(config), config.data.answers
    models, slots, scheduler = serving_shapes(load.models, load.requests, capacity, mesh)
    everywhere = replicated(mesh)

    def given(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    filtered = answers.top_k > 0 or answers.top_p < 1 or answers.min_p > 0
    mode = Mode(config.data.temperature < GREEDY_BELOW, filtered)
    with jax.set_mesh(mesh):
        count = evenly(load.requests)
        read = parts(count)
        numbers, settings = given(jnp.int32, read), given(jnp.float32, read)
        pieces = Chunk(
            tokens=given(jnp.int32, read, chunk), count=numbers, start=numbers, slot=numbers, prompt_length=numbers,
            limit=numbers, seed=numbers, random_stream=numbers, temperature=settings, top_k=numbers, top_p=settings,
            min_p=settings, stop_tokens=given(jnp.int32, read, STOP_TOKENS),
        )  # fmt: skip
        traced = serve_round.trace(models, slots, given(jnp.bool_, count), scheduler, mode=mode)
        reading = prefill_chunk.trace(models, slots, pieces, scheduler)
    held = _parts(models, slots)
    return Program("round of answers", traced, held), Program("chunk of prompts", reading, held)


def serving_shapes(models: Models, requests: int, rows: int, mesh: Mesh) -> tuple[Models, Slots, Any]:
    """Shapes with shardings of what `serve_round` and `prefill_chunk` are given.

    Args:
      models: shapes of target and drafter.
      requests: decoded together.
      rows: of each one's caches.
      mesh: that decoding lives on.

    Returns:
      The models in their compute type, the slots, and the scheduler.
    """
    scheduler = jax.eval_shape(schedulers.fixed)

    def lay(leaf: Any, *axes: str | None) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(axes, leaf.shape, mesh))

    with jax.set_mesh(mesh):  # caches and weights are what they are on its chips
        models = jax.eval_shape(lambda loaded: loaded.for_decoding(batch_size=evenly(requests)), models)
        opened = functools.partial(open_slots, count=evenly(requests), rows=rows, stops=STOP_TOKENS)
        slots = pin(models, scheduler, jax.eval_shape(opened, models, scheduler), lay)
    places = state_shardings(models, mesh)
    return _laid(models, places), slots, jax.tree.map(lambda leaf: lay(leaf, *(None,) * leaf.ndim), scheduler)


def _parts(models: Models, slots: Slots) -> dict[str, Any]:
    """What devices hold while they decode, by what it is for."""
    caches = slots.state.target_cache, slots.state.draft_cache
    return {"target_parameters": models.target, "drafter_parameters": models.drafter, "caches": caches}


def _laid(shapes: Any, shardings: Any) -> Any:
    """Shapes with their shardings."""
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, shardings)
