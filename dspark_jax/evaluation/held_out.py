"""Accepted length on held-out prompts while a drafter is trained, with the parameters that it has at the moment."""

import contextlib
import dataclasses
import math
import os
from pathlib import Path

import numpy as np

from dspark_jax.benchmarks import by_domain
from dspark_jax.data.prompts import content_hashes
from dspark_jax.data.samples import Tally
from dspark_jax.data.thinking import Thinking
from dspark_jax.drafter.interface import Drafter
from dspark_jax.drafter.none import NO_DRAFTER
from dspark_jax.engine.models import Models
from dspark_jax.evaluation.acceptance import count_rounds, estimate, macro_average
from dspark_jax.evaluation.decoding import answer
from dspark_jax.evaluation.setup import open_decoder, read_questions, tell_left_out
from dspark_jax.evaluation.summary import Measured
from dspark_jax.run import Run
from dspark_jax.target.model import Target
from dspark_jax.training.best import HeldOut
from dspark_jax.training.integrity import digest

PREFIX = "heldout/"
"""Begins the names of what is measured in `metrics.jsonl` and TensorBoard."""


class HeldOutPrompts:
    """Prompts that a training run is measured on, and the target that verifies.

    Nothing of the run changes by it: random numbers are those of the prompts, and the target is the run's own.
    """

    def __init__(self, run: Run, target: Target):
        """Reads the prompts.

        Args:
          run: `train.evaluate_limit` and `train.evaluate_tokens` of its config bound what is decoded.
          target: the model.

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
        self.temperature = settings.temperatures[0]
        data = config.data
        how = [self.temperature, settings.limit, settings.max_new_tokens, settings.seed]
        how += [data.system_prompt, *Thinking.of(data).settings(), data.max_prompt_length]
        self.about = digest([content_hashes(settings.prompts, "eval.prompts"), how])

    def measure(self, drafter: Drafter) -> tuple[dict[str, float], HeldOut | None]:
        """Decodes the prompts with a drafter, under `jax.set_mesh`.

        Returns:
          A row of `metrics.jsonl`: tau, tau by prompt set, by domain of the paper's benchmarks and with and without
          thinking, where prompts are asked in both ways, and the acceptance of draft k given that all before it were
          accepted; what was not observed is left out. And what is noted in the checkpoint, if there is a tau.
        """
        decoder = dataclasses.replace(self.decoder, models=Models(self.decoder.models.target, drafter))
        requests, result = answer(decoder, self.asked, self.first, self.temperature)
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
