"""What a compiled program needs and how long it should take: memory by purpose, operations, traffic, time."""

import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from dspark_jax.planning.flops import matmul_flops
from dspark_jax.planning.hlo import Cost, program_cost, total_cost
from dspark_jax.planning.programs import Program
from dspark_jax.planning.topology import GIB, Chip
from dspark_jax.sharding import bytes_per_device

OPTIONS: Any = {"xla_tpu_enable_latency_hiding_scheduler": "false"}
"""Compiles in less than half the time; the peak of memory moves by less than 3 %."""

_OUT_OF_MEMORY = re.compile(r"\(?(?:Used )?([\d.]+)([KMG])\)? (?:exceeds available HBM|of [\d.]+[KMG] hbm)")


def compile_and_estimate(program: Program, chip: Chip, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Compiles a program for a mesh of compile-only devices.

    Returns:
      What `plan.json` holds of it. Where it does not fit, `fits` is False and there are no times.
    """
    started = time.monotonic()
    flops = program.calls * matmul_flops(program.traced.jaxpr)
    flops += matmul_flops(program.last.jaxpr) if program.last else 0.0
    beside = bytes_per_device(program.beside)
    parts = {f"{name}_bytes": bytes_per_device(tree) for name, tree in program.parts.items()}
    found: dict[str, Any] = {"devices": mesh.size, "flops": flops, "flops_per_chip": flops / mesh.size}
    try:
        with jax.set_mesh(mesh):
            compiled = program.traced.lower().compile(compiler_options=OPTIONS)
            last = program.last and program.last.lower().compile(compiler_options=OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        match = _OUT_OF_MEMORY.search(str(error))
        if match is None or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = float(match[1]) * {"K": 2**10, "M": 2**20, "G": GIB}[match[2]] + beside
        memory = {**parts, "activations_bytes": max(needed - sum(parts.values()), 0.0), "rest_bytes": 0.0}
        found |= {"hbm_per_chip_bytes": needed, "hbm_available_bytes": chip.hbm_bytes, "memory": memory, "fits": False}
        return found | {"compile_seconds": time.monotonic() - started}
    found |= _memory(compiled.memory_analysis(), parts, chip, beside)
    cost = _cost([(compiled, program.calls), (last, 1)] if last else [(compiled, program.calls)])
    found |= _times(flops / mesh.size, found["memory"], cost, chip)
    return found | {"compile_seconds": time.monotonic() - started}


def _memory(stats: Any, parts: dict[str, int], chip: Chip, beside: int) -> dict[str, Any]:
    """Memory by purpose, `beside` (bytes that are no arguments) included.

    The rest is the padding of arguments to tiles, results that replace no argument, and code.
    """
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = (
        stats.argument_size_in_bytes + stats.temp_size_in_bytes + results + stats.generated_code_size_in_bytes + beside
    )
    rest = total - stats.temp_size_in_bytes - sum(parts.values())
    memory = {**parts, "activations_bytes": stats.temp_size_in_bytes, "rest_bytes": rest}
    fits = total <= chip.hbm_bytes
    return {"hbm_per_chip_bytes": total, "hbm_available_bytes": chip.hbm_bytes, "memory": memory, "fits": fits}


def _cost(programs: Sequence[tuple[Any, int]]) -> Cost | None:
    """Cost of compiled programs, each called so often, or None where this version of libtpu cannot print them."""
    try:
        return total_cost([(program_cost(compiled.as_text()), calls) for compiled, calls in programs])
    except jax.errors.JaxRuntimeError:
        return None


def _times(flops: float, memory: dict[str, Any], cost: Cost | None, chip: Chip) -> dict[str, Any]:
    """Seconds per call: the compiler's estimate, and the roofline that no program can beat.

    The compiler's adds up its cycles of every operation, the time that kernels need for the operations and bytes they
    state at the chip's full rates, and that of the collectives at the full rate of all links, as if nothing overlapped
    anything else. The roofline is the slowest of operations, memory traffic and collectives, each at the chip's full
    rate. Where the program cannot be printed, operations are all that is known;
    `incomplete` says so.
    """
    times = {"flops": flops / chip.flops}
    found: dict[str, Any] = {"roofline": times, "collectives": None, "hbm_bytes_per_chip": None}
    if cost is not None:
        times |= {"hbm": cost.hbm_bytes / chip.hbm_bandwidth, "collectives": cost.sent_bytes / chip.ici_bandwidth}
        kinds = {kind: {"count": t.count, "bytes": t.bytes} for kind, t in cost.collectives.items()}
        found |= {"collectives": kinds, "hbm_bytes_per_chip": cost.hbm_bytes, "unknown_loops": cost.unknown_loops}
        kernels = sum(kernel.seconds(chip.flops, chip.hbm_bandwidth) for kernel in cost.kernels)
        found["compiler_seconds"] = cost.cycles / chip.clock + kernels + times["collectives"]
    else:
        found["incomplete"] = (
            "memory traffic and collectives are not known: this libtpu cannot print the program, the one that belongs "
            "to this jax can (pip install 'dspark-jax[tpu]')"
        )
    found["roofline_seconds"] = max(times.values())
    found["estimated_seconds"] = max(found.get("compiler_seconds", 0.0), found["roofline_seconds"])
    return found
