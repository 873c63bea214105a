"""Device mesh and the one table from logical axis names to mesh axes.

Models name the axes of their parameters and activations logically (`embed`, `heads`, `batch`, ...); only this module
knows which mesh axis each of them is split over. Axes are Auto: the compiler propagates, `constrain` pins.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dspark_jax.config import InputError, MeshConfig

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "features": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_width": (),
    "taps": (),
    "mlp": ("tensor",),
    "experts": ("tensor", "fsdp"),  # whole ones, where there are enough: they are collected as they lie in memory
    "collected_experts": ("tensor",),
    "expert_width": (),
    "routes": (),
    "tokens": (),
    "index_heads": (),
    "streams": (),
    "streams_out": (),
    "vocab": ("tensor",),
    "rank": (),
    "rank_rows": (),
    "norm": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None, field: str = "mesh") -> Mesh:
    """Builds the mesh (data, fsdp, tensor) over all devices; `field` is the config's, for the message.

    Raises:
      InputError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"{field} data={sizes[0]} fsdp={sizes[1]} tensor={sizes[2]} needs {math.prod(sizes)} devices, "
            f"{len(devices)} are here; set one mesh axis to -1"
        )
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def one_device() -> Mesh:
    """A mesh of one device of this host."""
    return make_mesh(MeshConfig(), jax.local_devices()[:1])


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """PartitionSpec of an array with logical `axes`; an axis that the mesh does not divide stays whole.

    Experts that are too few for all their mesh axes are split over the first one, and their `embed` over `fsdp` then.

    Raises:
      KeyError: an axis name is not in `RULES`.
    """
    entries: list[Any] = []
    used: set[str] = set()

    def divides(wanted: Sequence[str], size: int) -> bool:
        return size % math.prod(mesh.shape[axis] for axis in wanted) == 0

    for name, size in zip(axes, shape, strict=True):
        wanted = tuple(axis for axis in (RULES[name] if name else ()) if mesh.shape[axis] > 1)
        if name == "experts" and not divides(wanted, size):
            wanted = tuple(axis for axis in wanted if axis == "tensor")
        if name == "embed" and "experts" in axes and set(wanted) <= used:
            wanted = ()
        if set(wanted) & used:
            raise ValueError(f"axes {tuple(axes)} use a mesh axis twice")
        if not wanted or not divides(wanted, size):
            entries.append(None)
            continue
        used.update(wanted)
        entries.append(wanted[0] if len(wanted) == 1 else wanted)
    return PartitionSpec(*entries)


def sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """NamedSharding of an array with logical `axes`."""
    return NamedSharding(mesh, spec(axes, shape, mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an intermediate to its logical axes under the mesh set by `jax.set_mesh`; without one, does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def whole(tree: Any) -> Any:
    """Pins all arrays of a tree to be whole on every device: a host can only fetch what its own devices hold."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def gather(x: jax.Array, *axes: str | None) -> jax.Array:
    """Collects what `fsdp` splits of a weight where it is used (FSDP); the other mesh axes go on splitting it."""
    return constrain(x, *(_COLLECTED.get(name, name) if name else None for name in axes))


_COLLECTED: dict[str, str | None] = {"embed": None, "experts": "collected_experts"}


def devices_here() -> int:
    """Devices of the mesh that is set; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def parts_of(name: str) -> int:
    """In how many parts the mesh that is set splits a logical axis; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES[name])


def share(name: str, size: int) -> int:
    """What a device has of a logical axis of this size; all of it where the mesh that is set does not divide it."""
    parts = parts_of(name)
    return size // parts if size % parts == 0 else size


def per_device(
    run: Callable[..., Any],
    inputs: Sequence[Sequence[str | None]],
    outputs: Sequence[Sequence[str | None]],
    shapes: Sequence[Sequence[int]] | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """`run` on every device's own part of the arrays, for kernels, which the compiler cannot split.

    What `run` computes must need nothing of another device. Gradients do not pass through it.

    Args:
      run: arrays -> a tuple of arrays.
      inputs: logical axes of each array.
      outputs: logical axes of each result.
      shapes: of the results, where they are not those that `run` would give of whole arrays.
    """
    if devices_here() == 1:
        return run
    mesh = jax.sharding.get_abstract_mesh()

    def split(*arrays: jax.Array) -> tuple[Any, ...]:
        sizes = [x.shape for x in jax.eval_shape(run, *arrays)] if shapes is None else shapes
        in_specs = tuple(spec(axes, x.shape, mesh) for axes, x in zip(inputs, arrays, strict=True))
        out_specs = tuple(spec(axes, size, mesh) for axes, size in zip(outputs, sizes, strict=True))
        return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)

    return split


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays, or of shapes, with shardings."""

    def size(leaf: Any) -> int:
        item = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * item

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of several devices on which the arrays of a tree lie; None if there is none."""
    if jax.device_count() == 1:  # to go through a model takes a fifth of a millisecond
        return None
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
            found = getattr(leaf.sharding, "mesh", None)
            if isinstance(found, Mesh) and found.size > 1:
                return found
    return None


def on_mesh_of(tree: Any) -> Any:
    """A context in which the mesh is the one on which a tree lies; without one nothing changes."""
    mesh = mesh_of(tree)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def evenly(requests: int) -> int:
    """So many requests, or a few more, as the mesh that is set splits evenly. One alone is not split."""
    parts = parts_of("batch")
    return requests if requests == 1 else -(-requests // parts) * parts


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


class Param(nnx.Param):
    """A parameter that knows the logical names of its axes (`axes`), from which its sharding is derived."""

    def __init__(self, value: Any, axes: tuple[str | None, ...] = (), **metadata: Any):
        super().__init__(value, axes=axes, **metadata)


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """Same tree with a NamedSharding for every parameter (abstract or concrete); other leaves are replicated."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            value = leaf.get_value()
            axes = getattr(leaf, "axes", ()) or (None,) * len(value.shape)
            return leaf.replace(sharding(axes, value.shape, mesh))
        return replicated(mesh)

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
