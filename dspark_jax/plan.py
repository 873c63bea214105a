"""Compiles a config's train step and decoding round for a TPU slice, on any machine, without weights and without a TPU.

    python -m dspark_jax.plan --config configs/dspark_qwen3_4b.py --topology v5e:4x4
    python -m dspark_jax.plan --topology list

Says what each chip's memory holds, operations, collectives, how long a step and the whole run should take, and whether
it fits or what to change. Needs the TPU compiler: pip install 'dspark-jax[tpu]'. Nothing here has been measured on a
TPU: times are the compiler's own estimates and rooflines.
"""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
from absl import flags

from dspark_jax import command
from dspark_jax.config import Config, InputError
from dspark_jax.json_file import write_json
from dspark_jax.planning.compile_job import PROGRAMS, estimate_in_process
from dspark_jax.planning.programs import with_dtypes
from dspark_jax.planning.topology import GIB, devices_of, listing
from dspark_jax.progress import Progress, log
from dspark_jax.run_lock import make_directory
from dspark_jax.sharding import make_mesh

PARTS = tuple(PROGRAMS)
NAMES = {"train": "train step", "decode": "decoding round"}


def plan(config: Config, workdir: Path, *, topology: str, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Plans the programs `parts` of a resolved config on `topology`.

    Writes `plan.json`:
      {"topology", "chips", "train": {"hbm_per_chip_bytes", "memory", "flops_per_step", "collectives",
      "estimated_step_seconds", "roofline_seconds", "tokens_per_second", "hours", "chip_hours", "fits", "verdict", ...},
      "decode": {"hbm_per_chip_bytes", "estimated_round_seconds", ...}}
    A part that cannot be planned has {"verdict", and "crashed" or "skipped": why}: decoding, of a target without a
    definition here.

    Raises:
      InputError: the topology or a part is unknown, libtpu is missing, or the mesh or batch does not suit it.
    """
    if not parts or set(parts) - set(PARTS):
        raise InputError(f"--parts {','.join(parts)!r} is unknown; use one or both of: {','.join(PARTS)}")
    jax.config.update("jax_platforms", "cpu")  # the TPU here is only compiled for
    chip, devices = devices_of(topology)
    config = with_dtypes(config)
    mesh = make_mesh(config.mesh, devices)
    make_directory(workdir)
    chips = len(devices) // chip.per_chip
    shape = {name: size for name, size in mesh.shape.items() if size > 1}
    report: dict[str, Any] = {"config": config.name, "topology": topology, "chips": chips, "mesh": shape}
    wanted = [part for part in parts if part == "train" or not config.target.architecture.unsupported]
    names = " and the ".join(NAMES[part] for part in wanted) or "nothing"
    log(f"compiling the {names} of {config.name} for {topology} ({chips} chips): some minutes")
    with ThreadPoolExecutor(max(len(wanted), 1)) as pool:
        jobs = {pool.submit(estimate_in_process, config, topology, part): part for part in wanted}
        with Progress("plan", len(wanted), unit="program") as progress:
            for job in as_completed(jobs):
                part, found = jobs[job], job.result()
                if "crashed" not in found:
                    found = _of_training(found, config, chips) if part == "train" else _of_decoding(found, config)
                report[part] = found | {"verdict": verdict(found, config, mesh, part)}
                progress.advance(1)
    for part in set(parts) - set(wanted):
        why = f"a {config.target.architecture.unsupported} has no definition here and cannot run"
        report[part] = {"skipped": why, "verdict": f"not planned: {why}"}
    for part in parts:
        print("\n".join(describe(NAMES[part], report[part])), flush=True)
    write_json(workdir / "plan.json", report)
    log(f"written to {workdir / 'plan.json'}")
    return report


def _of_training(found: dict[str, Any], config: Config, chips: int) -> dict[str, Any]:
    """Per step, and of the whole run. Tokens are positions: all of `max_length`, padding included."""
    found = found | {"flops_per_step": found["flops"]}
    if "estimated_seconds" in found:
        seconds = found["estimated_step_seconds"] = found.pop("estimated_seconds")
        hours = config.train.steps * seconds / 3600
        found |= {"tokens_per_second": config.train.batch_size * config.data.max_length / seconds}
        found |= {"steps": config.train.steps, "hours": hours, "chip_hours": hours * chips}
    return found


def _of_decoding(found: dict[str, Any], config: Config) -> dict[str, Any]:
    """Per round; tokens per second between one token per round and all drafts accepted."""
    found = found | {"flops_per_round": found["flops"]}
    if "estimated_seconds" in found:
        seconds = found["estimated_round_seconds"] = found.pop("estimated_seconds")
        each = config.eval.batch_size / seconds
        found["tokens_per_second_by_accepted_length"] = {"1": each, "max": each * (config.drafter.block_size + 1)}
    return found


def verdict(found: dict[str, Any], config: Config, mesh: jax.sharding.Mesh, part: str) -> str:
    """One line: fits, or what to change."""
    if "crashed" in found:
        return f"not known, the TPU compiler crashed ({found['crashed']}); try another topology, mesh or libtpu"
    memory, available = found["memory"], found["hbm_available_bytes"]
    used = f"{found['hbm_per_chip_bytes'] / GIB:.2f} of {available / GIB:.2f} GiB per chip"
    if found["fits"]:
        return f"fits: {used}"
    held = sum(size for name, size in memory.items() if name not in ("activations_bytes", "rest_bytes"))
    if part == "decode":
        factor = (available - held) / max(found["hbm_per_chip_bytes"] - held, 1)
        fewer = "lower eval.batch_size or eval.max_new_tokens" if factor > 0 else "use a larger slice"
        return f"does not fit ({used}): {fewer}"
    if held > 0.9 * available:
        return f"does not fit ({used}): weights and optimizer alone take {held / GIB:.2f} GiB; use a larger slice"
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    each = config.train.batch_size // (config.train.accumulate * ways)
    for rows in range(each - 1, 0, -1):
        if each % rows == 0 and memory["activations_bytes"] * rows / each <= 0.9 * (available - held):
            return f"does not fit ({used}): set train.accumulate={config.train.accumulate * each // rows}"
    return f"does not fit ({used}) even with one sequence per chip: lower data.max_length, or use a larger slice"


def describe(name: str, found: dict[str, Any]) -> Iterator[str]:
    """The lines that are printed for one program."""
    yield f"{name}: {found['verdict']}"
    if "memory" not in found:
        return
    for part, size in found["memory"].items():
        yield f"  {part.removesuffix('_bytes').replace('_', ' '):<20} {size / GIB:8.2f} GiB per chip"
    yield f"  {'operations':<20} {found['flops'] / 1e12:8.1f} TFLOP, {found['flops_per_chip'] / 1e12:.2f} per chip"
    if found.get("hbm_bytes_per_chip") is not None:
        yield f"  {'memory traffic':<20} {found['hbm_bytes_per_chip'] / 1e9:8.1f} GB per chip"
    for kind, traffic in (found.get("collectives") or {}).items():
        yield f"  {kind:<20} {traffic['bytes'] / 1e9:8.2f} GB per chip in {traffic['count']}"
    if "roofline" not in found:
        return
    if "compiler_seconds" in found:
        yield f"  {'compiler estimate':<20} {found['compiler_seconds']:8.3f} s, nothing overlapped"
    bounds = ", ".join(f"{bound} {seconds:.3f}" for bound, seconds in found["roofline"].items())
    yield f"  {'roofline':<20} {found['roofline_seconds']:8.3f} s ({bounds})"
    if "incomplete" in found:
        yield f"  {'far too short':<20} {found['incomplete']}"
    if "hours" in found:
        yield (
            f"  {'whole run':<20} {found['hours']:8.1f} h, {found['chip_hours']:.0f} chip-hours, "
            f"{found['tokens_per_second']:.0f} tokens/s" + " at the best" * ("incomplete" in found)
        )
    if "tokens_per_second_by_accepted_length" in found:
        low, high = found["tokens_per_second_by_accepted_length"].values()
        yield f"  {'tokens/s':<20} {low:8.0f} with one token per round, {high:.0f} with all drafts accepted"


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "topology", "v5e:4x4", "The slice, e.g. v5e:4x4, v6e:8x8, v5p:2x2x2; `list` names them.", flag_values=values
    )
    flags.DEFINE_list("parts", list(PARTS), "What to compile: train, decode.", flag_values=values)


if __name__ == "__main__":
    if {"--topology=list", "list"} & set(sys.argv[1:]):
        print(listing())
    else:
        # One file, whole: it may run beside others.
        command.run(plan, define=_define, writes=False, buckets=False)
