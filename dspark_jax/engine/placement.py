"""Where decoding lives on a mesh. Training spreads all weights over the devices and collects them layer by layer; a
decoding round would do nothing but collect them.

So decoding has a mesh of its own, over the same devices: whole copies of target and drafter, with the requests split
over them, where a copy fits into a device's memory; else groups of devices that share a copy (tensor parallelism: heads
and the vocabulary's rows are split), as small as fit, with the requests split over the groups. `config.mesh.decode`
says otherwise if need be.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from dspark_jax import platform
from dspark_jax.config import Config, DecodeMeshConfig, InputError, MeshConfig, import_additions
from dspark_jax.drafter import make_drafter
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.drafter.none import NO_DRAFTER
from dspark_jax.engine.models import Models
from dspark_jax.engine.slots import batch_axes, split_cache
from dspark_jax.progress import log
from dspark_jax.sharding import bytes_per_device, evenly, make_mesh, sharding, state_shardings
from dspark_jax.target.loading import abstract_target, compute_dtype
from dspark_jax.target.model import Target

SPARE = 8
"""One part in so many of a device's memory is left to what a round or a prompt computes, besides its logits."""

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Load:
    """What decodes, and of what size; what a device must hold follows.

    Attributes:
      models: with shapes only, or with arrays.
      requests: decoded together.
      rows: of each one's caches, most.
      held: bytes of each device that are in use by something else.
    """

    models: Models
    requests: int
    rows: int
    held: float = 0.0

    def on(self, mesh: Mesh) -> tuple[int, int, int]:
        """Bytes of one device on this mesh: weights, caches, and logits of a round."""
        models, requests = self.models, self.requests
        weights = sum(_weights(model, mesh) for model in (models.target, models.drafter))
        with jax.set_mesh(mesh):
            each = evenly(requests) // mesh.shape["data"] // mesh.shape["fsdp"] or requests
            count = evenly(requests)
        caches = _caches(models, count, self.rows, mesh)
        width = math.ceil(models.arch.vocab_size / mesh.shape["tensor"])
        return weights, caches, 2 * each * models.rows * width * 4  # of the target and of the drafter


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh to decode on, and what each device holds.

    Attributes:
      mesh: of the same axes as that of training.
      weights: bytes.
      caches: bytes.
      memory: bytes that a device has; infinite where nobody says.
    """

    mesh: Mesh
    weights: int
    caches: int
    memory: float

    def most(self, requests: int) -> int:
        """How many requests such as these would fit, all devices together; as many as there are where nobody knows."""
        if not math.isfinite(self.memory) or not self.caches:
            return requests
        copies = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        each = self.caches / math.ceil(requests / copies)
        return max(int((self.memory * (1 - 1 / SPARE) - self.weights) / each), 1) * copies

    def describe(self) -> str:
        """One line."""
        data, fsdp, tensor = (self.mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
        if fsdp > 1:
            how = f"weights spread over {fsdp} devices and collected in every round"
        elif tensor > 1:
            how = f"groups of {tensor} devices share a copy of the weights"
        else:
            how = "every device has a copy of the weights"
        over = f", requests split over {data * fsdp}" if data * fsdp > 1 else ""
        used = f"{self.weights / GIB:.2f} GiB of weights and {self.caches / GIB:.2f} of caches"
        of = f", {self.memory / GIB:.2f} are there" if math.isfinite(self.memory) else ""
        return f"decoding on {self.mesh.size} devices: {how}{over}; each holds {used}{of}"


def evaluation_load(config: Config, *, plain: bool = False) -> Load:
    """What evaluates the drafter of a resolved config: `eval.batch_size` of the longest requests, `plain` without it.

    Raises:
      InputError: the target has no definition here.
    """
    models = Models(_target(config), NO_DRAFTER if plain else _drafter(config))
    rows = config.data.max_prompt_length + config.eval.max_new_tokens + models.rows
    return Load(models, config.eval.batch_size, rows)


def answering_load(config: Config) -> Load:
    """What answers the prompts of a resolved config: the target alone, in the engine of the largest capacity."""
    return Load(Models(_target(config)), config.data.decode_batch_size, config.data.max_length)


def serving_load(config: Config, *, slots: int, capacity: int, plain: bool = False) -> Load:
    """What serves a resolved config: `slots` requests of up to `capacity` tokens, `plain` without its drafter."""
    models = Models(_target(config), NO_DRAFTER if plain else _drafter(config))
    return Load(models, slots, capacity + models.rows)


def _target(config: Config) -> Target:
    return abstract_target(config.target.architecture, compute_dtype(config.target.dtype))


def _drafter(config: Config) -> DrafterModule:
    import_additions(config)
    arch, dtype = config.target.architecture, compute_dtype(config.drafter.dtype)
    return nnx.eval_shape(lambda: make_drafter(arch, config.drafter, rngs=nnx.Rngs(0), dtype=dtype))


def place(
    wanted: DecodeMeshConfig, load: Load, devices: Sequence[Any] | None = None, memory: float | None = None
) -> Placement:
    """Chooses the mesh that a load decodes on.

    Args:
      wanted: what the config says; `tensor` 0 chooses the smallest group that fits.
      load: what decodes.
      devices: all of them if None.
      memory: bytes of each; asked for if None.

    Raises:
      InputError: the sizes do not go with the number of devices, or weights and caches alone do not fit.
    """
    devices = jax.devices() if devices is None else list(devices)
    memory = platform.device_memory() if memory is None else memory
    groups = [wanted.tensor] if wanted.tensor else _divisors(len(devices), wanted)
    found = []
    for tensor in groups:
        mesh = make_mesh(MeshConfig(wanted.data, wanted.fsdp, tensor), devices, "mesh.decode")
        weights, caches, logits = load.on(mesh)
        found.append(Placement(mesh, weights, caches, memory))
        if load.held + weights + caches + logits + memory / SPARE <= memory:
            return found[-1]
    least = min(found, key=lambda one: one.weights + one.caches)
    if load.held + least.weights + least.caches <= memory:
        return least  # with little to spare; the compiler has the last word
    raise InputError(_refusal(wanted, load, least))


def decoding_mesh(wanted: DecodeMeshConfig, load: Load, devices: Sequence[Any] | None = None) -> Mesh:
    """`place`; says in one line what was chosen, where there is more than one device."""
    found = place(wanted, load, devices)
    if found.mesh.size > 1 and jax.process_index() == 0:
        log(found.describe())
    return found.mesh


def beside_training(wanted: DecodeMeshConfig, load: Load, mesh: Mesh) -> Mesh:
    """Where a run decodes that trains on `mesh` and needs `load.held` bytes of every device for itself.

    Where there is no room for other copies of the weights, they stay as they train.

    Raises:
      InputError: what the config asks for does not go with the devices, or does not fit.
    """
    if mesh.size == 1:
        return mesh
    try:
        found = place(wanted, load, list(mesh.devices.flat))
    except InputError:
        if wanted != DecodeMeshConfig():
            raise
        log("decoding beside training: there is no room for other copies of the weights; they stay as they train")
        return mesh
    log(found.describe())
    return found.mesh


def _divisors(devices: int, wanted: DecodeMeshConfig) -> list[int]:
    """Sizes of a group, smallest first, that leave a whole number of groups of the sizes that are stated."""
    if -1 not in (wanted.data, wanted.fsdp):  # there is one
        return [max(devices // (wanted.data * wanted.fsdp), 1)]
    stated = wanted.data if wanted.fsdp == -1 else wanted.fsdp
    if wanted.fsdp != 1 or devices % stated:
        return [1]
    return [size for size in range(1, devices + 1) if devices % size == 0]


def _refusal(wanted: DecodeMeshConfig, load: Load, least: Placement) -> str:
    shape = least.mesh.shape
    sizes = f"data={shape['data']} fsdp={shape['fsdp']} tensor={shape['tensor']}"
    needs = f"{least.weights / GIB:.2f} GiB of weights and {least.caches / GIB:.2f} of caches"
    held = f", {load.held / GIB:.2f} are taken" if load.held else ""
    fewer = "decode fewer or shorter requests at a time, or use more or larger devices"
    remedy = f"leave mesh.decode.tensor={wanted.tensor} out, or {fewer}" if wanted.tensor else fewer
    return f"mesh.decode {sizes}: a device would hold {needs}, of {least.memory / GIB:.2f} GiB{held}; {remedy}"


def _weights(model: Any, mesh: Mesh) -> int:
    """Bytes of a model's parameters on one device, in its compute type."""
    dtype = model.dtype

    def one(leaf: Any, at: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=at)

    return bytes_per_device(jax.tree.map(one, model, state_shardings(model, mesh)))


def _caches(models: Models, count: int, rows: int, mesh: Mesh) -> int:
    """Bytes of the caches of `count` requests on one device."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: (models.target_cache(count, rows), models.draft_cache(count, rows)))

        def lay(leaf: Any, *axes: str | None) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(axes, leaf.shape, mesh))

        axes = batch_axes(models.target_cache, shapes[0]), batch_axes(models.draft_cache, shapes[1])
        return bytes_per_device([split_cache(*both, lay) for both in zip(shapes, axes, strict=True)])
