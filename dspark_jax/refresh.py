"""On-policy refresh: while it is trained, the drafter helps the target to answer the prompts that are still to come.

A run can then start as soon as the first part of its prompts is answered. Every `train.refresh_every` steps the target
answers the next part, with the drafter as it is at that moment in the decoding engine; the answers have the target's
own distribution whatever the drafter is worth. It drafts where that is expected to pay (`schedulers.adaptive`).

A part is written once, from beginning to end: which drafts are verified depends on what is decoded beside them, so the
part of a run that was killed meanwhile begins again, with the drafter of the checkpoint before it, and becomes the
same.
"""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from dspark_jax.answering import Effort, make_decoder
from dspark_jax.buckets.places import publish
from dspark_jax.config import Config, InputError
from dspark_jax.data.chat import load_tokenizer, stop_tokens
from dspark_jax.data.growth import GrowingBatches
from dspark_jax.data.parts import count_parts, part_folder, part_of
from dspark_jax.data.prompts import read_prompts
from dspark_jax.data.regenerate import Conversation, Limits, Rejected, conversations, regenerate
from dspark_jax.data.samples import Tally, answered_samples
from dspark_jax.data.sources import Sample, write_samples
from dspark_jax.data.thinking import Thinking
from dspark_jax.drafter.interface import Drafter
from dspark_jax.engine.models import Models
from dspark_jax.engine.placement import Load, beside_training
from dspark_jax.evaluation.run_scheduler import run_scheduler
from dspark_jax.json_file import read_ours, write_json
from dspark_jax.progress import Progress, log
from dspark_jax.run import Run
from dspark_jax.target.model import Target
from dspark_jax.training.host_memory import return_freed_memory

PREFIX = "refresh/"
"""Begins the names of what is measured in `metrics.jsonl` and TensorBoard."""


def check_refresh(config: Config) -> None:
    """Refuses it where it cannot be done, before data is prepared.

    Raises:
      InputError: several hosts train.
    """
    if config.train.refresh_every and jax.process_count() > 1:
        raise InputError(
            f"train.refresh_every={config.train.refresh_every}: the prompts are answered on one host; leave out "
            "--distributed, or set train.refresh_every=0"
        )


