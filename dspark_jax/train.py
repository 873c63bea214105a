"""Trains a drafter for a frozen target, then evaluates it.

    python -m dspark_jax.train --config configs/quickstart.py

prepares the data if it is missing, trains, and evaluates the last checkpoint. Started again, it continues from the
newest checkpoint, with the losses it would have had; SIGTERM makes it write one before it ends. Writes in the working
directory: `data/`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `config.json` and `eval/`.

`--config.train.refresh_every=1000` starts with the answers to a part of the prompts; every so many steps the drafter
that is being trained helps the target to answer the next part (`refresh/` in the working directory).

`--config.train.evaluate_every=1000` measures accepted length on held-out prompts while it trains (`heldout/...` in
`metrics.jsonl` and TensorBoard) and keeps the best checkpoint beside the newest ones: `--checkpoint best` of the other
commands.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dspark_jax import command
from dspark_jax.attached import STATUS
from dspark_jax.config import Config, InputError, to_json
from dspark_jax.data.features import CachedSamples, frozen_file
from dspark_jax.data.growth import GrowingBatches
from dspark_jax.data.pipeline import MicroBatches, batches
from dspark_jax.data.sources import SampleReader
from dspark_jax.drafter.interface import Drafter
from dspark_jax.evaluation.held_out import HeldOutPrompts, check_held_out
from dspark_jax.evaluation.setup import check_questions
from dspark_jax.json_file import read_ours
from dspark_jax.metrics import values
from dspark_jax.prepare import prepare_run
from dspark_jax.progress import MetricsWriter, Progress, check_wandb, log
from dspark_jax.refresh import Refresh, check_refresh
from dspark_jax.run import Run
from dspark_jax.sharding import bytes_per_device
from dspark_jax.start import begin_layers, check_start, fresh_state, tell_other_target
from dspark_jax.target.decode_weights import training_weights
from dspark_jax.target.frozen import load_frozen
from dspark_jax.target.loading import compute_dtype, load_target
from dspark_jax.training.best import HeldOut
from dspark_jax.training.checkpoint import Checkpoints, check_continuation, saved_config
from dspark_jax.training.feature_cache import open_features
from dspark_jax.training.host_memory import check_host_memory, describe_feature_memory, return_freed_memory
from dspark_jax.training.layer_start import TARGET
from dspark_jax.training.micro_steps import MicroSteps
from dspark_jax.training.optim import learning_rate, make_optimizer
from dspark_jax.training.padding import describe_padding
from dspark_jax.training.preemption import Preemption
from dspark_jax.training.state import abstract_drafter, init_state, state_layout, to_module, to_params
from dspark_jax.training.step import (
    FINITE,
    StepMetrics,
    add_metrics,
    batch_layout,
    check_batch,
    make_train_step,
    place_batch,
)
from dspark_jax.training.vocabulary import FILE as VOCABULARY_FILE
from dspark_jax.training.vocabulary import begin_head, fill_vocabulary, known_vocabulary


def train(config: Config, workdir: Path) -> None:
    """Trains from data to checkpoints and evaluation.

    Args:
      config: resolved.
      workdir: of this run, new or to be continued.

    Raises:
      InputError: something given cannot be used, the disk is full, or the loss stopped being finite.
      SystemExit: SIGTERM came while it trained; a checkpoint is written.
    """
    workdir = Path(workdir)
    if config.drafter.draft_vocab_size:
        config = known_vocabulary(config, saved_config(workdir))
    run = Run(config, workdir)
    check_batch(config, run.mesh)
    check_host_memory(config, run.mesh)
    if config.train.evaluate or config.train.evaluate_every:
        check_questions(config)
    if config.train.evaluate_every:
        check_held_out(run)
    check_wandb(config.train.wandb_project)
    check_refresh(config)
    if not check_continuation(run):
        config = check_start(config)
        run = run if config is run.config else dataclasses.replace(run, config=config)
    prepare_run(run)
    drafter = run.config.drafter
    if drafter.draft_vocab_size and not (drafter.draft_vocabulary and (workdir / VOCABULARY_FILE).exists()):
        filled, said = fill_vocabulary(run.config, SampleReader(run.data_folder), workdir)
        run = dataclasses.replace(run, config=filled)
        log(said)
    with Checkpoints(run) as checkpoints, jax.set_mesh(run.mesh):
        fit(run, checkpoints)
    if config.train.evaluate:
        from dspark_jax.evaluate import evaluate_run  # only this one command runs after another

        evaluate_run(run)


def fit(run: Run, checkpoints: Checkpoints) -> None:
    """Runs the optimizer steps that are still to do, under `jax.set_mesh(run.mesh)`."""
    config, mesh = run.config, run.mesh
    steps, every = config.train.steps, config.train.checkpoint_every
    cached = config.data.features != "online"
    latest = checkpoints.latest()
    start = latest or 0
    if start > steps:
        raise InputError(
            f"{checkpoints.path(start)}: {start} steps are done, and train.steps={steps} asks for fewer; "
            "give at least as many, or use another --workdir"
        )
    if start == steps:
        _state_config(run)
        log(f"training is finished: {checkpoints.path(start)} is the last of {steps} steps; raise train.steps to go on")
        return
    data = _open_data(run)

    # The state: fresh, with imported parameters, or that of the newest checkpoint.
    drafter = abstract_drafter(config)
    optimizer = make_optimizer(config.optim, steps)
    layout = state_layout(drafter, optimizer, mesh)
    if latest is None:
        tell_other_target(run)
        state = fresh_state(run, optimizer)
    else:
        start, state, position = checkpoints.restore(layout)
        if start:
            data.set_state(position)
            log(f"continuing from step {start}: {checkpoints.path(start)}")
        else:
            state = dataclasses.replace(init_state(config, optimizer, mesh), params=state.params)
            log(f"starting from the imported parameters of {checkpoints.path(0)}")
    _state_config(run)

    # The step, compiled before the clock starts.
    fresh = latest is None and not config.train.init_from
    from_target = fresh and config.drafter.init_layers == TARGET
    whole: Any = load_target(config.target, mesh) if from_target or not cached else None
    if from_target:
        state = begin_layers(state, whole, config.drafter)
    if cached:
        del whole
        where, dtype = frozen_file(run.feature_folder), compute_dtype(config.target.dtype)
        target: Any = load_frozen(where, config.target.architecture, mesh, dtype)
    else:
        target = training_weights(whole)
    if fresh:
        state = begin_head(state, drafter, target)
    frozen = to_params(target)
    held_out = None
    if config.train.evaluate_every:
        verifier = load_target(config.target, mesh) if cached else target
        held_out = HeldOutPrompts(run, verifier, held=bytes_per_device((state, frozen, verifier)))
    refresh = None
    if isinstance(data, GrowingBatches):
        refresh = Refresh(run, target, drafter, data, held=bytes_per_device((state, frozen)))
    began = time.monotonic()
    return_freed_memory()
    if cached:
        run_step: Any = MicroSteps(config, drafter, target, optimizer, mesh)
        run_step.compile(state, frozen)
    else:
        step_function = make_train_step(config, drafter, target, optimizer, mesh)
        run_step = step_function.lower(state, frozen, batch_layout(config, mesh)).compile()
    return_freed_memory()
    trainable = sum(leaf.size for leaf in state.params.values())
    log(
        f"training {config.name}: steps {start + 1}..{steps}, {config.train.batch_size} sequences each, "
        f"{trainable / 1e6:.2f} M parameters, {mesh.size} devices, compiled in {time.monotonic() - began:.0f} s"
    )

    preemption = Preemption()
    writing = MetricsWriter(run.workdir, start=start, wandb_project=config.train.wandb_project, name=config.name)
    with Progress("train", steps, done=start) as progress, writing as writer, preemption:
        training_log = TrainingLog(config, checkpoints, progress, writer)
        for step in range(start + 1, steps + 1):
            while refresh and refresh.due(step):
                checkpoints.wait()  # from which a run goes on that is killed while the prompts are answered
                training_log.grow(refresh, step, to_module(drafter, state.params), preemption)
            batch = next(data) if cached else place_batch(next(data), config.train.accumulate, mesh)
            state, metrics = run_step(state, frozen, batch)
            training_log.add(step, metrics)
            leaving = preemption.reached(step)
            # Rows also end at checkpoints: a continued run then starts its first row where this one would.
            at_checkpoint = step % every == 0 or step == steps or leaving
            at_checkpoint |= refresh is not None and refresh.due(step + 1)
            if step % config.train.log_every == 0 or at_checkpoint:
                training_log.end_row()
            if at_checkpoint:
                training_log.flush()  # a state that is not finite is never saved
                measured = None
                if held_out and not leaving and (step % config.train.evaluate_every == 0 or step == steps):
                    measured = training_log.measure(held_out, step, to_module(drafter, state.params))
                checkpoints.save(step, state, data.get_state(), measured)
            progress.update(step)
            if leaving:
                checkpoints.wait()
                log(f"told to stop: {checkpoints.path(step)} is written, the same command continues from it")
                raise SystemExit(STATUS)
    best = checkpoints.best()
    if best is not None:
        tau = checkpoints.measured[best].tau
        log(f"best on held-out prompts: {checkpoints.path(best)} with tau {tau:.3f}; --checkpoint best takes it")


def _state_config(run: Run) -> None:
    """Writes the config that the run has from now on."""
    if jax.process_index() == 0:
        (run.workdir / "config.json").write_text(to_json(run.config))


def _open_data(run: Run) -> Any:
    """The batches of this process: an iterator with a state, of arrays, or of micro-batches with features from disk."""
    config = run.config
    make = functools.partial(
        batches,
        batch_size=config.train.batch_size,
        max_length=config.data.max_length,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=config.data.workers,
        pack=config.data.pack,
    )
    if config.train.refresh_every:
        return GrowingBatches(run.workdir, lambda samples, seed: make(samples, seed=seed), config.train.seed)
    samples = open_features(run) if config.data.features != "online" else SampleReader(run.data_folder)
    data = make(samples, seed=config.train.seed)
    report, mesh = read_ours(run.data_folder / "report.json"), run.mesh.shape
    ways = mesh["data"] * mesh["fsdp"]
    if padding := describe_padding(config, report.get("samples", 0), report.get("tokens", 0), ways):
        log(padding)
    if isinstance(samples, CachedSamples):
        log(describe_feature_memory(config, run.mesh))
        return MicroBatches(data, config.train.accumulate, config.data.workers)
    return data


class TrainingLog:
    """Sums the steps' metrics on the device, a row at a time, and fetches a row while the next one is running."""

    def __init__(self, config: Config, checkpoints: Checkpoints, progress: Progress, writer: MetricsWriter):
        """Rows go to `writer`, the main numbers to `progress`."""
        self.config, self.checkpoints, self.progress, self.writer = config, checkpoints, progress, writer
        self.rate = learning_rate(config.optim, config.train.steps)
        self.sums: StepMetrics | None = None
        self.step = self.steps = 0
        self.waiting: tuple[int, int, StepMetrics] | None = None
        self.since = time.monotonic()

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Counts step `step` (from 1) into the current row."""
        self.step, self.steps = step, self.steps + 1
        self.sums = metrics if self.sums is None else add_metrics(self.sums, metrics)

    def end_row(self) -> None:
        """Ends the current row and writes the one before it, whose steps are done or nearly so."""
        self.flush()
        if self.sums is not None:
            self.waiting = (self.step, self.steps, self.sums)
            self.sums, self.steps = None, 0

    def flush(self) -> None:
        """Waits for the last ended row and writes it.

        Raises:
          InputError: a loss or gradient in it is not finite.
        """
        if self.waiting is None:
            return
        step, steps, sums = self.waiting
        self.waiting = None
        sums = jax.device_get(sums)
        seconds, self.since = time.monotonic() - self.since, time.monotonic()
        ratios = dict(sums.ratios)
        tokens = float(ratios.pop("tokens").num)
        found = values(ratios)
        row = {name: found[name] for name in sorted(found, key=lambda name: (name not in _FIRST, name))}
        row["learning_rate"] = float(np.asarray(self.rate(step - 1)))
        row["tokens_per_second"] = tokens / seconds
        row["seconds_per_step"] = seconds / steps
        self.writer.write(step, row)
        self.progress.update(self.progress.done, _headline(row))
        if sums.not_finite != FINITE:
            self._stop(int(sums.not_finite), of_target=bool(sums.target_not_finite <= sums.not_finite))

    def measure(self, held_out: HeldOutPrompts, step: int, drafter: Drafter) -> HeldOut | None:
        """Writes what held-out prompts show of the drafter after step `step`; that takes no time of the rows'."""
        began = time.monotonic()
        row, measured = held_out.measure(drafter)
        self.writer.write(step, row)
        shown = ", ".join(
            f"{name.removeprefix('heldout/')} {value:.2f}" for name, value in row.items() if "tau" in name
        )
        self.progress.print(f"held-out prompts after step {step}: {shown or 'no round of drafting'}")
        self.since += time.monotonic() - began
        return measured

    def grow(self, refresh: Refresh, step: int, drafter: Drafter, preemption: Preemption) -> None:
        """Lets the target answer more prompts before step `step`; that takes no time of the rows'.

        Raises:
          SystemExit: SIGTERM came meanwhile.
        """
        began = time.monotonic()

        def check() -> None:
            if preemption.noted:
                log("told to stop: the same command continues from the last checkpoint")
                raise SystemExit(STATUS)

        said, row = refresh.run(step, drafter, check)
        self.writer.write(step, row)
        self.progress.print(said)
        self.since += time.monotonic() - began

    def _stop(self, step: int, *, of_target: bool) -> None:
        self.checkpoints.wait()
        last = self.checkpoints.latest()
        good = (
            f"the last good checkpoint is {self.checkpoints.path(last)}"
            if last is not None
            else "there is no checkpoint yet"
        )
        what, remedy = not_finite(self.config, step, of_target=of_target)
        raise InputError(f"{what}; {good}; {remedy}")


