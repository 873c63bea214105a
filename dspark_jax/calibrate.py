"""Fits the temperatures that make the drafter's confidences true (sequential temperature scaling, STS).

    python -m dspark_jax.calibrate --config configs/quickstart.py --workdir runs/quickstart_dspark

decodes held-out prompts with a checkpoint of the working directory (the newest, or that of `--checkpoint`), all drafts
verified, at every sampling temperature; fits one temperature per block position on half of the prompts; and prints how
well raw and calibrated confidences hold on the other half, by position: calibration error (ECE), AUC and Brier score.
Beside them are a shared bias that may be added to the head before, and the running estimate that needs no head.

Writes `calibration.json` in the layout that SGLang reads (`--speculative-dspark-confidence-sts-path`), with the bias
and its temperatures beside it, which `generate` uses, and the step of the checkpoint; for sampling temperature 1, or
the first one, and `calibration_t0.7.json` and so on for others. Everything that was measured goes to
`eval/calibration*.json`, and the reliability before and after to `eval/reliability*.png`. A calibration holds for the
sampling temperature that it was fitted at.
"""

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from dspark_jax import command
from dspark_jax.config import Config, InputError
from dspark_jax.data.samples import Tally
from dspark_jax.evaluation.decoding import Decoder, answer
from dspark_jax.evaluation.plots import reliability_plots
from dspark_jax.evaluation.predictors import (
    CALIBRATED,
    HEAD,
    Calibration,
    calibration_data,
    calibration_table,
    compare_predictors,
)
from dspark_jax.evaluation.setup import check_prompt_files, open_decoder, read_questions, tell_left_out
from dspark_jax.evaluation.traces import Traces, record
from dspark_jax.json_file import write_json
from dspark_jax.kinds import KINDS
from dspark_jax.progress import Progress, log
from dspark_jax.registry import listed
from dspark_jax.run import Run
from dspark_jax.training.best import NEWEST
from dspark_jax.training.checkpoint import saved_config

PREFERRED = 1.0
"""The sampling temperature whose calibration gets the plain file name."""
FEW = 500
"""Rounds below which a calibration comes with a warning. With so many an ECE of 6 % is chance (20 bins, confidences
evenly spread; 10 % with 200, 33 % with 4), and later positions see a fraction of the rounds."""


def calibrate(
    config: Config,
    workdir: Path,
    *,
    mesh: Mesh | None = None,
    decoder: Decoder | None = None,
    temperatures: Sequence[str | float] = (),
    fit_on: str = "heldout",
    checkpoint: str = NEWEST,
) -> dict[float, dict[str, Any]]:
    """Calibrates a checkpoint of `workdir`, or models that are loaded already.

    Args:
      config: resolved; `target`, `eval`, and of `data` the system prompt and the prompt limit are used.
      workdir: of the training run.
      mesh: of the models; that of the config if None.
      decoder: models that are loaded already, or None to load the newest checkpoint.
      temperatures: sampling temperatures; none: those of `config.eval`.
      fit_on: `heldout` fits on half of the held-out prompts and scores on the other half; `train` fits on training
        prompts, as many per file as `eval.limit` says, and scores on all held-out prompts.
      checkpoint: `newest`, `best` or a step, see `training.checkpoint.load_drafter`.

    Returns:
      Sampling temperature -> content of its calibration file.

    Raises:
      InputError: there is no checkpoint for this target, no confidence head, or prompts cannot be used.
    """
    sampled = _temperatures(temperatures or config.eval.temperatures)
    check_prompt_files(config.eval.prompts, "eval.prompts")
    if fit_on == "train":
        check_prompt_files(config.data.prompts, "data.prompts")
    run = Run(config, Path(workdir), mesh)
    given = decoder
    decoder = open_decoder(run, checkpoint=checkpoint) if given is None else given
    if not decoder.models.confident:
        kind = ((saved_config(run.workdir, checkpoint) if given is None else None) or config).drafter.kind
        able = listed(repr(name) for name, other in KINDS.items() if other.has_heads)
        others = f"drafter.kind={able}, no other kind has one"
        remedy = "drafter.confidence_head=True" if KINDS[kind].has_heads else others
        raise InputError(
            f"{run.workdir}: its drafter (kind {kind!r}) has no confidence head to calibrate; train one with {remedy}"
        )
    primary = jax.process_index() == 0
    folder = run.eval_folder
    folder.mkdir(parents=True, exist_ok=True)
    rejected = folder / "rejected.jsonl"
    with contextlib.closing(Tally(rejected if primary else Path(os.devnull))) as tally, jax.set_mesh(run.mesh):
        traces = decode(config, decoder, tally, sampled, fit_on)
    written = {}
    if primary:
        tell_left_out("calibrate", tally, rejected)
        for number, (temperature, (fit, scored)) in enumerate(zip(sampled, traces, strict=True)):
            calibration = compare_predictors(fit, scored, seed=config.eval.seed)
            _warn_if_few(fit, fit_on)
            if number:
                print()
            suffix = "" if temperature == _main(sampled) else f"_t{temperature:g}"
            names = ", ".join(fit.set_names)
            content = sglang(calibration, names) | {"step": decoder.step}
            written[temperature] = write_json(run.workdir / f"calibration{suffix}.json", content)
            data = write_json(folder / f"calibration{suffix}.json", calibration_data(calibration))
            title = f"{config.name}, temperature {temperature:g}"
            for plot in reliability_plots(calibration, title, suffix):
                plot.write(folder)
            print(calibration_table(data, title), flush=True)
    return written


