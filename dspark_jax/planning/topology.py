"""TPU slices that a program can be compiled for without having one, and what their chips can do."""

import dataclasses
import os
import re
from typing import Any

import jax

from dspark_jax.config import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a slice, as it is specified (Cloud TPU documentation); per core where a core is a device.

    Attributes:
      name: as in the topology's name.
      flops: bfloat16 operations per second.
      hbm_bytes: memory that the compiler lets a program use, as its own error message states it.
      hbm_bandwidth: bytes per second.
      ici_bandwidth: bytes per second that a chip can send to its neighbours over all links.
      clock: cycles per second, the compiler's unit: flops / (2 x multipliers of the matrix units).
      per_chip: devices per chip.
      shapes: slices that are offered, smallest first (others of the kind compile too).
    """

    name: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    clock: float
    per_chip: int
    shapes: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 15.75 * GIB, 819e9, 200e9, 1.50e9, 1, _FLAT),
        Chip("v5p", 459e12, 95.73 * GIB, 2765e9, 600e9, 1.75e9, 1, _CUBES),
        Chip("v6e", 918e12, 31.24 * GIB, 1638e9, 400e9, 1.75e9, 1, _FLAT),
        Chip("tpu7x", 1153e12, 94.74 * GIB, 3690e9, 300e9, 2.20e9, 2, _CUBES),
    )
}


def listing() -> str:
    """The text of `--topology list`."""
    lines = ["topologies that can be asked for (devices; per device: memory, bfloat16 TFLOP/s, HBM GB/s)"]
    for chip in CHIPS.values():
        about = f"{chip.hbm_bytes / GIB:.2f} GiB, {chip.flops / 1e12:.0f}, {chip.hbm_bandwidth / 1e9:.0f}"
        lines.append(f"{chip.name} ({about}{', two devices per chip' if chip.per_chip == 2 else ''}):")
        lines.append("  " + "  ".join(f"{chip.name}:{shape}" for shape in chip.shapes))
    return "\n".join(lines)


def devices_of(topology: str) -> tuple[Chip, list[Any]]:
    """The chip and the compile-only devices of a slice such as v5e:4x4.

    Raises:
      InputError: the name is unknown, the shape does not exist, or libtpu is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise InputError(f"--topology {topology!r} is unknown; use e.g. v5e:4x4, or --topology list for all")
    # Otherwise libtpu asks a cloud machine's metadata server what it is, warns of what it is not told (any answer will
    # do), and locks out a second process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ImportError, FileNotFoundError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, jax.errors.JaxRuntimeError) and "INVALID_ARGUMENT" in reason:
            raise InputError(f"--topology {topology!r}: {reason}; --topology list names slices that exist") from None
        raise InputError(f"no TPU compiler is installed ({reason}); pip install 'dspark-jax[tpu]'") from None
    return CHIPS[kind], list(devices)
