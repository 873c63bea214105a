"""The form of a model's weights that decoding wants, made once: where decoding lives, in the type that products read,
and, but on a TPU, layers one by one and matrices fused.

A model in this form is a model like any other: what runs it looks at the weights and at nothing else.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh

from dspark_jax import platform
from dspark_jax.ops.product import product
from dspark_jax.sharding import Param, constrain, mesh_of, parts_of, state_shardings
from dspark_jax.target.layers import layer_at


def decode_weights(
    module: Any, dtype: Any, *, separate_caches: bool = False, consume: bool = False, drafts: Any = None
) -> Any:
    """A target or drafter whose weights have the form that decoding wants; a model that has it is returned as it is.

    - Stacks of layers become lists (`platform.unstacks_layers` says why).
    - With `separate_caches`, so do the caches that `init_cache` makes. That is for batches on a CPU (measured at batch
      32: a plain step 21 -> 16 ms, a round with drafts 74 -> 49 ms; at batch 1 separate arrays get copied, 0.25 ms) and
      for GPUs (batch 32 on an H100: 9.1 -> 5.9 ms, and nothing at batch 1).
    - Modules with a method `fuse_weights(dtype, join=...)` hold matrices as `dtype`, and join those that read the same
      rows: fewer and larger products from fewer bytes. Where a mesh splits their columns, nothing is joined: each
      device would have those of one matrix and need some of each.
    - On a TPU the stacks stay, nothing is joined, and matrices of heads are held the other way round
      (`platform.joins_heads`).

    Args:
      module: target or drafter, with stacked layers.
      dtype: of the matrices.
      separate_caches: one array of keys and one of values per layer.
      consume: delete the stacks as they are unstacked, so that there are never two copies of all weights. The given
        module cannot be used any more.
      drafts: type of the rows of a drafter that reads this target's LM head, or None. Where products read an
        LM head by columns, it is held as that type as well.
    """
    if not isinstance(module, nnx.Module) or has_decode_weights(module):
        return module
    unstack = platform.unstacks_layers()
    join = unstack and parts_of("heads") == 1
    copy: Any = unstacked(module, consume=consume) if unstack else jax.tree.map(lambda leaf: leaf, module)
    copy.separate_caches = False  # its mark, where nothing is unstacked as well
    for _, part in nnx.iter_modules(copy):
        if any(isinstance(value, nnx.List) for value in vars(part).values()):
            holder: Any = part
            holder.separate_caches = separate_caches
    for _, part in nnx.iter_modules(copy):
        fuse = getattr(part, "fuse_weights", None)
        if fuse is not None:
            fuse(dtype, join=join)
    if drafts is not None and drafts != dtype and hasattr(copy, "hold_head"):
        copy.hold_head(drafts)
    return copy


def moved(module: Any, mesh: Mesh) -> Any:
    """A target or drafter on another mesh of the same devices (itself if it is there): a second copy of its weights."""
    if not isinstance(module, nnx.Module) or mesh_of(module) == mesh:
        return module
    return jax.jit(lambda values: values, out_shardings=state_shardings(module, mesh))(module)


def has_decode_weights(module: Any) -> bool:
    """Whether `decode_weights` made this module."""
    return isinstance(module, nnx.Module) and "separate_caches" in vars(module)


def training_weights(target: Any) -> Any:
    """The form of a frozen target's weights that training wants, on the mesh that is set; the given one is used up.

    On a GPU that is layers one by one: of a stack every layer's matrices are copied before a product can read them, in
    every step. Where fsdp splits them they are collected into new arrays anyway, and a loop needs less room for these.
    """
    return unstacked(target, consume=True) if platform.current() == "gpu" and parts_of("embed") == 1 else target


def unstacked(module: Any, *, consume: bool = False) -> Any:
    """A module whose stacks of layers are lists of them; `consume` as in `decode_weights`."""
    copy: Any = jax.tree.map(lambda leaf: leaf, module)
    for _, part in nnx.iter_modules(copy):
        for name, layers in list(vars(part).items()):
            if isinstance(getattr(layers, "attention_norm", None), Param) and layers.attention_norm[...].ndim == 2:
                setattr(part, name, nnx.List(_unstacked(layers, consume=consume)))
    return copy


def _unstacked(layers: Any, *, consume: bool) -> list[Any]:
    """The layers of a stack."""
    depth = layers.attention_norm[...].shape[0]
    leaves, structure = jax.tree.flatten(layers, is_leaf=lambda leaf: isinstance(leaf, Param))
    traced = any(isinstance(leaf.get_value(), Tracer) for leaf in leaves if isinstance(leaf, Param))
    if traced:
        return [layer_at(layers, index) for index in range(depth)]
    rows = []
    for leaf in leaves:
        # One program for all layers: with Python's own numbers there would be one for each.
        rows.append([layer_at(leaf, jnp.int32(index)) for index in range(depth)])
        if consume and isinstance(leaf, Param):
            jax.block_until_ready(rows[-1])
            leaf.get_value().delete()
    return [jax.tree.unflatten(structure, [row[index] for row in rows]) for index in range(depth)]


def head_logits(hidden: jax.Array, head: Callable[[], jax.Array], *columns: Param | None) -> jax.Array:
    """hidden [..., D] -> float32 logits [..., V], by an LM head [V, D] or, where there are any, its `head_columns`.

    Of several columns those are read that have the type of `hidden`, or else the first ones.
    """
    held = [each[...] for each in columns if each is not None]
    if not held:
        weight = head().astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
    chosen = next((each for each in held if each.dtype == hidden.dtype), held[0])
    logits = product(hidden.reshape(-1, hidden.shape[-1]), chosen, jnp.float32)
    return logits.reshape(*hidden.shape[:-1], -1)


def head_columns(head: jax.Array, dtype: Any) -> Param | None:
    """The LM head [V, D] the other way round, [D, V], where products want it so: a CPU does, others read either."""
    if platform.current() != "cpu":
        return None
    return Param(constrain(head.T.astype(dtype), None, "vocab"), axes=(None, "vocab"))
