"""Trains several drafters on the same data for the same steps, and compares them.

    python -m dspark_jax.compare --config configs/compare_quickstart.py
    python -m dspark_jax.compare --config configs/compare_quickstart.py --studies main --seeds 3
    python -m dspark_jax.compare --config quickstart --studies main --config.compare.drafters='("dspark","dflash2")'

Studies: `main` (accepted length by prompt set, gains over DFlash and EAGLE-3, acceptance by position, time per round),
`depth` (draft layers) and `length` (draft tokens per round); which drafters take part is in `config.compare`.

`--seeds 3` trains every drafter three times, with `train.seed` and the seeds after it: other initial weights, another
order of the same data. Differences of trainings with other seeds are often as large as those of drafters; with one
training each (the default), intervals are of the prompts alone. With several, the figures are means over the seeds,
intervals are of seeds and prompts (how: `dspark_jax/evaluation/comparison_seeds.py`), and the main table has the gain
over dspark, paired by seed and prompt, and the number of parameters. A comparison that was made with fewer seeds is
continued: only what is missing is trained.

How long it takes: as many trainings as drafters x seeds, all of `train.steps` steps. The first line says how many there
are, and how long what is left will take as soon as one has been trained (in a directory with finished runs: at once).

Data is prepared once. Every training is a run of its own below `drafters/`, trained and measured in processes of its
own: one that fails is reported and loses nothing of the others (the exit status is then 1). Started again, `compare`
continues where it stopped; what is finished is not repeated, whichever study it was trained for. SIGTERM ends it with
status 143, after the checkpoint of the run in training. Writes `compare.json` (after every drafter) and
`compare/*.png` with their data as JSON, of the drafters and studies that this call names; the runs of others stay.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dspark_jax import command
from dspark_jax.attached import STATUS, run_module
from dspark_jax.config import Config, InputError, to_json
from dspark_jax.evaluation.comparison import (
    BASELINES,
    SEED_BASELINE,
    describe,
    estimate_tau,
    growth,
    round_times,
)
from dspark_jax.evaluation.comparison_plan import STUDIES, Plan, make_plan, with_measured
from dspark_jax.evaluation.comparison_plots import conditional_plots, study_plot, tau_plot, time_plot
from dspark_jax.evaluation.comparison_runs import (
    check_run,
    contents,
    is_measured,
    parameters,
    read_times,
    write_origin,
)
from dspark_jax.evaluation.comparison_seeds import TauEstimate, over_seeds
from dspark_jax.evaluation.comparison_table import method, study_table, table
from dspark_jax.evaluation.comparison_time import forecast, training_seconds
from dspark_jax.evaluation.rounds import PLAIN, read_rounds
from dspark_jax.json_file import write_json, written_whole
from dspark_jax.run import Run

_TITLES = {"depth": "Accepted length by draft depth", "length": "Accepted length by draft length"}

Step = Callable[[Sequence[str], Mapping[str, str]], str | None]
"""(module and arguments, environment) -> what went wrong, or None."""


def compare(
    config: Config, workdir: Path, *, studies: str = ",".join(STUDIES), seeds: int = 1, step: Step | None = None
) -> None:
    """Runs what is still to do, and reports.

    Args:
      config: resolved; its drafter is the dspark that the other kinds are derived from.
      workdir: of the comparison, new or to be continued.
      studies: comma-separated.
      seeds: trainings of every drafter.
      step: runs a module in a process of its own; replaceable for tests.

    Raises:
      InputError: the config or a study cannot be used, or the data cannot be prepared.
      SystemExit: with status 1, after everything else, if a drafter failed; with 143 at SIGTERM.
    """
    run = Run(config, workdir)
    plan, now = make_plan(config, studies, seeds), contents(run)
    _check_runs(workdir, plan, now)
    workdir.mkdir(parents=True, exist_ok=True)
    with _ended_by_sigterm():
        failures = _compare(run, plan, seeds, now, step or run_module)
    if failures:
        raise SystemExit(1)


def _compare(run: Run, plan: Plan, seeds: int, now: dict[str, Any], step: Step) -> dict[str, str]:
    """The same with everything checked; returns what failed."""
    config, workdir = run.config, run.workdir
    settings = _write_settings(workdir, config)
    if error := step(["dspark_jax.prepare", "--config", str(settings), "--workdir", str(workdir)], {}):
        raise InputError(f"preparing the data failed: {error}")
    if data := run.prepared_fingerprint:
        now = {**now, "data": data}
    _check_runs(workdir, plan, now)
    _forget_outdated(workdir, plan, now)
    failures: dict[str, str] = {}
    whole = with_measured(plan, config, seeds, lambda name, sub: _is_current(workdir, name, sub, now))
    said = None
    for number, (name, sub) in enumerate(plan.runs.items(), 1):
        if said != (said := _forecast(workdir, plan, seeds)):
            _say(f"compare: {said}")
        if error := _finish_run(workdir, name, sub, now, step, f"{number}/{len(plan.runs)}"):
            failures[name] = error
            _say(f"compare: {name} failed: {error}")
        write_report(run, whole, failures, times={})
    times = _measure_times(run, whole, now, failures, step)
    report = write_report(run, whole, failures, times)
    print(_text(config, plan, report), flush=True)
    _draw(workdir, plan, report, _estimates(run, plan))
    return failures


def _forget_outdated(workdir: Path, plan: Plan, now: Mapping[str, Any]) -> None:
    """Removes measurements of other prompts or settings: figures of several seeds have the same prompts."""
    for name, sub in plan.runs.items():
        if not is_measured(_folder(workdir, name), sub, now):
            (_folder(workdir, name) / "rounds.npz").unlink(missing_ok=True)


def _forecast(workdir: Path, plan: Plan, seeds: int) -> str:
    """How long it will take."""
    found = {name: training_seconds(_folder(workdir, name), sub.train.steps) for name, sub in plan.runs.items()}
    finished = [name for name in plan.runs if (_folder(workdir, name) / "rounds.npz").exists()]
    return forecast(plan, seeds, finished, {name: one for name, one in found.items() if one is not None})


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit(143), so that what is under way is ended in order."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(STATUS)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_runs(workdir: Path, plan: Plan, now: Mapping[str, Any]) -> None:
    for name, sub in plan.runs.items():
        check_run(_folder(workdir, name), workdir, sub, now)


def _is_current(workdir: Path, name: str, config: Config, now: Mapping[str, Any]) -> bool:
    """Whether a run has been trained and measured as it would be now."""
    folder = _folder(workdir, name)
    try:
        check_run(folder, workdir, config, now)
        return is_measured(folder, config, now)
    except InputError:
        return False


def _finish_run(workdir: Path, name: str, config: Config, now: Mapping[str, Any], step: Step, where: str) -> str | None:
    """Trains and measures a run as far as that is still to do; returns what went wrong."""
    folder = _folder(workdir, name)
    rounds = folder / "rounds.npz"
    folder.mkdir(parents=True, exist_ok=True)
    finished = is_measured(folder, config, now)
    settings = _write_settings(folder, config)
    write_origin(folder, now)
    if finished:
        _say(f"compare: {where} {name} is finished")
        return None
    if not (folder / "data").exists():
        (folder / "data").symlink_to(os.path.relpath(workdir / "data", folder), target_is_directory=True)
    _say(f"compare: {where} {name}")
    if error := step(["dspark_jax.train", "--config", str(settings), "--workdir", str(folder)], {}):
        return error
    return _measure(folder, "rounds", {name: config}, rounds, workdir, step, {})


def _measure_times(
    run: Run, plan: Plan, now: Mapping[str, Any], failures: dict[str, str], step: Step
) -> dict[str, dict[str, float]]:
    """Time per round of a run of every drafter that did not fail, by its name; measured together, and again when a
    drafter has joined."""
    config, workdir = run.config, run.workdir
    if not config.eval.speed_prompts:
        return {}
    if kind := config.target.architecture.unsupported:
        _say(f"compare: the time of a round is not measured: a {kind} is run by PyTorch, request after request")
        return {}
    runs = {name: plan.runs[name] for name in dict.fromkeys(plan.timed(failures).values())}
    found = read_times(workdir, config, now)
    if runs and not {*runs, PLAIN} <= {name for name, one in found.items() if "error" not in one}:
        out = workdir / "times.json"
        out.unlink(missing_ok=True)  # the job, which says how it was measured, is about to be another one
        # On a CPU a number of threads; an accelerator stays what it measures.
        environment = {"NPROC": str(config.eval.speed_threads)} if config.eval.speed_threads else {}
        if error := _measure(workdir, "times", runs, out, workdir, step, environment, now["eval.prompts"]):
            failures["time per round"] = error
            return {}
        found = read_times(workdir, config, now)
    failures |= {f"time per round of {name}": found[name]["error"] for name in runs if "error" in found.get(name, {})}
    return round_times({name: one for name, one in found.items() if "error" not in one})


def _measure(
    folder: Path,
    task: str,
    runs: Mapping[str, Config],
    out: Path,
    workdir: Path,
    step: Step,
    environment: Mapping[str, str],
    prompts: Any = None,
) -> str | None:
    """Runs `evaluation.rounds` on a job; returns what went wrong."""
    described = {name: {"config": to_json(sub), "workdir": str(_folder(workdir, name))} for name, sub in runs.items()}
    job = folder / f"{task}_job.json"
    write_json(job, {"task": task, "out": str(out), "runs": described, "eval.prompts": prompts})
    return step(["dspark_jax.evaluation.rounds", str(job)], environment)


def _estimates(run: Run, plan: Plan) -> dict[str, TauEstimate]:
    """Of every drafter of which a run has been measured, by `Point.run`."""
    single, settings = dict[str, TauEstimate](), run.config.eval
    for name in plan.runs:
        path = _folder(run.workdir, name) / "rounds.npz"
        if path.exists():
            single[name] = estimate_tau(*read_rounds(path), settings.bootstrap, settings.seed)
    found = {}
    for point in plan.points:
        trainings = {plan.runs[name].train.seed: single[name] for name in point.runs if name in single}
        if len(point.runs) > 1 and trainings:
            found[point.run] = over_seeds(trainings)
        elif trainings:
            found[point.run] = single[point.run]
    return found


def write_report(
    run: Run, plan: Plan, failures: Mapping[str, str], times: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Writes `compare.json` from what has been measured so far, and returns its content."""
    config, estimates = run.config, _estimates(run, plan)
    main = {point.kind: estimates[point.run] for point in plan.of("main") if point.run in estimates}
    seeds = max(len(point.runs) for point in plan.points)
    baselines = BASELINES if seeds == 1 else (SEED_BASELINE, *BASELINES)
    timed = plan.timed(failures)
    drafters = {
        point.kind: describe(main[point.kind], main, times.get(timed.get(point.run, "")), baselines)
        | ({} if seeds == 1 else {"parameters": parameters(plan.runs[point.run])})
        for point in plan.of("main")
        if point.kind in main
    }
    beside = {study: _by_value(plan, study, estimates) for study in STUDIES[1:] if plan.of(study)}
    studies = {
        study: [
            {"drafter": point.kind, study: point.value, "run": point.run}
            | describe(estimates[point.run], beside[study][point.value], times.get(timed.get(point.run, "")))
            for point in plan.of(study)
            if point.run in estimates
        ]
        for study in beside
    }
    report = {
        "name": config.name,
        "temperature": config.eval.temperatures[0],
        "max_new_tokens": config.eval.max_new_tokens,
        "steps": config.train.steps,
        **({} if seeds == 1 else {"seeds": seeds, "method": method(seeds, config, drafters.values())}),
        "drafters": drafters,
        "plain": times.get(PLAIN),
        "studies": studies,
        "growth": {study: growth(values) for study, values in beside.items()},
        "failures": dict(failures),
    }
    return write_json(run.workdir / "compare.json", report)