def decode(
    config: Config, decoder: Decoder, tally: Tally, temperatures: Sequence[float], fit_on: str
) -> list[tuple[Traces, Traces]]:
    """Rounds to fit on and rounds of other prompts to score, for every sampling temperature.

    Raises:
      InputError: one of the two is empty.
    """
    settings = config.eval
    groups = [read_questions(config, decoder, tally, settings.prompts, settings.limit)]
    if fit_on == "train":
        limit = min((n for n in (settings.limit, config.data.limit) if n), default=0)
        groups.append(read_questions(config, decoder, tally, config.data.prompts, limit))
    total = sum(len(one.questions) for asked, _ in groups for one in asked) * len(temperatures)
    pairs = []
    with Progress("calibrate", total, unit="answer") as progress:
        for temperature in temperatures:
            parts = []
            for asked, first in groups:
                requests, result = answer(decoder, asked, first, temperature, trace=True, advance=progress.advance)
                names = [one.prompt.prompt_set for one in asked]
                parts.append(record(result, requests.owners, names, decoder.stop_tokens))
            pairs.append((parts[1], parts[0]) if fit_on == "train" else parts[0].halves())
        progress.update(total)
    for fit, scored in pairs:
        if not len(fit.accepted) or not len(scored.accepted):
            raise InputError(
                f"{len(groups[0][0])} prompts gave {len(fit.accepted)} rounds to fit on and {len(scored.accepted)} to "
                "score; name more prompts in eval.prompts or raise eval.limit"
            )
    return pairs


def _warn_if_few(fit: Traces, fit_on: str) -> None:
    """Says that temperatures were fitted on too little to be more than chance."""
    rounds = len(fit.accepted)
    if rounds < FEW:
        files = "eval.prompts" if fit_on == "heldout" else "data.prompts"
        log(
            f"calibrate: WARNING: fitted on {rounds} rounds only, so the temperatures are mostly chance; "
            f"name more prompts in {files} or raise eval.limit, {FEW} rounds are the least to rely on"
        )


def sglang(calibration: Calibration, dataset: str) -> dict[str, Any]:
    """A calibration in the layout of SGLang's STS file, and the bias and its temperatures, which ours read instead."""
    return {
        "temperatures": calibration.temperatures,
        "bias": calibration.bias,
        "temperatures_with_bias": calibration.shifted_temperatures,
        "dataset": dataset,
        "num_samples": calibration.fitted_rounds,
        "ece_before": [one.ece for one in calibration.predictors[HEAD].prefix],
        "ece_after": [one.ece for one in calibration.predictors[CALIBRATED].prefix],
    }


def _main(temperatures: Sequence[float]) -> float:
    return PREFERRED if PREFERRED in temperatures else temperatures[0]


def _temperatures(given: Sequence[str | float]) -> list[float]:
    """Sampling temperatures as numbers, each once."""
    found: dict[float, None] = {}
    for one in given:
        try:
            value = float(one)
        except ValueError:
            raise InputError(f"--temperatures has {one!r}; give numbers, e.g. --temperatures=1.0,0.7,0.0") from None
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"--temperatures has {one}; temperatures are 0 or above")
        found[value] = None
    if not found:
        raise InputError("eval.temperatures is empty; give at least one, e.g. --temperatures=1.0")
    return list(found)


def _define(values: flags.FlagValues) -> None:
    command.define_checkpoint(values)
    flags.DEFINE_list(
        "temperatures", [], "Sampling temperatures, e.g. 1.0,0.7,0.0. Default: eval.temperatures.", flag_values=values
    )
    flags.DEFINE_enum(
        "fit_on",
        "heldout",
        ["heldout", "train"],
        "Fit on half of the held-out prompts and score on the other half, or fit on training prompts and score on all "
        "held-out ones.",
        flag_values=values,
    )


if __name__ == "__main__":
    command.run(calibrate, define=_define)
