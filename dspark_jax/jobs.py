"""Work in a process of its own: a JSON file says what is to be done, another one holds what was found.

    python -m MODULE JOB.json

runs a job by hand. A module that can be started so ends in `if __name__ == "__main__": jobs.do(work)`; `run` starts it.
A job that `compare` keeps, so that its result says how it was measured, is started by `attached.run_module` instead,
which shows what it prints.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from dspark_jax.attached import run_quietly
from dspark_jax.config import InputError
from dspark_jax.errors import reporting_errors
from dspark_jax.json_file import write_json


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
      status: of its process; negative is the number of the signal that killed it.
      result: what the job found; None if `status` is not 0.
      said: its stderr.
    """

    status: int
    result: Any
    said: str


def run(module: str, job: Mapping[str, Any], environment: Mapping[str, str]) -> Ended:
    """Does a job in a process that has `environment` added to ours, and waits for it.

    Raises:
      InputError: the job refused its input.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "job.json", Path(folder) / "result.json"
        write_json(file, {**job, "out": str(out)})
        done = run_quietly([module, str(file)], environment)
        result = json.loads(out.read_text("utf-8")) if done.returncode == 0 else None
    last = done.stderr.strip().split("\n")[-1]
    if done.returncode == 2 and last.startswith("error: "):
        raise InputError(last.removeprefix("error: "))
    return Ended(done.returncode, result, done.stderr)


def do(work: Callable[[dict[str, Any]], Mapping[str, Any] | None], file: Path | None = None) -> None:
    """Reads the job that the command line names and writes what `work` finds to its `out`; ends as commands do.

    Args:
      work: gets the job. None: it has written its `out` itself.
      file: of the job, instead of the command line's.
    """
    logging.set_verbosity(logging.ERROR)  # as commands do
    with reporting_errors():
        job = json.loads((file or Path(sys.argv[1])).read_text("utf-8"))
        found = work(job)
        if found is not None:
            write_json(Path(job["out"]), found)
