"""Whether a drafter accepts as much after export and import as it did before: every format that its kind has.

    python tests/benchmarks/round_trip.py runs/compare_quickstart/drafters/* [--prompts 24] [--json out.json]

Every run is exported in float32 (or `--dtype bfloat16`, which rounds) by `convert export` and imported by `convert
import`, and both draft for the same held-out prompts of the run's config with the same draws, at temperature 1 and
greedily. A file does not say in which type a drafter computed when it was trained, so both compute in the run's
(`drafter.dtype`). What is shown is tokens per round of both, and in how many prompts every single round was the same. A
format that does not hold the drafter is refused by `export`, and shown as that. Ends with status 1 if a prompt's rounds
differ.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dspark_jax.config import Config, MeshConfig
from dspark_jax.convert.__main__ import export_run
from dspark_jax.convert.__main__ import main as convert
from dspark_jax.convert.export import FORMATS
from dspark_jax.data.chat import load_tokenizer, prompt_tokens, stop_tokens
from dspark_jax.data.prompts import read_prompts
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.engine import DecodeResult, Models, generate
from dspark_jax.errors import InputError
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from dspark_jax.training.checkpoint import load_drafter
from dspark_jax.training.state import abstract_drafter, to_module, to_params

TEMPERATURES = (1.0, 0.0)


def read(workdir: Path, mesh: Any, dtype: str = "") -> tuple[Config, DrafterModule]:
    """The newest drafter of a run, which computes in `dtype` if one is given."""
    with jax.set_mesh(mesh):
        config, drafter = load_drafter(workdir, mesh)
        if dtype:
            config = dataclasses.replace(config, drafter=dataclasses.replace(config.drafter, dtype=dtype))
            drafter = to_module(abstract_drafter(config), to_params(drafter))
        return config, drafter


def answers(config: Config, drafter: DrafterModule, target: Any, prompts: int, mesh: Any) -> list[DecodeResult]:
    """What is decoded with a drafter at every temperature, the same draws for all drafters."""
    tokenizer = load_tokenizer(config.target.path)
    texts = [prompt_tokens(tokenizer, prompt.messages[:1]) for prompt in read_prompts(config.eval.prompts, prompts)]
    settings: dict[str, Any] = {
        "max_new_tokens": config.eval.max_new_tokens, "stop_tokens": stop_tokens(config.target.path, tokenizer),
    }  # fmt: skip
    with jax.set_mesh(mesh):
        return [generate(Models(target, drafter), texts, temperature=value, **settings) for value in TEMPERATURES]


def same_rounds(before: DecodeResult, after: DecodeResult) -> int:
    """Prompts whose tokens and rounds are the same."""
    return sum(
        np.array_equal(one, other) and np.array_equal(lengths, others)
        for one, other, lengths, others in zip(
            before.tokens, after.tokens, before.acceptance_lengths, after.acceptance_lengths, strict=True
        )
    )


def round_trips(workdir: Path, folder: Path, arguments: argparse.Namespace, mesh: Any) -> list[dict[str, Any]]:
    """One row per format and temperature."""
    config, drafter = read(workdir, mesh)
    with jax.set_mesh(mesh):
        target = load_target(config.target, mesh)
    before, rows = answers(config, drafter, target, arguments.prompts, mesh), list[dict[str, Any]]()
    for form in FORMATS:
        export, again = folder / workdir.name / form, folder / workdir.name / f"{form}_run"
        row: dict[str, Any] = {"run": workdir.name, "format": form, "prompts": len(before[0].tokens)}
        try:
            export_run(workdir, export, format=form, dtype=arguments.dtype)
        except InputError as error:
            rows.append(row | {"refused": str(error)})
            continue
        convert(["import", f"--drafter={export}", f"--target={config.target.path}", f"--workdir={again}"])
        after = answers(config, read(again, mesh, config.drafter.dtype)[1], target, arguments.prompts, mesh)
        for temperature, first, second in zip(TEMPERATURES, before, after, strict=True):
            taus = {"before": first.tau, "after": second.tau, "same": same_rounds(first, second)}
            rows.append(row | {"temperature": temperature} | taus)
    return rows


def show(row: dict[str, Any]) -> str:
    """A row of the table."""
    name = f"{row['run']:<24}{row['format']:<13}"
    if "refused" in row:
        return f"{name}refused: {row['refused']}"
    taus = f"{row['before']:>10.4f}{row['after']:>10.4f}"
    return f"{name}{row['temperature']:>11.0f}{taus}{row['same']:>8} of {row['prompts']}"


def main() -> int:
    """Prints a table; 1 if a round differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="working directories of trainings")
    parser.add_argument("--prompts", type=int, default=8, help="of each held-out prompt set")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    mesh, rows = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for workdir in arguments.runs:
            rows += round_trips(workdir.resolve(), Path(folder), arguments, mesh)
    print(f"{'run':<24}{'format':<13}{'temperature':>11}{'tau':>10}{'again':>10}{'same':>8}")
    for row in rows:
        print(show(row))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any("refused" not in row and row["same"] < row["prompts"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
