"""The train step: target forward, anchors, drafter, loss, exact accumulation, clipping, AdamW. A pure function."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from dspark_jax.config import Config, InputError
from dspark_jax.data.feature_codec import dequantise, group_size
from dspark_jax.drafter.blocks import sample_anchors
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.kinds import KINDS
from dspark_jax.metrics import Ratio
from dspark_jax.platform import train_step_options
from dspark_jax.recompute import recomputing
from dspark_jax.sharding import constrain, replicated, sharding
from dspark_jax.target.model import Target
from dspark_jax.training.loss import EPSILON, LossSums, drafter_loss
from dspark_jax.training.state import Params, TrainState, state_layout, to_module

Batch = dict[str, jax.Array]
"""tokens, loss_mask [C, B, S]; lengths, sample_id [C, B]: C micro-batches of B sequences. Packed sequences have starts
[C, B, S], the first row of every row's document. Optionally features [C, B, S, M*D] and last_hidden [C, B, S, D], or
feature_values and feature_scales as a feature cache has them, with which the target does not run. What brings features
from disk has C = 1, whatever train.accumulate is (see `training.micro_steps`)."""

FINITE = np.iinfo(np.int32).max
"""`StepMetrics.not_finite` of steps without an accident."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What steps report; those of several steps can be added.

    Attributes:
      ratios: numerators and denominators over the global batch, by name.
      not_finite: int32, the first step (counted from 1) with a loss or gradient that is not finite; `FINITE` if none.
      target_not_finite: the same of the target's last hidden states. What is not finite in any of its layers is not
        finite after them.
    """

    ratios: dict[str, Ratio]
    not_finite: jax.Array
    target_not_finite: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Accumulated:
    """What the micro-batches of an optimizer step add up to.

    Attributes:
      gradients: of the un-normalised loss, by parameter.
      sums: the loss and its terms.
      tokens: int32 scalar.
      not_finite: int32, micro-batches in which the target's last hidden states are not finite.
    """

    gradients: Params
    sums: LossSums
    tokens: jax.Array
    not_finite: jax.Array

    def normalised(self) -> Params:
        """Gradients of the loss of all of them."""
        return jax.tree.map(lambda g: g / (self.sums.denominator + EPSILON), self.gradients)


@functools.partial(jax.jit, donate_argnums=0)
def add_metrics(sums: StepMetrics, more: StepMetrics) -> StepMetrics:
    """Metrics of the steps of both."""
    return StepMetrics(
        _add(sums.ratios, more.ratios),
        jnp.minimum(sums.not_finite, more.not_finite),
        jnp.minimum(sums.target_not_finite, more.target_not_finite),
    )


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def anchor_keys(seed: int, step: jax.Array, sample_id: jax.Array) -> jax.Array:
    """[B] keys: of seed, step and sample only, so that neither micro-batches nor the mesh move an anchor (trap 34)."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(sample_id)


def loss_sums(
    params: Params, drafter: DrafterModule, target: Target, batch: Batch, step: jax.Array, config: Config
) -> tuple[jax.Array, tuple[LossSums, jax.Array]]:
    """Un-normalised loss of one micro-batch (no leading C), differentiable in `params`.

    Args:
      params: the drafter's parameters.
      drafter: its structure.
      target: frozen; runs here unless the batch brings its features.
      batch: B sequences.
      step: int32 scalar.
      config: resolved.

    Returns:
      The loss, and with it its terms and whether the target's last hidden states are finite.
    """
    batch = {name: constrain(x, "batch", *(None,) * (x.ndim - 1)) for name, x in batch.items()}
    tokens, loss_mask, starts = batch["tokens"], batch["loss_mask"], batch.get("starts")
    if "feature_values" in batch:
        rows = dequantise(batch["feature_values"], batch["feature_scales"], target.dtype)
        features, last_hidden = rows[..., : -target.arch.hidden_size], rows[..., -target.arch.hidden_size :]
    elif "features" in batch:
        features, last_hidden = batch["features"], batch["last_hidden"]
    else:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        positions = positions if starts is None else positions - starts
        out = target.forward(tokens, positions, taps=drafter.taps, starts=starts)
        features, last_hidden = out.features, out.last_hidden
    keys = anchor_keys(config.train.seed, step, batch["sample_id"])
    anchors = sample_anchors(keys, loss_mask, config.train.num_anchors)
    model = to_module(drafter, params)
    with recomputing(config.train.recompute):
        outputs = model(target, features, tokens, loss_mask, anchors, starts)
    sums = drafter_loss(model, target, outputs, last_hidden, config.loss, vocab_chunk=config.train.vocab_chunk)
    return sums.total, (sums, jnp.isfinite(last_hidden).all())