class Refresh:
    """The parts of a run's prompts that are answered while it is trained.

    Held-out prompts are no part of them.
    """

    def __init__(self, run: Run, target: Target, drafter: Drafter, data: GrowingBatches, *, held: int = 0):
        """Reads the prompts.

        Args:
          run: with prepared data.
          target: the model.
          drafter: that is trained, abstract.
          data: that grows.
          held: bytes of every device that the run needs for itself.

        Raises:
          InputError: a prompt file cannot be read, or `profile` has measured other rounds than those here.
        """
        self.config, self.workdir, self.target, self.data = run.config, run.workdir, target, data
        config = run.config
        load = Load(Models(target, drafter), config.data.decode_batch_size, config.data.max_length, held)
        self.mesh = beside_training(config.mesh.decode, load, run.mesh)
        self.parts, self.every = count_parts(config), config.train.refresh_every
        # Lines that are no prompts were set aside by `prepare`.
        self.prompts = read_prompts(
            config.data.prompts, config.data.limit, lambda malformed: None, reasoning=config.data.thinking != "off"
        )
        self.tokenizer = load_tokenizer(config.target.path)
        self.scheduler = run_scheduler("adaptive", drafter, run.workdir, slots=config.data.decode_batch_size)
        self.fingerprint = run.prepared_fingerprint
        reached = 1 + min((config.train.steps - 1) // self.every, self.parts - 1)
        if reached < self.parts:
            log(
                f"refresh: {config.train.steps} steps reach {reached} of {self.parts} parts of the prompts; lower "
                f"train.refresh_every={self.every} or train.refresh_parts={self.parts} to use all of them"
            )

    def due(self, step: int) -> bool:
        """Whether a part is to be added before optimizer step `step`, from 1 on."""
        return self.data.parts < 1 + min((step - 1) // self.every, self.parts - 1)

    def run(self, step: int, drafter: Drafter, check: Callable[[], None]) -> tuple[str, dict[str, float]]:
        """Adds the next part to the data, answered now or by this run before it was killed.

        Args:
          step: that comes next.
          drafter: as it is now.
          check: called after every answer; may raise to end the run.

        Returns:
          What is said of it, and its row of `metrics.jsonl`.
        """
        part = self.data.parts
        folder = part_folder(self.workdir, part)
        report = read_ours(folder / "report.json")
        if not report or report["fingerprint"] != self.fingerprint:
            report = self._answer(part, step, folder, drafter, check)
            return_freed_memory()
        self.data.add()
        found = report["refresh"]
        length = "-" if found["accepted_length"] is None else f"{found['accepted_length']:.2f}"
        line = (
            f"refresh {part} of {self.parts - 1} before step {step}: {found['answers']} answers, {found['tokens']} "
            f"tokens, accepted length {length} in {found['drafting_rounds']} of {found['rounds']} rounds, "
            f"{found['seconds']:.0f} s; {self.data.samples} samples from now on"
        )
        numbers = found | {"samples": self.data.samples}
        return line, {PREFIX + name: float(value) for name, value in numbers.items() if value is not None}

    def _answer(
        self, part: int, step: int, folder: Path, drafter: Drafter, check: Callable[[], None]
    ) -> dict[str, Any]:
        """Writes the folder of a part; returns its report."""
        partial = folder.with_name(f"{folder.name}.partial")
        for old in (folder, partial):  # of other data, or of a run that was killed
            if old.exists():
                shutil.rmtree(old)
        partial.mkdir(parents=True)
        began, effort = time.monotonic(), Effort()
        with contextlib.closing(Tally(partial / "rejected.jsonl")) as tally:
            samples = list(self._samples(part, drafter, effort, tally, check))
            if samples:
                write_samples(partial, samples)
            answers = effort.report() | {"seconds": time.monotonic() - began}
            about = {"fingerprint": self.fingerprint, "part": part, "step": step, "digest": _digest(samples)}
            report = write_json(partial / "report.json", {**about, "samples": 0, **tally.report(), "refresh": answers})
        os.replace(partial, folder)
        publish(folder)
        return report

    def _samples(
        self, part: int, drafter: Drafter, effort: Effort, tally: Tally, check: Callable[[], None]
    ) -> Iterator[Sample]:
        """The samples of a part, answered with `drafter`."""
        data, thinking = self.config.data, Thinking.of(self.config.data)
        prompts = part_of(self.prompts, part, self.parts)
        tally.read(prompts, thinking)
        todo = conversations(prompts, data.repeats, data.system_prompt, thinking, start=self.data.next_id)
        limits = Limits.of(data)

        def reject(conversation: Conversation, error: Rejected) -> None:
            tally.reject(conversation.sample_id, conversation.prompt, error)

        turns = sum(len(conversation.questions) for conversation in todo)
        with Progress(f"refresh {part}", turns, unit="answer") as progress:

            def advance(turns: int) -> None:
                progress.advance(turns)
                check()

            models = Models(self.target, drafter).decoding_on(self.mesh, batch_size=data.decode_batch_size)
            decode = make_decoder(self.config, models, self.mesh, self.scheduler, effort)
            stops = stop_tokens(self.config.target.path, self.tokenizer)
            answered = regenerate(self.tokenizer, todo, decode, stops, limits, None, reject, advance)
        yield from answered_samples(self.tokenizer, answered, data, tally)


def _digest(samples: Sequence[Sample]) -> str:
    """Hash of what is trained of them."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(b"%d %d " % (sample.sample_id, len(sample.tokens)))
        digest.update(sample.tokens.tobytes() + sample.loss_mask.tobytes())
    return digest.hexdigest()[:32]
