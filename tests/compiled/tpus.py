"""TPUs that programs can be compiled for on a machine without one, where libtpu is installed."""

import json
import subprocess
import sys
from typing import Any

import pytest

from dspark_jax.config import InputError
from dspark_jax.planning.topology import devices_of

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
"""The smallest that hold four devices."""


def compiled_apart(job: str, topology: str) -> dict[str, Any]:
    """What the function `job` of `tests.compiled.tpu_jobs` gives for the devices of a topology.

    It runs in a process of its own: libtpu ends its process where it finds something wrong in itself. Skips the test
    that asks where there is no libtpu.
    """
    try:
        devices_of(topology)
    except InputError as error:
        if "no TPU compiler" not in str(error):
            raise
        pytest.skip("libtpu is not installed (pip install libtpu)")
    command = [sys.executable, "-m", "tests.compiled.tpu_jobs", job, topology]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
