"""Compiles one program of a plan in a process of its own.

The TPU compiler ends its process where it finds something wrong in itself. That must not take the other programs'
figures along, and it must not look like a crash of ours. Besides, processes compile on several processors at once.
"""

from typing import Any

import jax

from dspark_jax import jobs
from dspark_jax.config import Config, from_json, to_json
from dspark_jax.engine.placement import answering_load, evaluation_load, place
from dspark_jax.ops.dispatch import watched
from dspark_jax.planning.estimate import compile_and_estimate
from dspark_jax.planning.programs import answering_programs, decode_program, train_program
from dspark_jax.planning.topology import Chip, devices_of
from dspark_jax.sharding import make_mesh

Job = dict[str, Any]


def _train(job: Job, config: Config, chip: Chip, devices: list[Any]) -> dict[str, Any]:
    mesh = make_mesh(config.mesh, devices)
    return compile_and_estimate(train_program(config, mesh), chip, mesh)


def _decode(job: Job, config: Config, chip: Chip, devices: list[Any]) -> dict[str, Any]:
    where = place(config.mesh.decode, evaluation_load(config), devices, chip.hbm_bytes)
    found = compile_and_estimate(decode_program(config, where.mesh), chip, where.mesh)
    return found | {"placement": where.describe()}


def _prepare(job: Job, config: Config, chip: Chip, devices: list[Any]) -> dict[str, Any]:
    """Besides a round, `chunk_seconds`, the copies that read a chunk each in that time, and how many slots fit."""
    load = answering_load(config)
    where = place(config.mesh.decode, load, devices, chip.hbm_bytes)
    programs = answering_programs(config, where.mesh, capacity=job["capacity"], chunk=job["chunk"])
    found, reading = (compile_and_estimate(program, chip, where.mesh) for program in programs)
    if "estimated_seconds" in reading:
        found["chunk_seconds"] = reading["estimated_seconds"]
    copies = where.mesh.shape["data"] * where.mesh.shape["fsdp"]
    found |= {"fits": found["fits"] and reading["fits"], "copies": copies}
    return found | {"slots_that_fit": where.most(load.requests), "placement": where.describe()}


PROGRAMS = {"train": _train, "decode": _decode, "prepare": _prepare}
"""The parts of a plan."""


def estimate_in_process(config: Config, topology: str, part: str, **more: int) -> dict[str, Any]:
    """`compile_and_estimate` of one of `PROGRAMS` on a slice.

    Args:
      config: resolved, without `auto` types.
      topology: e.g. v5e:4x4.
      part: a name in `PROGRAMS`.
      **more: of `prepare`: `capacity` of its engine, and tokens of a `chunk`.

    Returns:
      What it returns, with `placement` where something is decoded; or, where the compiler crashed, `crashed`: why, as
      far as it said.

    Raises:
      InputError: the topology is unknown, libtpu is missing, or the mesh or batch does not suit the slice.
    """
    job = {"config": to_json(config), "topology": topology, "part": part} | more
    ended = jobs.run("dspark_jax.planning.compile_job", job, {})
    if ended.status == 0:
        return ended.result
    if ended.status < 0:
        said = [line.strip() for line in ended.said.splitlines() if "heck failed" in line or "LOG(FATAL)" in line]
        return {"crashed": f"signal {-ended.status}" + "".join(f": {line[:300]}" for line in said[:1])}
    raise RuntimeError(f"compiling the {part} program failed: {ended.said.strip()[-2000:]}")


def work(job: dict[str, Any]) -> dict[str, Any]:
    """A job of `estimate_in_process`."""
    config = from_json(job["config"])
    with watched() as choices:
        found = PROGRAMS[job["part"]](job, config, *devices_of(job["topology"]))
    return found | {"operations": [{**choice._asdict(), "traced": count} for choice, count in choices.items()]}


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the TPU here is only compiled for
    jobs.do(work)
