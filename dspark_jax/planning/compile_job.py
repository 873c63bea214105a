"""Compiles one program of a plan in a process of its own.

The TPU compiler ends its process where it finds something wrong in itself. That must not take the other program's
figures along, and it must not look like a crash of ours. Besides, two processes compile on two processors at once.
"""

from typing import Any

import jax

from dspark_jax import jobs
from dspark_jax.config import Config, from_json, to_json
from dspark_jax.planning.estimate import compile_and_estimate
from dspark_jax.planning.programs import decode_program, train_program
from dspark_jax.planning.topology import devices_of
from dspark_jax.sharding import make_mesh

PROGRAMS = {"train": train_program, "decode": decode_program}
"""The parts of a plan."""


def estimate_in_process(config: Config, topology: str, part: str) -> dict[str, Any]:
    """`compile_and_estimate` of one of `PROGRAMS` on a slice.

    Args:
      config: resolved, without `auto` types.
      topology: e.g. v5e:4x4.
      part: a name in `PROGRAMS`.

    Returns:
      What it returns; or, where the compiler crashed, `crashed`: why, as far as it said.

    Raises:
      InputError: the topology is unknown, libtpu is missing, or the mesh or batch does not suit the slice.
    """
    job = {"config": to_json(config), "topology": topology, "part": part}
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
    chip, devices = devices_of(job["topology"])
    mesh = make_mesh(config.mesh, devices)
    return compile_and_estimate(PROGRAMS[job["part"]](config, mesh), chip, mesh)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the TPU here is only compiled for
    jobs.do(work)
