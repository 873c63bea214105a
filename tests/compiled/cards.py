"""NVIDIA cards that programs can be compiled for on a machine without a GPU: `devices()`.

It takes the CUDA plugin of this JAX and a `ptxas` on the path (`pip install --no-deps jax-cuda13-plugin
jax-cuda13-pjrt`, and NVIDIA's toolkit). The numbers are those that an H100 states of itself; of the others what limits
kernels, their capability and shared memory, is NVIDIA's, and the rest an H100's.
"""

import functools
import importlib.util
import shutil
from typing import Any

import pytest

from dspark_jax import platform

CARDS = {"h100": ((9, 0), 227), "a100": ((8, 0), 163), "ada": ((8, 9), 99)}
"""Compute capability, and KiB of shared memory that a block may have; "ada" is an RTX 4090 or an L40S."""

_LIMITS = {
    "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
    "shared_memory_per_block": 49152,
    "core_count": 132, "fpus_per_core": 128, "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
    "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64,
    "memory_bandwidth": 3352320000000, "l2_cache_size": 52428800, "clock_rate_ghz": 1.98,
    "device_memory_size": 84942979072, "device_address_bits": 64,
}  # fmt: skip


def target_config(card: str) -> str:
    """XLA's description of a card, in protocol buffer text."""
    (major, minor), shared = CARDS[card]
    memory = {"shared_memory_per_core": (shared + 1) << 10, "shared_memory_per_block_optin": shared << 10}
    limits = " ".join(f"{name}: {value}" for name, value in (_LIMITS | memory).items())
    own = "feature_extension: ACCELERATED_FEATURES" if card == "h100" else f"minor: {minor}"
    capability = f"cuda_compute_capability {{ major: {major} {own} }}"
    names = 'device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3" runtime_version: "12.8.0" '
    names += 'compile_time_toolkit_version: "12.8.0" driver_version: "13.0.0" dnn_version: "9.10.0"'
    return (
        f"gpu_device_info {{ {limits} {capability} {names} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"'
    )


@functools.cache
def devices(card: str = "h100") -> list[Any]:
    """Compile-only devices; skips the test that asks where they cannot be had."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the CUDA plugin is not installed (pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt)")
    if shutil.which("ptxas") is None:
        pytest.skip("ptxas of NVIDIA's CUDA toolkit is not on the path")
    from jax.experimental import topologies

    return list(
        topologies.get_topology_desc(
            platform="cuda", topology_name=card, topology="1x1x8", target_config=target_config(card)
        ).devices
    )


def has_shared_memory_of(card: str, patch: pytest.MonkeyPatch) -> None:
    """Kernels choose their sizes as on that card."""
    patch.setattr(platform, "gpu_shared_memory", lambda: CARDS[card][1] << 10)
