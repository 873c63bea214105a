"""An H100 that programs can be compiled for on a machine without a GPU: `devices()`.

It takes the CUDA plugin of this JAX and a `ptxas` on the path (`pip install --no-deps jax-cuda13-plugin
jax-cuda13-pjrt`, and NVIDIA's toolkit). The numbers are those that the card states of itself.
"""

import functools
import importlib.util
import shutil
from typing import Any

import pytest

_LIMITS = {
    "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
    "shared_memory_per_block": 49152, "shared_memory_per_core": 233472, "shared_memory_per_block_optin": 232448,
    "core_count": 132, "fpus_per_core": 128, "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
    "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64,
    "memory_bandwidth": 3352320000000, "l2_cache_size": 52428800, "clock_rate_ghz": 1.98,
    "device_memory_size": 84942979072, "device_address_bits": 64,
}  # fmt: skip


def target_config() -> str:
    """XLA's description of the card, in protocol buffer text."""
    limits = " ".join(f"{name}: {value}" for name, value in _LIMITS.items())
    capability = "cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }"
    names = 'device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3" runtime_version: "12.8.0" '
    names += 'compile_time_toolkit_version: "12.8.0" driver_version: "13.0.0" dnn_version: "9.10.0"'
    return (
        f"gpu_device_info {{ {limits} {capability} {names} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"'
    )


@functools.cache
def devices() -> list[Any]:
    """Compile-only devices; skips the test that asks where they cannot be had."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the CUDA plugin is not installed (pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt)")
    if shutil.which("ptxas") is None:
        pytest.skip("ptxas of NVIDIA's CUDA toolkit is not on the path")
    from jax.experimental import topologies

    return list(
        topologies.get_topology_desc(
            platform="cuda", topology_name="h100", topology="1x1x8", target_config=target_config()
        ).devices
    )