def not_finite(config: Config, step: int, *, of_target: bool) -> tuple[str, str]:
    """What is not finite at a step, the target's features or else the loss, and what is to be done."""
    data, loss = "look at the data of that step", f"loss or gradient is not finite at step {step}"

    def wider(field: str, dtype: str) -> str:
        return data if np.dtype(compute_dtype(dtype)) == np.float32 else f"set {field}={dtype} to float32, or {data}"

    if of_target and config.data.features == "online":
        what = (
            f"the target's features are not finite at step {step}, though its weights are"  # `load_target` has looked
        )
        return what, wider("target.dtype", config.target.dtype)
    if of_target:
        return f"the target's features on disk are not finite at step {step}", "remove features/ and prepare it again"
    if step == 1:
        return f"{loss}, before anything is learned", wider("drafter.dtype", config.drafter.dtype)
    return loss, f"lower optim.learning_rate={config.optim.learning_rate} or {data}"


_FIRST = ("loss", "ce", "tv", "confidence", "tau_expected")


def _headline(row: Mapping[str, float]) -> dict[str, float | str]:
    """What the bar shows of a row."""
    shown = {"loss": ("loss", ".3f"), "tau": ("tau_expected", ".2f"), "tokens/s": ("tokens_per_second", ".0f")}
    return {title: format(row[name], form) for title, (name, form) in shown.items() if name in row}


if __name__ == "__main__":
    command.run(train)
