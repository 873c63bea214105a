"""Compiles one program of a plan in a process of its own.

The TPU compiler ends its process where it finds something wrong in itself. That must not take the other program's
figures along, and it must not look like a crash of ours. Besides, two processes compile on two processors at once.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from dspark_jax.attached import run_quietly
from dspark_jax.config import Config, InputError, from_json, to_json
from dspark_jax.planning.estimate import compile_and_estimate
from dspark_jax.planning.programs import decode_program, train_program
from dspark_jax.planning.topology import devices_of
from dspark_jax.sharding import make_mesh

PROGRAMS = {"train": train_program, "decode": decode_program}
"""The parts of a plan."""


def estimate_apart(config: Config, topology: str, part: str) -> dict[str, Any]:
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
    with tempfile.TemporaryDirectory() as folder:
        job = {"config": to_json(config), "topology": topology, "part": part}
        (Path(folder) / "job.json").write_text(json.dumps(job), "utf-8")
        done = run_quietly(["dspark_jax.planning.apart", folder], {})
        result = Path(folder) / "result.json"
        if done.returncode == 0:
            return json.loads(result.read_text("utf-8"))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode == 2:
        raise InputError(lines[-1].removeprefix("error: "))
    if done.returncode < 0:
        said = [line.strip() for line in lines if "heck failed" in line or "LOG(FATAL)" in line]
        return {"crashed": f"signal {-done.returncode}" + "".join(f": {line[:300]}" for line in said[:1])}
    raise RuntimeError(f"compiling the {part} program failed: {done.stderr.strip()[-2000:]}")


def main(folder: Path) -> None:
    """Does the job in `folder` and writes result.json beside it; status 2 and one line for bad input."""
    job = json.loads((folder / "job.json").read_text("utf-8"))
    config = from_json(job["config"])
    try:
        chip, devices = devices_of(job["topology"])
        mesh = make_mesh(config.mesh, devices)
        found = compile_and_estimate(PROGRAMS[job["part"]](config, mesh), chip, mesh)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    (folder / "result.json").write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the TPU here is only compiled for
    main(Path(sys.argv[1]))
