"""Accepted length on held-out prompts while a drafter is trained, with the parameters that it has at the moment."""

import contextlib
import dataclasses
import math
import os
from pathlib import Path

import jax
import numpy as np

from dspark_jax.benchmarks import by_domain
from dspark_jax.config import InputError
from dspark_jax.data.prompts import content_hashes
from dspark_jax.data.samples import Tally
from dspark_jax.data.thinking import Thinking
from dspark_jax.drafter.interface import Drafter
from dspark_jax.drafter.none import NO_DRAFTER
from dspark_jax.engine.models import Models
from dspark_jax.engine.placement import beside_training, evaluation_load
from dspark_jax.evaluation.acceptance import count_rounds, estimate, macro_average
from dspark_jax.evaluation.decoding import answer
from dspark_jax.evaluation.setup import open_decoder, read_questions, tell_left_out
from dspark_jax.evaluation.summary import Measured
from dspark_jax.run import Run
from dspark_jax.target.interface import LanguageModel
from dspark_jax.training.best import HeldOut
from dspark_jax.training.integrity import digest

PREFIX = "heldout/"
"""Begins the names of what is measured in `metrics.jsonl` and TensorBoard."""


def check_held_out(run: Run) -> None:
    """Refuses, before anything is prepared, to measure with a target that cannot decode where the run trains.

    Raises:
      InputError: PyTorch runs the target, and the mesh has several devices.
    """
    config = run.config
    if config.train.evaluate_every and config.target.architecture.unsupported and run.mesh.size > 1:
        raise InputError(
            f"train.evaluate_every={config.train.evaluate_every}: a {config.target.architecture.unsupported} is run by "
            f"PyTorch, which decodes on one device, and {run.mesh.size} train; set train.evaluate_every=0 and evaluate "
            "afterwards"
        )


class HeldOutPrompts:
    """Prompts that a training run is measured on, and the target that verifies.

    Nothing of the run changes by it: random numbers are those of the prompts, and the target is the run's own.
    """

    def __init__(self, run: Run, target: LanguageModel, *, held: int = 0):
        """Reads the prompts.

        Args:
          run: `train.evaluate_limit` and `train.evaluate_tokens` of its config bound what is decoded.
          target: the model.
          held: bytes of every device that the run needs for itself.

        Raises:
          InputError: a prompt file cannot be read, or none of its prompts can be asked.
        """
        config = run.config
        settings = dataclasses.replace(
            config.eval,
            limit=config.train.evaluate_limit,
            max_new_tokens=min(config.train.evaluate_tokens, config.eval.max_new_tokens),
        )
        config = dataclasses.replace(config, eval=settings)
        run = dataclasses.replace(run, config=config)
        self.decoder = open_decoder(run, target=target, drafter=NO_DRAFTER)
        with contextlib.closing(Tally(Path(os.devnull))) as tally:
            self.asked, self.first = read_questions(config, self.decoder, tally, settings.prompts, settings.limit)
        tell_left_out("held-out prompts", tally)
        self.mesh = run.mesh
        if run.mesh.size > 1:
            load = dataclasses.replace(evaluation_load(config), held=held)
            self.mesh = beside_training(config.mesh.decode, load, run.mesh)
        self.temperature = settings.temperatures[0]
        data = config.data
        how = [self.temperature, settings.limit, settings.max_new_tokens, settings.seed]
        how += [data.system_prompt, *Thinking.of(data).settings(), data.max_prompt_length]
        self.about = digest([content_hashes(settings.prompts, "eval.prompts"), how])

    def measure(self, drafter: Drafter) -> tuple[dict[str, float], HeldOut | None]:
        """Decodes the prompts with a drafter.

        The models are moved to where they decode for as long as it takes, where that is not as they train.

        Returns:
          A row of `metrics.jsonl`: tau, tau by prompt set, by domain of the paper's benchmarks and with and without
          thinking, where prompts are asked in both ways, and the acceptance of draft k given that all before it were
          accepted; what was not observed is left out. And what is noted in the checkpoint, if there is a tau.
        """
        models = Models(self.decoder.models.target, drafter).decoding_on(self.mesh, batch_size=self.decoder.batch_size)
        with jax.set_mesh(self.mesh):
            decoder = dataclasses.replace(self.decoder, models=models)
            requests, result = answer(decoder, self.asked, self.first, self.temperature)
        del models, decoder
        counts = count_rounds(result).grouped(requests.owners, len(self.asked))
        measured = Measured(self.temperature, self.asked, requests, result, counts, None, None)
        sets = measured.acceptance(0, 0)
        tau, _ = macro_average(list(sets.values()))
        row = {"tau": tau} | {f"tau/{name}": one.tau for name, one in sets.items()}
        together = estimate(counts, 0, np.random.default_rng(0))
        row |= {f"domain/{name}": macro_average(members)[0] for name, members in by_domain(sets).items()}
        ways = measured.by_way(0, 0).items()
        row |= {f"tau/{name.replace(' ', '_')}": macro_average(members)[0] for name, members in ways}
        row |= {f"conditional@{k}": float(rate) for k, rate in enumerate(together.conditional, start=1)}
        row = {PREFIX + name: value for name, value in row.items() if math.isfinite(value)}
        return row, HeldOut(tau, self.about) if math.isfinite(tau) else None
