"""Programs that `tests.compiled.tpus` compiles for a TPU, each in a process of its own; the last line is their JSON."""

import functools
import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dspark_jax.ops.block_attention import block_attention
from dspark_jax.planning.topology import devices_of
from dspark_jax.sharding import MESH_AXES, spec

HEADS, KEY_HEADS, WIDTH = 32, 8, 128  # Qwen3-4B

Shapes = dict[str, tuple[tuple[int, ...], Any, tuple[str | None, ...]]]
"""Name -> sizes, type and logical axes of an argument."""


def figures(run: Any, shapes: Shapes, mesh: Mesh) -> dict[str, Any]:
    """Compiles `run` and says what is known of it."""

    def placed(sizes: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> Any:
        cut = spec(axes, sizes, mesh) if mesh.size > 1 else PartitionSpec()
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, cut))

    with jax.set_mesh(mesh):
        program = jax.jit(run).lower(*(placed(*shape) for shape in shapes.values())).compile()
    text = program.as_text()
    return {
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": len(re.findall(r" (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", text)),
    }


def train_attention(
    mesh: Mesh, batch: int = 1, heads: int = HEADS, width: int = WIDTH, size: int = 7, dtype: Any = jnp.bfloat16
) -> dict[str, Any]:
    """Forward and backward of `block_attention`: 4096 rows, 512 blocks of `size`."""

    def both(*arrays: Any) -> Any:
        out, pull = jax.vjp(lambda *x: block_attention(*x, *arrays[5:], scale=width**-0.5), *arrays[:5])
        return out, pull(out)

    context = (batch, 4096, KEY_HEADS, width), dtype, ("batch", None, "kv_heads", None)
    own = (batch, 512, size, KEY_HEADS, width), dtype, ("batch", None, None, "kv_heads", None)
    query = (batch, 512, size, heads, width), dtype, ("batch", None, None, "heads", None)
    blocks = (batch, 512), jnp.int32, ("batch", None)
    shapes = {"query": query, "key": context, "value": context, "block_key": own, "block_value": own}
    return figures(both, shapes | {"anchors": blocks, "keep": (blocks[0], jnp.bool_, blocks[2])}, mesh)


JOBS: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "block_attention": (train_attention, (1, 1, 1)),
    "block_attention on a mesh": (functools.partial(train_attention, batch=2), (1, 2, 2)),
    "block_attention, 5 query heads per key head": (functools.partial(train_attention, heads=40, size=16), (1, 1, 1)),
    "block_attention, wide": (functools.partial(train_attention, width=256, dtype=jnp.float32), (1, 1, 1)),
}
"""Name -> job and sizes of its mesh (data, fsdp, tensor)."""


def main(name: str, topology: str) -> None:
    job, sizes = JOBS[name]
    devices = np.asarray(devices_of(topology)[1][: int(np.prod(sizes))]).reshape(sizes)
    print(json.dumps(job(Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3))))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(*sys.argv[1:])
