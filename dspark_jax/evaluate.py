"""Measures a trained drafter on held-out prompts: accepted length, acceptance by position, speed, losslessness.

    python -m dspark_jax.evaluate --config configs/quickstart.py --workdir runs/quickstart_dspark

decodes the prompt sets of `config.eval` with the newest checkpoint of the working directory at every temperature of
`config.eval.temperatures` and writes `eval/metrics.json`. It ends in some twenty lines: accepted length, speed,
losslessness, and where the report is; `--details` prints every table of the report before them. The first temperature
gives the headline numbers. Speed is measured at batch 1 in the same run: plain decoding, drafting in every round, and
drafting where it pays (`schedulers.adaptive`), taking turns (with `eval.speed_threads`, in a process with so many CPU
threads; on one host only).

Of the paper's benchmarks (`prepare --benchmarks`) it also shows means by domain, and the paper's figures where it has
the same target and kind of drafter.

From the rounds at the first temperature it also draws, as PNG with the data as JSON: acceptance by position, the
sweep of the confidence threshold, the reliability of the confidences before and after calibration, and, replayed on a
cost table, throughput against per-user speed and verification budget against concurrency (`eval/load.json`). The table
is that of `--cost_table`, or what was measured on an H100 with Qwen3-4B where such a drafter was measured there, or has
the shape of a saturating accelerator. `eval/report.html` shows all of it on one page.

`--traffic=2,4,8` also drives the serving engine of this machine, if it is the only one, with open-loop traffic at so
many requests per second, with plain decoding, fixed lengths and schedulers in turn (`eval/traffic.json`).

`--teacher_forced=256` decodes nothing: from the features on disk (`data.features=cache` or `torch`) of so many training
samples it computes the acceptance of every position and the tokens per round that follow from it, at the answers'
tokens (`eval/teacher_forced.json`). It takes seconds, and is not tau.

Prompts that cannot be used are set aside in `eval/rejected.jsonl`.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from dspark_jax import command, platform
from dspark_jax.config import Config, InputError
from dspark_jax.data.samples import Tally
from dspark_jax.evaluation.acceptance import count_rounds
from dspark_jax.evaluation.decoding import Decoder, Requests, answer, compare_greedy
from dspark_jax.evaluation.load import (
    Costs,
    CostTable,
    contenders,
    load_curves,
    load_data,
    load_table,
)
from dspark_jax.evaluation.measured_costs import INVENTED, costs_for
from dspark_jax.evaluation.plots import (
    budget_plot,
    conditional_plot,
    reliability_plots,
    survival_plot,
    threshold_plot,
    throughput_plot,
    traffic_plot,
)
from dspark_jax.evaluation.predictors import (
    calibration_data,
    calibration_table,
    compare_predictors,
)
from dspark_jax.evaluation.report import report
from dspark_jax.evaluation.setup import (
    check_prompt_files,
    decoding_run,
    open_decoder,
    read_questions,
    refuse_timing,
    tell_left_out,
)
from dspark_jax.evaluation.speed import Speed, measure_speed, measure_speed_in_process
from dspark_jax.evaluation.summary import Measured, greedy_metrics, metrics_at, overview, paper_metrics, table
from dspark_jax.evaluation.teacher_forced import describe, measure_teacher_forced
from dspark_jax.evaluation.threshold import sweep_thresholds
from dspark_jax.evaluation.traces import record
from dspark_jax.evaluation.traffic import TrafficPoint, measure_traffic, parse_rates, traffic_table
from dspark_jax.json_file import write_json
from dspark_jax.ops.sampling import GREEDY_BELOW
from dspark_jax.presets import target_like
from dspark_jax.progress import Progress
from dspark_jax.run import Run
from dspark_jax.shown_paths import as_given
from dspark_jax.target.in_torch import runs_in_torch
from dspark_jax.training.best import NEWEST


def evaluate(config: Config, workdir: Path, *, mesh: Mesh | None = None, **options: Any) -> dict[str, Any]:
    """Evaluates a checkpoint of `workdir`, or models that are loaded already.

    Args:
      config: resolved; `target`, `eval`, and of `data` the system prompt and the prompt limit are used.
      workdir: of the training run; `eval/` is written in it.
      mesh: of the models; that of `config.mesh.decode` if None.
      options: see `evaluate_run`, as is what it returns and raises.
    """
    return evaluate_run(Run(config, Path(workdir), mesh), **options)


def evaluate_run(
    run: Run,
    *,
    decoder: Decoder | None = None,
    cost_table: str | None = None,
    traffic: str = "",
    traffic_requests: int = 60,
    traffic_slots: int = 8,
    details: bool = False,
    checkpoint: str = NEWEST,
    teacher_forced: int = 0,
) -> dict[str, Any]:
    """Evaluates a run that a command has already.

    Args:
      run: see `evaluate`.
      decoder: models that are loaded already, or None to load the newest checkpoint.
      cost_table: what to replay load on, see `evaluation.measured_costs.costs_for`.
      traffic: rates in requests per second at which the serving engine is driven, e.g. "2,4,8"; empty for none.
      traffic_requests: at every rate.
      traffic_slots: requests decoded together.
      details: print every table, not only what they come to.
      checkpoint: `newest`, `best` or a step, see `training.checkpoint.load_drafter`.
      teacher_forced: instead of decoding, look at so many training samples (`evaluation.teacher_forced`); 0 decodes.

    Returns:
      The content of `eval/metrics.json`, or of `eval/teacher_forced.json`.

    Raises:
      InputError: there is no checkpoint for this target, or target, tokenizer, prompts or cost table cannot be used;
        traffic on several hosts.
    """
    config = run.config
    if teacher_forced:
        found = measure_teacher_forced(run, teacher_forced, checkpoint)
        print(describe(found), flush=True)
        return found
    check_prompt_files(config.eval.prompts, "eval.prompts")
    if not config.eval.temperatures:
        raise InputError("eval.temperatures is empty; give at least one, e.g. (1.0, 0.0)")
    costs = costs_for(cost_table, config.drafter.kind, config.drafter.block_size)
    rates = parse_rates(traffic) if traffic else ()
    if rates and min(traffic_requests, traffic_slots) < 1:
        raise InputError(f"--traffic_requests={traffic_requests} and --traffic_slots={traffic_slots} must be positive")
    if rates and jax.process_count() > 1:
        raise InputError(f"--traffic={traffic}: hosts would not launch the same rounds; leave out --distributed")
    if rates:
        refuse_timing(config, f"--traffic={traffic}")
    started = time.monotonic()
    run = decoding_run(run)
    decoder = open_decoder(run, checkpoint=checkpoint) if decoder is None else decoder
    primary = jax.process_index() == 0
    folder = run.eval_folder
    folder.mkdir(parents=True, exist_ok=True)
    rejected = folder / "rejected.jsonl"
    with contextlib.closing(Tally(rejected if primary else Path(os.devnull))) as tally, jax.set_mesh(run.mesh):
        metrics, measured = measure(run, decoder, tally)
        curves = {}
        if rates:
            items = measured[0].requests.items
            curves = measure_traffic(
                decoder,
                [item.prompt for item in items],
                [measured[0].conversations[item.owner].prompt.prompt_set for item in items],
                rates,
                slots=traffic_slots,
                count=traffic_requests,
                temperature=measured[0].temperature,
                steps_per_second=costs.speculative if isinstance(costs, CostTable) and not costs.invented else None,
            )
    metrics["seconds"] = round(time.monotonic() - started, 1)
    if primary:
        tell_left_out("evaluate", tally, rejected)
        metrics = write_json(folder / "metrics.json", metrics)
        if curves:
            write_json(folder / "traffic.json", {name: [vars(one) for one in row] for name, row in curves.items()})
        predicted, load = write_analysis(config, metrics, measured[0], costs, folder, curves)
        show(metrics, predicted, load, curves, folder / "report.html", details=details)
    return metrics


def show(
    metrics: Mapping[str, Any],
    predicted: Mapping[str, Any] | None,
    load: Mapping[str, Any] | None,
    traffic: Mapping[str, Sequence[TrafficPoint]],
    page: Path,
    *,
    details: bool,
) -> None:
    """Prints what the command ends in.

    Args:
      metrics: content of `eval/metrics.json`.
      predicted: content of `eval/calibration.json`, or None.
      load: content of `eval/load.json`, or None.
      traffic: what `--traffic` has measured, empty if it was not asked for.
      page: `eval/report.html`.
      details: print all of them, not only the traffic and the overview.
    """
    parts = []
    if details:
        parts.append(table(metrics))
        if predicted is not None and load is not None:
            title = f"{metrics['name']}, temperature {metrics['temperature']:g}"
            parts += [calibration_table(predicted, title), load_table(load)]
    if traffic:
        parts.append(traffic_table(traffic))
    print("\n\n".join([*parts, as_given(overview(metrics, page, load))]), flush=True)


def measure(run: Run, decoder: Decoder, tally: Tally) -> tuple[dict[str, Any], list[Measured]]:
    """Decodes everything and computes the metrics, under `jax.set_mesh`; writes and prints nothing.

    Returns:
      Metrics in the layout of `eval/metrics.json` (NaN where something is not defined), and what they were computed
      from, one entry per temperature; the first one has traces.
    """
    config, settings = run.config, run.config.eval
    asked, first = read_questions(config, decoder, tally, settings.prompts, settings.limit)
    set_names = [one.prompt.prompt_set for one in asked]
    quick = first.take(_first_of_each(set_names, settings.speed_prompts))
    greedy = next((t for t in settings.temperatures if t < GREEDY_BELOW), None)
    turns = sum(len(one.questions) for one in asked)
    runs = len(settings.temperatures) + (1 if greedy is not None else 2)
    total = turns * runs + len(quick.items) * len(settings.temperatures)
    measured: list[Measured] = []
    with Progress("evaluate", total, unit="answer") as progress:
        speeds = _speeds(run, decoder, quick, progress.advance)
        for temperature, speed in zip(settings.temperatures, speeds, strict=True):
            trace = not measured
            requests, result = answer(decoder, asked, first, temperature, trace=trace, advance=progress.advance)
            traces = record(result, requests.owners, set_names, decoder.stop_tokens) if trace else None
            counts = count_rounds(result).grouped(requests.owners, len(asked))
            measured.append(Measured(temperature, asked, requests, result, counts, speed, traces))
        # Greedy decoding is compared whether or not it is among the temperatures.
        if greedy is not None:
            checked = measured[settings.temperatures.index(greedy)]
            requests, result = checked.requests, checked.result
        else:
            requests, result = answer(decoder, asked, first, 0.0, advance=progress.advance)
        differences = compare_greedy(decoder, requests, result.tokens, progress.advance)
        progress.update(total)
    described = [metrics_at(one, settings.bootstrap, settings.seed) for one in measured]
    metrics = {
        "name": config.name,
        "step": decoder.step,
        "block_size": decoder.models.block_size,
        "max_new_tokens": settings.max_new_tokens,
        **({"target_runs_in": "PyTorch"} if runs_in_torch(decoder.models.target) else {}),
        **described[0],
        **greedy_metrics(differences, requests, asked),
        "paper": paper_metrics(
            target_like(config.target.architecture), config.drafter.kind, described[0]["prompt_sets"]
        ),
        "rejected": dict(tally.rejected),
        "unused": dict(tally.unused),
        "temperatures": {str(float(one["temperature"])): one for one in described[1:]},
    }
    return metrics, measured


def _speeds(run: Run, decoder: Decoder, requests: Requests, advance: Callable[[int], None]) -> list[Speed | None]:
    """Speed at every temperature; None for each where there are no requests to measure it on.

    Nor is there one of a target that PyTorch runs: it would be that of calls from program to program.
    """
    settings = run.config.eval
    if not requests.items or runs_in_torch(decoder.models.target):
        return [None] * len(settings.temperatures)
    if settings.speed_threads and platform.computes_on_cpu() and jax.process_count() == 1:
        speeds = measure_speed_in_process(
            run, requests, settings.temperatures, settings.speed_threads, step=decoder.step
        )
        advance(len(requests.items) * len(speeds))
        return [*speeds]
    return [measure_speed(decoder, requests, temperature, advance) for temperature in settings.temperatures]


def write_analysis(
    config: Config,
    metrics: Mapping[str, Any],
    headline: Measured,
    costs: Costs,
    folder: Path,
    traffic: Mapping[str, Sequence[TrafficPoint]],
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Everything that follows from the rounds at the first temperature: figures, replays under load, the report.

    Half of the prompts are used to fit temperatures; calibration and load are shown on the other half.

    Returns:
      The contents of `eval/calibration.json` and `eval/load.json`, None each where there are too few rounds.
    """
    traces, seed = headline.traces, config.eval.seed
    assert traces is not None
    title = f"{config.name}, temperature {headline.temperature:g}"
    sets = headline.acceptance(config.eval.bootstrap, seed)
    plots = [conditional_plot(sets, title), survival_plot(sets, title)]
    predicted = load = None
    fit, scored = traces.halves()
    if len(fit.accepted) and len(scored.accepted):
        calibration = compare_predictors(fit, scored, seed=seed)
        sweeps = sweep_thresholds(traces, config.eval.bootstrap, seed)
        if sweeps:
            plots.append(threshold_plot(sweeps, title))
            plots += reliability_plots(calibration, title)
        with Progress("replay", len(contenders(calibration)), unit="scheduler") as progress:
            curves = load_curves(calibration, costs, seed=seed, advance=progress.advance)
        shown = {name: points for name, points in curves.items() if points and name not in _NOT_DRAWN}
        if shown:
            plots += [throughput_plot(shown, title, costs.name), budget_plot(shown, title, costs.name)]
        predicted = write_json(folder / "calibration.json", calibration_data(calibration))
        load = write_json(folder / "load.json", load_data(curves, costs, traces.block_size))
    if traffic:
        plots.append(traffic_plot(traffic, title))
    for name in _FIGURES - {plot.name for plot in plots}:  # of an earlier run, to which it applied
        for ending in ("png", "json"):
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
    for plot in plots:
        plot.write(folder)
    (folder / "report.html").write_text(report(metrics, predicted, load, traffic, plots), "utf-8")
    return predicted, load