def accumulate(
    params: Params, drafter: DrafterModule, target: Target, batch: Batch, step: jax.Array, config: Config
) -> Accumulated:
    """The sums over C micro-batches.

    Gradients and denominators are summed un-normalised and divided once, so C changes memory and nothing else
    (trap 18).
    """
    grad = jax.grad(loss_sums, has_aux=True)

    def one(micro: Batch) -> Accumulated:
        found, (sums, finite) = grad(params, drafter, target, micro, step, config)
        return Accumulated(found, sums, jnp.sum(micro["lengths"]), jnp.where(finite, 0, 1))

    first = jax.tree.map(lambda x: x[0], batch)
    if batch["tokens"].shape[0] == 1:
        return one(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
    return jax.lax.scan(lambda carry, micro: (_add(carry, one(micro)), None), zeros, batch)[0]


def train_step(
    state: TrainState,
    target_params: Params,
    batch: Batch,
    *,
    drafter: DrafterModule,
    target: Target,
    optimizer: optax.GradientTransformation,
    config: Config,
    shardings: Mapping[str, NamedSharding] | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step.

    Args:
      state: the state before.
      target_params: the frozen target's parameters; an argument, so that they are no constants of the program.
      batch: C micro-batches.
      drafter: the drafter's structure (an abstract module).
      target: the target's structure.
      optimizer: acts on the normalised gradient.
      config: resolved.
      shardings: of the parameters; Auto axes would otherwise drop them from the gradients.

    Returns:
      The state after, and the step's metrics.
    """
    total = accumulate(state.params, drafter, to_module(target, target_params), batch, state.step, config)
    return apply_gradients(state, total, optimizer=optimizer, shardings=shardings)


def apply_gradients(
    state: TrainState,
    total: Accumulated,
    *,
    optimizer: optax.GradientTransformation,
    shardings: Mapping[str, NamedSharding] | None = None,
) -> tuple[TrainState, StepMetrics]:
    """The end of a step, of which `total` are the sums; otherwise as `train_step`."""
    grads, sums = total.normalised(), total.sums
    if shardings is not None:
        grads = jax.lax.with_sharding_constraint(grads, dict(shardings))
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    one = jnp.ones((), jnp.float32)
    norm = optax.global_norm(grads)
    ratios = {
        "loss": Ratio(sums.total, sums.denominator),
        **sums.metrics,
        "grad_norm": Ratio(norm, one),
        "tokens": Ratio(total.tokens.astype(jnp.float32), one),
    }
    finite = jnp.isfinite(sums.total) & jnp.isfinite(norm)
    step = state.step + 1
    metrics = StepMetrics(ratios, jnp.where(finite, FINITE, step), jnp.where(total.not_finite == 0, FINITE, step))
    return TrainState(step, params, optimizer_state), metrics


def make_train_step(
    config: Config, drafter: DrafterModule, target: Target, optimizer: optax.GradientTransformation, mesh: Mesh
) -> jax.stages.Wrapped:
    """`train_step` jitted for a mesh: (state, target parameters, batch) -> (state, metrics); the state is donated.

    Call (or lower) it inside `jax.set_mesh(mesh)`. `drafter` and `target` may be abstract.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_layout(drafter, optimizer, mesh))
    step = functools.partial(
        train_step, drafter=drafter, target=target, optimizer=optimizer, config=config, shardings=shardings.params
    )
    return jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)), compiler_options=train_step_options(mesh)
    )


