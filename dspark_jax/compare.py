"""Trains several drafters on the same data for the same steps, and compares them.

    python -m dspark_jax.compare --config configs/compare_quickstart.py
    python -m dspark_jax.compare --config configs/compare_quickstart.py --studies main

Studies: `main` (accepted length by prompt set, gains over DFlash and EAGLE-3, acceptance by position, time per round),
`depth` (draft layers) and `length` (draft tokens per round); which drafters take part is in `config.compare`.

Data is prepared once. Every drafter is a run of its own below `drafters/`, trained and measured in processes of its
own: one that fails is reported and loses nothing of the others (the exit status is then 1). Started again, `compare`
continues where it stopped; what is finished is not repeated. Writes `compare.json` (after every drafter) and
`compare/*.png` with the JSON behind them.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dspark_jax import command
from dspark_jax.config import CompareConfig, Config, InputError, resolve, to_json
from dspark_jax.evaluation.comparison import Standing, describe, round_times, standing, study_table, table
from dspark_jax.evaluation.comparison_plots import conditional_plots, study_plot, time_plot
from dspark_jax.evaluation.rounds import PLAIN, read_rounds
from dspark_jax.evaluation.summary import write_json
from dspark_jax.kinds import as_kind

STUDIES = ("main", "depth", "length")
_TITLES = {"depth": "Accepted length by draft depth", "length": "Accepted length by draft length"}

Step = Callable[[Sequence[str], Mapping[str, str]], str | None]
"""(module and arguments, environment) -> what went wrong, or None."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A drafter in a study.

    Attributes:
      study: one of `STUDIES`.
      kind: of drafter.
      value: its depth or draft length, 0 in the main table.
      run: name of the run; runs of equal settings are shared.
    """

    study: str
    kind: str
    value: int
    run: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be trained: resolved configs by run, and where each run appears."""

    runs: Mapping[str, Config]
    points: Sequence[Point]

    def of(self, study: str) -> list[Point]:
        """The points of a study."""
        return [point for point in self.points if point.study == study]


def compare(config: Config, workdir: Path, *, studies: str = ",".join(STUDIES), step: Step | None = None) -> None:
    """Runs what is still to do, and reports.

    Args:
      config: resolved; its drafter is the dspark that the other kinds are derived from.
      workdir: of the comparison, new or to be continued.
      studies: comma-separated.
      step: runs a module in a process of its own; replaceable for tests.

    Raises:
      InputError: the config or a study cannot be used, or the data cannot be prepared.
      SystemExit: with status 1, after everything else, if a drafter failed.
    """
    step = step or run_module
    plan = make_plan(config, studies)
    for name, sub in plan.runs.items():
        _check_settings(_folder(workdir, name) / "settings.json", sub)
    workdir.mkdir(parents=True, exist_ok=True)
    settings = _write_settings(workdir, config)
    if error := step(["dspark_jax.prepare", "--config", str(settings), "--workdir", str(workdir)], {}):
        raise InputError(f"preparing the data failed: {error}")
    failures: dict[str, str] = {}
    for number, (name, sub) in enumerate(plan.runs.items(), 1):
        if error := _finish_run(workdir, name, sub, step, f"{number}/{len(plan.runs)}"):
            failures[name] = error
            _say(f"compare: {name} failed: {error}")
        write_report(config, workdir, plan, failures, times={})
    times = _measure_times(config, workdir, plan, failures, step)
    report = write_report(config, workdir, plan, failures, times)
    _draw(workdir, plan, report, _standings(config, workdir, plan))
    print(_text(config, plan, report), flush=True)
    if failures:
        raise SystemExit(1)