_FIGURES = {"conditional_acceptance", "survival", "threshold", "throughput", "budget", "traffic"}
_FIGURES |= {"reliability", "reliability_sts", "reliability_bias_sts"}
_NOT_DRAWN = {"early stop, head", "early stop, head+STS"}  # in the tables; as lines they hide each other


def _first_of_each(sets: Sequence[str], most: int) -> list[int]:
    """Indices of the first `most` entries of every set."""
    seen: dict[str, int] = {}
    chosen = []
    for index, name in enumerate(sets):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] <= most:
            chosen.append(index)
    return chosen


def _define(values: flags.FlagValues) -> None:
    command.define_path(
        values,
        "cost_table",
        "JSON file with steps per second against tokens in the batch (SGLang's layout, as `profile` writes it), or "
        f"{INVENTED}, the shape of an accelerator under any load. Default: for dspark and dflash with blocks of 7 an "
        f"H100 with Qwen3-4B, up to 32 users; for others {INVENTED}.",
    )
    flags.DEFINE_string(
        "traffic",
        "",
        "Also drive the serving engine with open-loop (Poisson) traffic: requests per second, e.g. 2,4,8.",
        flag_values=values,
    )
    flags.DEFINE_integer("traffic_requests", 60, "Requests at every rate of --traffic.", flag_values=values)
    flags.DEFINE_integer("traffic_slots", 8, "Requests decoded together under --traffic.", flag_values=values)
    command.define_checkpoint(values)
    flags.DEFINE_integer(
        "teacher_forced",
        0,
        "Decode nothing: expected tokens per round along the answers of so many training samples, from features that "
        "are stored (data.features=cache or torch). Not tau.",
        flag_values=values,
    )
    flags.DEFINE_boolean("details", False, "Print every table of the report before the overview.", flag_values=values)


if __name__ == "__main__":
    command.run(evaluate, define=_define)