def check_batch(config: Config, mesh: Mesh) -> None:
    """Refuses a batch that this mesh cannot divide, or of which a drafter that needs every row would see some.

    Raises:
      InputError: sequences per micro-step are no multiple of data x fsdp, `tensor` spans hosts, or a drafter that goes
        token by token has fewer anchors than a sequence has rows.
    """
    kind, rows = config.drafter.kind, config.data.max_length
    if KINDS[kind].token_by_token and config.train.num_anchors < rows:
        raise InputError(
            f"train.num_anchors={config.train.num_anchors}: {kind} is trained on every row of a sequence of "
            f"data.max_length={rows}; set train.num_anchors={rows}"
        )
    check_micro_steps(config, mesh)
    if jax.local_device_count() % mesh.shape["tensor"]:
        raise InputError(
            f"mesh.tensor={mesh.shape['tensor']} spans hosts of {jax.local_device_count()} devices, which would need "
            f"the same batch; use a divisor of {jax.local_device_count()}"
        )


def check_micro_steps(config: Config, mesh: Mesh) -> None:
    """Refuses a batch of which the mesh cannot divide the micro-steps.

    Raises:
      InputError: sequences per micro-step are no multiple of data x fsdp.
    """
    train, ways = config.train, mesh.shape["data"] * mesh.shape["fsdp"]
    if not train.batch_size % (train.accumulate * ways):
        return
    fewer = [parts for parts in range(1, train.accumulate) if train.batch_size % (parts * ways) == 0]
    raise InputError(
        f"train.batch_size={train.batch_size} is not divisible by train.accumulate={train.accumulate} x {ways} ways of "
        f"the mesh (data x fsdp); use a multiple of {train.accumulate * ways}, "
        + (f"train.accumulate={fewer[-1]}" if fewer else "or fewer ways and more of mesh.tensor")
    )


def batch_layout(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of what a program is given at a time, as `place_batch` makes it.

    That is a global batch in all its micro-batches, or one of them where features come from disk.
    """
    micro = config.train.batch_size // config.train.accumulate
    lead = (config.train.accumulate if config.data.features == "online" else 1, micro)
    rows = (*lead, config.data.max_length)
    shapes = {"tokens": (rows, jnp.int32), "loss_mask": (rows, jnp.uint8)}
    shapes |= {"lengths": (lead, jnp.int32), "sample_id": (lead, jnp.int32)}
    if config.data.pack:
        shapes["starts"] = (rows, jnp.int32)
    if config.data.features != "online":
        taps, width, dtype = len(config.drafter.target_layer_ids), config.target.architecture.hidden_size, jnp.bfloat16
        groups = (taps + 1) * width // group_size(width) if config.data.feature_dtype == "int8" else 0
        values = jnp.int8 if groups else dtype
        shapes |= {"feature_values": ((*rows, (taps + 1) * width), values), "feature_scales": ((*rows, groups), dtype)}
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=_batch_sharding(shape, mesh))
        for name, (shape, dtype) in shapes.items()
    }


def place_batch(batch: Mapping[str, np.ndarray], accumulate: int, mesh: Mesh) -> Batch:
    """This process's rows [B_local, ...] -> global arrays [C, B, ...] split over the mesh's batch axes."""

    def place(rows: np.ndarray) -> jax.Array:
        rows = rows.reshape(accumulate, len(rows) // accumulate, *rows.shape[1:])
        shape = (accumulate, rows.shape[1] * jax.process_count(), *rows.shape[2:])
        return jax.make_array_from_process_local_data(_batch_sharding(shape, mesh), rows, shape)

    return {name: place(rows) for name, rows in batch.items()}


def _batch_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    return sharding((None, "batch", *(None,) * (len(shape) - 2)), shape, mesh)
