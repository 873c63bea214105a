"""What a training run carries from step to step, and how it comes to lie on a mesh.

Inside the step the drafter is an NNX module. At the jit boundary it is a flat dict of arrays, dotted path -> array,
which costs little per call and reads well in a checkpoint; the module's structure travels separately, as a module whose
parameters are shapes (`abstract_drafter`).
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dspark_jax import platform
from dspark_jax.config import Config, import_additions
from dspark_jax.drafter import make_drafter
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.sharding import replicated, state_shardings
from dspark_jax.target.loading import compute_dtype

Params = dict[str, Any]
"""Arrays of a module by dotted path, e.g. `backbone.layers.attention.query`; or their shapes, or shardings."""

Module = TypeVar("Module", bound=nnx.Module)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State of a training run.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: the drafter's parameters, float32.
      optimizer: the optimizer's state; what has a parameter's shape is sharded like it.
    """

    step: jax.Array
    params: Params
    optimizer: optax.OptState


def to_params(module: nnx.Module) -> Params:
    """Arrays (or shapes, or shardings) of a module's parameters by dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(module)
    return {jax.tree_util.keystr(path[:-1], simple=True, separator="."): leaf for path, leaf in leaves}


def to_module(abstract: Module, params: Params) -> Module:
    """The module of the structure `abstract` with these parameters; exactly its paths must be there."""
    names = list(to_params(abstract))
    assert set(names) == set(params), sorted(set(names) ^ set(params))
    return jax.tree.unflatten(jax.tree.structure(abstract), [params[name] for name in names])


def build_drafter(config: Config, key: jax.Array) -> DrafterModule:
    """The config's drafter with random parameters drawn from `key`."""
    import_additions(config)  # that of a checkpoint has not been resolved here
    dtype = compute_dtype(config.drafter.dtype)
    return make_drafter(config.target.architecture, config.drafter, rngs=nnx.Rngs(key), dtype=dtype)


def abstract_drafter(config: Config) -> DrafterModule:
    """The config's drafter with shapes for parameters."""
    return jax.eval_shape(lambda: build_drafter(config, jax.random.key(0)))


def param_shardings(module: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """Sharding of every parameter of an (abstract) module, by dotted path."""
    return to_params(state_shardings(module, mesh))


def state_layout(drafter: DrafterModule, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A `TrainState` of `ShapeDtypeStruct`s with shardings: what is initialised, restored and compiled against.

    Args:
      drafter: an abstract drafter.
      optimizer: its state's leaves that are keyed by a parameter's path and have its shape are sharded like it.
      mesh: any mesh.
    """
    shardings, shapes = param_shardings(drafter, mesh), to_params(drafter)

    def lay(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = getattr(path[-1], "key", "") if path else ""
        like = name in shapes and shapes[name].shape == leaf.shape
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name] if like else replicated(mesh))

    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    abstract = TrainState(step, shapes, jax.eval_shape(optimizer.init, shapes))
    return jax.tree_util.tree_map_with_path(lay, abstract)


def init_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh state, created in its shards; the same numbers on every mesh. Drawn from `config.train.seed`."""
    layout = state_layout(abstract_drafter(config), optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)

    def init(key: jax.Array) -> TrainState:
        params = to_params(build_drafter(config, key))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    # It runs once: on CPU, optimising the random number generator would take longer than running it.
    return jax.jit(init, out_shardings=shardings, compiler_options=platform.unoptimised())(
        jax.random.key(config.train.seed)
    )
