"""Measures a trained drafter on held-out prompts: accepted length, acceptance by position, speed, losslessness.

    python -m dspark_jax.evaluate --config configs/quickstart.py --workdir runs/quickstart_dspark

decodes the prompt sets of `config.eval` with the newest checkpoint of the working directory at every temperature of
`config.eval.temperatures`, prints a table per temperature, and writes `eval/metrics.json` and `eval/*.png`. The first
temperature gives the headline numbers. Speed is measured at batch 1 in the same run, plain and speculative decoding
taking turns. Prompts that cannot be used are set aside in `eval/rejected.jsonl`.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dspark_jax import command
from dspark_jax.config import Config, InputError
from dspark_jax.data.chat import load_tokenizer, stop_tokens
from dspark_jax.data.prompts import read_prompts
from dspark_jax.data.regenerate import Conversation, Rejected, conversations
from dspark_jax.data.samples import Tally, describe
from dspark_jax.evaluation.acceptance import count_rounds
from dspark_jax.evaluation.decoding import Engine, Requests, answer, compare_greedy, first_requests, measure_speed
from dspark_jax.evaluation.plots import plot_conditional, plot_reliability, plot_survival
from dspark_jax.evaluation.summary import Measured, greedy_metrics, metrics_at, table
from dspark_jax.ops.sampling import GREEDY_BELOW
from dspark_jax.progress import Progress, log
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from dspark_jax.training.checkpoint import load_drafter


def evaluate(
    config: Config,
    workdir: Path,
    *,
    mesh: Mesh | None = None,
    target: Any = None,
    drafter: Any = None,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Evaluates the newest checkpoint of `workdir`, or models that are loaded already.

    Args:
      config: resolved; `target`, `eval`, and of `data` the system prompt and the prompt limit are used.
      workdir: of the training run; `eval/` is written in it.
      mesh: of the models; that of the config if None.
      target: the target, or None to load it.
      drafter: the drafter, or None to load it.
      tokenizer: the target's, or None to load it.

    Returns:
      The content of `eval/metrics.json`.

    Raises:
      InputError: there is no checkpoint for this target, or target, tokenizer or prompts cannot be used.
    """
    _check(config)
    started = time.monotonic()
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    if drafter is None:
        drafter = load_drafter(workdir, mesh, config.target)[1]
    target = load_target(config.target, mesh) if target is None else target
    tokenizer = load_tokenizer(config.target.path) if tokenizer is None else tokenizer
    primary = jax.process_index() == 0
    folder = Path(workdir) / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    rejected = folder / "rejected.jsonl"
    with contextlib.closing(Tally(rejected if primary else Path(os.devnull))) as tally, jax.set_mesh(mesh):
        metrics, measured = measure(config, target, drafter, tokenizer, tally)
    metrics["seconds"] = round(time.monotonic() - started, 1)
    if primary:
        if tally.rejected:
            log(f"evaluate: set aside in {rejected}: {describe(tally.rejected)}")
        else:
            rejected.unlink()
        write_figures(config, measured, folder)
        metrics = write_json(folder / "metrics.json", metrics)
        print(table(metrics), flush=True)
    return metrics