def _by_value(plan: Plan, study: str, estimates: Mapping[str, TauEstimate]) -> dict[int, dict[str, TauEstimate]]:
    """Estimates of a study by depth or draft length and kind: of one value they are compared with each other."""
    found: dict[int, dict[str, TauEstimate]] = {}
    for point in plan.of(study):
        if point.run in estimates:
            found.setdefault(point.value, {})[point.kind] = estimates[point.run]
    return found


def _draw(workdir: Path, plan: Plan, report: Mapping[str, Any], estimates: Mapping[str, TauEstimate]) -> None:
    """Writes the figures of the plan's studies into `compare/`; those of others are there already."""
    folder = workdir / "compare"
    folder.mkdir(exist_ok=True)
    main = {point.kind: estimates[point.run] for point in plan.of("main") if point.run in estimates}
    plots = conditional_plots(main)
    if any("tau_by_seed" in entry for entry in report["drafters"].values()):
        plots.append(tau_plot(report["drafters"], "Accepted length, mean over the prompt sets"))
    timed = {name: entry for name, entry in report["drafters"].items() if "round_ms" in entry}
    if main and timed:
        plain = {PLAIN: report["plain"]} if report["plain"] else {}
        plots.append(time_plot({**timed, **plain}, "Time per round at batch 1"))
    studies = {study: points for study, points in report["studies"].items() if points and plan.of(study)}
    plots += [study_plot(points, study, _TITLES[study]) for study, points in studies.items()]
    for plot in plots:
        plot.write(folder)


