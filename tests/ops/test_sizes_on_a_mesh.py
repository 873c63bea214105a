"""What a TPU kernel leaves to others for its size is what one device has to do, however many there are."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dspark_jax.config import MeshConfig
from dspark_jax.ops.attention import attention
from dspark_jax.ops.attention import pallas_tpu as attention_kernel
from dspark_jax.ops.block_attention import block_attention
from dspark_jax.ops.block_attention import pallas_tpu as block_kernel
from dspark_jax.ops.cached_attention import Rows, cached_attention
from dspark_jax.ops.cached_attention import pallas_tpu as cached_kernel
from dspark_jax.ops.dispatch import Unsupported
from dspark_jax.sharding import make_mesh, share

KERNEL: dict[str, Any] = {"scale": 0.1, "implementation": "pallas_tpu"}


def zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.bfloat16)


def over_a_sequence() -> jax.Array:
    return attention(zeros(8, 32, 4, 16), zeros(8, 32, 2, 16), zeros(8, 32, 2, 16), **KERNEL)


def over_blocks() -> jax.Array:
    context, own = zeros(8, 32, 2, 16), zeros(8, 4, 7, 2, 16)
    anchors, keep = jnp.zeros((8, 4), jnp.int32), jnp.ones((8, 4), bool)
    return block_attention(zeros(8, 4, 7, 4, 16), context, context, own, own, anchors, keep, **KERNEL)


def over_caches() -> jax.Array:
    cache = zeros(8, 2, 128, 16)
    return cached_attention(zeros(32, 4, 16), cache, cache, Rows.whole(jnp.zeros(8, jnp.int32), 4), **KERNEL)


CASES = {
    "attention": (over_a_sequence, attention_kernel, "TABLE"),
    "block_attention": (over_blocks, block_kernel, "TABLE"),
    "cached_attention": (over_caches, cached_kernel, "_WORK"),
}


@pytest.mark.parametrize("name", CASES)
def test_tables_are_of_one_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the one tile of two requests: eight are too many for a device, and not for four."""
    call, module, limit = CASES[name]
    monkeypatch.setattr(module, limit, 2)
    with pytest.raises(Unsupported, match="too many tiles"):
        jax.eval_shape(call)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        jax.eval_shape(call)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))), pytest.raises(Unsupported, match="tiles"):
        jax.eval_shape(call)


def test_a_share_is_whole_where_the_mesh_does_not_divide_it() -> None:
    assert share("batch", 8) == 8
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        assert (share("batch", 8), share("batch", 6)) == (2, 6)
