"""What programs run on: the only module that asks for a backend or a processor."""

import contextlib
import functools
import math
import os
from pathlib import Path

import jax
from jax.sharding import Mesh

_NAMES = {"cuda": "gpu", "rocm": "gpu"}


def current() -> str:
    """cpu, gpu or tpu: that of the mesh that is set, which may be one that is only compiled for, or of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return _NAMES.get(name, name)


def computes_on_cpu() -> bool:
    """Whether this process has no accelerator."""
    return jax.default_backend() == "cpu"


@functools.cache
def has_matrix_units() -> bool:
    """Whether this process computes on a CPU with bfloat16 matrix units (asked of Linux; elsewhere False)."""
    information = Path("/proc/cpuinfo")
    return computes_on_cpu() and information.exists() and "amx_bf16" in information.read_text()


def compute_dtype() -> str:
    """The type that `auto` means here."""
    return "float32" if computes_on_cpu() else "bfloat16"


def unstacks_layers() -> bool:
    """Whether decoding wants its layers one by one.

    A CPU slices a stack again in every turn of a loop (five sixths of a decoding step at batch 1), a GPU's products
    cannot read a slice of one and copy it first (half of a decoding step of Qwen3-4B on an H100). A TPU reads slices
    in place, and a loop compiles faster.
    """
    return current() != "tpu"


def joins_heads() -> bool:
    """Whether products want the matrices of heads in two axes, with what is summed over first.

    A TPU wants the heads' axes apart and what is summed over last: of others it copies every layer's matrix, in every
    round, before it multiplies.
    """
    return current() != "tpu"


def swaps_by_product() -> bool:
    """Whether the halves of a head change places by a product with ones and zeros, where that is exact.

    A TPU's registers are as wide as a head: to cut them in two takes as long as to read and write everything once more,
    and its matrix unit does it on the way (the queries of Qwen3-4B, 4096 rows, from their product to their attention:
    0.95 -> 0.67 ms on a v5e, 0.34 -> 0.21 on a v6e, 0.43 -> 0.36 on a v5p, in the compiler's cycles).
    """
    return current() == "tpu"


def cache_rows(rows: int) -> int:
    """`rows` of a cache, or a few more on a TPU: one that ends inside a tile is laid out in another order there than
    kernels read it in, and would be copied for each of them."""
    return -(-rows // _TILE_ROWS) * _TILE_ROWS if current() == "tpu" else rows


_TILE_ROWS = 16
"""Of bfloat16, two to a register's row; float32 has 8."""


def gpu_shared_memory() -> int:
    """Bytes of shared memory that a block of this process's GPU may have; an H100's where there is none to ask."""
    if jax.default_backend() != "gpu":
        return _SHARED["9.0"]
    return _SHARED.get(str(getattr(jax.local_devices()[0], "compute_capability", "")), _LEAST_SHARED)


_SHARED = {"8.0": 163 << 10, "9.0": 227 << 10, "10.0": 227 << 10, "10.3": 227 << 10}
_LEAST_SHARED = 99 << 10
"""By compute capability, after NVIDIA's table of technical specifications; all later ones than 8.0 have the least."""


def host_memory() -> int:
    """Bytes that this machine has, or that the container leaves of them to its processes."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _GROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it says "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


_GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a control group (a container) may have, by the version of control groups."""


def device_memory() -> float:
    """Bytes that a device of this process may use: of a CPU its share of the host's; infinite where nobody says."""
    if computes_on_cpu():
        return host_memory() / jax.local_device_count()
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", math.inf)


def tpu_kernel_memory() -> int:
    """Bytes on the chip that a kernel may take on the TPU of the mesh that is set, or of this process: seven eighths of
    what there is; the rest is left to the compiler."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.local_devices()[0].device_kind if device is None else device.device_kind
    return _ON_CHIP.get(kind, _LEAST_ON_CHIP) // 8 * 7


_ON_CHIP = {"TPU v5 lite": 128 << 20, "TPU v6 lite": 128 << 20, "cpu": 128 << 20}
_LEAST_ON_CHIP = 64 << 20
"""By kind, of a core; a CPU interprets kernels and has all the memory they want."""


def unoptimised() -> dict[str, int] | None:
    """Compiler options for a program that runs once."""
    return {"xla_backend_optimization_level": 0} if computes_on_cpu() else None


def train_step_options(mesh: Mesh) -> dict[str, bool] | None:
    """XLA options. The newer code generator takes 300 MB more to compile a train step on CPU and makes it no faster.

    JAX 0.11 has no other one, and does not know the option.
    """
    older = jax.__version_info__ < (0, 11)
    return {"xla_cpu_use_fusion_emitters": False} if older and mesh.devices.flat[0].platform == "cpu" else None