def make_plan(config: Config, studies: str) -> Plan:
    """The runs of some studies, in the order in which they are trained.

    Raises:
      InputError: an unknown study or drafter, or one that the config cannot be turned into.
    """
    chosen = [name.strip() for name in studies.split(",") if name.strip()]
    for name in chosen:
        if name not in STUDIES:
            raise InputError(f"--studies={studies}: {name!r} is unknown; use some of: {','.join(STUDIES)}")
    if not chosen:
        raise InputError(f"--studies is empty; use some of: {','.join(STUDIES)}")
    if config.drafter.kind != "dspark":
        raise InputError(
            f"drafter.kind={config.drafter.kind!r}: state a dspark drafter, the others are derived from it"
        )
    wanted = config.compare
    runs: dict[str, Config] = {}
    points: list[Point] = []

    def add(study: str, kind: str, value: int, **fields: int) -> None:
        sub = as_kind(dataclasses.replace(config, drafter=dataclasses.replace(config.drafter, **fields)), kind)
        name = kind + "".join(f"-{field}{number}" for field, number in fields.items())
        train = dataclasses.replace(sub.train, evaluate=False)
        # Who else is compared changes nothing about a run: it stays finished when that does.
        sub = resolve(dataclasses.replace(sub, train=train, compare=CompareConfig()))
        same = [other for other, planned in runs.items() if _essence(planned) == _essence(sub)]
        if not same:
            runs[name] = dataclasses.replace(sub, name=f"{config.name}_{name}")
        points.append(Point(study, kind, value, same[0] if same else name))

    for study in sorted(set(chosen), key=STUDIES.index):
        if study == "main":
            for kind in wanted.drafters:
                add(study, kind, 0)
        elif study == "depth":
            for depth in wanted.depths:
                for kind in wanted.depth_drafters:
                    add(study, kind, depth, num_layers=depth)
        else:
            for length in wanted.lengths:
                for kind in wanted.length_drafters:
                    add(study, kind, length, block_size=length)
    return Plan(runs, points)


def _essence(config: Config) -> Any:
    return dataclasses.asdict(dataclasses.replace(config, name=""))


def run_module(arguments: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Runs `python -m ARGUMENTS`, showing its output; returns its last words if it failed.

    Raises:
      KeyboardInterrupt: it was interrupted.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )
    last: deque[str] = deque(maxlen=50)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            sys.stderr.write(line)
            last.append(line.strip())
        status = process.wait()
    finally:
        if process.poll() is None:  # we are leaving early: nobody else would stop it
            process.terminate()
    if status in (130, -2):
        raise KeyboardInterrupt
    if not status:
        return None
    said = [line for line in last if line]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    if status < 0:
        return f"killed by signal {-status}, perhaps for its memory ({arguments[0]})"
    reason = errors[-1] if errors else said[-1] if said else "no message"
    return f"{reason} ({arguments[0]}, status {status})"


def _check_settings(path: Path, config: Config) -> None:
    """Refuses to continue a run that was trained in another way: nothing would be on equal terms any more."""
    if not path.exists():
        return
    before, now = json.loads(path.read_text("utf-8")), json.loads(to_json(config))
    for group in ("target", "drafter", "data", "loss", "optim", "train"):
        for field, value in now[group].items():
            if field in before[group] and before[group][field] != value:
                raise InputError(
                    f"{path.parent}: {group}.{field} was {before[group][field]!r}, now {value!r}; "
                    "compare with the old value, or use another --workdir"
                )


def _finish_run(workdir: Path, name: str, config: Config, step: Step, where: str) -> str | None:
    """Trains and measures a run as far as that is still to do; returns what went wrong."""
    folder = _folder(workdir, name)
    rounds, before = folder / "rounds.npz", folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    if rounds.exists() and before.exists() and before.read_text("utf-8") == to_json(config):
        _say(f"compare: {where} {name} is finished")
        return None
    rounds.unlink(missing_ok=True)
    settings = _write_settings(folder, config)
    if not (folder / "data").exists():
        (folder / "data").symlink_to(os.path.relpath(workdir / "data", folder), target_is_directory=True)
    _say(f"compare: {where} {name}")
    if error := step(["dspark_jax.train", "--config", str(settings), "--workdir", str(folder)], {}):
        return error
    return _measure(folder, "rounds", {name: config}, rounds, workdir, step, {})


def _measure_times(
    config: Config, workdir: Path, plan: Plan, failures: dict[str, str], step: Step
) -> dict[str, dict[str, float]]:
    """Time per round of all runs that did not fail, measured together; measured again when a run has joined."""
    runs = {name: sub for name, sub in plan.runs.items() if name not in failures}
    out = workdir / "times.json"
    found = json.loads(out.read_text("utf-8")) if out.exists() else {}
    if runs and set(found) != {*runs, PLAIN}:
        threads = config.eval.speed_threads
        environment = {"NPROC": str(threads), "JAX_PLATFORMS": "cpu"} if threads else {}
        if error := _measure(workdir, "times", runs, out, workdir, step, environment):
            failures["time per round"] = error
            return {}
        found = json.loads(out.read_text("utf-8"))
    return round_times(found)