def measure(
    config: Config, target: Any, drafter: Any, tokenizer: Any, tally: Tally
) -> tuple[dict[str, Any], list[Measured]]:
    """Decodes everything and computes the metrics, under `jax.set_mesh`; writes and prints nothing.

    Returns:
      Metrics in the layout of `eval/metrics.json` (NaN where something is not defined), and what they were computed
      from, one entry per temperature.
    """
    settings = config.eval
    engine = Engine(
        target=target,
        drafter=drafter,
        tokenizer=tokenizer,
        stop_tokens=stop_tokens(config.target.path, tokenizer),
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    asked, first = ask(config, engine, tally)
    quick = first.take(_first_of_each([one.prompt.prompt_set for one in asked], settings.speed_prompts))
    greedy = next((t for t in settings.temperatures if t < GREEDY_BELOW), None)
    turns = sum(len(one.questions) for one in asked)
    runs = len(settings.temperatures) + (1 if greedy is not None else 2)
    total = turns * runs + len(quick.items) * len(settings.temperatures)
    measured: list[Measured] = []
    with Progress("evaluate", total, unit="answer") as progress:
        for temperature in settings.temperatures:
            trace = not measured and getattr(drafter, "confidence", None) is not None
            requests, result = answer(engine, asked, first, temperature, trace=trace, advance=progress.advance)
            speed = measure_speed(engine, quick, temperature, progress.advance) if quick.items else None
            counts = count_rounds(result).grouped(requests.owners, len(asked))
            measured.append(Measured(temperature, asked, requests, result, counts, speed))
        # Greedy decoding is compared whether or not it is among the temperatures.
        if greedy is not None:
            checked = measured[settings.temperatures.index(greedy)]
            requests, result = checked.requests, checked.result
        else:
            requests, result = answer(engine, asked, first, 0.0, advance=progress.advance)
        differences = compare_greedy(engine, requests, result.tokens, progress.advance)
        progress.update(total)
    described = [metrics_at(one, settings.bootstrap, settings.seed) for one in measured]
    metrics = {
        "name": config.name,
        "block_size": drafter.block_size,
        "max_new_tokens": settings.max_new_tokens,
        **described[0],
        **greedy_metrics(differences, requests, asked),
        "rejected": dict(tally.rejected),
        "temperatures": {str(float(one["temperature"])): one for one in described[1:]},
    }
    return metrics, measured


def ask(config: Config, engine: Engine, tally: Tally) -> tuple[list[Conversation], Requests]:
    """Reads the held-out prompts; returns those that can be asked, and their first questions.

    Raises:
      InputError: a file cannot be read, or none of its prompts can be asked.
    """
    prompts = read_prompts(config.eval.prompts, config.eval.limit, tally.malformed)

    def reject(conversation: Conversation, error: Rejected) -> None:
        tally.reject(conversation.sample_id, conversation.prompt, error)

    todo = conversations(prompts, 1, config.data.system_prompt)
    asked, first = first_requests(engine, todo, config.data.max_prompt_length, reject)
    left = {one.prompt.file for one in asked}
    for file in config.eval.prompts:
        if str(file) not in left:
            raise InputError(
                f"{file}: none of its prompts can be asked ({describe(tally.rejected)}); "
                f"raise data.max_prompt_length={config.data.max_prompt_length} or change the prompts"
            )
    return asked, first


def write_figures(config: Config, measured: Sequence[Measured], folder: Path) -> None:
    """Figures of the first temperature; one that does not apply any more is removed."""
    headline = measured[0]
    title = f"{config.name}, temperature {headline.temperature}"
    sets = headline.acceptance(config.eval.bootstrap, config.eval.seed)
    plot_conditional(sets, title, folder / "conditional_acceptance.png")
    plot_survival(sets, title, folder / "survival.png")
    scores = headline.calibration()
    if scores is None:
        (folder / "reliability.png").unlink(missing_ok=True)
    else:
        plot_reliability(scores, title, folder / "reliability.png")


def write_json(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a JSON file that is there whole or not at all; returns what it holds: NaN is null, tuples are lists."""
    text = json.dumps(_plain(content), indent=1, allow_nan=False) + "\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)
    return json.loads(text)


def _plain(value: Any) -> Any:
    """The value in types that JSON has."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _first_of_each(sets: Sequence[str], most: int) -> list[int]:
    """Indices of the first `most` entries of every set."""
    seen: dict[str, int] = {}
    chosen = []
    for index, name in enumerate(sets):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] <= most:
            chosen.append(index)
    return chosen


def _check(config: Config) -> None:
    """Refuses what cannot be evaluated before anything is loaded."""
    if not config.eval.prompts:
        raise InputError("eval.prompts is empty; name at least one JSONL file of held-out prompts")
    if not config.eval.temperatures:
        raise InputError("eval.temperatures is empty; give at least one, e.g. (1.0, 0.0)")
    names = [Path(file).stem for file in config.eval.prompts]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"eval.prompts has two files named {name}; results are reported by name, rename one")


if __name__ == "__main__":
    command.run(evaluate)
