"""What `compare` measures of a trained drafter: its rounds on the held-out prompts, and what a round takes.

Every drafter is measured in a process of its own, so that one that fails takes nothing with it, and the time of a round
in one more, where all drafters take turns and see the same state of the machine. Hence this module is also a program:

    python -m dspark_jax.evaluation.rounds JOB.json
"""

import contextlib
import dataclasses
import os
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dspark_jax import jobs
from dspark_jax.config import InputError, from_json
from dspark_jax.data.samples import Tally
from dspark_jax.evaluation.acceptance import Counts, count_rounds
from dspark_jax.evaluation.decoding import Decoder, answer
from dspark_jax.evaluation.setup import open_decoder, read_questions, tell_left_out
from dspark_jax.json_file import written_whole
from dspark_jax.progress import Progress
from dspark_jax.run import Run

PLAIN = "plain"
"""Name of decoding without a drafter among the times."""


def measure_rounds(run: Run, out: Path) -> None:
    """Answers all held-out prompts at the first temperature of `eval`, and writes the counts.

    Args:
      run: its newest checkpoint is measured.
      out: NPZ file to write: `prompt_sets` [N] names, and the fields of `Counts` by prompt.

    Raises:
      InputError: there is no checkpoint for this target, or a prompt file cannot be used.
    """
    decoder, settings = open_decoder(run), run.config.eval
    with contextlib.closing(Tally(Path(os.devnull))) as tally, jax.set_mesh(run.mesh):
        asked, first = read_questions(run.config, decoder, tally, settings.prompts, settings.limit)
        turns = sum(len(one.questions) for one in asked)
        with Progress("measure", turns, unit="answer") as progress:
            requests, result = answer(decoder, asked, first, settings.temperatures[0], advance=progress.advance)
        tell_left_out("measure", tally)
    counts = count_rounds(result).grouped(requests.owners, len(asked))
    with written_whole(out, ".tmp.npz") as temporary:
        np.savez(temporary, prompt_sets=np.asarray([one.prompt.prompt_set for one in asked]), **vars(counts))


def read_rounds(path: Path) -> tuple[list[str], Counts]:
    """What `measure_rounds` has written: prompt set of every prompt, and its counts.

    Raises:
      InputError: it is damaged.
    """
    try:
        with np.load(path) as file:
            names = [str(name) for name in file["prompt_sets"]]
            return names, Counts(**{name: file[name] for name in file.files if name != "prompt_sets"})
    except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged ({error}); remove it, it will be measured again") from None


def measure_times(runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """Decodes some prompts at batch 1 with every drafter in turn, and without one.

    Args:
      runs: by name. All have the same target, prompts and settings.

    Returns:
      By name, and for `PLAIN`: seconds (prefill included), rounds and new tokens of every prompt. Compilation happens
      in a decoding that is not counted. A drafter that cannot be loaded has "error" instead.

    Raises:
      InputError: none can be loaded, or a prompt file cannot be used.
    """
    base = next(iter(runs.values()))
    settings = base.config.eval
    with contextlib.closing(Tally(Path(os.devnull))) as tally, jax.set_mesh(base.mesh):
        decoders, found = _open_all(runs)
        loaded = next(iter(decoders.values()))
        asked, first = read_questions(base.config, loaded, tally, settings.prompts, settings.limit)
        quick = first.take(_first_of_each([one.prompt.prompt_set for one in asked], settings.speed_prompts))
        decoders[PLAIN] = loaded
        with Progress("time", len(quick.items) * len(decoders), unit="answer") as progress:
            for name, decoder in decoders.items():
                models = (decoder.models.plain() if name == PLAIN else decoder.models).for_decoding(batch_size=1)
                decoders[name] = dataclasses.replace(decoder, models=models)
                decoders[name].decode(
                    quick.take([0]), settings.temperatures[0], speculative=name != PLAIN, batch_size=1
                )
                found[name] = {"seconds": [], "rounds": [], "tokens": []}
            for number in range(len(quick.items)):
                one = quick.take([number])
                for name, decoder in decoders.items():
                    started = time.perf_counter()
                    result = decoder.decode(one, settings.temperatures[0], speculative=name != PLAIN, batch_size=1)
                    found[name]["seconds"].append(time.perf_counter() - started)
                    found[name]["rounds"].append(len(result.acceptance_lengths[0]))
                    found[name]["tokens"].append(len(result.tokens[0]))
                    progress.advance()
    return found


def _open_all(runs: Mapping[str, Run]) -> tuple[dict[str, Decoder], dict[str, dict[str, Any]]]:
    """Engines with the same target by name, and {"error": why} of those that cannot be loaded."""
    decoders: dict[str, Decoder] = {}
    errors: dict[str, dict[str, Any]] = {}
    target = None
    for name, run in runs.items():
        try:
            decoders[name] = open_decoder(run, target=target)
        except InputError as error:
            errors[name] = {"error": " ".join(str(error).split())[:200]}
        else:
            target = decoders[name].models.target
    if not decoders:
        raise InputError("; ".join(f"{name}: {one['error']}" for name, one in errors.items()))
    return decoders, errors


def _first_of_each(sets: Sequence[str], most: int) -> list[int]:
    """Indices of the first `most` prompts of every set."""
    return [i for i, name in enumerate(sets) if list(sets[:i]).count(name) < most]


def work(job: dict[str, Any]) -> dict[str, Any] | None:
    """A job of `compare`: {"task": "rounds" or "times", "out": file, "runs": {name: {"config", "workdir"}}}."""
    runs = {name: Run(from_json(run["config"]), Path(run["workdir"])) for name, run in job["runs"].items()}
    if job["task"] == "times":
        return measure_times(runs)
    for run in runs.values():
        measure_rounds(run, Path(job["out"]))
    return None


if __name__ == "__main__":
    jobs.do(work)