def _measure(
    folder: Path,
    task: str,
    runs: Mapping[str, Config],
    out: Path,
    workdir: Path,
    step: Step,
    environment: Mapping[str, str],
) -> str | None:
    """Runs `evaluation.rounds` on a job; returns what went wrong."""
    described = {name: {"config": to_json(sub), "workdir": str(_folder(workdir, name))} for name, sub in runs.items()}
    job = folder / f"{task}_job.json"
    write_json(job, {"task": task, "out": str(out), "runs": described})
    return step(["dspark_jax.evaluation.rounds", str(job)], environment)


def _standings(config: Config, workdir: Path, plan: Plan) -> dict[str, Standing]:
    """Of every run that has been measured."""
    found = {}
    for name in plan.runs:
        path = _folder(workdir, name) / "rounds.npz"
        if path.exists():
            found[name] = standing(*read_rounds(path), config.eval.bootstrap, config.eval.seed)
    return found


def write_report(
    config: Config, workdir: Path, plan: Plan, failures: Mapping[str, str], times: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Writes `compare.json` from what has been measured so far, and returns its content."""
    standings = _standings(config, workdir, plan)
    main = {point.kind: standings[point.run] for point in plan.of("main") if point.run in standings}
    drafters = {
        point.kind: describe(main[point.kind], main, times.get(point.run))
        for point in plan.of("main")
        if point.kind in main
    }
    studies = {
        study: [
            {"drafter": point.kind, study: point.value, "run": point.run}
            | describe(standings[point.run], {}, times.get(point.run))
            for point in plan.of(study)
            if point.run in standings
        ]
        for study in STUDIES[1:]
        if plan.of(study)
    }
    report = {
        "name": config.name,
        "temperature": config.eval.temperatures[0],
        "max_new_tokens": config.eval.max_new_tokens,
        "steps": config.train.steps,
        "drafters": drafters,
        "plain": times.get(PLAIN),
        "studies": studies,
        "failures": dict(failures),
    }
    return write_json(workdir / "compare.json", report)


def _draw(workdir: Path, plan: Plan, report: Mapping[str, Any], standings: Mapping[str, Standing]) -> None:
    """Writes the figures into `compare/`."""
    folder = workdir / "compare"
    folder.mkdir(exist_ok=True)
    main = {point.kind: standings[point.run] for point in plan.of("main") if point.run in standings}
    plots = conditional_plots(main)
    timed = {name: entry for name, entry in report["drafters"].items() if "round_ms" in entry}
    if timed:
        plain = {PLAIN: report["plain"]} if report["plain"] else {}
        plots.append(time_plot({**timed, **plain}, "Time per round at batch 1"))
    plots += [study_plot(points, study, _TITLES[study]) for study, points in report["studies"].items() if points]
    for plot in plots:
        plot.write(folder)


def _text(config: Config, plan: Plan, report: Mapping[str, Any]) -> str:
    """What is printed at the end."""
    title = f"{config.name}: {config.train.steps} steps each, temperature {report['temperature']}"
    lines = []
    if plan.of("main"):
        lines.append(table(report["drafters"], report["failures"], title))
    lines += [f"\n{_TITLES[study]}\n{study_table(points, study)}" for study, points in report["studies"].items()]
    lines += [f"failed: {name}: {error}" for name, error in report["failures"].items() if not plan.of("main")]
    return "\n".join(lines)


def _folder(workdir: Path, name: str) -> Path:
    return workdir / "drafters" / name


def _write_settings(folder: Path, config: Config) -> Path:
    """The config as a file that commands read with `--config`."""
    path = folder / "settings.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(to_json(config), "utf-8")
    os.replace(temporary, path)
    return path


def _say(line: str) -> None:
    """A line on stderr. Not `progress.log`: asking for the process index would take the accelerator."""
    print(line, file=sys.stderr, flush=True)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "studies", ",".join(STUDIES), "What to compare, comma-separated: main, depth, length.", flag_values=values
    )


if __name__ == "__main__":
    command.run(compare, define=_define)