def _text(config: Config, plan: Plan, report: Mapping[str, Any]) -> str:
    """What is printed at the end."""
    title = f"{config.name}: {config.train.steps} steps each, temperature {report['temperature']}"
    lines = []
    if plan.of("main"):
        lines.append(table(report["drafters"], report["failures"], title))
    studies = {study: points for study, points in report["studies"].items() if plan.of(study)}
    lines += [
        f"\n{_TITLES[study]}\n{study_table(points, report['growth'][study], study)}"
        for study, points in studies.items()
    ]
    lines += [f"failed: {name}: {error}" for name, error in report["failures"].items() if not plan.of("main")]
    return "\n".join([*lines, *report.get("method", ())])


def _folder(workdir: Path, name: str) -> Path:
    return workdir / "drafters" / name


def _write_settings(folder: Path, config: Config) -> Path:
    """The config as a file that commands read with `--config`."""
    path = folder / "settings.json"
    with written_whole(path) as temporary:
        temporary.write_text(to_json(config), "utf-8")
    return path


def _say(line: str) -> None:
    """A line on stderr. Not `progress.log`: asking for the process index would take the accelerator."""
    print(line, file=sys.stderr, flush=True)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "studies", ",".join(STUDIES), "What to compare, comma-separated: main, depth, length.", flag_values=values
    )
    text = "Trainings of every drafter, with seeds from train.seed on; 3 show what is chance."
    flags.DEFINE_integer("seeds", 1, text, flag_values=values)


if __name__ == "__main__":
    command.run(compare, define=_define, distributed=False, buckets=False)
